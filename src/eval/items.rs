//! What became of each question, row of the table by row of the table: `items.jsonl` of an evaluation, from which rows are compared question
//! by question, within a run and between two.
//!
//! What must stay true: an item is known by its id, its words and its answer together; of each row it has as many answers as were asked for;
//! comparisons are on the questions that both rows were asked, and no others.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::figures::cell;
use crate::data::Sample;
use crate::episode::Episode;
use crate::report::{Cell, Row, Table, Unit};
use crate::stats::{self, Difference, wilson};

/// The file's name in a run folder.
pub const ITEMS: &str = "items.jsonl";

/// A question and its answers.
///
/// ```json
/// {"id": "7", "question": "What number is on the plate?", "answer": "4", "target_area": 0.0006,
///  "right": {"no_tool": [false], "two_turns": [true]}, "crop_necessity": {"two_turns": "only_with"}}
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Item {
    pub id: String,
    pub question: String,
    pub answer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// Share of the picture that the target takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_area: Option<f64>,
    /// By row of the table, whether each answer was right, in the order in which they were given.
    pub right: BTreeMap<String, Vec<bool>>,
    /// The same by the benchmark's published rule, where it has one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub official: BTreeMap<String, Vec<bool>>,
    /// By row that shows a crop: was it needed?
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub crop_necessity: BTreeMap<String, Necessity>,
}

/// Whether a question was answered with a crop and without one. Where it was asked several times, more than half of the answers must be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Necessity {
    /// Right with the crop and wrong without: it was needed.
    OnlyWith,
    /// Wrong with the crop and right without: it did harm.
    OnlyWithout,
    Both,
    Neither,
}

impl Necessity {
    pub fn of(with: bool, without: bool) -> Necessity {
        match (with, without) {
            (true, false) => Necessity::OnlyWith,
            (false, true) => Necessity::OnlyWithout,
            (true, true) => Necessity::Both,
            (false, false) => Necessity::Neither,
        }
    }
}

pub(super) fn mostly(right: &[bool]) -> bool {
    2 * right.iter().filter(|&&right| right).count() > right.len()
}

/// The items of an evaluation as they come in.
#[derive(Clone, Debug, Default)]
pub struct Items {
    pub items: Vec<Item>,
    places: HashMap<(String, String, String), usize>,
}

impl Items {
    /// Takes in the episodes that were played for one row of the table. An episode's group is the place of its row in `samples` and in `areas`;
    /// `official` has the verdict of each episode where there is one.
    pub fn add(
        &mut self,
        name: &str,
        episodes: &[Episode],
        samples: &[Sample],
        areas: &[Option<f64>],
        official: &[Option<bool>],
    ) {
        for (k, episode) in episodes.iter().enumerate() {
            let at = usize::try_from(episode.group).unwrap_or(usize::MAX);
            let Some(sample) = samples.get(at) else { continue };
            let verdict = |right: bool| BTreeMap::from([(name.to_owned(), vec![right])]);
            self.join(Item {
                id: sample.id.clone(),
                question: sample.question.clone(),
                answer: sample.answer.clone(),
                category: sample.task.clone(),
                target_area: areas.get(at).copied().flatten(),
                right: verdict(episode.right()),
                official: official.get(k).copied().flatten().map(verdict).unwrap_or_default(),
                ..Item::default()
            });
        }
    }

    /// Takes in a question with its answers; answers to one that is there are put beside those.
    pub(super) fn join(&mut self, item: Item) {
        let key = (item.id.clone(), item.question.clone(), item.answer.clone());
        match self.places.entry(key) {
            Entry::Vacant(place) => {
                place.insert(self.items.len());
                self.items.push(item);
            }
            Entry::Occupied(place) => {
                let known = &mut self.items[*place.get()];
                for (all, more) in [(&mut known.right, item.right), (&mut known.official, item.official)] {
                    for (row, verdicts) in more {
                        all.entry(row).or_default().extend(verdicts);
                    }
                }
            }
        }
    }

    /// By how much a row is better than another, on the questions that both were asked.
    pub fn difference(&self, first: &str, second: &str) -> Option<Difference> {
        difference(self.items.iter().filter_map(|item| Some((item.right.get(first)?, item.right.get(second)?))))
    }

    /// Classes the questions that were asked both with a crop and without.
    pub fn class(&mut self, with: &str, without: &str) {
        for item in &mut self.items {
            if let (Some(one), Some(other)) = (item.right.get(with), item.right.get(without)) {
                item.crop_necessity.insert(with.to_owned(), Necessity::of(mostly(one), mostly(other)));
            }
        }
    }

    /// How many questions are of each class, for rows that were classed against `without`.
    pub fn necessity(&self, with: &[&str], without: &str) -> Table {
        let row = |name: &&str| {
            let count = |class| self.items.iter().filter(|item| item.crop_necessity.get(*name) == Some(&class)).count();
            let counted = |n: usize| Cell { value: Some(n as f64), ..Cell::default() };
            let (only_with, both) = (count(Necessity::OnlyWith), count(Necessity::Both));
            let mut cells: Vec<Cell> =
                [only_with, count(Necessity::OnlyWithout), both, count(Necessity::Neither)].map(counted).to_vec();
            cells.push(cell((both + only_with > 0).then(|| wilson(both, both + only_with)).as_ref()));
            Row { name: (*name).to_owned(), cells, about: String::new() }
        };
        let plain = Some(Unit::Plain);
        Table {
            title: format!("Was the crop needed? Questions that are right with it, and right under {without}"),
            columns: ["only with", "only without", "both", "neither", "of those right with it, right without"]
                .map(String::from)
                .to_vec(),
            rows: with.iter().map(row).collect(),
            notes: vec![format!(
                "each question's class is in {ITEMS}; of several answers to one, more than half must be right"
            )],
            unit: Some(Unit::Percent),
            units: vec![plain, plain, plain, plain, None],
        }
    }

    /// The lines of the file.
    ///
    /// # Errors
    /// An item that cannot be written as JSON.
    pub fn lines(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for item in &self.items {
            serde_json::to_writer(&mut bytes, item)?;
            bytes.push(b'\n');
        }
        Ok(bytes)
    }
}

/// Of two sets of answers to the same questions, question by question. None without questions, or where their numbers of answers differ from
/// question to question.
pub(super) fn difference<'a>(pairs: impl Iterator<Item = (&'a Vec<bool>, &'a Vec<bool>)>) -> Option<Difference> {
    let pairs: Vec<(&Vec<bool>, &Vec<bool>)> = pairs.collect();
    let (of_first, of_second) = pairs.first().map(|(first, second)| (first.len(), second.len()))?;
    if pairs.iter().any(|(first, second)| (first.len(), second.len()) != (of_first, of_second)) {
        return None;
    }
    let count = |right: &Vec<bool>| right.iter().filter(|&&right| right).count();
    let (first, second): (Vec<usize>, Vec<usize>) = pairs.iter().map(|(a, b)| (count(a), count(b))).unzip();
    (of_first > 0 && of_second > 0).then(|| stats::difference(&first, of_first, &second, of_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(of: &[(&[bool], Option<&[bool]>)]) -> Items {
        let item = |(k, (with, without)): (usize, &(&[bool], Option<&[bool]>))| Item {
            id: k.to_string(),
            right: [("with", Some(*with)), ("without", *without)]
                .into_iter()
                .filter_map(|(name, right)| Some((name.to_owned(), right?.to_vec())))
                .collect(),
            ..Item::default()
        };
        Items { items: of.iter().enumerate().map(item).collect(), places: HashMap::new() }
    }

    #[test]
    fn each_question_is_of_one_class_and_only_those_asked_both_ways_are_counted() {
        let (yes, no): (&[bool], &[bool]) = (&[true], &[false]);
        let mut all =
            items(&[(yes, Some(no)), (yes, Some(no)), (no, Some(yes)), (yes, Some(yes)), (no, Some(no)), (yes, None)]);
        all.class("with", "without");
        let table = all.necessity(&["with"], "without");
        let counts: Vec<Option<f64>> = table.rows[0].cells.iter().map(|cell| cell.value.map(f64::round)).collect();
        assert_eq!(counts, [2.0, 1.0, 1.0, 1.0, 33.0].map(Some));
        assert!(all.items[5].crop_necessity.is_empty());
        let written: Vec<Item> = String::from_utf8(all.lines().unwrap())
            .unwrap()
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(written, all.items);
        assert!(serde_json::to_string(&written[0]).unwrap().contains(r#""crop_necessity":{"with":"only_with"}"#));
        let difference = all.difference("with", "without").unwrap();
        assert_eq!((difference.estimate.value, difference.estimate.n), (0.2, 5));
    }

    #[test]
    fn of_several_answers_more_than_half_must_be_right() {
        let mut all = items(&[(&[true, true, false], Some(&[true, false])), (&[false; 3], Some(&[true, true]))]);
        all.class("with", "without");
        let classes: Vec<Necessity> = all.items.iter().map(|item| item.crop_necessity["with"]).collect();
        assert_eq!(classes, [Necessity::OnlyWith, Necessity::OnlyWithout]);
        // 2/3 - 1/2 and 0 - 1.
        assert!((all.difference("with", "without").unwrap().estimate.value + 5.0 / 12.0).abs() < 1e-12);
        assert!(all.difference("with", "nobody").is_none());
    }
}
