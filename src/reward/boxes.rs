//! Boxes named in text: reading them, and the object and image rewards of multi-image grounding.
//!
//! It hides the many ways models write a box. A box stays in whatever space it was written in; whoever calls brings prediction and
//! truth into one space (chat.rs knows each model's). What must stay true: naming more boxes than there are
//! targets never pays; a right box on the wrong image earns no object reward when gated.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Parts, answer_tag, boxed, last_turn};
use crate::geometry::{BBox, assign};

/// A box on a numbered image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Named {
    /// Counted from 1; 0: the text names none.
    pub image: usize,
    pub bbox: BBox,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

/// What an IoU is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// 0 up to `low`, 1 from `high`, the IoU itself between. MG-Thinker, arXiv 2609.37374.
    #[default]
    Banded,
    Iou,
    /// 1 for an IoU above 0.5.
    Step,
    /// Generalised IoU (arXiv 1902.09630), -1 to 1, moved to 0 to 1: no box on the right picture is worth less than one on a wrong one.
    Giou,
}

/// How the object reward hangs on the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// A pair of boxes counts only where the image is right.
    #[default]
    ByImage,
    /// Every pair counts.
    None,
    /// Every pair counts, and the sum is multiplied by the image reward.
    Product,
}

/// What the sum over targets is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PerTarget {
    /// The larger of the number of predicted and true boxes, which makes box spam cost.
    #[default]
    MaxCount,
    /// Nothing: terms are summed, as in MG-Thinker.
    Sum,
}

/// Settings of the multi-image reward; the defaults are those of the specification's MIRG mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MultiImage {
    pub shape: Shape,
    pub low: f64,
    pub high: f64,
    pub gate: Gate,
    pub per_target: PerTarget,
    /// Format is 1 only if all four tags stand in order and each entry has exactly image, bbox_2d and label.
    pub strict_format: bool,
}

impl Default for MultiImage {
    fn default() -> Self {
        MultiImage {
            shape: Shape::Banded,
            low: 0.1,
            high: 0.9,
            gate: Gate::ByImage,
            per_target: PerTarget::MaxCount,
            strict_format: false,
        }
    }
}

/// More predicted boxes than this take no part in the assignment; they still count in the denominator.
const MOST_BOXES: usize = 256;
/// Coordinates beyond this are no coordinates (and their areas could overflow).
const FARTHEST: f64 = 1e9;

/// Judges named boxes against the truth: parts `image` and `object`.
///
/// `image`: F1 of the two multisets of image numbers (for one box and one target: 1 if right). `object`: boxes are assigned
/// one to one so that the sum of 1\[image equal\] + IoU is largest; each pair is worth its shaped IoU. MG-Thinker
/// (arXiv 2609.37374), with a denominator against box spam.
///
/// ```
/// use foveate::{geometry::BBox, reward::{MultiImage, Named, multi_image}};
/// let at = |image| Named { image, bbox: BBox::new(0.0, 0.0, 10.0, 10.0), label: None };
/// let parts = multi_image(&[at(1)], &[at(2)], &MultiImage::default());
/// assert_eq!((parts.get("image"), parts.get("object")), (Some(0.0), Some(0.0)));
/// ```
pub fn multi_image(predicted: &[Named], truth: &[Named], settings: &MultiImage) -> Parts {
    if predicted.is_empty() && truth.is_empty() {
        return Parts::from([("image", 1.0), ("object", 1.0)]);
    }
    if predicted.is_empty() || truth.is_empty() {
        return Parts::from([("image", 0.0), ("object", 0.0)]);
    }
    let mut left: Vec<usize> = truth.iter().map(|t| t.image).collect();
    let mut right_images = 0usize;
    for p in predicted {
        if let Some(at) = left.iter().position(|image| *image == p.image) {
            left.swap_remove(at);
            right_images += 1;
        }
    }
    let image = 2.0 * right_images as f64 / (predicted.len() + truth.len()) as f64;

    let mut sum = 0.0;
    let worth = |p: &Named, t: &Named| match settings.gate != Gate::ByImage || p.image == t.image {
        true => settings.shaped(&p.bbox, &t.bbox),
        false => 0.0,
    };
    for (p, t) in pairs(predicted, truth, worth) {
        sum += worth(p, t);
    }
    if settings.gate == Gate::Product {
        sum *= image;
    }
    let object = match settings.per_target {
        PerTarget::MaxCount => sum / predicted.len().max(truth.len()) as f64,
        PerTarget::Sum => sum,
    };
    Parts::from([("image", image), ("object", object)])
}

/// Boxes assigned to targets one to one, so that the sum of 1\[image equal\] + IoU is largest; of equal sums the one that is worth most, so that
/// the order in which boxes are named earns nothing.
pub(super) fn pairs<'a>(
    predicted: &'a [Named],
    truth: &'a [Named],
    worth: impl Fn(&Named, &Named) -> f64,
) -> Vec<(&'a Named, &'a Named)> {
    /// Far below any difference of IoU that boxes of whole pixels have, far above the rounding of a sum.
    const TIE: f64 = 1e-9;
    let candidates = predicted.get(..MOST_BOXES).unwrap_or(predicted);
    let weight =
        |p: &Named, t: &Named| f64::from(u8::from(p.image == t.image)) + p.bbox.iou(&t.bbox) + TIE * worth(p, t);
    let weights: Vec<Vec<f64>> = candidates.iter().map(|p| truth.iter().map(|t| weight(p, t)).collect()).collect();
    candidates.iter().zip(assign(&weights)).filter_map(|(p, chosen)| Some((p, truth.get(chosen?)?))).collect()
}

/// What tables show of an answer: the mean IoU, 0 on a wrong picture, and whether everything was found (each target by a box on its
/// picture with an IoU of at least 0.5, and nothing else was named).
///
/// ```
/// use foveate::{geometry::BBox, reward::{Named, found}};
/// let at = |image| Named { image, bbox: BBox::new(0.0, 0.0, 10.0, 10.0), label: None };
/// assert_eq!(found(&[at(2)], &[at(2)]), (1.0, 1.0));
/// assert_eq!(found(&[at(1)], &[at(2)]), (0.0, 0.0));
/// ```
pub fn found(predicted: &[Named], truth: &[Named]) -> (f64, f64) {
    let most = predicted.len().max(truth.len());
    if most == 0 {
        return (1.0, 1.0);
    }
    let iou = |p: &Named, t: &Named| if p.image == t.image { p.bbox.iou(&t.bbox) } else { 0.0 };
    let ious: Vec<f64> = pairs(predicted, truth, iou).iter().map(|(p, t)| iou(p, t)).collect();
    let right = ious.iter().filter(|iou| **iou >= 0.5).count();
    // Of no numbers the sum is -0.
    ((0.0 + ious.iter().sum::<f64>()) / most as f64, f64::from(u8::from(right == most)))
}

impl MultiImage {
    /// The format part of a response that has readable boxes.
    pub fn format(&self, text: &str) -> f64 {
        match self.strict_format {
            true => f64::from(u8::from(tag_format(text) == 1.0 && strict_entries(text))),
            false => tag_format(text),
        }
    }

    fn shaped(&self, a: &BBox, b: &BBox) -> f64 {
        let iou = a.iou(b);
        match self.shape {
            Shape::Banded if iou >= self.high => 1.0,
            Shape::Banded if iou <= self.low => 0.0,
            Shape::Banded | Shape::Iou => iou,
            Shape::Step => f64::from(u8::from(iou > 0.5)),
            Shape::Giou => 0.5 + 0.5 * a.giou(b),
        }
    }

    /// Judges a whole response: parts `format`, `image`, `object`. A response without readable boxes earns 0 in all three.
    pub fn judge(&self, text: &str, truth: &[Named]) -> (Parts, Option<Vec<Named>>) {
        let Some(predicted) = parse_named(text) else {
            return (Parts::from([("format", 0.0), ("image", 0.0), ("object", 0.0)]), None);
        };
        let mut parts = Parts::from([("format", self.format(text))]);
        for (name, value) in multi_image(&predicted, truth, self).iter() {
            parts.set(name, value);
        }
        (parts, Some(predicted))
    }
}

/// 0.25 for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs exactly once in the last turn, in that order.
pub fn tag_format(text: &str) -> f64 {
    let turn = last_turn(text);
    let mut from = 0;
    let mut score = 0.0;
    for tag in ["<think>", "</think>", "<answer>", "</answer>"] {
        let mut places = turn.match_indices(tag);
        if let (Some((at, _)), None) = (places.next(), places.next())
            && at >= from
        {
            score += 0.25;
            from = at + tag.len();
        }
    }
    score
}

fn strict_entries(text: &str) -> bool {
    let Some(Ok(Value::Array(entries))) = answer_tag(last_turn(text)).map(serde_json::from_str) else {
        return false;
    };
    entries.iter().all(|entry| {
        entry.as_object().is_some_and(|o| {
            o.len() == 3
                && o.get("image").is_some_and(Value::is_u64)
                && o.get("bbox_2d").is_some_and(|b| corners(b).is_some() && b.is_array())
                && o.get("label").is_some_and(Value::is_string)
        })
    })
}

/// The part of the last turn that declares boxes: what the answer tag holds (to the end, where it is not closed), else what follows the thoughts;
/// of that a fenced block, else `\boxed{}`, else all of it. Thoughts declare nothing: where they never end, there is no answer.
fn declared(text: &str) -> &str {
    let turn = last_turn(text);
    let opened = || turn.rfind("<answer>").and_then(|at| turn.get(at + "<answer>".len()..));
    let thought = || match (turn.contains("<think>"), turn.rfind("</think>")) {
        (_, Some(at)) => turn.get(at + "</think>".len()..),
        (true, None) => Some(""),
        (false, None) => None,
    };
    let said = answer_tag(turn).or_else(opened).or_else(thought).unwrap_or(turn);
    fenced(said).or_else(|| boxed(said)).unwrap_or(said).trim()
}

/// The first block between ``` and ```, without the name of its language.
fn fenced(text: &str) -> Option<&str> {
    let body = text.get(text.find("```")? + "```".len()..)?;
    let body = body.get(..body.find("```")?)?;
    Some(body.trim_start_matches(|c: char| c.is_ascii_alphabetic()))
}

/// The first box of a response, in the units it was written in: JSON with `bbox_2d` (or `bbox`, `box`),
/// `[x1,y1,x2,y2]`, or `(x1,y1),(x2,y2)`.
pub fn single_box(text: &str) -> Option<BBox> {
    parse_boxes(declared(text)).into_iter().next()
}

/// All boxes of a text, in order: each run of four numbers within brackets of the forms above.
///
/// ```
/// use foveate::reward::parse_boxes;
/// assert_eq!(parse_boxes("at [1, 2, 3, 4] and (5,6),(7,8)").len(), 2);
/// ```
pub fn parse_boxes(text: &str) -> Vec<BBox> {
    scan(text).into_iter().map(|(_, b)| b).collect()
}

/// Boxes with the place where each begins.
fn scan(text: &str) -> Vec<(usize, BBox)> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(offset) = text.get(at..).and_then(|rest| rest.find(['[', '('])) {
        let start = at + offset;
        let rest = text.get(start..).unwrap_or("");
        match four(rest) {
            Some((b, length)) => {
                found.push((start, b));
                at = start + length;
            }
            None => at = start + 1,
        }
    }
    found
}

/// Four numbers at the start of `text`, as `[a,b,c,d]`, `(a,b),(c,d)`, `[(a,b),(c,d)]` or `[[a,b],[c,d]]`, and how long they are.
fn four(text: &str) -> Option<(BBox, usize)> {
    let mut numbers = [0.0; 4];
    let mut count = 0;
    let mut depth = 0usize;
    let mut at = 0;
    let bytes = text.as_bytes();
    while let Some(&b) = bytes.get(at) {
        match b {
            b'[' | b'(' => depth += 1,
            b']' | b')' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 && count == 4 {
                    return bbox(numbers).map(|b| (b, at + 1));
                }
                if count != 2 && count != 4 {
                    return None;
                }
            }
            b',' | b' ' | b'\n' | b'\t' | b'\r' => {}
            b'-' | b'+' | b'.' | b'0'..=b'9' => {
                let length = bytes
                    .get(at..)?
                    .iter()
                    .take_while(|b| matches!(b, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9'))
                    .count();
                // More than four numbers, or numbers between brackets, are something else.
                *numbers.get_mut(count)? = (depth > 0).then(|| text.get(at..at + length)?.parse().ok())??;
                count += 1;
                at += length - 1;
            }
            _ => return None,
        }
        // A text of brackets only would be looked through from each of them.
        if at > 256 {
            return None;
        }
        at += 1;
    }
    None
}

fn bbox(numbers: [f64; 4]) -> Option<BBox> {
    numbers.iter().all(|x| x.abs() <= FARTHEST).then(|| BBox::from(numbers))
}

/// A JSON value that is a box: four numbers, two pairs, or a text with one.
fn corners(value: &Value) -> Option<BBox> {
    match value {
        Value::String(text) => scan(text).first().map(|(_, b)| *b),
        Value::Array(_) => scan(&value.to_string()).first().filter(|(at, _)| *at == 0).map(|(_, b)| *b),
        _ => None,
    }
}

/// The named boxes of a response: a JSON list (or one object) of `{"image": k, "bbox_2d": […], "label"?}`, where `image_id`,
/// `image_index`, `bbox` and `box` are understood too, words around the list and a comma too many; else boxes in plain text after "Image-k".
/// `None` when there is none, or when an entry of the list is not a box.
///
/// ```
/// use foveate::reward::parse_named;
/// let named = parse_named(r#"<think>…</think><answer>[{"image": 2, "bbox_2d": [1,2,3,4], "label": "cup"}]</answer>"#);
/// assert_eq!(named.unwrap()[0].image, 2);
/// ```
pub fn parse_named(text: &str) -> Option<Vec<Named>> {
    let body = declared(text);
    let named = match json_in(body) {
        // "Nothing" is an answer, where it is said.
        Some(Value::Array(entries)) if entries.is_empty() => return Some(Vec::new()),
        Some(Value::Array(entries)) => entries.iter().map(entry).collect::<Option<Vec<_>>>()?,
        Some(object) => vec![entry(&object)?],
        None => {
            let mut image = 0;
            let mut from = 0;
            let boxes = scan(body).into_iter();
            boxes
                .map(|(at, bbox)| {
                    image = body.get(from..at).and_then(last_image).unwrap_or(image);
                    from = at;
                    Named { image, bbox, label: None }
                })
                .collect()
        }
    };
    (!named.is_empty()).then_some(named)
}

/// The JSON of an answer: all of it, or the first list of objects, or object with a box, among its words.
fn json_in(body: &str) -> Option<Value> {
    let lists = |value: &Value| match value {
        Value::Array(entries) => entries.iter().any(Value::is_object),
        Value::Object(object) => BOX_KEYS.iter().any(|key| object.contains_key(*key)),
        _ => false,
    };
    let whole = |text: &str| serde_json::from_str(text).ok();
    let tidy = without_last_commas(body);
    let value: Option<Value> = whole(body).or_else(|| whole(&tidy));
    if let Some(value) = value {
        return (lists(&value) || value == Value::Array(Vec::new())).then_some(value);
    }
    // A text of brackets alone would be read from each of them.
    tidy.match_indices(['[', '{']).take(MOST_BOXES).find_map(|(at, _)| {
        let mut values = serde_json::Deserializer::from_str(tidy.get(at..)?).into_iter::<Value>();
        values.next()?.ok().filter(lists)
    })
}

/// JSON without the commas before a closing bracket that people and models write.
fn without_last_commas(text: &str) -> String {
    let mut tidy = String::with_capacity(text.len());
    let (mut quoted, mut escaped) = (false, false);
    for c in text.chars() {
        if !quoted && matches!(c, ']' | '}') && tidy.trim_end().ends_with(',') {
            tidy.truncate(tidy.trim_end().len() - 1);
        }
        (quoted, escaped) = (quoted ^ (c == '"' && !escaped), quoted && c == '\\' && !escaped);
        tidy.push(c);
    }
    tidy
}

const BOX_KEYS: [&str; 3] = ["bbox_2d", "bbox", "box"];

fn entry(value: &Value) -> Option<Named> {
    let object = value.as_object()?;
    let first = |keys: [&str; 3]| keys.iter().find_map(|k| object.get(*k));
    let image = match first(["image", "image_id", "image_index"]) {
        None => 0,
        Some(Value::Number(n)) => {
            let number = n.as_f64().filter(|k| k.fract() == 0.0 && (0.0..1e9).contains(k))?;
            number as usize
        }
        Some(Value::String(s)) => s.trim().parse().ok().or_else(|| last_image(s))?,
        Some(_) => return None,
    };
    let label = object.get("label").and_then(Value::as_str).map(str::to_string);
    Some(Named { image, bbox: corners(first(BOX_KEYS)?)?, label })
}

/// The number after the last "image" of a text: "Image-2", "image 2", "Image_2", `"image": 2`, `"image_id": 2`.
fn last_image(text: &str) -> Option<usize> {
    let lower = text.to_ascii_lowercase();
    let after = lower.get(lower.rfind("image")? + "image".len()..)?.trim_start_matches(['-', ' ', '_', '#', '"', ':']);
    let after = ["id", "index"].iter().find_map(|word| after.strip_prefix(word)).unwrap_or(after);
    let after = after.trim_start_matches([' ', '"', ':']);
    let digits = after.bytes().take_while(u8::is_ascii_digit).count();
    after.get(..digits)?.parse().ok()
}

/// Reads the truth of a multi-image row: a list of (or one) `{"image": k, "bbox": […]}`, empty where what is asked for is nowhere. Errors name
/// what is missing.
pub(crate) fn truth(value: &Value) -> Result<Vec<Named>> {
    let entries = match value {
        Value::Array(entries) => entries.as_slice(),
        Value::Object(_) => std::slice::from_ref(value),
        other => bail!("\"answer\" is {other}, expected a list of {{\"image\": k, \"bbox\": [x1,y1,x2,y2]}}"),
    };
    ensure!(entries.len() <= MOST_BOXES, "\"answer\" has {} targets, expected at most {MOST_BOXES}", entries.len());
    let read = |(i, e): (usize, &Value)| {
        let named = entry(e)
            .with_context(|| format!("\"answer\"[{i}] is {e}, expected {{\"image\": k, \"bbox\": [x1,y1,x2,y2]}}"))?;
        ensure!(named.image > 0, "\"answer\"[{i}] has no \"image\" (counted from 1)");
        upright(&named.bbox).with_context(|| format!("\"answer\"[{i}]"))?;
        Ok(named)
    };
    entries.iter().enumerate().map(read).collect()
}

/// Reads the truth of a box row: `[x1,y1,x2,y2]`.
pub(crate) fn truth_box(value: &Value) -> Result<BBox> {
    let bbox = corners(value).with_context(|| format!("\"answer\" is {value}, expected [x1,y1,x2,y2]"))?;
    upright(&bbox).context("\"answer\"")?;
    Ok(bbox)
}

/// A true box without an area would score 0 whatever is said.
fn upright(b: &BBox) -> Result<()> {
    ensure!(b.x1 < b.x2 && b.y1 < b.y2, "found the box {b}, expected [x1,y1,x2,y2] with x1 < x2 and y1 < y2");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(image: usize, b: [f64; 4]) -> Named {
        Named { image, bbox: BBox::from(b), label: None }
    }

    fn parts(predicted: &[Named], truth: &[Named], settings: &MultiImage) -> (f64, f64) {
        let parts = multi_image(predicted, truth, settings);
        (parts.get("image").unwrap(), parts.get("object").unwrap())
    }

    const WHOLE: [f64; 4] = [0.0, 0.0, 10.0, 10.0];

    #[test]
    fn the_object_reward_is_gated_by_the_image() {
        let (wrong, truth) = ([named(1, WHOLE)], [named(2, WHOLE)]);
        let gated = MultiImage::default();
        assert_eq!(parts(&wrong, &truth, &gated), (0.0, 0.0));
        assert_eq!(parts(&wrong, &truth, &MultiImage { gate: Gate::None, ..gated.clone() }), (0.0, 1.0));
        assert_eq!(parts(&wrong, &truth, &MultiImage { gate: Gate::Product, ..gated.clone() }), (0.0, 0.0));
        assert_eq!(parts(&truth, &truth, &gated), (1.0, 1.0));
    }

    /// A box [0,0,10,h] against the whole: IoU h / 10.
    #[test]
    fn the_iou_is_banded() {
        let settings = MultiImage::default();
        for (h, worth) in [(9.0, 1.0), (9.5, 1.0), (8.9, 0.89), (5.0, 0.5), (1.0, 0.0), (0.5, 0.0)] {
            let (_, object) = parts(&[named(1, [0.0, 0.0, 10.0, h])], &[named(1, WHOLE)], &settings);
            assert!((object - worth).abs() < 1e-12, "{h}: {object}");
        }
        let step = MultiImage { shape: Shape::Step, ..settings };
        assert_eq!(parts(&[named(1, [0.0, 0.0, 10.0, 5.0])], &[named(1, WHOLE)], &step).1, 0.0);
    }

    #[test]
    fn ten_boxes_for_one_target_earn_less_than_one() {
        let spam: Vec<Named> = (0..10).map(|i| named(1, [f64::from(i), 0.0, f64::from(i) + 10.0, 10.0])).collect();
        let (image, object) = parts(&spam, &[named(1, WHOLE)], &MultiImage::default());
        // F1 of ten against one: 2 · 1 / 11. The one right box is a tenth of what was said.
        assert_eq!((image, object), (2.0 / 11.0, 0.1));
    }

    #[test]
    fn several_targets_are_matched_together() {
        let far = [20.0, 20.0, 30.0, 30.0];
        let truth = [named(1, WHOLE), named(2, far)];
        let settings = MultiImage::default();
        assert_eq!(parts(&[named(2, far), named(1, WHOLE)], &truth, &settings), (1.0, 1.0));
        assert_eq!(parts(&[named(1, WHOLE)], &truth, &settings), (2.0 / 3.0, 0.5));
        let sum = MultiImage { per_target: PerTarget::Sum, ..settings };
        assert_eq!(parts(&[named(2, far), named(1, WHOLE)], &truth, &sum), (1.0, 2.0));
    }

    /// Where sums are equal, the assignment that is worth more is taken, whatever stands first.
    #[test]
    fn the_order_of_boxes_and_targets_earns_nothing() {
        let truth = [named(1, [0.0, 0.0, 10.0, 5.0]), named(2, WHOLE)];
        let said = [named(1, [0.0, 5.0, 10.0, 10.0]), named(1, WHOLE)];
        let reversed = |all: &[Named]| all.iter().rev().cloned().collect::<Vec<_>>();
        let settings = MultiImage::default();
        let worth = parts(&said, &truth, &settings);
        assert_eq!(worth.1, 0.25);
        assert_eq!(parts(&reversed(&said), &truth, &settings), worth);
        assert_eq!(parts(&said, &reversed(&truth), &settings), worth);
        let truth =
            [named(2, [5.0, 0.0, 10.0, 10.0]), named(2, [0.0, 0.0, 10.0, 5.0]), named(1, [0.0, 0.0, 10.0, 5.0])];
        let said = [named(1, [20.0, 20.0, 30.0, 30.0]), named(1, [0.0, 0.0, 5.0, 10.0])];
        let worth = parts(&said, &truth, &settings);
        assert!((worth.1 - 1.0 / 9.0).abs() < 1e-12, "{worth:?}");
        assert_eq!(parts(&reversed(&said), &reversed(&truth), &settings), worth);
    }

    #[test]
    fn a_wrong_picture_never_pays_more_than_a_bad_box() {
        let far = named(1, [900.0, 900.0, 910.0, 910.0]);
        for shape in [Shape::Banded, Shape::Iou, Shape::Step, Shape::Giou] {
            let settings = MultiImage { shape, ..MultiImage::default() };
            let on = |image: usize| parts(&[Named { image, ..far.clone() }], &[named(1, WHOLE)], &settings).1;
            assert!(on(1) >= on(2) && on(1) >= 0.0, "{shape:?}");
        }
    }

    #[test]
    fn format_is_a_quarter_a_tag() {
        assert_eq!(tag_format("<think>a</think><answer>b</answer>"), 1.0);
        assert_eq!(tag_format("<answer>b</answer>"), 0.5);
        assert_eq!(tag_format("<think>a<think></think><answer>b</answer>"), 0.75);
        // In the wrong order: the think pair stands behind what it must precede, and the answer pair is not after it.
        assert_eq!(tag_format("<answer>b</answer><think>a</think>"), 0.5);
        assert_eq!(tag_format(""), 0.0);
    }

    #[test]
    fn many_ways_to_write_named_boxes() {
        for text in [
            r#"<answer>[{"image": 2, "bbox_2d": [1, 2, 3, 4], "label": "cup"}]</answer>"#,
            r#"<answer>{"image_id": 2, "bbox": [1.0, 2, 3, 4]}</answer>"#,
            r#"<answer>[{"image_index": "2", "bbox_2d": "(1,2),(3,4)"}]</answer>"#,
            r#"```json [{"image": "Image-2", "box": [[1,2],[3,4]]}]```"#,
            "In Image-1 nothing; in Image-2 it is at (1,2),(3,4).",
            "<answer>Image-2: [1,2,3,4]</answer>",
            "<think>t</think><answer>```json\n[{\"image\":2,\"bbox_2d\":[1,2,3,4],\"label\":\"a\"}]\n```</answer>",
            "<answer>```\n[{\"image\": 2.0, \"bbox_2d\": [1,2,3,4],},]\n```</answer>",
            "<answer>It is here: [{\"image\": 2, \"bbox_2d\": [1,2,3,4], \"label\": \"a, ]\"}] as said.</answer>",
            "<answer>Here: {\"image_id\": 2, \"bbox_2d\": [1,2,3,4]</answer>",
            "<think>[9,9,9,9]</think><answer>[{\"image\": 2, \"bbox_2d\": [1,2,3,4], \"lab",
            "<think>Image-1: [9,9,9,9]</think> Image-2: [1,2,3,4]",
        ] {
            let found = parse_named(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!((found.len(), found[0].image, found[0].bbox), (1, 2, BBox::new(1.0, 2.0, 3.0, 4.0)), "{text}");
        }
        for text in [
            "",
            "no box",
            "[1,2,3]",
            "[1,2,3,4,5]",
            "<answer>[{\"image\": 1}]</answer>",
            "[1e99,2,3,4]",
            "[1,2,3,x]",
            "<think>In Image-1 at [1,2,3,4]",
            "<think>In Image-1 at [1,2,3,4]</think>",
        ] {
            assert_eq!(parse_named(text), None, "{text}");
        }
        assert_eq!(parse_named("[1,2,3,4]").unwrap()[0].image, 0);
        for nothing in ["[]", "<think>t</think><answer>[]</answer>", "<answer>```json\n[]\n```</answer>"] {
            assert_eq!(parse_named(nothing), Some(vec![]), "{nothing}");
        }
    }

    #[test]
    fn a_response_that_does_not_parse_earns_nothing() {
        let judge = |text: &str, settings: &MultiImage| settings.judge(text, &[named(1, WHOLE)]).0;
        let lax = MultiImage::default();
        let all = |parts: Parts| ["format", "image", "object"].map(|n| parts.get(n).unwrap());
        assert_eq!(all(judge("<think>a</think><answer>b</answer>", &lax)), [0.0; 3]);
        let good = r#"<think>a</think><answer>[{"image":1,"bbox_2d":[0,0,10,10],"label":"x"}]</answer>"#;
        assert_eq!(all(judge(good, &lax)), [1.0; 3]);
        let strict = MultiImage { strict_format: true, ..lax };
        assert_eq!(all(judge(good, &strict)), [1.0; 3]);
        assert_eq!(all(judge(&good.replace(r#","label":"x""#, ""), &strict)), [0.0, 1.0, 1.0]);
    }

    #[test]
    fn inverted_boxes_are_worth_nothing() {
        let flipped = [10.0, 10.0, 0.0, 0.0];
        assert_eq!(parts(&[named(1, flipped)], &[named(1, WHOLE)], &MultiImage::default()), (1.0, 0.0));
    }
}
