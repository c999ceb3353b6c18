//! RMSNorm with a weight, and its gradient.
//!
//! The sum of squares of a row is taken as 16 interleaved sums and a tree, whatever the other rows are.
//! The weight's gradient is summed over fixed blocks of rows and then over the blocks in order, so it does not depend
//! on the number of threads.

use crate::vector::{dispatch, dot};
use rayon::prelude::*;

/// Rows whose weight gradient is summed together; also the unit of parallel work.
const ROWS: usize = 64;
/// Numbers below which waking other threads costs more than it saves.
const WORTH_THREADS: usize = 1 << 15;

/// y = x · rstd · w with rstd = 1 / sqrt(mean(x²) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467).
///
/// # Shapes
/// y, x `[T, D]`; rstd `[T]` (kept for backward); w `[D]`.
pub fn forward(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], d: usize, eps: f32) {
    check(y.len(), x.len(), rstd.len(), w.len(), d);
    if x.len() <= WORTH_THREADS {
        return forward_rows(y, rstd, x, w, d, eps);
    }
    y.par_chunks_mut(ROWS * d)
        .zip(rstd.par_chunks_mut(ROWS))
        .zip(x.par_chunks(ROWS * d))
        .for_each(|((y, rstd), x)| forward_rows(y, rstd, x, w, d, eps));
}

dispatch! { fn forward_rows(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], d: usize, eps: f32) = forward_body }
#[inline(always)]
fn forward_body<const LEVEL: u8>(y: &mut [f32], rstd: &mut [f32], x: &[f32], w: &[f32], d: usize, eps: f32) {
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
    if rstd.len() <= ROWS {
        let mut part = vec![0.0f32; d];
        backward_rows(dx, &mut part, dy, x, w, rstd, d, accumulate_dx);
        return dw.iter_mut().zip(part).for_each(|(sum, p)| *sum += p);
    }
    let blocks = rstd.len().div_ceil(ROWS);
    let mut parts = vec![0.0f32; blocks * d];
    dx.par_chunks_mut(ROWS * d)
        .zip(parts.par_chunks_mut(d))
        .zip(dy.par_chunks(ROWS * d).zip(x.par_chunks(ROWS * d)).zip(rstd.par_chunks(ROWS)))
        .for_each(|((dx, part), ((dy, x), rstd))| backward_rows(dx, part, dy, x, w, rstd, d, accumulate_dx));
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
    for (((dx, dy), x), &r) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)).zip(rstd) {
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
    assert!(d > 0 && w == d, "norm: weight has {w} numbers, expected [D={d}]");
    assert_eq!(x, rstd * d, "norm: x has {x} numbers, expected [T={rstd}, D={d}]");
    assert_eq!(y, x, "norm: the output has {y} numbers, x has {x}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{
        self, assert_close, assert_same_bits, assert_threads_agree, gradient, numbers, weighted, wide,
    };

    fn run(x: &[f32], w: &[f32], d: usize, eps: f32) -> (Vec<f32>, Vec<f32>) {
        let (mut y, mut rstd) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len() / d]);
        forward(&mut y, &mut rstd, x, w, d, eps);
        (y, rstd)
    }

    #[test]
    fn a_row_by_hand() {
        // mean of squares of (3, 4, 0, 5) = 12.5
        let (y, rstd) = run(&[3.0, 4.0, 0.0, 5.0], &[1.0, 2.0, 3.0, 4.0], 4, 0.0);
        let r = 1.0 / 12.5f32.sqrt();
        assert_eq!(rstd, [r]);
        assert_eq!(y, [3.0 * r, 2.0 * (4.0 * r), 0.0, 4.0 * (5.0 * r)]);
    }

    #[test]
    fn agrees_with_the_oracle_and_its_finite_differences() {
        for (t, d) in [(1, 1), (1, 16), (3, 7), (5, 37), (70, 8)] {
            let (x, w, dy) = (numbers(1, t * d), numbers(2, d), numbers(3, t * d));
            let (xs, ws) = (wide(&x), wide(&w));
            let eps = 1e-6f32;
            let exact = |x: &[f64], w: &[f64]| oracle::rms_norm(x, w, d, f64::from(eps));
            let (y, rstd) = run(&x, &w, d, eps);
            // A few roundings of numbers near 1.
            assert_close("y", &y, &exact(&xs, &ws), 1e-6);
            let (mut dx, mut dw) = (vec![f32::NAN; t * d], vec![1.0; d]);
            backward(&mut dx, &mut dw, &dy, &x, &w, &rstd, d, false);
            let exact_dx = gradient(&xs, |x| weighted(&exact(x, &ws), &dy));
            // D=1 differentiates a sign: rstd of a small x is large, and what is left of the sum is its rounding.
            let tolerance = if d == 1 { 1e-4 } else { 4e-6 };
            assert_close("dx", &dx, &exact_dx, tolerance);
            let exact_dw: Vec<f64> = gradient(&ws, |w| weighted(&exact(&xs, w), &dy)).iter().map(|g| g + 1.0).collect();
            assert_close("dw", &dw, &exact_dw, 4e-6);
            backward(&mut dx, &mut dw, &dy, &x, &w, &rstd, d, true);
            let twice: Vec<f64> = exact_dx.iter().map(|g| 2.0 * g).collect();
            assert_close("dx accumulated", &dx, &twice, 2.0 * tolerance);
        }
    }

    #[test]
    fn rows_and_threads_do_not_change_bits() {
        let (t, d) = (200, 77);
        let (x, w, dy) = (numbers(1, t * d), numbers(2, d), numbers(3, t * d));
        let (all, rstd) = run(&x, &w, d, 1e-6);
        for t in [1, 2, 63, 65] {
            let from = (200 - t) * d;
            assert_same_bits("y", &run(&x[from..], &w, d, 1e-6).0, &all[from..]);
        }
        assert_threads_agree("backward", || {
            let (mut dx, mut dw) = (vec![0.0; t * d], vec![0.0; d]);
            backward(&mut dx, &mut dw, &dy, &x, &w, &rstd, d, false);
            [run(&x, &w, d, 1e-6).0, dx, dw].concat()
        });
    }

    #[test]
    fn zeros_and_huge_rows_stay_finite() {
        let x = [vec![0.0; 8], vec![1e15; 8]].concat();
        let (y, rstd) = run(&x, &[1.0; 8], 8, 1e-6);
        let (mut dx, mut dw) = (vec![0.0; 16], vec![0.0; 8]);
        backward(&mut dx, &mut dw, &[1.0; 16], &x, &[1.0; 8], &rstd, 8, false);
        assert!(y.iter().chain(&dx).chain(&dw).all(|v| v.is_finite()), "{y:?} {dx:?} {dw:?}");
        assert_eq!(y[8..], [1.0; 8]);
    }
}
