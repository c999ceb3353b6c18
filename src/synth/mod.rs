//! The bundled world: real photographs, named objects and handwritten digits, and the data sets drawn from them.
//!
//! Everything here is a function of explicit numbers: the same seed and index give the same scene on any machine. A
//! [`world::Scene`] says what is where without saying how many pixels there are; [`draw`] turns it, or a region of it, into
//! pixels at any size. The data sets of the RL task are written to files by [`make`]; the dialogues that pretrain the nano
//! model are made on the fly by [`pretrain`]. What must stay true: train and test share no photograph, no object picture and
//! no digit picture (`assets/build.py` splits them by file), and pretraining never asks the question of the RL task.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub mod contrast;
pub mod draw;
pub mod library;
pub mod make;
pub mod pairs;
pub mod pretrain;
pub mod recipe;
pub mod teacher;
pub mod trajectories;
pub mod world;

pub use library::Library;
pub use world::{Scene, World, WorldOptions};

/// Which half of the bundled material may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    Train,
    Test,
}

impl Split {
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
        }
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the bundled files are: `$FOVEATE_ASSETS`, else the source tree this program was built from, else `assets/`
/// beside the executable.
///
/// # Errors
/// `$FOVEATE_ASSETS` is set but holds no `objects/objects.json`, or none of the places does.
pub fn assets_dir() -> Result<PathBuf> {
    let good = |dir: &Path| dir.join("objects/objects.json").is_file();
    if let Some(dir) = std::env::var_os("FOVEATE_ASSETS") {
        let dir = PathBuf::from(dir);
        if !good(&dir) {
            bail!(
                "FOVEATE_ASSETS should name the assets folder of foveate, but there is no objects/objects.json in {}",
                dir.display()
            );
        }
        return Ok(dir);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let beside = std::env::current_exe().ok().and_then(|exe| exe.parent().map(|dir| dir.join("assets")));
    for dir in std::iter::once(source.clone()).chain(beside) {
        if good(&dir) {
            return Ok(dir);
        }
    }
    bail!(
        "the bundled pictures were not found in {} nor beside the executable; set FOVEATE_ASSETS to the assets folder of the repository",
        source.display()
    )
}

/// A folder that is written beside its place and renamed into it when all is there: it is whole or absent.
pub(crate) struct NewFolder {
    /// Holds `folder`, and is cleared away whatever happens.
    _temporary: tempfile::TempDir,
    folder: PathBuf,
    out: PathBuf,
}

impl NewFolder {
    /// # Errors
    /// Something is at `out` already, or nothing can be written beside it.
    pub fn beside(out: &Path) -> Result<NewFolder> {
        ensure!(!taken(out), "something is already at {}; remove it or choose another folder", out.display());
        NewFolder::start(out)
    }

    /// Takes the place of a folder of ours, one that holds a file `mark`: replacing it removes all that is in it.
    ///
    /// # Errors
    /// What is at `out` holds no such file, or nothing can be written beside it.
    pub fn over(out: &Path, mark: &str) -> Result<NewFolder> {
        ensure!(
            !taken(out) || out.join(mark).is_file(),
            "what is there was not written by foveate (it has no {mark}), so it is not overwritten: {}",
            out.display()
        );
        NewFolder::start(out)
    }

    fn start(out: &Path) -> Result<NewFolder> {
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).with_context(|| format!("making the folder {}", parent.display()))?;
        let temporary = tempfile::Builder::new()
            .prefix(".making-")
            .tempdir_in(parent)
            .with_context(|| format!("making a temporary folder in {}", parent.display()))?;
        // Within, for only its owner may read a temporary folder itself.
        let folder = temporary.path().join("new");
        std::fs::create_dir(&folder).with_context(|| format!("making the folder {}", folder.display()))?;
        Ok(NewFolder { _temporary: temporary, folder, out: out.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    pub fn finish(self) -> Result<()> {
        if self.out.is_dir() {
            // Empty or ours, as was seen at the start.
            std::fs::remove_dir_all(&self.out).with_context(|| format!("replacing {}", self.out.display()))?;
        }
        std::fs::rename(&self.folder, &self.out)
            .with_context(|| format!("moving the finished files to {}", self.out.display()))
    }
}

/// Whether there is anything at a path but an empty folder.
fn taken(out: &Path) -> bool {
    out.exists() && out.read_dir().map_or(true, |mut files| files.next().is_some())
}

/// One of several wordings; nothing of none.
pub(crate) fn pick<'a>(rng: &mut ChaCha8Rng, wordings: &[&'a str]) -> &'a str {
    wordings.choose(rng).copied().unwrap_or_default()
}

/// The random stream of item `index` under `seed`; `purpose` keeps streams of different uses apart.
pub(crate) fn stream(seed: u64, purpose: u64, index: u64) -> ChaCha8Rng {
    // Spread the purpose over all bits, so that (seed 1, purpose 0) is not (seed 0, purpose 1).
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ purpose.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    rng.set_stream(index);
    rng
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn streams_repeat_and_differ() {
        let first = |seed, purpose, index| stream(seed, purpose, index).random::<u64>();
        assert_eq!(first(1, 2, 3), first(1, 2, 3));
        assert_ne!(first(1, 2, 3), first(1, 2, 4));
        assert_ne!(first(1, 0, 3), first(0, 1, 3));
    }
}
