//! Rotary positions: tables of cosines and sines (text M-RoPE and the vision tower's 2-D one) and their application.
//!
//! Follows transformers' Qwen2.5-VL: frequencies and angles are rounded to f32 at the points where it rounds them, since
//! at a position of some thousands one rounding of the angle shows in the fourth digit. The rotate-half convention: element
//! i of a head turns together with element i + K/2.

use crate::vector::dispatch;
use rayon::prelude::*;
use std::ops::Range;

/// Cosine and sine of every angle, both halves of K filled.
///
/// # Shapes
/// cos, sin `[T, K]`.
pub struct Table {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub k: usize,
}

/// Some rows of a [`Table`].
#[derive(Clone, Copy)]
pub struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    k: usize,
}

impl Table {
    pub fn rows(&self, rows: Range<usize>) -> Angles<'_> {
        let values = rows.start * self.k..rows.end * self.k;
        Angles { cos: &self.cos[values.clone()], sin: &self.sin[values], k: self.k }
    }
}

/// Multimodal rotary table (Qwen2-VL, arXiv:2409.12191): frequency i takes its position from axis 0 (time), 1 (height)
/// or 2 (width) as `sections` lays them out over the K/2 frequencies.
///
/// # Shapes
/// positions: three axes of `[T]`; sections sum to K/2.
pub fn mrope(positions: [&[i32]; 3], k: usize, theta: f64, sections: [usize; 3]) -> Table {
    let half = k / 2;
    let t = positions[0].len();
    assert!(k.is_multiple_of(2) && k > 0, "rope: K={k} must be even");
    assert_eq!(sections.iter().sum::<usize>(), half, "rope: sections {sections:?} must sum to K/2={half}");
    assert!(
        positions.iter().all(|p| p.len() == t),
        "rope: the three axes differ in length: {:?}",
        positions.map(<[i32]>::len)
    );
    let freq = frequencies(k, theta);
    let axis: Vec<usize> = (0..3).flat_map(|a| std::iter::repeat_n(a, sections[a])).collect();
    table(t, k, |row, i| positions[axis[i]][row] as f32 * freq[i])
}

/// The vision tower's table: the first half of the K/2 angles turn with the patch's row, the second half with its column.
///
/// # Shapes
/// hw: (row, column) of each patch `[P]`; K divisible by 4; theta is 10000 in the family.
pub fn vision2d(hw: &[(u32, u32)], k: usize, theta: f64) -> Table {
    assert!(k.is_multiple_of(4) && k > 0, "rope: K={k} must be a multiple of 4");
    let quarter = k / 4;
    let freq = frequencies(k / 2, theta);
    table(hw.len(), k, |row, i| {
        let (h, w) = hw[row];
        if i < quarter { h as f32 * freq[i] } else { w as f32 * freq[i - quarter] }
    })
}

/// theta^(-2i/dim) for i < dim/2, rounded to f32 after the power and after the inverse.
fn frequencies(dim: usize, theta: f64) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        })
        .collect()
}

fn table(t: usize, k: usize, angle: impl Fn(usize, usize) -> f32 + Sync) -> Table {
    let half = k / 2;
    let (mut cos, mut sin) = (vec![0.0; t * k], vec![0.0; t * k]);
    cos.par_chunks_mut(k).zip(sin.par_chunks_mut(k)).with_min_len(16).enumerate().for_each(|(row, (cos, sin))| {
        for i in 0..half {
            let (s, c) = f64::from(angle(row, i)).sin_cos();
            (cos[i], sin[i]) = (c as f32, s as f32);
            (cos[i + half], sin[i + half]) = (c as f32, s as f32);
        }
    });
    Table { cos, sin, k }
}

/// Turns every head of x in place: x·cos + rotate_half(x)·sin.
///
/// # Shapes
/// x `[T, H, K]`; angles `[T, K]`.
pub fn apply(x: &mut [f32], angles: Angles, heads: usize) {
    turn(x, angles, heads, false);
}

/// The gradient of [`apply`] in place: turns by the opposite angle.
///
/// # Shapes
/// dx `[T, H, K]`; angles `[T, K]`.
pub fn apply_backward(dx: &mut [f32], angles: Angles, heads: usize) {
    turn(dx, angles, heads, true);
}

fn turn(x: &mut [f32], angles: Angles, heads: usize, back: bool) {
    let Angles { cos, sin, k } = angles;
    assert!(k > 0 && heads > 0, "rope: K={k}, H={heads}");
    assert_eq!(cos.len(), sin.len(), "rope: cos and sin differ in length");
    assert_eq!(
        x.len(),
        cos.len() * heads,
        "rope: x has {} numbers, expected [T={}, H={heads}, K={k}]",
        x.len(),
        cos.len() / k
    );
    const ROWS: usize = 32;
    // Below this waking other threads costs more than it saves.
    const WORTH_THREADS: usize = 1 << 15;
    if x.len() <= WORTH_THREADS {
        return turn_rows(x, cos, sin, heads, k, back);
    }
    x.par_chunks_mut(ROWS * heads * k)
        .zip(cos.par_chunks(ROWS * k))
        .zip(sin.par_chunks(ROWS * k))
        .for_each(|((x, cos), sin)| turn_rows(x, cos, sin, heads, k, back));
}

dispatch! { fn turn_rows(x: &mut [f32], cos: &[f32], sin: &[f32], heads: usize, k: usize, back: bool) = turn_body }
#[inline(always)]
fn turn_body<const LEVEL: u8>(x: &mut [f32], cos: &[f32], sin: &[f32], heads: usize, k: usize, back: bool) {
    let sign = if back { -1.0 } else { 1.0 };
    for ((row, cos), sin) in x.chunks_exact_mut(heads * k).zip(cos.chunks_exact(k)).zip(sin.chunks_exact(k)) {
        for head in row.chunks_exact_mut(k) {
            let (low, high) = head.split_at_mut(k / 2);
            // The table's halves are equal, so the first half serves both.
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x, y, s) = (*a, *b, s * sign);
                *a = x * c - y * s;
                *b = y * c + x * s;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{assert_close, assert_threads_agree, gradient, numbers, weighted, wide};
    use proptest::prelude::*;

    #[test]
    fn text_angles_by_hand() {
        // K=8, theta 16: frequencies 1, 1/2, 1/4, 1/8; sections give them to t, h, w, w.
        let table = mrope([&[3], &[4], &[8]], 8, 16.0, [1, 1, 2]);
        let angles = [3.0f64, 2.0, 2.0, 1.0, 3.0, 2.0, 2.0, 1.0];
        for (i, angle) in angles.iter().enumerate() {
            assert_eq!(table.cos[i], angle.cos() as f32, "cos {i}");
            assert_eq!(table.sin[i], angle.sin() as f32, "sin {i}");
        }
    }

    #[test]
    fn equal_positions_are_ordinary_rope() {
        let p: Vec<i32> = (0..50).collect();
        let table = mrope([&p, &p, &p], 128, 1e6, [16, 24, 24]);
        for (t, row) in table.cos.chunks_exact(128).enumerate() {
            for (i, &cos) in row.iter().enumerate().take(64) {
                let freq = 1.0 / (1e6f64.powf(f64::from(2.0 * i as f32 / 128.0)) as f32);
                assert_eq!(cos, f64::from(t as f32 * freq).cos() as f32);
            }
        }
    }

    #[test]
    fn vision_angles_by_hand() {
        // K=8: two frequencies for the row, two for the column: 1 and 1/10000^(2/4) = 1/100.
        let table = vision2d(&[(0, 0), (2, 5)], 8, 10_000.0);
        assert_eq!(table.cos[..8], [1.0; 8]);
        let angles = [2.0f64, 0.02, 5.0, 0.05, 2.0, 0.02, 5.0, 0.05];
        for (i, angle) in angles.iter().enumerate() {
            // The angle itself was rounded to f32 (5 · 6e-8).
            assert!((f64::from(table.sin[8 + i]) - angle.sin()).abs() < 3e-7, "sin {i}");
        }
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        let table = Table { cos: vec![0.0, 1.0, 0.0, 1.0], sin: vec![1.0, 0.0, 1.0, 0.0], k: 4 };
        let mut x = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0];
        apply(&mut x, table.rows(0..1), 2);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, -30.0, 20.0, 10.0, 40.0]);
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let (t, heads, k) = (3, 2, 12);
        let table = mrope([&[0, 5, 9], &[1, 2, 3], &[7, 7, 8]], k, 100.0, [2, 2, 2]);
        let (x, dy) = (numbers(1, t * heads * k), numbers(2, t * heads * k));
        let exact = |x: &[f64]| -> Vec<f64> {
            let mut y = Vec::new();
            for (row, x) in x.chunks_exact(heads * k).enumerate() {
                for head in x.chunks_exact(k) {
                    for i in 0..k {
                        let partner = if i < k / 2 { -head[i + k / 2] } else { head[i - k / 2] };
                        let (c, s) = (table.cos[row * k + i], table.sin[row * k + i]);
                        y.push(head[i] * f64::from(c) + partner * f64::from(s));
                    }
                }
            }
            y
        };
        let mut y = x.clone();
        apply(&mut y, table.rows(0..t), heads);
        // Two products of numbers in ±1.
        assert_close("y", &y, &exact(&wide(&x)), 2e-7);
        let mut dx = dy.clone();
        apply_backward(&mut dx, table.rows(0..t), heads);
        assert_close("dx", &dx, &gradient(&wide(&x), |x| weighted(&exact(x), &dy)), 5e-7);
    }

    #[test]
    fn threads_do_not_change_bits() {
        let p: Vec<i32> = (0..150).collect();
        assert_threads_agree("rope", || {
            let table = mrope([&p, &p, &p], 32, 1e4, [4, 6, 6]);
            let mut x = numbers(1, 150 * 3 * 32);
            apply(&mut x, table.rows(0..150), 3);
            x
        });
    }

    proptest! {
        #[test]
        fn backward_undoes_forward(seed in 0u64..1000, positions in prop::collection::vec((0i32..4000, 0i32..500, 0i32..500), 1..40), heads in 1usize..4) {
            let axes: [Vec<i32>; 3] = [
                positions.iter().map(|p| p.0).collect(),
                positions.iter().map(|p| p.1).collect(),
                positions.iter().map(|p| p.2).collect(),
            ];
            let table = mrope([&axes[0], &axes[1], &axes[2]], 16, 1e6, [2, 3, 3]);
            let x = numbers(seed, positions.len() * heads * 16);
            let mut y = x.clone();
            apply(&mut y, table.rows(0..positions.len()), heads);
            apply_backward(&mut y, table.rows(0..positions.len()), heads);
            // cos² + sin² is 1 to some 1e-7 in f32.
            assert_close("there and back", &y, &wide(&x), 1e-6);
        }
    }
}
