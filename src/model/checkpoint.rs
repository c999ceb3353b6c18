//! Parameters from safetensors files in Hugging Face layout.
//!
//! Takes one file or shards with an index, in f32, bf16 or f16, under the published names or those of newer and older
//! transformers versions. It fills memory or, of bf16, leaves the matrices in their files ([`Hold`]). Everything wrong with a checkpoint is
//! said at once, tensor by tensor: a model with one tensor left random would train without a word. A tensor that holds NaN or
//! infinity is refused, since such a model talks nonsense without a word.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use foveate_kernels::matrix::Matrix;
use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use rayon::prelude::*;
use safetensors::tensor::{Dtype as Stored, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::layout::{Arena, Layout};
use super::lora;
use super::values::{Mapped, Place, Weights, is_matrix};
use super::weights::{INDEX, SINGLE};
use crate::progress::Progress;

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
    let mut names: Vec<&str> = Vec::new();
    for value in map.values() {
        let name = value
            .as_str()
            .with_context(|| format!("`weight_map` holds {value}; expected a file name: {}", index.display()))?;
        ensure!(
            Path::new(name).components().all(|c| matches!(c, std::path::Component::Normal(_))),
            "`weight_map` names {name:?}, which lies outside the folder: {}",
            index.display()
        );
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let missing: Vec<&str> = names.iter().copied().filter(|name| !dir.join(name).exists()).collect();
    ensure!(
        missing.is_empty(),
        "{} of the {} weight files named in {INDEX} {} missing: {}; copy or fetch the checkpoint again: {}",
        missing.len(),
        names.len(),
        if missing.len() == 1 { "is" } else { "are" },
        missing.join(", "),
        dir.display()
    );
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Where the weights of a model are held while it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// In their files where they are bf16 and nothing is trained, else in memory
    #[default]
    Auto,
    /// In memory, as f32
    Memory,
    /// In their files, as bf16
    Mapped,
}

/// A tensor of the layout where it lies in a file.
struct Tensor {
    /// Its name in the file.
    stored: String,
    file: usize,
    dtype: Stored,
    bytes: Range<usize>,
}

/// The weight files of a checkpoint, mapped.
struct Checkpoint {
    dir: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    /// One for each entry of the layout, in its order.
    tensors: Vec<Tensor>,
    /// A head that is stored although it is tied to the embeddings.
    head_copy: Option<Tensor>,
}

impl Checkpoint {
    /// Reads the headers of the files and finds every tensor of a layout.
    ///
    /// # Errors
    /// Whatever is missing, has another shape or does not belong to the model, all at once.
    fn open(dir: &Path, layout: &Layout) -> Result<Checkpoint> {
        let by_name: HashMap<&str, usize> =
            layout.entries.iter().enumerate().map(|(i, e)| (e.name.as_str(), i)).collect();
        let tied = !by_name.contains_key("lm_head.weight");
        let mut files: Vec<(PathBuf, Mmap)> = Vec::new();
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut found: Vec<Option<Tensor>> = layout.entries.iter().map(|_| None).collect();
        let mut head_copy = None;
        let mut faults = Vec::new();
        for (k, path) in weight_files(dir)?.into_iter().enumerate() {
            let shown = path.display();
            let file = File::open(&path).with_context(|| format!("opening weights: {shown}"))?;
            // SAFETY: the map is only read. A file that another process changes meanwhile would give wrong numbers, as it would with
            // ordinary reads; checkpoints are replaced by renaming, which leaves a mapped file as it was.
            let map = unsafe { Mmap::map(&file) }.with_context(|| format!("mapping weights: {shown}"))?;
            let tensors = SafeTensors::deserialize(&map)
                .map_err(|e| anyhow::anyhow!("{e}"))
                .with_context(|| format!("reading the safetensors header (is the file complete?): {shown}"))?;
            for (stored, view) in tensors.iter() {
                let name = published_name(stored).into_owned();
                if is_derived(&name) {
                    continue;
                }
                let start = view.data().as_ptr().addr() - map.as_ptr().addr();
                let bytes = start..start + view.data().len();
                let tensor = Tensor { stored: stored.to_owned(), file: k, dtype: view.dtype(), bytes };
                if let Some(first) = seen.insert(name.clone(), k) {
                    let first = if first == k { shown.to_string() } else { files[first].0.display().to_string() };
                    faults.push(format!("{stored} stands twice, in {first} and {shown}; keep one"));
                } else if name == "lm_head.weight" && tied {
                    head_copy = Some(tensor);
                } else if let Some(&i) = by_name.get(name.as_str()) {
                    let expected = &layout.entries[i].shape;
                    if view.shape() != expected {
                        faults.push(format!(
                            "{stored} in {shown} has shape {:?}, expected {expected:?} by config.json",
                            view.shape()
                        ));
                    }
                    found[i] = Some(tensor);
                } else {
                    faults.push(format!(
                        "{stored} in {shown} is not part of this model; config.json may belong to another model"
                    ));
                }
            }
            drop(tensors);
            files.push((path, map));
        }
        for (entry, _) in layout.entries.iter().zip(&found).filter(|(_, tensor)| tensor.is_none()) {
            faults.push(format!("{} of shape {:?} is missing", entry.name, entry.shape));
        }
        if !faults.is_empty() {
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
        let tensors = found.into_iter().flatten().collect();
        Ok(Checkpoint { dir: dir.to_owned(), files, tensors, head_copy })
    }

    fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.files[tensor.file].1[tensor.bytes.clone()]
    }

    /// The first matrix that cannot stay in its file, because it is not bf16.
    fn not_mappable(&self, layout: &Layout) -> Option<&Tensor> {
        let mut tensors = layout.entries.iter().zip(&self.tensors);
        tensors.find(|(entry, tensor)| is_matrix(entry) && tensor.dtype != Stored::BF16).map(|(_, tensor)| tensor)
    }

    /// Widens a tensor.
    fn read(&self, tensor: &Tensor, out: &mut [f32]) -> Result<()> {
        let shown = self.files[tensor.file].0.display();
        let finite = fill(out, tensor.dtype, self.bytes(tensor))
            .with_context(|| format!("reading {}: {shown}", tensor.stored))?;
        ensure!(finite, "{}", self.not_finite(tensor));
        Ok(())
    }

    /// Pages that were read are not needed again; kept, they would count as memory of the process beside what was read from them.
    fn let_go(&self, tensor: &Tensor) {
        #[cfg(unix)]
        {
            let Range { start, end } = tensor.bytes.clone();
            // SAFETY: the map is read-only and of a file, so pages that are dropped come back from it as they were.
            let dropped = unsafe {
                self.files[tensor.file].1.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
            };
            // A system that keeps them has lost nothing.
            let _ = dropped;
        }
    }

    fn not_finite(&self, tensor: &Tensor) -> String {
        format!(
            "{} holds values that are not finite numbers (training that diverged, or a damaged file); \
             use an earlier checkpoint or fetch the file again: {}",
            tensor.stored,
            self.files[tensor.file].0.display()
        )
    }

    /// Refuses a head that is stored, and is another than the embeddings that it is tied to.
    fn check_head(&self, head: Matrix) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        let Some(copy) = &self.head_copy else { return Ok(()) };
        let bytes = self.bytes(copy);
        let width = if copy.dtype == Stored::F32 { 4 } else { 2 };
        let mut same = bytes.len() == head.len() * width;
        let (mut ours, mut theirs) = (vec![0.0; CHUNK], vec![0.0; CHUNK]);
        for (i, bytes) in bytes.chunks(CHUNK * width).enumerate() {
            if !same {
                break;
            }
            let n = bytes.len() / width;
            fill(&mut theirs[..n], copy.dtype, bytes).with_context(|| format!("reading {}", copy.stored))?;
            head.widen_into(&mut ours[..n], i * CHUNK);
            same = ours[..n] == theirs[..n];
        }
        ensure!(
            same,
            "lm_head.weight in {} differs from the embeddings although config.json says `tie_word_embeddings`: set it to false: {}",
            self.files[copy.file].0.display(),
            self.dir.display()
        );
        Ok(())
    }

    fn into_memory(mut self, layout: &Arc<Layout>) -> Result<Arena> {
        let mut arena = Arena::zeros(layout);
        let progress = Progress::start("reading the weights", "tensor", 0, self.tensors.len() as u64);
        for (entry, tensor) in layout.entries.iter().zip(&self.tensors) {
            self.read(tensor, &mut arena.data[entry.range.clone()])?;
            self.let_go(tensor);
            progress.step("");
        }
        self.check_head(arena.data[layout.text.head.clone()].into())?;
        self.files.clear();
        Ok(arena)
    }

    /// Leaves the matrices where they are, once each of their numbers has been seen to be finite.
    fn into_mapped(self, layout: &Arc<Layout>) -> Result<Mapped> {
        let (mut places, mut small) = (Vec::with_capacity(self.tensors.len()), Vec::new());
        let progress = Progress::start("reading the weights", "tensor", 0, self.tensors.len() as u64);
        for (entry, tensor) in layout.entries.iter().zip(&self.tensors) {
            if is_matrix(entry) {
                let matrix = Matrix::from(self.bytes(tensor).as_chunks::<2>().0);
                ensure!(matrix.is_finite(), "{}", self.not_finite(tensor));
                places.push(Place::File { file: tensor.file, bytes: tensor.bytes.clone() });
            } else {
                let start = small.len();
                small.resize(start + entry.range.len(), 0.0);
                self.read(tensor, &mut small[start..])?;
                places.push(Place::Memory(start..small.len()));
            }
            progress.step("");
        }
        let head = layout.entries.iter().position(|entry| entry.range == layout.text.head);
        if let Some(head) = head {
            self.check_head(self.bytes(&self.tensors[head]).as_chunks::<2>().0.into())?;
        }
        Ok(Mapped::new(layout, self.files.into_iter().map(|(_, map)| map).collect(), places, small))
    }
}

/// Opens the parameters of a layout in a model folder.
pub fn open_weights(dir: &Path, layout: &Arc<Layout>, hold: Hold) -> Result<Weights> {
    open_beside(dir, layout, layout, &[], hold)
}

/// The same where `adapted` has more tensors behind those of the layout, whose values are `others`.
pub(super) fn open_beside(
    dir: &Path,
    layout: &Arc<Layout>,
    adapted: &Arc<Layout>,
    others: &[f32],
    hold: Hold,
) -> Result<Weights> {
    let checkpoint = Checkpoint::open(dir, layout)?;
    let other = checkpoint.not_mappable(layout);
    match (hold, other) {
        (Hold::Auto | Hold::Mapped, None) => {
            Ok(Weights::Mapped(Arc::new(checkpoint.into_mapped(layout)?.beside(adapted, others))))
        }
        (Hold::Auto | Hold::Memory, _) => {
            let mut arena = checkpoint.into_memory(adapted)?;
            arena.data[layout.len..].copy_from_slice(others);
            Ok(Weights::Memory(arena))
        }
        (Hold::Mapped, Some(tensor)) => bail!(
            "{} is stored as {:?}, and only bf16 can be read where it lies; leave out \"mapped\", or write a bf16 copy with \
             `foveate model export {} --out NEW --dtype bf16`: {}",
            tensor.stored,
            tensor.dtype,
            dir.display(),
            checkpoint.files[tensor.file].0.display()
        ),
    }
}

/// Whether [`open_weights`] would leave the weights in their files where nothing is trained; only headers are read.
pub fn would_map(dir: &Path, layout: &Layout, hold: Hold) -> Result<bool> {
    Ok(match hold {
        Hold::Memory => false,
        Hold::Mapped => true,
        // It is merged in memory.
        Hold::Auto if lora::is_adapter(dir) => false,
        Hold::Auto => Checkpoint::open(dir, layout)?.not_mappable(layout).is_none(),
    })
}

/// Reads the parameters of a layout from a model folder into memory.
pub fn load_weights(dir: &Path, layout: &Arc<Layout>) -> Result<Arena> {
    Checkpoint::open(dir, layout)?.into_memory(layout)
}

/// Numbers of any supported type as f32; whether all of them are finite.
pub(super) fn fill(out: &mut [f32], dtype: Stored, bytes: &[u8]) -> Result<bool> {
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

#[cfg(test)]
mod tests {
    use super::super::weights::{Dtype, save_sharded};
    use super::super::{Vlm, presets};
    use super::*;
    use foveate_kernels::matrix::Numbers;
    use safetensors::tensor::TensorView;

    fn saved_with(change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> String {
        let (model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let entries = &model.weights.layout().entries;
        let mut tensors = entries
            .iter()
            .map(|e| (e.name.clone(), e.shape.clone(), model.weights.arena().unwrap().data[e.range.clone()].to_vec()))
            .collect();
        change(&mut tensors);
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(.., values)| values.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (name.as_str(), TensorView::new(Stored::F32, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize_to_file(views, None, &dir.path().join(SINGLE)).unwrap();
        match Vlm::load(dir.path()) {
            Ok(back) => {
                assert_eq!(back.weights.arena().unwrap().data, model.weights.arena().unwrap().data);
                String::new()
            }
            Err(e) => format!("{e:#}"),
        }
    }

    #[test]
    fn bf16_is_mapped_whole_or_in_shards() {
        let (model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        for shard in [u64::MAX, 200_000] {
            save_sharded(&model, dir.path(), Dtype::Bf16, None, shard).unwrap();
            let (read, mapped) = (Vlm::load(dir.path()).unwrap(), Vlm::open(dir.path(), Hold::Auto).unwrap());
            assert!(matches!(mapped.weights, Weights::Mapped(_)));
            let (layout, arena) = (read.weights.layout(), read.weights.arena().unwrap());
            for entry in &layout.entries {
                let there = mapped.weights.values().matrix(&entry.range);
                assert_eq!(matches!(there.numbers, Numbers::Bf16(_)), entry.shape.len() == 2, "{}", entry.name);
                let mut values = vec![0.0; entry.range.len()];
                there.widen_into(&mut values, 0);
                assert_eq!(values, arena.data[entry.range.clone()], "{}", entry.name);
            }
            // Parts of a fused map.
            let v = &layout.vision.blocks[0].v;
            let mut values = vec![0.0; v.w.len()];
            mapped.weights.values().matrix(&v.w).widen_into(&mut values, 0);
            assert_eq!(values, arena.data[v.w.clone()]);
            assert_eq!(mapped.weights.values().vector(v.b.as_ref().unwrap()), &arena.data[v.b.clone().unwrap()]);
            assert!(mapped.weights.arena().unwrap_err().to_string().contains("model.weights"));
            // Mapped weights are written as they are.
            let copy = tempfile::tempdir().unwrap();
            mapped.save(copy.path(), Dtype::F32, None).unwrap();
            assert_eq!(Vlm::load(copy.path()).unwrap().weights.arena().unwrap().data, arena.data);
        }
        model.save(dir.path(), Dtype::F32, None).unwrap();
        assert!(matches!(Vlm::open(dir.path(), Hold::Auto).unwrap().weights, Weights::Memory(_)));
        let error = format!("{:#}", Vlm::open(dir.path(), Hold::Mapped).unwrap_err());
        assert!(error.contains("stored as F32") && error.contains("model export"), "{error}");
    }

    #[test]
    fn a_mapped_number_that_is_not_finite_is_refused() {
        let (mut model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        let up = model.weights.layout().text.layers[0].up.w.start;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            model.weights.arena_mut().unwrap().data[up + 5] = bad;
            model.save(dir.path(), Dtype::Bf16, None).unwrap();
            let error = format!("{:#}", Vlm::open(dir.path(), Hold::Mapped).unwrap_err());
            assert!(error.contains("0.mlp.up_proj.weight holds values that are not finite"), "{error}");
        }
    }

    #[test]
    fn missing_shards_are_named_together() {
        let (model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        save_sharded(&model, dir.path(), Dtype::Bf16, None, 200_000).unwrap();
        let shards = weight_files(dir.path()).unwrap();
        for gone in &shards[1..3] {
            fs::remove_file(gone).unwrap();
        }
        let error = format!("{:#}", Vlm::load(dir.path()).unwrap_err());
        for gone in &shards[1..3] {
            assert!(error.contains(&*gone.file_name().unwrap().to_string_lossy()), "{error}");
        }
        assert!(error.contains(&format!("2 of the {} weight files", shards.len())), "{error}");
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
        let (model, dir) = (presets::one_layer(), tempfile::tempdir().unwrap());
        model.save(dir.path(), Dtype::F32, None).unwrap();
        let path = dir.path().join(SINGLE);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(format!("{:#}", Vlm::load(dir.path()).unwrap_err()).contains("is the file complete"));
        fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", Vlm::load(dir.path()).unwrap_err()).contains("no weights"));
    }
}
