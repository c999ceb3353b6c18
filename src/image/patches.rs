//! Pixels to the rows the vision tower multiplies: the processor's settings, and the order of the numbers.
//!
//! It hides the two generations of settings files and the order of patches. What must stay true: the numbers are those of the
//! published processors to 1e-6, and a settings file that asks for something else is an error that names the key.

use crate::geometry::{Budget, Grid, Size};
use crate::model::config::no_checkpoint;
use crate::model::{Config, lora};
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
    /// Frames a patch spans. A still picture is the same in all of them, so here it stands once.
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
            // The digits as published; two of them are beyond f32.
            #[allow(clippy::excessive_precision)]
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
    /// No such file, one that [`Processor::from_json`] refuses, or a `config.json` beside it that wants other patches.
    pub fn load(dir: &Path) -> Result<Processor> {
        ensure!(dir.is_dir(), no_checkpoint(dir));
        let dir = &lora::home(dir, &FILES)?;
        for file in FILES {
            let path = dir.join(file);
            if !path.is_file() {
                continue;
            }
            let text = fs::read_to_string(&path)
                .with_context(|| format!("reading the picture settings: {}", path.display()))?;
            let whole: Value = serde_json::from_str(&text)
                .with_context(|| format!("reading the picture settings: not JSON: {}", path.display()))?;
            let settings = match whole.get("image_processor") {
                Some(nested) => nested,
                // An old processor_config.json only speaks of the chat template.
                None if file == FILES[0] => continue,
                None => &whole,
            };
            let processor = Processor::from_json(settings).with_context(|| format!("in {}", path.display()))?;
            processor.check_model(dir, &path)?;
            return Ok(processor);
        }
        bail!(
            "reading the picture settings: found neither {} (with `image_processor`) nor {} in {}",
            FILES[0],
            FILES[1],
            dir.display()
        )
    }

    /// Refuses a model in `dir` whose vision tower takes other patches than these settings, read from `own`, cut.
    fn check_model(&self, dir: &Path, own: &Path) -> Result<()> {
        let path = dir.join("config.json");
        if !path.is_file() {
            return Ok(()); // the folder of a tokenizer and processor alone
        }
        let model = Config::load(dir)?.vision;
        for (key, cut, in_model, wanted) in [
            ("patch_size", self.patch, "patch_size", model.patch),
            ("merge_size", self.merge, "spatial_merge_size", model.merge),
            ("temporal_patch_size", self.temporal, "temporal_patch_size", model.temporal_patch),
        ] {
            ensure!(
                cut as usize == wanted,
                "the picture settings and the model disagree: `{key}` is {cut} in {}, `vision_config.{in_model}` is {wanted} in {}; \
                 use the two files of one checkpoint",
                own.display(),
                path.display()
            );
        }
        Ok(())
    }

    /// From the JSON object of the settings. Both generations of budget keys are read: `min_pixels`/`max_pixels`, which count
    /// when both are there, and `size.shortest_edge`/`size.longest_edge` (numbers of pixels too, in spite of the names). Absent keys have
    /// the defaults of the Qwen2-VL processor; keys that this program has no use for are left alone.
    ///
    /// # Errors
    /// A key whose value asks for other arithmetic than this, or has the wrong type; the key is named.
    pub fn from_json(settings: &Value) -> Result<Processor> {
        ensure!(settings.is_object(), "reading the picture settings: found {settings}, expected a JSON object");
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
                factor.as_f64().is_some_and(|f| (f * 255.0 - 1.0).abs() < 1e-6),
                "reading the picture settings: `rescale_factor` is {factor}, expected 1/255"
            );
        }
        let default = Processor::default();
        let side = |name: &str, default: u32| match key(name) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
                .filter(|&v| (1..=1024).contains(&v))
                .with_context(|| {
                    format!("reading the picture settings: `{name}` is {value}, expected a whole number from 1 to 1024")
                }),
        };
        let pixels = |names: [&str; 2], default: u64| {
            let size = key("size");
            let candidates = [
                (names[0].to_owned(), key(names[0])),
                (format!("size.{}", names[1]), size.and_then(|s| s.get(names[1]))),
                (format!("size.{}", names[0]), size.and_then(|s| s.get(names[0]))),
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
                .with_context(|| format!("reading the picture settings: `{name}` is {value}, expected three numbers")),
        };
        let (patch, merge) = (side("patch_size", default.patch)?, side("merge_size", default.merge)?);
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
        let Budget { min_pixels, max_pixels, .. } = processor.budget;
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
        // Through the shortest decimal that is the same f32, or 0.48145466 would be written as 0.48145467042922974.
        let decimals = |values: [f32; 3]| values.map(|v| v.to_string().parse::<f64>().unwrap_or(f64::from(v)));
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

    /// Numbers in one patch: channels × rows × columns.
    pub fn patch_len(&self) -> usize {
        CHANNELS * (self.patch as usize).pow(2)
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
    /// [P, channels × patch × patch]: the `pixel_values` of transformers without the repetition for each frame.
    pub data: Vec<f32>,
}

/// Cuts a shown picture into normalised patches.
///
/// The four patches (merge 2) of one token are neighbours: rows run over (token row, token column, row in token, column in token).
/// Within a row: channel, y, x. Values are (x/255 - mean)/std with the roundings of transformers' Pillow backend.
///
/// # Shapes
/// rgb: [h·patch, w·patch, 3] -> [P = h·w, 3·patch·patch]
///
/// # Errors
/// Sides that are not multiples of patch × merge: the picture did not go through [`super::show`].
pub fn patches(rgb: &RgbImage, processor: &Processor) -> Result<Patches> {
    let grid = processor.grid(Size::new(rgb.width(), rgb.height()));
    let mut data = vec![0.0; grid.patches() * processor.patch_len()];
    cut(&mut data, rgb, processor)?;
    Ok(Patches { grid, data })
}

/// [`patches`] into a place that has room for just these.
pub fn cut(data: &mut [f32], rgb: &RgbImage, processor: &Processor) -> Result<()> {
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
    let row_len = processor.patch_len();
    let band_len = grid.w as usize * merge * row_len;
    ensure!(data.len() == grid.patches() * row_len, "cutting patches: there is room for {} numbers", data.len());
    data.par_chunks_exact_mut(band_len).enumerate().for_each(|(band, out)| {
        for (i, out) in out.chunks_exact_mut(row_len).enumerate() {
            let (token, inside) = (i / (merge * merge), i % (merge * merge));
            let top = (band * merge + inside / merge) * patch;
            let left = (token * merge + inside % merge) * patch;
            for y in 0..patch {
                let pixels = &source[(top + y) * stride + left * CHANNELS..][..patch * CHANNELS];
                for (c, values) in values.iter().enumerate() {
                    let line = &mut out[c * square + y * patch..][..patch];
                    for (v, pixel) in line.iter_mut().zip(pixels.chunks_exact(CHANNELS)) {
                        *v = values[usize::from(pixel[c])];
                    }
                }
            }
        }
    });
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Small enough to write out: patches of 2x2 pixels, merged 2x2, values as they are (mean 0, std 1/255 undone below).
    fn small() -> Processor {
        Processor { budget: Budget::new(1, 1 << 20, 4), patch: 2, temporal: 2, merge: 2, mean: [0.0; 3], std: [1.0; 3] }
    }

    #[test]
    fn patches_of_one_token_are_neighbours() {
        // 8 x 4 pixels, red counting up along the rows: 0..8, 8..16, ...; two tokens side by side of 2x2 patches each.
        let rgb = RgbImage::from_fn(8, 4, |x, y| ::image::Rgb([(y * 8 + x) as u8, 100, 200]));
        let rows = patches(&rgb, &small()).unwrap();
        assert_eq!(rows.grid, Grid { t: 1, h: 2, w: 4 });
        let row_len = 3 * 4;
        let red: Vec<Vec<f32>> =
            rows.data.chunks(row_len).map(|row| row[..4].iter().map(|v| (v * 255.0).round()).collect()).collect();
        assert_eq!(
            red,
            [
                [0.0, 1.0, 8.0, 9.0],
                [2.0, 3.0, 10.0, 11.0],
                [16.0, 17.0, 24.0, 25.0],
                [18.0, 19.0, 26.0, 27.0],
                [4.0, 5.0, 12.0, 13.0],
                [6.0, 7.0, 14.0, 15.0],
                [20.0, 21.0, 28.0, 29.0],
                [22.0, 23.0, 30.0, 31.0],
            ]
        );
        for row in rows.data.chunks(row_len) {
            let (green, blue) = (&row[4..8], &row[8..]);
            assert!(green.iter().all(|&v| v == 100.0 / 255.0) && blue.iter().all(|&v| v == 200.0 / 255.0));
        }
    }

    #[test]
    fn values_are_normalised_as_transformers_does() {
        let values = normalised(&Processor::default());
        // (level/255 - mean)/std, from transformers' Pillow backend, in f32: 1e-6 is a few of its last bits at this size.
        for (c, level, wanted) in
            [(0, 0, -1.792_262_6), (0, 255, 1.930_336_2), (1, 128, 0.168_897_32), (2, 7, -1.380_679_4)]
        {
            let got: f32 = values[c][level];
            assert!((got - wanted).abs() < 1e-6, "channel {c} level {level}: {got}");
        }
    }

    #[test]
    fn sides_that_are_no_whole_tokens_are_refused() {
        let error = patches(&RgbImage::new(28, 27), &Processor::default()).map(drop).unwrap_err();
        assert!(error.to_string().contains("28x27"));
        assert!(patches(&RgbImage::new(0, 0), &Processor::default()).is_err());
    }

    #[test]
    fn both_generations_of_settings_are_read_and_written() {
        let old = json!({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "image_processor_type": "Qwen2VLImageProcessor"});
        assert_eq!(Processor::from_json(&old).unwrap().budget, Budget::new(3136, 12_845_056, 28));
        let new = json!({
            "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2, "resample": 3,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast"
        });
        let read = Processor::from_json(&new).unwrap();
        assert_eq!((read.budget, read.mean), (Budget::new(65_536, 16_777_216, 32), [0.5; 3]));
        assert_eq!(Processor::from_json(&json!({})).unwrap(), Processor::default());
        // When both generations stand there, the flat keys count, as in transformers.
        let both = json!({"min_pixels": 4000, "size": {"shortest_edge": 5000, "longest_edge": 6000}});
        assert_eq!(Processor::from_json(&both).unwrap().budget, Budget::new(4000, 6000, 28));
        for processor in [read, Processor::default()] {
            assert_eq!(Processor::from_json(&processor.to_json()).unwrap(), processor);
        }
        assert_eq!(Processor::default().to_json()["image_mean"].to_string(), "[0.48145467,0.4578275,0.40821072]");
    }

    #[test]
    fn settings_that_ask_for_something_else_name_the_key() {
        for (settings, key) in [
            (json!({"resample": 2}), "`resample` is 2"),
            (json!({"image_processor_type": "CLIPImageProcessor"}), "`image_processor_type` is \"CLIPImageProcessor\""),
            (json!({"do_normalize": false}), "`do_normalize`"),
            (json!({"rescale_factor": 1.0}), "`rescale_factor`"),
            (json!({"patch_size": 0}), "`patch_size` is 0"),
            (json!({"size": {"longest_edge": "big"}}), "`size.longest_edge` is \"big\""),
            (json!({"image_std": [0, 1, 1]}), "`image_std`"),
            (json!({"image_mean": [0.5]}), "`image_mean`"),
            (json!({"min_pixels": 9_000_000}), "`min_pixels` is 9000000"),
            (json!([1]), "expected a JSON object"),
        ] {
            let error = Processor::from_json(&settings).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn settings_are_found_in_either_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Processor::load(dir.path()).unwrap_err().to_string().contains("preprocessor_config.json"));
        fs::write(dir.path().join("preprocessor_config.json"), r#"{"max_pixels": 7000}"#).unwrap();
        fs::write(dir.path().join("processor_config.json"), r#"{"processor_class": "Qwen2_5_VLProcessor"}"#).unwrap();
        assert_eq!(Processor::load(dir.path()).unwrap().budget.max_pixels, 7000);
        fs::write(dir.path().join("processor_config.json"), r#"{"image_processor": {"max_pixels": 8000}}"#).unwrap();
        assert_eq!(Processor::load(dir.path()).unwrap().budget.max_pixels, 8000);
        fs::write(dir.path().join("processor_config.json"), r#"{"image_processor": {"resample": 0}}"#).unwrap();
        let error = format!("{:#}", Processor::load(dir.path()).unwrap_err());
        assert!(error.contains("`resample`") && error.contains("processor_config.json"), "{error}");
    }

    #[test]
    fn settings_of_another_model_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let settings = |json: Value| fs::write(dir.path().join("preprocessor_config.json"), json.to_string()).unwrap();
        let config = crate::model::presets::nano(100).to_json("float32");
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        settings(json!({"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}));
        assert!(Processor::load(dir.path()).is_ok());
        for (key, in_model) in [
            ("patch_size", "`vision_config.patch_size` is 14"),
            ("merge_size", "`vision_config.spatial_merge_size` is 2"),
            ("temporal_patch_size", "`vision_config.temporal_patch_size` is 2"),
        ] {
            settings(json!({key: 16}));
            let error = format!("{:#}", Processor::load(dir.path()).unwrap_err());
            let said = [&format!("`{key}` is 16"), in_model, "preprocessor_config.json", "/config.json"];
            assert!(said.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}
