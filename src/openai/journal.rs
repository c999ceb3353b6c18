//! The record of what servers were asked and what came back: one JSON object a line, in the order in which the calls ended.
//!
//! It hides the file. What must stay true: an answer is on the disk before anyone uses it; an answer that is in the file is never
//! asked for again; a line that a kill cut short costs nothing but itself; one process writes at a time; no key is in it.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::progress::say;

/// What a server's model wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub text: String,
    /// Thoughts that the server took out of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Why it ended, in the server's words: `stop`, `length`.
    pub finish_reason: Option<String>,
    /// Tokens that were paid for, as the server counts them.
    pub usage: Option<Value>,
}

/// A call that ended, one line of the file.
#[derive(Serialize)]
pub(crate) struct Call<'a> {
    /// Of `request`: equal requests have equal answers.
    pub digest: &'a str,
    pub row: &'a str,
    /// Counts from 1 within a run.
    pub attempt: usize,
    /// When it ended, UTC.
    pub at: String,
    pub seconds: f64,
    /// None: nothing came back.
    pub status: Option<u16>,
    #[serde(flatten)]
    pub end: End<'a>,
    /// What was sent, a picture as the digest of its file.
    pub request: &'a Value,
}

/// `"answer": {...}` or `"error": "..."`.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End<'a> {
    Answer(&'a Answer),
    Error(&'a str),
}

/// What is read back of a line.
#[derive(Deserialize)]
struct Recorded {
    digest: String,
    answer: Option<Answer>,
}

/// The file, open for appending, and the answers it holds.
pub(crate) struct Journal {
    path: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    answers: HashMap<String, Answer>,
}

impl Journal {
    /// Opens the file, which is made if missing, and mends its end.
    ///
    /// # Errors
    /// The file cannot be read or written, is held by another process, or has a damaged line that is not its last.
    pub fn open(path: &Path) -> Result<Journal> {
        let opening = || format!("opening the record of calls: {}", path.display());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(opening)?;
        let mut file = File::options().read(true).append(true).create(true).open(path).with_context(opening)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another process asks a server and writes into this record of calls; wait for it, or name another file: {}",
                path.display()
            ),
            // Some network file systems have no locks. Then nothing is known; the work goes on and says so.
            Err(TryLockError::Error(error)) => say(&format!(
                "note: this file system cannot lock ({error}); do not ask for the same rows twice at once: {}",
                path.display()
            )),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(opening)?;
        let mut answers = HashMap::new();
        let mut whole = 0;
        for (i, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
            let ended = line.ends_with(b"\n");
            match serde_json::from_slice::<Recorded>(line) {
                _ if line.trim_ascii().is_empty() => {}
                Ok(Recorded { digest, answer }) => {
                    if let Some(answer) = answer {
                        answers.entry(digest).or_insert(answer);
                    }
                    // The kill came between the line and its end: it was paid for, so it stays.
                    if !ended {
                        file.write_all(b"\n").with_context(opening)?;
                    }
                }
                Err(error) if ended => bail!(
                    "line {} of the record of calls is damaged ({error}); take it out, and its row is asked for again: {}",
                    i + 1,
                    path.display()
                ),
                Err(_) => {
                    say(&format!(
                        "line {}, the last, was cut short when the run was killed and is left out: {}",
                        i + 1,
                        path.display()
                    ));
                    file.set_len(whole as u64).with_context(opening)?;
                }
            }
            whole += line.len();
        }
        Ok(Journal { path: path.to_owned(), inner: Mutex::new(Inner { file, answers }) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first answer to a request, from this run or an earlier one.
    pub fn answer(&self, digest: &str) -> Option<Answer> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).answers.get(digest).cloned()
    }

    /// Appends a call; when this returns, it survives the process and the machine.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn append(&self, call: &Call) -> Result<()> {
        let mut line = serde_json::to_vec(call).context("writing a call as JSON")?;
        line.push(b'\n');
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // One write for the whole line, so that only a kill in its middle can tear it; half a line that a full disk left is taken back.
        let before = inner.file.metadata().map(|file| file.len());
        let written = inner.file.write_all(&line).and_then(|()| inner.file.sync_data());
        if let (Err(_), Ok(before)) = (&written, before) {
            let _ = inner.file.set_len(before);
        }
        written.with_context(|| format!("recording a call: {}", self.path.display()))?;
        if let End::Answer(answer) = call.end {
            inner.answers.entry(call.digest.to_owned()).or_insert_with(|| answer.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn append(journal: &Journal, digest: &str, end: End) {
        let request = json!({"model": "m"});
        let call = Call {
            digest,
            row: "r",
            attempt: 1,
            at: String::new(),
            seconds: 0.5,
            status: Some(200),
            end,
            request: &request,
        };
        journal.append(&call).unwrap();
    }

    fn answer(text: &str) -> Answer {
        Answer {
            text: text.into(),
            reasoning: None,
            finish_reason: Some("stop".into()),
            usage: Some(json!({"total_tokens": 7})),
        }
    }

    fn lines(path: &Path) -> usize {
        std::fs::read_to_string(path).unwrap().lines().count()
    }

    #[test]
    fn answers_are_there_again_and_errors_are_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calls.jsonl");
        let journal = Journal::open(&path).unwrap();
        append(&journal, "a", End::Error("500"));
        append(&journal, "a", End::Answer(&answer("first")));
        append(&journal, "a", End::Answer(&answer("second")));
        append(&journal, "b", End::Error("cut"));
        let error = Journal::open(&path).err().unwrap().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.answer("a"), Some(answer("first")));
        assert_eq!(journal.answer("b"), None);
        assert_eq!(lines(&path), 4);
        let last = std::fs::read_to_string(&path).unwrap();
        let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert_eq!((&last["error"], &last["request"]["model"]), (&json!("cut"), &json!("m")));
    }

    #[test]
    fn a_kill_at_any_byte_of_the_last_line_costs_that_line_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calls.jsonl");
        let journal = Journal::open(&path).unwrap();
        append(&journal, "a", End::Answer(&answer("kept")));
        let first = std::fs::metadata(&path).unwrap().len() as usize;
        append(&journal, "b", End::Answer(&answer("torn")));
        drop(journal);
        let bytes = std::fs::read(&path).unwrap();
        for end in first..=bytes.len() {
            std::fs::write(&path, &bytes[..end]).unwrap();
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.answer("a"), Some(answer("kept")));
            // Whole but for its line end counts as whole.
            assert_eq!(journal.answer("b").is_some(), end + 1 >= bytes.len(), "{end}");
            append(&journal, "c", End::Answer(&answer("after")));
            drop(journal);
            let journal = Journal::open(&path).unwrap();
            assert_eq!(journal.answer("c"), Some(answer("after")), "{end}");
        }
    }

    #[test]
    fn damage_that_no_kill_explains_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calls.jsonl");
        std::fs::write(&path, "{\"digest\": \"a\"}\nnonsense\n{\"digest\": \"b\"}\n").unwrap();
        let error = Journal::open(&path).err().unwrap().to_string();
        assert!(error.contains("line 2") && error.contains("calls.jsonl"), "{error}");
    }
}
