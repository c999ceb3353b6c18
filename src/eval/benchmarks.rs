//! Tables of benchmarks whose rows were read as published: by the benchmark's own rule and by the strict one, by category (spec 3).
//!
//! It hides which rule belongs to which set and how its authors average. What must stay true: an official figure is only there where
//! a rule was published for the set; the mean over questions and the mean over categories stand in rows of their own, named, for they
//! differ by points and are often confused (spec 1.12); answers to one question are one cluster of an interval, whatever the order of
//! its options.

use std::collections::BTreeMap;

use super::figures::cell;
use crate::chat::Convention;
use crate::data::{Format, Published, Sample, Target};
use crate::episode::Episode;
use crate::geometry::{Size, View};
use crate::report::{Row, Table, Unit};
use crate::reward::{Official, tree_bench_boxes, tree_bench_iou};
use crate::stats::{Estimate, clustered_mean, clustered_share};

/// The published rule for rows of a format.
fn rule_of(format: Format) -> Option<Official> {
    match format {
        Format::Vstar | Format::VstarFolder => Some(Official::VStar),
        Format::MmeRealworld | Format::MmeRealworldTable => Some(Official::MmeRealWorld),
        Format::HrBench | Format::OptionsTable => Some(Official::HrBench),
        Format::TreeBench => Some(Official::TreeBench),
        Format::Pope => Some(Official::Pope),
        Format::Counting | Format::Fsc147 => Some(Official::Counting),
        // Judged by a language model, by boxes, or not a benchmark.
        Format::VisualProbe
        | Format::ZoomBench
        | Format::Vqa
        | Format::Refcoco
        | Format::VlmR1
        | Format::Coco
        | Format::Own
        | Format::Verl
        | Format::Trl
        | Format::Sharegpt => None,
    }
}

/// An answer, judged by both rules.
struct Judged {
    published: Published,
    /// The question, whatever the order of its options.
    question: String,
    official: bool,
    strict: bool,
    /// What the official rule read, for figures of yes and no.
    read: Option<String>,
    /// How well its boxes meet the targets, officially and strictly (TreeBench).
    iou: Option<[Option<f64>; 2]>,
}

/// Judges an episode, whose group is the number of its row; none of a row that is of no benchmark with a published rule.
fn judged(episode: &Episode, rows: &[Sample], convention: Convention) -> Option<(Format, Judged)> {
    let row = rows.get(usize::try_from(episode.group).ok()?)?;
    let published = Published::of_row(row)?;
    let format = Format::named(&published.name).ok()?;
    let rule = rule_of(format)?;
    // As they were shown, with their letters.
    let choices: Vec<String> =
        row.choices.iter().zip('A'..='Z').map(|(choice, letter)| format!("({letter}) {choice}")).collect();
    let last = episode.turns.iter().rev().find(|turn| turn.role == "assistant");
    let response = last.map_or("", |turn| turn.text.as_str());
    let mut options = row.choices.clone();
    options.sort_unstable();
    let judged = Judged {
        question: format!("{}\n{}\n{}", row.task.as_deref().unwrap_or_default(), row.question, options.join("\n")),
        official: rule.right(response, &row.answer, &choices),
        strict: episode.right(),
        read: rule.read(response, &choices),
        iou: (format == Format::TreeBench).then(|| {
            let strict = || tree_bench_iou(&boxes_in_original(episode, convention), &corners(&row.targets));
            [
                Some(tree_bench_iou(&tree_bench_boxes(response), &published.boxes)),
                (!row.targets.is_empty()).then(strict),
            ]
        }),
        published,
    };
    Some((format, judged))
}

fn corners(targets: &[Target]) -> Vec<[f64; 4]> {
    targets.iter().map(|target| target.bbox.into()).collect()
}

/// Every usable box that the policy named, in its turns' JSON or in tags, in pixels of the original picture: numbers are measured in the view that
/// was shown last before them.
fn boxes_in_original(episode: &Episode, convention: Convention) -> Vec<[f64; 4]> {
    let views = episode.views();
    let mut boxes = Vec::new();
    for (k, turn) in episode.turns.iter().filter(|turn| turn.role == "assistant").enumerate() {
        boxes.extend(turn.bbox.map(<[f64; 4]>::from));
        let Some(seen) = views.iter().rev().find(|view| view.turn <= k) else { continue };
        let view = View { image: seen.image, region: seen.region, size: Size::new(seen.size[0], seen.size[1]) };
        boxes.extend(tree_bench_boxes(&turn.text).into_iter().map(|said| {
            let box_in_view = convention.box_in_view(said.map(|side| side as i64), view.size);
            <[f64; 4]>::from(view.original_from_view(box_in_view))
        }));
    }
    boxes
}

/// What the published rule makes of each episode; none of rows that are of no benchmark with one.
pub fn verdicts(episodes: &[Episode], rows: &[Sample], convention: Convention) -> Vec<Option<bool>> {
    episodes.iter().map(|episode| judged(episode, rows, convention).map(|(_, judged)| judged.official)).collect()
}

/// A table for each benchmark among the rows; none of rows that are of none.
pub fn tables(name: &str, episodes: &[Episode], rows: &[Sample], convention: Convention) -> Vec<Table> {
    let mut all: BTreeMap<Format, Vec<Judged>> = BTreeMap::new();
    for (format, judged) in episodes.iter().filter_map(|episode| judged(episode, rows, convention)) {
        all.entry(format).or_default().push(judged);
    }
    all.into_iter().map(|(format, all)| table(format, name, &all)).collect()
}

fn table(format: Format, name: &str, all: &[Judged]) -> Table {
    let mut rows: Vec<Row> = Vec::new();
    let mut row = |name: &str, about: &str, figure: &dyn Fn(Rule) -> Option<Estimate>| {
        let cells = RULES.map(|rule| cell(figure(rule).as_ref())).to_vec();
        rows.push(Row { name: name.to_owned(), cells, about: about.to_owned() });
    };
    let categories = grouped(all, |one| one.published.category.clone());
    for (category, of) in &categories {
        row(category, "", &|rule| figure(of, rule));
    }
    let halves = grouped(all, |one| Some(one.published.category.as_ref()?.split_once('/')?.0.to_owned()));
    for (half, of) in &halves {
        if halves.len() > 1 {
            row(half, "every question counts the same", &|rule| figure(of, rule));
        }
    }
    let everything: Vec<&Judged> = all.iter().collect();
    row("all", "every question counts the same", &|rule| figure(&everything, rule));
    if categories.len() > 1 {
        row("mean of categories", "every category counts the same", &|rule| mean_of(&categories, rule));
    }
    if matches!(format, Format::MmeRealworld | Format::MmeRealworldTable) {
        let merged = grouped(all, |one| Some(merged(one.published.subcategory.as_ref()?)));
        if merged.len() > 1 {
            row("Avg-C", "every subtask counts the same, attributes of one thing merged", &|rule| {
                mean_of(&merged, rule)
            });
        }
    }
    if format == Format::Pope {
        for (name, figure) in YES_OR_NO {
            row(name, "", &|rule| if rule.official { figure(&everything) } else { None });
        }
    }
    if format == Format::TreeBench {
        row("mean IoU", "for each target the best box named; no box is 0", &|rule| mean_iou(&everything, rule));
    }
    let judge = "official: the published rule, its faults included, and without the language model some scripts ask when it finds nothing; \
                 strict: the declared answer alone";
    Table {
        title: format!("{}: {name}", format.name()),
        columns: RULES.map(|rule| rule.name.to_owned()).to_vec(),
        rows,
        notes: vec![judge.to_owned()],
        unit: Some(Unit::Percent),
        ..Table::default()
    }
}

/// TreeBench's second figure: officially of the boxes tagged in the last turn's thought, in the numbers as written; strictly of every usable box
/// in pixels of the original.
fn mean_iou(of: &[&Judged], rule: Rule) -> Option<Estimate> {
    let column = usize::from(!rule.official);
    let (values, questions): (Vec<f64>, Vec<&str>) =
        of.iter().filter_map(|one| Some((one.iou?[column]?, one.question.as_str()))).unzip();
    (!values.is_empty()).then(|| {
        let mean = clustered_mean(&values, &questions);
        Estimate { low: mean.low.max(0.0), high: mean.high.min(1.0), ..mean }
    })
}

/// A column.
#[derive(Clone, Copy)]
struct Rule {
    name: &'static str,
    official: bool,
}

const RULES: [Rule; 2] = [Rule { name: "official", official: true }, Rule { name: "strict", official: false }];

impl Rule {
    fn right(self, one: &Judged) -> bool {
        if self.official { one.official } else { one.strict }
    }
}

/// In the order in which they first appear. Those without a name are in no group.
fn grouped(all: &[Judged], name: impl Fn(&Judged) -> Option<String>) -> Vec<(String, Vec<&Judged>)> {
    let mut groups: Vec<(String, Vec<&Judged>)> = Vec::new();
    for one in all {
        let Some(name) = name(one) else { continue };
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, group)) => group.push(one),
            None => groups.push((name, vec![one])),
        }
    }
    groups
}

/// The share of right answers. Where questions come in several orders of their options, the mean over the orders (HR-Bench).
fn figure(of: &[&Judged], rule: Rule) -> Option<Estimate> {
    if of.is_empty() {
        return None;
    }
    let value = |one: &&Judged| f64::from(u8::from(rule.right(one)));
    let values: Vec<f64> = of.iter().map(value).collect();
    let questions: Vec<&str> = of.iter().map(|one| one.question.as_str()).collect();
    let mut estimate = clustered_share(&values, &questions);
    let mut cycles: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for one in of {
        if let Some(cycle) = &one.published.cycle {
            let (right, n) = cycles.entry(cycle).or_default();
            (*right, *n) = (*right + value(one), *n + 1);
        }
    }
    if !cycles.is_empty() {
        estimate.value = cycles.values().map(|(right, n)| right / *n as f64).sum::<f64>() / cycles.len() as f64;
    }
    Some(estimate)
}

/// The unweighted mean over groups.
fn mean_of(groups: &[(String, Vec<&Judged>)], rule: Rule) -> Option<Estimate> {
    unweighted(&groups.iter().map(|(_, of)| figure(of, rule)).collect::<Option<Vec<_>>>()?)
}

/// The unweighted mean of independent figures, its interval from theirs.
///
/// ```
/// use foveate::{eval::benchmarks::unweighted, stats::wilson};
/// assert_eq!(unweighted(&[wilson(5, 10), wilson(90, 90)]).unwrap().value, 0.75);
/// assert!(unweighted(&[]).is_none());
/// ```
pub fn unweighted(figures: &[Estimate]) -> Option<Estimate> {
    if figures.is_empty() {
        return None;
    }
    let count = figures.len() as f64;
    let value = figures.iter().map(|figure| figure.value).sum::<f64>() / count;
    let half = figures.iter().map(|f| ((f.high - f.low) / 2.0).powi(2)).sum::<f64>().sqrt() / count;
    let n = figures.iter().map(|figure| figure.n).sum();
    Some(Estimate { value, low: (value - half).max(0.0), high: (value + half).min(1.0), n })
}

/// As MME-RealWorld's script counts: in small letters, and all attributes of one thing together.
fn merged(subcategory: &str) -> String {
    let small = subcategory.to_lowercase();
    match small.contains("attribute") {
        true => format!("{}/attribute", small.split('/').next().unwrap_or_default()),
        false => small,
    }
}

/// What POPE reports beside accuracy, of what the official rule reads.
type YesOrNo = (&'static str, fn(&[&Judged]) -> Option<Estimate>);

const YES_OR_NO: [YesOrNo; 4] = [
    ("precision", |all| share(all.iter().filter(|one| says_yes(one)), is_yes)),
    ("recall", |all| share(all.iter().filter(|one| is_yes(one)), says_yes)),
    ("F1", |all| {
        let (precision, recall) = (YES_OR_NO[0].1(all)?, YES_OR_NO[1].1(all)?);
        let sum = precision.value + recall.value;
        // Its interval would need more than those of its parts.
        let value = if sum > 0.0 { 2.0 * precision.value * recall.value / sum } else { 0.0 };
        Some(Estimate { value, low: f64::NAN, high: f64::NAN, n: all.len() })
    }),
    ("says yes", |all| share(all.iter(), says_yes)),
];

fn says_yes(one: &&Judged) -> bool {
    one.read.as_deref() == Some("yes")
}

fn is_yes(one: &&Judged) -> bool {
    one.published.answer.as_str().is_some_and(|answer| answer.eq_ignore_ascii_case("yes"))
}

fn share<'a>(of: impl Iterator<Item = &'a &'a Judged>, holds: fn(&&Judged) -> bool) -> Option<Estimate> {
    let (values, questions): (Vec<f64>, Vec<&str>) =
        of.map(|one| (f64::from(u8::from(holds(one))), one.question.as_str())).unzip();
    (!values.is_empty()).then(|| clustered_share(&values, &questions))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `right` of `count` answers, every question another.
    fn answers(category: &str, subcategory: &str, right: usize, count: usize) -> Vec<Judged> {
        let one = |i: usize| Judged {
            published: Published {
                category: Some(category.into()),
                subcategory: Some(subcategory.into()),
                ..Published::default()
            },
            question: format!("{category} {subcategory} {i}"),
            official: i < right,
            strict: false,
            read: None,
            iou: None,
        };
        (0..count).map(one).collect()
    }

    fn values(table: &Table, name: &str) -> Vec<Option<f64>> {
        let row = table.rows.iter().find(|row| row.name == name).unwrap();
        row.cells.iter().map(|cell| cell.value.map(|value| (100.0 * value).round() / 100.0)).collect()
    }

    /// MGPO's row of MME-RealWorld-Lite, from whose cells the paper took an unweighted mean (spec 1.12).
    #[test]
    fn the_mean_over_questions_and_the_mean_over_columns_are_two_figures() {
        let columns = [
            ("Perception/OCR", 216, 250),
            ("Perception/RS", 81, 150),
            ("Perception/DT", 78, 100),
            ("Perception/MO", 149, 319),
            ("Perception/AD", 154, 350),
            ("Reasoning/OCR", 74, 100),
            ("Reasoning/DT", 69, 100),
            ("Reasoning/MO", 79, 150),
            ("Reasoning/AD", 157, 400),
        ];
        let all: Vec<Judged> = columns.iter().flat_map(|(name, right, n)| answers(name, name, *right, *n)).collect();
        let table = table(Format::MmeRealworld, "crop", &all);
        assert_eq!(values(&table, "Perception/MO"), [Some(46.71), Some(0.0)]);
        assert_eq!(values(&table, "mean of categories")[0], Some(60.45));
        assert_eq!(values(&table, "all")[0], Some(55.08));
        assert_eq!(values(&table, "Perception")[0], Some(58.0));
        // Of the cells as printed, with the published numbers of questions.
        let cells = [86.4, 54.0, 78.0, 46.7, 44.0, 74.0, 69.0, 52.7, 39.3];
        let figures: Vec<Estimate> =
            cells.iter().map(|cell| Estimate { value: cell / 100.0, low: 0.0, high: 1.0, n: 1 }).collect();
        assert!((100.0 * unweighted(&figures).unwrap().value - 60.46).abs() < 0.005);
        let weighted: f64 = cells.iter().zip(&columns).map(|(cell, (.., n))| cell * *n as f64).sum::<f64>() / 1919.0;
        assert!((weighted - 55.09).abs() < 0.005, "{weighted}");
    }

    #[test]
    fn attributes_of_one_thing_are_one_subtask() {
        assert_eq!(merged("Person/attribute/color"), "person/attribute");
        assert_eq!(merged("Vehicle/Counting"), "vehicle/counting");
        let mut all = answers("Perception/MO", "Person/attribute/color", 1, 1);
        all.extend(answers("Perception/MO", "Person/attribute/orientation", 0, 3));
        all.extend(answers("Perception/MO", "Vehicle/counting", 1, 1));
        assert_eq!(values(&table(Format::MmeRealworld, "", &all), "Avg-C")[0], Some(62.5));
    }

    /// Each order of the options counts the same, whatever is missing from it.
    #[test]
    fn hr_bench_is_a_mean_over_cycles() {
        let mut all = Vec::new();
        for (cycle, right, count) in [("0", 1, 1), ("1", 0, 3)] {
            for mut one in answers("single", "", right, count) {
                one.published.cycle = Some(cycle.into());
                one.strict = true;
                all.push(one);
            }
        }
        let table = table(Format::HrBench, "", &all);
        assert_eq!(values(&table, "all"), [Some(50.0), Some(100.0)]);
        assert_eq!(table.rows.len(), 2, "one category has no mean over categories");
    }

    #[test]
    fn pope_has_precision_recall_and_f1() {
        let mut all = answers("random", "", 0, 4);
        for (one, (said, truth)) in all.iter_mut().zip([("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]) {
            one.published.answer = truth.into();
            (one.read, one.official) = (Some(said.into()), said == truth);
        }
        let table = table(Format::Pope, "", &all);
        for name in ["all", "precision", "recall", "F1", "says yes"] {
            assert_eq!(values(&table, name)[0], Some(50.0), "{name}");
        }
        assert_eq!(values(&table, "F1")[1], None);
    }
}
