//! What a run was: the cards at the top of the page, and config and environment at its end.

use super::chart::COLOURS;
use super::html::escape;
use super::load::Run;
use crate::progress;
use crate::run::{CONFIG, ENVIRONMENT};
use serde_json::Value;

/// One card a run: its colour, what it was, how long it took.
pub fn summary(runs: &[(&Run, usize)]) -> String {
    let mut html = String::from("<div class=\"runs\">");
    for (run, colour) in runs {
        html.push_str(&format!(
            "<div class=\"runcard\"><b><i class=\"swatch s{}\"></i>{}</b><dl>",
            colour % COLOURS,
            escape(&run.name)
        ));
        for (name, value) in facts(run) {
            html.push_str(&format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(&name), escape(&value)));
        }
        html.push_str("</dl></div>");
    }
    html + "</div>"
}

fn facts(run: &Run) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
    if let Some(step) = run.metrics.last().and_then(|row| row.get("step")).and_then(Value::as_u64) {
        fact("steps", step.to_string());
    }
    let seconds: f64 = run.metrics.iter().filter_map(|row| row.get("timing_s/step")?.as_f64()).sum();
    if seconds > 0.0 {
        fact("time", progress::duration(seconds));
    }
    if let Some(plan) = run.plan() {
        for key in ["task", "model", "objective", "algorithm", "seed"] {
            if let Some(value) = named(&plan, key) {
                fact(key, value);
            }
        }
    }
    if let Some(environment) = &run.environment {
        let commit = environment.commit.as_deref().map(|commit| format!(" ({})", commit.get(..10).unwrap_or(commit)));
        fact("program", format!("foveate {}{}", environment.version, commit.unwrap_or_default()));
        fact("started", environment.started.replace('T', " ").trim_end_matches('Z').to_owned() + " UTC");
    }
    facts
}

/// A plain value of the config by its key, at the top or one level down.
fn named(config: &toml::Table, key: &str) -> Option<String> {
    let plain = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        _ => None,
    };
    let below = || config.values().filter_map(toml::Value::as_table).find_map(|table| plain(table.get(key)?));
    config.get(key).and_then(plain).or_else(below)
}

/// Config and environment, folded.
pub fn setup(run: &Run) -> String {
    let mut html = String::new();
    if let Some(config) = &run.config {
        html.push_str(&format!(
            "<details><summary>{} <span class=\"quiet\">{CONFIG}</span></summary><pre>{}</pre></details>",
            escape(&run.name),
            escape(config)
        ));
    }
    if let Some(environment) = &run.environment {
        let memory = environment
            .memory
            .map_or_else(|| "unknown".into(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
        let lines = [
            ("command", environment.command.join(" ")),
            ("program", format!("foveate {}", environment.version)),
            ("commit", environment.commit.clone().unwrap_or_else(|| "not recorded".into())),
            ("started", environment.started.clone()),
            ("system", environment.system.clone()),
            ("processor", environment.cpu.clone()),
            ("threads", environment.threads.to_string()),
            ("memory", memory),
        ];
        let rows: String =
            lines.iter().map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(value))).collect();
        html.push_str(&format!(
            "<details><summary>{} <span class=\"quiet\">{ENVIRONMENT}</span></summary><dl class=\"facts\">{rows}</dl></details>",
            escape(&run.name)
        ));
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_values_are_found_one_level_down() {
        let config: toml::Table = "seed = 3\n[model]\npath = 'x'\n[rl]\ntask = 'crop'".parse().unwrap();
        assert_eq!(named(&config, "seed"), Some("3".into()));
        assert_eq!(named(&config, "task"), Some("crop".into()));
        assert_eq!(named(&config, "model"), None);
    }
}
