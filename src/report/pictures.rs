//! Pictures inside the page: each original once, shrunk; each view once, at the size the policy saw; all as data URIs.
//!
//! The few that are shown without scripts are `<image>` elements in one hidden SVG, shown with `<use>`; the many others are text until a script shows
//! them, so that a page of five hundred episodes opens at once. Pictures with the same bytes are carried once, wherever they came from. What must stay true: a crop is cut from the original file, as the rollout did, and a picture that
//! cannot be read becomes a message, never a failure of the page.

use crate::geometry::{BBox, Size, View};
use crate::image::{Picture, RgbImage, decode, encode_jpeg, show};
use ::image::imageops::thumbnail;
use anyhow::{Result, anyhow, ensure};
use base64::Engine as _;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Pixels that all originals of a page may take together, and all views; a page of JPEGs of these is about twelve megabytes.
const ORIGINALS: f64 = 28e6;
const VIEWS: f64 = 18e6;
/// The longest side of an original inside the page, from and to, whatever their number.
const LONGEST: (u32, u32) = (320, 800);
/// Views are shown as they were, up to this side; larger ones would only weigh.
const LONGEST_VIEW: (u32, u32) = (196, 560);
/// Sides of views beyond this are taken for damage.
const LARGEST_VIEW: u32 = 16_384;

/// A picture in the page.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The element that holds it.
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

/// A picture that a page shows: a whole original, or a region of one at a size.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    pub path: PathBuf,
    /// Region in original pixels, and the size shown to the policy.
    pub view: Option<([f64; 4], [u32; 2])>,
}

impl Wanted {
    fn key(&self) -> String {
        match &self.view {
            None => format!("{}", self.path.display()),
            Some((region, size)) => format!("{} {region:?} {size:?}", self.path.display()),
        }
    }
}

/// The pictures of one page.
pub struct Pictures {
    placed: HashMap<String, Result<Placed, String>>,
    /// Each different picture once, in the order of their ids.
    jpegs: Vec<Shelved>,
    /// The id of each picture by the digest of its bytes and its size.
    known: HashMap<([u8; 32], u32, u32), String>,
    longest: u32,
    longest_view: u32,
}

struct Shelved {
    placed: Placed,
    jpeg: Vec<u8>,
    /// Shown without scripts.
    plain: bool,
}

/// A picture made ready, not yet part of a page.
struct Made {
    jpeg: Vec<u8>,
    width: u32,
    height: u32,
}

impl Default for Pictures {
    fn default() -> Self {
        Pictures {
            placed: HashMap::new(),
            jpegs: Vec::new(),
            known: HashMap::new(),
            longest: LONGEST.1,
            longest_view: LONGEST_VIEW.1,
        }
    }
}

impl Pictures {
    /// Makes all pictures of a page, on all cores: the more there are, the smaller.
    pub fn of(wanted: &[Wanted]) -> Self {
        let mut files: Vec<(&Path, Vec<&Wanted>)> = Vec::new();
        let (mut place, mut seen) = (HashMap::new(), HashSet::new());
        for one in wanted.iter().filter(|one| seen.insert(one.key())) {
            let at = *place.entry(one.path.as_path()).or_insert_with(|| {
                files.push((&one.path, Vec::new()));
                files.len() - 1
            });
            files[at].1.push(one);
        }
        let views = files.iter().flat_map(|(_, wanted)| wanted).filter(|one| one.view.is_some()).count();
        let originals = files.iter().flat_map(|(_, wanted)| wanted).filter(|one| one.view.is_none()).count();
        let mut pictures = Pictures {
            longest: side(ORIGINALS, originals, LONGEST),
            longest_view: side(VIEWS, views, LONGEST_VIEW),
            ..Pictures::default()
        };
        let made: Vec<Vec<(&Wanted, Result<Made>)>> = files
            .par_iter()
            .map(|(path, wanted)| {
                let picture = decode(path);
                let make = |one: &&Wanted| match &picture {
                    Ok(picture) => pictures.make(picture, one.view),
                    Err(error) => Err(anyhow!("{error:#}")),
                };
                wanted.iter().map(|one| (*one, make(one))).collect()
            })
            .collect();
        // Placed in the order of files, on one thread: the same folders give the same page.
        for (one, made) in made.into_iter().flatten() {
            // What went wrong with one is told where it is shown.
            let _ = pictures.place(one.key(), made);
        }
        pictures
    }

    /// An original picture, shrunk; or why it cannot be shown.
    pub fn original(&mut self, path: &Path) -> Result<Placed, String> {
        self.get(&Wanted { path: path.to_owned(), view: None })
    }

    /// A view as the policy saw it: `region` in original pixels, shown at `size`; or why it cannot be shown.
    pub fn view(&mut self, path: &Path, region: [f64; 4], size: [u32; 2]) -> Result<Placed, String> {
        self.get(&Wanted { path: path.to_owned(), view: Some((region, size)) })
    }

    fn get(&mut self, wanted: &Wanted) -> Result<Placed, String> {
        let key = wanted.key();
        if let Some(placed) = self.placed.get(&key) {
            return placed.clone();
        }
        let made = decode(&wanted.path).and_then(|picture| self.make(&picture, wanted.view));
        self.place(key, made)
    }

    fn make(&self, picture: &Picture, view: Option<([f64; 4], [u32; 2])>) -> Result<Made> {
        let Some((region, [width, height])) = view else {
            let Size { width, height } = picture.size();
            return Ok(Made { jpeg: encode_jpeg(&shrunk(picture.as_image(), self.longest), 78)?, width, height });
        };
        // Only a damaged record asks for more, and it should not cost the machine's memory.
        ensure!(width.max(height) <= LARGEST_VIEW, "a view of {width} x {height} pixels is not shown");
        let region = BBox::from(region);
        ensure!(region.is_finite(), "the region {region} is not a box");
        let region = region.round_outward().clamp(&picture.size().bounds());
        let view = View { image: 0, region, size: Size { width, height } };
        Ok(Made { jpeg: encode_jpeg(&shrunk(&show(picture, &view)?, self.longest_view), 82)?, width, height })
    }

    fn place(&mut self, key: String, made: Result<Made>) -> Result<Placed, String> {
        let placed = made.map_err(|error| format!("{error:#}")).map(|Made { jpeg, width, height }| {
            let digest: [u8; 32] = Sha256::digest(&jpeg).into();
            let id = self.known.entry((digest, width, height)).or_insert_with(|| format!("p{}", self.jpegs.len()));
            let placed = Placed { id: id.clone(), width, height };
            if self.jpegs.len() < self.known.len() {
                self.jpegs.push(Shelved { placed: placed.clone(), jpeg, plain: false });
            }
            placed
        });
        self.placed.insert(key, placed.clone());
        placed
    }

    /// Says that a picture is shown without scripts too.
    pub fn show_plainly(&mut self, placed: &Placed) {
        let shelved = self.jpegs.iter_mut().find(|shelved| shelved.placed.id == placed.id);
        if let Some(shelved) = shelved {
            shelved.plain = true;
        }
    }

    /// The hidden SVG with the pictures that are shown without scripts; goes into the page once, before the first use.
    pub fn shelf(&self) -> String {
        let mut html = String::from("<svg class=\"shelf\" width=\"0\" height=\"0\" aria-hidden=\"true\"><defs>");
        for Shelved { placed: Placed { id, width, height }, jpeg, .. } in self.jpegs.iter().filter(|one| one.plain) {
            html.push_str(&format!(
                "<image id=\"{id}\" width=\"{width}\" height=\"{height}\" preserveAspectRatio=\"none\" href=\"{}\"/>",
                data_uri(jpeg)
            ));
        }
        html + "</defs></svg>"
    }

    /// The other pictures, each in an element that a browser takes for text until a script shows it.
    pub fn store(&self) -> String {
        let mut html = String::new();
        for Shelved { placed, jpeg, .. } in self.jpegs.iter().filter(|one| !one.plain) {
            html.push_str(&format!("<script type=\"text/plain\" id=\"{}\">{}</script>", placed.id, data_uri(jpeg)));
        }
        html
    }

    /// A picture by itself, for a file of its own.
    pub fn data_uri(&self, placed: &Placed) -> String {
        let shelved = self.jpegs.iter().find(|shelved| shelved.placed.id == placed.id);
        shelved.map(|shelved| data_uri(&shelved.jpeg)).unwrap_or_default()
    }
}

fn data_uri(jpeg: &[u8]) -> String {
    format!("data:image/jpeg;base64,{}", base64::engine::general_purpose::STANDARD.encode(jpeg))
}

/// The longest side that so many pictures of three by four may have within a budget of pixels.
fn side(budget: f64, count: usize, (least, most): (u32, u32)) -> u32 {
    ((budget / 0.75 / count.max(1) as f64).sqrt() as u32).clamp(least, most)
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
        assert_ne!(first.id, view.id);
        // The same picture under another name is the same picture.
        let copy = folder.path().join("copy.png");
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(pictures.original(&copy).unwrap(), first);
        assert_eq!(pictures.store().matches("<script ").count(), 2);
        pictures.show_plainly(&first);
        assert_eq!((pictures.shelf().matches("<image ").count(), pictures.store().matches("<script ").count()), (1, 1));
    }

    #[test]
    fn a_view_is_cut_from_the_original_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = chessboard(folder.path());
        let mut pictures = Pictures::default();
        // The second square of the first row is dark all over.
        pictures.view(&path, [100.0, 0.0, 200.0, 100.0], [28, 28]).unwrap();
        let shelf = pictures.store();
        let data = shelf.split_once("base64,").unwrap().1.split_once('<').unwrap().0;
        let jpeg = base64::engine::general_purpose::STANDARD.decode(data).unwrap();
        let seen = ::image::load_from_memory(&jpeg).unwrap().into_rgb8();
        assert_eq!(seen.dimensions(), (28, 28));
        // JPEG at quality 82 keeps a flat grey within a few levels.
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
        assert!(pictures.store().is_empty());
    }

    #[test]
    fn many_pictures_are_smaller_ones() {
        assert_eq!(side(ORIGINALS, 10, LONGEST), 800);
        assert_eq!(side(ORIGINALS, 200, LONGEST), 432);
        assert_eq!(side(ORIGINALS, 100_000, LONGEST), 320);
    }

    #[test]
    fn sizes_keep_their_proportions() {
        assert_eq!(fit(3000, 1500, 720), (720, 360));
        assert_eq!(fit(300, 150, 720), (300, 150));
        assert_eq!(fit(10_000, 1, 720), (720, 1));
    }
}
