//! The engine itself: what the loop asks of a [`Trainer`], on a [`Net`].

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use tch::{Cuda, Device, Kind, Tensor};

use super::net::{Head, Net, to_vec};
use super::speech::{Talk, Unread, Voice};
use super::{Options, guarded, no_grad};
use crate::batch::{self, Batch};
use crate::config::BadConfig;
use crate::engine::embedded::tower::{FEATURE_VALUES, ViewKey, key, patches, runs};
use crate::engine::embedded::{self, OPTIMIZER};
use crate::engine::{
    Completion, Frontend, Group, ModelOptions, Prompt, Sampler, Sampling, Scores, Trainer, Training, Weights, Who,
};
use crate::episode::Placed;
use crate::model::layout::Entry;
use crate::model::weights::{Outgoing, save_outgoing};
use crate::model::{Compute, Dtype, Trainable, Vlm, checkpoint, lora};
use crate::optim::{AdamW, Optim, Trained, clip_scale};
use crate::progress::say;

struct Learning {
    optim: Optim,
    /// First and second moments of each trained tensor.
    moments: Vec<[Tensor; 2]>,
    updates: u64,
    /// An update broke off half way.
    torn: bool,
    /// What products took of each trained tensor at the start.
    reference: Option<Vec<Tensor>>,
}

pub struct Torch {
    net: Net,
    frontend: Frontend,
    options: ModelOptions,
    trainable: Trainable,
    temperature: f32,
    /// Ids that cannot be drawn.
    banned: Tensor,
    training: Option<Learning>,
    /// Features of views under the weights as they are, `[tokens, D]`.
    features: HashMap<ViewKey, Tensor>,
    /// None where all of its members have gone on in another.
    talks: Vec<Option<Talk>>,
    /// Which talk a conversation stands in, and where.
    sessions: HashMap<u64, (usize, usize)>,
}

impl Torch {
    /// Opens a checkpoint for sampling, and for training if `training` says how.
    ///
    /// # Errors
    /// A device that is not there; as for the embedded engine otherwise.
    pub fn open(engine: &Options, options: &ModelOptions, training: Option<&Training>) -> Result<Torch> {
        let device = device(engine)?;
        // Its threads and ours take turns.
        tch::set_num_threads(rayon::current_num_threads() as i32);
        let frontend = Frontend::load(&options.path, options.picture_cache_mib)?;
        let model = match (training, &options.lora) {
            (Some(training), Some(lora)) => {
                lora::open(&options.path, lora, options.trainable()?, training.seed, options.weights)?
            }
            _ => Vlm::open(&options.path, options.weights)?,
        };
        if training.is_some() && options.lora.is_none() && lora::is_adapter(&options.path) {
            say(embedded::MERGED);
        }
        let trainable = options.trainable_of(model.weights.layout())?;
        let kind = match options.compute {
            Compute::F32 => Kind::Float,
            Compute::Bf16 => Kind::BFloat16,
            Compute::Bf16x6 => bail!(BadConfig(
                "model.compute = \"bf16x6\" is a way of the embedded engine; LibTorch computes in f32 or bf16".into()
            )),
        };
        let net = guarded("putting the model on the device", || {
            Ok(Net::new(&model, device, kind, training.is_some().then_some(trainable)))
        })?;
        let banned = frontend.banned(net.config.text.vocab, training);
        let banned: Vec<i64> = banned.into_iter().map(i64::from).collect();
        let learning = |training: &Training| {
            training.optim.validate()?;
            let zeros = |i: usize| [(); 2].map(|()| net.own(i).detach().zeros_like());
            guarded("making room for the optimiser", || {
                Ok(Learning {
                    optim: training.optim.clone(),
                    moments: net.trained().map(zeros).collect(),
                    updates: 0,
                    torn: false,
                    reference: training.reference.then(|| net.trained().map(|i| net.used(i).copy()).collect()),
                })
            })
        };
        let training_state = training.map(learning).transpose()?;
        Ok(Torch {
            banned: Tensor::from_slice(&banned).to_device(device),
            net,
            frontend,
            options: options.clone(),
            trainable,
            temperature: training.map_or(1.0, |t| t.temperature),
            training: training_state,
            features: HashMap::new(),
            talks: Vec::new(),
            sessions: HashMap::new(),
        })
    }

    /// The gradient of a tensor, as far as it has one; for tests.
    pub fn gradient(&self, name: &str) -> Option<Vec<f32>> {
        let i = self.net.layout.entries.iter().position(|entry| entry.name == name)?;
        let gradient = self.net.own(i).grad();
        gradient.defined().then(|| to_vec(&gradient))
    }

    /// Computes the features of views that are not known yet.
    fn see(&mut self, views: &[&Placed]) -> Result<()> {
        let held: usize = self.features.values().map(Tensor::numel).sum();
        if held > FEATURE_VALUES && views.iter().any(|v| !self.features.contains_key(&key(v))) {
            // Simple and rare: start over with what is wanted now.
            self.features.clear();
        }
        let mut asked = HashSet::new();
        let is_new = |v: &&&Placed| !self.features.contains_key(&key(v)) && asked.insert(key(v));
        let missing: Vec<Placed> = views.iter().filter(is_new).map(|v| (*v).clone()).collect();
        for views in runs(missing) {
            let (patches, grids) = patches(&self.frontend.pictures, &self.frontend.processor, &views)?;
            let features = no_grad(|| self.net.look(&patches, &grids, false));
            let mut at = 0;
            for (view, grid) in views.iter().zip(&grids) {
                let n = grid.tokens(self.frontend.processor.merge) as i64;
                self.features.insert(key(view), features.narrow(0, at, n).copy());
                at += n;
            }
        }
        Ok(())
    }

    /// Features of views that were seen, one after the other; none of no views.
    fn features(&self, views: &[&Placed]) -> Result<Option<Tensor>> {
        let all: Vec<&Tensor> = views
            .iter()
            .map(|v| self.features.get(&key(v)).context("a view was encoded and is not there"))
            .collect::<Result<_>>()?;
        Ok((!all.is_empty()).then(|| Tensor::cat(&all, 0)))
    }

    fn prepare(&mut self, groups: &[Group]) -> Result<(Batch, Option<Tensor>, Vec<i64>)> {
        let batch = batch::pack(&self.net.config, groups)?;
        let views: Vec<&Placed> = batch.images.iter().collect();
        self.see(&views)?;
        let features = self.features(&views)?;
        let tokens = batch.packed.targets.iter().map(|t| i64::from(t.token)).collect();
        Ok((batch, features, tokens))
    }

    fn head(&self) -> Head<'_> {
        Head { temperature: self.temperature, banned: &self.banned }
    }

    fn score(&mut self, groups: &[Group]) -> Result<Vec<Vec<Scores>>> {
        let mut all = Vec::with_capacity(groups.len());
        for run in batch::micro_batches(groups, self.options.micro_batch_tokens) {
            let (batch, features, tokens) = self.prepare(&groups[run])?;
            let pass = no_grad(|| self.net.run(&batch.packed, features.as_ref(), false, false));
            let (logprobs, entropies) = self.net.score(&pass, &tokens, &self.head());
            all.extend(batch.split(&logprobs, &entropies));
        }
        Ok(all)
    }

    /// Swaps what products take with what they took at the start; called in pairs.
    fn swap_reference(&mut self) -> Result<()> {
        let training =
            self.training.as_mut().context("no reference weights: the engine was opened for sampling only")?;
        let reference = training.reference.as_mut().context("the run keeps no reference weights")?;
        let trained: Vec<usize> = self.net.trained().collect();
        for (i, kept) in trained.into_iter().zip(reference) {
            *kept = self.net.use_instead(i, kept.shallow_clone());
        }
        Ok(())
    }

    fn accumulate_here(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()> {
        ensure!(self.training.is_some(), "the engine was opened for sampling only");
        let mut order: Vec<Placed> = Vec::new();
        let mut on_features: HashMap<ViewKey, Tensor> = HashMap::new();
        for run in batch::micro_batches(groups, self.options.micro_batch_tokens) {
            let first = run.start;
            let (batch, features, tokens) = self.prepare(&groups[run])?;
            let features = features.map(|features| features.set_requires_grad(self.trainable.tower()));
            let pass = self.net.run(&batch.packed, features.as_ref(), true, self.options.recompute);
            let (logprobs, entropies) = self.net.score(&pass, &tokens, &self.head());
            let (weights, entropy_weights) = batch.weigh(&logprobs, &entropies, first, weigh)?;
            // A step without any signal needs no backward pass.
            if weights.iter().chain(&entropy_weights).all(|w| *w == 0.0) {
                continue;
            }
            self.net.backward(pass, &tokens, &self.head(), &weights, &entropy_weights);
            let Some(slope) = features.map(|features| features.grad()).filter(Tensor::defined) else { continue };
            let mut at = 0;
            for view in &batch.images {
                let n = view.grid.tokens(self.frontend.processor.merge) as i64;
                let mine = slope.narrow(0, at, n);
                at += n;
                match on_features.get_mut(&key(view)) {
                    Some(sum) => *sum += mine,
                    None => {
                        order.push(view.clone());
                        on_features.insert(key(view), mine.copy());
                    }
                }
            }
        }
        for views in runs(order) {
            let (patches, grids) = patches(&self.frontend.pictures, &self.frontend.processor, &views)?;
            let slopes: Vec<&Tensor> = views.iter().filter_map(|view| on_features.get(&key(view))).collect();
            self.net.look_back(&patches, &grids, &Tensor::cat(&slopes, 0), self.options.recompute);
        }
        Ok(())
    }

    fn step_here(&mut self, learning_rate: f64) -> Result<f64> {
        let trained: Vec<usize> = self.net.trained().collect();
        let Learning { optim, moments, updates, torn, .. } =
            self.training.as_mut().context("the engine was opened for sampling only")?;
        let norms: Vec<Tensor> = trained
            .iter()
            .map(|&i| self.net.own(i).grad())
            .filter(Tensor::defined)
            .map(|gradient| gradient.norm().to_kind(Kind::Double))
            .collect();
        let norm = if norms.is_empty() { 0.0 } else { Tensor::stack(&norms, 0).norm().double_value(&[]) };
        ensure!(
            norm.is_finite(),
            "the gradient is not finite ({norm}); the weights were left as they are. Lower optim.lr, or resume from the last checkpoint"
        );
        let scale = clip_scale(norm, optim.clip_norm);
        *updates += 1;
        *torn = true;
        let correction = |beta: f64| 1.0 - beta.powi(*updates as i32);
        let (size, root) = (learning_rate / correction(optim.beta1), correction(optim.beta2).sqrt());
        for (&i, [m, v]) in trained.iter().zip(moments) {
            let decay = if self.net.layout.entries[i].shape.len() > 1 { optim.weight_decay } else { 0.0 };
            self.net.write(i, |own| {
                let mut gradient = own.grad();
                if !gradient.defined() {
                    // Nothing asked for it: its gradient is 0, and its moments go on.
                    gradient = own.zeros_like();
                }
                let _ = gradient.g_mul_scalar_(scale);
                // AdamW (arXiv 1711.05101), as kernels/adamw.rs has it.
                let _ = own.g_mul_scalar_(1.0 - learning_rate * decay);
                let _ = m.lerp_(&gradient, 1.0 - optim.beta1);
                let _ = v.g_mul_scalar_(optim.beta2);
                let _ = v.addcmul_(&(&gradient * (1.0 - optim.beta2)), &gradient);
                // In the gradient's own place: a large table has no room for many of its size.
                gradient.copy_(v);
                let _ = gradient.sqrt_().g_div_scalar_(root).g_add_scalar_(optim.eps).reciprocal_();
                let _ = own.g_sub_(&(gradient.g_mul_(m).g_mul_scalar_(size)));
                let _ = gradient.zero_();
            });
        }
        *torn = false;
        if let Device::Cuda(n) = self.net.device {
            // What it has still to do would be taken for another's time.
            Cuda::synchronize(n as i64);
        }
        self.end_step();
        self.forget_views();
        Ok(norm)
    }

    fn save_here(&self, dir: &Path) -> Result<()> {
        ensure!(
            !self.training.as_ref().is_some_and(|training| training.torn),
            "an update broke off half way, so the weights are between two steps and are not written; resume from the last checkpoint"
        );
        self.export_here(dir)?;
        let Some(training) = &self.training else { return Ok(()) };
        let all = |k: usize| training.moments.iter().flat_map(|both| to_vec(&both[k])).collect();
        AdamW::of(self.trained_ranges(), all(0), all(1), training.updates)?.save(&dir.join(OPTIMIZER))
    }

    fn load_here(&mut self, dir: &Path) -> Result<()> {
        let layout = self.net.layout.clone();
        let state = match &self.training {
            Some(_) => Some(AdamW::load(self.trained_ranges(), &dir.join(OPTIMIZER))?),
            None => None,
        };
        let write = |net: &mut Net, i: usize, values: &[f32]| {
            net.write(i, |own| own.copy_(&Tensor::from_slice(values).view_as(own)));
        };
        if layout.has_adapters() {
            for (range, values) in lora::adapters(dir, &self.net.config, &layout)? {
                let i = self.net.place(&range);
                write(&mut self.net, i, &values);
            }
        } else {
            let weights = checkpoint::load_weights(dir, &layout)?;
            for (i, entry) in layout.entries.iter().enumerate() {
                write(&mut self.net, i, &weights.data[entry.range.clone()]);
            }
        }
        if let (Some(training), Some(state)) = (&mut self.training, state) {
            let (m, v) = state.moments();
            let mut at = 0;
            for both in &mut training.moments {
                let n = both[0].numel();
                for (moment, values) in both.iter_mut().zip([m, v]) {
                    moment.copy_(&Tensor::from_slice(&values[at..at + n]).view_as(moment));
                }
                at += n;
            }
            training.updates = state.steps();
        }
        self.end_step();
        self.features.clear();
        Ok(())
    }

    fn export_here(&self, dir: &Path) -> Result<()> {
        let Net { config, layout, .. } = &self.net;
        let values = |entry: &Entry| to_vec(self.net.own(self.net.place(&entry.range))).into();
        let model = Outgoing { config, layout, values: &values };
        match layout.has_adapters() {
            true => lora::save_outgoing(&model, dir, &self.options.path),
            false => save_outgoing(&model, dir, Dtype::F32, Some(&lora::base_or(&self.options.path)?)),
        }
    }

    fn trained_ranges(&self) -> Vec<Trained> {
        Trained::of(&self.net.layout, self.trainable)
    }
}

/// Has LibTorch know of CUDA: it does by having that library loaded, which a linker leaves out where it sees nothing of it used.
fn load_cuda() -> bool {
    // SAFETY: the name ends with a zero, and what the library does when it is loaded is what every program that links it has done.
    let loaded = unsafe { libc::dlopen(c"libtorch_cuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    !loaded.is_null()
}

/// The devices that there are.
pub fn devices() -> Vec<String> {
    let cuda = if load_cuda() { Cuda::device_count() } else { 0 };
    std::iter::once("cpu".to_owned()).chain((0..cuda).map(|n| format!("cuda:{n}"))).collect()
}

/// The device that the options name.
///
/// # Errors
/// It is none, or not there.
fn device(engine: &Options) -> Result<Device> {
    let Some(n) = engine.device()? else { return Ok(Device::Cpu) };
    ensure!(
        load_cuda(),
        BadConfig(format!(
            "engine.device = {:?}: libtorch_cuda.so is not found beside LibTorch; take a LibTorch with CUDA and have LD_LIBRARY_PATH name its lib folder",
            engine.device
        ))
    );
    let device = Device::Cuda(n);
    guarded(&format!("using engine.device = {:?}", engine.device), || {
        drop(Tensor::zeros([1], (Kind::Float, device)));
        Ok(())
    })?;
    Ok(device)
}

impl Sampler for Torch {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        ensure!(sampling.max_new_tokens > 0, "rollout.max_new_tokens is 0; the policy could not say a word");
        guarded("sampling", || {
            let known = |p: &Prompt| {
                let place = self.sessions.get(&p.session).copied().filter(|_| p.seeds.len() == 1)?;
                let rows = self.talks[place.0].as_ref()?.rows(place.1);
                (rows < p.stream.len()).then_some((place, rows))
            };
            let places: Vec<_> = prompts.iter().map(known).collect();
            let views_of = |(prompt, place): (&Prompt, &Option<(_, usize)>)| -> Vec<Placed> {
                let read = place.as_ref().map_or(0, |(_, rows)| *rows);
                prompt.stream.images.iter().filter(|image| image.first >= read).cloned().collect()
            };
            let views: Vec<Vec<Placed>> = prompts.iter().zip(&places).map(views_of).collect();
            self.see(&views.iter().flatten().collect::<Vec<_>>())?;
            let features = views.iter().map(|views| self.features(&views.iter().collect::<Vec<_>>()));
            let mut seen: Vec<Option<Tensor>> = features.collect::<Result<_>>()?;
            let (chat, net) = (&self.frontend.chat, &self.net);
            let read_at_once = self.options.micro_batch_tokens;
            let voice = Voice { net, chat, banned: &self.banned, sampling, read_at_once };
            // Those that go on from the same talk go on together, and so do those that begin.
            let mut runs: Vec<(Option<usize>, Vec<usize>)> = Vec::new();
            let length = |i: usize| prompts[i].stream.len();
            for (i, place) in places.iter().enumerate() {
                let talk = place.map(|((talk, _), _)| talk);
                // A talk's prompts stand in tensors as long as the longest: prompts of other lengths begin one of their own.
                let alike =
                    |other: usize| talk.is_some() || length(i).max(length(other)) <= 2 * length(i).min(length(other));
                match runs.iter_mut().find(|(of, members)| *of == talk && alike(members[0])) {
                    Some((_, prompts)) => prompts.push(i),
                    None => runs.push((talk, vec![i])),
                }
            }
            let mut said: Vec<Vec<Completion>> = vec![Vec::new(); prompts.len()];
            for (of, chosen) in runs {
                let unread: Vec<Unread> =
                    chosen.iter().map(|&i| Unread { prompt: &prompts[i], features: seen[i].take() }).collect();
                let (talk, completions) = match of {
                    None => Talk::begin(&voice, &unread)?,
                    Some(talk) => {
                        let members = chosen.iter().filter_map(|&i| places[i]).map(|((_, member), _)| member);
                        let talk = self.talks[talk].as_ref().context("a conversation's talk is not there")?;
                        talk.go_on(&voice, &unread, &members.collect::<Vec<_>>())?
                    }
                };
                let mut member = 0;
                for (&i, completions) in chosen.iter().zip(completions) {
                    for k in 0..completions.len() {
                        self.sessions.insert(prompts[i].session + k as u64, (self.talks.len(), member));
                        member += 1;
                    }
                    said[i] = completions;
                }
                self.talks.push(Some(talk));
            }
            for i in 0..self.talks.len() {
                if !self.sessions.values().any(|(talk, _)| *talk == i) {
                    self.talks[i] = None;
                }
            }
            Ok(said)
        })
    }

    fn end_step(&mut self) {
        self.talks.clear();
        self.sessions.clear();
    }

    fn about(&self) -> Option<String> {
        let millions = self.net.layout.len as f64 / 1e6;
        let kind = match self.options.compute {
            Compute::F32 | Compute::Bf16x6 => "f32",
            Compute::Bf16 => "bf16",
        };
        let place = match self.net.device {
            Device::Cuda(n) => format!("cuda:{n}"),
            _ => "the CPU".into(),
        };
        Some(format!("{}: {millions:.1} M parameters in {kind}, LibTorch on {place}", self.options.path.display()))
    }
}

impl Trainer for Torch {
    fn frontend(&self) -> Frontend {
        self.frontend.clone()
    }

    /// Products of few rows and of many add up in other orders.
    fn samples_exactly(&self) -> bool {
        false
    }

    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>> {
        let doing = "computing log-probs";
        if who == Who::Policy {
            return guarded(doing, || self.score(groups));
        }
        self.swap_reference()?;
        // What a trained tower has seen belongs to the policy, not to the reference.
        let own = self.trainable.tower().then(|| std::mem::take(&mut self.features));
        let scores = guarded(doing, || self.score(groups));
        if let Some(own) = own {
            self.features = own;
        }
        self.swap_reference()?;
        scores
    }

    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()> {
        guarded("computing gradients", || self.accumulate_here(groups, weigh))
    }

    fn step(&mut self, learning_rate: f64) -> Result<f64> {
        guarded("updating the weights", || self.step_here(learning_rate))
    }

    fn updates(&self) -> u64 {
        self.training.as_ref().map_or(0, |training| training.updates)
    }

    /// A frozen tower remembers from step to step.
    fn forget_views(&mut self) {
        if self.trainable.tower() {
            self.features.clear();
        }
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        guarded("writing a checkpoint", || self.save_here(dir))
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        guarded("reading a checkpoint", || self.load_here(dir))
    }

    fn export(&self, dir: &Path) -> Result<()> {
        guarded("writing the model", || self.export_here(dir))
    }
}
