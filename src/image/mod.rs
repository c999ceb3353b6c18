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
mod patches;
mod resize;

pub use self::bench::bench_image;
pub use self::cache::{CacheStats, PictureCache};
pub use self::decode::{MAX_PIXELS, Picture, decode, decode_bytes};
pub use self::draw::{Color, draw_box, encode_jpeg, encode_png, save};
pub use self::patches::{Patches, Processor, patches};
pub use ::image::RgbImage;

use crate::geometry::{Size, View};
use anyhow::{Result, ensure};

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
    resized(region, view.size)
}

/// A whole picture at another size, as Pillow's `resize(size, BICUBIC)`.
///
/// # Errors
/// A side of 0, here or there.
pub fn resize(rgb: &RgbImage, size: Size) -> Result<RgbImage> {
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    ensure!(
        width > 0 && height > 0,
        "resizing a picture: it is {width}x{height}, expected at least 1x1"
    );
    let region = resize::Region {
        data: rgb.as_raw(),
        stride: width * 3,
        left: 0,
        top: 0,
        width,
        height,
    };
    resized(region, size)
}

fn resized(region: resize::Region<'_>, size: Size) -> Result<RgbImage> {
    ensure!(
        size.area() > 0 && size.area() <= MAX_PIXELS,
        "resizing a picture: asked for {size} pixels, expected at least 1x1 and at most {MAX_PIXELS} in all"
    );
    let Some(rgb) = RgbImage::from_raw(size.width, size.height, resize::resize(region, size))
    else {
        unreachable!("the resized rows have the size that was asked for")
    };
    Ok(rgb)
}
