//! The vision tower's work within a step: each view is encoded once, and the gradient by its features goes back through the
//! tower once, whatever groups it was seen in.
//!
//! It hides what is kept between the two. As long as the weights stay as they are features are kept, and where an update may
//! follow, as much of the forward pass as fits the budget: everything, or each block's input with attention's result or without,
//! or nothing, and then the forward pass is done again for the backward pass. All give the same gradients bit for bit, because the
//! views of one forward pass stay together.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::episode::Placed;
use crate::geometry::Grid;
use crate::image::{self, PictureCache, Processor};
use crate::model::block::Keep;
use crate::model::memory::Memory;
use crate::model::{Gradients, Trainable, VisionTape, Vlm};

/// A picture's view, as a key: the same file, region and size give the same features while the tower is unchanged.
pub type ViewKey = (Arc<Path>, [u64; 4], (u32, u32));

pub fn key(placed: &Placed) -> ViewKey {
    let r = placed.view.region;
    (placed.path.clone(), [r.x1, r.y1, r.x2, r.y2].map(f64::to_bits), (placed.view.size.width, placed.view.size.height))
}

/// Gradients by the features of views, in the order in which the views were first met.
#[derive(Default)]
pub struct OnFeatures {
    views: Vec<Placed>,
    sums: HashMap<ViewKey, Vec<f32>>,
}

impl OnFeatures {
    /// # Shapes
    /// gradient `[tokens, D]`
    pub fn add(&mut self, view: &Placed, gradient: &[f32]) {
        match self.sums.get_mut(&key(view)) {
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g),
            None => {
                self.views.push(view.clone());
                self.sums.insert(key(view), gradient.to_vec());
            }
        }
    }
}

/// One forward pass over some views.
struct Pass {
    views: Vec<Placed>,
    grids: Vec<Grid>,
    /// The patches and the tape, or nothing.
    kept: Option<(Vec<f32>, VisionTape)>,
}

pub struct Tower {
    pictures: Arc<PictureCache>,
    processor: Arc<Processor>,
    features: HashMap<ViewKey, Arc<Vec<f32>>>,
    /// Those since the weights changed, and their views.
    passes: Vec<Pass>,
    passed: HashSet<ViewKey>,
    /// Bytes that tapes take, and those that they may take.
    held: u64,
    budget: u64,
    memory: Memory,
    /// What its backward pass may want of a forward pass: less and less; nothing where none will follow.
    keep: &'static [Keep],
}

/// Values of cached features kept at most: 64 Mi f32 are 256 MiB.
pub const FEATURE_VALUES: usize = 64 << 20;

/// Patches of one pass; a larger picture is alone in its pass.
const PATCHES_AT_ONCE: usize = 4096;

impl Tower {
    /// `budget` is in bytes; no backward pass may follow where `keep` is [`Keep::Nothing`].
    pub fn new(
        pictures: Arc<PictureCache>,
        processor: Arc<Processor>,
        memory: Memory,
        budget: u64,
        keep: Keep,
    ) -> Tower {
        Tower {
            pictures,
            processor,
            features: HashMap::new(),
            passes: Vec::new(),
            passed: HashSet::new(),
            held: 0,
            budget,
            memory,
            keep: choices(keep),
        }
    }

    /// One for other weights, from which nothing is learned.
    pub fn aside(&self) -> Tower {
        Tower::new(self.pictures.clone(), self.processor.clone(), self.memory, 0, Keep::Nothing)
    }

    /// The weights have changed, or what comes has nothing to do with what was seen.
    pub fn forget(&mut self) {
        self.features.clear();
        self.passes.clear();
        self.passed.clear();
        self.held = 0;
    }

    /// Features of some views `[tokens, D]`, each computed once while the weights stay as they are.
    pub fn features(&mut self, model: &Vlm, views: &[&Placed]) -> Result<Vec<Arc<Vec<f32>>>> {
        let held: usize = self.features.values().map(|f| f.len()).sum();
        if held > FEATURE_VALUES && views.iter().any(|v| !self.features.contains_key(&key(v))) {
            // Simple and rare: start over with what is wanted now.
            self.features.clear();
        }
        let mut asked = HashSet::new();
        let is_new = |v: &&&Placed| !self.features.contains_key(&key(v)) && asked.insert(key(v));
        let missing: Vec<Placed> = views.iter().filter(is_new).map(|v| (*v).clone()).collect();
        // Views whose features had to make way have their pass already.
        let (again, new) = missing.into_iter().partition(|v| self.passed.contains(&key(v)));
        for views in runs(again) {
            let (patches, grids) = patches(&self.pictures, &self.processor, &views)?;
            let (features, _) = model.look(&patches, &grids, Keep::Nothing)?;
            self.remember(model, &views, &grids, &features);
        }
        for views in runs(new) {
            let (patches, grids) = patches(&self.pictures, &self.processor, &views)?;
            let rows = grids.iter().map(|g| g.patches() as u64).sum::<u64>();
            let fits = |keep: &Keep| self.held + rows * self.memory.of_patch(*keep) <= self.budget;
            let keep = self.keep.iter().copied().find(fits).unwrap_or(Keep::Nothing);
            let (features, tape) = model.look(&patches, &grids, keep)?;
            self.held += rows * self.memory.of_patch(keep);
            self.remember(model, &views, &grids, &features);
            if !self.keep.is_empty() {
                self.passed.extend(views.iter().map(key));
                self.passes.push(Pass { views, grids, kept: tape.map(|tape| (patches, tape)) });
            }
        }
        views
            .iter()
            .map(|v| self.features.get(&key(v)).cloned().context("a view was encoded and is not there"))
            .collect()
    }

    fn remember(&mut self, model: &Vlm, views: &[Placed], grids: &[Grid], features: &[f32]) {
        let mut rest = features;
        for (view, grid) in views.iter().zip(grids) {
            let (mine, others) = rest.split_at(self.values(*grid, model));
            self.features.insert(key(view), Arc::new(mine.to_vec()));
            rest = others;
        }
    }

    /// Adds the tower's gradient of a loss with the given gradients by the features.
    pub fn backward(&mut self, model: &Vlm, mut on: OnFeatures, train: Trainable, grads: &mut Gradients) -> Result<()> {
        let mut passes = std::mem::take(&mut self.passes);
        let known = std::mem::take(&mut self.passed);
        self.held = 0;
        let others = on.views.iter().filter(|v| !known.contains(&key(v))).cloned().collect();
        for views in runs(others) {
            let grids = views.iter().map(|v| self.processor.grid(v.view.size)).collect();
            passes.push(Pass { views, grids, kept: None });
        }
        for Pass { views, grids, kept } in passes {
            let sums: Vec<Option<Vec<f32>>> = views.iter().map(|v| on.sums.remove(&key(v))).collect();
            if sums.iter().all(Option::is_none) {
                continue;
            }
            let mut dfeatures = Vec::new();
            for (sum, grid) in sums.into_iter().zip(&grids) {
                dfeatures.extend(sum.unwrap_or_else(|| vec![0.0; self.values(*grid, model)]));
            }
            let (patches, tape) = match kept {
                Some(kept) => kept,
                None => {
                    let (patches, _) = patches(&self.pictures, &self.processor, &views)?;
                    let most = self.keep.first().copied().unwrap_or(Keep::Nothing);
                    let (_, tape) = model.look(&patches, &grids, most)?;
                    (patches, tape.context("a pass over the tower kept nothing")?)
                }
            };
            model.look_backward(&patches, tape, &dfeatures, train, grads)?;
        }
        Ok(())
    }

    fn values(&self, grid: Grid, model: &Vlm) -> usize {
        grid.tokens(self.processor.merge) * model.config.text.hidden
    }
}

/// Patches of some views, cut from the original pictures.
pub fn patches(pictures: &PictureCache, processor: &Processor, views: &[Placed]) -> Result<(Vec<f32>, Vec<Grid>)> {
    let grids: Vec<Grid> = views.iter().map(|v| processor.grid(v.view.size)).collect();
    let values = |grid: &Grid| grid.patches() * processor.patch_len();
    let mut all = vec![0.0; grids.iter().map(values).sum()];
    let mut rest = &mut all[..];
    let places = grids.iter().map(|grid| {
        let (mine, others) = std::mem::take(&mut rest).split_at_mut(values(grid));
        rest = others;
        mine
    });
    let work: Vec<(&Placed, &mut [f32])> = views.iter().zip(places).collect();
    work.into_par_iter()
        .try_for_each(|(placed, place)| image::cut(place, &pictures.show(&placed.path, &placed.view)?, processor))?;
    Ok((all, grids))
}

/// What may be kept of a pass where this much is wanted, the most first.
pub(super) fn choices(wanted: Keep) -> &'static [Keep] {
    match wanted {
        Keep::Nothing => &[],
        Keep::Inputs | Keep::Attended => &[Keep::Attended, Keep::Inputs],
        Keep::Everything => &[Keep::Everything, Keep::Attended, Keep::Inputs],
    }
}

/// Cuts views into passes of at most [`PATCHES_AT_ONCE`] patches.
pub fn runs(views: Vec<Placed>) -> Vec<Vec<Placed>> {
    let mut runs: Vec<Vec<Placed>> = Vec::new();
    let mut filled = 0;
    for view in views {
        let patches = view.grid.patches();
        match runs.last_mut() {
            Some(run) if filled + patches <= PATCHES_AT_ONCE => run.push(view),
            _ => {
                runs.push(vec![view]);
                filled = 0;
            }
        }
        filled += patches;
    }
    runs
}
