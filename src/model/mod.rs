//! The embedded model: Qwen2.5-VL computed by hand-written forward and backward passes, no framework.
//!
//! [`Vlm`] is a configuration and its parameters, one flat array in memory or, to be read only, in their files. It answers two questions about packed rows: what are the
//! log-probs of these tokens ([`Vlm::evaluate`]), and what is the gradient of a weighted sum of them ([`Vlm::backward`]).
//! Losses live elsewhere. Sampling with a cache is in [`generate`]; it gives the same bits as the packed pass.
//!
//! Letters in shapes: T packed rows, N targets, V vocabulary, D hidden, P patches.

pub mod block;
pub mod checkpoint;
pub mod config;
pub mod dense;
pub mod generate;
pub mod layout;
pub mod lora;
pub mod memory;
pub mod positions;
pub mod presets;
pub mod text;
pub mod trace;
pub mod values;
pub mod vision;
pub mod weights;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use foveate_kernels::attention::Span;
use foveate_kernels::logprob;
pub use foveate_kernels::matrix::Compute;
use foveate_kernels::matrix::Matrix;

pub use self::block::Keep;
pub use self::checkpoint::{Hold, load_weights};
pub use self::config::{Config, GenerationConfig};
pub use self::layout::{Arena, Gradients, Group, Layout, Trainable};
pub use self::positions::{Positions, positions, positions_from};
pub use self::text::Early;
use self::text::{FeatureRun, TextTape};
use self::values::Values;
pub use self::values::Weights;
pub use self::vision::VisionTape;
pub use self::weights::{Dtype, save_model};
use crate::geometry::Grid;

/// A model: sizes and parameters.
#[derive(Clone, Debug)]
pub struct Vlm {
    pub config: Config,
    pub weights: Weights,
    /// How products with the weights are computed. Log-probs of sampling and of training agree only under the same.
    pub compute: Compute,
}

/// An image among the packed rows.
#[derive(Clone, Debug)]
pub struct PackedImage {
    /// The row of its first placeholder; the others follow.
    pub first_row: usize,
    pub grid: Grid,
    /// Its features `[tokens, D]` when they are already known (a frozen tower, or features kept from sampling); its
    /// patches are then absent from [`Packed::patches`].
    pub features: Option<Arc<Vec<f32>>>,
}

/// One wanted log-prob: of `token`, predicted by the hidden state of `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub row: usize,
    pub token: u32,
}

/// Many sequences as one array of rows.
///
/// # Example
/// A prompt of 3 tokens shared by two answers of 2: `ids` has 7 rows, `spans` are
/// `{queries 0..3, shared 0..0, own 0..3}`, `{queries 3..5, shared 0..3, own 3..5}`, `{queries 5..7, shared 0..3, own 5..7}`,
/// all causal; positions are `0 1 2 3 4 3 4`; the first token of both answers is predicted by row 2.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    /// `[T]`
    pub ids: Vec<u32>,
    /// Time, height, width, each `[T]`.
    pub positions: [Vec<i32>; 3],
    /// Which keys each row sees; together the queries cover all rows once.
    pub spans: Vec<Span>,
    /// In the order of their rows.
    pub images: Vec<PackedImage>,
    /// `[P, patch_values]`: the patches of the images without features, one image after the other.
    pub patches: Vec<f32>,
    pub targets: Vec<Target>,
}

impl Packed {
    /// A single sequence with ordinary causal attention and no targets.
    pub fn single(ids: &[u32], grids: &[Grid], patches: Vec<f32>, config: &Config) -> Result<Packed> {
        let p = positions(ids, grids, config)?;
        let mut images = Vec::with_capacity(grids.len());
        let mut row = 0;
        for grid in grids {
            row += ids[row..].iter().position(|id| *id == config.ids.image_pad).unwrap_or(0);
            images.push(PackedImage { first_row: row, grid: *grid, features: None });
            row += grid.tokens(config.vision.merge as u32);
        }
        let all = 0..ids.len();
        let spans = vec![Span { queries: all.clone(), shared: 0..0, own: all, causal: true }];
        Ok(Packed { ids: ids.to_vec(), positions: p.axes, spans, images, patches, targets: Vec::new() })
    }

    /// Log-probs wanted for every token but the first, each predicted by the row before it.
    pub fn every_next_token(mut self) -> Packed {
        self.targets = (1..self.ids.len()).map(|t| Target { row: t - 1, token: self.ids[t] }).collect();
        self
    }

    fn check(&self, config: &Config) -> Result<()> {
        let t = self.ids.len();
        for (axis, p) in ["time", "height", "width"].iter().zip(&self.positions) {
            ensure!(p.len() == t, "{} {axis} positions for {t} packed rows", p.len());
        }
        if let Some((row, id)) = self.ids.iter().enumerate().find(|(_, id)| **id as usize >= config.text.vocab) {
            anyhow::bail!("token id {id} in row {row} is outside the vocabulary of {}", config.text.vocab);
        }
        let mut next = 0;
        for span in &self.spans {
            let inside = span.queries.end <= t && span.own.end <= t && span.shared.end <= t;
            ensure!(inside && span.queries.start == next, "span {span:?} does not follow row {next} of {t}");
            next = span.queries.end;
        }
        ensure!(next == t, "the spans cover {next} of {t} packed rows");
        let merge = config.vision.merge as u32;
        let (mut patches, mut pads, mut next) = (0, 0, 0);
        for (i, image) in self.images.iter().enumerate() {
            positions::check_grid(&image.grid, merge, i)?;
            let tokens = image.grid.tokens(merge);
            let rows = image.first_row..image.first_row + tokens;
            ensure!(
                rows.start >= next
                    && rows.end <= t
                    && self.ids[rows.clone()].iter().all(|id| *id == config.ids.image_pad),
                "image {i} of {tokens} tokens does not stand on placeholder rows {rows:?}"
            );
            next = rows.end;
            pads += tokens;
            match &image.features {
                Some(f) => ensure!(
                    f.len() == tokens * config.text.hidden,
                    "image {i} has {} feature values; expected {tokens} tokens × {}",
                    f.len(),
                    config.text.hidden
                ),
                None => patches += tokens * (merge * merge) as usize,
            }
        }
        let placeholders = self.ids.iter().filter(|id| **id == config.ids.image_pad).count();
        ensure!(placeholders == pads, "{placeholders} image placeholders in the packed rows, {pads} tokens of images");
        let values = config.vision.patch_values();
        ensure!(
            self.patches.len() == patches * values,
            "{} patch values; expected {patches} patches × {values}",
            self.patches.len()
        );
        for target in &self.targets {
            ensure!(
                target.row < t && (target.token as usize) < config.text.vocab,
                "target token {} at row {} is outside {t} rows or the vocabulary of {}",
                target.token,
                target.row,
                config.text.vocab
            );
        }
        Ok(())
    }

    /// The different rows with a target, ascending, and the place of each target's row among them. Several targets may
    /// share a row: a prompt's last row predicts the first token of every member of its group.
    fn wanted(&self) -> (Vec<usize>, Vec<usize>) {
        let mut place = vec![usize::MAX; self.ids.len()];
        for target in &self.targets {
            place[target.row] = 0;
        }
        let wanted: Vec<usize> = (0..place.len()).filter(|row| place[*row] == 0).collect();
        for (i, row) in wanted.iter().enumerate() {
            place[*row] = i;
        }
        (wanted, self.targets.iter().map(|t| place[t.row]).collect())
    }

    fn runs(&self, merge: u32) -> Vec<FeatureRun> {
        let run = |i: &PackedImage| FeatureRun { first_row: i.first_row, rows: i.grid.tokens(merge) };
        self.images.iter().map(run).collect()
    }

    fn unseen(&self) -> Vec<Grid> {
        self.images.iter().filter(|i| i.features.is_none()).map(|i| i.grid).collect()
    }
}

/// The distribution log-probs are taken from.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Logits are divided by it.
    pub temperature: f32,
    /// Ids that cannot be sampled: their probability is 0.
    pub banned: &'a [u32],
}

impl Head<'_> {
    /// The model's own distribution.
    pub const PLAIN: Head<'static> = Head { temperature: 1.0, banned: &[] };
}

/// Result of [`Vlm::evaluate`], in the order of the targets.
pub struct Evaluation {
    /// Natural log of the probability, `[N]`.
    pub logprobs: Vec<f32>,
    /// Entropy of the whole distribution in nats, `[N]`.
    pub entropies: Vec<f32>,
    /// `None` when nothing was kept.
    pub tape: Option<Tape>,
}

/// The derivatives of a loss by what the forward pass gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slopes<'a> {
    /// By each target's log-prob, `[N]`.
    pub logprobs: &'a [f32],
    /// By each target's entropy, `[N]`.
    pub entropies: Option<&'a [f32]>,
    /// By the images' features, `[tokens, D]`: of a loss on the visual tokens themselves.
    pub features: Option<&'a [f32]>,
    /// Of words asked for in the middle of the language model.
    pub early: &'a [Early<'a>],
}

impl<'a> Slopes<'a> {
    /// Of a weighted sum of log-probs.
    pub fn of(logprobs: &'a [f32]) -> Slopes<'a> {
        Slopes { logprobs, ..Slopes::default() }
    }
}

/// What [`Vlm::backward`] needs of a forward pass.
pub struct Tape {
    vision: Option<VisionTape>,
    text: TextTape,
    /// Final hidden states of the targets' rows, `[N, D]`.
    rows: Vec<f32>,
    head: logprob::Out,
    temperature: f32,
    banned: Vec<u32>,
    features: Vec<f32>,
}

impl Tape {
    /// The images' features `[tokens, D]`, one image after the other.
    pub fn features(&self) -> &[f32] {
        &self.features
    }
}

/// Result of the forward pass up to the head.
struct Hidden {
    hidden: Vec<f32>,
    features: Vec<f32>,
    vision: Option<VisionTape>,
    text: Option<TextTape>,
}

impl Vlm {
    /// A model that computes in f32.
    pub fn new(config: Config, weights: Weights) -> Vlm {
        Vlm { config, weights, compute: Compute::F32 }
    }

    /// The parameters as products take them.
    fn values(&self) -> Values<'_> {
        self.weights.values().computed(self.compute)
    }

    /// Reads a model folder in Hugging Face layout into memory, so that it can be trained.
    pub fn load(dir: &Path) -> Result<Vlm> {
        Vlm::open(dir, Hold::Memory)
    }

    /// The same, with the weights where `hold` says.
    ///
    /// Of an adapter's folder, the model with the adapter merged into it, in memory.
    pub fn open(dir: &Path, hold: Hold) -> Result<Vlm> {
        if lora::is_adapter(dir) {
            ensure!(
                hold != Hold::Mapped,
                "an adapter is merged into its model's weights in memory; leave out \"mapped\", or merge it once with \
                 `foveate model export {} --out NEW --dtype bf16`",
                dir.display()
            );
            return lora::read(dir)?.merged();
        }
        let config = Config::load(dir)?;
        let weights = checkpoint::open_weights(dir, &Layout::new(&config), hold)?;
        Ok(Vlm::new(config, weights))
    }

    /// Writes a model folder in Hugging Face layout; tokenizer, template and processor files are copied from `source`.
    ///
    /// # Errors
    /// A model with adapters, which `lora::save` writes; and what cannot be written.
    pub fn save(&self, dir: &Path, dtype: Dtype, source: Option<&Path>) -> Result<()> {
        ensure!(
            !self.weights.layout().has_adapters(),
            "the adapters of the model were not merged before it is written"
        );
        save_model(self, dir, dtype, source)
    }

    /// Features of some images.
    ///
    /// # Shapes
    /// patches `[P, patch_values]` -> `[tokens, D]`, images one after the other
    pub fn encode(&self, patches: &[f32], grids: &[Grid]) -> Result<Vec<f32>> {
        Ok(self.look(patches, grids, Keep::Nothing)?.0)
    }

    /// The same, keeping what [`Vlm::look_backward`] needs.
    pub fn look(&self, patches: &[f32], grids: &[Grid], keep: Keep) -> Result<(Vec<f32>, Option<VisionTape>)> {
        let merge = self.config.vision.merge as u32;
        let mut tokens = 0;
        for (i, grid) in grids.iter().enumerate() {
            positions::check_grid(grid, merge, i)?;
            tokens += grid.tokens(merge);
        }
        let (rows, values) = (tokens * (merge * merge) as usize, self.config.vision.patch_values());
        ensure!(patches.len() == rows * values, "{} patch values; expected {rows} patches × {values}", patches.len());
        Ok(self.encode_checked(patches, grids, keep))
    }

    /// Adds to `grads` the gradient by the tower's trained parameters of a loss with the gradient `dfeatures` by the features.
    ///
    /// # Shapes
    /// patches `[P, patch_values]`, dfeatures `[tokens, D]`
    pub fn look_backward(
        &self,
        patches: &[f32],
        tape: VisionTape,
        dfeatures: &[f32],
        train: Trainable,
        grads: &mut Gradients,
    ) -> Result<()> {
        let layout = &self.weights.arena()?.layout;
        let (config, index) = (&self.config.vision, &layout.vision);
        vision::backward(config, index, self.values(), dfeatures, patches, tape, train, &mut grads.data);
        Ok(())
    }

    fn encode_checked(&self, patches: &[f32], grids: &[Grid], keep: Keep) -> (Vec<f32>, Option<VisionTape>) {
        if grids.is_empty() {
            return (Vec::new(), None);
        }
        let Vlm { config, weights, .. } = self;
        vision::forward(&config.vision, &weights.layout().vision, self.values(), patches, grids, keep)
    }

    /// Hidden states after the final norm, `[T, D]`.
    pub fn hidden(&self, packed: &Packed) -> Result<Vec<f32>> {
        packed.check(&self.config)?;
        Ok(self.hidden_checked(packed, None, Keep::Nothing, Keep::Nothing).hidden)
    }

    fn hidden_checked(&self, packed: &Packed, wanted: Option<&[usize]>, vision: Keep, text: Keep) -> Hidden {
        let (new, vision_tape) = self.encode_checked(&packed.patches, &packed.unseen(), vision);
        let runs = packed.runs(self.config.vision.merge as u32);
        let features = if packed.images.iter().all(|i| i.features.is_none()) {
            new
        } else {
            let mut new = &new[..];
            let mut all = Vec::new();
            for (image, run) in packed.images.iter().zip(&runs) {
                match &image.features {
                    Some(f) => all.extend_from_slice(f),
                    None => {
                        let (mine, rest) = new.split_at(run.rows * self.config.text.hidden);
                        all.extend_from_slice(mine);
                        new = rest;
                    }
                }
            }
            all
        };
        let (hidden, text_tape) = text::forward(
            &self.config.text,
            &self.weights.layout().text,
            self.values(),
            &packed.ids,
            packed.positions.each_ref().map(Vec::as_slice),
            &packed.spans,
            &features,
            &runs,
            wanted,
            text,
        );
        Hidden { hidden, features, vision: vision_tape, text: text_tape }
    }

    /// Logits of some hidden states.
    ///
    /// # Shapes
    /// hidden `[N, D]` -> `[N, V]`
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let (d, v) = (self.config.text.hidden, self.config.text.vocab);
        logprob::logits(hidden, self.head(), None, &[], d, v)
    }

    /// The matrix of the head `[V, D]` (the embedding where tied).
    pub fn head(&self) -> Matrix<'_> {
        self.values().matrix(&self.weights.layout().text.head)
    }

    /// Log-probs and entropies of the targets. `train` says which gradients [`Vlm::backward`] will be asked for: a
    /// frozen vision tower keeps nothing.
    pub fn evaluate(&self, packed: &Packed, head: Head, keep: Keep, train: Trainable) -> Result<Evaluation> {
        packed.check(&self.config)?;
        check_head(head)?;
        let vision = if train.tower() { keep } else { Keep::Nothing };
        let (wanted, places) = packed.wanted();
        let Hidden { hidden, features, vision, text } = self.hidden_checked(packed, Some(&wanted), vision, keep);
        let d = self.config.text.hidden;
        let rows = block::pick(&hidden, &places, d);
        drop(hidden);
        let tokens = target_tokens(packed);
        let out =
            logprob::forward(&rows, self.head(), &tokens, head.temperature, head.banned, d, self.config.text.vocab);
        let (logprobs, entropies) = (out.logprob.clone(), out.entropy.clone());
        let tape = text.map(|text| Tape {
            vision,
            text,
            rows,
            head: out,
            temperature: head.temperature,
            banned: head.banned.to_vec(),
            features,
        });
        Ok(Evaluation { logprobs, entropies, tape })
    }

    /// Adds to `grads` the gradient by every trained parameter of a loss whose derivatives by the forward pass's results
    /// are `slopes`. `packed` is the one that was evaluated. Where its images came with ready features and the tower is trained,
    /// gives the gradient by these features, which the caller takes to [`Vlm::look_backward`]; nothing otherwise.
    ///
    /// # Shapes
    /// -> `[tokens, D]`, images one after the other, or empty
    pub fn backward(
        &self,
        packed: &Packed,
        tape: Tape,
        slopes: &Slopes,
        train: Trainable,
        grads: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Slopes { logprobs: weights, entropies: entropy_weights, features: on_features, early } = *slopes;
        let n = packed.targets.len();
        ensure!(weights.len() == n, "{} weights for {n} targets", weights.len());
        if let Some(e) = entropy_weights {
            ensure!(e.len() == n, "{} entropy weights for {n} targets", e.len());
        }
        let layout = &self.weights.arena()?.layout;
        ensure!(grads.layout.len == layout.len, "gradients of another model's layout");
        let given = packed.images.iter().filter(|i| i.features.is_some()).count();
        ensure!(
            !train.tower() || given == 0 || given == packed.images.len(),
            "{given} of {} images came with ready features; with a trained tower all or none must",
            packed.images.len()
        );
        let Tape { vision, text, rows, head, temperature, banned, features } = tape;
        drop(features);
        let (d, v) = (self.config.text.hidden, self.config.text.vocab);
        let mut drows = vec![0.0; rows.len()];
        let dw = train.embeddings.then(|| &mut grads.data[layout.text.head.clone()]);
        let tokens = target_tokens(packed);
        logprob::backward(
            &mut drows,
            dw,
            weights,
            entropy_weights,
            &head,
            &rows,
            self.head(),
            &tokens,
            temperature,
            &banned,
            d,
            v,
        );
        drop(rows);
        let (wanted, places) = packed.wanted();
        let mut dhidden = vec![0.0; wanted.len() * d];
        for (place, drow) in places.iter().zip(drows.chunks_exact(d)) {
            for (a, b) in dhidden[place * d..(place + 1) * d].iter_mut().zip(drow) {
                *a += b;
            }
        }
        drop(drows);
        let runs = packed.runs(self.config.vision.merge as u32);
        let mut dfeatures = text::backward(
            &self.config.text,
            &layout.text,
            self.values(),
            &dhidden,
            &packed.ids,
            &packed.spans,
            &runs,
            Some(&wanted),
            text,
            early,
            train,
            &mut grads.data,
        );
        drop(dhidden);
        if let Some(extra) = on_features {
            ensure!(
                extra.len() == dfeatures.len(),
                "{} values on the features, expected {}",
                extra.len(),
                dfeatures.len()
            );
            dfeatures.iter_mut().zip(extra).for_each(|(d, e)| *d += e);
        }
        if given > 0 {
            return Ok(dfeatures);
        }
        match vision {
            Some(tape) => self.look_backward(&packed.patches, tape, &dfeatures, train, grads)?,
            None => ensure!(
                packed.images.is_empty() || !train.tower(),
                "the vision tower is trained now but was frozen in the forward pass"
            ),
        }
        Ok(Vec::new())
    }
}

fn target_tokens(packed: &Packed) -> Vec<u32> {
    packed.targets.iter().map(|t| t.token).collect()
}

fn check_head(head: Head) -> Result<()> {
    ensure!(
        head.temperature > 0.0 && head.temperature.is_finite(),
        "temperature is {}; expected a number above 0 (greedy decoding has no log-probs)",
        head.temperature
    );
    Ok(())
}

#[cfg(test)]
mod tests;
