//! Adapters as a user meets them: trained from a config, shown, used, merged.

use std::path::Path;

use crate::cli::{good, json, refused};
use crate::tiny;

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_adapter_is_trained_shown_used_and_merged() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::checkpoint(dir, 3);
    tiny::rows(dir, 2);
    tiny::four_numbers(dir);
    let config = "[model]\npath = \"model\"\nfreeze = [\"vision\", \"merger\"]\n[model.lora]\nrank = 4\nalpha = 8\ntargets = [\"*_proj\"]\n\
                  [data]\ntrain = \"dialogues.jsonl\"\nmax_pixels = 6272\nmin_pixels = 3136\n\
                  [optim]\nlr = 1e-2\n[train]\nout = \"run\"\nsteps = 3\nbatch = 2\n";
    std::fs::write(dir.join("sft.toml"), config).unwrap();
    refused(dir, &["sft", "sft.toml", "model.lora.rank=0"], 2, &["model.lora.rank"]);
    refused(dir, &["sft", "sft.toml", "model.lora.targets=[\"visual.*\"]"], 2, &["model.freeze", "visual.*"]);
    refused(dir, &["sft", "sft.toml", "model.lora.target=[\"*\"]"], 2, &["targets"]);
    good(dir, &["sft", "sft.toml"]);

    let adapter = dir.join("run/checkpoints/3");
    let names = files(&adapter);
    for name in
        ["adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "optimizer.safetensors"]
    {
        assert!(names.contains(&name.to_owned()), "{names:?}");
    }
    assert!(!names.contains(&"model.safetensors".to_owned()));
    let info = json(&good(dir, &["model", "info", "run/checkpoints/3", "--json"]));
    // q, k, v, o, gate, up and down of two layers.
    assert_eq!((&info["adapter"]["maps"], &info["adapter"]["ranks"]), (&14.into(), &serde_json::json!([4, 4])));
    assert!(good(dir, &["model", "info", "run/checkpoints/3"]).contains("on 14 maps, rank 4, of "));

    // Merged here or once and for all: the same model.
    refused(dir, &["model", "export", "run/checkpoints/3", "--out", "model"], 1, &["there is a model already"]);
    good(dir, &["model", "export", "run/checkpoints/3", "--out", "merged", "--dtype", "f32"]);
    assert!(dir.join("merged/model.safetensors").is_file() && !dir.join("merged/adapter_config.json").exists());
    let ask = |model: &str| {
        let args =
            ["ask", "--model", model, "--image", "one.png", "--max-new-tokens", "6", "--json", "What number is it?"];
        json(&good(dir, &args))["turns"].clone()
    };
    let said = ask("run/checkpoints/3");
    assert_eq!(said, ask("merged"));
    assert_ne!(said, ask("model"));

    // PEFT's own folders hold nothing but the adapter: tokenizer and settings are the model's.
    let bare = dir.join("bare");
    std::fs::create_dir(&bare).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(adapter.join(name), bare.join(name)).unwrap();
    }
    assert_eq!(said, ask("bare"));
    std::fs::rename(dir.join("model"), dir.join("moved")).unwrap();
    refused(dir, &["model", "info", "bare"], 1, &["base_model_name_or_path", "no such folder"]);
}
