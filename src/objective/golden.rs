//! Holds this module against verl 0.9.1: tests/golden/objective.py wrote the numbers, in f64.

use serde_json::Value;

use super::*;

struct Golden(Value);

impl Golden {
    fn read() -> Golden {
        Golden(serde_json::from_str(include_str!("../../tests/golden/objective.json")).unwrap())
    }

    fn f64s(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    fn rows(value: &Value) -> Vec<Vec<f64>> {
        value.as_array().unwrap().iter().map(Golden::f64s).collect()
    }

    fn logprobs(&self, name: &str) -> Vec<Vec<f32>> {
        Golden::rows(&self.0[name]).iter().map(|row| row.iter().map(|x| *x as f32).collect()).collect()
    }
}

fn close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= tolerance, "{what}: {found:?} against {expected:?}");
    }
}

#[test]
fn advantages_are_verls() {
    let golden = Golden::read();
    let (old, reference) = (golden.logprobs("old"), golden.logprobs("reference"));
    let (groups, rewards) = (Golden::f64s(&golden.0["groups"]), Golden::f64s(&golden.0["rewards"]));
    let outcomes: Vec<Outcome> = (0..6)
        .map(|i| Outcome {
            old: Some(&old[i]),
            reference: Some(&reference[i]),
            ..Outcome::new(groups[i] as u64, rewards[i], old[i].len())
        })
        .collect();
    let plain = |advantage| Objective { advantage, ..Objective::default() };
    let penalised = |advantage| Objective { kl: KlKind::K1, kl_in: KlPlace::Reward, kl_coef: 0.1, ..plain(advantage) };
    for (name, objective) in [
        ("group_std", plain(AdvantageKind::GroupStd)),
        ("group_mean", plain(AdvantageKind::GroupMean)),
        ("rloo", plain(AdvantageKind::Rloo)),
        ("batch_norm", plain(AdvantageKind::BatchNorm)),
        ("batch_norm_after_group_mean", plain(AdvantageKind::BatchNormAfterGroupMean)),
        ("group_std, kl in reward", penalised(AdvantageKind::GroupStd)),
        ("batch_norm, kl in reward", penalised(AdvantageKind::BatchNorm)),
    ] {
        let found = objective.advantages(&outcomes).unwrap();
        for (i, row) in Golden::rows(&golden.0["advantages"][name]).iter().enumerate() {
            let ours: Vec<f64> = (0..row.len())
                .map(|t| match found.of(i).unwrap() {
                    Advantage::One(a) => a,
                    Advantage::PerToken(a) => a[t],
                })
                .collect();
            // Both in f64; verl's means over a mask divide by (count + 1e-8), which shows at the ninth digit.
            close(&ours, row, 5e-8, name);
        }
    }
}

#[test]
fn losses_and_gradients_are_verls() {
    let golden = Golden::read();
    let [new, old, reference, sampler] = ["new", "old", "reference", "sampler"].map(|n| golden.logprobs(n));
    let groups = Golden::f64s(&golden.0["groups"]);
    let advantages = Golden::rows(&golden.0["advantages"]["group_std"]);
    let sequences = |with_advantage: bool| -> Vec<Sequence> {
        (0..6)
            .map(|i| Sequence {
                group: groups[i] as u64,
                advantage: Advantage::One(if with_advantage { advantages[i][0] } else { 0.0 }),
                masked: false,
                new: &new[i],
                old: &old[i],
                sampler: Some(&sampler[i]),
                reference: Some(&reference[i]),
                entropy: None,
            })
            .collect()
    };
    let compare = |name: &str, expected: &Value, objective: &Objective, with_advantage: bool| {
        let sequences = sequences(with_advantage);
        let totals = objective.totals(sequences.iter().map(|s| (s.group, s.new.len(), false)));
        let found = objective.evaluate(&sequences, &totals).unwrap();
        // Inputs are exact in f32; ten digits were written, and 1e-8 is added to a count in verl's means.
        close(&[found.loss], &[expected["loss"].as_f64().unwrap()], 1e-8, name);
        for (row, theirs) in found.gradient.iter().zip(Golden::rows(&expected["gradient"])) {
            let row: Vec<f64> = row.iter().map(|g| f64::from(*g)).collect();
            // Ours are rounded to f32: half a unit in the last place of numbers up to 4.
            close(&row, &theirs, 2.5e-7, name);
        }
        found
    };

    let no_kl = Objective { kl_coef: 0.0, clip_high: 0.28, ..Objective::default() };
    let dual = Objective { dual_clip: Some(3.0), ..no_kl.clone() };
    let losses = &golden.0["losses"];
    for (name, aggregation) in [
        ("clip token-mean", Aggregation::TokenMean),
        ("clip seq-mean-token-sum", Aggregation::SeqMeanTokenSum),
        ("clip seq-mean-token-mean", Aggregation::SeqMeanTokenMean),
        // verl takes the padded length as the constant where none is given: 5 here.
        ("clip seq-mean-token-sum-norm", Aggregation::FixedNorm),
    ] {
        let objective = Objective { aggregation, norm_length: Some(5.0), ..dual.clone() };
        let found = compare(name, &losses[name], &objective, true);
        let report = found.tally.report();
        let metric = |name: &str| report.iter().find(|(n, _)| *n == name).unwrap().1;
        // verl's fraction counts what either bound stopped, here 1e-8 of a count off.
        let verl = |key: &str| losses[name][key].as_f64().unwrap();
        assert!((metric("actor/pg_clipfrac") - verl("actor/pg_clipfrac")).abs() < 1e-8);
        assert!((metric("actor/pg_clipfrac_dual") - verl("actor/pg_clipfrac_lower")).abs() < 1e-8);
        assert!(metric("actor/pg_clipfrac_dual") > 0.0, "the fixture must reach the dual clip");
    }
    let truncated = Objective { correction: Correction::TruncateToken, ..dual };
    compare("clip truncated", &losses["clip truncated"], &truncated, true);
    let gspo = Objective { clip_low: 0.1, clip_high: 0.15, ..Objective::preset("gspo").unwrap() };
    compare("gspo", &losses["gspo"], &gspo, true);
    let cispo = Objective { ratio_cap: 1.25, ..Objective::preset("cispo").unwrap() };
    compare("cispo", &losses["cispo"], &cispo, true);

    for (name, kl) in [("k1", KlKind::K1), ("k2", KlKind::K2), ("k3", KlKind::K3), ("k3+", KlKind::K3K2)] {
        let only_kl = Objective { kl, kl_coef: 1.0, ..Objective::default() };
        compare(name, &golden.0["kl"][name], &only_kl, false);
    }
}
