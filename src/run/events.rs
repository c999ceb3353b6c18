//! The metrics once more as TensorBoard reads them: an event file beside `metrics.jsonl`, a record a step, every metric under its own name.
//!
//! Hides the format: the messages are `tensorflow.Event` and its parts (only the fields used here; `prost` encodes them), each framed by its length
//! and two masked CRC-32C sums. What must stay true: `metrics.jsonl` is the record and this a copy for one viewer; nothing here is read back. Every start
//! of the program opens a file of its own, which first says from which step on it speaks: TensorBoard then forgets what earlier files say about
//! those steps, so that a resumed run shows no step twice.

use super::Metrics;
use anyhow::{Context, Result};
use prost::Message;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the names of event files begin with; TensorBoard knows them by it.
pub const EVENTS: &str = "events.out.tfevents.";

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    /// One of several kinds of value in the format, so that a 0 has to be written out: left away, it would be no value.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `SessionLog.START`: what earlier files say from this event's step on no longer counts.
const START: i32 = 1;

/// An event file open for appending.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
}

impl EventLog {
    /// Opens a new file in `folder` for the steps from `first` on.
    pub(super) fn create(folder: &Path, first: u64) -> Result<Self> {
        let (path, file) = new_file(folder).with_context(|| format!("making an event file in {}", folder.display()))?;
        let mut log = EventLog { path, file };
        // The reader looks for this text before anything else.
        log.write(0, What::FileVersion("brain.Event:2".into()))?;
        log.write(first, What::SessionLog(SessionLog { status: START }))?;
        Ok(log)
    }

    /// Writes the numbers among the metrics of a step; what is no number, or not finite, is left out.
    pub(super) fn append(&mut self, step: u64, metrics: &Metrics) -> Result<()> {
        let scalar = |(tag, value): (&String, &serde_json::Value)| {
            let value = value.as_f64().filter(|value| value.is_finite() && tag != "step")?;
            Some(Scalar { tag: tag.clone(), simple_value: Some(value as f32) })
        };
        self.write(step, What::Summary(Summary { value: metrics.iter().filter_map(scalar).collect() }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let event = Event { wall_time, step: i64::try_from(step).unwrap_or(i64::MAX), what: Some(what) };
        self.file
            .write_all(&framed(&event.encode_to_vec()))
            .and_then(|()| self.file.flush())
            .with_context(|| format!("writing the events of step {step}: {}", self.path.display()))
    }
}

/// TensorBoard reads the files of a folder in the order of their names, so a name begins with the time.
fn new_file(folder: &Path) -> std::io::Result<(PathBuf, File)> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    for number in 0..1000 {
        let path = folder.join(format!("{EVENTS}{seconds:010}.foveate.{number:03}"));
        match File::create_new(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(std::io::Error::new(ErrorKind::AlreadyExists, "a thousand event files were begun in this second"))
}

/// A record: length, its sum, the bytes, their sum; numbers in little endian.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), bytes, &masked(bytes).to_le_bytes()].concat()
}

/// The format's own twist: a sum over bytes that hold sums would be a poor sum.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    /// The events of a file, its sums checked.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let mut rest = bytes.as_slice();
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(framed(&rest[12..12 + length]), &rest[..16 + length]);
            events.push(Event::decode(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    /// Of 32 zero bytes the sum is 8a9136aa (RFC 3720, B.4).
    #[test]
    fn the_sum_is_the_published_one() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn a_file_says_from_which_step_on_it_speaks_and_then_the_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = EventLog::create(folder.path(), 3).unwrap();
        let metrics = [
            ("step", json!(3)),
            ("reward/mean", json!(0.5)),
            ("frac", json!(0)),
            ("actor/kl_loss", json!(null)),
            ("note", json!("x")),
        ];
        log.append(3, &metrics.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()).unwrap();
        let events = events(&log.path);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!((events[1].step, events[1].what.clone()), (3, Some(What::SessionLog(SessionLog { status: START }))));
        let reward = Scalar { tag: "reward/mean".into(), simple_value: Some(0.5) };
        let zero = Scalar { tag: "frac".into(), simple_value: Some(0.0) };
        assert_eq!(
            (events[2].step, events[2].what.clone()),
            (3, Some(What::Summary(Summary { value: vec![reward, zero] })))
        );
        assert_eq!(events.len(), 3);
    }

    #[test]
    fn every_start_has_a_file_of_its_own_that_sorts_behind_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventLog::create(folder.path(), 1).unwrap().path;
        let second = EventLog::create(folder.path(), 5).unwrap().path;
        assert!(first < second, "{} and {}", first.display(), second.display());
    }
}
