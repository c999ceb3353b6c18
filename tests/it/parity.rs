//! The embedded model against transformers: every number of the golden files in `tests/golden`, which `tests/golden/make.py` wrote.
//!
//! Ids, positions, grids and greedy tokens are equal; pixels within 1e-5; features and logits within 1e-4 of the tensor's largest
//! value; the loss, every gradient by name, and ten AdamW steps within the roundings of f32 in another order of summation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use foveate::chat::{Chat, Message, Part};
use foveate::geometry::{Grid, View};
use foveate::image::{Processor, decode, patches, show};
use foveate::model::trace::{Greedy, trace};
use foveate::model::{Arena, Gradients, Head, Keep, Packed, Slopes, Target, Trainable, Vlm, lora};
use foveate_kernels::adamw;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The tensors of one `expected.safetensors`.
struct Expected {
    reals: BTreeMap<String, Vec<f32>>,
    wholes: BTreeMap<String, Vec<i64>>,
    bytes: BTreeMap<String, Vec<u8>>,
}

impl Expected {
    fn load(path: &Path) -> Expected {
        let file = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut expected = Expected { reals: BTreeMap::new(), wholes: BTreeMap::new(), bytes: BTreeMap::new() };
        for (name, tensor) in SafeTensors::deserialize(&file).unwrap().tensors() {
            let data = tensor.data();
            match tensor.dtype() {
                Dtype::F32 => {
                    let values = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                    expected.reals.insert(name, values);
                }
                Dtype::I64 => {
                    let values = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
                    expected.wholes.insert(name, values);
                }
                Dtype::U8 => {
                    expected.bytes.insert(name, data.to_vec());
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        expected
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.wholes[name].iter().map(|&id| id as u32).collect()
    }

    /// `[P, 3·2·14·14]`, from the byte and the table of its channel.
    fn pixels(&self) -> Vec<f32> {
        const CHANNEL: usize = 2 * 14 * 14;
        let table = &self.reals["pixel_table"];
        let index = self.bytes["pixel_index"].iter().enumerate();
        index.map(|(i, &b)| table[i / CHANNEL % 3 * 256 + usize::from(b)]).collect()
    }
}

/// One golden case, gone through our own path from files to model inputs.
struct Case {
    chat: Chat,
    model: Vlm,
    messages: Vec<Message>,
    grids: Vec<Grid>,
    tokens: Vec<usize>,
    pixels: Vec<f32>,
    expected: Expected,
}

impl Case {
    fn load(name: &'static str) -> Case {
        let dir = golden().join(name);
        let processor = Processor::load(&dir).unwrap();
        let messages: Vec<Message> =
            serde_json::from_str(&std::fs::read_to_string(dir.join("messages.json")).unwrap()).unwrap();
        let (mut grids, mut tokens, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
        for part in messages.iter().flat_map(Message::parts) {
            let Part::Image { image } = part else {
                continue;
            };
            let picture = decode(&dir.join(image.unwrap())).unwrap();
            let view = View::whole(grids.len(), picture.size(), processor.budget).unwrap();
            let cut = patches(&show(&picture, &view).unwrap(), &processor).unwrap();
            grids.push(cut.grid);
            tokens.push(processor.tokens(view.size));
            pixels.extend(cut.data);
        }
        let expected = Expected::load(&dir.join("expected.safetensors"));
        Case {
            chat: Chat::load(&dir).unwrap(),
            model: Vlm::load(&dir).unwrap(),
            messages,
            grids,
            tokens,
            pixels,
            expected,
        }
    }

    fn ids(&self) -> Vec<u32> {
        self.chat.encode(&self.messages, false, &self.tokens).unwrap().ids
    }

    /// The whole conversation, its log-probs wanted where the golden labels train; and each target's share of the mean loss.
    fn packed(&self) -> (Packed, Vec<f32>) {
        let mut packed = Packed::single(&self.ids(), &self.grids, self.pixels.clone(), &self.model.config).unwrap();
        let labels = self.expected.wholes["labels"].iter().enumerate();
        packed.targets =
            labels.filter(|(_, l)| **l >= 0).map(|(t, l)| Target { row: t - 1, token: *l as u32 }).collect();
        let weights = vec![-1.0 / packed.targets.len() as f32; packed.targets.len()];
        (packed, weights)
    }

    /// Mean loss and its gradient by everything.
    fn loss_and_gradients(&self, packed: &Packed, weights: &[f32], keep: Keep) -> (f32, Gradients) {
        let scored = self.model.evaluate(packed, Head::PLAIN, keep, Trainable::ALL).unwrap();
        let loss = scored.logprobs.iter().zip(weights).map(|(l, w)| l * w).sum();
        let mut grads = Arena::zeros(self.model.weights.layout());
        self.model.backward(packed, scored.tape.unwrap(), &Slopes::of(weights), Trainable::ALL, &mut grads).unwrap();
        (loss, grads)
    }
}

/// +1 or -1 by a hash of the index, as in make.py.
fn sign(i: usize) -> f64 {
    1.0 - 2.0 * f64::from((i as u32).wrapping_mul(2_654_435_761) >> 16 & 1)
}

/// Norm, signed sum, and up to 64 entries spread evenly: `fingerprint` of make.py.
fn fingerprint(x: &[f32]) -> Vec<f32> {
    let norm = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let signed = x.iter().enumerate().map(|(i, v)| sign(i) * f64::from(*v)).sum::<f64>();
    let count = x.len().min(64);
    let spread = (0..count).map(|k| x[k * x.len() / count]);
    [norm as f32, signed as f32].into_iter().chain(spread).collect()
}

/// Largest difference over the largest expected value.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let far = found
        .iter()
        .zip(expected)
        .fold(0.0f32, |m, (a, b)| if (a - b).is_nan() { f32::INFINITY } else { m.max((a - b).abs()) });
    far / scale.max(f32::MIN_POSITIVE)
}

fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let far = relative(found, expected);
    println!("{what}: {far:.1e}");
    assert!(far <= tolerance, "{what}: {far:e} over {tolerance:e}");
}

fn inputs_and_outputs(name: &'static str) {
    let case = Case::load(name);
    let e = &case.expected;
    let ids = case.ids();
    assert_eq!(ids, e.ids("input_ids"), "{name}: input_ids");
    let grids: Vec<i64> = case.grids.iter().flat_map(|g| [g.t, g.h, g.w]).map(i64::from).collect();
    assert_eq!(grids, e.wholes["image_grid_thw"], "{name}: image_grid_thw");
    let t = trace(&case.model, &ids, &case.grids, case.pixels.clone(), None).unwrap();
    let pixels = e.pixels();
    assert_eq!(t.pixel_values.len(), pixels.len(), "{name}: pixel_values");
    let far = t.pixel_values.iter().zip(&pixels).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    println!("{name}: pixel_values {far:.1e}");
    assert!(far <= 1e-5, "{name}: pixel_values {far}");

    let positions: Vec<i64> = t.position_ids.iter().flatten().map(|p| i64::from(*p)).collect();
    assert_eq!(positions, e.wholes["position_ids"], "{name}: position_ids");
    let v = case.model.config.text.vocab;
    let rows = t.logits.chunks_exact(v);
    let lse: Vec<f32> = rows
        .clone()
        .map(|row| {
            let top = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
            top + row.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln() as f32
        })
        .collect();
    let signed: Vec<f32> =
        rows.map(|row| row.iter().enumerate().map(|(i, x)| sign(i) * f64::from(*x)).sum::<f64>() as f32).collect();
    // f32 sums of a few dozen terms through three or four layers: 1e-6 to 1e-5 of the largest value, with room.
    close(&format!("{name}: image_features"), &t.image_features, &e.reals["image_features"], 1e-4);
    close(&format!("{name}: logits, last rows"), &t.logits[t.logits.len() - 8 * v..], &e.reals["logits_last"], 1e-4);
    close(&format!("{name}: logits, log-sum-exp"), &lse, &e.reals["logits_lse"], 1e-4);
    close(&format!("{name}: logits, signed sums"), &signed, &e.reals["logits_signed"], 1e-4);
    close(&format!("{name}: logprobs"), &t.logprobs, &e.reals["logprobs"], 1e-4);

    // The last turn is left out and decoded anew.
    let asked = &case.messages[..case.messages.len() - 1];
    let prompt = case.chat.encode(asked, true, &case.tokens).unwrap().ids;
    assert_eq!(prompt, e.ids("prompt_ids"), "{name}: prompt_ids");
    let greedy = Greedy { tokens: 12, stop: &[] };
    let t = trace(&case.model, &prompt, &case.grids, case.pixels.clone(), Some(greedy)).unwrap();
    assert_eq!(t.greedy_ids.unwrap(), e.ids("greedy_ids"), "{name}: greedy_ids");
}

fn loss_gradients_and_ten_steps(name: &'static str) {
    let mut case = Case::load(name);
    let (packed, weights) = case.packed();
    let (loss, grads) = case.loss_and_gradients(&packed, &weights, Keep::Everything);
    close(&format!("{name}: loss"), &[loss], &case.expected.reals["loss"], 1e-5);

    let mut worst = (0.0, String::new());
    let mut compared = 0;
    for entry in &grads.layout.entries {
        let expected = &case.expected.reals[&format!("grad.{}", entry.name)];
        let found = fingerprint(&grads.data[entry.range.clone()]);
        assert_eq!(found.len(), expected.len(), "{name}: {}", entry.name);
        // The norm is the scale: single entries and the signed sum may be near 0. The signed sum of n entries is off by about as much as the
        // norm is (errors of random sign), so one tolerance serves; backward passes lose about ten times what forward passes do.
        let scale = expected[0];
        assert!(scale > 0.0, "{name}: {} has no gradient in the golden file", entry.name);
        let far = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / scale;
        assert!(
            far <= 1e-4,
            "{name}: gradient of {}: {far:e} of its norm {scale}; found {:?}, expected {:?}",
            entry.name,
            &found[..4],
            &expected[..4]
        );
        if far > worst.0 {
            worst = (far, entry.name.clone());
        }
        compared += 1;
    }
    assert_eq!(
        compared,
        case.expected.reals.keys().filter(|k| k.starts_with("grad.")).count(),
        "{name}: gradients by name"
    );
    // Recomputing activations repeats the same operations: the same bits.
    let (again, recomputed) = case.loss_and_gradients(&packed, &weights, Keep::Inputs);
    assert_eq!(again.to_bits(), loss.to_bits(), "{name}: loss with recomputation");
    assert!(recomputed.data == grads.data, "{name}: gradients with recomputation");
    println!("{name}: {compared} gradients, worst {:.1e} ({})", worst.0, worst.1);

    let n = case.model.weights.layout().len;
    let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
    let mut losses = Vec::new();
    for step in 1..=10 {
        let (loss, grads) = case.loss_and_gradients(&packed, &weights, Keep::Everything);
        losses.push(loss);
        let hyper = adamw::Hyper { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
        adamw::update(&mut case.model.weights.arena_mut().unwrap().data, &grads.data, &mut m, &mut v, hyper, 1.0);
    }
    // Adam divides by the gradient's own size, so an entry whose true gradient is nearly 0 takes a step of full length in a direction that
    // rounding decides: losses drift apart faster than gradients do.
    close(&format!("{name}: ten losses"), &losses, &case.expected.reals["losses"], 1e-3);
}

macro_rules! cases {
    ($($name:ident),*) => {$(
        mod $name {
            #[test]
            fn inputs_and_outputs() {
                super::inputs_and_outputs(stringify!($name));
            }
            #[test]
            fn loss_gradients_and_ten_steps() {
                super::loss_gradients_and_ten_steps(stringify!($name));
            }
        }
    )*};
}
cases!(gqa_tied, mha_untied, two_images, three_turns);

/// An adapter that PEFT made, on the language model, the tower and the merger, with ranks and alphas of single modules.
#[test]
fn adapters_are_those_of_peft() {
    let dir = golden().join("lora");
    let expected = Expected::load(&dir.join("expected.safetensors"));
    let mut case = Case::load("gqa_tied");
    case.model = lora::read(&dir).unwrap();
    let (packed, weights) = case.packed();
    let layout = case.model.weights.layout().clone();
    let train = Trainable::of_adapters(&layout);
    let ids = case.ids();
    for model in [&case.model, &Vlm::load(&dir).unwrap()] {
        let t = trace(model, &ids, &case.grids, case.pixels.clone(), None).unwrap();
        close("adapter: logprobs", &t.logprobs, &expected.reals["logprobs"], 1e-4);
    }

    let mut losses = Vec::new();
    let (mut m, mut v) = (vec![0.0; layout.len], vec![0.0; layout.len]);
    let adapter = layout.entries.iter().find(|e| e.adapter).unwrap().range.start..layout.len;
    for step in 1..=10 {
        let scored = case.model.evaluate(&packed, Head::PLAIN, Keep::Everything, train).unwrap();
        losses.push(scored.logprobs.iter().zip(&weights).map(|(l, w)| l * w).sum::<f32>());
        let mut grads = Arena::zeros(&layout);
        case.model.backward(&packed, scored.tape.unwrap(), &Slopes::of(&weights), train, &mut grads).unwrap();
        if step == 1 {
            close("adapter: loss", &losses, &expected.reals["loss"], 1e-5);
            let ours = layout.entries.iter().filter(|e| e.adapter);
            for entry in ours.clone() {
                let theirs = &expected.reals[&format!("grad.{}", entry.name)];
                let found = fingerprint(&grads.data[entry.range.clone()]);
                let far = found.iter().zip(theirs).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / theirs[0];
                assert!(theirs[0] > 0.0 && far <= 1e-4, "gradient of {}: {far:e} of its norm", entry.name);
            }
            assert_eq!(ours.count(), expected.reals.keys().filter(|k| k.starts_with("grad.")).count());
        }
        let hyper = adamw::Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
        let [m, v] = [&mut m, &mut v].map(|moments| &mut moments[adapter.clone()]);
        let data = &mut case.model.weights.arena_mut().unwrap().data[adapter.clone()];
        adamw::update(data, &grads.data[adapter.clone()], m, v, hyper, 1.0);
    }
    // As above: rounding decides where a gradient is nearly 0.
    close("adapter: ten losses", &losses, &expected.reals["losses"], 1e-3);
}

/// Turns appended one by one, as the rollout does it, give the ids of transformers' one encoding.
#[test]
fn appended_turns_are_the_same_tokens() {
    let case = Case::load("three_turns");
    let mut images = 0;
    let mut ids = Vec::new();
    for pair in case.messages.chunks(2) {
        let [user, answer] = pair else { panic!("turns come in pairs") };
        let tokens = &case.tokens[images..images + user.images()];
        if ids.is_empty() {
            ids = case.chat.encode(std::slice::from_ref(user), true, tokens).unwrap().ids;
        } else {
            ids.extend(case.chat.continuation(images, user, tokens, ids.last().copied()).unwrap().ids);
        }
        images += user.images();
        let [Part::Text { text }] = &answer.parts()[..] else { panic!("an answer is text") };
        ids.extend(case.chat.assistant_ids(text).unwrap());
        ids.push(case.chat.special.end_of_turn);
    }
    let whole = case.expected.ids("input_ids");
    assert_eq!(ids, whole[..whole.len() - 1]); // all but the newline after the last turn
}

#[derive(serde::Deserialize)]
struct Tokens {
    texts: Vec<TextCase>,
    rendered: Vec<RenderCase>,
}

#[derive(serde::Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
    decoded: String,
    plain: String,
}

#[derive(serde::Deserialize)]
struct RenderCase {
    messages: Vec<Message>,
    prompt: bool,
    numbered: bool,
    text: String,
}

#[test]
fn nano_tokenizer_and_template() {
    let file = std::fs::read_to_string(golden().join("tokens.json")).unwrap();
    let tokens: Tokens = serde_json::from_str(&file).unwrap();
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nano");
    let mut chat = Chat::load(&nano).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(nano.join("tokenizer.json")).unwrap();
    for case in tokens.texts {
        assert_eq!(tokenizer.encode(case.text.as_str(), false).unwrap().get_ids(), case.ids, "{:?}", case.text);
        assert_eq!(chat.decode(&case.ids, false).unwrap(), case.decoded);
        assert_eq!(chat.decode(&case.ids, true).unwrap(), case.plain);
        let hostile = case.text.contains("<|") || case.text.contains("tool_call");
        assert_eq!(chat.plain_ids(&case.text).unwrap() == case.ids, !hostile, "{:?}", case.text);
    }
    for case in tokens.rendered {
        chat.add_vision_id = case.numbered;
        assert_eq!(chat.render(&case.messages, case.prompt).unwrap(), case.text);
    }
}
