//! The SFT loop: written dialogues instead of played ones, the same streams, packing and gradient.
//!
//! Trained are the assistant's tokens, the end of turn included. The loss is the mean over the trained tokens of the whole
//! step, so splitting a step into micro-batches changes nothing.

mod learner;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::learner::Learner;
use crate::chat::{Chat, Content, Convention, Message, Part};
use crate::config::{self, BadConfig};
use crate::data::{self, Dialogue, Format, Order, ReadAs, Sample};
use crate::engine::ModelOptions;
use crate::engine::{self, Frontend, Training};
use crate::episode::Stream;
use crate::geometry::{BBox, Budget, Grid, Size, View};
use crate::image::{self, Patches, Processor};
use crate::model::dense;
use crate::need::{self, Need};
use crate::optim::Optim;
use crate::progress::{self, Progress};
use crate::run::{Interrupt, Interrupted, Invocation, Kind, Metrics, RunFolder, Start, Stopwatch, peak_rss};
use crate::synth::pretrain::{self, Pretrain};
use crate::synth::recipe::Recipe;
use crate::synth::{Split, assets_dir};
use crate::tasks::multi_image::{MultiImageTask, Writing};
use crate::tasks::{Options as TaskOptions, Task, check_rows, ensure_possible};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: ModelOptions,
    pub data: DataOptions,
    /// Ask the rows of `data.train` as this task does, and learn their answers; only tasks of `kind = "multi_image"`.
    #[serde(default)]
    pub task: Option<TaskOptions>,
    /// A temporary head on the visual tokens; only with `data.pretrain`, whose pictures know their objects.
    #[serde(default)]
    pub dense: Option<dense::Options>,
    /// Who holds the weights; drawn dialogues and `[dense]` are the embedded engine's alone.
    #[serde(default, skip_serializing_if = "engine::Options::is_embedded")]
    pub engine: engine::Options,
    #[serde(default)]
    pub optim: Optim,
    pub train: TrainOptions,
}

/// Where dialogues come from: exactly one of the two.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// JSONL of `{"messages": [{"role", "content": [{"type": "image", "image": PATH} | {"type": "text", "text": …}]}]}`; with a
    /// `[task]`, of rows as `foveate data trajectories` writes them.
    #[serde(default)]
    pub train: Option<PathBuf>,
    /// With a `[task]`: the format of its rows, where their keys do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where relative paths of pictures start, if not in the folder of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Train on the good rows of a file that has bad ones too; otherwise such a file is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_out_bad: bool,
    /// Dialogues drawn on the fly from the bundled world.
    #[serde(default)]
    pub pretrain: Option<Recipe>,
    /// Pixel budget of pictures from files; without it the checkpoint's.
    #[serde(default)]
    pub max_pixels: Option<u64>,
    #[serde(default)]
    pub min_pixels: Option<u64>,
    /// Longer dialogues are left out, and counted.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
    /// With a `[task]`: write each row's trajectory before its answer. Off: the answer alone.
    #[serde(default = "yes")]
    pub reason: bool,
    /// With a `[task]`: written coordinates are multiples of this.
    #[serde(default = "one")]
    pub snap: u32,
}

impl DataOptions {
    /// Of pictures from files, where the checkpoint's own is `budget`.
    pub fn budget(&self, budget: Budget) -> Budget {
        let (least, most) =
            (self.min_pixels.unwrap_or(budget.min_pixels), self.max_pixels.unwrap_or(budget.max_pixels));
        Budget::new(least, most, budget.factor)
    }

    fn read_as(&self) -> ReadAs {
        ReadAs { format: self.format, images: self.images.clone(), leave_out_bad: self.leave_out_bad }
    }
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

fn default_max_tokens() -> usize {
    16384
}

/// What one step's loss is the mean of. Reported is the token mean in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Every trained token of the step counts the same.
    TokenMean,
    /// Every dialogue counts the same: one digit that was read is worth as much as a long list of boxes.
    DialogueMean,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    pub out: PathBuf,
    pub steps: u64,
    /// Dialogues per step.
    pub batch: usize,
    pub loss: Loss,
    pub seed: u64,
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    /// Write the metrics a second time as TensorBoard reads them.
    pub tensorboard: bool,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            out: "runs/sft".into(),
            steps: 100,
            batch: 32,
            loss: Loss::TokenMean,
            seed: 1,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            tensorboard: true,
        }
    }
}

/// A dialogue, ready to be packed.
pub struct Example {
    pub stream: Stream,
    /// Of drawn pictures, in the order of `stream.images`; none where pictures come from files.
    pub drawn: Vec<Patches>,
    /// What stands where in each drawn view, in pixels of the view.
    pub objects: Vec<Vec<(String, BBox)>>,
    pub task: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// Next dialogue of the generator, or the order of the file's rows.
    next: u64,
    order: Option<Order>,
}

/// A written conversation -> a stream whose trained tokens are the assistant's.
pub fn stream_of(
    chat: &Chat,
    processor: &Processor,
    messages: &[Message],
    views: &[(Arc<Path>, View)],
) -> Result<Stream> {
    let mut stream = Stream::default();
    let mut waiting: Vec<Message> = Vec::new();
    let mut shown = 0;
    for message in messages {
        if message.role != "assistant" {
            waiting.push(message.clone());
            continue;
        }
        ensure!(message.images() == 0, "a message of the assistant holds an image; only others can show one");
        let images = waiting.iter().map(Message::images).sum::<usize>();
        ensure!(
            shown + images <= views.len(),
            "the messages show {} images, {} were given",
            shown + images,
            views.len()
        );
        let new = &views[shown..shown + images];
        shown += images;
        let grids: Vec<Grid> = new.iter().map(|(_, v)| processor.grid(v.size)).collect();
        let tokens: Vec<usize> = grids.iter().map(|g| g.tokens(processor.merge)).collect();
        let encoded = if stream.is_empty() {
            chat.encode(&waiting, true, &tokens)?
        } else {
            let [user] = waiting.as_slice() else {
                anyhow::bail!(
                    "{} messages stand between two of the assistant's, expected one of the user's",
                    waiting.len()
                );
            };
            chat.continuation(stream.images.len(), user, &tokens, stream.ids.last().copied())?
        };
        let placed = new.iter().zip(&grids).map(|((path, view), grid)| (path.clone(), *view, *grid)).collect();
        stream.push_context(&encoded.ids, placed, chat.special.image_pad, processor.merge)?;
        let mut said = chat.assistant_ids(&message.text())?;
        said.push(chat.special.end_of_turn);
        let zeros = vec![0.0; said.len()];
        stream.push_sampled(&said, &zeros);
        waiting.clear();
    }
    ensure!(
        shown == views.len(),
        "{} of {} images stand behind the last message of the assistant, where nothing is learnt from them",
        views.len() - shown,
        views.len()
    );
    ensure!(
        stream.sampled_count() > 0,
        "the dialogue has no message of the assistant, so there is nothing to train on"
    );
    Ok(stream)
}

/// The same of a dialogue from a file, whose pictures are shown whole within `budget`.
///
/// # Errors
/// Those of [`stream_of`] and of `size`, with the row.
pub fn stream_of_dialogue(
    chat: &Chat,
    processor: &Processor,
    dialogue: &Dialogue,
    budget: Budget,
    size: impl Fn(&Path) -> Result<Size>,
) -> Result<Stream> {
    let of_row = || format!("row {}", dialogue.number);
    let mut views = Vec::new();
    for (k, path) in dialogue.images.iter().enumerate() {
        let size = size(path).with_context(of_row)?;
        views.push((Arc::from(path.as_path()), View::whole(k, size, budget)?));
    }
    stream_of(chat, processor, &dialogue.messages, &views).with_context(of_row)
}

/// What a step learns from.
struct Batch {
    examples: Vec<Example>,
    /// Dialogues that were longer than `data.max_tokens`, and rows that turned out to be bad where these may be left out.
    left_out: usize,
}

/// Drawn dialogues that may be too long before the recipe is at fault.
const DRAWN_IN_VAIN: usize = 1000;

enum Source {
    World { world: Box<Pretrain>, seed: u64 },
    File { rows: Vec<Dialogue>, budget: Budget },
    Rows { rows: Vec<Sample>, task: MultiImageTask, writing: Writing },
}

impl Source {
    fn open(plan: &Plan, processor: &Processor) -> Result<Source> {
        let (data, seed) = (&plan.data, plan.train.seed);
        if let Some(kind) = &plan.task {
            let (Some(path), TaskOptions::MultiImage(options)) = (&data.train, kind) else {
                return Err(BadConfig(
                    "[task] in a config of sft asks the rows of data.train, and its kind must be multi_image".into(),
                )
                .into());
            };
            let task = MultiImageTask::new(options.clone(), processor.budget.factor)?;
            let writing = Writing { convention: Convention::of("qwen2_5_vl")?, reason: data.reason, snap: data.snap };
            let rows = kind.read(path, &data.read_as())?;
            check_rows(&task, &rows, path)?;
            ensure_possible(&rows, path)?;
            for row in &rows {
                task.written_reason(row, &writing).with_context(|| format!("row {} of {}", row.id, path.display()))?;
            }
            return Ok(Source::Rows { rows, task, writing });
        }
        match (&data.train, &data.pretrain) {
            (None, Some(recipe)) => Ok(Source::World {
                world: Box::new(Pretrain::load(&assets_dir()?, Split::Train, recipe.clone())?),
                seed,
            }),
            (Some(path), None) => {
                Ok(Source::File { rows: data.read_as().dialogues(path)?, budget: data.budget(processor.budget) })
            }
            _ => Err(BadConfig("[data] needs exactly one of `train` (a file) and `pretrain` (a recipe)".into()).into()),
        }
    }

    /// How many rows there are; drawn dialogues have no end.
    fn rows(&self) -> Option<usize> {
        match self {
            Source::World { .. } => None,
            Source::File { rows, .. } => Some(rows.len()),
            Source::Rows { rows, .. } => Some(rows.len()),
        }
    }

    /// How many pictures there are in its files.
    fn different(&self) -> usize {
        let count = |paths: &mut dyn Iterator<Item = &PathBuf>| paths.collect::<HashSet<_>>().len();
        match self {
            Source::World { .. } => 0,
            Source::File { rows, .. } => count(&mut rows.iter().flat_map(|row| &row.images)),
            Source::Rows { rows, .. } => count(&mut rows.iter().flat_map(|row| &row.images)),
        }
    }

    /// The dialogues of a step. Where all that were drawn are left out, it draws on.
    ///
    /// # Errors
    /// A row or picture that cannot be read, unless these are left out; nothing but dialogues that are too long or bad.
    fn batch(&self, plan: &Plan, frontend: &Frontend, state: &mut State, step: u64) -> Result<Batch> {
        let mut left_out = 0;
        loop {
            let mut next = || match &mut state.order {
                Some(order) => order.next_row() as u64,
                None => {
                    state.next += 1;
                    state.next - 1
                }
            };
            let indices: Vec<u64> = (0..plan.train.batch).map(|_| next()).collect();
            let drawn = indices.par_iter().map(|&i| self.example(frontend, i, step));
            let mut examples = Vec::with_capacity(plan.train.batch);
            for example in drawn.collect::<Vec<Result<Example>>>() {
                match example {
                    Ok(example) if example.stream.len() <= plan.data.max_tokens => examples.push(example),
                    Ok(_) => {}
                    // Headers of pictures were read when the run began; this is damaged behind its header.
                    Err(error) if plan.data.leave_out_bad => progress::say(&format!("left out: {error:#}")),
                    Err(error) if self.rows().is_some() => {
                        bail!("{error:#}; {}", data::BAD_ROW);
                    }
                    Err(error) => return Err(error),
                }
            }
            left_out += plan.train.batch - examples.len();
            if !examples.is_empty() {
                return Ok(Batch { examples, left_out });
            }
            // Twice round, for the order changes behind each.
            ensure!(
                left_out < 2 * self.rows().unwrap_or(DRAWN_IN_VAIN) + plan.train.batch,
                "every dialogue is bad or longer than data.max_tokens = {}; raise it or lower the pixel budget",
                plan.data.max_tokens
            );
        }
    }

    fn example(&self, frontend: &Frontend, index: u64, step: u64) -> Result<Example> {
        let Frontend { chat, processor, pictures, .. } = frontend;
        match self {
            Source::World { world, seed } => {
                let dialogue = world.dialogue(*seed, step, index)?;
                let mut views = Vec::new();
                let mut drawn = Vec::new();
                let mut objects = Vec::new();
                for view in &dialogue.views {
                    let size = Size::new(view.rgb.width(), view.rgb.height());
                    views.push((Arc::from(Path::new("drawn")), View { image: 0, region: size.bounds(), size }));
                    drawn.push(image::patches(&view.rgb, processor)?);
                    objects.push(view.objects.clone());
                }
                let messages: Vec<Message> = dialogue.messages.iter().map(spoken).collect();
                let stream = stream_of(chat, processor, &messages, &views)?;
                Ok(Example { stream, drawn, objects, task: dialogue.task.to_owned() })
            }
            Source::Rows { rows, task, writing } => {
                let row = &rows[index as usize];
                let sizes = row.images.iter().map(|path| pictures.size(path).with_context(|| row.named()));
                let sizes: Vec<Size> = sizes.collect::<Result<_>>()?;
                let opening = task.open(row, &sizes).with_context(|| row.named())?;
                let mut messages: Vec<Message> = opening.system.iter().map(Message::system).collect();
                messages.push(Message::user(opening.user.parts));
                messages.push(Message::assistant(task.written(row, &opening.user.views, writing)?));
                let placed = |view: View| (Arc::from(row.images[view.image].as_path()), view);
                let views: Vec<_> = opening.user.views.into_iter().map(placed).collect();
                let stream = stream_of(chat, processor, &messages, &views).with_context(|| row.named())?;
                let task = row.task.clone().unwrap_or_else(|| task.name().to_owned());
                Ok(Example { stream, drawn: Vec::new(), objects: Vec::new(), task })
            }
            Source::File { rows, budget } => {
                let stream =
                    stream_of_dialogue(chat, processor, &rows[index as usize], *budget, |path| pictures.size(path))?;
                Ok(Example { stream, drawn: Vec::new(), objects: Vec::new(), task: "file".into() })
            }
        }
    }
}

/// A drawn dialogue's turn in the words of the chat.
fn spoken(message: &pretrain::Message) -> Message {
    let parts = message.parts.iter().map(|part| match part {
        pretrain::Part::Text(text) => Part::text(text.as_str()),
        pretrain::Part::View(_) => Part::image(),
    });
    let role = match message.role {
        pretrain::Role::System => "system",
        pretrain::Role::User => "user",
        pretrain::Role::Assistant => "assistant",
    };
    Message { role: role.into(), content: Content::Parts(parts.collect()) }
}

/// `foveate sft CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load(&invocation.config, &invocation.overrides)?;
    plan.check()?;
    if invocation.dry_run {
        let source = Source::open(&plan, &Processor::load(&plan.model.path)?)?;
        invocation.show(&plan)?;
        if let Some(rows) = source.rows() {
            eprintln!("{rows} dialogues in {}", plan.data.train.as_deref().unwrap_or(Path::new("")).display());
        }
        eprintln!("{} dialogues a step, {} in all", plan.train.batch, plan.train.batch as u64 * plan.train.steps);
        return Ok(());
    }
    let last = train(&plan, invocation.start, &Interrupt::install()?)?;
    if invocation.json {
        println!("{}", json!({"run": plan.train.out, "metrics": last}));
    } else {
        println!("{}", plan.train.out.display());
    }
    Ok(())
}

impl Plan {
    /// Refuses what cannot work, before anything is loaded.
    fn check(&self) -> Result<()> {
        ensure!(
            (1..=1 << 40).contains(&self.train.steps) && (1..=1 << 20).contains(&self.train.batch),
            BadConfig(format!(
                "train.steps = {} and train.batch = {}: expected at least 1, and at most 2^40 steps of 2^20 dialogues",
                self.train.steps, self.train.batch
            ))
        );
        if self.task.is_some() {
            let unused = [
                ("pretrain", self.data.pretrain.is_some()),
                ("max_pixels", self.data.max_pixels.is_some()),
                ("min_pixels", self.data.min_pixels.is_some()),
            ];
            if let Some((key, _)) = unused.iter().find(|(_, set)| *set) {
                return Err(
                    BadConfig(format!("data.{key} says nothing with a [task]; the task has its own pixels")).into()
                );
            }
        }
        ensure!(
            self.task.is_some() || self.data.format.is_none(),
            BadConfig("data.format is of the rows that a [task] asks; dialogues have one form".into())
        );
        ensure!(
            !self.train.out.as_os_str().is_empty(),
            BadConfig("train.out is empty; name the folder that the run is to make".into())
        );
        self.optim.validate()?;
        self.model.trainable()?;
        self.model.check_lora()?;
        ensure!(
            !matches!(self.engine, engine::Options::Vllm(_)),
            BadConfig(
                "engine.kind = \"vllm\" is for sampling, and fine-tuning samples nothing; leave [engine] out".into()
            )
        );
        self.engine.validate(&self.model, 1.0, 0.0)?;
        self.engine.ensure_trains(&self.model, 1.0)?;
        ensure!(
            self.engine.is_embedded() || self.data.pretrain.is_none(),
            BadConfig("data.pretrain draws its pictures for the embedded engine; leave [engine] out, or name a file in data.train".into())
        );
        if let Some(recipe) = &self.data.pretrain {
            recipe.validate().map_err(|e| BadConfig(format!("in [data.pretrain]: {e:#}")))?;
        }
        Ok(())
    }
}

pub fn train(plan: &Plan, start: Start, interrupt: &Interrupt) -> Result<Metrics> {
    plan.check()?;
    let frontend = Frontend::load(&plan.model.path, 0)?;
    let source = Source::open(plan, &frontend.processor)?;
    if plan.engine.has_own_kernels() {
        need::of_sft(plan, &longest_examples(plan, &source, &frontend)?, source.different())?
            .ensure_fits(&plan.model)?;
    }
    let training = Training {
        optim: plan.optim.clone(),
        temperature: 1.0,
        all_ids: true,
        reference: false,
        pictures: source.different() > 0,
        seed: plan.train.seed,
    };
    let mut learner = Learner::open(plan, &training, &source, start)?;
    // Its pictures are those that the tower is going to ask for.
    let frontend = learner.engine().frontend();
    let mut state = State { next: 0, order: source.rows().map(|rows| Order::new(rows, plan.train.seed)).transpose()? };
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let written_plan = config::to_toml(plan)?;
    let (folder, checkpoint) = RunFolder::open(&plan.train.out, Kind::Sft, start, &written_plan)?;
    let mut done = 0;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.leaves_steps(plan.train.steps)?;
        learner.load(&checkpoint.path)?;
        let saved: State = checkpoint.state()?;
        // The same file must have the same rows, or an index would name another dialogue, or none.
        let order = match (saved.order, source.rows()) {
            (Some(order), Some(rows)) => Some(order.resume(rows)?),
            (order, _) => order,
        };
        state = State { order, ..saved };
        done = checkpoint.step;
        progress::say(&format!("resuming after step {done}"));
    }
    folder.begin(&written_plan, checkpoint.map(|c| c.step))?;
    let mut log = folder.metrics_log()?;
    if plan.train.tensorboard {
        log = log.with_events()?;
    }
    let bar = Progress::start("fine-tuning", "step", done, plan.train.steps);
    let rescue = |learner: &mut Learner, done, state: &State, error| match plan.engine.trains_here() {
        true => folder.rescue(done, plan.train.keep_checkpoints, state, |to| learner.save(to), error),
        // A server that went away is not asked to save.
        false => error,
    };
    let mut last = Metrics::new();
    for step in done + 1..=plan.train.steps {
        let mut watch = Stopwatch::start();
        let mut metrics = Metrics::new();
        let before_step = state.clone();
        let drawn = watch.time("data", || source.batch(plan, &frontend, &mut state, step));
        let started = std::time::Instant::now();
        let learnt = drawn.and_then(|Batch { examples, left_out }| {
            metrics.insert("data/left_out".into(), json!(left_out));
            learner.update(&examples, step, plan, &mut metrics)
        });
        if let Err(error) = learnt {
            return Err(rescue(&mut learner, step - 1, &before_step, error));
        }
        watch.add("update", started.elapsed());
        watch.write(&mut metrics);
        metrics.insert("perf/max_memory_gb".into(), json!(peak_rss() as f64 / 1e9));
        if let Err(error) = log.append(step, &metrics) {
            return Err(rescue(&mut learner, step, &state, error));
        }
        let number = |key: &str| metrics.get(key).and_then(|v| v.as_f64()).unwrap_or(f64::NAN);
        bar.step(format!("loss {:.3} · likely tokens {:.2}", number("loss"), number("tokens/likely")));
        last = metrics;
        let asked = interrupt.asked();
        let due = plan.train.checkpoint_every > 0 && step % plan.train.checkpoint_every == 0;
        if asked || due || step == plan.train.steps {
            folder.checkpoint(step, plan.train.keep_checkpoints, &state, |to| learner.save(to))?;
        }
        if asked {
            return Err(Interrupted::after(step, &plan.train.out).into());
        }
    }
    bar.finish();
    Ok(last)
}

/// What a run of this plan will hold in memory.
pub fn need(plan: &Plan) -> Result<Need> {
    let frontend = Frontend::load(&plan.model.path, 0)?;
    let source = Source::open(plan, &frontend.processor)?;
    need::of_sft(plan, &longest_examples(plan, &source, &frontend)?, source.different())
}

/// The longest dialogues that a step may have, to reckon with; drawn ones as the last step has them, for a curriculum begins with its smallest.
fn longest_examples(plan: &Plan, source: &Source, frontend: &Frontend) -> Result<Vec<Example>> {
    let (rows, count) = match source.rows() {
        None => (plan.train.batch, plan.train.batch),
        Some(rows) => (rows, rows.min(need::LOOKED_AT)),
    };
    let indices = (0..count).into_par_iter().map(|i| (i * rows / count.max(1)) as u64);
    let mut read: Vec<Result<Example>> = indices.map(|i| source.example(frontend, i, plan.train.steps)).collect();
    if plan.data.leave_out_bad && read.iter().any(Result::is_ok) {
        read.retain(Result::is_ok);
    }
    let mut examples: Vec<Example> = read.into_iter().collect::<Result<_>>()?;
    examples.retain(|e| e.stream.len() <= plan.data.max_tokens);
    examples.sort_by_key(|e| std::cmp::Reverse(e.stream.len()));
    examples.truncate(plan.train.batch);
    Ok(examples)
}
