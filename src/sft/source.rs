//! Where dialogues come from: drawn, written in a file, or the rows that a task asks with the answers it expects.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;

use super::{Plan, State, stream_of, stream_of_dialogue};
use crate::chat::{Content, Convention, Message, Part};
use crate::config::BadConfig;
use crate::data::{self, Dialogue, Sample};
use crate::engine::Frontend;
use crate::episode::Stream;
use crate::geometry::{BBox, Budget, Size, View};
use crate::image::{self, BadPicture, Patches, Processor};
use crate::progress;
use crate::synth::pretrain::{self, Pretrain};
use crate::synth::{Split, assets_dir};
use crate::tasks::multi_image::{MultiImageTask, Writing};
use crate::tasks::{Options as TaskOptions, Task, check_rows, ensure_possible};

/// A dialogue, ready to be packed.
pub struct Example {
    pub stream: Stream,
    /// Of drawn pictures, in the order of `stream.images`; none where pictures come from files.
    pub drawn: Vec<Patches>,
    /// What stands where in each drawn view, in pixels of the view.
    pub objects: Vec<Vec<(String, BBox)>>,
    pub task: String,
}

/// What a step learns from.
pub(super) struct Batch {
    pub examples: Vec<Example>,
    /// Dialogues that were longer than `data.max_tokens`, and rows that turned out to be bad where these may be left out.
    pub left_out: usize,
}

/// Drawn dialogues that may be too long before the recipe is at fault.
const DRAWN_IN_VAIN: usize = 1000;

pub(super) enum Source {
    World { world: Box<Pretrain>, seed: u64 },
    File { rows: Vec<Dialogue>, budget: Budget },
    Rows { rows: Vec<Sample>, task: MultiImageTask, writing: Writing },
}

impl Source {
    pub fn open(plan: &Plan, processor: &Processor) -> Result<Source> {
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
            let rows = kind.read(path, &data.read_as()).context("data.train")?;
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
            (Some(path), None) => Ok(Source::File {
                rows: data.read_as().dialogues(path).context("data.train")?,
                budget: data.budget(processor.budget),
            }),
            _ => Err(BadConfig("[data] needs exactly one of `train` (a file) and `pretrain` (a recipe)".into()).into()),
        }
    }

    /// How many rows there are; drawn dialogues have no end.
    pub fn rows(&self) -> Option<usize> {
        match self {
            Source::World { .. } => None,
            Source::File { rows, .. } => Some(rows.len()),
            Source::Rows { rows, .. } => Some(rows.len()),
        }
    }

    /// How many pictures there are in its files.
    pub fn different(&self) -> usize {
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
    pub fn batch(&self, plan: &Plan, frontend: &Frontend, state: &mut State, step: u64) -> Result<Batch> {
        let (mut left_out, mut bad) = (0, 0);
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
                    Err(error) if !error.is::<BadPicture>() => return Err(error),
                    Err(error) if !plan.data.leave_out_bad => {
                        return Err(BadPicture::told(format!("{error:#}; {}", data::BAD_ROW)));
                    }
                    Err(error) => {
                        progress::say_once(&format!("left out: {error:#}"));
                        bad += 1;
                    }
                }
            }
            left_out += plan.train.batch - examples.len();
            if !examples.is_empty() {
                return Ok(Batch { examples, left_out });
            }
            // Twice round, for the order changes behind each.
            let in_vain = 2 * self.rows().unwrap_or(DRAWN_IN_VAIN) + plan.train.batch;
            ensure!(bad < in_vain, "no dialogue has pictures that can be read");
            ensure!(
                left_out < in_vain,
                "every dialogue is bad or longer than data.max_tokens = {}; raise it or lower the pixel budget",
                plan.data.max_tokens
            );
        }
    }

    pub fn example(&self, frontend: &Frontend, index: u64, step: u64) -> Result<Example> {
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
