//! The token loop: some conversations and the cache that holds their keys and values.
//!
//! Lanes run beside each other, each on its own thread from the first token to the last: with models as small as a core's cache, threads
//! that share every product of every token mostly wait for each other. A conversation stays in its lane. What is said in one does not depend on the
//! others, because every kernel gives a row the same bits in any company.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use foveate_kernels::sample;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::chat::Chat;
use crate::engine::{Completion, Prompt, Sampling};
use crate::model::generate::{Cache, Extension, SequenceId};
use crate::model::{self, Vlm};

/// Rows of prompts and crops that are read in one call, over all lanes; a longer one is read alone.
pub const READ_AT_ONCE: usize = 2048;

/// Who speaks.
#[derive(Clone, Copy)]
pub struct Voice<'a> {
    pub model: &'a Vlm,
    pub chat: &'a Chat,
    /// Ids that cannot be sampled.
    pub banned: &'a [u32],
    pub sampling: &'a Sampling,
}

/// A conversation to be continued, and the features of each view that its cache does not hold yet.
pub struct Unread<'a> {
    pub prompt: &'a Prompt<'a>,
    pub features: Vec<Arc<Vec<f32>>>,
}

/// A conversation whose keys and values are still in the cache.
struct Kept {
    sequence: SequenceId,
    /// How many tokens of the stream it holds.
    rows: usize,
}

pub struct Lane {
    cache: Cache,
    kept: HashMap<u64, Kept>,
}

/// One continuation.
struct Speaker {
    prompt: usize,
    sequence: SequenceId,
    next_position: i32,
    rng: ChaCha8Rng,
    out: Completion,
    done: bool,
}

impl Lane {
    pub fn new(cache: Cache) -> Lane {
        Lane { cache, kept: HashMap::new() }
    }

    /// Tokens of a conversation that are in the cache, if it stands in this lane.
    pub fn rows_of(&self, session: u64) -> Option<usize> {
        self.kept.get(&session).map(|kept| kept.rows)
    }

    /// Continues conversations: what is unread first, `read_at_once` rows in a call, then token by token until all have stopped. One
    /// list a prompt. `heard` is told each token as soon as it is drawn, and its error ends it.
    pub fn speak(
        &mut self,
        voice: &Voice,
        unread: &[Unread],
        read_at_once: usize,
        heard: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<Vec<Vec<Completion>>> {
        let mut speakers = Vec::new();
        let mut rows = self.read(voice, unread, read_at_once, &mut speakers)?;
        let Voice { model, sampling, .. } = *voice;
        let v = model.config.text.vocab;
        let mut active: Vec<usize> = (0..speakers.len()).collect();
        for n in 1..=sampling.max_new_tokens {
            let mut logits = model.next_logits(&self.cache, &rows, voice.banned);
            let us: Vec<f64> = active.iter().map(|&s| speakers[s].rng.random::<f64>()).collect();
            let drawn: Vec<(u32, f32)> =
                logits.par_chunks_mut(v).zip(us).map(|(row, u)| draw(row, sampling, u)).collect();
            for (&s, &(id, logprob)) in active.iter().zip(&drawn) {
                speakers[s].done = speakers[s].out.hear(id, logprob, voice.chat, sampling)?;
                heard(id)?;
            }
            // The last token of a turn is not in the cache yet: it is read at the start of the next turn, if there is one.
            active.retain(|&s| !speakers[s].done);
            if n == sampling.max_new_tokens || active.is_empty() {
                break;
            }
            let extensions: Vec<Extension> = active
                .iter()
                .map(|&s| &speakers[s])
                .map(|speaker| Extension {
                    sequence: speaker.sequence,
                    ids: speaker.out.ids.last_chunk::<1>().map_or(&[][..], |last| last),
                    positions: [std::slice::from_ref(&speaker.next_position); 3],
                    features: &[],
                })
                .collect();
            rows = model.extend(&mut self.cache, &extensions)?;
            active.iter().for_each(|&s| speakers[s].next_position += 1);
        }
        let mut completions: Vec<Vec<Completion>> =
            unread.iter().map(|u| Vec::with_capacity(u.prompt.seeds.len())).collect();
        for speaker in speakers {
            let session = unread[speaker.prompt].prompt.session + completions[speaker.prompt].len() as u64;
            self.kept.insert(session, Kept { sequence: speaker.sequence, rows: self.cache.len(speaker.sequence) });
            completions[speaker.prompt].push(speaker.out);
        }
        Ok(completions)
    }

    /// Reads what each conversation has not read yet, makes its speakers, and gives the final hidden state each begins with.
    fn read(
        &mut self,
        voice: &Voice,
        unread: &[Unread],
        read_at_once: usize,
        speakers: &mut Vec<Speaker>,
    ) -> Result<Vec<f32>> {
        let Voice { model, sampling, .. } = *voice;
        let cache = &mut self.cache;
        let mut places = Vec::with_capacity(unread.len());
        for u in unread {
            let p = u.prompt;
            let own = if p.seeds.len() == 1 { sampling.max_new_tokens } else { 0 };
            let (from, sequence) = match self.kept.get(&p.session) {
                Some(kept) => (kept.rows, kept.sequence),
                None => (0, cache.add_sequence(None, p.stream.len() + own)?),
            };
            cache.make_room(sequence, p.stream.len() - from + own);
            let positions = model::positions(&p.stream.ids, &p.stream.grids(), &model.config)?;
            let features: Vec<f32> = u.features.iter().flat_map(|f| f.iter().copied()).collect();
            places.push((from, sequence, positions, features));
        }
        let extensions: Vec<Extension> = unread
            .iter()
            .zip(&places)
            .map(|(u, (from, sequence, positions, features))| Extension {
                sequence: *sequence,
                ids: &u.prompt.stream.ids[*from..],
                positions: positions.axes.each_ref().map(|a| &a[*from..]),
                features,
            })
            .collect();
        // A few rows do not fill the machine, and too many fill its memory.
        let d = model.config.text.hidden;
        let mut hidden = Vec::with_capacity(unread.len() * d);
        let mut rest = &extensions[..];
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |e: &&Extension| {
                rows += e.ids.len();
                rows <= read_at_once
            };
            let fit = rest.iter().take_while(fits).count().max(1);
            hidden.extend(model.extend(cache, &rest[..fit])?);
            rest = &rest[fit..];
        }
        let mut rows = Vec::new();
        for (i, (u, (_, sequence, positions, _))) in unread.iter().zip(&places).enumerate() {
            for &seed in u.prompt.seeds {
                let sequence = match u.prompt.seeds.len() {
                    1 => *sequence,
                    _ => cache.add_sequence(Some(*sequence), sampling.max_new_tokens)?,
                };
                rows.extend_from_slice(&hidden[i * d..(i + 1) * d]);
                speakers.push(Speaker {
                    prompt: i,
                    sequence,
                    next_position: positions.next,
                    rng: ChaCha8Rng::seed_from_u64(seed),
                    out: Completion::empty(),
                    done: false,
                });
            }
        }
        Ok(rows)
    }
}

/// A token and its log-prob by the logits of a row.
pub fn draw(row: &mut [f32], sampling: &Sampling, u: f64) -> (u32, f32) {
    if sampling.temperature <= 0.0 {
        return sample::greedy(row);
    }
    if let Some(k) = sampling.top_k {
        sample::top_k(row, k);
    }
    if let Some(p) = sampling.top_p {
        sample::top_p(row, sampling.temperature, f64::from(p));
    }
    sample::categorical(row, sampling.temperature, u)
}
