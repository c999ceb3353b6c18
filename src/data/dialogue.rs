//! Written dialogues for SFT: one JSON object a line, `{"messages": [{"role", "content": [{"type": "image", "image": PATH} |
//! {"type": "text", "text": …}]}]}`, paths relative to the file. What must stay true: a bad row is named by file and number.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::chat::{Message, Part};

/// A conversation with its pictures in order of appearance.
#[derive(Clone, Debug, PartialEq)]
pub struct Dialogue {
    /// The line in its file, from 1.
    pub number: usize,
    pub messages: Vec<Message>,
    pub images: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Row {
    messages: Vec<Message>,
}

/// Reads every dialogue of a file.
///
/// # Errors
/// A file that cannot be read or holds none; a row that is no dialogue, shows an image without a path or lacks the assistant.
pub fn read_dialogues(path: &Path) -> Result<Vec<Dialogue>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading dialogues: {}", path.display()))?;
    // Some editors begin a UTF-8 file with a byte order mark, which is no JSON.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut dialogues = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("row {} of {}", i + 1, path.display());
        let row: Row = serde_json::from_str(line)
            .with_context(|| format!("{}: expected {{\"messages\": [{{\"role\", \"content\"}}, …]}}", at()))?;
        ensure!(
            row.messages.iter().any(|m| m.role == "assistant"),
            "{}: \"messages\" holds no message of the assistant, so there is nothing to train on",
            at()
        );
        let mut images = Vec::new();
        for part in row.messages.iter().flat_map(Message::parts) {
            if let Part::Image { image } = part {
                let image =
                    image.with_context(|| format!("{}: an image without a path, expected \"image\": PATH", at()))?;
                images.push(folder.join(image));
            }
        }
        dialogues.push(Dialogue { number: i + 1, messages: row.messages, images });
    }
    ensure!(!dialogues.is_empty(), "the file holds no dialogue; expected one JSON object a line: {}", path.display());
    Ok(dialogues)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_rows_and_names_the_bad_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        let good = r#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "!"}]}"#;
        std::fs::write(&path, format!("\u{feff}{good}\n\n{good}\n")).unwrap();
        let rows = read_dialogues(&path).unwrap();
        assert_eq!((rows.len(), rows[1].number), (2, 3));
        assert_eq!(rows[0].images, [dir.path().join("a.png")]);

        let error = |text: &str| {
            std::fs::write(&path, text).unwrap();
            format!("{:#}", read_dialogues(&path).unwrap_err())
        };
        assert!(error(&format!("{good}\n{{\"messages\": 3}}")).contains("row 2 of"));
        assert!(error(r#"{"messages": [{"role": "user", "content": "?"}]}"#).contains("no message of the assistant"));
        assert!(error("\n").contains("holds no dialogue"));
    }
}
