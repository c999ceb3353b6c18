//! Turns a scene, or a region of it, into pixels of any size.
//!
//! It hides resampling: the photograph goes through a separable cubic filter that widens when shrinking (as Pillow's
//! bicubic, with a fractional source box), objects and plates through inverse mapping with a few samples a pixel. All
//! read the pyramid level nearest above the wanted resolution, so the cost follows the pixels drawn. What must stay
//! true: a region drawn alone shows what the whole drawing shows there, up to resampling; nothing here is random.

use ::image::RgbImage;

use super::library::{DIGIT_DRAWN, Library, Pyramid, Raster};
use super::world::{Placed, Plate, Scene};
use crate::geometry::{BBox, Size};

/// A region of a scene (scene units: the width is 1) shown with `size` pixels.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub region: BBox,
    pub size: Size,
}

impl Frame {
    /// A box of the scene in pixels of this drawing; not clipped.
    pub fn pixels(&self, b: BBox) -> BBox {
        let (sx, sy) = self.scale();
        BBox::new(
            (b.x1 - self.region.x1) * sx,
            (b.y1 - self.region.y1) * sy,
            (b.x2 - self.region.x1) * sx,
            (b.y2 - self.region.y1) * sy,
        )
    }

    /// A box in pixels of this drawing in units of the scene.
    pub fn scene(&self, b: BBox) -> BBox {
        let (sx, sy) = self.scale();
        BBox::new(
            self.region.x1 + b.x1 / sx,
            self.region.y1 + b.y1 / sy,
            self.region.x1 + b.x2 / sx,
            self.region.y1 + b.y2 / sy,
        )
    }

    /// Pixels per unit of the scene, across and down.
    fn scale(&self) -> (f64, f64) {
        (f64::from(self.size.width) / self.region.width(), f64::from(self.size.height) / self.region.height())
    }
}

/// The whole scene at `size`.
pub fn draw(library: &Library, scene: &Scene, size: Size) -> RgbImage {
    draw_region(library, scene, scene.bounds(), size)
}

/// `region` of the scene (scene units) at `size`. Outside the scene the edge of the photograph is repeated.
pub fn draw_region(library: &Library, scene: &Scene, region: BBox, size: Size) -> RgbImage {
    let frame = Frame { region, size };
    let mut canvas = Canvas { width: size.width as usize, height: size.height as usize, rgb: Vec::new() };
    canvas.rgb = photograph(library, scene, &frame);
    for object in &scene.objects {
        canvas.object(library, object, &frame);
    }
    for plate in scene.plates() {
        canvas.plate(library, plate, &frame);
    }
    let bytes = canvas.rgb.iter().map(|v| (v + 0.5).clamp(0.0, 255.0) as u8).collect();
    // The buffer was made from the size: the fallback only spares an unwrap.
    RgbImage::from_raw(size.width, size.height, bytes).unwrap_or_default()
}

/// RGB, 0 to 255.
struct Canvas {
    width: usize,
    height: usize,
    rgb: Vec<f32>,
}

impl Canvas {
    /// The pixels that `b` (in pixels of the canvas) may touch.
    fn touched(&self, b: &BBox) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let range = |a: f64, b: f64, n: usize| {
            let from = a.floor().max(0.0) as usize;
            from.min(n)..(b.ceil().max(0.0) as usize).min(n).max(from.min(n))
        };
        (range(b.x1, b.x2, self.width), range(b.y1, b.y2, self.height))
    }

    fn object(&mut self, library: &Library, object: &Placed, frame: &Frame) {
        let Some(picture) = library.classes.get(object.class).and_then(|c| c.pictures.get(object.picture)) else {
            return;
        };
        let (sx, sy) = frame.scale();
        // Turned corners stick out of the box by at most the sine of the angle.
        let (xs, ys) = self.touched(&frame.pixels(object.bbox.pad(object.angle.sin().abs())).pad(0.02));
        if xs.is_empty() || ys.is_empty() {
            return;
        }
        let level = picture.level(object.bbox.width() * sx / picture.full().width as f64);
        let ratio = level.width as f64 / (object.bbox.width() * sx);
        let samples = if ratio > 0.7 { 2 } else { 1 };
        let (cx, cy) = object.bbox.center();
        let (sin, cos) = object.angle.sin_cos();
        let (lw, lh) = (level.width as f64 / object.bbox.width(), level.height as f64 / object.bbox.height());
        // From the canvas to the level is one affine map: found once, it costs a sample two multiplications an axis.
        let flip = if object.mirror { -1.0 } else { 1.0 };
        let to_level = |x: f64, y: f64| {
            let (px, py) = (x / sx + frame.region.x1 - cx, y / sy + frame.region.y1 - cy);
            (
                flip * (px * cos + py * sin) * lw + level.width as f64 / 2.0 - 0.5,
                (py * cos - px * sin) * lh + level.height as f64 / 2.0 - 0.5,
            )
        };
        let origin = to_level(0.0, 0.0);
        let (right, down) = (to_level(1.0, 0.0), to_level(0.0, 1.0));
        let right = ((right.0 - origin.0) as f32, (right.1 - origin.1) as f32);
        let down = ((down.0 - origin.0) as f32, (down.1 - origin.1) as f32);
        let origin = (origin.0 as f32, origin.1 as f32);
        let step = 1.0 / samples as f32;
        let weight = step * step;
        // From a pixel to -1 .. 1 over the box, for the light.
        let shown = frame.pixels(object.bbox);
        let span = |from: f64, to: f64| ((2.0 / (to - from)) as f32, (-(from + to) / (to - from)) as f32);
        let (across, downward) = (span(shown.x1, shown.x2), span(shown.y1, shown.y2));
        for y in ys {
            for x in xs.clone() {
                let mut sum = [0f32; 4];
                for j in 0..samples {
                    let py = y as f32 + (j as f32 + 0.5) * step;
                    for i in 0..samples {
                        let px = x as f32 + (i as f32 + 0.5) * step;
                        bilinear(
                            level,
                            origin.0 + px * right.0 + py * down.0,
                            origin.1 + px * right.1 + py * down.1,
                            &mut sum,
                        );
                    }
                }
                if sum[3] == 0.0 {
                    continue;
                }
                let alpha = sum[3] * weight;
                let cover = 1.0 - alpha / 255.0;
                let (u, v) = (x as f32 * across.0 + across.1, y as f32 * downward.0 + downward.1);
                let light = weight * (1.0 + object.shade[0] * u + object.shade[1] * v);
                let at = (y * self.width + x) * 3;
                for ((under, sum), gain) in self.rgb[at..at + 3].iter_mut().zip(sum).zip(object.gain) {
                    *under = *under * cover + (sum * light * gain).min(alpha);
                }
            }
        }
    }

    fn plate(&mut self, library: &Library, plate: &Plate, frame: &Frame) {
        let (sx, sy) = frame.scale();
        let (xs, ys) = self.touched(&frame.pixels(plate.bbox));
        let samples = if plate.digit_height * sy < 12.0 { 4 } else { 2 };
        let step = 1.0 / f64::from(samples);
        let weight = (step * step) as f32;
        for y in ys {
            for x in xs.clone() {
                let (mut sum, mut inside) = ([0f32; 3], 0f32);
                for j in 0..samples {
                    let py = (y as f64 + (f64::from(j) + 0.5) * step) / sy + frame.region.y1;
                    for i in 0..samples {
                        let px = (x as f64 + (f64::from(i) + 0.5) * step) / sx + frame.region.x1;
                        if let Some(colour) = plate_colour(library, plate, px, py) {
                            inside += weight;
                            (0..3).for_each(|c| sum[c] += weight * colour[c]);
                        }
                    }
                }
                let at = (y * self.width + x) * 3;
                for (under, sum) in self.rgb[at..at + 3].iter_mut().zip(sum) {
                    *under = *under * (1.0 - inside) + sum;
                }
            }
        }
    }
}

/// The colour of a plate at a point of the scene; `None` outside.
fn plate_colour(library: &Library, plate: &Plate, x: f64, y: f64) -> Option<[f32; 3]> {
    let b = &plate.bbox;
    let edge = (x - b.x1).min(b.x2 - x).min(y - b.y1).min(b.y2 - y);
    if edge < 0.0 {
        return None;
    }
    if edge < plate.border {
        return Some(plate.ink);
    }
    let height = plate.digit_height;
    let (cx, cy) = b.center();
    let left = cx - plate.text_width() / 2.0;
    let v = (y - (cy - height / 2.0)) / height;
    let hand = &plate.hand;
    let mut ink = 0f32;
    for (i, &digit) in plate.digits.iter().enumerate() {
        let u = (x - (left + i as f64 * plate.advance())) / height;
        if !(0.0..1.0).contains(&u) || !(0.0..1.0).contains(&v) {
            continue;
        }
        let (du, dv) = (u as f32 - 0.5, v as f32 - 0.5);
        let u = 0.5 + hand.shift[0] + hand.to_scan[0] * du + hand.to_scan[1] * dv;
        let v = 0.5 + hand.shift[1] + hand.to_scan[2] * du + hand.to_scan[3] * dv;
        if !(0.0..1.0).contains(&u) || !(0.0..1.0).contains(&v) {
            continue;
        }
        if let Some(digit) = library.digits.get(digit) {
            // Cells of neighbouring digits overlap a little; the darker stroke is seen.
            ink = ink.max(ink_at(&digit.ink, u, v));
        }
    }
    let ink = ((ink - hand.cut) * hand.contrast).clamp(0.0, 1.0);
    Some(std::array::from_fn(|c| plate.paper[c] * (1.0 - ink) + plate.ink[c] * ink))
}

/// Ink of a digit, 0 to 1, at a point of its unit square.
fn ink_at(ink: &[u8], u: f32, v: f32) -> f32 {
    let last = DIGIT_DRAWN - 1;
    let clamp = |t: f32| (t * DIGIT_DRAWN as f32 - 0.5).clamp(0.0, last as f32);
    let (x, y) = (clamp(u), clamp(v));
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(last), (y0 + 1).min(last));
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    let at = |x: usize, y: usize| f32::from(ink[y * DIGIT_DRAWN + x]);
    let top = at(x0, y0) * (1.0 - fx) + at(x1, y0) * fx;
    let bottom = at(x0, y1) * (1.0 - fx) + at(x1, y1) * fx;
    (top * (1.0 - fy) + bottom * fy) / 255.0
}

/// Adds the RGBA value at `(x, y)` (pixel centres at whole numbers) to `sum`; nothing beyond the edges.
fn bilinear(raster: &Raster, x: f32, y: f32, sum: &mut [f32; 4]) {
    if !(x > -1.0 && y > -1.0 && x < raster.width as f32 && y < raster.height as f32) {
        return;
    }
    // Rounding down by way of an integer: f32::floor is a function call on the oldest x86-64.
    let (x0, y0) = ((x + 1.0) as i32 - 1, (y + 1.0) as i32 - 1);
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    if x0 >= 0 && y0 >= 0 && x0 < raster.width as i32 - 1 && y0 < raster.height as i32 - 1 {
        // All four neighbours are there: nearly every sample, so without asking for each.
        let at = (y0 as usize * raster.width + x0 as usize) * 4;
        let below = at + raster.width * 4;
        if let (Some(top), Some(bottom)) =
            (raster.data[at..].first_chunk::<8>(), raster.data[below..].first_chunk::<8>())
        {
            let weights = [(1.0 - fx) * (1.0 - fy), fx * (1.0 - fy), (1.0 - fx) * fy, fx * fy];
            for c in 0..4 {
                sum[c] += weights[0] * f32::from(top[c])
                    + weights[1] * f32::from(top[c + 4])
                    + weights[2] * f32::from(bottom[c])
                    + weights[3] * f32::from(bottom[c + 4]);
            }
            return;
        }
    }
    for (dy, wy) in [(0, 1.0 - fy), (1, fy)] {
        let row = y0 + dy;
        if row < 0 || row >= raster.height as i32 {
            continue;
        }
        for (dx, wx) in [(0, 1.0 - fx), (1, fx)] {
            let column = x0 + dx;
            if column < 0 || column >= raster.width as i32 {
                continue;
            }
            let at = (row as usize * raster.width + column as usize) * 4;
            if let Some(pixel) = raster.data.get(at..at + 4) {
                for c in 0..4 {
                    sum[c] += wx * wy * f32::from(pixel[c]);
                }
            }
        }
    }
}

/// The background of `frame`, RGB in 0..255 before clamping.
fn photograph(library: &Library, scene: &Scene, frame: &Frame) -> Vec<f32> {
    let (width, height) = (frame.size.width as usize, frame.size.height as usize);
    let Some(photo) = library.photos.get(scene.photo) else {
        return vec![127.0; width * height * 3];
    };
    let per_unit = scene.window.width();
    let region = frame.region;
    // A mirrored photograph is read from the mirrored place and turned round at the end.
    let (x1, x2) = if scene.mirror { (1.0 - region.x2, 1.0 - region.x1) } else { (region.x1, region.x2) };
    let source = BBox::new(
        scene.window.x1 + x1 * per_unit,
        scene.window.y1 + region.y1 * per_unit,
        scene.window.x1 + x2 * per_unit,
        scene.window.y1 + region.y2 * per_unit,
    );
    let mut rgb = resample(&photo.pixels, source, width, height);
    if scene.mirror {
        for row in rgb.chunks_exact_mut(width * 3) {
            for x in 0..width / 2 {
                for c in 0..3 {
                    row.swap(x * 3 + c, (width - 1 - x) * 3 + c);
                }
            }
        }
    }
    for pixel in rgb.as_chunks_mut::<3>().0 {
        for (value, gain) in pixel.iter_mut().zip(scene.gain) {
            *value = (*value * gain).clamp(0.0, 255.0);
        }
    }
    rgb
}

/// `source` (a box in pixels of the full RGB picture, fractions allowed) with `width` x `height` pixels.
fn resample(picture: &Pyramid, source: BBox, width: usize, height: usize) -> Vec<f32> {
    let shrink = (width as f64 / source.width()).max(height as f64 / source.height()).min(1.0);
    let level = picture.level(shrink);
    let (kx, ky) =
        (level.width as f64 / picture.full().width as f64, level.height as f64 / picture.full().height as f64);
    let across = taps(source.x1 * kx, source.x2 * kx, level.width, width);
    let down = taps(source.y1 * ky, source.y2 * ky, level.height, height);
    // Only the columns that are read; rows first, because whole rows add up fast.
    let first = across.iter().map(|t| t.first).min().unwrap_or(0);
    let end = across.iter().map(|t| t.first + t.weights.len()).max().unwrap_or(0);
    let mut row = vec![0f32; (end - first) * 3];
    let mut out = vec![0f32; width * height * 3];
    for (tap, out) in down.iter().zip(out.chunks_exact_mut(width * 3)) {
        row.fill(0.0);
        for (k, &weight) in tap.weights.iter().enumerate() {
            let start = ((tap.first + k) * level.width + first) * 3;
            for (sum, &value) in row.iter_mut().zip(&level.data[start..start + (end - first) * 3]) {
                *sum += weight * f32::from(value);
            }
        }
        for (tap, pixel) in across.iter().zip(out.as_chunks_mut::<3>().0) {
            let start = (tap.first - first) * 3;
            for (&weight, value) in tap.weights.iter().zip(row[start..].as_chunks::<3>().0) {
                for c in 0..3 {
                    pixel[c] += weight * value[c];
                }
            }
        }
    }
    out
}

/// The source pixels one output pixel is made of.
struct Taps {
    first: usize,
    weights: Vec<f32>,
}

/// Cubic filter (a = -0.5, as Pillow's) from `[from, to)` of `n` source pixels onto `out` pixels; wider when shrinking.
fn taps(from: f64, to: f64, n: usize, out: usize) -> Vec<Taps> {
    let scale = (to - from) / out as f64;
    let stretch = scale.max(1.0);
    let cubic = |x: f64| {
        let x = x.abs();
        if x < 1.0 {
            (1.5 * x - 2.5) * x * x + 1.0
        } else if x < 2.0 {
            ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
        } else {
            0.0
        }
    };
    let last = n as i64 - 1;
    (0..out)
        .map(|i| {
            let centre = from + (i as f64 + 0.5) * scale;
            let low = (((centre - 2.0 * stretch) + 0.5).floor() as i64).clamp(0, last);
            let high = (((centre + 2.0 * stretch) + 0.5).floor() as i64 - 1).clamp(low, last);
            let mut weights: Vec<f32> =
                (low..=high).map(|k| cubic((k as f64 + 0.5 - centre) / stretch) as f32).collect();
            let sum: f32 = weights.iter().sum();
            if sum.abs() > 1e-6 {
                weights.iter_mut().for_each(|w| *w /= sum);
            } else {
                // Wholly outside the picture: its nearest pixel.
                weights.fill(1.0 / (high - low + 1) as f32);
            }
            Taps { first: low as usize, weights }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Pyramid {
        let data = (0..n * n).flat_map(|i| [(i % n) as u8 * 10, (i / n) as u8 * 10, 7]).collect();
        Pyramid { levels: vec![Raster { width: n, height: n, channels: 3, data }] }
    }

    #[test]
    fn resampling_at_full_size_is_the_picture() {
        let picture = ramp(6);
        let out = resample(&picture, BBox::new(0.0, 0.0, 6.0, 6.0), 6, 6);
        for (a, &b) in out.iter().zip(&picture.full().data) {
            assert!((a - f32::from(b)).abs() < 1e-4); // f32 rounding of weights that are 0 and 1
        }
    }

    #[test]
    fn a_cubic_filter_keeps_a_ramp() {
        // Away from the edges, enlarging twice puts samples at quarter steps.
        let out = resample(&ramp(8), BBox::new(2.0, 2.0, 6.0, 6.0), 8, 8);
        let red: Vec<f32> = out[..24].as_chunks::<3>().0.iter().map(|p| p[0]).collect();
        for (i, r) in red.iter().enumerate() {
            let expected = (2.0 + (i as f32 + 0.5) / 2.0 - 0.5) * 10.0;
            assert!((r - expected).abs() < 1e-3, "{r} {expected}"); // f32 rounding of values to 60
        }
    }

    #[test]
    fn a_frame_maps_there_and_back() {
        let frame = Frame { region: BBox::new(0.25, 0.25, 0.75, 0.5), size: Size::new(100, 100) };
        assert_eq!(frame.pixels(BBox::new(0.5, 0.25, 0.75, 0.375)), BBox::new(50.0, 0.0, 100.0, 50.0));
        assert_eq!(frame.scene(BBox::new(50.0, 0.0, 100.0, 50.0)), BBox::new(0.5, 0.25, 0.75, 0.375));
    }
}
