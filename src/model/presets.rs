//! Sizes to start from, and random parameters for them.
//!
//! `nano` and `mini` are made for training on a laptop from nothing; the others have the sizes of the published
//! checkpoints. Initialisation is one seeded stream over the entries in layout order, so a preset, a seed and a
//! vocabulary size name one model exactly.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::Vlm;
use super::config::{Config, TextConfig, TokenIds, VisionConfig};
use super::layout::{Arena, Entry, Group, Layout};
use super::weights::{Dtype, Outgoing, save_outgoing};

/// Names that [`preset`] takes.
pub const NAMES: [&str; 4] = ["nano", "mini", "qwen2.5-vl-3b", "qwen2.5-vl-7b"];

/// Ids of Qwen's own tokenizer.
pub fn qwen_ids() -> TokenIds {
    TokenIds {
        image_pad: 151_655,
        video_pad: 151_656,
        vision_start: 151_652,
        vision_end: 151_653,
        bos: Some(151_643),
        eos: vec![151_645],
        pad: Some(151_643),
    }
}

/// The configuration of a name. `vocab` and `ids` come from the tokenizer; the published sizes keep their own vocabulary.
pub fn preset(name: &str, vocab: usize, ids: &TokenIds) -> Result<Config> {
    Ok(match name {
        "nano" => Config { ids: ids.clone(), ..nano(vocab) },
        "mini" => Config { ids: ids.clone(), ..mini(vocab) },
        "qwen2.5-vl-3b" => Config { ids: ids.clone(), ..qwen25_vl_3b() },
        "qwen2.5-vl-7b" => Config { ids: ids.clone(), ..qwen25_vl_7b() },
        other => bail!("unknown preset `{other}`; there are {}", NAMES.join(", ")),
    })
}

fn last_ids(vocab: usize) -> TokenIds {
    let id = |back: usize| vocab.saturating_sub(back) as u32;
    TokenIds {
        image_pad: id(2),
        video_pad: id(1),
        vision_start: id(4),
        vision_end: id(3),
        bos: None,
        eos: vec![id(5)],
        pad: Some(id(6)),
    }
}

/// About 2.5 million parameters beside the embeddings. Until a tokenizer says better, the special ids are the last ones.
pub fn nano(vocab: usize) -> Config {
    Config {
        vision: VisionConfig {
            depth: 4,
            hidden: 128,
            heads: 4,
            mlp: 384,
            in_channels: 3,
            patch: 14,
            temporal_patch: 2,
            merge: 2,
            window: 112,
            full_blocks: vec![1, 3],
            out_hidden: 128,
            tokens_per_second: 2,
        },
        text: TextConfig {
            vocab,
            hidden: 128,
            layers: 6,
            heads: 4,
            kv_heads: 2,
            mlp: 384,
            eps: 1e-6,
            // Not Qwen's 1e6. The sections hand frequencies out from fast to slow: time, height, width. With 16 of them
            // and a base of 1e6 the width axis gets angles from 2e-4 to 2e-6 a column, which no model can tell from 0. With
            // 100 it can, but then no frequency is slow enough to match words with patches by content alone, wherever
            // they stand. 1e4 leaves the first half of the head to places and the second to content (LOG.md).
            theta: 10_000.0,
            sections: [4, 6, 6],
            tied: true,
            max_positions: 32_768,
        },
        ids: last_ids(vocab),
    }
}

/// About 60 million parameters with a small vocabulary.
pub fn mini(vocab: usize) -> Config {
    Config {
        vision: VisionConfig {
            depth: 12,
            hidden: 384,
            heads: 6,
            mlp: 1152,
            in_channels: 3,
            patch: 14,
            temporal_patch: 2,
            merge: 2,
            window: 112,
            full_blocks: vec![2, 5, 8, 11],
            out_hidden: 512,
            tokens_per_second: 2,
        },
        text: TextConfig {
            vocab,
            hidden: 512,
            layers: 10,
            heads: 8,
            kv_heads: 2,
            mlp: 1536,
            eps: 1e-6,
            // As in `nano`: 32 frequencies are still too few for 1e6.
            theta: 1000.0,
            sections: [8, 12, 12],
            tied: true,
            max_positions: 32_768,
        },
        ids: last_ids(vocab),
    }
}

fn qwen_vision(out_hidden: usize) -> VisionConfig {
    VisionConfig {
        depth: 32,
        hidden: 1280,
        heads: 16,
        mlp: 3420,
        in_channels: 3,
        patch: 14,
        temporal_patch: 2,
        merge: 2,
        window: 112,
        full_blocks: vec![7, 15, 23, 31],
        out_hidden,
        tokens_per_second: 2,
    }
}

/// Qwen2.5-VL-3B.
pub fn qwen25_vl_3b() -> Config {
    Config {
        vision: qwen_vision(2048),
        text: TextConfig {
            vocab: 151_936,
            hidden: 2048,
            layers: 36,
            heads: 16,
            kv_heads: 2,
            mlp: 11_008,
            eps: 1e-6,
            theta: 1e6,
            sections: [16, 24, 24],
            tied: true,
            max_positions: 128_000,
        },
        ids: qwen_ids(),
    }
}

/// Qwen2.5-VL-7B.
pub fn qwen25_vl_7b() -> Config {
    Config {
        vision: qwen_vision(3584),
        text: TextConfig {
            vocab: 152_064,
            hidden: 3584,
            layers: 28,
            heads: 28,
            kv_heads: 4,
            mlp: 18_944,
            eps: 1e-6,
            theta: 1e6,
            sections: [16, 24, 24],
            tied: false,
            max_positions: 128_000,
        },
        ids: qwen_ids(),
    }
}

/// The smallest model that tests of files need.
#[cfg(test)]
pub fn one_layer() -> Vlm {
    let mut config = nano(50);
    (config.text.layers, config.vision.depth) = (1, 1);
    initialise(config, 1)
}

/// Random parameters: norms 1, biases 0, embeddings of standard deviation 0.02, matrices of `1/√inputs`. The maps that
/// write into the residual stream are smaller by `1/√(2L)`, so that the stream does not grow with depth
/// (GPT-2, section 2.3 of the report). Larger embeddings, where the head is tied, would make a random model repeat each token.
pub fn initialise(config: Config, seed: u64) -> Vlm {
    let random = Random::new(config, seed);
    let mut arena = Arena::zeros(&random.layout);
    for entry in &random.layout.entries {
        random.fill(entry, &mut arena.data[entry.range.clone()]);
    }
    Vlm::new(random.config, arena.into())
}

/// [`initialise`] tensor by tensor, for a model that is to be written and would not fit into memory.
pub struct Random {
    pub config: Config,
    pub layout: Arc<Layout>,
    seed: u64,
}

/// Words of the random stream that a pair of numbers takes: two of 64 bits.
const WORDS: usize = 4;
/// Numbers that one task draws.
const DRAWN: usize = 1 << 16;

impl Random {
    pub fn new(config: Config, seed: u64) -> Random {
        Random { layout: Layout::new(&config), config, seed }
    }

    /// Writes a model folder as [`Vlm::save`] does.
    pub fn save(&self, dir: &Path, dtype: Dtype, source: Option<&Path>) -> Result<()> {
        let values = |entry: &Entry| {
            let mut values = vec![0.0; entry.range.len()];
            self.fill(entry, &mut values);
            Cow::Owned(values)
        };
        save_outgoing(&Outgoing { config: &self.config, layout: &self.layout, values: &values }, dir, dtype, source)
    }

    /// The values of one tensor: those of the one stream over all entries, which is entered at their place.
    pub fn fill(&self, entry: &Entry, values: &mut [f32]) {
        let Random { config, layout, seed } = self;
        let name = entry.name.as_str();
        if !is_drawn(entry) {
            return values.fill(if name.ends_with(".bias") { 0.0 } else { 1.0 });
        }
        let residual = ["o_proj.weight", "attn.proj.weight", "down_proj.weight"].iter().any(|end| name.ends_with(end));
        let depth = if entry.group == Group::Text { config.text.layers } else { config.vision.depth };
        let inputs: usize = entry.shape[1..].iter().product();
        let std = match entry.group {
            Group::Embeddings => 0.02,
            _ if residual => 1.0 / (inputs as f64 * 2.0 * depth as f64).sqrt(),
            _ => 1.0 / (inputs as f64).sqrt(),
        };
        let before = layout.entries.iter().take_while(|e| e.range.start < entry.range.start);
        let pairs: usize = before.filter(|e| is_drawn(e)).map(|e| e.range.len().div_ceil(2)).sum();
        values.par_chunks_mut(DRAWN).enumerate().for_each(|(i, values)| {
            let mut rng = ChaCha8Rng::seed_from_u64(*seed);
            rng.set_word_pos(((pairs + i * DRAWN / 2) * WORDS) as u128);
            for pair in values.chunks_mut(2) {
                let (a, b) = normal_pair(&mut rng);
                for (value, z) in pair.iter_mut().zip([a, b]) {
                    *value = (z * std) as f32;
                }
            }
        });
    }
}

/// Whether a tensor's values are random; norms and biases are not.
fn is_drawn(entry: &Entry) -> bool {
    entry.shape.len() > 1
}

/// Two independent standard normal numbers (Box and Muller, 1958).
fn normal_pair(rng: &mut ChaCha8Rng) -> (f64, f64) {
    let u: f64 = 1.0 - rng.random::<f64>();
    let angle = std::f64::consts::TAU * rng.random::<f64>();
    let r = (-2.0 * u.ln()).sqrt();
    (r * angle.cos(), r * angle.sin())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_consistent() {
        for name in NAMES {
            preset(name, 2000, &last_ids(2000)).unwrap().check().unwrap();
        }
        assert!(preset("huge", 1, &qwen_ids()).unwrap_err().to_string().contains("nano, mini"));
        let millions = Layout::new(&mini(2000)).len / 1_000_000;
        assert!((50..70).contains(&millions), "mini has {millions} million");
    }

    /// Norms 1, biases 0; a matrix of 128 inputs has standard deviation 1/√128 = 0.0884. Over 128·384 draws the sample's
    /// own standard deviation is off by 1/√(2n) = 0.3 %; three of those are allowed.
    #[test]
    fn scales() {
        let m = initialise(nano(300), 7);
        assert!(
            m.weights.arena().unwrap().get("model.layers.2.input_layernorm.weight").unwrap().iter().all(|x| *x == 1.0)
        );
        assert!(
            m.weights.arena().unwrap().get("model.layers.2.self_attn.q_proj.bias").unwrap().iter().all(|x| *x == 0.0)
        );
        let gate = m.weights.arena().unwrap().get("model.layers.2.mlp.gate_proj.weight").unwrap();
        let std = (gate.iter().map(|x| (x * x) as f64).sum::<f64>() / gate.len() as f64).sqrt();
        assert!((std * 128f64.sqrt() - 1.0).abs() < 0.01, "{std}");
        let arena = |seed| initialise(nano(300), seed).weights.arena().unwrap().data.clone();
        assert_eq!(m.weights.arena().unwrap().data, arena(7));
        assert_ne!(m.weights.arena().unwrap().data, arena(8));
    }

    /// Every tensor alone, in any order, is its stretch of one stream; the embedding is longer than what a task draws.
    #[test]
    fn tensors_are_stretches_of_one_stream() {
        let random = Random::new(nano(1001), 7);
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for entry in random.layout.entries.iter().filter(|e| is_drawn(e)) {
            let mut values = vec![f32::NAN; entry.range.len()];
            random.fill(entry, &mut values);
            let pairs: Vec<(f64, f64)> = (0..values.len().div_ceil(2)).map(|_| normal_pair(&mut rng)).collect();
            let scale = f64::from(values[0]) / pairs[0].0;
            for (value, (a, b)) in values.chunks(2).zip(pairs) {
                for (value, z) in value.iter().zip([a, b]) {
                    // The scale was rounded to f32 with the first value.
                    assert!((f64::from(*value) - z * scale).abs() <= 2e-7 * (z * scale).abs(), "{}", entry.name);
                }
            }
        }
    }
}
