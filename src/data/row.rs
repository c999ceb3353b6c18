//! A row of our own becomes a [`Sample`], or the key at fault and why.
//!
//! Written by hand over `serde_json::Value` so that an error says which key was wrong, what was found there and what was
//! expected. What must stay true: no value is guessed; only numbers given as answers or ids are taken as their text.

use serde_json::Value;

use super::fields::{Fault, Given, describe, fault, optional_text, said, text, texts};
use super::{Sample, Target};
use crate::geometry::BBox;
use crate::reward::letter;

pub(super) fn parse(given: &Given) -> Result<Sample, Fault> {
    let mut row = given.values().clone();
    let id = match row.shift_remove("id") {
        Some(Value::Number(n)) => n.to_string(),
        other => text("id", other)?,
    };
    let named = row.shift_remove("images");
    let images = match given.record.pictures.iter().find(|(column, _)| column == "images") {
        Some((_, inside)) if inside.is_empty() => return fault("images", "the cell is empty, expected a picture"),
        Some((_, inside)) => inside.clone(),
        // An empty list is a question of words alone; which tasks ask such a one, they say themselves.
        None => texts("images", named)?.iter().map(|name| given.base.join(name)).collect(),
    };
    let question = said("question", row.shift_remove("question"))?;
    if images.is_empty() && question.contains("<image>") {
        return fault("images", "found an empty list, and the question shows an <image>");
    }
    let choices = match row.shift_remove("choices") {
        None | Some(Value::Null) => Vec::new(),
        some => texts("choices", some)?,
    };
    let answer = match row.shift_remove("answer") {
        Some(Value::Number(n)) => n.to_string(),
        other => said("answer", other)?,
    };
    if !choices.is_empty() {
        let is_answer = |choice: &&String| choice.trim() == answer.trim();
        let with_text = choices.iter().filter(is_answer).count();
        let reason = match letter(&answer, &choices) {
            None if with_text > 1 => {
                Some(format!("found {answer:?}, the text of {with_text} choices; give its letter"))
            }
            None => Some(format!(
                "found {answer:?}, expected the letter or the text of one of its {} choices",
                choices.len()
            )),
            // Which of the two is meant nobody could tell.
            Some(named)
                if with_text > 0
                    && !choices.get(usize::from(named as u8 - b'A')).is_some_and(|choice| is_answer(&choice)) =>
            {
                Some(format!(
                    "found {answer:?}, a letter and the text of another choice; give the letter in parentheses"
                ))
            }
            Some(_) => None,
        };
        if let Some(reason) = reason {
            return fault("answer", reason);
        }
    }
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

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::*;
    use crate::table::Record;
    use std::path::Path;

    fn read(line: &str) -> Result<Sample, Fault> {
        let values = serde_json::from_str(line).unwrap();
        let record = Record { number: 1, values, pictures: Vec::new() };
        parse(&Given { format: Format::Own, record: &record, base: Path::new("d"), ordinal: 1 })
    }

    fn key_of(line: &str) -> String {
        read(line).unwrap_err().0
    }

    #[test]
    fn numbers_are_taken_as_answers_and_ids_but_nothing_else() {
        let sample = read(r#"{"id":3,"images":["x.jpg"],"question":"?","answer":42}"#).unwrap();
        assert_eq!((sample.id.as_str(), sample.answer.as_str()), ("3", "42"));
        assert_eq!(sample.images, [Path::new("d/x.jpg")]);
        assert_eq!(key_of(r#"{"id":3,"images":["x.jpg"],"question":"?","answer":true}"#), "answer");
        let words = read(r#"{"id":3,"images":[],"question":"?","answer":"4"}"#).unwrap();
        assert!(words.images.is_empty(), "a question of words alone");
        assert_eq!(key_of(r#"{"id":3,"question":"?","answer":"4"}"#), "images");
        assert_eq!(key_of(r#"{"id":3,"images":"x.jpg","question":"?","answer":"4"}"#), "images");
        assert_eq!(key_of(r#"{"id":3,"images":[1],"question":"?","answer":"4"}"#), "images[0]");
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"answer":"4"}"#), "question");
        assert_eq!(
            key_of(r#"{"id":3,"images":["x"],"question":"?","answer":"4","targets":[{"image":1,"bbox":[4,0,2,1]}]}"#),
            "targets[0].bbox"
        );
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"question":" ","answer":"4"}"#), "question");
        assert_eq!(key_of(r#"{"id":3,"images":["x"],"question":"?","answer":""}"#), "answer");
        let chosen = |answer: &str| {
            format!(r#"{{"id":3,"images":["x"],"question":"?","choices":["cat","dog"],"answer":"{answer}"}}"#)
        };
        assert_eq!(key_of(&chosen("D")), "answer");
        ["B", "b", "dog", "(A)"].iter().for_each(|answer| assert!(read(&chosen(answer)).is_ok(), "{answer}"));
    }
}
