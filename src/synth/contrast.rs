//! Questions over several pictures from boxes on single ones: `foveate data contrast`. RefCOCO- or COCO-style annotation is enough to
//! start with several pictures (after CGC, arXiv 2604.22498, which contrasts pictures and contrasts views of one picture).
//!
//! Three kinds, in turn. `only_in`: the picture stands among others that lack the thing, so that its number must be found out.
//! `part_of`: Image-1 is cut from around the thing, Image-2 is the whole. `same_object`: two windows of one picture, both with the thing in
//! them. What must stay true: a question has one right answer as far as the annotation knows; boxes are whole pixels of the picture that
//! holds them; the rows carry the facts from which `data trajectories` composes its traces.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::make::{save, whole_pixels};
use super::{NewFolder, pick, stream};
use crate::data::{self, Sample, Target};
use crate::geometry::BBox;
use crate::image::{Picture, decode};

const PURPOSE: u64 = 7;
/// Windows with a shorter side are not cut.
const SHORTEST: f64 = 56.0;
/// A thing that fills more of its picture has no surroundings to be told from.
const LARGEST: f64 = 0.3;

#[derive(Clone, Debug)]
pub struct Options {
    pub rows: PathBuf,
    /// Folder: `rows.jsonl`, `images/`.
    pub out: PathBuf,
    /// Pictures of an `only_in` question, from and to.
    pub pictures: [usize; 2],
    pub seed: u64,
}

/// What became of the rows.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub rows: usize,
    pub written: BTreeMap<String, usize>,
    /// More than one picture, or not exactly one labelled box.
    pub unfit: usize,
    /// Neither a part nor windows could be cut, nor were there pictures without the thing.
    pub without_contrast: usize,
}

/// A row that can be used: one picture, one thing.
struct Thing<'a> {
    row: &'a Sample,
    label: &'a str,
    bbox: BBox,
}

/// Everything that is known of a picture: labels and boxes of all rows about it.
type Known<'a> = BTreeMap<&'a Path, Vec<(&'a str, BBox)>>;

/// # Errors
/// Rows or pictures that cannot be read, a range that makes no sense, a folder that holds something already.
pub fn build(options: &Options, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Report> {
    let [from, to] = options.pictures;
    ensure!(2 <= from && from <= to && to <= 16, "--pictures {from} {to}: expected two rising numbers from 2 to 16");
    let folder = NewFolder::beside(&options.out)?;
    std::fs::create_dir(folder.path().join("images")).context("making the folder for pictures")?;
    let rows = data::read(&options.rows)?;
    let mut known: Known = BTreeMap::new();
    for (path, target) in rows.iter().flat_map(|row| row.targets.iter().map(move |t| (&row.images[t.image - 1], t))) {
        if let Some(label) = &target.label {
            known.entry(path).or_default().push((bare(label), target.bbox));
        }
    }
    let things: Vec<Thing> = rows.iter().filter_map(thing).collect();
    let done = std::sync::atomic::AtomicUsize::new(0);
    let made: Vec<Option<(&str, Sample)>> = things
        .par_iter()
        .enumerate()
        .map(|(i, thing)| {
            let made = one(options, folder.path(), &known, thing, i).with_context(|| format!("row {}", thing.row.id));
            progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1, things.len());
            made
        })
        .collect::<Result<_>>()?;
    let mut report = Report { rows: rows.len(), unfit: rows.len() - things.len(), ..Report::default() };
    let mut written = Vec::new();
    for made in made {
        match made {
            Some((kind, sample)) => {
                *report.written.entry(kind.to_owned()).or_default() += 1;
                written.push(sample);
            }
            None => report.without_contrast += 1,
        }
    }
    ensure!(
        !written.is_empty(),
        "none of the {} rows could be used ({} have not exactly one picture with one labelled box): {}",
        report.rows,
        report.unfit,
        options.rows.display()
    );
    data::write(&folder.path().join("rows.jsonl"), &written)?;
    folder.finish()?;
    Ok(report)
}

fn thing(row: &Sample) -> Option<Thing<'_>> {
    let ([_], [target]) = (row.images.as_slice(), row.targets.as_slice()) else { return None };
    let label = bare(target.label.as_deref()?);
    if label.is_empty() {
        return None;
    }
    Some(Thing { row, label, bbox: target.bbox })
}

/// The question of one row: the kind whose turn it is, or the next that is possible.
fn one<'a>(
    options: &Options,
    folder: &Path,
    known: &Known,
    thing: &Thing<'a>,
    index: usize,
) -> Result<Option<(&'static str, Sample)>> {
    let mut rng = stream(options.seed, PURPOSE, index as u64);
    let rng = &mut rng;
    for turn in 0..3 {
        let made = match (index + turn) % 3 {
            0 => only_in(options, known, thing, rng)?.map(|sample| ("only_in", sample)),
            1 => part_of(folder, known, thing, index, rng)?.map(|sample| ("part_of", sample)),
            _ => same_object(folder, known, thing, index, rng)?.map(|sample| ("same_object", sample)),
        };
        if made.is_some() {
            return Ok(made);
        }
    }
    Ok(None)
}

/// A label without the article that it may begin with, so that sentences can give it theirs.
fn bare(label: &str) -> &str {
    let label = label.trim();
    let article =
        ["a ", "an ", "the "].iter().find(|a| label.get(..a.len()).is_some_and(|start| start.eq_ignore_ascii_case(a)));
    article.map_or(label, |article| label[article.len()..].trim_start())
}

/// Words that say nothing of what a thing is.
const SMALL: &[&str] = &[
    "a", "an", "the", "of", "in", "on", "at", "to", "with", "and", "or", "by", "from", "is", "are", "his", "her",
    "its", "their", "one", "left", "right", "top", "bottom", "front", "back", "middle", "center", "centre", "near",
    "next", "side", "upper", "lower", "far",
];

/// Whether two labels may mean the same thing, so that no picture with one can stand beside a question for the other: they share a word
/// that says something, in the singular or the plural.
fn alike(a: &str, b: &str) -> bool {
    let words = |text: &str| -> std::collections::BTreeSet<String> {
        let words = text.split(|c: char| !c.is_alphanumeric()).map(str::to_lowercase);
        let telling = words.filter(|w| !w.is_empty() && !SMALL.contains(&w.as_str()));
        telling.map(|w| w.strip_suffix('s').map(str::to_owned).unwrap_or(w)).collect()
    };
    let (a, b) = (words(a), words(b));
    // A label of small words alone could be anything.
    a.is_empty() || b.is_empty() || !a.is_disjoint(&b)
}

/// The picture among others that show nothing of that name.
fn only_in(options: &Options, known: &Known, thing: &Thing, rng: &mut ChaCha8Rng) -> Result<Option<Sample>> {
    let own = thing.row.images[0].as_path();
    let others: Vec<&Path> = known
        .iter()
        .filter(|(path, things)| **path != own && things.iter().all(|(label, _)| !alike(label, thing.label)))
        .map(|(path, _)| *path)
        .collect();
    let count = rng.random_range(options.pictures[0]..=options.pictures[1]).min(others.len() + 1);
    if count < 2 {
        return Ok(None);
    }
    let mut images: Vec<&Path> = others.choose_multiple(rng, count - 1).copied().collect();
    let at = rng.random_range(0..count);
    images.insert(at, own);
    let objects: Vec<Value> = images.iter().map(|path| facts(known, path, None)).collect();
    let question = pick(rng, &["Which image shows the {X}, and where?", "Find the {X} in one of the images."]);
    Ok(Some(sample(
        thing,
        "only_in",
        question.replace("{X}", thing.label),
        images.into_iter().map(absolute).collect::<Result<_>>()?,
        Target { image: at + 1, bbox: whole(thing.bbox), label: Some(thing.label.to_owned()) },
        objects,
        json!({"relation": "only_in", "name": thing.label, "target": at + 1}),
    )))
}

/// Image-1 is cut from around the thing; where in Image-2 is that?
fn part_of(folder: &Path, known: &Known, thing: &Thing, index: usize, rng: &mut ChaCha8Rng) -> Result<Option<Sample>> {
    let own = thing.row.images[0].as_path();
    let picture = decode(own)?;
    let bounds = picture.size().bounds();
    let margin = rng.random_range(1.2..=2.0);
    let window = around(thing.bbox, margin, bounds);
    if thing.bbox.area() > LARGEST * bounds.area() || window.width().min(window.height()) < SHORTEST {
        return Ok(None);
    }
    let part = cut(&picture, window, &folder.join(format!("images/{index:06}_part.jpg")))?;
    let question =
        pick(rng, &["Find the area that Image-1 shows in Image-2.", "Which area of Image-2 is shown in Image-1?"]);
    Ok(Some(sample(
        thing,
        "part_of",
        question.to_owned(),
        vec![part, absolute(own)?],
        Target { image: 2, bbox: window, label: Some("Image-1".into()) },
        vec![facts(known, own, Some(window)), facts(known, own, None)],
        json!({"relation": "part_of", "reference": 1, "target": 2, "name": thing.label}),
    )))
}

/// Two windows of the picture that both hold the thing.
fn same_object(
    folder: &Path,
    known: &Known,
    thing: &Thing,
    index: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Option<Sample>> {
    let own = thing.row.images[0].as_path();
    // Of two that are alike the question could mean either.
    let same =
        known[own].iter().filter(|(label, bbox)| alike(label, thing.label) && bbox.iou(&thing.bbox) < 0.7).count();
    let picture = decode(own)?;
    let bounds = picture.size().bounds();
    let shortest = bounds.width().min(bounds.height());
    if same > 0 || thing.bbox.area() > LARGEST * bounds.area() || shortest * 0.5 < SHORTEST {
        return Ok(None);
    }
    let windows = (0..24).find_map(|_| {
        let pair = [window(rng, thing.bbox, bounds), window(rng, thing.bbox, bounds)];
        (pair[0].iou(&pair[1]) < 0.6).then_some(pair)
    });
    let Some([first, second]) = windows else { return Ok(None) };
    let images = [("a", first), ("b", second)]
        .map(|(name, window)| cut(&picture, window, &folder.join(format!("images/{index:06}_{name}.jpg"))));
    let question = pick(rng, &["Find the {X} of Image-1 in Image-2.", "Where is the {X} of Image-1 in Image-2?"]);
    Ok(Some(sample(
        thing,
        "same_object",
        question.replace("{X}", thing.label),
        images.into_iter().collect::<Result<_>>()?,
        Target { image: 2, bbox: inside(whole(thing.bbox), second), label: Some(thing.label.to_owned()) },
        vec![facts(known, own, Some(first)), facts(known, own, Some(second))],
        json!({"relation": "same_object", "reference": 1, "target": 2, "name": thing.label}),
    )))
}

fn sample(
    thing: &Thing,
    task: &str,
    question: String,
    images: Vec<PathBuf>,
    target: Target,
    objects: Vec<Value>,
    relation: Value,
) -> Sample {
    let answer = json!([{"image": target.image, "bbox": whole_pixels(target.bbox), "label": target.label}]);
    Sample {
        id: format!("{}-{task}", thing.row.id),
        images,
        question,
        choices: Vec::new(),
        answer: answer.to_string(),
        targets: vec![target],
        task: Some(task.to_owned()),
        split: thing.row.split.clone(),
        extra: Map::from_iter([("objects".into(), objects.into()), ("relations".into(), vec![relation].into())]),
    }
}

/// What is known of a picture, or of what a window of it shows by half or more.
fn facts(known: &Known, path: &Path, window: Option<BBox>) -> Value {
    let mut objects: Vec<Value> = Vec::new();
    for (label, bbox) in known.get(path).into_iter().flatten() {
        let bbox = match window {
            Some(window) if window.contains_fraction(bbox) < 0.5 => continue,
            Some(window) => inside(whole(*bbox), window),
            None => whole(*bbox),
        };
        let object = json!({"name": label, "bbox": whole_pixels(bbox)});
        // Several rows may speak of one thing, in several words; the first of them name it.
        if !objects.iter().any(|other| other["bbox"] == object["bbox"]) {
            objects.push(object);
        }
    }
    objects.into()
}

fn whole(bbox: BBox) -> BBox {
    bbox.round_outward()
}

/// A box of the picture in pixels of a window of it, clipped to it.
fn inside(bbox: BBox, window: BBox) -> BBox {
    let moved = BBox::new(bbox.x1 - window.x1, bbox.y1 - window.y1, bbox.x2 - window.x1, bbox.y2 - window.y1);
    moved.clamp(&BBox::new(0.0, 0.0, window.width(), window.height()))
}

/// `bbox` with a margin, in whole pixels inside `bounds`.
fn around(bbox: BBox, margin: f64, bounds: BBox) -> BBox {
    let (cx, cy) = bbox.center();
    let (w, h) = (bbox.width() * margin / 2.0, bbox.height() * margin / 2.0);
    BBox::new(cx - w, cy - h, cx + w, cy + h).round_outward().clamp(&bounds)
}

/// Half to four fifths of the picture each way, somewhere, with the whole of `bbox` in it.
fn window(rng: &mut ChaCha8Rng, bbox: BBox, bounds: BBox) -> BBox {
    let mut axis = |low: f64, high: f64, end: f64| {
        let side = (end * rng.random_range(0.5..=0.8)).max(high - low).min(end);
        let first = (high - side).max(0.0);
        let last = low.min(end - side).max(first);
        let from = rng.random_range(first..=last);
        (from, from + side)
    };
    let ((x1, x2), (y1, y2)) = (axis(bbox.x1, bbox.x2, bounds.x2), axis(bbox.y1, bbox.y2, bounds.y2));
    BBox::new(x1, y1, x2, y2).round_outward().clamp(&bounds)
}

fn cut(picture: &Picture, window: BBox, path: &Path) -> Result<PathBuf> {
    let rgb = picture.cut(&window).with_context(|| format!("the window {window} lies outside the picture"))?;
    save(&rgb, path)?;
    Ok(path.to_owned())
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("finding the picture {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::trajectories::{Detail, Facts, by_rules, judge};

    /// Three pictures of 400 x 300 with one thing each, and a second row about the first's.
    fn rows(folder: &Path) -> PathBuf {
        let mut samples = Vec::new();
        for (k, label) in ["a red cup", "a dog", "the man in blue"].into_iter().enumerate() {
            let path = folder.join(format!("{k}.png"));
            image::RgbImage::from_fn(400, 300, |x, y| image::Rgb([x as u8, y as u8, k as u8 * 80]))
                .save(&path)
                .unwrap();
            let mut row = Sample::question(&[path], "Where?", vec![]);
            row.id = format!("r{k}");
            row.answer = "x".into();
            let x = 40.0 + 100.0 * k as f64;
            row.targets =
                vec![Target { image: 1, bbox: BBox::new(x, 90.0, x + 60.0, 150.0), label: Some(label.into()) }];
            samples.push(row);
        }
        samples.push(Sample { id: "unlabelled".into(), targets: vec![], ..samples[0].clone() });
        let path = folder.join("rows.jsonl");
        data::write(&path, &samples).unwrap();
        path
    }

    #[test]
    fn three_kinds_of_questions_whose_boxes_fit_their_pictures() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let options = Options { rows: rows(folder.path()), out: out.clone(), pictures: [2, 3], seed: 1 };
        let report = build(&options, &|_, _| ()).unwrap();
        assert_eq!((report.rows, report.unfit, report.without_contrast), (4, 1, 0));
        assert_eq!(report.written.values().sum::<usize>(), 3);
        assert_eq!(report.written.len(), 3, "{report:?}");
        assert!(data::check(&out.join("rows.jsonl")).unwrap().problems.is_empty());
        for row in data::read(&out.join("rows.jsonl")).unwrap() {
            let target = &row.targets[0];
            let picture = decode(&row.images[target.image - 1]).unwrap();
            assert!(picture.size().bounds().contains(&target.bbox));
            // The pictures say where a pixel came from: x is red, y is green.
            let cut = picture.cut(&target.bbox).unwrap();
            let corner = cut.get_pixel(0, 0).0;
            let expected: (f64, f64) = match row.task.as_deref() {
                Some("part_of") => (target.bbox.x1, target.bbox.y1),
                _ => {
                    let k: usize = row.id[1..2].parse().unwrap();
                    (40.0 + 100.0 * k as f64, 90.0)
                }
            };
            // JPEG moves a smooth ramp by a few levels.
            assert!((f64::from(corner[0]) - expected.0 % 256.0).abs() < 6.0, "{} {corner:?} {expected:?}", row.id);
            assert!((f64::from(corner[1]) - expected.1).abs() < 6.0, "{} {corner:?} {expected:?}", row.id);
            let facts = Facts::of(&row).unwrap();
            let trace = by_rules(&row, &facts, Detail::Full, 1);
            assert_eq!(judge(&trace, &row, &Facts::of(&row).unwrap()), Ok(()), "{trace}");
            let words: Vec<&str> = row.question.split(' ').chain(trace.split(' ')).collect();
            let article = |word: &str| matches!(word, "a" | "an" | "the");
            assert!(!words.windows(2).any(|two| two.iter().all(|word| article(word))), "{} {trace}", row.question);
        }
        assert!(format!("{:#}", build(&options, &|_, _| ()).unwrap_err()).contains("already"));
    }

    #[test]
    fn names_that_may_mean_the_same_do_not_stand_side_by_side() {
        assert!(alike("dog", "the black Dog") && alike("a dog", "dogs playing") && alike("left cat", "right cat"));
        assert!(alike("left", "red cup") && !alike("left dog", "right cat"));
        assert_eq!(
            (bare("The man in blue"), bare(" an apple"), bare("antelope")),
            ("man in blue", "apple", "antelope")
        );
    }
}
