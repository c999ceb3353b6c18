//! The whole model against itself: gradients against differences, and every way to compute one thing against the others.

use foveate_kernels::attention::Span;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::generate::{Cache, Extension};
use super::*;

/// Two vision blocks (one windowed, windows of 2 × 2 tokens), two layers, grouped queries. Norms and biases are moved
/// off 1 and 0 so that they tell.
fn tiny() -> Vlm {
    let mut config = presets::nano(60);
    config.vision = config::VisionConfig {
        depth: 2,
        hidden: 32,
        heads: 2,
        mlp: 40,
        window: 56,
        full_blocks: vec![1],
        out_hidden: 32,
        patch: 2,
        ..config.vision
    };
    config.vision.window = 8;
    config.text = config::TextConfig {
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        mlp: 48,
        sections: [1, 1, 2],
        ..config.text
    };
    let mut model = presets::initialise(config, 3);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for x in &mut model.weights.arena_mut().unwrap().data {
        *x = *x * 1.5 + 0.1 * (rng.random::<f32>() - 0.5);
    }
    model
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

const WIDE: Grid = Grid { t: 1, h: 4, w: 6 }; // 6 tokens: a whole window and a cut one
const TALL: Grid = Grid { t: 1, h: 6, w: 2 }; // 3 tokens

fn patches(config: &Config, grid: Grid, seed: u64) -> Vec<f32> {
    noise((grid.h * grid.w) as usize * config.vision.patch_values(), seed)
}

fn image(config: &Config, tokens: usize) -> Vec<u32> {
    let mut ids = vec![config.ids.vision_start];
    ids.extend(vec![config.ids.image_pad; tokens]);
    ids.push(config.ids.vision_end);
    ids
}

/// Two images in one conversation.
fn conversation(config: &Config) -> Packed {
    let ids = [&[3, 4, 5][..], &image(config, 6), &[6, 7, 8], &image(config, 3), &[9, 10]].concat();
    let both = [patches(config, WIDE, 1), patches(config, TALL, 2)].concat();
    Packed::single(&ids, &[WIDE, TALL], both, config).unwrap().every_next_token()
}

fn head(config: &Config) -> (f32, Vec<u32>) {
    (0.7, config.vision_ids().to_vec())
}

/// Targets that can be sampled: placeholders are banned and never trained.
fn sampled(mut packed: Packed, banned: &[u32]) -> Packed {
    packed.targets.retain(|t| !banned.contains(&t.token));
    packed
}

/// Central differences of the weighted sum of log-probs and entropies.
///
/// The sum is of order 10, so f32 rounding through some forty operations leaves about 1e-5 in it, and the step of 1e-2
/// divides that to 5e-4; the third derivative adds step²/6 of itself (3 % of the slope at twice the step, so under 1 %). Directions are random over a whole tensor, of
/// length 1, and the tolerance of 4e-3 plus 2 % leaves a margin, while a missing term would be off by all of it.
#[test]
fn gradient_of_everything_agrees_with_differences() {
    let model = tiny();
    let (temperature, banned) = head(&model.config);
    let head = Head { temperature, banned: &banned };
    let packed = sampled(conversation(&model.config), &banned);
    let n = packed.targets.len();
    let (weights, entropy_weights) = (noise(n, 5), noise(n, 6));
    let value = |m: &Vlm| {
        let e = m.evaluate(&packed, head, Keep::Nothing, Trainable::ALL).unwrap();
        let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
        sum(&e.logprobs, &weights) + sum(&e.entropies, &entropy_weights)
    };
    let e = model.evaluate(&packed, head, Keep::Everything, Trainable::ALL).unwrap();
    let mut grads = Gradients::zeros(model.weights.layout());
    model
        .backward(
            &packed,
            e.tape.unwrap(),
            &Slopes { logprobs: &weights, entropies: Some(&entropy_weights), ..Slopes::default() },
            Trainable::ALL,
            &mut grads,
        )
        .unwrap();

    let step = 1e-2f32;
    for (i, entry) in model.weights.layout().entries.iter().enumerate() {
        let mut direction = noise(entry.range.len(), 100 + i as u64);
        let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
        direction.iter_mut().for_each(|x| *x /= length);
        let moved = |by: f32| {
            let mut m = model.clone();
            m.weights.arena_mut().unwrap().data[entry.range.clone()]
                .iter_mut()
                .zip(&direction)
                .for_each(|(w, d)| *w += by * d);
            value(&m)
        };
        let differences = (moved(step) - moved(-step)) / (2.0 * step as f64);
        let gradient = &grads.data[entry.range.clone()];
        let ours: f64 = gradient.iter().zip(&direction).map(|(g, d)| *g as f64 * *d as f64).sum();
        let off = (ours - differences).abs();
        assert!(off < 4e-3 + 0.02 * differences.abs(), "{}: {ours} against {differences}", entry.name);
    }
}

/// Adapters on every map: as above by differences, the model's own weights get nothing, and merging them gives the same log-probs.
#[test]
fn gradient_of_adapters_agrees_with_differences() {
    let mut model = tiny();
    let options = lora::Options { rank: 3, alpha: 4.5, targets: vec!["*".into()] };
    let modules = options.modules(model.weights.layout(), Trainable::ALL).unwrap();
    let plain = model.clone();
    model.adapt(&modules, 8).unwrap();
    let packed = conversation(&model.config);
    let logprobs = |m: &Vlm| m.evaluate(&packed, Head::PLAIN, Keep::Nothing, Trainable::ALL).unwrap().logprobs;
    assert_eq!(logprobs(&model), logprobs(&plain), "a fresh adapter changes no bit");
    let layout = model.weights.layout().clone();
    for (i, entry) in layout.entries.iter().enumerate().filter(|(_, entry)| entry.adapter) {
        let values = noise(entry.range.len(), 300 + i as u64);
        let data = &mut model.weights.arena_mut().unwrap().data[entry.range.clone()];
        data.iter_mut().zip(values).for_each(|(w, x)| *w += 0.2 * x);
    }
    let train = Trainable::of_adapters(&layout);
    assert!(train.tower() && train.text && !train.embeddings);
    let weights = noise(packed.targets.len(), 5);
    let gradient = |keep| {
        let e = model.evaluate(&packed, Head::PLAIN, keep, train).unwrap();
        let mut grads = Gradients::zeros(&layout);
        model.backward(&packed, e.tape.unwrap(), &Slopes::of(&weights), train, &mut grads).unwrap();
        grads.data
    };
    let grads = gradient(Keep::Everything);
    assert_eq!(grads, gradient(Keep::Inputs));
    assert_eq!(grads, gradient(Keep::Attended));
    let value = |m: &Vlm| logprobs(m).iter().zip(&weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let step = 1e-2f32;
    for (i, entry) in layout.entries.iter().enumerate() {
        let gradient = &grads[entry.range.clone()];
        if !entry.adapter {
            assert!(gradient.iter().all(|g| *g == 0.0), "{}", entry.name);
            continue;
        }
        let mut direction = noise(entry.range.len(), 100 + i as u64);
        let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
        direction.iter_mut().for_each(|x| *x /= length);
        let moved = |by: f32| {
            let mut m = model.clone();
            let data = &mut m.weights.arena_mut().unwrap().data[entry.range.clone()];
            data.iter_mut().zip(&direction).for_each(|(w, d)| *w += by * d);
            value(&m)
        };
        let differences = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        let ours: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let off = (ours - differences).abs();
        assert!(off < 4e-3 + 0.02 * differences.abs(), "{}: {ours} against {differences}", entry.name);
    }
    let merged = model.clone().merged().unwrap();
    // Products in another order of additions.
    assert!(logprobs(&model).iter().zip(logprobs(&merged)).all(|(a, b)| (a - b).abs() < 1e-4));
    assert!(logprobs(&model).iter().zip(logprobs(&plain)).any(|(a, b)| (a - b).abs() > 1e-2));
}

/// What is asked before the second block has the gradient of a model that ends there; its final norm alone stays as it is.
#[test]
fn words_asked_early_have_the_gradient_of_a_shorter_model() {
    let model = tiny();
    let mut config = model.config.clone();
    config.text.layers = 1;
    let mut short = presets::initialise(config, 3);
    for entry in short.weights.layout().clone().entries.iter() {
        let same = model.weights.layout().entries.iter().find(|e| e.name == entry.name).unwrap();
        short.weights.arena_mut().unwrap().data[entry.range.clone()]
            .copy_from_slice(&model.weights.arena().unwrap().data[same.range.clone()]);
    }
    let asked: Vec<Target> = [(4, 7), (6, 9), (14, 3)].map(|(row, token)| Target { row, token }).into();
    let gradient = |model: &Vlm, targets: Vec<Target>, slopes: &Slopes| {
        let packed = Packed { targets, ..conversation(&model.config) };
        let e = model.evaluate(&packed, Head::PLAIN, Keep::Everything, Trainable::ALL).unwrap();
        let mut grads = Gradients::zeros(model.weights.layout());
        model.backward(&packed, e.tape.unwrap(), slopes, Trainable::ALL, &mut grads).unwrap();
        grads
    };
    let said = std::cell::Cell::new(0.0);
    let early = Early { block: 1, asked: &asked, slope: 0.5, said: &said };
    let last = Target { row: 15, token: 3 };
    let ours = gradient(&model, vec![last], &Slopes { early: &[early], ..Slopes::of(&[0.0]) });
    let expected = gradient(&short, asked.clone(), &Slopes::of(&[0.5; 3]));
    for entry in short.weights.layout().entries.iter().filter(|e| e.name != "model.norm.weight") {
        let same = ours.layout.entries.iter().find(|e| e.name == entry.name).unwrap();
        let (a, b) = (&ours.data[same.range.clone()], &expected.data[entry.range.clone()]);
        let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        // The same operations but for the order of sums over rows.
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * largest.max(1e-3)), "{}", entry.name);
    }
}

#[test]
fn computing_layers_again_changes_no_bit() {
    let model = tiny();
    let packed = conversation(&model.config);
    let weights = noise(packed.targets.len(), 5);
    let gradient = |keep| {
        let e = model.evaluate(&packed, Head::PLAIN, keep, Trainable::ALL).unwrap();
        let mut grads = Gradients::zeros(model.weights.layout());
        model.backward(&packed, e.tape.unwrap(), &Slopes::of(&weights), Trainable::ALL, &mut grads).unwrap();
        (e.logprobs, grads.data)
    };
    let kept = gradient(Keep::Everything);
    assert!(kept.1.iter().any(|g| *g != 0.0));
    assert_eq!(kept, gradient(Keep::Attended));
    assert_eq!(kept, gradient(Keep::Inputs));
}

/// Frozen groups stay at 0, the trained ones get the same bits as when everything is trained.
#[test]
fn frozen_groups_get_nothing_and_change_nothing() {
    let model = tiny();
    let packed = conversation(&model.config);
    let weights = noise(packed.targets.len(), 5);
    let gradient = |train: Trainable| {
        let e = model.evaluate(&packed, Head::PLAIN, Keep::Everything, train).unwrap();
        let mut grads = Gradients::zeros(model.weights.layout());
        model.backward(&packed, e.tape.unwrap(), &Slopes::of(&weights), train, &mut grads).unwrap();
        grads
    };
    let all = gradient(Trainable::ALL);
    for group in [Group::Vision, Group::Merger, Group::Embeddings, Group::Text] {
        let train = Trainable {
            vision: group == Group::Vision,
            merger: group == Group::Merger,
            embeddings: group == Group::Embeddings,
            text: group == Group::Text,
            adapters: false,
        };
        let some = gradient(train);
        for entry in &model.weights.layout().entries {
            let (some, all) = (&some.data[entry.range.clone()], &all.data[entry.range.clone()]);
            if entry.group == group {
                assert_eq!(some, all, "{}", entry.name);
            } else {
                assert!(some.iter().all(|g| *g == 0.0), "{}", entry.name);
            }
        }
    }
}

#[test]
fn two_images_together_are_each_alone() {
    let model = tiny();
    let (a, b) = (patches(&model.config, WIDE, 1), patches(&model.config, TALL, 2));
    let together = model.encode(&[&a[..], &b].concat(), &[WIDE, TALL]).unwrap();
    let alone = [model.encode(&a, &[WIDE]).unwrap(), model.encode(&b, &[TALL]).unwrap()].concat();
    assert_eq!(together, alone);

    // Ready features in place of patches are the same, too.
    let packed = conversation(&model.config);
    let mut ready = packed.clone();
    ready.images[0].features = Some(Arc::new(together[..6 * 32].to_vec()));
    ready.patches = b;
    assert_eq!(model.hidden(&ready).unwrap(), model.hidden(&packed).unwrap());
}

/// A prompt with an image shared by two members, one of them with a second image in a second turn: packed once with a
/// shared prefix, and grown token by token in the cache. Every hidden state that both compute has the same bits.
#[test]
fn sampling_with_the_cache_is_the_packed_pass() {
    let model = tiny();
    let config = &model.config;
    let d = config.text.hidden;
    let prompt = [&[3, 4, 5][..], &image(config, 6), &[6]].concat();
    let turns: [(&[u32], Vec<u32>, &[u32]); 2] =
        [(&[11, 12, 13], [&[2][..], &image(config, 3), &[7, 8]].concat(), &[14, 15]), (&[16, 17], vec![], &[])];
    let seen = [patches(config, WIDE, 1), patches(config, TALL, 2)];
    let start = positions(&prompt, &[WIDE], config).unwrap();

    // Packed.
    let n = prompt.len();
    let mut packed = Packed::single(&prompt, &[WIDE], seen.concat(), config).unwrap();
    for (first, middle, last) in &turns {
        let own = [first, &middle[..], last].concat();
        let grids: &[Grid] = if middle.is_empty() { &[] } else { &[TALL] };
        let at = positions_from(start.next, &own, grids, config).unwrap();
        let rows = packed.ids.len()..packed.ids.len() + own.len();
        packed.spans.push(Span { queries: rows.clone(), shared: 0..n, own: rows.clone(), causal: true });
        if let Some(pad) = own.iter().position(|id| *id == config.ids.image_pad) {
            packed.images.push(PackedImage { first_row: rows.start + pad, grid: TALL, features: None });
        }
        packed.ids.extend(&own);
        for axis in 0..3 {
            packed.positions[axis].extend(&at.axes[axis]);
        }
    }
    let full = model.hidden(&packed).unwrap();
    let row = |i: usize| &full[i * d..(i + 1) * d];

    // Cached.
    let mut cache = Cache::new(&model);
    let root = cache.add_sequence(None, n).unwrap();
    let features = model.encode(&seen[0], &[WIDE]).unwrap();
    let e = Extension { sequence: root, ids: &prompt, positions: start.as_slices(), features: &features };
    let h = model.extend(&mut cache, &[e]).unwrap();
    assert_eq!(h, row(n - 1));
    let members = [cache.add_sequence(Some(root), 3).unwrap(), cache.add_sequence(Some(root), 2).unwrap()];
    let b = n + turns[0].0.len() + turns[0].1.len() + turns[0].2.len();
    for step in 0..3 {
        let position = [start.next + step as i32];
        let mut e = vec![(members[0], &turns[0].0[step..=step])];
        if step < 2 {
            e.push((members[1], &turns[1].0[step..=step]));
        }
        let e: Vec<Extension> = e
            .iter()
            .map(|(s, ids)| Extension { sequence: *s, ids, positions: [&position; 3], features: &[] })
            .collect();
        let h = model.extend(&mut cache, &e).unwrap();
        assert_eq!(&h[..d], row(n + step));
        if step < 2 {
            assert_eq!(&h[d..], row(b + step));
        }
    }
    let at = positions_from(start.next + 3, &turns[0].1, &[TALL], config).unwrap();
    let features = model.encode(&seen[1], &[TALL]).unwrap();
    // The other member stands behind it, so it moves.
    cache.make_room(members[0], turns[0].1.len() + 2);
    cache.make_room(members[0], cache.room(members[0]) + 1);
    let e = Extension { sequence: members[0], ids: &turns[0].1, positions: at.as_slices(), features: &features };
    let h = model.extend(&mut cache, &[e]).unwrap();
    assert_eq!(h, row(n + 3 + turns[0].1.len() - 1));
    for step in 0..2 {
        let position = [at.next + step as i32];
        let ids = &turns[0].2[step..=step];
        let e = Extension { sequence: members[0], ids, positions: [&position; 3], features: &[] };
        let h = model.extend(&mut cache, &[e]).unwrap();
        assert_eq!(h, row(n + 3 + turns[0].1.len() + step));
    }
    assert_eq!(cache.len(members[0]), b);
    let room = cache.room(members[1]);
    let (ids, at) = (vec![1; room + 1], vec![0; room + 1]);
    let e = Extension { sequence: members[1], ids: &ids, positions: [&at; 3], features: &[] };
    assert!(model.extend(&mut cache, &[e]).unwrap_err().to_string().contains(&format!("room for {room}")));
}

/// The log-prob at the head is log-softmax of the logits without the banned ids, computed here in f64.
#[test]
fn logprobs_are_those_of_the_logits() {
    let model = tiny();
    let (temperature, banned) = head(&model.config);
    let packed = sampled(conversation(&model.config), &banned);
    let hidden = model.hidden(&packed).unwrap();
    let logits = model.logits(&hidden);
    let v = model.config.text.vocab;
    let e = model.evaluate(&packed, Head { temperature, banned: &banned }, Keep::Nothing, Trainable::ALL).unwrap();
    for (target, found) in packed.targets.iter().zip(&e.logprobs) {
        let row = &logits[target.row * v..(target.row + 1) * v];
        let z = |i: usize| row[i] as f64 / temperature as f64;
        let sum: f64 = (0..v).filter(|i| !banned.contains(&(*i as u32))).map(|i| z(i).exp()).sum();
        let expected = z(target.token as usize) - sum.ln();
        // f32 rounding of a number of order 10.
        assert!((expected - *found as f64).abs() < 1e-5, "{expected} {found}");
    }
}

#[test]
fn packs_that_do_not_fit_are_refused() {
    let model = tiny();
    let config = &model.config;
    let error = |change: &dyn Fn(&mut Packed)| {
        let mut packed = conversation(config);
        change(&mut packed);
        model.hidden(&packed).unwrap_err().to_string()
    };
    assert!(error(&|p| p.images[0].first_row += 1).contains("does not stand on placeholder rows"));
    assert!(error(&|p| p.images.truncate(1)).contains("image placeholders"));
    assert!(error(&|p| p.patches.truncate(9)).contains("patch values"));
    assert!(error(&|p| p.ids[0] = 60).contains("outside the vocabulary of 60"));
    assert!(error(&|p| p.spans[0].queries.end -= 1).contains("cover 20 of 21"));
    assert!(error(&|p| p.positions[1].truncate(9)).contains("height positions"));
}

/// A prompt with an image packed once for two members gives the log-probs and gradients of two packs that repeat it.
/// The sums run in another order, so bits may differ: 1e-5 of the largest gradient is some hundred roundings of f32.
#[test]
fn a_shared_prompt_is_a_repeated_prompt() {
    let model = tiny();
    let config = &model.config;
    let prompt = [&[3, 4, 5][..], &image(config, 6), &[6]].concat();
    let seen = patches(config, WIDE, 1);
    let members: [&[u32]; 2] = [&[11, 12, 13], &[14, 15]];
    let n = prompt.len();
    let weights = noise(5, 5);
    let run = |packed: &Packed, weights: &[f32], grads: &mut Gradients| {
        let e = model.evaluate(packed, Head::PLAIN, Keep::Everything, Trainable::ALL).unwrap();
        model.backward(packed, e.tape.unwrap(), &Slopes::of(weights), Trainable::ALL, grads).unwrap();
        e.logprobs
    };

    let mut shared = Packed::single(&prompt, &[WIDE], seen.clone(), config).unwrap();
    let next = positions(&prompt, &[WIDE], config).unwrap().next;
    let mut plain_grads = Gradients::zeros(model.weights.layout());
    let mut plain = Vec::new();
    for member in members {
        let first = shared.ids.len();
        let rows = first..first + member.len();
        shared.spans.push(Span { queries: rows.clone(), shared: 0..n, own: rows, causal: true });
        shared.ids.extend(member);
        for axis in &mut shared.positions {
            axis.extend((0..member.len() as i32).map(|i| next + i));
        }
        let row = |i: usize| if i == 0 { n - 1 } else { first + i - 1 };
        shared.targets.extend(member.iter().enumerate().map(|(i, t)| Target { row: row(i), token: *t }));

        let whole = [&prompt[..], member].concat();
        let mut alone = Packed::single(&whole, &[WIDE], seen.clone(), config).unwrap();
        alone.targets = member.iter().enumerate().map(|(i, t)| Target { row: n - 1 + i, token: *t }).collect();
        let from = plain.len();
        plain.extend(run(&alone, &weights[from..from + member.len()], &mut plain_grads));
    }
    let mut shared_grads = Gradients::zeros(model.weights.layout());
    let found = run(&shared, &weights, &mut shared_grads);
    for (a, b) in found.iter().zip(&plain) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    let largest = plain_grads.data.iter().fold(0f32, |m, g| m.max(g.abs()));
    for entry in &model.weights.layout().entries {
        let range = entry.range.clone();
        for (a, b) in shared_grads.data[range.clone()].iter().zip(&plain_grads.data[range]) {
            assert!((a - b).abs() < 1e-5 * largest, "{}: {a} {b} of {largest}", entry.name);
        }
    }
}

/// One token and no target, and the file of a trace read back.
#[test]
fn trace_writes_what_it_computed() {
    let model = tiny();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("trace.safetensors");
    let ids = [&[3][..], &image(&model.config, 6)].concat();
    let greedy = trace::Greedy { tokens: 3, stop: &[] };
    let t = trace::trace(&model, &ids, &[WIDE], patches(&model.config, WIDE, 1), Some(greedy)).unwrap();
    t.write(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let grid = file.tensor("image_grid_thw").unwrap();
    assert_eq!(grid.data(), [1i64, 4, 6].map(i64::to_le_bytes).concat());
    assert_eq!(file.tensor("greedy_ids").unwrap().shape(), [3]);
    // The first greedy token is the largest of the last row of logits.
    let last = &t.logits[t.logits.len() - 60..];
    let best = (0..60).max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
    assert_eq!(t.greedy_ids.as_ref().unwrap()[0] as usize, best);
    assert_eq!(t.logprobs[0], 0.0);

    let one = trace::trace(&model, &[3], &[], Vec::new(), None).unwrap();
    assert_eq!(one.logprobs, [0.0]);
}
