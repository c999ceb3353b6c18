//! A temporary head on the merged visual tokens, for pretraining small models from nothing; thrown away afterwards.
//!
//! From answers alone a small model takes very long to find out what its visual tokens could be good for. So each token that
//! lies on an object is also asked, through one linear map a question and the model's OWN vocabulary: what are you part of, and
//! at which coordinates are its four sides? Because the answers are words of the language model, visual tokens come to speak
//! its language: "the word of the question" and "the patch that shows it" become alike, and attention can match them.
//! (Which tokens belong to an object is decided as one-stage detectors do, FCOS, arXiv 1904.01355.)
//!
//! Words alone are a slow start: the vocabulary knows nothing yet either, and a side's coordinate asks where in the picture one
//! is. From random weights 5 % of the tokens were named after 500 steps. So the same tokens also answer to a plain classifier, and
//! say how far the four sides are from where they stand; that gets the tower going (LOG.md).

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use foveate_kernels::matrix::Compute;
use foveate_kernels::{adamw, linear, logprob};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::geometry::{BBox, Grid};
use crate::run::write_atomic;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Weight of the head's loss beside the loss on words.
    pub weight: f32,
    pub lr: f32,
    /// Weight of the hints (see [`DenseHead::hints`]) beside the loss on words.
    pub hints: f32,
    /// Both weights fall linearly to 0 at this step; none: they stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_step: Option<u64>,
}

impl Default for Options {
    fn default() -> Options {
        Options { weight: 1.0, lr: 1e-3, hints: 1.0, until_step: None }
    }
}

/// The words that answer the head's questions.
#[derive(Clone, Debug, Default)]
pub struct Words {
    /// Token of each label.
    pub names: HashMap<String, u32>,
    /// The digits among them.
    pub digits: Vec<u32>,
    /// The word that questions for a digit have.
    pub number: u32,
    /// Token of the coordinate `k * snap`.
    pub numbers: Vec<u32>,
    pub snap: f64,
    /// Said of background.
    pub nothing: u32,
}

/// One view and what stands in it, in pixels of the view.
#[derive(Clone, Debug)]
pub struct View<'a> {
    pub grid: Grid,
    /// Side of a merged token in pixels (28 for Qwen2.5-VL).
    pub side: f64,
    pub objects: &'a [(String, BBox)],
}

/// A view in a prompt: what stands in it, and the rows of its visual tokens.
#[derive(Clone, Debug)]
pub struct Shown<'a> {
    pub objects: &'a [(String, BBox)],
    pub rows: std::ops::Range<usize>,
    /// Visual tokens side by side, and the side of one in pixels.
    pub columns: usize,
    pub side: f64,
}

/// Rows of a prompt and the tokens that they are asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    pub words: Vec<(usize, u32)>,
    /// As [`EARLY`] names them.
    pub early: [Vec<(usize, u32)>; EARLY.len()],
}

/// What is asked in the middle of the language model, and before which block: a picture's own rows for its number, the row in the
/// middle of each object for its name, words that name an object for the number of its picture.
pub const EARLY: [(&str, usize); 3] = [("pictures", 1), ("names", 3), ("places", 4)];

/// How many of a picture's rows are asked for its number.
const ASKED_ROWS: usize = 4;

const FILE: &str = "dense_head.json";

/// What is it, x1, y1, x2, y2.
const QUESTIONS: usize = 5;

/// Distances to the sides are counted in so many sides of a token, and errors above the knee count linearly (Huber).
const REACH: f64 = 2.0;
const KNEE: f32 = 0.1;

pub struct DenseHead {
    words: Words,
    /// Names that the plain classifier tells apart, ascending; the class after the last is background.
    classes: Vec<u32>,
    d: usize,
    /// One map [D, D] a question, then the plain map [O, D] with its bias [O]: O = classes, background, four distances.
    params: Vec<f32>,
    grads: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    step: u64,
}

/// How well the head did. Sums over the tokens on objects, to be divided by their number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fit {
    pub loss: f64,
    pub on_object: usize,
    /// Named with more than half of the probability.
    pub named: usize,
    /// The same for those that lie on a digit.
    pub on_digit: usize,
    pub read: usize,
    /// Minus log-prob of the four sides, mean of the four.
    pub sides: f64,
}

impl Fit {
    pub fn add(&mut self, other: Fit) {
        self.loss += other.loss;
        self.on_object += other.on_object;
        self.named += other.named;
        self.on_digit += other.on_digit;
        self.read += other.read;
        self.sides += other.sides;
    }
}

impl DenseHead {
    pub fn new(words: Words, d: usize, seed: u64) -> DenseHead {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let scale = (1.0 / d as f32).sqrt();
        let mut classes: Vec<u32> = words.names.values().copied().collect();
        classes.sort_unstable();
        classes.dedup();
        let outputs = classes.len() + 5;
        let n = (QUESTIONS * d + outputs) * d + outputs;
        let params = (0..n).map(|_| rng.random_range(-scale..scale)).collect();
        DenseHead { words, classes, d, params, grads: vec![0.0; n], m: vec![0.0; n], v: vec![0.0; n], step: 0 }
    }

    /// Loss and its derivative by the features, scaled by `scale`. The gradient of the vocabulary is added to `dtable`, that
    /// of the maps is kept for [`DenseHead::update`].
    ///
    /// # Shapes
    /// `features` [tokens, D], the views' tokens one after the other, and the result likewise; `table`, `dtable` [V, D].
    pub fn backward(
        &mut self,
        features: &[f32],
        views: &[View],
        scale: f32,
        table: &[f32],
        dtable: &mut [f32],
    ) -> (Vec<f32>, Fit) {
        let d = self.d;
        let v = table.len() / d;
        let labels: Vec<Option<Label>> = views.iter().flat_map(|view| self.labels(view)).collect();
        assert_eq!(labels.len() * d, features.len(), "one label for each visual token");
        let on: Vec<usize> = (0..labels.len()).filter(|&i| labels[i].is_some()).collect();
        let off: Vec<usize> = (0..labels.len()).filter(|&i| labels[i].is_none()).collect();
        let mut fit = Fit { on_object: on.len(), ..Fit::default() };
        let mut dfeatures = vec![0.0; features.len()];
        for question in 0..QUESTIONS {
            // Background is asked for its name only; both kinds get half of that question's weight.
            let rows: Vec<usize> = if question == 0 { on.iter().chain(&off).copied().collect() } else { on.clone() };
            if rows.is_empty() {
                continue;
            }
            let targets: Vec<u32> =
                rows.iter().map(|&r| labels[r].as_ref().map_or(self.words.nothing, |l| l.words[question])).collect();
            let weights: Vec<f32> = rows
                .iter()
                .map(|&r| match (question, &labels[r]) {
                    (0, Some(_)) => 0.5 / on.len() as f32,
                    (0, None) => 0.5 / off.len() as f32,
                    _ => 0.25 / on.len() as f32,
                })
                .collect();
            let x: Vec<f32> = rows.iter().flat_map(|&r| features[r * d..(r + 1) * d].iter().copied()).collect();
            let n = rows.len();
            let map = &self.params[question * d * d..(question + 1) * d * d];
            let mut said = vec![0.0; n * d];
            linear::forward(&mut said, &x, map, None, false, n, d, d);
            let out = logprob::forward(&said, table, &targets, 1.0, &[], d, v);
            for ((logprob, w), &r) in out.logprob.iter().zip(&weights).zip(&rows) {
                fit.loss -= f64::from(w * logprob);
                if let (0, Some(label)) = (question, &labels[r]) {
                    let sure = usize::from(*logprob > -std::f32::consts::LN_2);
                    let digit = usize::from(self.words.digits.contains(&label.words[0]));
                    fit.named += sure;
                    fit.on_digit += digit;
                    fit.read += sure * digit;
                } else if question > 0 {
                    fit.sides -= f64::from(*logprob) / 4.0;
                }
            }
            let gradient: Vec<f32> = weights.iter().map(|w| -w * scale).collect();
            let mut dsaid = vec![0.0; n * d];
            logprob::backward(&mut dsaid, Some(dtable), &gradient, None, &out, &said, table, &targets, 1.0, &[], d, v);
            let mut dx = vec![0.0; n * d];
            linear::backward_input(&mut dx, &dsaid, map, n, d, d, false);
            linear::backward_weight(
                &mut self.grads[question * d * d..(question + 1) * d * d],
                None,
                &dsaid,
                &x,
                n,
                d,
                d,
                Compute::F32,
            );
            for (&r, row) in rows.iter().zip(dx.chunks_exact(d)) {
                dfeatures[r * d..(r + 1) * d].iter_mut().zip(row).for_each(|(a, b)| *a += b);
            }
        }
        fit.loss += self.plain(features, &labels, scale, &mut dfeatures);
        (dfeatures, fit)
    }

    /// The plain classifier and the distances to the sides: returns their loss, adds its derivative to `dfeatures`.
    fn plain(&mut self, features: &[f32], labels: &[Option<Label>], scale: f32, dfeatures: &mut [f32]) -> f64 {
        let (d, c, t) = (self.d, self.classes.len(), labels.len());
        let outputs = c + 5;
        let (w, b) = self.params[QUESTIONS * d * d..].split_at(outputs * d);
        let mut out = vec![0.0; t * outputs];
        linear::forward(&mut out, features, w, Some(b), false, t, d, outputs);
        let on = labels.iter().flatten().count();
        // Most tokens show background: both kinds get half of the weight.
        let (on_weight, off_weight) = (0.5 / on.max(1) as f32, 0.5 / (t - on).max(1) as f32);
        let mut loss = 0.0;
        let mut dout = vec![0.0; t * outputs];
        for ((row, drow), label) in out.chunks_exact(outputs).zip(dout.chunks_exact_mut(outputs)).zip(labels) {
            let class = label.as_ref().and_then(|l| self.classes.binary_search(&l.words[0]).ok()).unwrap_or(c);
            let weight = if label.is_some() { on_weight } else { off_weight };
            let logits = &row[..=c];
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|x| (x - max).exp()).sum();
            loss += f64::from(weight * (max + sum.ln() - logits[class]));
            for (j, (g, x)) in drow.iter_mut().zip(logits).enumerate() {
                *g = scale * weight * ((x - max).exp() / sum - f32::from(u8::from(j == class)));
            }
            let Some(label) = label else { continue };
            // Weighted so that an error of one token's side is worth about as much as a wrong name.
            let weight = 4.0 * on_weight;
            for ((g, x), wanted) in drow[c + 1..].iter_mut().zip(&row[c + 1..]).zip(label.distances) {
                let off = x - wanted;
                let size = off.abs();
                loss += f64::from(weight * if size < KNEE { off * off / (2.0 * KNEE) } else { size - KNEE / 2.0 });
                *g = scale * weight * (off / KNEE).clamp(-1.0, 1.0);
            }
        }
        let mut dx = vec![0.0; t * d];
        linear::backward_input(&mut dx, &dout, w, t, d, outputs, false);
        dfeatures.iter_mut().zip(dx).for_each(|(a, b)| *a += b);
        let (dw, db) = self.grads[QUESTIONS * d * d..].split_at_mut(outputs * d);
        linear::backward_weight(dw, Some(db), &dout, features, t, d, outputs, Compute::F32);
        loss
    }

    /// Words of a prompt that name one object of its pictures are asked, with the three rows behind them, where that object is:
    /// x1 of the word's own row, then y1, x2, y2. Nothing is ever sampled from a prompt's rows, so they are free to answer;
    /// finding the thing that a word names is then one step of attention, and the answer later a second. In the same way the word
    /// "number" is asked for the digit, where the picture shows one. Of several pictures, some rows of each are asked for its number, and
    /// the words for that of the picture they were found in. Both in the middle of the model: asked at the end alone, a row finds out too
    /// late for others to look it up, and the model finds the thing but not in which picture (LOG.md).
    pub fn hints(&self, prompt: &[u32], shown: &[Shown]) -> Asked {
        let (mut hints, mut places) = (Vec::new(), Vec::new());
        let objects = || shown.iter().enumerate().flat_map(|(k, view)| view.objects.iter().map(move |o| (k + 1, o)));
        for (image, (name, bbox)) in objects() {
            let alone = objects().filter(|(_, (other, _))| other == name).count() == 1;
            let Some(&word) = self.words.names.get(name).filter(|_| alone) else { continue };
            let sides = self.sides(bbox);
            for (row, _) in prompt.iter().enumerate().filter(|(_, id)| **id == word) {
                if row + 3 < prompt.len() {
                    hints.extend(sides.into_iter().enumerate().map(|(k, token)| (row + k, token)));
                }
                places.extend(self.picture(image, shown.len()).map(|token| (row, token)));
            }
        }
        let labels = objects().filter_map(|(_, (name, _))| self.words.names.get(name));
        let digits: Vec<u32> = labels.copied().filter(|token| self.words.digits.contains(token)).collect();
        if let [digit] = digits[..] {
            let number = prompt.iter().enumerate().filter(|(_, id)| **id == self.words.number);
            hints.extend(number.map(|(row, _)| (row, digit)));
        }
        let (mut pictures, mut names) = (Vec::new(), Vec::new());
        for (k, view) in shown.iter().enumerate() {
            let rows = view.rows.clone().step_by((view.rows.len() / ASKED_ROWS).max(1));
            names.extend(view.objects.iter().filter_map(|(name, bbox)| {
                let (x, y) = bbox.center();
                let row = view.rows.start + (y / view.side) as usize * view.columns + (x / view.side) as usize;
                let token = *self.words.names.get(name)?;
                (view.rows.contains(&row) && !self.words.digits.contains(&token)).then_some((row, token))
            }));
            pictures.extend(
                self.picture(k + 1, shown.len())
                    .into_iter()
                    .flat_map(|token| rows.clone().map(move |row| (row, token))),
            );
        }
        Asked { words: hints, early: [pictures, names, places] }
    }

    /// The token of a picture's number, where there are several.
    fn picture(&self, image: usize, of: usize) -> Option<u32> {
        self.words.names.get(&format!("{}{image}", crate::synth::pretrain::DIGIT)).copied().filter(|_| of > 1)
    }

    /// The tokens of a box's four sides.
    fn sides(&self, bbox: &BBox) -> [u32; 4] {
        [bbox.x1, bbox.y1, bbox.x2, bbox.y2].map(|x| {
            let k = (x / self.words.snap).round().clamp(0.0, (self.words.numbers.len() - 1) as f64);
            self.words.numbers[k as usize]
        })
    }

    /// Writes the head beside a checkpoint, so that pretraining can go on.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let bytes =
            serde_json::to_vec(&(&self.params, &self.m, &self.v, self.step)).context("writing the dense head")?;
        write_atomic(dir.join(FILE), &bytes)
    }

    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("reading the dense head: {}", path.display()))?;
        type Saved = (Vec<f32>, Vec<f32>, Vec<f32>, u64);
        let (params, m, v, step): Saved =
            serde_json::from_slice(&bytes).with_context(|| format!("the dense head is damaged: {}", path.display()))?;
        ensure!(
            [&params, &m, &v].iter().all(|p| p.len() == self.params.len()),
            "the dense head was made for a model of another width: {}",
            path.display()
        );
        (self.params, self.m, self.v, self.step) = (params, m, v, step);
        Ok(())
    }

    pub fn update(&mut self, lr: f32) {
        self.step += 1;
        let hyper = adamw::Hyper { lr, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.0, step: self.step };
        adamw::update(&mut self.params, &self.grads, &mut self.m, &mut self.v, hyper, 1.0);
        self.grads.fill(0.0);
    }

    /// A token belongs to the smallest object over its centre; an object too small for that takes the token of its centre.
    fn labels(&self, view: &View) -> Vec<Option<Label>> {
        let (rows, cols) = (view.grid.h as usize / 2, view.grid.w as usize / 2);
        let mut labels: Vec<Option<Label>> = vec![None; rows * cols];
        for (name, bbox) in view.objects {
            let Some(&name) = self.words.names.get(name) else { continue };
            let [x1, y1, x2, y2] = self.sides(bbox);
            let words = [name, x1, y1, x2, y2];
            let (ox, oy) = bbox.center();
            for row in 0..rows {
                for col in 0..cols {
                    let (x, y) = ((col as f64 + 0.5) * view.side, (row as f64 + 0.5) * view.side);
                    let over = x >= bbox.x1 && x < bbox.x2 && y >= bbox.y1 && y < bbox.y2;
                    let home = (ox - x).abs() <= view.side / 2.0 && (oy - y).abs() <= view.side / 2.0;
                    let slot = &mut labels[row * cols + col];
                    if (over || home) && slot.as_ref().is_none_or(|l| l.area > bbox.area()) {
                        let reach = REACH * view.side;
                        let distances =
                            [bbox.x1 - x, bbox.y1 - y, bbox.x2 - x, bbox.y2 - y].map(|s| (s / reach) as f32);
                        *slot = Some(Label { words, distances, area: bbox.area() });
                    }
                }
            }
        }
        labels
    }
}

#[derive(Clone, Debug)]
struct Label {
    words: [u32; QUESTIONS],
    /// From the token's centre to x1, y1, x2, y2, in [`REACH`] sides of a token.
    distances: [f32; 4],
    area: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens 0..10 are coordinates 0, 7, …, 63; 10 is a cat, 11 a dog, 12 nothing.
    fn head() -> DenseHead {
        let names = HashMap::from([("cat".to_owned(), 10), ("dog".to_owned(), 11)]);
        DenseHead::new(
            Words { names, digits: Vec::new(), numbers: (0..10).collect(), snap: 7.0, nothing: 12, number: 13 },
            4,
            1,
        )
    }

    fn view(objects: &[(String, BBox)]) -> View<'_> {
        View { grid: Grid { t: 1, h: 4, w: 6 }, side: 28.0, objects }
    }

    #[test]
    fn tokens_on_an_object_are_labelled() {
        let objects = [
            ("cat".to_owned(), BBox { x1: 0.0, y1: 0.0, x2: 56.0, y2: 30.0 }),
            ("dog".to_owned(), BBox { x1: 60.0, y1: 30.0, x2: 66.0, y2: 36.0 }),
        ];
        let labels: Vec<Option<[u32; 5]>> =
            head().labels(&view(&objects)).into_iter().map(|l| l.map(|l| l.words)).collect();
        // Two tokens of the first row lie on the cat; the dog covers no token's centre and takes the one it stands in.
        let (cat, dog) = (Some([10, 0, 0, 8, 4]), Some([11, 9, 4, 9, 5]));
        assert_eq!(labels, [cat, cat, None, None, None, dog]);
    }

    #[test]
    fn words_that_name_one_object_are_asked_for_its_place() {
        let fox = |x: f64| ("cat".to_owned(), BBox { x1: x, y1: 7.0, x2: x + 14.0, y2: 21.0 });
        let hints = |prompt: &[u32], objects: &[(String, BBox)]| {
            head().hints(prompt, &[Shown { objects, rows: 0..0, columns: 1, side: 28.0 }]).words
        };
        assert_eq!(hints(&[5, 10, 5, 5, 5, 5], &[fox(7.0)]), [(1, 1), (2, 1), (3, 3), (4, 3)]);
        assert!(hints(&[5, 10, 5, 5, 5, 5], &[fox(7.0), fox(28.0)]).is_empty(), "two of them: which one?");
        assert!(hints(&[5, 5, 5, 10, 5], &[fox(7.0)]).is_empty(), "no rows behind the word");
    }

    #[test]
    fn of_several_pictures_the_number_is_asked_too() {
        let mut head = head();
        head.words.names.extend([("digit:1".into(), 7), ("digit:2".into(), 8)]);
        let cat = [("cat".to_owned(), BBox { x1: 7.0, y1: 7.0, x2: 21.0, y2: 21.0 })];
        let (columns, side) = (2, 14.0);
        let shown =
            [Shown { objects: &[], rows: 0..8, columns, side }, Shown { objects: &cat, rows: 8..12, columns, side }];
        let prompt = [[5; 12].as_slice(), &[10, 5, 5, 5, 5]].concat();
        let of_word = [(12, 1), (13, 1), (14, 3), (15, 3)];
        let of_pictures = [(0, 7), (2, 7), (4, 7), (6, 7), (8, 8), (9, 8), (10, 8), (11, 8)];
        assert_eq!(
            head.hints(&prompt, &shown),
            Asked { words: of_word.into(), early: [of_pictures.into(), vec![(11, 10)], vec![(12, 8)]] }
        );
    }

    #[test]
    fn gradients_are_those_of_the_loss() {
        let objects = [("dog".to_owned(), BBox { x1: 0.0, y1: 0.0, x2: 56.0, y2: 28.0 })];
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (mut x, mut table) = (draw(6 * 4), draw(13 * 4));
        let mut dtable = vec![0.0; table.len()];
        let (dx, _) = head().backward(&x, &[view(&objects)], 1.0, &table, &mut dtable);
        let loss = |x: &[f32], table: &[f32]| {
            head().backward(x, &[view(&objects)], 1.0, table, &mut vec![0.0; table.len()]).1.loss
        };
        // Central differences of f32 losses near 5 with a step of 1e-2: rounding gives about 1e-4, the third derivative less.
        for i in 0..x.len() {
            let keep = x[i];
            x[i] = keep + 1e-2;
            let up = loss(&x, &table);
            x[i] = keep - 1e-2;
            let down = loss(&x, &table);
            x[i] = keep;
            assert!(((up - down) / 2e-2 - f64::from(dx[i])).abs() < 1e-3, "feature {i}");
        }
        for i in 0..table.len() {
            let keep = table[i];
            table[i] = keep + 1e-2;
            let up = loss(&x, &table);
            table[i] = keep - 1e-2;
            let down = loss(&x, &table);
            table[i] = keep;
            assert!(((up - down) / 2e-2 - f64::from(dtable[i])).abs() < 1e-3, "table {i}");
        }
    }
}
