//! Pictures inside the page: each original once, shrunk; each view once, at the size the policy saw; all as data URIs.
//!
//! Pictures are kept as `<image>` elements in one hidden SVG and shown with `<use>`, so that twenty episodes on one photograph carry it once and the
//! overlay can draw in original pixels. What must stay true: a crop is cut from the original file, as the rollout did, and a picture that
//! cannot be read becomes a message, never a failure of the page.

use crate::geometry::{BBox, Size, View};
use crate::image::{Picture, RgbImage, decode, encode_jpeg, show};
use ::image::imageops::thumbnail;
use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The longest side of an original inside the page, pixels.
const LONGEST: u32 = 720;
/// Views are shown as they were, up to this side; larger ones would only weigh.
const LONGEST_VIEW: u32 = 560;
/// Sides of views beyond this are taken for damage.
const LARGEST_VIEW: u32 = 16_384;

/// A picture in the page.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The element to `<use>`.
    pub id: String,
    /// Its coordinate system: for an original its real pixels, for a view the size shown to the policy.
    pub width: u32,
    pub height: u32,
}

impl Placed {
    /// Width over height.
    pub fn ratio(&self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }
}

/// The pictures of one page.
#[derive(Default)]
pub struct Pictures {
    placed: HashMap<String, Result<Placed, String>>,
    elements: String,
    /// The last picture decoded: an episode asks for an original and then for its views.
    decoded: Option<(PathBuf, Picture)>,
}

impl Pictures {
    /// An original picture, shrunk; or why it cannot be shown.
    pub fn original(&mut self, path: &Path) -> Result<Placed, String> {
        self.once(format!("{}", path.display()), |pictures| {
            let picture = pictures.decode(path)?;
            let Size { width, height } = picture.size();
            let jpeg = encode_jpeg(&shrunk(picture.as_image(), LONGEST), 80)?;
            Ok(pictures.place(&jpeg, width, height))
        })
    }

    /// A view as the policy saw it: `region` in original pixels, shown at `size`; or why it cannot be shown.
    pub fn view(&mut self, path: &Path, region: [f64; 4], size: [u32; 2]) -> Result<Placed, String> {
        self.once(format!("{} {region:?} {size:?}", path.display()), |pictures| {
            let picture = pictures.decode(path)?;
            let [width, height] = size;
            // Only a damaged record asks for more, and it should not cost the machine's memory.
            ensure!(width.max(height) <= LARGEST_VIEW, "a view of {width} x {height} pixels is not shown");
            let region = BBox::from(region);
            ensure!(region.is_finite(), "the region {region} is not a box");
            let region = region.round_outward().clamp(&picture.size().bounds());
            let view = View { image: 0, region, size: Size { width, height } };
            let jpeg = encode_jpeg(&shrunk(&show(picture, &view)?, LONGEST_VIEW), 85)?;
            Ok(pictures.place(&jpeg, width, height))
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

    fn decode(&mut self, path: &Path) -> Result<&Picture> {
        if self.decoded.as_ref().is_none_or(|(held, _)| held != path) {
            self.decoded = None;
            self.decoded = Some((path.to_owned(), decode(path)?));
        }
        self.decoded.as_ref().map(|(_, picture)| picture).context("no picture is held")
    }

    fn place(&mut self, jpeg: &[u8], width: u32, height: u32) -> Placed {
        let id = format!("p{}", self.placed.len());
        self.elements.push_str(&format!(
            "<image id=\"{id}\" width=\"{width}\" height=\"{height}\" preserveAspectRatio=\"none\" href=\"data:image/jpeg;base64,"
        ));
        base64::engine::general_purpose::STANDARD.encode_string(jpeg, &mut self.elements);
        self.elements.push_str("\"/>");
        Placed { id, width, height }
    }
}

/// The picture no longer than `longest` on any side.
fn shrunk(picture: &RgbImage, longest: u32) -> Cow<'_, RgbImage> {
    let (width, height) = fit(picture.width(), picture.height(), longest);
    if (width, height) == picture.dimensions() {
        Cow::Borrowed(picture)
    } else {
        Cow::Owned(thumbnail(picture, width, height))
    }
}

/// The size that fits `longest`, with the same proportions, never larger and never zero.
fn fit(width: u32, height: u32, longest: u32) -> (u32, u32) {
    let shrink = (f64::from(longest) / f64::from(width.max(height).max(1))).min(1.0);
    let side = |length: u32| ((f64::from(length) * shrink).round() as u32).max(1);
    (side(width), side(height))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chessboard(folder: &Path) -> PathBuf {
        let path = folder.join("board.png");
        RgbImage::from_fn(800, 400, |x, y| {
            ::image::Rgb(if (x / 100 + y / 100) % 2 == 0 { [250, 250, 250] } else { [10, 10, 10] })
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
        let seen = ::image::load_from_memory(&jpeg).unwrap().into_rgb8();
        assert_eq!(seen.dimensions(), (28, 28));
        // JPEG at quality 85 keeps a flat grey within a few levels.
        assert!(seen.pixels().all(|pixel| pixel.0.iter().all(|&level| level.abs_diff(10) <= 4)));
    }

    #[test]
    fn regions_outside_the_picture_are_pulled_in_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = chessboard(folder.path());
        let mut pictures = Pictures::default();
        assert!(pictures.view(&path, [-5.0, 10.2, 30.5, 900.0], [28, 28]).is_ok());
        assert!(pictures.view(&path, [900.0, 900.0, 950.0, 950.0], [28, 28]).is_err());
        assert!(pictures.view(&path, [f64::NAN, 0.0, 1.0, 1.0], [28, 28]).is_err());
        assert!(pictures.view(&path, [0.0, 0.0, 10.0, 10.0], [0, 28]).is_err());
        assert!(pictures.view(&path, [0.0, 0.0, 10.0, 10.0], [u32::MAX, 28]).is_err());
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
