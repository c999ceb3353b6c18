//! From annotated rows to reasoning dialogues: `foveate data trajectories`.
//!
//! A row knows what stands where in each picture (`objects`) and how the pictures hang together (`relations`); a teacher writes from
//! that what a careful reader would say before answering: rules, here, or a model behind an endpoint ([`super::teacher`]). Filters throw
//! out traces that give the answer away, name no picture, do not help or say what another says already (`filters.rs`, `gain.rs`;
//! spec 2.3). The trace goes into the row (`trajectory`); the answer does not: it is written when the row is shown, in the numbers of
//! the model that learns it. It hides wording and chance. What must stay true: a trace holds no number but those of pictures, so it
//! cannot leak a coordinate of any convention; every sentence about an object names a picture; the same rows, seed and answers
//! of a teacher give the same files.

mod filters;
mod gain;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::teacher::{self, Endpoint};
use super::{NewFolder, pick, stream};
use crate::data::{self, Sample, in_words};
use crate::geometry::BBox;
use crate::run::Interrupt;
use filters::Seen;
pub use filters::{Rejected, judge};
use gain::Gains;

const PURPOSE: u64 = 4;
/// The key of a row that holds its trace.
pub const TRAJECTORY: &str = "trajectory";

/// What is known between the pictures of a row; pictures count from 1.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "relation", rename_all = "snake_case")]
pub enum Relation {
    /// The object that one picture shows is among those of another.
    SameObject { reference: usize, target: usize, name: String },
    /// Two pictures show one scene, but for one change.
    Difference { change: Change, name: String, was: Option<String> },
    /// Of all pictures, one shows this.
    OnlyIn { name: String, target: usize },
    /// One picture is a part of another, around this object.
    PartOf { reference: usize, target: usize, name: String },
    /// An object is seen from the first to the last picture.
    Follows { reference: usize, target: usize, name: String },
    /// Where an object of a picture stands, in words.
    Place { reference: usize, name: String, is: String },
    /// Two pictures show a thing of one kind.
    SameKind { reference: usize, target: usize, name: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Added,
    Removed,
    Moved,
    Swapped,
}

/// An object of a picture, in its original pixels.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Object {
    pub name: String,
    pub bbox: BBox,
    /// What else is known of it, such as `red` or `with a hat`; for teachers that write freely.
    #[serde(default)]
    pub attributes: Vec<String>,
}

/// What a teacher may use, beside the row itself.
#[derive(Clone, Debug)]
pub struct Facts {
    pub objects: Vec<Vec<Object>>,
    pub relations: Vec<Relation>,
}

impl Facts {
    /// Of a row; without annotation both lists are empty.
    ///
    /// # Errors
    /// Annotation that cannot be read, or that names a picture which is not there.
    pub fn of(sample: &Sample) -> Result<Facts> {
        let read = |key: &str| sample.extra.get(key).cloned().unwrap_or(Value::Array(Vec::new()));
        let named = |key: &str| format!("row {}, key {key:?}", sample.id);
        let objects: Vec<Vec<Object>> = serde_json::from_value(read("objects")).with_context(|| {
            format!("{}: expected one list of {{\"name\", \"bbox\"}} for each picture", named("objects"))
        })?;
        let relations: Vec<Relation> = serde_json::from_value(read("relations")).with_context(|| named("relations"))?;
        ensure!(
            objects.is_empty() || objects.len() == sample.images.len(),
            "{}: {} lists for {} pictures",
            named("objects"),
            objects.len(),
            sample.images.len()
        );
        for (k, object) in objects.iter().enumerate().flat_map(|(k, all)| all.iter().map(move |object| (k, object))) {
            let Object { name, bbox: b, .. } = object;
            ensure!(!name.trim().is_empty(), "{}: an object of picture {} has no name", named("objects"), k + 1);
            ensure!(
                [b.x1, b.y1].iter().all(|side| *side >= 0.0)
                    && b.x1 < b.x2
                    && b.y1 < b.y2
                    && b.x2 <= FARTHEST
                    && b.y2 <= FARTHEST,
                "{}: {name:?} of picture {} has the box {b}, expected [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2",
                named("objects"),
                k + 1
            );
        }
        if let Some(image) = relations.last().and_then(Relation::concludes) {
            ensure!(
                sample.targets.iter().any(|target| target.image == image),
                "{}: the last one says that the answer is in picture {image}, and the row has no target there",
                named("relations")
            );
        }
        for relation in &relations {
            if let Relation::Follows { reference, target, .. } = relation {
                ensure!(
                    reference < target,
                    "{}: something is followed from picture {reference} to {target}, expected an earlier and a later one",
                    named("relations")
                );
            }
        }
        for image in relations.iter().flat_map(Relation::images) {
            ensure!(
                (1..=sample.images.len()).contains(&image),
                "{}: found picture {image}, expected 1 to {}",
                named("relations"),
                sample.images.len()
            );
        }
        Ok(Facts { objects, relations })
    }
}

/// No picture is larger.
const FARTHEST: f64 = 1e6;

impl Relation {
    /// The picture that it says the answer is in.
    fn concludes(&self) -> Option<usize> {
        match self {
            Relation::SameObject { target, .. }
            | Relation::PartOf { target, .. }
            | Relation::Follows { target, .. }
            | Relation::SameKind { target, .. }
            | Relation::OnlyIn { target, .. } => Some(*target),
            Relation::Place { .. } | Relation::Difference { .. } => None,
        }
    }

    fn images(&self) -> Vec<usize> {
        match self {
            Relation::SameObject { reference, target, .. }
            | Relation::PartOf { reference, target, .. }
            | Relation::Follows { reference, target, .. }
            | Relation::SameKind { reference, target, .. } => vec![*reference, *target],
            Relation::OnlyIn { target, .. } => vec![*target],
            Relation::Place { reference, .. } => vec![*reference],
            Relation::Difference { .. } => vec![1, 2],
        }
    }
}

/// How much a trace by rules says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Detail {
    /// What each picture shows that matters to the question, then what follows.
    #[default]
    Full,
    /// Only what the answer hangs on: pictures are told in full where they must be compared thing by thing.
    Brief,
}

/// The trace of a row, composed from its facts.
pub fn by_rules(sample: &Sample, facts: &Facts, detail: Detail, seed: u64) -> String {
    // A row's chance hangs on its name alone, so that rows may be left out or sorted.
    let name =
        sample.id.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = stream(seed, PURPOSE, name);
    let sentence = |relation: &Relation| match detail {
        Detail::Full => in_full(&mut rng, relation, sample, facts),
        Detail::Brief => in_brief(&mut rng, relation, sample, facts),
    };
    facts.relations.iter().map(sentence).collect::<String>().trim().to_owned()
}

/// What a picture shows, in one of several wordings; nothing of nothing.
fn shows(rng: &mut ChaCha8Rng, facts: &Facts, image: usize) -> String {
    let what = facts.objects.get(image - 1).map(|all| listed(&left_to_right(all))).unwrap_or_default();
    match what.as_str() {
        "" => String::new(),
        what => pick(rng, &["Image-{K} shows {X}. ", "In Image-{K} there {IS} {X}. ", "I see {X} in Image-{K}. "])
            .replace("{K}", &image.to_string())
            .replace("{IS}", if plural(what) { "are" } else { "is" })
            .replace("{X}", what),
    }
}

fn in_full(rng: &mut ChaCha8Rng, relation: &Relation, sample: &Sample, facts: &Facts) -> String {
    let images = |text: &str, reference: usize, target: usize| {
        text.replace("{A}", &format!("Image-{reference}")).replace("{B}", &format!("Image-{target}"))
    };
    match relation {
        Relation::SameObject { reference, target, name } => {
            let first = images(&format!("{{A}} shows {}. ", with_article(name)), *reference, *target);
            let seen = shows(rng, facts, *target);
            let side = side_of(sample, facts, *target, name);
            let text = pick(
                rng,
                &[
                    "The {X} of {A} is the{S} {X} of {B}.",
                    "So the {X} of {A} is the{S} {X} of {B}.",
                    "The{S} {X} of {B} is that of {A}.",
                ],
            );
            first + &seen + &images(&text.replace("{X}", name).replace("{S}", &side), *reference, *target)
        }
        Relation::Difference { change, name, was } => {
            shows(rng, facts, 1) + &shows(rng, facts, 2) + &difference(*change, name, was.as_deref())
        }
        Relation::OnlyIn { name, target } => {
            let seen: String = (1..=sample.images.len()).map(|image| shows(rng, facts, image)).collect();
            let text = pick(rng, &["The {X} is in {B}.", "So the {X} is in {B}."]);
            seen + &images(&text.replace("{X}", name), *target, *target)
        }
        Relation::PartOf { reference, target, name } => {
            let first = images(&format!("{{A}} shows {} closely. ", with_article(name)), *reference, *target);
            let seen = shows(rng, facts, *target);
            let text =
                pick(rng, &["{A} is the area around the {X} of {B}.", "So {A} is what lies around the {X} of {B}."]);
            first + &seen + &images(&text.replace("{X}", name), *reference, *target)
        }
        Relation::Follows { reference, target, name } => {
            let between: Vec<String> = (*reference..=*target).map(|k| format!("Image-{k}")).collect();
            let first = format!("I follow the {name} over {}. ", in_words(&between));
            first + &images(&format!("In {{B}} the {name} of {{A}} stands elsewhere."), *reference, *target)
        }
        Relation::Place { reference, name, is } => {
            shows(rng, facts, *reference) + &format!("The {name} is {is} in Image-{reference}. ")
        }
        Relation::SameKind { reference, target, name } => {
            let seen = shows(rng, facts, *target);
            let text = pick(rng, &["{B} has the {X} of {A} too.", "The {X} of {A} is in {B} too."]);
            seen + &images(&text.replace("{X}", name), *reference, *target)
        }
    }
}

/// The same in the fewest words: what is asked for, and where it is.
fn in_brief(rng: &mut ChaCha8Rng, relation: &Relation, sample: &Sample, facts: &Facts) -> String {
    match relation {
        Relation::SameObject { reference, target, name } => {
            let side = side_of(sample, facts, *target, name);
            format!("Image-{reference} shows {}. The{side} {name} is in Image-{target}.", with_article(name))
        }
        // Two pictures can only be compared thing by thing.
        Relation::Difference { .. } => in_full(rng, relation, sample, facts),
        Relation::OnlyIn { name, target } | Relation::Follows { target, name, .. } => {
            format!("The {name} is in Image-{target}.")
        }
        Relation::PartOf { reference, target, name } => {
            format!("Image-{reference} shows {} closely. The {name} is in Image-{target}.", with_article(name))
        }
        Relation::Place { reference, name, is } => format!("The {name} is {is} in Image-{reference}. "),
        Relation::SameKind { target, name, .. } => format!("The {name} is in Image-{target}."),
    }
}

fn difference(change: Change, name: &str, was: Option<&str>) -> String {
    match (change, was) {
        (Change::Added, _) => format!("Image-1 has no {name}; Image-2 has."),
        (Change::Removed, _) => format!("Image-2 has no {name}; Image-1 has."),
        (Change::Moved, _) => format!("The {name} of Image-1 stands elsewhere in Image-2."),
        (Change::Swapped, Some(was)) => format!("Where Image-1 has the {was}, Image-2 has the {name}."),
        (Change::Swapped, None) => format!("The {name} is in Image-2 alone."),
    }
}

/// " left" or " right", where a picture has several of a name and the row's target is left or right of all others, by more than it is above
/// or below them.
fn side_of(sample: &Sample, facts: &Facts, image: usize, name: &str) -> String {
    let Some(target) = sample.targets.iter().find(|t| t.image == image) else { return String::new() };
    let (x, y) = target.bbox.center();
    let others: Vec<(f64, f64)> = facts
        .objects
        .get(image - 1)
        .into_iter()
        .flatten()
        .filter(|o| o.name == name && o.bbox.iou(&target.bbox) < 0.5)
        .map(|o| o.bbox.center())
        .collect();
    let beside = |side: f64| others.iter().all(|(other_x, other_y)| side * (other_x - x) > (other_y - y).abs());
    match others.is_empty() {
        false if beside(1.0) => " left".into(),
        false if beside(-1.0) => " right".into(),
        _ => String::new(),
    }
}

/// The names in the order in which one reads: there is one right order to learn, and a thing that moved may show in it.
fn left_to_right(objects: &[Object]) -> Vec<&str> {
    // A number in a name would be taken for a coordinate.
    let mut sorted: Vec<&Object> = objects.iter().filter(|object| !object.name.contains(char::is_numeric)).collect();
    sorted.sort_by(|a, b| a.bbox.center().0.total_cmp(&b.bbox.center().0));
    sorted.into_iter().map(|object| object.name.as_str()).collect()
}

/// The names of some objects as a sentence has them: "a cup, two foxes and grapes".
pub(super) fn listed<'a>(names: &[&'a str]) -> String {
    let mut counts: Vec<(&'a str, usize)> = Vec::new();
    for name in names {
        match counts.iter_mut().find(|(other, _)| other == name) {
            Some((_, n)) => *n += 1,
            None => counts.push((name, 1)),
        }
    }
    let worded: Vec<String> = counts
        .into_iter()
        .map(|(name, n)| match n {
            1 => with_article(name),
            2 => format!("two {}", plural_of(name)),
            _ => format!("several {}", plural_of(name)),
        })
        .collect();
    in_words(&worded)
}

fn with_article(name: &str) -> String {
    match name.bytes().next() {
        _ if is_plural(name) => name.to_owned(),
        Some(b'a' | b'e' | b'i' | b'o' | b'u') => format!("an {name}"),
        _ => format!("a {name}"),
    }
}

fn plural_of(name: &str) -> String {
    match name {
        name if is_plural(name) => name.to_owned(),
        name if name.ends_with('x') || name.ends_with('s') || name.ends_with("sh") || name.ends_with("ch") => {
            format!("{name}es")
        }
        name => format!("{name}s"),
    }
}

fn plural(what: &str) -> bool {
    what.contains(" and ") || is_plural(what)
}

/// "grapes", but neither "cactus" nor "glass".
fn is_plural(name: &str) -> bool {
    name.ends_with('s') && !name.ends_with("us") && !name.ends_with("ss")
}

/// Who writes the traces.
#[derive(Clone, Debug)]
pub enum Teacher {
    /// Composed from the row's facts; no model, no network.
    Rules(Detail),
    /// A model that sees the pictures, behind an OpenAI-compatible server.
    Endpoint(Box<teacher::Options>),
}

impl Teacher {
    fn name(&self) -> &str {
        match self {
            Teacher::Rules(_) => "rules",
            Teacher::Endpoint(options) => &options.model,
        }
    }

    /// Whether there is enough to reason from: rules need to know how the pictures hang together, a model can see for itself.
    fn can_use(&self, row: &Sample, facts: &Facts) -> bool {
        match self {
            Teacher::Rules(_) => !facts.relations.is_empty(),
            Teacher::Endpoint(_) => !facts.relations.is_empty() || !row.targets.is_empty(),
        }
    }
}

/// Records of the same rows, answered without and with the traces that are to be judged by them.
#[derive(Clone, Debug)]
pub struct Episodes {
    pub direct: PathBuf,
    pub reasoned: PathBuf,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub rows: PathBuf,
    /// Folder: `sft.jsonl`, `rl.jsonl`, `report.json`.
    pub out: PathBuf,
    /// At most so many traces a task.
    pub per_task: Option<usize>,
    /// Share of the rows that traces are made for; the others are kept for RL.
    pub share: f64,
    pub seed: u64,
    pub teacher: Teacher,
    /// With them, a trace must make the answer better.
    pub episodes: Option<Episodes>,
}

/// What became of the rows.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `rules`, or the model's name.
    pub teacher: String,
    pub rows: usize,
    pub kept: usize,
    pub for_rl: usize,
    pub kept_by_task: BTreeMap<String, usize>,
    pub rejected: BTreeMap<Rejected, usize>,
    /// What an endpoint took. Not in the file: it differs between a run and its repetition, and nothing else does.
    #[serde(skip)]
    pub spent: Option<teacher::Spent>,
}

/// Builds traces for the rows of a file and writes three files; what has no trace goes to `rl.jsonl`.
///
/// # Errors
/// Rows that cannot be read, annotation that makes no sense (with its row), a folder that holds something already; an endpoint that
/// refuses, or an interrupt: then what was answered is on record, and the same call goes on.
pub fn build(options: &Options, interrupt: &Interrupt) -> Result<Report> {
    ensure!((0.0..=1.0).contains(&options.share), "--share {}: expected 0 to 1", options.share);
    let folder = NewFolder::beside(&options.out)?;
    let rows = data::read(&options.rows)?;
    let facts = rows.iter().map(Facts::of).collect::<Result<Vec<_>>>()?;
    let gains = options.episodes.as_ref().map(|e| Gains::read(&e.direct, &e.reasoned, &rows)).transpose()?;
    let (endpoint, detail) = match &options.teacher {
        Teacher::Rules(detail) => (None, *detail),
        Teacher::Endpoint(server) => (Some(Endpoint::open(server, interrupt)?), Detail::Full),
    };
    let chosen = |i: usize| stream(options.seed, PURPOSE + 1, i as u64).random::<f64>() < options.share;
    let chosen: Vec<bool> = (0..rows.len()).map(chosen).collect();
    let task = |i: usize| rows[i].task.as_deref().unwrap_or("none");
    let usable = |i: usize| options.teacher.can_use(&rows[i], &facts[i]);

    let mut report = Report { teacher: options.teacher.name().into(), rows: rows.len(), ..Report::default() };
    let mut kept: Vec<Option<String>> = vec![None; rows.len()];
    let mut seen = Seen::default();
    let mut from = 0;
    while from < rows.len() {
        let room =
            |task: &str| options.per_task.map_or(usize::MAX, |most| most - report.kept_by_task.get(task).unwrap_or(&0));
        // Traces cost. They are asked for as far as it is certain that their task has room, whatever becomes of those before them.
        let mut left: HashMap<&str, usize> = HashMap::new();
        let mut asked = Vec::new();
        let mut end = from;
        while end < rows.len() {
            if chosen[end] && usable(end) && room(task(end)) > 0 {
                match left.entry(task(end)).or_insert_with(|| room(task(end))) {
                    0 => break,
                    left => *left -= 1,
                }
                asked.push(end);
            }
            end += 1;
        }
        let traces = match &endpoint {
            None => asked.iter().map(|&i| Ok(by_rules(&rows[i], &facts[i], detail, options.seed))).collect(),
            Some(endpoint) => endpoint.traces(&asked.iter().map(|&i| (&rows[i], &facts[i])).collect::<Vec<_>>())?,
        };
        let mut traces: HashMap<usize, Result<String, Rejected>> = asked.into_iter().zip(traces).collect();
        for i in (from..end).filter(|&i| chosen[i]) {
            let row = &rows[i];
            let passed = |trace: String| {
                judge(&trace, row, &facts[i])?;
                gains.as_ref().map_or(Ok(()), |gains| gains.judge(&row.id))?;
                seen.add(row, &trace)?;
                Ok(trace)
            };
            let trace = match traces.remove(&i) {
                Some(trace) => trace.and_then(passed),
                None if usable(i) => Err(Rejected::Balance),
                None => Err(Rejected::NoFacts),
            };
            match trace {
                Ok(trace) => {
                    *report.kept_by_task.entry(task(i).to_owned()).or_default() += 1;
                    kept[i] = Some(trace);
                }
                Err(reason) => *report.rejected.entry(reason).or_default() += 1,
            }
        }
        from = end;
    }
    let (mut sft, mut rl) = (Vec::new(), Vec::new());
    for (mut row, trace) in rows.into_iter().zip(kept) {
        match trace {
            Some(trace) => {
                row.extra.insert(TRAJECTORY.into(), trace.into());
                sft.push(row);
            }
            None => rl.push(row),
        }
    }
    (report.kept, report.for_rl) = (sft.len(), rl.len());
    report.spent = endpoint.map(|endpoint| endpoint.spent());
    write(folder, sft, rl, &report)?;
    Ok(report)
}

fn write(folder: NewFolder, sft: Vec<Sample>, rl: Vec<Sample>, report: &Report) -> Result<()> {
    // Pictures stay where they are: the rows name them from here.
    let absolute = |mut rows: Vec<Sample>| -> Result<Vec<Sample>> {
        for path in rows.iter_mut().flat_map(|row| &mut row.images) {
            *path = std::path::absolute(&path).with_context(|| format!("finding the picture {}", path.display()))?;
        }
        Ok(rows)
    };
    data::write(&folder.path().join("sft.jsonl"), &absolute(sft)?)?;
    data::write(&folder.path().join("rl.jsonl"), &absolute(rl)?)?;
    let json = serde_json::to_vec_pretty(report).context("writing the report")?;
    std::fs::write(folder.path().join("report.json"), json).context("writing report.json")?;
    folder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Target;
    use serde_json::json;

    pub(super) fn row(relations: Value, objects: Value) -> Sample {
        let target = Target { image: 2, bbox: BBox::new(10.0, 20.0, 30.0, 40.0), label: Some("fox".into()) };
        let extra = serde_json::Map::from_iter([("relations".to_owned(), relations), ("objects".to_owned(), objects)]);
        Sample {
            id: "a".into(),
            images: vec!["1.jpg".into(), "2.jpg".into()],
            question: "?".into(),
            choices: vec![],
            answer: "x".into(),
            targets: vec![target],
            task: None,
            split: None,
            extra,
        }
    }

    #[test]
    fn two_of_a_kind_are_told_apart_by_their_side() {
        let objects = json!([
            [{"name": "fox", "bbox": [0, 0, 9, 9]}],
            [{"name": "fox", "bbox": [10, 20, 30, 40]}, {"name": "apple", "bbox": [50, 0, 60, 10]}, {"name": "fox", "bbox": [70, 20, 90, 40]}]
        ]);
        let row = row(json!([{"relation": "same_object", "reference": 1, "target": 2, "name": "fox"}]), objects);
        let trace = by_rules(&row, &Facts::of(&row).unwrap(), Detail::Full, 1);
        assert!(trace.starts_with("Image-1 shows a fox.") && trace.contains("two foxes and an apple"), "{trace}");
        assert!(trace.contains("left fox of Image-2"), "{trace}");
        assert_eq!(judge(&trace, &row, &Facts::of(&row).unwrap()), Ok(()));
        let brief = by_rules(&row, &Facts::of(&row).unwrap(), Detail::Brief, 1);
        assert_eq!(brief, "Image-1 shows a fox. The left fox is in Image-2.");
        assert_eq!(judge(&brief, &row, &Facts::of(&row).unwrap()), Ok(()));
    }

    /// The middle one of three is neither left nor right, nor is the upper one of two; a name with a number is left out of lists.
    #[test]
    fn sides_are_said_only_where_they_are_true() {
        let said = |others: &[[f64; 4]]| {
            let mut second = vec![
                json!({"name": "fox", "bbox": [10, 20, 30, 40]}),
                json!({"name": "player 7", "bbox": [0, 0, 5, 5]}),
            ];
            second.extend(others.iter().map(|bbox| json!({"name": "fox", "bbox": bbox})));
            let row = row(
                json!([{"relation": "same_object", "reference": 1, "target": 2, "name": "fox"}]),
                json!([[], second]),
            );
            let facts = Facts::of(&row).unwrap();
            assert_eq!(judge(&by_rules(&row, &facts, Detail::Full, 1), &row, &facts), Ok(()));
            by_rules(&row, &facts, Detail::Brief, 1)
        };
        assert!(said(&[[50.0, 20.0, 70.0, 40.0], [80.0, 20.0, 90.0, 40.0]]).contains("The left fox"));
        assert!(said(&[[50.0, 20.0, 70.0, 40.0], [0.0, 20.0, 5.0, 40.0]]).contains("The fox"));
        assert!(said(&[[12.0, 80.0, 33.0, 99.0]]).contains("The fox"));
    }

    #[test]
    fn things_are_listed_as_people_say_it() {
        assert_eq!(listed(&["cactus"]), "a cactus");
        assert_eq!(listed(&["grapes", "apple", "fox", "fox"]), "grapes, an apple and two foxes");
        assert_eq!(listed(&["cactus", "cactus", "cactus"]), "several cactuses");
    }

    #[test]
    fn annotation_that_makes_no_sense_names_its_row() {
        let error =
            |relations: Value, objects: Value| format!("{:#}", Facts::of(&row(relations, objects)).unwrap_err());
        let beyond = json!([{"relation": "same_object", "reference": 1, "target": 3, "name": "fox"}]);
        assert!(error(beyond, json!([])).contains("row a"));
        assert!(error(json!([{"relation": "knows"}]), json!([])).contains("relations"));
        assert!(error(json!([]), json!([[]])).contains("1 lists for 2 pictures"));
        let elsewhere = json!([{"relation": "only_in", "target": 1, "name": "fox"}]);
        assert!(error(elsewhere, json!([])).contains("picture 1"));
        let back = json!([{"relation": "follows", "reference": 2, "target": 2, "name": "fox"}]);
        assert!(error(back, json!([])).contains("followed from picture 2 to 2"));
        for object in [
            json!({"name": " ", "bbox": [0, 0, 1, 1]}),
            json!({"name": "fox", "bbox": [5, 0, 1, 1]}),
            json!({"name": "fox", "bbox": [0, 0, 1e300, 1]}),
        ] {
            assert!(error(json!([]), json!([[object], []])).contains("of picture 1"));
        }
    }
}
