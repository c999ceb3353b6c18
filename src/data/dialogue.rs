//! Written dialogues for SFT: a JSON object each, `{"messages": [{"role", "content": [{"type": "image", "image": PATH} |
//! {"type": "text", "text": …}]}]}`; or, as ShareGPT, LLaVA and LLaMA-Factory have them, texts with an `<image>` for each picture of a list beside the
//! messages. Paths are relative to the file. What must stay true: as with rows, every bad dialogue is named by its number and its reason, and that
//! before the first step; no picture is left out in silence.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::fields::{Fault, Given, describe, fault, said};
use super::reading::{Look, Pictures};
use super::{Format, Problem, ReadAs, Report};
use crate::chat::{Content, Message, Part};
use crate::geometry::Size;
use crate::progress::say;
use crate::table::{self, Record};

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
const CONVERSATIONS: &str = "conversations";
/// Where pictures stand beside the messages.
const BESIDE: [&str; 2] = ["images", "image"];
/// What stands in the texts for each of these.
const PLACE: &str = "<image>";

/// Whether the first row of a file that can be read is a dialogue and nothing else: conversations with their pictures beside the messages may also
/// be asked, as rows of `sharegpt`.
pub fn holds_dialogues(path: &Path) -> bool {
    let mut first = None;
    let in_table = |record: &Record| record.pictures.iter().any(|(_, cells)| !cells.is_empty());
    // Whoever reads the file tells what is wrong with it.
    let _ = path.is_file().then(|| {
        table::scan(path, &mut |record| {
            first = record.ok().filter(|record| in_table(record) || !record.values.is_empty());
            if first.is_some() {
                bail!("one row tells");
            }
            Ok(())
        })
    });
    first.is_some_and(|record| {
        let row = &record.values;
        let said = |key: &str| row.get(key).is_some_and(|value| !value.is_null() && *value != Value::Array(Vec::new()));
        said(MESSAGES) && !BESIDE.iter().any(|key| said(key)) && !row.contains_key("prompt") && !in_table(&record)
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
                Ok(record) => {
                    match dialogue(&Given { format: Format::Sharegpt, record: &record, base, ordinal: count }) {
                        Ok(dialogue) => found.push(dialogue),
                        Err((key, reason)) => problems.push(problem(record.number, &key, reason)),
                    }
                }
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

/// A dialogue and the keys of its pictures; or the key at fault and why.
fn dialogue(given: &Given) -> Result<(Dialogue, Vec<String>), Fault> {
    let (key, mut messages) = messages(given)?;
    if let Some(reason) = cannot_be_learnt(&messages) {
        return fault(key, reason);
    }
    let inside = messages.iter().any(|message| message.images() > 0);
    let beside = |key: &&str| {
        let cells = given.record.pictures.iter().any(|(column, cells)| column == key && !cells.is_empty());
        cells || given.value(key).is_some_and(|value| *value != Value::Array(Vec::new()))
    };
    let given_beside: Vec<&str> = BESIDE.into_iter().filter(|key| beside(key)).collect();
    let (mut images, mut keys) = (Vec::new(), Vec::new());
    match given_beside[..] {
        [first, second] => return fault(second, format!("pictures stand here and in {first}, expected them in one")),
        [key] if inside => {
            return fault(key, "pictures stand here and in the messages, expected them in one of the two");
        }
        [key] => {
            images = given.pictures(&[key])?;
            let places = messages.iter_mut().map(put_pictures).sum::<usize>();
            if places != images.len() {
                let reason = format!("found {}, and {places} {PLACE} in the messages to show them", images.len());
                return fault(key, reason);
            }
            keys = (0..images.len()).map(|k| format!("{key}[{k}]")).collect();
        }
        _ => {
            let places = messages.iter().map(places).sum::<usize>();
            let expected = match inside {
                true => "as parts of the messages stand the pictures, so their texts need none".to_owned(),
                false => format!("there is no picture to show, expected a list of them as {:?}", BESIDE[0]),
            };
            if places > 0 {
                return fault(key, format!("found {places} {PLACE} in the texts; {expected}"));
            }
        }
    }
    for (i, message) in messages.iter().enumerate().filter(|_| inside) {
        for (j, part) in message.parts().into_iter().enumerate() {
            let Part::Image { image } = part else { continue };
            let key = format!("{key}[{i}].content[{j}].image");
            let Some(image) = image else { return fault(key, "found nothing, expected the path of a picture") };
            images.push(given.base.join(image));
            keys.push(key);
        }
    }
    if let Some(reason) = behind_the_last(&messages) {
        return fault(key, reason);
    }
    Ok((Dialogue { number: given.record.number, messages, images }, keys))
}

#[derive(Deserialize)]
struct Row {
    messages: Vec<Message>,
}

/// The messages and the key they stand under: `messages`, or ShareGPT's `conversations`.
fn messages(given: &Given) -> Result<(&'static str, Vec<Message>), Fault> {
    let Some(turns) = given.value(CONVERSATIONS).filter(|_| given.value(MESSAGES).is_none()) else {
        let row = Value::Object(given.values().clone());
        let Row { messages } = serde_json::from_value(row)
            .or_else(|error| fault(MESSAGES, format!("{error}; expected a list of {{\"role\", \"content\"}}")))?;
        // A misspelt one would be read, and not learnt from.
        let known = ["system", "user", "assistant", "tool"];
        if let Some((i, other)) = messages.iter().enumerate().find(|(_, m)| !known.contains(&m.role.as_str())) {
            let found = format!("found {:?}, expected \"system\", \"user\", \"assistant\" or \"tool\"", other.role);
            return fault(format!("{MESSAGES}[{i}].role"), found);
        }
        return Ok((MESSAGES, messages));
    };
    let spoken = |(i, turn): (usize, &Value)| {
        let role = match turn["from"].as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            _ => {
                let found = describe(&turn["from"]);
                return fault(
                    format!("{CONVERSATIONS}[{i}].from"),
                    format!("found {found}, expected human, gpt or system"),
                );
            }
        };
        let text = said("value", Some(turn["value"].clone()))
            .or_else(|(_, reason)| fault(format!("{CONVERSATIONS}[{i}].value"), reason))?;
        Ok(Message { role: role.into(), content: Content::Text(text) })
    };
    let turns = turns.as_array().map(Vec::as_slice).unwrap_or_default();
    Ok((CONVERSATIONS, turns.iter().enumerate().map(spoken).collect::<Result<_, Fault>>()?))
}

/// Why nothing can be trained on messages in this order.
fn cannot_be_learnt(messages: &[Message]) -> Option<String> {
    let mut answers = messages.iter().enumerate().filter(|(_, message)| message.role == "assistant");
    let Some((first, _)) = answers.next() else {
        return Some("there is no message of the assistant, so there is nothing to train on".into());
    };
    if first == 0 {
        return Some("the assistant speaks first, expected a message of the user's before".into());
    }
    let mut last = first;
    for (i, _) in answers {
        let reason = match &messages[last + 1..i] {
            [one] if one.role == "user" => None,
            [one] => Some(format!("one of role {:?} stands", one.role)),
            several => Some(format!("{} messages stand", several.len())),
        };
        if let Some(reason) = reason {
            return Some(format!("{reason} between two of the assistant's, expected one of the user's"));
        }
        last = i;
    }
    let shows = |message: &&Message| message.role == "assistant" && message.images() > 0;
    messages
        .iter()
        .any(|m| shows(&m))
        .then(|| "a message of the assistant holds an image; only others can show one".into())
}

/// Pictures that nothing is learnt from.
fn behind_the_last(messages: &[Message]) -> Option<String> {
    let behind = messages.iter().rev().take_while(|message| message.role != "assistant");
    let images = behind.map(Message::images).sum::<usize>();
    (images > 0).then(|| {
        format!("{images} pictures stand behind the last message of the assistant, where nothing is learnt from them")
    })
}

/// Places for pictures in the texts of a message. What the assistant says stays text.
fn places(message: &Message) -> usize {
    if message.role == "assistant" { 0 } else { message.text().matches(PLACE).count() }
}

/// Makes each of these places a picture; says how many there are.
fn put_pictures(message: &mut Message) -> usize {
    if places(message) == 0 {
        return 0;
    }
    let mut parts = Vec::new();
    for part in message.parts() {
        let Part::Text { text } = part else { continue };
        for (k, text) in text.split(PLACE).enumerate() {
            parts.extend((k > 0).then(Part::image));
            parts.extend((!text.is_empty()).then(|| Part::text(text)));
        }
    }
    message.content = Content::Parts(parts);
    message.images()
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
        // Pictures beside the messages: rows of sharegpt too. A row that cannot be read tells nothing.
        std::fs::write(&path, r#"{"messages": [{"role": "user", "content": "?"}], "images": ["a.png"]}"#).unwrap();
        assert!(!holds_dialogues(&path));
        std::fs::write(&path, format!("{{\n{{}}\n{good}")).unwrap();
        assert!(holds_dialogues(&path));
    }

    /// As ShareGPT, LLaVA and LLaMA-Factory write them: the pictures stand where the texts say.
    #[test]
    fn pictures_beside_the_messages_are_put_in() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.png", "b.png"] {
            save(&RgbImage::new(30, 20), &dir.path().join(name)).unwrap();
        }
        let path = dir.path().join("d.jsonl");
        let read = |line: &str| {
            std::fs::write(&path, line).unwrap();
            ReadAs::default().dialogues(&path)
        };
        let lines = [
            r#"{"messages": [{"role": "user", "content": "<image>One, <image>two?"}, {"role": "assistant", "content": "<image>!"}], "images": ["a.png", "b.png"]}"#,
            r#"{"conversations": [{"from": "human", "value": "<image>One, <image>two?"}, {"from": "gpt", "value": "<image>!"}], "image": ["a.png", "b.png"]}"#,
        ];
        for line in lines {
            let [dialogue] = &read(line).unwrap()[..] else { panic!("one row") };
            assert_eq!(dialogue.images, [dir.path().join("a.png"), dir.path().join("b.png")]);
            let parts = [Part::image(), Part::text("One, "), Part::image(), Part::text("two?")];
            assert_eq!(dialogue.messages[0], Message { role: "user".into(), content: Content::Parts(parts.to_vec()) });
            assert_eq!(dialogue.messages[1], Message::assistant("<image>!"));
            let error = format!("{:#}", read(&line.replace(", \"b.png\"", "")).unwrap_err());
            assert!(error.contains("found 1, and 2 <image> in the messages"), "{error}");
        }
        let inside = r#"[{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]"#;
        for (rest, reason) in [
            (format!(r#"{{"role": "user", "content": {inside}}}, {{"role": "assistant", "content": "!"}}], "images": ["a.png""#), "in one of the two"),
            (format!(r#"{{"role": "user", "content": "?"}}, {{"role": "assistant", "content": {inside}}}"#), "only others can show one"),
            (
                r#"{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "assistant", "content": "!"}"#.into(),
                "0 messages stand between two of the assistant's",
            ),
            (
                r#"{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "system", "content": "."}, {"role": "assistant", "content": "!"}"#.into(),
                "one of role \"system\" stands between two of the assistant's",
            ),
            (r#"{"role": "assistant", "content": "!"}, {"role": "user", "content": "?"}"#.into(), "the assistant speaks first"),
            (
                r#"{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}], "image_list": ["a.png""#.into(),
                "found 1 <image> in the texts; there is no picture to show, expected a list of them as \"images\"",
            ),
            (
                format!(r#"{{"role": "user", "content": {}}}, {{"role": "assistant", "content": "!"}}"#, inside.replace('?', "<image>?")),
                "found 1 <image> in the texts; as parts of the messages stand the pictures",
            ),
            (
                r#"{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}], "image": "a.png", "images": ["a.png""#.into(),
                "pictures stand here and in images",
            ),
            (
                format!(r#"{{"role": "user", "content": "?"}}, {{"role": "assistant", "content": "!"}}, {{"role": "user", "content": {inside}}}"#),
                "1 pictures stand behind the last message of the assistant",
            ),
        ] {
            let error = format!("{:#}", read(&format!("{{\"messages\": [{rest}]}}")).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
        let none = r#"{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "images": null}"#;
        assert!(read(none).unwrap()[0].images.is_empty());
        assert!(holds_dialogues(&path));
    }
}
