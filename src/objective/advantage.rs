//! Rewards to advantages, and which groups to keep.
//!
//! It hides the several baselines and the KL that some methods take off the reward. What must stay true: rewards
//! are compared inside their own group only (the batch-normalised kinds aside), masked trajectories get 0, and a
//! group whose rewards are all equal gets exactly 0, not rounding noise divided by a tiny spread.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{Advantage, AdvantageKind, KlPlace, Objective, kl_estimate};

/// What is known of one trajectory when advantages are taken.
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    /// Trajectories of one prompt share this.
    pub group: u64,
    pub reward: f64,
    /// How many of its tokens are trained.
    pub tokens: usize,
    /// Over-long or over-turn: it gets advantage 0.
    pub masked: bool,
    /// Log-probs of its trained tokens under the policy before the update; needed for a KL in the reward only.
    pub old: Option<&'a [f32]>,
    /// The same under the reference model.
    pub reference: Option<&'a [f32]>,
}

impl Outcome<'_> {
    /// An unmasked outcome without log-probs.
    pub fn new(group: u64, reward: f64, tokens: usize) -> Self {
        Outcome { group, reward, tokens, masked: false, old: None, reference: None }
    }
}

/// Advantages of a rollout batch, in the order of its outcomes.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One a trajectory; where tokens differ, the mean over its tokens.
    pub trajectory: Vec<f64>,
    /// Only where tokens of one trajectory differ: batch normalisation with a KL in the reward.
    pub token: Option<Vec<Vec<f64>>>,
    pub groups: usize,
    /// Groups whose (raw) rewards are all equal: nothing can be learnt from them.
    pub zero_spread_groups: usize,
    pub reward_mean: f64,
    /// Mean over groups of the sample standard deviation of rewards (TRL's `reward_std`).
    pub reward_std: f64,
    /// Mean over trajectories of the KL summed over tokens that was taken off the reward; 0 without one.
    pub reward_kl: f64,
}

impl Advantages {
    /// The advantage of trajectory `i`, as [`super::Sequence`] takes it.
    pub fn of(&self, i: usize) -> Option<Advantage<'_>> {
        match &self.token {
            Some(tokens) => tokens.get(i).map(|t| Advantage::PerToken(t)),
            None => self.trajectory.get(i).map(|&a| Advantage::One(a)),
        }
    }

    /// Whether trajectory `i` has an advantage other than 0.
    pub fn moves(&self, i: usize) -> bool {
        match &self.token {
            Some(tokens) => tokens.get(i).is_some_and(|t| t.iter().any(|&a| a != 0.0)),
            None => self.trajectory.get(i).is_some_and(|&a| a != 0.0),
        }
    }

    /// Multiplies each trajectory's advantage by its weight.
    pub fn weigh(&mut self, weights: &[f64]) {
        self.trajectory.iter_mut().zip(weights).for_each(|(a, w)| *a *= w);
        for (tokens, w) in self.token.iter_mut().flatten().zip(weights) {
            tokens.iter_mut().for_each(|a| *a *= w);
        }
    }

    /// Metrics under the names users of verl and TRL know.
    pub fn report(&self) -> Vec<(&'static str, f64)> {
        let (mean, std) = mean_std(&self.trajectory);
        let fold = |f: fn(f64, f64) -> f64| self.trajectory.iter().copied().reduce(f).unwrap_or(0.0);
        vec![
            ("reward/mean", self.reward_mean),
            ("reward_std", self.reward_std),
            ("frac_reward_zero_std", self.zero_spread_groups as f64 / self.groups.max(1) as f64),
            ("reward_kl_penalty", self.reward_kl),
            ("advantage/mean", mean),
            ("advantage/std", std),
            ("advantage/max", fold(f64::max)),
            ("advantage/min", fold(f64::min)),
        ]
    }
}

/// Which trajectories of a batch remain after dynamic sampling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// One a trajectory, the same for all members of a group.
    pub keep: Vec<bool>,
    pub groups: usize,
    pub dropped_groups: usize,
}

/// Mean and sample standard deviation; the latter is 0 for fewer than two values and for equal values.
fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    if values.is_empty() {
        return (0.0, 0.0);
    }
    if values.iter().all(|v| *v == values[0]) {
        return (values[0], 0.0);
    }
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

impl Objective {
    /// Dynamic sampling (DAPO, arXiv 2503.14476; variance gate: MG-Thinker): which groups teach anything. Without
    /// `drop_equal_groups` all are kept. A group of one is dropped: it has no spread.
    pub fn keep_groups(&self, outcomes: &[Outcome]) -> Kept {
        let members = self.members(outcomes);
        let flat = |rows: &Vec<usize>| {
            let rewards: Vec<f64> = rows.iter().map(|&i| outcomes[i].reward).collect();
            mean_std(&rewards).1 <= self.min_spread
        };
        let dropped: Vec<u64> = match self.drop_equal_groups {
            true => members.iter().filter(|(_, rows)| flat(rows)).map(|(group, _)| *group).collect(),
            false => Vec::new(),
        };
        Kept {
            keep: outcomes.iter().map(|o| dropped.binary_search(&o.group).is_err()).collect(),
            groups: members.len(),
            dropped_groups: dropped.len(),
        }
    }

    /// The advantages of a whole rollout batch (groups must be complete; batch statistics are over all given).
    ///
    /// A group of one has no baseline: its advantage is 0 for the group-relative kinds (verl keeps the raw reward).
    /// Errors: a reward that is not finite; a KL in the reward without log-probs.
    ///
    /// ```
    /// use foveate::objective::{Objective, Outcome};
    /// let outcomes: Vec<Outcome> = [1.0, 0.0, 0.0, 1.0].map(|reward| Outcome::new(7, reward, 10)).to_vec();
    /// let advantages = Objective::default().advantages(&outcomes).unwrap();
    /// assert!((advantages.trajectory[0] - 0.8660).abs() < 1e-4);   // 0.5 / 0.5774, the sample std
    /// ```
    pub fn advantages(&self, outcomes: &[Outcome]) -> Result<Advantages> {
        for (i, o) in outcomes.iter().enumerate() {
            ensure!(
                o.reward.is_finite(),
                "taking advantages: trajectory {i} of group {} has reward {}, expected a finite number",
                o.group,
                o.reward
            );
        }
        let members = self.members(outcomes);
        let penalties = match self.kl_coef > 0.0 && self.kl_in == KlPlace::Reward {
            true => Some(self.reward_penalties(outcomes)?),
            false => None,
        };
        let total_penalty = |i: usize| penalties.as_ref().map_or(0.0, |p| p[i].iter().sum::<f64>());
        let shaped: Vec<f64> = outcomes.iter().enumerate().map(|(i, o)| o.reward - total_penalty(i)).collect();

        let mut trajectory = vec![0.0; outcomes.len()];
        let mut token = None;
        match self.advantage {
            AdvantageKind::GroupStd | AdvantageKind::GroupMean | AdvantageKind::Rloo => {
                for (i, o) in outcomes.iter().enumerate() {
                    if o.masked {
                        continue;
                    }
                    let rows = members.get(&o.group).map_or(&[][..], Vec::as_slice);
                    trajectory[i] = self.in_group(shaped[i], rows, &shaped);
                }
            }
            AdvantageKind::BatchNorm | AdvantageKind::BatchNormAfterGroupMean => {
                // A trajectory's return at token t: its reward less the KL of t and all later tokens (gamma 1). The
                // group form works on the whole shaped reward, as verl does.
                let returns: Vec<Vec<f64>> = outcomes
                    .iter()
                    .enumerate()
                    .map(|(i, o)| match (&penalties, self.advantage) {
                        (Some(p), AdvantageKind::BatchNorm) => {
                            let mut rest = o.reward;
                            let mut row: Vec<f64> = p[i]
                                .iter()
                                .rev()
                                .map(|kl| {
                                    rest -= kl;
                                    rest
                                })
                                .collect();
                            row.reverse();
                            row
                        }
                        (_, AdvantageKind::BatchNorm) => vec![shaped[i]; o.tokens],
                        _ => {
                            let rows = members.get(&o.group).map_or(&[][..], Vec::as_slice);
                            let group: Vec<f64> = rows.iter().map(|&j| shaped[j]).collect();
                            let centred = if rows.len() < 2 { 0.0 } else { shaped[i] - mean_std(&group).0 };
                            vec![centred; o.tokens]
                        }
                    })
                    .collect();
                let counted: Vec<f64> = outcomes
                    .iter()
                    .zip(&returns)
                    .filter(|(o, _)| self.masked_in_baseline || !o.masked)
                    .flat_map(|(_, row)| row.iter().copied())
                    .collect();
                let (mean, std) = mean_std(&counted);
                // verl's whitening adds 1e-8 to the variance.
                let scale = if std == 0.0 { 0.0 } else { (std * std + 1e-8).sqrt().recip() };
                let whitened: Vec<Vec<f64>> = outcomes
                    .iter()
                    .zip(returns)
                    .map(|(o, row)| row.iter().map(|r| if o.masked { 0.0 } else { (r - mean) * scale }).collect())
                    .collect();
                for (a, row) in trajectory.iter_mut().zip(&whitened) {
                    *a = row.iter().sum::<f64>() / row.len().max(1) as f64;
                }
                let per_token = self.advantage == AdvantageKind::BatchNorm && penalties.is_some();
                match per_token {
                    true => token = Some(whitened),
                    // All tokens of a row are equal: take the value itself, not a mean of copies of it.
                    false => trajectory = whitened.iter().map(|row| row.first().copied().unwrap_or(0.0)).collect(),
                }
            }
        }

        let raw: Vec<f64> = outcomes.iter().map(|o| o.reward).collect();
        let spreads: Vec<f64> =
            members.values().map(|rows| mean_std(&rows.iter().map(|&i| raw[i]).collect::<Vec<_>>()).1).collect();
        let n = outcomes.len().max(1) as f64;
        Ok(Advantages {
            trajectory,
            token,
            groups: members.len(),
            zero_spread_groups: spreads.iter().filter(|s| **s == 0.0).count(),
            reward_mean: raw.iter().sum::<f64>() / n,
            reward_std: spreads.iter().sum::<f64>() / spreads.len().max(1) as f64,
            reward_kl: (0..outcomes.len()).map(total_penalty).sum::<f64>() / n,
        })
    }

    /// Group → rows that count in its baseline. Every group has an entry, if need be an empty one.
    fn members(&self, outcomes: &[Outcome]) -> BTreeMap<u64, Vec<usize>> {
        let mut members: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (i, o) in outcomes.iter().enumerate() {
            let rows = members.entry(o.group).or_default();
            if self.masked_in_baseline || !o.masked {
                rows.push(i);
            }
        }
        members
    }

    /// The advantage of reward `r` among the rewards of `rows`, of which it is one.
    fn in_group(&self, r: f64, rows: &[usize], rewards: &[f64]) -> f64 {
        let group: Vec<f64> = rows.iter().map(|&j| rewards[j]).collect();
        let (mean, std) = mean_std(&group);
        if std == 0.0 {
            return 0.0;
        }
        let n = group.len() as f64;
        match self.advantage {
            AdvantageKind::GroupStd => (r - mean) / (std + self.adv_eps),
            AdvantageKind::Rloo => r - (mean * n - r) / (n - 1.0),
            AdvantageKind::GroupMean | AdvantageKind::BatchNorm | AdvantageKind::BatchNormAfterGroupMean => r - mean,
        }
    }

    /// `kl_coef * KL(old, reference)` of each trained token.
    fn reward_penalties(&self, outcomes: &[Outcome]) -> Result<Vec<Vec<f64>>> {
        let row = |(i, o): (usize, &Outcome)| {
            let (old, reference) = o.old.zip(o.reference).with_context(|| {
                format!("taking the KL off the reward: trajectory {i} lacks its old or reference log-probs")
            })?;
            ensure!(
                old.len() == o.tokens && reference.len() == o.tokens,
                "taking the KL off the reward: trajectory {i} has {} old and {} reference log-probs, expected {}",
                old.len(),
                reference.len(),
                o.tokens
            );
            let kl = |(a, b): (&f32, &f32)| self.kl_coef * kl_estimate(self.kl, f64::from(*a), f64::from(*b)).0;
            Ok(old.iter().zip(reference).map(kl).collect())
        };
        outcomes.iter().enumerate().map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(rewards: &[f64]) -> Vec<Outcome<'static>> {
        rewards.iter().map(|&r| Outcome::new(1, r, 3)).collect()
    }

    fn advantages(preset: &str, outcomes: &[Outcome]) -> Vec<f64> {
        Objective::preset(preset).unwrap().advantages(outcomes).unwrap().trajectory
    }

    fn close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            // Hand values are written with four decimals.
            assert!((f - e).abs() < 5e-5, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn a_weight_multiplies_what_belongs_to_its_trajectory() {
        let outcomes: Vec<Outcome> = [1.0, 0.0].map(|reward| Outcome::new(7, reward, 2)).to_vec();
        let mut advantages = Objective::default().advantages(&outcomes).unwrap();
        let before = advantages.trajectory.clone();
        advantages.weigh(&[2.0, 0.5]);
        assert_eq!(advantages.trajectory, [2.0 * before[0], 0.5 * before[1]]);
    }

    #[test]
    fn hand_values_of_one_group() {
        let group = outcomes(&[1.0, 0.0, 0.0, 1.0]);
        close(&advantages("mgpo", &group), &[0.8660, -0.8660, -0.8660, 0.8660]);
        close(&advantages("rloo", &group), &[0.6667, -0.6667, -0.6667, 0.6667]);
        close(&advantages("dr_grpo", &group), &[0.5, -0.5, -0.5, 0.5]);
    }

    #[test]
    fn equal_rewards_are_exactly_zero_and_counted() {
        // 0.1 three times: the float mean is not 0.1, so a naive (r - mean) / (std + eps) is not 0.
        let mut batch = outcomes(&[0.1, 0.1, 0.1]);
        batch.extend([1.0, 0.0].map(|r| Outcome::new(2, r, 1)));
        for preset in ["mgpo", "dr_grpo", "rloo", "gspo"] {
            let o = Objective::preset(preset).unwrap();
            let a = o.advantages(&batch).unwrap();
            assert_eq!(a.trajectory[..3], [0.0; 3], "{preset}");
            assert_eq!((a.groups, a.zero_spread_groups), (2, 1));
            assert!(a.report().contains(&("frac_reward_zero_std", 0.5)));
        }
        let kept = Objective::preset("dapo").unwrap().keep_groups(&batch);
        assert_eq!(kept, Kept { keep: vec![false, false, false, true, true], groups: 2, dropped_groups: 1 });
        assert!(Objective::default().keep_groups(&batch).keep.iter().all(|k| *k));
    }

    #[test]
    fn variance_gate_drops_small_spreads() {
        // Sample std of (0.5, 0.54) is 0.0283, of (0, 1) 0.7071.
        let batch: Vec<Outcome> =
            [(1, 0.5), (1, 0.54), (2, 0.0), (2, 1.0)].map(|(g, r)| Outcome::new(g, r, 1)).to_vec();
        let gate = Objective { drop_equal_groups: true, min_spread: 0.05, ..Objective::default() };
        assert_eq!(gate.keep_groups(&batch).keep, [false, false, true, true]);
    }

    #[test]
    fn a_masked_trajectory_gets_zero_and_may_leave_the_baseline() {
        let mut group = outcomes(&[1.0, 0.0, 0.0]);
        group[2].masked = true;
        close(&advantages("dr_grpo", &group), &[0.6667, -0.3333, 0.0]);
        let o = Objective { masked_in_baseline: false, ..Objective::preset("dr_grpo").unwrap() };
        close(&o.advantages(&group).unwrap().trajectory, &[0.5, -0.5, 0.0]);
    }

    /// Tokens 1 and 3 with returns 1 and 0: mean 0.25, sample variance (0.5625 + 3 * 0.0625) / 3 = 0.25.
    #[test]
    fn batch_normalisation_counts_tokens() {
        let batch = [Outcome::new(1, 1.0, 1), Outcome::new(2, 0.0, 3)];
        let o = Objective { kl_coef: 0.0, ..Objective::preset("reinforce++").unwrap() };
        close(&o.advantages(&batch).unwrap().trajectory, &[1.5, -0.5]);
    }

    /// Group means come off first: (1, 0) and (3, 2) both give (0.5, -0.5); sample std of (±0.5, ±0.5) is 0.5774.
    #[test]
    fn group_mean_comes_off_before_batch_normalisation() {
        let batch = [(1, 1.0), (1, 0.0), (2, 3.0), (2, 2.0)].map(|(g, r)| Outcome::new(g, r, 1));
        close(&advantages("reinforce++_baseline", &batch), &[0.8660, -0.8660, 0.8660, -0.8660]);
    }

    #[test]
    fn kl_in_the_reward_is_what_is_left_to_pay() {
        // Coefficient 0.1, k1 of 1 nat for each token: returns 1 - 0.2, 1 - 0.1 | 0, 0 → mean 0.425.
        let (old, reference, same) = ([-1.0f32, -1.0], [-2.0f32, -2.0], [-1.0f32, -1.0]);
        let batch = [
            Outcome { old: Some(&old), reference: Some(&reference), ..Outcome::new(1, 1.0, 2) },
            Outcome { old: Some(&old), reference: Some(&same), ..Outcome::new(2, 0.0, 2) },
        ];
        let o = Objective { kl_coef: 0.1, ..Objective::preset("reinforce++").unwrap() };
        let a = o.advantages(&batch).unwrap();
        let token = a.token.as_ref().unwrap();
        // Sample std of (0.8, 0.9, 0, 0): variance (0.1406 + 0.2256 + 2 * 0.1806) / 3 = 0.2425, std 0.49244.
        close(&token[0], &[0.7615, 0.9646]);
        close(&token[1], &[-0.8630, -0.8630]);
        assert!((a.reward_kl - 0.1).abs() < 1e-12);
        assert!(o.advantages(&outcomes(&[1.0, 0.0])).unwrap_err().to_string().contains("lacks"));
        // Group-relative kinds take the whole penalty off the reward: 1 - 0.2 against 0.
        let rloo = Objective { kl_coef: 0.1, ..Objective::preset("rloo").unwrap() };
        let batch = batch.map(|o| Outcome { group: 1, ..o });
        close(&rloo.advantages(&batch).unwrap().trajectory, &[0.8, -0.8]);
    }

    #[test]
    fn a_reward_that_is_no_number_is_refused() {
        let message = Objective::default().advantages(&outcomes(&[1.0, f64::NAN])).unwrap_err().to_string();
        assert!(message.contains("trajectory 1") && message.contains("NaN"), "{message}");
    }
}
