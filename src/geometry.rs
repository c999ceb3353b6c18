//! Boxes, sizes and views: the pure maths of where things are. No pixel is touched here.
//!
//! It hides the two coordinate spaces a box can be in, pixels of the original picture and pixels of what the model was
//! shown, behind one typed mapping, [`View`], which works axis by axis (the two scales differ slightly, because each side
//! is rounded to whole patches on its own).
//!
//! What must stay true: a `View`'s region is always in pixels of the ORIGINAL picture, however many crops deep it is;
//! a crop never loses a pixel of the box that was asked for (it is rounded outward); and [`smart_resize`] gives the sizes
//! that the published processors give, since the number of image tokens follows from them.

mod assign;

pub use self::assign::assign;
use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// Longest allowed ratio of the longer to the shorter side of a picture, as in the published processors.
pub const MAX_PICTURE_ASPECT: u64 = 200;

/// Numbers closer than this to a whole pixel count as that pixel, so that rounding outward does not add a row or column
/// because of the last bits of a division. A millionth of a pixel: far above f64 error at 100,000 px (1e-11), far below sight.
const SNAP: f64 = 1e-6;

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

impl Size {
    pub fn new(width: u32, height: u32) -> Size {
        Size { width, height }
    }

    /// Pixels in all; never overflows.
    pub fn area(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }

    /// Whether no view can be made of a picture this long: over 200 to 1.
    pub fn too_thin(self) -> bool {
        let (long, short) = (self.width.max(self.height), self.width.min(self.height));
        u64::from(long) > MAX_PICTURE_ASPECT * u64::from(short)
    }

    /// The box that covers it all, `[0, 0, width, height]`.
    pub fn bounds(self) -> BBox {
        BBox::new(0.0, 0.0, f64::from(self.width), f64::from(self.height))
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// A box in pixels, x to the right, y down, half open: `[x1, x2) × [y1, y2)`. Written as `[x1, y1, x2, y2]` in JSON.
///
/// The space is in the variable's name: pixels of the original picture unless it says otherwise (`box_in_view`).
///
/// ```
/// use foveate::geometry::BBox;
/// let cup = BBox::new(10.0, 10.0, 30.0, 20.0);
/// let table = BBox::new(20.0, 10.0, 40.0, 20.0);
/// assert_eq!(cup.area(), 200.0);
/// assert_eq!(cup.iou(&table), 100.0 / 300.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f64; 4]", into = "[f64; 4]")]
pub struct BBox {
    pub x1: f64,
    pub y1: f64,
    pub x2: f64,
    pub y2: f64,
}

impl From<[f64; 4]> for BBox {
    fn from([x1, y1, x2, y2]: [f64; 4]) -> BBox {
        BBox { x1, y1, x2, y2 }
    }
}

impl From<BBox> for [f64; 4] {
    fn from(b: BBox) -> [f64; 4] {
        [b.x1, b.y1, b.x2, b.y2]
    }
}

impl std::fmt::Display for BBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}, {}, {}]", self.x1, self.y1, self.x2, self.y2)
    }
}

impl BBox {
    pub fn new(x1: f64, y1: f64, x2: f64, y2: f64) -> BBox {
        BBox { x1, y1, x2, y2 }
    }

    /// Negative when the corners are the wrong way round.
    pub fn width(&self) -> f64 {
        self.x2 - self.x1
    }

    /// Negative when the corners are the wrong way round.
    pub fn height(&self) -> f64 {
        self.y2 - self.y1
    }

    /// Square pixels; 0 for an empty or inverted box.
    pub fn area(&self) -> f64 {
        self.width().max(0.0) * self.height().max(0.0)
    }

    /// `(x, y)` of the middle.
    pub fn center(&self) -> (f64, f64) {
        ((self.x1 + self.x2) / 2.0, (self.y1 + self.y2) / 2.0)
    }

    pub fn is_finite(&self) -> bool {
        <[f64; 4]>::from(*self).iter().all(|v| v.is_finite())
    }

    /// Longer side over shorter side; infinite when a side is 0.
    pub fn aspect(&self) -> f64 {
        let (w, h) = (self.width().abs(), self.height().abs());
        w.max(h) / w.min(h)
    }

    /// What both cover; `None` when that is nothing.
    pub fn intersection(&self, other: &BBox) -> Option<BBox> {
        let both = BBox {
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
            x2: self.x2.min(other.x2),
            y2: self.y2.min(other.y2),
        };
        (both.x1 < both.x2 && both.y1 < both.y2).then_some(both)
    }

    /// The smallest box that holds both (their hull, not the union of their areas).
    pub fn hull(&self, other: &BBox) -> BBox {
        BBox {
            x1: self.x1.min(other.x1),
            y1: self.y1.min(other.y1),
            x2: self.x2.max(other.x2),
            y2: self.y2.max(other.y2),
        }
    }

    /// Intersection over union, 0 to 1; 0 when either box is empty or inverted.
    pub fn iou(&self, other: &BBox) -> f64 {
        let both = self.intersection(other).map_or(0.0, |b| b.area());
        if both == 0.0 {
            return 0.0;
        }
        both / (self.area() + other.area() - both)
    }

    /// Generalised IoU (Rezatofighi et al., <https://arxiv.org/abs/1902.09630>, algorithm 1): the IoU minus the share of the
    /// hull that neither covers. -1 to 1; -1 when either box is empty or inverted, so that such an answer is never the better one.
    pub fn giou(&self, other: &BBox) -> f64 {
        if !(self.area() > 0.0 && other.area() > 0.0) {
            return -1.0;
        }
        let both = self.intersection(other).map_or(0.0, |b| b.area());
        let union = self.area() + other.area() - both;
        let hull = self.hull(other).area();
        both / union - (hull - union) / hull
    }

    /// Whether all of `other` lies in this box, edges included.
    pub fn contains(&self, other: &BBox) -> bool {
        self.x1 <= other.x1 && self.y1 <= other.y1 && self.x2 >= other.x2 && self.y2 >= other.y2
    }

    /// The share of `other`'s area that lies in this box, 0 to 1; 0 when `other` is empty.
    pub fn contains_fraction(&self, other: &BBox) -> f64 {
        let area = other.area();
        if area > 0.0 { self.intersection(other).map_or(0.0, |b| b.area()) / area } else { 0.0 }
    }

    /// Each corner moved to the nearest point of `bounds`. A box outside becomes an empty box on the edge.
    pub fn clamp(&self, bounds: &BBox) -> BBox {
        // max then min, not f64::clamp, which panics on inverted bounds.
        let x = |v: f64| v.max(bounds.x1).min(bounds.x2);
        let y = |v: f64| v.max(bounds.y1).min(bounds.y2);
        BBox { x1: x(self.x1), y1: y(self.y1), x2: x(self.x2), y2: y(self.y2) }
    }

    /// Every edge moved outward by `ratio` of the side it stretches: 0.5 doubles width and height about the same centre.
    pub fn pad(&self, ratio: f64) -> BBox {
        let (dx, dy) = (self.width() * ratio, self.height() * ratio);
        BBox { x1: self.x1 - dx, y1: self.y1 - dy, x2: self.x2 + dx, y2: self.y2 + dy }
    }

    /// The smallest box of whole pixels that covers it.
    pub fn round_outward(&self) -> BBox {
        BBox {
            x1: (self.x1 + SNAP).floor(),
            y1: (self.y1 + SNAP).floor(),
            x2: (self.x2 - SNAP).ceil(),
            y2: (self.y2 - SNAP).ceil(),
        }
    }

    /// The same box after the space `from` was stretched onto the space `to`, axis by axis.
    fn stretch(&self, from: &BBox, to: &BBox) -> BBox {
        // Multiply first, divide last: with whole numbers that is exact whenever the answer is a whole number.
        let x = |v: f64| to.x1 + (v - from.x1) * to.width() / from.width();
        let y = |v: f64| to.y1 + (v - from.y1) * to.height() / from.height();
        BBox { x1: x(self.x1), y1: y(self.y1), x2: x(self.x2), y2: y(self.y2) }
    }
}

/// How many pixels a picture may be shown with, and the unit its sides are whole multiples of (patch × merge, 28 for Qwen2-VL
/// and Qwen2.5-VL, 32 for Qwen3-VL).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub min_pixels: u64,
    pub max_pixels: u64,
    pub factor: u32,
}

impl Budget {
    pub fn new(min_pixels: u64, max_pixels: u64, factor: u32) -> Budget {
        Budget { min_pixels, max_pixels, factor }
    }
}

/// The size a picture is shown to the model with: both sides multiples of `budget.factor`, the area within the budget, the
/// proportions kept as far as that allows. `smart_resize` of the published processors, rounding half to even.
///
/// The cap is strict (the reference of MGPO rounds after its own budget step and can end above it), with one exception
/// taken over from the published function: no side goes below one factor, so a very long picture under a very small cap
/// may exceed it. Likewise the lower bound, applied by rounding up, may pass `max_pixels` if the two are less than a factor apart.
///
/// One difference from the function in transformers, on purpose and as in qwen-vl-utils: each rounded side is taken to be at least
/// one factor *before* the area is compared. There a side of less than half a factor rounds to 0, the area is 0, and the picture is
/// handled as too small however long it is (13x2000 becomes 28x700 instead of 28x1988).
///
/// # Errors
/// A side of 0, a longer side over 200 times the shorter, or a budget that cannot hold (`factor` 0, `min_pixels` over `max_pixels`).
///
/// ```
/// use foveate::geometry::{Budget, Size, smart_resize};
/// let budget = Budget::new(200_704, 1_003_520, 28);
/// assert_eq!(smart_resize(Size::new(4032, 3024), budget).unwrap(), Size::new(1148, 840));
/// ```
pub fn smart_resize(size: Size, budget: Budget) -> Result<Size> {
    let Budget { min_pixels, max_pixels, factor } = budget;
    ensure!(factor > 0, "sizing a picture: the factor (patch x merge) is 0, expected for example 28");
    ensure!(
        min_pixels <= max_pixels && max_pixels > 0,
        "sizing a picture: min_pixels {min_pixels} and max_pixels {max_pixels} leave no size, expected 0 < min_pixels <= max_pixels"
    );
    let (long, short) = (u64::from(size.width.max(size.height)), u64::from(size.width.min(size.height)));
    ensure!(short > 0, "sizing a picture: it is {size} pixels, expected at least 1x1");
    if size.too_thin() {
        bail!(
            "sizing a picture: {size} pixels has an aspect ratio of {:.1}, expected at most {MAX_PICTURE_ASPECT}; cut or pad it first",
            long as f64 / short as f64
        );
    }
    // f64 throughout, in the order of the published function, so that the same roundings happen.
    let (w, h, f) = (f64::from(size.width), f64::from(size.height), f64::from(factor));
    let nearest = |side: f64| ((side / f).round_ties_even() * f).max(f);
    let (mut shown_w, mut shown_h) = (nearest(w), nearest(h));
    if shown_w * shown_h > max_pixels as f64 {
        let beta = (h * w / max_pixels as f64).sqrt();
        let down = |side: f64| ((side / beta / f).floor() * f).max(f);
        (shown_w, shown_h) = (down(w), down(h));
    } else if shown_w * shown_h < min_pixels as f64 {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let up = |side: f64| (side * beta / f).ceil() * f;
        (shown_w, shown_h) = (up(w), up(h));
    }
    let whole = f64::from(u32::MAX);
    ensure!(
        shown_w <= whole && shown_h <= whole,
        "sizing a picture: {size} would be shown as {shown_w}x{shown_h}, more than can be counted; lower min_pixels ({min_pixels})"
    );
    Ok(Size { width: shown_w as u32, height: shown_h as u32 })
}

/// An image's patches: frames, rows, columns, in patches (not merged tokens).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grid {
    pub t: u32,
    pub h: u32,
    pub w: u32,
}

impl Grid {
    /// The grid of one still picture shown at `size` with square patches of `patch` pixels.
    pub fn of(size: Size, patch: u32) -> Grid {
        Grid { t: 1, h: size.height / patch.max(1), w: size.width / patch.max(1) }
    }

    /// Rows of the patch matrix.
    pub fn patches(&self) -> usize {
        self.t as usize * self.h as usize * self.w as usize
    }

    /// Tokens in the language model: `merge` × `merge` patches become one.
    pub fn tokens(&self, merge: u32) -> usize {
        let merge = merge.max(1) as usize;
        self.patches() / (merge * merge)
    }
}

/// What the model is shown: which image, which region of its ORIGINAL pixels, and the size it is shown with.
///
/// A crop is a `View`, not a new image, so a crop of a crop is one too and nothing has to remember the way there.
///
/// ```
/// use foveate::geometry::{BBox, Budget, Size, View};
/// let original = Size::new(4032, 3024);
/// let view = View { image: 0, region: original.bounds(), size: Size::new(1148, 868) };
/// let box_in_view = BBox::new(287.0, 217.0, 574.0, 434.0);
/// assert_eq!(view.original_from_view(box_in_view), BBox::new(1008.0, 756.0, 2016.0, 1512.0));
/// let crop = view.crop(box_in_view, original, Budget::new(200_704, 1_003_520, 28)).unwrap();
/// assert_eq!(crop.region, BBox::new(1008.0, 756.0, 2016.0, 1512.0));
/// assert_eq!(crop.size, Size::new(1008, 756)); // its own pixels: nothing is lost to shrinking any more
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct View {
    pub image: usize,
    pub region: BBox,
    pub size: Size,
}

impl View {
    /// The first look: the whole of image number `image`, which is `original` pixels large, shrunk or grown to the budget.
    ///
    /// # Errors
    /// Those of [`smart_resize`].
    pub fn whole(image: usize, original: Size, budget: Budget) -> Result<View> {
        Ok(View { image, region: original.bounds(), size: smart_resize(original, budget)? })
    }

    /// Where a box the model named, in pixels of what it was shown, lies in the original.
    pub fn original_from_view(&self, box_in_view: BBox) -> BBox {
        box_in_view.stretch(&self.size.bounds(), &self.region)
    }

    /// Where a box of the original lies in what the model was shown. It may stick out, when the view is a crop.
    pub fn view_from_original(&self, original: BBox) -> BBox {
        original.stretch(&self.region, &self.size.bounds())
    }

    /// A closer look at a box named in this view, cut from the original picture (`original` is its size).
    ///
    /// The region is rounded outward to whole original pixels and clamped to the picture, so the box is covered to the last pixel, and a box
    /// that sticks out of the view (padding does that) sees what lies beside it. A region thinner than a picture may be
    /// (1 : 200) is widened about its middle until it may; so every box that [`judge_box`] accepts gives a view.
    ///
    /// # Errors
    /// A box with no area inside the picture, or that is not finite; then those of [`smart_resize`].
    pub fn crop(&self, box_in_view: BBox, original: Size, budget: Budget) -> Result<View> {
        let wanted = self.original_from_view(box_in_view);
        ensure!(
            wanted.is_finite() && wanted.width() > 0.0 && wanted.height() > 0.0,
            "cropping image {}: the box {box_in_view} in the view has no area",
            self.image
        );
        let region = wanted.round_outward().clamp(&original.bounds());
        ensure!(
            region.area() > 0.0,
            "cropping image {}: the box {box_in_view} in the view is {wanted} in the original, outside its {original} pixels",
            self.image
        );
        let region = widen(region, original);
        let size = Size { width: region.width() as u32, height: region.height() as u32 };
        Ok(View { image: self.image, region, size: smart_resize(size, budget)? })
    }
}

/// Grows the short side of a region of whole pixels until its aspect ratio is one a picture may have, within the original.
fn widen(region: BBox, original: Size) -> BBox {
    let limit = MAX_PICTURE_ASPECT as f64;
    let grow = |low: f64, high: f64, other: f64, end: f64| {
        let need = (other / limit).ceil();
        if high - low >= need {
            return (low, high);
        }
        let start = ((low + high - need) / 2.0).floor().min(end - need).max(0.0);
        (start, (start + need).min(end))
    };
    let (x1, x2) = grow(region.x1, region.x2, region.height(), f64::from(original.width));
    let (y1, y2) = grow(region.y1, region.y2, region.width(), f64::from(original.height));
    BBox { x1, y1, x2, y2 }
}

/// Limits a box named by the model has to keep, in pixels of the view it was named in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BoxLimits {
    /// Width and height must each be MORE than this.
    pub min_side: f64,
    /// Longer over shorter side must be LESS than this.
    pub max_aspect: f64,
}

impl Default for BoxLimits {
    /// The published values of MGPO: over 28 pixels, under 100 to 1.
    fn default() -> BoxLimits {
        BoxLimits { min_side: 28.0, max_aspect: 100.0 }
    }
}

/// What [`judge_box`] found. A bad box is data, counted and shown, never an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxVerdict {
    Valid,
    /// NaN or infinite.
    NotFinite,
    /// `x1 >= x2` or `y1 >= y2`.
    Inverted,
    /// A corner left of or above 0, or right of or below the view.
    OutOfRange,
    /// A side of at most `min_side`.
    TooSmall,
    /// An aspect ratio of at least `max_aspect`.
    TooThin,
}

/// Whether a box named by the model may be cropped: the first rule it breaks, in the order of [`BoxVerdict`].
///
/// `view` is the size the model saw. Rules of the MGPO reference (finite, right way round, inside, sides, aspect).
pub fn judge_box(box_in_view: &BBox, view: Size, limits: BoxLimits) -> BoxVerdict {
    let b = box_in_view;
    if !b.is_finite() {
        BoxVerdict::NotFinite
    } else if b.x1 >= b.x2 || b.y1 >= b.y2 {
        BoxVerdict::Inverted
    } else if !view.bounds().contains(b) {
        BoxVerdict::OutOfRange
    } else if b.width() <= limits.min_side || b.height() <= limits.min_side {
        BoxVerdict::TooSmall
    } else if b.aspect() >= limits.max_aspect {
        BoxVerdict::TooThin
    } else {
        BoxVerdict::Valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDE: Budget = Budget { min_pixels: 3136, max_pixels: 12_845_056, factor: 28 };
    const MGPO: Budget = Budget { min_pixels: 200_704, max_pixels: 1_003_520, factor: 28 };
    const QWEN3: Budget = Budget { min_pixels: 65_536, max_pixels: 16_777_216, factor: 32 };

    fn shown(h: u32, w: u32, budget: Budget) -> (u32, u32) {
        let size = smart_resize(Size::new(w, h), budget).unwrap();
        (size.height, size.width)
    }

    #[test]
    fn sizes_are_those_of_the_published_processors() {
        // (h, w), then (h, w) under three budgets, from running transformers.
        let table = [
            ((70, 70), (56, 56), (448, 448), (256, 256)),
            ((42, 42), (56, 56), (448, 448), (256, 256)),
            ((14, 14), (56, 56), (448, 448), (256, 256)),
            ((100, 333), (112, 336), (252, 840), (160, 480)),
            ((1080, 1920), (1092, 1932), (728, 1316), (1088, 1920)),
            ((3024, 4032), (3024, 4032), (840, 1148), (3008, 4032)),
            ((5000, 300), (5012, 308), (4088, 224), (4992, 288)),
            ((867, 1156), (868, 1148), (868, 1148), (864, 1152)),
        ];
        for ((h, w), wide, mgpo, qwen3) in table {
            assert_eq!(shown(h, w, WIDE), wide, "{h}x{w}");
            assert_eq!(shown(h, w, MGPO), mgpo, "{h}x{w}");
            assert_eq!(shown(h, w, QWEN3), qwen3, "{h}x{w}");
        }
    }

    #[test]
    fn sizes_after_the_reference_shrank_the_picture_itself() {
        // MGPO's reference scales 1920x1080 to 1335x751 and 100x60 to 578x347 and then rounds: with a cap that does not bite.
        assert_eq!(shown(751, 1335, WIDE), (756, 1344));
        assert_eq!(shown(347, 578, WIDE), (336, 588));
        assert_eq!(Grid::of(Size::new(588, 336), 14).tokens(2), 252);
        // Ours keeps the cap: 756 x 1344 = 1,016,064 would be over.
        assert_eq!(shown(751, 1335, MGPO), (728, 1316));
    }

    #[test]
    fn a_thin_side_is_one_factor_before_the_area_is_looked_at() {
        assert_eq!(shown(13, 2000, WIDE), (28, 1988)); // transformers: 28x700
        assert_eq!(shown(1, 200, WIDE), (28, 196)); // transformers: 28x812
        assert_eq!(shown(1, 1, WIDE), (56, 56));
    }

    #[test]
    fn sizes_that_cannot_be_shown_are_errors() {
        let error = |w, h, budget| smart_resize(Size::new(w, h), budget).unwrap_err().to_string();
        assert!(error(1, 10_000, WIDE).contains("aspect ratio of 10000.0"));
        assert!(error(201, 1, WIDE).contains("aspect ratio of 201.0"));
        assert!(error(0, 5, WIDE).contains("0x5"));
        assert!(error(5, 5, Budget::new(10, 9, 28)).contains("min_pixels 10"));
        assert!(error(5, 5, Budget::new(1, 9, 0)).contains("factor"));
        assert!(error(5, 5, Budget::new(u64::MAX, u64::MAX, 28)).contains("min_pixels"));
        assert!(smart_resize(Size::new(u32::MAX, u32::MAX), WIDE).is_ok());
    }

    #[test]
    fn boxes_overlap_as_drawn_on_paper() {
        let a = BBox::new(0.0, 0.0, 4.0, 4.0);
        let b = BBox::new(2.0, 2.0, 6.0, 6.0);
        assert_eq!(a.intersection(&b), Some(BBox::new(2.0, 2.0, 4.0, 4.0)));
        assert_eq!(a.iou(&b), 4.0 / 28.0);
        assert_eq!(a.hull(&b), BBox::new(0.0, 0.0, 6.0, 6.0));
        assert_eq!(a.giou(&b), 4.0 / 28.0 - 8.0 / 36.0);
        assert_eq!(a.contains_fraction(&b), 0.25);
        assert!(a.contains(&BBox::new(0.0, 1.0, 4.0, 2.0)) && !a.contains(&b));
        // Beside each other: they touch but share nothing.
        let c = BBox::new(4.0, 0.0, 8.0, 4.0);
        assert_eq!((a.intersection(&c), a.iou(&c), a.giou(&c)), (None, 0.0, 0.0));
        // Far apart: hull 12 x 4, 16 of 48 not covered.
        assert_eq!(a.giou(&BBox::new(8.0, 0.0, 12.0, 4.0)), -16.0 / 48.0);
        assert_eq!(a.giou(&a), 1.0);
        let inverted = BBox::new(4.0, 4.0, 0.0, 0.0);
        assert_eq!((inverted.area(), a.iou(&inverted), a.giou(&inverted)), (0.0, 0.0, -1.0));
        assert_eq!(a.pad(0.25), BBox::new(-1.0, -1.0, 5.0, 5.0));
        assert_eq!(b.clamp(&a), BBox::new(2.0, 2.0, 4.0, 4.0));
        assert_eq!(b.center(), (4.0, 4.0));
        assert_eq!(serde_json::to_string(&b).unwrap(), "[2.0,2.0,6.0,6.0]");
        assert_eq!(serde_json::from_str::<BBox>("[1, 2, 3.5, 4]").unwrap(), BBox::new(1.0, 2.0, 3.5, 4.0));
    }

    #[test]
    fn verdicts_at_the_limits() {
        use BoxVerdict::*;
        let view = Size::new(4000, 868);
        let judge = |x1, y1, x2, y2| judge_box(&BBox::new(x1, y1, x2, y2), view, BoxLimits::default());
        assert_eq!(judge(10.0, 10.0, 38.0, 110.0), TooSmall); // 28 wide
        assert_eq!(judge(10.0, 10.0, 39.0, 110.0), Valid); // 29 wide
        assert_eq!(judge(0.0, 0.0, 4000.0, 868.0), Valid); // the right and lower edge belong to it
        assert_eq!(judge(3900.0, 0.0, 4001.0, 868.0), OutOfRange);
        assert_eq!(judge(-1.0, 0.0, 100.0, 100.0), OutOfRange);
        assert_eq!(judge(0.0, 0.0, 2900.0, 29.0), TooThin); // 100 to 1
        assert_eq!(judge(0.0, 0.0, 2899.0, 29.0), Valid);
        assert_eq!(judge(100.0, 100.0, 50.0, 200.0), Inverted);
        assert_eq!(judge(100.0, 100.0, 100.0, 200.0), Inverted);
        assert_eq!(judge(f64::NAN, 0.0, 100.0, 100.0), NotFinite);
        assert_eq!(judge(0.0, 0.0, f64::INFINITY, 100.0), NotFinite);
    }

    #[test]
    fn the_worked_example_and_a_crop_of_the_crop() {
        let original = Size::new(4032, 3024);
        // The reference's two steps end at 1148x868; ours at 1148x840. The mapping is the same arithmetic.
        let view = View { image: 0, region: original.bounds(), size: Size::new(1148, 868) };
        let crop = view.crop(BBox::new(287.0, 217.0, 574.0, 434.0), original, WIDE).unwrap();
        assert_eq!(crop.region, BBox::new(1008.0, 756.0, 2016.0, 1512.0));
        assert_eq!(crop.size, Size::new(1008, 756));
        // Right half of the crop's upper half, at one view pixel per original pixel.
        let closer = crop.crop(BBox::new(504.0, 0.0, 1008.0, 378.0), original, WIDE).unwrap();
        assert_eq!(closer.region, BBox::new(1512.0, 756.0, 2016.0, 1134.0));
        let first = View::whole(3, original, MGPO).unwrap();
        assert_eq!((first.image, first.region, first.size), (3, original.bounds(), Size::new(1148, 840)));
        // 100.5 of 1148 is 352.97..; of 840, 361.8: outward.
        let fractional = first.crop(BBox::new(100.5, 100.5, 200.0, 200.0), original, MGPO).unwrap();
        assert_eq!(fractional.region, BBox::new(352.0, 361.0, 703.0, 720.0));
    }

    #[test]
    fn crops_at_and_beyond_the_edge() {
        let original = Size::new(1000, 500);
        let view = View { image: 0, region: original.bounds(), size: Size::new(1000, 500) };
        let over = view.crop(BBox::new(900.0, -50.0, 1100.0, 100.0), original, WIDE).unwrap();
        assert_eq!(over.region, BBox::new(900.0, 0.0, 1000.0, 100.0));
        assert!(view.crop(BBox::new(1000.0, 0.0, 1100.0, 100.0), original, WIDE).is_err());
        assert!(view.crop(BBox::new(10.0, 10.0, 10.0, 20.0), original, WIDE).is_err());
        assert!(view.crop(BBox::new(f64::NAN, 0.0, 10.0, 10.0), original, WIDE).is_err());
        // 1000 x 1 may not be shown: it grows to 1000 x 5, about its middle, and stays inside.
        let line = view.crop(BBox::new(0.0, 250.0, 1000.0, 251.0), original, WIDE).unwrap();
        assert_eq!(line.region, BBox::new(0.0, 248.0, 1000.0, 253.0));
        let bottom = view.crop(BBox::new(0.0, 499.0, 1000.0, 500.0), original, WIDE).unwrap();
        assert_eq!(bottom.region, BBox::new(0.0, 495.0, 1000.0, 500.0));
    }

    /// An original, two budgets, and two boxes as fractions of the view.
    fn looks() -> impl Strategy<Value = (Size, Budget, [f64; 4], [f64; 4])> {
        let fractions = || [0.0..0.9f64, 0.0..0.9f64, 0.01..1.0f64, 0.01..1.0f64];
        (40..5000u32, 40..5000u32, 1..400u64, fractions(), fractions())
            .prop_map(|(w, h, k, a, b)| (Size::new(w, h), Budget::new(3136, k * 10_000, 28), a, b))
    }

    fn box_at(view: &View, [x, y, w, h]: [f64; 4]) -> BBox {
        let (width, height) = (f64::from(view.size.width), f64::from(view.size.height));
        let (x1, y1) = (x * width, y * height);
        BBox::new(x1, y1, x1 + (w * (width - x1)).max(1.0), y1 + (h * (height - y1)).max(1.0))
            .clamp(&view.size.bounds())
    }

    proptest! {
        #[test]
        fn nested_crops_hold_their_box_within_a_pixel((original, budget, a, b) in looks()) {
            let mut view = View::whole(0, original, budget).unwrap();
            for fractions in [a, b] {
                let box_in_view = box_at(&view, fractions);
                let wanted = view.original_from_view(box_in_view);
                // There and back. 1e-6 px: f64 at 5000 px with a scale under 200 errs by less than 1e-9.
                let back = view.view_from_original(wanted);
                for (there, here) in <[f64; 4]>::from(back).into_iter().zip(<[f64; 4]>::from(box_in_view)) {
                    prop_assert!((there - here).abs() < 1e-6);
                }
                let crop = view.crop(box_in_view, original, budget).unwrap();
                prop_assert!(original.bounds().contains(&crop.region));
                prop_assert_eq!(crop.region, crop.region.round_outward());
                prop_assert!(crop.region.pad(1e-6).contains(&wanted));
                if wanted.aspect() < 100.0 && wanted.width().min(wanted.height()) > 4.0 {
                    let grown = [wanted.x1 - crop.region.x1, wanted.y1 - crop.region.y1, crop.region.x2 - wanted.x2, crop.region.y2 - wanted.y2];
                    prop_assert!(grown.iter().all(|&g| g < 1.0), "grown by {:?}", grown);
                }
                // The crop's own corners are its region's corners: composing the maps loses nothing.
                let whole = crop.original_from_view(crop.size.bounds());
                for (there, here) in <[f64; 4]>::from(whole).into_iter().zip(<[f64; 4]>::from(crop.region)) {
                    prop_assert!((there - here).abs() < 1e-6);
                }
                view = crop;
            }
        }

        #[test]
        fn shown_sizes_are_whole_factors_within_the_cap(w in 1..8000u32, h in 1..8000u32, low in 1..300u64, room in 4..1000u64) {
            let budget = Budget::new(low * 1000, low * 1000 * room, 28);
            let Ok(size) = smart_resize(Size::new(w, h), budget) else {
                prop_assert!(w.max(h) > 200 * w.min(h));
                return Ok(());
            };
            prop_assert!(size.width % 28 == 0 && size.height % 28 == 0 && size.area() > 0);
            prop_assert!(size.area() >= budget.min_pixels || size.width.max(size.height) > 28);
            prop_assert!(size.area() <= budget.max_pixels || size.width.min(size.height) == 28 || low * room < 40);
        }
    }
}
