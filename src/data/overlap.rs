//! What two sets of rows share: the same pictures, exactly or to the eye, and the same questions. A test set whose pictures were trained on measures
//! memory (MGPO trains on the rest of its own benchmark: spec 1.10).
//!
//! It hides formats, decoding and the search for pairs. What must stay true: every picture of both sets is decoded once, and only its fingerprint
//! stays; a picture that cannot be decoded is named, never silently different; pairs come in the order of the second set's rows, then of the first's.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rayon::prelude::*;
use serde::Serialize;

use super::{Read, ReadAs, Sample};
use crate::image::{Fingerprint, Likeness, decode};
use crate::progress::Progress;

/// Words that two questions must share, of all words of both, to be nearly the same (Jaccard).
pub const NEAR: f64 = 0.8;

#[derive(Clone, Debug, Serialize)]
pub struct Overlap {
    /// For instance what was trained on, and what is tested.
    pub first: Side,
    pub second: Side,
    pub pictures: Vec<PicturePair>,
    pub questions: Vec<QuestionPair>,
    pub rows: Rows,
    /// Pictures that cannot be decoded, with the reason. Nothing is known of them.
    pub unread: Vec<(PathBuf, String)>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Side {
    pub path: PathBuf,
    /// Good rows.
    pub rows: usize,
    /// Problems of the file; what they are, `data check` says.
    pub problems: usize,
    /// Different files.
    pub pictures: usize,
    /// Different wordings, apart from case and punctuation.
    pub questions: usize,
}

/// Rows of the second set that the first one gives away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rows {
    /// Some picture of theirs is in the first set.
    pub picture: usize,
    /// And it is asked the same or nearly the same there.
    pub picture_and_question: usize,
    /// Their question is asked word by word in the first set, about whatever picture.
    pub question: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PicturePair {
    pub first: PathBuf,
    pub second: PathBuf,
    /// Width and height of each.
    pub sizes: [[u32; 2]; 2],
    #[serde(flatten)]
    pub like: Likeness,
    /// Rows that show them, by id.
    pub first_rows: Vec<String>,
    pub second_rows: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuestionPair {
    pub first: String,
    pub second: String,
    /// 1 where they are the same apart from case and punctuation, else the share of words in common.
    pub likeness: f64,
    pub first_rows: Vec<String>,
    pub second_rows: Vec<String>,
}

impl Overlap {
    pub fn exact_pictures(&self) -> usize {
        self.pictures.iter().filter(|pair| pair.like == Likeness::Exact).count()
    }

    pub fn exact_questions(&self) -> usize {
        self.questions.iter().filter(|pair| pair.likeness == 1.0).count()
    }
}

/// Looks for what two files of rows share.
///
/// # Errors
/// A file that cannot be read, or has no good row.
pub fn overlap(first: (&Path, &ReadAs), second: (&Path, &ReadAs)) -> Result<Overlap> {
    let read = |(path, read_as): (&Path, &ReadAs)| {
        let Read { samples, report, .. } = read_as.good(path)?;
        let faults = report.faults().unwrap_or_default();
        ensure!(!samples.is_empty(), "there is no good row, {faults}: {}", path.display());
        Ok((samples, report.problems.len()))
    };
    let ((a, a_problems), (b, b_problems)) = (read(first)?, read(second)?);
    let (of_a, of_b) = (Pictures::of(&a), Pictures::of(&b));
    let prints = fingerprints(of_a.paths.iter().chain(&of_b.paths).copied());
    let pictures = picture_pairs(&of_a, &of_b, &prints);
    let (asked_a, asked_b) = (Questions::of(&a), Questions::of(&b));
    let questions = question_pairs(&asked_a, &asked_b);
    let side = |path: &Path, rows: &[Sample], problems, pictures: &Pictures, questions: &Questions| Side {
        path: path.to_owned(),
        rows: rows.len(),
        problems,
        pictures: pictures.paths.len(),
        questions: questions.texts.len(),
    };
    let mut unread: Vec<(PathBuf, String)> =
        prints.iter().filter_map(|(path, print)| Some(((*path).to_owned(), print.as_ref().err()?.clone()))).collect();
    unread.sort();
    Ok(Overlap {
        first: side(first.0, &a, a_problems, &of_a, &asked_a),
        second: side(second.0, &b, b_problems, &of_b, &asked_b),
        rows: given_away(&a, &b, &pictures, &questions),
        pictures,
        questions,
        unread,
    })
}

/// The different pictures of a set, in the order of its rows.
struct Pictures<'a> {
    paths: Vec<&'a Path>,
    /// Ids of the rows that show each.
    rows: HashMap<&'a Path, Vec<String>>,
}

impl Pictures<'_> {
    fn of(rows: &[Sample]) -> Pictures<'_> {
        let mut pictures = Pictures { paths: Vec::new(), rows: HashMap::new() };
        for row in rows {
            for path in row.images.iter().map(PathBuf::as_path) {
                let ids = pictures.rows.entry(path).or_insert_with(|| {
                    pictures.paths.push(path);
                    Vec::new()
                });
                if ids.last() != Some(&row.id) {
                    ids.push(row.id.clone());
                }
            }
        }
        pictures
    }
}

type Prints<'a> = HashMap<&'a Path, Result<Fingerprint, String>>;

fn fingerprints<'a>(paths: impl Iterator<Item = &'a Path>) -> Prints<'a> {
    let mut seen = HashSet::new();
    let different: Vec<&Path> = paths.filter(|path| seen.insert(*path)).collect();
    let bar = Progress::start("looking at the pictures", "picture", 0, different.len() as u64);
    let print = |path: &&'a Path| {
        let print = decode(path).and_then(|picture| Fingerprint::of(&picture)).map_err(|e| format!("{e:#}"));
        bar.add(1);
        (*path, print)
    };
    let prints = different.par_iter().map(print).collect();
    bar.finish();
    prints
}

fn picture_pairs(a: &Pictures, b: &Pictures, prints: &Prints) -> Vec<PicturePair> {
    let print = |path: &Path| prints.get(path)?.as_ref().ok();
    let known: Vec<(&Path, &Fingerprint)> = a.paths.iter().filter_map(|path| Some((*path, print(path)?))).collect();
    let of = |second: &&Path| {
        let Some(other) = print(second) else { return Vec::new() };
        let pair = |(first, one): &(&Path, &Fingerprint)| {
            let like = one.like(other)?;
            Some(PicturePair {
                first: (*first).to_owned(),
                second: (*second).to_owned(),
                sizes: [[one.size.width, one.size.height], [other.size.width, other.size.height]],
                like,
                first_rows: a.rows[first].clone(),
                second_rows: b.rows[second].clone(),
            })
        };
        known.iter().filter_map(pair).collect::<Vec<_>>()
    };
    b.paths.par_iter().map(of).collect::<Vec<_>>().concat()
}

/// The different wordings of a set's questions, in the order of its rows.
struct Questions {
    /// As first written, with its words and the ids of its rows.
    texts: Vec<(String, Vec<String>, Vec<String>)>,
}

impl Questions {
    fn of(rows: &[Sample]) -> Questions {
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut texts: Vec<(String, Vec<String>, Vec<String>)> = Vec::new();
        for row in rows {
            let words = words(&row.question);
            let place = *places.entry(words.join(" ")).or_insert_with(|| {
                texts.push((row.question.clone(), words, Vec::new()));
                texts.len() - 1
            });
            texts[place].2.push(row.id.clone());
        }
        Questions { texts }
    }
}

/// The words of a text in small letters. Scripts that are written without spaces give a word for each sign.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut within = false;
    for c in text.chars().flat_map(char::to_lowercase) {
        let alone = c >= '\u{2e80}' && c.is_alphanumeric();
        match words.last_mut() {
            Some(word) if within && c.is_alphanumeric() && !alone => word.push(c),
            _ if c.is_alphanumeric() => words.push(c.to_string()),
            _ => {}
        }
        within = c.is_alphanumeric() && !alone;
    }
    words
}

/// Pairs of wordings that share at least [`NEAR`] of their words. So that not all are held against all, only those are that share one of their
/// rarest words: two sets that share so much must (Chaudhuri, Ganti and Kaushik 2006, "A Primitive Operator for Similarity Joins").
fn question_pairs(a: &Questions, b: &Questions) -> Vec<QuestionPair> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for (_, words, _) in a.texts.iter().chain(&b.texts) {
        for word in words.iter().map(String::as_str).collect::<BTreeSet<_>>() {
            *counts.entry(word).or_default() += 1;
        }
    }
    // The rarest first; words alike in number by their spelling.
    let set = |words: &[String]| {
        let mut set: Vec<(usize, String)> = words
            .iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|word| (counts[word.as_str()], word.clone()))
            .collect();
        set.sort_unstable();
        set
    };
    let rarest =
        |set: &[(usize, String)]| set.len() - (NEAR * set.len() as f64).ceil() as usize + usize::from(!set.is_empty());
    let sets: Vec<Vec<(usize, String)>> = a.texts.iter().map(|(_, words, _)| set(words)).collect();
    let mut with: HashMap<&str, Vec<usize>> = HashMap::new();
    for (k, set) in sets.iter().enumerate() {
        set[..rarest(set)].iter().for_each(|(_, word)| with.entry(word).or_default().push(k));
    }
    let of = |(text, words, rows): &(String, Vec<String>, Vec<String>)| {
        let own = set(words);
        let candidates: BTreeSet<usize> =
            own[..rarest(&own)].iter().filter_map(|(_, word)| with.get(word.as_str())).flatten().copied().collect();
        let pair = |k: usize| {
            let (first, first_words, first_rows) = &a.texts[k];
            let likeness = if words == first_words { 1.0 } else { jaccard(&own, &sets[k]).min(0.999) };
            (likeness >= NEAR).then(|| QuestionPair {
                first: first.clone(),
                second: text.clone(),
                likeness,
                first_rows: first_rows.clone(),
                second_rows: rows.clone(),
            })
        };
        candidates.into_iter().filter_map(pair).collect::<Vec<_>>()
    };
    b.texts.par_iter().map(of).collect::<Vec<_>>().concat()
}

/// Things in common, of all things; both are in order.
fn jaccard<T: Ord>(a: &[T], b: &[T]) -> f64 {
    let (mut i, mut k, mut common) = (0, 0, 0);
    while let (Some(one), Some(other)) = (a.get(i), b.get(k)) {
        match one.cmp(other) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => k += 1,
            std::cmp::Ordering::Equal => (i, k, common) = (i + 1, k + 1, common + 1),
        }
    }
    common as f64 / (a.len() + b.len() - common).max(1) as f64
}

/// Counts the rows of the second set that have a picture, a question, or both from the first.
fn given_away(a: &[Sample], b: &[Sample], pictures: &[PicturePair], questions: &[QuestionPair]) -> Rows {
    let asked: HashMap<&str, &str> = a.iter().map(|row| (row.id.as_str(), row.question.as_str())).collect();
    let normal = |text: &str| words(text).join(" ");
    let mut near: HashMap<String, HashSet<String>> = HashMap::new();
    for pair in questions {
        near.entry(normal(&pair.second)).or_default().insert(normal(&pair.first));
    }
    let exact: HashSet<&str> = questions
        .iter()
        .filter(|pair| pair.likeness == 1.0)
        .flat_map(|pair| pair.second_rows.iter().map(String::as_str))
        .collect();
    let mut shown: HashMap<&Path, Vec<&PicturePair>> = HashMap::new();
    for pair in pictures {
        shown.entry(&pair.second).or_default().push(pair);
    }
    let mut rows = Rows { question: exact.len(), ..Rows::default() };
    for row in b {
        let pairs: Vec<&PicturePair> =
            row.images.iter().filter_map(|path| shown.get(path.as_path())).flatten().copied().collect();
        if pairs.is_empty() {
            continue;
        }
        rows.picture += 1;
        let same = near.get(&normal(&row.question));
        let asked_there = |pair: &&PicturePair| {
            pair.first_rows
                .iter()
                .filter_map(|id| asked.get(id.as_str()))
                .any(|question| same.is_some_and(|same| same.contains(&normal(question))))
        };
        rows.picture_and_question += usize::from(pairs.iter().any(asked_there));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Size;
    use crate::image::{PassOrder, RgbImage, encode_jpeg, resize, save};

    /// A picture without two equal regions, another for every number.
    fn picture(k: u32) -> RgbImage {
        RgbImage::from_fn(160, 120, |x, y| {
            let wave = |a: u32, b: u32| (127.0 + 120.0 * (f64::from(x * a + y * b + k * 37) / 29.0).sin()) as u8;
            [wave(k + 1, 2), wave(1, k + 2), ((x * (k + 3) + y) % 256) as u8].into()
        })
    }

    fn rows(folder: &Path, name: &str, rows: &[(&str, &str, &str)]) -> PathBuf {
        let lines: Vec<String> = rows
            .iter()
            .map(|(id, image, question)| {
                serde_json::json!({"id": id, "images": [image], "question": question, "answer": "7"}).to_string()
            })
            .collect();
        let path = folder.join(name);
        std::fs::write(&path, lines.join("\n")).unwrap();
        path
    }

    #[test]
    fn pictures_and_questions_that_two_sets_share_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for k in 0..4 {
            save(&picture(k), &dir.join(format!("{k}.png"))).unwrap();
        }
        save(&picture(0), &dir.join("copy.png")).unwrap();
        let small = resize(&picture(1), Size::new(80, 60), PassOrder::default()).unwrap();
        std::fs::write(dir.join("small.jpg"), encode_jpeg(&small, 60).unwrap()).unwrap();
        let train = rows(
            dir,
            "train.jsonl",
            &[
                ("t0", "0.png", "What is written on the small sign left of the door?"),
                ("t1", "1.png", "How many cars are there?"),
                ("t2", "2.png", "Which colour?"),
            ],
        );
        let test = rows(
            dir,
            "test.jsonl",
            &[
                ("a", "copy.png", "What is written on the small sign, left of a door?"),
                ("b", "small.jpg", "What number is on the bus?"),
                ("c", "3.png", "which colour"),
                ("d", "small.jpg", "How many cars are there"),
            ],
        );
        let read_as = ReadAs::default();
        let found = overlap((&train, &read_as), (&test, &read_as)).unwrap();
        let names: Vec<(String, String, bool)> = found
            .pictures
            .iter()
            .map(|pair| {
                let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
                (name(&pair.first), name(&pair.second), pair.like == Likeness::Exact)
            })
            .collect();
        let wanted = |a: &str, b: &str, exact| (a.to_owned(), b.to_owned(), exact);
        assert_eq!(names, [wanted("0.png", "copy.png", true), wanted("1.png", "small.jpg", false)]);
        assert_eq!(found.pictures[1].second_rows, ["b", "d"]);
        assert_eq!(found.pictures[1].sizes, [[160, 120], [80, 60]]);
        let asked: Vec<(&str, bool)> =
            found.questions.iter().map(|pair| (pair.second_rows[0].as_str(), pair.likeness == 1.0)).collect();
        assert_eq!(asked, [("a", false), ("c", true), ("d", true)]);
        assert_eq!(found.rows, Rows { picture: 3, picture_and_question: 2, question: 2 });
        assert_eq!((found.first.pictures, found.second.pictures, found.second.questions), (3, 3, 4));
        assert!(found.unread.is_empty());
    }

    #[test]
    fn a_set_shares_nothing_with_another_world() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        for k in 0..12 {
            save(&picture(k), &dir.join(format!("{k}.png"))).unwrap();
        }
        let of = |range: std::ops::Range<u32>| -> Vec<(String, String, String)> {
            range.map(|k| (format!("{k}"), format!("{k}.png"), format!("Question number {k} of some more?"))).collect()
        };
        let write = |name: &str, all: &[(String, String, String)]| {
            rows(dir, name, &all.iter().map(|(a, b, c)| (a.as_str(), b.as_str(), c.as_str())).collect::<Vec<_>>())
        };
        let (a, b) = (write("a.jsonl", &of(0..6)), write("b.jsonl", &of(6..12)));
        let found = overlap((&a, &ReadAs::default()), (&b, &ReadAs::default())).unwrap();
        assert!(found.pictures.is_empty() && found.questions.is_empty(), "{found:?}");
        assert_eq!(found.rows, Rows::default());
        // A set and itself share everything, each picture with itself.
        let same = overlap((&a, &ReadAs::default()), (&a, &ReadAs::default())).unwrap();
        assert_eq!((same.exact_pictures(), same.exact_questions()), (6, 6));
    }

    #[test]
    fn words_are_compared_without_case_and_punctuation_and_signs_one_by_one() {
        assert_eq!(words("Is it  the DOG's?"), ["is", "it", "the", "dog", "s"]);
        assert_eq!(words("图中有2只狗？"), ["图", "中", "有", "2", "只", "狗"]);
        assert_eq!(jaccard(&[1, 2, 3, 4], &[2, 3, 4, 5]), 0.6);
        assert_eq!(jaccard::<u8>(&[], &[]), 0.0);
    }
}
