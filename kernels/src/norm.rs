//! RMSNorm with a weight, and its gradient.
//!
//! The sum of squares of a row is taken as 16 interleaved sums and a tree, whatever the other rows are.
//! The weight's gradient is summed over fixed blocks of rows and then over the blocks in order, so it does not depend
//! on the number of threads.

use crate::vector::{dispatch, dot};
use rayon::prelude::*;

/// Rows whose weight gradient is summed together; also the unit of parallel work.
const ROWS: usize = 64;

/// y = x · rstd · w with rstd = 1 / sqrt(mean(x²) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467).
///
/// # Shapes
/// y, x `[T, D]`; rstd `[T]` (kept for backward); w `[D]`.
pub fn forward(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], d: usize, eps: f32) {
    check(y.len(), x.len(), rstd.len(), w.len(), d);
    y.par_chunks_mut(ROWS * d)
        .zip(rstd.par_chunks_mut(ROWS))
        .zip(x.par_chunks(ROWS * d))
        .for_each(|((y, rstd), x)| forward_rows(y, rstd, x, w, d, eps));
}

dispatch! { fn forward_rows(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], d: usize, eps: f32) = forward_body }
#[inline(always)]
fn forward_body<const LEVEL: u8>(
    y: &mut [f32],
    rstd: &mut [f32],
    x: &[f32],
    w: &[f32],
    d: usize,
    eps: f32,
) {
    for ((y, r), x) in y.chunks_exact_mut(d).zip(rstd).zip(x.chunks_exact(d)) {
        *r = 1.0 / (dot::<LEVEL>(x, x) / d as f32 + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = w * (x * *r);
        }
    }
}

/// dx from dy (written, or added when `accumulate_dx`), dw += Σ_t dy · x · rstd.
///
/// # Shapes
/// dx, dy, x `[T, D]`; dw, w `[D]`; rstd `[T]` as `forward` left it.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dx: &mut [f32],
    dw: &mut [f32],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    d: usize,
    accumulate_dx: bool,
) {
    check(dx.len(), x.len(), rstd.len(), w.len(), d);
    check(dy.len(), x.len(), rstd.len(), dw.len(), d);
    let blocks = rstd.len().div_ceil(ROWS);
    let mut parts = vec![0.0f32; blocks * d];
    dx.par_chunks_mut(ROWS * d)
        .zip(parts.par_chunks_mut(d))
        .zip(
            dy.par_chunks(ROWS * d)
                .zip(x.par_chunks(ROWS * d))
                .zip(rstd.par_chunks(ROWS)),
        )
        .for_each(|((dx, part), ((dy, x), rstd))| {
            backward_rows(dx, part, dy, x, w, rstd, d, accumulate_dx)
        });
    for part in parts.chunks_exact(d) {
        for (sum, p) in dw.iter_mut().zip(part) {
            *sum += p;
        }
    }
}

dispatch! { fn backward_rows(dx: &mut [f32], dw: &mut [f32], dy: &[f32], x: &[f32], w: &[f32], rstd: &[f32], d: usize, accumulate: bool) = backward_body }
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn backward_body<const LEVEL: u8>(
    dx: &mut [f32],
    dw: &mut [f32],
    dy: &[f32],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    d: usize,
    accumulate: bool,
) {
    let mut g = vec![0.0f32; d];
    for (((dx, dy), x), &r) in dx
        .chunks_exact_mut(d)
        .zip(dy.chunks_exact(d))
        .zip(x.chunks_exact(d))
        .zip(rstd)
    {
        for i in 0..d {
            g[i] = dy[i] * w[i];
            dw[i] += dy[i] * (x[i] * r);
        }
        // d rstd / dx_i = -rstd³ x_i / D
        let mean = dot::<LEVEL>(&g, x) / d as f32 * r * r;
        for i in 0..d {
            let value = r * (g[i] - x[i] * mean);
            dx[i] = if accumulate { dx[i] + value } else { value };
        }
    }
}

fn check(y: usize, x: usize, rstd: usize, w: usize, d: usize) {
    assert!(
        d > 0 && w == d,
        "norm: weight has {w} numbers, expected [D={d}]"
    );
    assert_eq!(
        x,
        rstd * d,
        "norm: x has {x} numbers, expected [T={rstd}, D={d}]"
    );
    assert_eq!(y, x, "norm: the output has {y} numbers, x has {x}");
}
