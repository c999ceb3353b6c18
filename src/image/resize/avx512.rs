//! The two passes with AVX-512 and its dot products of small whole numbers (VNNI): the same bits as [`super::avx2`] in half of the time.

use super::avx2::{self, Packed, STEP};
use super::{CHANNELS, HALF, PRECISION};
use std::arch::x86_64::*;

/// Rows that [`row_pass`] takes together.
pub(super) const TOGETHER: usize = 4;
/// Bytes a column's inner loop takes at a time, and source rows.
const BLOCK: usize = 64;
const TAPS: usize = 4;

pub(super) fn available() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vnni")
}

/// As [`avx2::row_pass`], two source rows to a register.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn row_pass(target: &mut [u8], source: [&[u8]; TOGETHER], packed: &Packed) {
    let count = packed.starts.len();
    let stride = count * CHANNELS;
    let reach = (packed.furthest + packed.length + avx2::SPARE) * CHANNELS;
    assert!(source.iter().all(|row| row.len() >= reach) && target.len() == TOGETHER * stride);
    let spread = _mm512_broadcast_i64x4(avx2::spread());
    let highs = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1);
    let lows = _mm512_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3, 2, 2, 2, 2, 3, 3, 3, 3);
    for (x, (&start, weights)) in packed.starts.iter().zip(packed.weights.chunks_exact(packed.length * 2)).enumerate() {
        let zero = _mm512_setzero_si512();
        // Rows 0 and 1, then rows 2 and 3: the sums with the high parts of the weights, and with the low ones.
        let (mut high_a, mut low_a, mut high_b, mut low_b) = (zero, zero, zero, zero);
        let mut at = start * CHANNELS;
        for weights in weights.chunks_exact(2 * STEP) {
            // SAFETY: the chunk holds 8 i16, 16 bytes. No window starts after `furthest`, so of a row the last of these loads ends
            // within `reach`, which was asserted: at most at 3 (start + length - 4) + 16 <= 3 (start + length + SPARE).
            let (both, rows) = unsafe {
                let load = |row: &[u8]| _mm_loadu_si128(row.as_ptr().add(at).cast());
                (
                    _mm512_castsi128_si512(_mm_loadu_si128(weights.as_ptr().cast())),
                    [load(source[0]), load(source[1]), load(source[2]), load(source[3])],
                )
            };
            let (high, low) = (_mm512_permutexvar_epi32(highs, both), _mm512_permutexvar_epi32(lows, both));
            let a = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(rows[0]), 0xff00, rows[1]);
            let b = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(rows[2]), 0xff00, rows[3]);
            let (a, b) = (_mm512_shuffle_epi8(a, spread), _mm512_shuffle_epi8(b, spread));
            high_a = _mm512_dpwssd_epi32(high_a, a, high);
            low_a = _mm512_dpwssd_epi32(low_a, a, low);
            high_b = _mm512_dpwssd_epi32(high_b, b, high);
            low_b = _mm512_dpwssd_epi32(low_b, b, low);
            at += STEP * CHANNELS;
        }
        // Packing saturates: that is the clipping to 0..255. In the first quarter rows 0 and 2, in the third 1 and 3.
        let levels = _mm512_packs_epi32(level(high_a, low_a), level(high_b, low_b));
        let levels = _mm512_packus_epi16(levels, levels);
        let even = _mm_cvtsi128_si64(_mm512_castsi512_si128(levels)) as u64;
        let odd = _mm_cvtsi128_si64(_mm512_extracti32x4_epi32::<2>(levels)) as u64;
        let pixels = [even as u32, odd as u32, (even >> 32) as u32, (odd >> 32) as u32];
        for (row, pixel) in target.chunks_exact_mut(stride).zip(pixels.map(u32::to_le_bytes)) {
            let to = &mut row[x * CHANNELS..];
            // A fourth byte is overwritten by the next pixel; the last pixel has no next.
            match to.first_chunk_mut::<4>() {
                Some(to) => *to = pixel,
                None => to.copy_from_slice(&pixel[..CHANNELS]),
            }
        }
    }
}

/// From the two sums of two rows, whose windows' halves stand in neighbouring quarters.
#[inline]
#[target_feature(enable = "avx512f")]
fn level(high: __m512i, low: __m512i) -> __m512i {
    let sum = _mm512_add_epi32(_mm512_slli_epi32::<{ avx2::LOW as u32 }>(high), low);
    let sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4::<0b10_11_00_01>(sum, sum));
    _mm512_srai_epi32::<PRECISION>(_mm512_add_epi32(sum, _mm512_set1_epi32(HALF)))
}

/// One output row from the source rows of its window.
///
/// # Shapes
/// source: `weights.len()` rows of `target.len()` bytes, `stride` apart.
pub(super) fn column_pass(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    assert!(available(), "called on a processor without AVX-512");
    // SAFETY: what it needs is there, asserted above.
    unsafe { column_pass_wide(target, source, stride, weights) }
}

/// A weight as `a · 65536 + b · 256 + c`, each of 8 bits: bytes of pixels are multiplied by bytes.
fn split(weight: i32) -> [i8; 3] {
    let c = weight as i8;
    let above = (weight - i32::from(c)) >> 8;
    let b = above as i8;
    [((above - i32::from(b)) >> 8) as i8, b, c]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn column_pass_wide(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    // For each four source rows the parts of their weights side by side; where there are no four, the last ones count 0 times.
    let parts: Vec<[i32; 3]> = weights
        .chunks(TAPS)
        .map(|weights| {
            let mut bytes = [[0u8; TAPS]; 3];
            for (k, &weight) in weights.iter().enumerate() {
                split(weight).into_iter().enumerate().for_each(|(part, byte)| bytes[part][k] = byte as u8);
            }
            bytes.map(i32::from_le_bytes)
        })
        .collect();
    let mut blocks = target.chunks_exact_mut(BLOCK);
    let mut at = 0;
    for block in &mut blocks {
        let mut sums = [[_mm512_setzero_si512(); 3]; 4];
        for (group, parts) in parts.iter().enumerate() {
            let row = |k: usize| {
                let bytes = &source[(group * TAPS + k).min(weights.len() - 1) * stride + at..][..BLOCK];
                // SAFETY: the slice holds 64 bytes.
                unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
            };
            let rows = [row(0), row(1), row(2), row(3)];
            let (low, high) = (_mm512_unpacklo_epi8(rows[0], rows[1]), _mm512_unpackhi_epi8(rows[0], rows[1]));
            let (low2, high2) = (_mm512_unpacklo_epi8(rows[2], rows[3]), _mm512_unpackhi_epi8(rows[2], rows[3]));
            // The four rows' bytes of each column side by side, sixteen columns to a register.
            let columns = [
                _mm512_unpacklo_epi16(low, low2),
                _mm512_unpackhi_epi16(low, low2),
                _mm512_unpacklo_epi16(high, high2),
                _mm512_unpackhi_epi16(high, high2),
            ];
            let parts = parts.map(|part| _mm512_set1_epi32(part));
            for (sums, columns) in sums.iter_mut().zip(columns) {
                for (sum, part) in sums.iter_mut().zip(parts) {
                    *sum = _mm512_dpbusd_epi32(*sum, columns, part);
                }
            }
        }
        let levels = sums.map(|[a, b, c]| {
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<16>(a), _mm512_slli_epi32::<8>(b));
            let sum = _mm512_add_epi32(sum, _mm512_add_epi32(c, _mm512_set1_epi32(HALF)));
            _mm512_srai_epi32::<PRECISION>(sum)
        });
        // Packing undoes the order of unpacking, and saturates.
        let low = _mm512_packs_epi32(levels[0], levels[1]);
        let high = _mm512_packs_epi32(levels[2], levels[3]);
        // SAFETY: the block holds 64 bytes.
        unsafe { _mm512_storeu_si512(block.as_mut_ptr().cast(), _mm512_packus_epi16(low, high)) };
        at += BLOCK;
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        avx2::column_pass(rest, &source[at..], stride, weights);
    }
}
