//! The turn loop: the policy speaks, the task replies, until the task closes the conversation.
//!
//! All conversations of a step advance together, so that the engine works on many rows at once. Tokens go in and tokens come
//! out; text is only a view for the task. A length limit is checked before an image is appended and never splits one.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::chat::{Action, Message, Reading as Reader};
use crate::config::BadConfig;
use crate::data::Sample;
use crate::engine::{Finish, Frontend, Prompt, Sampler, Sampling};
use crate::episode::{Episode, Stop, Stream, Turn};
use crate::geometry::{Grid, Size, View};
use crate::reward::Parts;
use crate::tasks::{Context, Reading, Reply, Shown, Task};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// 1 for training (nothing is truncated); 0 is greedy.
    pub temperature: f32,
    /// Evaluation only.
    pub top_k: Option<usize>,
    /// Evaluation only.
    pub top_p: Option<f32>,
    /// The most tokens the policy may write in one turn.
    pub max_new_tokens: usize,
    /// The most tokens of a whole conversation, images included.
    pub max_tokens: usize,
    /// Texts that end a turn as soon as they are complete.
    pub stop: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options { temperature: 1.0, top_k: None, top_p: None, max_new_tokens: 1024, max_tokens: 16384, stop: vec![] }
    }
}

impl Options {
    /// # Errors
    /// A value that nothing can be sampled with, named.
    pub fn validate(&self) -> Result<()> {
        let bad = |text: String| Err(BadConfig(text).into());
        if !(self.temperature.is_finite() && (0.0..=100.0).contains(&self.temperature)) {
            return bad(format!(
                "rollout.temperature = {}: expected 0 (greedy) to 100, 1 for training",
                self.temperature
            ));
        }
        if self.top_k == Some(0) {
            return bad("rollout.top_k = 0 leaves no token to choose from; leave it out to choose from all".into());
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return bad(format!("rollout.top_p = {p}: expected more than 0 and at most 1"));
        }
        if self.max_new_tokens == 0 || self.max_new_tokens >= self.max_tokens {
            return bad(format!(
                "rollout.max_new_tokens = {} (of a turn): expected at least 1 and less than rollout.max_tokens = {} (of a conversation)",
                self.max_new_tokens, self.max_tokens
            ));
        }
        if self.stop.iter().any(String::is_empty) {
            return bad("rollout.stop holds an empty text, which would end every turn at once".into());
        }
        Ok(())
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            ignore_end: false,
        }
    }
}

/// What every conversation needs: the words, the pictures, the rules.
pub struct Stage<'a> {
    pub task: &'a dyn Task,
    pub frontend: &'a Frontend,
    pub options: &'a Options,
}

/// The random stream of one conversation depends on these numbers alone, never on its neighbours or on threads.
pub fn seed_of(seed: u64, step: u64, group: u64, member: u64, turn: u64) -> u64 {
    let mut key = [0u8; 32];
    for (slot, value) in key.chunks_exact_mut(8).zip([seed, step, group, (member << 32) | turn]) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key).next_u64()
}

/// One conversation under way.
struct Playing<'a> {
    sample: &'a Sample,
    sizes: Vec<Size>,
    paths: Vec<Arc<Path>>,
    group: u64,
    member: usize,
    stream: Stream,
    turns: Vec<Turn>,
    stop: Option<Stop>,
}

/// Plays `group_size` conversations for each sample. The result is ordered by sample, then by member.
pub fn play(
    stage: &Stage,
    sampler: &mut dyn Sampler,
    samples: &[(u64, &Sample)],
    group_size: usize,
    seed: u64,
    step: u64,
) -> Result<Vec<Episode>> {
    // Opening a conversation decodes pictures that are new, so it is done for all at once; of several errors the first is told.
    let opened: Vec<Result<Playing>> = samples.par_iter().map(|&(group, sample)| open(stage, sample, group)).collect();
    let mut playing = Vec::with_capacity(samples.len() * group_size);
    for (&(group, sample), first) in samples.iter().zip(opened) {
        let first = first?;
        for member in 0..group_size {
            playing.push(Playing {
                sample,
                sizes: first.sizes.clone(),
                paths: first.paths.clone(),
                group,
                member,
                stream: first.stream.clone(),
                turns: first.turns.clone(),
                stop: None,
            });
        }
    }
    let sampling = stage.options.sampling();
    for turn in 1..=stage.task.max_turns() {
        let active: Vec<usize> = (0..playing.len()).filter(|&i| playing[i].stop.is_none()).collect();
        if active.is_empty() {
            break;
        }
        // In the first turn the members of a group ask the same thing: one prompt, many seeds.
        let together = if turn == 1 { group_size } else { 1 };
        let seeds: Vec<u64> = active
            .iter()
            .map(|&i| seed_of(seed, step, playing[i].group, playing[i].member as u64, turn as u64))
            .collect();
        let prompts: Vec<Prompt> = active
            .chunks(together)
            .zip(seeds.chunks(together))
            .map(|(members, seeds)| Prompt { session: members[0] as u64, stream: &playing[members[0]].stream, seeds })
            .collect();
        let completions = sampler.sample(&prompts, &sampling)?;
        drop(prompts);
        // A completion too few would hand every later one to the wrong conversation.
        let asked = active.chunks(together).map(<[usize]>::len);
        ensure!(
            completions.iter().map(Vec::len).eq(asked),
            "the engine answered {} prompts with {} completions, expected {} and {}",
            completions.len(),
            completions.iter().map(Vec::len).sum::<usize>(),
            active.len().div_ceil(together),
            active.len()
        );
        for (completion, &i) in completions.into_iter().flatten().zip(&active) {
            let seed = seed_of(seed ^ 0x7461_736b, step, playing[i].group, playing[i].member as u64, turn as u64);
            advance(stage, &mut playing[i], completion.ids, completion.logprobs, completion.finish, turn, seed)?;
        }
    }
    sampler.end_step();
    playing.into_iter().map(|p| finish(stage, p, step)).collect()
}

fn open<'a>(stage: &Stage, sample: &'a Sample, group: u64) -> Result<Playing<'a>> {
    let mut sizes = Vec::with_capacity(sample.images.len());
    let mut paths: Vec<Arc<Path>> = Vec::with_capacity(sample.images.len());
    for path in &sample.images {
        sizes.push(stage.frontend.pictures.size(path).with_context(|| sample.named())?);
        paths.push(Arc::from(path.as_path()));
    }
    let named = || {
        format!(
            "{} ({})",
            sample.named(),
            sample.images.first().map_or("no picture".into(), |p| p.display().to_string())
        )
    };
    let opening = stage.task.open(sample, &sizes).with_context(named)?;
    let mut messages = Vec::new();
    let mut turns = Vec::new();
    if let Some(system) = opening.system {
        turns.push(Turn::new("system", system.clone(), 0));
        messages.push(Message::system(&system));
    }
    let mut playing = Playing { sample, sizes, paths, group, member: 0, stream: Stream::default(), turns, stop: None };
    messages.push(Message::user(opening.user.parts.clone()));
    let grids = grids(stage, &opening.user.views)?;
    let tokens = tokens(stage, &grids);
    let encoded = stage.frontend.chat.encode(&messages, true, &tokens).with_context(|| sample.named())?;
    append(stage, &mut playing, &encoded.ids, opening.user, grids)?;
    ensure!(
        playing.stream.len() + stage.options.max_new_tokens <= stage.options.max_tokens,
        "{}: the prompt takes {} tokens and the answer may take {}, more than max_tokens = {}; \
         raise rollout.max_tokens or lower the pixel budget",
        sample.named(),
        playing.stream.len(),
        stage.options.max_new_tokens,
        stage.options.max_tokens
    );
    Ok(playing)
}

fn tokens(stage: &Stage, grids: &[Grid]) -> Vec<usize> {
    grids.iter().map(|g| g.tokens(stage.frontend.processor.merge)).collect()
}

fn grids(stage: &Stage, views: &[View]) -> Result<Vec<Grid>> {
    Ok(views.iter().map(|view| stage.frontend.processor.grid(view.size)).collect())
}

/// Appends a message of the task to the stream and to the readable turns.
fn append(stage: &Stage, playing: &mut Playing, ids: &[u32], shown: Shown, grids: Vec<Grid>) -> Result<()> {
    let images =
        shown.views.iter().zip(&grids).map(|(view, grid)| (playing.paths[view.image].clone(), *view, *grid)).collect();
    playing.stream.push_context(ids, images, stage.frontend.chat.special.image_pad, stage.frontend.processor.merge)?;
    let text = shown.parts.iter().map(|p| p.readable()).collect::<String>();
    playing.turns.push(Turn::new("user", text, ids.len()));
    Ok(())
}

fn advance(
    stage: &Stage,
    playing: &mut Playing,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    finish: Finish,
    turn: usize,
    seed: u64,
) -> Result<()> {
    playing.stream.push_sampled(&ids, &logprobs);
    // Box tokens are text to a reader of corners; for everybody else special tokens are not words.
    let text = stage.frontend.chat.decode(&ids, stage.frontend.convention.is_json())?;
    let action = Action::read(&text, &Reader::of(stage.frontend.convention));
    let views: Vec<View> = playing.stream.images.iter().map(|p| p.view).collect();
    let context = Context {
        sample: playing.sample,
        sizes: &playing.sizes,
        views: &views,
        convention: stage.frontend.convention,
        turn,
        seed,
        said: &text,
    };
    let reply = stage.task.reply(&context, &action)?;
    let (Reply::Close(_, reading) | Reply::Show(_, reading)) = &reply;
    let Reading { outcome, bbox, boxes } = reading.clone();
    playing.turns.push(Turn {
        outcome,
        bbox,
        boxes,
        pieces: stage.frontend.chat.pieces(&ids)?,
        ..Turn::new("assistant", text, ids.len())
    });
    match reply {
        Reply::Close(stop, _) => {
            playing.stop = Some(if finish == Finish::Length { Stop::Truncated } else { stop });
        }
        Reply::Show(shown, _) => {
            if finish == Finish::Length {
                playing.stop = Some(Stop::Truncated);
                return Ok(());
            }
            let grids = grids(stage, &shown.views)?;
            let message = Message::user(shown.parts.clone());
            let before = playing.stream.images.len();
            let ids =
                stage.frontend.chat.continuation(before, &message, &tokens(stage, &grids), ids.last().copied())?.ids;
            let needed = playing.stream.len() + ids.len() + stage.options.max_new_tokens;
            if needed > stage.options.max_tokens {
                playing.stop = Some(Stop::OverLong);
                return Ok(());
            }
            append(stage, playing, &ids, shown, grids)?;
        }
    }
    Ok(())
}

fn finish(stage: &Stage, playing: Playing, step: u64) -> Result<Episode> {
    let sample = playing.sample;
    let mut episode = Episode {
        id: sample.id.clone(),
        step,
        group: playing.group,
        member: playing.member,
        task: sample.task.clone().unwrap_or_else(|| stage.task.name().to_owned()),
        question: sample.question.clone(),
        answer: sample.answer.clone(),
        images: sample.images.clone(),
        targets: sample.targets.clone(),
        split: sample.split.clone(),
        stream: playing.stream,
        turns: playing.turns,
        stop: playing.stop.unwrap_or(Stop::TurnLimit),
        parts: Parts::default(),
        reward: 0.0,
        advantage: None,
        update: None,
    };
    episode.parts = stage.task.judge(sample, &episode);
    episode.reward = stage.task.reward(&episode.parts);
    Ok(episode)
}
