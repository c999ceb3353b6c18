//! Episodes -> packed tensors. A group becomes one tree: the prompt once, its members behind it, each seeing the prompt and
//! itself. Nothing is padded. Every position is the member's own M-RoPE position in its whole conversation, so the result
//! (log-probs bit for bit, gradients up to the order of sums) is that of the plain computation.
//!
//! The shift by one happens here and nowhere else: the log-prob of the token in row r is read from the row before it.

use std::ops::Range;

use anyhow::{Result, ensure};
use foveate_kernels::attention::Span;

use crate::engine::{Scores, Weights};
use crate::episode::{Placed, Stream};
use crate::model::{Config, Packed, PackedImage, Target, positions};

/// A packed run of groups, and where each stream's numbers stand in it.
pub struct Batch {
    pub packed: Packed,
    /// One entry per image of `packed`: where its pixels come from.
    pub images: Vec<Placed>,
    /// For each group, for each member: its entries of `packed.targets`.
    pub targets: Vec<Vec<Range<usize>>>,
}

impl Batch {
    /// Numbers of the packed targets, by group and member.
    pub fn split(&self, logprobs: &[f32], entropies: &[f32]) -> Vec<Vec<Scores>> {
        let scores = |r: &Range<usize>| Scores {
            logprobs: logprobs[r.clone()].to_vec(),
            entropies: entropies[r.clone()].to_vec(),
        };
        self.targets.iter().map(|group| group.iter().map(scores).collect()).collect()
    }

    /// Asks for the weight of each target, group by group; `first` is the number of the first. The weights of entropies are empty where
    /// none are given.
    ///
    /// # Errors
    /// Those of `weigh`, and another number of weights than of targets.
    pub fn weigh(
        &self,
        logprobs: &[f32],
        entropies: &[f32],
        first: usize,
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut of_logprobs = Vec::with_capacity(logprobs.len());
        let mut of_entropies = Vec::new();
        for (g, group) in self.split(logprobs, entropies).iter().enumerate() {
            for (m, scores) in group.iter().enumerate() {
                let w = weigh(first + g, m, scores)?;
                ensure!(
                    w.logprobs.len() == scores.logprobs.len(),
                    "{} weights for {} trained tokens",
                    w.logprobs.len(),
                    scores.logprobs.len()
                );
                of_logprobs.extend_from_slice(&w.logprobs);
                of_entropies.extend(w.entropies.into_iter().flatten());
            }
        }
        let all = of_entropies.len() == of_logprobs.len();
        Ok((of_logprobs, if all { of_entropies } else { Vec::new() }))
    }
}

/// How many rows of a group are the same for all of its members and sampled by none.
fn shared_rows(streams: &[&Stream]) -> usize {
    let Some((first, rest)) = streams.split_first() else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let mut shared = streams.iter().map(|s| s.prompt_len()).min().unwrap_or(0);
    for other in rest {
        let same = first.ids[..shared].iter().zip(&other.ids[..shared]).take_while(|(a, b)| a == b).count();
        shared = shared.min(same);
        // The same placeholder ids may stand for different pictures: the images must agree as well.
        let differs = first
            .images
            .iter()
            .zip(&other.images)
            .find(|(a, b)| a.first < shared && (a.path != b.path || a.view != b.view || a.first != b.first));
        if let Some((image, _)) = differs {
            shared = shared.min(image.first);
        }
    }
    shared
}

/// Rows that a group takes when packed.
pub fn rows(streams: &[&Stream]) -> usize {
    let shared = shared_rows(streams);
    shared + streams.iter().map(|s| s.len() - shared).sum::<usize>()
}

/// Packs groups of streams that share their prompts.
pub fn pack(config: &Config, groups: &[Vec<&Stream>]) -> Result<Batch> {
    let mut packed = Packed::default();
    let mut images = Vec::new();
    let mut targets = Vec::with_capacity(groups.len());
    for group in groups {
        let shared = shared_rows(group);
        let base = packed.ids.len();
        let mut of_group = Vec::with_capacity(group.len());
        for (member, stream) in group.iter().enumerate() {
            let positions = positions(&stream.ids, &stream.grids(), config)?.axes;
            // The first member brings the prompt along.
            let from = if member == 0 { 0 } else { shared };
            let start = packed.ids.len();
            packed.ids.extend_from_slice(&stream.ids[from..]);
            for (all, own) in packed.positions.iter_mut().zip(&positions) {
                all.extend_from_slice(&own[from..]);
            }
            let row = |r: usize| if r < shared { base + r } else { start + r - from };
            for image in &stream.images {
                if image.first >= from {
                    packed.images.push(PackedImage { first_row: row(image.first), grid: image.grid, features: None });
                    images.push(image.clone());
                }
            }
            if member == 0 && shared > 0 {
                packed.spans.push(Span {
                    queries: base..base + shared,
                    shared: 0..0,
                    own: base..base + shared,
                    causal: true,
                });
            }
            let own = row(shared)..packed.ids.len();
            if !own.is_empty() {
                packed.spans.push(Span { queries: own.clone(), shared: base..base + shared, own, causal: true });
            }
            let begin = packed.targets.len();
            for r in 1..stream.len() {
                if stream.sampled[r] {
                    packed.targets.push(Target { row: row(r - 1), token: stream.ids[r] });
                }
            }
            of_group.push(begin..packed.targets.len());
        }
        targets.push(of_group);
    }
    Ok(Batch { packed, images, targets })
}

/// Cuts groups into runs of at most `max_rows` rows, whole groups each; a larger group stands alone.
pub fn micro_batches(groups: &[Vec<&Stream>], max_rows: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut start = 0;
    let mut filled = 0;
    for (i, group) in groups.iter().enumerate() {
        let rows = rows(group);
        if i > start && filled + rows > max_rows {
            runs.push(start..i);
            start = i;
            filled = 0;
        }
        filled += rows;
    }
    if start < groups.len() {
        runs.push(start..groups.len());
    }
    runs
}
