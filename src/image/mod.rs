//! Pictures: from a file to what the vision tower is fed, and back to files for reports.
//!
//! It hides file formats, EXIF turns, colour modes, resampling and the order of patches. The path is [`decode`] (once a file, kept by a
//! [`PictureCache`]), [`show`] (cut a [`View`] out of the original and resize it), [`patches`] (normalise and cut).
//!
//! What must stay true: a crop is always cut from the ORIGINAL pixels; resizing gives Pillow's bytes; the number of
//! patches follows from the view's size alone; and no file, however broken, makes any of this panic.

mod bench;
mod cache;
mod decode;
mod draw;
mod fingerprint;
mod patches;
mod resize;

pub use self::bench::bench_image;
pub use self::cache::{CacheStats, PictureCache};
pub use self::decode::{BadPicture, MAX_PIXELS, Picture, decode, decode_bytes, decode_region, size};
pub use self::draw::{Color, draw_box, encode_jpeg, encode_png, save};
pub use self::fingerprint::{Fingerprint, Likeness};
pub use self::patches::{Patches, Processor, cut, patches};
pub use self::resize::PassOrder;
pub use ::image::RgbImage;

use crate::geometry::{Size, View};
use anyhow::{Result, ensure};
use std::path::Path;

/// What the model is shown: the view's region of the original, resized to the view's size (Pillow's bicubic, antialiased).
///
/// # Errors
/// A region that is not made of whole pixels inside the picture, or an empty size: the view belongs to another picture.
pub fn show(picture: &Picture, view: &View) -> Result<RgbImage> {
    let r = view.region;
    let size = picture.size();
    let corners: [f64; 4] = r.into();
    ensure!(
        corners.iter().all(|v| v.fract() == 0.0) && r.area() > 0.0 && size.bounds().contains(&r),
        "cutting a view of image {}: its region {r} is not whole pixels inside the picture, which is {size}",
        view.image
    );
    let region = resize::Region {
        data: picture.rgb(),
        stride: size.width as usize * 3,
        left: r.x1 as usize,
        top: r.y1 as usize,
        width: r.width() as usize,
        height: r.height() as usize,
    };
    resized(region, view.size, PassOrder::default())
}

/// The same from the picture's file, of which only the view's region is decoded.
///
/// # Errors
/// Those of [`decode`] and [`show`].
fn show_from_file(path: &Path, view: &View) -> Result<RgbImage> {
    let rgb = decode_region(path, &view.region)?;
    resized(
        resize::Region::whole(rgb.as_raw(), rgb.width() as usize, rgb.height() as usize),
        view.size,
        PassOrder::default(),
    )
}

/// A whole picture at another size, as Pillow's `resize(size, BICUBIC)` of the version that `order` names.
///
/// # Errors
/// A side of 0, here or there.
pub fn resize(rgb: &RgbImage, size: Size, order: PassOrder) -> Result<RgbImage> {
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    ensure!(width > 0 && height > 0, "resizing a picture: it is {width}x{height}, expected at least 1x1");
    resized(resize::Region::whole(rgb.as_raw(), width, height), size, order)
}

fn resized(region: resize::Region<'_>, size: Size, order: PassOrder) -> Result<RgbImage> {
    ensure!(
        size.area() > 0 && size.area() <= MAX_PIXELS,
        "resizing a picture: asked for {size} pixels, expected at least 1x1 and at most {MAX_PIXELS} in all"
    );
    let Some(rgb) = RgbImage::from_raw(size.width, size.height, resize::resize(region, size, order)) else {
        unreachable!("the resized rows have the size that was asked for")
    };
    Ok(rgb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{BBox, Budget};
    use std::fs;
    use std::path::PathBuf;

    fn golden(folder: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder)
    }

    fn open(path: &Path) -> RgbImage {
        decode(path).unwrap().as_image().clone()
    }

    /// `(source, order, wanted)` of each golden file, from its name `SOURCE.to-WxH.png` or `SOURCE.rows-first-WxH.png`.
    fn resized_by_pillow() -> Vec<(RgbImage, PassOrder, RgbImage)> {
        let folder = golden("resize");
        let mut cases = Vec::new();
        for file in fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let order = match name.split('.').nth(1).unwrap() {
                "png" => continue,
                how if how.starts_with("to-") => PassOrder::Pillow13,
                _ => PassOrder::RowsFirst,
            };
            let source = folder.join(name.split('.').next().unwrap()).with_extension("png");
            cases.push((open(&source), order, open(&path)));
        }
        cases
    }

    #[test]
    fn resizing_gives_the_bytes_of_pillow() {
        let cases = resized_by_pillow();
        assert!(cases.len() > 20, "golden files missing");
        for (source, order, wanted) in cases {
            let size = Size::new(wanted.width(), wanted.height());
            let got = resize(&source, size, order).unwrap();
            // No tolerance: fixed-point arithmetic on both sides.
            assert!(got == wanted, "{}x{} to {size}, {order:?}", source.width(), source.height());
        }
    }

    #[test]
    fn the_two_orders_of_passes_differ_where_they_should() {
        let tall = open(&golden("resize/tall.png"));
        let by = |size, order| resize(&tall, size, order).unwrap();
        // 20x50: to 10x30 the height shrinks by 20 and the width by 10, a tie: rows first in both. To 10x29: columns first.
        let tie = Size::new(10, 30);
        assert!(by(tie, PassOrder::Pillow13) == by(tie, PassOrder::RowsFirst));
        let lower = Size::new(10, 29);
        assert!(by(lower, PassOrder::Pillow13) != by(lower, PassOrder::RowsFirst));
    }

    #[test]
    fn a_view_is_cut_first_and_resized_then() {
        let picture = Picture::new(open(&golden("resize/picture.png")));
        let region = BBox::new(5.0, 3.0, 33.0, 29.0);
        let view = View { image: 0, region, size: Size::new(56, 56) };
        let cut = picture.cut(&region).unwrap();
        assert_eq!((cut.width(), cut.height(), cut.get_pixel(0, 0)), (28, 26, picture.as_image().get_pixel(5, 3)));
        // The neighbours outside the region must not bleed in: the same as resizing a copy of the region.
        assert!(show(&picture, &view).unwrap() == resize(&cut, view.size, PassOrder::default()).unwrap());
        let at_its_own_size = View { size: Size::new(28, 26), ..view };
        assert!(show(&picture, &at_its_own_size).unwrap() == cut);
    }

    #[test]
    fn a_view_of_another_picture_is_an_error() {
        let picture = Picture::new(RgbImage::new(10, 10));
        let shown = |region, size| show(&picture, &View { image: 2, region, size }).map(drop);
        assert!(shown(BBox::new(0.0, 0.0, 11.0, 10.0), Size::new(28, 28)).unwrap_err().to_string().contains("image 2"));
        assert!(shown(BBox::new(0.0, 0.0, 9.5, 10.0), Size::new(28, 28)).is_err());
        assert!(shown(BBox::new(5.0, 5.0, 5.0, 9.0), Size::new(28, 28)).is_err());
        assert!(shown(BBox::new(0.0, 0.0, f64::NAN, 10.0), Size::new(28, 28)).is_err());
        assert!(shown(BBox::new(0.0, 0.0, 10.0, 10.0), Size::new(0, 28)).is_err());
        assert!(resize(&RgbImage::new(0, 3), Size::new(1, 1), PassOrder::default()).is_err());
    }

    #[test]
    fn tiny_and_thin_pictures_go_all_the_way() {
        let processor = Processor::default();
        let mut png = RgbImage::new(1, 1);
        png.put_pixel(0, 0, ::image::Rgb([255, 0, 51]));
        let picture = decode_bytes(&encode_png(&png).unwrap(), "dot").unwrap();
        let view = View::whole(0, picture.size(), processor.budget).unwrap();
        let rows = patches(&show(&picture, &view).unwrap(), &processor).unwrap();
        assert_eq!(rows.grid.patches(), 16);
        // 255, 0 and 51 of 255, normalised by hand; half a unit of the last digit written.
        for (c, wanted) in [1.930_34, -1.752_10, -0.755_02].into_iter().enumerate() {
            assert!((rows.data[c * 196] - wanted).abs() < 5e-5, "channel {c}: {}", rows.data[c * 196]);
        }
        let thin = decode_bytes(&encode_png(&RgbImage::new(1, 10_000)).unwrap(), "thin").unwrap();
        assert!(View::whole(0, thin.size(), processor.budget).unwrap_err().to_string().contains("aspect ratio"));
    }

    #[test]
    fn the_benchmark_names_what_it_measured() {
        let report = bench_image(&golden("resize/picture.png"), Budget::new(3136, 100_352, 28)).unwrap();
        assert_eq!(report["original"], serde_json::json!([41, 29]));
        assert_eq!(report["shown"], serde_json::json!([84, 56]));
        assert_eq!(report["tokens"], 6);
    }
}
