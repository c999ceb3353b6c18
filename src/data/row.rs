//! One line of a data file becomes a [`Sample`], or the key at fault and why.
//!
//! Written by hand over `serde_json::Value` so that an error says which key was wrong, what was found there and what was
//! expected. What must stay true: no value is guessed; only numbers given as answers or ids are taken as their text.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Sample, Target};
use crate::geometry::BBox;

/// Key and reason.
type Fault = (String, String);

fn fault<T>(key: impl Into<String>, reason: impl Into<String>) -> Result<T, Fault> {
    Err((key.into(), reason.into()))
}

/// `folder` is where relative picture paths start.
pub(super) fn parse(line: &[u8], folder: &Path) -> Result<Sample, Fault> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|e| (String::new(), format!("this is not JSON ({e}), expected one JSON object a line")))?;
    let Value::Object(mut row) = value else {
        return fault("", format!("found {}, expected one JSON object a line", describe(&value)));
    };
    let id = match row.shift_remove("id") {
        Some(Value::Number(n)) => n.to_string(),
        other => text("id", other)?,
    };
    let names = texts("images", row.shift_remove("images"))?;
    if names.is_empty() {
        return fault("images", "found an empty list, expected at least one path");
    }
    let images = names.iter().map(|name| folder.join(name)).collect::<Vec<_>>();
    let question = said("question", row.shift_remove("question"))?;
    let choices = match row.shift_remove("choices") {
        None | Some(Value::Null) => Vec::new(),
        some => texts("choices", some)?,
    };
    let answer = match row.shift_remove("answer") {
        Some(Value::Number(n)) => n.to_string(),
        other => said("answer", other)?,
    };
    let targets = match row.shift_remove("targets") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list
            .into_iter()
            .enumerate()
            .map(|(k, value)| target(&format!("targets[{k}]"), value, images.len()))
            .collect::<Result<_, _>>()?,
        Some(other) => {
            return fault("targets", format!("found {}, expected a list of {{\"image\", \"bbox\"}}", describe(&other)));
        }
    };
    let task = optional_text("task", &mut row)?;
    let split = optional_text("split", &mut row)?;
    Ok(Sample { id, images, question, choices, answer, targets, task, split, extra: row })
}

fn target(key: &str, value: Value, images: usize) -> Result<Target, Fault> {
    let Value::Object(mut value) = value else {
        return fault(key, format!("found {}, expected {{\"image\", \"bbox\"}}", describe(&value)));
    };
    let image = value.shift_remove("image").unwrap_or(Value::Null);
    let Some(number) = image.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=images).contains(n)) else {
        return fault(
            format!("{key}.image"),
            format!("found {}, expected 1 to {images} (pictures count from 1)", describe(&image)),
        );
    };
    let bbox = value.shift_remove("bbox").unwrap_or(Value::Null);
    let sides: Option<Vec<f64>> = bbox.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
    let bbox = match sides.as_deref() {
        Some(&[x1, y1, x2, y2]) if x1 < x2 && y1 < y2 => BBox::new(x1, y1, x2, y2),
        _ => {
            return fault(
                format!("{key}.bbox"),
                format!("found {}, expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2", describe(&bbox)),
            );
        }
    };
    let label = optional_text("label", &mut value).map_err(|(k, reason)| (format!("{key}.{k}"), reason))?;
    Ok(Target { image: number, bbox, label })
}

fn text(key: &str, value: Option<Value>) -> Result<String, Fault> {
    match value {
        Some(Value::String(text)) => Ok(text),
        None => fault(key, "this key is missing, expected a text"),
        Some(other) => fault(key, format!("found {}, expected a text", describe(&other))),
    }
}

/// A text that says something: nothing can be asked by an empty question, nor judged by an empty answer.
fn said(key: &str, value: Option<Value>) -> Result<String, Fault> {
    let said = text(key, value)?;
    if said.trim().is_empty() {
        return fault(key, format!("found {}, expected a text that says something", describe(&Value::String(said))));
    }
    Ok(said)
}

fn optional_text(key: &str, row: &mut Map<String, Value>) -> Result<Option<String>, Fault> {
    match row.shift_remove(key) {
        None | Some(Value::Null) => Ok(None),
        some => text(key, some).map(Some),
    }
}

fn texts(key: &str, value: Option<Value>) -> Result<Vec<String>, Fault> {
    match value {
        Some(Value::Array(list)) => {
            list.into_iter().enumerate().map(|(k, v)| text(&format!("{key}[{k}]"), Some(v))).collect()
        }
        None => fault(key, "this key is missing, expected a list of texts"),
        Some(other) => fault(key, format!("found {}, expected a list of texts", describe(&other))),
    }
}

/// A value in an error message: its kind, and itself as far as it is short.
fn describe(value: &Value) -> String {
    let short = |text: String| {
        if text.chars().count() > 60 { text.chars().take(57).collect::<String>() + "..." } else { text }
    };
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("{b}"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => format!("the text {}", short(format!("{s:?}"))),
        Value::Array(_) => format!("the list {}", short(value.to_string())),
        Value::Object(_) => format!("the object {}", short(value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(line: &str) -> String {
        parse(line.as_bytes(), Path::new("d")).unwrap_err().0
    }

    #[test]
    fn numbers_are_taken_as_answers_and_ids_but_nothing_else() {
        let sample = parse(br#"{"id":3,"images":["x.jpg"],"question":"?","answer":42}"#, Path::new("d")).unwrap();
        assert_eq!((sample.id.as_str(), sample.answer.as_str()), ("3", "42"));
        assert_eq!(sample.images, [Path::new("d/x.jpg")]);
        assert_eq!(key_of(r#"{"id":3,"images":["x.jpg"],"question":"?","answer":true}"#), "answer");
        assert_eq!(key_of(r#"{"id":3,"images":"x.jpg","question":"?","answer":"4"}"#), "images");
        assert_eq!(key_of(r#"{"id":3,"images":[1],"question":"?","answer":"4"}"#), "images[0]");
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"answer":"4"}"#), "question");
        assert_eq!(
            key_of(r#"{"id":3,"images":["x"],"question":"?","answer":"4","targets":[{"image":1,"bbox":[4,0,2,1]}]}"#),
            "targets[0].bbox"
        );
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"question":" ","answer":"4"}"#), "question");
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"question":"?","answer":""}"#), "answer");
        assert_eq!(key_of("[1]"), "");
    }
}
