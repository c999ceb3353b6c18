//! Parameters to and from safetensors files in Hugging Face layout.
//!
//! Reading takes one file or shards with an index, in f32, bf16 or f16, under the published names or those of newer and
//! older transformers versions. Everything wrong with a checkpoint is said at once, tensor by tensor: a model with one
//! tensor left random would train without a word. A tensor that holds NaN or infinity is refused, since such a model talks
//! nonsense without a word. Writing streams tensor by tensor, so no second copy of the model is held; each file is written
//! beside its place, synced and renamed into it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype as Stored, SafeTensors, View};
use serde_json::{Value, json};

use super::Vlm;
use super::layout::{Arena, Entry, Layout, Weights};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
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

/// The published name of a tensor that other versions of transformers call differently.
pub fn published_name(name: &str) -> Cow<'_, str> {
    for (from, to) in [
        ("model.visual.", "visual."),
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.lm_head.", "lm_head."),
    ] {
        if let Some(rest) = name.strip_prefix(from) {
            return Cow::Owned(format!("{to}{rest}"));
        }
    }
    Cow::Borrowed(name)
}

/// Tables that old checkpoints store and every reader computes again.
fn is_derived(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_pos_emb.inv_freq")
}

/// The weight files of a folder.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join(INDEX);
    ensure!(
        index.exists(),
        "no weights in the model folder: expected {SINGLE} or {INDEX} (pickled .bin files are not read; save the model as safetensors): {}",
        dir.display()
    );
    let text = fs::read_to_string(&index).with_context(|| format!("reading {}", index.display()))?;
    let root: Value = serde_json::from_str(&text).with_context(|| format!("parsing {}", index.display()))?;
    let map = root
        .get("weight_map")
        .and_then(Value::as_object)
        .with_context(|| format!("the index has no `weight_map`: {}", index.display()))?;
    let mut files = Vec::new();
    for value in map.values() {
        let name = value
            .as_str()
            .with_context(|| format!("`weight_map` holds {value}; expected a file name: {}", index.display()))?;
        ensure!(
            Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_))),
            "`weight_map` names {name:?}, which lies outside the folder: {}",
            index.display()
        );
        let path = dir.join(name);
        if !files.contains(&path) {
            files.push(path);
        }
    }
    Ok(files)
}

/// Reads the parameters of a layout from a model folder.
pub fn load_weights(dir: &Path, layout: &Arc<Layout>) -> Result<Weights> {
    let mut weights = Arena::zeros(layout);
    let by_name: HashMap<&str, &Entry> = layout.entries.iter().map(|e| (e.name.as_str(), e)).collect();
    let tied = !by_name.contains_key("lm_head.weight");
    let mut seen: HashMap<String, PathBuf> = HashMap::new();
    let mut faults = Vec::new();
    let mut head_copy: Option<(PathBuf, Vec<f32>)> = None;
    for path in weight_files(dir)? {
        let shown = path.display();
        let file = File::open(&path).with_context(|| format!("opening weights: {shown}"))?;
        // SAFETY: the map is only read, and only while `file` lives; a file changed by another process meanwhile would
        // give wrong numbers, as it would with ordinary reads.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("mapping weights: {shown}"))?;
        let tensors = SafeTensors::deserialize(&map)
            .map_err(|e| anyhow::anyhow!("{e}"))
            .with_context(|| format!("reading the safetensors header (is the file complete?): {shown}"))?;
        let mut loads = Vec::new();
        for (stored, view) in tensors.iter() {
            let name = published_name(stored).into_owned();
            if is_derived(&name) {
                continue;
            }
            if let Some(first) = seen.insert(name.clone(), path.clone()) {
                faults.push(format!("{stored} stands twice, in {} and {shown}; keep one", first.display()));
                continue;
            }
            if name == "lm_head.weight" && tied {
                head_copy = Some((path.clone(), decode(stored, view.dtype(), view.data())?));
                continue;
            }
            let Some(entry) = by_name.get(name.as_str()) else {
                faults.push(format!(
                    "{stored} in {shown} is not part of this model; config.json may belong to another model"
                ));
                continue;
            };
            if view.shape() != entry.shape {
                faults.push(format!(
                    "{stored} in {shown} has shape {:?}, expected {:?} by config.json",
                    view.shape(),
                    entry.shape
                ));
                continue;
            }
            loads.push((stored.to_string(), view, entry.range.clone()));
        }
        for (stored, view, range) in loads {
            let data = view.data();
            let finite = fill(&mut weights.data[range], view.dtype(), data)
                .with_context(|| format!("reading {stored}: {shown}"))?;
            ensure!(
                finite,
                "{stored} holds values that are not finite numbers (training that diverged, or a damaged file); \
                 use an earlier checkpoint or fetch the file again: {shown}"
            );
        }
    }
    for entry in &layout.entries {
        if !seen.contains_key(&entry.name) {
            faults.push(format!("{} of shape {:?} is missing", entry.name, entry.shape));
        }
    }
    if let Some((path, head)) = head_copy
        && head != weights.data[layout.text.head.clone()]
    {
        faults.push(format!(
            "lm_head.weight in {} differs from the embeddings although config.json says `tie_word_embeddings`: set it to false",
            path.display()
        ));
    }
    if faults.is_empty() {
        return Ok(weights);
    }
    const SHOWN: usize = 4;
    let more = match faults.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    faults.truncate(SHOWN);
    bail!(
        "the weights do not fit the config: {}{more}; use the config.json and weights of one checkpoint: {}",
        faults.join("; "),
        dir.display()
    )
}

fn decode(name: &str, dtype: Stored, bytes: &[u8]) -> Result<Vec<f32>> {
    let width = if dtype == Stored::F32 { 4 } else { 2 };
    let mut out = vec![0.0; bytes.len() / width];
    fill(&mut out, dtype, bytes).with_context(|| format!("reading {name}"))?;
    Ok(out)
}

/// Numbers of any supported type as f32; whether all of them are finite.
fn fill(out: &mut [f32], dtype: Stored, bytes: &[u8]) -> Result<bool> {
    Ok(match dtype {
        Stored::F32 => convert(out, bytes, f32::from_le_bytes),
        Stored::BF16 => convert(out, bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Stored::F16 => convert(out, bytes, |b| f16::from_le_bytes(b).to_f32()),
        other => bail!(
            "the tensor is stored as {other:?}; supported: F32, BF16, F16 (quantised checkpoints cannot be trained)"
        ),
    })
}

fn convert<const N: usize>(out: &mut [f32], bytes: &[u8], read: impl Fn([u8; N]) -> f32 + Sync) -> bool {
    const CHUNK: usize = 1 << 16;
    let chunks = out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(N * CHUNK));
    let finite = chunks.map(|(out, bytes)| {
        let mut finite = true;
        for (x, b) in out.iter_mut().zip(bytes.as_chunks().0) {
            *x = read(*b);
            finite &= x.is_finite();
        }
        finite
    });
    finite.reduce(|| true, |a, b| a & b)
}

/// A stretch of the arena on its way into a file.
struct Outgoing<'a> {
    shape: &'a [usize],
    values: &'a [f32],
    dtype: Dtype,
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> Stored {
        match self.dtype {
            Dtype::F32 => Stored::F32,
            Dtype::Bf16 => Stored::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        match self.dtype {
            Dtype::F32 => self.values.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes())),
            Dtype::Bf16 => self.values.iter().for_each(|x| bytes.extend_from_slice(&bf16::from_f32(*x).to_le_bytes())),
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.values.len() * self.dtype.size()
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

fn save_sharded(model: &Vlm, dir: &Path, dtype: Dtype, source: Option<&Path>, shard_bytes: u64) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating the model folder {}", dir.display()))?;
    let entries = &model.weights.layout.entries;
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
            let views = shard.iter().map(|e| {
                let values = &model.weights.data[e.range.clone()];
                (e.name.as_str(), Outgoing { shape: &e.shape, values, dtype })
            });
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

    fn tiny() -> Vlm {
        let mut config = presets::nano(50);
        (config.text.layers, config.vision.depth) = (1, 1);
        presets::initialise(config, 1)
    }

    #[test]
    fn f32_comes_back_bit_for_bit_and_bf16_rounded() {
        let (model, dir) = (tiny(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let back = Vlm::load(dir.path()).unwrap();
        assert_eq!(back.config, model.config);
        assert!(back.weights.data.iter().zip(&model.weights.data).all(|(a, b)| a.to_bits() == b.to_bits()));

        model.save(dir.path(), Dtype::Bf16, None).unwrap();
        let back = Vlm::load(dir.path()).unwrap();
        for (a, b) in back.weights.data.iter().zip(&model.weights.data) {
            assert_eq!(*a, bf16::from_f32(*b).to_f32());
        }
    }

    #[test]
    fn shards_are_read_and_replaced() {
        let (model, dir, source) = (tiny(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(source.path().join("tokenizer.json"), "{}").unwrap();
        save_sharded(&model, dir.path(), Dtype::F32, Some(source.path()), 400_000).unwrap();
        assert!(!dir.path().join(SINGLE).exists() && dir.path().join(INDEX).exists());
        assert_eq!(Vlm::load(dir.path()).unwrap().weights.data, model.weights.data);
        assert_eq!(fs::read_to_string(dir.path().join("tokenizer.json")).unwrap(), "{}");
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
    }

    fn saved_with(change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> String {
        let (model, dir) = (tiny(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let entries = &model.weights.layout.entries;
        let mut tensors = entries
            .iter()
            .map(|e| (e.name.clone(), e.shape.clone(), model.weights.data[e.range.clone()].to_vec()))
            .collect();
        change(&mut tensors);
        let views =
            tensors.iter().map(|(n, shape, values)| (n.as_str(), Outgoing { shape, values, dtype: Dtype::F32 }));
        safetensors::serialize_to_file(views, None, &dir.path().join(SINGLE)).unwrap();
        match Vlm::load(dir.path()) {
            Ok(back) => {
                assert_eq!(back.weights.data, model.weights.data);
                String::new()
            }
            Err(e) => format!("{e:#}"),
        }
    }

    #[test]
    fn names_of_other_versions() {
        let newer = saved_with(|tensors| {
            for (name, ..) in tensors.iter_mut() {
                *name = match name.strip_prefix("model.") {
                    Some(rest) => format!("model.language_model.{rest}"),
                    None => format!("model.{name}"),
                };
            }
        });
        assert_eq!(newer, "");
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let error = saved_with(|tensors| {
            tensors.retain(|(name, ..)| name != "model.norm.weight");
            tensors.push(("model.layers.7.extra".into(), vec![1], vec![0.0]));
            let (_, shape, _) = tensors.iter_mut().find(|t| t.0.ends_with("0.mlp.up_proj.weight")).unwrap();
            shape.reverse();
        });
        for part in [
            "model.norm.weight of shape [128] is missing",
            "layers.7.extra",
            "not part of this model",
            "[128, 384], expected [384, 128]",
        ] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY] {
            let error = saved_with(|tensors| tensors[0].2[3] = bad);
            let name = "model.embed_tokens.weight holds values that are not finite";
            assert!(error.contains(name) && error.ends_with(SINGLE), "{error}");
        }
    }

    #[test]
    fn an_untied_head_in_a_tied_model_is_refused() {
        let error = saved_with(|tensors| {
            let (_, shape, mut values) = tensors[0].clone();
            values[3] += 1.0;
            tensors.push(("lm_head.weight".into(), shape, values));
        });
        assert!(error.contains("differs from the embeddings"), "{error}");
    }

    #[test]
    fn a_cut_file_and_an_empty_folder() {
        let (model, dir) = (tiny(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let path = dir.path().join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(format!("{:#}", Vlm::load(dir.path()).unwrap_err()).contains("is the file complete"));
        fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", Vlm::load(dir.path()).unwrap_err()).contains("no weights"));
    }
}
