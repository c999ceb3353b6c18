//! The engine on LibTorch beside the embedded one: two programs that share weights, words and packing, and no arithmetic.

use std::path::{Path, PathBuf};

use foveate::demo;
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::engine::torch::{self, Torch};
use foveate::engine::{self, Prompt, Sampler, Sampling, Trainer, Who};
use foveate::model::layout::Layout;
use foveate::model::{Compute, Dtype, Vlm, lora};
use foveate::rl;
use foveate::run::{Interrupt, Start};

use crate::agreement::{self, apart, gradient, groups, play, sampled, samples, training, weights};
use crate::{tinker, tiny, vllm};

fn on_cpu() -> torch::Options {
    torch::Options { device: "cpu".into() }
}

/// The random model as a checkpoint with the processor of the bundled one.
fn saved(dir: &Path) -> PathBuf {
    let path = dir.join("plain");
    tiny::model(5).save(&path, Dtype::F32, Some(&tiny::nano())).unwrap();
    path
}

fn opened(options: &ModelOptions) -> Torch {
    Torch::open(&on_cpu(), options, Some(&training())).unwrap()
}

/// All gradients, in the places of the layout.
fn all(engine: &Torch, layout: &Layout) -> Vec<f32> {
    let mut gradients = vec![0.0; layout.len];
    for entry in &layout.entries {
        if let Some(gradient) = engine.gradient(&entry.name) {
            gradients[entry.range.clone()].copy_from_slice(&gradient);
        }
    }
    gradients
}

/// f32 sums in other orders, through four blocks (measured: 4e-6).
const CLOSE: f32 = 5e-5;

#[test]
fn log_probs_and_gradients_are_those_of_the_embedded_engine() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path());
    let samples = samples(dir.path());
    let model = tiny::model(5);
    let mut plain = agreement::engine(&model, |_| ());
    let episodes = play(&mut plain, &samples);
    assert!(episodes.iter().filter(|e| e.stream.images.len() == 2).count() >= 4, "second pictures are part of it");
    let scored = plain.logprobs(&groups(&episodes), Who::Policy).unwrap();
    let whole = gradient(&mut plain, &groups(&episodes));
    let tower = || vec!["vision".to_owned(), "merger".to_owned()];
    for (freeze, recompute, rows) in [
        (vec![], false, 8192),
        (vec![], true, 8192),
        (vec![], false, 1),
        (tower(), true, 8192),
        (vec!["embeddings".to_owned(), "text".to_owned()], false, 8192),
    ] {
        let named = format!("{freeze:?} {recompute} {rows}");
        let options =
            ModelOptions { path: path.clone(), freeze, recompute, micro_batch_tokens: rows, ..ModelOptions::default() };
        let mut other = opened(&options);
        let theirs = other.logprobs(&groups(&episodes), Who::Policy).unwrap();
        for (a, b) in scored.iter().flatten().zip(theirs.iter().flatten()) {
            for (a, b) in a.logprobs.iter().zip(&b.logprobs).chain(a.entropies.iter().zip(&b.entropies)) {
                assert!((a - b).abs() < 2e-4, "{named}: {a} and {b}");
            }
        }
        other.accumulate(&groups(&episodes), &mut |_, _, scores| Ok(weights(scores))).unwrap();
        let layout = model.weights.layout();
        let mut expected = whole.clone();
        for entry in layout.entries.iter().filter(|e| !options.trainable().unwrap().trains(e)) {
            expected[entry.range.clone()].fill(0.0);
        }
        let (far, name) = apart(&model, &expected, &all(&other, layout));
        println!("{named}: {far:.1e} in {name}");
        assert!(far < CLOSE, "{named}: {far:e} in {name}");
    }
}

#[test]
fn it_says_what_the_embedded_engine_says() {
    let dir = tempfile::tempdir().unwrap();
    let options = ModelOptions { path: saved(dir.path()), ..ModelOptions::default() };
    let samples = samples(dir.path());
    let mut ours = agreement::engine(&tiny::model(5), |_| ());
    let mut theirs = opened(&options);
    // Two turns with a crop each, drawn by the same seeds: the same tokens, unless a number of one in millions lies between two of them.
    let (a, b) = (play(&mut ours, &samples), play(&mut theirs, &samples));
    assert!(a.iter().filter(|e| e.stream.images.len() == 2).count() >= 4);
    for (a, b) in a.iter().zip(&b) {
        assert_eq!(a.stream.ids, b.stream.ids);
        for (a, b) in sampled(a).iter().zip(sampled(b)) {
            assert!((a - b).abs() < 2e-4, "{a} and {b}");
        }
    }
    // What was said is what is scored.
    let scored = theirs.logprobs(&groups(&b), Who::Policy).unwrap();
    for (episode, scores) in b.iter().zip(scored.iter().flatten()) {
        for (a, b) in sampled(episode).iter().zip(&scores.logprobs) {
            assert!((a - b).abs() < 2e-4, "{a} and {b}");
        }
    }
    // Greedy, and cut to the likeliest; more tokens than there is room for at first.
    let streams: Vec<_> = a.iter().map(|e| &e.stream).take(2).collect();
    for (temperature, top_k, top_p) in [(0.0, None, None), (1.0, Some(3), None), (1.0, None, Some(0.5))] {
        let sampling = Sampling { temperature, top_k, top_p, max_new_tokens: 80, stop: Vec::new(), ignore_end: true };
        let prompts: Vec<Prompt> = streams
            .iter()
            .enumerate()
            .map(|(i, stream)| Prompt {
                session: 100 * i as u64,
                stream,
                seeds: if i == 0 { &[1, 2, 3] } else { &[4] },
            })
            .collect();
        ours.end_step();
        theirs.end_step();
        let [a, b] = [&mut ours as &mut dyn Sampler, &mut theirs].map(|e| e.sample(&prompts, &sampling).unwrap());
        let ids =
            |all: &[Vec<foveate::engine::Completion>]| all.iter().flatten().map(|c| c.ids.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&a), ids(&b), "{temperature} {top_k:?} {top_p:?}");
        assert!(ids(&a).iter().all(|ids| ids.len() == 80));
    }
}

/// The reference stays behind, and checkpoints of either engine go on in the other.
#[test]
fn steps_and_checkpoints_are_those_of_the_embedded_engine() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(dir.path());
    let samples = samples(dir.path());
    let adapters =
        lora::Options { rank: 3, alpha: 6.0, targets: vec!["model.layers.*".into(), "visual.merger.*".into()] };
    for lora in [None, Some(adapters)] {
        let options = ModelOptions { path: path.clone(), lora, ..ModelOptions::default() };
        let mut ours = Embedded::open(&options, Some(&training())).unwrap();
        let mut theirs = opened(&options);
        let episodes = play(&mut ours, &samples);
        let before = theirs.logprobs(&groups(&episodes), Who::Policy).unwrap();
        let learn = |engine: &mut dyn Trainer| {
            engine.accumulate(&groups(&episodes), &mut |_, _, scores| Ok(weights(scores))).unwrap();
            engine.step(3e-3).unwrap()
        };
        for _ in 0..2 {
            let (a, b) = (learn(&mut ours), learn(&mut theirs));
            assert!((a / b - 1.0).abs() < 1e-4, "{a} and {b}");
        }
        assert_eq!(theirs.updates(), 2);
        let reference = theirs.logprobs(&groups(&episodes), Who::Reference).unwrap();
        let policy = theirs.logprobs(&groups(&episodes), Who::Policy).unwrap();
        assert_eq!(reference[0][0].logprobs, before[0][0].logprobs);
        assert_ne!(policy[0][0].logprobs, before[0][0].logprobs);

        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        ours.save(&a).unwrap();
        theirs.save(&b).unwrap();
        let read = |dir: &Path| match lora::is_adapter(dir) {
            true => lora::read(dir).unwrap(),
            false => Vlm::load(dir).unwrap(),
        };
        let (x, y) = (read(&a), read(&b));
        let [x, y] = [&x, &y].map(|model| model.weights.arena().unwrap());
        for entry in &x.layout.entries {
            for (x, y) in x.data[entry.range.clone()].iter().zip(&y.data[entry.range.clone()]) {
                // A step moves a number by 3e-3, in the direction of its gradient's sign where that is not noise.
                assert!((x - y).abs() < 5e-4, "{}: {x} and {y}", entry.name);
            }
        }
        // Each goes on from the other's checkpoint, and they stay together.
        ours.load(&b).unwrap();
        theirs.load(&a).unwrap();
        assert_eq!((ours.updates(), theirs.updates()), (2, 2));
        let (a, b) = (learn(&mut ours), learn(&mut theirs));
        assert!((a / b - 1.0).abs() < 1e-2, "{a} and {b}");
        for name in ["a", "b"] {
            std::fs::remove_dir_all(dir.path().join(name)).unwrap();
        }
    }
}

#[test]
fn what_it_cannot_do_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let options = ModelOptions { path: saved(dir.path()), ..ModelOptions::default() };
    let on = |device: &str| Torch::open(&torch::Options { device: device.into() }, &options, None).map(drop);
    let said = on("gpu").unwrap_err().to_string();
    assert!(said.contains("engine.device") && said.contains("cuda:N"), "{said}");
    let said = on("cuda:63").unwrap_err().to_string();
    assert!(said.contains("engine.device = \"cuda:63\"") && said.lines().count() == 1, "{said}");
}

/// One config on three engines, trained with the same samples: this program's, LibTorch, and a server behind the protocol.
#[test]
fn three_engines_have_one_gradient() {
    let (_folder, dir) = tinker::world();
    let tinker::Shared { plan, mut here, episodes } = tinker::shared(&dir);
    let training = plan.training().unwrap();
    let mut beside = Torch::open(&on_cpu(), &plan.model, Some(&training)).unwrap();
    let double = tinker::calm(&dir);
    let there = tinker::on(&double, plan.clone(), |_| ());
    let mut served = engine::open(&there.engine, &there.model, &training, false).unwrap();
    let learn = |engine: &mut dyn Trainer| tinker::learn(engine, &plan, &episodes);
    learn(&mut here);
    learn(&mut beside);
    learn(&mut *served);
    // That is when the server adds up.
    served.step(1e-3).unwrap();
    let whole = here.gradients().unwrap().data.clone();
    assert!(whole.iter().any(|g| g.abs() > 1e-2));
    let on_torch = all(&beside, here.model.weights.layout());
    for (name, gradient, most) in [("LibTorch", on_torch, CLOSE), ("the protocol", double.gradient(), CLOSE)] {
        let (far, tensor) = apart(&here.model, &whole, &gradient);
        println!("{name}: {far:.1e} in {tensor}");
        assert!(far < most, "{name}: {far:e} in {tensor}");
    }
}

/// A whole run from a config, its KL and second updates included: samples, rewards and norms are those of the embedded engine, and a run
/// that was stopped goes on.
#[test]
fn a_run_is_the_run_on_the_embedded_engine() {
    let (_folder, dir) = tinker::world();
    let extra = ["task.turns=2", "task.on_invalid=resend_image"];
    let own = tinker::plan(&dir, "own", &extra);
    let with_torch = |out: &str, more: &[&str]| {
        let extra: Vec<&str> = extra.iter().chain(more).copied().collect();
        let mut plan = tinker::plan(&dir, out, &extra);
        plan.engine = engine::Options::Torch(on_cpu());
        plan.resolve().unwrap()
    };
    let beside = with_torch("beside", &[]);
    tinker::train(&own, Start::New).unwrap();
    tinker::train(&beside, Start::New).unwrap();
    for (step, (a, b)) in tinker::metrics(&own).iter().zip(&tinker::metrics(&beside)).enumerate() {
        let number = |m: &serde_json::Value, name: &str| m[name].as_f64().unwrap_or(f64::NAN);
        assert_eq!(a["reward/mean"], b["reward/mean"], "step {}", step + 1);
        for name in ["actor/pg_loss", "actor/ref_kl", "actor/grad_norm"] {
            let (a, b) = (number(a, name), number(b, name));
            assert!((a - b).abs() <= 1e-5 + 1e-3 * a.abs(), "{name} of step {}: {a} and {b}", step + 1);
        }
        // It samples and trains in other orders, says so, and by how much.
        assert!(number(b, "mismatch_logprob/max") < 1e-3 && number(b, "ratio/first_update_gap") == 0.0);
        let ids = |plan: &_| tinker::episodes(plan, step as u64 + 1).iter().map(|r| r.ids.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&own), ids(&beside), "step {}", step + 1);
    }
    let cut = with_torch("cut", &[]);
    let interrupt = Interrupt::none();
    rl::train(&cut, Start::New, &interrupt, &mut |step, _| {
        if step == 2 {
            interrupt.ask();
        }
    })
    .unwrap_err();
    tinker::train(&cut, Start::Resume).unwrap();
    let weights = |plan: &rl::Plan| std::fs::read(plan.train.out.join("checkpoints/3/model.safetensors")).unwrap();
    assert_eq!(weights(&cut), weights(&beside), "a run that was stopped ends where it would have");
}

/// Fine-tuning on dialogues with pictures, from a config.
#[test]
fn fine_tuning_is_that_of_the_embedded_engine() {
    let (_folder, dir) = tinker::world();
    let weights = |plan: &foveate::sft::Plan| {
        let start = Start::New;
        let metrics = foveate::sft::train(plan, start, &Interrupt::none()).unwrap();
        let model = Vlm::load(&plan.train.out.join("checkpoints/3")).unwrap();
        (metrics["loss"].as_f64().unwrap(), model.weights.arena().unwrap().data.clone())
    };
    let own = tinker::fine_tuning(&dir, "own-sft");
    let (loss, ours) = weights(&own);
    let mut beside = tinker::fine_tuning(&dir, "beside-sft");
    beside.engine = engine::Options::Torch(on_cpu());
    let (theirs_loss, theirs) = weights(&beside);
    assert!((loss - theirs_loss).abs() < 1e-4 * loss, "{loss} and {theirs_loss}");
    let far = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 1e-4, "{far}");
}

/// Products in bf16, on a model whose file is in bf16: adapters beside weights that are read from where they lie.
#[test]
fn bf16_is_close_to_f32() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bf16");
    tiny::model(5).save(&path, Dtype::Bf16, Some(&tiny::nano())).unwrap();
    let samples = samples(dir.path());
    let adapters = lora::Options { rank: 3, alpha: 6.0, targets: vec!["*".into()] };
    for lora in [None, Some(adapters)] {
        let plain = ModelOptions { path: path.clone(), lora, ..ModelOptions::default() };
        let rounded = ModelOptions { compute: Compute::Bf16, recompute: true, ..plain.clone() };
        let mut ours = Embedded::open(&plain, Some(&training())).unwrap();
        let layout = ours.model.weights.layout().clone();
        let mut theirs = opened(&rounded);
        let episodes = play(&mut theirs, &samples);
        let learn = |engine: &mut dyn Trainer| {
            let mut logprobs = Vec::new();
            let mut weigh = |_, _, scores: &engine::Scores| {
                logprobs.extend_from_slice(&scores.logprobs);
                Ok(engine::Weights { logprobs: vec![1.0; scores.logprobs.len()], entropies: None })
            };
            engine.accumulate(&groups(&episodes), &mut weigh).unwrap();
            logprobs
        };
        let (a, b) = (learn(&mut ours), learn(&mut theirs));
        let most = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(most > 0.0 && most < 0.3, "log-probs are off by {most}");
        let off = |a: &[f32], b: &[f32]| {
            let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
            (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())).sqrt()
        };
        let gradient = off(&ours.gradients().unwrap().data, &all(&theirs, &layout));
        println!("log-probs at most {most:.3}, gradient {gradient:.4}");
        assert!(gradient > 0.0 && gradient < 0.1, "the gradient is off by {gradient}");
        assert!(theirs.step(1e-3).unwrap() > 0.0);
        assert_ne!(learn(&mut theirs), b, "the step is seen by the products");
    }
}

/// Samples from vLLM, adapters on LibTorch: the run that it is with our own kernels.
#[test]
fn it_trains_what_vllm_samples_with() {
    let (_folder, dir) = tinker::world();
    let ours = vllm::run(&dir, "ours", |_| ());
    let theirs = vllm::run(&dir, "theirs", |options| options.device = Some("cpu".into()));
    assert_eq!(ours.len(), 3);
    for (a, b) in ours.iter().zip(&theirs) {
        assert_eq!(a["reward/mean"], b["reward/mean"]);
        let [a, b] = [a, b].map(|metrics| metrics["actor/grad_norm"].as_f64().unwrap());
        assert!(a > 1e-4 && (a - b).abs() <= 1e-3 * a, "{a} and {b}");
    }
    assert!(theirs.iter().all(|metrics| metrics["mismatch_logprob/max"].as_f64().unwrap() < 1e-3));
}

/// What is not trained stays as it is in checkpoints, however products round it.
#[test]
fn frozen_weights_keep_their_bits() {
    let dir = tempfile::tempdir().unwrap();
    let freeze = vec!["vision".to_owned(), "embeddings".to_owned()];
    let options = ModelOptions { path: saved(dir.path()), freeze, compute: Compute::Bf16, ..ModelOptions::default() };
    let mut engine = opened(&options);
    let episodes = play(&mut engine, &samples(dir.path()));
    engine.accumulate(&groups(&episodes), &mut |_, _, scores| Ok(weights(scores))).unwrap();
    engine.step(1e-2).unwrap();
    let out = dir.path().join("out");
    engine.save(&out).unwrap();
    let (before, after) = (Vlm::load(&options.path).unwrap(), Vlm::load(&out).unwrap());
    let [before, after] = [&before, &after].map(|model| model.weights.arena().unwrap());
    for entry in &before.layout.entries {
        let same = before.data[entry.range.clone()] == after.data[entry.range.clone()];
        assert_eq!(same, !options.trainable().unwrap().trains(entry), "{}", entry.name);
    }
}

#[test]
fn the_demo_runs_to_its_report() {
    let dir = tempfile::tempdir().unwrap();
    let request = demo::Request {
        story: demo::Story::Mgpo,
        out: dir.path().join("demo"),
        quick: true,
        seed: 1,
        overwrite: false,
        engine: engine::Options::on_device(Some("cpu")),
        json: true,
    };
    demo::main(&request).unwrap();
    let read = |name: &str| std::fs::read_to_string(request.out.join(name)).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&read("eval/summary.json")).unwrap();
    assert_eq!(summary["rows"].as_object().unwrap().len(), 7, "models and controls");
    assert!(read("mgpo/config.toml").contains("kind = \"torch\""));
    assert!(read("report.html").contains("What number is on the plate?"));
    // A device that is none is refused before anything is drawn.
    let request = demo::Request { engine: engine::Options::on_device(Some("gpu")), overwrite: true, ..request };
    assert!(demo::main(&request).unwrap_err().to_string().contains("expected \"cpu\", \"cuda\""));
}
