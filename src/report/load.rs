//! A run folder as the page reads it: metrics, tables, config, environment, episodes of training and of held-out questions.
//!
//! Hides what may be missing or damaged: a missing file leaves a gap, an unreadable episode a note. What must stay true: nothing outside of
//! the folder is read but the pictures that episodes name, and of a long run a bounded number of steps.

use super::record::Record;
use super::table::{self, TABLE, Table};
use crate::run::{self, CONFIG, ENVIRONMENT, Environment, METRICS, Metrics};
use crate::table::is_there;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Steps whose episodes are read: enough for early and late, few enough for runs of any length.
const STEPS_READ: usize = 24;

/// Everything the page shows of one run.
pub struct Run {
    pub name: String,
    pub root: PathBuf,
    pub metrics: Vec<Metrics>,
    pub config: Option<String>,
    pub environment: Option<Environment>,
    pub tables: Vec<Table>,
    pub records: Vec<Record>,
    /// The same held-out questions, asked every so many steps.
    pub validation: Vec<Record>,
    /// The steps that have episodes.
    pub steps: Vec<u64>,
    /// What could not be read, said on the page.
    pub notes: Vec<String>,
}

impl Run {
    /// When an episode was played: its step; in an evaluation, whose "steps" are the rows of its table in order, the row's name.
    pub fn when(&self, step: u64) -> String {
        let row = self.tables.first().filter(|table| self.metrics.is_empty() && table.rows.len() == self.steps.len());
        let row = row.and_then(|table| table.rows.get(self.steps.iter().position(|&one| one == step)?));
        row.map_or_else(|| format!("step {step}"), |row| row.name.clone())
    }

    /// The config, where it can be read.
    pub fn plan(&self) -> Option<toml::Table> {
        self.config.as_deref()?.parse().ok()
    }

    /// Where the run wrote itself when it was made: the config's `out`.
    fn made_in(&self) -> Option<PathBuf> {
        let plan = self.plan()?;
        let out = ["train", "eval"].iter().find_map(|section| plan.get(*section)?.get("out")?.as_str());
        out.map(PathBuf::from)
    }

    /// A picture's path as the run wrote it: absolute, relative to the run folder, or relative to where the program was started. If the run was moved
    /// together with what lies beside it, the picture is found there.
    pub fn locate(&self, path: &str) -> PathBuf {
        let inside = self.root.join(path);
        if is_there(&inside) {
            return inside;
        }
        let plain = PathBuf::from(path);
        if is_there(&plain) {
            return plain;
        }
        let beside = || {
            let was_beside = self.made_in()?.parent()?.to_owned();
            let moved = self.root.parent()?.join(plain.strip_prefix(was_beside).ok()?);
            is_there(&moved).then_some(moved)
        };
        beside().unwrap_or(plain)
    }
}

/// The runs that `folders` stand for, each once, with names that tell them apart.
///
/// # Errors
/// When a folder is missing or holds nothing a run leaves, or when its metrics or table are damaged.
pub fn load_all(folders: &[PathBuf]) -> Result<Vec<Run>> {
    let mut roots: Vec<PathBuf> = Vec::new();
    for folder in folders {
        for root in expand(folder)? {
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
    }
    let mut runs = roots.iter().map(|root| load(root)).collect::<Result<Vec<_>>>()?;
    for (run, name) in runs.iter_mut().zip(names(&roots)) {
        run.name = name;
    }
    Ok(runs)
}

/// The shortest ends of the paths that differ: `mgpo`, or `first/mgpo` and `second/mgpo`.
fn names(roots: &[PathBuf]) -> Vec<String> {
    let absolute = |root: &PathBuf| fs::canonicalize(root).unwrap_or_else(|_| root.clone());
    let parts: Vec<Vec<String>> = roots
        .iter()
        .map(|root| {
            let parts = absolute(root);
            let named = parts.components().filter(|part| matches!(part, Component::Normal(_)));
            named.map(|part| part.as_os_str().to_string_lossy().into_owned()).collect()
        })
        .collect();
    let end = |parts: &[String], length: usize| parts[parts.len().saturating_sub(length)..].join("/");
    parts
        .iter()
        .enumerate()
        .map(|(index, own)| {
            let unique = |length: &usize| {
                parts.iter().enumerate().all(|(other, path)| other == index || end(path, *length) != end(own, *length))
            };
            end(own, (1..own.len()).find(unique).unwrap_or(own.len()))
        })
        .collect()
}

/// The folder both paths start with.
pub fn common(a: &Path, b: &Path) -> PathBuf {
    let shared: PathBuf =
        a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(part, _)| part).collect();
    if shared.as_os_str().is_empty() { PathBuf::from(".") } else { shared }
}

/// The folder itself if it holds anything to show, and the runs inside it.
pub fn expand(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut inside: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("opening the run folder: {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| shows(path))
        .collect();
    // Trainings first, evaluations after them.
    inside.sort_by_key(|path| (!path.join(METRICS).is_file(), path.clone()));
    let own = shows(folder);
    if !own && inside.is_empty() {
        bail!(
            "this is not a run folder: it holds no {METRICS}, {CONFIG}, {TABLE} or episodes, nor a folder that does: {}",
            folder.display()
        );
    }
    let mut roots = if own { vec![folder.to_owned()] } else { Vec::new() };
    roots.extend(inside);
    Ok(roots)
}

/// Whether a folder holds anything the page can show.
fn shows(folder: &Path) -> bool {
    run::holds_run(folder) || folder.join(TABLE).is_file()
}

fn load(root: &Path) -> Result<Run> {
    let mut notes = Vec::new();
    let metrics = run::metrics(root)?;
    notes.extend(metrics.note);
    let path = root.join(TABLE);
    let tables = match optional(&path)? {
        Some(text) => {
            table::read_tables(&text).with_context(|| format!("this is not a result table: {}", path.display()))?
        }
        None => Vec::new(),
    };
    let environment = optional(&root.join(ENVIRONMENT))?.and_then(|text| match serde_json::from_str(&text) {
        Ok(environment) => Some(environment),
        Err(error) => {
            notes.push(format!("{ENVIRONMENT} cannot be read: {error}"));
            None
        }
    });
    let steps = run::episode_steps(root)?;
    let records = read_steps(&steps, &mut notes, &|step| run::episodes(root, step));
    let validation = read_steps(&run::validation_steps(root)?, &mut notes, &|step| run::validation(root, step));
    Ok(Run {
        name: String::new(),
        root: root.to_owned(),
        metrics: metrics.rows,
        config: optional(&root.join(CONFIG))?,
        environment,
        tables,
        records,
        validation,
        steps,
        notes,
    })
}

/// The episodes of at most [`STEPS_READ`] of the steps.
fn read_steps(steps: &[u64], notes: &mut Vec<String>, read: &dyn Fn(u64) -> Result<Vec<Value>>) -> Vec<Record> {
    let mut records = Vec::new();
    for index in spread(steps.len(), STEPS_READ) {
        let step = steps[index];
        match read(step) {
            Ok(values) => {
                for (line, value) in values.into_iter().enumerate() {
                    match Record::from_value(value) {
                        Ok(mut record) => {
                            // The file's name is the step, whatever the record says.
                            record.step = step;
                            records.push(record);
                        }
                        Err(error) => notes.push(format!("episode {} of step {step} is left out: {error:#}", line + 1)),
                    }
                }
            }
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
    records
}

/// A file's text, or nothing when there is no such file.
fn optional(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// At most `wanted` of the indices below `count`, at even distances, first and last included.
pub fn spread(count: usize, wanted: usize) -> Vec<usize> {
    if count <= wanted {
        return (0..count).collect();
    }
    (0..wanted).map(|i| i * (count - 1) / (wanted - 1).max(1)).collect()
}

/// A run that holds nothing yet, for tests.
#[cfg(test)]
pub fn bare(name: &str) -> Run {
    Run {
        name: name.into(),
        root: name.into(),
        metrics: vec![],
        config: None,
        environment: None,
        tables: vec![],
        records: vec![],
        validation: vec![],
        steps: vec![],
        notes: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn early_and_late_steps_are_read() {
        assert_eq!(spread(3, 24), [0, 1, 2]);
        assert_eq!(spread(101, 3), [0, 50, 100]);
        assert_eq!(spread(5, 1), [0]);
    }

    #[test]
    fn names_are_as_long_as_they_must_be() {
        let paths = |paths: &[&str]| names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(paths(&["/x/a/mgpo", "/x/a/grpo"]), ["mgpo", "grpo"]);
        assert_eq!(paths(&["/x/a/mgpo", "/x/b/mgpo", "/x/b/eval"]), ["a/mgpo", "b/mgpo", "eval"]);
    }

    /// A demo that was copied to another disk still shows its pictures, which lie beside its runs.
    #[test]
    fn pictures_beside_a_moved_run_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let now = folder.path().join("moved");
        fs::create_dir_all(now.join("data")).unwrap();
        fs::write(now.join("data/a.jpg"), "x").unwrap();
        let run = run::RunFolder::create(now.join("mgpo"), run::Kind::Rl).unwrap();
        run.save(CONFIG, b"[train]\nout = '/gone/demo/mgpo'\n").unwrap();
        run.write_episodes(1, &[serde_json::json!({"id": "q"})]).unwrap();
        let runs = load_all(&[now.join("mgpo")]).unwrap();
        assert_eq!(runs[0].locate("/gone/demo/data/a.jpg"), now.join("data/a.jpg"));
        assert_eq!(runs[0].locate("/gone/demo/data/b.jpg"), PathBuf::from("/gone/demo/data/b.jpg"));
    }
}
