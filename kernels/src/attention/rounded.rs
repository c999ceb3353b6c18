//! Attention whose products are computed in bf16 (`pairs`): queries, keys, values, probabilities and their derivatives are rounded, sums and the
//! softmax are f32.
//!
//! For runs that are read as a whole, by queries that see all of it: the windows and pictures of a vision tower. Hides how their rows lie in pairs, along a
//! head's numbers for scores and along keys (or queries) where these are summed over.

use super::{Dims, Span};
use crate::matrix::Matrix;
use crate::pairs::{self, Sides, WIDTH};
use std::ops::Range;

/// # Panics
/// Spans that are not of that kind, which is a programming error.
pub(super) fn check(spans: &[Span]) {
    let whole = spans.iter().all(|span| span.shared.is_empty() && !span.causal);
    let apart = spans.windows(2).all(|pair| pair[0].own.end <= pair[1].own.start);
    assert!(whole && apart, "attention in bf16 is for spans that share nothing and hide nothing, one behind the other");
}

/// Keys and values of a run for one head.
#[derive(Default)]
pub(super) struct Run {
    /// Panels of `WIDTH` keys, `[panels, K / 2, WIDTH]`.
    keys: Vec<u32>,
    /// Panels of `WIDTH` numbers, `[K / WIDTH, keys / 2, WIDTH]`.
    values: Vec<u32>,
    count: usize,
}

impl Run {
    pub(super) fn new(k: &[f32], v: &[f32], run: &Range<usize>, head: usize, dims: Dims) -> Run {
        let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
        let count = run.len();
        Run {
            keys: of_keys(k, run, head, dims),
            values: across(&v[run.start * stride + head * kd..], stride, count, kd),
            count,
        }
    }

    /// Scores of some rows and the keys from `first` on, which begins a panel.
    pub(super) fn scores(&self, out: &mut [f32], stride: usize, q: Rows, first: usize, keys: usize, rows: usize) {
        let step = q.pairs * WIDTH;
        let panels = &self.keys[first / WIDTH * step..];
        pairs::multiply(out, stride, q.with(panels, step), rows, keys.next_multiple_of(WIDTH), false);
    }

    /// Adds the values of the keys from `first` on, which begins a panel, as the rows of `weights` weigh them.
    pub(super) fn add_values(&self, o: &mut [f32], weights: Rows, first: usize, rows: usize, kd: usize) {
        let panels = &self.values[first / 2 * WIDTH..];
        pairs::multiply(o, kd, weights.with(panels, pairs::of(self.count) * WIDTH), rows, kd, true);
    }
}

/// Panels of `WIDTH` rows of a run, one head of them: `[panels, K / 2, WIDTH]`.
fn of_keys(k: &[f32], run: &Range<usize>, head: usize, dims: Dims) -> Vec<u32> {
    let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
    let step = pairs::of(kd) * WIDTH;
    let mut panels = vec![0; run.len().div_ceil(WIDTH) * step];
    for (panel, row) in panels.chunks_exact_mut(step).zip(run.clone().step_by(WIDTH)) {
        Matrix::from(k).pair_into(panel, row * stride + head * kd, stride, kd, WIDTH.min(run.end - row));
    }
    panels
}

/// Rows in pairs of two, as panels of `WIDTH` numbers: `[K / WIDTH, rows / 2, WIDTH]`.
fn across(x: &[f32], stride: usize, rows: usize, kd: usize) -> Vec<u32> {
    let size = pairs::of(rows) * WIDTH;
    let mut panels = vec![0; kd.div_ceil(WIDTH) * size];
    for (panel, c) in panels.chunks_exact_mut(size).zip((0..kd).step_by(WIDTH)) {
        pairs::columns_into(panel, WIDTH, &x[c..], stride, rows, WIDTH.min(kd - c));
    }
    panels
}

/// Rows of pairs, the left side of a product.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [u32],
    stride: usize,
    pairs: usize,
}

impl<'a> Rows<'a> {
    /// `rows` rows of `m` numbers each, in place of what `to` held.
    pub(super) fn of(to: &'a mut Vec<u32>, x: &[f32], x_stride: usize, rows: usize, m: usize) -> Rows<'a> {
        let pairs = pairs::of(m);
        let stride = pairs::apart(pairs);
        to.resize(rows * stride, 0);
        pairs::rows_into(to, stride, x, x_stride, m);
        Rows { data: to, stride, pairs }
    }

    pub(super) fn from(self, row: usize) -> Rows<'a> {
        Rows { data: &self.data[row * self.stride..], ..self }
    }

    fn with(self, panels: &'a [u32], panel: usize) -> Sides<'a> {
        Sides { left: self.data, left_stride: self.stride, panels, panel, pairs: self.pairs }
    }
}

/// What the backward of a stretch of keys reads of it, for one head.
#[derive(Default)]
pub(super) struct Stretch {
    keys: Vec<u32>,
    values: Vec<u32>,
    /// Keys in pairs of two, for each tile of `WIDTH` of them `[K / WIDTH, WIDTH / 2, WIDTH]`.
    keys_across: Vec<u32>,
}

impl Stretch {
    pub(super) fn new(k: &[f32], v: &[f32], run: &Range<usize>, head: usize, dims: Dims) -> Stretch {
        let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
        let tile = |row: usize| across(&k[row * stride + head * kd..], stride, WIDTH.min(run.end - row), kd);
        Stretch {
            keys: of_keys(k, run, head, dims),
            values: of_keys(v, run, head, dims),
            keys_across: run.clone().step_by(WIDTH).flat_map(tile).collect(),
        }
    }
}

/// What it reads of some rows of a task, kept for the next.
#[derive(Default)]
pub(super) struct Scratch {
    q: Vec<u32>,
    d_o: Vec<u32>,
    ds: Vec<u32>,
    /// A tile, two rows a word: `[rows / 2, WIDTH]`, and turned round.
    tile: Vec<u32>,
    turned: Vec<u32>,
}

/// Adds what some rows of q and d_o `[rows, K]` and the keys of a stretch give to dq `[rows, K]`, dk and dv `[keys, K]`. `probabilities` makes p and ds of
/// scores and of d_o·vᵀ, `[rows, WIDTH]` for the keys from a number of the stretch on. `scaled` is q times what the forward multiplies it with: only
/// rounded as it was there does it give the scores that the log-sum-exp is of.
#[allow(clippy::too_many_arguments)]
pub(super) fn add_rows(
    [dq, dk, dv]: [&mut [f32]; 3],
    [q, scaled, d_o]: [&[f32]; 3],
    [p, ds]: [&mut Vec<f32>; 2],
    stretch: &Stretch,
    scratch: &mut Scratch,
    kd: usize,
    probabilities: impl Fn(&mut [f32], &mut [f32], usize),
) {
    let (rows, keys) = (q.len() / kd, dk.len() / kd);
    let across = [across(d_o, kd, rows, kd), across(q, kd, rows, kd)];
    let Scratch { q: q_pairs, d_o: d_o_pairs, ds: ds_pairs, tile, turned } = scratch;
    let q = Rows::of(q_pairs, scaled, kd, rows, kd);
    let d_o = Rows::of(d_o_pairs, d_o, kd, rows, kd);
    p.resize(rows * WIDTH, 0.0);
    ds.resize(rows * WIDTH, 0.0);
    let step = q.pairs * WIDTH;
    let (halves, apart) = (pairs::of(rows), pairs::apart(pairs::of(rows)));
    tile.clear();
    tile.resize(halves * WIDTH, 0);
    turned.resize(WIDTH * apart, 0);
    let tile_across = kd.div_ceil(WIDTH) * pairs::of(WIDTH) * WIDTH;
    for (i, first) in (0..keys).step_by(WIDTH).enumerate() {
        let count = WIDTH.min(keys - first);
        pairs::multiply(p, WIDTH, q.with(&stretch.keys[i * step..], step), rows, WIDTH, false);
        pairs::multiply(ds, WIDTH, d_o.with(&stretch.values[i * step..], step), rows, WIDTH, false);
        probabilities(p, ds, first);
        for (sum, weights, right) in [(&mut *dv, &*p, &across[0]), (&mut *dk, &*ds, &across[1])] {
            pairs::columns_into(tile, WIDTH, weights, WIDTH, rows, WIDTH);
            pairs::transpose(turned, apart, tile, WIDTH, halves, WIDTH);
            let sides = Sides { left: turned, left_stride: apart, panels: right, panel: halves * WIDTH, pairs: halves };
            pairs::multiply(&mut sum[first * kd..], kd, sides, count, kd, true);
        }
        // Of the last tile the derivatives of keys that are not there are 0.
        let ds = Rows::of(ds_pairs, ds, WIDTH, rows, WIDTH);
        let keys = &stretch.keys_across[i * tile_across..];
        pairs::multiply(dq, kd, ds.with(keys, pairs::of(WIDTH) * WIDTH), rows, kd, true);
    }
}
