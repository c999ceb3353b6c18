//! Marks on pictures, and pictures to files: for reports and for `ask --save`.
//!
//! What must stay true: a file is written beside its place, synced and renamed into it, so nobody ever sees half a picture; marks never
//! reach what the model is shown, because they are drawn on copies.

use crate::geometry::BBox;
use ::image::codecs::jpeg::JpegEncoder;
use ::image::{ImageFormat, Rgb, RgbImage};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

/// Red, green, blue.
pub type Color = [u8; 3];

/// Outlines a box (pixels of `image`), `thickness` pixels wide. The line lies inside the box, so that boxes at the edge stay visible;
/// what sticks out of the picture is not drawn. A box that is inverted or not finite draws nothing.
pub fn draw_box(image: &mut RgbImage, bbox: &BBox, color: Color, thickness: u32) {
    if !bbox.is_finite() || bbox.area() <= 0.0 {
        return;
    }
    let outer = bbox.round_outward();
    let t = f64::from(thickness);
    let inner = BBox::new(outer.x1 + t, outer.y1 + t, outer.x2 - t, outer.y2 - t);
    let bounds = BBox::new(0.0, 0.0, f64::from(image.width()), f64::from(image.height()));
    let Some(visible) = outer.intersection(&bounds) else {
        return;
    };
    for y in visible.y1 as u32..visible.y2 as u32 {
        for x in visible.x1 as u32..visible.x2 as u32 {
            let (fx, fy) = (f64::from(x), f64::from(y));
            if fx < inner.x1 || fx >= inner.x2 || fy < inner.y1 || fy >= inner.y2 {
                image.put_pixel(x, y, Rgb(color));
            }
        }
    }
}

/// PNG bytes.
pub fn encode_png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, ImageFormat::Png)
        .with_context(|| format!("encoding a PNG of {}x{}", image.width(), image.height()))?;
    Ok(bytes.into_inner())
}

/// JPEG bytes; `quality` 1 to 100.
pub fn encode_jpeg(image: &RgbImage, quality: u8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    image
        .write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100)))
        .with_context(|| format!("encoding a JPEG of {}x{}", image.width(), image.height()))?;
    Ok(bytes)
}

/// Writes a picture to `path`, whose extension says how: `png`, or `jpg`/`jpeg` (quality 90).
///
/// # Errors
/// Another extension, a picture the format cannot hold, or a folder that cannot be written.
pub fn save(image: &RgbImage, path: &Path) -> Result<()> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let bytes = match extension.as_str() {
        "png" => encode_png(image),
        "jpg" | "jpeg" => encode_jpeg(image, 90),
        _ => bail!("saving a picture: the extension is {extension:?}, expected png, jpg or jpeg: {}", path.display()),
    }
    .with_context(|| format!("saving a picture: {}", path.display()))?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        let mut beside = tempfile::Builder::new().prefix(".saving-").tempfile_in(dir)?;
        beside.write_all(&bytes)?;
        // Temporary files are private; a picture should be as readable as any file here.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = fs::metadata(dir)?.permissions().mode() & 0o666;
            fs::set_permissions(beside.path(), fs::Permissions::from_mode(mode))?;
        }
        beside.as_file().sync_all()?;
        beside.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    write().with_context(|| format!("saving a picture: is the folder there and writable? {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::decode;

    /// Where red is, a row a line.
    fn map(image: &RgbImage) -> Vec<String> {
        image.rows().map(|row| row.map(|p| if p[0] == 255 { '#' } else { '.' }).collect()).collect()
    }

    #[test]
    fn the_outline_lies_inside_the_box() {
        let mut image = RgbImage::new(7, 5);
        draw_box(&mut image, &BBox::new(1.0, 0.5, 5.9, 4.0), [255, 0, 0], 1);
        assert_eq!(map(&image), [".#####.", ".#...#.", ".#...#.", ".#####.", "......."]);
    }

    #[test]
    fn what_sticks_out_or_makes_no_sense_is_not_drawn() {
        let mut image = RgbImage::new(4, 3);
        draw_box(&mut image, &BBox::new(-5.0, 1.0, 3.0, 9.0), [255, 0, 0], 1);
        assert_eq!(map(&image), ["....", "###.", "..#."]);
        let mut image = RgbImage::new(4, 3);
        for nothing in
            [[3.0, 1.0, 1.0, 2.0], [f64::NAN, 0.0, 2.0, 2.0], [50.0, 50.0, 60.0, 60.0], [0.0, 0.0, f64::INFINITY, 1.0]]
        {
            draw_box(&mut image, &nothing.into(), [255, 0, 0], 2);
        }
        draw_box(&mut image, &BBox::new(-1e18, -1e18, 1e18, 1e18), [255, 0, 0], 2);
        assert_eq!(map(&image), ["....", "....", "...."]);
        draw_box(&mut image, &BBox::new(0.0, 0.0, 4.0, 3.0), [255, 0, 0], 9); // thicker than the box: filled
        assert_eq!(map(&image), ["####", "####", "####"]);
    }

    #[test]
    fn saved_pictures_come_back_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let image = RgbImage::from_fn(9, 5, |x, y| Rgb([x as u8 * 20, y as u8 * 40, 7]));
        let png = dir.path().join("a.png");
        save(&RgbImage::new(1, 1), &png).unwrap();
        save(&image, &png).unwrap(); // over the first
        assert!(decode(&png).unwrap().as_image() == &image);
        save(&image, &dir.path().join("a.JPG")).unwrap();
        assert!(save(&image, &dir.path().join("a.gif")).unwrap_err().to_string().contains("\"gif\""));
        assert!(save(&image, &dir.path().join("no/folder.png")).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
