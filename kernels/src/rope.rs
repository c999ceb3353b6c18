//! Rotary positions: tables of cosines and sines (text M-RoPE and the vision tower's 2-D one) and their application.
//!
//! Follows transformers' Qwen2.5-VL: frequencies and angles are rounded to f32 at the points where it rounds them, since
//! at a position of some thousands one rounding of the angle shows in the fourth digit. The rotate-half convention: element
//! i of a head turns together with element i + K/2.

use crate::vector::dispatch;
use rayon::prelude::*;

/// Cosine and sine of every angle, both halves of K filled.
///
/// # Shapes
/// cos, sin `[T, K]`.
pub struct Table {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub k: usize,
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
    assert_eq!(
        sections.iter().sum::<usize>(),
        half,
        "rope: sections {sections:?} must sum to K/2={half}"
    );
    assert!(
        positions.iter().all(|p| p.len() == t),
        "rope: the three axes differ in length: {:?}",
        positions.map(<[i32]>::len)
    );
    let freq = frequencies(k, theta);
    let axis: Vec<usize> = (0..3)
        .flat_map(|a| std::iter::repeat_n(a, sections[a]))
        .collect();
    table(t, k, |row, i| positions[axis[i]][row] as f32 * freq[i])
}

/// The vision tower's table: the first half of the K/2 angles turn with the patch's row, the second half with its column.
///
/// # Shapes
/// hw: (row, column) of each patch `[P]`; K divisible by 4; theta is 10000 in the family.
pub fn vision2d(hw: &[(u32, u32)], k: usize, theta: f64) -> Table {
    assert!(
        k.is_multiple_of(4) && k > 0,
        "rope: K={k} must be a multiple of 4"
    );
    let quarter = k / 4;
    let freq = frequencies(k / 2, theta);
    table(hw.len(), k, |row, i| {
        let (h, w) = hw[row];
        if i < quarter {
            h as f32 * freq[i]
        } else {
            w as f32 * freq[i - quarter]
        }
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
    cos.par_chunks_mut(k)
        .zip(sin.par_chunks_mut(k))
        .with_min_len(16)
        .enumerate()
        .for_each(|(row, (cos, sin))| {
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
/// x `[T, H, K]`; table `[T, K]`.
pub fn apply(x: &mut [f32], table: &Table, heads: usize) {
    turn(x, table, heads, false);
}

/// The gradient of [`apply`] in place: turns by the opposite angle.
///
/// # Shapes
/// dx `[T, H, K]`; table `[T, K]`.
pub fn apply_backward(dx: &mut [f32], table: &Table, heads: usize) {
    turn(dx, table, heads, true);
}

fn turn(x: &mut [f32], table: &Table, heads: usize, back: bool) {
    let k = table.k;
    assert_eq!(
        table.cos.len(),
        table.sin.len(),
        "rope: cos and sin differ in length"
    );
    assert_eq!(
        x.len(),
        table.cos.len() * heads,
        "rope: x has {} numbers, expected [T={}, H={heads}, K={k}]",
        x.len(),
        table.cos.len() / k
    );
    const ROWS: usize = 32;
    if x.is_empty() {
        return;
    }
    x.par_chunks_mut(ROWS * heads * k)
        .zip(table.cos.par_chunks(ROWS * k))
        .zip(table.sin.par_chunks(ROWS * k))
        .for_each(|((x, cos), sin)| turn_rows(x, cos, sin, heads, k, back));
}

dispatch! { fn turn_rows(x: &mut [f32], cos: &[f32], sin: &[f32], heads: usize, k: usize, back: bool) = turn_body }
#[inline(always)]
fn turn_body<const LEVEL: u8>(
    x: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    heads: usize,
    k: usize,
    back: bool,
) {
    let sign = if back { -1.0 } else { 1.0 };
    for ((row, cos), sin) in x
        .chunks_exact_mut(heads * k)
        .zip(cos.chunks_exact(k))
        .zip(sin.chunks_exact(k))
    {
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
