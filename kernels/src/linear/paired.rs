//! The products of a linear layer in bf16, by one part of each number or by three: rows and panels of words, for `pairs`.

use super::{Outer, Panels, STRIPE, Weights, add_bias};
use crate::memory::Rows;
use crate::pairs::{self, Parts, Sides, WIDTH};
use crate::threads::each;
use rayon::prelude::*;
use std::cell::Cell;

/// Tokens that a weight's gradient sums in one run where they are paired: what a run reads stays in the second cache.
const PAIRED_RUN: usize = 512;
/// Inputs whose words of many rows stay in the second cache (1 MiB).
const INPUTS: usize = 768;
/// Bytes of words of x that stand at a time, unless a single run has more.
const AT_ONCE: usize = 8 << 20;
/// Inputs that a panel is written in three parts for at a time: these stay in the first cache (24 KiB).
const SPLIT: usize = 128;

/// Lays out panels of pairs of `m` inputs for `n` outputs; `lay` is given each with its first column and how many it has.
pub(super) fn lay_out(m: usize, n: usize, lay: impl Fn(&mut [u32], usize, usize) + Sync) -> Panels {
    let size = WIDTH * pairs::of(m);
    let mut panels = Rows::new(n.div_ceil(WIDTH) * size);
    let each = panels.chunks(size.max(1)).enumerate();
    each.for_each(|(p, panel)| lay(panel.clear(), p * WIDTH, WIDTH.min(n - p * WIDTH)));
    Panels::Bf16(panels.done())
}

thread_local! {
    /// For the next [`Paired`] of the thread, and the next run of a gradient: what is written over need not be cleared first, which would cost as much
    /// as a small product.
    static KEPT: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static KEPT_RUN: Cell<[Vec<u32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
    static KEPT_RUNS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    static KEPT_PANEL: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// A panel of [`SPLIT`] inputs in three parts.
fn kept_panel() -> Vec<u32> {
    let mut panel = KEPT_PANEL.take();
    panel.resize(Parts::Three.words(SPLIT) * WIDTH, 0);
    panel
}

/// Rows of the left side in words.
pub(super) struct Paired {
    rows: Vec<u32>,
    stride: usize,
    pairs: usize,
    parts: Parts,
}

impl Drop for Paired {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.rows));
    }
}

impl Paired {
    /// # Shapes
    /// x: `t` rows of `stride` numbers, `m` of them used.
    pub(super) fn new(x: &[f32], stride: usize, t: usize, m: usize, parts: Parts) -> Paired {
        let words = parts.words(m);
        let apart = pairs::apart(words);
        let mut rows = KEPT.take();
        rows.resize(t * apart, 0);
        pairs::rows_into(&mut rows, apart, x, stride, m, parts);
        Paired { rows, stride: apart, pairs: pairs::of(m), parts }
    }

    /// With panels of all inputs.
    pub(super) fn with<'a>(&'a self, panels: &'a [u32]) -> Sides<'a> {
        let panel = self.pairs * self.parts.count() * WIDTH;
        Sides { left: &self.rows, left_stride: self.stride, panels, panel, pairs: self.pairs, parts: self.parts }
    }

    /// With a single panel of `k` inputs from `k0` on, where a step begins.
    fn part<'a>(&'a self, panel: &'a [u32], k0: usize, k: usize) -> Sides<'a> {
        Sides { left: &self.rows[self.parts.whole(k0 / 2)..], pairs: pairs::of(k), ..self.with(panel) }
    }
}

/// The product with one panel of columns, which `lay` writes in words for the inputs from one on, so many of them at a time.
fn panel_by_parts(
    out: &mut [f32],
    stride: usize,
    left: &Paired,
    (t, m, cols): (usize, usize, usize),
    begun: bool,
    words: &mut [u32],
    lay: impl Fn(&mut [u32], usize, usize),
) {
    for k0 in (0..m).step_by(SPLIT) {
        let k = SPLIT.min(m - k0);
        let words = &mut words[..left.parts.words(k) * WIDTH];
        // The last step may not be full.
        words[left.parts.whole(k / 2) * WIDTH..].fill(0);
        lay(words, k0, k);
        pairs::multiply(out, stride, left.part(words, k0, k), t, cols, begun || k0 > 0);
    }
}

/// The product of rows x, given as (numbers, how far apart rows are, rows), with panels `[N / WIDTH, M, WIDTH]` that are split as they come.
pub(super) fn split_panels(
    y: &mut [f32],
    y_stride: usize,
    (x, x_stride, t): (&[f32], usize, usize),
    panels: &[f32],
    (m, n): (usize, usize),
    begun: bool,
    parts: Parts,
) {
    let _tiles = pairs::hold();
    let mut words = kept_panel();
    for from in (0..m).step_by(INPUTS) {
        let inputs = INPUTS.min(m - from);
        let left = Paired::new(&x[from..], x_stride, t, inputs, parts);
        for (panel, first) in panels.chunks_exact(WIDTH * m).zip((0..n).step_by(WIDTH)) {
            let (y, cols) = (&mut y[first..], WIDTH.min(n - first));
            panel_by_parts(y, y_stride, &left, (t, inputs, cols), begun || from > 0, &mut words, |words, k0, k| {
                pairs::columns_into(words, WIDTH, &panel[(from + k0) * WIDTH..], WIDTH, k, cols, parts);
            });
        }
    }
    KEPT_PANEL.set(words);
}

/// Some panels of words: the columns of the result from `first` on.
#[allow(clippy::too_many_arguments)]
pub(super) fn few(
    out: &mut [f32],
    stride: usize,
    left: &Paired,
    w: Weights<'_>,
    first: usize,
    t: usize,
    m: usize,
    n: usize,
    cols: usize,
    begun: bool,
) {
    let parts = left.parts;
    if let Weights::Laid(Panels::Bf16(panels), _) = w {
        return pairs::multiply(out, stride, left.with(&panels[first * left.pairs..]), t, cols, begun);
    }
    let _tiles = pairs::hold();
    let mut words = kept_panel();
    for c in (0..cols).step_by(WIDTH) {
        let (from, width) = (first + c, WIDTH.min(cols - c));
        panel_by_parts(&mut out[c..], stride, left, (t, m, width), begun, &mut words, |words, k0, k| match w {
            Weights::Rows(w) => w.pair_into(words, from * m + k0, m, k, width, parts),
            Weights::Turned(w, _) => pairs::columns_into(words, WIDTH, &w[k0 * n + from..], n, k, width, parts),
            Weights::Laid(Panels::F32(panels), _) => {
                pairs::columns_into(words, WIDTH, &panels[from * m + k0 * WIDTH..], WIDTH, k, width, parts);
            }
            Weights::Laid(Panels::Bf16(_), _) => {}
        });
    }
    KEPT_PANEL.set(words);
}

/// The gradients by products of pairs of tokens, run after run of [`PAIRED_RUN`].
pub(super) fn add(mut maps: Vec<Outer>, x: &[f32], t: usize, m: usize, threads: bool, parts: Parts) {
    for Outer { db, dy, .. } in &mut maps {
        add_bias(db.as_deref_mut(), dy, dy.len() / t, threads);
    }
    // Each thread makes some rows of the gradients, from all tokens in order: which rows changes no bit.
    let outputs: usize = maps.iter().map(|map| map.dw.len() / m).sum();
    let shares = if threads { outputs.div_ceil(STRIPE).next_multiple_of(rayon::current_num_threads()) } else { 1 };
    let stripe = outputs.div_ceil(shares).next_multiple_of(WIDTH).clamp(WIDTH, STRIPE);
    let columns = m.div_ceil(WIDTH);
    let place = WIDTH * parts.words(PAIRED_RUN.min(t));
    let runs = (AT_ONCE / (columns * place * size_of::<u32>())).clamp(1, t.div_ceil(PAIRED_RUN));
    for (x, from) in x.chunks(runs * PAIRED_RUN * m).zip((0..t).step_by(runs * PAIRED_RUN)) {
        // x as panels for each run, which all threads read; a place for each, though the last run may be shorter.
        let tokens = x.len() / m;
        let mut panels = KEPT_RUNS.take();
        panels.resize(panels.len().max(tokens.div_ceil(PAIRED_RUN) * columns * place), 0);
        let used = &mut panels[..tokens.div_ceil(PAIRED_RUN) * columns * place];
        let lay = |(i, panel): (usize, &mut [u32])| {
            let (t0, first) = (i / columns * PAIRED_RUN, i % columns * WIDTH);
            let (run, cols) = (PAIRED_RUN.min(tokens - t0), WIDTH.min(m - first));
            // Columns that are not there may hold anything; pairs of a step that is not full meet zeros.
            panel[parts.whole(run / 2) * WIDTH..parts.words(run) * WIDTH].fill(0);
            pairs::columns_into(panel, WIDTH, &x[t0 * m + first..], m, run, cols, parts);
        };
        let at_once = if threads { 1 } else { usize::MAX };
        used.par_chunks_mut(place).enumerate().with_min_len(at_once).for_each(lay);
        let used = &*used;
        let stripes = maps.iter_mut().flat_map(|Outer { dw, dy, .. }| {
            let n = dy.len() / t;
            let dy = &dy[from * n..];
            dw.chunks_mut(stripe * m).enumerate().map(move |(i, dw)| (dw, dy, n, i * stripe))
        });
        each(
            threads,
            stripes,
            || (),
            |(), (dw, dy, n, first)| {
                let rows = dw.len() / m;
                let [mut words, mut left] = KEPT_RUN.take();
                for (panels, t0) in used.chunks(columns * place).zip((0..tokens).step_by(PAIRED_RUN)) {
                    let run = PAIRED_RUN.min(tokens - t0);
                    let (of_run, pairs) = (parts.words(run), pairs::of(run));
                    let apart = pairs::apart(of_run);
                    words.resize(of_run * STRIPE, 0);
                    left.resize(STRIPE * apart, 0);
                    words[parts.whole(run / 2) * STRIPE..].fill(0);
                    pairs::columns_into(&mut words, STRIPE, &dy[t0 * n + first..], n, run, rows, parts);
                    pairs::transpose(&mut left, apart, &words, STRIPE, of_run, rows);
                    let sides = Sides { left: &left, left_stride: apart, panels, panel: place, pairs, parts };
                    pairs::multiply(dw, m, sides, rows, m, true);
                }
                KEPT_RUN.set([words, left]);
            },
        );
        KEPT_RUNS.set(panels);
    }
}
