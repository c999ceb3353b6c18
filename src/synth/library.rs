//! The bundled material in memory: photographs and object pictures with their shrunken copies, handwritten digits.
//!
//! It hides files and formats. Every picture is kept as a pyramid (each level half the one before), so that drawing it small
//! costs no more than the pixels drawn. What must stay true: only pictures of the asked [`Split`] are ever loaded, and their
//! order follows sorted names, never the order in which a directory happens to be listed.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::Deserialize;

use super::Split;

/// Side of a digit picture in the sheet, and of its enlarged copy that drawing reads.
const DIGIT_SIDE: usize = 8;
pub const DIGIT_DRAWN: usize = 32;

/// `channels` interleaved 8-bit values a pixel, rows from the top.
#[derive(Clone, Debug)]
pub struct Raster {
    pub width: usize,
    pub height: usize,
    pub channels: usize,
    pub data: Vec<u8>,
}

/// A picture and its copies at 1/2, 1/4, ... ; never empty.
#[derive(Clone, Debug)]
pub struct Pyramid {
    pub levels: Vec<Raster>,
}

#[derive(Clone, Debug)]
pub struct Photo {
    pub name: String,
    pub pixels: Pyramid,
}

/// A named thing with its pictures in this split. RGBA, colour premultiplied by alpha.
#[derive(Clone, Debug)]
pub struct Class {
    pub name: String,
    pub pictures: Vec<Pyramid>,
}

/// A handwritten digit: how much ink, 0 to 255, on a square of [`DIGIT_DRAWN`] pixels.
#[derive(Clone, Debug)]
pub struct Digit {
    pub label: u8,
    pub ink: Vec<u8>,
}

/// All bundled material of one split.
#[derive(Clone, Debug)]
pub struct Library {
    pub split: Split,
    pub photos: Vec<Photo>,
    pub classes: Vec<Class>,
    pub digits: Vec<Digit>,
    /// Indices into `digits` by label.
    pub by_label: [Vec<usize>; 10],
}

#[derive(Deserialize)]
struct ClassEntry {
    name: String,
    pictures: Vec<PictureEntry>,
}

#[derive(Deserialize)]
struct PictureEntry {
    file: String,
    split: Split,
}

#[derive(Deserialize)]
struct DigitSheet {
    side: usize,
    across: usize,
    train: usize,
    labels: String,
}

impl Library {
    /// Reads the pictures of `split` from the assets folder. Photographs longer than `photo_side` are kept at the first
    /// halving that fits (pretraining needs no more than about 1400; the RL sets need all).
    ///
    /// # Errors
    /// A file that is missing or not what `assets/build.py` writes.
    pub fn load(assets: &Path, split: Split, photo_side: u32) -> Result<Library> {
        let photos = load_photos(&assets.join("photos").join(split.name()), photo_side as usize)?;
        let classes = load_classes(&assets.join("objects"), split)?;
        let digits = load_digits(assets, split)?;
        let mut by_label: [Vec<usize>; 10] = Default::default();
        for (i, digit) in digits.iter().enumerate() {
            by_label[digit.label as usize].push(i);
        }
        ensure!(
            by_label.iter().all(|of| !of.is_empty()),
            "reading the digits of the {split} split: some digit has no picture in {}",
            assets.display()
        );
        Ok(Library { split, photos, classes, digits, by_label })
    }

    pub fn class(&self, name: &str) -> Option<usize> {
        self.classes.iter().position(|class| class.name == name)
    }
}

fn load_photos(folder: &Path, longest: usize) -> Result<Vec<Photo>> {
    let mut paths = std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>())
        .with_context(|| format!("listing the bundled photographs in {}", folder.display()))?;
    paths.retain(|path| path.extension().is_some_and(|e| e == "jpg"));
    paths.sort();
    ensure!(!paths.is_empty(), "there are no bundled photographs (*.jpg) in {}", folder.display());
    paths
        .par_iter()
        .map(|path| {
            let picture = open(path)?.into_rgb8();
            let (width, height) = (picture.width() as usize, picture.height() as usize);
            let mut pixels = Pyramid::new(Raster { width, height, channels: 3, data: picture.into_raw() });
            while pixels.levels.len() > 1 && pixels.levels[0].width.max(pixels.levels[0].height) > longest {
                pixels.levels.remove(0);
            }
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            Ok(Photo { name, pixels })
        })
        .collect()
}

fn load_classes(folder: &Path, split: Split) -> Result<Vec<Class>> {
    let table: Vec<ClassEntry> = read_json(&folder.join("objects.json"))?;
    table
        .into_par_iter()
        .map(|entry| {
            let pictures = entry
                .pictures
                .iter()
                .filter(|p| p.split == split)
                .map(|p| {
                    let picture = open(&folder.join(&p.file))?.into_rgba8();
                    let (width, height) = (picture.width() as usize, picture.height() as usize);
                    let mut data = picture.into_raw();
                    // Averaging colours is right only when each counts as much as it is seen.
                    for [r, g, b, a] in data.as_chunks_mut::<4>().0 {
                        for colour in [r, g, b] {
                            *colour = ((u32::from(*colour) * u32::from(*a) + 127) / 255) as u8;
                        }
                    }
                    Ok(Pyramid::new(Raster { width, height, channels: 4, data }))
                })
                .collect::<Result<Vec<_>>>()?;
            ensure!(
                !pictures.is_empty(),
                "the object {:?} has no {split} picture in {}",
                entry.name,
                folder.join("objects.json").display()
            );
            Ok(Class { name: entry.name, pictures })
        })
        .collect()
}

fn load_digits(assets: &Path, split: Split) -> Result<Vec<Digit>> {
    let path = assets.join("digits.png");
    let sheet: DigitSheet = read_json(&assets.join("digits.json"))?;
    let picture = open(&path)?.into_luma8();
    let labels = sheet.labels.as_bytes();
    let rows = labels.len().div_ceil(sheet.across.max(1));
    ensure!(
        sheet.side == DIGIT_SIDE
            && picture.width() as usize == sheet.across * DIGIT_SIDE
            && picture.height() as usize == rows * DIGIT_SIDE
            && labels.iter().all(u8::is_ascii_digit)
            && sheet.train < labels.len(),
        "the sheet of digits does not fit digits.json ({}x{} pixels for {} labels, {} across): {}",
        picture.width(),
        picture.height(),
        labels.len(),
        sheet.across,
        path.display()
    );
    let range = match split {
        Split::Train => 0..sheet.train,
        Split::Test => sheet.train..labels.len(),
    };
    Ok(range
        .map(|i| {
            let (x0, y0) = (i % sheet.across * DIGIT_SIDE, i / sheet.across * DIGIT_SIDE);
            let cell: Vec<f32> = (0..DIGIT_SIDE * DIGIT_SIDE)
                .map(|p| f32::from(picture.get_pixel((x0 + p % DIGIT_SIDE) as u32, (y0 + p / DIGIT_SIDE) as u32).0[0]))
                .collect();
            Digit { label: labels[i] - b'0', ink: enlarge(&cell) }
        })
        .collect())
}

/// 8x8 to 32x32 by Catmull-Rom, edges repeated; the strokes keep their softness but not their squares.
fn enlarge(cell: &[f32]) -> Vec<u8> {
    let at = |x: i64, y: i64| {
        let clamp = |v: i64| v.clamp(0, DIGIT_SIDE as i64 - 1) as usize;
        cell[clamp(y) * DIGIT_SIDE + clamp(x)]
    };
    let weights = |t: f32| {
        [
            ((-0.5 * t + 1.0) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1.0,
            ((-1.5 * t + 2.0) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        ]
    };
    let scale = DIGIT_SIDE as f32 / DIGIT_DRAWN as f32;
    let mut ink = Vec::with_capacity(DIGIT_DRAWN * DIGIT_DRAWN);
    for y in 0..DIGIT_DRAWN {
        let v = (y as f32 + 0.5) * scale - 0.5;
        let wy = weights(v - v.floor());
        for x in 0..DIGIT_DRAWN {
            let u = (x as f32 + 0.5) * scale - 0.5;
            let wx = weights(u - u.floor());
            let mut sum = 0.0;
            for (j, wy) in wy.iter().enumerate() {
                for (i, wx) in wx.iter().enumerate() {
                    sum += wy * wx * at(u.floor() as i64 + i as i64 - 1, v.floor() as i64 + j as i64 - 1);
                }
            }
            ink.push(sum.round().clamp(0.0, 255.0) as u8);
        }
    }
    ink
}

impl Pyramid {
    pub fn new(full: Raster) -> Pyramid {
        let mut levels = vec![full];
        while let Some(last) = levels.last()
            && last.width.min(last.height) >= 16
        {
            let half = last.halved();
            levels.push(half);
        }
        Pyramid { levels }
    }

    pub fn full(&self) -> &Raster {
        &self.levels[0]
    }

    /// The smallest level that still has at least `scale` (0 to 1) of the full resolution; the full picture above 1.
    pub fn level(&self, scale: f64) -> &Raster {
        let wanted = self.full().width as f64 * scale;
        // A percent of slack: a level that is one rounding too small is still the right one.
        let fit = self.levels.iter().rposition(|level| level.width as f64 >= wanted * 0.99);
        &self.levels[fit.unwrap_or(0)]
    }
}

impl Raster {
    /// Means of 2x2 pixels; an odd last row or column is averaged with itself.
    fn halved(&self) -> Raster {
        let (width, height, channels) = (self.width.div_ceil(2), self.height.div_ceil(2), self.channels);
        let mut data = Vec::with_capacity(width * height * channels);
        for y in 0..height {
            let rows = [2 * y, (2 * y + 1).min(self.height - 1)];
            for x in 0..width {
                let columns = [2 * x, (2 * x + 1).min(self.width - 1)];
                for c in 0..channels {
                    let sum: u32 = rows
                        .iter()
                        .flat_map(|r| columns.iter().map(move |k| (r, k)))
                        .map(|(r, k)| u32::from(self.data[(r * self.width + k) * channels + c]))
                        .sum();
                    data.push(((sum + 2) / 4) as u8);
                }
            }
        }
        Raster { width, height, channels, data }
    }
}

fn open(path: &Path) -> Result<::image::DynamicImage> {
    ::image::open(path).with_context(|| format!("reading the bundled picture {}", path.display()))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("understanding {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halving_averages_and_keeps_the_odd_edge() {
        let raster = Raster { width: 3, height: 2, channels: 1, data: vec![0, 4, 10, 8, 12, 30] };
        let half = raster.halved();
        assert_eq!((half.width, half.height), (2, 1));
        assert_eq!(half.data, [6, 20]); // (0+4+8+12)/4 and (10+10+30+30)/4
    }

    #[test]
    fn a_flat_digit_stays_flat_when_enlarged() {
        assert!(enlarge(&[200.0; 64]).iter().all(|&v| v == 200));
    }

    #[test]
    fn train_and_test_share_no_picture() {
        let assets = crate::synth::assets_dir().unwrap();
        let train = Library::load(&assets, Split::Train, 400).unwrap();
        let test = Library::load(&assets, Split::Test, 400).unwrap();
        assert!(train.photos.iter().all(|a| test.photos.iter().all(|b| a.name != b.name)));
        assert_eq!((train.digits.len(), test.digits.len()), (1400, 397));
        for (a, b) in train.classes.iter().zip(&test.classes) {
            assert_eq!(a.name, b.name);
            for picture in &a.pictures {
                assert!(b.pictures.iter().all(|other| other.full().data != picture.full().data), "{}", a.name);
            }
        }
        // Two people may draw the same 64 grey values, but hardly often.
        let same = test.digits.iter().filter(|b| train.digits.iter().any(|a| a.ink == b.ink)).count();
        assert_eq!(same, 0);
    }
}
