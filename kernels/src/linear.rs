//! Linear layers: y = x·wᵀ + b with weights as Hugging Face stores them, [out, in].
//!
//! Hides how weights are laid out for our own product (`panel`) and how the work is cut: many rows are spread over the threads by
//! rows, few by outputs, with the same bits. The order fixed for one output: the M inputs are cut into `ceil(M / 192)` equal
//! blocks; each block is a run of fused multiply-adds from zero in order of m; what y holds comes first where it is to be
//! kept, then the bias, and the blocks are added to these in order.
//!
//! Where the matrix says so ([`Compute::Bf16`], [`Compute::Bf16x6`]), both sides of all three products become bf16 first, by one part or by three, and
//! go through `pairs`. Then the sum starts from what comes first and takes the M inputs in order, a step of them at a time.

mod paired;

use self::paired::{Paired, lay_out};
use crate::matrix::{Compute, Matrix};
use crate::pairs::{self, Parts};
use crate::panel::{self, Left, Onto, WIDTH};
use crate::threads::each;
use crate::vector::dispatch;
use rayon::prelude::*;

/// Longest run of multiply-adds: a panel of so many rows stays in the first cache (24 KiB).
const BLOCK: usize = 192;
/// Below this many rows the work is spread by outputs.
pub const FEW_ROWS: usize = 64;
/// Most rows that one task takes: what it makes of them stays in its core's cache.
const ROWS: usize = 128;
/// Outputs (or inputs, in the backward) whose weights are laid out at a time where they are used once: not a second copy of a head.
const SLAB: usize = 2048;
/// Most rows of a weight's gradient that one task takes, and the tokens it sums in one run.
const STRIPE: usize = 128;
const RUN: usize = 256;
/// Columns of a weight's gradient that a task makes of one run: what they read of x stays in the second cache (512 KiB).
const INPUTS: usize = 512;
/// Rows of the product's tile.
const TILE: usize = 8;
/// Columns that one task takes where the work is adding.
const COLUMNS: usize = 64;
/// Multiply-adds below which waking other threads costs more than it saves.
const WORTH_THREADS: usize = 1 << 18;

/// Most rows that one task takes.
pub fn most_rows(compute: Compute) -> usize {
    match compute {
        Compute::F32 | Compute::Bf16 => ROWS,
        // Weights are split for each task anew.
        Compute::Bf16x6 => 2 * ROWS,
    }
}

/// Rows of one task where each row is computed the same in any company: every thread gets some.
pub fn rows_at_once(t: usize, compute: Compute) -> usize {
    t.div_ceil(rayon::current_num_threads()).next_multiple_of(TILE).clamp(TILE, most_rows(compute))
}

fn block_len(m: usize) -> usize {
    m.div_ceil(m.div_ceil(BLOCK).max(1)).max(1)
}

/// Writes y, or adds to it (a residual) when `onto`.
///
/// # Shapes
/// y `[T, N]` = x `[T, M]` · w `[N, M]`ᵀ + b `[N]`.
#[allow(clippy::too_many_arguments)]
pub fn forward<'a>(
    y: &mut [f32],
    x: &[f32],
    w: impl Into<Matrix<'a>>,
    b: Option<&[f32]>,
    onto: bool,
    t: usize,
    m: usize,
    n: usize,
) {
    let w = w.into();
    check(y.len(), x.len(), w.len(), b.map(<[f32]>::len), t, m, n);
    if t < FEW_ROWS || m == 0 || n == 0 {
        return few_rows(y, x, Weights::Rows(w), b, onto, t, m, n);
    }
    for first in (0..n).step_by(SLAB) {
        let outputs = first..n.min(first + SLAB);
        let slab = Packed::new(w.part(outputs.start * m..outputs.end * m), m, outputs.len());
        slab.many_rows(y, (n, first), x, (m, 0), b.map(|b| &b[outputs]), onto, t);
    }
}

dispatch! {
    /// What the products are added to: the bias, behind what is there already when `onto`.
    fn start(y: &mut [f32], stride: usize, b: &[f32], onto: bool) = start_body
}
#[inline(always)]
fn start_body<const LEVEL: u8>(y: &mut [f32], stride: usize, b: &[f32], onto: bool) {
    for row in y.chunks_mut(stride) {
        let row = &mut row[..b.len()];
        if onto {
            row.iter_mut().zip(b).for_each(|(y, b)| *y += b);
        } else {
            row.copy_from_slice(b);
        }
    }
}

/// Weights laid out once for our own product; same bits as [`forward`].
///
/// Costs as much memory as the weights themselves. Worth it where the same weights meet rows several times: token after token, or
/// one stretch of rows after the other.
pub struct Packed {
    panels: Panels,
    compute: Compute,
    m: usize,
    n: usize,
    /// Inputs of one run of multiply-adds.
    block: usize,
}

enum Panels {
    /// For each panel of `WIDTH` outputs, a matrix [M, WIDTH]. Three parts are made of it where they are needed: they take half as much again to read.
    F32(Vec<f32>),
    /// For each, one of pairs [M / 2, WIDTH], in whole steps.
    Bf16(Vec<u32>),
}

impl Packed {
    /// # Shapes
    /// w `[N, M]`.
    pub fn new<'a>(w: impl Into<Matrix<'a>>, m: usize, n: usize) -> Self {
        let w = w.into();
        assert_eq!(w.len(), n * m, "linear: weight [{n}, {m}]");
        let (block, compute) = (block_len(m), w.compute);
        if compute == Compute::Bf16 {
            let panels = lay_out(m, n, |panel, first, cols| w.pair_into(panel, first * m, m, m, cols, Parts::One));
            return Self { panels, compute, m, n, block };
        }
        let mut panels = vec![0.0; n.div_ceil(WIDTH) * WIDTH * m];
        if m > 0 {
            panels.par_chunks_mut(WIDTH * m).enumerate().for_each(|(p, panel)| {
                let first = p * WIDTH;
                w.transpose_into(panel, first * m, m, m, WIDTH.min(n - first));
            });
        }
        Self { panels: Panels::F32(panels), compute, m, n, block }
    }

    /// For [`backward_input`]: the inputs are what was the outputs.
    ///
    /// # Shapes
    /// w `[N, M]`; [`Packed::forward`] then takes dy `[T, N]` to dx `[T, M]`.
    pub fn turned<'a>(w: impl Into<Matrix<'a>>, m: usize, n: usize) -> Self {
        let w = w.into();
        assert_eq!(w.len(), n * m, "linear: weight [{n}, {m}]");
        let (block, compute, w) = (block_len(n), w.compute, w.wide());
        if compute == Compute::Bf16 {
            let lay = |panel: &mut [u32], first: usize, cols| {
                pairs::columns_into(panel, WIDTH, &w[first..], m, n, cols, Parts::One);
            };
            return Self { panels: lay_out(n, m, lay), compute, m: n, n: m, block };
        }
        let mut panels = vec![0.0; m.div_ceil(WIDTH) * WIDTH * n];
        if n > 0 {
            panels.par_chunks_mut(WIDTH * n).enumerate().for_each(|(p, panel)| {
                let (first, last) = (p * WIDTH, m.min((p + 1) * WIDTH));
                for (to, from) in panel.chunks_exact_mut(WIDTH).zip(w.chunks_exact(m)) {
                    to[..last - first].copy_from_slice(&from[first..last]);
                }
            });
        }
        Self { panels: Panels::F32(panels), compute, m: n, n: m, block }
    }

    /// Writes y, or adds to it when `onto`.
    ///
    /// # Shapes
    /// y `[T, N]` = x `[T, M]` · w `[N, M]`ᵀ + b `[N]`.
    pub fn forward(&self, y: &mut [f32], x: &[f32], b: Option<&[f32]>, onto: bool, t: usize) {
        let (m, n) = (self.m, self.n);
        check(y.len(), x.len(), n * m, b.map(<[f32]>::len), t, m, n);
        if t < FEW_ROWS || m == 0 || n == 0 {
            few_rows(y, x, Weights::Laid(&self.panels, self.compute), b, onto, t, m, n);
        } else {
            self.many_rows(y, (n, 0), x, (m, 0), b, onto, t);
        }
    }

    /// Spread over the threads by rows; y and x are some columns of wider rows, given as (numbers of a row, first column).
    #[allow(clippy::too_many_arguments)]
    fn many_rows(
        &self,
        y: &mut [f32],
        (y_stride, y_first): (usize, usize),
        x: &[f32],
        (x_stride, x_first): (usize, usize),
        b: Option<&[f32]>,
        onto: bool,
        t: usize,
    ) {
        let rows = rows_at_once(t, self.compute);
        y.par_chunks_mut(rows * y_stride)
            .zip(x.par_chunks(rows * x_stride))
            .for_each(|(y, x)| self.rows(&mut y[y_first..], y_stride, &x[x_first..], x_stride, b, onto));
    }

    /// The same on the calling thread, for callers that cut the rows themselves.
    pub fn forward_here(&self, y: &mut [f32], x: &[f32], b: Option<&[f32]>, onto: bool, t: usize) {
        let (m, n) = (self.m, self.n);
        check(y.len(), x.len(), n * m, b.map(<[f32]>::len), t, m, n);
        if m == 0 || n == 0 || t == 0 {
            few_rows(y, x, Weights::Laid(&self.panels, self.compute), b, onto, t, m, n);
        } else {
            self.rows(y, n, x, m, b, onto);
        }
    }

    /// On the calling thread, from rows of `x_stride` numbers into rows of `y_stride`.
    fn rows(&self, y: &mut [f32], y_stride: usize, x: &[f32], x_stride: usize, b: Option<&[f32]>, onto: bool) {
        let (m, n) = (self.m, self.n);
        if let Some(b) = b {
            start(y, y_stride, b, onto);
        }
        let (t, block) = (x.len().div_ceil(x_stride), self.block);
        let there = onto || b.is_some();
        match (&self.panels, self.compute.parts()) {
            (Panels::Bf16(panels), parts) => {
                let left = Paired::new(x, x_stride, t, m, parts.unwrap_or(Parts::One));
                pairs::multiply(y, y_stride, left.with(panels), t, n, there);
            }
            (Panels::F32(panels), Some(parts)) => {
                paired::split_panels(y, y_stride, (x, x_stride, t), panels, (m, n), there, parts);
            }
            (Panels::F32(panels), None) => {
                for (p, panel) in panels.chunks_exact(WIDTH * m).enumerate() {
                    let first = p * WIDTH;
                    let cols = WIDTH.min(n - first);
                    for k0 in (0..m).step_by(block) {
                        let k = block.min(m - k0);
                        let (left, panel) = (Left::rows(&x[k0..], x_stride), &panel[k0 * WIDTH..]);
                        let onto = sum_if(there || k0 > 0);
                        panel::multiply(&mut y[first..], y_stride, left, panel, WIDTH, t, k, cols, onto);
                    }
                }
            }
        }
    }
}

fn sum_if(there: bool) -> Onto {
    if there { Onto::Sum } else { Onto::Nothing }
}

#[derive(Clone, Copy)]
enum Weights<'a> {
    /// `[N, M]`
    Rows(Matrix<'a>),
    /// `[M, N]`
    Turned(&'a [f32], Compute),
    Laid(&'a Panels, Compute),
}

impl Weights<'_> {
    fn compute(self) -> Compute {
        match self {
            Weights::Rows(w) => w.compute,
            Weights::Turned(_, compute) | Weights::Laid(_, compute) => compute,
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn few_rows(y: &mut [f32], x: &[f32], w: Weights<'_>, b: Option<&[f32]>, onto: bool, t: usize, m: usize, n: usize) {
    if t == 0 || n == 0 {
        return;
    }
    let paired = w.compute().parts().map(|parts| Paired::new(x, m.max(1), t, m, parts));
    // Tiles are set up for each call: a group of panels shares it.
    let group = if paired.is_some() { (WORTH_THREADS / 8 / (t * m * WIDTH).max(1)).clamp(1, 8) } else { 1 };
    let width = group * WIDTH;
    let groups = n.div_ceil(width);
    // Each group's outputs side by side, so that groups can be computed apart: [groups, T, width].
    let mut result = vec![0.0f32; groups * t * width];
    let begun: &[f32] = y;
    let one = |(g, out): (usize, &mut [f32])| {
        let first = g * width;
        let cols = width.min(n - first);
        if onto {
            for (row, begun) in out.chunks_exact_mut(width).zip(begun.chunks_exact(n)) {
                row[..cols].copy_from_slice(&begun[first..first + cols]);
            }
        }
        if let Some(b) = b {
            start(out, width, &b[first..first + cols], onto);
        }
        match &paired {
            Some(left) => paired::few(out, width, left, w, first, t, m, n, cols, onto || b.is_some()),
            None => few_plain(out, x, w, first, t, m, n, cols, onto || b.is_some()),
        }
    };
    if t * m * n < WORTH_THREADS {
        result.chunks_exact_mut(t * width).enumerate().for_each(one);
    } else {
        let at_once = (WORTH_THREADS / 4 / (t * m * width).max(1)).max(1);
        result.par_chunks_exact_mut(t * width).enumerate().with_min_len(at_once).for_each(one);
    }
    for (g, out) in result.chunks_exact(t * width).enumerate() {
        let first = g * width;
        let cols = width.min(n - first);
        for (row, y) in out.chunks_exact(width).zip(y.chunks_exact_mut(n)) {
            y[first..first + cols].copy_from_slice(&row[..cols]);
        }
    }
}

/// One panel: the columns of the result from `first` on.
#[allow(clippy::too_many_arguments)]
fn few_plain(
    out: &mut [f32],
    x: &[f32],
    w: Weights<'_>,
    first: usize,
    t: usize,
    m: usize,
    n: usize,
    cols: usize,
    begun: bool,
) {
    let block = block_len(m);
    let mut scratch = match w {
        Weights::Rows(_) => vec![0.0; block * WIDTH],
        _ => Vec::new(),
    };
    for k0 in (0..m).step_by(block) {
        let k = block.min(m - k0);
        let (panel, stride) = match w {
            Weights::Rows(w) => {
                w.transpose_into(&mut scratch, first * m + k0, m, k, cols);
                (&scratch[..], WIDTH)
            }
            Weights::Turned(w, _) => (&w[k0 * n + first..], n),
            Weights::Laid(Panels::F32(panels), _) => (&panels[first * m + k0 * WIDTH..], WIDTH),
            Weights::Laid(Panels::Bf16(_), _) => unreachable!("pairs are multiplied as such"),
        };
        // Weights that were laid out once come from afar, each for these few rows alone.
        let product = if matches!(w, Weights::Laid(..)) { panel::multiply_far } else { panel::multiply };
        product(out, WIDTH, Left::rows(&x[k0..], m), panel, stride, t, k, cols, sum_if(begun || k0 > 0));
    }
}

/// # Shapes
/// dx `[T, M]` = dy `[T, N]` · w `[N, M]`, added to dx when `accumulate`.
pub fn backward_input<'a>(
    dx: &mut [f32],
    dy: &[f32],
    w: impl Into<Matrix<'a>>,
    t: usize,
    m: usize,
    n: usize,
    accumulate: bool,
) {
    let w = w.into();
    check(dy.len(), dx.len(), w.len(), None, t, m, n);
    if t < FEW_ROWS || m == 0 || n == 0 {
        return few_rows(dx, dy, Weights::Turned(&w.wide(), w.compute), None, accumulate, t, n, m);
    }
    // Slabs of whole runs (and of whole steps of pairs), so that these are the ones of few rows.
    let block = block_len(n);
    let slab = if w.compute == Compute::F32 { SLAB / block * block } else { SLAB };
    for first in (0..n).step_by(slab) {
        let outputs = first..n.min(first + slab);
        let laid = Packed { block, ..Packed::turned(w.part(outputs.start * m..outputs.end * m), m, outputs.len()) };
        laid.many_rows(dx, (m, 0), dy, (n, first), None, accumulate || first > 0, t);
    }
}

/// A map's share in [`backward_weights`].
pub struct Outer<'a> {
    /// `[N, M]`
    pub dw: &'a mut [f32],
    /// `[N]`
    pub db: Option<&'a mut [f32]>,
    /// `[T, N]`
    pub dy: &'a [f32],
}

/// # Shapes
/// dw `[N, M]` += dy `[T, N]`ᵀ · x `[T, M]`; db `[N]` += column sums of dy.
#[allow(clippy::too_many_arguments)]
pub fn backward_weight(
    dw: &mut [f32],
    db: Option<&mut [f32]>,
    dy: &[f32],
    x: &[f32],
    t: usize,
    m: usize,
    n: usize,
    compute: Compute,
) {
    check(dy.len(), x.len(), dw.len(), db.as_ref().map(|b| b.len()), t, m, n);
    backward_weights(vec![Outer { dw, db, dy }], x, t, m, compute);
}

/// [`backward_weight`] of maps that have the same input, which is then read once.
///
/// # Shapes
/// x `[T, M]`
pub fn backward_weights(maps: Vec<Outer>, x: &[f32], t: usize, m: usize, compute: Compute) {
    if t == 0 || m == 0 {
        return;
    }
    for map in &maps {
        check(map.dy.len(), x.len(), map.dw.len(), map.db.as_ref().map(|b| b.len()), t, m, map.dy.len() / t);
    }
    let outputs: usize = maps.iter().map(|map| map.dw.len() / m).sum();
    let threads = t * m * outputs >= WORTH_THREADS;
    if let Some(parts) = compute.parts() {
        return paired::add(maps, x, t, m, threads, parts);
    }
    // Each thread makes some rows of the gradients, from all tokens in order: which rows changes no bit.
    let share = if threads { outputs.div_ceil(rayon::current_num_threads()).next_multiple_of(TILE) } else { outputs };
    let mut shares: Vec<Vec<Stripe>> = Vec::new();
    let mut given = 0;
    for Outer { dw, db, dy } in maps {
        let n = dy.len() / t;
        add_bias(db, dy, n, threads);
        let (mut rest, mut first) = (dw, 0);
        while !rest.is_empty() {
            let rows = STRIPE.min(share - given % share).min(n - first);
            let (dw, others) = rest.split_at_mut(rows * m);
            shares.resize_with(given / share + 1, Vec::new);
            shares[given / share].push(Stripe { dw, dy: &dy[first..], n });
            (rest, first, given) = (others, first + rows, given + rows);
        }
    }
    each(threads, shares.into_iter(), || (), |(), share| add_outer(share, x, t, m));
}

fn add_bias(db: Option<&mut [f32]>, dy: &[f32], n: usize, threads: bool) {
    let Some(db) = db else { return };
    // Each thread sums some columns over all rows, in order.
    let sum = |(c, db): (usize, &mut [f32])| add_columns(db, dy, c * COLUMNS, n);
    each(threads, db.chunks_mut(COLUMNS).enumerate(), || (), |(), part| sum(part));
}

/// Some rows of a gradient, and the columns of dy `[T, N]` that make them.
struct Stripe<'a> {
    dw: &'a mut [f32],
    dy: &'a [f32],
    n: usize,
}

/// dw `[rows, M]` += the first columns of dy `[T, N]`ᵀ · x `[T, M]` for each stripe, on the calling thread.
fn add_outer(mut stripes: Vec<Stripe>, x: &[f32], t: usize, m: usize) {
    // What a run reads of x, as panels [RUN, WIDTH], and of dy, [RUN, TILE] for each tile: read where they are, strides of powers of
    // two would push each other out of the first cache. The same goes for panels that lie a power of two apart.
    const APART: usize = RUN * WIDTH + 16;
    let mut panels = vec![0.0; INPUTS.min(m).div_ceil(WIDTH) * APART];
    let mut left = vec![0.0; STRIPE * RUN];
    for t0 in (0..t).step_by(RUN) {
        let run = RUN.min(t - t0);
        for c0 in (0..m).step_by(INPUTS) {
            let inputs = INPUTS.min(m - c0);
            for (k, x) in x[t0 * m..].chunks_exact(m).take(run).enumerate() {
                let (whole, rest) = x[c0..c0 + inputs].as_chunks::<WIDTH>();
                let mut panels = panels.chunks_mut(APART).map(|panel| &mut panel[k * WIDTH..][..WIDTH]);
                whole.iter().zip(&mut panels).for_each(|(x, panel)| panel.copy_from_slice(x));
                rest.iter().zip(panels.next().into_iter().flatten()).for_each(|(x, to)| *to = *x);
            }
            for Stripe { dw, dy, n } in &mut stripes {
                let rows = dw.len() / m;
                for (k, dy) in dy[t0 * *n..].chunks(*n).take(run).enumerate() {
                    let (whole, rest) = dy[..rows].as_chunks::<TILE>();
                    let mut tiles = left.chunks_exact_mut(RUN * TILE).map(|tile| &mut tile[k * TILE..][..TILE]);
                    whole.iter().zip(&mut tiles).for_each(|(dy, tile)| tile.copy_from_slice(dy));
                    rest.iter().zip(tiles.next().into_iter().flatten()).for_each(|(dy, to)| *to = *dy);
                }
                for (panel, c) in panels.chunks(APART).zip((c0..c0 + inputs).step_by(WIDTH)) {
                    let cols = WIDTH.min(m - c);
                    for (dw, left) in dw.chunks_mut(TILE * m).zip(left.chunks_exact(RUN * TILE)) {
                        let (rows, left) = (dw.len() / m, Left::turned(left, TILE));
                        panel::multiply(&mut dw[c..], m, left, panel, WIDTH, rows, run, cols, Onto::Sum);
                    }
                }
            }
        }
    }
}

dispatch! { fn add_columns(sums: &mut [f32], rows: &[f32], first: usize, n: usize) = add_columns_body }
#[inline(always)]
fn add_columns_body<const LEVEL: u8>(sums: &mut [f32], rows: &[f32], first: usize, n: usize) {
    for row in rows.chunks_exact(n) {
        for (sum, g) in sums.iter_mut().zip(&row[first..]) {
            *sum += g;
        }
    }
}

fn check(y: usize, x: usize, w: usize, b: Option<usize>, t: usize, m: usize, n: usize) {
    assert_eq!(y, t * n, "linear: output side has {y} numbers, expected [T={t}, N={n}]");
    assert_eq!(x, t * m, "linear: input side has {x} numbers, expected [T={t}, M={m}]");
    assert_eq!(w, n * m, "linear: weight has {w} numbers, expected [N={n}, M={m}]");
    if let Some(b) = b {
        assert_eq!(b, n, "linear: bias has {b} numbers, expected [N={n}]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{
        self, assert_close, assert_same_bits, assert_threads_agree, gradient, halves, numbers, weighted, wide,
    };

    fn product(x: &[f32], w: &[f32], b: Option<&[f32]>, t: usize, m: usize, n: usize) -> Vec<f32> {
        let mut y = vec![f32::NAN; t * n];
        forward(&mut y, x, w, b, false, t, m, n);
        y
    }

    #[test]
    fn a_product_by_hand() {
        // [1 2; 3 4] · [1 0; 0 1; 1 1]ᵀ + [10 20 30]
        let y = product(&[1.0, 2.0, 3.0, 4.0], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], Some(&[10.0, 20.0, 30.0]), 2, 2, 3);
        assert_eq!(y, [11.0, 22.0, 33.0, 13.0, 24.0, 37.0]);
    }

    #[test]
    fn agrees_with_the_oracle_on_ragged_sizes() {
        for (t, m, n) in [
            (1, 1, 1),
            (1, 7, 5),
            (3, 2, 40),
            (5, 33, 31),
            (64, 16, 16),
            (65, 100, 67),
            (70, 513, 33),
            (40, 600, 5),
            (2, 1100, 97),
        ] {
            let (x, w, b) = (numbers(1, t * m), numbers(2, n * m), numbers(3, n));
            let exact = oracle::linear(&wide(&x), &wide(&w), Some(&wide(&b)), t, m, n);
            // A run of m products in ±1 each rounded at 6e-8 of a partial sum near sqrt(m).
            let tolerance = 1e-6 * (m as f64).sqrt().max(1.0);
            assert_close("forward", &product(&x, &w, Some(&b), t, m, n), &exact, tolerance);
            let mut y = vec![0.0; t * n];
            Packed::new(&w, m, n).forward(&mut y, &x, Some(&b), false, t);
            assert_close("packed", &y, &exact, tolerance);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_however_many_rows_there_are() {
        for m in [2, 3, 32, 128, 384, 513, 1176, 3420] {
            for (n, bias) in [(96, true), (200, false), (7, true)] {
                let (x, w, b) = (numbers(1, 200 * m), numbers(2, n * m), numbers(3, n));
                let b = bias.then_some(&b[..]);
                let all = product(&x, &w, b, 200, m, n);
                let packed = Packed::new(&w, m, n);
                for t in [1, 2, 3, 5, 8, 17, 63, 64, 65, 199] {
                    // Rows from the middle, so that their place changes too.
                    let from = 200 - t;
                    let some = product(&x[from * m..], &w, b, t, m, n);
                    assert_same_bits(&format!("T={t} M={m} N={n}"), &some, &all[from * n..]);
                    let mut some = vec![0.0; t * n];
                    packed.forward(&mut some, &x[from * m..], b, false, t);
                    assert_same_bits(&format!("packed T={t} M={m} N={n}"), &some, &all[from * n..]);
                }
            }
        }
    }

    #[test]
    fn a_residual_comes_first_and_has_the_same_bits_in_few_rows() {
        let (t, m, n) = (100, 600, 70);
        let (x, w, b, residual) = (numbers(1, t * m), numbers(2, n * m), numbers(3, n), numbers(4, t * n));
        for b in [None, Some(&b[..])] {
            let mut all = residual.clone();
            forward(&mut all, &x, &w, b, true, t, m, n);
            let mut exact = oracle::linear(&wide(&x), &wide(&w), b.map(wide).as_deref(), t, m, n);
            exact.iter_mut().zip(&residual).for_each(|(y, r)| *y += f64::from(*r));
            assert_close("onto", &all, &exact, 1e-6 * (m as f64).sqrt());
            let packed = Packed::new(&w, m, n);
            for rows in [1, 9, 63] {
                let mut some = residual[..rows * n].to_vec();
                forward(&mut some, &x[..rows * m], &w, b, true, rows, m, n);
                assert_same_bits("few rows", &some, &all[..rows * n]);
                let mut some = residual[..rows * n].to_vec();
                packed.forward(&mut some, &x[..rows * m], b, true, rows);
                assert_same_bits("packed", &some, &all[..rows * n]);
            }
        }
    }

    #[test]
    fn a_row_among_very_many_has_the_same_bits() {
        // Many tasks, and several blocks of inputs.
        let (t, m, n) = (1500, 600, 80);
        let (x, w) = (numbers(1, t * m), numbers(2, n * m));
        let all = product(&x, &w, None, t, m, n);
        for row in [0, 1, 700, 1499] {
            let one = product(&x[row * m..(row + 1) * m], &w, None, 1, m, n);
            assert_same_bits("row", &one, &all[row * n..(row + 1) * n]);
        }
    }

    #[test]
    fn outputs_do_not_depend_on_how_many_others_are_asked() {
        let (m, n) = (384, 300);
        let (x, w) = (numbers(1, 40 * m), numbers(2, n * m));
        let all = product(&x, &w, None, 40, m, n);
        for some in [1, 15, 16, 17, 128] {
            let y = product(&x, &w[..some * m], None, 40, m, some);
            for (row, all) in y.chunks_exact(some).zip(all.chunks_exact(n)) {
                assert_same_bits(&format!("N={some}"), row, &all[..some]);
            }
        }
    }

    #[test]
    fn a_gradient_has_the_same_bits_however_many_rows_there_are() {
        // More outputs than a slab has.
        let (t, m, n) = (65, 40, 4100);
        let (w, dy) = (numbers(1, n * m), numbers(2, t * n));
        let mut all = vec![0.0; t * m];
        backward_input(&mut all, &dy, &w, t, m, n, false);
        let mut packed = vec![0.0; t * m];
        Packed::turned(&w, m, n).forward(&mut packed, &dy, None, false, t);
        assert_same_bits("turned", &packed, &all);
        for some in [1, 63] {
            let mut few = vec![0.0; some * m];
            backward_input(&mut few, &dy[..some * n], &w, some, m, n, false);
            assert_same_bits("few", &few, &all[..some * m]);
        }
    }

    #[test]
    fn bf16_weights_give_the_bits_of_the_same_weights_in_f32() {
        for (t, m, n) in
            [(1, 7, 5), (1, 1100, 97), (3, 64, 40), (8, 513, 33), (63, 200, 70), (64, 200, 70), (150, 40, 4100)]
        {
            let (x, b) = (numbers(1, t * m), numbers(3, n));
            let (bytes, w) = halves(&numbers(2, n * m));
            let exact = oracle::linear(&wide(&x), &wide(&w), Some(&wide(&b)), t, m, n);
            let all = product(&x, &w, Some(&b), t, m, n);
            assert_close("f32", &all, &exact, 1e-6 * (m as f64).sqrt().max(1.0));
            let mut y = vec![f32::NAN; t * n];
            forward(&mut y, &x, &bytes[..], Some(&b), false, t, m, n);
            assert_same_bits(&format!("bf16 T={t} M={m} N={n}"), &y, &all);
            Packed::new(&bytes[..], m, n).forward(&mut y, &x, Some(&b), false, t);
            assert_same_bits("packed", &y, &all);
            // Any row alone.
            let mut one = vec![f32::NAN; n];
            forward(&mut one, &x[(t - 1) * m..], &bytes[..], Some(&b), false, 1, m, n);
            assert_same_bits("alone", &one, &all[(t - 1) * n..]);
        }
    }

    #[test]
    fn threads_do_not_change_bits() {
        let (t, m, n) = (150, 700, 300);
        let (x, w, dy) = (numbers(1, t * m), numbers(2, n * m), numbers(3, t * n));
        assert_threads_agree("few rows", || product(&x[..8 * m], &w, None, 8, m, n));
        let (bytes, _) = halves(&w);
        assert_threads_agree("few rows of bf16", || {
            let mut y = vec![0.0; n];
            forward(&mut y, &x[..m], &bytes[..], None, false, 1, m, n);
            y
        });
        assert_threads_agree("many rows", || product(&x, &w, None, t, m, n));
        for compute in [Compute::F32, Compute::Bf16x6, Compute::Bf16] {
            let w = Matrix::from(&w).computed(compute);
            assert_threads_agree("forward", || {
                let mut y = vec![0.0; 9 * n];
                forward(&mut y, &x[..9 * m], w, None, false, 9, m, n);
                y
            });
            assert_threads_agree("backward input", || {
                let mut dx = vec![0.0; t * m];
                backward_input(&mut dx, &dy, w, t, m, n, false);
                dx
            });
            assert_threads_agree("backward weight", || {
                let mut dw = vec![0.0; n * m];
                backward_weight(&mut dw, None, &dy, &x, t, m, n, compute);
                dw
            });
        }
    }

    /// Numbers that are bf16 already: then the products are exact, and only the sums round.
    fn short(seed: u64, n: usize) -> Vec<f32> {
        halves(&numbers(seed, n)).1
    }

    #[test]
    fn in_bf16_all_products_agree_with_the_oracle_and_rows_do_not_see_each_other() {
        let sizes = [(1, 1, 1), (3, 40, 70), (70, 33, 90), (64, 900, 40), (200, 64, 2100), (1200, 40, 50)];
        for ((t, m, n), compute) in sizes.into_iter().flat_map(|s| [Compute::Bf16, Compute::Bf16x6].map(|c| (s, c))) {
            // In three parts any numbers will do.
            let long = compute == Compute::Bf16x6;
            let of = |seed, n| if long { numbers(seed, n) } else { short(seed, n) };
            let (x, w, b, dy) = (of(1, t * m), short(2, n * m), numbers(3, n), of(4, t * n));
            let (bytes, _) = halves(&w);
            let matrix = Matrix::from(&w).computed(compute);
            let size = |m: usize| 1e-6 * (m as f64).max(4.0);

            let begun = numbers(5, t * n);
            let plain = oracle::linear(&wide(&x), &wide(&w), Some(&wide(&b)), t, m, n);
            let expected: Vec<f64> = plain.iter().zip(&begun).map(|(y, begun)| y + f64::from(*begun)).collect();
            let mut y = begun.clone();
            forward(&mut y, &x, matrix, Some(&b), true, t, m, n);
            assert_close("forward", &y, &expected, size(m));
            let packed = Packed::new(matrix, m, n);
            for way in 0..3 {
                let mut again = begun.clone();
                match way {
                    0 => packed.forward(&mut again, &x, Some(&b), true, t),
                    1 => packed.forward_here(&mut again, &x, Some(&b), true, t),
                    _ => {
                        let stored = Matrix::from(&bytes[..]).computed(compute);
                        forward(&mut again, &x, stored, Some(&b), true, t, m, n);
                    }
                }
                assert_same_bits("another way", &again, &y);
            }
            let mut one = begun[(t - 1) * n..].to_vec();
            forward(&mut one, &x[(t - 1) * m..], matrix, Some(&b), true, 1, m, n);
            assert_same_bits("a row alone", &one, &y[(t - 1) * n..]);

            let mut dx = vec![f32::NAN; t * m];
            backward_input(&mut dx, &dy, matrix, t, m, n, false);
            let turned: Vec<f64> = (0..m * n).map(|i| f64::from(w[i % n * m + i / n])).collect();
            assert_close("dx", &dx, &oracle::linear(&wide(&dy), &turned, None, t, n, m), size(n));
            let mut one = vec![f32::NAN; m];
            backward_input(&mut one, &dy[..n], matrix, 1, m, n, false);
            assert_same_bits("a row's dx alone", &one, &dx[..m]);
            let mut laid = vec![f32::NAN; t * m];
            Packed::turned(matrix, m, n).forward(&mut laid, &dy, None, false, t);
            assert_same_bits("dx over what was laid out", &laid, &dx);

            let (mut dw, mut db) = (vec![1.0; n * m], vec![1.0; n]);
            backward_weight(&mut dw, Some(&mut db), &dy, &x, t, m, n, compute);
            for (i, dw) in dw.iter().enumerate() {
                let exact =
                    1.0 + (0..t).map(|t| f64::from(dy[t * n + i / m]) * f64::from(x[t * m + i % m])).sum::<f64>();
                assert!((f64::from(*dw) - exact).abs() < size(t), "dw {i} of [{t}, {m}, {n}]: {dw} against {exact}");
            }
            let exact: Vec<f64> = (0..n).map(|c| 1.0 + (0..t).map(|t| f64::from(dy[t * n + c])).sum::<f64>()).collect();
            assert_close("db", &db, &exact, size(t));
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (t, m, n) in [(1, 3, 2), (4, 5, 6), (9, 20, 3)] {
            let (x, w, b, dy) = (numbers(1, t * m), numbers(2, n * m), numbers(3, n), numbers(4, t * n));
            let (xs, ws, bs) = (wide(&x), wide(&w), wide(&b));
            let dx = gradient(&xs, |x| weighted(&oracle::linear(x, &ws, Some(&bs), t, m, n), &dy));
            let dw = gradient(&ws, |w| weighted(&oracle::linear(&xs, w, Some(&bs), t, m, n), &dy));
            let db = gradient(&bs, |b| weighted(&oracle::linear(&xs, &ws, Some(b), t, m, n), &dy));
            let mut found = vec![f32::NAN; t * m];
            backward_input(&mut found, &dy, &w, t, m, n, false);
            // Sums of at most 20 products in ±1.
            assert_close("dx", &found, &dx, 2e-6);
            backward_input(&mut found, &dy, &w, t, m, n, true);
            let twice: Vec<f64> = dx.iter().map(|g| 2.0 * g).collect();
            assert_close("dx accumulated", &found, &twice, 4e-6);
            let (mut found_w, mut found_b) = (vec![1.0; n * m], vec![1.0; n]);
            backward_weight(&mut found_w, Some(&mut found_b), &dy, &x, t, m, n, Compute::F32);
            let plus_one = |g: &[f64]| g.iter().map(|g| g + 1.0).collect::<Vec<_>>();
            assert_close("dw", &found_w, &plus_one(&dw), 2e-6);
            assert_close("db", &found_b, &plus_one(&db), 2e-6);
        }
    }
}
