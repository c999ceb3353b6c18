//! Parameters to safetensors files in Hugging Face layout; `checkpoint` reads them.
//!
//! Writing streams tensor by tensor, so no second copy of the model is held, and a model that is nowhere whole can be written too
//! ([`Outgoing`]); each file is written beside its place, synced and renamed into it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use half::bf16;
use safetensors::tensor::{Dtype as Stored, View};
use serde_json::{Value, json};

use super::layout::{Entry, Layout};
use super::{Config, Vlm};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Shards are cut before they pass this many bytes.
const SHARD_BYTES: u64 = 4_000_000_000;

/// Files beside the weights that make a folder complete; copied as they are.
const COMPANIONS: [&str; 14] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
];

/// How parameters are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    /// Half the size; each value rounded to 8 bits of mantissa.
    Bf16,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
        }
    }

    fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

/// What is written into a checkpoint: a configuration and the values of each tensor, asked for one after the other.
pub struct Outgoing<'a> {
    pub config: &'a Config,
    pub layout: &'a Layout,
    pub values: &'a dyn Fn(&Entry) -> Cow<'a, [f32]>,
}

/// A tensor on its way into a file.
struct Writing<'a> {
    entry: &'a Entry,
    of: &'a Outgoing<'a>,
    dtype: Dtype,
}

impl View for Writing<'_> {
    fn dtype(&self) -> Stored {
        match self.dtype {
            Dtype::F32 => Stored::F32,
            Dtype::Bf16 => Stored::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = (self.of.values)(self.entry);
        let mut bytes = Vec::with_capacity(self.data_len());
        match self.dtype {
            Dtype::F32 => values.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes())),
            Dtype::Bf16 => values.iter().for_each(|x| bytes.extend_from_slice(&bf16::from_f32(*x).to_le_bytes())),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.entry.range.len() * self.dtype.size()
    }
}

/// Writes a file beside its place, syncs it and renames it into place.
pub(super) fn in_place(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let beside = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let done: Result<()> = (|| {
        write(&beside)?;
        File::open(&beside)?.sync_all()?;
        fs::rename(&beside, path)?;
        Ok(())
    })();
    if done.is_err() {
        let _ = fs::remove_file(&beside); // the first error is the one to report
    }
    done.with_context(|| format!("writing {}", path.display()))
}

/// Writes `config.json`, the weights and the companion files of `source`.
pub fn save_model(model: &Vlm, dir: &Path, dtype: Dtype, source: Option<&Path>) -> Result<()> {
    save_sharded(model, dir, dtype, source, SHARD_BYTES)
}

/// The same of what may be nowhere whole.
pub fn save_outgoing<'a>(model: &'a Outgoing<'a>, dir: &Path, dtype: Dtype, source: Option<&Path>) -> Result<()> {
    write_shards(model, dir, dtype, source, SHARD_BYTES)
}

/// [`save_model`] in files of at most so many bytes, as far as single tensors allow.
pub fn save_sharded(model: &Vlm, dir: &Path, dtype: Dtype, source: Option<&Path>, shard_bytes: u64) -> Result<()> {
    let values = |entry: &Entry| model.weights.values().matrix(&entry.range).wide();
    let outgoing = Outgoing { config: &model.config, layout: model.weights.layout(), values: &values };
    write_shards(&outgoing, dir, dtype, source, shard_bytes)
}

fn write_shards<'a>(
    model: &'a Outgoing<'a>,
    dir: &Path,
    dtype: Dtype,
    source: Option<&Path>,
    shard_bytes: u64,
) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating the model folder {}", dir.display()))?;
    let entries = &model.layout.entries;
    let mut shards: Vec<Vec<&Entry>> = vec![Vec::new()];
    let mut filled = 0;
    for entry in entries {
        let bytes = (entry.range.len() * dtype.size()) as u64;
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(entry);
        }
    }
    let count = shards.len();
    let mut map = BTreeMap::new();
    let mut written = Vec::new();
    for (i, shard) in shards.iter().enumerate() {
        let name =
            if count == 1 { SINGLE.to_string() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
        in_place(&dir.join(&name), |path| {
            let views = shard.iter().map(|entry| (entry.name.as_str(), Writing { entry, of: model, dtype }));
            let about = HashMap::from([("format".to_string(), "pt".to_string())]);
            safetensors::serialize_to_file(views, Some(about), path).map_err(|e| anyhow::anyhow!("{e}"))
        })?;
        map.extend(shard.iter().map(|e| (e.name.clone(), name.clone())));
        written.push(name);
    }
    if count > 1 {
        let total: usize = entries.iter().map(|e| e.range.len() * dtype.size()).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        write_json(&dir.join(INDEX), &index)?;
        written.push(INDEX.to_string());
    }
    write_json(&dir.join("config.json"), &model.config.to_json(dtype.name()))?;
    if let Some(source) = source {
        copy_companions(source, dir)?;
    }
    remove_other_weights(dir, &written)
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    in_place(path, |beside| Ok(fs::write(beside, serde_json::to_string_pretty(value)? + "\n")?))
}

/// Copies tokenizer, template and processor files unchanged.
pub fn copy_companions(source: &Path, dir: &Path) -> Result<()> {
    for name in COMPANIONS {
        let (from, to) = (source.join(name), dir.join(name));
        let same = fs::canonicalize(&from).ok().zip(fs::canonicalize(&to).ok()).is_some_and(|(a, b)| a == b);
        if from.exists() && !same {
            in_place(&to, |beside| Ok(fs::copy(&from, beside).map(|_| ())?))?;
        }
    }
    Ok(())
}

/// Removes weight files of an earlier save with another number of shards, which readers would prefer or mix in.
fn remove_other_weights(dir: &Path, written: &[String]) -> Result<()> {
    for file in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        let file = file.with_context(|| format!("listing {}", dir.display()))?;
        let name = file.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with("model-") && name.ends_with(".safetensors");
        if (shard || name == SINGLE || name == INDEX) && !written.contains(&name) {
            fs::remove_file(file.path()).with_context(|| format!("removing old weights {}", file.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::presets;
    use super::*;

    #[test]
    fn f32_comes_back_bit_for_bit_and_bf16_rounded() {
        let (model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let back = Vlm::load(dir.path()).unwrap();
        assert_eq!(back.config, model.config);
        assert!(
            back.weights
                .arena()
                .unwrap()
                .data
                .iter()
                .zip(&model.weights.arena().unwrap().data)
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );

        model.save(dir.path(), Dtype::Bf16, None).unwrap();
        let back = Vlm::load(dir.path()).unwrap();
        for (a, b) in back.weights.arena().unwrap().data.iter().zip(&model.weights.arena().unwrap().data) {
            assert_eq!(*a, bf16::from_f32(*b).to_f32());
        }
    }

    #[test]
    fn shards_are_read_and_replaced() {
        let (model, dir, source) = (presets::one_layer(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(source.path().join("tokenizer.json"), "{}").unwrap();
        save_sharded(&model, dir.path(), Dtype::F32, Some(source.path()), 400_000).unwrap();
        assert!(!dir.path().join(SINGLE).exists() && dir.path().join(INDEX).exists());
        assert_eq!(Vlm::load(dir.path()).unwrap().weights.arena().unwrap().data, model.weights.arena().unwrap().data);
        assert_eq!(fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), "{}");
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
    }
}
