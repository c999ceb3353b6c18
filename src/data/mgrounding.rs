//! MGrounding-630k, the training set of Migician: dialogues about several pictures, answered in boxes on 0 to 1000 (spec 3.5).
//!
//! Every question with its answer becomes a row of its own: all are about the same pictures and stand for themselves. What
//! must stay true: a box gets the picture that the answer names before it ("It's in the third image."); where the answer names none, the
//! one that the set's own wording fixes for that task; where that does not tell either, there is no row, and it is counted.
//! <https://huggingface.co/datasets/Michael4933/MGrounding-630k>

use anyhow::Result;
use serde::Deserialize;
use serde_json::Map;

use super::convert::{Draft, Drafts, Place, Unit, items, mentions, referred, words};
use crate::geometry::BBox;
use crate::reward::parse_boxes;

#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
struct Row {
    images: Vec<String>,
    conversations: Vec<Turn>,
    #[serde(rename = "type")]
    task: Option<String>,
}

#[derive(Deserialize)]
struct Turn {
    from: String,
    value: String,
}

const OPEN: &str = "<|box_start|>";
const CLOSE: &str = "<|box_end|>";

pub(super) fn read(text: &str) -> Result<Drafts> {
    let rows = items::<Row>(text)?;
    let mut drafts = Drafts { read: rows.len(), ..Drafts::default() };
    for (number, row) in rows {
        let asked = row.conversations.windows(2).filter(|two| two[0].from == "human" && two[1].from == "gpt");
        let mut none = true;
        for (turn, two) in asked.enumerate() {
            none = false;
            match places(&row, &two[0].value, &two[1].value) {
                Ok(places) => drafts.rows.push(Draft {
                    number,
                    // The set's own ids repeat.
                    id: format!("{}-{number}-{}", row.task.as_deref().unwrap_or("mgrounding"), turn + 1),
                    images: row.images.clone(),
                    question: words(&two[0].value),
                    places,
                    task: row.task.clone(),
                    split: None,
                    extra: Map::new(),
                }),
                Err(reason) => drafts.left_out.add(reason, number),
            }
        }
        if none {
            drafts.left_out.add("no question with an answer", number);
        }
    }
    Ok(drafts)
}

/// The boxes of an answer with their pictures, or why there are none that can be used.
fn places(row: &Row, question: &str, answer: &str) -> Result<Vec<Place>, &'static str> {
    if words(question).is_empty() {
        return Err("an empty question");
    }
    let mut places = Vec::new();
    let mut picture = None;
    let mut from = 0;
    while let Some(at) = answer.get(from..).and_then(|rest| rest.find(OPEN)).map(|at| from + at) {
        let inside = answer.get(at + OPEN.len()..).unwrap_or_default();
        let end = inside.find(CLOSE).ok_or("a box that does not end")?;
        let said = answer.get(from..at).unwrap_or_default();
        let named = mentions(said, "image").last().map(|mention| mention.number);
        picture = named.or(picture);
        let image = picture.or_else(|| fixed(row, question)).ok_or("nothing says which picture a box is on")?;
        if !(1..=row.images.len()).contains(&image) {
            return Err("a box on a picture that is not there");
        }
        let [bbox] = parse_boxes(inside.get(..end).unwrap_or_default())[..] else {
            return Err("a box that cannot be read");
        };
        let upright = bbox.width() > 0.0 && bbox.height() > 0.0;
        if !upright || !BBox::new(0.0, 0.0, SIDE, SIDE).contains(&bbox) {
            return Err("a box with its corners the wrong way round, or beyond the picture");
        }
        let label = referred(said).or_else(|| referred(question));
        places.push(Place { image, bbox, unit: Unit::Sides(SIDE), label });
        from = at + OPEN.len() + end + CLOSE.len();
    }
    if places.is_empty() { Err("an answer without a box") } else { Ok(places) }
}

/// How long a side is.
const SIDE: f64 = 1000.0;

/// The picture that the wording of the row's task fixes (the generators are those of MIG-Bench, spec 3.4).
fn fixed(row: &Row, question: &str) -> Option<usize> {
    let is = |start: &str| row.task.as_deref().is_some_and(|task| task.starts_with(start));
    match row.images.len() {
        1 => Some(1),
        // Parts of the first picture are looked for in it.
        _ if is("region") => Some(1),
        2 if is("diff") || is("refer") => Some(2),
        // "... locate this object in the 2th image"
        _ if is("common") || is("ot") => mentions(question, "image").last().map(|mention| mention.number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::convert::Format;
    use super::super::convert::tests::{converted, pictures};
    use super::*;
    use serde_json::{Value, json};

    fn row(images: &[&str], task: &str, turns: &[(&str, &str)]) -> Value {
        let said: Vec<Value> = turns
            .iter()
            .flat_map(|(q, a)| [json!({"from": "human", "value": q}), json!({"from": "gpt", "value": a})])
            .collect();
        json!({"id": "same", "images": images, "conversations": said, "type": task})
    }

    #[test]
    fn every_turn_becomes_a_row_and_the_answer_names_the_picture() {
        let dir = pictures(&["S/a.png", "S/b.png", "S/c.png"]);
        let images = ["./S/a.png", "./S/b.png", "./S/c.png"];
        let group = row(
            &images,
            "gg_train",
            &[
                (
                    "<image>\n<image>\n<image>\nGive the box of: <|object_ref_start|>a statue of a man<|object_ref_end|>.",
                    "It's in the third image. <|box_start|>(250,500),(500,1000)<|box_end|>",
                ),
                (
                    "And of <|object_ref_start|>a dog<|object_ref_end|>?",
                    "In Image-1: <|box_start|>(0,0),(100,100)<|box_end|> and <|box_start|>(200,200),(300,300)<|box_end|>, in the \
                     second image <|object_ref_start|>a cat<|object_ref_end|><|box_start|>(5,5),(10,10)<|box_end|>",
                ),
            ],
        );
        let (report, rows) = converted(dir.path(), Format::MGrounding, &json!([group, group]).to_string()).unwrap();
        assert_eq!((report.read, report.rows, report.pictures, report.left_out.lines().len()), (2, 4, 3, 0));
        assert_eq!(rows[0].id, "gg_train-1-1");
        assert_eq!(rows[3].id, "gg_train-2-2");
        assert_eq!(rows[0].question, "Give the box of: a statue of a man.");
        let target = &rows[0].targets[0];
        assert_eq!((target.image, target.bbox), (3, BBox::new(50.0, 50.0, 100.0, 100.0)));
        assert_eq!(target.label.as_deref(), Some("a statue of a man"));
        let found: Vec<(usize, Option<&str>)> = rows[1].targets.iter().map(|t| (t.image, t.label.as_deref())).collect();
        assert_eq!(found, [(1, Some("a dog")), (1, Some("a dog")), (2, Some("a cat"))]);
    }

    #[test]
    fn the_task_says_which_picture_where_the_answer_does_not() {
        let dir = pictures(&["a.png", "b.png", "c.png"]);
        let here = "<|box_start|>(0,0),(500,500)<|box_end|>";
        let cases = [
            (row(&["a.png", "b.png", "c.png"], "region_train", &[("Locate the 1th region picture.", here)]), 1),
            (row(&["a.png", "b.png"], "diff_train", &[("What differs?", here)]), 2),
            (row(&["a.png", "b.png"], "refer_train", &[("Find it.", here)]), 2),
            (row(&["a.png", "b.png", "c.png"], "common_train", &[("Locate it in the 3th image.", here)]), 3),
            (row(&["a.png", "b.png"], "ot_train", &[("Of the first image, locate it in the 2th image.", here)]), 2),
            (row(&["a.png"], "free_form", &[("Where?", here)]), 1),
        ];
        let text: Vec<String> = cases.iter().map(|(row, _)| row.to_string()).collect();
        let (_, rows) = converted(dir.path(), Format::MGrounding, &text.join("\n")).unwrap();
        let found: Vec<usize> = rows.iter().map(|r| r.targets[0].image).collect();
        assert_eq!(found, cases.map(|(_, image)| image));
    }

    #[test]
    fn what_cannot_be_used_is_counted_under_its_reason() {
        let dir = pictures(&["a.png", "b.png"]);
        let two = ["a.png", "b.png"];
        let good = "In the first image <|box_start|>(0,0),(9,9)<|box_end|>";
        let one = |task: &str, question: &str, answer: &str| row(&two, task, &[(question, answer)]).to_string();
        let rows = [
            one("gg_train", "Where?", good),
            one("gg_reg", "What is it?", "A man."),
            one("gg_train", "Where?", "In the fifth image <|box_start|>(0,0),(9,9)<|box_end|>"),
            one("free_form", "Where in the first image?", "<|box_start|>(0,0),(9,9)<|box_end|>"),
            one("gg_train", "Where?", "In the first image <|box_start|>(9,9),(0,0)<|box_end|>"),
            one("gg_train", "Where?", "In the first image <|box_start|>(0,0),(9,1001)<|box_end|>"),
            one("gg_train", "Where?", "In the first image <|box_start|>here<|box_end|>"),
            one("gg_train", "Where?", "In the first image <|box_start|>(0,0)"),
            one("gg_train", "<image>", good),
            row(&two, "gg_train", &[]).to_string(),
        ];
        let (report, kept) = converted(dir.path(), Format::MGrounding, &rows.join("\n")).unwrap();
        assert_eq!((report.read, kept.len()), (10, 1));
        let counted: Vec<(&str, &[usize])> =
            report.left_out.0.iter().map(|(reason, rows)| (reason.as_str(), rows.as_slice())).collect();
        assert_eq!(
            counted,
            [
                ("a box on a picture that is not there", &[3][..]),
                ("a box that cannot be read", &[7]),
                ("a box that does not end", &[8]),
                ("a box with its corners the wrong way round, or beyond the picture", &[5, 6]),
                ("an answer without a box", &[2]),
                ("an empty question", &[9]),
                ("no question with an answer", &[10]),
                ("nothing says which picture a box is on", &[4]),
            ]
        );
        let none = format!("{:#}", converted(dir.path(), Format::MGrounding, &rows[1]).unwrap_err());
        assert!(none.contains("no row can be made") && none.contains("without a box (row 1)"), "{none}");
        let bad = r#"{"images": ["a.png"], "conversations": [{"from": "human"}], "type": "x"}"#;
        let bad =
            format!("{:#}", converted(dir.path(), Format::MGrounding, &format!("{}\n{bad}", rows[0])).unwrap_err());
        assert!(bad.contains("row 2: missing field `value`"), "{bad}");
    }
}
