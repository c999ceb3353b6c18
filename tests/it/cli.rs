//! The program from outside: what it leaves behind, and what other programs read of it. What it says about bad input is in `bad_input.rs`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::tiny;
use foveate::model::{Config, presets};

pub fn foveate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_foveate"))
        .current_dir(dir)
        .env("NO_COLOR", "1")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// The same with something to read.
pub fn fed(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_foveate"))
        .current_dir(dir)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs what must succeed and gives its stdout.
pub fn good(dir: &Path, args: &[&str]) -> String {
    let out = foveate(dir, args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// Runs what must fail: with this code, in one line that holds these words, on stderr alone.
pub fn refused(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let out = foveate(dir, args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    let line = said.strip_prefix("error: ").unwrap_or_else(|| panic!("{args:?}: {said}"));
    assert_eq!(line.trim_end().lines().count(), 1, "one line: {said}");
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {said}");
    }
    assert_eq!(text(&out.stdout), "", "{args:?}");
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Everything below a folder, sorted.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

/// A folder with a model, rows and a config of one short step.
pub fn world() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny::checkpoint(dir.path(), 9);
    tiny::rows(dir.path(), 2);
    std::fs::write(
        dir.path().join("rl.toml"),
        r#"
[model]
path = "model"
[data]
train = "train.jsonl"
[task]
template = "short"
max_pixels = 6272
min_pixels = 3136
judge = "number"
[rollout]
max_new_tokens = 4
max_tokens = 256
[train]
out = "run"
steps = 1
prompts = 2
group = 2
"#,
    )
    .unwrap();
    dir
}

/// Two pictures at the ends of what there is, and two that are none.
pub fn strange_pictures(dir: &Path) {
    tiny::picture(&dir.join("dot.png"), 1, 1);
    tiny::picture(&dir.join("thread.png"), 1, 10_000);
    let whole = std::fs::read(dir.join("one.png")).unwrap();
    std::fs::write(dir.join("cut.png"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(dir.join("page.jpg"), "<!doctype html><p>404</p>").unwrap();
}

#[test]
fn help_lists_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let help = good(dir.path(), &["--help"]);
    for command in
        ["demo", "sft", "rl", "rollout", "eval", "ask", "report", "data", "model", "score", "trace", "bench", "doctor"]
    {
        assert!(help.lines().any(|l| l.trim_start().starts_with(&format!("{command} "))), "{command} in {help}");
    }
    assert_eq!(foveate(dir.path(), &["lr"]).status.code(), Some(2));
    assert_eq!(foveate(dir.path(), &["ask", "--model", "m"]).status.code(), Some(2));
}

#[test]
fn ask_shows_every_turn_and_names_a_bad_picture() {
    let world = world();
    let dir = world.path();
    strange_pictures(dir);
    let ask =
        |image: &'static str| ["ask", "--model", "model", "--max-new-tokens", "4", "--image", image, "What is it?"];
    for (image, words) in [
        ("lost.png", &["lost.png"][..]),
        ("cut.png", &["cut.png", "damaged"]),
        ("page.jpg", &["page.jpg", "web page"]),
        ("thread.png", &["thread.png", "1x10000", "aspect"]),
    ] {
        refused(dir, &ask(image), 1, words);
    }
    refused(dir, &[&ask("one.png")[..], &["--turns", "0"]].concat(), 2, &["turns"]);
    refused(dir, &[&ask("one.png")[..], &["--image", "two.png", "--free"]].concat(), 2, &["--free", "one picture"]);
    let both = json(&good(dir, &[&ask("one.png")[..], &["--image", "two.png", "--json"]].concat()));
    assert_eq!((both["views"].as_array().unwrap().len(), &both["views"][1]["image"]), (2, &1.into()));
    assert!(both["turns"][0]["text"].as_str().unwrap().contains("Image-2: "), "{both}");
    refused(dir, &[&ask("thread.png")[..], &["--turns", "1"]].concat(), 1, &["the question (thread.png)"]);
    let answer = json(&good(dir, &[&ask("dot.png")[..], &["--json"]].concat()));
    assert_eq!((&answer["views"][0]["region"], &answer["stop"]), (&json("[0.0,0.0,1.0,1.0]"), &"truncated".into()));
    let out = good(dir, &[&ask("one.png")[..], &["--save", "shown"]].concat());
    assert!(out.contains("user") && out.contains("assistant"), "{out}");
    assert!(out.contains("\n── answer: ") && out.contains("\n── end: "), "{out}");
    // A template whose first turn does not list the choices asks as in training: they come in the last one.
    let template =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tasks/templates/short.toml"));
    let withheld = template.unwrap().replacen(" {choices}", "", 1);
    std::fs::write(dir.join("own.toml"), withheld).unwrap();
    let choices = ["--template", "own.toml", "--choice", "a red hat", "--choice", "a cup"];
    let out = good(dir, &[&ask("one.png")[..], &choices].concat());
    assert!(!out.split("── assistant").next().unwrap().contains("a red hat"), "{out}");
    let choices = ["--turns", "1", "--choice", "a red hat", "--choice", "a cup"];
    assert!(good(dir, &[&ask("one.png")[..], &choices].concat()).contains("a red hat"));
    let saved = |name: &str| foveate::image::decode(&dir.join("shown").join(name)).unwrap().size();
    assert_eq!(saved("marked-1.jpg"), foveate::geometry::Size::new(200, 150));
    // 200x150 in the tokenizer folder's budget of 38416 to 62720 pixels.
    assert_eq!(saved("view-1.png"), foveate::geometry::Size::new(252, 196));
}

#[test]
fn a_run_leaves_what_others_read() {
    let world = world();
    let dir = world.path();
    let before = files(dir);
    let plan = good(dir, &["rl", "rl.toml", "--dry-run", "train.steps=7"]);
    let plan: toml::Table = toml::from_str(&plan).unwrap();
    assert_eq!(plan["train"]["steps"].as_integer(), Some(7));
    assert_eq!(plan["objective"]["clip_low"].as_float(), Some(0.2), "every default is written out");
    assert_eq!(files(dir), before);

    let out = json(&good(dir, &["rl", "rl.toml", "--json"]));
    assert_eq!((&out["run"], &out["metrics"]["ratio/first_update_gap"]), (&"run".into(), &0.0.into()));
    for file in
        ["config.toml", "environment.json", "metrics.jsonl", "episodes/1.jsonl", "checkpoints/1/model.safetensors"]
    {
        assert!(dir.join("run").join(file).is_file(), "{file}");
    }
    let record = json(std::fs::read_to_string(dir.join("run/episodes/1.jsonl")).unwrap().lines().next().unwrap());
    let ones: u64 = record["sampled"].as_array().unwrap().iter().map(|s| s.as_u64().unwrap()).sum();
    let said: u64 = record["turns"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|t| t["role"] == "assistant")
        .map(|t| t["tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(ones, said);
    refused(dir, &["rl", "rl.toml"], 1, &["already holds a run", "--resume", "run"]);
    // It goes on anywhere, and says so where sums may come out otherwise.
    let resumed = ["rl", "rl.toml", "--resume", "--accept-changes", "train.steps=2"];
    let environment = std::fs::read_to_string(dir.join("run/environment.json")).unwrap();
    let here = json(&environment)["cpu"].as_str().unwrap().to_owned();
    std::fs::write(dir.join("run/environment.json"), environment.replace(&here, "Abacus")).unwrap();
    let out = foveate(dir, &resumed);
    let said = text(&out.stderr);
    assert!(out.status.success() && said.contains("up to 1 were computed on Abacus") && said.contains(&here), "{said}");
    assert!(!text(&foveate(dir, &resumed).stderr).contains("were computed on"), "it has been said");
    // Damaged files of the newest checkpoint point at the one before.
    let weights = dir.join("run/checkpoints/2/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let more = [&resumed[..4], &["train.steps=3"]].concat();
    refused(dir, &more, 1, &["checkpoint of step 2", "removing this folder", "checkpoints/2"]);
    std::fs::remove_dir_all(dir.join("run/checkpoints/2")).unwrap();
    good(dir, &more);
    // The checkpoint is a model folder like any other.
    let info = json(&good(dir, &["model", "info", "run/checkpoints/1", "--json"]));
    assert_eq!(info["config"]["hidden_size"], 32);

    std::fs::write(
        dir.join("eval.toml"),
        "[model]\npath='run/checkpoints/1'\n[data]\ntest='train.jsonl'\n[rollout]\nmax_new_tokens=4\n[tasks.one]\ntemplate='short'\nturns=1\nmax_pixels=6272\nmin_pixels=3136\njudge='number'\n[eval]\nout='eval'\n",
    )
    .unwrap();
    refused(dir, &["eval", "eval.toml", "tasks.one.max_aspect=0"], 2, &["tasks.one", "max_aspect"]);
    refused(dir, &["eval", "eval.toml", "eval.samples=0"], 2, &["eval.samples"]);
    assert!(!dir.join("eval").exists());
    let table = json(&good(dir, &["eval", "eval.toml", "--json"]));
    assert_eq!((&table["rows"]["one"]["questions"], &table["rows"]["one"]["accuracy"]["n"]), (&2.into(), &2.into()));
    assert_eq!(json(&std::fs::read_to_string(dir.join("eval/table.json")).unwrap()), table["table"]);
    let played = json(&good(dir, &["rollout", "rl.toml", "train.out=played", "--json"]));
    assert_eq!(played["run"], "played");
}

#[test]
fn models_are_made_shown_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let nano = tiny::nano();
    let new =
        ["model", "new", "--preset", "nano", "--out", "m", "--dtype", "bf16", "--tokenizer", nano.to_str().unwrap()];
    good(dir, &new);
    refused(dir, &new, 1, &["already", "m"]);
    let info = json(&good(dir, &["model", "info", "m", "--json"]));
    let parameters = info["memory"]["parameters"].as_u64().unwrap();
    // bf16 numbers stay what they are in f32 and come back unchanged.
    good(dir, &["model", "export", "m", "--out", "wide", "--dtype", "f32"]);
    let out = json(&good(dir, &["model", "export", "wide", "--out", "narrow", "--dtype", "bf16", "--json"]));
    assert_eq!(out, serde_json::json!({"model": "narrow", "parameters": parameters, "dtype": "bfloat16"}));
    refused(dir, &["model", "export", "wide", "--out", "m"], 1, &["already", "m"]);
    refused(dir, &["model", "export", "wide", "--out", "wide"], 1, &["already", "wide"]);
    std::fs::create_dir(dir.join("data")).unwrap();
    std::fs::write(dir.join("data/train.jsonl"), "").unwrap();
    refused(dir, &["model", "export", "m", "--out", "data"], 1, &["other files", "data"]);
    let bytes = |name: &str| std::fs::read(dir.join(name).join("model.safetensors")).unwrap();
    assert!(bytes("m") == bytes("narrow"));
    let wide = bytes("wide");
    let stored: usize = SafeTensors::deserialize(&wide).unwrap().iter().map(|(_, t)| t.data().len()).sum();
    assert_eq!(stored as u64, 4 * parameters);
    assert!(dir.join("narrow/tokenizer.json").is_file());
    refused(dir, &["model", "export", "m", "--out", "q", "--dtype", "int4"], 2, &["int4", "bf16"]);
    refused(dir, &["model", "info", "nothing"], 1, &["nothing", "no model folder"]);
}

#[test]
fn trace_writes_the_promised_tensors() {
    let world = world();
    let dir = world.path();
    std::fs::write(
        dir.join("m.json"),
        r#"[{"role": "user", "content": [{"type": "image", "image": "one.png"}, {"type": "text", "text": "What is it?"}]}]"#,
    )
    .unwrap();
    let args = ["trace", "--model", "model", "--messages", "m.json", "--greedy", "3", "--json", "--out"];
    let said = json(&good(dir, &[&args[..], &["t.safetensors"]].concat()));
    assert_eq!((&said["trace"], &said["images"]), (&"t.safetensors".into(), &1.into()));
    refused(dir, &[&args[..], &["nowhere/t.safetensors"]].concat(), 1, &["--out", "make it first: nowhere"]);
    let bytes = std::fs::read(dir.join("t.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let t = tensors.tensor("input_ids").unwrap().shape()[0];
    let vocab = tiny::model(9).config.text.vocab;
    // 252x196 pixels: 14 x 18 patches, 63 tokens.
    for (name, dtype, shape) in [
        ("input_ids", Dtype::I64, vec![t]),
        ("position_ids", Dtype::I64, vec![3, t]),
        ("pixel_values", Dtype::F32, vec![252, 1176]),
        ("image_grid_thw", Dtype::I64, vec![1, 3]),
        ("image_features", Dtype::F32, vec![63, 32]),
        ("logits", Dtype::F32, vec![t, vocab]),
        ("logprobs", Dtype::F32, vec![t]),
        ("greedy_ids", Dtype::I64, vec![3]),
    ] {
        let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &shape[..]), "{name}");
    }
    let whole = |name: &str| -> Vec<i64> {
        let tensor = tensors.tensor(name).unwrap();
        tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect()
    };
    assert_eq!(whole("image_grid_thw"), [1, 14, 18]);
    let pad = i64::from(tiny::chat().special.image_pad);
    assert_eq!(whole("input_ids").iter().filter(|id| **id == pad).count(), 63);
    for (file, body, word) in [
        ("no.json", None, "no.json"),
        ("m.json", Some("{}"), "m.json"),
        ("m.json", Some(r#"[{"role": "user", "content": [{"type": "image"}]}]"#), "without a path"),
    ] {
        if let Some(body) = body {
            std::fs::write(dir.join(file), body).unwrap();
        }
        refused(dir, &["trace", "--model", "model", "--messages", file, "--out", "u.safetensors"], 1, &[word]);
        assert!(!dir.join("u.safetensors").exists());
    }
}

#[test]
fn score_names_a_bad_row_and_goes_on() {
    let rows = "{\"kind\": \"number\", \"prediction\": \"\\\\boxed{7}\", \"answer\": \"7\"}\n{\"kind\": \"colour\", \"prediction\": \"\", \"answer\": \"\"}\nnonsense\n{\"kind\": \"choice\", \"prediction\": \"\\\\boxed{B}\", \"answer\": \"A\"}\n";
    let out = fed(Path::new("."), &["score", "--json"], rows);
    assert_eq!(out.status.code(), Some(1));
    let lines: Vec<Value> = text(&out.stdout).lines().map(json).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!((&lines[0]["total"], &lines[3]["total"]), (&1.0.into(), &0.0.into()));
    assert!(lines[1]["error"].as_str().unwrap().starts_with("row 2: \"kind\" is \"colour\""));
    assert!(lines[2]["error"].as_str().unwrap().starts_with("row 3"));
    assert!(text(&out.stderr).contains("2 rows could not be judged"));
}

/// Both ways of writing: `score` gets an error back, `println!` panics.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let row = "{\"kind\": \"number\", \"prediction\": \"\\\\boxed{7}\", \"answer\": \"7\"}\n";
    for command in ["score", "doctor"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_foveate"))
            .arg(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        // It may be gone before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(row.repeat(100).as_bytes());
        let out = child.wait_with_output().unwrap();
        assert_eq!((out.status.code(), text(&out.stderr)), (Some(0), String::new()), "{command}");
    }
}

#[test]
fn doctor_and_data_speak_json() {
    let world = world();
    let dir = world.path();
    assert!(json(&good(dir, &["doctor", "--json"])).is_object());
    let made = json(&good(
        dir,
        &["data", "make", "plates", "--out", "plates", "--train", "3", "--test", "2", "--size", "1008x756", "--json"],
    ));
    assert_eq!((&made["train_rows"], &made["test_rows"]), (&3.into(), &2.into()));
    let checked = json(&good(dir, &["data", "check", "plates/train.jsonl", "--json"]));
    assert_eq!((&checked["rows"], &checked["problems"]), (&3.into(), &json("[]")));
    refused(dir, &["data", "make", "plates", "--out", "plates"], 1, &["plates", "--overwrite"]);
    refused(dir, &["data", "make", "teapots", "--out", "x"], 2, &["teapots", "plates"]);
}

/// Several pictures, from drawing to the report: rows, traces, fine-tuning with and without them, RL, evaluation.
#[test]
fn pairs_go_from_drawing_to_the_report() {
    let world = world();
    let dir = world.path();
    let make =
        ["data", "make", "pairs", "--out", "pairs", "--train", "12", "--test", "6", "--size", "224x168", "--json"];
    assert_eq!(json(&good(dir, &make))["train_rows"], 12);
    assert!(
        json(&good(dir, &["data", "check", "pairs/test.jsonl", "--json"]))["problems"].as_array().unwrap().is_empty()
    );
    let made =
        json(&good(dir, &["data", "trajectories", "pairs/train.jsonl", "--out", "traces", "--share", "1", "--json"]));
    assert_eq!((&made["report"]["rows"], &made["report"]["kept"]), (&12.into(), &12.into()), "{made}");
    refused(dir, &["data", "trajectories", "pairs/train.jsonl", "--out", "traces"], 1, &["traces", "already"]);

    let task = "[task]\nkind = \"multi_image\"\ntemplate = \"mirg_short\"\nmax_pixels = 6272\nmin_pixels = 3136\n";
    let sft = format!(
        "[model]\npath='model'\n[data]\ntrain='traces/sft.jsonl'\nsnap=4\n{task}[train]\nout='sft'\nsteps=2\nbatch=4\n"
    );
    std::fs::write(dir.join("sft.toml"), sft).unwrap();
    let with = json(&good(dir, &["sft", "sft.toml", "--json"]));
    let direct = ["sft", "sft.toml", "train.out=direct", "data.reason=false", "data.train=pairs/train.jsonl", "--json"];
    let without = json(&good(dir, &direct));
    let trained = |run: &Value| run["metrics"]["tokens/trained"].as_u64().unwrap();
    assert!(trained(&with) > 2 * trained(&without), "a trace is longer than an answer");
    refused(
        dir,
        &["sft", "sft.toml", "train.out=x", "data.train=pairs/train.jsonl"],
        1,
        &["pairs-train-00000", "data.reason"],
    );
    assert!(good(dir, &["doctor", "sft.toml"]).contains("total"));

    let rl = format!(
        "[model]\npath='model'\n[data]\ntrain='traces/sft.jsonl'\n{task}[rollout]\nmax_new_tokens=6\nmax_tokens=512\n[train]\nout='run'\nsteps=1\nprompts=2\ngroup=2\n"
    );
    std::fs::write(dir.join("rl.toml"), rl).unwrap();
    let last = json(&good(dir, &["rl", "rl.toml", "--json"]));
    for part in ["format", "image", "object", "iou", "joint"] {
        assert!(last["metrics"][format!("rewards/{part}/mean")].is_number(), "{last}");
    }
    let play = format!(
        "[model]\npath='model'\n[data]\ntest='pairs/test.jsonl'\n[rollout]\nmax_new_tokens=6\nmax_tokens=512\n{}[eval]\nout='eval'\n",
        task.replace("[task]", "[tasks.all]")
    );
    std::fs::write(dir.join("eval.toml"), play).unwrap();
    assert_eq!(json(&good(dir, &["eval", "eval.toml", "--json"]))["rows"]["all"]["questions"], 6);
    // What the traces are worth to the model: three rows, answered without and with them.
    let gain = format!(
        "[model]\npath='model'\n[data]\ntest='traces/sft.jsonl'\nlimit=3\n[rollout]\nmax_new_tokens=6\nmax_tokens=1024\n{}{}[eval]\nout='gain'\n",
        task.replace("[task]", "[tasks.direct]").replace("mirg_short", "mirg_direct"),
        task.replace("[task]", "[tasks.reasoned]").replace("mirg_short", "mirg_traced")
    );
    std::fs::write(dir.join("gain.toml"), gain).unwrap();
    good(dir, &["eval", "gain.toml"]);
    refused(dir, &["eval", "gain.toml", "data.test=pairs/train.jsonl", "eval.out=x"], 1, &["trajectory", "reasoned"]);
    let again = ["data", "trajectories", "pairs/train.jsonl", "--out", "better", "--share", "1", "--json"];
    let better = ["--direct", "gain/episodes/0.jsonl", "--reasoned", "gain/episodes/1.jsonl"];
    let made = json(&good(dir, &[&again[..], &better].concat()));
    assert_eq!(
        made["report"]["rejected"],
        json(r#"{"unmeasured": 9, "no_gain": 3}"#),
        "nobody learnt anything: {made}"
    );
    assert!(good(dir, &["report", "run"]).contains("report.html"));
    // A kind that there is not, and a key of the other kind.
    refused(dir, &["rl", "rl.toml", "task.kind=video"], 2, &["task.kind", "video", "multi_image"]);
    refused(dir, &["rl", "rl.toml", "task.turns=2"], 2, &["turns", "template"]);
}

/// What `doctor` reckons is what is taken. Two turns with crops as large as the first view, everything trained, with a reference.
#[test]
fn the_peak_of_a_step_is_predicted() {
    let dir = tempfile::tempdir().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/nano");
    tiny::picture(&dir.path().join("large.png"), 1600, 1200);
    let row = r#"{"image": "large.png", "question": "What?", "boxes": [[0, 0, 900, 700], [400, 300, 1500, 1100]]}"#;
    std::fs::write(dir.path().join("rows.jsonl"), row).unwrap();
    // What the caller holds is not the program's: a large parent must not show in the figure.
    let of_the_caller = std::hint::black_box(vec![1_u8; 300 << 20]);
    for more in [&[][..], &["--recompute"]] {
        let mut args = vec!["bench", "step", "--model", model, "--rows", "rows.jsonl", "--max-pixels", "301056"];
        args.extend(["--prompts", "1", "--group", "4", "--steps", "1", "--warmup", "0", "--new-tokens", "8,4"]);
        args.extend(more);
        let out = json(&good(dir.path(), &args));
        let (taken, predicted) = (out["peak_rss_mib"].as_f64().unwrap(), out["predicted_mib"].as_f64().unwrap());
        assert!((predicted / taken - 1.0).abs() < 0.15, "{more:?}: {predicted} MiB predicted, {taken} taken");
    }
    drop(of_the_caller);
}

#[test]
fn a_run_without_room_is_refused_with_the_number() {
    let world = world();
    let dir = world.path();
    let needs = &json(&good(dir, &["doctor", "rl.toml", "--json"]))["needs"];
    let parts = ["weights", "training_state", "sampling", "learning"].map(|part| needs[part].as_u64().unwrap());
    assert!(parts.iter().all(|bytes| *bytes > 0) && needs["total"].as_u64().unwrap() > parts[0] + parts[1], "{needs}");
    // A model of 7 billion numbers, of which there is a config alone: nothing is read that need not be.
    let large = dir.join("model/config.json");
    let config = Config { ids: Config::load(&dir.join("model")).unwrap().ids, ..presets::qwen25_vl_7b() };
    std::fs::write(&large, config.to_json("bfloat16").to_string()).unwrap();
    std::fs::remove_file(dir.join("model/model.safetensors")).unwrap();
    let refusal = ["would take about", "GiB", "weights 30.", "[model.lora]", "model.check_memory"];
    for command in ["rl", "rollout"] {
        // A shell gives the program 8 GiB, whatever the machine has.
        let limited =
            format!("ulimit -v 8388608; exec {} {command} rl.toml --threads 2", env!("CARGO_BIN_EXE_foveate"));
        let out = Command::new("sh").args(["-c", &limited]).current_dir(dir).output().unwrap();
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(refusal.iter().all(|word| said.contains(word)), "{said}");
    }
    assert!(!dir.join("run").exists());
    // Before there is any data.
    assert!(good(dir, &["doctor", "rl.toml", "data.train=not_there.jsonl"]).contains("total"));
}

/// From the benchmark's own file to its table, by polling and by asking at once, and for another program's predictions.
#[test]
fn mig_bench_goes_from_its_file_to_its_table() {
    let world = world();
    let dir = world.path();
    let item = |task: &str, question: &str, answer: &str| {
        format!(
            r#"{{"task": "{task}", "images": ["./MIG-Bench/one.png", "./MIG-Bench/two.png"], "question": "{question}", "answer": {answer}, "additional_info": "", "need_format": true}}"#
        )
    };
    let common = |n: usize, answer: &str| item("common_object", &format!("Locate it in the {n}th image. "), answer);
    let diff = item("diff", "Compare these two images.", "[0.25, 0.25, 0.5, 0.5]");
    let items = [common(1, "[0.3, 0.4, 0.1, 0.2]"), common(2, "[0.1, 0.1, 0.5, 0.5]"), diff.clone()];
    std::fs::write(dir.join("MIG_data.json"), format!("[{}]", items.join(","))).unwrap();
    let convert = ["data", "convert", "MIG_data.json", "--from", "mig_bench", "--out", "mig.jsonl"];
    let before = files(dir);
    refused(dir, &convert, 1, &["row 1", "MIG-Bench/one.png", "--remap", "MIG_data.json"]);
    refused(dir, &[&convert[..], &["--remap", "MIG-Bench"]].concat(), 2, &["--remap MIG-Bench", "OLD=NEW"]);
    refused(
        dir,
        &["data", "convert", "MIG_data.json", "--from", "coco", "--out", "x"],
        2,
        &["--from coco", "mig_bench"],
    );
    assert_eq!(files(dir), before, "nothing was written");
    let remapped = [&convert[..], &["--remap", "./MIG-Bench/="]].concat();
    let made = json(&good(dir, &[&remapped[..], &["--json"]].concat()));
    assert_eq!((&made["rows"], &made["pictures"]), (&3.into(), &2.into()));
    assert_eq!(made["notes"][0], "original annotations, 1 impossible boxes among them");
    refused(dir, &remapped, 1, &["--overwrite", "mig.jsonl"]);
    good(dir, &[&remapped[..], &["--overwrite"]].concat());
    let written = std::fs::read_to_string(dir.join("mig.jsonl")).unwrap();
    assert!(written.contains(r#""images":["one.png","two.png"]"#), "{written}");
    good(dir, &["data", "check", "mig.jsonl"]);

    let task = |ask: &str| {
        format!(
            "[tasks.{ask}]\nkind='multi_image'\nask='{ask}'\ntemplate='mirg_short'\nmax_pixels=6272\nmin_pixels=3136\n"
        )
    };
    let play = format!(
        "[model]\npath='model'\n[data]\ntest='mig.jsonl'\n[rollout]\nmax_new_tokens=4\nmax_tokens=512\n{}{}[eval]\nout='eval'\n",
        task("all"),
        task("poll")
    );
    std::fs::write(dir.join("eval.toml"), play).unwrap();
    let played = json(&good(dir, &["eval", "eval.toml", "--json"]));
    assert_eq!((&played["rows"]["all"]["questions"], &played["rows"]["poll"]["questions"]), (&2.into(), &3.into()));
    let titles =
        |tables: &[Value]| -> Vec<String> { tables.iter().map(|t| t["title"].as_str().unwrap().to_owned()).collect() };
    // Before them stands accuracy by the size of the target.
    let (by_size, of_bench) = played["by_task"].as_array().unwrap().split_first().unwrap();
    assert!(by_size["title"].as_str().unwrap().contains("the share of the picture"));
    let title = |rest: &str| format!("MIG-Bench, original annotations: {rest}");
    assert_eq!(titles(of_bench), ["all", "all, cleaned", "poll", "poll, cleaned"].map(title));
    let common = |k: usize| of_bench[k]["rows"][2].clone();
    // Two items either way; the published rule has no figure for an answer of several boxes.
    assert_eq!((&common(0)["cells"][0]["value"], &common(0)["cells"][4]["n"]), (&Value::Null, &2.into()));
    assert_eq!((&common(2)["cells"][0]["n"], &common(3)["cells"][0]["n"]), (&2.into(), &1.into()));
    let page = good(dir, &["report", "eval"]);
    assert!(std::fs::read_to_string(dir.join(page.trim())).unwrap().contains("Co-Re"));

    let right = r#"{"id": "mig-original-0003", "prediction": "<|box_start|>(250,250),(500,500)<|box_end|>"}"#;
    let out = fed(dir, &["score", "--bench", "mig.jsonl", "--json"], right);
    let tables = json(&text(&out.stdout));
    assert_eq!((out.status.code(), &tables["missing"]), (Some(0), &2.into()));
    assert_eq!(tables["tables"][0]["rows"][0]["cells"][0]["value"], 100.0);
    assert_eq!(tables["tables"][0]["rows"][2]["cells"][0]["value"], 0.0);
    let bad = fed(dir, &["score", "--bench", "mig.jsonl"], &right.replace("0003", "0009"));
    assert!(bad.status.code() == Some(1) && text(&bad.stderr).contains("prediction 1: there is no row"), "{bad:?}");

    // Both versions in one file would share every column.
    let revised = diff.replace("[0.25, 0.25, 0.5, 0.5]", "[250, 250, 500, 500]");
    std::fs::write(dir.join("MIG_data.json"), revised).unwrap();
    let convert =
        ["data", "convert", "MIG_data.json", "--from", "mig_bench", "--out", "revised.jsonl", "--images", "."];
    good(dir, &[&convert[..], &["--remap", "MIG-Bench=."]].concat());
    let both = written + &std::fs::read_to_string(dir.join("revised.jsonl")).unwrap();
    std::fs::write(dir.join("both.jsonl"), both).unwrap();
    refused(
        dir,
        &["eval", "eval.toml", "data.test=both.jsonl", "eval.out=e2"],
        1,
        &["never share a column", "both.jsonl"],
    );
}
