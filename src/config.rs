//! One file = one run. Reads a TOML file and `key=value` overrides into a typed plan.
//!
//! The types stand with the modules that read them; this file only knows how to read. Unknown keys are errors that name
//! the nearest key. There is no inheritance between files; the resolved plan is what the run folder keeps.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A bad configuration; the program ends with exit code 2.
#[derive(Debug)]
pub struct BadConfig(pub String);

impl std::fmt::Display for BadConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadConfig {}

/// Reads `path`, applies overrides such as `optim.lr=3e-5`, and fills a plan.
pub fn load<T: DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        BadConfig(format!(
            "the config file cannot be read ({e}); give the path of a TOML file, for instance one of configs/: {}",
            path.display()
        ))
    })?;
    parse(&text, overrides).with_context(|| format!("in the config {}", path.display()))
}

/// As [`load`], for a command; a config that cannot be read as its own and is another's is sent there.
pub fn load_for<T: DeserializeOwned>(command: &str, path: &Path, overrides: &[String]) -> Result<T> {
    load(path, overrides).map_err(|error| {
        let other = load::<toml::Table>(path, &[]).map_or(command, |sections| command_of(&sections));
        match other == command {
            true => error,
            false => anyhow!(BadConfig(format!("this config is for `foveate {other} {}` ({error:#})", path.display()))),
        }
    })
}

/// The command that a config is for, as its sections say: eval, sft or rl.
pub fn command_of(sections: &toml::Table) -> &'static str {
    let has = |section: &str, key: &str| sections.get(section).and_then(|s| s.get(key)).is_some();
    // A config of sft may have a task too; it counts dialogues, not questions.
    let sft = has("train", "batch") || has("data", "pretrain") || has("data", "reason") || has("data", "snap");
    match (sections.contains_key("tasks"), sft || !sections.contains_key("task")) {
        (true, _) => "eval",
        (false, true) => "sft",
        (false, false) => "rl",
    }
}

/// The same from text.
pub fn parse<T: DeserializeOwned>(text: &str, overrides: &[String]) -> Result<T> {
    let mut table: toml::Table = toml::from_str(text).map_err(|e| BadConfig(e.to_string()))?;
    for item in overrides {
        apply(&mut table, item)?;
    }
    // Through text once more, so that an error can point at the place and serde names the key.
    toml::Value::Table(table).try_into().map_err(|e: toml::de::Error| anyhow!(BadConfig(explain(&e.to_string()))))
}

/// The plan as TOML, every default written out.
pub fn to_toml<T: Serialize>(plan: &T) -> Result<String> {
    toml::to_string_pretty(plan).context("writing the resolved config")
}

fn apply(table: &mut toml::Table, item: &str) -> Result<()> {
    let Some((key, value)) = item.split_once('=') else {
        bail!(BadConfig(format!("`{item}` is not an override; write key=value, for instance optim.lr=3e-5")));
    };
    // A bare word is a string: `task.template=mgpo` needs no quotes.
    let value = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut at = table;
    let parts: Vec<&str> = key.trim().split('.').collect();
    for (i, part) in parts.iter().enumerate() {
        if i + 1 == parts.len() {
            at.insert((*part).to_owned(), value);
            return Ok(());
        }
        at = at
            .entry((*part).to_owned())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| anyhow!(BadConfig(format!("`{key}`: `{part}` is a value, not a section"))))?;
    }
    Ok(())
}

/// Says in a person's words what serde says, and adds the nearest known key to its "unknown field `x`, expected one of `a`, `b`".
pub(crate) fn explain(message: &str) -> String {
    let message = message.trim();
    let section = message.lines().find_map(|l| l.strip_prefix("in `")).and_then(|l| l.strip_suffix('`'));
    let Some((unknown, rest)) = message.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`')) else {
        return missing(message, section)
            .or_else(|| wrong(message, section))
            .unwrap_or_else(|| message.lines().map(str::trim).collect::<Vec<_>>().join(" "));
    };
    let known: Vec<&str> = rest.lines().next().unwrap_or("").split('`').skip(1).step_by(2).collect();
    let nearest = known
        .iter()
        .map(|k| (strsim::jaro_winkler(unknown, k), *k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(score, _)| *score > 0.6);
    let place = section.map(|s| format!(" in [{s}]")).unwrap_or_default();
    match nearest {
        Some((_, near)) => {
            format!("unknown key `{unknown}`{place}; did you mean `{near}`? Known here: {}", known.join(", "))
        }
        None => format!("unknown key `{unknown}`{place}; known here: {}", known.join(", ")),
    }
}

/// Of "missing field `x`".
fn missing(message: &str, section: Option<&str>) -> Option<String> {
    let (key, _) = message.strip_prefix("missing field `")?.split_once('`')?;
    let key = section.map_or(key.to_owned(), |section| format!("{section}.{key}"));
    Some(format!("`{key}` is missing; configs/ has examples with every key"))
}

/// Of "invalid type: integer `3`, expected a string".
fn wrong(message: &str, key: Option<&str>) -> Option<String> {
    let what = message.lines().next()?;
    let what = what.strip_prefix("invalid type: ").or_else(|| what.strip_prefix("invalid value: "))?;
    let (found, expected) = what.split_once(", expected ")?;
    let expected = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "text in quotes",
        "a sequence" => "a list in brackets",
        "a map" => "a section",
        other if other.starts_with("struct ") => "a section",
        other => other,
    };
    Some(format!("`{}` is {found}, expected {expected}", key?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Plan {
        name: String,
        optim: Optim,
    }

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Optim {
        learning_rate: f64,
        betas: [f64; 2],
    }

    impl Default for Optim {
        fn default() -> Optim {
            Optim { learning_rate: 1e-6, betas: [0.9, 0.999] }
        }
    }

    #[test]
    fn overrides_replace_values_and_words_need_no_quotes() {
        let plan: Plan = parse(
            "name = \"a\"\n[optim]\nlearning_rate = 1.0",
            &["name=short".into(), "optim.learning_rate=3e-5".into(), "optim.betas=[0.8,0.9]".into()],
        )
        .unwrap();
        assert_eq!(plan, Plan { name: "short".into(), optim: Optim { learning_rate: 3e-5, betas: [0.8, 0.9] } });
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = parse::<Plan>("name = \"a\"\n[optim]\nlearnin_rate = 1.0", &[]).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("unknown key `learnin_rate`") && text.contains("did you mean `learning_rate`"), "{text}");
        assert!(error.downcast_ref::<BadConfig>().is_some());
    }

    #[test]
    fn a_wrong_type_and_a_bad_override_are_named() {
        let text = format!("{:#}", parse::<Plan>("name = 3\n[optim]", &[]).unwrap_err());
        assert!(text.contains("`name` is integer `3`, expected text in quotes"), "{text}");
        let text = format!("{:#}", parse::<Plan>("name = \"a\"\noptim = 3", &[]).unwrap_err());
        assert!(text.contains("`optim` is integer `3`, expected a section"), "{text}");
        let text = format!("{:#}", parse::<Plan>("[optim]", &[]).unwrap_err());
        assert!(text.contains("`name` is missing"), "{text}");
        let text = format!("{:#}", parse::<Plan>("name = \"a\"\n[optim]", &["lr".into()]).unwrap_err());
        assert!(text.contains("key=value"), "{text}");
        let text = format!("{:#}", parse::<Plan>("name = \"a\"", &["name.x=1".into()]).unwrap_err());
        assert!(text.contains("not a section"), "{text}");
    }

    #[test]
    fn a_config_for_another_command_is_sent_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sft.toml");
        std::fs::write(&path, "[data]\ntrain = \"a\"\n[train]\nbatch = 2\n").unwrap();
        let error = format!("{:#}", load_for::<Plan>("rl", &path, &[]).unwrap_err());
        assert!(error.contains("this config is for `foveate sft") && error.contains("unknown key `data`"), "{error}");
        let error = format!("{:#}", load_for::<Plan>("sft", &path, &[]).unwrap_err());
        assert!(!error.contains("this config is for"), "{error}");
    }

    #[test]
    fn the_resolved_plan_reads_back() {
        let plan = Plan { name: "a".into(), optim: Optim::default() };
        assert_eq!(parse::<Plan>(&to_toml(&plan).unwrap(), &[]).unwrap(), plan);
    }
}
