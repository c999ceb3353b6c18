//! Attention whose products are of bf16 numbers (`pairs`): queries, keys, values, probabilities and their derivatives are rounded, or written in three
//! parts; sums and the softmax are f32.
//!
//! For runs that are read as a whole, by queries that see all of it: the windows and pictures of a vision tower; in three parts only where they are
//! long enough ([`worth`]). Hides how their rows lie in pairs, along a head's numbers for scores and along keys (or queries) where these are summed over.

use super::{Dims, Span};
use crate::matrix::Matrix;
use crate::pairs::{self, Parts, Sides, WIDTH};
use std::ops::Range;

/// # Panics
/// Spans that are not of that kind, which is a programming error.
pub(super) fn check(spans: &[Span]) {
    let whole = spans.iter().all(|span| span.shared.is_empty() && !span.causal);
    let apart = spans.windows(2).all(|pair| pair[0].own.end <= pair[1].own.start);
    assert!(whole && apart, "attention in bf16 is for spans that share nothing and hide nothing, one behind the other");
}

/// Keys whose weights are written in words at a time, a third of them where each takes three words: twice as many words stay in the first cache.
const WEIGHTS: usize = 192;
/// Keys from which on three parts are worth the splitting.
const MANY_KEYS: usize = 256;

/// Whether so many keys that are read together are to be written in words: what is split, and not rounded, may as well stay in f32.
pub(super) fn worth(parts: Parts, keys: usize) -> bool {
    parts == Parts::One || keys >= MANY_KEYS
}

/// Keys and values of a run for one head.
pub(super) struct Run {
    /// Panels of `WIDTH` keys, `[panels, words of K, WIDTH]`.
    keys: Vec<u32>,
    /// Panels of `WIDTH` numbers, `[K / WIDTH, words of the keys, WIDTH]`.
    values: Vec<u32>,
    count: usize,
    parts: Parts,
}

impl Run {
    pub(super) fn new(k: &[f32], v: &[f32], run: &Range<usize>, head: usize, dims: Dims, parts: Parts) -> Run {
        let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
        let count = run.len();
        Run {
            keys: of_keys(k, run, head, dims, parts),
            values: across(&v[run.start * stride + head * kd..], stride, count, kd, parts),
            count,
            parts,
        }
    }

    /// Scores of some rows and the keys from `first` on, which begins a panel.
    pub(super) fn scores(&self, out: &mut [f32], stride: usize, q: Rows, first: usize, keys: usize, rows: usize) {
        let step = q.words() * WIDTH;
        let panels = &self.keys[first / WIDTH * step..];
        pairs::multiply(out, stride, q.with(panels, step), rows, keys.next_multiple_of(WIDTH), false);
    }

    /// Adds the values of so many keys from `first` on, which begins a panel, as the rows of `weights` (one every `stride` numbers) weigh them.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn add_values(
        &self,
        o: &mut [f32],
        scratch: &mut Vec<u32>,
        (weights, stride): (&[f32], usize),
        (first, keys): (usize, usize),
        rows: usize,
        kd: usize,
    ) {
        let at_once = WEIGHTS / self.parts.count();
        let apart = pairs::apart(self.parts.words(at_once));
        scratch.resize(2 * rows * apart, 0);
        let (mut now, mut next) = scratch.split_at_mut(rows * apart);
        let count = |from: usize| at_once.min(keys - from);
        let write =
            |to: &mut [u32], from| pairs::rows_into(to, apart, &weights[from..], stride, count(from), self.parts);
        write(now, 0);
        for from in (0..keys).step_by(at_once) {
            // Tiles that read what was written a moment ago would wait for it.
            if from + at_once < keys {
                write(next, from + at_once);
            }
            let panels = &self.values[self.parts.whole((first + from) / 2) * WIDTH..];
            let left = Rows { data: now, stride: apart, pairs: pairs::of(count(from)), parts: self.parts };
            pairs::multiply(o, kd, left.with(panels, self.parts.words(self.count) * WIDTH), rows, kd, true);
            std::mem::swap(&mut now, &mut next);
        }
    }
}

/// Panels of `WIDTH` rows of a run, one head of them: `[panels, words of K, WIDTH]`.
fn of_keys(k: &[f32], run: &Range<usize>, head: usize, dims: Dims, parts: Parts) -> Vec<u32> {
    let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
    let step = parts.words(kd) * WIDTH;
    let mut panels = vec![0; run.len().div_ceil(WIDTH) * step];
    for (panel, row) in panels.chunks_exact_mut(step).zip(run.clone().step_by(WIDTH)) {
        Matrix::from(k).pair_into(panel, row * stride + head * kd, stride, kd, WIDTH.min(run.end - row), parts);
    }
    panels
}

/// Rows in pairs of two, as panels of `WIDTH` numbers: `[K / WIDTH, words of the rows, WIDTH]`.
fn across(x: &[f32], stride: usize, rows: usize, kd: usize, parts: Parts) -> Vec<u32> {
    let size = parts.words(rows) * WIDTH;
    let mut panels = vec![0; kd.div_ceil(WIDTH) * size];
    for (panel, c) in panels.chunks_exact_mut(size).zip((0..kd).step_by(WIDTH)) {
        pairs::columns_into(panel, WIDTH, &x[c..], stride, rows, WIDTH.min(kd - c), parts);
    }
    panels
}

/// Rows of words, the left side of a product.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [u32],
    stride: usize,
    pairs: usize,
    parts: Parts,
}

impl<'a> Rows<'a> {
    /// `rows` rows of `m` numbers each, in place of what `to` held.
    pub(super) fn of(
        to: &'a mut Vec<u32>,
        x: &[f32],
        x_stride: usize,
        rows: usize,
        m: usize,
        parts: Parts,
    ) -> Rows<'a> {
        let words = parts.words(m);
        let stride = pairs::apart(words);
        to.resize(rows * stride, 0);
        pairs::rows_into(to, stride, x, x_stride, m, parts);
        Rows { data: to, stride, pairs: pairs::of(m), parts }
    }

    fn words(self) -> usize {
        self.pairs * self.parts.count()
    }

    pub(super) fn from(self, row: usize) -> Rows<'a> {
        Rows { data: &self.data[row * self.stride..], ..self }
    }

    fn with(self, panels: &'a [u32], panel: usize) -> Sides<'a> {
        let Rows { data: left, stride: left_stride, pairs, parts } = self;
        Sides { left, left_stride, panels, panel, pairs, parts }
    }
}

/// What the backward of a stretch of keys reads of it, for one head.
pub(super) struct Stretch {
    keys: Vec<u32>,
    values: Vec<u32>,
    /// Keys in pairs of two, for each tile of `WIDTH` of them `[K / WIDTH, words of WIDTH, WIDTH]`.
    keys_across: Vec<u32>,
    /// What its keys and values gain, tile by tile turned round, `[tiles, K, WIDTH]`: so the probabilities, which are made row by row, are the right side of
    /// the products and need not be turned.
    dk: Vec<f32>,
    dv: Vec<f32>,
    parts: Parts,
}

impl Stretch {
    pub(super) fn new(k: &[f32], v: &[f32], run: &Range<usize>, head: usize, dims: Dims, parts: Parts) -> Stretch {
        let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
        let tile = |row: usize| across(&k[row * stride + head * kd..], stride, WIDTH.min(run.end - row), kd, parts);
        Stretch {
            keys: of_keys(k, run, head, dims, parts),
            values: of_keys(v, run, head, dims, parts),
            keys_across: run.clone().step_by(WIDTH).flat_map(tile).collect(),
            dk: vec![0.0; run.len().div_ceil(WIDTH) * kd * WIDTH],
            dv: vec![0.0; run.len().div_ceil(WIDTH) * kd * WIDTH],
            parts,
        }
    }
}

impl Stretch {
    /// Writes what the keys and values have gained, `[keys, K]` each.
    pub(super) fn write(&self, dk: &mut [f32], dv: &mut [f32], kd: usize) {
        for (out, tiles) in [(dk, &self.dk), (dv, &self.dv)] {
            for (out, tile) in out.chunks_mut(WIDTH * kd).zip(tiles.chunks_exact(kd * WIDTH)) {
                for (key, row) in out.chunks_exact_mut(kd).enumerate() {
                    row.iter_mut().zip(tile.chunks_exact(WIDTH)).for_each(|(x, column)| *x = column[key]);
                }
            }
        }
    }
}

/// What it reads of some rows of a task, kept for the next.
#[derive(Default)]
pub(super) struct Scratch {
    q: Vec<u32>,
    d_o: Vec<u32>,
    ds: Vec<u32>,
    /// q and d_o turned round, `[K, words of the rows]`.
    turned: [Vec<u32>; 2],
    /// A tile, two rows a word: `[words of the rows, WIDTH]`.
    tile: Vec<u32>,
}

/// Adds what some rows of q and d_o `[rows, K]` and the keys of a stretch give to dq `[rows, K]` and to the stretch. `probabilities` makes p and ds of
/// scores and of d_o·vᵀ, `[rows, WIDTH]` for the keys from a number of the stretch on. `scaled` is q times what the forward multiplies it with: only
/// rounded as it was there does it give the scores that the log-sum-exp is of.
pub(super) fn add_rows(
    dq: &mut [f32],
    [q, scaled, d_o]: [&[f32]; 3],
    [p, ds]: [&mut Vec<f32>; 2],
    stretch: &mut Stretch,
    scratch: &mut Scratch,
    kd: usize,
    probabilities: impl Fn(&mut [f32], &mut [f32], usize),
) {
    let rows = q.len() / kd;
    let parts = stretch.parts;
    let (words, pairs) = (parts.words(rows), pairs::of(rows));
    let apart = pairs::apart(words);
    let Scratch { q: q_pairs, d_o: d_o_pairs, ds: ds_pairs, turned, tile } = scratch;
    for (turned, x) in turned.iter_mut().zip([q, d_o]) {
        turned.resize(kd * apart, 0);
        for (panel, c) in across(x, kd, rows, kd, parts).chunks_exact(words * WIDTH).zip((0..kd).step_by(WIDTH)) {
            pairs::transpose(&mut turned[c * apart..], apart, panel, WIDTH, words, WIDTH.min(kd - c));
        }
    }
    let q = Rows::of(q_pairs, scaled, kd, rows, kd, parts);
    let d_o = Rows::of(d_o_pairs, d_o, kd, rows, kd, parts);
    p.resize(rows * WIDTH, 0.0);
    ds.resize(rows * WIDTH, 0.0);
    tile.clear();
    tile.resize(words * WIDTH, 0);
    let step = q.words() * WIDTH;
    let tile_across = kd.div_ceil(WIDTH) * parts.words(WIDTH) * WIDTH;
    let gains = stretch.dk.chunks_exact_mut(kd * WIDTH).zip(stretch.dv.chunks_exact_mut(kd * WIDTH));
    for (i, (dk, dv)) in gains.enumerate() {
        pairs::multiply(p, WIDTH, q.with(&stretch.keys[i * step..], step), rows, WIDTH, false);
        pairs::multiply(ds, WIDTH, d_o.with(&stretch.values[i * step..], step), rows, WIDTH, false);
        // Of the last tile the derivatives of keys that are not there are 0.
        probabilities(p, ds, i * WIDTH);
        for ((sum, weights), left) in [(dk, &*ds), (dv, &*p)].into_iter().zip(&*turned) {
            pairs::columns_into(tile, WIDTH, weights, WIDTH, rows, WIDTH, parts);
            let sides = Sides { left, left_stride: apart, panels: &*tile, panel: words * WIDTH, pairs, parts };
            pairs::multiply(sum, WIDTH, sides, kd, WIDTH, true);
        }
        let ds = Rows::of(ds_pairs, ds, WIDTH, rows, WIDTH, parts);
        let keys = &stretch.keys_across[i * tile_across..];
        pairs::multiply(dq, kd, ds.with(keys, parts.words(WIDTH) * WIDTH), rows, kd, true);
    }
}
