//! Pixels to the rows the vision tower multiplies: the processor's settings, and the order of the numbers.
//!
//! It hides the two generations of settings files and the order of patches. What must stay true: the numbers are those of the
//! published processors to 1e-6, and a settings file that asks for something else is an error that names the key.

use crate::geometry::{Budget, Grid, Size};
use ::image::RgbImage;
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const CHANNELS: usize = 3;

/// How pictures are sized, normalised and cut for one model. Pixels of sides in `patch`; the budget's factor is patch × merge.
#[derive(Clone, Debug, PartialEq)]
pub struct Processor {
    pub budget: Budget,
    /// Side of a square patch, pixels.
    pub patch: u32,
    /// Frames a patch spans; a still picture is repeated that often.
    pub temporal: u32,
    /// Patches along each side of what becomes one token.
    pub merge: u32,
    /// Per channel, on the scale 0 to 1.
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

impl Default for Processor {
    /// The defaults of the Qwen2-VL processor: 3,136 to 1,003,520 pixels, patch 14, CLIP's mean and deviation.
    fn default() -> Processor {
        Processor {
            budget: Budget::new(56 * 56, 28 * 28 * 1280, 28),
            patch: 14,
            temporal: 2,
            merge: 2,
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            std: [0.268_629_54, 0.261_302_58, 0.275_777_11],
        }
    }
}

/// Files a processor's settings may be in, the first that has them counting, as in transformers.
const FILES: [&str; 2] = ["processor_config.json", "preprocessor_config.json"];

/// The values of `image_processor_type` whose arithmetic this is.
const TYPES: [&str; 7] = [
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
    "Qwen2_5_VLImageProcessorFast",
    "Qwen3VLImageProcessor",
    "Qwen3VLImageProcessorFast",
];

impl Processor {
    /// Reads the settings of the model in folder `dir`: `image_processor` inside `processor_config.json` where there is one, else
    /// `preprocessor_config.json`.
    ///
    /// # Errors
    /// No such file, or one that [`Processor::from_json`] refuses.
    pub fn load(dir: &Path) -> Result<Processor> {
        for file in FILES {
            let path = dir.join(file);
            if !path.is_file() {
                continue;
            }
            let text = fs::read_to_string(&path)
                .with_context(|| format!("reading the picture settings: {}", path.display()))?;
            let whole: Value = serde_json::from_str(&text).with_context(|| {
                format!("reading the picture settings: not JSON: {}", path.display())
            })?;
            let settings = match whole.get("image_processor") {
                Some(nested) => nested,
                // An old processor_config.json only speaks of the chat template.
                None if file == FILES[0] => continue,
                None => &whole,
            };
            return Processor::from_json(settings)
                .with_context(|| format!("in {}", path.display()));
        }
        bail!(
            "reading the picture settings: found neither {} (with `image_processor`) nor {} in {}",
            FILES[0],
            FILES[1],
            dir.display()
        )
    }

    /// From the JSON object of the settings. Both generations of budget keys are read: `min_pixels`/`max_pixels`, which count
    /// when both are there, and `size.shortest_edge`/`size.longest_edge` (numbers of pixels too, in spite of the names). Absent keys have
    /// the defaults of the Qwen2-VL processor; keys that this program has no use for are left alone.
    ///
    /// # Errors
    /// A key whose value asks for other arithmetic than this, or has the wrong type; the key is named.
    pub fn from_json(settings: &Value) -> Result<Processor> {
        ensure!(
            settings.is_object(),
            "reading the picture settings: found {settings}, expected a JSON object"
        );
        let key = |name: &str| settings.get(name).filter(|v| !v.is_null());
        for name in ["image_processor_type", "feature_extractor_type"] {
            if let Some(kind) = key(name) {
                ensure!(
                    kind.as_str().is_some_and(|k| TYPES.contains(&k)),
                    "reading the picture settings: `{name}` is {kind}, expected one of {}",
                    TYPES.join(", ")
                );
            }
        }
        if let Some(resample) = key("resample") {
            ensure!(
                resample.as_u64() == Some(3),
                "reading the picture settings: `resample` is {resample}, expected 3 (bicubic)"
            );
        }
        for name in ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"] {
            if let Some(value) = key(name) {
                ensure!(
                    value.as_bool() == Some(true),
                    "reading the picture settings: `{name}` is {value}, expected true"
                );
            }
        }
        if let Some(factor) = key("rescale_factor") {
            // Files write 1/255 to between 8 and 17 places.
            ensure!(
                factor
                    .as_f64()
                    .is_some_and(|f| (f * 255.0 - 1.0).abs() < 1e-6),
                "reading the picture settings: `rescale_factor` is {factor}, expected 1/255"
            );
        }
        let default = Processor::default();
        let side = |name: &str, default: u32| {
            match key(name) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
                .filter(|&v| (1..=1024).contains(&v))
                .with_context(|| format!("reading the picture settings: `{name}` is {value}, expected a whole number from 1 to 1024")),
        }
        };
        let pixels = |names: [&str; 2], default: u64| {
            let size = key("size");
            let candidates = [
                (names[0].to_owned(), key(names[0])),
                (
                    format!("size.{}", names[1]),
                    size.and_then(|s| s.get(names[1])),
                ),
                (
                    format!("size.{}", names[0]),
                    size.and_then(|s| s.get(names[0])),
                ),
            ];
            for (name, value) in candidates {
                if let Some(value) = value.filter(|v| !v.is_null()) {
                    return value.as_u64().filter(|&v| v > 0).with_context(|| {
                        format!("reading the picture settings: `{name}` is {value}, expected a whole number of pixels over 0")
                    });
                }
            }
            Ok(default)
        };
        let channels = |name: &str, default: [f32; 3]| match key(name) {
            None => Ok(default),
            Some(value) => serde_json::from_value::<[f32; 3]>(value.clone())
                .ok()
                .with_context(|| {
                    format!(
                        "reading the picture settings: `{name}` is {value}, expected three numbers"
                    )
                }),
        };
        let (patch, merge) = (
            side("patch_size", default.patch)?,
            side("merge_size", default.merge)?,
        );
        let processor = Processor {
            budget: Budget::new(
                pixels(["min_pixels", "shortest_edge"], default.budget.min_pixels)?,
                pixels(["max_pixels", "longest_edge"], default.budget.max_pixels)?,
                patch * merge,
            ),
            patch,
            temporal: side("temporal_patch_size", default.temporal)?,
            merge,
            mean: channels("image_mean", default.mean)?,
            std: channels("image_std", default.std)?,
        };
        let Budget {
            min_pixels,
            max_pixels,
            ..
        } = processor.budget;
        ensure!(
            min_pixels <= max_pixels,
            "reading the picture settings: `min_pixels` is {min_pixels}, expected at most `max_pixels`, which is {max_pixels}"
        );
        ensure!(
            processor.std.iter().all(|&s| s > 0.0),
            "reading the picture settings: `image_std` is {:?}, expected three numbers over 0",
            processor.std
        );
        Ok(processor)
    }

    /// The content of a `preprocessor_config.json`, with both generations of budget keys, as old and new readers expect.
    pub fn to_json(&self) -> Value {
        // Through the shortest decimal of the f32, or 0.48145466 would be written as 0.4814546704292297.
        let decimals =
            |values: [f32; 3]| values.map(|v| v.to_string().parse::<f64>().unwrap_or(f64::from(v)));
        json!({
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": decimals(self.mean),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": decimals(self.std),
            "max_pixels": self.budget.max_pixels,
            "merge_size": self.merge,
            "min_pixels": self.budget.min_pixels,
            "patch_size": self.patch,
            "resample": 3,
            "rescale_factor": 1.0 / 255.0,
            "size": {"longest_edge": self.budget.max_pixels, "shortest_edge": self.budget.min_pixels},
            "temporal_patch_size": self.temporal,
        })
    }

    /// Numbers in one patch: channels × frames × rows × columns.
    pub fn patch_len(&self) -> usize {
        CHANNELS * self.temporal as usize * (self.patch as usize).pow(2)
    }

    /// The grid of a picture shown at `size`, which is a multiple of the budget's factor.
    pub fn grid(&self, size: Size) -> Grid {
        Grid::of(size, self.patch)
    }

    /// Tokens in the language model for a picture shown at `size`.
    pub fn tokens(&self, size: Size) -> usize {
        self.grid(size).tokens(self.merge)
    }
}

/// The vision tower's input for one picture.
pub struct Patches {
    pub grid: Grid,
    /// [P, channels × temporal × patch × patch], the `pixel_values` of transformers.
    pub data: Vec<f32>,
}

/// Cuts a shown picture into normalised patches.
///
/// The four patches (merge 2) of one token are neighbours: rows run over (token row, token column, row in token, column in token).
/// Within a row: channel, frame, y, x. Values are (x/255 - mean)/std with the roundings of transformers' Pillow backend.
///
/// # Shapes
/// rgb: [h·patch, w·patch, 3] -> [P = h·w, 3·temporal·patch·patch]
///
/// # Errors
/// Sides that are not multiples of patch × merge: the picture did not go through [`super::show`].
pub fn patches(rgb: &RgbImage, processor: &Processor) -> Result<Patches> {
    let (patch, merge) = (processor.patch as usize, processor.merge as usize);
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    let unit = patch * merge;
    ensure!(
        unit > 0 && width > 0 && height > 0 && width % unit == 0 && height % unit == 0,
        "cutting patches: the picture is {width}x{height}, expected multiples of {unit} (patch {patch} x merge {merge})"
    );
    let grid = processor.grid(Size::new(rgb.width(), rgb.height()));
    let values = normalised(processor);
    let source = rgb.as_raw();
    let (stride, square) = (width * CHANNELS, patch * patch);
    let frames = processor.temporal as usize * square;
    let row_len = processor.patch_len();
    let band_len = grid.w as usize * merge * row_len;
    let mut data = vec![0.0; grid.patches() * row_len];
    data.par_chunks_exact_mut(band_len)
        .enumerate()
        .for_each(|(band, out)| {
            for (i, out) in out.chunks_exact_mut(row_len).enumerate() {
                let (token, inside) = (i / (merge * merge), i % (merge * merge));
                let top = (band * merge + inside / merge) * patch;
                let left = (token * merge + inside % merge) * patch;
                for y in 0..patch {
                    let pixels =
                        &source[(top + y) * stride + left * CHANNELS..][..patch * CHANNELS];
                    for (c, values) in values.iter().enumerate() {
                        let line = &mut out[c * frames + y * patch..][..patch];
                        for (v, pixel) in line.iter_mut().zip(pixels.chunks_exact(CHANNELS)) {
                            *v = values[usize::from(pixel[c])];
                        }
                    }
                }
                // A still picture is the same in every frame.
                for channel in out.chunks_exact_mut(frames) {
                    let (first, later) = channel.split_at_mut(square);
                    later
                        .chunks_exact_mut(square)
                        .for_each(|frame| frame.copy_from_slice(first));
                }
            }
        });
    Ok(Patches { grid, data })
}

/// Per channel, the number that each of the 256 grey levels becomes.
fn normalised(processor: &Processor) -> [[f32; 256]; CHANNELS] {
    std::array::from_fn(|c| {
        std::array::from_fn(|level| {
            // transformers scales in f64, rounds to f32, then subtracts and divides in f32.
            let scaled = (level as f64 * (1.0 / 255.0)) as f32;
            (scaled - processor.mean[c]) / processor.std[c]
        })
    })
}
