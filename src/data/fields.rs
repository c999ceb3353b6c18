//! What a row says under a key, or the key at fault and why.
//!
//! It hides that one set writes a list as a list and another as the text of one, and where a row's pictures are. What must stay true: an
//! error says which key was wrong, what was found there and what was expected; no value is guessed.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::convert::located;
use super::{Format, Sample, Target};
use crate::geometry::BBox;
use crate::table::Record;

/// Key and reason.
pub(super) type Fault = (String, String);

pub(super) fn fault<T>(key: impl Into<String>, reason: impl Into<String>) -> Result<T, Fault> {
    Err((key.into(), reason.into()))
}

/// A row as a format's reader gets it.
pub(super) struct Given<'a> {
    pub format: Format,
    pub record: &'a Record,
    /// Where relative paths of pictures start.
    pub base: &'a Path,
    /// The row's number over all files of the set, for rows without a name of their own.
    pub ordinal: usize,
}

impl Given<'_> {
    pub fn values(&self) -> &Map<String, Value> {
        &self.record.values
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values().get(key).filter(|value| !value.is_null())
    }

    /// A text that says something.
    pub fn said(&self, key: &str) -> Result<String, Fault> {
        said(key, self.value(key).cloned())
    }

    /// The first of the keys that there is, as text; numbers are their digits.
    pub fn maybe(&self, keys: &[&str]) -> Option<String> {
        keys.iter().find_map(|key| word(self.value(key)?)).filter(|text| !text.trim().is_empty())
    }

    /// The same, where one of them must be there.
    pub fn word(&self, keys: &[&str]) -> Result<String, Fault> {
        match self.maybe(keys) {
            Some(text) => Ok(text.trim().to_owned()),
            None => said(keys[0], keys.iter().find_map(|key| self.value(key)).cloned()),
        }
    }

    /// The row's name: the set's own, or its number.
    pub fn id(&self, published: Option<&str>) -> String {
        match published {
            Some(id) => format!("{}-{id}", self.format.name()),
            None => format!("{}-{}", self.format.name(), self.ordinal),
        }
    }

    /// The pictures under the first of these keys that has any: in the table's cells, or in files of their own.
    pub fn pictures(&self, keys: &[&str]) -> Result<Vec<PathBuf>, Fault> {
        for key in keys {
            if let Some((_, pictures)) = self.record.pictures.iter().find(|(column, p)| column == key && !p.is_empty())
            {
                return Ok(pictures.clone());
            }
            let names = match self.value(key) {
                Some(Value::String(name)) if !name.is_empty() => vec![name.clone()],
                Some(Value::Array(list)) if !list.is_empty() => {
                    let name = |(k, value): (usize, &Value)| match value.as_str().or(value["path"].as_str()) {
                        Some(name) => Ok(name.to_owned()),
                        None => fault(format!("{key}[{k}]"), format!("found {}, expected a path", describe(value))),
                    };
                    list.iter().enumerate().map(name).collect::<Result<_, _>>()?
                }
                Some(Value::Object(one)) if one.get("path").is_some_and(Value::is_string) => {
                    one["path"].as_str().map(str::to_owned).into_iter().collect()
                }
                _ => continue,
            };
            return Ok(names.iter().map(|name| located(name, self.base, &[])).collect());
        }
        fault(keys[0], "the row has no picture, expected a path or the picture itself")
    }

    /// A row of the plainest kind.
    pub fn sample(&self, id: String, images: Vec<PathBuf>, question: String, answer: String) -> Sample {
        Sample { id, answer, ..Sample::question(&images, question.trim(), Vec::new()) }
    }
}

/// A value as a word: a text, a number, yes or no.
pub(super) fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A list, or a text that is one as JSON or Python writes it.
pub(super) fn list(value: &Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(list) => Some(list.clone()),
        Value::String(text) if text.trim_start().starts_with(['[', '(']) => {
            let json = text.replace('(', "[").replace(')', "]");
            serde_json::from_str(text).or_else(|_| serde_json::from_str(&json)).ok().or_else(|| quoted(text))
        }
        _ => None,
    }
}

/// The texts of a list as Python writes it: each between marks that it does not hold itself, or holds behind a backslash.
fn quoted(text: &str) -> Option<Vec<Value>> {
    let mut found = Vec::new();
    let mut rest = text.trim().strip_prefix('[')?.strip_suffix(']')?.trim();
    while !rest.is_empty() {
        let mark = rest.chars().next().filter(|c| ['\'', '"'].contains(c))?;
        let (mut one, mut chars, mut end) = (String::new(), rest[1..].char_indices(), None);
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => one.push(chars.next()?.1),
                c if c == mark => {
                    end = Some(at);
                    break;
                }
                c => one.push(c),
            }
        }
        found.push(Value::String(one));
        // One for the mark it began with, one for the mark it ends with.
        rest = rest.get(end? + 2..)?.trim_start();
        rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
    }
    Some(found)
}

/// Every run of four numbers in a value, however deep: `[x1, y1, x2, y2]`, a list of them, objects that hold one, or a text of these.
pub(super) fn boxes(value: &Value) -> Vec<[f64; 4]> {
    match value {
        Value::Array(numbers) => {
            let four: Option<Vec<f64>> = numbers.iter().map(Value::as_f64).collect();
            match four.as_deref() {
                Some(&[a, b, c, d]) => vec![[a, b, c, d]],
                _ => numbers.iter().flat_map(boxes).collect(),
            }
        }
        Value::Object(object) => object.values().flat_map(boxes).collect(),
        Value::String(_) => list(value).map(|list| boxes(&Value::Array(list))).unwrap_or_default(),
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

/// A target in the first picture.
pub(super) fn target(key: &str, corners: [f64; 4], label: Option<String>) -> Result<Target, Fault> {
    let bbox = BBox::from(corners);
    if !(bbox.is_finite() && bbox.width() > 0.0 && bbox.height() > 0.0) {
        return fault(key, format!("found {bbox}, expected a box with an area"));
    }
    Ok(Target { image: 1, bbox, label })
}

pub(super) fn text(key: &str, value: Option<Value>) -> Result<String, Fault> {
    match value {
        Some(Value::String(text)) => Ok(text),
        None => fault(key, "this key is missing, expected a text"),
        Some(other) => fault(key, format!("found {}, expected a text", describe(&other))),
    }
}

/// A text that says something: nothing can be asked by an empty question, nor judged by an empty answer.
pub(super) fn said(key: &str, value: Option<Value>) -> Result<String, Fault> {
    let said = text(key, value)?;
    if said.trim().is_empty() {
        return fault(key, format!("found {}, expected a text that says something", describe(&Value::String(said))));
    }
    Ok(said)
}

pub(super) fn optional_text(key: &str, row: &mut Map<String, Value>) -> Result<Option<String>, Fault> {
    match row.shift_remove(key) {
        None | Some(Value::Null) => Ok(None),
        some => text(key, some).map(Some),
    }
}

pub(super) fn texts(key: &str, value: Option<Value>) -> Result<Vec<String>, Fault> {
    match value {
        Some(Value::Array(list)) => {
            list.into_iter().enumerate().map(|(k, v)| text(&format!("{key}[{k}]"), Some(v))).collect()
        }
        None => fault(key, "this key is missing, expected a list of texts"),
        Some(other) => fault(key, format!("found {}, expected a list of texts", describe(&other))),
    }
}

/// A value in an error message: its kind, and itself as far as it is short.
pub(super) fn describe(value: &Value) -> String {
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
    use serde_json::json;

    #[test]
    fn lists_are_read_as_lists_and_as_texts_of_them() {
        let of = |text: &str| list(&json!(text)).map(|l| l.iter().filter_map(word).collect::<Vec<_>>());
        let abc = Some(vec!["(A) it's 5".to_owned(), "(B) \"six\"".to_owned()]);
        assert_eq!(of(r#"["(A) it's 5", "(B) \"six\""]"#), abc);
        assert_eq!(of(r#"["(A) it's 5", '(B) "six"']"#), abc);
        assert_eq!(of("no list"), None);
        assert_eq!(of("['open"), None);
        assert_eq!(of("[]"), Some(vec![]));
    }

    #[test]
    fn boxes_are_found_however_they_are_wrapped() {
        let four = [1.0, 2.0, 3.0, 4.5];
        for value in [
            json!([1, 2, 3, 4.5]),
            json!([[1, 2, 3, 4.5]]),
            json!("[[1, 2, 3, 4.5]]"),
            json!("[(1, 2, 3, 4.5)]"),
            json!([{"bbox": [1, 2, 3, 4.5], "label": "x"}]),
        ] {
            assert_eq!(boxes(&value), [four], "{value}");
        }
        assert!(boxes(&json!([1, 2, 3])).is_empty() && boxes(&json!("nothing")).is_empty());
    }
}
