//! Pictures inside the page: each original once, shrunk; each view once, at the size the policy saw; all as data URIs.
//!
//! Pictures are kept as `<image>` elements in one hidden SVG and shown with `<use>`, so that twenty episodes on one photograph carry it once and the
//! overlay can draw in original pixels. What must stay true: a crop is cut from the original file, as the rollout did, and a picture that
//! cannot be read becomes a message, never a failure of the page.

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{FilterType, crop_imm, resize, thumbnail};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The longest side of an original inside the page, pixels.
const LONGEST: u32 = 720;
/// Views are shown as they were, up to this side; larger ones would only weigh.
const LONGEST_VIEW: u32 = 560;

/// A picture in the page.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The element to `<use>`.
    pub id: String,
    /// Its coordinate system: for an original its real pixels, for a view the size shown to the policy.
    pub width: u32,
    pub height: u32,
}

/// The pictures of one page.
#[derive(Default)]
pub struct Pictures {
    placed: HashMap<String, Result<Placed, String>>,
    elements: String,
    /// The last picture decoded: an episode asks for an original and then for its views.
    decoded: Option<(PathBuf, RgbImage)>,
}

impl Pictures {
    /// An original picture, shrunk; or why it cannot be shown.
    pub fn original(&mut self, path: &Path) -> Result<Placed, String> {
        self.once(format!("{}", path.display()), |pictures| {
            let picture = pictures.decode(path)?;
            let (width, height) = picture.dimensions();
            let (w, h) = fit(width, height, LONGEST);
            let small = if (w, h) == (width, height) { picture.clone() } else { thumbnail(picture, w, h) };
            pictures.place(&small, width, height, 80)
        })
    }

    /// A view as the policy saw it: `region` in original pixels, shown at `size`; or why it cannot be shown.
    pub fn view(&mut self, path: &Path, region: [f64; 4], size: [u32; 2]) -> Result<Placed, String> {
        self.once(format!("{} {region:?} {size:?}", path.display()), |pictures| {
            let picture = pictures.decode(path)?;
            let [left, top, right, bottom] = whole_pixels(region, picture.dimensions())?;
            let [width, height] = size;
            ensure!(
                width > 0 && height > 0 && width <= 16_384 && height <= 16_384,
                "a view of {width} x {height} pixels cannot be shown"
            );
            let cut = crop_imm(picture, left, top, right - left, bottom - top).to_image();
            let seen = resize(&cut, width, height, FilterType::CatmullRom);
            let (w, h) = fit(width, height, LONGEST_VIEW);
            let seen = if (w, h) == (width, height) { seen } else { thumbnail(&seen, w, h) };
            pictures.place(&seen, width, height, 85)
        })
    }

    /// The hidden SVG that holds every picture; goes into the page once, before the first use.
    pub fn shelf(&self) -> String {
        format!(
            "<svg class=\"shelf\" width=\"0\" height=\"0\" aria-hidden=\"true\"><defs>{}</defs></svg>",
            self.elements
        )
    }

    fn once(&mut self, key: String, make: impl FnOnce(&mut Self) -> Result<Placed>) -> Result<Placed, String> {
        if let Some(placed) = self.placed.get(&key) {
            return placed.clone();
        }
        let placed = make(self).map_err(|error| format!("{error:#}"));
        self.placed.insert(key, placed.clone());
        placed
    }

    fn decode(&mut self, path: &Path) -> Result<&RgbImage> {
        if self.decoded.as_ref().is_none_or(|(held, _)| held != path) {
            self.decoded = None;
            self.decoded = Some((path.to_owned(), read(path)?));
        }
        self.decoded.as_ref().map(|(_, picture)| picture).context("no picture is held")
    }

    fn place(&mut self, picture: &RgbImage, width: u32, height: u32, quality: u8) -> Result<Placed> {
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, quality)
            .encode_image(picture)
            .context("compressing a picture for the page")?;
        let id = format!("p{}", self.placed.len());
        self.elements.push_str(&format!(
            "<image id=\"{id}\" width=\"{width}\" height=\"{height}\" preserveAspectRatio=\"none\" href=\"data:image/jpeg;base64,"
        ));
        base64::engine::general_purpose::STANDARD.encode_string(jpeg, &mut self.elements);
        self.elements.push_str("\"/>");
        Ok(Placed { id, width, height })
    }
}

fn read(path: &Path) -> Result<RgbImage> {
    Ok(image::open(path)?.into_rgb8())
}

/// The size that fits `longest`, with the same proportions, never larger and never zero.
fn fit(width: u32, height: u32, longest: u32) -> (u32, u32) {
    let shrink = (f64::from(longest) / f64::from(width.max(height).max(1))).min(1.0);
    let side = |length: u32| ((f64::from(length) * shrink).round() as u32).max(1);
    (side(width), side(height))
}

/// The region as whole pixels inside the picture, at least one by one.
fn whole_pixels([x1, y1, x2, y2]: [f64; 4], (width, height): (u32, u32)) -> Result<[u32; 4]> {
    ensure!(
        [x1, y1, x2, y2].iter().all(|side| side.is_finite()) && width > 0 && height > 0,
        "the region [{x1}, {y1}, {x2}, {y2}] is not a box"
    );
    // f64 to u32 saturates, so a negative side is 0.
    let (left, top) = ((x1.floor() as u32).min(width - 1), (y1.floor() as u32).min(height - 1));
    let (right, bottom) = ((x2.ceil() as u32).clamp(left + 1, width), (y2.ceil() as u32).clamp(top + 1, height));
    Ok([left, top, right, bottom])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chessboard(folder: &Path) -> PathBuf {
        let path = folder.join("board.png");
        RgbImage::from_fn(800, 400, |x, y| {
            image::Rgb(if (x / 100 + y / 100) % 2 == 0 { [250, 250, 250] } else { [10, 10, 10] })
        })
        .save(&path)
        .unwrap();
        path
    }

    #[test]
    fn a_picture_used_twice_is_carried_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = chessboard(folder.path());
        let mut pictures = Pictures::default();
        let first = pictures.original(&path).unwrap();
        assert_eq!((first.width, first.height), (800, 400));
        assert_eq!(pictures.original(&path).unwrap(), first);
        let view = pictures.view(&path, [0.0, 0.0, 100.0, 100.0], [56, 56]).unwrap();
        assert_eq!(pictures.view(&path, [0.0, 0.0, 100.0, 100.0], [56, 56]).unwrap(), view);
        assert_eq!(pictures.shelf().matches("<image ").count(), 2);
        assert_ne!(first.id, view.id);
    }

    #[test]
    fn a_view_is_cut_from_the_original_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = chessboard(folder.path());
        let mut pictures = Pictures::default();
        // The second square of the first row is dark all over.
        pictures.view(&path, [100.0, 0.0, 200.0, 100.0], [28, 28]).unwrap();
        let shelf = pictures.shelf();
        let data = shelf.split_once("base64,").unwrap().1.split_once('"').unwrap().0;
        let jpeg = base64::engine::general_purpose::STANDARD.decode(data).unwrap();
        let seen = image::load_from_memory(&jpeg).unwrap().into_rgb8();
        assert_eq!(seen.dimensions(), (28, 28));
        // JPEG at quality 85 keeps a flat grey within a few levels.
        assert!(seen.pixels().all(|pixel| pixel.0.iter().all(|&level| level.abs_diff(10) <= 4)));
    }

    #[test]
    fn regions_outside_the_picture_are_pulled_in() {
        assert_eq!(whole_pixels([-5.0, 10.2, 30.5, 900.0], (100, 50)).unwrap(), [0, 10, 31, 50]);
        assert_eq!(whole_pixels([400.0, 400.0, 300.0, 300.0], (100, 50)).unwrap(), [99, 49, 100, 50]);
        assert!(whole_pixels([f64::NAN, 0.0, 1.0, 1.0], (100, 50)).is_err());
    }

    #[test]
    fn a_missing_picture_is_a_message_with_its_path() {
        let mut pictures = Pictures::default();
        let message = pictures.original(Path::new("/nowhere/at/all.png")).unwrap_err();
        assert!(!message.is_empty());
        assert_eq!(pictures.shelf().matches("<image ").count(), 0);
    }

    #[test]
    fn sizes_keep_their_proportions() {
        assert_eq!(fit(3000, 1500, 720), (720, 360));
        assert_eq!(fit(300, 150, 720), (300, 150));
        assert_eq!(fit(10_000, 1, 720), (720, 1));
    }
}
