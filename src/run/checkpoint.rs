//! Checkpoints on disk: written whole or not at all, found again after any crash.
//!
//! A checkpoint is a folder `checkpoints/STEP/`. It is filled under the name `STEP.tmp`, its `state.json` is written last, everything
//! is synced, and only then does it get its name. What must stay true: a folder with a number for a name and a `state.json` in it is complete.

use super::{sync_folder, write_atomic};
use crate::config::BadConfig;
use anyhow::{Context, Result, bail, ensure};
use serde::{Serialize, de::DeserializeOwned};
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// The file whose presence says that a checkpoint is complete; it holds the loop's own state (random streams, data position, counters).
pub const STATE: &str = "state.json";

/// A complete checkpoint. `step` counts finished steps: resuming from it starts with step `step + 1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Finished steps.
    pub step: u64,
    /// Its folder, in Hugging Face layout plus optimiser and `state.json`.
    pub path: PathBuf,
}

impl Checkpoint {
    /// # Errors
    /// When the plan asks for fewer steps than are done.
    pub fn leaves_steps(&self, planned: u64) -> Result<()> {
        ensure!(
            self.step <= planned,
            BadConfig(format!(
                "train.steps = {planned}, but this run has done {} already; raise it to go on",
                self.step
            ))
        );
        Ok(())
    }

    /// Has what lies in its folder loaded.
    ///
    /// # Errors
    /// Those of `load`, with what to do about files that are damaged.
    pub fn load(&self, load: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        load(&self.path).with_context(|| {
            format!(
                "the checkpoint of step {} cannot be loaded; if its files are damaged, resume from an older one by removing this folder: {}",
                self.step,
                self.path.display()
            )
        })
    }

    /// Reads the loop's state.
    ///
    /// # Errors
    /// When `state.json` cannot be read or is not what `T` expects.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        let path = self.path.join(STATE);
        let bytes =
            fs::read(&path).with_context(|| format!("reading the state of step {}: {}", self.step, path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "the state of step {} is damaged; resume from an older checkpoint by removing this folder: {}",
                self.step,
                path.display()
            )
        })
    }
}

/// A checkpoint being written. Fill [`Draft::folder`], then [`Draft::finish`]. Dropped unfinished, it leaves nothing that counts.
#[derive(Debug)]
pub struct Draft {
    step: u64,
    unfinished: PathBuf,
    place: PathBuf,
}

impl Draft {
    /// Opens an empty folder for the checkpoint of `step` under `checkpoints`.
    pub(super) fn open(checkpoints: &Path, step: u64) -> Result<Self> {
        let unfinished = checkpoints.join(format!("{step}.tmp"));
        remove_folder(&unfinished)?;
        fs::create_dir_all(&unfinished)
            .with_context(|| format!("making room for the checkpoint of step {step}: {}", unfinished.display()))?;
        Ok(Draft { step, unfinished, place: checkpoints.join(step.to_string()) })
    }

    /// Where to write weights, tokenizer, optimiser.
    pub fn folder(&self) -> &Path {
        &self.unfinished
    }

    /// Writes `state.json`, syncs everything and gives the folder its name. A checkpoint of the same step is replaced.
    ///
    /// # Errors
    /// When the disk refuses; the folder then keeps its `.tmp` name and never counts as a checkpoint.
    pub fn finish<T: Serialize>(self, state: &T) -> Result<Checkpoint> {
        let what = || format!("finishing the checkpoint of step {}: {}", self.step, self.place.display());
        sync_tree(&self.unfinished).with_context(what)?;
        let bytes = serde_json::to_vec_pretty(state).with_context(what)?;
        write_atomic(self.unfinished.join(STATE), &bytes).with_context(what)?;
        // rename cannot replace a folder that has files in it: step aside first.
        let aside = self.place.with_extension("old.tmp");
        remove_folder(&aside)?;
        if self.place.exists() {
            fs::rename(&self.place, &aside).with_context(what)?;
        }
        fs::rename(&self.unfinished, &self.place).with_context(what)?;
        if let Some(parent) = self.place.parent() {
            sync_folder(parent).with_context(what)?;
        }
        remove_folder(&aside)?;
        Ok(Checkpoint { step: self.step, path: self.place })
    }
}

/// The complete checkpoints under `checkpoints`, oldest first; anything half-written is passed over.
pub(super) fn complete(checkpoints: &Path) -> Result<Vec<Checkpoint>> {
    let mut found: Vec<Checkpoint> = entries(checkpoints)?
        .into_iter()
        .filter_map(|path| {
            let step = path.file_name()?.to_str()?.parse().ok()?;
            path.join(STATE).is_file().then_some(Checkpoint { step, path })
        })
        .collect();
    found.sort_by_key(|checkpoint| checkpoint.step);
    Ok(found)
}

/// Removes all but the newest `keep` complete checkpoints.
pub(super) fn keep_last(checkpoints: &Path, keep: NonZeroUsize) -> Result<()> {
    let found = complete(checkpoints)?;
    for old in &found[..found.len().saturating_sub(keep.get())] {
        // Renamed first, so that a crash in the middle of removing leaves no folder that looks complete.
        let going = old.path.with_extension("old.tmp");
        remove_folder(&going)?;
        fs::rename(&old.path, &going).with_context(|| format!("removing an old checkpoint: {}", old.path.display()))?;
        remove_folder(&going)?;
    }
    Ok(())
}

/// Removes what a crash left half-written.
pub(super) fn sweep(checkpoints: &Path) -> Result<()> {
    for path in entries(checkpoints)? {
        let half = path.extension().is_some_and(|extension| extension == "tmp")
            || (path.is_dir() && path.file_name().is_some_and(is_number) && !path.join(STATE).is_file());
        if half {
            remove_folder(&path)?;
        }
    }
    Ok(())
}

fn is_number(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.parse::<u64>().is_ok())
}

/// The paths in a folder; none when it is missing.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = match fs::read_dir(folder) {
        Ok(list) => list,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("listing {}", folder.display())),
    };
    list.map(|entry| Ok(entry.with_context(|| format!("listing {}", folder.display()))?.path())).collect()
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

fn sync_tree(folder: &Path) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() {
            sync_tree(&path)?;
        } else if path.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .with_context(|| format!("syncing {}", path.display()))?;
        } else {
            bail!("a checkpoint holds only files and folders: {}", path.display());
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn save(folder: &Path, step: u64, weights: &str) -> Checkpoint {
        let draft = Draft::open(folder, step).unwrap();
        fs::create_dir(draft.folder().join("adapter")).unwrap();
        fs::write(draft.folder().join("adapter/weights"), weights).unwrap();
        draft.finish(&json!({"step": step})).unwrap()
    }

    fn steps(folder: &Path) -> Vec<u64> {
        complete(folder).unwrap().iter().map(|checkpoint| checkpoint.step).collect()
    }

    #[test]
    fn only_finished_checkpoints_count_and_steps_sort_as_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert!(steps(folder).is_empty());
        save(folder, 10, "ten");
        save(folder, 9, "nine");
        let draft = Draft::open(folder, 11).unwrap();
        fs::write(draft.folder().join("weights"), "half").unwrap();
        drop(draft);
        fs::create_dir(folder.join("12")).unwrap(); // copied by hand, cut short
        assert_eq!(steps(folder), [9, 10]);
        sweep(folder).unwrap();
        assert_eq!(entries(folder).unwrap().len(), 2);
        assert_eq!(complete(folder).unwrap()[1].state::<Value>().unwrap(), json!({"step": 10}));
    }

    #[test]
    fn the_same_step_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), 4, "first");
        let second = save(folder.path(), 4, "second");
        assert_eq!(fs::read_to_string(second.path.join("adapter/weights")).unwrap(), "second");
        assert_eq!(entries(folder.path()).unwrap().len(), 1);
    }

    #[test]
    fn old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        for step in [2, 4, 8, 16] {
            save(folder.path(), step, "w");
        }
        keep_last(folder.path(), NonZeroUsize::new(2).unwrap()).unwrap();
        assert_eq!(steps(folder.path()), [8, 16]);
        keep_last(folder.path(), NonZeroUsize::new(5).unwrap()).unwrap();
        assert_eq!(steps(folder.path()), [8, 16]);
    }
}
