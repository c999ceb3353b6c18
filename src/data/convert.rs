//! Public data sets -> rows of our own: `foveate data convert`.
//!
//! It hides where pictures lie and how large they are: a format's reader gives drafts, with names of pictures and boxes in whatever
//! unit the set uses, and this file finds the pictures, reads their headers and writes boxes in original pixels. What must stay
//! true: nothing is guessed and nothing is dropped in silence (a question that cannot become a row is counted under its reason); a
//! row that is not of the format, or lacks its picture, stops the conversion with its number; the file appears whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::{Sample, Target, mgrounding, mig_bench, refcoco, write};
use crate::config::BadConfig;
use crate::geometry::{BBox, Size};
use crate::image;
use crate::progress::Progress;

/// What a file is converted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    MigBench,
    MGrounding,
    RefCoco,
}

impl Format {
    const ALL: [Format; 3] = [Format::MigBench, Format::MGrounding, Format::RefCoco];

    pub fn name(self) -> &'static str {
        match self {
            Format::MigBench => "mig_bench",
            Format::MGrounding => "mgrounding",
            Format::RefCoco => "refcoco",
        }
    }

    /// # Errors
    /// There is no format of that name.
    pub fn named(name: &str) -> Result<Format> {
        let names = Format::ALL.map(Format::name).join(", ");
        let found = Format::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| BadConfig(format!("--from {name}: expected one of {names}")).into())
    }
}

/// `--remap OLD=NEW`: the path of a picture that begins with OLD begins with NEW instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remap {
    old: PathBuf,
    new: PathBuf,
}

impl std::str::FromStr for Remap {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Remap> {
        match text.split_once('=') {
            Some((old, new)) if !old.is_empty() => Ok(Remap { old: plain(old), new: new.into() }),
            _ => Err(BadConfig(format!(
                "--remap {text}: expected OLD=NEW, the beginning of a path in the file and what is there instead"
            ))
            .into()),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Options {
    pub format: Format,
    /// JSON (a list) or JSON lines.
    pub input: PathBuf,
    /// JSON lines.
    pub out: PathBuf,
    /// Where relative paths of pictures start; without it, in the folder of `input`.
    pub images: Option<PathBuf>,
    /// The first that fits a path is used.
    pub remap: Vec<Remap>,
    pub overwrite: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Converted {
    pub out: PathBuf,
    /// Rows of the source, and those written.
    pub read: usize,
    pub rows: usize,
    /// Different pictures.
    pub pictures: usize,
    pub left_out: LeftOut,
    /// What else a person should know of the set.
    pub notes: Vec<String>,
}

/// Questions that became no row: the numbers of their rows in the source, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut(pub BTreeMap<String, Vec<usize>>);

impl LeftOut {
    pub(super) fn add(&mut self, reason: &str, row: usize) {
        self.0.entry(reason.to_owned()).or_default().push(row);
    }

    /// One line a reason.
    pub fn lines(&self) -> Vec<String> {
        const SHOWN: usize = 5;
        let line = |(reason, rows): (&String, &Vec<usize>)| {
            let some: Vec<String> = rows.iter().take(SHOWN).map(usize::to_string).collect();
            let more = if rows.len() > SHOWN { ", ..." } else { "" };
            format!("{} left out: {reason} (row {}{more})", rows.len(), some.join(", "))
        };
        self.0.iter().map(line).collect()
    }
}

/// A row before its pictures are known.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    /// Of the source's row, from 1.
    pub number: usize,
    pub id: String,
    /// As the source names them.
    pub images: Vec<String>,
    pub question: String,
    pub places: Vec<Place>,
    pub task: Option<String>,
    pub split: Option<String>,
    pub extra: Map<String, Value>,
}

/// A box before its picture's size is known.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Counts from 1; never beyond the draft's pictures.
    pub image: usize,
    pub bbox: BBox,
    pub unit: Unit,
    pub label: Option<String>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Unit {
    Pixels,
    /// A side of the picture is this long.
    Sides(f64),
}

/// What a format's reader gives.
#[derive(Debug, Default)]
pub(super) struct Drafts {
    /// Rows of the source.
    pub read: usize,
    pub rows: Vec<Draft>,
    pub left_out: LeftOut,
    pub notes: Vec<String>,
}

/// Reads a file of another format and writes its rows.
///
/// # Errors
/// `out` is there already (unless `overwrite`); a row that is not of the format; pictures that are not where they should be.
pub fn convert(options: &Options) -> Result<Converted> {
    let Options { format, input, out, .. } = options;
    ensure!(
        options.overwrite || !out.exists(),
        "there is a file already; choose another name, or replace it with --overwrite: {}",
        out.display()
    );
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "the folder of --out is not there, make it first: {}", folder.display());
    let bytes = std::fs::read(input).with_context(|| format!("reading {}", input.display()))?;
    let failed = |error: anyhow::Error| anyhow!("converting {}: {error:#}: {}", format.name(), input.display());
    let text = std::str::from_utf8(&bytes).context("this is not UTF-8").map_err(failed)?;
    let drafts = match format {
        Format::MigBench => mig_bench::read(text),
        Format::MGrounding => mgrounding::read(text),
        Format::RefCoco => refcoco::read(text),
    };
    let Drafts { read, rows, mut left_out, notes } = drafts.map_err(failed)?;
    let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("finding {}", path.display()));
    let from = absolute(input)?;
    let base = match &options.images {
        Some(folder) => absolute(folder)?,
        None => from.parent().map(Path::to_owned).unwrap_or_default(),
    };
    let pictures = Pictures::open(&rows, &base, &options.remap).map_err(failed)?;
    let mut samples = Vec::with_capacity(rows.len());
    for draft in rows {
        let number = draft.number;
        match pictures.sample(draft) {
            Ok(sample) => samples.push(sample),
            Err(reason) => left_out.add(reason, number),
        }
    }
    if samples.is_empty() {
        return Err(failed(anyhow!("no row can be made of it: {}", left_out.lines().join("; "))));
    }
    // Pictures below the folder of the rows are named from there, so both must be spelt alike.
    write(&absolute(out)?, &samples)?;
    Ok(Converted { out: out.clone(), read, rows: samples.len(), pictures: pictures.sizes.len(), left_out, notes })
}

/// The pictures of a set: where each name leads, and how large it is.
struct Pictures {
    paths: HashMap<String, PathBuf>,
    sizes: HashMap<PathBuf, Size>,
}

impl Pictures {
    fn open(drafts: &[Draft], base: &Path, remap: &[Remap]) -> Result<Pictures> {
        // Each name with the first row that has it.
        let mut first: BTreeMap<&str, usize> = BTreeMap::new();
        for (draft, name) in drafts.iter().flat_map(|draft| draft.images.iter().map(move |name| (draft, name))) {
            first.entry(name).or_insert(draft.number);
        }
        let bar = Progress::start("reading the sizes", "picture", 0, first.len() as u64);
        let names: Vec<(&str, usize)> = first.into_iter().collect();
        let opened: Vec<(usize, &str, PathBuf, Result<Size>)> = names
            .par_iter()
            .map(|&(name, row)| {
                let path = located(name, base, remap);
                let size = image::size(&path);
                bar.add(1);
                (row, name, path, size)
            })
            .collect();
        bar.finish();
        let (mut paths, mut sizes, mut missing) = (HashMap::new(), HashMap::new(), Vec::new());
        for (row, name, path, size) in opened {
            match size {
                Ok(size) => sizes.insert(path.clone(), size),
                Err(error) => {
                    missing.push((row, format!("row {row}: {error:#}")));
                    continue;
                }
            };
            paths.insert(name.to_owned(), path);
        }
        const SHOWN: usize = 3;
        missing.sort();
        if let Some(more) = missing.len().checked_sub(1) {
            let shown: Vec<&str> = missing.iter().take(SHOWN).map(|(_, reason)| reason.as_str()).collect();
            let rest = if more >= SHOWN { format!("; and {} more", missing.len() - SHOWN) } else { String::new() };
            bail!(
                "{} of {} pictures cannot be read; --images DIR and --remap OLD=NEW say where they lie. {}{rest}",
                missing.len(),
                names.len(),
                shown.join("; ")
            );
        }
        Ok(Pictures { paths, sizes })
    }

    /// The row, or why there can be none.
    fn sample(&self, draft: Draft) -> Result<Sample, &'static str> {
        let images: Vec<PathBuf> = draft.images.iter().filter_map(|name| self.paths.get(name)).cloned().collect();
        let sizes: Vec<Size> = images.iter().filter_map(|path| self.sizes.get(path)).copied().collect();
        if sizes.iter().any(|size| size.too_thin()) {
            return Err("a picture is too long for its width to be shown");
        }
        let target = |place: Place| {
            let size = place.image.checked_sub(1).and_then(|k| sizes.get(k)).ok_or("a box is on no picture")?;
            Ok(Target { image: place.image, bbox: place.unit.pixels(place.bbox, *size)?, label: place.label })
        };
        let targets = draft.places.into_iter().map(target).collect::<Result<Vec<_>, &'static str>>()?;
        Ok(Sample {
            id: draft.id,
            images,
            question: draft.question,
            choices: Vec::new(),
            answer: answer(&targets),
            targets,
            task: draft.task,
            split: draft.split,
            extra: draft.extra,
        })
    }
}

impl Unit {
    /// In pixels of a picture of this size. Rounding may have left a box up to a pixel outside; that is cut off.
    fn pixels(self, b: BBox, size: Size) -> Result<BBox, &'static str> {
        let whole = size.bounds();
        let pixels = match self {
            Unit::Pixels => b,
            Unit::Sides(side) => {
                let (x, y) = (whole.width() / side, whole.height() / side);
                BBox::new(b.x1 * x, b.y1 * y, b.x2 * x, b.y2 * y)
            }
        };
        let inside = pixels.clamp(&whole);
        let off = <[f64; 4]>::from(pixels).iter().zip(<[f64; 4]>::from(inside)).any(|(a, b)| (a - b).abs() > 1.0);
        match inside.area() > 0.0 && pixels.is_finite() {
            _ if off => Err("a box lies outside of its picture"),
            false => Err("a box without an area"),
            true => Ok(inside),
        }
    }
}

/// The answer of a row whose targets these are, as those of the bundled sets are written.
pub(crate) fn answer(targets: &[Target]) -> String {
    if targets.is_empty() {
        return "unknown".into();
    }
    let entry = |t: &Target| {
        let mut entry =
            json!({"image": t.image, "bbox": <[f64; 4]>::from(t.bbox).map(|v| (v * 100.0).round() / 100.0)});
        if let Some(label) = &t.label {
            entry["label"] = json!(label);
        }
        entry
    };
    targets.iter().map(entry).collect::<Value>().to_string()
}

/// A path without `.` in it.
fn plain(path: &str) -> PathBuf {
    Path::new(path).components().filter(|part| *part != Component::CurDir).collect()
}

pub(super) fn located(name: &str, base: &Path, remap: &[Remap]) -> PathBuf {
    let name = plain(name);
    let moved = remap.iter().find_map(|r| Some(r.new.join(name.strip_prefix(&r.old).ok()?)));
    let path = base.join(moved.unwrap_or(name));
    // RefCOCO names a picture of COCO once for each annotation.
    match refcoco::of_coco(&path) {
        Some(picture) if !path.exists() => picture,
        _ => path,
    }
}

/// The rows of a file, each with its number: items of a JSON list or lines of JSON, from 1.
pub(super) fn items<T: DeserializeOwned>(text: &str) -> Result<Vec<(usize, T)>> {
    // Some editors begin a UTF-8 file with a byte order mark, which is no JSON.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // Where in the item serde stopped says nothing about where in the file.
    let why = |e: serde_json::Error| e.to_string().split(" at line ").next().unwrap_or_default().to_owned();
    let one = |text: &str| serde_json::from_str::<T>(text).map_err(why);
    let mut rows = Vec::new();
    if text.trim_start().starts_with('[') {
        let list: Vec<&RawValue> = serde_json::from_str(text).context("this is no JSON list of rows")?;
        rows.extend(list.iter().enumerate().map(|(i, item)| (i + 1, one(item.get()))));
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        rows.extend(lines.map(|(i, line)| (i + 1, one(line))));
    }
    ensure!(!rows.is_empty(), "there are no rows, expected a JSON list or JSON lines");
    let bad: Vec<String> =
        rows.iter().filter_map(|(n, row)| Some(format!("row {n}: {}", row.as_ref().err()?))).collect();
    if let Some(more) = bad.len().checked_sub(3).filter(|more| *more > 0) {
        bail!("{}; and {more} more", bad[..3].join("; "));
    }
    ensure!(bad.is_empty(), "{}", bad.join("; "));
    Ok(rows.into_iter().filter_map(|(n, row)| Some((n, row.ok()?))).collect())
}

/// A picture that a text speaks of, and the words that do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mention {
    pub words: std::ops::Range<usize>,
    /// Counts from 1.
    pub number: usize,
}

/// The places where a text numbers a `noun`: "the third image", "2th image", "Image-2", in order.
pub(super) fn mentions(text: &str, noun: &str) -> Vec<Mention> {
    let lower = text.to_ascii_lowercase();
    let mention = |(at, _): (usize, &str)| {
        let (before, after) = (lower.get(..at)?, lower.get(at + noun.len()..)?);
        if let Some(before) = before.strip_suffix(' ') {
            let start = before.rfind(|c: char| !c.is_ascii_alphanumeric()).map_or(0, |i| i + 1);
            if let Some(number) = before.get(start..).and_then(ordinal) {
                let the = before.get(..start)?.strip_suffix("the ").map_or(start, str::len);
                return Some(Mention { words: the..at + noun.len(), number });
            }
        }
        let digits = after.trim_start_matches(['-', '_', ' ', '#']);
        let end = digits.bytes().take_while(u8::is_ascii_digit).count();
        let number = usize::from(digits.get(..end)?.parse::<u16>().ok()?);
        Some(Mention { words: at..text.len() - digits.len() + end, number })
    };
    lower.match_indices(noun).filter_map(mention).collect()
}

/// "third", "3rd", and "3th" as some sets have it.
fn ordinal(word: &str) -> Option<usize> {
    const WORDS: [&str; 10] =
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"];
    let digits = ["st", "nd", "rd", "th"].iter().find_map(|end| word.strip_suffix(end));
    let written = WORDS.iter().position(|w| *w == word).map(|i| i + 1);
    written.or_else(|| digits?.parse::<u16>().ok().map(usize::from))
}

/// The words of a question: places of pictures at its beginning are left out, later ones are named, and marks around names and
/// boxes go, which are tokens to one family of models and noise to the others.
pub(super) fn words(question: &str) -> String {
    const PICTURE: &str = "<image>";
    let mut rest = question.trim();
    let mut picture = 0;
    while let Some(after) = rest.strip_prefix(PICTURE) {
        picture += 1;
        rest = after.trim_start();
    }
    let mut said = String::with_capacity(rest.len());
    for (i, piece) in rest.split(PICTURE).enumerate() {
        if i > 0 {
            picture += 1;
            said.push_str(&format!("Image-{picture}"));
        }
        said.push_str(piece);
    }
    for mark in ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"] {
        said = said.replace(mark, "");
    }
    said.trim().to_owned()
}

/// The last thing that a text names between marks.
pub(super) fn referred(text: &str) -> Option<String> {
    let (_, after) = text.rsplit_once("<|object_ref_start|>")?;
    let (name, _) = after.split_once("<|object_ref_end|>")?;
    Some(name.trim().trim_end_matches('.').to_owned()).filter(|name| !name.is_empty())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A folder of pictures, each 200 x 100, by their names.
    pub fn pictures(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            ::image::RgbImage::new(200, 100).save(path).unwrap();
        }
        dir
    }

    /// Converts a text that lies beside the pictures.
    pub fn converted(dir: &Path, format: Format, text: &str) -> Result<(Converted, Vec<Sample>)> {
        converted_with(dir, format, text, |_| ())
    }

    pub fn converted_with(
        dir: &Path,
        format: Format,
        text: &str,
        change: impl FnOnce(&mut Options),
    ) -> Result<(Converted, Vec<Sample>)> {
        let (input, out) = (dir.join("in.json"), dir.join("out.jsonl"));
        std::fs::write(&input, text).unwrap();
        let mut options = Options { format, input, out, images: None, remap: vec![], overwrite: true };
        change(&mut options);
        let report = convert(&options)?;
        let rows = crate::data::read(&report.out)?;
        Ok((report, rows))
    }

    const ROW: &str = r#"{"image": "home/them/set/a.png", "problem": "Where is it?", "solution": [10, 10, 50, 40]}"#;

    #[test]
    fn paths_are_looked_for_where_they_are_said_to_be() {
        let dir = pictures(&["a.png", "elsewhere/a.png", "home/them/set/a.png"]);
        let image = |change: &dyn Fn(&mut Options)| {
            let (_, rows) = converted_with(dir.path(), Format::RefCoco, ROW, change).unwrap();
            rows[0].images[0].strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned()
        };
        let remap = |text: &str| text.parse::<Remap>().unwrap();
        assert_eq!(image(&|_| ()), "home/them/set/a.png");
        assert_eq!(image(&|o| o.remap = vec![remap("home/them/set=.")]), "a.png");
        assert_eq!(
            image(&|o| o.remap = vec![remap("home/the=x"), remap("./home/them/set/=elsewhere")]),
            "elsewhere/a.png"
        );
        assert_eq!(
            image(&|o| {
                o.images = Some(dir.path().join("elsewhere"));
                o.remap = vec![remap("home/them/set=")];
            }),
            "elsewhere/a.png"
        );
        for bad in ["=new", "old", ""] {
            assert!(bad.parse::<Remap>().unwrap_err().to_string().contains("OLD=NEW"), "{bad}");
        }
    }

    #[test]
    fn what_is_missing_is_named_and_nothing_is_left_behind() {
        let dir = pictures(&["a.png"]);
        let error = |text: &str| format!("{:#}", converted(dir.path(), Format::RefCoco, text).unwrap_err());
        let lost = error(&format!("{}\n\n{ROW}", ROW.replace("home/them/set/", "")));
        assert!(lost.contains("1 of 2 pictures") && lost.contains("row 3: ") && lost.contains("set/a.png"), "{lost}");
        assert!(lost.contains("--remap") && lost.contains("in.json"), "{lost}");
        let bad = error(&format!("[{ROW}, {{\"problem\": 3}}, 5]"));
        assert!(bad.contains("row 2: ") && bad.contains("row 3: ") && bad.ends_with("in.json"), "{bad}");
        assert!(error("[{]").contains("no JSON list"));
        assert!(error(" ").contains("no rows"));
        assert!(!dir.path().join("out.jsonl").exists());

        std::fs::write(dir.path().join("out.jsonl"), "precious").unwrap();
        let kept = converted_with(dir.path(), Format::RefCoco, ROW, |o| o.overwrite = false).unwrap_err().to_string();
        assert!(kept.contains("--overwrite") && kept.contains("out.jsonl"), "{kept}");
        assert_eq!(std::fs::read_to_string(dir.path().join("out.jsonl")).unwrap(), "precious");
        let nowhere = converted_with(dir.path(), Format::RefCoco, ROW, |o| o.out = dir.path().join("none/out.jsonl"));
        assert!(nowhere.unwrap_err().to_string().ends_with("none"));
        assert!(Format::named("coco").unwrap_err().to_string().contains("mig_bench, mgrounding, refcoco"));
    }

    #[test]
    fn boxes_come_into_pixels_and_stay_inside() {
        let size = Size::new(200, 100);
        let pixels = |unit: Unit, b: [f64; 4]| unit.pixels(BBox::from(b), size).map(<[f64; 4]>::from);
        assert_eq!(pixels(Unit::Sides(1000.0), [250.0, 250.0, 500.0, 1000.0]), Ok([50.0, 25.0, 100.0, 100.0]));
        assert_eq!(pixels(Unit::Sides(1.0), [0.0, 0.5, 1.0, 1.0]), Ok([0.0, 50.0, 200.0, 100.0]));
        assert_eq!(pixels(Unit::Pixels, [-0.4, 1.0, 200.5, 99.0]), Ok([0.0, 1.0, 200.0, 99.0]));
        assert!(pixels(Unit::Pixels, [0.0, 1.0, 202.0, 99.0]).unwrap_err().contains("outside"));
        assert!(pixels(Unit::Pixels, [5.0, 5.0, 5.0, 9.0]).unwrap_err().contains("area"));
        assert!(pixels(Unit::Pixels, [5.0, 5.0, f64::NAN, 9.0]).is_err());
    }

    #[test]
    fn pictures_are_numbered_in_many_words() {
        let numbers = |text: &str| mentions(text, "image").iter().map(|m| m.number).collect::<Vec<_>>();
        assert_eq!(
            numbers("It's in the third image. Then Image-2, image 10 and image#1; the 4th image, the 2th image"),
            [3, 2, 10, 1, 4, 2]
        );
        assert_eq!(numbers("these two images, an image, images 3, the last image, image. 5 dogs"), Vec::<usize>::new());
        let text = "Please locate the 1th region picture in the source image.";
        let found = mentions(text, "region picture");
        assert_eq!((found.len(), &text[found[0].words.clone()], found[0].number), (1, "the 1th region picture", 1));
        assert_eq!(numbers("the 99999999999999999999th image and image-99999, é2th image, the 0th image"), [0]);
        let text = "Find it in Image-12 now";
        assert_eq!(&text[mentions(text, "image")[0].words.clone()], "Image-12");
    }

    #[test]
    fn questions_lose_their_marks_and_keep_their_words() {
        assert_eq!(words("<image>\n<image>\nFind <|object_ref_start|>a man<|object_ref_end|>."), "Find a man.");
        assert_eq!(words("<image> What of it is in <image>? "), "What of it is in Image-2?");
        assert_eq!(words("at (<|box_start|>(1,2),(3,4)<|box_end|>)"), "at ((1,2),(3,4))");
        assert_eq!(referred("<|object_ref_start|>a man.<|object_ref_end|> at").as_deref(), Some("a man"));
        assert_eq!(referred("a man"), None);
    }
}
