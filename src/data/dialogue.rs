//! Written dialogues for SFT: a JSON object each, `{"messages": [{"role", "content": [{"type": "image", "image": PATH} |
//! {"type": "text", "text": …}]}]}`, paths relative to the file. What must stay true: as with rows, every bad dialogue is named by its number and
//! its reason, and that before the first step.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::reading::{Look, Pictures};
use super::{Problem, ReadAs, Report};
use crate::chat::{Message, Part};
use crate::geometry::Size;
use crate::progress::say;
use crate::table;

/// A conversation with its pictures in order of appearance.
#[derive(Clone, Debug, PartialEq)]
pub struct Dialogue {
    /// Its row in the file, from 1.
    pub number: usize,
    pub messages: Vec<Message>,
    pub images: Vec<PathBuf>,
}

/// The good dialogues of a file, and what is wrong with the others.
#[derive(Clone, Debug)]
pub struct Dialogues {
    pub rows: Vec<Dialogue>,
    /// How large their pictures are.
    pub sizes: HashMap<PathBuf, Size>,
    /// Its format is none: dialogues are no questions.
    pub report: Report,
}

const MESSAGES: &str = "messages";

/// Whether the first row of a file is a dialogue. Conversations with their pictures beside the messages are rows of `sharegpt`.
pub fn holds_dialogues(path: &Path) -> bool {
    let mut first = None;
    // Whoever reads the file tells what is wrong with it.
    let _ = path.is_file().then(|| {
        table::scan(path, &mut |record| {
            first = record.ok().map(|record| record.values);
            bail!("one row tells")
        })
    });
    first.is_some_and(|row| {
        row.contains_key(MESSAGES) && !["image", "images", "prompt"].iter().any(|key| row.contains_key(*key))
    })
}

impl ReadAs {
    /// All dialogues of a file; with `leave_out_bad`, all good ones.
    ///
    /// # Errors
    /// The file cannot be read or has none; some row is no dialogue, lacks the assistant, or shows a picture that is not there. The first few are
    /// named.
    pub fn dialogues(&self, path: &Path) -> Result<Vec<Dialogue>> {
        let Dialogues { rows, report, .. } = self.examine_dialogues(path, Look::Header)?;
        match report.faults() {
            Some(faults) if self.leave_out_bad && !rows.is_empty() => {
                let bad = report.problems.len();
                say(&format!("{bad} problems, whose dialogues are left out of {}: {faults}", path.display()));
                Ok(rows)
            }
            Some(faults) => bail!("reading dialogues: {faults}: {}", path.display()),
            None => Ok(rows),
        }
    }

    /// Every dialogue with every picture decoded, and all that is wrong.
    ///
    /// # Errors
    /// Only when the file itself cannot be read; bad rows are in the report.
    pub fn check_dialogues(&self, path: &Path) -> Result<Dialogues> {
        self.examine_dialogues(path, Look::Whole)
    }

    fn examine_dialogues(&self, path: &Path, look: Look) -> Result<Dialogues> {
        let base = self.images.as_deref().unwrap_or(path.parent().unwrap_or(Path::new("")));
        let (mut count, mut problems, mut found) = (0, Vec::new(), Vec::new());
        let problem = |row: usize, key: &str, reason: String| Problem { row, key: key.into(), reason, file: None };
        table::scan(path, &mut |record| {
            count += 1;
            match record {
                Ok(record) => match dialogue(record.number, record.values, base) {
                    Ok(dialogue) => found.push(dialogue),
                    Err((key, reason)) => problems.push(problem(record.number, &key, reason)),
                },
                Err(bad) => problems.push(problem(bad.number, "", bad.reason)),
            }
            Ok(())
        })?;
        if count == 0 {
            problems.push(problem(0, "", "there are no dialogues, expected one JSON object a line".into()));
        }
        let pictures = Pictures::look(found.iter().flat_map(|(dialogue, _)| &dialogue.images), look);
        let mut rows = Vec::with_capacity(found.len());
        for (dialogue, keys) in found {
            let faults: Vec<_> =
                dialogue.images.iter().zip(keys).filter_map(|(path, key)| Some((key, pictures.fault(path)?))).collect();
            problems.extend(faults.iter().map(|(key, reason)| problem(dialogue.number, key, reason.clone())));
            if faults.is_empty() {
                rows.push(dialogue);
            }
        }
        problems.sort_by_key(|problem| problem.row);
        let (path, questions) = (path.to_owned(), rows.len());
        let report = Report {
            path,
            format: None,
            rows: count,
            questions,
            pictures: pictures.len(),
            problems,
            notes: Vec::new(),
        };
        Ok(Dialogues { rows, sizes: pictures.sizes(), report })
    }
}

#[derive(Deserialize)]
struct Row {
    messages: Vec<Message>,
}

/// A dialogue and the keys of its pictures; or the key at fault and why.
fn dialogue(
    number: usize,
    values: Map<String, Value>,
    base: &Path,
) -> Result<(Dialogue, Vec<String>), (String, String)> {
    let Row { messages } = serde_json::from_value(Value::Object(values))
        .map_err(|error| (MESSAGES.to_owned(), format!("{error}; expected a list of {{\"role\", \"content\"}}")))?;
    if !messages.iter().any(|message| message.role == "assistant") {
        return Err((MESSAGES.into(), "there is no message of the assistant, so there is nothing to train on".into()));
    }
    let (mut images, mut keys) = (Vec::new(), Vec::new());
    for (i, message) in messages.iter().enumerate() {
        for (j, part) in message.parts().into_iter().enumerate() {
            let Part::Image { image } = part else { continue };
            let key = format!("{MESSAGES}[{i}].content[{j}].image");
            let Some(image) = image else { return Err((key, "found nothing, expected the path of a picture".into())) };
            images.push(base.join(image));
            keys.push(key);
        }
    }
    Ok((Dialogue { number, messages, images }, keys))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{RgbImage, save};

    #[test]
    fn reads_rows_and_names_the_bad_ones() {
        let dir = tempfile::tempdir().unwrap();
        save(&RgbImage::new(30, 20), &dir.path().join("a.png")).unwrap();
        let path = dir.path().join("d.jsonl");
        let row = |picture: &str| {
            r#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "PICTURE"}, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]}"#
                .replace("PICTURE", picture)
        };
        let good = row("a.png");
        std::fs::write(&path, format!("\u{feff}{good}\n\n{good}\n")).unwrap();
        assert!(holds_dialogues(&path));
        let rows = ReadAs::default().dialogues(&path).unwrap();
        assert_eq!((rows.len(), rows[1].number), (2, 3));
        assert_eq!(rows[0].images, [dir.path().join("a.png")]);

        let lines = [
            good.as_str(),
            r#"{"messages": 3}"#,
            &row("gone.png"),
            r#"{"messages": [{"role": "user", "content": "?"}]}"#,
            r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "!"}]}"#,
            "{",
        ];
        std::fs::write(&path, lines.join("\n")).unwrap();
        let Dialogues { rows, report, sizes } = ReadAs::default().check_dialogues(&path).unwrap();
        assert_eq!((rows.len(), report.rows, report.pictures, sizes.len()), (1, 6, 2, 1));
        let said: Vec<String> = report.problems.iter().map(Problem::to_string).collect();
        for (said, part) in said.iter().zip([
            "row 2, key \"messages\": invalid type: integer `3`",
            "row 3, key \"messages[0].content[0].image\": there is no picture at",
            "row 4, key \"messages\": there is no message of the assistant",
            "row 5, key \"messages[0].content[0].image\": found nothing",
            "row 6: ",
        ]) {
            assert!(said.starts_with(part), "{said}");
        }
        assert_eq!(said.len(), 5);
        let error = format!("{:#}", ReadAs::default().dialogues(&path).unwrap_err());
        assert!(error.contains("row 2") && error.contains("and 2 more"), "{error}");
        assert_eq!(ReadAs { leave_out_bad: true, ..ReadAs::default() }.dialogues(&path).unwrap().len(), 1);

        std::fs::write(&path, "\n").unwrap();
        assert!(ReadAs::default().dialogues(&path).unwrap_err().to_string().contains("there are no dialogues"));
        // Pictures beside the messages: rows of sharegpt.
        std::fs::write(&path, r#"{"messages": [], "images": ["a.png"]}"#).unwrap();
        assert!(!holds_dialogues(&path));
    }
}
