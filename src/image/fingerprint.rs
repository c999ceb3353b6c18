//! What a picture looks like in a few hundred bytes, so that the same picture is known again at another size or compressed anew.
//!
//! Two pictures look alike when the signs of their low frequencies agree (a perceptual hash: of the 32x32 grey picture's cosine transform the 8x8
//! lowest coefficients without the mean, each above or below their median; Zauner 2010, "Implementation and Benchmarking of Perceptual
//! Image Hash Functions", section 3.2.1) and their 16x16 thumbnails are close. The hash makes candidates cheap to find, the thumbnail throws out
//! those that only share a layout. What must stay true: equal pixels give equal fingerprints; what has no structure (a blank page) is like
//! nothing but itself. Crops and mirrored pictures are other pictures.

use anyhow::Result;
use sha2::{Digest, Sha256};

use super::{PassOrder, Picture, resize};
use crate::geometry::Size;

/// Side of the grey picture that is transformed, of the block of its coefficients, and of the thumbnail.
const SIDE: usize = 32;
const BLOCK: usize = 8;
const THUMB: usize = 16;
/// Bits in which the hashes of two versions of a picture may differ, of 63. Of unrelated ones half differ, and one pair of a thousand million
/// comes as near as this by chance.
const BITS: u32 = 10;
/// Root mean square by which their thumbnails may differ, in grey levels.
const LEVELS: f64 = 8.0;
/// A thumbnail whose grey levels spread less than this has no structure.
const FLAT: f64 = 4.0;

#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint {
    pub size: Size,
    /// Of all pixels and the size.
    pub digest: [u8; 32],
    hash: u64,
    /// RGB, row by row.
    thumb: Vec<u8>,
    flat: bool,
}

/// How two pictures are the same.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Likeness {
    /// Pixel by pixel.
    Exact,
    /// To the eye: `bits` of 63 differ in their hashes, and `levels` is the root mean square between their thumbnails.
    Near { bits: u32, levels: f64 },
}

impl Fingerprint {
    /// # Errors
    /// A picture that cannot be resized.
    pub fn of(picture: &Picture) -> Result<Fingerprint> {
        let size = picture.size();
        let mut digest = Sha256::new();
        digest.update(size.width.to_le_bytes());
        digest.update(size.height.to_le_bytes());
        digest.update(picture.rgb());
        let small = resize(picture.as_image(), Size::new(SIDE as u32, SIDE as u32), PassOrder::default())?;
        let grey: Vec<f64> = small
            .pixels()
            .map(|p| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2]))
            .collect();
        let mean = grey.iter().sum::<f64>() / grey.len() as f64;
        let spread = (grey.iter().map(|level| (level - mean).powi(2)).sum::<f64>() / grey.len() as f64).sqrt();
        Ok(Fingerprint {
            size,
            digest: digest.finalize().into(),
            hash: hash(&grey),
            thumb: thumb(&small),
            flat: spread < FLAT,
        })
    }

    /// How it is the same picture as another, if it is.
    pub fn like(&self, other: &Fingerprint) -> Option<Likeness> {
        if self.digest == other.digest {
            return Some(Likeness::Exact);
        }
        if self.flat || other.flat || self.bits(other) > BITS {
            return None;
        }
        let (bits, levels) = self.distance(other);
        (levels <= LEVELS).then_some(Likeness::Near { bits, levels })
    }

    /// Bits in which the hashes differ, and the root mean square between the thumbnails.
    pub fn distance(&self, other: &Fingerprint) -> (u32, f64) {
        let squares: f64 =
            self.thumb.iter().zip(&other.thumb).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        (self.bits(other), (squares / self.thumb.len() as f64).sqrt())
    }

    fn bits(&self, other: &Fingerprint) -> u32 {
        (self.hash ^ other.hash).count_ones()
    }
}

/// The lowest coefficients of the cosine transform, a bit for each but the mean: is it above their median?
fn hash(grey: &[f64]) -> u64 {
    let wave = |k: usize, i: usize| (std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / SIDE as f64).cos();
    let waves: Vec<f64> = (0..BLOCK).flat_map(|k| (0..SIDE).map(move |i| wave(k, i))).collect();
    // Along rows, then along columns.
    let mut rows = [0.0; SIDE * BLOCK];
    for (row, levels) in rows.chunks_exact_mut(BLOCK).zip(grey.chunks_exact(SIDE)) {
        for (sum, wave) in row.iter_mut().zip(waves.chunks_exact(SIDE)) {
            *sum = levels.iter().zip(wave).map(|(level, wave)| level * wave).sum();
        }
    }
    let mut low = [0.0; BLOCK * BLOCK];
    for (ky, wave) in waves.chunks_exact(SIDE).enumerate() {
        for kx in 0..BLOCK {
            low[ky * BLOCK + kx] = (0..SIDE).map(|y| rows[y * BLOCK + kx] * wave[y]).sum();
        }
    }
    let coefficients = &low[1..];
    let mut sorted = coefficients.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    coefficients.iter().fold(0, |bits, &c| (bits << 1) | u64::from(c > median))
}

/// The mean of each square of pixels.
fn thumb(small: &::image::RgbImage) -> Vec<u8> {
    let step = SIDE / THUMB;
    let mut out = Vec::with_capacity(THUMB * THUMB * 3);
    for y in 0..THUMB {
        for x in 0..THUMB {
            for channel in 0..3 {
                let square = (0..step * step).map(|k| {
                    let (dx, dy) = (k % step, k / step);
                    u32::from(small.get_pixel((x * step + dx) as u32, (y * step + dy) as u32)[channel])
                });
                out.push((square.sum::<u32>() / (step * step) as u32) as u8);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{RgbImage, decode, decode_bytes, encode_jpeg};
    use std::path::Path;

    /// All that come with the program.
    fn photographs() -> Vec<RgbImage> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos");
        let inside = |part: &str| std::fs::read_dir(folder.join(part)).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<_> = inside("train").chain(inside("test")).collect();
        files.sort();
        files.iter().map(|path| decode(path).unwrap().as_image().clone()).collect()
    }

    fn of(image: &RgbImage) -> Fingerprint {
        Fingerprint::of(&Picture::new(image.clone())).unwrap()
    }

    #[test]
    fn a_picture_is_known_again_smaller_stretched_and_compressed_anew() {
        let all = photographs();
        assert!(all.len() > 5);
        for image in &all {
            let original = of(image);
            assert_eq!(original.like(&of(image)), Some(Likeness::Exact));
            let (w, h) = (image.width(), image.height());
            for size in [
                Size::new(w / 2, h / 2),
                Size::new(w / 3, h / 3),
                Size::new(w / 28 * 28, h / 28 * 28 - 28),
                Size::new(336, 336),
            ] {
                let other = resize(image, size, PassOrder::default()).unwrap();
                let other = decode_bytes(&encode_jpeg(&other, 40).unwrap(), "again").unwrap();
                let like = original.like(&Fingerprint::of(&other).unwrap());
                assert!(matches!(like, Some(Likeness::Near { .. })), "{size}: {like:?}");
            }
        }
    }

    #[test]
    fn other_pictures_and_other_parts_are_not_the_same() {
        let all = photographs();
        let prints: Vec<Fingerprint> = all.iter().map(of).collect();
        for (k, one) in prints.iter().enumerate() {
            for other in &prints[..k] {
                assert_eq!(one.like(other), None);
            }
            let half = ::image::imageops::crop_imm(&all[k], 0, 0, all[k].width() / 2, all[k].height() / 2).to_image();
            assert_eq!(one.like(&of(&half)), None, "a quarter is another picture");
            assert_eq!(one.like(&of(&::image::imageops::flip_horizontal(&all[k]))), None, "so is the mirror's");
        }
    }

    #[test]
    fn blank_pages_are_only_like_themselves() {
        let page = |level: u8, spot: u32| {
            let mut page = RgbImage::from_pixel(200, 100, [level; 3].into());
            page.put_pixel(spot, 7, [0; 3].into());
            of(&page)
        };
        assert_eq!(page(250, 3).like(&page(250, 3)), Some(Likeness::Exact));
        assert_eq!(page(250, 3).like(&page(250, 100)), None);
    }
}
