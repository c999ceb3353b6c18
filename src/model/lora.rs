//! LoRA: narrow matrices beside the maps of a frozen model (arXiv 2106.09685), in PEFT's files.
//!
//! An adapter's matrices lie in the model's arena behind its own tensors ([`Layout::adapted`]), so gradients, optimiser and first weights
//! treat them as they treat any others; `block` computes with them. This file says which maps get one, draws the first ones, merges them
//! into the weights, and reads and writes the folder that PEFT, vLLM and transformers know: `adapter_config.json` and
//! `adapter_model.safetensors`. What must stay true: a fresh adapter changes nothing (its `b` is 0), and a merged model computes what the
//! adapted one does, up to rounding.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use foveate_kernels::linear;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::checkpoint::{self, Hold, published_name};
use super::layout::{Arena, Entry, Group, LORA_A, LORA_B, Layout, Module, Trainable};
use super::weights::{copy_companions, in_place, write_json};
use super::{Config, Vlm};
use crate::config::BadConfig;

/// `[model.lora]`: train adapters instead of the model's own weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// R: the width of an adapter.
    pub rank: usize,
    /// What an adapter adds is multiplied by `alpha / rank`.
    pub alpha: f32,
    /// The maps that get one: module names as checkpoints have them, `*` for any text. What `freeze` names gets none.
    pub targets: Vec<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options { rank: 16, alpha: 32.0, targets: vec!["model.layers.*".into()] }
    }
}

impl Options {
    /// # Errors
    /// Values that no adapter can have, named.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.rank > 0, BadConfig("model.lora.rank is 0, expected at least 1".into()));
        ensure!(
            self.alpha.is_finite() && self.alpha > 0.0,
            BadConfig(format!("model.lora.alpha = {}: expected a number above 0", self.alpha))
        );
        ensure!(!self.targets.is_empty(), BadConfig("model.lora.targets is empty: no map would get an adapter".into()));
        Ok(())
    }

    /// The maps that get an adapter, in the order of the model.
    ///
    /// # Errors
    /// A pattern that no map is called by, and patterns that name frozen parts only.
    pub fn modules(&self, layout: &Layout, train: Trainable) -> Result<Vec<Module>> {
        self.validate()?;
        for pattern in &self.targets {
            ensure!(
                maps(layout).any(|(name, _)| matches(pattern, name)),
                BadConfig(format!(
                    "model.lora.targets: no map of the model is called {pattern:?}; names are such as \
                     model.layers.0.self_attn.q_proj, model.layers.0.mlp.down_proj, visual.blocks.0.attn.qkv and visual.merger.mlp.0, \
                     and * stands for any text"
                ))
            );
        }
        let scale = self.alpha / self.rank as f32;
        let modules: Vec<Module> = maps(layout)
            .filter(|(name, entry)| train.has(entry.group) && self.targets.iter().any(|pattern| matches(pattern, name)))
            .map(|(name, _)| Module { name: name.to_owned(), rank: self.rank, scale })
            .collect();
        ensure!(
            !modules.is_empty(),
            BadConfig(format!(
                "model.lora.targets = {:?} names maps of frozen parts only (model.freeze), so nothing would be trained",
                self.targets
            ))
        );
        Ok(modules)
    }
}

/// The maps that can have an adapter, by name.
fn maps(layout: &Layout) -> impl Iterator<Item = (&str, &Entry)> {
    let linear = |entry: &&Entry| entry.shape.len() == 2 && entry.group != Group::Embeddings && !entry.adapter;
    layout.entries.iter().filter(linear).filter_map(|entry| Some((entry.name.strip_suffix(".weight")?, entry)))
}

/// Whether a name is the pattern, where `*` is any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            // The shortest text first; what is left has to be the rest.
            (0..=name.len()).filter(|&i| name.is_char_boundary(i)).any(|i| matches(rest, &name[i..]))
        }),
    }
}

impl Trainable {
    /// The parts of a layout that have adapters; nothing but these is trained.
    pub fn of_adapters(layout: &Layout) -> Trainable {
        let has = |group: Group| layout.entries.iter().any(|entry| entry.adapter && entry.group == group);
        Trainable {
            vision: has(Group::Vision),
            merger: has(Group::Merger),
            embeddings: false,
            text: has(Group::Text),
            adapters: true,
        }
    }
}

impl Vlm {
    /// Puts adapters beside some maps; all their values are 0.
    fn attach(&mut self, modules: &[Module]) -> Result<()> {
        let arena = self.weights.arena_mut()?;
        ensure!(!arena.layout.has_adapters(), "the model has adapters already");
        arena.layout = arena.layout.adapted(modules);
        arena.data.resize(arena.layout.len, 0.0);
        Ok(())
    }

    /// Puts fresh adapters beside some maps: `a` uniform within `1/√inputs` and `b` 0, as PEFT draws them.
    ///
    /// # Errors
    /// Weights that are mapped, and a model that has adapters.
    pub fn adapt(&mut self, modules: &[Module], seed: u64) -> Result<()> {
        self.attach(modules)?;
        let Arena { layout, data } = self.weights.arena_mut()?;
        for (i, entry) in layout.entries.iter().enumerate().filter(|(_, entry)| entry.adapter) {
            if entry.name.contains(LORA_B) {
                continue;
            }
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(i as u64);
            let bound = 1.0 / (entry.shape[1] as f32).sqrt();
            data[entry.range.clone()].iter_mut().for_each(|w| *w = random.random_range(-bound..bound));
        }
        Ok(())
    }

    /// The model with its adapters added to its weights: `w += scale · b · a`.
    ///
    /// # Errors
    /// Weights that are mapped.
    pub fn merged(mut self) -> Result<Vlm> {
        let modules = self.modules();
        let Arena { layout, data } = self.weights.arena_mut()?;
        for Module { name, rank, scale } in modules {
            let place = |part: &str| layout.find(&format!("{name}{part}.weight")).map(|entry| entry.range.clone());
            let (Some(w), Some(a), Some(b)) = (place(""), place(&format!(".{LORA_A}")), place(&format!(".{LORA_B}")))
            else {
                bail!("the adapter of {name} is not complete");
            };
            let (outputs, inputs) = (b.len() / rank, a.len() / rank);
            let (own, adapters) = data.split_at_mut(a.start.min(b.start));
            let from = a.start.min(b.start);
            let [a, b] = [a, b].map(|place| &adapters[place.start - from..place.end - from]);
            // As a gradient of R tokens: w [N, M] += (scale · bᵀ [R, N])ᵀ · a [R, M].
            let mut turned = vec![0.0; b.len()];
            for (n, row) in b.chunks_exact(rank).enumerate() {
                row.iter().enumerate().for_each(|(r, b)| turned[r * outputs + n] = scale * b);
            }
            linear::backward_weight(&mut own[w], None, &turned, a, rank, inputs, outputs);
        }
        let layout = Layout::new(&self.config);
        data.truncate(layout.len);
        let weights = Arena { layout, data: std::mem::take(data) };
        Ok(Vlm { weights: weights.into(), config: self.config })
    }

    /// The maps that have an adapter.
    pub fn modules(&self) -> Vec<Module> {
        let layout = self.weights.layout();
        let named = |entry: &Entry| Some(entry.name.strip_suffix(&format!(".{LORA_A}.weight"))?.to_owned());
        let of = |entry: &Entry| {
            let name = named(entry)?;
            Some(Module { rank: entry.shape[0], scale: layout.lora(&name)?.scale, name })
        };
        layout.entries.iter().filter(|entry| entry.adapter).filter_map(of).collect()
    }
}

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the model's modules.
const PREFIX: &str = "base_model.model.";

/// Whether a folder holds an adapter.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// The folder of a model's config, tokenizer and picture settings: its own, or where an adapter's folder has none, that of its model.
///
/// # Errors
/// An adapter without any whose model is not here.
pub fn home(dir: &Path) -> Result<PathBuf> {
    if dir.join("config.json").is_file() || !is_adapter(dir) {
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
        // What would compute something else than y += scale · b · a · x.
        for key in ["use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"] {
            ensure!(
                config.get(key).and_then(Value::as_bool) != Some(true),
                "`{key}` is true, which is not supported; merge the adapter with PEFT and use the merged model: {}",
                in_config()
            );
        }
        ensure!(
            matches!(text("bias"), None | Some("none")),
            "`bias` is {:?}, supported: \"none\"; merge the adapter with PEFT and use the merged model: {}",
            text("bias").unwrap_or_default(),
            in_config()
        );
        let path = dir.join(WEIGHTS);
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
                "the adapter has matrices for {name}, and the model has no such map; was the adapter made for another model? {}",
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
        ensure!(
            self.tensors.len() == 2 * self.modules.len(),
            "the adapter holds {} matrices for {} maps, expected two each: {}",
            self.tensors.len(),
            self.modules.len(),
            self.path.display()
        );
        Ok(())
    }

    fn fill(&self, arena: &mut Arena) {
        for entry in arena.layout.entries.iter().filter(|entry| entry.adapter) {
            if let Some((_, values)) = self.tensors.get(&entry.name) {
                arena.data[entry.range.clone()].copy_from_slice(values);
            }
        }
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
    Ok((alpha / over) as f32)
}

/// The maps of a model folder that training with these options gives an adapter: those that an adapter in the folder has, which is then gone
/// on with, or those that the options name.
///
/// # Errors
/// Patterns that name nothing, and an adapter of another rank or scale than asked for.
pub fn modules(dir: &Path, options: &Options, layout: &Layout, train: Trainable) -> Result<Vec<Module>> {
    if !is_adapter(dir) {
        return options.modules(layout, train);
    }
    options.validate()?;
    let Adapter { modules, .. } = Adapter::read(dir, layout)?;
    let scale = options.alpha / options.rank as f32;
    if let Some(other) = modules.iter().find(|m| m.rank != options.rank || m.scale != scale) {
        bail!(BadConfig(format!(
            "the adapter that is gone on with has rank {} and scale {} at {}, model.lora has rank {} and alpha {} (scale {scale}); \
             write the adapter's own, or merge it first with `foveate model export`: {}",
            other.rank,
            other.scale,
            other.name,
            options.rank,
            options.alpha,
            dir.display()
        )));
    }
    Ok(modules)
}

/// Opens a model for training adapters: those that its folder holds, or fresh ones.
///
/// # Errors
/// As [`modules`], and what cannot be read.
pub fn open(dir: &Path, options: &Options, train: Trainable, seed: u64) -> Result<Vlm> {
    if is_adapter(dir) {
        modules(dir, options, &Layout::new(&Config::load(dir)?), train)?;
        return read(dir);
    }
    let mut model = Vlm::load(dir)?;
    let modules = options.modules(model.weights.layout(), train)?;
    model.adapt(&modules, seed)?;
    Ok(model)
}

/// A model with the adapter of a folder beside its weights.
///
/// # Errors
/// What cannot be read, or does not belong together.
pub fn read(dir: &Path) -> Result<Vlm> {
    let base = base(dir)?;
    ensure!(!is_adapter(&base), "the adapter's model is itself an adapter, merge that first: {}", base.display());
    let adapter = Adapter::read(dir, &Layout::new(&Config::load(&base)?))?;
    let mut model = Vlm::open(&base, Hold::Memory)?;
    model.attach(&adapter.modules)?;
    adapter.fill(model.weights.arena_mut()?);
    Ok(model)
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
    let adapter = Adapter::read(dir, &Layout::new(&model.config))?;
    ensure!(
        adapter.modules == model.modules(),
        "the checkpoint's adapter is not the one that model.lora describes; write its rank, alpha and targets into the config: {}",
        dir.display()
    );
    adapter.fill(model.weights.arena_mut()?);
    Ok(())
}

/// Writes a model's adapter as PEFT does, with the config, tokenizer and picture settings of the model. `opened` is the folder that the
/// model was read from.
///
/// # Errors
/// What cannot be written.
pub fn save(model: &Vlm, dir: &Path, opened: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating the adapter's folder {}", dir.display()))?;
    let Arena { layout, data } = model.weights.arena()?;
    let mut tensors: Vec<(String, &Entry, Vec<u8>)> = Vec::new();
    for entry in layout.entries.iter().filter(|entry| entry.adapter) {
        let bytes = data[entry.range.clone()].iter().flat_map(|w| w.to_le_bytes()).collect();
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
    let modules = model.modules();
    let first = modules.first().context("the model has no adapter")?;
    let base = if is_adapter(opened) { base(opened)? } else { opened.to_owned() };
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
    copy_companions(&home(opened)?, dir)
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
    use super::super::presets;
    use super::*;

    #[test]
    fn a_star_is_any_text() {
        let name = "model.layers.10.self_attn.q_proj";
        for pattern in
            ["model.layers.*", "*.q_proj", "model.*.self_attn.*", "*", name, "model.layers.1*.self_attn.?_proj*"]
        {
            assert_eq!(matches(pattern, name), !pattern.contains('?'), "{pattern}");
        }
        assert!(!matches("model.layers.1", name) && !matches("q_proj", name) && !matches("*.k_proj", name));
    }

    #[test]
    fn targets_are_maps_that_are_not_frozen() {
        let layout = Layout::new(&presets::nano(50));
        let named = |targets: &[&str], train: Trainable| {
            let targets = targets.iter().map(|t| (*t).to_owned()).collect();
            let options = Options { targets, ..Options::default() };
            options.modules(&layout, train).map(|modules| modules.into_iter().map(|m| m.name).collect::<Vec<_>>())
        };
        let layers = presets::nano(50).text.layers;
        assert_eq!(named(&["model.layers.*"], Trainable::ALL).unwrap().len(), 7 * layers);
        let some = named(&["*.q_proj", "visual.merger.*"], Trainable::ALL).unwrap();
        assert_eq!(some.len(), layers + 2);
        assert!(some.contains(&"visual.merger.mlp.0".to_owned()));
        let frozen = Trainable { vision: false, merger: false, ..Trainable::ALL };
        assert_eq!(named(&["*"], frozen).unwrap().len(), 7 * layers, "no embeddings, no norms, nothing frozen");
        let said = named(&["visual.*"], frozen).unwrap_err().to_string();
        assert!(said.contains("model.freeze") && said.contains("visual.*"), "{said}");
        let said = named(&["q_proj"], Trainable::ALL).unwrap_err().to_string();
        assert!(said.contains("\"q_proj\"") && said.contains("model.layers.0.self_attn.q_proj"), "{said}");
    }

    /// Without b the adapted model has the bits of the plain one; with it, merging changes the weights of the named map alone, by hand.
    #[test]
    fn merging_adds_the_product() {
        let plain = presets::one_layer();
        let mut model = plain.clone();
        let options = Options { rank: 2, alpha: 3.0, targets: vec!["model.layers.0.self_attn.k_proj".into()] };
        let modules = options.modules(model.weights.layout(), Trainable::ALL).unwrap();
        model.adapt(&modules, 1).unwrap();
        assert_eq!(model.modules(), modules);
        let first = model.clone().merged().unwrap();
        assert_eq!(first.weights.arena().unwrap().data, plain.weights.arena().unwrap().data);

        let arena = model.weights.arena_mut().unwrap();
        let b = arena.get_mut("model.layers.0.self_attn.k_proj.lora_B.weight").unwrap();
        b.iter_mut().enumerate().for_each(|(i, b)| *b = i as f32);
        let a = arena.get("model.layers.0.self_attn.k_proj.lora_A.weight").unwrap().to_vec();
        let merged = model.merged().unwrap();
        let inputs = a.len() / 2;
        for entry in &plain.weights.layout().entries {
            let [before, after] =
                [&plain, &merged].map(|model| &model.weights.arena().unwrap().data[entry.range.clone()]);
            if entry.name != "model.layers.0.self_attn.k_proj.weight" {
                assert_eq!(before, after, "{}", entry.name);
                continue;
            }
            for (i, (before, after)) in before.iter().zip(after).enumerate() {
                let (n, m) = (i / inputs, i % inputs);
                let expected = before + 1.5 * ((2 * n) as f32 * a[m] + (2 * n + 1) as f32 * a[inputs + m]);
                assert!(
                    (after - expected).abs() < 1e-4 * expected.abs().max(1.0),
                    "{n}, {m}: {after} against {expected}"
                );
            }
        }
    }

    #[test]
    fn folders_go_out_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let (base, out) = (dir.path().join("base"), dir.path().join("adapter"));
        presets::one_layer().save(&base, crate::model::Dtype::F32, None).unwrap();
        let options = Options { rank: 3, alpha: 6.0, targets: vec!["*.q_proj".into(), "visual.blocks.*.qkv".into()] };
        let train = Trainable::ALL;
        let mut model = open(&base, &options, train, 5).unwrap();
        for entry in model.weights.layout().clone().entries.iter().filter(|e| e.adapter) {
            let data = &mut model.weights.arena_mut().unwrap().data[entry.range.clone()];
            data.iter_mut().enumerate().for_each(|(i, w)| *w += (i as f32).sin());
        }
        save(&model, &out, &base).unwrap();
        let data = |model: &Vlm| model.weights.arena().unwrap().data.clone();
        // Gone on with, and read into a fresh one.
        assert_eq!(data(&open(&out, &options, train, 9).unwrap()), data(&model));
        let mut fresh = open(&base, &options, train, 9).unwrap();
        assert_ne!(data(&fresh), data(&model));
        read_into(&mut fresh, &out).unwrap();
        assert_eq!(data(&fresh), data(&model));
        // Used without training, it is merged.
        assert_eq!(data(&Vlm::open(&out, Hold::Auto).unwrap()), data(&model.clone().merged().unwrap()));
        assert!(format!("{:#}", Vlm::open(&out, Hold::Mapped).unwrap_err()).contains("model export"));
        assert!(model.save(&dir.path().join("no"), crate::model::Dtype::F32, None).is_err());

        let refuses = |options: &Options| open(&out, options, train, 9).unwrap_err().to_string();
        assert!(refuses(&Options { rank: 4, ..options.clone() }).contains("rank 3"));
        let mut other =
            open(&base, &Options { targets: vec!["*.k_proj".into()], ..options.clone() }, train, 1).unwrap();
        assert!(read_into(&mut other, &out).unwrap_err().to_string().contains("model.lora"));
        let config = out.join(CONFIG);
        let good = fs::read_to_string(&config).unwrap();
        for (from, to, said) in [
            ("\"LORA\"", "\"IA3\"", "IA3"),
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("\"bias\": \"none\"", "\"bias\": \"all\"", "all"),
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
