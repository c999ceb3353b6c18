//! What a run of SFT may be told: the keys of its config, their defaults, and what is refused before anything is loaded.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config::BadConfig;
use crate::data::{Format, ReadAs};
use crate::engine::{self, ModelOptions};
use crate::geometry::Budget;
use crate::model::dense;
use crate::optim::Optim;
use crate::synth::recipe::Recipe;
use crate::tasks::Options as TaskOptions;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: ModelOptions,
    pub data: DataOptions,
    /// Ask the rows of `data.train` as this task does, and learn their answers; only tasks of `kind = "multi_image"`.
    #[serde(default)]
    pub task: Option<TaskOptions>,
    /// A temporary head on the visual tokens; only with `data.pretrain`, whose pictures know their objects.
    #[serde(default)]
    pub dense: Option<dense::Options>,
    /// Who holds the weights; drawn dialogues and `[dense]` are the embedded engine's alone.
    #[serde(default, skip_serializing_if = "engine::Options::is_embedded")]
    pub engine: engine::Options,
    #[serde(default)]
    pub optim: Optim,
    pub train: TrainOptions,
}

/// Where dialogues come from: exactly one of the two.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// JSONL of `{"messages": [{"role", "content": [{"type": "image", "image": PATH} | {"type": "text", "text": …}]}]}`; with a
    /// `[task]`, of rows as `foveate data trajectories` writes them.
    #[serde(default)]
    pub train: Option<PathBuf>,
    /// With a `[task]`: the format of its rows, where their keys do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where relative paths of pictures start, if not in the folder of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Train on the good rows of a file that has bad ones too; otherwise such a file is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_out_bad: bool,
    /// Dialogues drawn on the fly from the bundled world.
    #[serde(default)]
    pub pretrain: Option<Recipe>,
    /// Pixel budget of pictures from files; without it the checkpoint's.
    #[serde(default)]
    pub max_pixels: Option<u64>,
    #[serde(default)]
    pub min_pixels: Option<u64>,
    /// Longer dialogues are left out, and counted.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
    /// With a `[task]`: write each row's trajectory before its answer. Off: the answer alone.
    #[serde(default = "yes")]
    pub reason: bool,
    /// With a `[task]`: written coordinates are multiples of this.
    #[serde(default = "one")]
    pub snap: u32,
}

impl DataOptions {
    /// Of pictures from files, where the checkpoint's own is `budget`.
    pub fn budget(&self, budget: Budget) -> Budget {
        let (least, most) =
            (self.min_pixels.unwrap_or(budget.min_pixels), self.max_pixels.unwrap_or(budget.max_pixels));
        Budget::new(least, most, budget.factor)
    }

    pub(super) fn read_as(&self) -> ReadAs {
        ReadAs { format: self.format, images: self.images.clone(), leave_out_bad: self.leave_out_bad }
    }
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

fn default_max_tokens() -> usize {
    16384
}

/// What one step's loss is the mean of. Reported is the token mean in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Every trained token of the step counts the same.
    TokenMean,
    /// Every dialogue counts the same: one digit that was read is worth as much as a long list of boxes.
    DialogueMean,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    pub out: PathBuf,
    pub steps: u64,
    /// Dialogues per step.
    pub batch: usize,
    pub loss: Loss,
    pub seed: u64,
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    /// Write the metrics a second time as TensorBoard reads them.
    pub tensorboard: bool,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            out: "runs/sft".into(),
            steps: 100,
            batch: 32,
            loss: Loss::TokenMean,
            seed: 1,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            tensorboard: true,
        }
    }
}

impl Plan {
    /// Refuses what cannot work, before anything is loaded.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            (1..=1 << 40).contains(&self.train.steps) && (1..=1 << 20).contains(&self.train.batch),
            BadConfig(format!(
                "train.steps = {} and train.batch = {}: expected at least 1, and at most 2^40 steps of 2^20 dialogues",
                self.train.steps, self.train.batch
            ))
        );
        if self.task.is_some() {
            let unused = [
                ("pretrain", self.data.pretrain.is_some()),
                ("max_pixels", self.data.max_pixels.is_some()),
                ("min_pixels", self.data.min_pixels.is_some()),
            ];
            if let Some((key, _)) = unused.iter().find(|(_, set)| *set) {
                return Err(
                    BadConfig(format!("data.{key} says nothing with a [task]; the task has its own pixels")).into()
                );
            }
        }
        ensure!(
            self.task.is_some() || self.data.format.is_none(),
            BadConfig("data.format is of the rows that a [task] asks; dialogues have one form".into())
        );
        ensure!(
            self.task.is_some() || (self.data.reason && self.data.snap == 1),
            BadConfig("data.reason and data.snap say how the answers to a [task] are written; dialogues are learnt as they stand".into())
        );
        ensure!(
            !self.train.out.as_os_str().is_empty(),
            BadConfig("train.out is empty; name the folder that the run is to make".into())
        );
        self.optim.validate()?;
        self.model.trainable()?;
        self.model.check_lora()?;
        ensure!(
            !matches!(self.engine, engine::Options::Vllm(_)),
            BadConfig(
                "engine.kind = \"vllm\" is for sampling, and fine-tuning samples nothing; leave [engine] out".into()
            )
        );
        self.engine.validate(&self.model, 1.0, 0.0)?;
        self.engine.ensure_trains(&self.model, 1.0)?;
        ensure!(
            self.engine.is_embedded() || self.data.pretrain.is_none(),
            BadConfig("data.pretrain draws its pictures for the embedded engine; leave [engine] out, or name a file in data.train".into())
        );
        if let Some(recipe) = &self.data.pretrain {
            recipe.validate().map_err(|e| BadConfig(format!("in [data.pretrain]: {e:#}")))?;
        }
        Ok(())
    }
}
