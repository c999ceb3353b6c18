//! `foveate ask`: one question about pictures of one's own, every turn shown as a person would want to see it.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::data::Sample;
use crate::engine::embedded::{Embedded, Options as EngineOptions};
use crate::geometry::BBox;
use crate::image;
use crate::rollout::{self, Stage};
use crate::tasks::crop::{Crop, Options as TaskOptions};

#[derive(Args)]
pub struct Options {
    /// Checkpoint folder (Hugging Face layout)
    #[arg(long)]
    model: PathBuf,
    /// Picture file (PNG, JPEG, WebP)
    #[arg(long, required = true)]
    image: Vec<PathBuf>,
    question: String,
    /// Wording: mgpo, short, or a template file
    #[arg(long, default_value = "mgpo")]
    template: String,
    /// The most turns; 1 answers at once
    #[arg(long, default_value_t = 2)]
    turns: usize,
    /// Let the model decide itself whether to look again
    #[arg(long)]
    free: bool,
    /// Answer choices, one option each
    #[arg(long)]
    choice: Vec<String>,
    /// Pixel budget of a view (default: the checkpoint's)
    #[arg(long)]
    max_pixels: Option<u64>,
    #[arg(long)]
    min_pixels: Option<u64>,
    /// The most tokens in one turn
    #[arg(long, default_value_t = 512)]
    max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the crops and the marked picture
    #[arg(long)]
    save: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> Result<()> {
    let engine = EngineOptions { path: options.model.clone(), ..EngineOptions::default() };
    let mut embedded = Embedded::open(&engine, None)?;
    let budget = embedded.processor.budget;
    let task = TaskOptions {
        template: options.template.clone(),
        turns: options.turns,
        free: options.free,
        max_pixels: options.max_pixels.unwrap_or(budget.max_pixels),
        min_pixels: options.min_pixels.unwrap_or(budget.min_pixels),
        choices_in_turn_1: true,
        ..TaskOptions::default()
    };
    let task = Crop::new(task, budget.factor)?;
    let play = rollout::Options {
        temperature: options.temperature,
        max_new_tokens: options.max_new_tokens,
        max_tokens: embedded.max_positions(),
        ..rollout::Options::default()
    };
    let sample = Sample::question(&options.image, &options.question, options.choice.clone());
    let (chat, pictures, processor) = (embedded.chat.clone(), embedded.pictures.clone(), embedded.processor.clone());
    let stage = Stage {
        task: &task,
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention: embedded.convention,
        options: &play,
    };
    let episodes = rollout::play(&stage, &mut embedded, &[(0, &sample)], 1, options.seed, 0)?;
    let episode = episodes.into_iter().next().context("the question was not played")?;
    let record = episode.record();

    let mut saved = Vec::new();
    if let Some(dir) = &options.save {
        std::fs::create_dir_all(dir).with_context(|| format!("making the folder {}", dir.display()))?;
        for (k, view) in record.views.iter().enumerate() {
            let placed = &episode.stream.images[k];
            let picture = pictures.get(&placed.path)?;
            let path = dir.join(format!("view-{}.png", k + 1));
            image::save(&image::show(&picture, &placed.view)?, &path)?;
            saved.push(json!({"file": path, "region": view.region, "size": view.size}));
        }
        for (k, image) in options.image.iter().enumerate() {
            let picture = pictures.get(image)?;
            let mut marked = picture.as_image().clone();
            let thickness = (picture.size().width.max(picture.size().height) / 300).max(2);
            let boxes: Vec<BBox> = record.views.iter().skip(1).filter(|v| v.image == k).map(|v| v.region).collect();
            for region in boxes {
                image::draw_box(&mut marked, &region, [255, 64, 32], thickness);
            }
            let path = dir.join(format!("marked-{}.jpg", k + 1));
            image::save(&marked, &path)?;
            saved.push(json!({"file": path}));
        }
    }
    if options.json {
        let out = json!({
            "turns": record.turns, "views": record.views, "stop": record.stop, "saved": saved,
            "answer": crate::reward::extract(record.turns.last().map_or("", |t| t.text.as_str()), crate::reward::Place::Boxed),
        });
        println!("{out}");
        return Ok(());
    }
    for turn in &record.turns {
        println!("── {} ({} tokens)", turn.role, turn.tokens);
        println!("{}", turn.text.trim_end());
        if let Some(outcome) = turn.outcome {
            let place =
                turn.bbox.map(|b| format!(": [{:.0}, {:.0}, {:.0}, {:.0}] in the original", b.x1, b.y1, b.x2, b.y2));
            eprintln!("   box {outcome:?}{}", place.unwrap_or_default());
        }
    }
    for file in saved {
        eprintln!("wrote {}", file["file"].as_str().unwrap_or_default());
    }
    Ok(())
}
