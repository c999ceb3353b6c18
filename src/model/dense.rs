//! A temporary linear head on the merged visual tokens, for pretraining small models from nothing; thrown away afterwards.
//!
//! From words alone a small model takes very long to find out what its visual tokens could be good for. So each token that
//! lies on an object is also asked, through one linear layer: what are you part of, and where are its sides, measured from
//! you and measured in the picture? (One-stage detectors such as FCOS, arXiv 1904.01355, label their cells in the same way.)

use std::path::Path;

use anyhow::{Context, Result, ensure};
use foveate_kernels::{adamw, linear};
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
    pub learning_rate: f32,
    /// The weight falls linearly to 0 at this step.
    pub until_step: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { weight: 1.0, learning_rate: 1e-3, until_step: u64::MAX }
    }
}

/// What one merged token is asked to say. Boxes in pixels of the view.
#[derive(Clone, Debug)]
pub struct View<'a> {
    pub grid: Grid,
    /// Side of a merged token in pixels (28 for Qwen2.5-VL).
    pub side: f64,
    pub objects: &'a [(String, BBox)],
}

const FILE: &str = "dense_head.json";

/// Numbers of the head after the classes: box relative to the token, then box in the picture.
const BOX: usize = 8;

pub struct DenseHead {
    classes: Vec<String>,
    d: usize,
    /// [O, D] and [O], O = classes + 1 (nothing here) + 8.
    params: Vec<f32>,
    grads: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    step: u64,
}

/// How well the head did on one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fit {
    pub loss: f64,
    pub on_object: usize,
    pub named_right: usize,
    pub iou: f64,
}

impl Fit {
    pub fn add(&mut self, other: Fit) {
        self.loss += other.loss;
        self.on_object += other.on_object;
        self.named_right += other.named_right;
        self.iou += other.iou;
    }
}

impl DenseHead {
    pub fn new(classes: Vec<String>, d: usize, seed: u64) -> DenseHead {
        let o = classes.len() + 1 + BOX;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let scale = (1.0 / d as f32).sqrt();
        let mut params: Vec<f32> = (0..o * d).map(|_| rng.random_range(-scale..scale)).collect();
        params.resize(o * d + o, 0.0);
        let n = params.len();
        DenseHead { classes, d, params, grads: vec![0.0; n], m: vec![0.0; n], v: vec![0.0; n], step: 0 }
    }

    fn outputs(&self) -> usize {
        self.classes.len() + 1 + BOX
    }

    /// Loss and its derivative by the features, scaled by `scale`; the head's own gradient is kept for [`DenseHead::update`].
    ///
    /// # Shapes
    /// `features` [tokens, D], the views' tokens one after the other; the result has the same shape.
    pub fn backward(&mut self, features: &[f32], views: &[View], scale: f32) -> (Vec<f32>, Fit) {
        let (d, o) = (self.d, self.outputs());
        let c = self.classes.len();
        let t = features.len() / d;
        let (w, b) = self.params.split_at(o * d);
        let mut out = vec![0.0; t * o];
        linear::forward(&mut out, features, w, Some(b), t, d, o);

        let labels: Vec<Option<Label>> = views.iter().flat_map(|v| self.labels(v)).collect();
        assert_eq!(labels.len(), t, "one label for each visual token");
        let on_object = labels.iter().flatten().count();
        // Most tokens show background: both kinds get half of the weight.
        let (w_on, w_off) = (0.5 / on_object.max(1) as f32, 0.5 / (t - on_object).max(1) as f32);
        let mut fit = Fit { on_object, ..Fit::default() };
        let mut dout = vec![0.0; t * o];
        for ((row, drow), label) in out.chunks_exact(o).zip(dout.chunks_exact_mut(o)).zip(&labels) {
            let class = label.as_ref().map_or(c, |l| l.class);
            let weight = if label.is_some() { w_on } else { w_off };
            let logits = &row[..=c];
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|x| (x - max).exp()).sum();
            fit.loss += f64::from(weight * (max + sum.ln() - logits[class]));
            for (j, (g, x)) in drow[..=c].iter_mut().zip(logits).enumerate() {
                *g = scale * weight * ((x - max).exp() / sum - f32::from(u8::from(j == class)));
            }
            let Some(label) = label else { continue };
            let best = (0..=c).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            fit.named_right += usize::from(best == Some(class));
            fit.iou += iou_in_picture(&row[c + 5..], &label.sides[4..]);
            for (k, g) in drow[c + 1..].iter_mut().enumerate() {
                // Huber with its knee at 0.1: squares near the truth, so that it settles.
                let diff = row[c + 1 + k] - label.sides[k];
                let weight = 4.0 * w_on;
                fit.loss += f64::from(weight * if diff.abs() < 0.1 { diff * diff * 5.0 } else { diff.abs() - 0.05 });
                *g = scale * weight * (diff * 10.0).clamp(-1.0, 1.0);
            }
        }
        let mut dfeatures = vec![0.0; t * d];
        linear::backward_input(&mut dfeatures, &dout, w, t, d, o, false);
        let (dw, db) = self.grads.split_at_mut(o * d);
        linear::backward_weight(dw, Some(db), &dout, features, t, d, o);
        (dfeatures, fit)
    }

    /// Writes the head beside a checkpoint, so that pretraining can go on.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let state = (&self.classes, &self.params, &self.m, &self.v, self.step);
        let bytes = serde_json::to_vec(&state).context("writing the dense head")?;
        write_atomic(dir.join(FILE), &bytes)
    }

    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("reading the dense head: {}", path.display()))?;
        type Saved = (Vec<String>, Vec<f32>, Vec<f32>, Vec<f32>, u64);
        let (classes, params, m, v, step): Saved =
            serde_json::from_slice(&bytes).with_context(|| format!("the dense head is damaged: {}", path.display()))?;
        ensure!(
            classes == self.classes && [&params, &m, &v].iter().all(|p| p.len() == self.params.len()),
            "the dense head was made for other classes or another model: {}",
            path.display()
        );
        (self.params, self.m, self.v, self.step) = (params, m, v, step);
        Ok(())
    }

    pub fn update(&mut self, learning_rate: f32) {
        self.step += 1;
        let hyper = adamw::Hyper { lr: learning_rate, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, step: self.step };
        adamw::update(&mut self.params, &self.grads, &mut self.m, &mut self.v, hyper, 1.0);
        self.grads.fill(0.0);
    }

    /// A token belongs to the smallest object over its centre; an object too small for that takes the token of its centre.
    fn labels(&self, view: &View) -> Vec<Option<Label>> {
        let (rows, cols) = (view.grid.h as usize / 2, view.grid.w as usize / 2);
        let (width, height) = (cols as f64 * view.side, rows as f64 * view.side);
        let mut labels: Vec<Option<Label>> = vec![None; rows * cols];
        for (name, bbox) in view.objects {
            let Some(class) = self.classes.iter().position(|c| c == name) else { continue };
            let (ox, oy) = bbox.center();
            for row in 0..rows {
                for col in 0..cols {
                    let (x, y) = ((col as f64 + 0.5) * view.side, (row as f64 + 0.5) * view.side);
                    let over = x >= bbox.x1 && x < bbox.x2 && y >= bbox.y1 && y < bbox.y2;
                    let home = (ox - x).abs() <= view.side / 2.0 && (oy - y).abs() <= view.side / 2.0;
                    if !(over || home) {
                        continue;
                    }
                    let slot = &mut labels[row * cols + col];
                    if slot.as_ref().is_some_and(|l| l.area <= bbox.area()) {
                        continue;
                    }
                    let near = 2.0 * view.side;
                    let sides = [
                        (bbox.x1 - x) / near,
                        (bbox.y1 - y) / near,
                        (bbox.x2 - x) / near,
                        (bbox.y2 - y) / near,
                        bbox.x1 / width,
                        bbox.y1 / height,
                        bbox.x2 / width,
                        bbox.y2 / height,
                    ]
                    .map(|s| s as f32);
                    *slot = Some(Label { class, sides, area: bbox.area() });
                }
            }
        }
        labels
    }
}

#[derive(Clone, Debug)]
struct Label {
    class: usize,
    sides: [f32; BOX],
    area: f64,
}

fn iou_in_picture(said: &[f32], truth: &[f32]) -> f64 {
    let bbox = |s: &[f32]| BBox { x1: s[0].into(), y1: s[1].into(), x2: s[2].into(), y2: s[3].into() };
    let (said, truth) = (bbox(said), bbox(truth));
    if said.x1 < said.x2 && said.y1 < said.y2 { said.iou(&truth) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(objects: &[(String, BBox)]) -> View<'_> {
        View { grid: Grid { t: 1, h: 4, w: 6 }, side: 28.0, objects }
    }

    fn head() -> DenseHead {
        DenseHead::new(vec!["cat".into(), "dog".into()], 4, 1)
    }

    #[test]
    fn tokens_on_an_object_are_labelled() {
        let objects = [("cat".to_owned(), BBox { x1: 0.0, y1: 0.0, x2: 56.0, y2: 30.0 }), ("dog".to_owned(), BBox { x1: 60.0, y1: 30.0, x2: 66.0, y2: 36.0 })];
        let labels = head().labels(&view(&objects));
        let classes: Vec<Option<usize>> = labels.iter().map(|l| l.as_ref().map(|l| l.class)).collect();
        // Two tokens of the first row lie on the cat; the dog covers no token's centre and takes the one it stands in.
        assert_eq!(classes, [Some(0), Some(0), None, None, None, Some(1)]);
        let cat = labels[0].as_ref().unwrap();
        assert_eq!(cat.sides[..4], [-0.25, -0.25, 0.75, 16.0 / 56.0].map(|x: f64| x as f32));
        assert_eq!(cat.sides[4..], [0.0, 0.0, 56.0 / 84.0, 30.0 / 56.0].map(|x: f64| x as f32));
    }

    #[test]
    fn the_gradient_is_that_of_the_loss() {
        let objects = [("dog".to_owned(), BBox { x1: 0.0, y1: 0.0, x2: 56.0, y2: 28.0 })];
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut x: Vec<f32> = (0..6 * 4).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (dx, _) = head().backward(&x, &[view(&objects)], 1.0);
        for i in 0..x.len() {
            let keep = x[i];
            let mut at = |v: f32| {
                x[i] = v;
                head().backward(&x, &[view(&objects)], 1.0).1.loss
            };
            let slope = (at(keep + 1e-2) - at(keep - 1e-2)) / 2e-2;
            x[i] = keep;
            // Central differences of f32 sums with a step of 1e-2: about 1e-4 of rounding, and the Huber's knee.
            assert!((slope - f64::from(dx[i])).abs() < 5e-3, "entry {i}: {slope} against {}", dx[i]);
        }
    }
}
