//! What the embedded engine holds at the peak of a step, counted from the lengths of its conversations before anything is loaded.
//!
//! It repeats in bytes what `embedded.rs` and `tower.rs` do: conversations are played over a cache, groups are packed into
//! micro-batches, views go through the tower in passes. Freed memory stays with the process (`main.rs`), so the peak is what always stays
//! and the largest of the phases.

use std::collections::HashSet;

use foveate_kernels::attention::PANEL;

use super::READ_AT_ONCE;
use super::tower::{FEATURE_VALUES, choices, key, runs};
use crate::batch;
use crate::engine::{Group, ModelOptions};
use crate::episode::{Placed, Stream};
use crate::model::block::Keep;
use crate::model::generate::LAID_OUT;
use crate::model::memory::{Memory, memory};
use crate::model::{Config, Layout, Trainable};
use crate::sft::Example;

/// Bytes, part by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Held {
    pub weights: u64,
    /// Gradients and moments.
    pub training_state: u64,
    /// The first weights.
    pub reference: u64,
    /// Features of views, and what the update can use again of their way through the tower.
    pub views: u64,
    /// While conversations are sampled: keys and values, weights laid out for few rows, the rows being read.
    pub sampling: u64,
    /// While the policy learns: the largest micro-batch, forward and back.
    pub learning: u64,
}

impl Held {
    /// Sampling and learning alternate.
    pub fn total(&self) -> u64 {
        self.weights + self.training_state + self.reference + self.views + self.sampling.max(self.learning)
    }
}

/// How weights are held that learn.
#[derive(Clone, Copy)]
pub struct Learns {
    pub reference: bool,
    /// Steps of the run: a frozen tower's features stay from one to the next.
    pub steps: u64,
}

/// Logits that the head holds at once, `kernels::logprob`.
const LOGITS_BYTES: u64 = 16 << 20;
/// Places of partial gradients, `kernels::attention`.
const PLACES_BYTES: u64 = 64 << 20;

/// Of a step that plays these groups and, with `learns`, learns from them.
pub fn of_step(
    config: &Config,
    layout: &Layout,
    options: &ModelOptions,
    train: Trainable,
    learns: Option<Learns>,
    groups: &[Group],
    max_new_tokens: usize,
) -> Held {
    let m = memory(config, layout, train);
    let merge = config.vision.merge as u32;
    let mut held = Held { weights: m.weights_bytes, ..Held::default() };
    let keep = if learns.is_some() && train.tower() { options.keep() } else { Keep::Nothing };
    let looked = Looked::at(&m, groups, keep, options.vision_tape_mib << 20, merge);
    held.views = looked.kept(learns.filter(|_| !train.tower()).map_or(1, |l| l.steps));

    let speakers: usize = groups.iter().map(Vec::len).sum();
    let longest = groups.iter().flatten().map(|s| s.len()).max().unwrap_or(0);
    let cached: usize = groups.iter().map(|group| cached_rows(group, max_new_tokens)).sum();
    let read = READ_AT_ONCE.max(longest).min(groups.iter().flatten().map(|s| s.len()).sum()) as u64;
    let laid = m.text_bytes + m.head_bytes;
    let laid = if laid <= 4 * LAID_OUT as u64 { laid } else { m.block_bytes };
    let reading = laid + read * m.scratch_bytes_per_row + speakers as u64 * m.logits_bytes();
    held.sampling = cached as u64 * m.cache_bytes_per_row + reading.max(looked.pass);

    if let Some(learns) = learns {
        held.training_state = m.training_bytes;
        held.reference = if learns.reference { 4 * m.trained as u64 } else { 0 };
        let runs = batch::micro_batches(groups, options.micro_batch_tokens);
        let packed = runs.into_iter().map(|run| m.of_groups(options.keep(), &groups[run]));
        let on_features = if train.tower() { looked.features } else { 0 };
        held.learning = on_features + packed.max().unwrap_or(0).max(looked.back);
    }
    held
}

/// Of a step on written dialogues, one of so many.
pub fn of_dialogues(
    config: &Config,
    layout: &Layout,
    options: &ModelOptions,
    train: Trainable,
    examples: &[Example],
    steps: u64,
) -> Held {
    let m = memory(config, layout, train);
    let groups: Vec<Group> = examples.iter().map(|e| e.stream.alone()).collect();
    let keep = if train.tower() { options.keep() } else { Keep::Nothing };
    // Pictures from files, which are seen as those of a rollout are.
    let looked = match examples.iter().all(|e| e.drawn.is_empty()) {
        true => Looked::at(&m, &groups, keep, options.vision_tape_mib << 20, config.vision.merge as u32),
        false => Looked::default(),
    };
    let patches = |e: &Example| e.drawn.iter().map(|p| p.grid.patches() as u64).sum::<u64>();
    let all: u64 = examples.iter().map(patches).sum();
    let runs = batch::micro_batches(&groups, options.micro_batch_tokens);
    let packed = runs.into_iter().map(|run| {
        let packed = m.of_groups(options.keep(), &groups[run.clone()]);
        let patches: u64 = examples[run].iter().map(patches).sum();
        let tower = patches * (m.pixel_bytes_per_patch + m.of_patch(keep).max(m.scratch_bytes_per_patch));
        tower + packed.max(patches * m.scratch_bytes_per_patch)
    });
    let on_features = if train.tower() { looked.features } else { 0 };
    Held {
        weights: m.weights_bytes,
        training_state: m.training_bytes,
        views: all * m.pixel_bytes_per_patch + looked.kept(if train.tower() { 1 } else { steps }),
        learning: on_features + packed.max().unwrap_or(0).max(looked.pass).max(looked.back),
        ..Held::default()
    }
}

/// Rows of the cache that a group takes: the prompt once, each member's own behind it, which move to the end of the cache when they
/// grow from turn to turn.
fn cached_rows(group: &Group, max_new_tokens: usize) -> usize {
    let panels = |rows: usize| rows.next_multiple_of(PANEL);
    let prompt = group.first().map_or(0, |s| s.prompt_len());
    let shared = if group.len() > 1 { panels(prompt) } else { 0 };
    let own = |rows: usize| if group.len() > 1 { rows - prompt } else { rows };
    let member = |s: &&Stream| {
        let first = panels(own(prompt) + max_new_tokens);
        let whole = panels(own(s.len()));
        if whole > first { first + whole } else { first }
    };
    shared + group.iter().map(member).sum::<usize>()
}

/// What views cost.
#[derive(Default)]
struct Looked {
    features: u64,
    /// Kept for the backward pass of the tower.
    tape: u64,
    /// Beside it: the largest pass forward, and back.
    pass: u64,
    back: u64,
}

impl Looked {
    fn at(m: &Memory, groups: &[Group], keep: Keep, budget: u64, merge: u32) -> Looked {
        let mut out = Looked::default();
        let mut passes: Vec<Vec<Placed>> = Vec::new();
        // Prompts are looked at in the first turn, closer views in the next ones. Groups are taken to have different pictures.
        for closer in [false, true] {
            let mut views = Vec::new();
            for group in groups {
                let mut seen = HashSet::new();
                let of_turn = |stream: &&Stream, image: &Placed| (image.first < stream.prompt_len()) != closer;
                let images = group.iter().flat_map(|s| s.images.iter().filter(move |i| of_turn(s, i)));
                views.extend(images.filter(|image| seen.insert(key(image))).cloned());
            }
            out.features += views.iter().map(|v| v.grid.tokens(merge) as u64 * m.feature_bytes).sum::<u64>();
            passes.extend(runs(views));
        }
        for pass in passes {
            let patches: u64 = pass.iter().map(|v| v.grid.patches() as u64).sum();
            let costs = choices(keep).iter().map(|k| patches * m.of_patch(*k));
            let kept = costs.into_iter().find(|bytes| out.tape + bytes <= budget).unwrap_or(0);
            out.tape += kept;
            out.pass = out.pass.max(patches * (m.pixel_bytes_per_patch + m.scratch_bytes_per_patch));
            let again = if kept == 0 { m.of_patch(keep) } else { 0 };
            if keep != Keep::Nothing {
                out.back = out.back.max(patches * (again + m.scratch_bytes_per_patch) + m.block_bytes);
            }
        }
        out
    }

    /// What stays of a step's views, or of those of so many steps.
    fn kept(&self, steps: u64) -> u64 {
        self.tape + (self.features * steps).min(4 * FEATURE_VALUES as u64 + self.features)
    }
}

impl Memory {
    fn logits_bytes(&self) -> u64 {
        self.head_bytes / self.feature_bytes * 4
    }

    /// Groups packed, on their way forward and back, with their head.
    fn of_groups(&self, keep: Keep, groups: &[Group]) -> u64 {
        let rows: usize = groups.iter().map(|g| batch::rows(g)).sum();
        let targets: usize = groups.iter().flatten().map(|s| s.sampled_count()).sum();
        let per_row = match keep {
            Keep::Inputs | Keep::Attended => self.recompute_bytes_per_row,
            _ => self.tape_bytes_per_row,
        };
        let stretches = rows.div_ceil(1024) as u64;
        let places = (stretches * rows as u64 * self.feature_bytes).min(PLACES_BYTES);
        let block = rows as u64 * self.scratch_bytes_per_row + self.block_bytes;
        let head = (targets as u64 * self.logits_bytes()).min(LOGITS_BYTES)
            + 2 * targets as u64 * self.feature_bytes
            + if self.head_bytes <= 32 << 20 { 2 * self.head_bytes } else { 0 };
        rows as u64 * (per_row + 2 * self.feature_bytes) + block.max(places).max(head)
    }
}
