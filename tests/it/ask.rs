//! `foveate ask` as a person meets it: on a terminal while it speaks, through a pipe, with weights in memory or in their files, and when
//! something is wrong.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::tiny;
use foveate::data::Sample;
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::model::weights::save_sharded;
use foveate::model::{Config, Dtype, Hold, Vlm, Weights, presets};
use foveate::rollout::{self, Stage};

fn ask(dir: &Path, model: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    command.current_dir(dir).env("NO_COLOR", "1").stdin(Stdio::null());
    command.args(["ask", "--model", model, "What number is on the plate?"]).args(more);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(out: Output) -> Value {
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Starts a command on a terminal of its own; what it shows can be read from the other end.
fn on_terminal(mut command: Command) -> (Child, File) {
    let (mut ours, mut theirs) = (0, 0);
    let none = std::ptr::null_mut();
    // SAFETY: openpty writes two descriptors into the memory we own; the settings that it could take are left out.
    let opened =
        unsafe { libc::openpty(&raw mut ours, &raw mut theirs, none, std::ptr::null_mut(), std::ptr::null_mut()) };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both descriptors were just opened and belong to nobody else.
    let (ours, theirs) = unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
    let child = command.stdout(theirs.try_clone().unwrap()).stderr(theirs).spawn().unwrap();
    (child, ours)
}

/// Reads until the words are there or the other end is closed, which a terminal tells as an error.
fn read_until(from: &mut File, shown: &mut String, words: &str) {
    let mut bytes = [0; 4096];
    let mut held = std::mem::take(shown).into_bytes();
    loop {
        *shown = String::from_utf8_lossy(&held).into_owned();
        match from.read(&mut bytes) {
            _ if !words.is_empty() && shown.contains(words) => return,
            Ok(0) | Err(_) => return,
            Ok(n) => held.extend_from_slice(&bytes[..n]),
        }
    }
}

fn refused(mut command: Command, code: i32, words: &[&str]) {
    let out = command.output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{said}");
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "one line: {said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert_eq!(text(&out.stdout), "");
}

/// The same words, ids and log-probs, bit for bit: bf16 is widened exactly and in the same products.
#[test]
fn weights_in_their_files_say_what_they_say_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    tiny::rows(dir.path(), 2);
    // The bundled model, and a sharded one.
    let shards = dir.path().join("shards");
    save_sharded(&tiny::model(3), &shards, Dtype::Bf16, Some(&tiny::nano()), 60_000).unwrap();
    let files = std::fs::read_dir(&shards).unwrap().flatten();
    let files = files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors")).count();
    assert!(files > 2, "{files}");
    for folder in [tiny::nano(), shards] {
        let mut played = Vec::new();
        for weights in [Hold::Memory, Hold::Auto] {
            let options = ModelOptions { path: folder.clone(), weights, ..ModelOptions::default() };
            let mut engine = Embedded::open(&options, None).unwrap();
            assert_eq!(matches!(engine.model.weights, Weights::Mapped(_)), weights == Hold::Auto);
            let task = foveate::tasks::crop::Crop::new(tiny::task(), engine.frontend.processor.budget.factor).unwrap();
            let frontend = engine.frontend.clone();
            let play = rollout::Options { max_new_tokens: 24, temperature: 0.7, ..rollout::Options::default() };
            let stage = Stage { task: &task, frontend: &frontend, options: &play };
            let sample = Sample::question(&[dir.path().join("one.png")], "What number is it?", vec![]);
            // More than one member, so that products of several rows are among them.
            played.push(rollout::play(&stage, &mut engine, &[(0, &sample)], 3, 5, 0).unwrap());
        }
        for (memory, mapped) in played[0].iter().zip(&played[1]) {
            assert_eq!(memory.stream.ids, mapped.stream.ids);
            let bits =
                |e: &foveate::episode::Episode| e.stream.logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(memory), bits(mapped));
            assert!(memory.stream.sampled_count() > 3);
        }
    }
}

#[test]
fn what_is_trained_cannot_stay_in_its_files() {
    let dir = tempfile::tempdir().unwrap();
    tiny::rows(dir.path(), 2);
    let config = format!(
        "[model]\npath = {:?}\nweights = \"mapped\"\n[data]\ntrain = \"train.jsonl\"\n[task]\njudge = \"number\"\n[train]\nout = \"run\"\n",
        tiny::nano()
    );
    std::fs::write(dir.path().join("rl.toml"), config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    command.current_dir(dir.path()).args(["rl", "rl.toml"]);
    refused(command, 2, &["model.weights", "mapped", "leave the key out"]);
    assert!(!dir.path().join("run").exists());
    // Weights that are mapped give no gradients, also to a caller of the library.
    let model = Vlm::open(&tiny::nano(), Hold::Mapped).unwrap();
    assert!(model.weights.arena().unwrap_err().to_string().contains("can only be read"));
}

/// The words of a turn, what it looked at and what was saved, in this order and as the JSON object has them.
#[test]
fn a_terminal_shows_each_turn_as_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    tiny::rows(dir.path(), 2);
    let nano = tiny::nano();
    let nano = nano.to_str().unwrap();
    let asked =
        |save: &'static str| ask(dir.path(), nano, &["--image", "one.png", "--template", "short", "--save", save]);
    let mut command = asked("piped");
    let told = json(command.arg("--json").output().unwrap());
    assert_eq!(told["weights"], "mapped");
    let said: Vec<&str> = told["turns"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|t| t["role"] == "assistant")
        .map(|t| t["text"].as_str().unwrap())
        .collect();
    let (mut child, mut terminal) = on_terminal(asked("shown"));
    let mut shown = String::new();
    read_until(&mut terminal, &mut shown, "");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{shown}");
    let shown = shown.replace('\r', "");
    let mut rest = shown.as_str();
    let mut next = |words: &str| {
        let at = rest.find(words).unwrap_or_else(|| panic!("{words:?} is not in what follows: {rest}\nof\n{shown}"));
        rest = &rest[at + words.len()..];
    };
    next("bf16, mapped from the files");
    next("── user\nWhat number is on the plate?");
    let views = told["views"].as_array().unwrap();
    assert_eq!(views.len(), 2, "the bundled model names a region: {told}");
    next("one.png: 200x150 pixels, seen as ");
    next("wrote shown/view-1.png");
    next("── assistant\n");
    next(said[0].trim_end());
    next("tokens in ");
    let corners: Vec<String> =
        views[1]["region"].as_array().unwrap().iter().map(|x| format!("{:.0}", x.as_f64().unwrap())).collect();
    next(&format!("a closer look at [{}] of one.png, seen as ", corners.join(", ")));
    next("wrote shown/view-2.png");
    next(said[1].trim_end());
    next("── answer: ");
    next("── end: ");
    next("wrote shown/marked-1.jpg");
    assert!(!shown.contains('\x1b') || !shown.contains("\x1b[1m"), "NO_COLOR was set");
    for name in ["view-1.png", "view-2.png", "marked-1.jpg"] {
        let [piped, shown] =
            ["piped", "shown"].map(|folder| std::fs::read(dir.path().join(folder).join(name)).unwrap());
        assert_eq!(piped, shown, "{name}");
    }
}

/// Where it looked is red on the picture, and nothing else is.
#[test]
fn the_marked_picture_shows_where_it_looked() {
    let dir = tempfile::tempdir().unwrap();
    tiny::rows(dir.path(), 2);
    let told = json(
        ask(
            dir.path(),
            tiny::nano().to_str().unwrap(),
            &["--image", "one.png", "--template", "short", "--save", "out", "--json"],
        )
        .output()
        .unwrap(),
    );
    let region: Vec<f64> = told["views"][1]["region"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let marked = foveate::image::decode(&dir.path().join("out/marked-1.jpg")).unwrap();
    let red = |x: f64, y: f64| {
        let p = marked.as_image().get_pixel((x as u32).min(199), (y as u32).min(149)).0;
        // JPEG blurs a line of two pixels, colours most.
        p[0] > 140 && i32::from(p[0]) - i32::from(p[2]) > 50
    };
    let [x1, y1, x2, y2] = region[..] else { panic!("{region:?}") };
    let share =
        |points: Vec<(f64, f64)>| points.iter().filter(|(x, y)| red(*x, *y)).count() as f64 / points.len() as f64;
    let along = |t: f64| t / 20.0;
    let top = share((1..20).map(|t| (x1 + along(t.into()) * (x2 - x1), y1 + 0.5)).collect());
    let left = share((1..20).map(|t| (x1 + 0.5, y1 + along(t.into()) * (y2 - y1))).collect());
    assert!(top > 0.6 && left > 0.6, "top {top}, left {left} of {region:?}");
}

#[test]
fn control_c_ends_it_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    tiny::checkpoint(dir.path(), 9);
    tiny::rows(dir.path(), 2);
    // A random model, greedy: it repeats itself and does not end by itself.
    let (mut child, mut terminal) =
        on_terminal(ask(dir.path(), "model", &["--image", "one.png", "--max-new-tokens", "30000", "--save", "out"]));
    let mut shown = String::new();
    read_until(&mut terminal, &mut shown, "── assistant");
    // SAFETY: a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    read_until(&mut terminal, &mut shown, "");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{shown}");
    assert!(shown.trim_end().ends_with("stopped"), "{shown}");
    assert!(!shown.contains("── end"), "{shown}");
    // What was shown until then is whole, and nothing else is there.
    let files: Vec<_> = std::fs::read_dir(dir.path().join("out")).unwrap().flatten().map(|f| f.file_name()).collect();
    assert_eq!(files, ["view-1.png"]);
    foveate::image::decode(&dir.path().join("out/view-1.png")).unwrap();
}

#[test]
fn what_is_no_model_is_told_apart() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::rows(dir, 2);
    let one = &["--image", "one.png"][..];
    refused(ask(dir, "nowhere", one), 1, &["there is no model folder", "nowhere"]);
    refused(ask(dir, "Qwen/Qwen2.5-VL-3B-Instruct", one), 1, &["nothing is downloaded", "Qwen/Qwen2.5-VL-3B-Instruct"]);
    refused(ask(dir, "one.png", one), 1, &["a model is a folder", "one.png"]);
    std::fs::create_dir_all(dir.join("run/checkpoints/3")).unwrap();
    refused(ask(dir, "run", one), 1, &["no config.json", "checkpoints/", "run"]);
    std::fs::create_dir(dir.join("lora")).unwrap();
    std::fs::write(dir.join("lora/adapter_config.json"), "{}").unwrap();
    refused(ask(dir, "lora", one), 1, &["`base_model_name_or_path` is missing", "lora/adapter_config.json"]);
    tiny::checkpoint(dir, 9);
    let config = dir.join("model/config.json");
    let whole = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, whole.replacen("qwen2_5_vl", "qwen2_vl", 1)).unwrap();
    refused(ask(dir, "model", one), 1, &["`model_type` is \"qwen2_vl\"", "Qwen2.5-VL", "config.json"]);
    std::fs::write(&config, whole).unwrap();
    refused(
        ask(dir, "model", &["--image", "one.png", "--weights", "mapped"]),
        1,
        &["stored as F32", "model export", "model.safetensors"],
    );
    refused(ask(dir, "model", &["--image", "one.png", "--save", "one.png"]), 1, &["--save", "one.png"]);
}

#[test]
fn missing_shards_and_bad_pictures_are_named() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::rows(dir, 2);
    save_sharded(&tiny::model(3), &dir.join("model"), Dtype::Bf16, Some(&tiny::nano()), 60_000).unwrap();
    std::fs::write(dir.join("cut.jpg"), [0xff, 0xd8, 0xff, 0xe0, 0, 16]).unwrap();
    std::fs::write(dir.join("notes.txt"), "no picture").unwrap();
    for (image, words) in [("lost.png", "is the path right?"), ("cut.jpg", "cut.jpg"), ("notes.txt", "notes.txt")] {
        refused(ask(dir, "model", &["--image", image, "--save", "out"]), 1, &[image, words]);
    }
    assert!(!dir.join("out").exists());
    let mut shards: Vec<String> = std::fs::read_dir(dir.join("model"))
        .unwrap()
        .flatten()
        .map(|file| file.file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    shards.sort();
    std::fs::remove_file(dir.join("model").join(&shards[1])).unwrap();
    refused(ask(dir, "model", &["--image", "one.png"]), 1, &["1 of the", "is missing", &shards[1], "model"]);
}

/// Before anything is loaded: with the number, and what to do.
#[test]
fn a_model_without_room_is_refused_with_the_number() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::rows(dir, 2);
    tiny::checkpoint(dir, 9);
    let config = Config { ids: Config::load(&dir.join("model")).unwrap().ids, ..presets::qwen25_vl_7b() };
    std::fs::write(dir.join("model/config.json"), config.to_json("bfloat16").to_string()).unwrap();
    std::fs::remove_file(dir.join("model/model.safetensors")).unwrap();
    // A shell gives the program 8 GiB, whatever the machine has.
    let limited = format!(
        "ulimit -v 8388608; exec {} --threads 2 ask --model model --image one.png What?",
        env!("CARGO_BIN_EXE_foveate")
    );
    let mut command = Command::new("sh");
    command.args(["-c", &limited]).current_dir(dir);
    refused(command, 1, &["would take about", "weights 30.", "can be had", "--max-pixels", "model export"]);
}
