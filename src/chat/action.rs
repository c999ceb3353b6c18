//! The text of an assistant turn read as an action: it looks somewhere, answers, does both, neither, or garbles a box.
//!
//! It hides the forms in which models write boxes (fenced JSON, bare JSON, corners in box tokens). Pure, and total: whatever a model
//! says is data, so there is no error here, only classes to be counted ([`Flaw`]). The numbers stay the model's own; only
//! [`super::Convention`] knows what they mean, and whether a box may be cropped is judged in `geometry`.
//!
//! Rules of the MGPO reference: the first fenced `json` block; it holds a list of objects; the first with four whole
//! numbers under `bbox_2d` and a text under `label` is used. (The caller uses the first box; the others are kept for multi-box tasks.)

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Convention;

/// A box as the model said it, in the model's own numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxClaim {
    pub bbox_2d: [i64; 4],
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Which image or observation it is a box in, as the model numbered it (`source`, `image`, `image_id` or `image_index`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<i64>,
}

/// What an assistant turn does.
///
/// ```
/// use foveate::chat::{Action, Reading};
/// let text = "It is on the left.\n```json\n[{\"bbox_2d\":[1,2,30,40],\"label\":\"cup\"}]\n```";
/// let Action::Look { boxes } = Action::read(text, &Reading::default()) else { panic!() };
/// assert_eq!(boxes[0].bbox_2d, [1, 2, 30, 40]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Action {
    /// At least one usable box, and no answer.
    Look { boxes: Vec<BoxClaim> },
    /// A closed `\boxed{…}`; the whole text, for `reward` to take the answer from.
    Answer { text: String },
    /// Boxes and an answer in one turn.
    Both { boxes: Vec<BoxClaim>, text: String },
    /// Neither an answer nor anything like a box.
    None,
    /// No answer, and a box that cannot be used.
    Malformed { flaw: Flaw },
}

/// Why a box could not be read, of the first object that was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flaw {
    /// The fence was opened and never closed: cut off, usually.
    Unclosed,
    /// Not JSON.
    BadJson,
    /// JSON, but not a list of objects.
    NotAList,
    /// An empty list.
    Empty,
    /// No `bbox_2d`.
    NoBox,
    /// `bbox_2d` is not a list of four.
    NotFour,
    /// A number with a fraction or beyond 64 bits.
    NotWhole,
    /// A coordinate that is a text or something else that is no number.
    NotNumbers,
    /// `x1 >= x2` or `y1 >= y2`.
    Reversed,
    /// `label` missing or no text.
    NoLabel,
}

/// How strictly a turn is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "snake_case")]
pub struct Reading {
    /// Boxes as JSON (Qwen2.5-VL, Qwen3-VL); otherwise as corners in box tokens (Qwen2-VL).
    pub json: bool,
    /// The reference's rule: a newline after the word `json` and one before the closing fence.
    pub need_newlines: bool,
    /// JSON without a fence counts too, if no fenced block is there.
    pub unfenced: bool,
    /// Fractions are rounded instead of refused.
    pub round: bool,
    /// A box without a label counts too.
    pub label_optional: bool,
}

impl Default for Reading {
    fn default() -> Reading {
        Reading { json: true, need_newlines: false, unfenced: false, round: false, label_optional: false }
    }
}

impl Reading {
    /// The default for a model family.
    pub fn of(convention: Convention) -> Reading {
        Reading { json: convention.is_json(), label_optional: !convention.is_json(), ..Reading::default() }
    }
}

impl Action {
    /// Reads the decoded text of one assistant turn (for corners: decoded with its special tokens).
    pub fn read(text: &str, reading: &Reading) -> Action {
        let found = if reading.json { json_boxes(text, reading) } else { corner_boxes(text) };
        match (found, has_answer(text)) {
            (Some(Ok(boxes)), false) => Action::Look { boxes },
            (Some(Ok(boxes)), true) => Action::Both { boxes, text: text.to_string() },
            // An answer stands whatever became of the box beside it.
            (_, true) => Action::Answer { text: text.to_string() },
            (Some(Err(flaw)), false) => Action::Malformed { flaw },
            (None, false) => Action::None,
        }
    }

    /// The usable boxes, in the order they were said.
    pub fn boxes(&self) -> &[BoxClaim] {
        match self {
            Action::Look { boxes } | Action::Both { boxes, .. } => boxes,
            Action::Answer { .. } | Action::None | Action::Malformed { .. } => &[],
        }
    }
}

/// Whether the text holds a `\boxed{` whose brace is closed. What stands in it is `reward`'s business.
pub fn has_answer(text: &str) -> bool {
    text.match_indices("\\boxed{").any(|(at, opening)| {
        let mut depth = 1;
        text[at + opening.len()..].chars().any(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            depth == 0
        })
    })
}

const FENCE: &str = "```";

/// The inside of the first fenced `json` block.
enum Fenced<'a> {
    Block(&'a str),
    Unclosed,
    Absent,
}

fn first_fence<'a>(text: &'a str, need_newlines: bool) -> Fenced<'a> {
    let opening = if need_newlines { "```json\n" } else { "```json" };
    let closing = if need_newlines { "\n```" } else { FENCE };
    let Some(at) = text.find(opening) else {
        return Fenced::Absent;
    };
    let inside = at + opening.len();
    match text[inside..].find(closing) {
        Some(length) => Fenced::Block(&text[inside..inside + length]),
        None => Fenced::Unclosed,
    }
}

/// `None` when nothing like a box is there.
fn json_boxes(text: &str, reading: &Reading) -> Option<Result<Vec<BoxClaim>, Flaw>> {
    match first_fence(text, reading.need_newlines) {
        Fenced::Block(inside) => Some(match serde_json::from_str(inside.trim()) {
            Ok(value) => claims(value, reading),
            Err(_) => Err(Flaw::BadJson),
        }),
        Fenced::Unclosed => Some(Err(Flaw::Unclosed)),
        Fenced::Absent if reading.unfenced => bare_json(text).map(|value| claims(value, reading)),
        Fenced::Absent => None,
    }
}

/// The first JSON list or object in the text that speaks of a box.
fn bare_json(text: &str) -> Option<Json> {
    text.contains("bbox_2d").then_some(())?;
    text.match_indices(['[', '{']).find_map(|(at, _)| {
        let value = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Json>().next()?.ok()?;
        let speaks = |v: &Json| v.get("bbox_2d").is_some();
        (speaks(&value) || value.as_array().is_some_and(|list| list.iter().any(speaks))).then_some(value)
    })
}

fn claims(value: Json, reading: &Reading) -> Result<Vec<BoxClaim>, Flaw> {
    let list = match value {
        Json::Array(list) => list,
        // One object instead of a list of one: readable without doubt.
        object @ Json::Object(_) => vec![object],
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => {
            return Err(Flaw::NotAList);
        }
    };
    let mut boxes = Vec::new();
    let mut first_flaw = None;
    for item in &list {
        match claim(item, reading) {
            Ok(b) => boxes.push(b),
            Err(flaw) => first_flaw = first_flaw.or(Some(flaw)),
        }
    }
    if boxes.is_empty() { Err(first_flaw.unwrap_or(Flaw::Empty)) } else { Ok(boxes) }
}

fn claim(item: &Json, reading: &Reading) -> Result<BoxClaim, Flaw> {
    let object = item.as_object().ok_or(Flaw::NotAList)?;
    let numbers = object.get("bbox_2d").ok_or(Flaw::NoBox)?.as_array().ok_or(Flaw::NotFour)?;
    let [x1, y1, x2, y2] = numbers.as_slice() else {
        return Err(Flaw::NotFour);
    };
    let whole = |n: &Json| -> Result<i64, Flaw> {
        match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => Ok(n),
            (None, Some(n)) if reading.round && n.abs() < 1e15 => Ok(n.round() as i64),
            (None, Some(_)) => Err(Flaw::NotWhole),
            (None, None) => Err(Flaw::NotNumbers),
        }
    };
    let bbox_2d = ordered([whole(x1)?, whole(y1)?, whole(x2)?, whole(y2)?])?;
    let label = object.get("label").and_then(Json::as_str).map(str::to_string);
    if label.is_none() && !reading.label_optional {
        return Err(Flaw::NoLabel);
    }
    let source = ["source", "image", "image_id", "image_index"].iter().find_map(|key| object.get(*key)?.as_i64());
    Ok(BoxClaim { bbox_2d, label, source })
}

fn ordered(numbers: [i64; 4]) -> Result<[i64; 4], Flaw> {
    let [x1, y1, x2, y2] = numbers;
    if x1 >= x2 || y1 >= y2 { Err(Flaw::Reversed) } else { Ok(numbers) }
}

/// `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`; the tokens may be missing.
fn corner_boxes(text: &str) -> Option<Result<Vec<BoxClaim>, Flaw>> {
    let mut boxes = Vec::new();
    let mut first_flaw = text.contains("<|box_start|>").then_some(Flaw::NotFour);
    let mut from = 0;
    let mut label_from = 0;
    while let Some(at) = text[from..].find('(').map(|at| from + at) {
        from = at + 1;
        let Some((numbers, length)) = corners(&text[at..]) else {
            continue;
        };
        from = at + length;
        let label = text[label_from..at]
            .rsplit_once("<|object_ref_start|>")
            .and_then(|(_, rest)| rest.split_once("<|object_ref_end|>"));
        label_from = from;
        match ordered(numbers) {
            Ok(bbox_2d) => {
                boxes.push(BoxClaim { bbox_2d, label: label.map(|(label, _)| label.to_string()), source: None })
            }
            Err(flaw) => first_flaw = Some(flaw),
        }
    }
    if boxes.is_empty() { first_flaw.map(Err) } else { Some(Ok(boxes)) }
}

/// `(x1,y1),(x2,y2)` at the start of the text, blanks allowed, and how many bytes it took.
fn corners(text: &str) -> Option<([i64; 4], usize)> {
    let mut rest = text;
    let mut numbers = [0; 4];
    for (number, signs) in numbers.iter_mut().zip(["(", ",", "),(", ","]) {
        for sign in signs.chars() {
            rest = rest.trim_start_matches(' ').strip_prefix(sign)?;
        }
        (*number, rest) = leading_number(rest)?;
    }
    rest = rest.trim_start_matches(' ').strip_prefix(')')?;
    Some((numbers, text.len() - rest.len()))
}

fn leading_number(text: &str) -> Option<(i64, &str)> {
    let text = text.trim_start_matches(' ');
    let end =
        text.char_indices().find(|&(i, c)| !(c.is_ascii_digit() || i == 0 && c == '-')).map_or(text.len(), |(i, _)| i);
    Some((text[..end].parse().ok()?, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Action {
        Action::read(text, &Reading::default())
    }

    fn flaw(text: &str) -> Flaw {
        match read(text) {
            Action::Malformed { flaw } => flaw,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn cup(bbox_2d: [i64; 4]) -> BoxClaim {
        BoxClaim { bbox_2d, label: Some("cup".into()), source: None }
    }

    #[test]
    fn the_first_fenced_block_counts() {
        let text = "a ```json\n[{\"bbox_2d\":[1,2,3,4],\"label\":\"cup\"}]\n``` b ```json\n[{\"bbox_2d\":[5,6,7,8],\"label\":\"cup\"}]\n```";
        assert_eq!(read(text), Action::Look { boxes: vec![cup([1, 2, 3, 4])] });
    }

    #[test]
    fn newlines_are_needed_only_when_asked_for() {
        let text = "```json[{\"bbox_2d\":[1,2,3,4],\"label\":\"cup\"}]```";
        assert_eq!(read(text), Action::Look { boxes: vec![cup([1, 2, 3, 4])] });
        assert_eq!(Action::read(text, &Reading { need_newlines: true, ..Reading::default() }), Action::None);
    }

    #[test]
    fn bare_json_counts_only_when_allowed() {
        let text = "[1] I see <answer>[{\"image\": 2, \"bbox_2d\": [1, 2, 3, 4], \"label\": \"cup\"}]</answer>";
        assert_eq!(read(text), Action::None);
        let boxes = vec![BoxClaim { source: Some(2), ..cup([1, 2, 3, 4]) }];
        assert_eq!(Action::read(text, &Reading { unfenced: true, ..Reading::default() }), Action::Look { boxes });
    }

    #[test]
    fn flaws_have_classes() {
        let fenced = |inside: &str| flaw(&format!("```json\n{inside}\n```"));
        assert_eq!(flaw("```json\n[{\"bbox_2d\":[1,2"), Flaw::Unclosed);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,3,4],}]"), Flaw::BadJson);
        assert_eq!(fenced("7"), Flaw::NotAList);
        assert_eq!(fenced("[]"), Flaw::Empty);
        assert_eq!(fenced("[{\"label\":\"cup\"}]"), Flaw::NoBox);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,3],\"label\":\"cup\"}]"), Flaw::NotFour);
        assert_eq!(fenced("[{\"bbox_2d\":\"1,2,3,4\",\"label\":\"cup\"}]"), Flaw::NotFour);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,3.5,4],\"label\":\"cup\"}]"), Flaw::NotWhole);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,1e300,4],\"label\":\"cup\"}]"), Flaw::NotWhole);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,\"3\",4],\"label\":\"cup\"}]"), Flaw::NotNumbers);
        assert_eq!(fenced("[{\"bbox_2d\":[3,2,1,4],\"label\":\"cup\"}]"), Flaw::Reversed);
        assert_eq!(fenced("[{\"bbox_2d\":[1,2,3,4],\"label\":7}]"), Flaw::NoLabel);
    }

    #[test]
    fn a_good_box_after_a_bad_one_is_used() {
        let text = "```json\n[{\"bbox_2d\":[1,2],\"label\":\"x\"},{\"bbox_2d\":[1,2,3,4],\"label\":\"cup\"}]\n```";
        assert_eq!(read(text).boxes(), [cup([1, 2, 3, 4])]);
    }

    #[test]
    fn answers() {
        assert_eq!(read("so \\boxed{\\frac{1}{2}}"), Action::Answer { text: "so \\boxed{\\frac{1}{2}}".into() });
        assert_eq!(read("so \\boxed{\\frac{1}{2"), Action::None);
        assert_eq!(read("boxed{7}"), Action::None);
        let both = "```json\n[{\"bbox_2d\":[1,2,3,4],\"label\":\"cup\"}]\n```\n\\boxed{7}";
        assert_eq!(read(both), Action::Both { boxes: vec![cup([1, 2, 3, 4])], text: both.into() });
        let garbled = "```json\n[{\n```\n\\boxed{7}";
        assert_eq!(read(garbled), Action::Answer { text: garbled.into() });
    }

    #[test]
    fn fractions_may_be_rounded() {
        let text = "```json\n[{\"bbox_2d\":[1.4,2.0,3.5,4],\"label\":\"cup\"}]\n```";
        assert_eq!(Action::read(text, &Reading { round: true, ..Reading::default() }).boxes(), [cup([1, 2, 4, 4])]);
    }

    #[test]
    fn corners_with_and_without_tokens() {
        let reading = Reading::of(Convention::Qwen2);
        let text =
            "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|> or (5, 6), (7, 8) (not 9)";
        let bare = BoxClaim { bbox_2d: [5, 6, 7, 8], label: None, source: None };
        assert_eq!(Action::read(text, &reading), Action::Look { boxes: vec![cup([1, 2, 3, 4]), bare] });
        assert_eq!(
            Action::read("<|box_start|>(1,2),(3<|box_end|>", &reading),
            Action::Malformed { flaw: Flaw::NotFour }
        );
        assert_eq!(Action::read("(3,4),(1,2)", &reading), Action::Malformed { flaw: Flaw::Reversed });
        assert_eq!(Action::read("(a) or (b)", &reading), Action::None);
    }

    #[test]
    fn hostile_text_is_only_text() {
        // Deep nesting must not overflow the stack, and a cut inside a character must not panic.
        let unfenced = Reading { unfenced: true, ..Reading::default() };
        assert_eq!(Action::read(&format!("bbox_2d{}", "[".repeat(20_000)), &unfenced), Action::None);
        assert_eq!(flaw(&format!("```json{}```", "[".repeat(100_000))), Flaw::BadJson);
        assert_eq!(read("é```jsoné"), Action::Malformed { flaw: Flaw::Unclosed });
    }
}
