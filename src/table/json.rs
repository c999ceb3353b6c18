//! JSON as sets of rows come in it: a list of objects, one object a line, or one object that holds them all.
//!
//! What must stay true: an item that is not JSON is one bad row, named by its number, and the others are read. The text is held whole;
//! pictures are never in it.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{Bad, Each, Record};

/// Keys of a COCO file, whose rows lie across two of its lists.
const COCO: [&str; 2] = ["images", "annotations"];

pub(super) fn scan(path: &Path, each: Each) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("reading the data file {}", path.display()))?;
    // Some editors begin a UTF-8 file with a byte order mark, which is no JSON.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    match bytes.trim_ascii_start().first() {
        Some(b'[') => match serde_json::from_slice::<Vec<&RawValue>>(bytes) {
            Ok(items) => {
                for (i, item) in items.iter().enumerate() {
                    each(record(i + 1, item.get().as_bytes(), "objects in the list"))?;
                }
                return Ok(());
            }
            // A list on each of several lines is bad line by line.
            Err(e) if !one_line(bytes) => {
                return each(Err(Bad { number: 0, rows: 0, reason: format!("this is no whole JSON list ({e})") }));
            }
            Err(_) => {}
        },
        Some(b'{') => {
            let whole = serde_json::from_slice::<Map<String, Value>>(bytes).ok();
            if let Some(whole) = whole.filter(|w| COCO.iter().all(|key| w.get(*key).is_some_and(Value::is_array))) {
                return coco(whole, each);
            }
        }
        _ => {}
    }
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        if !line.trim_ascii().is_empty() {
            each(record(i + 1, line, "one JSON object a line"))?;
        }
    }
    Ok(())
}

fn one_line(bytes: &[u8]) -> bool {
    !bytes.trim_ascii().contains(&b'\n')
}

fn record(number: usize, text: &[u8], expected: &str) -> Result<Record, Bad> {
    let bad = |reason: String| Bad { number, rows: 1, reason };
    let value: Value =
        serde_json::from_slice(text).map_err(|e| bad(format!("this is not JSON ({e}), expected {expected}")))?;
    match value {
        Value::Object(values) => Ok(Record { number, values, pictures: Vec::new() }),
        other => {
            let kind = match other {
                Value::Array(_) => "a list",
                Value::String(_) => "a text",
                Value::Number(_) => "a number",
                Value::Bool(_) | Value::Object(_) => "a value",
                Value::Null => "nothing",
            };
            Err(bad(format!("found {kind}, expected {expected}")))
        }
    }
}

/// Each picture of a COCO file with what was annotated in it: `{"image", "annotations", "categories"}`, the latter two as published.
fn coco(mut whole: Map<String, Value>, each: Each) -> Result<()> {
    let mut list = |key: &str| match whole.shift_remove(key) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let (images, annotations, categories) = (list("images"), list("annotations"), list("categories"));
    let names: Map<String, Value> = categories.iter().map(|c| (c["id"].to_string(), c["name"].clone())).collect();
    let mut of: std::collections::HashMap<String, Vec<Value>> = Default::default();
    for mut annotation in annotations {
        // Outlines are most of the file, and nobody asks for them here.
        if let Some(annotation) = annotation.as_object_mut() {
            annotation.shift_remove("segmentation");
        }
        let name = names.get(&annotation["category_id"].to_string()).cloned().unwrap_or_default();
        annotation["category"] = name;
        of.entry(annotation["image_id"].to_string()).or_default().push(annotation);
    }
    for (i, image) in images.into_iter().enumerate() {
        let annotations = of.remove(&image["id"].to_string()).unwrap_or_default();
        let values = Map::from_iter([
            ("coco_image".to_owned(), image),
            ("coco_annotations".to_owned(), Value::Array(annotations)),
        ]);
        each(Ok(Record { number: i + 1, values, pictures: Vec::new() }))?;
    }
    // What is annotated on no picture of the file must not vanish.
    let lost: usize = of.values().map(Vec::len).sum();
    if lost > 0 {
        each(Err(Bad { number: 0, rows: 0, reason: format!("{lost} annotations are of no picture in \"images\"") }))?;
    }
    Ok(())
}
