//! The pieces attention is cut into: a block of queries of one span for one head of keys, the rows it reads, and
//! keys laid out for the panel product.
//!
//! Hides where rows lie in the [T, H, K] buffers. How spans are cut must not depend on the number of threads.

use super::{Dims, Span};
use crate::panel::{self, WIDTH};
use rayon::prelude::*;
use std::ops::Range;

/// Rows (query × head of the group) that one task holds.
const ROWS: usize = 128;
/// A block of queries of one span, for one head of keys.
pub(super) struct Task<'a> {
    pub(super) span: &'a Span,
    pub(super) kv_head: usize,
    /// Queries, counted within the span.
    pub(super) block: Range<usize>,
}

impl Task<'_> {
    /// Keys that some query of the block sees.
    pub(super) fn keys(&self) -> usize {
        self.span.visible(self.block.end - 1)
    }

    /// Runs of rows in the key buffer, in order, for the first `keys` visible keys.
    pub(super) fn pieces(&self, keys: usize) -> [Range<usize>; 2] {
        let shared = keys.min(self.span.shared.len());
        let own = keys - shared;
        [self.span.shared.start..self.span.shared.start + shared, self.span.own.start..self.span.own.start + own]
    }

    /// Where the rows of the block start in a [Tq, H, K] buffer, one start per query; each holds the whole group.
    pub(super) fn starts(&self, dims: Dims) -> impl Iterator<Item = usize> {
        let first = self.span.queries.start + self.block.start;
        let kv_head = self.kv_head;
        (0..self.block.len()).map(move |i| ((first + i) * dims.heads + kv_head * dims.group()) * dims.k)
    }

    /// The block's rows side by side: [queries · group, K].
    pub(super) fn gather(&self, x: &[f32], dims: Dims) -> Vec<f32> {
        let width = dims.group() * dims.k;
        let mut rows = Vec::with_capacity(self.block.len() * width);
        for start in self.starts(dims) {
            rows.extend_from_slice(&x[start..start + width]);
        }
        rows
    }

    /// The visible keys (or values) of the task's head side by side: [keys, K].
    pub(super) fn gather_keys(&self, x: &[f32], dims: Dims) -> Vec<f32> {
        let mut rows = Vec::with_capacity(self.keys() * dims.k);
        for row in self.pieces(self.keys()).into_iter().flatten() {
            rows.extend_from_slice(&x[(row * dims.kv_heads + self.kv_head) * dims.k..][..dims.k]);
        }
        rows
    }

    pub(super) fn work(&self, dims: Dims) -> usize {
        self.block.len() * dims.group() * self.keys() * dims.k * 2
    }
}

pub(super) fn tasks(spans: &[Span], dims: Dims) -> Vec<Task<'_>> {
    let step = (ROWS / dims.group()).max(1);
    let mut tasks = Vec::new();
    for span in spans {
        let n = span.queries.len();
        for kv_head in 0..dims.kv_heads {
            for start in (0..n).step_by(step) {
                tasks.push(Task { span, kv_head, block: start..n.min(start + step) });
            }
        }
    }
    tasks
}

/// The keys of shared runs as panels, made once for all the spans that share them.
pub(super) struct Prompts {
    /// A run and, for each head of keys, its panels.
    runs: Vec<(Range<usize>, Vec<Vec<f32>>)>,
}

impl Prompts {
    pub(super) fn new(k: &[f32], spans: &[Span], dims: Dims) -> Self {
        let mut distinct: Vec<&Range<usize>> = spans.iter().map(|s| &s.shared).filter(|r| !r.is_empty()).collect();
        distinct.sort_by_key(|r| (r.start, r.end));
        distinct.dedup();
        let panels =
            |run: &Range<usize>| (0..dims.kv_heads).map(|head| transposed(k, run.clone(), head, dims)).collect();
        let runs = if distinct.len() < 2 {
            distinct.iter().map(|run| ((*run).clone(), panels(run))).collect()
        } else {
            distinct.par_iter().map(|run| ((*run).clone(), panels(run))).collect()
        };
        Self { runs }
    }

    pub(super) fn keys(&self, task: &Task) -> &[f32] {
        let shared = &task.span.shared;
        match self.runs.binary_search_by_key(&(shared.start, shared.end), |(r, _)| (r.start, r.end)) {
            Ok(at) => &self.runs[at].1[task.kv_head],
            Err(_) => &[],
        }
    }
}

/// A run of keys of one head as panels: [panels, K, WIDTH], zeros past the last key.
pub(super) fn transposed(k: &[f32], run: Range<usize>, head: usize, dims: Dims) -> Vec<f32> {
    let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
    let mut panels = vec![0.0f32; run.len().div_ceil(WIDTH) * WIDTH * kd];
    for (panel, row) in panels.chunks_exact_mut(WIDTH * kd).zip(run.clone().step_by(WIDTH)) {
        panel::transpose_into(panel, &k[row * stride + head * kd..], stride, kd, WIDTH.min(run.end - row));
    }
    panels
}
