//! `[model]` of a config: which weights, and how this program holds and computes them, whichever of its engines does.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::config::BadConfig;
use crate::model::block::Keep;
use crate::model::{Compute, Config, Hold, Layout, Trainable, lora};

/// `[model]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelOptions {
    /// Checkpoint folder in Hugging Face layout.
    pub path: PathBuf,
    /// Where the weights are held while nothing is trained: `auto` (in their files where they are bf16), `memory` (as f32), `mapped`.
    pub weights: Hold,
    /// How products with the weights are computed: `f32`; `bf16x6` (each number as the sum of three in bf16: f32's accuracy, other bits); or `bf16` (both
    /// sides rounded, sums in f32; the weights that are trained stay f32). Training is a fifth faster with the second on processors with tiles (Intel
    /// AMX), several times with the third, and nowhere else; with the second a run repeats bit for bit only on the same kind of processor.
    #[serde(with = "ComputeName", skip_serializing_if = "in_f32")]
    pub compute: Compute,
    /// Parts that are not trained: any of `vision`, `merger`, `embeddings`, `text`.
    pub freeze: Vec<String>,
    /// Compute activations a second time in the backward pass instead of keeping them: a third more work, far less memory.
    pub recompute: bool,
    /// Rows (tokens) of one forward and backward pass; a group that has more stands alone.
    pub micro_batch_tokens: usize,
    /// Decoded pictures kept in memory, in MiB.
    pub picture_cache_mib: u64,
    /// Memory for what sampling has computed of pictures and the update can use again, in MiB.
    pub vision_tape_mib: u64,
    /// Refuse to start where the run would take more memory than there is, as `foveate doctor` reckons.
    pub check_memory: bool,
    /// Train adapters instead of the model's own weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<lora::Options>,
}

/// The kernels' choice under the names that configs and commands have for it.
#[derive(Clone, Copy, Serialize, Deserialize, ValueEnum)]
#[serde(remote = "Compute", rename_all = "snake_case")]
pub enum ComputeName {
    F32,
    Bf16x6,
    Bf16,
}

impl From<ComputeName> for Compute {
    fn from(name: ComputeName) -> Compute {
        match name {
            ComputeName::F32 => Compute::F32,
            ComputeName::Bf16x6 => Compute::Bf16x6,
            ComputeName::Bf16 => Compute::Bf16,
        }
    }
}

fn in_f32(compute: &Compute) -> bool {
    *compute == Compute::F32
}

impl Default for ModelOptions {
    fn default() -> ModelOptions {
        ModelOptions {
            path: "assets/nano".into(),
            weights: Hold::Auto,
            compute: Compute::F32,
            freeze: Vec::new(),
            recompute: false,
            micro_batch_tokens: 8192,
            picture_cache_mib: 512,
            vision_tape_mib: 1024,
            check_memory: true,
            lora: None,
        }
    }
}

impl ModelOptions {
    /// What a forward pass keeps for its backward pass.
    pub(super) fn keep(&self) -> Keep {
        if self.recompute { Keep::Inputs } else { Keep::Everything }
    }

    /// The parts that are not frozen.
    ///
    /// # Errors
    /// A name that no part has, and adapters that cannot be.
    pub fn trainable(&self) -> Result<Trainable> {
        self.lora.iter().try_for_each(lora::Options::validate)?;
        let mut trainable = Trainable::ALL;
        for part in &self.freeze {
            match part.as_str() {
                "vision" => trainable.vision = false,
                "merger" => trainable.merger = false,
                "embeddings" => trainable.embeddings = false,
                "text" => trainable.text = false,
                other => bail!(BadConfig(format!(
                    "model.freeze names `{other}`; known are vision, merger, embeddings, text"
                ))),
            }
        }
        ensure!(
            trainable != Trainable { vision: false, merger: false, embeddings: false, text: false, ..Trainable::ALL },
            BadConfig("model.freeze names every part of the model, so nothing would be trained; leave one out".into())
        );
        Ok(trainable)
    }

    /// The same of a model that is open: where it has adapters, nothing but these.
    ///
    /// # Errors
    /// As [`ModelOptions::trainable`].
    pub fn trainable_of(&self, layout: &Layout) -> Result<Trainable> {
        match layout.has_adapters() {
            true => Ok(Trainable::of_adapters(layout)),
            false => self.trainable(),
        }
    }

    /// # Errors
    /// Adapters that this model cannot have.
    pub fn check_lora(&self) -> Result<()> {
        if self.lora.is_some() {
            self.learns(Layout::new(&Config::load(&self.path)?))?;
        }
        Ok(())
    }

    /// The layout of the model as it is trained, with adapters where it gets some, and what of it learns.
    ///
    /// # Errors
    /// As [`lora::modules`].
    pub fn learns(&self, layout: Arc<Layout>) -> Result<(Arc<Layout>, Trainable)> {
        let train = self.trainable()?;
        let Some(options) = &self.lora else { return Ok((layout, train)) };
        let adapted = layout.adapted(&lora::modules(&self.path, options, &layout, train)?);
        let train = Trainable::of_adapters(&adapted);
        Ok((adapted, train))
    }
}
