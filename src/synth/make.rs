//! Writes the bundled data sets as files: `DIR/train.jsonl`, `DIR/test.jsonl`, `DIR/images/*.jpg`, `DIR/set.json`.
//!
//! It hides drawing in parallel and the temporary folder: all is written beside DIR and renamed into place at the end, so
//! DIR is either whole or absent. What must stay true: the files depend on the options alone, not on threads or machine,
//! and every box in them is in whole pixels of the picture it belongs to.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::draw::{Frame, draw_region};
use super::pairs::{PairOptions, Pairs, Row, Shot};
use super::world::{Scene, World, WorldOptions};
use super::{Library, NewFolder, Split, assets_dir};
use crate::data::{self, Sample, Target};
use crate::geometry::{BBox, Size};

const JPEG_QUALITY: u8 = 92;
/// Says how a set was made; a folder that holds it is one.
const ABOUT: &str = "set.json";

/// Which of the bundled sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Set {
    /// "What number is on the plate under the fox?": the number can be read in a crop only.
    Plates,
    /// Questions over several pictures, answered in boxes: [`super::pairs`].
    Pairs,
}

impl Set {
    pub const NAMES: [&str; 2] = ["plates", "pairs"];

    /// # Errors
    /// A name that is not in [`Set::NAMES`].
    pub fn named(name: &str) -> Result<Set> {
        match name {
            "plates" => Ok(Set::Plates),
            "pairs" => Ok(Set::Pairs),
            other => bail!("there is no bundled set {other:?}; the sets are: {}", Set::NAMES.join(", ")),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Set::Plates => "plates",
            Set::Pairs => "pairs",
        }
    }

    /// What pictures have where nobody says otherwise: plates must be too small to be read in a first view, pairs need no more than
    /// a few views have.
    pub fn size(self) -> Size {
        match self {
            Set::Plates => Size::new(2016, 1512),
            Set::Pairs => Size::new(672, 504),
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
    #[serde(default)]
    pub pairs: PairOptions,
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
    let new = match options.overwrite {
        true => NewFolder::over(out, ABOUT),
        false => NewFolder::beside(out).context("without --overwrite"),
    };
    let new = new.with_context(|| format!("making the set {}", options.set.name()))?;
    let folder = new.path();
    std::fs::create_dir(folder.join("images")).context("making the folder for pictures")?;

    let per_scene = match options.set {
        Set::Plates => options.world.objects.max(1),
        Set::Pairs => 1,
    };
    let scenes = |rows: usize| rows.div_ceil(per_scene);
    let all = scenes(options.train) + scenes(options.test);
    let done = AtomicUsize::new(0);
    let mut pictures = 0;
    let assets = assets_dir()?;
    for (split, rows) in [(Split::Train, options.train), (Split::Test, options.test)] {
        let mut samples = Vec::new();
        if rows > 0 {
            let source = Source::load(&assets, split, options)?;
            let made: Vec<Vec<Sample>> = (0..scenes(rows))
                .into_par_iter()
                .map(|index| {
                    let samples = source.one(options, folder, split, index)?;
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1, all);
                    Ok(samples)
                })
                .collect::<Result<_>>()?;
            samples = made.into_iter().flatten().take(rows).collect();
            pictures += samples.iter().flat_map(|s| &s.images).collect::<HashSet<_>>().len();
        }
        data::write(&folder.join(format!("{split}.jsonl")), &samples)?;
    }
    // The folder that was asked for is not part of what was made.
    let drawn = match options.set {
        Set::Plates => json!(options.world),
        Set::Pairs => json!(options.pairs),
    };
    let about = json!({"set": options.set, "train": options.train, "test": options.test, "size": options.size, "seed": options.seed, "world": drawn});
    std::fs::write(folder.join(ABOUT), format!("{about:#}\n")).with_context(|| format!("writing {ABOUT}"))?;
    new.finish()?;
    Ok(Made {
        train: out.join("train.jsonl"),
        test: out.join("test.jsonl"),
        train_rows: options.train,
        test_rows: options.test,
        pictures,
    })
}

/// Where the rows of a split come from.
enum Source {
    Plates(World),
    Pairs(Pairs),
}

impl Source {
    fn load(assets: &Path, split: Split, options: &MakeOptions) -> Result<Source> {
        Ok(match options.set {
            Set::Plates => Source::Plates(World::load(assets, split, options.world.clone())?),
            Set::Pairs => {
                let library = Library::load(assets, split, 1400)?;
                Source::Pairs(Pairs::new(library, options.pairs.clone(), aspect(options.size))?)
            }
        })
    }

    /// Draws scene or row `index`, writes its pictures into `folder` and gives its rows.
    fn one(&self, options: &MakeOptions, folder: &Path, split: Split, index: usize) -> Result<Vec<Sample>> {
        let size = options.size;
        match self {
            Source::Plates(world) => {
                let scene = world.scene(options.seed, index as u64, aspect(size))?;
                let picture = folder.join(format!("images/{split}_{index:05}.jpg"));
                save(&world.draw(&scene, size), &picture)?;
                Ok(samples(&scene, size, options.set, split, index, &picture))
            }
            Source::Pairs(pairs) => {
                let row = pairs.row(options.seed, index as u64)?;
                let mut pictures = Vec::with_capacity(row.shots.len());
                for (k, shot) in row.shots.iter().enumerate() {
                    let picture = folder.join(format!("images/{split}_{index:05}_{}.jpg", k + 1));
                    save(&draw_region(&pairs.library, &shot.scene, shot.region, size), &picture)?;
                    pictures.push(picture);
                }
                Ok(vec![pair(&row, size, split, index, pictures)])
            }
        }
    }
}

fn aspect(size: Size) -> f64 {
    f64::from(size.height) / f64::from(size.width)
}

pub(super) fn save(rgb: &::image::RgbImage, path: &Path) -> Result<()> {
    let jpeg = crate::image::encode_jpeg(rgb, JPEG_QUALITY)?;
    std::fs::write(path, jpeg).with_context(|| format!("writing the picture {}", path.display()))
}

/// A box of a scene in whole pixels of the picture that shows this region of it.
fn in_pixels(region: BBox, size: Size, b: BBox) -> BBox {
    Frame { region, size }.pixels(b).round_outward().clamp(&size.bounds())
}

/// A row over several pictures, with what is known of each (`objects`) and between them (`relations`).
fn pair(row: &Row, size: Size, split: Split, index: usize, images: Vec<PathBuf>) -> Sample {
    let pixels = |image: usize, b: BBox| in_pixels(row.shots[image - 1].region, size, b);
    // Of a region, what is seen of it by half or more.
    let objects = |(k, shot): (usize, &Shot)| -> Vec<Value> {
        let seen = shot.scene.objects.iter().filter(|o| shot.region.contains_fraction(&o.bbox) >= 0.5);
        seen.map(|o| json!({"name": o.name, "bbox": whole_pixels(pixels(k + 1, o.bbox))})).collect()
    };
    let targets: Vec<Target> = row
        .targets
        .iter()
        .map(|t| Target { image: t.image, bbox: pixels(t.image, t.bbox), label: Some(t.label.clone()) })
        .collect();
    let answer: Vec<Value> =
        targets.iter().map(|t| json!({"image": t.image, "bbox": whole_pixels(t.bbox), "label": t.label})).collect();
    let mut extra = serde_json::Map::new();
    extra.insert("objects".into(), row.shots.iter().enumerate().map(objects).collect());
    extra.insert("relations".into(), row.relations.clone().into());
    Sample {
        id: format!("pairs-{split}-{index:05}"),
        images,
        question: row.question.clone(),
        choices: Vec::new(),
        answer: Value::from(answer).to_string(),
        targets,
        task: Some(row.kind.name().to_owned()),
        split: Some(split.name().to_owned()),
        extra,
    }
}

fn samples(scene: &Scene, size: Size, set: Set, split: Split, index: usize, picture: &Path) -> Vec<Sample> {
    let pixels = |b: BBox| in_pixels(scene.bounds(), size, b);
    let objects: Vec<_> =
        scene.objects.iter().map(|o| json!({"name": o.name, "bbox": whole_pixels(pixels(o.bbox))})).collect();
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
pub(super) fn whole_pixels(b: BBox) -> [i64; 4] {
    <[f64; 4]>::from(b).map(|v| v.round() as i64)
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
            pairs: PairOptions::default(),
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
            pairs: PairOptions::default(),
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

        assert!(format!("{:#}", make(&options, &|_, _| ()).unwrap_err()).contains("already at"));
        let before = std::fs::read(out.join("images/test_00000.jpg")).unwrap();
        options.overwrite = true;
        make(&options, &|_, _| ()).unwrap();
        assert_eq!(std::fs::read(out.join("images/test_00000.jpg")).unwrap(), before);
        assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1);
    }

    /// Every row of the bundled set can be reasoned about, and the traces pass their own filters.
    #[test]
    fn a_thousand_traces_by_rules_pass_their_filters() {
        use crate::synth::trajectories::{Detail, Facts, by_rules, judge};
        let size = Set::Pairs.size();
        for split in [Split::Train, Split::Test] {
            let library = super::super::world::tests::SMALL[split as usize].clone();
            let pairs = Pairs::new(library, PairOptions::default(), aspect(size)).unwrap();
            for index in 0..500 {
                let row = pairs.row(3, index).unwrap();
                let images = (1..=row.shots.len()).map(|k| PathBuf::from(format!("{k}.jpg"))).collect();
                let sample = pair(&row, size, split, index as usize, images);
                for detail in [Detail::Full, Detail::Brief] {
                    let trace = by_rules(&sample, &Facts::of(&sample).unwrap(), detail, 1);
                    assert_eq!(
                        judge(&trace, &sample, &Facts::of(&sample).unwrap()),
                        Ok(()),
                        "{}: {trace}",
                        sample.question
                    );
                }
            }
        }
    }
}
