//! The engine on a server: the same run through the protocol is the run on our own engine, whatever happens on the way; and a server that cannot
//! do what is asked of it is refused in one clear line.
//!
//! The server is `tinker/double.rs`: our engine on a tiny model behind the protocol, strict as the real servers are, and hostile here.

mod double;
mod packed;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use foveate::config::{self, BadConfig};
use foveate::data;
use foveate::engine::embedded::Embedded;
use foveate::engine::{
    self, Completion, Frontend, Group, Prompt, Sampler, Sampling, Scores, Trainer, Weights, Who,
    tinker::{Encoding, Options},
};
use foveate::episode::{Episode, Record};
use foveate::rl;
use foveate::rollout::{self, Stage};
use foveate::run::{Interrupt, Start};
use foveate::sft;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::{agreement, tiny};
use double::{Act, BASE_MODEL, Double, Kind};

/// A folder with rows and a random model that takes pictures of 4 to 16 tokens.
fn untaught() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_owned();
    let settings = tiny::checkpoint(&dir, 9).join("preprocessor_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&settings).unwrap()).unwrap();
    json["min_pixels"] = 3136.into();
    json["max_pixels"] = 12544.into();
    std::fs::write(&settings, json.to_string()).unwrap();
    tiny::rows(&dir, 4);
    (folder, dir)
}

/// The same with a model that says one of four numbers, so that some of its answers are right and some are not.
pub fn world() -> (tempfile::TempDir, PathBuf) {
    let (folder, dir) = untaught();
    let model = dir.join("model");
    let text = format!(
        "[model]\npath = {model:?}\n[data]\ntrain = {:?}\nmax_pixels = 12544\nmin_pixels = 3136\n[optim]\nlr = 1e-2\n[train]\n\
         out = {:?}\nsteps = 20\nbatch = 8\n",
        tiny::four_numbers(&dir),
        dir.join("sft")
    );
    sft::train(&config::parse(&text, &[]).unwrap(), Start::New, &Interrupt::none()).unwrap();
    (folder, dir)
}

pub fn taught(dir: &Path) -> PathBuf {
    dir.join("sft/checkpoints/20")
}

/// Three steps of two updates, with a KL. `eps` is far above the gradients' rounding, which AdamW would otherwise blow up to a whole
/// step wherever a gradient is nearly 0.
pub fn plan(dir: &Path, out: &str, extra: &[&str]) -> rl::Plan {
    let text = format!(
        r#"
        [model]
        path = {:?}
        [data]
        train = {:?}
        [task]
        template = "short"
        turns = 1
        judge = "number"
        max_pixels = 12544
        min_pixels = 3136
        [rollout]
        max_new_tokens = 8
        max_tokens = 512
        [objective]
        kl_coef = 0.05
        [optim]
        lr = 3e-3
        eps = 1e-2
        schedule = "linear"
        [train]
        out = {:?}
        steps = 3
        prompts = 4
        group = 4
        updates = 2
        checkpoint_every = 1
        keep_checkpoints = 0
        "#,
        taught(dir),
        dir.join("train.jsonl"),
        dir.join(out)
    );
    let overrides: Vec<String> = extra.iter().map(|s| (*s).to_owned()).collect();
    config::parse::<rl::Plan>(&text, &overrides).unwrap().resolve().unwrap()
}

/// The same on a server.
pub fn on(double: &Double, mut plan: rl::Plan, change: impl FnOnce(&mut Options)) -> rl::Plan {
    let mut options = Options {
        url: double.url(),
        base_model: BASE_MODEL.into(),
        lora_rank: 0,
        api_key_env: "FOVEATE_TEST_NO_SUCH_KEY".into(),
        max_in_flight: 4,
        // A few sequences a request.
        max_request_mib: 0.06,
        timeout_s: 30.0,
        pause_s: 0.002,
        patience_s: 60.0,
        ..Options::default()
    };
    change(&mut options);
    plan.engine = foveate::engine::Options::Tinker(options);
    plan.resolve().unwrap()
}

fn server(dir: &Path, kind: Kind, script: impl Fn(&str, usize) -> Act + Send + Sync + 'static) -> Double {
    let mut training = plan(dir, "none", &[]).training().unwrap();
    training.reference = false;
    Double::start(kind, &taught(dir), training, script)
}

pub fn calm(dir: &Path) -> Double {
    server(dir, Kind::default(), |_, _| Act::Good)
}

pub fn train(plan: &rl::Plan, start: Start) -> anyhow::Result<()> {
    rl::train(plan, start, &Interrupt::none(), &mut |_, _| ()).map(drop)
}

pub fn metrics(plan: &rl::Plan) -> Vec<Value> {
    let text = std::fs::read_to_string(plan.train.out.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn episodes(plan: &rl::Plan, step: u64) -> Vec<Record> {
    let text = std::fs::read_to_string(plan.train.out.join(format!("episodes/{step}.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Where the server keeps the state after a step, as the run folder says.
fn state(plan: &rl::Plan, step: u64) -> Value {
    let path = plan.train.out.join(format!("checkpoints/{step}/tinker.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn weights(double: &Double, plan: &rl::Plan) -> Vec<u8> {
    double.weights(state(plan, 3)["state"].as_str().unwrap())
}

fn values(safetensors: &[u8]) -> Vec<f32> {
    let tensors = SafeTensors::deserialize(safetensors).unwrap();
    let mut names = tensors.names();
    names.sort();
    let bytes = |name: &str| tensors.tensor(name).unwrap().data().to_vec();
    names
        .iter()
        .flat_map(|name| bytes(name))
        .collect::<Vec<u8>>()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// The largest difference of two sets of weights, over the largest change that training made.
fn apart(a: &[u8], b: &[u8], from: &[u8]) -> f32 {
    let largest = |a: &[u8], b: &[u8]| values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    largest(a, b) / largest(a, from)
}

/// Our engine, drawing as a server is told to: all members of a group from one number on.
struct AsServed(Embedded);

impl Sampler for AsServed {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> anyhow::Result<Vec<Vec<Completion>>> {
        let seeds: Vec<Vec<u64>> = prompts
            .iter()
            .map(|p| (0..p.seeds.len() as u64).map(|i| p.seeds[0] % ((1 << 31) - (1 << 16)) + i).collect())
            .collect();
        let prompts: Vec<Prompt> = prompts
            .iter()
            .zip(&seeds)
            .map(|(p, seeds)| Prompt { session: p.session, stream: p.stream, seeds })
            .collect();
        self.0.sample(&prompts, sampling)
    }

    fn end_step(&mut self) {
        self.0.end_step();
    }
}

impl Trainer for AsServed {
    fn frontend(&self) -> Frontend {
        self.0.frontend()
    }
    fn samples_exactly(&self) -> bool {
        self.0.samples_exactly()
    }
    fn logprobs(&mut self, groups: &[Group], who: Who) -> anyhow::Result<Vec<Vec<Scores>>> {
        self.0.logprobs(groups, who)
    }
    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> anyhow::Result<Weights>,
    ) -> anyhow::Result<()> {
        self.0.accumulate(groups, weigh)
    }
    fn step(&mut self, learning_rate: f64) -> anyhow::Result<f64> {
        self.0.step(learning_rate)
    }
    fn updates(&self) -> u64 {
        self.0.updates()
    }
    fn forget_views(&mut self) {
        self.0.forget_views();
    }
    fn save(&mut self, dir: &Path) -> anyhow::Result<()> {
        self.0.save(dir)
    }
    fn load(&mut self, dir: &Path) -> anyhow::Result<()> {
        self.0.load(dir)
    }
}

/// The run on our own engine: its weights at the end.
fn here(plan: &rl::Plan) -> Vec<u8> {
    let mut engine = AsServed(Embedded::open(&plan.model, Some(&plan.training().unwrap())).unwrap());
    rl::train_with(&mut engine, plan, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    std::fs::read(plan.train.out.join("checkpoints/3/model.safetensors")).unwrap()
}

/// One config, and what was sampled under it once, for every engine to learn from.
pub struct Shared {
    pub plan: rl::Plan,
    pub here: Embedded,
    pub episodes: Vec<Episode>,
}

pub fn shared(dir: &Path) -> Shared {
    let plan = plan(dir, "shared", &["task.turns=2", "task.on_invalid=resend_image"]);
    let mut here = Embedded::open(&plan.model, Some(&plan.training().unwrap())).unwrap();
    let samples = data::read(&dir.join("train.jsonl")).unwrap();
    let samples: Vec<_> = samples.iter().enumerate().map(|(i, sample)| (i as u64, sample)).collect();
    let frontend = here.frontend.clone();
    let task = plan.task.task(frontend.processor.budget.factor).unwrap();
    let stage = Stage { task: &*task, frontend: &frontend, options: &plan.rollout };
    let episodes = rollout::play(&stage, &mut here, &samples, plan.train.group, 3, 1).unwrap();
    assert!(episodes.iter().any(|e| e.stream.images.len() == 2), "second pictures are part of it");
    Shared { plan, here, episodes }
}

/// Adds up a gradient of these episodes; the protocol carries no weights of entropies.
pub fn learn(engine: &mut dyn Trainer, plan: &rl::Plan, episodes: &[Episode]) {
    let groups: Vec<Group> = episodes.chunks(plan.train.group).map(|g| g.iter().map(|e| &e.stream).collect()).collect();
    engine
        .accumulate(&groups, &mut |_, _, scores| Ok(Weights { entropies: None, ..agreement::weights(scores) }))
        .unwrap();
}

#[test]
fn the_gradient_through_the_protocol_is_the_engines_own() {
    let (_folder, dir) = world();
    let Shared { plan, mut here, episodes } = shared(&dir);
    let double = calm(&dir);
    let there = on(&double, plan.clone(), |_| ());
    let mut served = engine::open(&there.engine, &there.model, &plan.training().unwrap(), false).unwrap();
    learn(&mut here, &plan, &episodes);
    learn(&mut *served, &plan, &episodes);
    served.step(1e-3).unwrap();
    let whole = &here.gradients().unwrap().data;
    assert!(whole.iter().any(|g| g.abs() > 1e-2));
    let (far, tensor) = agreement::apart(&here.model, whole, &double.gradient());
    assert!(far < 1e-5, "{far:e} in {tensor}");
}

/// Three steps on dialogues with pictures. `eps` as in [`plan`].
pub fn fine_tuning(dir: &Path, out: &str) -> sft::Plan {
    let text = format!(
        "[model]\npath = {:?}\n[data]\ntrain = {:?}\nmax_pixels = 12544\nmin_pixels = 3136\n[optim]\nlr = 3e-3\neps = 1e-2\n\
         schedule = \"linear\"\n[train]\nout = {:?}\nsteps = 3\nbatch = 4\ncheckpoint_every = 1\n",
        taught(dir),
        tiny::four_numbers(dir),
        dir.join(out)
    );
    config::parse(&text, &[]).unwrap()
}

/// Trajectories are learnt on a server as they are here, and a run that was stopped goes on there.
#[test]
fn fine_tuning_on_a_server_is_fine_tuning_here() {
    let (_folder, dir) = world();
    let own = fine_tuning(&dir, "sft-here");
    let metrics = sft::train(&own, Start::New, &Interrupt::none()).unwrap();
    let at_home = std::fs::read(own.train.out.join("checkpoints/3/model.safetensors")).unwrap();
    let first = std::fs::read(taught(&dir).join("model.safetensors")).unwrap();
    // Servers' distributions have every id.
    let mut training = plan(&dir, "none", &[]).training().unwrap();
    (training.reference, training.all_ids) = (false, true);
    let double = Double::start(Kind::default(), &taught(&dir), training, hostile);
    let mut there = fine_tuning(&dir, "sft-there");
    there.engine = on(&double, plan(&dir, "none", &[]), |_| ()).engine;
    let stopped = Interrupt::none();
    stopped.ask();
    let error = sft::train(&there, Start::New, &stopped).unwrap_err().to_string();
    assert!(error.contains("interrupted after step 1"), "{error}");
    let there_metrics = sft::train(&there, Start::Resume, &Interrupt::none()).unwrap();
    assert_eq!(double.updates(), 3);
    for name in ["loss", "tokens/likely", "lr", "tokens/trained"] {
        let (a, b) = (metrics[name].as_f64().unwrap(), there_metrics[name].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-4 * a.abs(), "{name}: {a} and {b}");
    }
    let state: Value =
        serde_json::from_slice(&std::fs::read(there.train.out.join("checkpoints/3/tinker.json")).unwrap()).unwrap();
    let far = apart(&at_home, &double.weights(state["state"].as_str().unwrap()), &first);
    assert!(far < 1e-3, "{far}");

    // What a server cannot do is said before it is asked.
    let said = |change: &dyn Fn(&mut sft::Plan)| {
        let mut plan = there.clone();
        change(&mut plan);
        sft::train(&plan, Start::New, &Interrupt::none()).unwrap_err().to_string()
    };
    assert!(said(&|plan| plan.model.freeze = vec!["vision".into()]).contains("model.freeze"));
    let drawn = said(&|plan| {
        (plan.data.train, plan.data.pretrain) = (None, Some(foveate::synth::recipe::Recipe::default()));
    });
    assert!(drawn.contains("data.pretrain"), "{drawn}");
}

#[test]
fn a_run_through_the_protocol_is_the_run_on_the_engine_itself() {
    let (_folder, dir) = world();
    let first = std::fs::read(taught(&dir).join("model.safetensors")).unwrap();
    // At a glance, and with a closer view in the second turn: two pictures, two turns of the policy.
    for (name, extra) in [("glance", vec![]), ("crop", vec!["task.turns=2", "task.on_invalid=resend_image"])] {
        let own = plan(&dir, &format!("{name}-here"), &extra);
        let at_home = here(&own);
        let double = calm(&dir);
        let there = on(&double, plan(&dir, &format!("{name}-there"), &extra), |_| ());
        train(&there, Start::New).unwrap();
        assert_eq!(double.updates(), 6, "two updates a step");

        let mut learnt = false;
        for (step, (a, b)) in metrics(&own).iter().zip(&metrics(&there)).enumerate() {
            for name in ["reward/mean", "actor/lr", "response_length/mean"] {
                assert_eq!(a[name], b[name], "{name} of step {}", step + 1);
            }
            for name in ["actor/pg_loss", "actor/ref_kl", "actor/grad_norm"] {
                let (a, b) = (a[name].as_f64().unwrap(), b[name].as_f64().unwrap());
                // Sums in another order: the server has no tree of a group.
                assert!((a - b).abs() <= 1e-6 + 1e-4 * a.abs(), "{name} of step {}: {a} and {b}", step + 1);
                learnt |= name == "actor/grad_norm" && a > 1e-3;
            }
            // Not a bit is lost on the way: what the sampler said is what the trainer says, and the first update starts from there.
            assert_eq!((&b["mismatch_logprob/max"], &b["ratio/first_update_gap"]), (&0.0.into(), &0.0.into()));
            let (a, b) = (episodes(&own, step as u64 + 1), episodes(&there, step as u64 + 1));
            let said =
                |records: &[Record]| records.iter().map(|r| (r.ids.clone(), r.reward.to_bits())).collect::<Vec<_>>();
            assert_eq!(said(&a), said(&b), "the same samples in step {}", step + 1);
        }
        assert!(learnt, "nothing was learnt, so nothing is shown: {:?}", metrics(&there));
        let apart = apart(&at_home, &weights(&double, &there), &first);
        println!("{name}: weights differ by {apart:.1e} of the change that training made");
        assert!(apart < 1e-3, "{apart}");
        drop(there);
        // Models are handed back. (The engine was dropped when training ended.)
        assert_eq!(double.models(), 0);
    }
}

/// Rows in words alone are trained on a server that knows nothing of pictures; with a single picture among them it is refused.
#[test]
fn words_alone_need_no_server_that_sees() {
    let (_folder, dir) = world();
    let rows = std::fs::read_to_string(dir.join("train.jsonl")).unwrap();
    let words: Vec<String> = rows
        .lines()
        .map(|row| {
            let mut row: Value = serde_json::from_str(row).unwrap();
            (row["images"], row["targets"]) = (serde_json::json!([]), Value::Null);
            row.to_string()
        })
        .collect();
    std::fs::write(dir.join("words.jsonl"), words.join("\n")).unwrap();
    let file = format!("data.train={:?}", dir.join("words.jsonl"));
    let blind = Kind { drops_in_training: true, drops_in_samples: true, ..Kind::default() };
    let double = server(&dir, blind.clone(), |_, _| Act::Good);
    let own = plan(&dir, "words-here", &[&file]);
    let there = on(&double, plan(&dir, "words-there", &[&file]), |_| ());
    let first = std::fs::read(taught(&dir).join("model.safetensors")).unwrap();
    let at_home = here(&own);
    train(&there, Start::New).unwrap();
    assert!(episodes(&there, 1).iter().all(|record| record.images.is_empty() && record.turns.len() == 2));
    assert!(apart(&at_home, &weights(&double, &there), &first) < 1e-3);

    std::fs::write(
        dir.join("mixed.jsonl"),
        format!("{}\n{}", words.join("\n"), rows.lines().next().unwrap().replace("row-0", "seen")),
    )
    .unwrap();
    let mixed = plan(&dir, "mixed", &[&format!("data.train={:?}", dir.join("mixed.jsonl"))]);
    let error = format!("{:#}", train(&on(&double, mixed, |_| ()), Start::New).unwrap_err());
    assert!(error.contains("drops pictures"), "{error}");
}

/// Passes and samples as protobuf: the run that it is in JSON, to the last bit; and a server that takes nothing else says so to a config that
/// speaks JSON.
#[test]
fn in_protobuf_it_is_the_same_run() {
    let (_folder, dir) = world();
    let extra = ["task.turns=2", "task.on_invalid=resend_image"];
    let double = calm(&dir);
    let in_json = on(&double, plan(&dir, "json", &extra), |_| ());
    train(&in_json, Start::New).unwrap();
    let kind = Kind { protobuf_only: true, prompt_logprobs: true, ..Kind::default() };
    let strict = server(&dir, kind.clone(), hostile);
    let packed = on(&strict, plan(&dir, "packed", &extra), |options| {
        (options.encoding, options.timeout_s) = (Encoding::Protobuf, 3.0);
    });
    train(&packed, Start::New).unwrap();
    for (a, b) in metrics(&in_json).iter().zip(&metrics(&packed)) {
        for name in ["reward/mean", "actor/pg_loss", "mismatch_logprob/max"] {
            assert_eq!(a[name], b[name], "{name}");
        }
    }
    assert!(weights(&double, &in_json) == weights(&strict, &packed));
    let error = refused(&dir, kind, |_| ());
    assert!(error.contains("415") && error.contains("engine.encoding"), "{error}");
}

/// Every way to misbehave, spread over the run so that each operation meets several.
fn hostile(operation: &str, before: usize) -> Act {
    use Act::*;
    let turns: &[Act] = match operation {
        "retrieve_future" => &[
            Good,
            TryAgain,
            Good,
            Pending,
            Good,
            Status(500, "oops"),
            HangUp,
            Good,
            LoseAnswer,
            CutAnswer,
            Good,
            BadGateway,
        ],
        "session_heartbeat" | "healthz" | "unload_model" | "get_server_capabilities" => &[Good],
        "create_session" => &[Status(503, ""), Good],
        "create_model" | "load_weights" => &[Good],
        // What changes the model: lost on the way there and on the way back.
        "forward_backward" => &[Good, LoseAnswer, Good, HangUp, Status(429, ""), CutAnswer, BadGateway, Good, Good],
        "optim_step" => {
            &[LoseAnswer, Good, Good, CutAnswer, Good, BadGateway, HangUp, Status(500, "{}"), Good, Late, Good, Good]
        }
        "forward" => &[Good, Good, Good, LoseAnswer, Good, Status(502, ""), Good],
        "asample" => &[Good, Good, Good, HangUp, Good, LoseAnswer, Good, Status(503, "busy"), CutAnswer, Good],
        "save_weights_for_sampler" => &[Good, LoseAnswer, Good, HangUp, Good],
        "save_weights" => &[LoseAnswer, Good, Good, CutAnswer, Good, Good, BadGateway, Good, Good],
        _ => &[Good],
    };
    turns[before % turns.len()]
}

#[test]
fn whatever_happens_on_the_way_the_weights_are_those_of_an_undisturbed_run() {
    let (_folder, dir) = world();
    let undisturbed = calm(&dir);
    let quiet = on(&undisturbed, plan(&dir, "calm", &[]), |_| ());
    train(&quiet, Start::New).unwrap();
    let expected = weights(&undisturbed, &quiet);

    let wild = server(&dir, Kind::default(), hostile);
    let disturbed = on(&wild, plan(&dir, "wild", &[]), |options| options.timeout_s = 3.0);
    train(&disturbed, Start::New).unwrap();
    assert_eq!(wild.updates(), 6, "no update was applied twice");
    assert!(weights(&wild, &disturbed) == expected, "the weights differ");
    for operation in ["optim_step", "forward_backward", "asample", "retrieve_future", "save_weights"] {
        let (calls, good) = wild.calls(operation);
        assert!(calls > good, "{operation} was never disturbed");
    }

    // A forgotten future of what changes nothing is asked for anew; of an update, the server still knows the request.
    let forgetful = server(&dir, Kind::default(), |operation, before| match operation {
        "retrieve_future" if before % 5 == 3 => Act::Forget,
        _ => Act::Good,
    });
    let plan = on(&forgetful, plan(&dir, "forgetful", &["train.steps=1"]), |options| options.max_in_flight = 1);
    // The futures of the double are gone for good, so an update among them ends the run; whichever comes first is told clearly.
    if let Err(error) = train(&plan, Start::New) {
        let error = format!("{error:#}");
        assert!(error.contains("--resume"), "{error}");
        assert!(forgetful.updates() <= 2);
    }
}

#[test]
fn a_lost_update_is_not_repeated_where_the_server_would_apply_it_twice() {
    let (_folder, dir) = world();
    let undisturbed = calm(&dir);
    let quiet = on(&undisturbed, plan(&dir, "calm", &[]), |_| ());
    train(&quiet, Start::New).unwrap();
    let expected = weights(&undisturbed, &quiet);

    // The fourth update is applied and its answer lost, by a server that takes a repeated request for a new one. In the other run it is the
    // answer to the first gradients of that update.
    for (name, operation) in [("update", "optim_step"), ("gradients", "forward_backward")] {
        let kind = Kind { knows_repeats: false, ..Kind::default() };
        let (updates, lost) = (AtomicUsize::new(0), AtomicBool::new(false));
        let double = server(&dir, kind, move |called, _| {
            let fourth = updates.load(Ordering::SeqCst) == 3;
            updates.fetch_add(usize::from(called == "optim_step"), Ordering::SeqCst);
            match called == operation && fourth && !lost.swap(true, Ordering::SeqCst) {
                true => Act::LoseAnswer,
                false => Act::Good,
            }
        });
        let plan = on(&double, plan(&dir, name, &[]), |_| ());
        let error = format!("{:#}", train(&plan, Start::New).unwrap_err());
        assert!(error.contains("nothing is applied twice") && error.contains("--resume"), "{error}");
        train(&plan, Start::Resume).unwrap();
        assert!(weights(&double, &plan) == expected, "{name}: the weights differ");
        assert_eq!(state(&plan, 3)["updates"], 6);
        assert_eq!(metrics(&plan).len(), 3);
    }

    // A server that is started anew in the middle has forgotten its models, but not what was saved.
    let double = calm(&dir);
    let plan = on(&double, plan(&dir, "restarted", &[]), |options| options.patience_s = 0.5);
    let interrupt = Interrupt::none();
    let error = rl::train(&plan, Start::New, &interrupt, &mut |step, _| {
        if step == 2 {
            double.restart();
        }
    })
    .unwrap_err();
    assert!(format!("{error:#}").contains("--resume"), "{error:#}");
    train(&plan, Start::Resume).unwrap();
    assert!(weights(&double, &plan) == expected);
}

#[test]
fn a_server_that_takes_means_is_found_out_and_can_be_used_all_the_same() {
    let (_folder, dir) = world();
    let first = std::fs::read(taught(&dir).join("model.safetensors")).unwrap();
    let one = ["train.updates=1", "objective.kl_coef=0"];
    let summing = calm(&dir);
    let sums = on(&summing, plan(&dir, "sums", &one), |_| ());
    train(&sums, Start::New).unwrap();

    let means = |reports_loss| server(&dir, Kind { means: true, reports_loss, ..Kind::default() }, |_, _| Act::Good);
    // By the loss that it reports, or because it reports none.
    for (reports_loss, words) in [(true, "does not add up losses"), (false, "does not report its loss")] {
        let double = means(reports_loss);
        let plan = on(&double, plan(&dir, &format!("found-{reports_loss}"), &one), |_| ());
        let error = train(&plan, Start::New).unwrap_err();
        assert!(error.chain().any(|cause| cause.is::<BadConfig>()), "{error:#}");
        assert!(format!("{error:#}").contains(words) && format!("{error:#}").contains("sequence_mean"), "{error:#}");
        assert_eq!(double.updates(), 0);
    }
    let double = means(false);
    let told = on(&double, plan(&dir, "told", &one), |options| {
        options.reduction = Some(foveate::engine::tinker::Reduction::SequenceMean);
        options.loss = foveate::engine::tinker::Loss::ImportanceSampling;
    });
    train(&told, Start::New).unwrap();
    let apart = apart(&weights(&summing, &sums), &weights(&double, &told), &first);
    println!("means through importance_sampling: weights differ by {apart:.1e} of the change that training made");
    assert!(apart < 1e-3, "{apart}");
}

/// Why a run on this server does not begin; it must be the config's fault, told in one line, and leave no folder behind.
fn refused(dir: &Path, kind: Kind, change: impl FnOnce(&mut Options)) -> String {
    let double = server(dir, kind, |_, _| Act::Good);
    let plan = on(&double, plan(dir, "refused", &[]), change);
    let error = train(&plan, Start::New).unwrap_err();
    let told = format!("{error:#}");
    assert!(error.chain().any(|cause| cause.is::<BadConfig>()), "{told}");
    assert!(!told.contains('\n') && !plan.train.out.exists(), "{told}");
    assert_eq!(double.updates(), 0);
    told
}

#[test]
fn a_server_that_cannot_do_it_is_refused_before_anything_is_trained() {
    let (_folder, dir) = untaught();
    std::fs::create_dir_all(dir.join("sft/checkpoints")).unwrap();
    std::fs::rename(dir.join("model"), taught(&dir)).unwrap();

    let blind = refused(&dir, Kind { drops_in_training: true, ..Kind::default() }, |_| ());
    assert!(blind.contains("drops pictures in its forward pass") && blind.contains("log-probs"), "{blind}");
    let blind = refused(&dir, Kind { drops_in_training: true, pads_by_inputs: true, ..Kind::default() }, |_| ());
    assert!(blind.contains("drops pictures in its forward pass") && blind.contains("exceeds max_length"), "{blind}");
    let blind = refused(&dir, Kind { drops_in_samples: true, ..Kind::default() }, |_| ());
    assert!(blind.contains("drops pictures in its sampler") && blind.contains("same certainty"), "{blind}");
    let blind = refused(&dir, Kind { drops_in_samples: true, prompt_logprobs: true, ..Kind::default() }, |_| ());
    assert!(blind.contains("drops pictures in its sampler") && blind.contains("tokens has"), "{blind}");

    let key = refused(&dir, Kind { key: Some("tml-right"), ..Kind::default() }, |_| ());
    assert!(key.contains("FOVEATE_TEST_NO_SUCH_KEY is not set"), "{key}");
    // A variable that every process has, and no server's key.
    let key = refused(&dir, Kind { key: Some("tml-right"), ..Kind::default() }, |options| {
        options.api_key_env = "PATH".into()
    });
    let own = std::env::var("PATH").unwrap();
    assert!(key.contains("look at the key") && key.contains("[key]") && !key.contains(&own), "{key}");

    let model = refused(&dir, Kind::default(), |options| options.base_model = "tiny/tiny-vlm".into());
    assert!(model.contains("did you mean \"tiny/tiny-vl\"?"), "{model}");
    let url = refused(&dir, Kind::default(), |options| options.url += "/elsewhere");
    assert!(url.contains("engine.url"), "{url}");
    let url = refused(&dir, Kind::default(), |options| options.url = "http://127.0.0.1:9".into());
    assert!(url.contains("nobody answers at engine.url"), "{url}");

    // The picture of the probe is small, those of the rows are not.
    let narrow = server(&dir, Kind { largest: 8_000, ..Kind::default() }, |_, _| Act::Good);
    let error = format!("{:#}", train(&on(&narrow, plan(&dir, "large", &[]), |_| ()), Start::New).unwrap_err());
    assert!(error.contains("413") && error.contains("max_request_mib") && error.contains("max_pixels"), "{error}");
    // The server's own reasons are passed on.
    let double = server(&dir, Kind { models_at_once: 1, ..Kind::default() }, |_, _| Act::Good);
    let error = format!("{:#}", train(&on(&double, plan(&dir, "one", &[]), |_| ()), Start::New).unwrap_err());
    assert!(error.contains("already has a 'policy' model") && error.contains("objective.kl_coef = 0"), "{error}");
    // A view that the server's processor would resize would not have the tokens that were counted.
    let small = plan(&dir, "small", &["task.max_pixels=2352", "task.min_pixels=784"]);
    let double = calm(&dir);
    let error = format!("{:#}", train(&on(&double, small, |_| ()), Start::New).unwrap_err());
    assert!(error.contains("would be resized") && error.contains("task.max_pixels"), "{error}");
    // A server that hangs is away, and is not waited for longer than was said.
    let hung =
        server(&dir, Kind::default(), |operation, _| if operation == "create_model" { Act::HangUp } else { Act::Good });
    let began = std::time::Instant::now();
    let error = train(&on(&hung, plan(&dir, "hung", &[]), |options| options.patience_s = 0.2), Start::New).unwrap_err();
    assert!(format!("{error:#}").contains("no answer") && began.elapsed() < Duration::from_secs(20), "{error:#}");
}

#[test]
fn what_the_protocol_cannot_carry_is_refused_in_the_config() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for (change, word) in [
        ("objective.entropy_coef=0.01", "entropy_coef"),
        ("rollout.temperature=0.7", "temperature"),
        ("model.freeze=[\"vision\"]", "model.freeze"),
        ("engine.lora_rnk=8", "lora_rnk"),
        ("engine.url=\"\"", "engine.url"),
    ] {
        let text = format!(
            "[model]\npath = {:?}\n[engine]\nkind = \"tinker\"\nurl = \"http://h\"\nbase_model = \"m\"\n[data]\ntrain = \"x\"\n[task]\n[train]\n",
            dir.join("m")
        );
        let parsed = config::parse::<rl::Plan>(&text, &[change.to_owned()]);
        let error = parsed.and_then(rl::Plan::resolve).unwrap_err();
        assert!(format!("{error:#}").contains(word), "{change}: {error:#}");
    }
}
