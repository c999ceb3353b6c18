//! Two evaluations of the same rows, question by question: `foveate score --compare A B`.
//!
//! It hides where answers were written down: `items.jsonl` of an evaluation, or the records of its episodes. What must stay true: both were asked
//! the very same questions with the same answers, or nothing is compared; a difference has its interval and its p-value beside it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::figures::cell;
use super::items::{ITEMS, Item, Items, difference, mostly};
use crate::episode;
use crate::report::{Cell, Row, Table, Unit};
use crate::reward::Parts;
use crate::run;
use crate::stats::{Difference, Estimate, clustered_share};

/// One row of two evaluations.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What the row is called in each table.
    pub rows: [String; 2],
    /// Whether answers were judged by the benchmark's published rule instead of the strict one.
    pub official: bool,
    pub all: Line,
    /// By category, where rows have one.
    pub by_category: BTreeMap<String, Line>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub accuracy: [Estimate; 2],
    /// The first less the second.
    pub difference: Difference,
    /// Questions that only one of them mostly answered right.
    pub only: [usize; 2],
}

/// The answers of an evaluation.
struct Answers {
    path: PathBuf,
    items: Vec<Item>,
}

/// Compares two evaluations: run folders, or files of items or of episodes.
///
/// # Errors
/// What cannot be read; no row of the tables in common; questions that differ, with the first of them.
pub fn compare(first: &Path, second: &Path) -> Result<Vec<Comparison>> {
    let (first, second) = (Answers::read(first)?, Answers::read(second)?);
    let mut all = Vec::new();
    for (a, b) in pairs(&first, &second)? {
        for official in [false, true] {
            let (of_a, of_b) = (first.of(&a, official), second.of(&b, official));
            // Not every set has a published rule.
            if !(official && of_a.is_empty() && of_b.is_empty()) {
                all.push(comparison([&a, &b], official, &together(&first, &of_a, &second, &of_b)?)?);
            }
        }
    }
    Ok(all)
}

/// The rows of the two tables that belong together: those of one name, or the only ones.
fn pairs(first: &Answers, second: &Answers) -> Result<Vec<(String, String)>> {
    let (a, b) = (first.rows(), second.rows());
    if let ([a], [b]) = (&a[..], &b[..]) {
        return Ok(vec![(a.clone(), b.clone())]);
    }
    let shared: Vec<(String, String)> =
        a.iter().filter(|name| b.contains(name)).map(|name| (name.clone(), name.clone())).collect();
    ensure!(
        !shared.is_empty(),
        "the two tables have no row in common: {} has {}, and {} has {}; name the episodes of one row instead, for instance {}",
        first.path.display(),
        a.join(", "),
        second.path.display(),
        b.join(", "),
        first.path.join("episodes/0.jsonl").display()
    );
    Ok(shared)
}

type Judged<'a> = BTreeMap<&'a str, (&'a Item, Vec<bool>)>;

impl Answers {
    fn read(path: &Path) -> Result<Answers> {
        let items = match path.is_dir() {
            true if path.join(ITEMS).is_file() => read_lines(&path.join(ITEMS))?,
            true => {
                let steps = run::episode_steps(path)?;
                ensure!(
                    !steps.is_empty() && !path.join(run::METRICS).is_file(),
                    "there is no evaluation in this folder, expected {ITEMS} or the episodes of one: {}",
                    path.display()
                );
                let file = |step: u64| path.join("episodes").join(format!("{step}.jsonl"));
                let read: Vec<Vec<Item>> =
                    steps.into_iter().map(|step| read_lines(&file(step))).collect::<Result<_>>()?;
                join(read.into_iter().flatten())
            }
            false => read_lines(path)?,
        };
        ensure!(!items.is_empty(), "there are no answers: {}", path.display());
        Ok(Answers { path: path.to_owned(), items })
    }

    /// The rows of its table.
    fn rows(&self) -> Vec<String> {
        let mut names: Vec<String> = self.items.iter().flat_map(|item| item.right.keys().cloned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The questions of one row with their verdicts, by id.
    fn of(&self, row: &str, official: bool) -> Judged<'_> {
        let verdicts = |item: &'_ Item| if official { item.official.get(row) } else { item.right.get(row) }.cloned();
        self.items.iter().filter_map(|item| Some((item.id.as_str(), (item, verdicts(item)?)))).collect()
    }
}

/// A line of a file: an item, or an episode with what matters of it.
#[derive(Deserialize)]
struct Written {
    id: String,
    question: String,
    answer: String,
    #[serde(default)]
    category: Option<String>,
    #[serde(default)]
    right: Option<BTreeMap<String, Vec<bool>>>,
    #[serde(default)]
    official: BTreeMap<String, Vec<bool>>,
    #[serde(default)]
    task: Option<String>,
    #[serde(default)]
    rewards: Parts,
    #[serde(default)]
    reward: Option<f64>,
}

/// Reads a file of items or of episodes. Several answers to a question are one item.
fn read_lines(path: &Path) -> Result<Vec<Item>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading answers, items or episodes of an evaluation: {}", path.display()))?;
    let mut items = Vec::new();
    for (k, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("line {} is neither an item nor an episode of an evaluation: {}", k + 1, path.display());
        let Written { id, question, answer, category, right, official, task, rewards, reward } =
            serde_json::from_str(line).with_context(at)?;
        let right = match (right, task, reward) {
            (Some(right), ..) => right,
            (None, Some(task), Some(reward)) => BTreeMap::from([(task, vec![episode::right(&rewards, reward)])]),
            _ => bail!("{}; it has neither \"right\" nor \"task\" and \"reward\"", at()),
        };
        items.push(Item { id, question, answer, category, right, official, ..Item::default() });
    }
    Ok(join(items))
}

/// Puts the answers to each question together.
fn join(items: impl IntoIterator<Item = Item>) -> Vec<Item> {
    let mut joined = Items::default();
    items.into_iter().for_each(|item| joined.join(item));
    joined.items
}

/// A question with the verdicts on both systems' answers to it.
struct Pair<'a> {
    category: Option<&'a str>,
    first: &'a Vec<bool>,
    second: &'a Vec<bool>,
}

/// The questions, in the order of their ids, if they are the same in both.
fn together<'a>(first: &Answers, a: &'a Judged, second: &Answers, b: &'a Judged) -> Result<Vec<Pair<'a>>> {
    let missing = |from: &Judged, of: &Judged| {
        of.keys().filter(|id| !from.contains_key(*id)).map(|id| (*id).to_owned()).collect()
    };
    let said = |only: Vec<String>, answers: &Answers| {
        let more = if only.len() > SHOWN { ", …" } else { "" };
        format!(
            "{} only in {} ({}{more})",
            only.len(),
            answers.path.display(),
            only[..only.len().min(SHOWN)].join(", ")
        )
    };
    let (only_a, only_b): (Vec<String>, Vec<String>) = (missing(b, a), missing(a, b));
    let differ: Vec<String> = [(only_a, first), (only_b, second)]
        .into_iter()
        .filter(|(only, _)| !only.is_empty())
        .map(|(only, answers)| said(only, answers))
        .collect();
    ensure!(
        differ.is_empty(),
        "the two were not asked the same rows: {}; evaluate both on one file with the same data.limit",
        differ.join(" and ")
    );
    let mut pairs = Vec::with_capacity(a.len());
    for (id, (item, one)) in a {
        let (other, two) = &b[id];
        for (what, here, there) in
            [("question", &item.question, &other.question), ("answer", &item.answer, &other.answer)]
        {
            ensure!(
                here == there,
                "row {id} is not the same in both: its {what} is {here:?} in {} and {there:?} in {}; rows, their options' order \
                 (data.shuffle_options) and the way of asking must be one",
                first.path.display(),
                second.path.display()
            );
        }
        pairs.push(Pair { category: item.category.as_deref().or(other.category.as_deref()), first: one, second: two });
    }
    Ok(pairs)
}

/// Ids that an error names.
const SHOWN: usize = 3;

fn comparison(rows: [&str; 2], official: bool, pairs: &[Pair]) -> Result<Comparison> {
    let mut categories: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
    for pair in pairs {
        if let Some(category) = pair.category {
            categories.entry(category).or_default().push(pair);
        }
    }
    let by_category = categories
        .into_iter()
        .map(|(category, of)| Ok((category.to_owned(), line(&of)?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    Ok(Comparison {
        rows: rows.map(str::to_owned),
        official,
        all: line(&pairs.iter().collect::<Vec<_>>())?,
        // One category is all of them.
        by_category: if by_category.len() > 1 { by_category } else { BTreeMap::new() },
    })
}

fn line(pairs: &[&Pair]) -> Result<Line> {
    let share = |first: bool| {
        let answers = |(k, pair): (usize, &&Pair)| {
            let of = if first { pair.first } else { pair.second };
            of.iter().map(|&right| (f64::from(u8::from(right)), k)).collect::<Vec<_>>()
        };
        let (values, questions): (Vec<f64>, Vec<usize>) = pairs.iter().enumerate().flat_map(answers).unzip();
        clustered_share(&values, &questions)
    };
    let only = |first: bool| {
        let alone = |pair: &&&Pair| {
            let (one, other) = (mostly(pair.first), mostly(pair.second));
            one != other && one == first
        };
        pairs.iter().filter(alone).count()
    };
    let difference = difference(pairs.iter().map(|pair| (pair.first, pair.second)));
    Ok(Line {
        accuracy: [share(true), share(false)],
        difference: difference
            .context("some questions have more answers than others, so they are not one evaluation")?,
        only: [only(true), only(false)],
    })
}

/// The tables, one for each comparison. `names` are those of the two evaluations.
pub fn tables(comparisons: &[Comparison], names: [&str; 2]) -> Vec<Table> {
    comparisons.iter().map(|comparison| table(comparison, names)).collect()
}

fn table(comparison: &Comparison, [first, second]: [&str; 2]) -> Table {
    let row = |(name, line): (&str, &Line)| {
        let count = |n: usize| Cell { value: Some(n as f64), ..Cell::default() };
        let Line { accuracy: [one, other], difference, only } = line;
        let cells = vec![
            cell(Some(one)),
            cell(Some(other)),
            cell(Some(&difference.estimate)),
            Cell { value: Some(difference.p), ..Cell::default() },
            count(only[0]),
            count(only[1]),
        ];
        Row { name: format!("{name} ({})", difference.estimate.n), cells, about: String::new() }
    };
    let [a, b] = &comparison.rows;
    let what = if a == b { a.clone() } else { format!("{a} and {b}") };
    let rule = if comparison.official { "official rule" } else { "strict rule" };
    let plain = Some(Unit::Plain);
    let lines = std::iter::once(("all", &comparison.all));
    Table {
        title: format!("{first} against {second}: {what}, {rule}"),
        columns: [first, second, "first less second", "p", "only the first right", "only the second"].map(String::from).to_vec(),
        rows: lines.chain(comparison.by_category.iter().map(|(name, line)| (name.as_str(), line))).map(row).collect(),
        notes: vec![
            "in brackets: questions; 95 % intervals; p: McNemar's exact test, or the sign-flip test where a question has several answers"
                .to_owned(),
        ],
        unit: Some(Unit::Percent),
        units: vec![None, None, Some(Unit::Points), plain, plain, plain],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A folder with an evaluation of `right` answers to question 0, 1, …
    fn evaluation(row: &str, right: &[bool], category: impl Fn(usize) -> &'static str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let line = |(k, right): (usize, &bool)| {
            json!({"id": k.to_string(), "question": format!("{k}?"), "answer": "A", "category": category(k), "right": {row: [right]}}).to_string()
        };
        let lines: Vec<String> = right.iter().enumerate().map(line).collect();
        std::fs::write(folder.path().join(ITEMS), lines.join("\n")).unwrap();
        folder
    }

    #[test]
    fn rows_are_compared_question_by_question_and_by_category() {
        let first = evaluation("look", &[true, true, true, false], |k| if k < 2 { "x" } else { "y" });
        let second = evaluation("look", &[false, true, false, true], |_| "x");
        let all = compare(first.path(), second.path()).unwrap();
        let [one] = &all[..] else { panic!("{all:?}") };
        assert_eq!((one.all.difference.estimate.value, one.all.only), (0.25, [2, 1]));
        assert_eq!(one.all.difference.p, 1.0);
        assert_eq!((one.all.accuracy[0].value, one.all.accuracy[1].value), (0.75, 0.5));
        assert_eq!(one.by_category["y"].only, [1, 1]);
        let text = tables(&all, ["a", "b"])[0].to_string();
        assert!(text.contains("a against b: look, strict rule") && text.contains("+25.0 ("), "{text}");
        // An evaluation of one row is compared with another of one row, whatever they are called.
        let other = evaluation("glance", &[false; 4], |_| "x");
        assert_eq!(compare(first.path(), other.path()).unwrap()[0].rows, ["look", "glance"]);
    }

    #[test]
    fn what_was_not_asked_alike_is_not_compared() {
        let first = evaluation("look", &[true; 5], |_| "x");
        let fails = |folder: &tempfile::TempDir| format!("{:#}", compare(first.path(), folder.path()).unwrap_err());
        let said = fails(&evaluation("look", &[true; 3], |_| "x"));
        assert!(said.contains("2 only in") && said.contains("(3, 4)") && said.contains("data.limit"), "{said}");
        let other = evaluation("look", &[true; 5], |_| "x");
        let file = other.path().join(ITEMS);
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replacen("\"answer\":\"A\"", "\"answer\":\"B\"", 1)).unwrap();
        let said = fails(&other);
        assert!(said.contains("row 0") && said.contains("\"A\"") && said.contains("shuffle_options"), "{said}");
        std::fs::write(&file, format!("{text}\n{{\"id\": 3}}")).unwrap();
        let said = fails(&other);
        assert!(said.contains("line 6") && said.contains(ITEMS), "{said}");
        let empty = tempfile::tempdir().unwrap();
        assert!(fails(&empty).contains("no evaluation in this folder"));
    }

    #[test]
    fn episodes_are_answers_too_and_several_of_one_question_are_one_item() {
        let folder = tempfile::tempdir().unwrap();
        let line = |id: &str, task: &str, right: f64| {
            json!({"id": id, "question": "?", "answer": "7", "task": task, "rewards": {"accuracy": right}, "reward": right, "turns": []})
                .to_string()
        };
        let write = |name: &str, right: [f64; 4]| {
            let lines: Vec<String> =
                right.iter().enumerate().map(|(k, right)| line(["a", "b"][k / 2], name, *right)).collect();
            let file = folder.path().join(format!("{name}.jsonl"));
            std::fs::write(&file, lines.join("\n")).unwrap();
            file
        };
        let all = compare(&write("one", [1.0, 0.0, 1.0, 1.0]), &write("two", [0.0; 4])).unwrap();
        let line = &all[0].all;
        assert_eq!((line.accuracy[0].n, line.difference.estimate.n, line.difference.estimate.value), (4, 2, 0.75));
        assert_eq!(line.only, [1, 0], "half of its answers is not most of them");
    }
}
