//! What is optimised: rewards to advantages, log-probs to a loss and its derivative.
//!
//! Nothing here has seen a tensor of a model. Per trained token the new, old, sampler and reference log-probs go
//! in; out come the loss, its derivative by each new log-prob, a weight for each token's entropy, and metrics. A
//! trainer only has to add the gradient of a weighted sum of log-probs, so every variant runs on every engine.
//!
//! Order of use, per rollout batch: [`Objective::keep_groups`] (dynamic sampling), [`Objective::advantages`]; then
//! per optimiser step [`Objective::totals`] over all of its sequences, and [`Objective::evaluate`] on each
//! micro-batch with these totals.
//!
//! What must stay true: every denominator comes from [`Totals`], that is, from the whole optimiser step, so splitting the
//! step into micro-batches changes nothing; a sequence's gradient depends on no other sequence once advantages are
//! known; a group of equal rewards has advantages of exactly 0 (of the group-relative kinds).
//!
//! Variants are settings, not code paths by name: [`Objective::preset`] only sets fields.

mod advantage;
#[cfg(test)]
mod golden;
mod loss;
mod tally;

pub use advantage::{Advantages, Kept, Outcome};
pub use loss::{Advantage, Evaluation, Sequence, Totals};
pub use tally::Tally;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// How a reward becomes an advantage. `R` are the rewards of a group of `G` trajectories of one prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageKind {
    /// `(R_i - mean R) / (std R + adv_eps)`, sample std (n - 1) as in verl. GRPO, arXiv 2402.03300.
    GroupStd,
    /// `R_i - mean R`. Dr. GRPO, arXiv 2503.20783.
    GroupMean,
    /// `R_i - mean of the others`. RLOO, arXiv 2402.14740.
    Rloo,
    /// `(return - mean) / std` over all trained tokens of the batch. REINFORCE++, arXiv 2501.03262.
    BatchNorm,
    /// `R_i - mean R`, then as `batch_norm`. REINFORCE++-baseline, arXiv 2501.03262.
    BatchNormAfterGroupMean,
}

/// Over what the ratio of new to old policy is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// `r_t = exp(new_t - old_t)`. PPO, arXiv 1707.06347.
    Token,
    /// `s = exp(mean_t (new_t - old_t))`, one for the whole sequence. GSPO, arXiv 2507.18071.
    Sequence,
}

/// The function of ratio and advantage that is minimised. `A` is the advantage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Surrogate {
    /// `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`; with `dual_clip = c` and `A < 0` at most `-A c`.
    /// PPO, arXiv 1707.06347, eq. 7; asymmetric bounds: DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729.
    Clip,
    /// `-stopgrad(min(r, ratio_cap)) A logp`. CISPO, arXiv 2506.13585 (upper bound only, as used there).
    Cispo,
    /// `-A logp`.
    Reinforce,
}

/// How token losses become one number. `B` sequences, `n_i` tokens of sequence i, `T` tokens of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// `sum / T`. verl's default; DAPO as implemented.
    TokenMean,
    /// `sum / B`.
    SeqMeanTokenSum,
    /// `1/B sum_i 1/n_i sum_t`. GRPO (with groups of one size), GSPO.
    SeqMeanTokenMean,
    /// `sum / (B * norm_length)`: a constant in place of the length. Dr. GRPO, arXiv 2503.20783.
    FixedNorm,
    /// Mean over groups of each group's token mean: DAPO's formula to the letter (arXiv 2503.14476).
    GroupTokenMean,
    /// Mean over groups of the mean over members of the token mean: GRPO's formula to the letter, which differs
    /// from `seq_mean_token_mean` only when groups differ in size (arXiv 2402.03300, eq. 3).
    GroupMeanTokenMean,
}

/// Estimator of KL(new, reference) from one sampled token, `d = new - reference`. J. Schulman, "Approximating KL
/// divergence", 2020.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlKind {
    /// `d`. Unbiased value; as a loss its expected gradient is zero, so it belongs in the reward.
    K1,
    /// `d^2 / 2`. Its gradient is the gradient of the KL in expectation.
    K2,
    /// `exp(-d) - 1 + d`, with -d clamped to ±20 and the value to ±10 as in verl; no gradient where clamped.
    K3,
    /// The value of `k3` with the gradient of `k2` (straight-through); verl's "k3+".
    K3K2,
}

/// Where the KL penalty acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPlace {
    /// Added to the loss, of the new policy. GRPO.
    Loss,
    /// Taken off the reward before advantages, of the old policy. RLOO, REINFORCE++.
    Reward,
}

/// Correction for a sampler whose probabilities differ from the trainer's: `w = exp(old - sampler)`.
/// Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    Off,
    /// Each token's policy loss times `min(w_t, correction_cap)`.
    TruncateToken,
    /// Each token's policy loss times `min(prod_t w_t, correction_cap)`.
    TruncateSequence,
    /// Tokens with `w_t` outside `[correction_floor, correction_cap]` get no policy loss, the others their `w_t`.
    MaskToken,
    /// The same with `prod_t w_t`, for the whole sequence.
    MaskSequence,
}

/// The settings of the objective. The defaults are MGPO's (GRPO as in verl, KL 0.01 by k3, clip 0.2/0.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Objective {
    pub advantage: AdvantageKind,
    /// Added to the group's standard deviation, in units of the reward.
    pub adv_eps: f64,
    /// Dynamic sampling (DAPO): leave out groups whose rewards spread no more than `min_spread`.
    pub drop_equal_groups: bool,
    /// Sample standard deviation of a group's rewards at or below which it is dropped; 0 drops only equal rewards.
    /// Above 0 it is MG-Thinker's variance gate.
    pub min_spread: f64,
    /// Whether masked (over-long, over-turn) trajectories still count in the mean and spread of their group.
    pub masked_in_baseline: bool,
    /// Whether the tokens of masked trajectories count in denominators and carry KL and entropy terms. Their
    /// advantage is 0 either way. Off is DAPO's over-long filtering.
    pub masked_in_totals: bool,
    pub ratio: RatioLevel,
    pub surrogate: Surrogate,
    pub clip_low: f64,
    pub clip_high: f64,
    /// Upper bound `c > 1` of the ratio where the advantage is negative. Unset: no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dual_clip: Option<f64>,
    /// CISPO's cap on the ratio.
    pub ratio_cap: f64,
    pub aggregation: Aggregation,
    /// The constant of `aggregation = "fixed_norm"`, in tokens. Unset: the longest response allowed, `max_new_tokens` of every turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_length: Option<f64>,
    pub kl: KlKind,
    /// 0 switches the KL off; then no reference model is needed.
    pub kl_coef: f64,
    pub kl_in: KlPlace,
    pub correction: Correction,
    pub correction_cap: f64,
    pub correction_floor: f64,
    /// Entropy bonus: the loss is lowered by this times the aggregated entropy.
    pub entropy_coef: f64,
}

impl Default for Objective {
    fn default() -> Self {
        Objective {
            advantage: AdvantageKind::GroupStd,
            adv_eps: 1e-6,
            drop_equal_groups: false,
            min_spread: 0.0,
            masked_in_baseline: true,
            masked_in_totals: false,
            ratio: RatioLevel::Token,
            surrogate: Surrogate::Clip,
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: None,
            ratio_cap: 5.0,
            aggregation: Aggregation::TokenMean,
            norm_length: None,
            kl: KlKind::K3,
            kl_coef: 0.01,
            kl_in: KlPlace::Loss,
            correction: Correction::Off,
            correction_cap: 2.0,
            correction_floor: 0.0,
            entropy_coef: 0.0,
        }
    }
}

/// The names [`Objective::preset`] knows.
pub const PRESETS: [&str; 9] =
    ["mgpo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++_baseline"];

impl Objective {
    /// The settings of a published method. Errors on a name that is not in [`PRESETS`], naming the nearest.
    pub fn preset(name: &str) -> Result<Objective> {
        let base = Objective::default();
        Ok(match name {
            // arXiv 2507.05920: GRPO as verl had it, KL 0.01.
            "mgpo" => base,
            // arXiv 2402.03300: sequence mean of token means, beta 0.04.
            "grpo" => Objective { aggregation: Aggregation::SeqMeanTokenMean, kl_coef: 0.04, ..base },
            // arXiv 2503.20783: neither the spread nor the length in a denominator, no KL.
            "dr_grpo" => Objective {
                advantage: AdvantageKind::GroupMean,
                aggregation: Aggregation::FixedNorm,
                kl_coef: 0.0,
                ..base
            },
            // arXiv 2503.14476: clip higher, token mean, dynamic sampling, no KL.
            "dapo" => Objective { clip_high: 0.28, drop_equal_groups: true, kl_coef: 0.0, ..base },
            // arXiv 2507.18071: bounds 3e-4 and 4e-4 of the sequence ratio.
            "gspo" => Objective {
                ratio: RatioLevel::Sequence,
                clip_low: 3e-4,
                clip_high: 4e-4,
                aggregation: Aggregation::SeqMeanTokenMean,
                kl_coef: 0.0,
                ..base
            },
            // arXiv 2506.13585: no token is dropped, no KL.
            "cispo" => Objective { surrogate: Surrogate::Cispo, kl_coef: 0.0, ..base },
            // arXiv 2402.14740: whole-sequence REINFORCE; a KL, when asked for, is in the reward.
            "rloo" => Objective {
                advantage: AdvantageKind::Rloo,
                surrogate: Surrogate::Reinforce,
                aggregation: Aggregation::SeqMeanTokenSum,
                kl: KlKind::K1,
                kl_in: KlPlace::Reward,
                kl_coef: 0.0,
                ..base
            },
            // arXiv 2501.03262: token-level KL in the reward, batch normalisation.
            "reinforce++" => {
                Objective { advantage: AdvantageKind::BatchNorm, kl: KlKind::K1, kl_in: KlPlace::Reward, ..base }
            }
            // The same paper's group form: the group mean comes off first, and the KL (k2) moves to the loss.
            "reinforce++_baseline" => {
                Objective { advantage: AdvantageKind::BatchNormAfterGroupMean, kl: KlKind::K2, ..base }
            }
            unknown => {
                let near = PRESETS
                    .iter()
                    .max_by(|a, b| strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown)));
                bail!(
                    "unknown objective preset {unknown:?}; did you mean {:?}? Known: {}",
                    near.copied().unwrap_or_default(),
                    PRESETS.join(", ")
                )
            }
        })
    }

    /// Reads a config table: `preset = NAME` first (default `mgpo`), then every other key over it.
    ///
    /// ```
    /// let table: toml::Table = toml::from_str("preset = 'dapo'\nclip_high = 0.3").unwrap();
    /// let objective = foveate::objective::Objective::from_table(table).unwrap();
    /// assert_eq!((objective.clip_high, objective.kl_coef), (0.3, 0.0));
    /// ```
    pub fn from_table(mut table: toml::Table) -> Result<Objective> {
        let name = match table.remove("preset") {
            Some(toml::Value::String(name)) => name,
            Some(other) => bail!("reading objective.preset: expected a string, found {other}"),
            None => "mgpo".to_string(),
        };
        let mut fields = toml::Table::try_from(Objective::preset(&name)?).context("writing out a preset")?;
        fields.extend(table);
        let objective: Objective = fields.try_into().context("reading the objective's settings")?;
        objective.validate()?;
        Ok(objective)
    }

    /// Refuses settings that cannot mean anything. Errors name the key, the value and the range.
    pub fn validate(&self) -> Result<()> {
        let finite_at_least = |key: &str, value: f64, least: f64| {
            ensure!(
                value.is_finite() && value >= least,
                "objective.{key} = {value}: expected a number of at least {least}"
            );
            Ok(())
        };
        finite_at_least("adv_eps", self.adv_eps, 0.0)?;
        finite_at_least("min_spread", self.min_spread, 0.0)?;
        ensure!(
            self.min_spread == 0.0 || self.drop_equal_groups,
            "objective.min_spread = {} says which groups are dropped; that needs objective.drop_equal_groups = true",
            self.min_spread
        );
        finite_at_least("clip_low", self.clip_low, 0.0)?;
        finite_at_least("clip_high", self.clip_high, 0.0)?;
        finite_at_least("kl_coef", self.kl_coef, 0.0)?;
        finite_at_least("correction_floor", self.correction_floor, 0.0)?;
        ensure!(self.entropy_coef.is_finite(), "objective.entropy_coef = {}: expected a number", self.entropy_coef);
        for (key, value) in [
            ("ratio_cap", self.ratio_cap),
            ("norm_length", self.norm_length.unwrap_or(1.0)),
            ("correction_cap", self.correction_cap),
        ] {
            ensure!(value.is_finite() && value > 0.0, "objective.{key} = {value}: expected a number above 0");
        }
        ensure!(self.clip_low <= 1.0, "objective.clip_low = {}: a ratio is never below 0, so at most 1", self.clip_low);
        if let Some(c) = self.dual_clip {
            ensure!(c.is_finite() && c > 1.0, "objective.dual_clip = {c}: expected a number above 1");
        }
        ensure!(
            self.correction_floor <= self.correction_cap,
            "objective.correction_floor = {} is above correction_cap = {}",
            self.correction_floor,
            self.correction_cap
        );
        ensure!(
            !(self.kl == KlKind::K1 && self.kl_in == KlPlace::Loss && self.kl_coef > 0.0),
            "objective.kl = \"k1\" in the loss has a gradient of zero expectation and restrains nothing; \
             take \"k2\" or \"k3\", or kl_in = \"reward\""
        );
        Ok(())
    }

    /// Whether log-probs of a reference model are needed.
    pub fn needs_reference(&self) -> bool {
        self.kl_coef != 0.0
    }

    /// Whether a trajectory without an advantage still moves the policy.
    pub fn moves_without_advantage(&self) -> bool {
        self.entropy_coef != 0.0 || (self.kl_coef != 0.0 && self.kl_in == KlPlace::Loss)
    }

    /// Whether an advantage compares an episode with others of its prompt.
    pub fn needs_siblings(&self) -> bool {
        match self.advantage {
            AdvantageKind::GroupStd
            | AdvantageKind::GroupMean
            | AdvantageKind::Rloo
            | AdvantageKind::BatchNormAfterGroupMean => true,
            AdvantageKind::BatchNorm => false,
        }
    }
}

/// Value and derivative by `new` of a KL estimate of one token. Units: nats.
fn kl_estimate(kind: KlKind, new: f64, reference: f64) -> (f64, f64) {
    let d = new - reference;
    let k3 = || {
        let clamped = (-d).clamp(-20.0, 20.0);
        let value = clamped.exp() - clamped - 1.0;
        let inside = clamped == -d && value < 10.0;
        (value.min(10.0), if inside { 1.0 - clamped.exp() } else { 0.0 })
    };
    match kind {
        KlKind::K1 => (d, 1.0),
        KlKind::K2 => (0.5 * d * d, d),
        KlKind::K3 => k3(),
        KlKind::K3K2 => (k3().0, d),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_mgpo() {
        let o = Objective::preset("mgpo").unwrap();
        assert_eq!(o, Objective::default());
        assert_eq!((o.kl_coef, o.clip_low, o.clip_high, o.entropy_coef), (0.01, 0.2, 0.2, 0.0));
        assert_eq!((o.kl, o.kl_in, o.advantage), (KlKind::K3, KlPlace::Loss, AdvantageKind::GroupStd));
    }

    #[test]
    fn every_preset_is_valid_and_survives_its_own_table() {
        for name in PRESETS {
            let o = Objective::preset(name).unwrap();
            o.validate().unwrap();
            let table = toml::Table::try_from(&o).unwrap();
            assert_eq!(Objective::from_table(table).unwrap(), o, "{name}");
        }
    }

    #[test]
    fn wrong_names_are_refused_with_a_suggestion() {
        let message = Objective::preset("dapoo").unwrap_err().to_string();
        assert!(message.contains("\"dapo\""), "{message}");
        let table: toml::Table = toml::from_str("clip_hihg = 0.3").unwrap();
        let message = format!("{:#}", Objective::from_table(table).unwrap_err());
        assert!(message.contains("clip_hihg") && message.contains("clip_high"), "{message}");
        let table: toml::Table = toml::from_str("dual_clip = 0.5").unwrap();
        assert!(Objective::from_table(table).unwrap_err().to_string().contains("above 1"));
    }

    /// d = ln 2: k1 = 0.6931, k2 = 0.2402, k3 = 0.5 - 1 + 0.6931 = 0.1931.
    #[test]
    fn kl_estimates_by_hand() {
        let two = 2f64.ln();
        assert!((kl_estimate(KlKind::K1, two, 0.0).0 - std::f64::consts::LN_2).abs() < 1e-6);
        assert!((kl_estimate(KlKind::K2, two, 0.0).0 - 0.240227).abs() < 1e-6);
        assert!((kl_estimate(KlKind::K3, two, 0.0).0 - 0.193147).abs() < 1e-6);
        assert!((kl_estimate(KlKind::K3, two, 0.0).1 - 0.5).abs() < 1e-12);
        assert_eq!(kl_estimate(KlKind::K3K2, two, 0.0), (kl_estimate(KlKind::K3, two, 0.0).0, two));
        assert_eq!(kl_estimate(KlKind::K3, -1.5, -1.5), (0.0, 0.0));
    }

    #[test]
    fn kl_derivatives_are_finite_differences_and_zero_where_clamped() {
        let h = 1e-6;
        for kind in [KlKind::K1, KlKind::K2, KlKind::K3] {
            for new in [-3.0, -1.7, -0.4, -0.1] {
                let slope = (kl_estimate(kind, new + h, -1.0).0 - kl_estimate(kind, new - h, -1.0).0) / (2.0 * h);
                // Central differences in f64 at h = 1e-6 are good to about 1e-9.
                assert!((slope - kl_estimate(kind, new, -1.0).1).abs() < 1e-7, "{kind:?} {new}");
            }
        }
        // exp(4) - 5 = 49.6 is above 10: the value stops there and pulls no further.
        assert_eq!(kl_estimate(KlKind::K3, -4.0, 0.0), (10.0, 0.0));
        // d = 30: exp(-20) - 1 + 20 = 19 is cut to 10 as well.
        assert_eq!(kl_estimate(KlKind::K3, 0.0, -30.0), (10.0, 0.0));
    }
}
