//! The small commands: data, model, trace. Each is a few lines around a library call.

mod check;
mod overlap;
mod trajectories;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::chat::{Chat, Message, Part};
use crate::config::BadConfig;
use crate::data;
use crate::data::convert::{Format, Options as ConvertOptions, convert};
use crate::geometry::{Size, View};
use crate::image::{self, Processor, decode};
use crate::model::checkpoint::would_map;
use crate::model::config::TokenIds;
use crate::model::memory::memory;
use crate::model::presets::{self, Random};
use crate::model::trace::{Greedy, trace};
use crate::model::{Config, Dtype, Hold, Layout, Trainable, Vlm, lora};
use crate::progress::Progress;
use crate::run::{Environment, ensure_ours};
use crate::synth::contrast;
use crate::synth::make::{MakeOptions, Set, make};
use crate::{eval, report, score};
use trajectories::Trajectories;

/// More threads than this only cost: tens of thousands take minutes to start.
const MOST_THREADS: usize = 1024;

/// Uses this many threads for everything; without a number, all cores.
pub fn use_threads(threads: Option<usize>) -> Result<()> {
    if let Some(n) = threads {
        ensure!(
            (1..=MOST_THREADS).contains(&n),
            BadConfig(format!("--threads {n}: expected a number from 1 to {MOST_THREADS}"))
        );
    }
    // 0 is one for each core. The commands themselves run in the pool, so its stacks are as large as a main thread's.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).stack_size(8 << 20);
    pool.build_global().context("starting the threads")
}

/// `foveate report`: writes the page, and figures where they are asked for, and prints where they are.
pub fn report(runs: &[PathBuf], options: &report::Options, as_json: bool) -> Result<()> {
    ensure!(options.episodes > 0, BadConfig("--episodes 0: expected at least 1".into()));
    let written = report::write(runs, options)?;
    if as_json {
        println!("{}", json!({"report": written.page, "figures": written.figures}));
    } else {
        println!("{}", written.page.display());
        written.figures.iter().for_each(|path| println!("{}", path.display()));
    }
    Ok(())
}

/// `foveate score`: rows on stdin, judgements on stdout. Bad rows are named there and make the exit code 1.
pub fn score() -> Result<()> {
    let summary = score::run(std::io::stdin().lock(), std::io::stdout().lock())?;
    eprintln!("{} rows, mean {:.4}, {} bad rows", summary.rows, summary.mean, summary.errors);
    ensure!(summary.errors == 0, "{} rows could not be judged; each says why in its place", summary.errors);
    Ok(())
}

/// `foveate score --bench ROWS`: predictions of another program on stdin, the benchmark's tables on stdout.
pub fn score_bench(rows: &Path, enlarge: bool, as_json: bool) -> Result<()> {
    let samples = data::read(rows)?;
    let (judged, missing) = eval::mig_bench::predicted(std::io::stdin().lock(), &samples, rows, enlarge)?;
    let tables = eval::mig_bench::tables("predictions on stdin", &judged);
    if as_json {
        println!("{}", json!({"tables": tables, "missing": missing}));
    } else {
        eval::print_tables(&tables);
    }
    if missing > 0 {
        eprintln!("{missing} of {} rows have no prediction and count as wrong", samples.len());
    }
    Ok(())
}

/// `foveate score --compare A B`: two evaluations of the same rows, question by question.
pub fn score_compare(first: &Path, second: &Path, as_json: bool) -> Result<()> {
    let comparisons = eval::compare::compare(first, second)?;
    if as_json {
        println!("{}", json!({"first": first, "second": second, "comparisons": comparisons}));
    } else {
        let names = [first, second].map(|path| path.display().to_string());
        eval::print_tables(&eval::compare::tables(&comparisons, [&names[0], &names[1]]));
    }
    Ok(())
}

#[derive(Subcommand)]
pub enum Data {
    /// Draw a bundled data set from a seed
    Make {
        /// plates (read a number that only a closer look shows) or pairs (questions over several pictures)
        set: String,
        /// Folder to write
        #[arg(long)]
        out: PathBuf,
        /// Training questions
        #[arg(long, default_value_t = 1000)]
        train: usize,
        /// Held-out questions (other photographs, other pictures of the objects, other digits)
        #[arg(long, default_value_t = 300)]
        test: usize,
        /// WIDTHxHEIGHT of the pictures [default: 2016x1512, pairs 672x504]
        #[arg(long)]
        size: Option<String>,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Replace the folder if it is there
        #[arg(long)]
        overwrite: bool,
        #[arg(long)]
        json: bool,
    },
    /// Reasoning traces for annotated rows of several pictures: DIR/sft.jsonl to fine-tune on, DIR/rl.jsonl with the other rows
    Trajectories(Box<Trajectories>),
    /// Rows of a public data set as rows of our own
    Convert {
        /// JSON (a list) or JSON lines
        file: PathBuf,
        /// mig_bench (original or revised), mgrounding (MGrounding-630k) or refcoco (lmms-lab's REC rows, VLM-R1's JSON)
        #[arg(long)]
        from: String,
        /// File of rows to write
        #[arg(long)]
        out: PathBuf,
        /// Folder in which relative paths of pictures start [default: that of FILE]
        #[arg(long)]
        images: Option<PathBuf>,
        /// OLD=NEW: paths of pictures that begin with OLD begin with NEW instead; may be given again
        #[arg(long)]
        remap: Vec<String>,
        /// Replace the file of rows if it is there
        #[arg(long)]
        overwrite: bool,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Questions over several pictures from rows with one picture and one labelled box (RefCOCO, COCO)
    Contrast {
        rows: PathBuf,
        /// Folder to write: rows.jsonl and the windows cut from the pictures
        #[arg(long)]
        out: PathBuf,
        /// Pictures of a question among distractors, from and to
        #[arg(long, num_args = 2, default_values_t = [2, 4])]
        pictures: Vec<usize>,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        #[arg(long)]
        json: bool,
    },
    /// Pictures and questions that two files of rows share: exact and near duplicates
    Overlap(Box<overlap::Overlap>),
    /// Validate rows of any known format, one by one; with a model, show what would be asked
    Check(Box<check::Check>),
}

impl Data {
    pub fn run(self) -> Result<()> {
        match self {
            Data::Make { set, out, train, test, size, seed, overwrite, json } => {
                let set = Set::named(&set).map_err(|e| BadConfig(e.to_string()))?;
                let size = size.as_deref().map(parse_size).transpose()?.unwrap_or(set.size());
                let (world, pairs) = Default::default();
                let options = MakeOptions { set, out, train, test, size, seed, world, pairs, overwrite };
                let bar = Progress::start("drawing", "picture", 0, 0);
                let made = make(&options, &|done, all| bar.at(done as u64, all as u64))?;
                bar.finish();
                if json {
                    println!("{}", serde_json::to_string(&made)?);
                } else {
                    println!("{}\n{}", made.train.display(), made.test.display());
                    eprintln!("{} and {} questions on {} pictures", made.train_rows, made.test_rows, made.pictures);
                }
                Ok(())
            }
            Data::Trajectories(command) => command.run(),
            Data::Convert { file, from, out, images, remap, overwrite, json } => {
                let format = Format::named(&from)?;
                let remap = remap.iter().map(|text| text.parse()).collect::<Result<_>>()?;
                let made = convert(&ConvertOptions { format, input: file, out, images, remap, overwrite })?;
                if json {
                    println!("{}", serde_json::to_string(&made)?);
                    return Ok(());
                }
                println!("{}", made.out.display());
                eprintln!("{} rows from {} of the source, over {} pictures", made.rows, made.read, made.pictures);
                made.notes.iter().chain(&made.left_out.lines()).for_each(|line| eprintln!("  {line}"));
                Ok(())
            }
            Data::Contrast { rows, out, pictures, seed, json } => {
                let pictures = [pictures[0], pictures[1]];
                let bar = Progress::start("contrasting", "row", 0, 0);
                let options = contrast::Options { rows, out: out.clone(), pictures, seed };
                let report = contrast::build(&options, &|done, all| bar.at(done as u64, all as u64))?;
                bar.finish();
                if json {
                    println!("{}", json!({"out": out, "report": report}));
                } else {
                    println!("{}", out.join("rows.jsonl").display());
                    for (kind, n) in &report.written {
                        eprintln!("{n} {}", kind.replace('_', " "));
                    }
                    eprintln!(
                        "of {} rows; {} have not one picture with one labelled box, {} found no contrast",
                        report.rows, report.unfit, report.without_contrast
                    );
                }
                Ok(())
            }
            Data::Overlap(command) => command.run(),
            Data::Check(command) => command.run(),
        }
    }
}

fn parse_size(text: &str) -> Result<Size> {
    let parsed = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    match parsed {
        Some((width, height)) if width > 0 && height > 0 => Ok(Size { width, height }),
        _ => Err(BadConfig(format!("--size {text}: expected WIDTHxHEIGHT in pixels, for instance 2016x1512")).into()),
    }
}

#[derive(Subcommand)]
pub enum Model {
    /// Write a random model of a preset, in Hugging Face layout
    New {
        /// nano, mini, qwen2.5-vl-3b, qwen2.5-vl-7b
        #[arg(long)]
        preset: String,
        #[arg(long)]
        out: PathBuf,
        /// Folder with tokenizer, template and processor (default: the bundled nano tokenizer)
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        #[arg(long, default_value_t = 1)]
        seed: u64,
        #[arg(long, default_value = "f32")]
        dtype: String,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Sizes, parameters and memory of a checkpoint
    Info {
        dir: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint again, for instance in another number format
    Export {
        dir: PathBuf,
        #[arg(long)]
        out: PathBuf,
        /// f32 or bf16
        #[arg(long, default_value = "bf16")]
        dtype: String,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
}

fn dtype(name: &str) -> Result<Dtype> {
    match name {
        "f32" => Ok(Dtype::F32),
        "bf16" => Ok(Dtype::Bf16),
        _ => Err(BadConfig(format!("--dtype {name}: expected f32 or bf16")).into()),
    }
}

impl Model {
    pub fn run(self) -> Result<()> {
        match self {
            Model::New { preset, out, tokenizer, seed, dtype: name, json } => {
                let dtype = dtype(&name)?;
                let tokenizer = match tokenizer {
                    Some(dir) => dir,
                    None => crate::synth::assets_dir()?.join("nano"),
                };
                ensure_free(&out)?;
                let random = Random::new(new_config(&preset, &tokenizer)?, seed);
                ensure_fits(&random.layout, Hold::Mapped)?;
                random.save(&out, dtype, Some(&tokenizer))?;
                written(&random.layout, &out, dtype, json);
                Ok(())
            }
            Model::Info { dir, json } => {
                let config = Config::load(&dir)?;
                let layout = Layout::new(&config);
                let memory = memory(&config, &layout, Trainable::ALL);
                let adapter = lora::is_adapter(&dir).then(|| lora::about(&dir, &layout)).transpose()?;
                if json {
                    println!("{}", json!({"config": config.to_json("float32"), "memory": memory, "adapter": adapter}));
                    return Ok(());
                }
                println!("{}", dir.display());
                println!("parameters      {:.2} M", memory.parameters as f64 / 1e6);
                if let Some(adapter) = adapter {
                    println!("{:<16}{adapter}", "adapter");
                }
                println!(
                    "text            {} layers, {} wide, {} heads / {} kv, vocabulary {}",
                    config.text.layers, config.text.hidden, config.text.heads, config.text.kv_heads, config.text.vocab
                );
                println!("vision          {} blocks, {} wide", config.vision.depth, config.vision.hidden);
                println!("sampling        {}", gib(memory.weights_bytes));
                println!("training        {} and activations", gib(memory.weights_bytes + memory.training_bytes));
                println!(
                    "per token       {} bytes kept, {} with recompute, {} cached",
                    memory.tape_bytes_per_row, memory.recompute_bytes_per_row, memory.cache_bytes_per_row
                );
                Ok(())
            }
            Model::Export { dir, out, dtype: name, json } => {
                let dtype = dtype(&name)?;
                ensure_free(&out)?;
                let layout = Layout::new(&Config::load(&dir)?);
                let hold = if would_map(&dir, &layout, Hold::Auto)? { Hold::Mapped } else { Hold::Memory };
                ensure_fits(&layout, hold)?;
                let model = Vlm::open(&dir, hold)?;
                model.save(&out, dtype, Some(&lora::base_or(&dir)?))?;
                written(&layout, &out, dtype, json);
                Ok(())
            }
        }
    }
}

/// Says what was written, and where.
fn written(layout: &Layout, out: &Path, dtype: Dtype, json: bool) {
    if json {
        let parameters = layout.len;
        println!("{}", json!({"model": out, "parameters": parameters, "dtype": dtype.name()}));
    } else {
        println!("{}", out.display());
    }
}

/// Refuses a folder that holds anything, so that no model is replaced and none is mixed into other files.
fn ensure_free(out: &Path) -> Result<()> {
    ensure!(
        !out.join("config.json").exists(),
        "there is a model already, choose another folder or remove it: {}",
        out.display()
    );
    let taken = match std::fs::read_dir(out) {
        Ok(mut files) => files.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).with_context(|| format!("looking into --out: {}", out.display())),
    };
    ensure!(!taken, "the folder holds other files, choose a new or an empty one for a model: {}", out.display());
    Ok(())
}

/// Refuses a model for which there is no room before it is begun: later the system would end the process without a word.
fn ensure_fits(layout: &Layout, hold: Hold) -> Result<()> {
    // The weights in f32 unless they stay in files, and one tensor, as numbers and as bytes on its way into or out of a file.
    let largest = layout.entries.iter().map(|e| e.range.len()).max().unwrap_or(0);
    let weights = if hold == Hold::Mapped { 0 } else { layout.len };
    let need = 4 * (weights + 2 * largest) as u64;
    let left = Environment::memory_left().unwrap_or(u64::MAX);
    ensure!(
        need <= left,
        "a model of {:.2} G parameters takes {} of memory here, and {} can be had; \
         choose a smaller model, free some memory or use a larger machine",
        layout.len as f64 / 1e9,
        gib(need),
        gib(left)
    );
    Ok(())
}

/// Bytes as a person reads them.
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

/// The configuration of a preset with the ids of a tokenizer folder.
fn new_config(preset: &str, tokenizer: &Path) -> Result<Config> {
    let chat = Chat::load(tokenizer)?;
    // Rows beyond the tokenizer's are banned from sampling; a round number of them keeps the products even.
    let rows = chat.vocabulary().next_multiple_of(64);
    presets::preset(preset, rows, &token_ids(&chat)?).map_err(|e| BadConfig(e.to_string()).into())
}

/// The ids that a model's config must name, as this tokenizer numbers them.
fn token_ids(chat: &Chat) -> Result<TokenIds> {
    let s = &chat.special;
    let end = chat.id("<|endoftext|>");
    Ok(TokenIds {
        image_pad: s.image_pad,
        video_pad: s.video_pad.context("the tokenizer has no <|video_pad|> token")?,
        vision_start: s.vision_start,
        vision_end: s.vision_end,
        bos: end,
        eos: vec![s.end_of_turn],
        pad: end,
    })
}

#[derive(Args)]
pub struct Trace {
    #[arg(long)]
    model: PathBuf,
    /// JSON list of {"role", "content": [{"type": "image", "image": PATH} | {"type": "text", "text": ...}]}
    #[arg(long)]
    messages: PathBuf,
    /// safetensors file to write
    #[arg(long)]
    out: PathBuf,
    /// Decode so many tokens greedily
    #[arg(long)]
    greedy: Option<usize>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

impl Trace {
    pub fn run(self) -> Result<()> {
        let chat = Chat::load(&self.model)?;
        let processor = Processor::load(&self.model)?;
        let folder = self.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ensure!(folder.is_dir(), "the folder of --out is not there, make it first: {}", folder.display());
        let text = std::fs::read_to_string(&self.messages)
            .with_context(|| format!("reading the messages: {}", self.messages.display()))?;
        let messages: Vec<Message> = serde_json::from_str(text.trim_start_matches('\u{feff}')).with_context(|| {
            format!("reading the messages, a JSON list of {{\"role\", \"content\"}}: {}", self.messages.display())
        })?;
        let base = self.messages.parent().unwrap_or(Path::new("."));
        let mut grids = Vec::new();
        let mut pixels = Vec::new();
        for part in messages.iter().flat_map(Message::parts) {
            let Part::Image { image: path } = part else { continue };
            let path = path.with_context(|| format!("an image without a path in {}", self.messages.display()))?;
            let path = base.join(path);
            let picture = decode(&path)?;
            let view = View::whole(grids.len(), picture.size(), processor.budget)
                .with_context(|| format!("showing {}", path.display()))?;
            let patches = image::patches(&image::show(&picture, &view)?, &processor)?;
            grids.push(patches.grid);
            pixels.extend(patches.data);
        }
        let tokens: Vec<usize> = grids.iter().map(|g| g.tokens(processor.merge)).collect();
        // A conversation that ends with the user is one that the model should go on with.
        let goes_on = messages.last().is_none_or(|m| m.role != "assistant");
        let encoded = chat.encode(&messages, goes_on, &tokens)?;
        let greedy = self.greedy.map(|tokens| Greedy { tokens, stop: &chat.special.stops });
        ensure_ours(&self.out, "\"input_ids\"")?;
        let model = Vlm::open(&self.model, Hold::Auto)?;
        let traced = trace(&model, &encoded.ids, &grids, pixels, greedy)?;
        traced.write(&self.out)?;
        if self.json {
            let greedy = &traced.greedy_ids;
            println!(
                "{}",
                json!({"trace": self.out, "tokens": encoded.ids.len(), "images": grids.len(), "greedy_ids": greedy})
            );
        } else {
            println!("{}", self.out.display());
        }
        Ok(())
    }
}
