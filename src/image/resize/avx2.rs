//! The two passes with AVX2, several times as fast as the plain ones and the same bits: all sums are whole numbers.
//!
//! A weight of 24 bits is split into `high · 4096 + low`, both of 16 bits, because the processor multiplies 16 numbers of 16 bits and adds
//! them in pairs in one instruction. What must stay true: no read past a slice (each `SAFETY` says why), and every entry asks
//! [`available`] first.

use super::{CHANNELS, HALF, PRECISION, Region, Windows, avx512};
use foveate_kernels::memory::Rows;
use rayon::prelude::*;
use std::arch::x86_64::*;

/// Bits of the low part of a split weight.
pub(super) const LOW: i32 = 12;
/// Pixels a row's inner loop takes at a time.
pub(super) const STEP: usize = 4;
/// It reads 16 bytes for those 4 pixels: this many pixels more must follow the row in memory (what they are does not matter).
pub(super) const SPARE: usize = 2;
/// Rows handled together, so that a window's weights are loaded once for all of them.
const TOGETHER: usize = avx512::TOGETHER;
/// Bytes a column's inner loop takes at a time.
const BLOCK: usize = 16;

pub(super) fn available() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

fn split(weight: i32) -> (i16, i16) {
    let high = (weight + (1 << (LOW - 1))) >> LOW;
    (high as i16, (weight - (high << LOW)) as i16)
}

/// Windows for the row pass: each `length` pixels long and inside a row.
pub(super) struct Packed {
    pub(super) starts: Vec<usize>,
    /// The largest of them.
    pub(super) furthest: usize,
    pub(super) length: usize,
    /// Per window and step of 4 pixels: the 4 high parts, then the 4 low parts.
    pub(super) weights: Vec<i16>,
}

impl Packed {
    /// `width` pixels in a source row, at least [`Packed::length`].
    fn new(windows: &Windows, width: usize) -> Packed {
        let length = Packed::length(windows);
        let mut starts = windows.starts.clone();
        let mut weights = vec![0; starts.len() * length * 2];
        for (i, out) in weights.chunks_exact_mut(length * 2).enumerate() {
            let (start, w) = windows.of(i);
            // At the right edge the window moves left and begins with weights of 0.
            let shift = (start + length).saturating_sub(width);
            starts[i] = start - shift;
            for (k, &w) in w.iter().enumerate() {
                let at = shift + k;
                let (high, low) = split(w);
                out[at / STEP * 2 * STEP + at % STEP] = high;
                out[at / STEP * 2 * STEP + STEP + at % STEP] = low;
            }
        }
        let furthest = starts.iter().copied().max().unwrap_or(0);
        Packed { starts, furthest, length, weights }
    }

    fn length(windows: &Windows) -> usize {
        windows.taps.next_multiple_of(STEP)
    }
}

/// The pass along rows: the region at its own height and a new width.
///
/// `wide`: with [`avx512`].
pub(super) fn resize_rows(region: Region<'_>, width: usize, windows: &Windows, wide: bool) -> Vec<u8> {
    assert!(!wide || avx512::available(), "called on a processor without AVX-512");
    assert!(available(), "called on a processor without AVX2");
    let padded_width = region.width.max(Packed::length(windows));
    let row_len = (padded_width + SPARE) * CHANNELS;
    let begin = |y: usize| (region.top + y) * region.stride + region.left * CHANNELS;
    // Rows are used where they lie. Only where no SPARE pixels follow (the picture's last row), or where one is shorter than a window
    // (a small picture), it is copied, with zeros behind.
    let in_place = |y: usize| padded_width == region.width && begin(y) + row_len <= region.data.len();
    let first_copied = (0..region.height).find(|&y| !in_place(y)).unwrap_or(region.height);
    let mut copies = vec![0; (region.height - first_copied) * row_len];
    for (i, row) in copies.chunks_exact_mut(row_len).enumerate() {
        row[..region.width * CHANNELS].copy_from_slice(region.row(first_copied + i));
    }
    let source = |y: usize| match y.checked_sub(first_copied) {
        Some(i) => &copies[i * row_len..][..row_len],
        None => &region.data[begin(y)..][..row_len],
    };
    let packed = Packed::new(windows, padded_width);
    let stride = width * CHANNELS;
    let mut out = Rows::new(region.height * stride);
    out.chunks(TOGETHER * stride).with_min_len(4).enumerate().for_each(|(group, target)| {
        let (y, target) = (group * TOGETHER, target.clear());
        // SAFETY: AVX2 is there, and AVX-512 where it is asked for, both asserted above.
        unsafe {
            if target.len() == TOGETHER * stride {
                let rows = [source(y), source(y + 1), source(y + 2), source(y + 3)];
                if wide { avx512::row_pass(target, rows, &packed) } else { row_pass(target, rows, &packed) }
            } else {
                for (i, target) in target.chunks_exact_mut(stride).enumerate() {
                    row_pass(target, [source(y + i)], &packed);
                }
            }
        }
    });
    out.done()
}

/// The shuffle that leaves in each 128-bit half two pixels, each channel's two values side by side and widened to 16 bits:
/// r0 r1 g0 g1 b0 b1 - -.
#[target_feature(enable = "avx2")]
pub(super) fn spread() -> __m256i {
    _mm256_setr_epi8(
        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, //
        6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1,
    )
}

/// # Shapes
/// target: N rows of `packed.starts.len()` pixels; source: N rows with SPARE pixels behind.
#[target_feature(enable = "avx2")]
fn row_pass<const N: usize>(target: &mut [u8], source: [&[u8]; N], packed: &Packed) {
    let length = packed.length;
    let stride = packed.starts.len() * CHANNELS;
    let spread = spread();
    let (highs, lows) = (_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3));
    for (x, (&start, weights)) in packed.starts.iter().zip(packed.weights.chunks_exact(length * 2)).enumerate() {
        let windows = source.map(|row| &row[start * CHANNELS..][..(length + SPARE) * CHANNELS]);
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (k, weights) in weights.chunks_exact(2 * STEP).enumerate() {
            // SAFETY: the chunk holds 8 i16, 16 bytes.
            let both = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(weights.as_ptr().cast())) };
            let (high, low) = (_mm256_permutevar8x32_epi32(both, highs), _mm256_permutevar8x32_epi32(both, lows));
            for n in 0..N {
                // SAFETY: k < length / 4, so 12 k + 16 <= 3 length + 4 <= 3 (length + SPARE), the window's bytes.
                let bytes = unsafe { _mm_loadu_si128(windows[n].as_ptr().add(k * STEP * CHANNELS).cast()) };
                let pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);
                sums[n][0] = _mm256_add_epi32(sums[n][0], _mm256_madd_epi16(pixels, high));
                sums[n][1] = _mm256_add_epi32(sums[n][1], _mm256_madd_epi16(pixels, low));
            }
        }
        for n in 0..N {
            let sum = joined(sums[n][0], sums[n][1]);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let level = _mm_srai_epi32::<{ PRECISION as i32 }>(_mm_add_epi32(sum, _mm_set1_epi32(HALF)));
            // Packing saturates: that is the clipping to 0..255.
            let level = _mm_packus_epi16(_mm_packs_epi32(level, level), level);
            let pixel = _mm_cvtsi128_si32(level).to_le_bytes();
            target[n * stride + x * CHANNELS..][..CHANNELS].copy_from_slice(&pixel[..CHANNELS]);
        }
    }
}

/// One output row from the source rows of its window.
///
/// # Shapes
/// source: `weights.len()` rows of `target.len()` bytes, `stride` apart.
pub(super) fn column_pass(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    assert!(available(), "called on a processor without AVX2");
    // SAFETY: AVX2 is there, asserted above.
    unsafe { column_pass_wide(target, source, stride, weights) }
}

#[target_feature(enable = "avx2")]
fn column_pass_wide(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    let mut blocks = target.chunks_exact_mut(BLOCK);
    let mut at = 0;
    for block in &mut blocks {
        let mut sums = [[_mm256_setzero_si256(); 2]; 2];
        for (pair, w) in weights.chunks(2).enumerate() {
            let row = |k: usize| {
                let bytes = &source[(pair * 2 + k) * stride + at..][..BLOCK];
                // SAFETY: the slice holds 16 bytes.
                unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
            };
            // A last row without a partner is paired with itself at weight 0.
            let (first, second) = (row(0), row(w.len() - 1));
            let (w0, w1) = (split(w[0]), split(if w.len() == 2 { w[1] } else { 0 }));
            let pair_of = |a: i16, b: i16| _mm256_set1_epi32(i32::from(a as u16) | (i32::from(b) << 16));
            let (high, low) = (pair_of(w0.0, w1.0), pair_of(w0.1, w1.1));
            let halves = [_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)];
            for (sums, half) in sums.iter_mut().zip(halves) {
                let pixels = _mm256_cvtepu8_epi16(half);
                sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(pixels, high));
                sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(pixels, low));
            }
        }
        let eight = |sums: [__m256i; 2]| {
            let sum = _mm256_add_epi32(joined(sums[0], sums[1]), _mm256_set1_epi32(HALF));
            let level = _mm256_srai_epi32::<{ PRECISION as i32 }>(sum);
            _mm_packs_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256::<1>(level))
        };
        let levels = _mm_packus_epi16(eight(sums[0]), eight(sums[1]));
        // SAFETY: the block holds 16 bytes.
        unsafe { _mm_storeu_si128(block.as_mut_ptr().cast(), levels) };
        at += BLOCK;
    }
    let rest = blocks.into_remainder();
    if !rest.is_empty() {
        super::column_pass(rest, &source[at..], stride, weights);
    }
}

/// `high · 4096 + low`. A high sum may pass 32 bits once multiplied, but the total never does, and the wrapping cancels.
#[target_feature(enable = "avx2")]
fn joined(high: __m256i, low: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_slli_epi32::<LOW>(high), low)
}
