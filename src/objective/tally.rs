//! The metrics of an optimiser step, as sums that micro-batches add up to.
//!
//! What must stay true: merging the tallies of any split of a step reports what the whole step would have.

/// Sums from which metrics are made; those of micro-batches add up ([`Tally::merge`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Tally {
    pub pg_loss: f64,
    /// The KL term as it stands in the loss, coefficient included.
    pub kl_loss: f64,
    pub entropy_loss: f64,
    pub(super) tokens: f64,
    pub(super) ratio_sum: f64,
    pub(super) ratio_min: f64,
    pub(super) ratio_max: f64,
    pub(super) clipped_high: f64,
    pub(super) clipped_low: f64,
    pub(super) clipped_dual: f64,
    pub(super) approx_kl: f64,
    pub(super) kl_tokens: f64,
    pub(super) kl_sum: f64,
    pub(super) entropy_tokens: f64,
    pub(super) entropy_sum: f64,
    pub(super) sampler_tokens: f64,
    pub(super) mismatch_kl: f64,
    pub(super) mismatch_max: f64,
    pub(super) correction_sum: f64,
    pub(super) corrected: f64,
}

impl Default for Tally {
    fn default() -> Self {
        Tally {
            pg_loss: 0.0,
            kl_loss: 0.0,
            entropy_loss: 0.0,
            tokens: 0.0,
            ratio_sum: 0.0,
            ratio_min: f64::INFINITY,
            ratio_max: f64::NEG_INFINITY,
            clipped_high: 0.0,
            clipped_low: 0.0,
            clipped_dual: 0.0,
            approx_kl: 0.0,
            kl_tokens: 0.0,
            kl_sum: 0.0,
            entropy_tokens: 0.0,
            entropy_sum: 0.0,
            sampler_tokens: 0.0,
            mismatch_kl: 0.0,
            mismatch_max: 0.0,
            correction_sum: 0.0,
            corrected: 0.0,
        }
    }
}

impl Tally {
    /// Adds the tally of another micro-batch of the same step.
    pub fn merge(&mut self, other: &Tally) {
        let Tally {
            pg_loss,
            kl_loss,
            entropy_loss,
            tokens,
            ratio_sum,
            ratio_min,
            ratio_max,
            clipped_high,
            clipped_low,
            clipped_dual,
            approx_kl,
            kl_tokens,
            kl_sum,
            entropy_tokens,
            entropy_sum,
            sampler_tokens,
            mismatch_kl,
            mismatch_max,
            correction_sum,
            corrected,
        } = other;
        self.pg_loss += pg_loss;
        self.kl_loss += kl_loss;
        self.entropy_loss += entropy_loss;
        self.tokens += tokens;
        self.ratio_sum += ratio_sum;
        self.ratio_min = self.ratio_min.min(*ratio_min);
        self.ratio_max = self.ratio_max.max(*ratio_max);
        self.clipped_high += clipped_high;
        self.clipped_low += clipped_low;
        self.clipped_dual += clipped_dual;
        self.approx_kl += approx_kl;
        self.kl_tokens += kl_tokens;
        self.kl_sum += kl_sum;
        self.entropy_tokens += entropy_tokens;
        self.entropy_sum += entropy_sum;
        self.sampler_tokens += sampler_tokens;
        self.mismatch_kl += mismatch_kl;
        self.mismatch_max = self.mismatch_max.max(*mismatch_max);
        self.correction_sum += correction_sum;
        self.corrected += corrected;
    }

    /// The tally of several optimiser steps as that of one: each step's loss has its own denominators, so losses are averaged; the other
    /// figures are sums over tokens already.
    pub fn of_steps(mut self, steps: usize) -> Tally {
        let n = steps.max(1) as f64;
        self.pg_loss /= n;
        self.kl_loss /= n;
        self.entropy_loss /= n;
        self
    }

    /// Metrics of the whole step, over the groups that gave a gradient. What was not measured (no reference, no sampler, no entropy) is
    /// left out.
    ///
    /// Fractions are of counted tokens: `pg_clipfrac_high` and `_low` where the upper or lower bound stopped the gradient,
    /// `_dual` where the dual clip did. `approx_kl` is k3 of new against old; `mismatch_kl/mean` k3 of sampler against
    /// old; `mismatch_logprob/max` the largest |old - sampler|.
    pub fn report(&self) -> Vec<(&'static str, f64)> {
        let n = self.tokens;
        let mut out = vec![("actor/pg_loss", self.pg_loss)];
        if n > 0.0 {
            out.extend([
                ("actor/pg_clipfrac", (self.clipped_high + self.clipped_low) / n),
                ("actor/pg_clipfrac_high", self.clipped_high / n),
                ("actor/pg_clipfrac_low", self.clipped_low / n),
                ("actor/pg_clipfrac_dual", self.clipped_dual / n),
                ("actor/approx_kl", self.approx_kl / n),
                ("ratio/mean", self.ratio_sum / n),
                ("ratio/min", self.ratio_min),
                ("ratio/max", self.ratio_max),
            ]);
        }
        if self.kl_tokens > 0.0 {
            out.push(("actor/kl_loss", self.kl_loss));
            out.push(("actor/ref_kl", self.kl_sum / self.kl_tokens));
        }
        if self.entropy_tokens > 0.0 {
            out.push(("actor/entropy", self.entropy_sum / self.entropy_tokens));
        }
        if self.sampler_tokens > 0.0 {
            out.push(("mismatch_kl/mean", self.mismatch_kl / self.sampler_tokens));
            out.push(("mismatch_logprob/max", self.mismatch_max));
            out.push(("correction/mean", self.correction_sum / self.sampler_tokens));
            out.push(("correction/frac_limited", self.corrected / self.sampler_tokens));
        }
        out
    }
}
