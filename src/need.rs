//! What a run will hold in memory at its peak, before anything is loaded: `foveate doctor CONFIG` shows it, and a run for which
//! there is no room refuses to start.
//!
//! It hides how that is known: the first step is rehearsed. The turn loop plays real rows with a policy that says as much as it may
//! and always looks closer, so that prompts, crops, groups and micro-batches have the lengths of a real step at its longest;
//! then the engine counts what it keeps of each token and patch (`engine/embedded/memory.rs`). No weight is read.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::chat::{Chat, Convention};
use crate::commands::gib;
use crate::data::Sample;
use crate::engine::ModelOptions;
use crate::engine::embedded::memory::{self, Held, Learns};
use crate::engine::{Completion, Finish, Frontend, Group, Prompt, Sampler, Sampling};
use crate::episode::{Episode, Stream};
use crate::geometry::{BBox, Size};
use crate::image::RgbImage;
use crate::model::checkpoint::would_map;
use crate::model::values::mapped_bytes;
use crate::model::{Config, Layout, Trainable, lora};
use crate::progress;
use crate::rollout::{self, Stage};
use crate::run::Environment;
use crate::tasks::Task;
use crate::{eval, rl, sft};

/// Bytes at the peak of a run.
#[derive(Clone, Debug)]
pub struct Need {
    pub held: Held,
    /// Decoded pictures: those kept, and those being decoded.
    pub pictures: u64,
    /// The program itself and its tokenizer.
    pub program: u64,
    /// The weights stay in their files: the system can drop them from memory and read them again.
    pub mapped: bool,
}

/// Rows that are rehearsed; the others of a step are taken to be like them.
const REHEARSED: usize = 8;
/// Rows among which the largest is looked for.
pub const LOOKED_AT: usize = 256;
/// The program, its threads and its libraries.
pub const PROGRAM: u64 = 24 << 20;

impl Need {
    pub fn total(&self) -> u64 {
        self.held.total() + self.pictures + self.program
    }

    /// Part by part, as a person reads them, and the total.
    pub fn parts(&self) -> [(&'static str, u64); 8] {
        let h = &self.held;
        [
            ("weights", h.weights),
            ("training_state", h.training_state),
            ("reference", h.reference),
            ("views", h.views),
            ("sampling", h.sampling),
            ("learning", h.learning),
            ("pictures", self.pictures + self.program),
            ("total", self.total()),
        ]
    }

    pub fn to_json(&self) -> Value {
        Value::Object(self.parts().into_iter().map(|(name, bytes)| (name.to_owned(), json!(bytes))).collect())
    }

    /// # Errors
    /// There is not so much memory, with the number and what to do.
    pub fn ensure_fits(&self, options: &ModelOptions) -> Result<()> {
        if !options.check_memory {
            return Ok(());
        }
        self.ensure_room(&format!("{}; model.check_memory = false starts it all the same", self.advice()))
    }

    /// What would make it smaller, by what takes most.
    pub fn advice(&self) -> &'static str {
        let Held { weights, training_state, reference, sampling, learning, .. } = self.held;
        if weights + training_state + reference > sampling.max(learning) {
            HOLDS_LESS
        } else if sampling > learning {
            SAMPLES_LESS
        } else {
            LEARNS_LESS
        }
    }

    /// The same with other advice. Where mapped weights alone are too many, it only says what that means.
    pub fn ensure_room(&self, advice: &str) -> Result<()> {
        let left = Environment::memory_left().unwrap_or(u64::MAX);
        let without_weights = self.total() - self.held.weights;
        if self.mapped && without_weights <= left && left < self.total() {
            progress::say(&format!(
                "of {} of weights about {} fit into memory: the others are read from the disk again for every token, which is slow",
                gib(self.held.weights),
                gib(left - without_weights)
            ));
            return Ok(());
        }
        ensure!(
            self.total() <= left,
            "this run would take about {} of memory at its peak, and {} can be had ({}). {advice}",
            gib(self.total()),
            gib(left),
            self.parts()[..7]
                .iter()
                .filter(|(_, bytes)| *bytes > 0)
                .map(|(name, bytes)| format!("{} {}", name.replace('_', " "), gib(*bytes)))
                .collect::<Vec<_>>()
                .join(", ")
        );
        Ok(())
    }
}

/// What makes the model and its training smaller.
const HOLDS_LESS: &str = "Take a smaller model, freeze parts of it (model.freeze), train adapters instead ([model.lora]), or leave weights in \
                          their files where nothing is trained (model.weights)";
/// What makes sampling smaller.
const SAMPLES_LESS: &str =
    "Lower train.prompts or train.group (of an evaluation eval.batch), rollout.max_tokens or the pixel budget";
/// What makes learning smaller.
const LEARNS_LESS: &str = "Set model.recompute = true, lower model.micro_batch_tokens, model.vision_tape_mib or the pixel budget, \
                          or freeze parts of the model";

/// Of `foveate rl`, or of `foveate rollout`, which does not learn. Without rows, as if every picture were large.
pub fn of_rl(plan: &rl::Plan, task: &dyn Task, rows: &[Sample], learns: bool) -> Result<Need> {
    let group = plan.train.group;
    let asked = plan.train.prompts * plan.train.steps as usize;
    let learning = Learns { reference: plan.objective()?.needs_reference(), steps: plan.train.steps };
    let model = Model::open(&plan.model, learns)?;
    let rehearsal = model.rehearse(task, &plan.rollout, rows, plan.train.prompts, group, plan.task.max_pixels())?;
    let (layout, train) = match learns {
        true => plan.model.learns(model.layout.clone())?,
        false => (model.layout.clone(), Trainable::ALL),
    };
    let count = |groups: &[Group], learns| {
        memory::of_step(&model.config, &layout, &plan.model, train, learns, groups, plan.rollout.max_new_tokens)
    };
    let groups = rehearsal.groups(plan.train.prompts, group);
    let mut held = count(&groups, learns.then_some(learning));
    if learns && plan.eval.every > 0 {
        let alone = rehearsal.groups(eval::EvalOptions::default().batch, 1);
        held.sampling = held.sampling.max(count(&alone, None).sampling);
    }
    // Samples that come from servers take nothing here.
    if !plan.engine.is_embedded() {
        held.sampling = 0;
    }
    Ok(model.need(held, rehearsal.pictures(plan.model.picture_cache_mib, rows, asked)))
}

/// Of `foveate eval`: the largest of its tasks, each with the rows that it asks.
pub fn of_eval(plan: &eval::Plan, asked: &[eval::Asked]) -> Result<Need> {
    let model = Model::open(&plan.model, false)?;
    let mut most: Option<Need> = None;
    let largest = plan.tasks.values().map(|t| t.max_pixels()).max().unwrap_or(0);
    for eval::Asked { task, samples: rows, .. } in asked {
        let rehearsal = model.rehearse(&**task, &plan.rollout, rows, plan.eval.batch, plan.eval.samples, largest)?;
        let groups = rehearsal.groups(plan.eval.batch.min(rows.len().max(1)), plan.eval.samples);
        let new = plan.rollout.max_new_tokens;
        let held = memory::of_step(&model.config, &model.layout, &plan.model, Trainable::ALL, None, &groups, new);
        let need = model.need(held, rehearsal.pictures(plan.model.picture_cache_mib, rows, rows.len()));
        if most.as_ref().is_none_or(|m| need.total() > m.total()) {
            most = Some(need);
        }
    }
    most.context("the config has no task")
}

/// Of `foveate sft`, from the longest dialogues that a step may have, with so many pictures in its files.
pub fn of_sft(plan: &sft::Plan, examples: &[sft::Example], different: usize) -> Result<Need> {
    let model = Model::open(&plan.model, true)?;
    let (layout, train) = plan.model.learns(model.layout.clone())?;
    let shown: usize = examples.iter().map(|e| e.stream.images.len()).sum();
    // Steps until every picture has been seen.
    let steps = plan.train.steps.min(different.div_ceil(shown.max(1)) as u64);
    let held = memory::of_dialogues(&model.config, &layout, &plan.model, train, examples, steps);
    let of_pictures = match different {
        0 => 0,
        seen => {
            let decoded = examples.iter().map(|e| decoded(&e.stream)).max().unwrap_or(0);
            pictures(plan.model.picture_cache_mib, decoded, seen.min(shown * steps as usize))
        }
    };
    Ok(model.need(held, of_pictures))
}

/// Of `foveate ask`: one conversation. Its pictures are opened here, so this is where bad ones are named.
pub fn of_ask(
    options: &ModelOptions,
    task: &dyn Task,
    rollout: &rollout::Options,
    max_pixels: u64,
    sample: &Sample,
) -> Result<Need> {
    let model = Model::open(options, false)?;
    let rows = std::slice::from_ref(sample);
    let rehearsal = model.rehearse(task, rollout, rows, 1, 1, max_pixels)?;
    let groups = rehearsal.groups(1, 1);
    let held =
        memory::of_step(&model.config, &model.layout, options, Trainable::ALL, None, &groups, rollout.max_new_tokens);
    Ok(model.need(held, rehearsal.pictures(options.picture_cache_mib, rows, 1)))
}

/// What is known of a model without its weights.
struct Model {
    /// Bytes of the weights where they stay in their files.
    mapped: Option<u64>,
    config: Config,
    layout: Arc<Layout>,
    /// Keeps no picture.
    frontend: Frontend,
    tokenizer: u64,
}

impl Model {
    fn open(options: &ModelOptions, learns: bool) -> Result<Model> {
        let path = &options.path;
        let config = Config::load(path)?;
        let layout = Layout::new(&config);
        // Files that cannot be read are named when the model is opened; a config without any can be reckoned with too.
        let mapped = !learns && would_map(path, &layout, options.weights).unwrap_or(false);
        let mapped = mapped.then(|| mapped_bytes(&layout));
        let tokenizer =
            std::fs::metadata(lora::home(path, &["tokenizer.json"])?.join("tokenizer.json")).map_or(0, |m| m.len());
        Ok(Model { mapped, config, layout, frontend: Frontend::load(path, 0)?, tokenizer })
    }

    fn need(&self, mut held: Held, pictures: u64) -> Need {
        held.weights = self.mapped.unwrap_or(held.weights);
        // Words, their numbers and the merges, in maps.
        Need { held, pictures, program: PROGRAM + 8 * self.tokenizer, mapped: self.mapped.is_some() }
    }

    /// Plays some rows of a step.
    fn rehearse(
        &self,
        task: &dyn Task,
        options: &rollout::Options,
        rows: &[Sample],
        prompts: usize,
        group: usize,
        max_pixels: u64,
    ) -> Result<Rehearsal> {
        let drawn;
        let (rows, _folder) = if rows.is_empty() {
            let folder = tempfile::tempdir().context("drawing a picture to reckon with")?;
            let side = (2.0 * max_pixels as f64).sqrt().ceil() as u32;
            let path = folder.path().join("picture.png");
            crate::image::save(&RgbImage::new(side, side), &path)?;
            let question =
                "What is written on the small sign to the left of the door, and who might have put it there? "
                    .repeat(3);
            drawn = [Sample::question(&[path], &question, vec![])];
            (&drawn[..], Some(folder))
        } else {
            (rows, None)
        };
        let played = rows.len().min(prompts).clamp(1, REHEARSED);
        // Spread over the file, for neighbours are often alike; but the first is the largest, wherever it stands.
        let spread = |n: usize| (0..n).map(move |i| &rows[i * rows.len() / n]);
        let largest = spread(rows.len().min(LOOKED_AT)).max_by_key(|row| size_of(row, max_pixels));
        // A row whose picture is damaged behind its header is named when it is drawn. Where there is nothing else, here.
        let opens = |row: &&Sample| row.images.iter().all(|path| self.frontend.pictures.size(path).is_ok());
        let mut some: Vec<&Sample> =
            largest.into_iter().chain(spread(played)).chain(rows).filter(opens).take(played).collect();
        if some.is_empty() {
            some.push(&rows[0]);
        }
        let some: Vec<(u64, &Sample)> = (0..).zip(some).collect();
        let Frontend { chat, convention, .. } = &self.frontend;
        let stage = Stage { task, frontend: &self.frontend, options };
        let mut policy = Longest { chat, convention: *convention };
        let episodes = rollout::play(&stage, &mut policy, &some, group, 0, 0)?;
        let decoded = episodes.iter().map(|e| decoded(&e.stream)).max().unwrap_or(0);
        Ok(Rehearsal { episodes, group, decoded })
    }
}

/// About how many tokens a row asks with: its views' patches by four, and its words.
fn size_of(row: &Sample, max_pixels: u64) -> u64 {
    let pixels = |path: &PathBuf| {
        crate::image::size(path).map_or(0, |s| (u64::from(s.width) * u64::from(s.height)).min(max_pixels))
    };
    row.images.iter().map(pixels).sum::<u64>() / 784 + row.question.len() as u64 / 4
}

/// Bytes of the largest picture of a conversation.
fn decoded(stream: &Stream) -> u64 {
    stream.images.iter().map(|i| (3.0 * i.view.region.area()) as u64).max().unwrap_or(0)
}

/// Of so many pictures, each of so many bytes, of which some are kept.
fn pictures(limit_mib: u64, decoded: u64, seen: usize) -> u64 {
    // A JPEG stands in memory twice while it is decoded, as what was read and as what comes of it.
    let at_once = 2 * rayon::current_num_threads() as u64 * decoded;
    at_once + (seen as u64 * decoded).min(limit_mib << 20)
}

struct Rehearsal {
    episodes: Vec<Episode>,
    group: usize,
    /// Bytes of a picture.
    decoded: u64,
}

impl Rehearsal {
    /// As many groups as a step has.
    fn groups(&self, prompts: usize, group: usize) -> Vec<Group<'_>> {
        let played: Vec<Group> =
            self.episodes.chunks(self.group).map(|g| g.iter().take(group).map(|e| &e.stream).collect()).collect();
        played.iter().cycle().take(prompts).cloned().collect()
    }

    /// Of a run that asks so many of the rows.
    fn pictures(&self, limit_mib: u64, rows: &[Sample], asked: usize) -> u64 {
        let different: HashSet<&Path> = rows.iter().flat_map(|row| &row.images).map(|path| path.as_path()).collect();
        pictures(limit_mib, self.decoded, different.len().min(asked).max(1))
    }
}

/// A policy that never stops early and always asks for nearly everything it sees, enlarged.
struct Longest<'a> {
    chat: &'a Chat,
    convention: Convention,
}

impl Sampler for Longest<'_> {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        let speak = |p: &Prompt| -> Result<Vec<Completion>> {
            let view = p.stream.images.last().map_or(Size::new(28, 28), |i| i.view.size);
            let mut out = Vec::with_capacity(p.seeds.len());
            for member in 0..p.seeds.len() as u64 {
                // A margin of its own for each conversation, so that no two of them share a view.
                let margin = (1 + (p.session + member) % 16) as f64;
                let b = BBox::new(margin, margin, f64::from(view.width) - margin, f64::from(view.height) - margin);
                let mut ids = self.chat.plain_ids(&self.convention.write(&[("it", b)], view))?;
                let blank = self.chat.plain_ids("\n")?;
                ids.extend(blank.iter().cycle().take(sampling.max_new_tokens));
                ids.truncate(sampling.max_new_tokens - 1);
                ids.push(self.chat.special.end_of_turn);
                out.push(Completion { logprobs: vec![0.0; ids.len()], ids, finish: Finish::EndOfTurn });
            }
            Ok(out)
        };
        prompts.par_iter().map(speak).collect()
    }

    fn end_step(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_weights_may_be_more_than_memory_and_nothing_else_may() {
        let held = Held { weights: 1 << 60, ..Held::default() };
        let need = Need { held, pictures: 0, program: 0, mapped: true };
        need.ensure_room("").unwrap();
        let in_memory = Need { mapped: false, ..need.clone() };
        let error = in_memory.ensure_room("Choose a smaller model").unwrap_err().to_string();
        assert!(error.contains("can be had") && error.ends_with("Choose a smaller model"), "{error}");
        Need { pictures: 1 << 60, ..need }.ensure_room("").unwrap_err();
    }
}
