//! Stopping and going on is as if one had not stopped: weights, optimiser and metrics, bit for bit.

use std::path::{Path, PathBuf};

use foveate::config;
use foveate::episode::Record;
use foveate::rl;
use foveate::run::{EVENTS, Interrupt, Interrupted, Start};
use foveate::sft;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::cli::{foveate, good, refused};
use crate::tiny;

/// A KL against the first weights and an entropy bonus, so that every step moves the weights whatever the rewards are.
fn rl_plan(dir: &Path, out: &str, extra: &[&str]) -> rl::Plan {
    let text = format!(
        r#"
        [model]
        path = "{model}"
        [data]
        train = "{rows}"
        [task]
        template = "short"
        max_pixels = 12544
        min_pixels = 3136
        judge = "number"
        [rollout]
        max_new_tokens = 8
        max_tokens = 512
        stop = ["e", "a", "o", "t", "1", "5"]
        [objective]
        kl_coef = 0.05
        entropy_coef = 0.02
        [optim]
        lr = 3e-3
        schedule = "linear"
        [train]
        out = "{out}"
        steps = 4
        prompts = 2
        group = 2
        checkpoint_every = 2
        "#,
        model = dir.join("model").display(),
        rows = dir.join("train.jsonl").display(),
        out = dir.join(out).display(),
    );
    let overrides: Vec<String> = extra.iter().map(|s| (*s).to_owned()).collect();
    config::parse::<rl::Plan>(&text, &overrides).unwrap().resolve().unwrap()
}

fn sft_plan(dir: &Path, out: &str) -> sft::Plan {
    let text = format!(
        r#"
        [model]
        path = "{model}"
        [data]
        train = "{rows}"
        max_pixels = 12544
        min_pixels = 3136
        [optim]
        lr = 3e-3
        schedule = "cosine"
        [train]
        out = "{out}"
        steps = 4
        batch = 2
        checkpoint_every = 1
        "#,
        model = dir.join("model").display(),
        rows = dir.join("dialogues.jsonl").display(),
        out = dir.join(out).display(),
    );
    config::parse(&text, &[]).unwrap()
}

/// `metrics.jsonl` without what a clock or the system measured.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut row: serde_json::Map<String, Value> = serde_json::from_str(line).unwrap();
            row.retain(|name, _| !name.starts_with("timing_s/") && !name.starts_with("perf/"));
            Value::Object(row)
        })
        .collect()
}

fn same_end(a: &Path, b: &Path) {
    let bytes = |run: &Path, file: &str| std::fs::read(run.join("checkpoints/4").join(file)).unwrap();
    let adapter = a.join("checkpoints/4/adapter_model.safetensors").exists();
    for file in [if adapter { "adapter_model.safetensors" } else { "model.safetensors" }, "state.json"] {
        assert!(bytes(a, file) == bytes(b, file), "{file} differs");
    }
    // The order of a safetensors header's metadata is not fixed; what it says is.
    let (a_bytes, b_bytes) = (bytes(a, "optimizer.safetensors"), bytes(b, "optimizer.safetensors"));
    let said = |bytes: &[u8]| SafeTensors::read_metadata(bytes).unwrap().1.metadata().clone();
    assert_eq!(said(&a_bytes), said(&b_bytes));
    for moments in ["m", "v"] {
        let of = |bytes: &[u8]| SafeTensors::deserialize(bytes).unwrap().tensor(moments).unwrap().data().to_vec();
        assert!(of(&a_bytes) == of(&b_bytes), "{moments} differs");
        assert!(of(&a_bytes).iter().any(|b| *b != 0));
    }
    assert_eq!(metrics(a), metrics(b));
    assert_eq!(metrics(a).len(), 4);
}

fn world() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    tiny::checkpoint(&path, 9);
    tiny::rows(&path, 3);
    (dir, path)
}

/// Adapters on the language model, the tower and the merger: a checkpoint is the adapter alone, beside a model that stays as it was.
#[test]
fn adapters_go_on_as_if_they_had_not_stopped() {
    let (_dir, dir) = world();
    let lora = ["model.lora.rank=4", "model.lora.targets=[\"*\"]"];
    let base = std::fs::read(dir.join("model/model.safetensors")).unwrap();
    let whole = rl_plan(&dir, "whole", &lora);
    rl::train(&whole, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    for row in metrics(&whole.train.out) {
        assert_eq!(row["ratio/first_update_gap"], 0.0, "{row}");
        assert!(row["actor/grad_norm"].as_f64().unwrap() > 0.0, "nothing was learnt, so nothing is shown: {row}");
    }
    let kl = |step: usize| metrics(&whole.train.out)[step]["actor/ref_kl"].as_f64().unwrap();
    assert!(kl(0) == 0.0 && kl(1) != 0.0, "the reference is the model without its adapter");
    let plan = rl_plan(&dir, "parts", &[&lora[..], &["train.checkpoint_every=0"]].concat());
    let interrupt = Interrupt::none();
    let stopped = rl::train(&plan, Start::New, &interrupt, &mut |step, _| {
        if step == 2 {
            interrupt.ask();
        }
    });
    assert!(stopped.unwrap_err().is::<Interrupted>());
    rl::train(&plan, Start::Resume, &Interrupt::none(), &mut |_, _| ()).unwrap();
    same_end(&plan.train.out, &whole.train.out);
    assert!(!plan.train.out.join("checkpoints/4/model.safetensors").exists());
    assert_eq!(std::fs::read(dir.join("model/model.safetensors")).unwrap(), base);

    // Another run goes on with the adapter, from its folder.
    let on = rl_plan(&dir, "on", &lora);
    let on = rl::Plan {
        model: foveate::engine::ModelOptions { path: whole.train.out.join("checkpoints/4"), ..on.model },
        ..on
    };
    rl::train(&on, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    let first = &metrics(&on.train.out)[0];
    assert!(first["ratio/first_update_gap"] == 0.0 && first["actor/ref_kl"] == 0.0, "{first}");
}

#[test]
fn rl_goes_on_as_if_it_had_not_stopped() {
    let (_dir, dir) = world();
    let whole = rl_plan(&dir, "whole", &[]);
    rl::train(&whole, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    for row in metrics(&whole.train.out) {
        // The policy that is trained is the one that sampled, to the last bit, at every step.
        assert_eq!(row["ratio/first_update_gap"], 0.0, "{row}");
        assert!(row["actor/grad_norm"].as_f64().unwrap() > 0.0, "nothing was learnt, so nothing is shown: {row}");
    }
    assert_ne!(metrics(&whole.train.out)[1]["actor/ref_kl"], 0.0, "the reference stays behind");

    // Asked to stop during step 2: the step is finished, a checkpoint written, and the error says so.
    let plan = rl_plan(&dir, "parts", &["train.checkpoint_every=0"]);
    let interrupt = Interrupt::none();
    let stopped = rl::train(&plan, Start::New, &interrupt, &mut |step, _| {
        if step == 2 {
            interrupt.ask();
        }
    });
    let error = stopped.unwrap_err();
    assert!(error.is::<Interrupted>() && error.to_string().contains("after step 2"), "{error}");
    assert!(plan.train.out.join("checkpoints/2/state.json").is_file());

    // As a crash would leave it: half a checkpoint, one without its state, metrics and episodes of a step never finished, a torn line.
    let checkpoints = plan.train.out.join("checkpoints");
    for half in ["3.tmp", "4"] {
        std::fs::create_dir(checkpoints.join(half)).unwrap();
        std::fs::write(checkpoints.join(half).join("model.safetensors"), b"half").unwrap();
    }
    let log = plan.train.out.join("metrics.jsonl");
    let torn = std::fs::read_to_string(&log).unwrap() + "{\"step\":3,\"reward/mean\":9}\n{\"step\":4,\"rew";
    std::fs::write(&log, torn).unwrap();
    std::fs::write(plan.train.out.join("episodes/3.jsonl"), b"{").unwrap();

    rl::train(&plan, Start::Resume, &Interrupt::none(), &mut |_, _| ()).unwrap();
    same_end(&whole.train.out, &plan.train.out);
    for step in 1..=4 {
        let episodes = |run: &Path| std::fs::read_to_string(run.join(format!("episodes/{step}.jsonl"))).unwrap();
        assert_eq!(episodes(&whole.train.out), episodes(&plan.train.out), "step {step}");
    }
    assert!(!checkpoints.join("3.tmp").exists());
    // Each start has its own file for TensorBoard; the second takes back what the first said of later steps (tests of run/events.rs).
    assert_eq!((event_files(&whole.train.out), event_files(&plan.train.out)), (1, 2));
}

fn event_files(run: &Path) -> usize {
    let names = std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(EVENTS)).count()
}

fn records(run: &Path, file: &str) -> Vec<Record> {
    let text = std::fs::read_to_string(run.join(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn several_updates_masks_and_dynamic_sampling_run() {
    let (_dir, dir) = world();
    // Two updates a step: the second is off-policy, the first is not. Held-out rows are
    // played after each step, between the update and the next sampling.
    let held_out = format!("eval.rows={}", dir.join("train.jsonl").display());
    let plan = rl_plan(
        &dir,
        "updates",
        &["train.updates=2", "train.steps=2", "objective.kl_coef=0", "eval.every=1", &held_out],
    );
    rl::train(&plan, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    for row in metrics(&plan.train.out) {
        assert_eq!((&row["ratio/first_update_gap"], &row["val/accuracy"]), (&0.0.into(), &0.0.into()));
        assert_ne!(row["ratio/max"], 1.0, "the second update sees other weights than those that sampled");
    }
    // What an update saw at each token stands in the record: one number for each token that was sampled, and its share of the text.
    let played = records(&plan.train.out, "episodes/2.jsonl");
    let mut seen = Vec::new();
    for record in &played {
        let sampled = record.sampled.iter().filter(|sampled| **sampled == 1).count();
        let update = record.update.as_ref().unwrap();
        assert_eq!((update.ratios.len(), update.entropies.len()), (sampled, sampled));
        let policy: Vec<_> = record.turns.iter().filter(|turn| turn.role == "assistant").collect();
        assert_eq!(policy.iter().map(|turn| turn.pieces.len()).sum::<usize>(), sampled);
        seen.extend(update.ratios.iter().map(|ratio| *ratio == 1.0));
    }
    assert!(
        seen.contains(&true) && seen.contains(&false),
        "the first update's tokens have ratio 1, the second's have not"
    );
    // And the held-out rows' answers are kept for looking at them over time; no update was made of them.
    let held_out = records(&plan.train.out, "validation/2.jsonl");
    assert!(!held_out.is_empty() && held_out.iter().all(|record| record.update.is_none()));
    // Every turn is cut and cut turns are masked: nothing is trained, and nothing breaks.
    let cut = ["rollout.stop=[]", "rollout.max_new_tokens=2", "train.mask_truncated=true", "train.steps=1"];
    let plan = rl_plan(&dir, "masked", &cut);
    rl::train(&plan, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    let row = &metrics(&plan.train.out)[0];
    assert_eq!((&row["response_length/clip_ratio"], &row["actor/grad_norm"]), (&1.0.into(), &0.0.into()));
    let weights = |model: &Path| std::fs::read(model.join("model.safetensors")).unwrap();
    assert!(weights(&plan.model.path) == weights(&plan.train.out.join("checkpoints/1")));
    // Nobody is ever right here, so every group is flat: all are played and dropped, and the step still ends.
    let plan = rl_plan(&dir, "dynamic", &["objective.drop_equal_groups=true", "train.refill=2", "train.steps=1"]);
    rl::train(&plan, Start::New, &Interrupt::none(), &mut |_, _| ()).unwrap();
    let row = &metrics(&plan.train.out)[0];
    assert_eq!(
        (&row["dynamic_sampling/played_groups"], &row["dynamic_sampling/dropped_groups"]),
        (&4.into(), &4.into())
    );
}

#[test]
fn sft_goes_on_as_if_it_had_not_stopped() {
    let (_dir, dir) = world();
    let lines: Vec<String> = (0..3)
        .map(|i| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{}.png"}}, {{"type": "text", "text": "What is it?"}}]}}, {{"role": "assistant", "content": "Number {i}."}}]}}"#,
                ["one", "two"][i % 2]
            )
        })
        .collect();
    std::fs::write(dir.join("dialogues.jsonl"), lines.join("\n")).unwrap();
    let whole = sft_plan(&dir, "whole");
    sft::train(&whole, Start::New, &Interrupt::none()).unwrap();

    let plan = sft_plan(&dir, "parts");
    for step in 1..=2 {
        let interrupt = Interrupt::none();
        interrupt.ask();
        let start = if step > 1 { Start::Resume } else { Start::New };
        let error = sft::train(&plan, start, &interrupt).unwrap_err();
        assert!(error.is::<Interrupted>() && error.to_string().contains(&format!("after step {step}")), "{error}");
    }
    sft::train(&plan, Start::Resume, &Interrupt::none()).unwrap();
    same_end(&whole.train.out, &plan.train.out);
    let losses: Vec<f64> = metrics(&whole.train.out).iter().map(|m| m["loss"].as_f64().unwrap()).collect();
    assert!(losses[3] < losses[0], "{losses:?}");

    // The order of rows is part of the state: a file that changed is noticed.
    std::fs::write(dir.join("dialogues.jsonl"), lines[..2].join("\n")).unwrap();
    let error = format!("{:#}", sft::train(&plan, Start::Resume, &Interrupt::none()).unwrap_err());
    assert!(error.contains("3 rows when the run was saved and has 2 now"), "{error}");
}

/// An evaluation and a rollout that were killed among their answers end as those that were not.
#[test]
fn what_was_answered_before_a_kill_is_not_asked_again() {
    let (_dir, dir) = world();
    let conversation = "[model]\npath = 'model'\n[rollout]\nmax_new_tokens = 8\nmax_tokens = 512\n";
    let task = "max_pixels = 12544\nmin_pixels = 3136\njudge = 'number'\ntemplate = 'short'\n";
    std::fs::write(
        dir.join("eval.toml"),
        format!("{conversation}[data]\ntest = 'train.jsonl'\n[tasks.look]\n{task}[eval]\nbatch = 1\n"),
    )
    .unwrap();
    std::fs::write(
        dir.join("rollout.toml"),
        format!(
            "{conversation}[data]\ntrain = 'train.jsonl'\n[task]\n{task}[train]\nsteps = 2\nprompts = 1\ngroup = 2\n"
        ),
    )
    .unwrap();
    for (command, config, out, same) in [
        ("eval", "eval.toml", "eval.out", &["episodes/0.jsonl", "items.jsonl", "table.json", "answers.jsonl"][..]),
        ("rollout", "rollout.toml", "train.out", &["episodes/1.jsonl", "episodes/2.jsonl", "answers.jsonl"][..]),
    ] {
        let (whole, cut) = (format!("{command}-whole"), format!("{command}-cut"));
        good(&dir, &[command, config, &format!("{out}={whole}")]);
        good(&dir, &[command, config, &format!("{out}={cut}")]);
        let record = dir.join(&cut).join("answers.jsonl");
        let answers = std::fs::read_to_string(&record).unwrap();
        let first = answers.find('\n').unwrap() + 1;
        for file in same {
            std::fs::remove_file(dir.join(&cut).join(file)).unwrap();
        }
        std::fs::write(&record, &answers[..first + 20]).unwrap();
        refused(&dir, &[command, config, &format!("{out}={cut}")], 1, &["already holds a run", "--resume"]);
        let more = [command, config, &format!("{out}={cut}"), "--resume", "rollout.temperature=0.5"];
        refused(&dir, &more, 2, &["rollout.temperature", "is now 0.5"]);
        good(&dir, &[command, config, &format!("{out}={cut}"), "--resume"]);
        for file in same {
            let read = |run: &str| std::fs::read_to_string(dir.join(run).join(file)).unwrap();
            assert_eq!(read(&whole), read(&cut), "{command}: {file}");
        }
        // Another picture under the same name is another question; a record that cannot be read leaves what there is.
        let one = dir.join("one.png");
        let picture = std::fs::read(&one).unwrap();
        let mut dark = foveate::image::decode(&one).unwrap().as_image().clone();
        dark.pixels_mut().for_each(|pixel| *pixel = image::Rgb([9, 9, 9]));
        foveate::image::save(&dark, &one).unwrap();
        let lines = || std::fs::read_to_string(&record).unwrap().lines().count();
        let before = lines();
        good(&dir, &[command, config, &format!("{out}={cut}"), "--resume"]);
        assert!(lines() > before, "{command}");
        std::fs::write(&one, picture).unwrap();
        let episodes = std::fs::read(dir.join(&cut).join(same[0])).unwrap();
        let text = std::fs::read_to_string(&record).unwrap();
        std::fs::write(&record, text.replacen("\"logprobs\":[", "\"logprobs\":[0.0,", 1)).unwrap();
        let again = [command, config, &format!("{out}={cut}"), "--resume"];
        let out = foveate(&dir, &again);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains("line 1 of the record of answers is damaged") && said.contains("logprobs"), "{said}");
        assert_eq!(std::fs::read(dir.join(&cut).join(same[0])).unwrap(), episodes, "{command}");
    }
    // The folder of one command is nothing that another goes on with, whatever it is told to accept.
    good(&dir, &["rl", "rollout.toml", "train.out=trained"]);
    let metrics = std::fs::read(dir.join("trained/metrics.jsonl")).unwrap();
    for args in [
        &["rollout", "rollout.toml", "train.out=trained", "--resume"][..],
        &["eval", "eval.toml", "eval.out=trained", "--resume", "--accept-changes"],
    ] {
        refused(&dir, args, 1, &["what foveate rl left", args[0]]);
    }
    refused(&dir, &["rl", "rollout.toml", "train.out=rollout-cut", "--resume"], 1, &["what foveate rollout left"]);
    assert_eq!(std::fs::read(dir.join("trained/metrics.jsonl")).unwrap(), metrics);
    assert!(dir.join("rollout-cut/answers.jsonl").exists());
}
