//! Bicubic resizing, bit for bit as Pillow's `Image.resize((w, h), BICUBIC)` on 8-bit RGB, which is what the published
//! processors train with.
//!
//! It hides the fixed-point arithmetic and the instruction sets. What must stay true: the same bytes as Pillow for every size
//! (tests/golden/resize), and for any number of threads.
//!
//! The method, as Pillow's manual describes it: a convolution with Keys' cubic (a = -1/2, Keys 1981), stretched when
//! shrinking so that every source pixel counts (antialiasing); first along rows, then along columns; weights
//! normalised, then rounded to 22 bits after the point; the rows rounded to 8 bits in between; a pass that changes nothing is left out.

use crate::geometry::Size;
use rayon::prelude::*;

/// Bits after the point of a weight: 32, less 8 of the pixel, less 2 for weights over 1 and the sign.
const PRECISION: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION - 1);
/// Reach of the cubic at scale 1, pixels to either side.
const REACH: f64 = 2.0;
const CHANNELS: usize = 3;
/// Source pixels a row's inner loop takes at a time: 8 pixels of 3 channels are three full 256-bit registers of i32, so
/// every lane always meets the same channel.
const STEP: usize = 8;
const LANES: usize = STEP * CHANNELS;
/// Bytes a column's inner loop takes at a time.
const BLOCK: usize = 32;

/// A rectangle of 8-bit RGB inside a larger picture, without copying it.
#[derive(Clone, Copy)]
pub(super) struct Region<'a> {
    /// The whole picture, rows of `stride` bytes.
    pub data: &'a [u8],
    pub stride: usize,
    /// The rectangle's corner and size, pixels.
    pub left: usize,
    pub top: usize,
    pub width: usize,
    pub height: usize,
}

impl<'a> Region<'a> {
    fn row(&self, y: usize) -> &'a [u8] {
        let start = (self.top + y) * self.stride + self.left * CHANNELS;
        &self.data[start..start + self.width * CHANNELS]
    }
}

/// For each output position, the first source position it draws on and the weights of that one and the following.
struct Windows {
    starts: Vec<usize>,
    /// `taps` fixed-point weights per output position, zeros after the last that counts.
    weights: Vec<i32>,
    counts: Vec<usize>,
    taps: usize,
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

impl Windows {
    /// From `source` positions to `target`, both at least 1.
    fn new(source: usize, target: usize) -> Windows {
        let scale = source as f64 / target as f64;
        let stretch = scale.max(1.0);
        let support = REACH * stretch;
        let taps = support.ceil() as usize * 2 + 1;
        let mut starts = Vec::with_capacity(target);
        let mut counts = Vec::with_capacity(target);
        let mut weights = vec![0; target * taps];
        let mut exact = vec![0.0; taps];
        for (i, fixed) in weights.chunks_exact_mut(taps).enumerate() {
            let center = (i as f64 + 0.5) * scale;
            // Truncation towards 0 after adding a half, and multiplication by 1/stretch rather than division: as Pillow does, for its bits.
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(source);
            let count = end - start;
            let mut sum = 0.0;
            for (k, w) in exact[..count].iter_mut().enumerate() {
                *w = cubic(((k + start) as f64 - center + 0.5) * (1.0 / stretch));
                sum += *w;
            }
            for (w, f) in exact[..count].iter_mut().zip(fixed) {
                if sum != 0.0 {
                    *w /= sum;
                }
                let scaled = *w * f64::from(1 << PRECISION);
                *f = (scaled + if *w < 0.0 { -0.5 } else { 0.5 }) as i32;
            }
            starts.push(start);
            counts.push(count);
        }
        Windows {
            starts,
            weights,
            counts,
            taps,
        }
    }

    fn of(&self, i: usize) -> (usize, &[i32]) {
        (
            self.starts[i],
            &self.weights[i * self.taps..][..self.counts[i]],
        )
    }

    /// The same windows laid out for [`row_pass`]: each a whole number of [`STEP`]s long and inside a row of
    /// `padded_width` pixels, each weight three times in a row (once a channel).
    fn for_rows(&self, padded_width: usize) -> (Vec<usize>, Vec<i32>, usize) {
        let length = self.taps.next_multiple_of(STEP);
        let mut starts = self.starts.clone();
        let mut weights = vec![0; starts.len() * length * CHANNELS];
        for (i, out) in weights.chunks_exact_mut(length * CHANNELS).enumerate() {
            let (start, w) = self.of(i);
            // At the right edge the window moves left and begins with zeros.
            let shift = (start + length).saturating_sub(padded_width);
            starts[i] = start - shift;
            for (three, &w) in out[shift * CHANNELS..].chunks_exact_mut(CHANNELS).zip(w) {
                three.fill(w);
            }
        }
        (starts, weights, length)
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// `N` rows at once, so that a window's weights are loaded once for all of them.
///
/// # Shapes
/// source: N rows of at least `padded_width` × 3; target: N rows of `starts.len()` × 3.
#[inline(always)]
fn row_pass<const N: usize>(
    target: &mut [u8],
    source: [&[u8]; N],
    starts: &[usize],
    weights: &[i32],
    length: usize,
) {
    let width = starts.len() * CHANNELS;
    for (x, (&start, w)) in starts
        .iter()
        .zip(weights.chunks_exact(length * CHANNELS))
        .enumerate()
    {
        let mut sums = [[0i32; LANES]; N];
        let windows: [&[u8]; N] = source.map(|row| &row[start * CHANNELS..][..length * CHANNELS]);
        for (k, w) in w.chunks_exact(LANES).enumerate() {
            for n in 0..N {
                let pixels = &windows[n][k * LANES..][..LANES];
                for lane in 0..LANES {
                    sums[n][lane] += w[lane] * i32::from(pixels[lane]);
                }
            }
        }
        for n in 0..N {
            for c in 0..CHANNELS {
                let sum: i32 = (0..STEP).map(|s| sums[n][s * CHANNELS + c]).sum();
                target[n * width + x * CHANNELS + c] = clip(sum + HALF);
            }
        }
    }
}

/// One output row from the source rows of its window.
///
/// # Shapes
/// source: `weights.len()` rows of `target.len()` bytes, `stride` apart.
#[inline(always)]
fn column_pass(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    let width = target.len();
    let mut at = 0;
    while at + BLOCK <= width {
        let mut sums = [HALF; BLOCK];
        for (k, &w) in weights.iter().enumerate() {
            let pixels = &source[k * stride + at..][..BLOCK];
            for lane in 0..BLOCK {
                sums[lane] += w * i32::from(pixels[lane]);
            }
        }
        for (t, sum) in target[at..at + BLOCK].iter_mut().zip(sums) {
            *t = clip(sum);
        }
        at += BLOCK;
    }
    for x in at..width {
        let sum = weights.iter().enumerate().fold(HALF, |sum, (k, &w)| {
            sum + w * i32::from(source[k * stride + x])
        });
        target[x] = clip(sum);
    }
}

/// Compiles a pass for AVX2 as well and picks at run time. Integer sums: the same bits either way.
macro_rules! dispatched {
    ($name:ident, $plain:ident $(::<$n:literal>)?, ($($arg:ident: $type:ty),*)) => {
        fn $name($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($arg: $type),*) {
                    $plain$(::<$n>)?($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2, asked on the line above; the function needs nothing else.
                    return unsafe { wide($($arg),*) };
                }
            }
            $plain$(::<$n>)?($($arg),*)
        }
    };
}

dispatched!(one_row, row_pass::<1>, (target: &mut [u8], source: [&[u8]; 1], starts: &[usize], weights: &[i32], length: usize));
dispatched!(four_rows, row_pass::<4>, (target: &mut [u8], source: [&[u8]; 4], starts: &[usize], weights: &[i32], length: usize));
dispatched!(one_output_row, column_pass, (target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]));

/// The region shown at `size`, as 8-bit RGB rows. Both must be at least 1x1.
pub(super) fn resize(region: Region<'_>, size: Size) -> Vec<u8> {
    let (width, height) = (size.width as usize, size.height as usize);
    let columns = (height != region.height).then(|| Windows::new(region.height, height));
    let narrowed: Vec<u8> = if width == region.width {
        let mut copy = Vec::with_capacity(region.height * width * CHANNELS);
        (0..region.height).for_each(|y| copy.extend_from_slice(region.row(y)));
        copy
    } else {
        resize_rows(region, width)
    };
    let Some(columns) = columns else {
        return narrowed;
    };
    let stride = width * CHANNELS;
    let mut out = vec![0; height * stride];
    out.par_chunks_exact_mut(stride)
        .with_min_len(4)
        .enumerate()
        .for_each(|(y, target)| {
            let (start, weights) = columns.of(y);
            one_output_row(target, &narrowed[start * stride..], stride, weights);
        });
    out
}

/// The first pass: every row of the region at its new width.
fn resize_rows(region: Region<'_>, width: usize) -> Vec<u8> {
    const TOGETHER: usize = 4;
    let windows = Windows::new(region.width, width);
    let padded_width = region.width.max(windows.taps.next_multiple_of(STEP));
    let (starts, weights, length) = windows.for_rows(padded_width);
    // A picture narrower than one window gets rows with zeros behind them; such pictures are small.
    let padded: Option<Vec<u8>> = (padded_width > region.width).then(|| {
        let mut rows = vec![0; region.height * padded_width * CHANNELS];
        for (y, row) in rows.chunks_exact_mut(padded_width * CHANNELS).enumerate() {
            row[..region.width * CHANNELS].copy_from_slice(region.row(y));
        }
        rows
    });
    let source = |y: usize| match &padded {
        Some(rows) => &rows[y * padded_width * CHANNELS..][..padded_width * CHANNELS],
        None => region.row(y),
    };
    let stride = width * CHANNELS;
    let mut out = vec![0; region.height * stride];
    out.par_chunks_mut(TOGETHER * stride)
        .with_min_len(4)
        .enumerate()
        .for_each(|(group, target)| {
            let y = group * TOGETHER;
            if target.len() == TOGETHER * stride {
                let rows = [source(y), source(y + 1), source(y + 2), source(y + 3)];
                four_rows(target, rows, &starts, &weights, length);
            } else {
                for (i, target) in target.chunks_exact_mut(stride).enumerate() {
                    one_row(target, [source(y + i)], &starts, &weights, length);
                }
            }
        });
    out
}
