//! LoRA: narrow matrices beside the maps of a frozen model (arXiv 2106.09685), in PEFT's files.
//!
//! An adapter's matrices lie in the model's arena behind its own tensors ([`Layout::adapted`]), so gradients, optimiser and first weights
//! treat them as they treat any others; `block` computes with them. This file says which maps get one, draws the first ones and merges them
//! into the weights; `lora/peft.rs` reads and writes the files. What must stay true: a fresh adapter changes nothing (its `b` is 0), and a
//! merged model computes what the adapted one does, up to rounding.

mod peft;

use anyhow::{Result, bail, ensure};
use foveate_kernels::linear;
use foveate_kernels::matrix::Compute;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Vlm;
use super::layout::{Arena, Entry, Group, LORA_A, LORA_B, Layout, Module, Trainable};
use crate::config::BadConfig;
pub use peft::{
    About, about, adapters, base_or, home, is_adapter, modules, open, read, read_into, save, save_outgoing,
};

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

/// The values of fresh adapters, which lie behind the model's own.
fn fresh(layout: &Layout, seed: u64) -> Vec<f32> {
    let mut values = Vec::new();
    for (i, entry) in layout.entries.iter().enumerate().filter(|(_, entry)| entry.adapter) {
        if entry.name.contains(LORA_B) {
            values.resize(values.len() + entry.range.len(), 0.0);
            continue;
        }
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(i as u64);
        let bound = 1.0 / (entry.shape[1] as f32).sqrt();
        values.extend(entry.range.clone().map(|_| random.random_range(-bound..bound)));
    }
    values
}

impl Vlm {
    /// Puts fresh adapters beside some maps: `a` uniform within `1/√inputs` and `b` 0, as PEFT draws them.
    ///
    /// # Errors
    /// Weights that are mapped, and a model that has adapters.
    pub fn adapt(&mut self, modules: &[Module], seed: u64) -> Result<()> {
        let arena = self.weights.arena_mut()?;
        ensure!(!arena.layout.has_adapters(), "the model has adapters already");
        arena.layout = arena.layout.adapted(modules);
        arena.data.reserve_exact(arena.layout.len - arena.data.len());
        arena.data.extend(fresh(&arena.layout, seed));
        Ok(())
    }

    /// The model with its adapters added to its weights: `w += scale · b · a`.
    ///
    /// # Errors
    /// Weights that are mapped; an adapter that makes them infinite.
    pub fn merged(mut self) -> Result<Vlm> {
        let modules = self.weights.layout().modules();
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
            linear::backward_weight(&mut own[w], None, &turned, a, rank, inputs, outputs, Compute::F32);
        }
        let layout = Layout::new(&self.config);
        data.truncate(layout.len);
        ensure!(
            data.iter().all(|w| w.is_finite()),
            "with its adapter the model has weights that are not finite numbers"
        );
        let weights = Arena { layout, data: std::mem::take(data) };
        Ok(Vlm { weights: weights.into(), ..self })
    }
}

impl Layout {
    /// The maps that have an adapter.
    pub fn modules(&self) -> Vec<Module> {
        let named = |entry: &Entry| Some(entry.name.strip_suffix(&format!(".{LORA_A}.weight"))?.to_owned());
        let of = |entry: &Entry| {
            let name = named(entry)?;
            Some(Module { rank: entry.shape[0], scale: self.lora(&name)?.scale, name })
        };
        self.entries.iter().filter(|entry| entry.adapter).filter_map(of).collect()
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
        assert_eq!(model.weights.layout().modules(), modules);
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
}
