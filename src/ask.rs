//! `foveate ask`: one question about pictures of one's own, every turn shown as a person would want to see it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use crate::config::BadConfig;
use crate::data::Sample;
use crate::engine::embedded::{Embedded, Options as EngineOptions};
use crate::episode::{BoxOutcome, Stop, Turn};
use crate::geometry::Budget;
use crate::image;
use crate::reward::{self, Named, Place};
use crate::rollout::{self, Stage};
use crate::tasks::{Options as TaskOptions, crop, multi_image};

const TURNS: usize = 2;

#[derive(Args)]
pub struct Options {
    /// Checkpoint folder (Hugging Face layout)
    #[arg(long)]
    model: PathBuf,
    /// Picture file (PNG, JPEG, WebP). Given several times, the pictures are Image-1, Image-2 and so on, and the answer is boxes in them
    #[arg(long, required = true)]
    image: Vec<PathBuf>,
    question: String,
    /// Wording: mgpo, short, of several pictures mirg, mirg_direct, mirg_short, or a template file [default: mgpo, mirg]
    #[arg(long)]
    template: Option<String>,
    /// The most turns; 1 answers at once [default: 2; several pictures are answered at once]
    #[arg(long)]
    turns: Option<usize>,
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
    options.check()?;
    let engine = EngineOptions { path: options.model.clone(), ..EngineOptions::default() };
    let mut embedded = Embedded::open(&engine, None)?;
    let budget = embedded.processor.budget;
    let task = options.task(budget).task(budget.factor)?;
    let play = rollout::Options {
        temperature: options.temperature,
        max_new_tokens: options.max_new_tokens,
        max_tokens: embedded.max_positions(),
        ..rollout::Options::default()
    };
    let sample = Sample::question(&options.image, &options.question, options.choice.clone());
    let (chat, pictures, processor) = (embedded.chat.clone(), embedded.pictures.clone(), embedded.processor.clone());
    let stage = Stage {
        task: &*task,
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
            let closer = record.views.iter().skip(options.image.len()).filter(|v| v.image == k).map(|v| v.region);
            let said = named(&record.turns).filter(|said| said.image == k + 1).map(|said| said.bbox);
            for region in closer.chain(said) {
                image::draw_box(&mut marked, &region, [255, 64, 32], thickness);
            }
            let path = dir.join(format!("marked-{}.jpg", k + 1));
            image::save(&marked, &path)?;
            saved.push(json!({"file": path}));
        }
    }
    let last = record.turns.last().map_or("", |turn| turn.text.as_str());
    let place = if options.image.len() > 1 { Place::AnswerTag } else { Place::Boxed };
    let answer = reward::extract(last, place).map(str::trim).filter(|answer| !answer.is_empty());
    if options.json {
        let out = json!({
            "turns": record.turns, "views": record.views, "stop": record.stop, "saved": saved, "answer": answer,
        });
        println!("{out}");
        return Ok(());
    }
    for turn in &record.turns {
        println!("── {} ({} tokens)", turn.role, turn.tokens);
        println!("{}", turn.text.trim_end());
        if let Some(line) = box_line(turn) {
            println!("   {line}");
        }
        for said in turn.boxes.iter().flatten() {
            println!("   {}", said_line(said, &options.image));
        }
    }
    println!("── answer: {}", answer.unwrap_or("none"));
    println!("── end: {}", end(record.stop, options, embedded.max_positions()));
    for file in saved {
        eprintln!("wrote {}", file["file"].as_str().unwrap_or_default());
    }
    Ok(())
}

impl Options {
    /// What can be refused before a model is read.
    fn check(&self) -> Result<()> {
        let at_once = !self.free && self.choice.is_empty() && self.turns.is_none_or(|turns| turns == 1);
        ensure!(
            self.image.len() == 1 || at_once,
            BadConfig(
                "--turns, --free and --choice are for questions about one picture; several are answered in boxes, at once"
                    .into()
            )
        );
        Ok(())
    }

    fn task(&self, budget: Budget) -> TaskOptions {
        let max_pixels = self.max_pixels.unwrap_or(budget.max_pixels);
        let min_pixels = self.min_pixels.unwrap_or(budget.min_pixels);
        let template = |default: &str| self.template.clone().unwrap_or_else(|| default.into());
        if self.image.len() > 1 {
            let template = template("mirg");
            let task = multi_image::Options { template, max_pixels, min_pixels, ..Default::default() };
            return TaskOptions::MultiImage(task);
        }
        let (template, turns) = (template("mgpo"), self.turns.unwrap_or(TURNS));
        let free = self.free;
        TaskOptions::Crop(crop::Options { template, turns, free, max_pixels, min_pixels, ..Default::default() })
    }
}

/// The boxes of an answer over several pictures.
fn named(turns: &[Turn]) -> impl Iterator<Item = &Named> {
    turns.iter().flat_map(|turn| turn.boxes.iter().flatten())
}

fn said_line(said: &Named, images: &[PathBuf]) -> String {
    let Named { image, bbox: b, label } = said;
    let Some(path) = image.checked_sub(1).and_then(|k| images.get(k)) else {
        return format!("no box: there is no Image-{image}");
    };
    let label = label.as_deref().unwrap_or("a box");
    format!("Image-{image} ({}): {label} at [{:.0}, {:.0}, {:.0}, {:.0}]", path.display(), b.x1, b.y1, b.x2, b.y2)
}

/// What became of the box that a turn named or should have named.
fn box_line(turn: &Turn) -> Option<String> {
    if let Some(b) = turn.bbox {
        return Some(format!("box: [{:.0}, {:.0}, {:.0}, {:.0}] in the original", b.x1, b.y1, b.x2, b.y2));
    }
    let fault = match turn.outcome? {
        BoxOutcome::Valid => "it was not kept",
        BoxOutcome::Missing => "none was named",
        BoxOutcome::Malformed => "it is not the JSON that was asked for",
        BoxOutcome::NotInteger => "its coordinates are not whole numbers",
        BoxOutcome::Inverted => "its corners are the wrong way round",
        BoxOutcome::OutOfRange => "it leaves the picture",
        BoxOutcome::TooSmall => "it is too small",
        BoxOutcome::TooThin => "it is too narrow",
        BoxOutcome::Duplicate => "this region was shown already",
    };
    Some(format!("no box: {fault}"))
}

/// Why the conversation ended, with the options that would have let it go on.
fn end(stop: Stop, options: &Options, positions: usize) -> String {
    match stop {
        Stop::Answered => "the model answered".into(),
        Stop::TurnLimit if options.image.len() > 1 => "the answer holds no list of boxes that could be read".into(),
        Stop::TurnLimit => format!("no answer in {} turns", options.turns.unwrap_or(TURNS)),
        Stop::Truncated => format!("cut off at {} tokens in a turn (--max-new-tokens)", options.max_new_tokens),
        Stop::OverLong => {
            format!("the next turn does not fit into {positions} tokens (--max-pixels, --max-new-tokens)")
        }
        Stop::InvalidBox => "the box could not be used".into(),
    }
}
