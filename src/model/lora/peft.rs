//! Adapters in the files that PEFT, vLLM and transformers know: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! It hides how modules are called there, and where an adapter's model, tokenizer and settings lie. What must stay true: what would compute
//! something else than [`crate::model::layout::Lora`] does is refused, never ignored; what is written loads in PEFT as it is.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{SafeTensors, TensorView};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Options, fresh, maps};
use crate::config::BadConfig;
use crate::model::checkpoint::{self, published_name};
use crate::model::layout::{Entry, LORA_A, LORA_B, Layout, Module, Trainable};
use crate::model::weights::{Outgoing, copy_companions, in_place, write_json};
use crate::model::{Config, Hold, Vlm};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the model's modules.
const PREFIX: &str = "base_model.model.";

/// Whether a folder holds an adapter.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// The folder that holds any of these files of a model: its own, or where an adapter's folder has none of them, that of its model.
///
/// # Errors
/// An adapter without them whose model is not here.
pub fn home(dir: &Path, files: &[&str]) -> Result<PathBuf> {
    if files.iter().any(|file| dir.join(file).is_file()) || !is_adapter(dir) {
        return Ok(dir.to_owned());
    }
    base(dir)
}

/// The folder of the model that an adapter was made for.
///
/// # Errors
/// A config that names none, or one that is not here.
pub fn base(dir: &Path) -> Result<PathBuf> {
    let path = dir.join(CONFIG);
    let name = read_config(&path)?.get("base_model_name_or_path").and_then(Value::as_str).map(PathBuf::from);
    let name = name.with_context(|| format!("`base_model_name_or_path` is missing: {}", path.display()))?;
    ensure!(
        name.is_dir(),
        "the adapter belongs to the model {}, and no such folder is here; fetch the model and write its folder into \
         `base_model_name_or_path`: {}",
        name.display(),
        path.display()
    );
    ensure!(
        !is_adapter(&name),
        "the adapter's model is itself an adapter, {}; merge that first: {}",
        name.display(),
        path.display()
    );
    Ok(name)
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading an adapter's config: {}", path.display()))?;
    let config = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    match config {
        Value::Object(config) => Ok(config),
        other => bail!("expected a JSON object, found {other}: {}", path.display()),
    }
}

/// Matrices by their places in a layout.
type Placed = Vec<(Range<usize>, Vec<f32>)>;

/// An adapter's folder, read.
struct Adapter {
    path: PathBuf,
    modules: Vec<Module>,
    /// By the name of the layout: shape and values.
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Adapter {
    /// For a model of this layout.
    ///
    /// # Errors
    /// What cannot be read, is another kind of adapter, or belongs to another model.
    fn read(dir: &Path, layout: &Layout) -> Result<Adapter> {
        let config_path = dir.join(CONFIG);
        let config = read_config(&config_path)?;
        let in_config = || config_path.display().to_string();
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        ensure!(
            text("peft_type") == Some("LORA"),
            "`peft_type` is {}, supported: \"LORA\": {}",
            config.get("peft_type").unwrap_or(&Value::Null),
            in_config()
        );
        for (key, value) in &config {
            ensure!(
                is_plain(key, value),
                "`{key}` is {value}, and nothing is known of it that leaves y + scale · b · a · x as it is; merge the adapter with PEFT and use the \
                 merged model: {}",
                in_config()
            );
        }
        let path = dir.join(WEIGHTS);
        ensure!(
            path.exists() || !dir.join("adapter_model.bin").exists(),
            "the adapter is a pickled .bin file, which is not read; save it with safetensors (PEFT's default): {}",
            dir.join("adapter_model.bin").display()
        );
        let bytes = fs::read(&path).with_context(|| format!("reading an adapter: {}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| anyhow::anyhow!("{e}"))
            .with_context(|| format!("reading the safetensors header (is the file complete?): {}", path.display()))?;
        let mut tensors = BTreeMap::new();
        let mut modules: Vec<Module> = Vec::new();
        for (stored, view) in file.iter() {
            let name = published_name(stored.strip_prefix(PREFIX).unwrap_or(stored)).into_owned();
            let module = [LORA_A, LORA_B].iter().find_map(|part| name.strip_suffix(&format!(".{part}.weight")));
            let (Some(module), [rows, _]) = (module, view.shape()) else {
                bail!(
                    "{stored} of shape {:?} is no matrix of a LoRA adapter (`modules_to_save` and adapters of embeddings are not supported; \
                     merge the adapter with PEFT and use the merged model): {}",
                    view.shape(),
                    path.display()
                );
            };
            if name.contains(LORA_A) {
                ensure!(*rows > 0, "{stored} has no rows: {}", path.display());
                let scale = scale_of(&config, module, *rows).with_context(in_config)?;
                modules.push(Module { name: module.to_owned(), rank: *rows, scale });
            }
            let mut values = vec![0.0; view.shape().iter().product()];
            let finite = checkpoint::fill(&mut values, view.dtype(), view.data())
                .with_context(|| format!("reading {stored}: {}", path.display()))?;
            ensure!(finite, "{stored} holds values that are not finite numbers: {}", path.display());
            tensors.insert(name, (view.shape().to_vec(), values));
        }
        ensure!(!modules.is_empty(), "the file holds no adapter: {}", path.display());
        // In the order of the model, whatever the file's is.
        let order: BTreeMap<&str, usize> = maps(layout).enumerate().map(|(i, (name, _))| (name, i)).collect();
        modules.sort_by_key(|module| order.get(module.name.as_str()).copied());
        let adapter = Adapter { path, modules, tensors };
        adapter.check(layout)?;
        Ok(adapter)
    }

    /// Every module is one of the model's and has both of its matrices, in the shapes that they need.
    fn check(&self, layout: &Layout) -> Result<()> {
        for Module { name, .. } in &self.modules {
            ensure!(
                maps(layout).any(|(known, _)| known == name),
                "the adapter has matrices for {name}, which is no map of this model that can have one; embeddings and the head cannot (merge such an \
                 adapter with PEFT), or was it made for another model? {}",
                self.path.display()
            );
        }
        for name in self.tensors.keys() {
            let other =
                name.strip_suffix(&format!(".{LORA_B}.weight")).map(|module| format!("{module}.{LORA_A}.weight"));
            ensure!(
                other.as_ref().is_none_or(|other| self.tensors.contains_key(other)),
                "{name} is there and {} is missing: {}",
                other.unwrap_or_default(),
                self.path.display()
            );
        }
        let adapted = layout.adapted(&self.modules);
        for entry in adapted.entries.iter().filter(|entry| entry.adapter) {
            let found = self.tensors.get(&entry.name).map(|(shape, _)| shape);
            ensure!(
                found == Some(&entry.shape),
                "{} has shape {}, expected {:?}; was the adapter made for another model? {}",
                entry.name,
                found.map_or("none (it is missing)".to_owned(), |shape| format!("{shape:?}")),
                entry.shape,
                self.path.display()
            );
        }
        Ok(())
    }

    /// The values of each matrix, by its place in the layout.
    fn placed(self, layout: &Layout) -> Placed {
        let mut tensors = self.tensors;
        let entries = layout.entries.iter().filter(|entry| entry.adapter);
        entries.filter_map(|entry| Some((entry.range.clone(), tensors.remove(&entry.name)?.1))).collect()
    }
}

/// Whether a key of PEFT's config leaves the computation as it is here: those that are read, those that speak of training alone, and whatever
/// is not set.
fn is_plain(key: &str, value: &Value) -> bool {
    let unset = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        _ => false,
    };
    match key {
        "r" | "lora_alpha" => value.is_number(),
        "rank_pattern" | "alpha_pattern" => value.is_object() || value.is_null(),
        "use_rslora" => value.is_boolean() || value.is_null(),
        "bias" => value.is_null() || value == "none",
        // Others take their first product off the model's weights.
        "init_lora_weights" => matches!(value, Value::Null | Value::Bool(_)) || value == "gaussian",
        "peft_type" | "task_type" | "base_model_name_or_path" | "auto_mapping" | "revision" | "peft_version" | "inference_mode"
        | "target_modules" | "exclude_modules" | "layers_to_transform" | "layers_pattern" | "lora_dropout"
        // Used where another key, which is refused, is set.
        | "megatron_core" | "qalora_group_size" => true,
        _ => unset,
    }
}

/// `lora_alpha / r`, or over the root of r with `use_rslora` (arXiv 2312.03732); `alpha_pattern` has alphas of single modules.
fn scale_of(config: &Map<String, Value>, module: &str, rank: usize) -> Result<f32> {
    let known = transformers_name(module);
    let mut own = None;
    for (key, alpha) in config.get("alpha_pattern").and_then(Value::as_object).into_iter().flatten() {
        ensure!(
            !key.contains(['\\', '*', '+', '?', '[', '(', '{', '|', '^', '$']),
            "`alpha_pattern` has the regular expression {key:?}, supported: ends of module names"
        );
        if [module, &known].iter().any(|name| *name == key || name.ends_with(&format!(".{key}"))) {
            own = own.or(Some(alpha));
        }
    }
    let alpha = own.or(config.get("lora_alpha")).and_then(Value::as_f64).context("`lora_alpha` is missing")?;
    let root = config.get("use_rslora").and_then(Value::as_bool) == Some(true);
    let over = if root { (rank as f64).sqrt() } else { rank as f64 };
    let scale = (alpha / over) as f32;
    ensure!(
        scale.is_finite() && scale > 0.0,
        "an alpha of {alpha:?} at rank {rank} scales the adapter by {scale}, expected a number above 0"
    );
    Ok(scale)
}

/// The maps of a model folder that training with these options gives an adapter: those that an adapter in the folder has, which is then gone
/// on with, or those that the options name.
///
/// # Errors
/// Patterns that name nothing, and an adapter that is not the one that the options describe.
pub fn modules(dir: &Path, options: &Options, layout: &Layout, train: Trainable) -> Result<Vec<Module>> {
    if !is_adapter(dir) {
        return options.modules(layout, train);
    }
    let Adapter { modules, .. } = Adapter::read(dir, layout)?;
    let wanted = options.modules(layout, train)?;
    // A scale that went through a division by a root need not come back to the last bit.
    let same =
        |a: &Module, b: &Module| a.name == b.name && a.rank == b.rank && (a.scale - b.scale).abs() <= 1e-5 * b.scale;
    let lacks = |all: &[Module], one: &Module| !all.iter().any(|other| same(one, other));
    let named = |one: &Module| format!("{} (rank {}, scale {})", one.name, one.rank, one.scale);
    let has = modules.iter().find(|one| lacks(&wanted, one)).map(|one| format!("has {}", named(one)));
    let has = has.or_else(|| wanted.iter().find(|one| lacks(&modules, one)).map(|one| format!("lacks {}", named(one))));
    if let Some(has) = has {
        bail!(BadConfig(format!(
            "the adapter that is gone on with is not the one of model.lora and model.freeze: it {has}; write its own rank, alpha (scale times \
             rank) and targets, or merge it first with `foveate model export`: {}",
            dir.display()
        )));
    }
    Ok(modules)
}

/// Opens a model for training adapters: those that its folder holds, or fresh ones. The adapters are in memory, the model's own weights where
/// `hold` says.
///
/// # Errors
/// As [`modules`], and what cannot be read.
pub fn open(dir: &Path, options: &Options, train: Trainable, seed: u64, hold: Hold) -> Result<Vlm> {
    if is_adapter(dir) {
        modules(dir, options, &Layout::new(&Config::load(dir)?), train)?;
        return read_beside(dir, hold);
    }
    let config = Config::load(dir)?;
    let layout = Layout::new(&config);
    let adapted = layout.adapted(&options.modules(&layout, train)?);
    let weights = checkpoint::open_beside(dir, &layout, &adapted, &fresh(&adapted, seed), hold)?;
    Ok(Vlm::new(config, weights))
}

/// A model with the adapter of a folder beside its weights, in memory.
///
/// # Errors
/// What cannot be read, or does not belong together.
pub fn read(dir: &Path) -> Result<Vlm> {
    read_beside(dir, Hold::Memory)
}

/// Read into its place: a copy would need twice the memory.
fn read_beside(dir: &Path, hold: Hold) -> Result<Vlm> {
    let base = base(dir)?;
    let config = Config::load(&base)?;
    let layout = Layout::new(&config);
    let adapter = Adapter::read(dir, &layout)?;
    let adapted = layout.adapted(&adapter.modules);
    let values: Vec<f32> = adapter.placed(&adapted).into_iter().flat_map(|(_, values)| values).collect();
    let weights = checkpoint::open_beside(&base, &layout, &adapted, &values, hold)?;
    Ok(Vlm::new(config, weights))
}

/// What an adapter's folder holds.
#[derive(Clone, Debug, Serialize)]
pub struct About {
    /// The folder of its model.
    pub base: PathBuf,
    pub maps: usize,
    pub parameters: usize,
    /// The smallest and the largest.
    pub ranks: [usize; 2],
}

/// # Errors
/// As [`read`].
pub fn about(dir: &Path, layout: &Layout) -> Result<About> {
    let Adapter { modules, tensors, .. } = Adapter::read(dir, layout)?;
    let ranks = || modules.iter().map(|module| module.rank);
    Ok(About {
        base: base(dir)?,
        maps: modules.len(),
        parameters: tensors.values().map(|(_, values)| values.len()).sum(),
        ranks: [ranks().min(), ranks().max()].map(Option::unwrap_or_default),
    })
}

impl std::fmt::Display for About {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let About { base, maps, parameters, ranks: [low, high] } = self;
        let ranks = if low == high { low.to_string() } else { format!("{low} to {high}") };
        write!(f, "{:.2} M on {maps} maps, rank {ranks}, of {}", *parameters as f64 / 1e6, base.display())
    }
}

/// Reads the adapter of a checkpoint into a model that has the same one.
///
/// # Errors
/// An adapter of other maps, widths or scales.
pub fn read_into(model: &mut Vlm, dir: &Path) -> Result<()> {
    let read = adapters(dir, &model.config, model.weights.layout())?;
    let data = &mut model.weights.arena_mut()?.data;
    read.into_iter().for_each(|(place, values)| data[place].copy_from_slice(&values));
    Ok(())
}

/// The matrices of a checkpoint's adapter by their places in a layout that has the same one.
///
/// # Errors
/// As [`read_into`].
pub fn adapters(dir: &Path, config: &Config, layout: &Layout) -> Result<Placed> {
    let adapter = Adapter::read(dir, &Layout::new(config))?;
    ensure!(
        adapter.modules == layout.modules(),
        "the checkpoint's adapter is not the one that model.lora describes; write its rank, alpha and targets into the config: {}",
        dir.display()
    );
    Ok(adapter.placed(layout))
}

/// Writes a model's adapter as PEFT does, with the config, tokenizer and picture settings of the model. `opened` is the folder that the
/// model was read from.
///
/// # Errors
/// What cannot be written.
pub fn save(model: &Vlm, dir: &Path, opened: &Path) -> Result<()> {
    let layout = model.weights.layout();
    let values = |entry: &Entry| model.weights.values().matrix(&entry.range).wide();
    save_outgoing(&Outgoing { config: &model.config, layout, values: &values }, dir, opened)
}

/// The same of a model that may be nowhere whole.
pub fn save_outgoing(model: &Outgoing, dir: &Path, opened: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating the adapter's folder {}", dir.display()))?;
    let layout = model.layout;
    let mut tensors: Vec<(String, &Entry, Vec<u8>)> = Vec::new();
    for entry in layout.entries.iter().filter(|entry| entry.adapter) {
        let bytes = (model.values)(entry).iter().flat_map(|w| w.to_le_bytes()).collect();
        tensors.push((format!("{PREFIX}{}", transformers_name(&entry.name)), entry, bytes));
    }
    in_place(&dir.join(WEIGHTS), |path| {
        let views = tensors
            .iter()
            .map(|(name, entry, bytes)| {
                Ok((name, TensorView::new(safetensors::Dtype::F32, entry.shape.clone(), bytes)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let about = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize_to_file(views, Some(about), path).map_err(|e| anyhow::anyhow!("{e}"))
    })?;
    let modules = layout.modules();
    let first = modules.first().context("the model has no adapter")?;
    let base = base_or(opened)?;
    let base = std::path::absolute(&base).with_context(|| format!("finding {}", base.display()))?;
    let alpha = |module: &Module| module.scale * module.rank as f32;
    let others = |differs: &dyn Fn(&Module) -> Option<Value>| -> Map<String, Value> {
        modules.iter().filter_map(|m| Some((transformers_name(&m.name), differs(m)?))).collect()
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": alpha(first),
        "rank_pattern": others(&|m| (m.rank != first.rank).then(|| m.rank.into())),
        "alpha_pattern": others(&|m| (alpha(m) != alpha(first)).then(|| alpha(m).into())),
        "target_modules": modules.iter().map(|m| transformers_name(&m.name)).collect::<Vec<_>>(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "modules_to_save": null,
        "inference_mode": true,
    });
    write_json(&dir.join(CONFIG), &config)?;
    write_json(&dir.join("config.json"), &model.config.to_json("float32"))?;
    copy_companions(&base_or(opened)?, dir)?;
    // What an adapter's folder has of its own comes last.
    copy_companions(opened, dir)
}

/// The model of an adapter's folder, and any other folder itself.
///
/// # Errors
/// An adapter whose model is not named, or not here.
pub fn base_or(dir: &Path) -> Result<PathBuf> {
    if is_adapter(dir) { base(dir) } else { Ok(dir.to_owned()) }
}

/// A module's name in transformers from version 4.52 on, which is what PEFT knows it by.
fn transformers_name(name: &str) -> String {
    match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => format!("model.{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Hold, presets};

    #[test]
    fn folders_go_out_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let (base, out) = (dir.path().join("base"), dir.path().join("adapter"));
        presets::one_layer().save(&base, crate::model::Dtype::F32, None).unwrap();
        let options = Options { rank: 3, alpha: 6.0, targets: vec!["*.q_proj".into(), "visual.blocks.*.qkv".into()] };
        let train = Trainable::ALL;
        let mut model = open(&base, &options, train, 5, Hold::Memory).unwrap();
        for entry in model.weights.layout().clone().entries.iter().filter(|e| e.adapter) {
            let data = &mut model.weights.arena_mut().unwrap().data[entry.range.clone()];
            data.iter_mut().enumerate().for_each(|(i, w)| *w += (i as f32).sin());
        }
        save(&model, &out, &base).unwrap();
        let data = |model: &Vlm| model.weights.arena().unwrap().data.clone();
        // Gone on with, and read into a fresh one.
        assert_eq!(data(&open(&out, &options, train, 9, Hold::Memory).unwrap()), data(&model));
        let mut fresh = open(&base, &options, train, 9, Hold::Memory).unwrap();
        assert_ne!(data(&fresh), data(&model));
        read_into(&mut fresh, &out).unwrap();
        assert_eq!(data(&fresh), data(&model));
        // Used without training, it is merged.
        assert_eq!(data(&Vlm::open(&out, Hold::Auto).unwrap()), data(&model.clone().merged().unwrap()));
        assert!(format!("{:#}", Vlm::open(&out, Hold::Mapped).unwrap_err()).contains("model export"));
        assert!(model.save(&dir.path().join("no"), crate::model::Dtype::F32, None).is_err());

        let refuses = |options: &Options| open(&out, options, train, 9, Hold::Memory).unwrap_err().to_string();
        assert!(refuses(&Options { rank: 4, ..options.clone() }).contains("rank 3"));
        assert!(
            refuses(&Options { targets: vec!["*.q_proj".into()], ..options.clone() }).contains("has visual.blocks.0")
        );
        assert!(refuses(&Options { targets: vec!["*".into()], ..options.clone() }).contains("lacks "));
        let frozen = Trainable { vision: false, ..train };
        assert!(open(&out, &options, frozen, 9, Hold::Memory).unwrap_err().to_string().contains("model.freeze"));
        let mut other =
            open(&base, &Options { targets: vec!["*.k_proj".into()], ..options.clone() }, train, 1, Hold::Memory)
                .unwrap();
        assert!(read_into(&mut other, &out).unwrap_err().to_string().contains("model.lora"));
        let config = out.join(CONFIG);
        let good = fs::read_to_string(&config).unwrap();
        for (from, to, said) in [
            ("\"LORA\"", "\"IA3\"", "IA3"),
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("\"bias\": \"none\"", "\"bias\": \"all\"", "all"),
            ("\"use_dora\": false", "\"use_dora\": \"true\"", "use_dora"),
            ("\"use_dora\": false", "\"init_lora_weights\": \"pissa\"", "pissa"),
            ("\"use_dora\": false", "\"alora_invocation_tokens\": [1]", "alora_invocation_tokens"),
            ("\"lora_alpha\": 6.0", "\"lora_alpha\": 1e300", "1e300"),
            ("\"lora_alpha\": 6.0", "\"lora_alpha\": \"6\"", "lora_alpha"),
            (&base.display().to_string(), "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
            ("\"alpha_pattern\": {}", "\"alpha_pattern\": {\".*q_proj\": 2}", "regular expression"),
        ] {
            assert!(good.contains(from), "{from}");
            fs::write(&config, good.replace(from, to)).unwrap();
            let error = format!("{:#}", Vlm::load(&out).unwrap_err());
            assert!(error.contains(said) && error.contains(CONFIG), "{error}");
        }
        fs::write(&config, &good).unwrap();
        fs::write(out.join(WEIGHTS), b"short").unwrap();
        assert!(format!("{:#}", Vlm::load(&out).unwrap_err()).contains("complete"));
    }
}
