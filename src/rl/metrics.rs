//! What a step was like, under the names that users of verl and TRL know, and the grounding ones.

use std::collections::BTreeMap;

use serde_json::json;

use crate::episode::{BoxOutcome, Episode, Stop};
use crate::eval;
use crate::objective::Tally;
use crate::run::Metrics;

/// The largest distance from 1 of any token's ratio.
pub(super) fn largest_ratio_gap(tally: &Tally) -> Option<f64> {
    let report: BTreeMap<&str, f64> = tally.report().into_iter().collect();
    let far = |key| report.get(key).map(|r| (r - 1.0).abs());
    Some(far("ratio/min")?.max(far("ratio/max")?))
}

/// What the episodes of a step were like, under the names users of verl and TRL know, and the grounding ones.
pub(super) fn count(episodes: &[Episode], metrics: &mut Metrics) {
    let mut put = |key: &str, value: f64| {
        metrics.insert(key.to_owned(), json!(value));
    };
    let n = episodes.len().max(1) as f64;
    let lengths: Vec<f64> = episodes.iter().map(|e| e.stream.sampled_count() as f64).collect();
    put("response_length/mean", eval::average(lengths.iter().copied()));
    put("response_length/max", lengths.iter().copied().fold(0.0, f64::max));
    let cut = episodes.iter().filter(|e| e.stop == Stop::Truncated).count() as f64;
    put("response_length/clip_ratio", cut / n);
    put("prompt_length/mean", eval::average(episodes.iter().map(|e| e.stream.prompt_len() as f64)));
    put(
        "num_turns/mean",
        eval::average(episodes.iter().map(|e| e.turns.iter().filter(|t| t.role == "assistant").count() as f64)),
    );
    let mut parts: BTreeMap<String, f64> = BTreeMap::new();
    for e in episodes {
        for (name, value) in e.parts.iter() {
            *parts.entry(format!("rewards/{name}/mean")).or_default() += value / n;
        }
    }
    for (name, value) in parts {
        put(&name, value);
    }
    let outcomes: Vec<BoxOutcome> = episodes.iter().filter_map(|e| e.turns.iter().find_map(|t| t.outcome)).collect();
    if !outcomes.is_empty() {
        let m = outcomes.len() as f64;
        let mut classes: BTreeMap<String, usize> = BTreeMap::new();
        for o in &outcomes {
            *classes.entry(eval::name_of(o)).or_default() += 1;
        }
        let valid = outcomes.iter().filter(|o| **o == BoxOutcome::Valid).count();
        put("grounding/valid_box", valid as f64 / m);
        for (class, count) in classes {
            put(&format!("box/{class}"), count as f64 / m);
        }
    }
    let held: Vec<bool> = episodes.iter().filter_map(eval::contains_target).collect();
    if !held.is_empty() {
        put("grounding/contains_target", held.iter().filter(|h| **h).count() as f64 / held.len() as f64);
    }
    let areas: Vec<f64> = episodes.iter().filter_map(eval::box_area_share).collect();
    if !areas.is_empty() {
        put("grounding/box_area", eval::average(areas.iter().copied()));
    }
    for stop in [Stop::Answered, Stop::TurnLimit, Stop::Truncated, Stop::OverLong, Stop::InvalidBox] {
        let count = episodes.iter().filter(|e| e.stop == stop).count() as f64;
        put(&format!("stop/{}", eval::name_of(&stop)), count / n);
    }
}
