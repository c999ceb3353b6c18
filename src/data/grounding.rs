//! Sets whose answers are boxes, as they are published: the RefCOCO family and COCO (spec 3.7).
//!
//! What must stay true: every expression is a question of its own; all boxes of a kind in one picture are one answer; the same rows come
//! out here and from `data convert --from refcoco`.

use std::collections::BTreeMap;

use serde_json::Value;

use super::convert::{answer, located};
use super::fields::{Fault, Given, boxes, fault, target, word};
use super::published::Published;
use super::{Sample, Target, refcoco};

/// RefCOCO, + and g: lmms-lab's rows with all expressions of a box, and VLM-R1's.
pub(super) fn expressions(given: &Given) -> Result<Vec<Sample>, Fault> {
    let row: refcoco::Row = serde_json::from_value(Value::Object(given.values().clone()))
        .or_else(|e| fault("", format!("this is no row of RefCOCO: {e}")))?;
    // In lmms-lab's tables the picture itself; in exports of them its name.
    let images = given.pictures(&["image", "images", "file_name"])?;
    let id = row.question_id.as_ref().and_then(word);
    let published = match (&row.bbox, &row.solution) {
        (Some(bbox), _) => Published { boxes: vec![*bbox], sides: true, ..Published::of(given, id) },
        (None, solution) => Published { boxes: solution.iter().copied().collect(), ..Published::of(given, id) },
    };
    let asked = row.asked().or_else(|e| fault("", e.to_string()))?;
    let question = |(k, asked): (usize, refcoco::Asked)| {
        let corners = <[f64; 4]>::from(asked.bbox);
        let found = target("bbox", corners, asked.label.clone())?;
        let mut sample =
            given.sample(format!("refcoco-{}-{}", given.ordinal, k + 1), images.clone(), asked.question, String::new());
        sample.answer = answer(std::slice::from_ref(&found));
        sample.targets = vec![found];
        let mut published = published.clone().keep(given, &["file_name", "dataset", "split"]);
        published.category = Some("refcoco".into());
        published.answer = asked.label.map_or(Value::Null, Value::from);
        published.into_row(sample)
    };
    asked.into_iter().enumerate().map(question).collect()
}

/// A picture of COCO: for each category that is in it, where all of that category are. Crowds are no single things and are left out.
pub(super) fn coco(given: &Given) -> Result<Vec<Sample>, Fault> {
    let image = given.value("coco_image").cloned().unwrap_or_default();
    let Some(name) = image["file_name"].as_str() else {
        return fault("images.file_name", "this key is missing, expected the picture's path");
    };
    let path = located(name, given.base, &[]);
    let number = word(&image["id"]).unwrap_or_else(|| given.ordinal.to_string());
    let mut by_category: BTreeMap<String, Vec<(Target, [f64; 4])>> = BTreeMap::new();
    let annotations = given.value("coco_annotations").and_then(Value::as_array).cloned().unwrap_or_default();
    for (k, annotation) in annotations.iter().enumerate() {
        let key = format!("annotations[{k}]");
        let Some(category) = annotation["category"].as_str() else {
            return fault(format!("{key}.category_id"), "there is no category of this number");
        };
        if word(&annotation["iscrowd"]).is_some_and(|crowd| crowd != "0" && crowd != "false") {
            continue;
        }
        let [[x, y, w, h]] = boxes(&annotation["bbox"])[..] else {
            return fault(format!("{key}.bbox"), "expected x, y, width and height");
        };
        let found = target(&format!("{key}.bbox"), [x, y, x + w, y + h], Some(category.to_owned()))?;
        by_category.entry(category.to_owned()).or_default().push((found, [x, y, w, h]));
    }
    let row = |(category, found): (String, Vec<(Target, [f64; 4])>)| {
        let (targets, boxes): (Vec<Target>, Vec<[f64; 4]>) = found.into_iter().unzip();
        let id = given.id(Some(&format!("{number}-{}", category.replace(' ', "_"))));
        let question = format!("Locate every {category} in the picture");
        let mut sample = given.sample(id, vec![path.clone()], question, answer(&targets));
        sample.targets = targets;
        let published = Published::of(given, Some(number.clone()));
        Published { category: Some(category), boxes, sides: true, ..published }.into_row(sample)
    };
    by_category.into_iter().map(row).collect()
}
