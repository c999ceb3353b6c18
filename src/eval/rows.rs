//! Rows that an evaluation cannot ask: counted, named, and the others asked.
//!
//! What must stay true: nothing is left out in silence: every such row stands on stderr, in the notes of the table and in the JSON, with
//! its reason; where not one row can be asked, the evaluation is refused with the first reason.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::data::{Report, Sample};
use crate::progress;
use crate::reward::mig::Truth;
use crate::tasks::Task;

/// A row that was not asked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Unasked {
    /// Its number in the file, or its id in quotes.
    pub row: String,
    /// Where in the row, if it is known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key: String,
    pub reason: String,
    /// The rows of the table whose tasks could not ask it; where there are none, nobody could.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
}

impl Unasked {
    fn by(task: &str, row: &Sample, reason: String) -> Unasked {
        Unasked { row: format!("row {:?}", row.id), key: String::new(), reason, tasks: vec![task.to_owned()] }
    }

    fn line(&self) -> String {
        let tasks = if self.tasks.is_empty() { String::new() } else { self.tasks.join(", ") + ": " };
        let key = if self.key.is_empty() { String::new() } else { format!(", key {:?}", self.key) };
        format!("{tasks}{}{key}: {}", self.row, self.reason)
    }
}

/// Adds `more` to `all`; what several tasks say of one row for one reason becomes one entry.
pub(super) fn add(all: &mut Vec<Unasked>, more: Vec<Unasked>) {
    let name = |one: &Unasked| (one.row.clone(), one.key.clone(), one.reason.clone());
    let places: HashMap<_, usize> = all.iter().enumerate().map(|(k, one)| (name(one), k)).collect();
    for one in more {
        match places.get(&name(&one)) {
            Some(&k) => all[k].tasks.extend(one.tasks),
            None => all.push(one),
        }
    }
}

/// What is wrong with the file.
pub(super) fn bad(report: &Report) -> Vec<Unasked> {
    let of = |problem: &crate::data::Problem| {
        let part = problem.file.as_ref().map(|file| format!("{}, ", file.display())).unwrap_or_default();
        let row = if problem.row == 0 { "the file".to_owned() } else { format!("row {}", problem.row) };
        let (key, reason) = (problem.key.clone(), problem.reason.clone());
        Unasked { row: part + &row, key, reason, tasks: Vec::new() }
    };
    report.problems.iter().map(of).collect()
}

/// Keeps the rows that a task can ask, and tells of the others.
///
/// # Errors
/// It can ask none.
pub(crate) fn keep_askable(
    name: &str,
    task: &dyn Task,
    rows: &mut Arc<Vec<Sample>>,
    file: &Path,
) -> Result<Vec<Unasked>> {
    let (mut unasked, mut first) = (Vec::new(), None);
    let count = rows.len();
    // Most often all can be asked, and then the rows stay shared.
    if rows.iter().all(|row| task.check(row).is_ok()) {
        return Ok(unasked);
    }
    Arc::make_mut(rows).retain(|row| match task.check(row) {
        Ok(()) => true,
        Err(error) => {
            unasked.push(Unasked::by(name, row, format!("{error:#}")));
            first.get_or_insert_with(|| error.context(format!("row {} of {}", row.id, file.display())));
            false
        }
    });
    match first {
        Some(error) if unasked.len() == count => {
            Err(error).with_context(|| format!("no question can be asked for {name}"))
        }
        _ => Ok(unasked),
    }
}

/// Leaves out the rows with pictures that cannot be decoded.
///
/// # Errors
/// None is left.
pub(super) fn leave_out(
    name: &str,
    rows: &mut Arc<Vec<Sample>>,
    truths: &mut Vec<Option<Truth>>,
    damaged: &HashMap<PathBuf, String>,
    file: &Path,
) -> Result<Vec<Unasked>> {
    let reason = |row: &Sample| row.images.iter().find_map(|path| damaged.get(path)).cloned();
    let whole: Vec<bool> = rows.iter().map(|row| reason(row).is_none()).collect();
    let unasked: Vec<Unasked> = rows.iter().filter_map(|row| Some(Unasked::by(name, row, reason(row)?))).collect();
    ensure!(
        whole.contains(&true) || rows.is_empty(),
        anyhow!("no picture can be decoded for {name}: {}: {}", unasked[0].line(), file.display())
    );
    if unasked.is_empty() {
        return Ok(unasked);
    }
    let mut keep = whole.iter();
    // One for each row, or none at all where the rows are of no benchmark with truths.
    if truths.len() == whole.len() {
        truths.retain(|_| keep.next().copied().unwrap_or(true));
    }
    let mut keep = whole.iter();
    Arc::make_mut(rows).retain(|_| keep.next().copied().unwrap_or(true));
    Ok(unasked)
}

/// How many of them are told of in notes and on stderr; the JSON has all.
const SHOWN: usize = 10;

/// For the table, which has so many rows: how many, and the first of them.
pub(super) fn notes(unasked: &[Unasked], tasks: usize) -> Vec<String> {
    if unasked.is_empty() {
        return Vec::new();
    }
    let rows = unasked.iter().map(|one| &one.row).collect::<HashSet<_>>().len();
    let rows = if rows == 1 { "1 row was".to_owned() } else { format!("{rows} rows were") };
    let by_some = unasked.iter().any(|one| !one.tasks.is_empty() && one.tasks.len() < tasks);
    let mut notes = vec![format!("{rows} not asked{}:", if by_some { ", or not by every task" } else { "" })];
    notes.extend(unasked.iter().take(SHOWN).map(Unasked::line));
    if unasked.len() > SHOWN {
        notes.push(format!("and {} more; foveate data check lists them all", unasked.len() - SHOWN));
    }
    notes
}

pub(super) fn say(unasked: &[Unasked], tasks: usize) {
    notes(unasked, tasks).iter().for_each(|note| progress::say(note));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_several_tasks_cannot_ask_is_one_row() {
        let by = |task: &str, row: &str| Unasked {
            row: row.into(),
            key: String::new(),
            reason: "thin".into(),
            tasks: vec![task.into()],
        };
        let torn = |key: &str| Unasked { row: "row 3".into(), key: key.into(), reason: "torn".into(), tasks: vec![] };
        let mut all = vec![torn("images[0]"), torn("images[1]")];
        let lines = ["row 3, key \"images[0]\": torn", "row 3, key \"images[1]\": torn"];
        assert_eq!(notes(&all, 2), [&["1 row was not asked:"], &lines[..]].concat());
        add(&mut all, vec![by("a", "row \"x\"")]);
        add(&mut all, vec![by("b", "row \"x\""), by("b", "row \"y\"")]);
        let more = ["a, b: row \"x\": thin", "b: row \"y\": thin"];
        let heading = ["3 rows were not asked, or not by every task:"];
        assert_eq!(notes(&all, 2), [&heading[..], &lines[..], &more[..]].concat());
        all.pop();
        assert_eq!(notes(&all, 2)[0], "2 rows were not asked:");
    }
}
