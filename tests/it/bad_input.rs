//! What the program says about bad input: one line on stderr that names the file, row or key, exit code 2 (bad usage or config) or 1 (anything
//! else), and no half-written file.

use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::cli::{files, foveate, good, json, refused, strange_pictures, text, world};

#[test]
fn bad_configs_are_usage_errors() {
    let world = world();
    let dir = world.path();
    let before = files(dir);
    refused(dir, &["rl", "nowhere.toml"], 2, &["nowhere.toml", "config"]);
    refused(dir, &["rl", "rl.toml", "train.stepz=3"], 2, &["unknown key `stepz`", "did you mean `steps`", "rl.toml"]);
    refused(dir, &["rl", "rl.toml", "objective.clip_hihg=0.3"], 2, &["clip_hihg", "did you mean `clip_high`"]);
    refused(dir, &["rl", "rl.toml", "optim.learning=1"], 2, &["unknown key `learning`"]);
    refused(dir, &["rl", "rl.toml", "train.steps=many"], 2, &["steps", "many", "rl.toml"]);
    refused(dir, &["rl", "rl.toml", "train.group=0"], 2, &["train.group"]);
    refused(
        dir,
        &["rl", "rl.toml", "--dry-run", "train.prompts=100000000"],
        2,
        &["train.prompts = 100000000", "at most"],
    );
    refused(dir, &["rl", "rl.toml", "train.out="], 2, &["train.out is empty"]);
    let all = "model.freeze=['vision','merger','text','embeddings']";
    refused(dir, &["rl", "rl.toml", all], 2, &["model.freeze names every part"]);
    refused(dir, &["rl", "rl.toml", "steps"], 2, &["key=value"]);
    refused(dir, &["rl", "rl.toml", "rollout.temperature=0"], 2, &["rollout.temperature"]);
    refused(dir, &["rl", "rl.toml", "task.turns=0"], 2, &["task.turns"]);
    refused(dir, &["rl", "rl.toml", "task.turns=3"], 2, &["task.turns = 3", "task.free"]);
    refused(dir, &["rl", "rl.toml", "rollout.temperature=nan"], 2, &["rollout.temperature"]);
    refused(dir, &["rl", "rl.toml", "rollout.max_new_tokens=0"], 2, &["rollout.max_new_tokens"]);
    refused(dir, &["rl", "rl.toml", "rollout.stop=['']"], 2, &["rollout.stop"]);
    refused(dir, &["rl", "rl.toml", "train.group=1"], 2, &["train.group = 1", "advantage"]);
    refused(dir, &["rl", "rl.toml", "eval.every=1"], 2, &["eval.every = 1", "eval.rows"]);
    refused(dir, &["rl", "rl.toml", "--dry-run", "task.judge=choice"], 1, &["row", "task.judge", "choices"]);
    refused(dir, &["rl", "rl.toml", "task.pad_ratio=-1"], 2, &["task.pad_ratio"]);
    refused(dir, &["rl", "rl.toml", "task.template=none"], 2, &["template", "none"]);
    refused(dir, &["rl", "rl.toml", "model.freeze=['visoin']"], 2, &["visoin", "vision"]);
    refused(dir, &["rl", "rl.toml", "optim.lr=-1"], 2, &["optim.lr"]);
    refused(dir, &["rl", "rl.toml", "--threads", "0"], 2, &["--threads"]);
    refused(dir, &["doctor", "--threads", "100000"], 2, &["--threads 100000", "1 to 1024"]);
    refused(dir, &["rollout", "rl.toml", "--resume"], 1, &["no run to resume", "run"]);
    refused(dir, &["rl", "rl.toml", "--resume"], 1, &["no run to resume", "run"]);
    refused(
        dir,
        &["rl", "rl.toml", "data.train=none.jsonl"],
        1,
        &["data.train", "there is no data file none.jsonl in"],
    );
    for out in ["train.out=train.jsonl", "train.out=train.jsonl/run"] {
        refused(dir, &["rl", "rl.toml", out], 1, &["needs a folder", "train.jsonl is a file"]);
    }
    refused(dir, &["model", "new", "--preset", "giga", "--out", "m"], 2, &["giga", "nano"]);
    refused(dir, &["data", "make", "plates", "--out", "d", "--size", "big"], 2, &["--size big"]);
    assert_eq!(files(dir), before, "nothing was written");
}

#[test]
fn bad_data_is_named_by_file_row_and_key() {
    let world = world();
    let dir = world.path();
    strange_pictures(dir);
    let row = |image: &str, rest: &str| {
        format!(r#"{{"id": "a", "images": ["{image}"], "question": "?", "answer": "7"{rest}}}"#)
    };
    let cases: Vec<(String, &[&str])> = vec![
        (String::new(), &["no rows"]),
        ("{\"id\": 1".into(), &["row 1", "not JSON"]),
        (row("one.png", ", \"choices\": \"A\""), &["row 1", "choices"]),
        (row("one.png", "").replace("\"7\"", "\"\""), &["row 1", "answer"]),
        (row("one.png", ", \"choices\": [\"3\", \"5\"]"), &["row 1", "answer", "one of its 2 choices"]),
        (row("one.png", ", \"choices\": [\"7\", \"7\"]"), &["row 1", "answer", "the text of 2 choices"]),
        (
            row("one.png", ", \"choices\": [\"B\", \"A\"]").replace("\"7\"", "\"A\""),
            &["row 1", "answer", "a letter and the text of another choice"],
        ),
        (row("one.png", ", \"targets\": [{\"image\": 2, \"bbox\": [1, 1, 9, 9]}]"), &["row 1", "targets[0].image"]),
        (
            row("one.png", ", \"targets\": [{\"image\": 1, \"bbox\": [1, 1, 999, 9]}]"),
            &["row 1", "targets[0].bbox", "200x150"],
        ),
        (format!("{}\n{}", row("one.png", ""), row("one.png", "")), &["row 2", "id"]),
        (row("lost.png", ""), &["row 1", "images[0]", "lost.png"]),
        (row("page.jpg", ""), &["row 1", "images[0]", "page.jpg"]),
        (row("thread.png", ""), &["row 1", "images[0]", "thread.png", "1x10000"]),
    ];
    let before = files(dir);
    for (rows, words) in cases {
        std::fs::write(dir.join("train.jsonl"), &rows).unwrap();
        let words = [&["train.jsonl"], words].concat();
        refused(dir, &["rl", "rl.toml"], 1, &words);
        refused(dir, &["rollout", "rl.toml"], 1, &words);
        assert_eq!(files(dir), before, "{rows}");
        // `data check` lists the same on stdout, one line a problem, and fails.
        let out = foveate(dir, &["data", "check", "train.jsonl"]);
        assert_eq!(out.status.code(), Some(1), "{rows}");
        let listed = text(&out.stdout);
        assert_eq!(listed.lines().count(), 1, "{listed}");
        assert!(words[1..].iter().all(|w| listed.contains(w)), "{words:?} in {listed}");
        let out = foveate(dir, &["data", "check", "train.jsonl", "--json"]);
        assert_eq!(json(&text(&out.stdout))["problems"].as_array().unwrap().len(), 1);
    }
    refused(dir, &["data", "check", "nowhere.jsonl"], 1, &["nowhere.jsonl"]);

    // A picture whose header is whole is opened before the run begins if it is among the first, else when it is played: the row and
    // the file are named either way.
    std::fs::write(dir.join("train.jsonl"), row("cut.png", "")).unwrap();
    let out = foveate(dir, &["rl", "rl.toml"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("row a") && said.contains("cut.png") && said.contains("damaged"), "{said}");
    assert!(files(dir).iter().all(|f| !f.to_string_lossy().ends_with(".tmp")));
    assert!(!dir.join("run").exists());
    // The smallest picture is one.
    std::fs::write(dir.join("train.jsonl"), row("dot.png", "")).unwrap();
    let last = json(&good(dir, &["rl", "rl.toml", "train.out=dot", "--json"]));
    assert_eq!(last["metrics"]["ratio/first_update_gap"], 0.0);

    let misspelt = r#"{"messages": [{"role": "user", "content": "?"}, {"role": "Assistant", "content": "7"}]}"#;
    for (line, word) in [
        ("{\"messages\": 3}", "row 1"),
        ("", "no dialogue"),
        (misspelt, "key \"messages[1].role\": found \"Assistant\", expected \"system\""),
    ] {
        std::fs::write(dir.join("talk.jsonl"), line).unwrap();
        std::fs::write(dir.join("sft.toml"), "[model]\npath='model'\n[data]\ntrain='talk.jsonl'\n[train]\nout='sft'\n")
            .unwrap();
        refused(dir, &["sft", "sft.toml"], 1, &["talk.jsonl", word]);
        assert!(!dir.join("sft").exists());
    }
}

#[test]
fn bad_dialogues_are_named_before_the_first_step() {
    let world = world();
    let dir = world.path();
    let row = |picture: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{picture}"}}, {{"type": "text", "text": "?"}}]}}, {{"role": "assistant", "content": "7"}}]}}"#
        )
    };
    std::fs::write(dir.join("d.jsonl"), [row("one.png"), row("one.png"), row("lost.png")].join("\n")).unwrap();
    std::fs::write(
        dir.join("sft.toml"),
        "[model]\npath = 'model'\n[data]\ntrain = 'd.jsonl'\nmax_tokens = 20\n[train]\nout = 'sft'\nsteps = 1\nbatch = 1\n",
    )
    .unwrap();
    let before = files(dir);
    for args in [&["sft", "sft.toml"][..], &["sft", "sft.toml", "--dry-run"]] {
        refused(dir, args, 1, &["row 3", "messages[0].content[0].image", "lost.png", "d.jsonl"]);
    }
    assert_eq!(files(dir), before);
    let out = foveate(dir, &["data", "check", "d.jsonl", "--model", "model", "--config", "sft.toml", "--json"]);
    assert_eq!(out.status.code(), Some(1));
    let told: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&told["format"], &told["rows"], &told["pictures"]), (&"dialogues".into(), &3.into(), &2.into()));
    assert_eq!((&told["problems"][0]["row"], told["problems"].as_array().unwrap().len()), (&3.into(), 1));
    let written = &told["written"];
    assert_eq!(
        (&written["dialogues"], &written["too_long"], &written["max_tokens"]),
        (&2.into(), &2.into(), &20.into())
    );
    // "7" and the end of the turn.
    assert_eq!((&written["trained"]["least"], &written["pictures"]["most"]), (&2.into(), &1.into()));
    good(dir, &["sft", "sft.toml", "--dry-run", "data.leave_out_bad=true"]);
    refused(dir, &["sft", "sft.toml", "data.format=own"], 2, &["data.format"]);
    refused(dir, &["sft", "sft.toml", "data.snap=7"], 2, &["data.snap", "[task]"]);
    refused(
        dir,
        &["sft", "sft.toml", "data.train=none.jsonl"],
        1,
        &["data.train", "there is no data file none.jsonl in"],
    );
    // One that is too long is left out wherever it stands, and of nothing else there is no step.
    let said = |words: usize| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "?"}}, {{"role": "assistant", "content": "{}"}}]}}"#,
            "7".repeat(words)
        )
    };
    std::fs::write(dir.join("d.jsonl"), [said(1), said(90)].join("\n")).unwrap();
    let run = ["sft", "sft.toml", "data.max_tokens=40", "train.steps=6", "train.out=on", "--json"];
    good(dir, &run);
    let metrics = std::fs::read_to_string(dir.join("on/metrics.jsonl")).unwrap();
    let left_out: Vec<u64> = metrics.lines().map(|l| json(l)["data/left_out"].as_u64().unwrap()).collect();
    assert!(left_out.len() == 6 && left_out.iter().sum::<u64>() >= 2, "{left_out:?}");
    std::fs::write(dir.join("d.jsonl"), said(90)).unwrap();
    refused(
        dir,
        &["sft", "sft.toml", "data.max_tokens=40", "model.check_memory=false", "train.out=no"],
        1,
        &["data.max_tokens = 40"],
    );
    std::fs::write(dir.join("d.jsonl"), row("one.png")).unwrap();
    let shown = good(dir, &["data", "check", "d.jsonl", "--model", "model"]);
    assert!(shown.contains("1 dialogues") && shown.contains("pictures a dialogue"), "{shown}");
}

#[test]
fn a_picture_that_is_damaged_behind_its_header_costs_its_row() {
    let world = world();
    let dir = world.path();
    strange_pictures(dir);
    let row = |i: usize, image: &str| {
        format!(r#"{{"id": "row-{i}", "images": ["{image}"], "question": "What number is it?", "answer": "7"}}"#)
    };
    let file = |pictures: &[&str]| {
        let rows: Vec<String> = pictures.iter().enumerate().map(|(i, picture)| row(i, picture)).collect();
        std::fs::write(dir.join("train.jsonl"), rows.join("\n")).unwrap();
    };
    let steps = ["train.steps=3", "train.prompts=2", "train.checkpoint_every=1"];
    let run = |out: &'static str| [&["rl", "rl.toml", out][..], &steps[..]].concat();
    file(&["one.png", "cut.png", "two.png"]);
    let out = foveate(dir, &run("train.out=named"));
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    let words = ["row row-1", "cut.png", "damaged", "data check", "data.leave_out_bad=true"];
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    // Left out, another is drawn in its place: every step has its two groups.
    let out = foveate(dir, &[&run("train.out=on")[..], &["data.leave_out_bad=true"]].concat());
    let said = text(&out.stderr);
    assert!(out.status.success() && said.contains("cut.png"), "{said}");
    assert_eq!(said.matches("row row-1 is left out").count(), 1, "drawn in every epoch, told once: {said}");
    let metrics = std::fs::read_to_string(dir.join("on/metrics.jsonl")).unwrap();
    let left_out: Vec<u64> = metrics.lines().map(|l| json(l)["data/left_out"].as_u64().unwrap()).collect();
    assert!(left_out.len() == 3 && left_out.iter().sum::<u64>() >= 2, "{left_out:?}");
    for step in 1..=3 {
        let episodes = std::fs::read_to_string(dir.join(format!("on/episodes/{step}.jsonl"))).unwrap();
        let groups: std::collections::BTreeSet<u64> =
            episodes.lines().map(|l| json(l)["group"].as_u64().unwrap()).collect();
        assert_eq!(groups.len(), 2, "step {step}");
    }
    let held_out = ["eval.rows=train.jsonl", "eval.every=1"];
    refused(dir, &[&run("train.out=held")[..], &held_out].concat(), 1, &["row row-1", "train.jsonl", "cut.png"]);
    // What is only played evaluates nothing.
    good(dir, &["rollout", "rl.toml", "data.leave_out_bad=true", "train.steps=1", "train.out=played", held_out[0]]);
    // However few are good, these are reckoned with and asked; where there is none, the run ends.
    for (good_row, code) in [("one.png", 0), ("cut.png", 1)] {
        file(&["cut.png", "cut.png", "cut.png", "cut.png", good_row, "cut.png", "cut.png", "cut.png"]);
        let out = format!("train.out=few-{code}");
        let few = ["rl", "rl.toml", "data.leave_out_bad=true", "train.steps=2", "train.prompts=5", &out];
        let out = foveate(dir, &few);
        assert_eq!(out.status.code(), Some(code), "{}", text(&out.stderr));
    }

    let talk = |picture: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{picture}"}}]}}, {{"role": "assistant", "content": "7"}}]}}"#
        )
    };
    std::fs::write(dir.join("talk.jsonl"), [talk("one.png"), talk("cut.png")].join("\n")).unwrap();
    std::fs::write(
        dir.join("sft.toml"),
        "[model]\npath='model'\n[data]\ntrain='talk.jsonl'\n[train]\nout='sft'\nbatch=2\nsteps=2\n",
    )
    .unwrap();
    let out = foveate(dir, &["sft", "sft.toml"]);
    let said = text(&out.stderr);
    assert!(!out.status.success() && said.contains("row 2") && said.contains("cut.png"), "{said}");
    let out = foveate(dir, &["sft", "sft.toml", "data.leave_out_bad=true", "train.out=talked"]);
    let said = text(&out.stderr);
    assert!(out.status.success() && said.contains("left out: row 2"), "{said}");
    let metrics = std::fs::read_to_string(dir.join("talked/metrics.jsonl")).unwrap();
    assert!(metrics.lines().count() == 2 && metrics.lines().all(|l| json(l)["data/left_out"] == 1), "{metrics}");
}

/// Writes the model's weights again after a change to its tensors (name, shape, bytes).
fn rewrite(dir: &Path, change: impl FnOnce(&mut Vec<(String, Vec<usize>, Vec<u8>)>)) {
    let path = dir.join("model/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, t)| (name.to_owned(), t.shape().to_vec(), t.data().to_vec()))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(n, s, d)| (n.as_str(), TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn damaged_checkpoints_are_named_by_tensor_and_file() {
    let dir = world();
    let weights = dir.path().join("model/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let fails = |words: &[&str]| {
        let before = files(dir.path());
        for args in [
            &["rl", "rl.toml"][..],
            &["ask", "--model", "model", "--image", "one.png", "What is it?"],
            &["model", "export", "model", "--out", "exported"],
        ] {
            refused(dir.path(), args, 1, words);
        }
        assert_eq!(files(dir.path()), before);
    };
    let at = "model.layers.1.mlp.up_proj.weight";
    rewrite(dir.path(), |t| t.retain(|(name, ..)| name != at));
    fails(&[at, "missing", "[48, 32]", "model"]);
    std::fs::write(&weights, &whole).unwrap();
    let processor = dir.path().join("model/preprocessor_config.json");
    let settings = std::fs::read_to_string(&processor).unwrap();
    std::fs::write(&processor, settings.replace("\"patch_size\":14", "\"patch_size\":16")).unwrap();
    let words = ["`patch_size` is 16", "preprocessor_config.json", "`vision_config.patch_size` is 14", "config.json"];
    refused(dir.path(), &["ask", "--model", "model", "--image", "one.png", "What is it?"], 1, &words);
    std::fs::write(&processor, settings).unwrap();
    rewrite(dir.path(), |t| t.iter_mut().find(|t| t.0 == at).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    fails(&[at, "not finite", "model.safetensors"]);
    std::fs::write(&weights, &whole).unwrap();
    rewrite(dir.path(), |t| t.iter_mut().find(|t| t.0 == at).unwrap().1.reverse());
    fails(&[at, "[32, 48]", "expected [48, 32]", "model.safetensors"]);
    std::fs::write(&weights, &whole[..whole.len() - 1000]).unwrap();
    fails(&["model.safetensors", "complete"]);
    std::fs::write(&weights, &whole[..100]).unwrap();
    fails(&["model.safetensors"]);
    std::fs::remove_file(&weights).unwrap();
    fails(&["no weights", "model"]);
    std::fs::write(&weights, &whole).unwrap();
    std::fs::write(dir.path().join("model/config.json"), "{\"model_type\": \"llama\"}").unwrap();
    fails(&["config.json", "llama"]);
    std::fs::remove_file(dir.path().join("model/config.json")).unwrap();
    fails(&["config.json"]);
    std::fs::remove_file(dir.path().join("model/tokenizer.json")).unwrap();
    refused(dir.path(), &["trace", "--model", "model", "--messages", "m.json", "--out", "t"], 1, &["tokenizer.json"]);
}
