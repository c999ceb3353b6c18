//! Benchmarks of multiple choice: V*, MME-RealWorld, HR-Bench, TreeBench and what else VLMEvalKit has in columns of options (spec 3.1-3.3, 3.6).
//!
//! What must stay true: the letter published stays with the row beside the letter of the choice as it is shown; options are shown in the
//! order published, but where a set puts the right one first.

use std::path::Path;

use serde_json::{Map, Value};

use super::fields::{Fault, Given, boxes, describe, fault, list, target, word};
use super::published::{Published, split_options};
use super::{Sample, Target};

/// V*'s questions: options stand in the text. The boxes are in the JSON beside the picture, where that is there.
pub(super) fn vstar(given: &Given) -> Result<Sample, Fault> {
    let text = given.said("text")?;
    let Some((question, options)) = split_options(&text) else {
        return fault("text", format!("found {}, expected options (A), (B), …", describe(&text.into())));
    };
    let images = given.pictures(&["image"])?;
    let label = given.word(&["label"])?;
    let id = given.maybe(&["question_id"]);
    let mut published = Published { category: given.maybe(&["category"]), ..Published::of(given, id.clone()) };
    (published.text, published.options, published.answer) = (Some(text), options, label.clone().into());
    let mut row = given.sample(given.id(id.as_deref()), images, question, label.clone());
    if let Some(beside) = row.images.first().and_then(|path| beside(path)) {
        row.targets = marked(&beside, &mut published)?;
    }
    published.into_choices(row, &label, false)
}

/// The JSON beside a picture of V*.
fn beside(picture: &Path) -> Option<Map<String, Value>> {
    serde_json::from_slice(&std::fs::read(picture.with_extension("json")).ok()?).ok()
}

/// V*'s boxes: x, y, width and height, each with the name of its object.
fn marked(row: &Map<String, Value>, published: &mut Published) -> Result<Vec<Target>, Fault> {
    let names = row.get("target_object").and_then(list).unwrap_or_default();
    (published.boxes, published.sides) = (row.get("bbox").map(boxes).unwrap_or_default(), true);
    let target = |(k, &[x, y, w, h]): (usize, &[f64; 4])| {
        target(&format!("bbox[{k}]"), [x, y, x + w, y + h], names.get(k).and_then(word))
    };
    published.boxes.iter().enumerate().map(target).collect()
}

/// A JSON of V*'s folders, whose right option is the first: shown in an order of its own (spec 3.1).
pub(super) fn vstar_beside(given: &Given) -> Result<Sample, Fault> {
    let options = options(given, "options")?;
    let images = given.pictures(&["image"])?;
    let question = given.said("question")?;
    // The category and the name are the folder's and the picture's.
    let folder = images.first().and_then(|path| path.parent()?.file_name()?.to_str()).map(str::to_owned);
    let stem = images.first().and_then(|path| path.file_stem()?.to_str()).map(str::to_owned);
    let id = folder.iter().chain(&stem).cloned().collect::<Vec<_>>().join("/");
    let mut published = Published { category: folder, options, ..Published::of(given, stem) };
    published.answer = "A".into();
    let mut row = given.sample(given.id(Some(&id)), images, question, String::new());
    row.targets = marked(given.values(), &mut published)?;
    published.into_choices(row, "A", true)
}

fn options(given: &Given, key: &str) -> Result<Vec<String>, Fault> {
    let Some(value) = given.value(key) else {
        return fault(key, "this key is missing, expected a list of options");
    };
    let texts: Option<Vec<String>> = list(value).and_then(|list| list.iter().map(word).collect());
    match texts {
        Some(texts) => Ok(texts),
        None => fault(key, format!("found {}, expected a list of options", describe(value))),
    }
}

/// MME-RealWorld as its authors have it.
pub(super) fn mme_realworld(given: &Given) -> Result<Sample, Fault> {
    let id = given.maybe(&["Question_id"]);
    let letter = given.word(&["Ground truth"])?;
    // Perception or Reasoning, and which of the five fields.
    let parts: Vec<String> = ["Task", "Subtask"].iter().filter_map(|key| given.maybe(&[key])).collect();
    let published = Published {
        category: (!parts.is_empty()).then(|| parts.join("/")),
        subcategory: given.maybe(&["Category"]),
        options: options(given, "Answer choices")?,
        answer: letter.clone().into(),
        ..Published::of(given, id.clone())
    };
    let images = given.pictures(&["Image"])?;
    let row = given.sample(given.id(id.as_deref()), images, given.said("Text")?, letter.clone());
    published.keep(given, &["Question Type"]).into_choices(row, &letter, false)
}

/// MME-RealWorld as lmms-eval has it.
pub(super) fn mme_realworld_table(given: &Given) -> Result<Sample, Fault> {
    let id = given.maybe(&["index"]);
    let letter = given.word(&["answer"])?;
    let published = Published {
        category: given.maybe(&["category"]),
        subcategory: given.maybe(&["l2-category"]),
        options: options(given, "multi-choice options")?,
        answer: letter.clone().into(),
        ..Published::of(given, id.clone())
    };
    let images = given.pictures(&["bytes", "image", "images"])?;
    let row = given.sample(given.id(id.as_deref()), images, given.said("question")?, letter.clone());
    published.into_choices(row, &letter, false)
}

/// A column for each option, as far as there are letters: HR-Bench with its cycles, TreeBench with its boxes, and others.
pub(super) fn columns(given: &Given) -> Result<Sample, Fault> {
    let id = given.maybe(&["index"]);
    let letter = given.word(&["answer"])?;
    let mut published = Published {
        category: given.maybe(&["category"]),
        subcategory: given.maybe(&["l2-category", "l2_category"]),
        cycle: given.maybe(&["cycle_category"]),
        answer: letter.clone().into(),
        ..Published::of(given, id.clone())
    };
    published.options = ('A'..='Z').map_while(|letter| given.maybe(&[&letter.to_string()])).collect();
    let mut question = given.said("question")?;
    if published.options.is_empty() {
        // TreeBench's are in one text, lettered, line by line; where that is empty, they stand in the question.
        let text = given.maybe(&["multi-choice options"]).unwrap_or_default();
        if let Some((_, options)) = split_options(&text) {
            published.options = options;
        } else if let Some((before, options)) = split_options(&question) {
            (published.text, published.options, question) = (Some(question), options, before);
        }
    }
    published.boxes = given.value("target_instances").map(boxes).unwrap_or_default();
    let images = given.pictures(&["image", "images", "image_path"])?;
    // What VLMEvalKit puts before the question.
    if let Some(hint) = given.maybe(&["hint"]) {
        question = format!("{}\n{}", hint.trim(), question.trim());
    }
    let mut row = given.sample(given.id(id.as_deref()), images, question, letter.clone());
    let boxed = |(k, &corners): (usize, &[f64; 4])| target(&format!("target_instances[{k}]"), corners, None);
    row.targets = published.boxes.iter().enumerate().map(boxed).collect::<Result<_, _>>()?;
    published.keep(given, &["target_instances"]).into_choices(row, &letter, false)
}
