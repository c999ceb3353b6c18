//! Which runs are one experiment under several seeds: these share a colour and are drawn as a band.
//!
//! Two runs belong together when their configs say the same but for seeds and for where things lie, and their seeds differ. What must
//! stay true: runs that differ in anything that could change what is learnt never share a band.

use super::load::Run;
use std::path::Path;
use toml::{Table, Value};

/// Runs of one experiment, as indices in the order given.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    pub label: String,
    pub members: Vec<usize>,
}

/// The families of the runs, in the order of their first members. A run without a config stands alone.
pub fn families(runs: &[&Run]) -> Vec<Family> {
    let plans: Vec<Option<(Table, Vec<i64>)>> = runs.iter().map(|run| run.plan().map(without_seeds)).collect();
    let mut families: Vec<Family> = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let home = plans[index].as_ref().and_then(|(plan, seeds)| {
            families.iter_mut().find(|family| {
                let same = |&member: &usize| plans[member].as_ref().is_some_and(|(other, _)| other == plan);
                let again = |&member: &usize| plans[member].as_ref().is_some_and(|(_, other)| other == seeds);
                !seeds.is_empty() && family.members.iter().all(same) && !family.members.iter().any(again)
            })
        });
        match home {
            Some(family) => family.members.push(index),
            None => families.push(Family { label: run.name.clone(), members: vec![index] }),
        }
    }
    for family in families.iter_mut().filter(|family| family.members.len() > 1) {
        let ends = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
        let first = ends(&runs[family.members[0]].name);
        let same_end = family.members.iter().all(|&member| ends(&runs[member].name) == first);
        let name = if same_end { first } else { family.label.clone() };
        family.label = format!("{name}, {} seeds", family.members.len());
    }
    families
}

/// A plan without its seeds and with paths told from the folder that holds the run; and the seeds.
fn without_seeds(mut plan: Table) -> (Table, Vec<i64>) {
    let out = ["train", "eval"].iter().find_map(|section| plan.get(*section)?.get("out")?.as_str());
    let beside = out.and_then(|out| Path::new(out).parent()).map(Path::to_owned).unwrap_or_default();
    let mut seeds = Vec::new();
    strip(&mut plan, &beside, &mut seeds);
    (plan, seeds)
}

fn strip(table: &mut Table, beside: &Path, seeds: &mut Vec<i64>) {
    table.retain(|key, value| match (key, &value) {
        ("seed", Value::Integer(seed)) => {
            seeds.push(*seed);
            false
        }
        ("out", _) => false,
        _ => true,
    });
    for (_, value) in table.iter_mut() {
        match value {
            Value::Table(inner) => strip(inner, beside, seeds),
            Value::String(text) if beside.components().next().is_some() => {
                if let Ok(rest) = Path::new(text.as_str()).strip_prefix(beside) {
                    *text = Path::new("..").join(rest).to_string_lossy().into_owned();
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::load::bare;

    fn run(name: &str, config: &str) -> Run {
        Run { config: Some(config.into()), ..bare(name) }
    }

    fn demo(folder: &str, lr: &str, seed: u32) -> Run {
        run(
            &format!("{folder}/mgpo"),
            &format!(
                "[data]\ntrain = '{folder}/data/train.jsonl'\n[optim]\nlr = {lr}\n[train]\nout = '{folder}/mgpo'\nseed = {seed}\n"
            ),
        )
    }

    #[test]
    fn only_runs_that_differ_by_their_seed_are_a_family() {
        let runs = [demo("a", "1.0", 1), demo("b", "1.0", 2), demo("c", "2.0", 3), demo("d", "1.0", 1)];
        let families = families(&runs.iter().collect::<Vec<_>>());
        let members: Vec<&[usize]> = families.iter().map(|family| family.members.as_slice()).collect();
        // The last repeats the first one's seed: a repetition is not a second seed.
        assert_eq!(members, [&[0, 1][..], &[2], &[3]]);
        assert_eq!(families[0].label, "mgpo, 2 seeds");
        assert_eq!(families[1].label, "c/mgpo");
    }

    #[test]
    fn runs_without_a_plan_or_a_seed_stand_alone() {
        let (bare, other) = (run("a", "lr = 1"), run("b", "lr = 1"));
        assert_eq!(families(&[&bare, &other]).len(), 2);
    }
}
