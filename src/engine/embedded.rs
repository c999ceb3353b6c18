//! The default engine: our own forward and backward on this machine's CPU, one set of weights for sampling and training.
//!
//! A prompt is read once for its group, later turns continue each member's own cache, and a picture is encoded once as long
//! as the vision tower stays as it is. Because every kernel gives a row the same bits in any company, the log-probs of
//! sampling are those of training, to the last bit.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use crate::model::Compute;
use anyhow::{Context, Result, bail, ensure};
use foveate_kernels::pairs;
use rayon::prelude::*;

pub(super) mod lane;
pub mod memory;
pub(super) mod tower;

use self::lane::{Lane, READ_AT_ONCE, Unread, Voice};
use self::tower::{OnFeatures, Tower};
use super::{
    Completion, Frontend, Group, ModelOptions, Prompt, Sampler, Sampling, Scores, Trainer, Training, Weights, Who,
};
use crate::batch::{self, Batch};
use crate::config::BadConfig;
use crate::episode::{Placed, Stream};
use crate::geometry::Grid;
use crate::model::block::Keep;
use crate::model::generate::Cache;
use crate::model::memory::memory;
use crate::model::{Arena, Dtype, Early, Gradients, Head, Hold, Slopes, Target, Trainable, Vlm, lora};
use crate::optim::{AdamW, Optim, Trained};
use crate::progress;
use crate::sft::Example;

/// Answers that rows of a prompt are asked for beside the dialogue: for each example (row, token), and the weight of one.
pub struct Hints {
    pub rows: Vec<Vec<(usize, u32)>>,
    pub weight: f32,
    /// The same, asked in the middle of the language model.
    pub early: Vec<EarlyHints>,
}

/// Hints that are asked before a block.
pub struct EarlyHints {
    pub block: usize,
    pub rows: Vec<Vec<(usize, u32)>>,
    pub weight: f32,
}

/// Minus the sums of the log-probs of the hints.
#[derive(Clone, Debug)]
pub struct Hinted {
    pub rows: f64,
    /// In the order in which they were given.
    pub early: Vec<f64>,
}

/// A loss on the visual tokens of example i: gets their features [tokens, D], their grids, the embedding table and its
/// gradient (to add to), and returns the gradient by the features.
pub type Look<'a> = dyn FnMut(usize, &[f32], &[Grid], &[f32], &mut [f32]) -> Option<Vec<f32>> + 'a;

struct Learning {
    gradients: Gradients,
    optimizer: AdamW,
    trained: Vec<Trained>,
    optim: Optim,
    /// The trained ranges of the weights as they were at the start.
    reference: Option<Vec<(std::ops::Range<usize>, Vec<f32>)>>,
}

pub struct Embedded {
    pub model: Vlm,
    pub frontend: Frontend,
    options: ModelOptions,
    trainable: Trainable,
    temperature: f32,
    /// Ids that cannot be sampled: vision tokens (a sampled one would have no picture) and rows without a token.
    banned: Vec<u32>,
    training: Option<Learning>,
    lanes: Vec<Lane>,
    tower: Tower,
}

pub(super) const MERGED: &str =
    "the adapter was merged into its model, and all weights are trained; add [model.lora] to go on with the adapter";
/// The optimiser's state in a checkpoint folder.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";

impl Embedded {
    /// Opens a checkpoint for sampling, and for training if `training` says how.
    pub fn open(options: &ModelOptions, training: Option<&Training>) -> Result<Embedded> {
        let hold = match (training, options.weights) {
            (None, hold) => hold,
            (Some(_), Hold::Auto | Hold::Memory) => Hold::Memory,
            (Some(_), Hold::Mapped) => bail!(BadConfig(
                "model.weights = \"mapped\" is for using a model; what is trained must be in memory, leave the key out"
                    .into()
            )),
        };
        let model = match (training, &options.lora) {
            (Some(training), Some(lora)) => lora::open(&options.path, lora, options.trainable()?, training.seed, hold)?,
            _ => Vlm::open(&options.path, hold)?,
        };
        if training.is_some() && options.lora.is_none() && lora::is_adapter(&options.path) {
            progress::say(MERGED);
        }
        Embedded::with_model(model, options, training)
    }

    /// The same around weights that are already in memory; tokenizer and processor still come from the folder.
    pub fn with_model(mut model: Vlm, options: &ModelOptions, training: Option<&Training>) -> Result<Embedded> {
        model.compute = options.compute;
        if options.compute != Compute::F32 && !pairs::fast() {
            progress::say(
                "note: this processor has no tiles for bf16 (Intel AMX); model.compute = \"f32\" is as fast here, or faster",
            );
        }
        let frontend = Frontend::load(&options.path, options.picture_cache_mib)?;
        let layout = model.weights.layout();
        let trainable = options.trainable_of(layout)?;
        let banned = frontend.banned(model.config.text.vocab, training);
        let training_state = training.map(|t| -> Result<Learning> {
            t.optim.validate()?;
            let Arena { layout, data } = model.weights.arena()?;
            let trained = Trained::of(layout, trainable);
            let kept = |t: &Trained| (t.range.clone(), data[t.range.clone()].to_vec());
            let reference = t.reference.then(|| trained.iter().map(kept).collect());
            Ok(Learning {
                gradients: Gradients::zeros(layout),
                optimizer: AdamW::new(trained.clone())?,
                trained,
                optim: t.optim.clone(),
                reference,
            })
        });
        let training_state: Option<Learning> = training_state.transpose()?;
        let keep = match training_state.is_some() && trainable.tower() {
            true => options.keep(),
            false => Keep::Nothing,
        };
        let memory = memory(&model.config, model.weights.layout(), trainable);
        let Frontend { pictures, processor, .. } = frontend.clone();
        let tower = Tower::new(pictures, processor, memory, options.vision_tape_mib << 20, keep);
        Ok(Embedded {
            model,
            frontend,
            options: options.clone(),
            trainable,
            temperature: training.map_or(1.0, |t| t.temperature),
            banned,
            training: training_state,
            lanes: Vec::new(),
            tower,
        })
    }

    pub fn max_positions(&self) -> usize {
        self.model.config.text.max_positions
    }

    pub fn gradients(&self) -> Option<&Gradients> {
        self.training.as_ref().map(|t| &t.gradients)
    }

    /// Features of some views, each computed once while the tower stays as it is.
    fn encode(&mut self, views: &[&Placed]) -> Result<Vec<Arc<Vec<f32>>>> {
        self.tower.features(&self.model, views)
    }

    /// Packs groups and gives every image its features.
    fn prepare(&mut self, groups: &[Group]) -> Result<Batch> {
        let mut batch = batch::pack(&self.model.config, groups)?;
        self.give_features(&mut batch)?;
        Ok(batch)
    }

    fn give_features(&mut self, batch: &mut Batch) -> Result<()> {
        let views: Vec<&Placed> = batch.images.iter().collect();
        let features = self.encode(&views)?;
        for (image, features) in batch.packed.images.iter_mut().zip(features) {
            image.features = Some(features);
        }
        Ok(())
    }

    /// Adds up what a run of groups says about the features of its images, to go through the tower once.
    fn note(&self, batch: &Batch, dfeatures: &[f32], on_features: &mut OnFeatures) {
        if !self.trainable.tower() || dfeatures.is_empty() {
            return;
        }
        let mut rest = dfeatures;
        for image in &batch.images {
            let values = image.grid.tokens(self.frontend.processor.merge) * self.model.config.text.hidden;
            let (mine, others) = rest.split_at(values);
            on_features.add(image, mine);
            rest = others;
        }
    }

    /// The tower's own backward pass, when all that was seen of its pictures is known.
    fn look_back(&mut self, on_features: OnFeatures) -> Result<()> {
        if self.trainable.tower() {
            let training = self.training.as_mut().context("the engine was opened for sampling only")?;
            self.tower.backward(&self.model, on_features, self.trainable, &mut training.gradients)?;
        }
        Ok(())
    }

    /// [`Sampler::sample`] of one conversation that is listened to: `heard` is told each token as soon as it is drawn.
    ///
    /// # Errors
    /// Those of sampling, and of `heard`, which ends it.
    pub fn sample_aloud(
        &mut self,
        prompt: &Prompt,
        sampling: &Sampling,
        heard: &mut dyn FnMut(u32) -> Result<()>,
    ) -> Result<Vec<Completion>> {
        let completions = self.generate(std::slice::from_ref(prompt), sampling, Some(heard))?;
        completions.into_iter().next().context("a prompt was not answered")
    }

    /// Continues conversations in their lanes, or deals them out to new ones. Where somebody listens, the lanes speak one after the other.
    fn generate(
        &mut self,
        prompts: &[Prompt],
        sampling: &Sampling,
        heard: Option<&mut dyn FnMut(u32) -> Result<()>>,
    ) -> Result<Vec<Vec<Completion>>> {
        // An error leaves no lane behind that holds half of a turn.
        let mut lanes = std::mem::take(&mut self.lanes);
        let lane_of = |lanes: &[Lane], p: &Prompt| lanes.iter().position(|lane| lane.rows_of(p.session).is_some());
        let going_on = prompts.iter().all(|p| p.seeds.len() == 1 && lane_of(&lanes, p).is_some());
        if !going_on {
            let first = Cache::new(&self.model);
            lanes = (1..self.model.lanes(prompts.len())).map(|_| Lane::new(first.beside())).collect();
            lanes.push(Lane::new(first));
        }
        let places: Vec<usize> = prompts
            .iter()
            .enumerate()
            .map(|(i, p)| lane_of(&lanes, p).unwrap_or(i * lanes.len() / prompts.len()))
            .collect();

        // The pictures of all are encoded together.
        let views: Vec<Vec<&Placed>> = prompts
            .iter()
            .zip(&places)
            .map(|(p, &place)| {
                let from = lanes[place].rows_of(p.session).unwrap_or(0);
                p.stream.images.iter().filter(|i| i.first >= from).collect()
            })
            .collect();
        let mut encoded = self.encode(&views.concat())?.into_iter();
        let mut work: Vec<(&mut Lane, Vec<Unread>, Vec<usize>)> =
            lanes.iter_mut().map(|lane| (lane, Vec::new(), Vec::new())).collect();
        for (i, (prompt, views)) in prompts.iter().zip(&views).enumerate() {
            let features = encoded.by_ref().take(views.len()).collect();
            work[places[i]].1.push(Unread { prompt, features });
            work[places[i]].2.push(i);
        }
        let voice = Voice { model: &self.model, chat: &self.frontend.chat, banned: &self.banned, sampling };
        let read_at_once = READ_AT_ONCE / work.len();
        let said: Vec<(Vec<usize>, Vec<Vec<Completion>>)> = match heard {
            Some(heard) => work
                .into_iter()
                .map(|(lane, unread, indices)| Ok((indices, lane.speak(&voice, &unread, read_at_once, heard)?)))
                .collect::<Result<_>>()?,
            None => work
                .into_par_iter()
                .map(|(lane, unread, indices)| {
                    Ok((indices, lane.speak(&voice, &unread, read_at_once, &mut |_| Ok(()))?))
                })
                .collect::<Result<_>>()?,
        };
        let mut completions: Vec<Vec<Completion>> = prompts.iter().map(|_| Vec::new()).collect();
        for (i, all) in said.into_iter().flat_map(|(indices, said)| indices.into_iter().zip(said)) {
            completions[i] = all;
        }
        self.lanes = lanes;
        Ok(completions)
    }

    /// Adds the gradient of written dialogues. `weigh` gives each trained token its weight; `look` may add a loss on the
    /// visual tokens of an example.
    pub fn accumulate_examples(
        &mut self,
        examples: &[Example],
        weigh: &mut dyn FnMut(usize, &Scores) -> Result<Weights>,
        hints: &Hints,
        look: &mut Look,
    ) -> Result<Hinted> {
        let mut hinted = 0.0;
        let said: Vec<Cell<f64>> = hints.early.iter().map(|_| Cell::new(0.0)).collect();
        let keep = self.options.keep();
        let groups: Vec<Group> = examples.iter().map(|e| e.stream.alone()).collect();
        // Pictures from files are seen as those of a rollout are; drawn ones come as patches, and come but once.
        let drawn = examples.iter().any(|e| !e.drawn.is_empty());
        let mut seen = OnFeatures::default();
        for run in batch::micro_batches(&groups, self.options.micro_batch_tokens) {
            let first = run.start;
            let mut batch = batch::pack(&self.model.config, &groups[run.clone()])?;
            match drawn {
                true => {
                    for patches in examples[run.clone()].iter().flat_map(|e| &e.drawn) {
                        batch.packed.patches.extend_from_slice(&patches.data);
                    }
                }
                false => self.give_features(&mut batch)?,
            }
            let spoken = batch.packed.targets.len();
            let mut base = 0;
            let mut early: Vec<Vec<Target>> = vec![Vec::new(); hints.early.len()];
            for i in run.clone() {
                let placed = |asked: &[(usize, u32)]| -> Vec<Target> {
                    asked.iter().map(|&(row, token)| Target { row: base + row, token }).collect()
                };
                batch.packed.targets.extend(placed(&hints.rows[i]));
                early.iter_mut().zip(&hints.early).for_each(|(all, hints)| all.extend(placed(&hints.rows[i])));
                base += examples[i].stream.len();
            }
            let head = Head { temperature: self.temperature, banned: &self.banned };
            let out = self.model.evaluate(&batch.packed, head, keep, self.trainable)?;
            let mut weights = Vec::with_capacity(out.logprobs.len());
            for (g, group) in batch.split(&out.logprobs, &out.entropies).iter().enumerate() {
                weights.extend(weigh(first + g, &group[0])?.logprobs);
            }
            hinted -= out.logprobs[spoken..].iter().map(|&l| f64::from(l)).sum::<f64>();
            weights.resize(out.logprobs.len(), -hints.weight);
            let tape = out.tape.context("the forward pass kept nothing for the backward pass")?;
            let training = self.training.as_mut().context("the engine was opened for sampling only")?;
            let Arena { layout, data } = self.model.weights.arena()?;
            let vocabulary = layout.text.embed.clone();
            let table = &data[vocabulary.clone()];
            let dtable = &mut training.gradients.data[vocabulary];
            let mut on_features = Vec::new();
            let mut asked = false;
            let mut rest = tape.features();
            for i in run {
                let grids: Vec<Grid> = examples[i].drawn.iter().map(|p| p.grid).collect();
                let tokens: usize = grids.iter().map(|g| g.tokens(self.frontend.processor.merge)).sum();
                let (mine, others) = rest.split_at(tokens * self.model.config.text.hidden);
                rest = others;
                match look(i, mine, &grids, table, dtable) {
                    Some(gradient) => {
                        asked = true;
                        on_features.extend(gradient);
                    }
                    None => on_features.resize(on_features.len() + mine.len(), 0.0),
                }
            }
            let early: Vec<Early> = early
                .iter()
                .zip(&hints.early)
                .zip(&said)
                .map(|((asked, hints), said)| Early { block: hints.block, asked, slope: -hints.weight, said })
                .collect();
            let dfeatures = self.model.backward(
                &batch.packed,
                tape,
                &Slopes {
                    logprobs: &weights,
                    entropies: None,
                    features: asked.then_some(on_features.as_slice()),
                    early: &early,
                },
                self.trainable,
                &mut training.gradients,
            )?;
            self.note(&batch, &dfeatures, &mut seen);
        }
        self.look_back(seen)?;
        Ok(Hinted { rows: hinted, early: said.iter().map(|said| -said.get()).collect() })
    }

    /// Swaps the trained weights with the kept first ones; called in pairs.
    fn swap_reference(&mut self) -> Result<()> {
        let training =
            self.training.as_mut().context("no reference weights: the engine was opened for sampling only")?;
        let reference = training.reference.as_mut().context("the run keeps no reference weights")?;
        let weights = &mut self.model.weights.arena_mut()?.data;
        for (range, kept) in reference {
            weights[range.clone()].swap_with_slice(kept);
        }
        Ok(())
    }

    fn score(&mut self, groups: &[Group]) -> Result<Vec<Vec<Scores>>> {
        let mut all = Vec::with_capacity(groups.len());
        for run in batch::micro_batches(groups, self.options.micro_batch_tokens) {
            let batch = self.prepare(&groups[run])?;
            let head = Head { temperature: self.temperature, banned: &self.banned };
            let out = self.model.evaluate(&batch.packed, head, Keep::Nothing, self.trainable)?;
            all.extend(batch.split(&out.logprobs, &out.entropies));
        }
        Ok(all)
    }
}

impl Sampler for Embedded {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        ensure!(sampling.max_new_tokens > 0, "rollout.max_new_tokens is 0; the policy could not say a word");
        self.generate(prompts, sampling, None)
    }

    fn end_step(&mut self) {
        self.lanes.clear();
    }

    fn about(&self) -> Option<String> {
        let Vlm { weights, .. } = &self.model;
        let millions = weights.layout().len as f64 / 1e6;
        let products = match self.options.compute {
            Compute::F32 => "",
            Compute::Bf16x6 => ", products in f32 by six of bf16",
            Compute::Bf16 => ", products in bf16",
        };
        Some(format!("{}: {millions:.1} M parameters, {}{products}", self.options.path.display(), weights.held()))
    }
}

impl Trainer for Embedded {
    fn frontend(&self) -> Frontend {
        self.frontend.clone()
    }

    fn samples_exactly(&self) -> bool {
        true
    }

    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>> {
        if who == Who::Policy {
            return self.score(groups);
        }
        self.swap_reference()?;
        // What a trained tower has seen belongs to the policy, not to the reference.
        let own = self.trainable.tower().then(|| {
            let aside = self.tower.aside();
            std::mem::replace(&mut self.tower, aside)
        });
        let scores = self.score(groups);
        if let Some(own) = own {
            self.tower = own;
        }
        self.swap_reference()?;
        scores
    }

    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()> {
        let keep = self.options.keep();
        let mut on_features = OnFeatures::default();
        for run in batch::micro_batches(groups, self.options.micro_batch_tokens) {
            let first = run.start;
            let batch = self.prepare(&groups[run])?;
            let head = Head { temperature: self.temperature, banned: &self.banned };
            let out = self.model.evaluate(&batch.packed, head, keep, self.trainable)?;
            let (weights, entropy_weights) = batch.weigh(&out.logprobs, &out.entropies, first, weigh)?;
            // A step without any signal needs no backward pass.
            if weights.iter().chain(&entropy_weights).all(|w| *w == 0.0) {
                continue;
            }
            let training = self.training.as_mut().context("the engine was opened for sampling only")?;
            let tape = out.tape.context("the forward pass kept nothing for the backward pass")?;
            let entropies = (!entropy_weights.is_empty()).then_some(entropy_weights.as_slice());
            let slopes = Slopes { logprobs: &weights, entropies, ..Slopes::default() };
            let gradients = &mut training.gradients;
            let dfeatures = self.model.backward(&batch.packed, tape, &slopes, self.trainable, gradients)?;
            self.note(&batch, &dfeatures, &mut on_features);
        }
        self.look_back(on_features)
    }

    fn step(&mut self, learning_rate: f64) -> Result<f64> {
        let training = self.training.as_mut().context("the engine was opened for sampling only")?;
        let Learning { optimizer, gradients, optim, trained, .. } = training;
        let stepped =
            optimizer.step(&mut self.model.weights.arena_mut()?.data, &gradients.data, optim, learning_rate)?;
        ensure!(
            stepped.applied,
            "the gradient is not finite ({}); the weights were left as they are. Lower optim.lr, or resume from the last checkpoint",
            stepped.grad_norm
        );
        // The others are never read.
        trained.iter().for_each(|trained| gradients.data[trained.range.clone()].fill(0.0));
        self.end_step();
        self.forget_views();
        Ok(stepped.grad_norm)
    }

    fn updates(&self) -> u64 {
        self.training.as_ref().map_or(0, |t| t.optimizer.steps())
    }

    /// A frozen tower remembers from step to step.
    fn forget_views(&mut self) {
        if self.trainable.tower() {
            self.tower.forget();
        }
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        self.export(dir)?;
        if let Some(training) = &self.training {
            training.optimizer.save(&dir.join(OPTIMIZER))?;
        }
        Ok(())
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        let layout = self.model.weights.layout().clone();
        match layout.has_adapters() {
            true => lora::read_into(&mut self.model, dir)?,
            false => self.model.weights = crate::model::load_weights(dir, &layout)?.into(),
        }
        if let Some(training) = &mut self.training {
            training.optimizer = AdamW::load(training.trained.clone(), &dir.join(OPTIMIZER))?;
        }
        self.end_step();
        self.tower.forget();
        Ok(())
    }

    fn export(&self, dir: &Path) -> Result<()> {
        // Always exact: a run that goes on from here must go on bit for bit. `model export` writes bf16.
        match self.model.weights.layout().has_adapters() {
            true => lora::save(&self.model, dir, &self.options.path),
            false => self.model.save(dir, Dtype::F32, Some(&lora::base_or(&self.options.path)?)),
        }
    }
}

impl Stream {
    /// The streams of a group that has one member.
    pub fn alone(&self) -> Group<'_> {
        vec![self]
    }
}
