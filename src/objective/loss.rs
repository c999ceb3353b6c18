//! Log-probs and advantages to a loss, its derivative by each new log-prob, and metrics.
//!
//! It hides clipping, sequence ratios, aggregation and sampler correction. What must stay true: all denominators come from
//! [`Totals`] of the whole optimiser step, sums run in a fixed order in f64, and where a term is clipped or
//! clamped its derivative is exactly 0.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{Aggregation, Correction, KlPlace, Objective, RatioLevel, Surrogate, Tally, kl_estimate};

/// Log-ratios are clamped to this before `exp`, as in verl.
const LOG_RATIO_LIMIT: f64 = 20.0;

/// The advantage of a sequence: one number, or one a trained token.
#[derive(Clone, Copy, Debug)]
pub enum Advantage<'a> {
    One(f64),
    PerToken(&'a [f64]),
}

/// One trajectory's trained tokens. All slices have one entry a trained token, in order, all log-probs in nats and of
/// the distribution that was sampled from (temperature included).
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    pub group: u64,
    pub advantage: Advantage<'a>,
    /// Over-long or over-turn: no policy loss, whatever the advantage says.
    pub masked: bool,
    /// Under the policy being trained.
    pub new: &'a [f32],
    /// Under the policy as it was before the first update on this batch.
    pub old: &'a [f32],
    /// As the sampler reported them.
    pub sampler: Option<&'a [f32]>,
    pub reference: Option<&'a [f32]>,
    /// Entropy of the new policy at each token, nats. Without it the loss value lacks the bonus and the entropy is not
    /// reported; the weights for the head do not need it.
    pub entropy: Option<&'a [f32]>,
}

/// The counts of a whole optimiser step, which every micro-batch divides by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub tokens: usize,
    /// Sequences with at least one counted token.
    pub sequences: usize,
    /// Group → (sequences, tokens).
    groups: BTreeMap<u64, (usize, usize)>,
}

/// What a micro-batch contributes to the step.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// This micro-batch's share of the loss of the step; shares add up.
    pub loss: f64,
    /// d loss / d new log-prob, one a trained token of each sequence.
    pub gradient: Vec<Vec<f32>>,
    /// d loss / d entropy, the same shape; `None` without an entropy bonus.
    pub entropy_weight: Option<Vec<Vec<f32>>>,
    pub tally: Tally,
}

/// A token's policy loss, its derivative by the log-ratio (or log-prob), and which bound stopped it.
struct Policy {
    value: f64,
    slope: f64,
    bound: Bound,
}

#[derive(PartialEq)]
enum Bound {
    None,
    Low,
    High,
    Dual,
}

impl Objective {
    /// Counts a whole optimiser step from (group, trained tokens, masked) of each of its sequences.
    pub fn totals(&self, sequences: impl IntoIterator<Item = (u64, usize, bool)>) -> Totals {
        let mut totals = Totals::default();
        for (group, tokens, masked) in sequences {
            if tokens == 0 || (masked && !self.masked_in_totals) {
                continue;
            }
            totals.tokens += tokens;
            totals.sequences += 1;
            let entry = totals.groups.entry(group).or_default();
            entry.0 += 1;
            entry.1 += tokens;
        }
        totals
    }

    /// The loss and gradient of one micro-batch of the step counted in `totals`.
    ///
    /// Loss = aggregate(policy term + kl_coef · KL − entropy_coef · entropy). Masked sequences that do not count
    /// (`masked_in_totals = false`) contribute nothing.
    ///
    /// Errors: slices of different lengths, a log-prob that is not finite, a missing reference or sampler where the settings
    /// need one, a sequence that `totals` has not seen.
    pub fn evaluate(&self, sequences: &[Sequence], totals: &Totals) -> Result<Evaluation> {
        let mut out = Evaluation {
            loss: 0.0,
            gradient: Vec::with_capacity(sequences.len()),
            entropy_weight: (self.entropy_coef != 0.0).then(Vec::new),
            tally: Tally::default(),
        };
        for (i, sequence) in sequences.iter().enumerate() {
            self.add(sequence, totals, &mut out)
                .with_context(|| format!("evaluating the objective on sequence {i} (group {})", sequence.group))?;
        }
        out.loss = out.tally.pg_loss + out.tally.kl_loss + out.tally.entropy_loss;
        Ok(out)
    }

    fn add(&self, s: &Sequence, totals: &Totals, out: &mut Evaluation) -> Result<()> {
        check(s)?;
        let n = s.new.len();
        if n == 0 || (s.masked && !self.masked_in_totals) {
            out.gradient.push(vec![0.0; n]);
            if let Some(weights) = &mut out.entropy_weight {
                weights.push(vec![0.0; n]);
            }
            return Ok(());
        }
        let weight = self.token_weight(s, totals)?;
        let tally = &mut out.tally;
        let correction = self.correction_weights(s, tally)?;
        let advantage = |t: usize| match s.advantage {
            _ if s.masked => 0.0,
            Advantage::One(a) => a,
            Advantage::PerToken(a) => a[t],
        };

        let raw: Vec<f64> = s.new.iter().zip(s.old).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        let mean_log_ratio = raw.iter().sum::<f64>() / n as f64;
        let mut gradient = vec![0.0f64; n];
        let mut spread = 0.0; // of a sequence ratio: what all tokens share
        for t in 0..n {
            let log_ratio = match self.ratio {
                RatioLevel::Token => raw[t],
                RatioLevel::Sequence => mean_log_ratio,
            };
            let policy = self.policy_term(log_ratio, f64::from(s.new[t]), advantage(t));
            let c = weight * correction.as_ref().map_or(1.0, |c| c[t]);
            tally.pg_loss += c * policy.value;
            match (self.ratio, self.surrogate) {
                // s = exp(mean of log-ratios): d s / d new_t = s / n for every t, so each token's loss pulls on all.
                (RatioLevel::Sequence, Surrogate::Clip) => spread += c * policy.slope / n as f64,
                _ => gradient[t] += c * policy.slope,
            }
            let ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp();
            tally.tokens += 1.0;
            tally.ratio_sum += ratio;
            tally.ratio_min = tally.ratio_min.min(ratio);
            tally.ratio_max = tally.ratio_max.max(ratio);
            let token = raw[t].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
            tally.approx_kl += token.exp() - 1.0 - token;
            match policy.bound {
                Bound::None => {}
                Bound::Low => tally.clipped_low += 1.0,
                Bound::High => tally.clipped_high += 1.0,
                Bound::Dual => tally.clipped_dual += 1.0,
            }
        }
        gradient.iter_mut().for_each(|g| *g += spread);

        let in_loss = self.kl_coef != 0.0 && self.kl_in == KlPlace::Loss;
        ensure!(!in_loss || s.reference.is_some(), "a KL in the loss needs reference log-probs, and there are none");
        if let Some(reference) = s.reference {
            for (t, r) in reference.iter().enumerate() {
                let (value, slope) = kl_estimate(self.kl, f64::from(s.new[t]), f64::from(*r));
                tally.kl_tokens += 1.0;
                tally.kl_sum += value;
                if in_loss {
                    tally.kl_loss += weight * self.kl_coef * value;
                    gradient[t] += weight * self.kl_coef * slope;
                }
            }
        }
        if let Some(entropy) = s.entropy {
            let sum: f64 = entropy.iter().map(|e| f64::from(*e)).sum();
            tally.entropy_tokens += n as f64;
            tally.entropy_sum += sum;
            tally.entropy_loss -= self.entropy_coef * weight * sum;
        }
        out.gradient.push(gradient.iter().map(|g| *g as f32).collect());
        if let Some(weights) = &mut out.entropy_weight {
            weights.push(vec![(-self.entropy_coef * weight) as f32; n]);
        }
        Ok(())
    }

    /// The policy term of one token. Slopes are by the log-ratio for `clip` and by the log-prob for the others, which
    /// is the same derivative by `new`.
    fn policy_term(&self, log_ratio: f64, logprob: f64, a: f64) -> Policy {
        let clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
        let ratio = clamped.exp();
        match self.surrogate {
            Surrogate::Reinforce => Policy { value: -a * logprob, slope: -a, bound: Bound::None },
            Surrogate::Cispo => {
                let held = ratio.min(self.ratio_cap);
                let bound = if ratio > self.ratio_cap { Bound::High } else { Bound::None };
                Policy { value: -held * a * logprob, slope: -held * a, bound }
            }
            Surrogate::Clip => {
                let free = -a * ratio;
                let limited = -a * ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high);
                if let Some(c) = self.dual_clip
                    && a < 0.0
                    && free.max(limited) > -a * c
                {
                    return Policy { value: -a * c, slope: 0.0, bound: Bound::Dual };
                }
                if limited > free {
                    let bound = if ratio > 1.0 { Bound::High } else { Bound::Low };
                    return Policy { value: limited, slope: 0.0, bound };
                }
                let slope = if clamped == log_ratio { free } else { 0.0 };
                Policy { value: free, slope, bound: Bound::None }
            }
        }
    }

    /// The share of the loss that one token of `s` has.
    fn token_weight(&self, s: &Sequence, totals: &Totals) -> Result<f64> {
        let (members, group_tokens) = totals
            .groups
            .get(&s.group)
            .copied()
            .context("its group is not in the totals of the step; count all sequences of the step first")?;
        let (b, n) = (totals.sequences as f64, s.new.len() as f64);
        let groups = totals.groups.len() as f64;
        Ok(match self.aggregation {
            Aggregation::TokenMean => 1.0 / totals.tokens as f64,
            Aggregation::SeqMeanTokenSum => 1.0 / b,
            Aggregation::SeqMeanTokenMean => 1.0 / (b * n),
            Aggregation::FixedNorm => 1.0 / (b * self.norm_length.context("objective.norm_length is not set")?),
            Aggregation::GroupTokenMean => 1.0 / (groups * group_tokens as f64),
            Aggregation::GroupMeanTokenMean => 1.0 / (groups * members as f64 * n),
        })
    }

    /// Weights for a sampler that is not the trainer, and the mismatch metrics. `None` when no correction is asked
    /// for. The denominators of the step stay as they are: a masked token counts as a token with loss 0 (as in TRL).
    fn correction_weights(&self, s: &Sequence, tally: &mut Tally) -> Result<Option<Vec<f64>>> {
        ensure!(
            self.correction == Correction::Off || s.sampler.is_some(),
            "correction for the sampler needs its log-probs, and there are none"
        );
        let Some(sampler) = s.sampler else {
            return Ok(None);
        };
        let log: Vec<f64> = s.old.iter().zip(sampler).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        let exp = |x: f64| x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp();
        for x in &log {
            let clamped = x.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
            tally.sampler_tokens += 1.0;
            tally.mismatch_kl += clamped.exp() - 1.0 - clamped;
            tally.mismatch_max = tally.mismatch_max.max(x.abs());
        }
        let mut limited = 0.0;
        let mut truncate = |w: f64| {
            limited += f64::from(u8::from(w > self.correction_cap));
            w.min(self.correction_cap)
        };
        let n = log.len();
        let whole = exp(log.iter().sum());
        let inside = |w: f64| w >= self.correction_floor && w <= self.correction_cap;
        let weights: Vec<f64> = match self.correction {
            Correction::Off => vec![1.0; n],
            Correction::TruncateToken => log.iter().map(|x| truncate(exp(*x))).collect(),
            Correction::TruncateSequence => (0..n).map(|_| truncate(whole)).collect(),
            Correction::MaskToken => log.iter().map(|x| exp(*x)).map(|w| if inside(w) { w } else { 0.0 }).collect(),
            Correction::MaskSequence => vec![if inside(whole) { whole } else { 0.0 }; n],
        };
        if matches!(self.correction, Correction::MaskToken | Correction::MaskSequence) {
            limited = weights.iter().filter(|w| **w == 0.0).count() as f64;
        }
        tally.corrected += limited;
        tally.correction_sum += weights.iter().sum::<f64>();
        Ok((self.correction != Correction::Off).then_some(weights))
    }
}

/// Equal lengths, finite numbers.
fn check(s: &Sequence) -> Result<()> {
    let n = s.new.len();
    let streams = [
        ("new", Some(s.new)),
        ("old", Some(s.old)),
        ("sampler", s.sampler),
        ("reference", s.reference),
        ("entropy", s.entropy),
    ];
    for (name, stream) in streams.into_iter().filter_map(|(name, stream)| Some((name, stream?))) {
        ensure!(stream.len() == n, "{} {name} values for {n} trained tokens", stream.len());
        if let Some(t) = stream.iter().position(|x| !x.is_finite()) {
            anyhow::bail!("the {name} value of trained token {t} is {}, expected a finite number", stream[t]);
        }
    }
    match s.advantage {
        Advantage::One(a) => ensure!(a.is_finite(), "the advantage is {a}, expected a finite number"),
        Advantage::PerToken(a) => {
            ensure!(a.len() == n, "{} advantages for {n} trained tokens", a.len());
            ensure!(a.iter().all(|x| x.is_finite()), "an advantage is not a finite number");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::PRESETS;

    /// Three sequences of two groups, ratios away from every bound of every preset.
    struct Fixture {
        new: Vec<Vec<f32>>,
        old: Vec<Vec<f32>>,
        sampler: Vec<Vec<f32>>,
        reference: Vec<Vec<f32>>,
        advantage: Vec<f64>,
    }

    fn fixture() -> Fixture {
        Fixture {
            new: vec![vec![-0.5, -1.25, -2.0], vec![-0.75], vec![-0.25, -3.0]],
            old: vec![vec![-0.625, -1.0, -2.0625], vec![-1.25], vec![-0.25, -2.5]],
            sampler: vec![vec![-0.5, -1.125, -2.0], vec![-2.5], vec![-0.3125, -2.25]],
            reference: vec![vec![-0.75, -1.5, -1.0], vec![-0.5], vec![-0.375, -2.0]],
            advantage: vec![0.875, -0.5, 1.25],
        }
    }

    impl Fixture {
        fn sequences(&self) -> Vec<Sequence<'_>> {
            (0..3)
                .map(|i| Sequence {
                    group: [4, 4, 9][i],
                    advantage: Advantage::One(self.advantage[i]),
                    masked: false,
                    new: &self.new[i],
                    old: &self.old[i],
                    sampler: Some(&self.sampler[i]),
                    reference: Some(&self.reference[i]),
                    entropy: None,
                })
                .collect()
        }
    }

    fn count(o: &Objective, sequences: &[Sequence]) -> Totals {
        o.totals(sequences.iter().map(|s| (s.group, s.new.len(), s.masked)))
    }

    fn evaluate(o: &Objective, sequences: &[Sequence]) -> Evaluation {
        o.evaluate(sequences, &count(o, sequences)).unwrap()
    }

    fn variants() -> Vec<Objective> {
        let mut out: Vec<Objective> = PRESETS.iter().map(|p| Objective::preset(p).unwrap()).collect();
        let base = Objective::default();
        for aggregation in [
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::FixedNorm,
            Aggregation::GroupTokenMean,
            Aggregation::GroupMeanTokenMean,
        ] {
            out.push(Objective { aggregation, ..base.clone() });
        }
        for correction in
            [Correction::TruncateToken, Correction::TruncateSequence, Correction::MaskToken, Correction::MaskSequence]
        {
            for ratio in [RatioLevel::Token, RatioLevel::Sequence] {
                out.push(Objective { correction, ratio, ..base.clone() });
            }
        }
        out.push(Objective { dual_clip: Some(1.25), ..base.clone() });
        out.push(Objective { ratio: RatioLevel::Sequence, clip_low: 0.5, clip_high: 0.5, ..base.clone() });
        out.push(Objective { kl: super::super::KlKind::K2, kl_coef: 0.5, ..base });
        out.iter_mut().for_each(|o| o.norm_length = Some(16.0));
        out
    }

    /// Central differences of the loss in f64. The inputs are f32, so the step is a power of two that they represent
    /// exactly; 2^-10 leaves a truncation error of about h^2 = 1e-6.
    #[test]
    fn gradients_are_finite_differences() {
        let h = 2f32.powi(-10);
        for o in variants() {
            let mut f = fixture();
            let analytic = evaluate(&o, &f.sequences()).gradient;
            for (i, analytic) in analytic.iter().enumerate() {
                for (t, &found) in analytic.iter().enumerate() {
                    let at = |f: &Fixture| match o.surrogate {
                        // The loss holds the capped ratio fixed: take it from the unmoved point.
                        Surrogate::Cispo => cispo_value(&o, f),
                        _ => evaluate(&o, &f.sequences()).loss,
                    };
                    let x = f.new[i][t];
                    f.new[i][t] = x + h;
                    let up = at(&f);
                    f.new[i][t] = x - h;
                    let down = at(&f);
                    f.new[i][t] = x;
                    let slope = (up - down) / (2.0 * f64::from(h));
                    let found = f64::from(found);
                    assert!((slope - found).abs() < 2e-6, "{o:?}\nsequence {i} token {t}: {found} against {slope}");
                }
            }
        }
    }

    /// CISPO with the ratio of the unmoved fixture: linear in each log-prob.
    fn cispo_value(o: &Objective, moved: &Fixture) -> f64 {
        let still = fixture();
        let mut sum = 0.0;
        for i in 0..3 {
            for t in 0..still.new[i].len() {
                let ratio = f64::from(still.new[i][t] - still.old[i][t]).exp().min(o.ratio_cap);
                sum -= ratio * still.advantage[i] * f64::from(moved.new[i][t]);
            }
        }
        sum / 6.0
    }

    #[test]
    fn splitting_a_step_changes_nothing() {
        for o in variants() {
            let f = fixture();
            let all = f.sequences();
            let totals = count(&o, &all);
            let whole = o.evaluate(&all, &totals).unwrap();
            for cuts in [vec![0..1, 1..3], vec![0..2, 2..3], vec![0..1, 1..2, 2..3]] {
                let parts: Vec<Evaluation> =
                    cuts.iter().map(|c| o.evaluate(&all[c.clone()], &totals).unwrap()).collect();
                let loss: f64 = parts.iter().map(|p| p.loss).sum();
                // The same terms added in another order, in f64.
                assert!((loss - whole.loss).abs() < 1e-14, "{o:?}");
                let gradient: Vec<Vec<f32>> = parts.iter().flat_map(|p| p.gradient.clone()).collect();
                assert_eq!(gradient, whole.gradient);
                let mut tally = Tally::default();
                parts.iter().for_each(|p| tally.merge(&p.tally));
                for ((name, a), (_, b)) in tally.report().iter().zip(whole.tally.report()) {
                    assert!((a - b).abs() < 1e-14, "{name}");
                }
            }
        }
    }

    #[test]
    fn before_the_first_update_the_ratio_is_one_and_the_gradient_the_advantage() {
        let mut f = fixture();
        f.old = f.new.clone();
        f.reference = f.new.clone();
        for o in [Objective::preset("mgpo").unwrap(), Objective::preset("dapo").unwrap()] {
            let e = evaluate(&o, &f.sequences());
            for (row, a) in e.gradient.iter().zip(&f.advantage) {
                assert!(row.iter().all(|g| *g == (-a / 6.0) as f32));
            }
            let report = e.tally.report();
            for entry in [("ratio/mean", 1.0), ("ratio/max", 1.0), ("actor/approx_kl", 0.0), ("actor/pg_clipfrac", 0.0)]
            {
                assert!(report.contains(&entry), "{report:?}");
            }
            // -(3 · 0.875 - 0.5 + 2 · 1.25) / 6
            assert!((e.loss + 4.625 / 6.0).abs() < 1e-15);
        }
    }

    /// One token, ratio 1.5 or 0.5, A = ±1: which of the four cases stop the gradient.
    #[test]
    fn clipping_by_hand() {
        let o = Objective { kl_coef: 0.0, clip_high: 0.28, ..Objective::default() };
        let case = |o: &Objective, ratio: f64, a: f64| {
            let new = [ratio.ln() as f32];
            let s = Sequence {
                group: 0,
                advantage: Advantage::One(a),
                masked: false,
                new: &new,
                old: &[0.0],
                sampler: None,
                reference: None,
                entropy: None,
            };
            let e = evaluate(o, &[s]);
            (e.loss, f64::from(e.gradient[0][0]))
        };
        // The log-ratio is f32, so its exp is good to 1e-7.
        let same = |found: (f64, f64), loss: f64, gradient: f64| {
            assert!((found.0 - loss).abs() < 1e-6 && (found.1 - gradient).abs() < 1e-6, "{found:?}");
        };
        same(case(&o, 1.5, 1.0), -1.28, 0.0);
        same(case(&o, 0.5, 1.0), -0.5, -0.5);
        same(case(&o, 1.5, -1.0), 1.5, 1.5);
        same(case(&o, 0.5, -1.0), 0.8, 0.0);
        let dual = Objective { dual_clip: Some(3.0), ..o.clone() };
        same(case(&dual, 4.0, -1.0), 3.0, 0.0);
        same(case(&dual, 2.0, -1.0), 2.0, 2.0);
        let cispo = Objective { ratio_cap: 2.0, ..Objective::preset("cispo").unwrap() };
        same(case(&cispo, 4.0, 1.0), -2.0 * 4f64.ln(), -2.0);
    }

    /// Token ratios 2 and 0.5: the sequence ratio is 1, so nothing is clipped even at 3e-4, and both tokens pull alike.
    #[test]
    fn gspo_looks_at_the_whole_sequence() {
        let o = Objective::preset("gspo").unwrap();
        let new = [2f32.ln(), -(2f32.ln())];
        let s = Sequence {
            group: 0,
            advantage: Advantage::One(1.0),
            masked: false,
            new: &new,
            old: &[0.0, 0.0],
            sampler: None,
            reference: None,
            entropy: None,
        };
        let e = evaluate(&o, &[s]);
        assert_eq!(e.gradient, [[-0.5, -0.5]]);
        assert!((e.loss + 1.0).abs() < 1e-12);
        let token = Objective { ratio: RatioLevel::Token, ..o };
        assert_eq!(evaluate(&token, &[s]).gradient[0][0], 0.0);
    }

    /// Weights of the three sequences (lengths 3, 1 in group 4 and 2 in group 9) under each aggregation.
    #[test]
    fn aggregation_by_hand() {
        let f = fixture();
        let weights = |aggregation| {
            let o = Objective { aggregation, norm_length: Some(10.0), ..Objective::default() };
            let all = f.sequences();
            let totals = count(&o, &all);
            [0, 1, 2].map(|i| o.token_weight(&all[i], &totals).unwrap())
        };
        let close = |a: [f64; 3], b: [f64; 3]| {
            assert!(a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-15), "{a:?} {b:?}");
        };
        close(weights(Aggregation::TokenMean), [1.0 / 6.0; 3]);
        close(weights(Aggregation::SeqMeanTokenSum), [1.0 / 3.0; 3]);
        close(weights(Aggregation::SeqMeanTokenMean), [1.0 / 9.0, 1.0 / 3.0, 1.0 / 6.0]);
        close(weights(Aggregation::FixedNorm), [1.0 / 30.0; 3]);
        close(weights(Aggregation::GroupTokenMean), [1.0 / 8.0, 1.0 / 8.0, 1.0 / 4.0]);
        close(weights(Aggregation::GroupMeanTokenMean), [1.0 / 12.0, 1.0 / 4.0, 1.0 / 4.0]);
    }

    #[test]
    fn sampler_mismatch_is_weighed_and_reported() {
        let f = fixture();
        let base = Objective { kl_coef: 0.0, ..Objective::default() };
        let plain = evaluate(&base, &f.sequences());
        // Sequence 1: old - sampler = 1.25, w = 3.49, above the cap of 2; its ratio exp(0.5) with A < 0 is not clipped.
        let truncated = evaluate(&Objective { correction: Correction::TruncateToken, ..base.clone() }, &f.sequences());
        assert_eq!(truncated.gradient[1][0], 2.0 * plain.gradient[1][0]);
        let masked = evaluate(&Objective { correction: Correction::MaskToken, ..base.clone() }, &f.sequences());
        assert_eq!(masked.gradient[1][0], 0.0);
        let find = |e: &Evaluation, name: &str| e.tally.report().iter().find(|(n, _)| *n == name).unwrap().1;
        assert_eq!(find(&plain, "mismatch_logprob/max"), 1.25);
        assert_eq!(find(&plain, "correction/mean"), 1.0);
        assert!((find(&truncated, "correction/frac_limited") - 1.0 / 6.0).abs() < 1e-15);
        // Without sampler log-probs a correction is an error, not a silent 1.
        let mut blind = f.sequences();
        blind[0].sampler = None;
        let o = Objective { correction: Correction::TruncateToken, ..base };
        assert!(format!("{:#}", o.evaluate(&blind, &count(&o, &blind)).unwrap_err()).contains("sampler"));
    }

    #[test]
    fn masked_sequences_pull_on_nothing() {
        let f = fixture();
        let mut all = f.sequences();
        all[0].masked = true;
        let o = Objective::default();
        let e = evaluate(&o, &all);
        assert_eq!(e.gradient[0], [0.0; 3]);
        assert_eq!(count(&o, &all).tokens, 3);
        let counted = Objective { masked_in_totals: true, kl_coef: 0.0, ..o };
        assert_eq!(count(&counted, &all).tokens, 6);
        assert_eq!(evaluate(&counted, &all).gradient[0], [0.0; 3]);
    }

    #[test]
    fn an_entropy_bonus_is_a_weight_for_the_head() {
        let f = fixture();
        let mut all = f.sequences();
        let entropy = [1.0, 2.0, 3.0];
        all[0].entropy = Some(&entropy);
        let o = Objective { entropy_coef: 0.06, kl_coef: 0.0, ..Objective::default() };
        let e = evaluate(&o, &all);
        assert_eq!(e.entropy_weight.as_ref().unwrap()[0], [-0.01; 3]);
        assert!((e.tally.entropy_loss + 0.06).abs() < 1e-12);
        let without = evaluate(&Objective { entropy_coef: 0.0, ..o }, &all);
        assert!(without.entropy_weight.is_none());
        assert!((without.loss - 0.06 - e.loss).abs() < 1e-12);
    }

    #[test]
    fn broken_input_is_named() {
        let f = fixture();
        let o = Objective::default();
        let mut all = f.sequences();
        let totals = count(&o, &all);
        all[2].old = &[0.0];
        let message = format!("{:#}", o.evaluate(&all, &totals).unwrap_err());
        assert!(message.contains("sequence 2") && message.contains("1 old values for 2"), "{message}");
        all = f.sequences();
        all[1].new = &[f32::NAN];
        let message = format!("{:#}", o.evaluate(&all, &totals).unwrap_err());
        assert!(message.contains("sequence 1") && message.contains("NaN"), "{message}");
        all = f.sequences();
        all[1].group = 77;
        assert!(format!("{:#}", o.evaluate(&all, &totals).unwrap_err()).contains("totals"));
        all = f.sequences();
        all[0].reference = None;
        assert!(format!("{:#}", o.evaluate(&all, &totals).unwrap_err()).contains("reference"));
    }
}
