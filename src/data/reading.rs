//! From a path to rows, and what is wrong with those that are none.
//!
//! It hides which files a path stands for and that pictures must be looked at. What must stay true: every bad row is named by its number
//! and its reason and never hides another; a row of which anything is wrong is not among the good ones; pictures are looked at in the
//! order of the rows, so that a table is read from front to back.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Map;

use super::fields::Given;
use super::files::{self, Files};
use super::{Format, Sample};
use crate::geometry::{MAX_PICTURE_ASPECT, Size};
use crate::image;
use crate::progress::{Progress, say};
use crate::table::{self, Bad, Record};

/// How a file is to be read: `[data] format` and `images` of a config.
#[derive(Clone, Debug, Default)]
pub struct ReadAs {
    /// Without it, recognised by the keys of the rows.
    pub format: Option<Format>,
    /// Where relative paths of pictures start; without it, in the folder of the file.
    pub images: Option<PathBuf>,
    /// Go on without the bad rows where all are asked for, and say how many.
    pub leave_out_bad: bool,
}

/// Something wrong with a file of rows. `row` counts from 1: lines of JSON lines, items of a list, rows of a table below its headings; 0 is
/// the file as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub row: usize,
    pub key: String,
    pub reason: String,
    /// The part, where the rows lie in several files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        match (self.row, self.key.is_empty()) {
            (0, _) => write!(f, "{}", self.reason),
            (row, true) => write!(f, "row {row}: {}", self.reason),
            (row, false) => write!(f, "row {row}, key {:?}: {}", self.key, self.reason),
        }
    }
}

/// What was found in a file.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub path: PathBuf,
    /// None where no row says.
    pub format: Option<Format>,
    /// Rows that are not blank, good or bad.
    pub rows: usize,
    /// Questions that the good ones become.
    pub questions: usize,
    /// Different pictures named in the rows.
    pub pictures: usize,
    pub problems: Vec<Problem>,
    /// What else a person should know.
    pub notes: Vec<String>,
}

impl Report {
    /// The first few problems in one line, or nothing.
    pub fn faults(&self) -> Option<String> {
        const SHOWN: usize = 3;
        let shown: Vec<String> = self.problems.iter().take(SHOWN).map(Problem::to_string).collect();
        let more = match self.problems.len().saturating_sub(SHOWN) {
            0 => String::new(),
            n => format!("; and {n} more (foveate data check lists them all)"),
        };
        (!shown.is_empty()).then(|| format!("{}{more}", shown.join("; ")))
    }
}

/// The good rows, and what is wrong with the others.
#[derive(Clone, Debug)]
pub struct Read {
    pub samples: Vec<Sample>,
    /// How large their pictures are.
    pub sizes: HashMap<PathBuf, Size>,
    pub report: Report,
}

/// All rows of a file of any known format, in order. Blank lines are skipped.
///
/// # Errors
/// Those of [`ReadAs::all`].
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    ReadAs::default().all(path)
}

/// Reads every row and decodes every picture; lists all that is wrong.
///
/// # Errors
/// Those of [`ReadAs::check`].
pub fn check(path: &Path) -> Result<Report> {
    Ok(ReadAs::default().check(path)?.report)
}

impl ReadAs {
    /// All rows; with `leave_out_bad`, all good ones.
    ///
    /// # Errors
    /// The file cannot be read, has no rows, or some row is bad; the first few bad rows are named.
    pub fn all(&self, path: &Path) -> Result<Vec<Sample>> {
        let Read { samples, report, .. } = self.good(path)?;
        match report.faults() {
            Some(faults) if self.leave_out_bad && !samples.is_empty() => {
                let bad = report.problems.len();
                say(&format!("{bad} problems, whose rows are left out of {}: {faults}", path.display()));
                Ok(samples)
            }
            Some(faults) => bail!("reading data: {faults}: {}", path.display()),
            None => Ok(samples),
        }
    }

    /// The rows that are good, as far as headers of pictures tell.
    ///
    /// # Errors
    /// Only when the file itself cannot be read; bad rows are in the report.
    pub fn good(&self, path: &Path) -> Result<Read> {
        self.examine(path, Look::Header)
    }

    /// The same with every picture decoded.
    ///
    /// # Errors
    /// Only when the file itself cannot be read; bad rows are in the report.
    pub fn check(&self, path: &Path) -> Result<Read> {
        self.examine(path, Look::Whole)
    }

    fn examine(&self, path: &Path, look: Look) -> Result<Read> {
        let mut rows = Rows { format: self.format, ..Rows::default() };
        self.list(path, &mut rows)?;
        if rows.format.is_none()
            && let Some(reason) = rows.unknown.take()
        {
            rows.problem(None, 0, "", reason);
        } else if rows.read == 0 && rows.problems.is_empty() {
            rows.problem(None, 0, "", "there are no rows, expected one JSON object a line");
        }
        let notes = rows.notes();
        let Rows { format, read, found, mut problems, .. } = rows;
        let pictures = Pictures::look(found.iter().flat_map(|row| &row.sample.images), look);
        let mut samples = Vec::with_capacity(found.len());
        for Found { file, row, mut sample, doubled } in found {
            let faults = pictures.faults(&mut sample, format != Some(Format::Own));
            if faults.is_empty() && !doubled {
                samples.push(sample);
            }
            problems.extend(faults.into_iter().map(|(key, reason)| Problem { row, key, reason, file: file.clone() }));
        }
        // By part as the parts were read, within it by row.
        let parts: Vec<Option<PathBuf>> = problems.iter().map(|p| p.file.clone()).collect();
        let first = |part: &Option<PathBuf>| parts.iter().position(|p| p == part);
        problems.sort_by_cached_key(|p| (first(&p.file), p.row));
        let (path, questions) = (path.to_owned(), samples.len());
        let report = Report { path, format, rows: read, questions, pictures: pictures.len(), problems, notes };
        Ok(Read { samples, sizes: pictures.sizes(), report })
    }

    /// Every row of every file, its pictures not yet looked at.
    fn list(&self, path: &Path, rows: &mut Rows) -> Result<()> {
        match files::of(path)? {
            Files::Rows(files) => {
                let several = files.len() > 1;
                for file in &files {
                    let part = several.then(|| file.clone());
                    let base = self.images.as_deref().unwrap_or(file.parent().unwrap_or(Path::new("")));
                    let listed = table::scan(file, &mut |record| {
                        rows.take(record, base, part.as_deref());
                        Ok(())
                    });
                    match listed {
                        Err(error) if several => rows.problem(part, 0, "", format!("{error:#}")),
                        other => other?,
                    }
                }
            }
            Files::Beside(pairs) => {
                rows.format.get_or_insert(Format::VstarFolder);
                for (k, (file, picture)) in pairs.into_iter().enumerate() {
                    let bad = |reason: String| Bad { number: k + 1, rows: 1, reason };
                    let values: Result<Map<_, _>, Bad> =
                        std::fs::read(&file).map_err(|e| bad(e.to_string())).and_then(|b| {
                            serde_json::from_slice(&b).map_err(|e| bad(format!("this is no JSON object ({e})")))
                        });
                    let pictures = vec![("image".to_owned(), vec![picture])];
                    let record = values.map(|values| Record { number: k + 1, values, pictures });
                    rows.take(record, Path::new(""), Some(&file));
                }
            }
        }
        Ok(())
    }
}

/// A row that could be read.
struct Found {
    file: Option<PathBuf>,
    row: usize,
    sample: Sample,
    /// Another row has its id.
    doubled: bool,
}

/// The rows of a path as they come in.
#[derive(Default)]
struct Rows {
    format: Option<Format>,
    read: usize,
    /// Rows seen before the format was known, the first hundred.
    waiting: Vec<Record>,
    unknown: Option<String>,
    found: Vec<Found>,
    ids: HashMap<String, usize>,
    problems: Vec<Problem>,
}

const MOST_WAITING: usize = 100;

impl Rows {
    fn problem(&mut self, file: Option<PathBuf>, row: usize, key: &str, reason: impl Into<String>) {
        self.problems.push(Problem { row, key: key.into(), reason: reason.into(), file });
    }

    fn take(&mut self, record: Result<Record, Bad>, base: &Path, part: Option<&Path>) {
        let record = match record {
            Ok(record) => record,
            Err(bad) => {
                self.read += bad.rows;
                return self.problem(part.map(Path::to_owned), bad.number, "", bad.reason);
            }
        };
        self.read += 1;
        match self.format.map_or_else(|| Format::of(&record.values), Ok) {
            Ok(format) => {
                self.format = Some(format);
                let waiting = std::mem::take(&mut self.waiting);
                let first = self.read - waiting.len();
                for (k, record) in waiting.iter().enumerate() {
                    self.read_as(format, record, first + k, base, part);
                }
                self.read_as(format, &record, self.read, base, part);
            }
            Err(reason) => {
                self.unknown.get_or_insert(reason);
                if self.waiting.len() < MOST_WAITING {
                    self.waiting.push(record);
                }
            }
        }
    }

    fn read_as(&mut self, format: Format, record: &Record, ordinal: usize, base: &Path, part: Option<&Path>) {
        let file = part.map(Path::to_owned);
        let row = record.number;
        match format.read(&Given { format, record, base, ordinal }) {
            Ok(samples) => {
                for sample in samples {
                    let first = self.ids.get(&sample.id).copied();
                    if let Some(first) = first {
                        let reason = format!("{:?} was used in row {first} already, expected every id once", sample.id);
                        self.problem(file.clone(), row, "id", reason);
                    } else {
                        self.ids.insert(sample.id.clone(), row);
                    }
                    self.found.push(Found { file: file.clone(), row, sample, doubled: first.is_some() });
                }
            }
            Err((key, reason)) => self.problem(file, row, &key, reason),
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.format == Some(Format::VstarFolder) {
            notes.push(
                "options are shown in an order of each row's own, for the right one is published first".to_owned(),
            );
        }
        let longer = self.found.iter().filter(|row| row.sample.extra.contains_key("turns")).count();
        if longer > 0 {
            notes.push(format!("{longer} conversations go on after their first answer; only the first is asked"));
        }
        notes
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Look {
    Header,
    Whole,
}

/// The pictures of a set: how large each is, or why it cannot be shown.
pub(super) struct Pictures {
    sizes: HashMap<PathBuf, Result<Size, String>>,
}

impl Pictures {
    pub(super) fn look<'a>(paths: impl Iterator<Item = &'a PathBuf>, look: Look) -> Pictures {
        let mut seen = HashMap::new();
        let mut different: Vec<&PathBuf> = Vec::new();
        for path in paths {
            seen.entry(path).or_insert_with(|| different.push(path));
        }
        let bar = Progress::start("looking at the pictures", "picture", 0, different.len() as u64);
        let of = |path: &PathBuf| {
            let size = match look {
                Look::Header => image::size(path),
                Look::Whole if table::is_there(path) => image::decode(path).map(|picture| picture.size()),
                Look::Whole => Err(anyhow!("there is no picture at {}", path.display())),
            };
            bar.add(1);
            (path.clone(), size.map_err(|e| format!("{e:#}")))
        };
        let sizes = different.par_iter().map(|path| of(path)).collect();
        bar.finish();
        Pictures { sizes }
    }

    /// How many different ones were named.
    pub(super) fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Of those that are there.
    pub(super) fn sizes(self) -> HashMap<PathBuf, Size> {
        self.sizes.into_iter().filter_map(|(path, size)| Some((path, size.ok()?))).collect()
    }

    /// Why a picture cannot be shown.
    pub(super) fn fault(&self, path: &Path) -> Option<String> {
        match self.sizes.get(path)? {
            Err(reason) => Some(reason.clone()),
            Ok(size) if size.too_thin() => Some(format!(
                "{size} pixels, expected an aspect ratio of at most {MAX_PICTURE_ASPECT}; cut or pad it first: {}",
                path.display()
            )),
            Ok(_) => None,
        }
    }

    /// Missing or damaged pictures of a row, and boxes outside them. With `cut`, what rounding left outside is cut off first.
    fn faults(&self, sample: &mut Sample, cut: bool) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        for (k, path) in sample.images.iter().enumerate() {
            faults.extend(self.fault(path).map(|reason| (format!("images[{k}]"), reason)));
        }
        for (k, target) in sample.targets.iter_mut().enumerate() {
            let path = target.image.checked_sub(1).and_then(|k| sample.images.get(k));
            let Some(Ok(size)) = path.and_then(|path| self.sizes.get(path)) else { continue };
            let whole = size.bounds();
            let inside = target.bbox.clamp(&whole);
            let corners = <[f64; 4]>::from(target.bbox);
            let near = corners.iter().zip(<[f64; 4]>::from(inside)).all(|(a, b)| (a - b).abs() <= 1.0);
            if cut && near && inside.area() > 0.0 {
                target.bbox = inside;
            }
            if !whole.contains(&target.bbox) {
                let reason = format!("found {}, expected a box inside the picture, which is {size}", target.bbox);
                faults.push((format!("targets[{k}].bbox"), reason));
            }
        }
        faults
    }
}

/// Whether any of these rows has a picture: questions may be of words alone.
pub fn shows_pictures<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> bool {
    samples.into_iter().any(|sample| !sample.images.is_empty())
}

/// The pictures of these rows that cannot be decoded, with the reason; headers do not tell that.
pub fn damaged(samples: &[&Sample]) -> HashMap<PathBuf, String> {
    let pictures = Pictures::look(samples.iter().flat_map(|sample| &sample.images), Look::Whole);
    pictures.sizes.into_iter().filter_map(|(path, size)| Some((path, size.err()?))).collect()
}
