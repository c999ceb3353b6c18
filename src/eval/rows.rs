//! Rows that an evaluation cannot ask: counted, named, and the others asked.
//!
//! What must stay true: nothing is left out in silence: every such row stands on stderr, in the notes of the table and in the JSON, with
//! its reason; where not one row can be asked, the evaluation is refused with the first reason.

use std::collections::HashMap;
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
pub(super) struct Unasked {
    /// Its number and key in the file, or its id.
    pub row: String,
    pub reason: String,
    /// The row of the table whose task could not ask it; without it, none could.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
}

impl Unasked {
    fn by(task: &str, row: &Sample, reason: String) -> Unasked {
        Unasked { row: row.named(), reason, task: Some(task.to_owned()) }
    }

    fn line(&self) -> String {
        let task = self.task.as_ref().map(|task| format!("{task}, ")).unwrap_or_default();
        format!("{task}{}: {}", self.row, self.reason)
    }
}

/// What is wrong with the file.
pub(super) fn bad(report: &Report) -> Vec<Unasked> {
    let of = |problem: &crate::data::Problem| {
        let part = problem.file.as_ref().map(|file| format!("{}, ", file.display())).unwrap_or_default();
        let key = if problem.key.is_empty() { String::new() } else { format!(", key {:?}", problem.key) };
        let row = if problem.row == 0 { "the file".to_owned() } else { format!("row {}{key}", problem.row) };
        Unasked { row: part + &row, reason: problem.reason.clone(), task: None }
    };
    report.problems.iter().map(of).collect()
}

/// Keeps the rows that a task can ask, and tells of the others.
///
/// # Errors
/// It can ask none.
pub(super) fn keep_askable(
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

/// For the table: how many, and the first of them.
pub(super) fn notes(unasked: &[Unasked]) -> Vec<String> {
    let Some(more) = unasked.len().checked_sub(1) else { return Vec::new() };
    let rows = if more == 0 { "1 row was".to_owned() } else { format!("{} rows were", more + 1) };
    let mut notes = vec![format!("{rows} not asked and counts nowhere:")];
    notes.extend(unasked.iter().take(SHOWN).map(Unasked::line));
    if unasked.len() > SHOWN {
        notes.push(format!("and {} more; foveate data check lists them all", unasked.len() - SHOWN));
    }
    notes
}

pub(super) fn say(unasked: &[Unasked]) {
    notes(unasked).iter().for_each(|note| progress::say(note));
}
