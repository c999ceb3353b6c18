//! What may differ between the plan a run was begun with and the plan it goes on with.
//!
//! A resumed run promises to be the uninterrupted one bit for bit, which a changed learning rate or another data file would quietly break.
//! Keys that only say how long, how often and with how much memory may change; any other change has to be asked for.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::config::BadConfig;

/// Keys (or sections, with a dot behind) that change nothing in the steps to come.
const FREE: [&str; 27] = [
    "train.out",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.episodes_every",
    "train.tensorboard",
    "eval.",
    "model.weights",
    "model.micro_batch_tokens",
    "model.recompute",
    "model.picture_cache_mib",
    "model.vision_tape_mib",
    "model.check_memory",
    SERVERS[0],
    SERVERS[1],
    "engine.adapters",
    "engine.api_key_env",
    "engine.encoding",
    "engine.max_in_flight",
    "engine.max_request_mib",
    "engine.timeout_s",
    "engine.pause_s",
    "engine.patience_s",
    "engine.max_retries",
    "engine.requests_per_minute",
    "engine.calls",
    "engine.price",
];

/// Free, unless the learning rate falls over all steps or warms up over a share of them.
const STEPS: &str = "train.steps";

/// A run may go on at another server, from a checkpoint of its own; what one server answered is no answer of another. Of several that share the work
/// each answers for all: they are known by the model's name.
const SERVERS: [&str; 2] = ["engine.url", "engine.urls"];

/// The keys of a plan (TOML) that answers hang on, with their values: those that may not change, and the server.
///
/// # Errors
/// It is no TOML.
pub fn of_answers(plan: &str) -> Result<String> {
    // A bad row is not asked: without it the others are the same questions.
    let hangs = |key: &str| (!is_free(key) || key == SERVERS[0]) && key != "data.leave_out_bad";
    let kept = keys(plan)?.into_iter().filter(|(key, _)| hangs(key));
    Ok(kept.map(|(key, value)| format!("{key} = {value}\n")).collect())
}

/// # Errors
/// When `plan` differs from `saved` (both TOML) in a key that is not free to change: names each with both values.
pub(super) fn refuse(saved: &str, plan: &str) -> Result<()> {
    let (before, now) = (keys(saved)?, keys(plan)?);
    let changed: Vec<String> = before
        .keys()
        .chain(now.keys().filter(|key| !before.contains_key(*key)))
        .filter(|key| before.get(*key) != now.get(*key))
        .filter(|key| !is_free(key) || *key == STEPS && rates_follow_steps(&now))
        .map(|key| {
            let value = |side: &BTreeMap<String, String>| side.get(key).cloned().unwrap_or("not set".into());
            format!("{key} was {} and is now {}", value(&before), value(&now))
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    bail!(BadConfig(format!(
        "the run was begun with another plan: {}; put it back, or add --accept-changes to go on with the new one",
        changed.join("; ")
    )))
}

fn is_free(key: &str) -> bool {
    FREE.iter().any(|free| if free.ends_with('.') { key.starts_with(free) } else { key == *free })
}

fn rates_follow_steps(plan: &BTreeMap<String, String>) -> bool {
    let falls = plan.get("optim.schedule").is_some_and(|schedule| schedule != "\"constant\"");
    let warmup = plan.get("optim.warmup").and_then(|warmup| warmup.parse::<f64>().ok()).unwrap_or(0.0);
    falls || (warmup > 0.0 && warmup < 1.0)
}

fn keys(text: &str) -> Result<BTreeMap<String, String>> {
    let mut keys = BTreeMap::new();
    flatten("", &toml::Value::Table(toml::from_str(text).context("the config is damaged")?), &mut keys);
    Ok(keys)
}

/// Every leaf under its dotted name.
fn flatten(name: &str, value: &toml::Value, out: &mut BTreeMap<String, String>) {
    let under = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        toml::Value::Table(table) => table.iter().for_each(|(key, value)| flatten(&under(key), value, out)),
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            items.iter().enumerate().for_each(|(i, value)| flatten(&under(&i.to_string()), value, out));
        }
        leaf => {
            out.insert(name.to_owned(), leaf.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_and_memory_may_change_the_rest_is_named() {
        let before = "[train]\nsteps = 4\nseed = 1\n[model]\npath = \"a\"\nfreeze = [\"vision\"]\n";
        refuse(
            before,
            "[train]\nsteps = 9\nseed = 1\n[model]\npath = \"a\"\nfreeze = [\"vision\"]\n[eval]\nevery = 3\n",
        )
        .unwrap();
        let falling = |steps: u64| format!("[train]\nsteps = {steps}\n[optim]\nschedule = \"linear\"\n");
        let error = refuse(&falling(4), &falling(9)).unwrap_err().to_string();
        assert!(error.contains("train.steps was 4 and is now 9"), "the rate would jump up again: {error}");
        let other = "[train]\nsteps = 4\nseed = 2\n[model]\npath = \"a\"\nfreeze = []\n";
        let error = refuse(before, other).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("train.seed was 1 and is now 2"), "{text}");
        assert!(text.contains("model.freeze was [\"vision\"] and is now []"), "{text}");
        assert!(error.is::<BadConfig>());
    }
}
