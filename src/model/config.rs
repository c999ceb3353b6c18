//! `config.json` and `generation_config.json` of a Qwen2.5-VL model, read and written.
//!
//! Two spellings are in use: the published one (text sizes at the top level, `rope_scaling`) and the one written since
//! transformers 5 (`text_config`, `rope_parameters`). Both are read; a key that is absent has the default of
//! transformers' config class, because transformers itself leaves defaults out when it saves. The published spelling is
//! written, since every version of transformers and vLLM reads it. Whatever this program does not compute (another
//! architecture, another rotary scaling, sliding windows) is an error that names the key, never ignored.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::lora;

/// Sizes of the vision tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    pub depth: usize,
    pub hidden: usize,
    pub heads: usize,
    pub mlp: usize,
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Frames in a patch; a still image is doubled.
    pub temporal_patch: usize,
    /// `merge × merge` patches become one token.
    pub merge: usize,
    /// Side of an attention window in pixels.
    pub window: usize,
    /// Blocks that attend over the whole image.
    pub full_blocks: Vec<usize>,
    /// Width of the features, equal to the language model's.
    pub out_hidden: usize,
    /// Only of use for video; carried through.
    pub tokens_per_second: usize,
}

impl VisionConfig {
    /// Norm epsilon; fixed in the model's code, not in its config.
    pub const EPS: f32 = 1e-6;
    /// Base of the 2-D rotary frequencies; fixed likewise.
    pub const THETA: f64 = 10_000.0;

    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Values in one patch row: channels × side × side. A still picture is the same in every frame of a patch, so each value
    /// stands once.
    pub fn patch_values(&self) -> usize {
        self.in_channels * self.patch * self.patch
    }

    /// Values in a row of the weights and of transformers' `pixel_values`: channels × frames × side × side.
    pub fn framed_values(&self) -> usize {
        self.patch_values() * self.temporal_patch
    }
}

/// Sizes of the language model.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub mlp: usize,
    pub eps: f32,
    pub theta: f64,
    /// Rotary frequencies given to the time, height and width axes; they add up to half a head.
    pub sections: [usize; 3],
    /// Whether the output head is the embedding.
    pub tied: bool,
    pub max_positions: usize,
}

impl TextConfig {
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

/// Ids that the model's code gives a meaning to.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenIds {
    pub image_pad: u32,
    pub video_pad: u32,
    pub vision_start: u32,
    pub vision_end: u32,
    pub bos: Option<u32>,
    /// Every id that ends a turn.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

/// A whole model's sizes and ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub vision: VisionConfig,
    pub text: TextConfig,
    pub ids: TokenIds,
}

/// One JSON object with its path, so that errors can name the key.
#[derive(Clone, Copy)]
struct Section<'a> {
    path: &'static str,
    object: &'a Value,
}

impl Section<'_> {
    fn present(&self, keys: &[&str]) -> Option<(String, &Value)> {
        keys.iter().find_map(|key| {
            let value = self.object.get(key).filter(|v| !v.is_null())?;
            Some((format!("{}{key}", self.path), value))
        })
    }

    fn size(&self, keys: &[&str], default: usize) -> Result<usize> {
        let Some((key, value)) = self.present(keys) else {
            return Ok(default);
        };
        match value.as_u64() {
            Some(n) if n > 0 => Ok(n as usize),
            _ => bail!("`{key}` is {value}; expected a whole number above 0"),
        }
    }

    fn number(&self, keys: &[&str], default: f64) -> Result<f64> {
        let Some((key, value)) = self.present(keys) else {
            return Ok(default);
        };
        value.as_f64().filter(|x| *x > 0.0).with_context(|| format!("`{key}` is {value}; expected a number above 0"))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let Some((key, value)) = self.present(&[key]) else {
            return Ok(false);
        };
        value.as_bool().with_context(|| format!("`{key}` is {value}; expected true or false"))
    }

    fn sizes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        let Some((key, value)) = self.present(&[key]) else {
            return Ok(default.to_vec());
        };
        value
            .as_array()
            .and_then(|a| a.iter().map(|v| v.as_u64().map(|n| n as usize)).collect())
            .with_context(|| format!("`{key}` is {value}; expected a list of whole numbers"))
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        let ids = self.ids(key)?;
        match ids.len() {
            0 | 1 => Ok(ids.first().copied()),
            _ => bail!("`{}{key}` is a list of {}; expected one token id", self.path, ids.len()),
        }
    }

    /// A token id or a list of them.
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some((key, value)) = self.present(&[key]) else {
            return Ok(Vec::new());
        };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids: Option<Vec<u32>> = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        };
        ids.with_context(|| format!("`{key}` is {value}; expected a token id or a list of them"))
    }

    /// Refuses a value other than those this program computes.
    fn only(&self, key: &str, supported: &[Value]) -> Result<()> {
        let Some((key, value)) = self.present(&[key]) else {
            return Ok(());
        };
        let same = |s: &Value| s == value || (s.is_number() && s.as_f64() == value.as_f64());
        ensure!(supported.iter().any(same), "`{key}` is {value}; supported: {}", list(supported));
        Ok(())
    }
}

/// Why a path without a `config.json` is no model, and what to give instead.
pub(crate) fn no_checkpoint(dir: &Path) -> String {
    let shown = dir.display();
    if !dir.exists() {
        let hub = dir.components().count() == 2 && !dir.has_root();
        let hub = if hub { " (nothing is downloaded: give the folder that a hub's model was fetched to)" } else { "" };
        return format!("there is no model folder{hub}: {shown}");
    }
    if !dir.is_dir() {
        return format!(
            "a model is a folder with config.json, tokenizer.json and safetensors files; this is a file: {shown}"
        );
    }
    let inside = |name: &str| std::fs::read_dir(dir.join(name)).is_ok_and(|mut files| files.next().is_some());
    let hint = if inside("checkpoints") { "; a run's models are the folders in its checkpoints/" } else { "" };
    format!("the folder is no model, it has no config.json{hint}: {shown}")
}

fn list(values: &[Value]) -> String {
    values.iter().map(Value::to_string).collect::<Vec<_>>().join(" or ")
}

impl Config {
    /// Reads `config.json` of a model folder.
    pub fn load(dir: &Path) -> Result<Config> {
        let dir = &lora::home(dir, &["config.json"])?;
        let path = dir.join("config.json");
        if !path.is_file() {
            bail!(no_checkpoint(dir));
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let root = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        Config::from_json(&root).with_context(|| format!("reading the model's config: {}", path.display()))
    }

    /// Takes either spelling.
    pub fn from_json(root: &Value) -> Result<Config> {
        let top = Section { path: "", object: root };
        ensure!(root.is_object(), "expected a JSON object, found {root}");
        match root.get("model_type").and_then(Value::as_str) {
            Some("qwen2_5_vl") => {}
            found => bail!(
                "`model_type` is {}; supported: \"qwen2_5_vl\" (choose a checkpoint of Qwen2.5-VL or one trained from it)",
                found.map_or("absent".into(), |f| format!("{f:?}"))
            ),
        }
        let t = match root.get("text_config").filter(|v| v.is_object()) {
            Some(object) => Section { path: "text_config.", object },
            None => top,
        };
        let empty = json!({});
        let v = Section { path: "vision_config.", object: root.get("vision_config").unwrap_or(&empty) };
        let config = Config { text: text(t, top)?, vision: vision(v)?, ids: ids(t, top)? };
        config.check()?;
        Ok(config)
    }

    /// Relations between sizes that the computation relies on.
    pub fn check(&self) -> Result<()> {
        let (t, v) = (&self.text, &self.vision);
        ensure!(
            t.hidden % t.heads == 0,
            "`hidden_size` {} is not a multiple of `num_attention_heads` {}",
            t.hidden,
            t.heads
        );
        ensure!(
            t.heads % t.kv_heads == 0,
            "`num_attention_heads` {} is not a multiple of `num_key_value_heads` {}",
            t.heads,
            t.kv_heads
        );
        ensure!(
            2 * t.sections.iter().sum::<usize>() == t.head_dim(),
            "`mrope_section` {:?} must add up to half the head width, {}",
            t.sections,
            t.head_dim() / 2
        );
        ensure!(
            v.hidden % v.heads == 0 && v.head_dim() % 4 == 0,
            "`vision_config.hidden_size` {} over `num_heads` {} must be a multiple of 4",
            v.hidden,
            v.heads
        );
        ensure!(
            v.out_hidden == t.hidden,
            "`vision_config.out_hidden_size` {} must equal `hidden_size` {}",
            v.out_hidden,
            t.hidden
        );
        ensure!(
            v.window / v.merge / v.patch > 0,
            "`vision_config.window_size` {} is smaller than one token, {} pixels",
            v.window,
            v.merge * v.patch
        );
        for id in self.vision_ids() {
            ensure!((id as usize) < t.vocab, "token id {id} is outside the vocabulary of {} (`vocab_size`)", t.vocab);
        }
        Ok(())
    }

    /// Ids that stand for vision and must never be sampled.
    pub fn vision_ids(&self) -> [u32; 4] {
        [self.ids.image_pad, self.ids.video_pad, self.ids.vision_start, self.ids.vision_end]
    }

    /// The published spelling.
    pub fn to_json(&self, dtype: &str) -> Value {
        let (t, v, i) = (&self.text, &self.vision, &self.ids);
        let vision = json!({
            "model_type": "qwen2_5_vl",
            "depth": v.depth,
            "hidden_act": "silu",
            "hidden_size": v.hidden,
            "intermediate_size": v.mlp,
            "num_heads": v.heads,
            // Both names: transformers reads in_channels, the published files and older loaders in_chans.
            "in_channels": v.in_channels,
            "in_chans": v.in_channels,
            "out_hidden_size": v.out_hidden,
            "patch_size": v.patch,
            "spatial_patch_size": v.patch,
            "spatial_merge_size": v.merge,
            "temporal_patch_size": v.temporal_patch,
            "window_size": v.window,
            "fullatt_block_indexes": v.full_blocks,
            "tokens_per_second": v.tokens_per_second,
        });
        let mut root = json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "attention_dropout": 0.0,
            "bos_token_id": i.bos,
            "eos_token_id": match i.eos.as_slice() { [one] => json!(one), many => json!(many) },
            "pad_token_id": i.pad,
            "vision_start_token_id": i.vision_start,
            "vision_end_token_id": i.vision_end,
            "image_token_id": i.image_pad,
            "video_token_id": i.video_pad,
            "hidden_act": "silu",
            "hidden_size": t.hidden,
            "initializer_range": 0.02,
            "intermediate_size": t.mlp,
            "max_position_embeddings": t.max_positions,
            "max_window_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_hidden_layers": t.layers,
            "num_key_value_heads": t.kv_heads,
            "rms_norm_eps": shortest(t.eps),
            "rope_theta": t.theta,
            "rope_scaling": { "type": "mrope", "mrope_section": t.sections },
            "use_cache": true,
            "use_sliding_window": false,
            "tie_word_embeddings": t.tied,
            "vocab_size": t.vocab,
            "torch_dtype": dtype,
            "vision_config": vision,
        });
        if let Value::Object(map) = &mut root {
            map.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|a| !a.is_empty()));
        }
        root
    }
}

/// The f64 with the same shortest decimal as this f32: 1e-6 is written as 1e-6, not 9.99999997e-7.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x as f64)
}

fn text(t: Section, top: Section) -> Result<TextConfig> {
    t.only("hidden_act", &[json!("silu")])?;
    t.only("use_sliding_window", &[json!(false)])?;
    t.only("attention_dropout", &[json!(0.0)])?;
    if let Some((key, Value::Array(kinds))) = t.present(&["layer_types"])
        && let Some(other) = kinds.iter().find(|k| *k != "full_attention")
    {
        bail!("`{key}` contains {other}; supported: \"full_attention\"");
    }
    let heads = t.size(&["num_attention_heads"], 64)?;
    let hidden = t.size(&["hidden_size"], 8192)?;
    t.only("head_dim", &[json!(hidden / heads)])?;

    let empty = json!({});
    let rope = t.present(&["rope_parameters", "rope_scaling"]).map_or(&empty, |(_, v)| v);
    let rope = Section { path: "rope_parameters.", object: rope };
    rope.only("rope_type", &[json!("default"), json!("mrope")])?;
    rope.only("type", &[json!("default"), json!("mrope")])?;
    let theta = match rope.present(&["rope_theta"]) {
        Some(_) => rope.number(&["rope_theta"], 1e6)?,
        None => t.number(&["rope_theta"], 1e6)?,
    };
    let sections = rope.sizes("mrope_section", &[16, 24, 24])?;
    let sections = <[usize; 3]>::try_from(sections)
        .map_err(|s| anyhow::anyhow!("`mrope_section` is {s:?}; expected three numbers, for time, height and width"))?;
    Ok(TextConfig {
        vocab: t.size(&["vocab_size"], 152_064)?,
        hidden,
        layers: t.size(&["num_hidden_layers"], 80)?,
        heads,
        // transformers: an explicit null means as many as query heads, an absent key means 8.
        kv_heads: match t.object.get("num_key_value_heads") {
            Some(Value::Null) => heads,
            _ => t.size(&["num_key_value_heads"], 8)?,
        },
        mlp: t.size(&["intermediate_size"], 29_568)?,
        eps: t.number(&["rms_norm_eps"], 1e-5)? as f32,
        theta,
        sections,
        tied: t.flag("tie_word_embeddings")? || top.flag("tie_word_embeddings")?,
        max_positions: t.size(&["max_position_embeddings"], 32_768)?,
    })
}

fn vision(v: Section) -> Result<VisionConfig> {
    v.only("hidden_act", &[json!("silu")])?;
    if let Some((_, rope)) = v.present(&["rope_parameters"]) {
        let rope = Section { path: "vision_config.rope_parameters.", object: rope };
        rope.only("rope_type", &[json!("axial"), json!("default")])?;
        rope.only("rope_theta", &[json!(VisionConfig::THETA)])?;
    }
    Ok(VisionConfig {
        depth: v.size(&["depth", "num_hidden_layers"], 32)?,
        hidden: v.size(&["hidden_size"], 3584)?,
        heads: v.size(&["num_heads", "num_attention_heads"], 16)?,
        mlp: v.size(&["intermediate_size"], 3420)?,
        in_channels: v.size(&["in_channels", "in_chans"], 3)?,
        patch: v.size(&["patch_size"], 14)?,
        temporal_patch: v.size(&["temporal_patch_size"], 2)?,
        merge: v.size(&["spatial_merge_size"], 2)?,
        window: v.size(&["window_size"], 112)?,
        full_blocks: v.sizes("fullatt_block_indexes", &[7, 15, 23, 31])?,
        out_hidden: v.size(&["out_hidden_size"], 3584)?,
        tokens_per_second: v.size(&["tokens_per_second"], 4)?,
    })
}

fn ids(t: Section, top: Section) -> Result<TokenIds> {
    let either = |key: &str| Ok::<_, anyhow::Error>(top.id(key)?.or(t.id(key)?));
    let eos = top.ids("eos_token_id")?;
    Ok(TokenIds {
        image_pad: either("image_token_id")?.unwrap_or(151_655),
        video_pad: either("video_token_id")?.unwrap_or(151_656),
        vision_start: either("vision_start_token_id")?.unwrap_or(151_652),
        vision_end: either("vision_end_token_id")?.unwrap_or(151_653),
        bos: either("bos_token_id")?,
        eos: if eos.is_empty() { t.ids("eos_token_id")? } else { eos },
        pad: either("pad_token_id")?,
    })
}

/// `generation_config.json`: how the makers of a model sample from it. Absent keys are `None` or empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<usize>,
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Reads the file of a model folder; a folder without one gives the empty value.
    pub fn load(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        if !path.exists() {
            return Ok(GenerationConfig::default());
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let root = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        GenerationConfig::from_json(&root).with_context(|| format!("reading {}", path.display()))
    }

    pub fn from_json(root: &Value) -> Result<GenerationConfig> {
        let s = Section { path: "", object: root };
        let number = |key: &str| {
            s.present(&[key])
                .map(|(key, v)| v.as_f64().with_context(|| format!("`{key}` is {v}; expected a number")))
                .transpose()
        };
        Ok(GenerationConfig {
            bos: s.id("bos_token_id")?,
            eos: s.ids("eos_token_id")?,
            pad: s.id("pad_token_id")?,
            do_sample: s.present(&["do_sample"]).map(|_| s.flag("do_sample")).transpose()?,
            temperature: number("temperature")?,
            top_p: number("top_p")?,
            top_k: s.present(&["top_k"]).and_then(|(_, v)| v.as_u64()).map(|k| k as usize),
            repetition_penalty: number("repetition_penalty")?,
        })
    }

    pub fn to_json(&self) -> Value {
        let mut root = json!({
            "bos_token_id": self.bos,
            "eos_token_id": match self.eos.as_slice() { [] => Value::Null, [one] => json!(one), many => json!(many) },
            "pad_token_id": self.pad,
            "do_sample": self.do_sample,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
        });
        if let Value::Object(map) = &mut root {
            map.retain(|_, value| !value.is_null());
        }
        root
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Value {
        json!({
            "model_type": "qwen2_5_vl", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655,
            "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
            "max_position_embeddings": 128000, "num_attention_heads": 16, "num_hidden_layers": 36,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936,
            "vision_config": { "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2, "temporal_patch_size": 2 },
            "rope_scaling": { "type": "mrope", "mrope_section": [16, 24, 24] },
        })
    }

    fn nested() -> Value {
        let mut text = published();
        let map = text.as_object_mut().unwrap();
        let vision = map.remove("vision_config").unwrap();
        for key in ["rope_scaling", "rope_theta", "tie_word_embeddings", "model_type"] {
            map.remove(key);
        }
        for key in ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"] {
            map.remove(key);
        }
        map.insert(
            "rope_parameters".into(),
            json!({"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}),
        );
        json!({ "model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": true })
    }

    #[test]
    fn both_spellings_are_one_config() {
        let a = Config::from_json(&published()).unwrap();
        assert_eq!((a.text.layers, a.text.kv_heads, a.text.sections), (36, 2, [16, 24, 24]));
        assert_eq!(a.ids.eos, vec![151645]);
        assert_eq!(a, Config::from_json(&nested()).unwrap());
        assert_eq!(a, Config::from_json(&a.to_json("float32")).unwrap());
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let with = |key: &str, value: Value| {
            let mut root = published();
            root[key] = value;
            Config::from_json(&root).unwrap_err().to_string()
        };
        let other = with("model_type", json!("qwen3_vl"));
        assert!(other.starts_with("`model_type` is \"qwen3_vl\"; supported: \"qwen2_5_vl\""), "{other}");
        assert_eq!(with("use_sliding_window", json!(true)), "`use_sliding_window` is true; supported: false");
        assert_eq!(with("hidden_act", json!("gelu")), "`hidden_act` is \"gelu\"; supported: \"silu\"");
        let yarn = with("rope_scaling", json!({"type": "yarn", "factor": 4.0}));
        assert_eq!(yarn, "`rope_parameters.type` is \"yarn\"; supported: \"default\" or \"mrope\"");
        assert!(with("hidden_size", json!("wide")).contains("`hidden_size` is \"wide\""));
    }

    #[test]
    fn generation_config_takes_one_id_or_many() {
        let g = GenerationConfig::from_json(&json!({"eos_token_id": [151645, 151643], "temperature": 1e-6})).unwrap();
        assert_eq!((g.eos.as_slice(), g.temperature), (&[151645u32, 151643][..], Some(1e-6)));
        assert_eq!(GenerationConfig::from_json(&g.to_json()).unwrap(), g);
        assert_eq!(GenerationConfig::from_json(&json!({"eos_token_id": 2})).unwrap().eos, vec![2]);
    }
}
