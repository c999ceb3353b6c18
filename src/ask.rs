//! `foveate ask`: one question about pictures of one's own, every turn shown as a person would want to see it: on a terminal while it is
//! written, for a file or a pipe when it is over, for a program as one JSON object.

mod aloud;
mod saving;

use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use self::aloud::{Aloud, Screen};
use self::saving::Saving;
use crate::config::BadConfig;
use crate::data::Sample;
use crate::engine::embedded::Embedded;
use crate::engine::openai::{self, Served};
use crate::engine::{ComputeName, Frontend, ModelOptions, Sampler};
use crate::episode::{BoxOutcome, Stop, Turn};
use crate::geometry::{BBox, Budget};
use crate::image::Processor;
use crate::model::{Config, Hold};
use crate::need;
use crate::progress;
use crate::reward::{self, Named, Place};
use crate::rollout::{self, Stage};
use crate::run::Interrupt;
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
    /// Ask a chat server (OpenAI's protocol, up to /v1) instead; --model is then a folder with tokenizer and picture settings
    #[arg(long, value_name = "URL", requires = "served_as")]
    url: Option<String>,
    /// The model's name at the server
    #[arg(long, value_name = "NAME", requires = "url")]
    served_as: Option<String>,
    /// The environment variable that holds the server's key
    #[arg(long, value_name = "VARIABLE", default_value = "OPENAI_API_KEY")]
    api_key_env: String,
    /// Where the weights are held while the model speaks
    #[arg(long, value_enum, default_value = "auto")]
    weights: Hold,
    /// What products with the weights are computed in; bf16 is faster on processors with tiles, which foveate doctor shows, and bf16x6 with large pictures
    #[arg(long, value_enum, default_value = "f32")]
    compute: ComputeName,
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
    /// Folder for the views and the marked pictures: red where it looked closer, green what it answered with
    #[arg(long)]
    save: Option<PathBuf>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> Result<()> {
    options.check()?;
    let mut saving = options.save.as_deref().map(Saving::into).transpose()?;
    let engine = ModelOptions {
        path: options.model.clone(),
        weights: options.weights,
        compute: options.compute.into(),
        ..ModelOptions::default()
    };
    // From here on what a person can get wrong is found in the order of its cost: the config, the pictures, the weights.
    let positions = Config::load(&options.model)?.text.max_positions;
    let budget = Processor::load(&options.model)?.budget;
    let task_options = options.task(budget);
    let task = task_options.task(budget.factor)?;
    let play = rollout::Options {
        temperature: options.temperature,
        max_new_tokens: options.max_new_tokens,
        max_tokens: positions,
        ..rollout::Options::default()
    };
    play.validate()?;
    let sample = Sample::question(&options.image, &options.question, options.choice.clone());
    let screen = Screen::new();
    let asked = [(0, &sample)];
    let mut speaker = match options.server() {
        Some(server) => {
            end_cleanly(false)?;
            let frontend = Frontend::load(&engine.path, engine.picture_cache_mib)?;
            Speaker::Served(Box::new(Served::open(&server, frontend.clone())?), frontend)
        }
        None => {
            need::of_ask(&engine, &*task, &play, task_options.max_pixels(), &sample)?.ensure_room(ADVICE)?;
            end_cleanly(screen.terminal && !options.json)?;
            let embedded = Embedded::open(&engine, None)?;
            if let (Some(about), false) = (embedded.about(), options.json) {
                progress::say(&about);
            }
            Speaker::Here(Box::new(embedded))
        }
    };
    let aloud = screen.terminal && !options.json && matches!(speaker, Speaker::Here(_));
    let (frontend, held) = match &speaker {
        Speaker::Here(embedded) => (embedded.frontend.clone(), Some(embedded.model.weights.hold())),
        Speaker::Served(_, frontend) => (frontend.clone(), None),
    };
    let stage = Stage { task: &*task, frontend: &frontend, options: &play };
    let episodes = match &mut speaker {
        Speaker::Served(served, _) => rollout::play(&stage, &mut **served, &asked, 1, options.seed, 0)?,
        Speaker::Here(embedded) if !aloud => rollout::play(&stage, &mut **embedded, &asked, 1, options.seed, 0)?,
        Speaker::Here(embedded) => {
            println!("{}\n{}", screen.head("── user"), screen.words(&options.question));
            let mut sampler = Aloud {
                engine: embedded,
                frontend: &frontend,
                saving: saving.as_mut(),
                screen,
                asked: options.image.len(),
                told: 0,
            };
            rollout::play(&stage, &mut sampler, &asked, 1, options.seed, 0)?
        }
    };
    let episode = episodes.into_iter().next().context("the question was not played")?;
    let record = episode.record();

    let mut wrote = Vec::new();
    if let Some(saving) = &mut saving {
        for placed in episode.stream.images.iter().skip(saving.views()) {
            wrote.push(saving.view(&*frontend.pictures.get(&placed.path)?, &placed.view)?);
        }
        for (k, image) in options.image.iter().enumerate() {
            let closer = record.views.iter().skip(options.image.len()).filter(|v| v.image == k);
            let looked: Vec<BBox> = closer.map(|view| view.region).collect();
            let said: Vec<BBox> =
                named(&record.turns).filter(|said| said.image == k + 1).map(|said| said.bbox).collect();
            wrote.push(saving.marked(k, &*frontend.pictures.get(image)?, &looked, &said)?);
        }
    }
    let last = record.turns.last().map_or("", |turn| turn.text.as_str());
    let place = if options.image.len() > 1 { Place::AnswerTag } else { Place::Boxed };
    let answer = reward::extract(last, place).map(str::trim).filter(|answer| !answer.is_empty());
    if options.json {
        let saved = saving.map(|saving| saving.files).unwrap_or_default();
        let out = json!({
            "turns": record.turns, "views": record.views, "stop": record.stop, "saved": saved, "answer": answer,
            "weights": held,
        });
        println!("{out}");
        return Ok(());
    }
    for turn in &record.turns {
        if !aloud {
            println!("── {} ({} tokens)", turn.role, turn.tokens);
            println!("{}", turn.text.trim_end());
        }
        // A box that was looked at has been told of.
        if let Some(line) = box_line(turn).filter(|_| !aloud || turn.bbox.is_none()) {
            println!("{}", screen.aside(&format!("   {line}")));
        }
        for said in turn.boxes.iter().flatten() {
            println!("{}", screen.words(&format!("   {}", said_line(said, &options.image))));
        }
    }
    println!("{} {}", screen.head("── answer:"), screen.words(answer.unwrap_or("none")));
    println!("{} {}", screen.head("── end:"), end(record.stop, options, positions));
    for path in wrote {
        match aloud {
            true => println!("{}", aloud::wrote(screen, &path)),
            false => eprintln!("wrote {}", path.display()),
        }
    }
    Ok(())
}

/// Who answers.
enum Speaker {
    Here(Box<Embedded>),
    Served(Box<Served>, Frontend),
}

/// What makes a question smaller.
const ADVICE: &str = "Lower --max-pixels or --max-new-tokens, choose a smaller model, or keep its weights in their files: \
                      `foveate model export DIR --out NEW --dtype bf16` writes a copy for that";

/// Ctrl-C ends at once: there is nothing to finish but a file that is being written.
fn end_cleanly(aloud: bool) -> Result<()> {
    Interrupt::end_at_once(move || {
        // Held until the end: no file is begun, and no word is written behind the last.
        let writing = saving::writing();
        let mut out = io::stdout().lock();
        if aloud {
            // A terminal that has gone needs no end of line.
            let _ = writeln!(out);
        }
        progress::say("stopped");
        (writing, out)
    })
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

    fn server(&self) -> Option<openai::Options> {
        let urls = vec![self.url.clone()?];
        let model = self.served_as.clone().unwrap_or_default();
        Some(openai::Options { urls, model, api_key_env: self.api_key_env.clone(), ..openai::Options::default() })
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

/// A box in pixels of the original.
fn corners(b: &BBox) -> String {
    format!("[{:.0}, {:.0}, {:.0}, {:.0}]", b.x1, b.y1, b.x2, b.y2)
}

fn said_line(said: &Named, images: &[PathBuf]) -> String {
    let Named { image, bbox, label } = said;
    let Some(path) = image.checked_sub(1).and_then(|k| images.get(k)) else {
        return format!("no box: there is no Image-{image}");
    };
    let label = label.as_deref().unwrap_or("a box");
    format!("Image-{image} ({}): {label} at {}", path.display(), corners(bbox))
}

/// What became of the box that a turn named or should have named.
fn box_line(turn: &Turn) -> Option<String> {
    if let Some(b) = turn.bbox {
        return Some(format!("box: {} in the original", corners(&b)));
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
