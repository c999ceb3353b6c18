//! What the loop needs of a model, as two traits: a [`Sampler`] continues conversations, a [`Trainer`] also learns.
//!
//! They are cut along the operations that distributed engines offer over the wire (sample; forward and backward with one
//! weight per token; optimiser step; save; load), so that the same loop runs on this machine and on a cluster. A trainer
//! never sees an objective: it is asked for log-probs and is handed back one weight per token.

pub mod embedded;

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::episode::Stream;

/// A conversation to be continued `seeds.len()` times.
pub struct Prompt<'a> {
    /// Names the conversation, so that an engine may keep its cache from turn to turn. Unique within a step.
    pub session: u64,
    pub stream: &'a Stream,
    /// One independent continuation per seed; continuation i is remembered as session + i.
    pub seeds: &'a [u64],
}

/// How to sample. Training never truncates the distribution; `top_k` and `top_p` are for evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub max_new_tokens: usize,
    /// The policy's turn also ends where one of these texts is complete (its tokens are kept and trained).
    pub stop: Vec<String>,
    /// Go on after an end of turn, so that exactly `max_new_tokens` are sampled; for benchmarks.
    pub ignore_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end-of-turn token was sampled; it is the last of `ids`.
    EndOfTurn,
    /// A stop text was completed; no end-of-turn token was sampled.
    StopText,
    /// The limit of new tokens was reached.
    Length,
}

#[derive(Clone, Debug)]
pub struct Completion {
    pub ids: Vec<u32>,
    /// Of each id, under the distribution it was drawn from.
    pub logprobs: Vec<f32>,
    pub finish: Finish,
}

/// Per sampled token of one stream, in order of appearance.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    pub logprobs: Vec<f32>,
    pub entropies: Vec<f32>,
}

/// What an objective hands back: the derivative of the loss by each log-prob, and the weight of each token's entropy.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    pub logprobs: Vec<f32>,
    pub entropies: Option<Vec<f32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Policy,
    /// The weights that training began with.
    Reference,
}

pub trait Sampler {
    /// One list per prompt, one completion per seed, in order.
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>>;
    /// Drops what was kept for the conversations of a step.
    fn end_step(&mut self);
}

/// Streams with a common prompt; the engine may share its work on it.
pub type Group<'a> = Vec<&'a Stream>;

pub trait Trainer: Sampler {
    /// Log-probs of every sampled token, without gradients.
    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>>;
    /// Runs the policy over the groups and adds the gradient of the weighted sum of log-probs (and entropies).
    /// `weigh(group, member, scores)` is asked once for each stream, between forward and backward.
    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()>;
    /// Clips, updates, forgets the gradient. Returns the norm of the gradient before clipping.
    fn step(&mut self, learning_rate: f64) -> Result<f64>;
    /// Writes weights (Hugging Face layout) and optimiser state into `dir`.
    fn save(&self, dir: &Path) -> Result<()>;
    fn load(&mut self, dir: &Path) -> Result<()>;
}
