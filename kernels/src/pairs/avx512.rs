//! Sixteen rows of sixteen words turned round with AVX-512, and f32 in pairs: rounded with AVX512-BF16, or split into parts.

use super::{Parts, STEP};
use std::arch::x86_64::*;

const SIDE: usize = 16;
/// Rows between what is split and what is asked for: weights come from afar.
const AHEAD: usize = 24;

/// to[c, r] = from[r, c] for a block of `SIDE` by `SIDE`: pairs of rows, then fours, then lanes of four twice.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(to: &mut [u32], to_stride: usize, from: &[u32], from_stride: usize) {
    let last = SIDE - 1;
    assert!(
        from.len() >= last * from_stride + SIDE && to.len() >= last * to_stride + SIDE,
        "pairs: a side is too short for a block"
    );
    // SAFETY: the assertion puts `SIDE` words behind each row's start.
    let rows = std::array::from_fn(|r| unsafe { _mm512_loadu_si512(from.as_ptr().add(r * from_stride).cast()) });
    // SAFETY: and behind each that is written.
    unsafe { turn(to.as_mut_ptr(), to_stride, rows) };
}

/// The same of rows whose words lie at any address as pairs of bf16; `from_stride` counts these.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_stored(to: &mut [u32], to_stride: usize, from: &[[u8; 2]], from_stride: usize) {
    let last = SIDE - 1;
    assert!(
        from.len() >= last * from_stride + 2 * SIDE && to.len() >= last * to_stride + SIDE,
        "pairs: a side is too short for a block"
    );
    // SAFETY: the assertion puts `SIDE` words behind each row's start.
    let rows = std::array::from_fn(|r| unsafe { _mm512_loadu_si512(from.as_ptr().add(r * from_stride).cast()) });
    // SAFETY: and behind each that is written.
    unsafe { turn(to.as_mut_ptr(), to_stride, rows) };
}

/// # Safety
/// Behind `to` are `SIDE` rows of `SIDE` words, `to_stride` apart.
#[target_feature(enable = "avx512f")]
unsafe fn turn(to: *mut u32, to_stride: usize, a: [__m512i; SIDE]) {
    let b: [__m512i; SIDE] = std::array::from_fn(|i| {
        let (x, y) = (a[i / 2 * 2], a[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    // Lane l of `c[4 i + j]` holds column 4 l + j of rows 4 i to 4 i + 3.
    let c: [__m512i; SIDE] = std::array::from_fn(|i| {
        let first = i / 4 * 4 + i % 4 / 2;
        let (x, y) = (b[first], b[first + 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    for j in 0..4 {
        let even = [_mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j])];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j])];
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
            _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
        ];
        for (l, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller has room for it.
            unsafe { _mm512_storeu_si512(to.add((4 * l + j) * to_stride).cast(), column) };
        }
    }
}

/// [`super::rows_into`] of whole steps; returns how many numbers of each row these were.
///
/// # Panics
/// A side is too short.
pub(super) fn rows_into(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, m: usize, parts: Parts) -> usize {
    match parts {
        Parts::One if !is_x86_feature_detected!("avx512bf16") => return 0,
        // SAFETY: the processor has what it takes.
        Parts::One => unsafe { round_rows(to, to_stride, x, x_stride, m) },
        // SAFETY: the caller's level has it.
        Parts::Three => unsafe { split_rows(to, to_stride, x, x_stride, m) },
    }
    m / (2 * STEP) * 2 * STEP
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn round_rows(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, m: usize) {
    for (to, x) in to.chunks_mut(to_stride).zip(x.chunks(x_stride)) {
        let x = x[..m].as_chunks::<{ 2 * STEP }>().0;
        for (to, x) in to.as_chunks_mut::<STEP>().0[..x.len()].iter_mut().zip(x) {
            // SAFETY: both are as many numbers as are read and written.
            unsafe {
                let (lower, upper) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(STEP)));
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(upper, lower));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), both);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn split_rows(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, m: usize) {
    // The upper halves of thirty-two numbers, one after the other.
    let places = halves(|i| 2 * i + 1);
    for (to, x) in to.chunks_mut(to_stride).zip(x.chunks(x_stride)) {
        let x = x[..m].as_chunks::<{ 2 * STEP }>().0;
        for (to, x) in to.as_chunks_mut::<{ 3 * STEP }>().0[..x.len()].iter_mut().zip(x) {
            // SAFETY: as many numbers as are read.
            let [lower, upper] = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(STEP))] };
            for (part, (lower, upper)) in split(lower).into_iter().zip(split(upper)).enumerate() {
                let words = _mm512_permutex2var_epi16(lower, places, upper);
                // SAFETY: there is a step for each part.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(part * STEP).cast(), words) };
            }
        }
    }
}

/// [`super::split`] of sixteen numbers, lower halves left as they come.
#[target_feature(enable = "avx512f")]
fn split(x: __m512) -> [__m512i; 3] {
    let (half, upper) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0xffff_0000_u32 as i32));
    let first = _mm512_add_epi32(_mm512_castps_si512(x), half);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(first, upper)));
    let second = _mm512_add_epi32(_mm512_castps_si512(rest), half);
    let last = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_and_si512(second, upper)));
    [first, second, _mm512_castps_si512(last)]
}

#[target_feature(enable = "avx512f")]
fn halves(place: impl Fn(usize) -> usize) -> __m512i {
    let places: [u16; 2 * SIDE] = std::array::from_fn(|i| place(i) as u16);
    // SAFETY: an array of 64 bytes.
    unsafe { _mm512_loadu_si512(places.as_ptr().cast()) }
}

/// [`super::columns_into`] of the columns that fill vectors; returns how many.
///
/// # Panics
/// A side is too short.
pub(super) fn columns_into(
    to: &mut [u32],
    to_stride: usize,
    x: &[f32],
    x_stride: usize,
    rows: usize,
    cols: usize,
    parts: Parts,
) -> usize {
    let whole = cols / SIDE * SIDE;
    if rows == 0 || whole == 0 {
        return whole;
    }
    let last = parts.places(rows.div_ceil(2) - 1).last().unwrap_or_default();
    assert!(
        x.len() >= (rows - 1) * x_stride + whole && to.len() >= last * to_stride + whole,
        "pairs: a side is too short for {rows} rows of {cols} columns"
    );
    match parts {
        Parts::One if !is_x86_feature_detected!("avx512bf16") => return 0,
        // SAFETY: the processor has what it takes; the assertion is about the sides.
        Parts::One => unsafe { round_columns(to, to_stride, x, x_stride, rows, whole) },
        // SAFETY: the caller's level has it; the assertion is about the sides.
        Parts::Three => unsafe { split_columns(to, to_stride, x, x_stride, rows, whole) },
    }
    whole
}

/// # Safety
/// x has `rows` rows of `whole` numbers, and `to` one of words for each pair of them.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_columns(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, rows: usize, whole: usize) {
    // Halves 0 to 15 are the first row's, 16 to 31 the second's: a word takes one of each.
    let places = halves(|i| i / 2 + i % 2 * SIDE);
    for i in 0..rows.div_ceil(2) {
        for c in (0..whole).step_by(SIDE) {
            // SAFETY: the caller's sides have `SIDE` numbers from c on.
            unsafe {
                let first = x.as_ptr().add(2 * i * x_stride + c);
                let (lower, mut upper) = (_mm512_loadu_ps(first), _mm512_setzero_ps());
                if 2 * i + 1 < rows {
                    upper = _mm512_loadu_ps(first.add(x_stride));
                }
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(upper, lower));
                let words = _mm512_permutexvar_epi16(places, both);
                _mm512_storeu_si512(to.as_mut_ptr().add(i * to_stride + c).cast(), words);
            }
        }
    }
}

/// # Safety
/// x has `rows` rows of `whole` numbers, and `to` three of words for each pair of them.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split_columns(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, rows: usize, whole: usize) {
    for i in 0..rows.div_ceil(2) {
        let start = (Parts::Three.whole(i) + i % STEP) * to_stride;
        for c in (0..whole).step_by(SIDE) {
            // SAFETY: the caller's sides have `SIDE` numbers from c on; what is asked for ahead may lie anywhere.
            unsafe {
                let first = x.as_ptr().add(2 * i * x_stride + c);
                let (lower, mut upper) = (_mm512_loadu_ps(first), _mm512_setzero_ps());
                if 2 * i + 1 < rows {
                    upper = _mm512_loadu_ps(first.add(x_stride));
                }
                for ahead in [AHEAD, AHEAD + 1] {
                    _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(ahead * x_stride).cast());
                }
                for (part, (lower, upper)) in split(lower).into_iter().zip(split(upper)).enumerate() {
                    // Every other half is the second row's.
                    let words = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(lower), upper);
                    _mm512_storeu_si512(to.as_mut_ptr().add(start + part * STEP * to_stride + c).cast(), words);
                }
            }
        }
    }
}
