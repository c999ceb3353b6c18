//! The run folder: the one place a run leaves its trace, and the only thing report and evaluation read.
//!
//! ```text
//! RUN/config.toml  environment.json  metrics.jsonl  events.out.tfevents.*  episodes/STEP.jsonl  validation/STEP.jsonl  checkpoints/STEP/
//!     table.json  answers.jsonl  report.html
//! ```
//!
//! Hides how files become durable. What must stay true: at whatever instant the process is killed, every file in the folder is
//! either the old one or the new one (only the last line of `metrics.jsonl` may be torn, and readers know), no step appears twice in
//! `metrics.jsonl`, and one folder belongs to one process at a time.

mod changes;
pub use changes::of_answers;
mod checkpoint;
mod events;
mod metrics;
mod process;

use checkpoint::Draft;
pub use checkpoint::{Checkpoint, STATE};
pub use events::EVENTS;
pub use metrics::{Metrics, MetricsFile, MetricsLog};
pub use process::{
    EXIT_INTERRUPTED, Environment, Interrupt, Interrupted, Invocation, Stopwatch, now, peak_of, peak_rss,
};

use crate::progress::say;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read as _, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Whether a run begins or goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    #[default]
    New,
    /// From the newest checkpoint, with the plan it was begun with.
    Resume,
    /// From the newest checkpoint, with another plan, on purpose.
    ResumeChanged,
}

/// What leaves its trace in a run folder. A folder belongs to the one that began it: what is unfinished to another is a result to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Rl,
    Sft,
    Rollout,
    Eval,
    /// The evaluations of a demo.
    Demo,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Kind::Rl => "foveate rl",
            Kind::Sft => "foveate sft",
            Kind::Rollout => "foveate rollout",
            Kind::Eval => "foveate eval",
            Kind::Demo => "foveate demo",
        })
    }
}

/// The resolved plan of the run.
pub const CONFIG: &str = "config.toml";
/// Machine and program, see [`Environment`].
pub const ENVIRONMENT: &str = "environment.json";
/// One JSON object a line, each with "step".
pub const METRICS: &str = "metrics.jsonl";
/// What was answered so far, where playing can go on, see [`crate::engine::recorded`].
pub const ANSWERS: &str = "answers.jsonl";
const EPISODES: &str = "episodes";
/// Episodes of the held-out questions asked during training.
const VALIDATION: &str = "validation";
const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = "run.lock";

/// A run folder open for writing. Held by one process at a time; the hold ends with the process, however it ends.
#[derive(Debug)]
pub struct RunFolder {
    root: PathBuf,
    kind: Kind,
    /// Kept open: closing it gives the folder back.
    _lock: File,
}

impl RunFolder {
    /// Starts a run in `path`, which is made if missing.
    ///
    /// # Errors
    /// When the folder already holds a run, is held by another process, or cannot be written.
    pub fn create(path: impl AsRef<Path>, kind: Kind) -> Result<Self> {
        let root = path.as_ref();
        RunFolder::check(root, kind, Start::New, "")?;
        make_folders(root)?;
        Ok(RunFolder { root: root.to_owned(), kind, _lock: lock(root)? })
    }

    /// Whether a run can begin or go on in `path` with this plan, before anything large is loaded for it.
    ///
    /// # Errors
    /// There is a run where none should be, or the other way round; it is of another kind; the plan differs from the saved one in what a
    /// resumed run must keep.
    pub fn check(path: impl AsRef<Path>, kind: Kind, start: Start, plan: &str) -> Result<()> {
        let root = path.as_ref();
        if let Some(file) =
            root.ancestors().find(|place| place.symlink_metadata().is_ok()).filter(|place| !place.is_dir())
        {
            bail!(
                "a run needs a folder, and {} is a file: choose another place than {}",
                file.display(),
                root.display()
            );
        }
        let saved = root.join(CONFIG);
        if start != Start::New && holds_run(root) {
            refuse_another(root, kind)?;
        }
        if start == Start::Resume && holds_run(root) && saved.exists() {
            let text =
                fs::read_to_string(&saved).with_context(|| format!("reading the run's config: {}", saved.display()))?;
            return changes::refuse(&text, plan).with_context(|| format!("resuming {}", root.display()));
        }
        if start == Start::Resume && holds_run(root) {
            bail!(
                "the run's {CONFIG} is missing, so this plan cannot be compared with it; put it back, or add --accept-changes: {}",
                root.display()
            );
        }
        match (start, holds_run(root)) {
            (Start::New, true) => bail!(
                "this folder already holds a run; choose another folder, remove this one, or go on in it with --resume: {}",
                root.display()
            ),
            (Start::Resume | Start::ResumeChanged, false) => {
                bail!("there is no run to resume here; leave out `--resume` to start one: {}", root.display())
            }
            _ => Ok(()),
        }
    }

    /// Claims the folder of a run as `start` says; for a resumed one, also gives its newest complete checkpoint. Nothing in the
    /// folder is changed before [`RunFolder::begin`], so that whatever fails until then (a checkpoint that does not fit, say)
    /// leaves the run as it was.
    ///
    /// # Errors
    /// Those of [`RunFolder::check`]; another process holds it, or a file is damaged.
    pub fn open(path: impl AsRef<Path>, kind: Kind, start: Start, plan: &str) -> Result<(Self, Option<Checkpoint>)> {
        let root = path.as_ref();
        if start == Start::New {
            return Ok((RunFolder::create(root, kind)?, None));
        }
        RunFolder::check(root, kind, start, plan)?;
        let run = RunFolder { root: root.to_owned(), kind, _lock: lock(root)? };
        Ok((run, latest_checkpoint(root)?))
    }

    /// From here on the run is written to: takes back whatever is there beyond step `done` (metrics, episodes, half-written
    /// checkpoints), so that those steps can be done again, and saves the plan and where it runs. With no checkpoint (`None`)
    /// the run starts over.
    ///
    /// # Errors
    /// When the disk refuses, or a line of the metrics before the last is damaged.
    pub fn begin(&self, plan: &str, done: Option<u64>) -> Result<()> {
        make_folders(&self.root)?;
        if done.is_none() && matches!(self.kind, Kind::Rl | Kind::Sft) && has_lines(&self.root, METRICS) {
            say(&format!(
                "there is no complete checkpoint in {}: the run starts over, and what it wrote is taken back",
                self.root.join(CHECKPOINTS).display()
            ));
        }
        checkpoint::sweep(&self.root.join(CHECKPOINTS))?;
        metrics::cut_after(&self.root.join(METRICS), done)?;
        for folder in [EPISODES, VALIDATION] {
            for step in steps_in(&self.root.join(folder))? {
                if done.is_none_or(|done| step > done) {
                    let path = lines_path(&self.root, folder, step);
                    fs::remove_file(&path)
                        .with_context(|| format!("taking back the episodes of step {step}: {}", path.display()))?;
                }
            }
        }
        let here = Environment { kind: Some(self.kind), ..Environment::now() };
        if let (Some(done), Some(before)) = (done, environment(&self.root))
            && before.cpu != here.cpu
        {
            say(&format!(
                "steps up to {done} were computed on {}, those that follow on {}: their sums may differ in the last bits from what they would have been there",
                before.cpu, here.cpu
            ));
        }
        self.save_plan(plan, &here)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes a file of the run, whole or not at all. `name` is relative to the folder.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.root.join(name);
        write_atomic(&path, bytes)?;
        Ok(path)
    }

    /// Saves the resolved config and where the run runs.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save_plan(&self, config_toml: &str, environment: &Environment) -> Result<()> {
        self.save(CONFIG, config_toml.as_bytes())?;
        let json = serde_json::to_vec_pretty(environment).context("writing down the environment")?;
        self.save(ENVIRONMENT, &json)?;
        Ok(())
    }

    /// Opens `metrics.jsonl` for appending.
    ///
    /// # Errors
    /// When the file cannot be opened or holds a damaged line.
    pub fn metrics_log(&self) -> Result<MetricsLog> {
        MetricsLog::open(&self.root.join(METRICS))
    }

    /// Writes the episodes of one step, one JSON object a line, whole or not at all; an older file of that step is replaced.
    ///
    /// # Errors
    /// When a record cannot be serialised or the disk refuses.
    pub fn write_episodes<T: Serialize>(&self, step: u64, episodes: &[T]) -> Result<()> {
        self.write_lines(EPISODES, step, episodes)
    }

    /// Writes the episodes of the held-out questions that were asked after a step, as [`RunFolder::write_episodes`] does.
    ///
    /// # Errors
    /// When a record cannot be serialised or the disk refuses.
    pub fn write_validation<T: Serialize>(&self, step: u64, episodes: &[T]) -> Result<()> {
        let folder = self.root.join(VALIDATION);
        fs::create_dir_all(&folder).with_context(|| format!("making the folder {}", folder.display()))?;
        self.write_lines(VALIDATION, step, episodes)
    }

    fn write_lines<T: Serialize>(&self, folder: &str, step: u64, episodes: &[T]) -> Result<()> {
        let path = lines_path(&self.root, folder, step);
        let mut bytes = Vec::new();
        for episode in episodes {
            serde_json::to_writer(&mut bytes, episode)
                .with_context(|| format!("writing the episodes of step {step}: {}", path.display()))?;
            bytes.push(b'\n');
        }
        write_atomic(&path, &bytes)
    }

    /// Writes the checkpoint of `step`, whole or not at all: what `write` puts into the folder it is given, and the loop's own
    /// `state`. Then all but the newest `keep` checkpoints go; 0 keeps every one.
    ///
    /// # Errors
    /// When `write` fails, or a folder cannot be made or removed.
    pub fn checkpoint<S: Serialize>(
        &self,
        step: u64,
        keep: usize,
        state: &S,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let draft = Draft::open(&self.root.join(CHECKPOINTS), step)?;
        write(draft.folder())?;
        draft.finish(state)?;
        match NonZeroUsize::new(keep) {
            Some(keep) => checkpoint::keep_last(&self.root.join(CHECKPOINTS), keep),
            None => Ok(()),
        }
    }
}

impl RunFolder {
    /// What a run that fails leaves: the steps that are done as a checkpoint, unless there is one already. Gives the error with what to do.
    pub fn rescue<S: Serialize>(
        &self,
        done: u64,
        keep: usize,
        state: &S,
        write: impl FnOnce(&Path) -> Result<()>,
        error: anyhow::Error,
    ) -> anyhow::Error {
        let there = latest_checkpoint(&self.root).ok().flatten().is_some_and(|checkpoint| checkpoint.step == done);
        if done == 0 || (!there && self.checkpoint(done, keep, state, write).is_err()) {
            return error;
        }
        error.context(format!(
            "the run stopped behind step {done}, whose checkpoint is written; when this is mended, go on with --resume"
        ))
    }
}

/// Whether a folder holds what a run leaves behind: steps, episodes, answers or checkpoints. A plan alone is a start that failed.
pub fn holds_run(root: &Path) -> bool {
    let has_entries = |folder| checkpoint::entries(&root.join(folder)).is_ok_and(|entries| !entries.is_empty());
    has_lines(root, METRICS) || has_lines(root, ANSWERS) || has_entries(EPISODES) || has_entries(CHECKPOINTS)
}

/// Where a run ran last, if its folder says so.
fn environment(root: &Path) -> Option<Environment> {
    serde_json::from_str(&fs::read_to_string(root.join(ENVIRONMENT)).ok()?).ok()
}

fn has_lines(root: &Path, file: &str) -> bool {
    fs::metadata(root.join(file)).is_ok_and(|file| file.len() > 0)
}

/// # Errors
/// What the folder holds was begun by something else, whose steps would be taken back.
fn refuse_another(root: &Path, kind: Kind) -> Result<()> {
    // Folders of older versions, and those put together by hand, do not say what they are of.
    let saved = environment(root).and_then(|environment| environment.kind);
    let fits = match saved {
        Some(saved) => saved == kind,
        None => {
            let plan: Option<toml::Table> =
                fs::read_to_string(root.join(CONFIG)).ok().and_then(|plan| plan.parse().ok());
            let evaluates = plan.is_some_and(|plan| plan.contains_key("tasks"));
            match kind {
                Kind::Eval => evaluates,
                Kind::Rollout => !evaluates && has_lines(root, ANSWERS),
                Kind::Rl | Kind::Sft | Kind::Demo => !evaluates && !has_lines(root, ANSWERS),
            }
        }
    };
    if fits {
        return Ok(());
    }
    let of = saved.map_or_else(|| "another command".into(), |saved| saved.to_string());
    bail!(
        "this folder holds what {of} left, and {kind} cannot go on with it; choose another folder: {}",
        root.display()
    )
}

fn make_folders(root: &Path) -> Result<()> {
    for folder in [EPISODES, CHECKPOINTS] {
        let path = root.join(folder);
        fs::create_dir_all(&path).with_context(|| format!("making the run folder: {}", path.display()))?;
    }
    Ok(())
}

fn lock(root: &Path) -> Result<File> {
    let path = root.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("taking hold of the run folder: {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            bail!("another process is writing to this run; wait for it, or choose another folder: {}", root.display())
        }
        // Some network file systems have no locks. Then nothing is known; the run goes on and says so.
        Err(TryLockError::Error(error)) => {
            crate::progress::say(&format!(
                "note: this file system cannot lock ({error}); do not start two runs in {}",
                root.display()
            ));
        }
    }
    Ok(file)
}

/// The metrics of a run, in the order of its steps. A torn last line, left by a kill, is passed over and reported in `note`.
///
/// # Errors
/// When the file cannot be read or a line before the last is damaged. A run without the file has no metrics.
pub fn metrics(root: &Path) -> Result<MetricsFile> {
    metrics::read(&root.join(METRICS))
}

/// The steps that have episodes, in order.
///
/// # Errors
/// When the folder cannot be listed.
pub fn episode_steps(root: &Path) -> Result<Vec<u64>> {
    steps_in(&root.join(EPISODES))
}

/// The steps after which held-out questions were asked, in order.
///
/// # Errors
/// When the folder cannot be listed.
pub fn validation_steps(root: &Path) -> Result<Vec<u64>> {
    steps_in(&root.join(VALIDATION))
}

fn steps_in(folder: &Path) -> Result<Vec<u64>> {
    let mut steps: Vec<u64> = checkpoint::entries(folder)?
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .filter_map(|path| path.file_stem()?.to_str()?.parse().ok())
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

/// The episodes of one step.
///
/// # Errors
/// When the file cannot be read or a line is not an episode; the message names the line.
pub fn episodes<T: DeserializeOwned>(root: &Path, step: u64) -> Result<Vec<T>> {
    read_lines(root, EPISODES, step)
}

/// The episodes of the held-out questions that were asked after a step.
///
/// # Errors
/// When the file cannot be read or a line is not an episode; the message names the line.
pub fn validation<T: DeserializeOwned>(root: &Path, step: u64) -> Result<Vec<T>> {
    read_lines(root, VALIDATION, step)
}

fn read_lines<T: DeserializeOwned>(root: &Path, folder: &str, step: u64) -> Result<Vec<T>> {
    let path = lines_path(root, folder, step);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("reading the episodes of step {step}: {}", path.display()))?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line)
                .with_context(|| format!("line {} is not an episode: {}", index + 1, path.display()))
        })
        .collect()
}

/// The complete checkpoints of a run, oldest first.
///
/// # Errors
/// When the folder cannot be listed.
pub fn checkpoints(root: &Path) -> Result<Vec<Checkpoint>> {
    checkpoint::complete(&root.join(CHECKPOINTS))
}

/// The newest complete checkpoint.
///
/// # Errors
/// When the folder cannot be listed.
pub fn latest_checkpoint(root: &Path) -> Result<Option<Checkpoint>> {
    Ok(checkpoints(root)?.pop())
}

fn lines_path(root: &Path, folder: &str, step: u64) -> PathBuf {
    root.join(folder).join(format!("{step}.jsonl"))
}

/// Whether a file may be written at a place that a person named: there is none yet, or one that this program wrote, known by `mark` in its
/// first bytes.
///
/// # Errors
/// There is something else, such as an input that was named twice.
pub fn ensure_ours(path: &Path, mark: &str) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let mut head = Vec::new();
    // A folder is told of where it is written.
    let read = file.take(4096).read_to_end(&mut head).is_ok();
    if read && !head.is_empty() && !String::from_utf8_lossy(&head).contains(mark) {
        bail!(
            "this file is no earlier one of its kind, so it is not written over; choose another place: {}",
            path.display()
        );
    }
    Ok(())
}

/// Writes a file so that a reader, or the next start after a crash, finds the old bytes or the new ones and nothing between:
/// beside its place, synced, renamed into it, and the folder synced.
///
/// # Errors
/// When the disk refuses; the old file is then untouched.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let what = || format!("writing {}", path.display());
    let name = path.file_name().with_context(|| format!("this is not a file's name: {}", path.display()))?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (beside, mut file) = create_beside(folder, name).with_context(what)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Best effort: the error worth telling is the one above.
        let _ = fs::remove_file(&beside);
    }
    written.with_context(what)?;
    sync_folder(folder).with_context(what)
}

/// A new file in `folder` that nobody else writes, its name made from `name`. Opened plainly, so that it gets the usual permissions.
fn create_beside(folder: &Path, name: &std::ffi::OsStr) -> std::io::Result<(PathBuf, File)> {
    let process = std::process::id();
    for attempt in 0.. {
        let mut beside = std::ffi::OsString::from(".");
        beside.push(name);
        beside.push(format!(".{process}-{attempt}.tmp"));
        let beside = folder.join(beside);
        match File::create_new(&beside) {
            Ok(file) => return Ok((beside, file)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists && attempt < 10_000 => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("the loop returns at its ten thousandth attempt")
}

/// Makes renames and new names in `folder` durable.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("syncing the folder {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn step_metrics(value: f64) -> Metrics {
        let mut metrics = Metrics::new();
        metrics.insert("reward/mean".into(), json!(value));
        metrics
    }

    /// Plays `steps` with a checkpoint after each of `saved`.
    fn play(run: &RunFolder, steps: std::ops::RangeInclusive<u64>, saved: &[u64]) {
        let mut log = run.metrics_log().unwrap();
        for step in steps {
            run.write_episodes(step, &[json!({"id": "a", "step": step}), json!({"id": "b", "step": step})]).unwrap();
            log.append(step, &step_metrics(step as f64 / 10.0)).unwrap();
            if saved.contains(&step) {
                run.checkpoint(step, 0, &json!({"done": step}), |_| Ok(())).unwrap();
            }
        }
    }

    #[test]
    fn a_run_is_not_written_over_and_the_message_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let run = RunFolder::create(&path, Kind::Rl).unwrap();
        run.begin("seed = 1\n", None).unwrap();
        drop(run);
        // A plan without a step is a start that failed: it is no obstacle.
        let run = RunFolder::create(&path, Kind::Rl).unwrap();
        play(&run, 1..=1, &[]);
        drop(run);
        let error = format!("{:#}", RunFolder::create(&path, Kind::Rl).unwrap_err());
        assert!(error.contains("already holds a run") && error.contains("--resume"), "{error}");
        let elsewhere = folder.path().join("nothing");
        let error = format!("{:#}", RunFolder::open(&elsewhere, Kind::Rl, Start::Resume, "").unwrap_err());
        assert!(error.contains("no run to resume"), "{error}");
    }

    #[test]
    fn one_process_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        run.begin("", None).unwrap();
        play(&run, 1..=1, &[]);
        let error = format!("{:#}", RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "").unwrap_err());
        assert!(error.contains("another process"), "{error}");
        drop(run);
        RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "").unwrap();
        // Nothing to compare the plan with.
        fs::remove_file(folder.path().join(CONFIG)).unwrap();
        let error = format!("{:#}", RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "").unwrap_err());
        assert!(error.contains("config.toml is missing") && error.contains("--accept-changes"), "{error}");
    }

    #[test]
    fn resuming_takes_back_what_came_after_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        run.save(CONFIG, b"seed = 1").unwrap();
        play(&run, 1..=5, &[2, 3]);
        fs::create_dir(folder.path().join("checkpoints/6.tmp")).unwrap();
        drop(run);

        // Another plan is refused, and then nothing is touched.
        let error = format!("{:#}", RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "seed = 2").unwrap_err());
        assert!(error.contains("seed was 1 and is now 2"), "{error}");
        assert_eq!(episode_steps(folder.path()).unwrap(), [1, 2, 3, 4, 5]);
        let (run, latest) = RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "seed = 1").unwrap();
        let latest = latest.unwrap();
        assert!(latest.leaves_steps(3).is_ok());
        assert!(latest.leaves_steps(2).unwrap_err().to_string().contains("train.steps = 2"));
        run.begin("seed = 1", Some(3)).unwrap();
        assert_eq!((latest.step, latest.state::<Value>().unwrap()), (3, json!({"done": 3})));
        assert_eq!(episode_steps(folder.path()).unwrap(), [1, 2, 3]);
        play(&run, 4..=6, &[]);
        let rows = metrics(folder.path()).unwrap().rows;
        let steps: Vec<u64> = rows.iter().map(|row| row["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
        assert_eq!(checkpoint::entries(&folder.path().join("checkpoints")).unwrap().len(), 2);
    }

    #[test]
    fn a_folder_belongs_to_the_command_that_began_it() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        run.begin("seed = 1", None).unwrap();
        play(&run, 1..=2, &[]);
        drop(run);
        let other = |kind| RunFolder::open(folder.path(), kind, Start::ResumeChanged, "seed = 1");
        for kind in [Kind::Sft, Kind::Rollout, Kind::Eval, Kind::Demo] {
            let error = format!("{:#}", other(kind).unwrap_err());
            assert!(error.contains("what foveate rl left") && error.contains(&kind.to_string()), "{error}");
        }
        other(Kind::Rl).unwrap();
        // A folder that does not say.
        fs::remove_file(folder.path().join(ENVIRONMENT)).unwrap();
        assert!(other(Kind::Rollout).unwrap_err().to_string().contains("another command"));
        fs::write(folder.path().join(ANSWERS), "").unwrap();
        assert!(other(Kind::Rollout).is_err());
        other(Kind::Rl).unwrap();
        fs::write(folder.path().join(ANSWERS), "{}\n").unwrap();
        assert!(other(Kind::Rl).is_err() && other(Kind::Eval).is_err());
        other(Kind::Rollout).unwrap();
        fs::write(folder.path().join(CONFIG), "[tasks.a]\njudge = \"text\"\n").unwrap();
        assert!(other(Kind::Rl).is_err() && other(Kind::Rollout).is_err());
        other(Kind::Eval).unwrap();
    }

    #[test]
    fn what_was_held_out_is_taken_back_too() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        for step in [2, 4] {
            run.write_validation(step, &[json!({"id": "a"})]).unwrap();
        }
        run.begin("", Some(2)).unwrap();
        assert_eq!(validation_steps(folder.path()).unwrap(), [2]);
        assert_eq!(validation::<Value>(folder.path(), 2).unwrap(), [json!({"id": "a"})]);
    }

    #[test]
    fn without_a_checkpoint_the_run_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        run.begin("", None).unwrap();
        play(&run, 1..=2, &[]);
        drop(run);
        let (run, latest) = RunFolder::open(folder.path(), Kind::Rl, Start::Resume, "").unwrap();
        assert_eq!(latest, None);
        run.begin("", None).unwrap();
        assert!(metrics(run.root()).unwrap().rows.is_empty());
        assert!(episode_steps(run.root()).unwrap().is_empty());
    }

    #[test]
    fn episodes_come_back_and_a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunFolder::create(folder.path(), Kind::Rl).unwrap();
        let written = [json!({"text": "one\ntwo", "reward": 1.0}), json!({"text": "</script>"})];
        run.write_episodes(7, &written).unwrap();
        assert_eq!(episodes::<Value>(folder.path(), 7).unwrap(), written);
        fs::write(folder.path().join("episodes/8.jsonl"), "{}\n{\"text\": \n").unwrap();
        let error = format!("{:#}", episodes::<Value>(folder.path(), 8).unwrap_err());
        assert!(error.contains("line 2") && error.contains("8.jsonl"), "{error}");
    }

    #[test]
    fn a_write_replaces_the_file_and_leaves_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.json");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(checkpoint::entries(folder.path()).unwrap(), [path]);
        let error = format!("{:#}", write_atomic(folder.path().join("missing/x"), b"").unwrap_err());
        assert!(error.contains("missing/x"), "{error}");
    }
}
