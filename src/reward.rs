//! Judging what a model wrote: small pure judges, composed.
//!
//! A judge reads one text and a known answer and returns named [`Parts`]; weights turn the parts into one reward, and the parts are
//! kept beside it. What must stay true: same input, same output, nothing written anywhere; only the last assistant
//! turn is read, never the prompt or the template; any text at all is judged, none is an error.

mod boxes;
mod choice;
pub mod mig;
mod number;
mod official;
mod shaping;
mod text;

pub use boxes::{
    Gate, MultiImage, Named, PerTarget, Shape, found, multi_image, parse_boxes, parse_named, single_box, tag_format,
};
pub(crate) use boxes::{truth, truth_box};
pub use choice::letter;
pub use number::{Number, number};
pub use official::{
    Official, matched_letter, mme_realworld_letter, tree_bench_boxes, tree_bench_iou, tree_bench_letter, vstar_letter,
};
pub use shaping::{over_long, repetition};
pub use text::{normalise, same_text};

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// The named parts of a judgement, in the order they were judged. A JSON object when serialised.
///
/// ```
/// use foveate::reward::Parts;
/// let parts = Parts::from([("format", 1.0), ("accuracy", 0.5)]);
/// assert_eq!(parts.total(&Parts::from([("accuracy", 2.0)])), 1.0);   // a part without a weight does not count
/// assert_eq!(serde_json::to_string(&parts).unwrap(), r#"{"format":1.0,"accuracy":0.5}"#);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts(Vec<(String, f64)>);

impl Parts {
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// Sets a part, in its old place if it was there.
    pub fn set(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some(entry) => entry.1 = value,
            None => self.0.push((name.to_string(), value)),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(n, v)| (n.as_str(), *v))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sum of parts times `weights` of the same name.
    pub fn total(&self, weights: &Parts) -> f64 {
        self.iter().map(|(name, value)| value * weights.get(name).unwrap_or(0.0)).sum()
    }
}

impl<const N: usize> From<[(&str, f64); N]> for Parts {
    fn from(entries: [(&str, f64); N]) -> Parts {
        let mut parts = Parts::default();
        entries.into_iter().for_each(|(name, value)| parts.set(name, value));
        parts
    }
}

impl Serialize for Parts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in self.iter() {
            map.serialize_entry(name, &value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Parts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Parts, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Parts;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map from the name of a part to a number")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parts, A::Error> {
                let mut parts = Parts::default();
                while let Some((name, value)) = map.next_entry::<String, f64>()? {
                    parts.set(&name, value);
                }
                Ok(parts)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Where the answer is declared in the last assistant turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The last `\boxed{}`. Missing: no answer. MGPO's reward.
    #[default]
    Boxed,
    /// The last `<answer>…</answer>`.
    AnswerTag,
    /// `\boxed{}`, else `<answer>`, else the turn itself (right only when it is nothing but an answer).
    Declared,
    /// The whole turn.
    Turn,
}

/// The answer that `text` declares at `place`, trimmed. `None`: it declares none.
///
/// ```
/// use foveate::reward::{Place, extract};
/// assert_eq!(extract(r"First \boxed{A}, no: \boxed{\text{B}}.", Place::Boxed), Some(r"\text{B}"));
/// assert_eq!(extract("B", Place::Boxed), None);
/// ```
pub fn extract(text: &str, place: Place) -> Option<&str> {
    let turn = last_turn(text);
    match place {
        Place::Boxed => boxed(turn),
        Place::AnswerTag => answer_tag(turn),
        Place::Declared => boxed(turn).or_else(|| answer_tag(turn)).or(Some(turn.trim())),
        Place::Turn => Some(turn.trim()),
    }
}

/// The text of the last assistant turn. A text with chat markers is cut at them (and is empty without an assistant turn);
/// one without is a turn already.
pub fn last_turn(text: &str) -> &str {
    const START: &str = "<|im_start|>";
    const END: &str = "<|im_end|>";
    if !text.contains(START) {
        return text.split(END).next().unwrap_or(text);
    }
    let turns = text.split(START).skip(1);
    let of_assistant = turns.filter_map(|turn| turn.strip_prefix("assistant"));
    of_assistant.last().map_or("", |turn| turn.split(END).next().unwrap_or(turn))
}

/// The content of the last `\boxed{…}` with balanced braces. A later one that never closes counts for nothing, as a
/// truncated answer should; `\{` and `\}` are text.
fn boxed(text: &str) -> Option<&str> {
    const OPEN: &str = r"\boxed";
    let starts: Vec<usize> = text.match_indices(OPEN).map(|(at, _)| at + OPEN.len()).collect();
    // Only so many are tried: a text of nothing but openings would cost the square of its length.
    starts.iter().rev().take(64).find_map(|&start| {
        let rest = text.get(start..)?;
        let body = rest.trim_start().strip_prefix('{')?;
        let mut depth = 1usize;
        let mut escaped = false;
        for (at, c) in body.char_indices() {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '{' => depth += 1,
                '}' => {
                    depth -= 1;
                    if depth == 0 {
                        return body.get(..at).map(str::trim);
                    }
                }
                _ => {}
            }
        }
        None
    })
}

/// The content of the last `<answer>…</answer>`.
fn answer_tag(text: &str) -> Option<&str> {
    let end = text.rfind("</answer>")?;
    let start = text.get(..end)?.rfind("<answer>")? + "<answer>".len();
    text.get(start..end).map(str::trim)
}

/// 1 when the last turn declares an answer at `place`, else 0.
pub fn format_reward(text: &str, place: Place) -> f64 {
    f64::from(u8::from(extract(text, place).is_some_and(|answer| !answer.is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_box_of_the_last_assistant_turn_counts() {
        let at = |text| extract(text, Place::Boxed);
        assert_eq!(at(r"\boxed{A} or \boxed{B}"), Some("B"));
        assert_eq!(at(r"\boxed{\frac{1}{2}}"), Some(r"\frac{1}{2}"));
        assert_eq!(at(r"\boxed{a \} b}"), Some(r"a \} b"));
        assert_eq!(at(r"\boxed {C}"), Some("C"));
        assert_eq!(at("the answer is A"), None);
        assert_eq!(at(r"\boxed{A"), None);
        assert_eq!(at(r"\boxed{A} then \boxed{B"), Some("A"));
        let chat = "<|im_start|>user\nput it in \\boxed{A}<|im_end|>\n<|im_start|>assistant\nIt is a cat.<|im_end|>\n";
        assert_eq!(at(chat), None);
        let two = format!(r"{chat}<|im_start|>user{}again<|im_end|><|im_start|>assistant{}\boxed{{D}}", '\n', '\n');
        assert_eq!(at(&two), Some("D"));
        assert_eq!(at("<|im_start|>user\n\\boxed{A}"), None);
        // What a template adds after the end of the turn was not said by the model.
        assert_eq!(at(r"B<|im_end|>\boxed{A}"), None);
    }

    #[test]
    fn answer_tags_and_declared_answers() {
        assert_eq!(extract("<think>x</think><answer> B </answer>", Place::AnswerTag), Some("B"));
        assert_eq!(extract("<answer>A</answer><answer>B</answer>", Place::AnswerTag), Some("B"));
        assert_eq!(extract("</answer><answer>", Place::AnswerTag), None);
        assert_eq!(extract(r"<answer>A</answer> \boxed{B}", Place::Declared), Some("B"));
        assert_eq!(extract("<answer>A</answer>", Place::Declared), Some("A"));
        assert_eq!(extract(" A ", Place::Declared), Some("A"));
        assert_eq!(format_reward(r"\boxed{}", Place::Boxed), 0.0);
        assert_eq!(format_reward(r"\boxed{A}", Place::Boxed), 1.0);
    }

    #[test]
    fn parts_keep_their_order_and_read_back() {
        let parts = Parts::from([("z", 1.0), ("a", 2.0), ("z", 3.0)]);
        let json = serde_json::to_string(&parts).unwrap();
        assert_eq!(json, r#"{"z":3.0,"a":2.0}"#);
        assert_eq!(serde_json::from_str::<Parts>(&json).unwrap(), parts);
        assert_eq!(parts.total(&Parts::from([("a", 0.5), ("z", 1.0), ("missing", 9.0)])), 4.0);
    }
}
