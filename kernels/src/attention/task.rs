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
/// Rows up to which values are not worth copying.
const FEW_ROWS: usize = 32;

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

/// Keys and values that several tasks read, laid out for them once: shared runs, and own runs that are long enough to be read by
/// more than one block of queries.
pub(super) struct Prepared {
    /// A run and, for each head of keys, its keys and values.
    runs: Vec<(Range<usize>, Vec<Run>)>,
}

/// A run of keys for one head.
pub(super) struct Run {
    /// Panels, as [`transposed`] makes them.
    pub(super) keys: Vec<f32>,
    /// `[keys, K]`; empty where so few rows read them that copying costs more than reading them where they are.
    pub(super) values: Vec<f32>,
}

impl Prepared {
    pub(super) fn new(k: &[f32], v: &[f32], spans: &[Span], dims: Dims) -> Self {
        // Each run that some span reads: whether it is to be laid out, and whether many rows read it.
        let mut read: Vec<(&Range<usize>, bool, bool)> = Vec::with_capacity(2 * spans.len());
        for span in spans {
            let rows = span.queries.len() * dims.group();
            read.push((&span.shared, true, rows > FEW_ROWS));
            read.push((&span.own, rows > ROWS, rows > FEW_ROWS));
        }
        read.retain(|(run, ..)| !run.is_empty());
        read.sort_by_key(|(run, ..)| (run.start, run.end));
        let mut distinct: Vec<(&Range<usize>, bool, bool)> = Vec::new();
        for (run, wanted, many) in read {
            match distinct.last_mut() {
                Some(last) if last.0 == run => (last.1, last.2) = (last.1 || wanted, last.2 || many),
                _ => distinct.push((run, wanted, many)),
            }
        }
        distinct.retain(|(_, wanted, _)| *wanted);
        let of_run = |&(run, _, many): &(&Range<usize>, bool, bool)| {
            let head = |head: usize| Run {
                keys: transposed(k, run.clone(), head, dims),
                values: if many { head_rows(v, run, head, dims) } else { Vec::new() },
            };
            (run.clone(), (0..dims.kv_heads).map(head).collect())
        };
        let runs = if distinct.len() < 2 {
            distinct.iter().map(of_run).collect()
        } else {
            distinct.par_iter().map(of_run).collect()
        };
        Self { runs }
    }

    /// The run of keys as the task's head reads it, if it was prepared.
    pub(super) fn run(&self, run: &Range<usize>, task: &Task) -> Option<&Run> {
        let at = self.runs.binary_search_by_key(&(run.start, run.end), |(r, _)| (r.start, r.end)).ok()?;
        Some(&self.runs[at].1[task.kv_head])
    }
}

/// The rows `run` of a `[T, Hkv, K]` buffer, one head of them side by side: `[run, K]`.
pub(super) fn head_rows(x: &[f32], run: &Range<usize>, head: usize, dims: Dims) -> Vec<f32> {
    let mut rows = Vec::with_capacity(run.len() * dims.k);
    for row in run.clone() {
        rows.extend_from_slice(&x[(row * dims.kv_heads + head) * dims.k..][..dims.k]);
    }
    rows
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
