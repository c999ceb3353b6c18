//! `metrics.jsonl`: one JSON object a line, each with its "step", in the order of the steps.
//!
//! Names are the ones users of verl and TRL know (`reward/mean`, `actor/grad_norm`, `timing_s/step`, ...). What must stay true: a step is in the
//! file at most once, steps only grow, and a kill can tear the last line only.

use super::events::EventLog;
use super::write_atomic;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The metrics of one step by name. A value that is not finite is stored as null, as JSON has no other way.
pub type Metrics = Map<String, Value>;

/// What was read from a `metrics.jsonl`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsFile {
    /// One map a step, in order, each with "step".
    pub rows: Vec<Metrics>,
    /// A sentence about a torn last line, where there was one.
    pub note: Option<String>,
}

/// `metrics.jsonl` open for appending.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    last: Option<u64>,
    events: Option<EventLog>,
}

impl MetricsLog {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let read = read(path)?;
        if read.note.is_some() {
            // Appending after a torn line would damage the next one too.
            rewrite(path, &read.rows)?;
        }
        let last = read.rows.last().map(step_of).transpose()?;
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("opening the metrics: {}", path.display()))?;
        Ok(MetricsLog { path: path.to_owned(), file, last, events: None })
    }

    /// From here on, what is logged also goes into a new event file beside this one, for TensorBoard.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn with_events(mut self) -> Result<Self> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.events = Some(EventLog::create(folder, self.last.map_or(0, |last| last + 1))?);
        Ok(self)
    }

    /// Appends the metrics of a step, handed to the system before this returns: a reader sees them at once and a killed process loses none.
    ///
    /// # Errors
    /// When the step is not after the last one, or the disk refuses.
    pub fn append(&mut self, step: u64, metrics: &Metrics) -> Result<()> {
        if let Some(last) = self.last.filter(|&last| step <= last) {
            bail!("step {step} cannot be logged after step {last}: {}", self.path.display());
        }
        let mut row = Metrics::new();
        row.insert("step".into(), json!(step));
        row.extend(
            metrics.iter().filter(|(name, _)| *name != "step").map(|(name, value)| (name.clone(), value.clone())),
        );
        let mut line = serde_json::to_vec(&row).context("writing metrics as JSON")?;
        line.push(b'\n');
        // One write for the whole line, so that a reader who follows the file rarely meets half of one.
        self.file
            .write_all(&line)
            .and_then(|()| self.file.flush())
            .with_context(|| format!("writing the metrics of step {step}: {}", self.path.display()))?;
        self.last = Some(step);
        match &mut self.events {
            Some(events) => events.append(step, &row),
            None => Ok(()),
        }
    }
}

fn step_of(row: &Metrics) -> Result<u64> {
    row.get("step").and_then(Value::as_u64).context("a metrics line has no whole number \"step\"")
}

/// Reads the file; a missing one is empty. The last line may be torn (no newline at its end, or not JSON): it is left out and `note` says so.
pub(super) fn read(path: &Path) -> Result<MetricsFile> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(MetricsFile::default());
        }
        Err(error) => {
            return Err(error).with_context(|| format!("reading the metrics: {}", path.display()));
        }
    };
    let mut file = MetricsFile::default();
    let mut rest = bytes.as_slice();
    let mut number = 0;
    while !rest.is_empty() {
        number += 1;
        let (line, ended, after) = match rest.iter().position(|&byte| byte == b'\n') {
            Some(end) => (&rest[..end], true, &rest[end + 1..]),
            None => (rest, false, &rest[rest.len()..]),
        };
        rest = after;
        if line.trim_ascii().is_empty() {
            continue;
        }
        let parsed = serde_json::from_slice::<Metrics>(line).map_err(anyhow::Error::from).and_then(|row| {
            step_of(&row)?;
            Ok(row)
        });
        match parsed {
            Ok(row) if ended => file.rows.push(row),
            // Whole JSON without its newline: the kill came between the two. Counted as torn, so that appending stays simple.
            Ok(_) => file.note = Some(torn(path, number)),
            Err(_) if rest.is_empty() => file.note = Some(torn(path, number)),
            Err(error) => {
                return Err(error).with_context(|| format!("line {number} is damaged: {}", path.display()));
            }
        }
    }
    Ok(file)
}

fn torn(path: &Path, number: usize) -> String {
    format!("line {number}, the last, was cut short when the run was killed and is left out: {}", path.display())
}

/// Keeps the lines up to and including step `done` (none of them without a checkpoint).
pub(super) fn cut_after(path: &Path, done: Option<u64>) -> Result<()> {
    let read = read(path)?;
    let mut kept = Vec::new();
    for row in &read.rows {
        let step = step_of(row)?;
        if done.is_some_and(|done| step <= done) {
            kept.push(row.clone());
        }
    }
    if kept.len() < read.rows.len() || read.note.is_some() { rewrite(path, &kept) } else { Ok(()) }
}

fn rewrite(path: &Path, rows: &[Metrics]) -> Result<()> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row).context("writing metrics as JSON")?;
        bytes.push(b'\n');
    }
    write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, value: f64) -> Metrics {
        let mut metrics = Metrics::new();
        metrics.insert(name.into(), json!(value));
        metrics
    }

    #[test]
    fn lines_are_what_a_reader_expects() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        log.append(1, &row("reward/mean", 0.25)).unwrap();
        log.append(3, &row("actor/kl_loss", f64::NAN)).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"reward/mean\":0.25}\n{\"step\":3,\"actor/kl_loss\":null}\n"
        );
    }

    #[test]
    fn a_step_is_never_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        MetricsLog::open(&path).unwrap().append(5, &row("a", 1.0)).unwrap();
        let mut log = MetricsLog::open(&path).unwrap();
        let error = format!("{:#}", log.append(5, &row("a", 1.0)).unwrap_err());
        assert!(error.contains("step 5 cannot be logged after step 5"), "{error}");
        log.append(6, &row("a", 1.0)).unwrap();
    }

    #[test]
    fn a_torn_last_line_is_left_out_said_and_mended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for torn in ["{\"step\":2,\"rew", "{\"step\":2}", "{\"step\":2,\"rew\n"] {
            fs::write(&path, format!("{{\"step\":1}}\n{torn}")).unwrap();
            let read = read(&path).unwrap();
            assert_eq!(read.rows.len(), 1, "{torn:?}");
            assert!(read.note.is_some_and(|note| note.contains("line 2")), "{torn:?}");
            let mut log = MetricsLog::open(&path).unwrap();
            log.append(2, &row("a", 0.5)).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2,\"a\":0.5}\n", "{torn:?}");
        }
    }

    #[test]
    fn damage_before_the_last_line_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\nnonsense\n{\"step\":3}\n").unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("line 2 is damaged"), "{error}");
    }
}
