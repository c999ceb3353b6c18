//! RefCOCO, RefCOCO+ and RefCOCOg: one expression, one picture, one box (spec 3.7).
//!
//! Two layouts are read: lmms-lab's (`bbox` as x, y, width and height in pixels, `answer` a list of expressions, one row each as its
//! REC variant has it), exported to JSON or JSON lines; and VLM-R1's (`problem`, `solution` as two corners in pixels). What must stay
//! true: a question is an expression of the set, or VLM-R1's own words. `data/grounding.rs` reads the same rows without a conversion.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::convert::{Draft, Drafts, Place, Unit, items, words};
use crate::geometry::BBox;

#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
pub(super) struct Row {
    #[serde(default)]
    image: Value,
    file_name: Option<String>,
    pub question_id: Option<Value>,
    answer: Option<Vec<String>>,
    pub bbox: Option<[f64; 4]>,
    problem: Option<String>,
    pub solution: Option<[f64; 4]>,
}

/// One question of a row.
pub(super) struct Asked {
    pub question: String,
    pub label: Option<String>,
    /// Pixels; may be without an area.
    pub bbox: BBox,
}

pub(super) fn read(text: &str) -> Result<Drafts> {
    let rows = items::<Row>(text)?;
    let mut drafts = Drafts { read: rows.len(), ..Drafts::default() };
    for (number, row) in rows {
        let at = || format!("row {number}");
        let image = row.picture().with_context(at)?;
        let extra: Map<_, _> = row.question_id.iter().map(|id| ("question_id".to_owned(), id.clone())).collect();
        for (k, Asked { question, label, bbox }) in row.asked().with_context(at)?.into_iter().enumerate() {
            if !(bbox.width() > 0.0 && bbox.height() > 0.0) {
                drafts.left_out.add("a box without an area", number);
                continue;
            }
            drafts.rows.push(Draft {
                number,
                id: format!("refcoco-{number}-{}", k + 1),
                images: vec![image.clone()],
                question,
                places: vec![Place { image: 1, bbox, unit: Unit::Pixels, label }],
                task: Some("refcoco".into()),
                split: None,
                extra: extra.clone(),
            });
        }
    }
    Ok(drafts)
}

impl Row {
    /// Each expression with its box.
    pub fn asked(&self) -> Result<Vec<Asked>> {
        match (&self.answer, self.bbox, &self.problem, self.solution) {
            (Some(answers), Some([x, y, w, h]), ..) => {
                ensure!(!answers.is_empty(), "\"answer\" is an empty list, expected what is said of the box");
                let bbox = BBox::new(x, y, x + w, y + h);
                let locate = |said: &String| Asked {
                    question: format!("Locate this in the picture: {}", said.trim()),
                    label: Some(said.clone()),
                    bbox,
                };
                Ok(answers.iter().map(locate).collect())
            }
            (_, _, Some(problem), Some(corners)) => {
                // The set's own wording.
                let label = problem.split_once("this sentence describes: ").map(|(_, said)| said.trim().to_owned());
                Ok(vec![Asked { question: words(problem), label, bbox: BBox::from(corners) }])
            }
            _ => bail!("expected \"bbox\" and \"answer\" (lmms-lab) or \"problem\" and \"solution\" (VLM-R1)"),
        }
    }

    /// In exports of lmms-lab's set `image` holds the picture's bytes, or nothing, and its name is under `file_name`.
    fn picture(&self) -> Result<String> {
        let named = self.image.as_str().or(self.file_name.as_deref()).or(self.image["path"].as_str());
        named.map(str::to_owned).context("expected the picture's path under \"image\" or \"file_name\"")
    }
}

/// COCO's own picture, for a name that ends in the number of an annotation: `COCO_train2014_000000581857_16.jpg`.
pub(super) fn of_coco(path: &Path) -> Option<PathBuf> {
    let (stem, extension) = (path.file_stem()?.to_str()?, path.extension()?.to_str()?);
    let (picture, annotation) = stem.rsplit_once('_')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (set, id) = picture.rsplit_once('_')?;
    let coco = set.starts_with("COCO_") && id.len() == 12 && digits(id) && digits(annotation);
    coco.then(|| path.with_file_name(format!("{picture}.{extension}")))
}

#[cfg(test)]
mod tests {
    use super::super::convert::Format;
    use super::super::convert::tests::{converted, pictures};
    use super::*;

    #[test]
    fn each_expression_becomes_a_row() {
        let dir = pictures(&["COCO_train2014_000000581857.png", "x/b.png"]);
        let text = r#"[
            {"question_id": "7", "image": {"bytes": null, "path": null}, "file_name": "COCO_train2014_000000581857_16.png",
             "question": "Describe it.", "answer": ["the left man ", "man in blue"], "bbox": [10.5, 20, 30, 40], "segmentation": [1]},
            {"image": "x/b.png", "problem": "<image>Find the region this sentence describes: a cat", "solution": [1, 2, 30, 40], "dataset": "refcoco"},
            {"image": "x/b.png", "answer": ["nothing"], "bbox": [1, 2, 0, 5]},
            {"image": "x/b.png", "problem": "Outside?", "solution": [1, 2, 300, 40]}
        ]"#;
        let (report, rows) = converted(dir.path(), Format::RefCoco, text).unwrap();
        assert_eq!((report.read, report.rows, report.pictures), (4, 3, 2));
        assert_eq!(
            report.left_out.lines(),
            ["1 left out: a box lies outside of its picture (row 4)", "1 left out: a box without an area (row 3)"]
        );
        assert_eq!(rows[0].question, "Locate this in the picture: the left man");
        assert_eq!(rows[0].targets[0].bbox, BBox::new(10.5, 20.0, 40.5, 60.0));
        assert_eq!((rows[1].id.as_str(), rows[1].extra["question_id"].as_str()), ("refcoco-1-2", Some("7")));
        assert_eq!(rows[1].targets[0].label.as_deref(), Some("man in blue"));
        assert!(rows[0].images[0].ends_with("COCO_train2014_000000581857.png"));
        assert_eq!(
            (rows[2].question.as_str(), rows[2].targets[0].bbox),
            ("Find the region this sentence describes: a cat", BBox::new(1.0, 2.0, 30.0, 40.0))
        );
        assert_eq!(rows[2].answer, r#"[{"image":1,"bbox":[1.0,2.0,30.0,40.0],"label":"a cat"}]"#);
    }

    #[test]
    fn a_row_of_another_shape_is_named() {
        let dir = pictures(&["a.png"]);
        let error = |row: &str| {
            let text = format!("{{\"image\": \"a.png\", \"problem\": \"?\", \"solution\": [1, 2, 3, 4]}}\n{row}");
            format!("{:#}", converted(dir.path(), Format::RefCoco, &text).unwrap_err())
        };
        for (row, words) in [
            (r#"{"image": "a.png", "problem": "?"}"#, "\"solution\" (VLM-R1)"),
            (r#"{"image": "a.png", "answer": ["x"], "bbox": [1, 2, 3]}"#, "length 3"),
            (r#"{"image": "a.png", "answer": "x", "bbox": [1, 2, 3, 4]}"#, "invalid type"),
            (r#"{"answer": ["x"], "bbox": [1, 2, 3, 4]}"#, "\"file_name\""),
        ] {
            let said = error(row);
            assert!(said.contains("row 2") && said.contains(words) && said.ends_with("in.json"), "{said}");
        }
    }

    #[test]
    fn only_names_of_coco_lose_their_annotation() {
        let of = |name: &str| of_coco(Path::new(name));
        assert_eq!(of("d/COCO_val2014_000000000001_2.jpg"), Some("d/COCO_val2014_000000000001.jpg".into()));
        for name in ["COCO_val2014_000000000001.jpg", "mine_000000000001_2.jpg", "a_1.jpg", "COCO_val2014_01_2.jpg"] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
