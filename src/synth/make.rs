//! Writes the bundled data sets as files: `DIR/train.jsonl`, `DIR/test.jsonl`, `DIR/images/*.jpg`, `DIR/set.json`.
//!
//! It hides drawing in parallel and the temporary folder: all is written beside DIR and renamed into place at the end, so
//! DIR is either whole or absent. What must stay true: the files depend on the options alone, not on threads or machine,
//! and every box in them is in whole pixels of the picture it belongs to.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::draw::Frame;
use super::world::{Scene, World, WorldOptions};
use super::{Split, assets_dir};
use crate::data::{self, Sample, Target};
use crate::geometry::{BBox, Size};

const JPEG_QUALITY: u8 = 92;

/// Which of the bundled sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// "What number is on the plate under the fox?": the number can be read in a crop only.
    Plates,
}

impl Set {
    pub const NAMES: [&str; 1] = ["plates"];

    /// # Errors
    /// A name that is not in [`Set::NAMES`].
    pub fn named(name: &str) -> Result<Set> {
        match name {
            "plates" => Ok(Set::Plates),
            other => bail!("there is no bundled set {other:?}; the sets are: {}", Set::NAMES.join(", ")),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Set::Plates => "plates",
        }
    }
}

/// What to write. `train` and `test` count questions; one picture serves as many questions as it has objects.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MakeOptions {
    pub set: Set,
    pub out: PathBuf,
    pub train: usize,
    pub test: usize,
    /// Size of the pictures in pixels.
    pub size: Size,
    pub seed: u64,
    #[serde(default)]
    pub world: WorldOptions,
    /// Replace `out` if it is there.
    #[serde(default)]
    pub overwrite: bool,
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Made {
    pub train: PathBuf,
    pub test: PathBuf,
    pub train_rows: usize,
    pub test_rows: usize,
    pub pictures: usize,
}

/// Draws and writes a set. `progress(done, all)` is called from several threads, once a picture.
///
/// # Errors
/// Options out of range, `out` already there (unless `overwrite`), missing assets, or a failed write; `out` is then untouched.
pub fn make(options: &MakeOptions, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Made> {
    options.world.validate().with_context(|| format!("making the set {}", options.set.name()))?;
    ensure!(
        (64..=16384).contains(&options.size.width) && (64..=16384).contains(&options.size.height),
        "making the set {}: the pictures should be {}, expected sides of 64 to 16384 pixels",
        options.set.name(),
        options.size
    );
    ensure!(
        options.train + options.test > 0,
        "making the set {}: both train and test are 0 questions, expected at least one",
        options.set.name()
    );
    let out = &options.out;
    if !options.overwrite && out.exists() && (!out.is_dir() || out.read_dir().map_or(true, |mut d| d.next().is_some()))
    {
        bail!(
            "making the set {}: something is already at {}; remove it, choose another folder or add --overwrite",
            options.set.name(),
            out.display()
        );
    }
    // Overwriting removes a folder with all it holds, so it must be one of ours.
    if options.overwrite
        && out.is_dir()
        && !out.join("set.json").is_file()
        && out.read_dir().is_ok_and(|mut d| d.next().is_some())
    {
        bail!(
            "making the set {}: this folder was not written by data make (it has no set.json), so it is not overwritten: {}",
            options.set.name(),
            out.display()
        );
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).with_context(|| format!("making the folder {}", parent.display()))?;
    let partial = tempfile::Builder::new()
        .prefix(".making-")
        .tempdir_in(parent)
        .with_context(|| format!("making a temporary folder in {}", parent.display()))?;
    let folder = partial.path().join("set");
    std::fs::create_dir_all(folder.join("images"))
        .with_context(|| format!("making the folder {}", folder.display()))?;

    let per_scene = options.world.objects.max(1);
    let scenes = |rows: usize| rows.div_ceil(per_scene);
    let all = scenes(options.train) + scenes(options.test);
    let done = AtomicUsize::new(0);
    let assets = assets_dir()?;
    for (split, rows) in [(Split::Train, options.train), (Split::Test, options.test)] {
        let mut samples = Vec::new();
        if rows > 0 {
            let world = World::load(&assets, split, options.world.clone())?;
            let made: Vec<Vec<Sample>> = (0..scenes(rows))
                .into_par_iter()
                .map(|index| {
                    let samples = one(&world, options, &folder, split, index)?;
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1, all);
                    Ok(samples)
                })
                .collect::<Result<_>>()?;
            samples = made.into_iter().flatten().take(rows).collect();
        }
        data::write(&folder.join(format!("{split}.jsonl")), &samples)?;
    }
    // The folder that was asked for is not part of what was made.
    let about = json!({"set": options.set, "train": options.train, "test": options.test, "size": options.size, "seed": options.seed, "world": options.world});
    std::fs::write(folder.join("set.json"), format!("{about:#}\n"))
        .with_context(|| format!("writing {}", folder.join("set.json").display()))?;
    if out.is_dir() {
        std::fs::remove_dir_all(out).with_context(|| format!("removing the old set {}", out.display()))?;
    }
    std::fs::rename(&folder, out).with_context(|| format!("moving the finished set to {}", out.display()))?;
    Ok(Made {
        train: out.join("train.jsonl"),
        test: out.join("test.jsonl"),
        train_rows: options.train,
        test_rows: options.test,
        pictures: all,
    })
}

/// Draws scene `index`, writes its picture into `folder` and gives its rows.
fn one(world: &World, options: &MakeOptions, folder: &Path, split: Split, index: usize) -> Result<Vec<Sample>> {
    let size = options.size;
    let scene = world.scene(options.seed, index as u64, f64::from(size.height) / f64::from(size.width))?;
    let picture = folder.join(format!("images/{split}_{index:05}.jpg"));
    let jpeg = crate::image::encode_jpeg(&world.draw(&scene, size), JPEG_QUALITY)?;
    std::fs::write(&picture, jpeg).with_context(|| format!("writing the picture {}", picture.display()))?;
    Ok(samples(&scene, size, options.set, split, index, &picture))
}

fn samples(scene: &Scene, size: Size, set: Set, split: Split, index: usize, picture: &Path) -> Vec<Sample> {
    let frame = Frame { region: scene.bounds(), size };
    let pixels = |b: BBox| frame.pixels(b).round_outward().clamp(&size.bounds());
    let objects: Vec<_> =
        scene.objects.iter().map(|o| json!({"name": o.name, "bbox": pixels(o.bbox).map_whole()})).collect();
    World::questions(scene)
        .into_iter()
        .enumerate()
        .map(|(k, asked)| {
            let mut extra = serde_json::Map::new();
            extra.insert("objects".into(), objects.clone().into());
            Sample {
                id: format!("{}-{split}-{index:05}-{k}", set.name()),
                images: vec![picture.to_owned()],
                question: asked.question,
                choices: Vec::new(),
                answer: asked.answer,
                targets: vec![Target { image: 1, bbox: pixels(asked.target), label: Some(asked.label) }],
                task: Some(set.name().to_owned()),
                split: Some(split.name().to_owned()),
                extra,
            }
        })
        .collect()
}

/// Whole numbers without a trailing `.0` in JSON.
trait MapWhole {
    fn map_whole(self) -> [i64; 4];
}

impl MapWhole for BBox {
    fn map_whole(self) -> [i64; 4] {
        <[f64; 4]>::from(self).map(|v| v.round() as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `LOOK=DIR cargo test --lib look_at_plates -- --ignored` writes a small set to look at.
    #[test]
    #[ignore = "writes pictures for people"]
    fn look_at_plates() {
        let out = PathBuf::from(std::env::var("LOOK").unwrap()).join("plates");
        let options = MakeOptions {
            set: Set::Plates,
            out,
            train: 16,
            test: 16,
            size: Size::new(2016, 1512),
            seed: 1,
            world: WorldOptions::default(),
            overwrite: true,
        };
        make(&options, &|done, all| eprintln!("{done}/{all}")).unwrap();
    }

    #[test]
    fn a_set_reads_back_and_is_never_half_there() {
        let temporary = tempfile::tempdir().unwrap();
        let out = temporary.path().join("plates");
        let mut options = MakeOptions {
            set: Set::Plates,
            out: out.clone(),
            train: 5,
            test: 3,
            size: Size::new(320, 240),
            seed: 4,
            world: WorldOptions::default(),
            overwrite: false,
        };
        let made = make(&options, &|_, _| ()).unwrap();
        assert_eq!(made.pictures, 3);
        let train = data::read(&made.train).unwrap();
        let test = data::read(&made.test).unwrap();
        assert_eq!((train.len(), test.len()), (5, 3));
        assert_eq!(train[4].id, "plates-train-00001-0");
        assert!(train[0].question.starts_with("What number is on the plate under the "));
        assert_eq!(train[0].targets[0].image, 1);
        assert_eq!(train[0].extra["objects"].as_array().unwrap().len(), 4);
        assert!(data::check(&made.test).unwrap().problems.is_empty());

        assert!(make(&options, &|_, _| ()).unwrap_err().to_string().contains("already at"));
        let before = std::fs::read(out.join("images/test_00000.jpg")).unwrap();
        options.overwrite = true;
        make(&options, &|_, _| ()).unwrap();
        assert_eq!(std::fs::read(out.join("images/test_00000.jpg")).unwrap(), before);
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1);
    }
}
