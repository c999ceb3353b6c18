//! The figures of an evaluation: what is counted of the episodes of one row of its table, and the tables that show it.
//!
//! What must stay true: every share has its interval, and several answers to one question are one cluster of it; a figure that nothing
//! was asked for is absent, never 0.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::size::{self, Bin};
use crate::data::Sample;
use crate::episode::{BoxOutcome, Episode, Stop};
use crate::report::{Cell, Row, Table, Unit};
use crate::stats::{self, Difference};

/// The figures of one row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub questions: usize,
    pub episodes: usize,
    pub accuracy: stats::Estimate,
    /// Share of first grounding turns whose box holds the target; a bad box holds nothing. None where no row has a target.
    pub containment: Option<stats::Estimate>,
    /// Share of first grounding turns with a usable box.
    pub valid_box: Option<stats::Estimate>,
    /// Accuracy where the box held the target, and where it did not.
    pub accuracy_if_contained: Option<stats::Estimate>,
    pub accuracy_if_not: Option<stats::Estimate>,
    pub boxes: BTreeMap<String, usize>,
    pub stops: BTreeMap<String, usize>,
    pub response_length: f64,
    /// Mean area of the first usable box, as a share of the picture.
    pub box_area: Option<f64>,
    /// For boxes on several pictures: answers that name the right pictures, and the mean IoU. `accuracy` is then the joint one: the
    /// right picture and an IoU of at least 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right_image: Option<stats::Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iou: Option<stats::Estimate>,
}

/// One row of the tables: the figures of all questions, and of those of each kind, where the rows say of which they are.
#[derive(Clone, Debug)]
pub struct Figures {
    pub name: String,
    /// A few words on what it is, or none.
    pub about: String,
    pub all: Summary,
    pub by_task: Vec<(String, Summary)>,
    /// By how much of the picture the target takes, where rows have targets.
    pub by_target_area: Vec<Bin>,
    /// Against another row of the table, question by question.
    pub over: Option<Over>,
}

/// What a row is better by than another, on the questions that both were asked.
#[derive(Clone, Debug, Serialize)]
pub struct Over {
    /// The other row.
    pub row: String,
    #[serde(flatten)]
    pub difference: Difference,
}

impl Figures {
    /// Of the episodes that [`play_all`](super::play_all) returned for these samples. `areas` are the shares of the picture that their targets
    /// take ([`size::target_area`]); without them nothing is told of sizes.
    pub fn of(name: &str, episodes: &[Episode], samples: &[Sample], areas: &[Option<f64>]) -> Figures {
        let mut by_task: Vec<(String, Vec<&Episode>)> = Vec::new();
        for episode in episodes {
            let Some(task) = samples.get(episode.group as usize).and_then(|sample| sample.task.clone()) else {
                continue;
            };
            match by_task.iter_mut().find(|(name, _)| *name == task) {
                Some((_, of_task)) => of_task.push(episode),
                None => by_task.push((task, vec![episode])),
            }
        }
        let by_task = by_task.into_iter().map(|(task, episodes)| (task, summarise(episodes))).collect();
        Figures {
            name: name.to_owned(),
            about: String::new(),
            all: summarise(episodes),
            by_task,
            by_target_area: size::bins(episodes, areas),
            over: None,
        }
    }

    /// Without figures of its boxes: of a control, which changes what is shown for a box and not the box, so that they are those of the row it
    /// is a control of.
    #[must_use]
    pub fn without_boxes(mut self) -> Figures {
        for summary in std::iter::once(&mut self.all).chain(self.by_task.iter_mut().map(|(_, summary)| summary)) {
            (summary.containment, summary.valid_box) = (None, None);
        }
        self
    }
}

/// A box holds a target when at least this share of the target's area lies in it: whole, up to rounding outward.
const HOLDS: f64 = 0.95;

/// Whether the first grounding turn of an episode names a region that contains the target; None without target or grounding.
pub fn contains_target(episode: &Episode) -> Option<bool> {
    let target = episode.targets.first()?;
    episode.turns.iter().find(|t| t.outcome.is_some())?;
    Some(episode.first_box().is_some_and(|b| b.contains_fraction(&target.bbox) >= HOLDS))
}

pub fn summarise<'a>(episodes: impl IntoIterator<Item = &'a Episode>) -> Summary {
    let episodes: &[&Episode] = &episodes.into_iter().collect::<Vec<_>>();
    let share = |items: Vec<(u64, bool)>| (!items.is_empty()).then(|| share_by_question(&items));
    let right = Episode::right;
    let parts = |name: &str| -> Vec<(u64, f64)> {
        episodes.iter().filter_map(|e| Some((e.group, e.parts.get(name)?))).collect()
    };
    let grounded: Vec<(&Episode, BoxOutcome)> =
        episodes.iter().filter_map(|&e| e.turns.iter().find_map(|t| t.outcome).map(|o| (e, o))).collect();
    let held: Vec<(&Episode, bool)> = episodes.iter().filter_map(|&e| contains_target(e).map(|c| (e, c))).collect();
    let mut boxes = BTreeMap::new();
    let mut stops = BTreeMap::new();
    for (_, outcome) in &grounded {
        *boxes.entry(name_of(outcome)).or_insert(0) += 1;
    }
    for e in episodes {
        *stops.entry(name_of::<Stop>(&e.stop)).or_insert(0) += 1;
    }
    let mut questions: Vec<u64> = episodes.iter().map(|e| e.group).collect();
    questions.sort_unstable();
    questions.dedup();
    let areas: Vec<f64> = episodes.iter().copied().filter_map(box_area_share).collect();
    Summary {
        questions: questions.len(),
        episodes: episodes.len(),
        accuracy: share_by_question(&episodes.iter().map(|e| (e.group, right(e))).collect::<Vec<_>>()),
        containment: share(held.iter().map(|(e, c)| (e.group, *c)).collect()),
        valid_box: share(grounded.iter().map(|(e, o)| (e.group, *o == BoxOutcome::Valid)).collect()),
        accuracy_if_contained: share(held.iter().filter(|(_, c)| *c).map(|(e, _)| (e.group, right(e))).collect()),
        accuracy_if_not: share(held.iter().filter(|(_, c)| !*c).map(|(e, _)| (e.group, right(e))).collect()),
        boxes,
        stops,
        response_length: average(episodes.iter().map(|e| e.stream.sampled_count() as f64)),
        box_area: (!areas.is_empty()).then(|| average(areas.iter().copied())),
        // Where several pictures are asked for, the part is their F1; right are only all of them.
        right_image: share(parts("image").into_iter().map(|(question, f1)| (question, f1 > 1.0 - 1e-9)).collect()),
        iou: {
            let (questions, ious): (Vec<u64>, Vec<f64>) = parts("iou").into_iter().unzip();
            (!ious.is_empty()).then(|| {
                let mean = stats::clustered_mean(&ious, &questions);
                // No IoU lies outside.
                stats::Estimate { low: mean.low.max(0.0), high: mean.high.min(1.0), ..mean }
            })
        },
    }
}

/// The mean, 0 of nothing.
pub fn average(values: impl Iterator<Item = f64>) -> f64 {
    stats::mean(&values.collect::<Vec<_>>()).unwrap_or(0.0)
}

/// A share with its interval; answers to one question are not independent, so questions are the clusters.
pub(super) fn share_by_question(items: &[(u64, bool)]) -> stats::Estimate {
    let values: Vec<f64> = items.iter().map(|(_, right)| f64::from(u8::from(*right))).collect();
    let questions: Vec<u64> = items.iter().map(|(question, _)| *question).collect();
    stats::clustered_share(&values, &questions)
}

/// Area of the first usable box as a share of its picture; the first view of an episode is the whole picture.
pub fn box_area_share(episode: &Episode) -> Option<f64> {
    let whole = episode.stream.images.first()?.view.region;
    episode.first_box().map(|b| b.area() / whole.area())
}

/// The snake_case name that serde gives an enum.
pub fn name_of<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// The value in percent with its interval.
pub(super) fn cell(estimate: Option<&stats::Estimate>) -> Cell {
    let Some(e) = estimate else { return Cell::default() };
    let percent = |share: f64| 100.0 * share;
    Cell::from(stats::Estimate { value: percent(e.value), low: percent(e.low), high: percent(e.high), n: e.n })
}

/// What stands in a column of a table.
type Figure = (&'static str, fn(&Summary) -> Option<&stats::Estimate>);

const ANSWERS: &[Figure] = &[
    ("right answers", |s| Some(&s.accuracy)),
    ("box contains the target", |s| s.containment.as_ref()),
    ("box usable", |s| s.valid_box.as_ref()),
];
const BOXES: &[Figure] = &[
    ("right picture and IoU ≥ 0.5", |s| Some(&s.accuracy)),
    ("right picture", |s| s.right_image.as_ref()),
    ("mean IoU", |s| s.iou.as_ref()),
];

fn figures_of<'a>(mut summaries: impl Iterator<Item = &'a Summary>) -> &'static [Figure] {
    if summaries.any(|s| s.iou.is_some()) { BOXES } else { ANSWERS }
}

/// All questions: a row each, the main figures, and what each row is better by than another where that is known.
pub fn table(title: &str, rows: &[Figures], notes: &[String]) -> Table {
    let figures = figures_of(rows.iter().map(|row| &row.all));
    let mut columns: Vec<String> = figures.iter().map(|(heading, _)| (*heading).to_owned()).collect();
    let mut units = Vec::new();
    let compared = rows.iter().find_map(|row| row.over.as_ref());
    if let Some(over) = compared {
        // Those of several tasks are compared each with its own.
        let same = rows.iter().filter_map(|row| row.over.as_ref()).all(|other| other.row == over.row);
        units = vec![None; columns.len()];
        units.extend([Some(Unit::Points), Some(Unit::Plain)]);
        columns.extend([if same { format!("over {}", over.row) } else { "over the first".to_owned() }, "p".to_owned()]);
    }
    let row = |row: &Figures| {
        let mut cells: Vec<Cell> = figures.iter().map(|(_, of)| cell(of(&row.all))).collect();
        if compared.is_some() {
            cells.push(cell(row.over.as_ref().map(|over| &over.difference.estimate)));
            cells.push(Cell { value: row.over.as_ref().map(|over| over.difference.p), ..Cell::default() });
        }
        Row { name: row.name.clone(), cells, about: row.about.clone() }
    };
    Table {
        title: title.to_owned(),
        columns,
        rows: rows.iter().map(row).collect(),
        notes: notes.to_vec(),
        unit: Some(Unit::Percent),
        units,
    }
}

/// Where the questions are of several kinds: each of the main figures by kind.
pub fn tables_by_task(rows: &[Figures]) -> Vec<Table> {
    let mut tasks: Vec<&str> = Vec::new();
    for (task, _) in rows.iter().flat_map(|row| &row.by_task) {
        if !tasks.contains(&task.as_str()) {
            tasks.push(task);
        }
    }
    if tasks.len() < 2 {
        return Vec::new();
    }
    let table = |(heading, of): &Figure| {
        let cell_of = |row: &Figures, task: &str| {
            cell(row.by_task.iter().find(|(name, _)| name == task).and_then(|(_, summary)| of(summary)))
        };
        let rows: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                name: row.name.clone(),
                cells: tasks.iter().map(|task| cell_of(row, task)).collect(),
                about: String::new(),
            })
            .collect();
        let columns = tasks.iter().map(|task| task.replace('_', " ")).collect();
        Table { title: format!("{heading}, by task"), columns, rows, unit: Some(Unit::Percent), ..Table::default() }
    };
    let shown = figures_of(rows.iter().map(|row| &row.all)).iter().map(table);
    // Containment and boxes mean nothing where nobody was asked for a box.
    shown.filter(|table| table.rows.iter().flat_map(|row| &row.cells).any(|cell| cell.value.is_some())).collect()
}

/// The tables for a terminal, on stdout.
pub fn print_tables(tables: &[Table]) {
    for table in tables {
        println!("\n{table}");
    }
}

/// The figures of each row by its name, for programs to read.
pub fn summaries(rows: &[Figures]) -> Value {
    let row = |row: &Figures| {
        let by_task: serde_json::Map<String, Value> = row.by_task.iter().map(|(t, s)| (t.clone(), json!(s))).collect();
        let mut value = json!(row.all);
        if by_task.len() > 1 {
            value["by_task"] = by_task.into();
        }
        if !row.by_target_area.is_empty() {
            value["by_target_area"] = json!(row.by_target_area);
        }
        if let Some(over) = &row.over {
            value["over"] = json!(over);
        }
        (row.name.clone(), value)
    };
    Value::Object(rows.iter().map(row).collect())
}
