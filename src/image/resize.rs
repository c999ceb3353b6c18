//! Bicubic resizing, bit for bit as Pillow's `Image.resize((w, h), BICUBIC)` on 8-bit RGB, which is what the published
//! processors train with.
//!
//! It hides the fixed-point arithmetic and the instruction sets. What must stay true: the same bytes as Pillow for every size
//! (tests/golden/resize), and for any number of threads.
//!
//! The method, as Pillow's manual describes it: a convolution with Keys' cubic (a = -1/2, Keys 1981), stretched when
//! shrinking so that every source pixel counts (antialiasing), along rows and along columns; weights
//! normalised, then rounded to 22 bits after the point; 8 bits again between the passes; a pass that changes nothing is left out.
//! Which pass goes first changed between versions of Pillow: see [`PassOrder`].

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::geometry::Size;
use foveate_kernels::memory::Rows;
use rayon::prelude::*;

/// Bits after the point of a weight: 32, less 8 of the pixel, less 2 for weights over 1 and the sign.
const PRECISION: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION - 1);
/// Reach of the cubic at scale 1, pixels to either side.
const REACH: f64 = 2.0;
const CHANNELS: usize = 3;
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
    /// All of a picture of `width` × `height` pixels.
    pub fn whole(data: &'a [u8], width: usize, height: usize) -> Region<'a> {
        Region { data, stride: width * CHANNELS, left: 0, top: 0, width, height }
    }

    fn size(&self) -> Size {
        Size { width: self.width as u32, height: self.height as u32 }
    }

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
        Windows { starts, weights, counts, taps }
    }

    fn of(&self, i: usize) -> (usize, &[i32]) {
        (self.starts[i], &self.weights[i * self.taps..][..self.counts[i]])
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// One row at its new width: the plain version, for processors without AVX2 and to hold the other against.
fn row_pass(target: &mut [u8], source: &[u8], windows: &Windows) {
    for (x, pixel) in target.chunks_exact_mut(CHANNELS).enumerate() {
        let (start, weights) = windows.of(x);
        let mut sums = [HALF; CHANNELS];
        for (&w, from) in weights.iter().zip(source[start * CHANNELS..].chunks_exact(CHANNELS)) {
            for (sum, &v) in sums.iter_mut().zip(from) {
                *sum += w * i32::from(v);
            }
        }
        pixel.iter_mut().zip(sums).for_each(|(p, sum)| *p = clip(sum));
    }
}

/// One output row from the source rows of its window: the plain version.
///
/// # Shapes
/// source: `weights.len()` rows of `target.len()` bytes, `stride` apart.
fn column_pass(target: &mut [u8], source: &[u8], stride: usize, weights: &[i32]) {
    for (x, out) in target.iter_mut().enumerate() {
        let sum = weights.iter().enumerate().fold(HALF, |sum, (k, &w)| sum + w * i32::from(source[k * stride + x]));
        *out = clip(sum);
    }
}

/// Which direction goes first. The 8-bit rounding in between makes them differ: on tall photographs
/// by up to 9 grey levels, in a tenth to a fifth of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PassOrder {
    /// As Pillow 13.0.0: along columns first when the height shrinks by more pixels than twice what the width shrinks by (a width
    /// that grows counting as negative), else along rows first. Inferred by trying nearly two thousand sizes, no document states it. For a
    /// picture shrunk in proportion that is the case when it is more than twice as high as wide; otherwise both give the same.
    #[default]
    Pillow13,
    /// As Pillow up to 12: always along rows first.
    RowsFirst,
}

impl PassOrder {
    fn columns_first(self, from: Size, to: Size) -> bool {
        let shrink = |from: u32, to: u32| i64::from(from) - i64::from(to);
        let (narrower, lower) = (shrink(from.width, to.width), shrink(from.height, to.height));
        self == PassOrder::Pillow13 && lower > 0 && 2 * narrower < lower
    }
}

/// The region shown at `size`, as 8-bit RGB rows. Both must be at least 1x1.
pub(super) fn resize(region: Region<'_>, size: Size, order: PassOrder) -> Vec<u8> {
    let (width, height) = (size.width as usize, size.height as usize);
    match (width != region.width, height != region.height) {
        (false, false) => {
            let mut copy = Vec::with_capacity(height * width * CHANNELS);
            (0..height).for_each(|y| copy.extend_from_slice(region.row(y)));
            copy
        }
        (true, false) => resize_rows(region, width),
        (false, true) => resize_columns(region, height),
        (true, true) if order.columns_first(region.size(), size) => {
            let lower = resize_columns(region, height);
            resize_rows(Region::whole(&lower, region.width, height), width)
        }
        (true, true) => {
            let narrower = resize_rows(region, width);
            resize_columns(Region::whole(&narrower, width, region.height), height)
        }
    }
}

/// The pass along columns: the region at its own width and a new height.
fn resize_columns(region: Region<'_>, height: usize) -> Vec<u8> {
    let windows = Windows::new(region.height, height);
    let stride = region.width * CHANNELS;
    let mut out = Rows::new(height * stride);
    out.chunks(stride).with_min_len(4).enumerate().for_each(|(y, target)| {
        let target = target.clear();
        let (start, weights) = windows.of(y);
        let source = &region.data[(region.top + start) * region.stride + region.left * CHANNELS..];
        #[cfg(target_arch = "x86_64")]
        if avx512::available() {
            return avx512::column_pass(target, source, region.stride, weights);
        } else if avx2::available() {
            return avx2::column_pass(target, source, region.stride, weights);
        }
        column_pass(target, source, region.stride, weights);
    });
    out.done()
}

/// The pass along rows: the region at its own height and a new width.
fn resize_rows(region: Region<'_>, width: usize) -> Vec<u8> {
    let windows = Windows::new(region.width, width);
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        return avx2::resize_rows(region, width, &windows, avx512::available());
    }
    let stride = width * CHANNELS;
    let mut out = vec![0; region.height * stride];
    out.par_chunks_exact_mut(stride)
        .with_min_len(4)
        .enumerate()
        .for_each(|(y, target)| row_pass(target, region.row(y), &windows));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cubic_at_the_points_keys_names() {
        // Interpolating: 1 at 0 and 0 at every other whole number; -1/16 half way out, 9/16 half way in.
        assert_eq!([0.0, 1.0, 2.0, 3.0].map(cubic), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!([0.5, -0.5, 1.5, -1.5].map(cubic), [0.5625, 0.5625, -0.0625, -0.0625]);
    }

    #[test]
    fn halving_four_pixels_by_hand() {
        // Scale 2, so the cubic is sampled at odd quarters: 0.25 -> 0.8671875, 0.75 -> 0.2265625, 1.25 -> -0.0703125, 1.75 -> -0.0234375.
        // The first output sees pixels 0..4 of 4 at 0.25, 0.25, 0.75, 1.25 stretched distances; the weights sum to 1.890625.
        let windows = Windows::new(4, 2);
        let (start, weights) = windows.of(0);
        let exact = [0.8671875, 0.8671875, 0.2265625, -0.0703125].map(|w: f64| w / 1.890625);
        assert_eq!((start, weights.len()), (0, 4));
        for (&w, e) in weights.iter().zip(exact) {
            // Rounded to the nearest of 2^22 steps.
            assert!((f64::from(w) - e * f64::from(1 << 22)).abs() <= 0.5);
        }
        let row = [10u8, 20, 30, 90].map(|v| [v, 255 - v, v]).concat();
        let mut out = [0; 6];
        row_pass(&mut out, &row, &windows);
        // (8.671875 + 17.34375 + 6.796875 - 6.328125) / 1.890625 = 14.007; the second sees them mirrored: 107.890625 / 1.890625 = 57.07
        assert_eq!(out, [14, 241, 14, 57, 198, 57]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_give_the_bytes_of_the_plain_passes() {
        if !avx2::available() {
            return;
        }
        let levels: &[bool] = if avx512::available() { &[false, true] } else { &[false] };
        // A cheap fixed scramble: every level occurs, neighbours differ.
        let data: Vec<u8> = (0..97u32 * 61 * 3).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (left, top, width, height) in [(0, 0, 97, 61), (3, 5, 90, 50), (96, 0, 1, 61), (90, 57, 7, 4)] {
            let region = Region { data: &data, stride: 97 * 3, left, top, width, height };
            for target in [1, 2, 5, 28, 89, 200] {
                let windows = Windows::new(width, target);
                let mut plain = vec![0; height * target * 3];
                for (y, out) in plain.chunks_exact_mut(target * 3).enumerate() {
                    row_pass(out, region.row(y), &windows);
                }
                for &wide in levels {
                    let fast = avx2::resize_rows(region, target, &windows, wide);
                    assert!(fast == plain, "rows, {width} to {target}, wide {wide}");
                }
                let windows = Windows::new(height, target);
                for y in 0..target {
                    let (start, weights) = windows.of(y);
                    let source = &data[(top + start) * region.stride + left * 3..];
                    let (mut fast, mut plain) = (vec![0; width * 3], vec![0; width * 3]);
                    column_pass(&mut plain, source, region.stride, weights);
                    for &wide in levels {
                        match wide {
                            true => avx512::column_pass(&mut fast, source, region.stride, weights),
                            false => avx2::column_pass(&mut fast, source, region.stride, weights),
                        }
                        assert!(fast == plain, "columns, {height} to {target}, wide {wide}");
                    }
                }
            }
        }
    }
}
