//! Boxes, sizes and views: the pure maths of where things are. No pixel is touched here.
//!
//! It hides the two coordinate spaces a box can be in, pixels of the original picture and pixels of what the model was
//! shown, behind one typed mapping, [`View`], which works axis by axis (the two scales differ slightly, because each side
//! is rounded to whole patches on its own).
//!
//! What must stay true: a `View`'s region is always in pixels of the ORIGINAL picture, however many crops deep it is;
//! a crop never loses a pixel of the box that was asked for (it is rounded outward); and [`smart_resize`] gives the sizes
//! that the published processors give, since the number of image tokens follows from them.

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
        if area > 0.0 {
            self.intersection(other).map_or(0.0, |b| b.area()) / area
        } else {
            0.0
        }
    }

    /// Each corner moved to the nearest point of `bounds`. A box outside becomes an empty box on the edge.
    pub fn clamp(&self, bounds: &BBox) -> BBox {
        // max then min, not f64::clamp, which panics on inverted bounds.
        let x = |v: f64| v.max(bounds.x1).min(bounds.x2);
        let y = |v: f64| v.max(bounds.y1).min(bounds.y2);
        BBox {
            x1: x(self.x1),
            y1: y(self.y1),
            x2: x(self.x2),
            y2: y(self.y2),
        }
    }

    /// Every edge moved outward by `ratio` of the side it stretches: 0.5 doubles width and height about the same centre.
    pub fn pad(&self, ratio: f64) -> BBox {
        let (dx, dy) = (self.width() * ratio, self.height() * ratio);
        BBox {
            x1: self.x1 - dx,
            y1: self.y1 - dy,
            x2: self.x2 + dx,
            y2: self.y2 + dy,
        }
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
        BBox {
            x1: x(self.x1),
            y1: y(self.y1),
            x2: x(self.x2),
            y2: y(self.y2),
        }
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
        Budget {
            min_pixels,
            max_pixels,
            factor,
        }
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
    let Budget {
        min_pixels,
        max_pixels,
        factor,
    } = budget;
    ensure!(
        factor > 0,
        "sizing a picture: the factor (patch x merge) is 0, expected for example 28"
    );
    ensure!(
        min_pixels <= max_pixels && max_pixels > 0,
        "sizing a picture: min_pixels {min_pixels} and max_pixels {max_pixels} leave no size, expected 0 < min_pixels <= max_pixels"
    );
    let (long, short) = (
        u64::from(size.width.max(size.height)),
        u64::from(size.width.min(size.height)),
    );
    ensure!(
        short > 0,
        "sizing a picture: it is {size} pixels, expected at least 1x1"
    );
    if long > MAX_PICTURE_ASPECT * short {
        bail!(
            "sizing a picture: {size} pixels has an aspect ratio of {:.1}, expected at most {MAX_PICTURE_ASPECT}; cut or pad it first",
            long as f64 / short as f64
        );
    }
    // f64 throughout, in the order of the published function, so that the same roundings happen.
    let (w, h, f) = (
        f64::from(size.width),
        f64::from(size.height),
        f64::from(factor),
    );
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
    Ok(Size {
        width: shown_w as u32,
        height: shown_h as u32,
    })
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
        Grid {
            t: 1,
            h: size.height / patch.max(1),
            w: size.width / patch.max(1),
        }
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
        Ok(View {
            image,
            region: original.bounds(),
            size: smart_resize(original, budget)?,
        })
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
        let size = Size {
            width: region.width() as u32,
            height: region.height() as u32,
        };
        Ok(View {
            image: self.image,
            region,
            size: smart_resize(size, budget)?,
        })
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
    let (x1, x2) = grow(
        region.x1,
        region.x2,
        region.height(),
        f64::from(original.width),
    );
    let (y1, y2) = grow(
        region.y1,
        region.y2,
        region.width(),
        f64::from(original.height),
    );
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
        BoxLimits {
            min_side: 28.0,
            max_aspect: 100.0,
        }
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

/// One-to-one assignment of rows to columns with the largest total weight: which predicted box answers for which target.
///
/// `weights[i][j]` is what pairing row i with column j is worth (an IoU, say); rows must be equally long. As many pairs are made as there
/// are rows or columns, whichever are fewer, even if a pair is worth 0 or less: drop those after. A weight that is not
/// finite (or beyond ±1e100, where sums could overflow) forbids its pair. Returns, for each row, its column or `None`.
///
/// Hungarian method with potentials (Kuhn 1955; Jonker and Volgenant 1987), O(n² m).
///
/// ```
/// use foveate::geometry::assign;
/// // Greedy would take 0.9 first and end with 0.9 + 0.0; together 0.8 + 0.7 is more.
/// assert_eq!(assign(&[vec![0.9, 0.8], vec![0.7, 0.0]]), [Some(1), Some(0)]);
/// ```
///
/// # Panics
/// If rows differ in length: a bug of the caller.
pub fn assign(weights: &[Vec<f64>]) -> Vec<Option<usize>> {
    let rows = weights.len();
    let columns = weights.first().map_or(0, Vec::len);
    assert!(
        weights.iter().all(|row| row.len() == columns),
        "assign: rows of different lengths"
    );
    if columns == 0 {
        return vec![None; rows];
    }
    let allowed = |w: f64| w.abs() <= 1e100;
    let (low, high) = weights
        .iter()
        .flatten()
        .copied()
        .filter(|&w| allowed(w))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), w| {
            (l.min(w), h.max(w))
        });
    if low > high {
        return vec![None; rows];
    }
    // A forbidden pair costs more than any allowed pairs could win back.
    let forbidden = high + (high - low + 1.0) * (rows.min(columns) + 1) as f64;
    let cost = |i: usize, j: usize| {
        let w = weights[i][j];
        if allowed(w) {
            high - w
        } else {
            forbidden - low
        }
    };
    let mut chosen = vec![None; rows];
    if rows <= columns {
        for (row, column) in cheapest(rows, columns, cost).into_iter().enumerate() {
            chosen[row] = Some(column);
        }
    } else {
        for (column, row) in cheapest(columns, rows, |j, i| cost(i, j))
            .into_iter()
            .enumerate()
        {
            chosen[row] = Some(column);
        }
    }
    for (row, column) in chosen.iter_mut().enumerate() {
        *column = column.filter(|&j| allowed(weights[row][j]));
    }
    chosen
}

/// For each of n rows its column, all different, at least total cost; n <= m.
fn cheapest(n: usize, m: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<usize> {
    // Rows are added one at a time, each by the cheapest alternating path to a free column (Dijkstra on reduced costs).
    // Column m is a stand-in that holds the row being added.
    let mut row_price = vec![0.0; n];
    let mut column_price = vec![0.0; m + 1];
    let mut owner: Vec<Option<usize>> = vec![None; m + 1];
    for row in 0..n {
        owner[m] = Some(row);
        let mut distance = vec![f64::INFINITY; m];
        let mut came_from = vec![m; m];
        let mut done = vec![false; m + 1];
        let mut at = m;
        while let Some(i) = owner[at] {
            done[at] = true;
            let (mut next, mut step) = (m, f64::INFINITY);
            for j in (0..m).filter(|&j| !done[j]) {
                let reduced = cost(i, j) - row_price[i] - column_price[j];
                if reduced < distance[j] {
                    distance[j] = reduced;
                    came_from[j] = at;
                }
                if distance[j] < step {
                    step = distance[j];
                    next = j;
                }
            }
            for j in 0..=m {
                if done[j] {
                    if let Some(i) = owner[j] {
                        row_price[i] += step;
                    }
                    column_price[j] -= step;
                } else {
                    distance[j] -= step;
                }
            }
            at = next;
        }
        while at != m {
            owner[at] = owner[came_from[at]];
            at = came_from[at];
        }
    }
    let mut chosen = vec![0; n];
    for (column, row) in owner.iter().take(m).enumerate() {
        if let Some(row) = row {
            chosen[*row] = column;
        }
    }
    chosen
}
