//! Files to 8-bit RGB in upright position.
//!
//! It hides file formats (told by content, never by the name's extension), EXIF orientation and colour modes. What must stay true: a file
//! that is missing, cut short, damaged or absurdly large gives one error that names it, says what was found and what
//! to do, and never a panic, a half grey picture or an allocation of the size a header claims.
//!
//! Colour modes follow transformers (`convert_to_rgb` of 5.x, as vLLM and qwen_vl_utils): what is transparent lies on white, blended as PIL's
//! `alpha_composite` does it; a palette is looked up; grey is repeated; CMYK is multiplied out. 16 bits become 8 by taking the high byte,
//! as PIL does for colour; 16-bit GREY too, where PIL instead clips everything over 255 to white, which no data set can want.
//!
//! A JPEG in colour or grey has the very pixels that libjpeg-turbo gives it, and so Pillow: the model sees here what it sees in transformers
//! and vLLM (where they resize with Pillow: torchvision resizes a little differently). Of one in CMYK they may differ by a few grey levels; of a
//! progressive one whose last scans are missing by more, for libjpeg smooths what it has between blocks.

use crate::geometry::{BBox, Size};
use crate::table::{Cell, picture_bytes};
use ::image::error::{ImageError, LimitErrorKind};
use ::image::metadata::Orientation;
use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use anyhow::{Context, Result, bail, ensure};
use libjpeg_turbo_rs::{DecodeLimits, Decoder as JpegDecoder, JpegError, PixelFormat};
use std::fmt::Display;
use std::fs;
use std::io::{BufRead, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Most pixels of a picture that is opened, as PIL's limit against decompression bombs: 179 megapixels, 537 MB decoded.
pub const MAX_PIXELS: u64 = 178_956_970;

/// Most bytes of a file that is opened.
const MAX_FILE: u64 = 1 << 30;

/// A decoded original: 8-bit RGB, rows from the top, upright.
pub struct Picture {
    rgb: RgbImage,
}

impl Picture {
    pub fn new(rgb: RgbImage) -> Picture {
        Picture { rgb }
    }

    pub fn size(&self) -> Size {
        Size { width: self.rgb.width(), height: self.rgb.height() }
    }

    /// Rows of `width` × 3 bytes.
    pub fn rgb(&self) -> &[u8] {
        self.rgb.as_raw()
    }

    /// The whole of it as an image, to draw on or save.
    pub fn as_image(&self) -> &RgbImage {
        &self.rgb
    }

    /// The pixels of a box, rounded outward and clamped, at their own size; `None` when nothing is inside.
    pub fn cut(&self, region: &BBox) -> Option<RgbImage> {
        let r = region.round_outward().clamp(&self.size().bounds());
        (r.area() > 0.0).then(|| Rect::of(&r).cut(&self.rgb))
    }
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({})", self.size())
    }
}

/// What was read is no picture that can be decoded: the fault of its row, which may be left out. A file that cannot be read is the fault of a disk or
/// a path.
#[derive(Debug)]
pub struct BadPicture(String);

impl BadPicture {
    fn of(error: anyhow::Error) -> anyhow::Error {
        BadPicture(format!("{error:#}")).into()
    }

    /// One that stays one, in other words.
    pub fn told(words: String) -> anyhow::Error {
        BadPicture(words).into()
    }
}

impl Display for BadPicture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadPicture {}

/// Opens a PNG, JPEG or WebP file (of an animation, the first frame), or one that lies in a cell of a table.
///
/// # Errors
/// One message with what was found, what to do, and the path.
pub fn decode(path: &Path) -> Result<Picture> {
    decode_part(&read(path)?, &path.display().to_string(), None).map_err(BadPicture::of)
}

/// The pixels of a region of whole pixels, without keeping the whole picture: of a JPEG, only what lies around it is turned into pixels.
///
/// # Errors
/// As [`decode`], except that damage elsewhere in the file may go unseen; and a region that is not inside the picture.
pub fn decode_region(path: &Path, region: &BBox) -> Result<RgbImage> {
    Ok(decode_part(&read(path)?, &path.display().to_string(), Some(region)).map_err(BadPicture::of)?.rgb)
}

/// The bytes of a picture's file or cell.
fn read(path: &Path) -> Result<Vec<u8>> {
    if in_table(path) {
        return picture_bytes(path);
    }
    let found =
        fs::metadata(path).with_context(|| format!("opening a picture: is the path right? {}", path.display()))?;
    ensure!(
        found.is_file(),
        "opening a picture: this is a folder or a device, expected a PNG, JPEG or WebP file: {}",
        path.display()
    );
    ensure!(
        found.len() <= MAX_FILE,
        "opening a picture: the file has {} bytes, expected at most {MAX_FILE}: {}",
        found.len(),
        path.display()
    );
    fs::read(path).with_context(|| format!("reading a picture: {}", path.display()))
}

/// A plain file of that name goes before a cell.
fn in_table(path: &Path) -> bool {
    Cell::named(path).is_some() && !path.is_file()
}

/// Width and height as shown, that is after the EXIF orientation, from the header alone.
///
/// # Errors
/// There is no picture, or its header cannot be read.
pub fn size(path: &Path) -> Result<Size> {
    let reading = || format!("reading the picture {}", path.display());
    if in_table(path) {
        return size_of(ImageReader::new(Cursor::new(picture_bytes(path)?))).with_context(reading);
    }
    if !path.exists() {
        bail!("there is no picture at {}", path.display());
    }
    size_of(ImageReader::open(path).with_context(reading)?).with_context(reading)
}

fn size_of(reader: ImageReader<impl BufRead + Seek>) -> Result<Size> {
    let mut decoder = reader.with_guessed_format()?.into_decoder()?;
    let (width, height) = decoder.dimensions();
    Ok(upright(Size { width, height }, decoder.orientation()?))
}

/// A picture from memory; `name` is what errors call it.
///
/// # Errors
/// As [`decode`].
pub fn decode_bytes(bytes: &[u8], name: &str) -> Result<Picture> {
    decode_part(bytes, name, None)
}

/// The whole picture or a region of it, in upright pixels.
fn decode_part(bytes: &[u8], name: &str, region: Option<&BBox>) -> Result<Picture> {
    ensure!(
        !bytes.is_empty(),
        "decoding a picture: the file is empty (0 bytes), expected a PNG, JPEG or WebP; fetch it again: {name}"
    );
    let format = match ::image::guess_format(bytes) {
        Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) => format,
        _ => bail!(
            "decoding a picture: found {}, expected a PNG, JPEG or WebP file; convert it or fetch it again: {name}",
            describe(bytes)
        ),
    };
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        // The decoder would fill the missing part with grey and say nothing.
        bail!(
            "decoding a picture: the JPEG is cut short, it ends after {} bytes without an end marker; fetch it again: {name}",
            bytes.len()
        );
    }
    let damaged = |e: &dyn Display| {
        anyhow::anyhow!(
            "decoding a picture: the {format:?} is damaged or cut short after {} bytes ({e}); fetch it again: {name}",
            bytes.len()
        )
    };
    let problem = |error: ImageError| match error {
        ImageError::Limits(e) if !matches!(e.kind(), LimitErrorKind::Unsupported { .. }) => {
            anyhow::anyhow!(
                "decoding a picture: the {format:?} needs more memory than allowed ({e}), expected at most {MAX_PIXELS} pixels; shrink it: {name}"
            )
        }
        ImageError::Unsupported(e) => {
            anyhow::anyhow!(
                "decoding a picture: this kind of {format:?} is not read ({e}); save it again as plain RGB: {name}"
            )
        }
        e => damaged(&e),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    // Eight bytes a pixel, the widest mode, and as much again for the decoder's own buffers.
    limits.max_alloc = Some(MAX_PIXELS * 16);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(problem)?;
    let (width, height) = decoder.dimensions();
    ensure!(
        width > 0 && height > 0,
        "decoding a picture: its header says {width}x{height} pixels, expected at least 1x1: {name}"
    );
    ensure!(
        u64::from(width) * u64::from(height) <= MAX_PIXELS,
        "decoding a picture: its header says {width}x{height} pixels, expected at most {MAX_PIXELS} in all; shrink it: {name}"
    );
    let orientation = decoder.orientation().map_err(problem)?;
    let stored = Size { width, height };
    if let Some(region) = region {
        let size = upright(stored, orientation);
        let whole = <[f64; 4]>::from(*region).iter().all(|v| v.fract() == 0.0);
        ensure!(
            whole && region.area() > 0.0 && size.bounds().contains(region),
            "decoding a picture: asked for its region {region}, which is not whole pixels inside it, for it is {size}; did the file change? {name}"
        );
    }
    let pixels = || -> Result<(DynamicImage, bool)> {
        let part = region.map(|region| Rect::of(region).as_stored(stored, orientation));
        let exact = match format {
            ImageFormat::Jpeg => as_libjpeg_turbo(bytes, part).map_err(|e| damaged(&e))?,
            _ => None,
        };
        match exact {
            Some(rgb) => Ok((DynamicImage::ImageRgb8(rgb), part.is_some())),
            None => Ok((DynamicImage::from_decoder(decoder).map_err(problem)?, false)),
        }
    };
    // A file that a decoder did not expect costs one row, not the run.
    let (mut image, is_part) =
        catch_unwind(AssertUnwindSafe(pixels)).unwrap_or_else(|_| Err(damaged(&"its decoder broke off")))?;
    image.apply_orientation(orientation);
    let picture = Picture { rgb: to_rgb(image) };
    match region {
        Some(region) if !is_part => {
            let Some(rgb) = picture.cut(region) else { unreachable!("the region is inside the picture") };
            Ok(Picture { rgb })
        }
        _ => Ok(picture),
    }
}

/// The size of a picture of that stored size, as shown.
fn upright(stored: Size, orientation: Orientation) -> Size {
    use Orientation::*;
    match orientation {
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => Size::new(stored.height, stored.width),
        NoTransforms | Rotate180 | FlipHorizontal | FlipVertical => stored,
    }
}

/// Some pixels of a picture: columns `x` and rows `y`, from and to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rect {
    x: (usize, usize),
    y: (usize, usize),
}

impl Rect {
    /// A region of whole pixels.
    fn of(region: &BBox) -> Rect {
        Rect { x: (region.x1 as usize, region.x2 as usize), y: (region.y1 as usize, region.y2 as usize) }
    }

    /// Where these upright pixels lie in a file of this size that is to be turned so.
    fn as_stored(self, stored: Size, orientation: Orientation) -> Rect {
        let from_end = |(from, to): (usize, usize), end: u32| (end as usize - to, end as usize - from);
        let Rect { x, y } = self;
        let Size { width, height } = stored;
        use Orientation::*;
        let (x, y) = match orientation {
            NoTransforms => (x, y),
            FlipHorizontal => (from_end(x, width), y),
            FlipVertical => (x, from_end(y, height)),
            Rotate180 => (from_end(x, width), from_end(y, height)),
            // Columns of the file are rows of what is shown.
            Rotate90 => (y, from_end(x, height)),
            Rotate270 => (from_end(y, width), x),
            Rotate90FlipH => (y, x),
            Rotate270FlipH => (from_end(y, width), from_end(x, height)),
        };
        Rect { x, y }
    }

    fn cut(self, rgb: &RgbImage) -> RgbImage {
        let (stride, row) = (rgb.width() as usize * 3, self.x.0 * 3..self.x.1 * 3);
        let mut cut = Vec::with_capacity(row.len() * (self.y.1 - self.y.0));
        for line in rgb.as_raw().chunks_exact(stride).take(self.y.1).skip(self.y.0) {
            cut.extend_from_slice(&line[row.clone()]);
        }
        let (width, height) = ((self.x.1 - self.x.0) as u32, (self.y.1 - self.y.0) as u32);
        let Some(cut) = RgbImage::from_raw(width, height, cut) else { unreachable!("the rows lie inside the picture") };
        cut
    }
}

/// Pixels beside a region that are decoded with it: the widest unit of a JPEG, so that smoothing between coarse colours has the neighbours that
/// it has in the whole picture.
const AROUND: usize = 32;

/// A JPEG in colour or grey or a part of it, not yet upright; `None` for any other: in CMYK, without loss or of more than 8 bits.
fn as_libjpeg_turbo(bytes: &[u8], part: Option<Rect>) -> Result<Option<RgbImage>, JpegError> {
    let limits = DecodeLimits { max_pixels: MAX_PIXELS, max_memory: Some(MAX_PIXELS * 16), ..DecodeLimits::default() };
    let shorter = part.and_then(|part| ending_below(bytes, part.y.1));
    let mut decoder = JpegDecoder::new_with_limits(shorter.as_deref().unwrap_or(bytes), limits)?;
    let frame = decoder.header();
    if frame.is_lossless || frame.precision != 8 || !matches!(frame.components.len(), 1 | 3) {
        return Ok(None);
    }
    let width = usize::from(frame.width);
    decoder.set_output_format(PixelFormat::Rgb);
    let Some(Rect { x, y }) = part else {
        let image = decoder.decode_image()?;
        return Ok(RgbImage::from_raw(image.width as u32, image.height as u32, image.data));
    };
    let (left, right) = (x.0.saturating_sub(AROUND), (x.1 + AROUND).min(width));
    decoder.set_crop_region(left, y.0, right - left, y.1 - y.0);
    let image = decoder.decode_image()?;
    // The decoder moves the left edge further, to a whole unit.
    let left = right.saturating_sub(image.width);
    let wider = RgbImage::from_raw(image.width as u32, image.height as u32, image.data);
    let inside = Rect { x: (x.0 - left, x.1 - left), y: (0, y.1 - y.0) };
    Ok(wider.map(|wider| inside.cut(&wider)))
}

/// A JPEG that says it ends soon below row `y`: what comes after is then not decoded, and a decoder reads its file only that far.
fn ending_below(bytes: &[u8], y: usize) -> Option<Vec<u8>> {
    let at = markers(bytes).find(|(marker, _)| matches!(marker, 0xc0..=0xc2))?.1 + 4;
    let mut shorter = bytes.to_vec();
    let height = shorter.get_mut(at..at + 2)?;
    let said = usize::from(u16::from_be_bytes([height[0], height[1]]));
    height.copy_from_slice(&(said.min(y + AROUND) as u16).to_be_bytes());
    Some(shorter)
}

/// A value of this opacity on white, with PIL's rounding (`alpha_composite` in 8 bits over an opaque background).
fn on_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    let sum = ((value * alpha + 255 * (255 - alpha)) << 7) + (0x80 << 7);
    ((((sum >> 8) + sum) >> 8) >> 7) as u8
}

/// Puts what is transparent on white, repeats grey, keeps the high byte of 16 bits.
fn to_rgb(image: DynamicImage) -> RgbImage {
    let (width, height) = (image.width(), image.height());
    let high = |v: u16| (v >> 8) as u8;
    let grey = |v: u8| [v; 3];
    let raw: Vec<u8> = match image {
        DynamicImage::ImageRgb8(rgb) => return rgb,
        DynamicImage::ImageRgba8(i) => i.pixels().flat_map(|p| [0, 1, 2].map(|c| on_white(p[c], p[3]))).collect(),
        DynamicImage::ImageLuma8(i) => i.pixels().flat_map(|p| grey(p[0])).collect(),
        DynamicImage::ImageLumaA8(i) => i.pixels().flat_map(|p| grey(on_white(p[0], p[1]))).collect(),
        DynamicImage::ImageLuma16(i) => i.pixels().flat_map(|p| grey(high(p[0]))).collect(),
        DynamicImage::ImageLumaA16(i) => i.pixels().flat_map(|p| grey(on_white(high(p[0]), high(p[1])))).collect(),
        DynamicImage::ImageRgb16(i) => i.pixels().flat_map(|p| [high(p[0]), high(p[1]), high(p[2])]).collect(),
        DynamicImage::ImageRgba16(i) => {
            i.pixels().flat_map(|p| [0, 1, 2].map(|c| on_white(high(p[c]), high(p[3])))).collect()
        }
        // Float modes do not come out of these three formats; the type is open, so say how anyway.
        other => return other.into_rgb8(),
    };
    let Some(rgb) = RgbImage::from_raw(width, height, raw) else { unreachable!("three bytes for each pixel") };
    rgb
}

/// What a file that is no picture of ours looks like, in words.
fn describe(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(512)];
    let brand = |b: &[u8]| start.get(4..8) == Some(b"ftyp") && start.get(8..12) == Some(b);
    let text = String::from_utf8_lossy(start).trim_start().to_lowercase();
    let what = if start.starts_with(b"GIF8") {
        "a GIF"
    } else if start.starts_with(b"BM") {
        "a BMP"
    } else if start.starts_with(b"II*\0") || start.starts_with(b"MM\0*") {
        "a TIFF"
    } else if brand(b"avif") {
        "an AVIF"
    } else if brand(b"heic") || brand(b"mif1") || brand(b"heix") {
        "a HEIC"
    } else if text.starts_with("<svg") || (text.starts_with("<?xml") && text.contains("<svg")) {
        "an SVG"
    } else if text.starts_with("<!doctype") || text.starts_with("<html") {
        "a web page (an error page instead of the download?)"
    } else if start.starts_with(b"version https://git-lfs") {
        "a Git LFS pointer (run `git lfs pull`)"
    } else {
        let head: Vec<String> = start.iter().take(8).map(|b| format!("{b:02x}")).collect();
        return format!("{} bytes that begin {}", bytes.len(), head.join(" "));
    };
    what.to_owned()
}

/// The markers of a JPEG and where they stand, but for those that carry no length (stuffing, restarts, its start), up to its end or to where the
/// bytes do.
fn markers(bytes: &[u8]) -> impl Iterator<Item = (u8, usize)> {
    let mut at = 2;
    std::iter::from_fn(move || {
        loop {
            // To the next marker, over whatever lies between: coded data after a scan's header, stuffed FF 00 included.
            at += bytes.get(at..)?.iter().position(|&b| b == 0xff)? + 1;
            let found = at;
            match *bytes.get(at)? {
                0xff => continue,
                0x00 | 0x01 | 0xd0..=0xd8 => at += 1,
                0xd9 => {
                    at = bytes.len();
                    return Some((0xd9, found));
                }
                marker => {
                    let length = bytes.get(at + 1..at + 3)?.first_chunk::<2>()?;
                    at += 1 + usize::from(u16::from_be_bytes(*length)).max(2);
                    return Some((marker, found));
                }
            }
        }
    })
}

/// Whether a JPEG's segments lead to its end marker. Bytes after that are common (phones append to files) and fine.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    markers(bytes).any(|(marker, _)| marker == 0xd9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::image::{ImageBuffer, Luma, Rgba};

    /// Encoded in memory.
    fn bytes(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        image.into().write_to(&mut out, format).unwrap();
        out.into_inner()
    }

    fn error(data: &[u8]) -> String {
        decode_bytes(data, "the/file").unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_picture_is_told_from_what_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let [path, gone] = ["a.png", "gone.png"].map(|name| folder.path().join(name));
        fs::write(&path, &bytes(DynamicImage::new_rgb8(64, 64), ImageFormat::Png)[..60]).unwrap();
        let error = decode(&path).unwrap_err().context("row 3");
        assert!(error.is::<BadPicture>(), "through every context: {error:#}");
        assert!(!decode(&gone).unwrap_err().is::<BadPicture>());
    }

    #[test]
    fn modes_become_rgb_as_pil_does_it() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/decode");
        let mut seen = 0;
        for file in fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name.ends_with(".rgb.png") {
                continue;
            }
            let wanted = decode(&folder.join(format!("{name}.rgb.png"))).unwrap();
            let got = decode(&path).unwrap();
            assert_eq!(got.size(), wanted.size(), "{name}");
            let worst = got.rgb().iter().zip(wanted.rgb()).map(|(&a, &b)| a.abs_diff(b)).max();
            // CMYK leaves the rounding of its transforms to the decoder: a few levels after colour conversion. The rest is exact.
            let allowed = if name == "cmyk.jpg" { 3 } else { 0 };
            assert!(worst <= Some(allowed), "{name}: {worst:?}");
            seen += 1;
        }
        assert_eq!(seen, 16, "golden files missing");
    }

    #[test]
    fn sixteen_bits_keep_their_high_byte_and_what_is_transparent_lies_on_white() {
        let grey: ImageBuffer<Luma<u16>, _> = ImageBuffer::from_raw(2, 1, vec![0x12ff_u16, 0xfe01]).unwrap();
        let picture = decode_bytes(&bytes(grey, ImageFormat::Png), "grey").unwrap();
        assert_eq!(picture.rgb(), [0x12, 0x12, 0x12, 0xfe, 0xfe, 0xfe]);
        let half = vec![9, 8, 7, 0, 9, 8, 7, 255, 0, 100, 255, 51];
        let clear: ImageBuffer<Rgba<u8>, _> = ImageBuffer::from_raw(3, 1, half).unwrap();
        let shown = decode_bytes(&bytes(clear, ImageFormat::Png), "clear").unwrap();
        // A fifth of the colour and four fifths of white.
        assert_eq!(shown.rgb(), [255, 255, 255, 9, 8, 7, 204, 224, 255]);
    }

    #[test]
    fn every_cut_of_a_file_is_an_error_and_never_a_panic() {
        let ramp = RgbImage::from_fn(24, 17, |x, y| ::image::Rgb([(x * 10) as u8, (y * 15) as u8, (x * y) as u8]));
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
            let whole = bytes(ramp.clone(), format);
            assert!(decode_bytes(&whole, "whole").is_ok());
            for end in 0..whole.len() {
                match decode_bytes(&whole[..end], "the/file") {
                    Err(e) => assert!(e.to_string().ends_with("the/file"), "{e}"),
                    // Only what comes after the pixels may be missing: PNG's closing chunk, WebP's padding.
                    Ok(picture) => {
                        assert!(end + 20 >= whole.len() && picture.rgb() == ramp.as_raw(), "{format:?} at {end}")
                    }
                }
                let mut damaged = whole.clone();
                damaged[end] ^= 0x5a;
                // May be read (a damaged pixel) or refused, nothing else.
                let _ = decode_bytes(&damaged, "the/file");
                let _ = decode_part(&damaged, "the/file", Some(&BBox::new(3.0, 5.0, 20.0, 16.0)));
            }
        }
    }

    /// TIFF with the one entry that tells how a picture is to be turned.
    fn exif(orientation: u8) -> Vec<u8> {
        let mut tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        tiff.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        tiff
    }

    #[test]
    fn a_region_from_a_file_has_the_pixels_of_the_whole() {
        use libjpeg_turbo_rs::{Encoder, Subsampling::*};
        use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture");
        let mut draw = StdRng::seed_from_u64(3);
        let mut regions_of = |bytes: &[u8], name: &str| {
            fs::write(&path, bytes).unwrap();
            let whole = decode(&path).unwrap();
            let Size { width, height } = whole.size();
            let mut side = |length: u32| {
                let from = draw.random_range(0..length);
                (f64::from(from), f64::from(draw.random_range(from + 1..=length)))
            };
            for _ in 0..12 {
                let ((x1, x2), (y1, y2)) = (side(width), side(height));
                let region = BBox::new(x1, y1, x2, y2);
                let part = decode_region(&path, &region).unwrap();
                assert!(part == whole.cut(&region).unwrap(), "{name}: {region} of {}", whole.size());
            }
            let all = decode_region(&path, &whole.size().bounds()).unwrap();
            assert!(all == *whole.as_image(), "{name}");
        };
        // Steep colours, so that what smoothing takes from the neighbours shows.
        let (width, height) = (211, 157);
        let noise: Vec<u8> = (0..width * height * 3).map(|i| (i * i % 251) as u8).collect();
        let jpeg = || Encoder::new(&noise, width, height, PixelFormat::Rgb).quality(92);
        for sampling in [S444, S422, S420, S440, S411, S441, S410, S24] {
            let plain = jpeg().subsampling(sampling);
            regions_of(&plain.encode().unwrap(), &format!("{sampling:?}"));
            regions_of(&plain.progressive(true).encode().unwrap(), &format!("{sampling:?}, progressive"));
            let restarts = jpeg().subsampling(sampling).restart_blocks(5);
            regions_of(&restarts.encode().unwrap(), &format!("{sampling:?}, restarts"));
        }
        regions_of(&jpeg().grayscale_from_color(true).encode().unwrap(), "grey");
        for orientation in 1..=8 {
            let exif = exif(orientation);
            let turned = jpeg().subsampling(S420).exif_data(&exif).encode().unwrap();
            assert_eq!(decode_bytes(&turned, "turned").unwrap().size().width == 157, orientation > 4);
            regions_of(&turned, &format!("turned {orientation}"));
        }
        let rgb = RgbImage::from_raw(width as u32, height as u32, noise.clone()).unwrap();
        regions_of(&bytes(rgb, ImageFormat::Png), "PNG");
        for region in [BBox::new(0.0, 0.0, 212.0, 10.0), BBox::new(0.0, 0.5, 9.0, 10.0), BBox::new(4.0, 4.0, 4.0, 9.0)]
        {
            let error = decode_region(&path, &region).unwrap_err().to_string();
            assert!(error.contains("211x157") && error.ends_with("picture"), "{error}");
        }
    }

    #[test]
    fn errors_say_what_was_found_and_what_to_do() {
        assert!(error(b"").contains("0 bytes"));
        assert!(error(b"GIF89a....").contains("found a GIF"));
        assert!(error(b"<!DOCTYPE html><html>404").contains("web page"));
        assert!(error(b"version https://git-lfs.github.com/spec/v1").contains("git lfs pull"));
        assert!(error(b"\x01\x02\x03").contains("3 bytes that begin 01 02 03"));
        let jpeg = bytes(RgbImage::new(16, 16), ImageFormat::Jpeg);
        assert!(error(&jpeg[..jpeg.len() - 2]).contains("cut short"));
        let mut followed = jpeg.clone();
        followed.extend_from_slice(&[0; 40]);
        assert!(decode_bytes(&followed, "bytes after the end are fine").is_ok());
        // The frame header's height and width made 65535: refused before anything is allocated.
        let mut huge = jpeg;
        let at = huge.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
        huge[at + 5..at + 9].fill(0xff);
        assert!(error(&huge).contains("65535x65535"));
        let missing = decode(Path::new("no/such.png")).unwrap_err();
        assert!(format!("{missing:#}").contains("no/such.png"));
        assert!(decode(Path::new(".")).unwrap_err().to_string().contains("folder"));
    }

    #[test]
    fn the_extension_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("really_a_png.jpg");
        fs::write(&path, bytes(RgbImage::new(3, 2), ImageFormat::Png)).unwrap();
        assert_eq!(decode(&path).unwrap().size(), Size::new(3, 2));
    }
}
