//! Every way to compute one thing gives the same thing: sampling and training, shared and plain prompts, whole and split steps,
//! kept and recomputed activations, one thread and two.

use std::path::Path;

use foveate::data::{self, Sample};
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::engine::{Group, Scores, Trainer, Training, Weights, Who};
use foveate::episode::Episode;
use foveate::geometry::Grid;
use foveate::image;
use foveate::model::block::Keep;
use foveate::model::{Compute, Gradients, Head, Packed, Slopes, Trainable, Vlm};
use foveate::optim::Optim;
use foveate::rollout::{self, Stage};
use foveate::tasks::crop::Crop;

use crate::tiny;

pub const TEMPERATURE: f32 = 0.8;

pub fn engine(model: &Vlm, change: impl FnOnce(&mut ModelOptions)) -> Embedded {
    let mut options = ModelOptions { path: tiny::nano(), ..ModelOptions::default() };
    change(&mut options);
    Embedded::with_model(model.clone(), &options, Some(&training())).unwrap()
}

pub fn training() -> Training {
    Training {
        optim: Optim::default(),
        temperature: TEMPERATURE,
        all_ids: false,
        reference: true,
        pictures: true,
        seed: 0,
    }
}

/// Two groups of three two-turn conversations, each with a picture a turn.
pub fn play(engine: &mut dyn Trainer, samples: &[Sample]) -> Vec<Episode> {
    let frontend = engine.frontend();
    let task = Crop::new(tiny::task(), frontend.processor.budget.factor).unwrap();
    let options = rollout::Options {
        temperature: TEMPERATURE,
        max_new_tokens: 24,
        stop: tiny::soon(),
        ..rollout::Options::default()
    };
    let stage = Stage { task: &task, frontend: &frontend, options: &options };
    let numbered: Vec<(u64, &Sample)> = samples.iter().enumerate().map(|(i, s)| (i as u64, s)).collect();
    rollout::play(&stage, &mut *engine, &numbered, 3, 7, 1).unwrap()
}

pub fn samples(dir: &Path) -> Vec<Sample> {
    data::read(&tiny::rows(dir, 2)).unwrap()
}

pub fn groups(episodes: &[Episode]) -> Vec<Group<'_>> {
    episodes.chunks(3).map(|g| g.iter().map(|e| &e.stream).collect()).collect()
}

fn alone(episodes: &[Episode]) -> Vec<Group<'_>> {
    episodes.iter().map(|e| e.stream.alone()).collect()
}

pub fn sampled(episode: &Episode) -> Vec<f32> {
    let s = &episode.stream;
    s.logprobs.iter().zip(&s.sampled).filter(|(_, t)| **t).map(|(l, _)| *l).collect()
}

/// A different weight for each token, of both signs, that depends on the stream and not on how it was packed.
pub fn weights(scores: &Scores) -> Weights {
    let weight = |(k, l): (usize, &f32)| (l * 3.0).sin() + 0.1 * (k as f32 - 2.0);
    let logprobs: Vec<f32> = scores.logprobs.iter().enumerate().map(weight).collect();
    Weights { entropies: Some(logprobs.iter().map(|w| 0.3 * w).collect()), logprobs }
}

pub fn gradient(engine: &mut Embedded, groups: &[Group]) -> Vec<f32> {
    engine.accumulate(groups, &mut |_, _, scores| Ok(weights(scores))).unwrap();
    let gradient = engine.gradients().unwrap().data.clone();
    assert!(gradient.iter().any(|g| g.abs() > 1e-3), "a gradient of nothing proves nothing");
    // A step of rate 0 forgets the gradient and leaves the weights.
    engine.step(0.0).unwrap();
    gradient
}

/// Largest difference within each tensor, relative to that tensor's largest entry of `a`, and the worst tensor's name.
pub fn apart(model: &Vlm, a: &[f32], b: &[f32]) -> (f32, String) {
    let mut worst = (0.0, String::new());
    for e in &model.weights.layout().entries {
        let (a, b) = (&a[e.range.clone()], &b[e.range.clone()]);
        let size = a.iter().fold(1e-6f32, |m, x| m.max(x.abs()));
        let far = a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / size;
        if far > worst.0 {
            worst = (far, e.name.clone());
        }
    }
    worst
}

/// Sums of some hundred terms of mixed sign in another order: 1e-7 each, with some cancellation (measured: 1e-6).
const ROUNDING: f32 = 1e-5;

#[test]
fn sampling_and_training_agree_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let model = tiny::model(5);
    let tower = || vec!["vision".to_owned(), "merger".to_owned()];
    for (freeze, compute) in
        [Compute::F32, Compute::Bf16x6, Compute::Bf16].into_iter().flat_map(|c| [vec![], tower()].map(|f| (f, c)))
    {
        let mut engine = engine(&model, |o| (o.freeze, o.compute) = (freeze.clone(), compute));
        let episodes = play(&mut engine, &samples);
        assert_eq!(episodes.len(), 6);
        let two_turns = episodes.iter().filter(|e| e.stream.images.len() == 2).count();
        assert!(two_turns >= 4, "{two_turns} of 6 episodes have two turns; the test needs most of them");
        let different = episodes[0].stream.ids != episodes[1].stream.ids;
        assert!(different, "the members of a group draw their own tokens");

        // Without gradients (features from the cache), and as the update does it (a trained tower computes them anew).
        let scored = engine.logprobs(&groups(&episodes), Who::Policy).unwrap();
        let mut seen = Vec::new();
        engine
            .accumulate(&groups(&episodes), &mut |_, _, scores| {
                seen.push(scores.clone());
                Ok(weights(scores))
            })
            .unwrap();
        for ((episode, scored), seen) in episodes.iter().zip(scored.iter().flatten()).zip(&seen) {
            // Equal bits: the ratio before the first update is exactly 1.
            assert_eq!(sampled(episode), scored.logprobs);
            assert_eq!(sampled(episode), seen.logprobs);
            assert_eq!(scored.entropies, seen.entropies);
        }
        // The reference is the policy until the first step, and stays behind after it.
        let reference = engine.logprobs(&groups(&episodes), Who::Reference).unwrap();
        assert_eq!(reference[0][0].logprobs, scored[0][0].logprobs);
        engine.step(1e-2).unwrap();
        let again = engine.logprobs(&groups(&episodes), Who::Reference).unwrap();
        assert_eq!(again[1][2].logprobs, scored[1][2].logprobs);
        let policy = engine.logprobs(&groups(&episodes), Who::Policy).unwrap();
        assert_ne!(policy[1][2].logprobs, scored[1][2].logprobs);

        // And after the update: nothing of the old weights (features of a trained tower, above all) is left anywhere.
        play(&mut engine, &samples);
        engine.step(1e-2).unwrap();
        let later = play(&mut engine, &samples);
        let mut seen = Vec::new();
        engine
            .accumulate(&groups(&later), &mut |_, _, scores| {
                seen.push(scores.logprobs.clone());
                Ok(weights(scores))
            })
            .unwrap();
        assert_eq!(later.iter().map(sampled).collect::<Vec<_>>(), seen);
    }
}

#[test]
fn members_that_are_played_alone_read_and_score_the_same() {
    // A group of one has no shared prompt: another packing, another split of the attention, the same promise.
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let mut engine = engine(&tiny::model(5), |_| ());
    let episodes = play(&mut engine, &samples);
    let together = engine.logprobs(&groups(&episodes), Who::Policy).unwrap();
    let apart = engine.logprobs(&alone(&episodes), Who::Policy).unwrap();
    for (a, b) in together.iter().flatten().zip(apart.iter().flatten()) {
        for (x, y) in a.logprobs.iter().zip(&b.logprobs) {
            // The softmax is summed in another order.
            assert!((x - y).abs() <= 1e-4 * x.abs().max(1.0), "{x} and {y}");
        }
    }
}

#[test]
fn packing_splitting_and_recomputing_change_no_gradient() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let model = tiny::model(5);
    let mut plain = engine(&model, |_| ());
    let episodes = play(&mut plain, &samples);
    let whole = gradient(&mut plain, &groups(&episodes));
    // Now the update itself looks at the pictures, in another order.
    let (far, name) = apart(&model, &whole, &gradient(&mut plain, &groups(&episodes)));
    println!("looked at anew: {far:.1e} in {name}");
    assert!(far < ROUNDING, "looked at anew: {far:e} in {name}");

    let (far, name) = apart(&model, &whole, &gradient(&mut plain, &alone(&episodes)));
    println!("each stream alone: {far:.1e} in {name}");
    assert!(far < ROUNDING, "each stream alone: {far:e} in {name}");

    let mut split = engine(&model, |o| o.micro_batch_tokens = 1);
    let (far, name) = apart(&model, &whole, &gradient(&mut split, &groups(&episodes)));
    println!("a group at a time: {far:.1e} in {name}");
    assert!(far < ROUNDING, "a group at a time: {far:e} in {name}");

    // What sampling has computed of the pictures is kept whole, in part or not at all.
    for (recompute, mib) in [(false, 1024), (true, 1024), (true, 0), (false, 0)] {
        let mut other = engine(&model, |o| (o.recompute, o.vision_tape_mib) = (recompute, mib));
        play(&mut other, &samples);
        let same = gradient(&mut other, &groups(&episodes)) == whole;
        assert!(same, "recompute = {recompute}, vision_tape_mib = {mib}: other bits");
    }

    let mut frozen = engine(&model, |o| o.freeze = vec!["vision".into(), "merger".into()]);
    let text = gradient(&mut frozen, &groups(&episodes));
    let (vision, text_part): (Vec<_>, Vec<_>) =
        model.weights.layout().entries.iter().partition(|e| e.name.starts_with("visual."));
    assert!(vision.iter().all(|e| text[e.range.clone()].iter().all(|g| *g == 0.0)));
    assert!(text_part.iter().all(|e| text[e.range.clone()] == whole[e.range.clone()]), "kept features, same gradient");
}

#[test]
fn features_do_not_depend_on_company() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let mut engine = engine(&tiny::model(5), |_| ());
    let episodes = play(&mut engine, &samples);
    let placed: Vec<_> = episodes.iter().flat_map(|e| &e.stream.images).collect();
    let patches: Vec<_> = placed
        .iter()
        .map(|p| {
            image::patches(
                &image::show(&engine.frontend.pictures.get(&p.path).unwrap(), &p.view).unwrap(),
                &engine.frontend.processor,
            )
            .unwrap()
        })
        .collect();
    let all: Vec<f32> = patches.iter().flat_map(|p| p.data.iter().copied()).collect();
    let grids: Vec<_> = patches.iter().map(|p| p.grid).collect();
    let together = engine.model.encode(&all, &grids).unwrap();
    let apart: Vec<f32> = patches.iter().flat_map(|p| engine.model.encode(&p.data, &[p.grid]).unwrap()).collect();
    assert_eq!(together, apart);
}

/// What bf16 costs on the bundled model, whose numbers then keep eight bits (2^-9 of each): the figures measured, with room.
#[test]
fn bf16_is_close_to_f32() {
    let [features, logprobs, gradient] = off_in(Compute::Bf16);
    assert!(features > 1e-4 && features < 0.03, "features are off by {features}");
    assert!(logprobs > 0.0 && logprobs < 0.3, "log-probs are off by up to {logprobs}");
    assert!(gradient < 0.05, "the gradient is off by {gradient}");
}

/// Numbers in three parts cost nothing: what is off is what f32 itself rounds, in another order.
#[test]
fn bf16_by_six_products_is_f32_with_other_bits() {
    let [features, logprobs, gradient] = off_in(Compute::Bf16x6);
    assert!(features > 0.0 && features < 3e-6, "features are off by {features}");
    assert!(logprobs < 3e-5, "log-probs are off by up to {logprobs}");
    assert!(gradient < 3e-6, "the gradient is off by {gradient}");
}

/// How far the bundled model's features, log-probs and gradient are from those in f32: the first and last as parts of their size, the others in nats.
fn off_in(compute: Compute) -> [f64; 3] {
    let plain = Vlm::load(&tiny::nano()).unwrap();
    let other = Vlm { compute, ..plain.clone() };
    let both = [&plain, &other];
    let off = |[a, b]: [&[f32]; 2]| {
        let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
        (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())).sqrt()
    };

    // A picture of noise.
    let grid = Grid { t: 1, h: 16, w: 20 };
    let patches: Vec<f32> = (0..320 * plain.config.vision.patch_values()).map(|i| (i as f32 * 0.7).sin()).collect();
    let [a, b] = both.map(|model| model.encode(&patches, &[grid]).unwrap());
    let features = off([&a, &b]);

    // Words that it has not been taught to say: log-probs of some nats.
    let text = "The fox stands beside plate 7, the bear beside plate 3. What number is on the plate under the bear? \\boxed{3}";
    let ids = tiny::chat().plain_ids(text).unwrap();
    let packed = Packed::single(&ids, &[], Vec::new(), &plain.config).unwrap().every_next_token();
    let slopes = vec![1.0; packed.targets.len()];
    let [(a, da), (b, db)] = both.map(|model| {
        let e = model.evaluate(&packed, Head::PLAIN, Keep::Everything, Trainable::ALL).unwrap();
        let mut grads = Gradients::zeros(model.weights.layout());
        model.backward(&packed, e.tape.unwrap(), &Slopes::of(&slopes), Trainable::ALL, &mut grads).unwrap();
        (e.logprobs, grads.data)
    });
    let most = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(a.iter().sum::<f32>() < -10.0, "log-probs {a:?}");
    let gradient = off([&da, &db]);
    println!("{compute:?}: features {features:e}, log-probs at most {most:e}, gradient {gradient:e}");
    [features, f64::from(most), gradient]
}

#[test]
fn one_thread_and_two_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let samples = samples(dir.path());
    let model = tiny::model(5);
    for compute in [Compute::F32, Compute::Bf16x6, Compute::Bf16] {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut engine = engine(&model, |o| o.compute = compute);
                let episodes = play(&mut engine, &samples);
                let ids: Vec<Vec<u32>> = episodes.iter().map(|e| e.stream.ids.clone()).collect();
                let logprobs: Vec<Vec<f32>> = episodes.iter().map(sampled).collect();
                (ids, logprobs, gradient(&mut engine, &groups(&episodes)))
            })
        };
        let (one, two) = (run(1), run(2));
        assert_eq!(one.0, two.0);
        assert_eq!(one.1, two.1);
        assert!(one.2 == two.2, "the gradients differ by {:?}", apart(&model, &one.2, &two.2));
    }
}
