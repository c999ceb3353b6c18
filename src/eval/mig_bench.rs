//! MIG-Bench's table: ten tasks and their unweighted mean, by the published rule and by the strict one (spec 3.4).
//!
//! It hides how answers are joined with the published boxes that their rows carry. What must stay true: the two versions of the benchmark
//! never stand in one table; `AVG` is over all ten tasks or is not there; a cell for which there is no rule is empty, never 0.

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::figures::cell;
use crate::data::Sample;
use crate::episode::Episode;
use crate::geometry::{BBox, Size};
use crate::report::{Cell, Row, Table, Unit};
use crate::reward::mig::{self, MIG_BENCH, Said, TASKS, Truth, Verdict, Version};
use crate::stats::{Estimate, clustered_mean, clustered_share};

/// A verdict with what it is counted under.
#[derive(Clone, Debug)]
pub struct Judged {
    pub version: Version,
    /// The benchmark's key.
    pub task: String,
    /// Answers to one question are not independent.
    pub question: u64,
    pub verdict: Verdict,
}

/// What was published for each row; `None` where a row is of another set.
///
/// # Errors
/// Rows of both versions, whose scores must not be averaged; a row that is not as `foveate data convert` writes it.
pub fn truths(rows: &[Sample], file: &Path) -> Result<Vec<Option<Truth>>> {
    let published = |row: &Sample| {
        let truth = row.extra.get(MIG_BENCH).map(Truth::deserialize).transpose();
        let truth = truth.with_context(|| format!("row {}, key {MIG_BENCH:?}: {}", row.id, file.display()))?;
        let known = row.task.as_deref().is_some_and(|task| TASKS.iter().any(|(key, _)| *key == task));
        ensure!(
            truth.is_none() || known,
            "row {}, key \"task\": expected one of {}: {}",
            row.id,
            TASKS.map(|(key, _)| key).join(", "),
            file.display()
        );
        Ok(truth)
    };
    let truths = rows.iter().map(published).collect::<Result<Vec<_>>>()?;
    let mut versions: Vec<Version> = truths.iter().flatten().map(|truth| truth.version).collect();
    versions.sort_unstable();
    versions.dedup();
    ensure!(
        versions.len() < 2,
        "the rows are of both versions of MIG-Bench, whose scores must never share a column; evaluate each by itself: {}",
        file.display()
    );
    Ok(truths)
}

/// Judges what was played. An episode's group is the number of its row.
pub fn judged(episodes: &[Episode], rows: &[Sample], truths: &[Option<Truth>]) -> Vec<Judged> {
    let mut all = Vec::new();
    for episode in episodes {
        let row = usize::try_from(episode.group).unwrap_or(usize::MAX);
        let (Some(sample), Some(Some(truth))) = (rows.get(row), truths.get(row)) else { continue };
        let last = episode.turns.iter().rev().find(|turn| turn.role == "assistant");
        let said = Said {
            // The published rule reads the text; our own boxes, which are read already, are for the strict one.
            official: Said::of_text(last.map_or("", |turn| turn.text.as_str()), truth, false, Some(&shown(episode)))
                .official,
            ..Said::of_pixels(last.and_then(|turn| turn.boxes.as_deref()), &pictures(episode), truth.version)
        };
        all.extend(counted(sample, truth, episode.group, &said));
    }
    all
}

/// The bounds of an episode's pictures, whole: each is shown whole before anything else of it.
fn pictures(episode: &Episode) -> Vec<BBox> {
    let whole = |k: usize| episode.stream.images.iter().find(|placed| placed.view.image == k);
    (0..episode.images.len()).map_while(|k| whole(k).map(|placed| placed.view.region)).collect()
}

/// The sizes in which they were shown.
fn shown(episode: &Episode) -> Vec<Size> {
    let first = |k: usize| episode.stream.images.iter().find(|placed| placed.view.image == k);
    (0..episode.images.len()).map_while(|k| first(k).map(|placed| placed.view.size)).collect()
}

fn counted(sample: &Sample, truth: &Truth, question: u64, said: &Said) -> Vec<Judged> {
    let task = sample.task.clone().unwrap_or_default();
    let judged = |verdict| Judged { version: truth.version, task: task.clone(), question, verdict };
    mig::judge(truth, said).into_iter().map(judged).collect()
}

/// A prediction of another program.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Prediction {
    id: String,
    prediction: String,
    /// For a model that speaks in pixels: the sizes that its pictures had, width and height.
    #[serde(default)]
    shown: Option<Vec<[u32; 2]>>,
}

/// Judges predictions of another program, JSON lines of `{"id", "prediction", "shown"?}`, for the rows of a file. Rows without
/// a prediction count as wrong.
///
/// # Errors
/// A line that is no prediction, names no row or one that was answered already; rows that are not of MIG-Bench.
pub fn predicted(input: impl BufRead, rows: &[Sample], file: &Path, enlarge: bool) -> Result<(Vec<Judged>, usize)> {
    let truths = truths(rows, file)?;
    ensure!(truths.iter().all(Option::is_some), "there are rows that are not of MIG-Bench: {}", file.display());
    let places: HashMap<&str, usize> = rows.iter().enumerate().map(|(i, row)| (row.id.as_str(), i)).collect();
    let mut said = vec![None; rows.len()];
    for (i, line) in input.lines().enumerate() {
        let at = || format!("prediction {}", i + 1);
        let line = line.with_context(at)?;
        if line.trim().is_empty() {
            continue;
        }
        let one: Prediction = serde_json::from_str(&line).with_context(at)?;
        let Some(&row) = places.get(one.id.as_str()) else {
            bail!("{}: there is no row {:?}: {}", at(), one.id, file.display());
        };
        let shown: Option<Vec<Size>> =
            one.shown.map(|all| all.into_iter().map(|[width, height]| Size { width, height }).collect());
        if let Some(shown) = &shown {
            let right = shown.len() == rows[row].images.len() && shown.iter().all(|size| size.area() > 0);
            ensure!(
                right,
                "{}, key \"shown\": expected the width and height of each of {} pictures",
                at(),
                rows[row].images.len()
            );
        }
        ensure!(said[row].is_none(), "{}: row {:?} was answered already", at(), one.id);
        let Some(truth) = &truths[row] else { continue };
        said[row] = Some(Said::of_text(&one.prediction, truth, enlarge, shown.as_deref()));
    }
    let missing = said.iter().filter(|said| said.is_none()).count();
    let all = rows.iter().zip(&truths).zip(said).enumerate().flat_map(|(i, ((row, truth), said))| {
        truth
            .iter()
            .flat_map(|truth| counted(row, truth, i as u64, &said.clone().unwrap_or_default()))
            .collect::<Vec<_>>()
    });
    Ok((all.collect(), missing))
}

/// The table of everything, and where annotations cannot be right one without them. No table of nothing.
pub fn tables(name: &str, judged: &[Judged]) -> Vec<Table> {
    let mut versions: BTreeMap<Version, Vec<&Judged>> = BTreeMap::new();
    for one in judged {
        versions.entry(one.version).or_default().push(one);
    }
    let mut tables = Vec::new();
    for (version, all) in versions {
        let title = format!("MIG-Bench, {} annotations: {name}", version.name());
        let cleaned: Vec<&Judged> = all.iter().filter(|one| !one.verdict.faulty).copied().collect();
        let faulty = all.len() - cleaned.len();
        tables.push(table(title.clone(), &all, format!("{} items", all.len())));
        if faulty > 0 {
            let note = format!("{} items; {faulty} are left out, whose published boxes are impossible", cleaned.len());
            tables.push(table(format!("{title}, cleaned"), &cleaned, note));
        }
    }
    tables
}

/// A figure of a verdict, 0 to 1; `None` where there is none.
type Figure = fn(&Verdict) -> Option<f64>;

fn share(right: bool) -> Option<f64> {
    Some(f64::from(u8::from(right)))
}

const COLUMNS: [(&str, Figure); 6] = [
    ("official Acc@0.5", |v| share(v.official? >= 0.5)),
    ("official Acc@0.7", |v| share(v.official? >= 0.7)),
    ("official Acc@0.3", |v| share(v.official? >= 0.3)),
    ("official mean IoU", |v| v.official),
    ("strict joint@0.5", |v| share(v.joint)),
    ("strict picture", |v| share(v.picture)),
];

fn table(title: String, judged: &[&Judged], note: String) -> Table {
    let of = |key: &str, (column, figure): &(&str, Figure)| -> Option<Estimate> {
        let of_task = judged.iter().filter(|one| one.task == key);
        let (values, questions): (Vec<f64>, Vec<u64>) =
            of_task.filter_map(|one| Some((figure(&one.verdict)?, one.question))).unzip();
        let estimate = if column.ends_with("IoU") { clustered_mean } else { clustered_share };
        (!values.is_empty()).then(|| estimate(&values, &questions))
    };
    let mut rows: Vec<Row> = TASKS
        .iter()
        .map(|(key, name)| Row {
            name: (*name).into(),
            cells: COLUMNS.iter().map(|column| cell(of(key, column).as_ref())).collect(),
            about: String::new(),
        })
        .collect();
    let averages = COLUMNS.iter().map(|column| {
        let figures: Vec<(&str, Estimate)> =
            TASKS.iter().filter_map(|(key, _)| Some((*key, of(key, column)?))).collect();
        let value = mig::average(|key| figures.iter().find(|(k, _)| *k == key).map(|(_, e)| e.value));
        let half =
            figures.iter().map(|(_, e)| ((e.high - e.low) / 2.0).powi(2)).sum::<f64>().sqrt() / TASKS.len() as f64;
        match value {
            Ok(value) => {
                let n = figures.iter().map(|(_, e)| e.n).sum();
                cell(Some(&Estimate { value, low: (value - half).max(0.0), high: (value + half).min(1.0), n }))
            }
            Err(_) => Cell::default(),
        }
    });
    let averages: Vec<Cell> = averages.collect();
    rows.push(Row { name: "AVG".into(), cells: averages, about: "unweighted mean of the ten tasks".into() });
    let mut notes = vec![note];
    let lacks = |column| TASKS.iter().filter(|(key, _)| of(key, column).is_none()).map(|(_, name)| *name).collect();
    notes.extend(gaps(&COLUMNS.iter().map(lacks).collect::<Vec<Vec<&str>>>()));
    Table {
        title,
        columns: COLUMNS.map(|(name, _)| name.to_owned()).to_vec(),
        rows,
        notes,
        unit: Some(Unit::Percent),
        ..Table::default()
    }
}

/// Why cells are empty: `missing` has the tasks without a figure, column by column. The strict columns have one wherever anything was
/// asked.
fn gaps(missing: &[Vec<&str>]) -> Vec<String> {
    let [official, .., strict] = missing else { return Vec::new() };
    let several: Vec<&str> = official.iter().filter(|name| !strict.contains(name)).copied().collect();
    let mut notes = Vec::new();
    if !strict.is_empty() {
        notes.push(format!("no AVG: it is over ten tasks, and nothing was asked of {}", strict.join(", ")));
    }
    if !several.is_empty() {
        notes.push(format!(
            "no official figure where several boxes were asked for at once ({}): the published rule reads one",
            several.join(", ")
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::mig::Item;
    use serde_json::json;

    fn row(id: &str, task: &str, version: Version, items: &[(usize, [f64; 4])]) -> Sample {
        let items = items.iter().map(|&(image, published)| Item { image, published }).collect();
        let mut row = Sample::question(&["1.png".into(), "2.png".into()], "Where?", vec![]);
        (row.id, row.task) = (id.into(), Some(task.into()));
        row.extra.insert(MIG_BENCH.into(), json!(Truth { version, items }));
        row
    }

    const BOX: [f64; 4] = [0.1, 0.2, 0.3, 0.4];
    const RIGHT: &str = r#"<answer>[{\"image\": 2, \"bbox_2d\": [100, 200, 300, 400]}]</answer>"#;

    fn said(id: &str, text: &str) -> String {
        format!("{{\"id\": \"{id}\", \"prediction\": \"{text}\"}}\n")
    }

    fn values(table: &Table, name: &str) -> Vec<Option<f64>> {
        let row = table.rows.iter().find(|row| row.name == name).unwrap();
        row.cells.iter().map(|cell| cell.value.map(|v| (v * 100.0).round() / 100.0)).collect()
    }

    #[test]
    fn the_table_has_ten_tasks_their_mean_and_a_cleaned_twin() {
        let inverted = [0.3, 0.4, 0.1, 0.2];
        let mut rows: Vec<Sample> =
            TASKS.iter().map(|(key, _)| row(key, key, Version::Original, &[(2, BOX)])).collect();
        rows.push(row("upside_down", "common_object", Version::Original, &[(2, inverted)]));
        // Everything right but Region, whose picture is wrong; what is upside down cannot be right.
        let text: String = rows
            .iter()
            .map(|row| said(&row.id, &if row.id == "region" { RIGHT.replace("2, ", "1, ") } else { RIGHT.to_owned() }))
            .collect();
        let (judged, missing) = predicted(text.as_bytes(), &rows, Path::new("rows.jsonl"), false).unwrap();
        let tables = tables("poll", &judged);
        assert_eq!((missing, tables.len()), (0, 2));
        assert_eq!(tables[0].title, "MIG-Bench, original annotations: poll");
        assert_eq!(tables[0].columns[0], "official Acc@0.5");
        let full = |v: f64| Some(v);
        assert_eq!(values(&tables[0], "Static"), [full(100.0); 6]);
        assert_eq!(
            values(&tables[0], "Region")[..4],
            [full(100.0); 4],
            "the published rule never looks at the picture"
        );
        assert_eq!(values(&tables[0], "Region")[4..], [full(0.0); 2]);
        assert_eq!(values(&tables[0], "Common"), [50.0, 50.0, 50.0, 50.0, 50.0, 100.0].map(full));
        assert_eq!(values(&tables[0], "AVG"), [95.0, 95.0, 95.0, 95.0, 85.0, 90.0].map(full));
        assert_eq!(values(&tables[1], "Common"), [full(100.0); 6]);
        assert_eq!(values(&tables[1], "AVG"), [100.0, 100.0, 100.0, 100.0, 90.0, 90.0].map(full));
        assert!(tables[1].notes[0].contains("10 items; 1 are left out"), "{:?}", tables[1].notes);
    }

    #[test]
    fn there_is_no_average_of_fewer_tasks_and_no_official_figure_of_several_boxes() {
        let mut rows: Vec<Sample> = TASKS
            .iter()
            .map(|(key, _)| row(key, key, Version::Revised, &[(2, [100.0, 200.0, 300.0, 400.0])]))
            .collect();
        let table = |rows: &[Sample]| {
            let text: String = rows.iter().map(|row| said(&row.id, RIGHT)).collect();
            let (judged, _) = predicted(text.as_bytes(), rows, Path::new("rows.jsonl"), false).unwrap();
            tables("all", &judged).remove(0)
        };
        assert_eq!(values(&table(&rows), "AVG"), [Some(100.0); 6]);
        let few = table(&rows[..9]);
        assert_eq!((values(&few, "AVG"), values(&few, "Co-Re")), (vec![None; 6], vec![None; 6]));
        assert!(few.notes[1].contains("nothing was asked of Co-Re"), "{:?}", few.notes);
        rows[2] = row(
            "at_once",
            "common_object",
            Version::Revised,
            &[(1, [0.0, 0.0, 9.0, 9.0]), (2, [100.0, 200.0, 300.0, 400.0])],
        );
        let all = table(&rows);
        assert_eq!(values(&all, "Common"), [None, None, None, None, Some(50.0), Some(50.0)]);
        assert_eq!(values(&all, "AVG"), [None, None, None, None, Some(95.0), Some(95.0)]);
        assert!(all.notes[1].contains("at once (Common)"), "{:?}", all.notes);
    }

    #[test]
    fn versions_do_not_mix_and_bad_predictions_are_named() {
        let rows = [
            row("a", "diff", Version::Original, &[(2, BOX)]),
            row("b", "diff", Version::Revised, &[(2, [100.0, 200.0, 300.0, 400.0])]),
        ];
        let error = |rows: &[Sample], text: &str| {
            format!("{:#}", predicted(text.as_bytes(), rows, Path::new("rows.jsonl"), false).unwrap_err())
        };
        assert!(error(&rows, "").contains("never share a column") && error(&rows, "").ends_with("rows.jsonl"));
        let (judged, missing) = predicted(&b""[..], &rows[..1], Path::new("rows.jsonl"), false).unwrap();
        assert_eq!((judged[0].verdict.official, missing), (Some(0.0), 1));
        let good = said("a", RIGHT);
        for (text, words) in [
            (format!("{good}{good}"), "prediction 2: row \"a\" was answered already"),
            (said("z", ""), "prediction 1: there is no row \"z\""),
            ("\n5".into(), "prediction 2"),
            (good.replace('}', ", \"shown\": [[5, 5]]}").replace("]}, \"shown", "], \"shown"), "prediction 1"),
        ] {
            let said = error(&rows[..1], &text);
            assert!(said.contains(words), "{said}");
        }
        let mut other = rows[0].clone();
        other.task = Some("poem".into());
        assert!(error(&[other], "").contains("key \"task\""));
        assert!(error(&[Sample::question(&[], "?", vec![])], "").contains("not of MIG-Bench"));
    }
}
