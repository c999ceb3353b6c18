//! What a run of RL may be told: the keys of its config, their defaults, and what is refused before anything is loaded.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::config::{self, BadConfig};
use crate::data::{Format, ReadAs};
use crate::engine::{self, ModelOptions, Training};
use crate::objective::Objective;
use crate::optim::Optim;
use crate::rollout;
use crate::tasks::Options as TaskOptions;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: ModelOptions,
    #[serde(default, skip_serializing_if = "engine::Options::is_embedded")]
    pub engine: engine::Options,
    pub data: DataOptions,
    pub task: TaskOptions,
    #[serde(default)]
    pub rollout: rollout::Options,
    /// `preset` and any setting of `objective::Objective` over it.
    #[serde(default)]
    pub objective: toml::Table,
    #[serde(default)]
    pub optim: Optim,
    pub train: TrainOptions,
    #[serde(default)]
    pub eval: EvalOptions,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// Rows of our own or of any format that docs/data.md names.
    pub train: PathBuf,
    /// The format, where the keys of the rows do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where relative paths of pictures start, if not in the folder of the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Train on the good rows of a file that has bad ones too; otherwise such a file is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_out_bad: bool,
}

impl DataOptions {
    pub fn read_as(&self) -> ReadAs {
        ReadAs { format: self.format, images: self.images.clone(), leave_out_bad: self.leave_out_bad }
    }
}

/// Held-out questions during training, played as `[rollout]` says but for the temperature.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalOptions {
    pub rows: Option<PathBuf>,
    /// Only the first so many.
    pub limit: Option<usize>,
    /// Every so many steps, and after the last; 0 never.
    pub every: u64,
    /// 0 is greedy.
    pub temperature: f32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// Run folder.
    pub out: PathBuf,
    pub steps: u64,
    /// Questions per step.
    pub prompts: usize,
    /// Episodes per question.
    pub group: usize,
    /// Optimiser updates per step; the questions are dealt out evenly.
    pub updates: usize,
    /// With `drop_equal_groups`: play at most so many times the questions of a step to fill it.
    pub refill: usize,
    /// MG-Thinker's variance gate, for `drop_equal_groups`: the run has so many phases, and `min_spread` is halved with each; 1 keeps it.
    pub spread_phases: u64,
    /// Where a step has several updates: the questions with the highest mean reward first, the lowest last (MG-Thinker's bands). With
    /// the gate and `refill = 1`, the questions of a step are its candidate pool: what the gate leaves is dealt out to the updates.
    pub bands: bool,
    /// Multiply the advantages of a question by exp(1 - its mean IoU), or mean reward where no IoU is known (UniVG-R1, arXiv 2505.14231).
    pub weigh_hard: bool,
    /// Over-long and truncated episodes get no policy loss instead of their reward.
    pub mask_truncated: bool,
    pub seed: u64,
    /// 0 writes a checkpoint at the end only.
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    /// Write the episodes of every so many steps, and of the last; 0 writes none.
    pub episodes_every: u64,
    /// Write the metrics a second time as TensorBoard reads them.
    pub tensorboard: bool,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            out: "runs/rl".into(),
            steps: 100,
            prompts: 16,
            group: 8,
            updates: 1,
            refill: 3,
            spread_phases: 1,
            bands: false,
            weigh_hard: false,
            mask_truncated: false,
            seed: 1,
            checkpoint_every: 20,
            keep_checkpoints: 2,
            episodes_every: 1,
            tensorboard: true,
        }
    }
}

impl TrainOptions {
    /// What the gate's spread is multiplied with in this step: halved with each phase.
    pub(super) fn share_of_spread(&self, step: u64) -> f64 {
        let phase = (step - 1) * self.spread_phases / self.steps.max(1);
        0.5f64.powi(phase as i32)
    }
}

impl Plan {
    pub fn objective(&self) -> Result<Objective> {
        Objective::from_table(self.objective.clone())
            .map_err(|e| BadConfig(format!("[objective] {}", config::explain(&format!("{e:#}")))).into())
    }

    /// What the engine is told of the training.
    ///
    /// # Errors
    /// A bad `[objective]`.
    pub fn training(&self) -> Result<Training> {
        Ok(Training {
            optim: self.optim.clone(),
            temperature: self.rollout.temperature,
            all_ids: false,
            reference: self.objective()?.needs_reference(),
            pictures: true,
            seed: self.train.seed,
        })
    }

    /// Optimiser updates of the whole run, over which the schedule of the learning rate goes.
    pub(super) fn total_updates(&self) -> u64 {
        self.train.steps * self.train.updates as u64
    }

    /// How held-out questions are sampled.
    pub(super) fn held_out_rollout(&self) -> rollout::Options {
        rollout::Options { temperature: self.eval.temperature, ..self.rollout.clone() }
    }

    /// Refuses what cannot work, before anything is loaded, and writes every default of the objective out.
    pub fn resolve(mut self) -> Result<Plan> {
        let mut objective = self.objective()?;
        // Dr. GRPO's constant is the longest response that could have been written.
        objective.norm_length.get_or_insert((self.rollout.max_new_tokens * self.task.turns()) as f64);
        self.objective = toml::Table::try_from(&objective).context("writing out the objective")?;
        let t = &self.train;
        let bad = |text: String| Err(BadConfig(text).into());
        self.rollout.validate()?;
        self.optim.validate()?;
        self.model.trainable()?;
        self.engine.validate(&self.model, self.rollout.temperature, objective.entropy_coef)?;
        if t.prompts == 0 || t.group == 0 || t.updates == 0 || t.steps == 0 {
            return bad("train.steps, train.prompts, train.group and train.updates must be at least 1".into());
        }
        if !t.prompts.is_multiple_of(t.updates) {
            return bad(format!(
                "train.prompts = {} cannot be dealt out to train.updates = {} evenly",
                t.prompts, t.updates
            ));
        }
        // Far above any step there ever was, and what is reckoned with them stays a number.
        for (key, value, most) in [
            ("train.steps", t.steps, 1 << 40),
            ("train.prompts", t.prompts as u64, 1 << 20),
            ("train.group", t.group as u64, 1 << 16),
        ] {
            if value > most {
                return bad(format!("{key} = {value}: expected at most {most}"));
            }
        }
        if self.train.out.as_os_str().is_empty() {
            return bad("train.out is empty; name the folder that the run is to make".into());
        }
        if t.spread_phases == 0 {
            return bad("train.spread_phases is 0, expected at least 1".into());
        }
        if t.spread_phases > 1 && !(objective.drop_equal_groups && objective.min_spread > 0.0) {
            return bad(format!(
                "train.spread_phases = {} halves objective.min_spread over the run; that needs objective.drop_equal_groups = true and a \
                 min_spread above 0",
                t.spread_phases
            ));
        }
        if t.bands && t.updates == 1 {
            return bad("train.bands orders the updates of a step, and train.updates is 1; take at least 2".into());
        }
        if t.group == 1 && objective.needs_siblings() {
            return bad(
                "train.group = 1: the objective compares the episodes of a question with each other, so every advantage would be 0; \
                 take at least 2"
                    .into(),
            );
        }
        if self.eval.every > 0 && self.eval.rows.is_none() {
            return bad(format!("eval.every = {}, but eval.rows names no file with held-out rows", self.eval.every));
        }
        self.held_out_rollout().validate().map_err(|e| BadConfig(format!("in [eval]: {e}")))?;
        if self.rollout.temperature <= 0.0 {
            return bad(format!(
                "rollout.temperature = {}: training needs a distribution, so more than 0",
                self.rollout.temperature
            ));
        }
        if self.rollout.top_k.is_some() || self.rollout.top_p.is_some() {
            return bad(
                "rollout.top_k and rollout.top_p truncate the distribution; they are for evaluation only".into()
            );
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval;
    use crate::objective::Correction;

    #[test]
    fn the_gate_is_halved_with_each_phase() {
        let train = TrainOptions { steps: 8, spread_phases: 4, ..TrainOptions::default() };
        let shares: Vec<f64> = (1..=8).map(|step| train.share_of_spread(step)).collect();
        assert_eq!(shares, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]);
        assert_eq!(TrainOptions { spread_phases: 1, ..train }.share_of_spread(8), 1.0);
    }

    /// The reference config says something about every key there is, and holds the published values: the defaults.
    #[test]
    fn the_reference_config_names_every_key() {
        let text = include_str!("../../configs/mgpo_paper.toml");
        let plan: Plan = config::parse::<Plan>(text, &[]).unwrap().resolve().unwrap();
        assert_eq!(plan.objective().unwrap().kl_coef, Objective::default().kl_coef);
        let TaskOptions::Crop(published) = plan.task.clone() else { panic!("another task") };
        let default = crate::tasks::crop::Options::default();
        assert_eq!((published.max_pixels, published.min_pixels), (default.max_pixels, default.min_pixels));
        let table = toml::Table::try_from(&plan).unwrap();
        let optional = ["top_k", "top_p", "dual_clip", "norm_length", "rows", "limit"];
        for key in
            table.values().filter_map(toml::Value::as_table).flat_map(|section| section.keys().map(String::as_str))
        {
            let named = text.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} =")));
            assert!(named || optional.contains(&key), "configs/mgpo_paper.toml does not mention {key}");
        }
        assert!(optional.iter().all(|key| text.contains(key)));
    }

    /// The config for a cluster names every key of its engine, with the defaults where it has no reason of its own, and is otherwise the published
    /// one but for what it says.
    #[test]
    fn the_config_for_a_cluster_is_the_published_one() {
        let text = include_str!("../../configs/mgpo_tinker.toml");
        let plan: Plan = config::parse::<Plan>(text, &[]).unwrap().resolve().unwrap();
        let engine::Options::Tinker(options) = &plan.engine else { panic!("another engine") };
        let every = engine::tinker::Options {
            state: Some(String::new()),
            reduction: Some(engine::tinker::Reduction::Sum),
            ..engine::tinker::Options::default()
        };
        for key in toml::Table::try_from(&every).unwrap().keys() {
            assert!(text.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} ="))), "{key}");
        }
        let own = engine::tinker::Options {
            url: options.url.clone(),
            base_model: options.base_model.clone(),
            lora_rank: 0,
            ..engine::tinker::Options::default()
        };
        assert_eq!(*options, own);
        let paper = include_str!("../../configs/mgpo_paper.toml");
        let paper: Plan = config::parse::<Plan>(paper, &[]).unwrap().resolve().unwrap();
        let published = Objective { kl_coef: 0.0, correction: Correction::TruncateToken, ..paper.objective().unwrap() };
        assert_eq!(plan.objective().unwrap(), published);
        let sections = |plan: &Plan| {
            let mut table = toml::Table::try_from(plan).unwrap();
            table.retain(|section, _| !["model", "engine", "objective"].contains(&section));
            table["train"].as_table_mut().unwrap().remove("out");
            table
        };
        assert_eq!(sections(&plan), sections(&paper));
    }

    #[test]
    fn every_shipped_config_is_read() {
        for text in [
            include_str!("../../configs/demo_mgpo.toml"),
            include_str!("../../configs/demo_grpo.toml"),
            include_str!("../../configs/mirg_tinker.toml"),
            include_str!("../../configs/mgpo_vllm.toml"),
            include_str!("../../tests/engines/skyrl.toml"),
        ] {
            config::parse::<Plan>(text, &[]).unwrap().resolve().unwrap();
        }
        // Every ablation that the file names.
        let mirg = include_str!("../../configs/mirg_rl.toml");
        let changes: Vec<Vec<String>> = mirg
            .lines()
            .filter_map(|line| line.strip_prefix("#   "))
            .flat_map(|line| line.split("  ").filter(|words| words.contains('=')))
            .map(|words| words.split_whitespace().filter(|word| word.contains('=')).map(str::to_owned).collect())
            .collect();
        assert!(changes.len() >= 5, "{changes:?}");
        for overrides in
            changes.into_iter().filter(|all| !all.iter().any(|one| one.starts_with("data."))).chain([vec![]])
        {
            config::parse::<Plan>(mirg, &overrides).unwrap().resolve().unwrap();
        }
        for text in [
            include_str!("../../configs/eval_plates.toml"),
            include_str!("../../configs/eval_mig_bench.toml"),
            include_str!("../../configs/eval_protocols.toml"),
            include_str!("../../configs/mirg_gain.toml"),
        ] {
            config::parse::<eval::Plan>(text, &[]).unwrap();
        }
        config::parse::<crate::sft::Plan>(include_str!("../../configs/sft_dialogues.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../../configs/nano_pretrain.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../../configs/nano_several.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../../configs/nano_many.toml"), &[]).unwrap();
        for text in [include_str!("../../configs/mirg_sft.toml"), include_str!("../../configs/mirg_tinker_sft.toml")] {
            config::parse::<crate::sft::Plan>(text, &[]).unwrap();
        }
    }
}
