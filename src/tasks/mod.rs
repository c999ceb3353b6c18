//! What may be asked, shown and rewarded. A [`Task`] never meets a tensor or a token: it opens a conversation in words and
//! views, replies to what the policy said, and judges the finished episode. The turn loop (`rollout.rs`) does the rest.

pub mod asking;
pub mod crop;
pub mod multi_image;
pub mod protocol;
pub mod template;

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error as _};

use crate::chat::{Action, Convention, Part};
use crate::config::BadConfig;
use crate::data::{FAULTY, ReadAs, Sample};
use crate::episode::{BoxOutcome, Episode, Stop};
use crate::geometry::{BBox, Budget, Size, View};
use crate::reward::{Named, Parts};

/// A message of the task with the views it shows, one for each image among its parts, in order.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    pub parts: Vec<Part>,
    pub views: Vec<View>,
}

/// How the task opens the conversation.
#[derive(Clone, Debug)]
pub struct Opening {
    pub system: Option<String>,
    pub user: Shown,
}

/// What the policy's last turn was taken to be, for the record.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub outcome: Option<BoxOutcome>,
    /// In pixels of the original picture.
    pub bbox: Option<BBox>,
    /// The same of an answer in boxes on several pictures, where it can be read.
    pub boxes: Option<Vec<Named>>,
}

impl Reading {
    /// Of a turn whose box was of this class, and is not used.
    pub fn of(outcome: BoxOutcome) -> Reading {
        Reading { outcome: Some(outcome), ..Reading::default() }
    }
}

/// The task's answer to a turn of the policy.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Go on with this message.
    Show(Shown, Reading),
    Close(Stop, Reading),
}

/// Everything that a task may look at when it replies.
pub struct Context<'a> {
    pub sample: &'a Sample,
    /// Sizes of the sample's original pictures.
    pub sizes: &'a [Size],
    /// The views shown so far, in order.
    pub views: &'a [View],
    /// What the policy's numbers mean.
    pub convention: Convention,
    /// How many turns the policy has taken, this one included.
    pub turn: usize,
    /// A number that is the same in every run for the same seed, step, group, member and turn.
    pub seed: u64,
    /// What the policy wrote in this turn.
    pub said: &'a str,
}

/// Checks every row of a file against the task that will ask it.
///
/// # Errors
/// The first row that cannot be asked or judged, named.
pub fn check_rows(task: &dyn Task, rows: &[Sample], file: &Path) -> Result<()> {
    for row in rows {
        task.check(row).with_context(|| format!("row {} of {}", row.id, file.display()))?;
    }
    Ok(())
}

/// Refuses to train on rows whose published answer cannot be right; they are there to be counted in evaluations.
///
/// # Errors
/// Names the first, and says how many there are.
pub fn ensure_possible(rows: &[Sample], file: &Path) -> Result<()> {
    let mut faulty = rows.iter().filter(|row| row.extra.get(FAULTY).and_then(serde_json::Value::as_bool) == Some(true));
    let Some(first) = faulty.next() else { return Ok(()) };
    anyhow::bail!(
        "row {} is marked faulty, for no answer to it can be right ({} such rows); evaluations count them, to train leave them out: {}",
        first.id,
        1 + faulty.count(),
        file.display()
    )
}

/// The pixel budget of a task's views, whose sides are multiples of `factor`.
///
/// # Errors
/// No view has so many pixels.
fn view_budget(min_pixels: u64, max_pixels: u64, factor: u32) -> Result<Budget> {
    let smallest = u64::from(factor) * u64::from(factor);
    ensure!(
        min_pixels <= max_pixels && max_pixels >= smallest,
        BadConfig(format!(
            "task.min_pixels = {min_pixels} and task.max_pixels = {max_pixels} leave no size for a view; the smallest view has {smallest} pixels"
        ))
    );
    Ok(Budget { min_pixels, max_pixels, factor })
}

pub trait Task: Sync {
    fn name(&self) -> &'static str;
    /// The most turns the policy can take.
    fn max_turns(&self) -> usize;
    /// Whether this row can be asked and judged at all; looked at before a run begins. The error says what the row lacks.
    fn check(&self, sample: &Sample) -> Result<()>;
    fn open(&self, sample: &Sample, sizes: &[Size]) -> Result<Opening>;
    fn reply(&self, context: &Context, action: &Action) -> Result<Reply>;
    /// Scores the finished episode. Pure: the same episode gives the same parts.
    fn judge(&self, sample: &Sample, episode: &Episode) -> Parts;
    /// What the parts of a judgement are worth together.
    fn reward(&self, parts: &Parts) -> f64 {
        parts.iter().map(|(_, value)| value).sum()
    }
}

/// `[task]` of a config. `kind` says which; without it, it is `crop`.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Options {
    Crop(crop::Options),
    MultiImage(multi_image::Options),
}

impl Options {
    /// The task, for views whose sides are multiples of `factor`.
    ///
    /// # Errors
    /// Options that cannot work, named.
    pub fn task(&self, factor: u32) -> Result<Box<dyn Task>> {
        Ok(match self {
            Options::Crop(options) => Box::new(crop::Crop::new(options.clone(), factor)?),
            Options::MultiImage(options) => Box::new(multi_image::MultiImageTask::new(options.clone(), factor)?),
        })
    }

    /// The rows of a file as this task asks them.
    ///
    /// # Errors
    /// Those of [`ReadAs::all`].
    pub fn read(&self, path: &Path, read_as: &ReadAs) -> Result<Vec<Sample>> {
        Ok(self.asked(read_as.all(path)?))
    }

    /// Rows as this task asks them: those of a file, or others (`[task] ask`).
    pub fn asked(&self, rows: Vec<Sample>) -> Vec<Sample> {
        match self {
            Options::Crop(_) | Options::MultiImage(multi_image::Options { ask: None, .. }) => rows,
            Options::MultiImage(multi_image::Options { ask: Some(ask), .. }) => ask.rows(rows),
        }
    }

    pub fn max_pixels(&self) -> u64 {
        match self {
            Options::Crop(options) => options.max_pixels,
            Options::MultiImage(options) => options.max_pixels,
        }
    }

    /// The most turns the policy can take.
    pub fn turns(&self) -> usize {
        match self {
            Options::Crop(options) => options.turns,
            Options::MultiImage(_) => 1,
        }
    }
}

/// By hand, because serde's tagged enums know no default and lose the names of unknown keys.
impl<'de> Deserialize<'de> for Options {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Options, D::Error> {
        let mut table = toml::Table::deserialize(deserializer)?;
        let kind = table.remove("kind");
        match kind.as_ref().map_or(Some("crop"), toml::Value::as_str) {
            Some("crop") => table.try_into().map(Options::Crop).map_err(D::Error::custom),
            Some("multi_image") => table.try_into().map(Options::MultiImage).map_err(D::Error::custom),
            _ => Err(D::Error::custom(format!(
                "task.kind is {}, expected \"crop\" or \"multi_image\"",
                kind.unwrap_or_else(|| "nothing".into())
            ))),
        }
    }
}
