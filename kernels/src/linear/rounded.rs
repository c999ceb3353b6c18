//! The products of a linear layer in bf16: rows and panels of pairs, for `pairs`.

use super::{Outer, Panels, STRIPE, Weights, add_bias};
use crate::memory::{Chunk, Rows};
use crate::pairs::{self, Sides, WIDTH};
use crate::threads::each;
use rayon::prelude::*;
use std::cell::Cell;

/// Tokens that a weight's gradient sums in one run where they are paired: what a run reads stays in the second cache.
const PAIRED_RUN: usize = 512;

/// Lays out panels of pairs of `m` inputs for `n` outputs; `lay` is given each with its first column and how many it has.
pub(super) fn paired(m: usize, n: usize, lay: impl Fn(&mut [u32], usize, usize) + Sync) -> Panels {
    let size = WIDTH * pairs::of(m);
    let mut panels = Rows::new(n.div_ceil(WIDTH) * size);
    let each = panels.chunks(size.max(1)).enumerate();
    each.for_each(|(p, panel)| lay(panel.clear(), p * WIDTH, WIDTH.min(n - p * WIDTH)));
    Panels::Bf16(panels.done())
}

thread_local! {
    /// For the next [`Rounded`] of the thread: rows are written over, and clearing them first would cost as much as a small product.
    static KEPT: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

impl Drop for Rounded {
    fn drop(&mut self) {
        KEPT.set(std::mem::take(&mut self.rows));
    }
}

/// Rows of the left side in pairs.
pub(super) struct Rounded {
    rows: Vec<u32>,
    stride: usize,
    pairs: usize,
}

impl Rounded {
    /// # Shapes
    /// x: `t` rows of `stride` numbers, `m` of them used.
    pub(super) fn new(x: &[f32], stride: usize, t: usize, m: usize) -> Rounded {
        let pairs = pairs::of(m);
        let apart = pairs::apart(pairs);
        let mut rows = KEPT.take();
        rows.resize(t * apart, 0);
        pairs::rows_into(&mut rows, apart, x, stride, m);
        Rounded { rows, stride: apart, pairs }
    }

    pub(super) fn with<'a>(&'a self, panels: &'a [u32]) -> Sides<'a> {
        Sides { left: &self.rows, left_stride: self.stride, panels, panel: self.pairs * WIDTH, pairs: self.pairs }
    }
}

/// Some panels of pairs: the columns of the result from `first` on.
#[allow(clippy::too_many_arguments)]
pub(super) fn few_rounded(
    out: &mut [f32],
    stride: usize,
    left: &Rounded,
    w: Weights<'_>,
    first: usize,
    t: usize,
    m: usize,
    n: usize,
    cols: usize,
    begun: bool,
) {
    let size = left.pairs * WIDTH;
    let mut scratch = Vec::new();
    let panels = match w {
        Weights::Laid(Panels::Bf16(panels)) => &panels[first * left.pairs..],
        Weights::Laid(Panels::F32(_)) => unreachable!("f32 is multiplied as such"),
        Weights::Rows(_) | Weights::Turned(..) => {
            scratch.resize(cols.div_ceil(WIDTH) * size, 0);
            for (panel, c) in scratch.chunks_exact_mut(size.max(1)).zip((0..cols).step_by(WIDTH)) {
                let (first, cols) = (first + c, WIDTH.min(cols - c));
                match w {
                    Weights::Rows(w) => w.pair_into(panel, first * m, m, m, cols),
                    Weights::Turned(w, _) => pairs::columns_into(panel, WIDTH, &w[first..], n, m, cols),
                    Weights::Laid(_) => {}
                }
            }
            &scratch[..]
        }
    };
    pairs::multiply(out, stride, left.with(panels), t, cols, begun);
}

/// The gradients by products of pairs of tokens, run after run of [`PAIRED_RUN`].
pub(super) fn add_rounded(mut maps: Vec<Outer>, x: &[f32], t: usize, m: usize, threads: bool) {
    for Outer { db, dy, .. } in &mut maps {
        add_bias(db.as_deref_mut(), dy, dy.len() / t, threads);
    }
    // x as panels for each run, which all threads read; a place for each, though the last run may be shorter.
    let columns = m.div_ceil(WIDTH);
    let place = WIDTH * pairs::of(PAIRED_RUN.min(t));
    let mut panels = Rows::new(t.div_ceil(PAIRED_RUN) * columns * place);
    let lay = |(i, panel): (usize, Chunk<u32>)| {
        let (t0, first) = (i / columns * PAIRED_RUN, i % columns * WIDTH);
        let run = PAIRED_RUN.min(t - t0);
        pairs::columns_into(panel.clear(), WIDTH, &x[t0 * m + first..], m, run, WIDTH.min(m - first));
    };
    let at_once = if threads { 1 } else { usize::MAX };
    panels.chunks(place).enumerate().with_min_len(at_once).for_each(lay);
    let panels = panels.done();
    let stripes = maps.iter_mut().flat_map(|Outer { dw, dy, .. }| {
        let dy: &[f32] = dy;
        dw.chunks_mut(STRIPE * m).enumerate().map(move |(i, dw)| (dw, dy, i * STRIPE))
    });
    let most = pairs::of(PAIRED_RUN.min(t));
    let start = || (vec![0; most * STRIPE], vec![0; STRIPE * pairs::apart(most)]);
    each(threads, stripes, start, |(tokens, left), (dw, dy, first)| {
        let (n, rows) = (dy.len() / t, dw.len() / m);
        for (panels, t0) in panels.chunks(columns * place).zip((0..t).step_by(PAIRED_RUN)) {
            let run = PAIRED_RUN.min(t - t0);
            let pairs = pairs::of(run);
            let apart = pairs::apart(pairs);
            tokens[run / 2 * STRIPE..].fill(0);
            pairs::columns_into(tokens, STRIPE, &dy[t0 * n + first..], n, run, rows);
            pairs::transpose(left, apart, tokens, STRIPE, pairs, rows);
            // Panels of a shorter run end with zeros, which meet zeros.
            let sides = Sides { left: &*left, left_stride: apart, panels, panel: place, pairs };
            pairs::multiply(dw, m, sides, rows, m, true);
        }
    });
}
