//! foveate teaches vision-language models where to look.
//!
//! The path of one sample: [`data`] (a row) -> [`tasks`] (the question and a first view) -> [`chat`] and [`image`] (tokens and
//! patches) -> [`rollout`] with an [`engine`] (the policy speaks, the task replies with a closer view) -> [`reward`] ->
//! [`objective`] (advantage, loss) -> [`batch`] and [`model`] (gradient) -> [`optim`] -> [`run`] (what is kept) -> [`report`].
//! Start reading at [`rl`].
//!
//! Letters in shapes: B sequences, T tokens, V vocabulary, D hidden, H heads, K per head, P patches, G group, I images.

pub mod ask;
pub mod batch;
pub mod bench;
pub mod chat;
pub mod commands;
pub mod config;
pub mod data;
pub mod demo;
pub mod doctor;
pub mod engine;
pub mod episode;
pub mod eval;
pub mod geometry;
pub mod http;
pub mod image;
pub mod model;
pub mod need;
pub mod objective;
pub mod openai;
pub mod optim;
pub mod progress;
pub mod report;
pub mod reward;
pub mod rl;
pub mod rollout;
pub mod run;
pub mod score;
pub mod sft;
pub mod stats;
pub mod synth;
pub mod table;
pub mod tasks;
