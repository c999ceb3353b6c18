//! The pieces attention is cut into: a block of queries of one span for one head of keys, the rows it reads, and
//! keys laid out for the panel product.
//!
//! Hides where rows lie in the [T, H, K] buffers. How spans are cut must not depend on the number of threads.

use super::{Dims, Keys, Span, paired};
use crate::matrix::Compute;
use crate::pairs::Parts;
use crate::panel::{self, WIDTH};
use rayon::prelude::*;
use std::ops::Range;

/// Rows (query × head of the group) of a block.
const ROWS: usize = 128;
/// Rows up to which values are not worth copying.
const FEW_ROWS: usize = 32;
/// Numbers below which laying keys out takes less time than waking other threads.
const WORTH_THREADS: usize = 1 << 15;

/// Queries that one task of the forward takes, with all heads: a stretch of one span, or whole short spans that follow each other
/// and share their first keys.
pub(super) struct Block<'a> {
    pub(super) spans: &'a [Span],
    /// Queries of a single span, counted within it.
    stretch: Range<usize>,
}

impl Block<'_> {
    /// Rows of the query buffer.
    pub(super) fn queries(&self) -> Range<usize> {
        match self.spans {
            [span] => span.queries.start + self.stretch.start..span.queries.start + self.stretch.end,
            spans => spans[0].queries.start..spans[spans.len() - 1].queries.end,
        }
    }

    /// Each span with its queries, counted within it.
    pub(super) fn members(&self) -> impl Iterator<Item = (&Span, Range<usize>)> {
        let one = self.spans.len() == 1;
        let stretch = self.stretch.clone();
        self.spans.iter().map(move |s| (s, if one { stretch.clone() } else { 0..s.queries.len() }))
    }

    pub(super) fn work(&self, dims: Dims) -> usize {
        let keys = |(span, queries): (&Span, Range<usize>)| queries.len() * span.visible(queries.end - 1);
        self.members().map(keys).sum::<usize>() * dims.heads * dims.k * 2
    }
}

/// Of a block.
fn most_queries(dims: Dims) -> usize {
    (ROWS / dims.group()).max(1)
}

pub(super) fn blocks(spans: &[Span], dims: Dims) -> Vec<Block<'_>> {
    let most = most_queries(dims);
    let mut blocks = Vec::new();
    let mut at = 0;
    while at < spans.len() {
        let n = spans[at].queries.len();
        if n == 0 {
            at += 1;
            continue;
        }
        if n > most {
            blocks.extend(
                (0..n).step_by(most).map(|start| Block { spans: &spans[at..=at], stretch: start..n.min(start + most) }),
            );
            at += 1;
            continue;
        }
        let (mut end, mut queries) = (at + 1, n);
        while let Some(next) = spans.get(end).filter(|s| {
            let last = &spans[end - 1];
            let follows = s.queries.start == last.queries.end && !s.queries.is_empty();
            follows && !s.shared.is_empty() && s.shared == last.shared
        }) {
            queries += next.queries.len();
            if queries > most {
                break;
            }
            end += 1;
        }
        blocks.push(Block { spans: &spans[at..end], stretch: 0..n });
        at = end;
    }
    blocks
}

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

    /// Where the rows of the block start in a [Tq, H, K] buffer, one start per query; each holds the whole group.
    pub(super) fn starts(&self, dims: Dims) -> impl Iterator<Item = usize> {
        let first = self.span.queries.start + self.block.start;
        let kv_head = self.kv_head;
        (0..self.block.len()).map(move |i| ((first + i) * dims.heads + kv_head * dims.group()) * dims.k)
    }

    /// Rows of the query buffer.
    pub(super) fn queries(&self) -> Range<usize> {
        self.span.queries.start + self.block.start..self.span.queries.start + self.block.end
    }

    /// Query × head of the group.
    pub(super) fn rows(&self, dims: Dims) -> usize {
        self.block.len() * dims.group()
    }
}

/// Every block of queries, for each head of keys in turn.
pub(super) fn tasks(spans: &[Span], dims: Dims) -> Vec<Task<'_>> {
    let step = most_queries(dims);
    let mut tasks = Vec::new();
    for span in spans {
        let n = span.queries.len();
        for start in (0..n).step_by(step) {
            let block = start..n.min(start + step);
            tasks.extend((0..dims.kv_heads).map(|kv_head| Task { span, kv_head, block: block.clone() }));
        }
    }
    tasks
}

/// Keys and values that several tasks read, laid out for them once: shared runs, and own runs that are long enough to be read by
/// more than one block of queries. Keys that are panels already stay where they are, and values are copied where many rows read them.
pub(super) struct Prepared {
    /// Ascending.
    runs: Vec<Range<usize>>,
    /// Keys and values of each run for each head of keys, `[runs, Hkv]`.
    heads: Vec<Run>,
    kv_heads: usize,
    pub(super) parts: Option<Parts>,
}

/// A run of keys for one head.
pub(super) struct Run {
    /// Panels, as [`transposed`] makes them; empty where they are panels already.
    pub(super) keys: Vec<f32>,
    /// Panels `[K / WIDTH, keys, WIDTH]`; empty where so few rows read them that copying costs more than reading them where they are.
    pub(super) values: Vec<f32>,
    /// Both in words, in place of the others, where products are of bf16 numbers.
    pub(super) paired: Option<paired::Run>,
}

impl Prepared {
    pub(super) fn new(k: Keys, v: &[f32], spans: &[Span], dims: Dims, compute: Compute) -> Self {
        // Each run that some span reads: whether it is to be laid out, and whether many rows read it.
        let mut read: Vec<(&Range<usize>, bool, bool)> = Vec::with_capacity(2 * spans.len());
        let parts = compute.parts();
        for span in spans {
            let rows = span.queries.len() * dims.group();
            let many = rows > FEW_ROWS;
            let (shared, own) = if parts.is_some_and(|parts| paired::worth(parts, span.own.len())) {
                (true, true)
            } else if matches!(k, Keys::Rows(_)) {
                (true, rows > ROWS)
            } else {
                (many, many)
            };
            read.push((&span.shared, shared, many));
            read.push((&span.own, own, many));
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
        let of_head = |(run, _, many): &(&Range<usize>, bool, bool), head: usize| {
            let mut keys = Vec::new();
            if let (Keys::Rows(k), Some(parts)) = (k, parts.filter(|parts| paired::worth(*parts, run.len()))) {
                let paired = Some(paired::Run::new(k, v, run, head, dims, parts));
                return Run { keys, values: Vec::new(), paired };
            }
            if let Keys::Rows(k) = k {
                transposed(&mut keys, k, (*run).clone(), head, dims);
            }
            Run { keys, values: if *many { value_panels(v, run, head, dims) } else { Vec::new() }, paired: None }
        };
        let numbers: usize = distinct.iter().map(|(run, ..)| run.len() * dims.kv_heads * dims.k).sum();
        let each = 0..distinct.len() * dims.kv_heads;
        let one = |i: usize| of_head(&distinct[i / dims.kv_heads], i % dims.kv_heads);
        let heads: Vec<Run> =
            if numbers < WORTH_THREADS { each.map(one).collect() } else { each.into_par_iter().map(one).collect() };
        Self {
            runs: distinct.into_iter().map(|(run, ..)| run.clone()).collect(),
            heads,
            kv_heads: dims.kv_heads,
            parts,
        }
    }

    /// The run of keys as one head reads it, if it was prepared.
    pub(super) fn run(&self, run: &Range<usize>, head: usize) -> Option<&Run> {
        let at = self.runs.binary_search_by_key(&(run.start, run.end), |r| (r.start, r.end)).ok()?;
        Some(&self.heads[at * self.kv_heads + head])
    }
}

/// The rows `run` of a `[T, Hkv, K]` buffer, one head of them as panels `[K / WIDTH, run, WIDTH]`.
fn value_panels(x: &[f32], run: &Range<usize>, head: usize, dims: Dims) -> Vec<f32> {
    let mut panels = vec![0.0; run.len() * dims.k.next_multiple_of(WIDTH)];
    for (panel, c) in panels.chunks_exact_mut(run.len() * WIDTH).zip((0..dims.k).step_by(WIDTH)) {
        let cols = WIDTH.min(dims.k - c);
        for (to, row) in panel.chunks_exact_mut(WIDTH).zip(run.clone()) {
            to[..cols].copy_from_slice(&x[(row * dims.kv_heads + head) * dims.k + c..][..cols]);
        }
    }
    panels
}

/// Writes a run of keys of one head as panels: [panels, K, WIDTH], zeros past the last key.
pub(super) fn transposed(panels: &mut Vec<f32>, k: &[f32], run: Range<usize>, head: usize, dims: Dims) {
    let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
    panels.clear();
    panels.resize(run.len().div_ceil(WIDTH) * WIDTH * kd, 0.0);
    for (panel, row) in panels.chunks_exact_mut(WIDTH * kd).zip(run.clone().step_by(WIDTH)) {
        panel::transpose_into(panel, &k[row * stride + head * kd..], stride, kd, WIDTH.min(run.end - row));
    }
}
