//! The optimiser: learning-rate schedule, clipping by the global norm, AdamW over a flat arena.
//!
//! It hides which parts of the arena are trained. What must stay true: frozen parameters are never written; the
//! gradient norm is the same bits for any number of threads; moments exist for trained parameters only; a state that
//! is saved and loaded goes on as if it had not been.

use anyhow::{Context, Result, ensure};
use foveate_kernels::adamw;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use crate::config::BadConfig;
use crate::model::{Layout, Trainable};

/// How the learning rate goes on after the warm-up. `p` runs from 0 (end of warm-up) to 1 (last step).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Constant,
    /// `1 - p (1 - min_lr_ratio)`.
    Linear,
    /// `min_lr_ratio + (1 - min_lr_ratio) (1 + cos(pi p)) / 2`.
    Cosine,
}

/// Settings of the optimiser. Defaults are those of MGPO: lr 1e-6 constant, decay 0.01, clip 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optim {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0: they are not.
    pub clip_norm: f64,
    pub schedule: Schedule,
    /// Steps of linear warm-up; below 1 the share of all steps.
    pub warmup: f64,
    /// The share of `lr` at which linear and cosine end.
    pub min_lr_ratio: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Optim {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            schedule: Schedule::Constant,
            warmup: 0.0,
            min_lr_ratio: 0.0,
        }
    }
}

impl Optim {
    /// Refuses settings that cannot mean anything. Errors name the key and the value.
    pub fn validate(&self) -> Result<()> {
        for (key, value, low, high) in [
            ("lr", self.lr, 0.0, f64::INFINITY),
            ("beta1", self.beta1, 0.0, 0.999_999),
            ("beta2", self.beta2, 0.0, 0.999_999_9),
            ("eps", self.eps, 0.0, f64::INFINITY),
            ("weight_decay", self.weight_decay, 0.0, f64::INFINITY),
            ("clip_norm", self.clip_norm, 0.0, f64::INFINITY),
            ("warmup", self.warmup, 0.0, f64::INFINITY),
            ("min_lr_ratio", self.min_lr_ratio, 0.0, 1.0),
        ] {
            let expected =
                if high.is_finite() { format!("from {low} to {high}") } else { format!("of at least {low}") };
            ensure!(
                value.is_finite() && value >= low && value <= high,
                BadConfig(format!("optim.{key} = {value}: expected a number {expected}"))
            );
        }
        Ok(())
    }

    /// The learning rate of step `step` (from 0) of `total`.
    ///
    /// The first of `w` warm-up steps has `lr / w`, not 0 (a step of rate 0 teaches nothing), the last has `lr`.
    ///
    /// ```
    /// use foveate::optim::{Optim, Schedule};
    /// let o = Optim { lr: 1.0, warmup: 2.0, schedule: Schedule::Linear, ..Optim::default() };
    /// let rates: Vec<f64> = (0..6).map(|step| o.lr_at(step, 6)).collect();
    /// assert_eq!(rates, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
    /// ```
    pub fn lr_at(&self, step: u64, total: u64) -> f64 {
        let warmup = match self.warmup {
            w if w < 1.0 => (w * total as f64).ceil(),
            w => w.floor(),
        };
        let at = step as f64;
        if at < warmup {
            return self.lr * (at + 1.0) / warmup;
        }
        let p = ((at - warmup) / (total as f64 - warmup).max(1.0)).min(1.0);
        let rest = 1.0 - self.min_lr_ratio;
        self.lr
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - p * rest,
                Schedule::Cosine => self.min_lr_ratio + rest * 0.5 * (1.0 + (std::f64::consts::PI * p).cos()),
            }
    }
}

/// A run of trained parameters in the arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trained {
    pub range: Range<usize>,
    /// Whether weight decay applies (it is customary to spare norms and biases; verl does not).
    pub decay: bool,
}

impl Trained {
    /// The tensors of a model that are trained, in their order; matrices decay.
    pub fn of(layout: &Layout, train: Trainable) -> Vec<Trained> {
        let entries = layout.entries.iter().filter(|e| train.trains(e));
        entries.map(|e| Trained { range: e.range.clone(), decay: e.shape.len() > 1 }).collect()
    }
}

/// Numbers summed in one go: fixed, so that the order of additions does not depend on the number of threads.
const CHUNK: usize = 1 << 16;

/// The Euclidean norm of the gradients in `ranges`, summed in f64 in a fixed order.
///
/// Errors: a range beyond the arena.
pub fn global_norm(gradients: &[f32], ranges: impl IntoIterator<Item = Range<usize>>) -> Result<f64> {
    let mut sum = 0.0;
    for range in ranges {
        let part = gradients.get(range.clone()).with_context(|| {
            format!("taking the gradient norm: range {range:?} is not within the {} gradients", gradients.len())
        })?;
        let sums: Vec<f64> =
            part.par_chunks(CHUNK).map(|chunk| chunk.iter().map(|g| f64::from(*g) * f64::from(*g)).sum()).collect();
        sum += sums.iter().sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// What gradients of norm `norm` are multiplied by: `min(1, max / (norm + 1e-6))`, as torch's `clip_grad_norm_`.
pub fn clip_scale(norm: f64, max: f64) -> f64 {
    if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// What one optimiser step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stepped {
    /// Before clipping.
    pub grad_norm: f64,
    /// What gradients were multiplied by.
    pub clip_scale: f64,
    pub lr: f64,
    /// False when the norm was not finite: then neither parameters nor state were touched, and the step is not counted.
    pub applied: bool,
}

/// AdamW (arXiv 1711.05101) over the trained ranges of a flat arena.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    trained: Vec<Trained>,
    /// First and second moments of the trained parameters, range after range.
    m: Vec<f32>,
    v: Vec<f32>,
    step: u64,
}

impl AdamW {
    /// Fresh state. Errors: ranges that overlap, run backwards or are out of order.
    pub fn new(trained: Vec<Trained>) -> Result<AdamW> {
        let mut end = 0;
        for t in &trained {
            ensure!(
                t.range.start >= end && t.range.end >= t.range.start,
                "setting up AdamW: range {:?} begins before {end}, where the one before it ended, or runs backwards",
                t.range
            );
            end = t.range.end;
        }
        let n = trained.iter().map(|t| t.range.len()).sum();
        Ok(AdamW { trained, m: vec![0.0; n], v: vec![0.0; n], step: 0 })
    }

    /// A state that was kept elsewhere.
    ///
    /// # Errors
    /// As [`AdamW::new`], and moments of another number.
    pub fn of(trained: Vec<Trained>, m: Vec<f32>, v: Vec<f32>, step: u64) -> Result<AdamW> {
        let n: usize = trained.iter().map(|t| t.range.len()).sum();
        ensure!(m.len() == n && v.len() == n, "{} and {} moments of {n} trained parameters", m.len(), v.len());
        Ok(AdamW { m, v, step, ..AdamW::new(trained)? })
    }

    /// First and second moments of the trained parameters, range after range.
    pub fn moments(&self) -> (&[f32], &[f32]) {
        (&self.m, &self.v)
    }

    /// Steps applied so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The number of trained parameters.
    pub fn parameters(&self) -> usize {
        self.m.len()
    }

    /// The norm of the gradients of all trained parameters.
    pub fn grad_norm(&self, gradients: &[f32]) -> Result<f64> {
        global_norm(gradients, self.trained.iter().map(|t| t.range.clone()))
    }

    /// One step at learning rate `lr`: clip, decay, update. `parameters` and `gradients` are whole arenas of one length;
    /// what is not trained is neither read nor written.
    ///
    /// Errors: arenas of different lengths, or shorter than a range. A norm that is not finite is not an error but
    /// [`Stepped::applied`] false: the caller decides whether the run goes on.
    pub fn step(&mut self, parameters: &mut [f32], gradients: &[f32], settings: &Optim, lr: f64) -> Result<Stepped> {
        ensure!(
            parameters.len() == gradients.len(),
            "taking an optimiser step: {} parameters but {} gradients",
            parameters.len(),
            gradients.len()
        );
        let grad_norm = self.grad_norm(gradients)?;
        let scale = clip_scale(grad_norm, settings.clip_norm);
        let mut stepped = Stepped { grad_norm, clip_scale: scale, lr, applied: false };
        if !grad_norm.is_finite() {
            return Ok(stepped);
        }
        self.step += 1;
        let mut at = 0;
        for t in &self.trained {
            let moments = at..at + t.range.len();
            at = moments.end;
            let hyper = adamw::Hyper {
                lr: lr as f32,
                beta1: settings.beta1 as f32,
                beta2: settings.beta2 as f32,
                eps: settings.eps as f32,
                weight_decay: if t.decay { settings.weight_decay as f32 } else { 0.0 },
                step: self.step,
            };
            // `grad_norm` has checked the ranges against the gradients, which are as long as the parameters.
            adamw::update(
                &mut parameters[t.range.clone()],
                &gradients[t.range.clone()],
                &mut self.m[moments.clone()],
                &mut self.v[moments],
                hyper,
                scale as f32,
            );
        }
        stepped.applied = true;
        Ok(stepped)
    }

    /// Writes the state as safetensors (`m`, `v`, and as metadata the step and the ranges), beside its place first, synced and
    /// then renamed, so that `path` never holds half of one.
    pub fn save(&self, path: &Path) -> Result<()> {
        let doing = || format!("saving the optimiser state to {}", path.display());
        let ranges = serde_json::to_string(&self.trained).with_context(doing)?;
        // One key: of several the order in the file would be another each time, and equal states would be unequal files.
        let metadata = [("state".to_string(), format!("{} {ranges}", self.step))];
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let tensors = [("m", Moments::of(&self.m)), ("v", Moments::of(&self.v))];
        safetensors::serialize_to_file(tensors, Some(metadata.into()), Path::new(&partial)).with_context(doing)?;
        File::open(&partial).and_then(|file| file.sync_all()).with_context(doing)?;
        std::fs::rename(&partial, path).with_context(doing)
    }

    /// Reads a state that [`AdamW::save`] wrote. Errors: it is of other trained ranges, or damaged.
    pub fn load(trained: Vec<Trained>, path: &Path) -> Result<AdamW> {
        let doing = || format!("loading the optimiser state from {}", path.display());
        let mut state = AdamW::new(trained).with_context(doing)?;
        let bytes = std::fs::read(path).with_context(doing)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).with_context(doing)?;
        let saved = header.metadata().as_ref().and_then(|m| m.get("state")?.split_once(' '));
        let (step, ranges) = saved.with_context(|| format!("{}: it has no \"state\" of a step and ranges", doing()))?;
        state.step = step.parse().with_context(|| format!("{}: its step is {step:?}", doing()))?;
        let saved: Vec<Trained> = serde_json::from_str(ranges).with_context(doing)?;
        ensure!(
            saved == state.trained,
            "{}: it is of {} parameters in {} ranges, this run trains {} in {}; resume with the settings it was saved under",
            doing(),
            saved.iter().map(|t| t.range.len()).sum::<usize>(),
            saved.len(),
            state.m.len(),
            state.trained.len()
        );
        let tensors = SafeTensors::deserialize(&bytes).with_context(doing)?;
        for (name, moments) in [("m", &mut state.m), ("v", &mut state.v)] {
            let tensor = tensors.tensor(name).with_context(doing)?;
            ensure!(
                tensor.dtype() == Dtype::F32 && tensor.shape() == [moments.len()],
                "{}: {name:?} is {:?} {:?}, expected F32 [{}]",
                doing(),
                tensor.dtype(),
                tensor.shape(),
                moments.len()
            );
            for (x, b) in moments.iter_mut().zip(tensor.data().chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Ok(state)
    }
}

/// Moments as safetensors sees them; bytes of one tensor at a time are made while writing.
struct Moments<'a> {
    values: &'a [f32],
    shape: [usize; 1],
}

impl<'a> Moments<'a> {
    fn of(values: &'a [f32]) -> Self {
        Moments { values, shape: [values.len()] }
    }
}

impl View for Moments<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

#[cfg(test)]
mod tests {
    // Reference numbers stand as torch printed them.
    #![allow(clippy::excessive_precision)]

    use super::*;

    fn all(n: usize) -> Vec<Trained> {
        vec![Trained { range: 0..n, decay: true }]
    }

    fn close(found: &[f32], expected: &[f32], tolerance: f32) {
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= tolerance, "{found:?} is not {expected:?}");
        }
    }

    /// Gradients of step t that f32 holds exactly.
    fn gradient(t: i32, n: i32) -> Vec<f32> {
        (0..n).map(|i| ((i * 7 + t * 5) % 11 - 5) as f32 / 4.0).collect()
    }

    /// torch 2.15: AdamW(lr=1e-2, weight_decay=0.1) after clip_grad_norm_(1.0), ten steps.
    #[test]
    fn ten_steps_are_torchs() {
        let settings = Optim { lr: 1e-2, weight_decay: 0.1, ..Optim::default() };
        let mut p = vec![1.0, -0.5, 0.25, 2.0];
        let mut state = AdamW::new(all(4)).unwrap();
        for t in 0..10 {
            let stepped = state.step(&mut p, &gradient(t, 4), &settings, settings.lr).unwrap();
            if t == 0 {
                // The numbers are -5, 2, -2, 5 quarters.
                assert!((stepped.grad_norm - 58f64.sqrt() / 4.0).abs() < 1e-12);
                close(&p, &[1.00900006, -0.509500027, 0.259750009, 1.98800004], 2e-7);
            }
        }
        // Ten steps of f32 rounding on values near 2: a few units in the last place (2.4e-7).
        close(&p, &[0.997365355, -0.487561882, 0.262649179, 1.9494853], 1e-6);
        close(&state.m, &[-0.0132581079, 0.0401279777, -0.00828865636, -0.0601300597], 1e-7);
        // The kernel takes beta2 in f32, where 1 - 0.999 is 1.3e-5 short; the bias correction is short by as much,
        // so the parameters do not see it.
        close(&state.v, &[0.00231403578, 0.00277668051, 0.00251102704, 0.0023533653], 2e-5 * 0.0028);
        assert_eq!(state.steps(), 10);
    }

    #[test]
    fn frozen_parameters_stay_and_cost_nothing() {
        let trained = vec![Trained { range: 1..3, decay: true }, Trained { range: 5..6, decay: false }];
        let mut state = AdamW::new(trained).unwrap();
        assert_eq!(state.parameters(), 3);
        let mut p: Vec<f32> = (1..=8).map(|x| x as f32).collect();
        let mut g = vec![f32::NAN; 8];
        for i in [1, 2] {
            g[i] = 1.0;
        }
        g[5] = 0.0;
        let settings = Optim { weight_decay: 0.5, ..Optim::default() };
        let stepped = state.step(&mut p, &g, &settings, 0.1).unwrap();
        assert!(stepped.applied);
        assert!((stepped.grad_norm - 2f64.sqrt()).abs() < 1e-12);
        // The first step of Adam is lr whatever the gradient's size: 2 · (1 - 0.05) - 0.1 and 3 · 0.95 - 0.1.
        close(&p, &[1.0, 1.8, 2.75, 4.0, 5.0, 6.0, 7.0, 8.0], 1e-6);
        // Neither gradient nor decay: not even a rounding.
        assert_eq!(p[5], 6.0);
    }

    #[test]
    fn a_broken_gradient_changes_nothing_and_says_so() {
        let mut state = AdamW::new(all(2)).unwrap();
        let before = state.clone();
        let mut p = vec![1.0, 2.0];
        let stepped = state.step(&mut p, &[1.0, f32::INFINITY], &Optim::default(), 0.1).unwrap();
        assert!(!stepped.applied);
        assert_eq!((p, state), (vec![1.0, 2.0], before));
        assert!(AdamW::new(vec![all(3)[0].clone(), all(2)[0].clone()]).is_err());
        let mut short = AdamW::new(all(9)).unwrap();
        assert!(short.step(&mut [0.0], &[0.0], &Optim::default(), 0.1).is_err());
    }

    #[test]
    fn resuming_from_a_file_is_not_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let settings = Optim { lr: 1e-2, ..Optim::default() };
        let (mut p, mut state) = (vec![1.0, -0.5, 0.25, 2.0, 3.0], AdamW::new(all(5)).unwrap());
        for t in 0..3 {
            state.step(&mut p, &gradient(t, 5), &settings, 1e-2).unwrap();
        }
        state.save(&path).unwrap();
        let mut loaded = AdamW::load(all(5), &path).unwrap();
        assert_eq!(loaded, state);
        let mut q = p.clone();
        state.step(&mut p, &gradient(3, 5), &settings, 1e-2).unwrap();
        loaded.step(&mut q, &gradient(3, 5), &settings, 1e-2).unwrap();
        assert_eq!(p, q);
        let message = format!("{:#}", AdamW::load(all(4), &path).unwrap_err());
        assert!(message.contains("5 parameters in 1 ranges, this run trains 4"), "{message}");
        std::fs::write(&path, b"garbage").unwrap();
        assert!(AdamW::load(all(5), &path).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_norm_does_not_depend_on_threads() {
        let g: Vec<f32> = (0..300_000).map(|i| ((i % 7919) % 1000) as f32 * 1e-3 - 0.4).collect();
        let norm = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| global_norm(&g, [0..100_000, 100_003..300_000]).unwrap())
        };
        assert_eq!(norm(1).to_bits(), norm(3).to_bits());
        assert_eq!(global_norm(&[3.0, 9.0, 4.0], [0..1, 2..3]).unwrap(), 5.0);
        assert!(global_norm(&[1.0], std::iter::once(0..2)).is_err());
    }

    #[test]
    fn clipping_is_torchs() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
        assert_eq!(clip_scale(4.0, 0.0), 1.0);
    }

    #[test]
    fn schedules_by_hand() {
        let o = Optim { lr: 2.0, ..Optim::default() };
        assert_eq!((o.lr_at(0, 10), o.lr_at(9, 10)), (2.0, 2.0));
        // A share of steps: 30 % of 10 are 3.
        let cosine = Optim { warmup: 0.3, min_lr_ratio: 0.1, schedule: Schedule::Cosine, ..o.clone() };
        let rates: Vec<f64> = [0, 2, 3, 10].iter().map(|s| cosine.lr_at(*s, 10)).collect();
        for (found, expected) in rates.iter().zip([2.0 / 3.0, 2.0, 2.0, 0.2]) {
            assert!((found - expected).abs() < 1e-12, "{rates:?}");
        }
        // Half way from 2 to 10 the factor is the mean of 1 and 0.1.
        let half = Optim { warmup: 2.0, ..cosine };
        assert!((half.lr_at(6, 10) - 1.1).abs() < 1e-12);
        assert!(Optim { beta1: 1.0, ..o.clone() }.validate().is_err());
        assert!(Optim { lr: f64::NAN, ..o.clone() }.validate().is_err());
        let error = Optim { lr: -1.0, ..o }.validate().unwrap_err().to_string();
        assert_eq!(error, "optim.lr = -1: expected a number of at least 0");
    }
}
