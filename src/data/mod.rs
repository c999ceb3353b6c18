//! Rows of data: what is asked about which pictures, and what the answer is.
//!
//! It hides file formats behind [`Sample`]: our own rows (below) and those of other sets as their authors publish them ([`Format`]), from
//! the containers that `table` opens; [`convert`] writes rows of our own from sets whose pictures must be found first. Pictures stay
//! closed here: a sample names them by path, also those that lie in a cell of a table. What must stay true: a row is either wholly
//! valid or refused with its file, its number and the key at fault; paths in a file are relative to that file and absolute (or relative
//! to the working directory) in a `Sample`; boxes are in original pixels.
//!
//! ```json
//! {"id": "plates-test-00000-0", "images": ["images/test_00000.jpg"], "question": "What number is on the plate under the fox?",
//!  "answer": "7", "targets": [{"image": 1, "bbox": [812, 640, 857, 685], "label": "plate under the fox"}]}
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::geometry::BBox;

mod answers;
mod chats;
mod choices;
pub mod convert;
mod dialogue;
mod fields;
mod files;
mod format;
mod grounding;
mod mgrounding;
mod mig_bench;
mod order;
pub mod overlap;
mod published;
mod reading;
mod refcoco;
mod row;
mod shuffle;

pub use dialogue::{Dialogue, Dialogues, holds_dialogues};
pub use format::Format;
pub use order::Order;
pub use published::{PUBLISHED, Published};
pub use reading::{Problem, Read, ReadAs, Report, check, damaged, read, shows_pictures};
pub use shuffle::{Shuffled, shuffle_options};

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub id: String,
    pub images: Vec<PathBuf>,
    pub question: String,
    /// Empty when the answer is free.
    pub choices: Vec<String>,
    pub answer: String,
    /// Where the answer is to be seen: for judging and reports, never for training.
    pub targets: Vec<Target>,
    pub task: Option<String>,
    pub split: Option<String>,
    /// Keys of the row that this program does not know; kept as they are.
    pub extra: Map<String, Value>,
}

/// Key of a row whose annotation cannot be right: it may be asked, and nothing is right.
pub const FAULTY: &str = "faulty";
/// Key of a row that is one of a set: the set's name and the question that asks for all of it at once, `{"set", "question"}`.
pub const ALL: &str = "all";

/// What to do about a row that turns out to be bad when it is drawn for training.
pub const BAD_ROW: &str = "foveate data check finds all such rows, data.leave_out_bad=true trains on the others";

/// The id of a question that comes from no file.
const QUESTION: &str = "question";

impl Sample {
    /// How errors speak of it.
    pub fn named(&self) -> String {
        if self.id == QUESTION { "the question".into() } else { format!("row {}", self.id) }
    }

    /// Whether the row itself says that its annotation cannot be right.
    pub fn faulty(&self) -> bool {
        self.extra.get(FAULTY) == Some(&Value::Bool(true))
    }

    /// A question of one's own, without a known answer.
    pub fn question(images: &[PathBuf], question: &str, choices: Vec<String>) -> Sample {
        Sample {
            id: QUESTION.into(),
            images: images.to_vec(),
            question: question.into(),
            choices,
            answer: String::new(),
            targets: Vec::new(),
            task: None,
            split: None,
            extra: Map::new(),
        }
    }
}

/// A box of interest in one of the sample's pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Counts from 1, as people and the file do.
    pub image: usize,
    /// Original pixels.
    pub bbox: BBox,
    pub label: Option<String>,
}

/// Writes rows; the file appears whole or not at all. Paths under the file's folder are written relative to it.
///
/// # Errors
/// The folder does not exist or cannot be written to.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    let writing = || format!("writing the data file {}", path.display());
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file =
        tempfile::Builder::new().prefix(".rows-").suffix(".tmp").tempfile_in(folder).with_context(writing)?;
    {
        let mut out = std::io::BufWriter::new(file.as_file_mut());
        for sample in samples {
            writeln!(out, "{}", to_json(sample, folder)).with_context(writing)?;
        }
        out.flush().with_context(writing)?;
    }
    file.as_file().sync_all().with_context(writing)?;
    readable_by_all(file.as_file()).with_context(writing)?;
    file.persist(path).with_context(writing)?;
    Ok(())
}

/// Temporary files are made for their owner only; a data set is for everybody who may enter its folder.
fn readable_by_all(file: &std::fs::File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

fn to_json(sample: &Sample, folder: &Path) -> Value {
    let mut row = Map::new();
    row.insert("id".into(), json!(sample.id));
    let relative = |path: &PathBuf| path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
    row.insert("images".into(), sample.images.iter().map(relative).collect());
    row.insert("question".into(), json!(sample.question));
    if !sample.choices.is_empty() {
        row.insert("choices".into(), json!(sample.choices));
    }
    row.insert("answer".into(), json!(sample.answer));
    if !sample.targets.is_empty() {
        let target = |t: &Target| {
            // Whole numbers are written as such: they are what people compare with.
            let side = |v: f64| {
                if v.fract() == 0.0 { json!(v as i64) } else { json!(v) }
            };
            let mut target = json!({"image": t.image, "bbox": <[f64; 4]>::from(t.bbox).map(side)});
            if let Some(label) = &t.label {
                target["label"] = json!(label);
            }
            target
        };
        row.insert("targets".into(), sample.targets.iter().map(target).collect());
    }
    for (key, value) in [("task", &sample.task), ("split", &sample.split)] {
        if let Some(value) = value {
            row.insert(key.into(), json!(value));
        }
    }
    row.extend(sample.extra.clone());
    Value::Object(row)
}

/// "a, b and c".
pub(crate) fn in_words(items: &[String]) -> String {
    match items.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => items.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with_picture() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        ::image::RgbImage::new(40, 30).save(folder.path().join("a.png")).unwrap();
        folder
    }

    #[test]
    fn rows_survive_writing_and_reading() {
        let folder = folder_with_picture();
        let path = folder.path().join("rows.jsonl");
        let sample = Sample {
            id: "1".into(),
            images: vec![folder.path().join("a.png")],
            question: "What is \"it\"?\n".into(),
            choices: vec!["a cup".into(), "a hat".into()],
            answer: "A".into(),
            targets: vec![Target { image: 1, bbox: BBox::new(1.0, 2.5, 40.0, 30.0), label: None }],
            task: Some("answer".into()),
            split: None,
            extra: Map::from_iter([("weight".to_owned(), json!(2))]),
        };
        write(&path, std::slice::from_ref(&sample)).unwrap();
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(written.contains(r#""images":["a.png"]"#));
        assert_eq!(read(&path).unwrap(), std::slice::from_ref(&sample));
        std::fs::write(&path, format!("\u{feff}{written}")).unwrap();
        assert_eq!(read(&path).unwrap(), [sample], "a byte order mark is no part of the first row");
    }

    #[test]
    fn every_bad_row_is_named_with_key_found_and_expected() {
        let folder = folder_with_picture();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(folder.path().join("broken.png"), b"\x89PNG\r\n\x1a\nnot really").unwrap();
        let rows = [
            r#"{"id":"good","images":["a.png"],"question":"?","answer":"7"}"#,
            r#"{"id":"b","images":["a.png"],"question":5,"answer":"7"}"#,
            r#"{"id":"c","images":["none.png"],"question":"?","answer":"7"}"#,
            "",
            r#"{"id":"d","images":["a.png"],"question":"?","answer":"7","targets":[{"image":1,"bbox":[0,0,41,30]}]}"#,
            r#"{"id":"e","images":["a.png"],"question":"?","answer":"7","targets":[{"image":0,"bbox":[0,0,4,3]}]}"#,
            r#"{"id":"f","images":["broken.png"],"question":"?","answer":"7"}"#,
            r#"{"id":"good","images":["a.png"],"question":"?","answer":"7"}"#,
            "not json",
        ];
        std::fs::write(&path, rows.join("\n")).unwrap();
        let report = check(&path).unwrap();
        assert_eq!(report.rows, 8);
        let found: Vec<(usize, &str)> = report.problems.iter().map(|p| (p.row, p.key.as_str())).collect();
        assert_eq!(
            found,
            [
                (2, "question"),
                (3, "images[0]"),
                (5, "targets[0].bbox"),
                (6, "targets[0].image"),
                (7, "images[0]"),
                (8, "id"),
                (9, "")
            ]
        );
        assert_eq!(report.problems[0].to_string(), r#"row 2, key "question": found the number 5, expected a text"#);
        assert!(report.problems[2].reason.contains("[0, 0, 41, 30]") && report.problems[2].reason.contains("40x30"));
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("row 2") && error.contains("and 4 more") && error.ends_with("rows.jsonl"), "{error}");
    }

    #[test]
    fn an_empty_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, "\n\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("there are no rows"));
        assert!(read(&folder.path().join("absent.jsonl")).unwrap_err().to_string().contains("absent.jsonl"));
    }
}
