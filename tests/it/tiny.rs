//! A world small enough for tests: a random model of a few thousand parameters with the bundled tokenizer, drawn pictures, rows.

use std::path::{Path, PathBuf};

use foveate::chat::Chat;
use foveate::image::{RgbImage, save};
use foveate::model::config::{TextConfig, TokenIds, VisionConfig};
use foveate::model::{Config, Dtype, Vlm, presets};
use foveate::tasks::crop::{Judge, OnInvalid, Options as CropOptions};

/// Tokenizer, template and processor of the bundled model.
pub fn nano() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nano")
}

pub fn chat() -> Chat {
    Chat::load(&nano()).unwrap()
}

/// Two layers and two vision blocks (one with windows), grouped queries, 32 wide. Random, but loud enough that its
/// distributions are far from flat.
pub fn model(seed: u64) -> Vlm {
    let chat = chat();
    let s = &chat.special;
    let base = presets::nano(chat.vocabulary().next_multiple_of(64));
    let config = Config {
        vision: VisionConfig {
            depth: 2,
            hidden: 32,
            heads: 2,
            mlp: 48,
            full_blocks: vec![1],
            out_hidden: 32,
            ..base.vision
        },
        text: TextConfig { hidden: 32, layers: 2, heads: 4, kv_heads: 2, mlp: 48, sections: [1, 1, 2], ..base.text },
        ids: TokenIds {
            image_pad: s.image_pad,
            video_pad: s.video_pad.unwrap(),
            vision_start: s.vision_start,
            vision_end: s.vision_end,
            bos: None,
            eos: vec![s.end_of_turn],
            pad: None,
        },
    };
    let mut model = presets::initialise(config, seed);
    let embed = model.weights.layout().text.embed.clone();
    model.weights.arena_mut().unwrap().data[embed].iter_mut().for_each(|w| *w *= 20.0);
    model
}

/// Writes the model as a checkpoint folder.
pub fn checkpoint(dir: &Path, seed: u64) -> PathBuf {
    let path = dir.join("model");
    model(seed).save(&path, Dtype::F32, Some(&nano())).unwrap();
    // 49 to 80 tokens a picture, whatever budget the bundled model has.
    let processor = path.join("preprocessor_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&processor).unwrap()).unwrap();
    json["min_pixels"] = 38416.into();
    json["max_pixels"] = 62720.into();
    json["size"] = serde_json::json!({"shortest_edge": 38416, "longest_edge": 62720});
    std::fs::write(&processor, json.to_string()).unwrap();
    path
}

/// A picture without two equal regions.
pub fn picture(path: &Path, width: u32, height: u32) {
    let image = RgbImage::from_fn(width, height, |x, y| {
        let wave = ((x * x / 7 + y * 3) % 256) as u8;
        [wave, (x * 255 / width) as u8, (y * 255 / height) as u8].into()
    });
    save(&image, path).unwrap();
}

/// The two-turn task on views of at most 16 tokens, asking for numbers.
pub fn task() -> CropOptions {
    CropOptions {
        template: "short".into(),
        max_pixels: 16 * 784,
        min_pixels: 4 * 784,
        judge: Judge::Number,
        on_invalid: OnInvalid::ResendImage,
        ..CropOptions::default()
    }
}

/// Texts that a random policy soon completes, so that its turns end by themselves.
pub fn soon() -> Vec<String> {
    ["e", "a", "i", "o", "n", "s", "r", "t", "0", "1", "2", "5"].map(String::from).to_vec()
}

/// A file of `rows` rows on two pictures.
pub fn rows(dir: &Path, rows: usize) -> PathBuf {
    picture(&dir.join("one.png"), 200, 150);
    picture(&dir.join("two.png"), 120, 220);
    let path = dir.join("train.jsonl");
    let lines: Vec<String> = (0..rows)
        .map(|i| {
            let image = ["one.png", "two.png"][i % 2];
            format!(
                r#"{{"id": "row-{i}", "images": ["{image}"], "question": "What number is it, {i}?", "answer": "7", "targets": [{{"image": 1, "bbox": [10, 10, 60, 50]}}]}}"#
            )
        })
        .collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

/// A file of dialogues on the pictures of [`rows`] that answer 3, 7, 5 or 9, each as often as the others.
pub fn four_numbers(dir: &Path) -> PathBuf {
    let question = r"\nQuestion: What number is it, 1? Put the final answer in \\boxed{}.";
    let lines: Vec<String> = (0..8)
        .map(|i| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": [{{"type": "image", "image": "{}.png"}}, {{"type": "text", "text": "{question}"}}]}}, {{"role": "assistant", "content": "\\boxed{{{}}}"}}]}}"#,
                ["one", "two"][i % 2],
                [3, 7, 5, 9][i / 2]
            )
        })
        .collect();
    let path = dir.join("dialogues.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}
