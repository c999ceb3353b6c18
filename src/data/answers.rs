//! Benchmarks answered in words or numbers: VisualProbe, ZoomBench, POPE, counting (spec 3.6, 3.8).
//!
//! What must stay true: a picture that shows the answer's place (ZoomBench's `crop_image`) is never shown with the question.

use serde_json::Value;

use super::Sample;
use super::convert::words;
use super::fields::{Fault, Given, boxes, describe, fault, target};
use super::published::{Published, split_options};

/// VisualProbe, and sets of the same keys: `problem`, `solution`.
pub(super) fn visual_probe(given: &Given) -> Result<Sample, Fault> {
    let images = match given.pictures(&["images", "image"]) {
        // Their paths begin with the name of the set, whose folder is the file's own.
        Ok(images) => images.iter().map(|path| unprefixed(path, given)).collect(),
        Err(fault) => return Err(fault),
    };
    let solution = given.word(&["solution"])?;
    let answer = between(&solution, "<answer>", "</answer>").unwrap_or(&solution).trim().to_owned();
    let id = given.maybe(&["doc_id", "id", "index"]);
    let published = Published {
        category: given.maybe(&["category", "level", "difficulty"]),
        answer: solution.clone().into(),
        ..Published::of(given, id)
    };
    let row = given.sample(given.id(None), images, words(&given.said("problem")?), answer);
    published.keep(given, &["data_source"]).into_row(row)
}

/// Without its first folder, where it is not there but is without.
fn unprefixed(path: &std::path::Path, given: &Given) -> std::path::PathBuf {
    let shorter = path
        .strip_prefix(given.base)
        .ok()
        .map(|inner| given.base.join(inner.components().skip(1).collect::<std::path::PathBuf>()));
    match shorter {
        Some(shorter) if !crate::table::is_there(path) && crate::table::is_there(&shorter) => shorter,
        _ => path.to_owned(),
    }
}

fn between<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(open)?;
    Some(rest.split_once(close)?.0)
}

/// ZoomBench: `query`, `response`; some questions bring options.
pub(super) fn zoom_bench(given: &Given) -> Result<Sample, Fault> {
    let (text, answer) = (given.said("query")?, given.word(&["response"])?);
    let id = given.maybe(&["id"]);
    let kind = given.maybe(&["category", "dimension", "question_type"]);
    let mut published = Published { category: kind, answer: answer.clone().into(), ..Published::of(given, id.clone()) };
    published = published.keep(given, &["question_type", "bbox"]);
    published.boxes = given.value("bbox").map(boxes).unwrap_or_default();
    let images = given.pictures(&["image", "images"])?;
    let mut row = given.sample(given.id(id.as_deref()), images, words(&text), answer.clone());
    let boxed = |(k, &corners): (usize, &[f64; 4])| target(&format!("bbox[{k}]"), corners, None);
    row.targets = published.boxes.iter().enumerate().map(boxed).collect::<Result<_, _>>()?;
    // Only a letter says that what looks like options are options.
    let letter = answer.trim().trim_matches(['(', ')', '.']);
    let split = if letter.len() == 1 { split_options(&text) } else { None };
    if let Some((question, options)) = split {
        (row.question, published.options, published.text) = (words(&question), options, Some(text));
        return published.into_choices(row, letter, false);
    }
    published.into_row(row)
}

/// POPE, as its authors have it (`text`, `label`) or as lmms-lab has it.
pub(super) fn pope(given: &Given) -> Result<Sample, Fault> {
    let answer = given.word(&["answer", "label"])?.to_lowercase();
    if !matches!(answer.as_str(), "yes" | "no") {
        return fault("answer", format!("found {}, expected yes or no", describe(&answer.into())));
    }
    let question = given.word(&["question", "text"])?;
    let category = given.maybe(&["category"]);
    // Each of the three ways of asking numbers its questions anew.
    let number = given.maybe(&["question_id"]);
    let parts: Vec<String> = category.iter().chain(&number).cloned().collect();
    let id = given.maybe(&["id"]).unwrap_or_else(|| parts.join("-"));
    let images = given.pictures(&["image", "images"])?;
    let published = Published { category, answer: answer.clone().into(), ..Published::of(given, number) };
    let row = given.sample(given.id(Some(&id)), images, question, answer);
    published.keep(given, &["image_source"]).into_row(row)
}

/// A picture, a question, an answer: counting and whatever else has no more than that.
pub(super) fn plain(given: &Given) -> Result<Sample, Fault> {
    let answer = given.word(&["answer"])?;
    let id = given.maybe(&["question_id", "index"]);
    let images = given.pictures(&["image", "images", "image_path"])?;
    let published =
        Published { category: given.maybe(&["category"]), answer: answer.clone().into(), ..Published::of(given, id) };
    published.into_row(given.sample(given.id(None), images, words(&given.said("question")?), answer))
}

/// Where versions of FSC-147 keep the number, and what is counted; the first that there is.
pub(super) const COUNTS: [&str; 5] = ["annotated_pos_count", "pos_count", "count", "gt_count", "gt_num"];
pub(super) const CAPTIONS: [&str; 4] = ["pos_caption", "caption", "query", "label"];

/// FSC-147: a picture with a number of things of one kind.
pub(super) fn fsc147(given: &Given) -> Result<Sample, Fault> {
    let said = given.word(&COUNTS)?;
    let Some(count) = whole_number(&said) else {
        return fault(COUNTS[0], format!("found {}, expected a number", describe(&Value::from(said))));
    };
    let caption = given.word(&CAPTIONS)?;
    let caption = caption.trim_end_matches(['.', ' ']);
    let what = caption.strip_prefix("The ").or(caption.strip_prefix("the ")).unwrap_or(caption);
    let question = format!("How many {what} are there in the image?");
    let images = given.pictures(&["image", "img", "query_image"])?;
    let id = given.maybe(&["image_id", "id", "index"]);
    let published = Published { answer: count.into(), ..Published::of(given, id) };
    published.into_row(given.sample(given.id(None), images, question, count.to_string()))
}

/// `12`, `12.0`, `1,200`.
pub(super) fn whole_number(text: &str) -> Option<i64> {
    let number: f64 = text.trim().replace(',', "").parse().ok()?;
    (number.fract() == 0.0 && number.abs() < 1e9).then_some(number as i64)
}
