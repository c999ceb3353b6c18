//! What the loop needs of a model, as two traits: a [`Sampler`] continues conversations, a [`Trainer`] also learns.
//!
//! They are cut along the operations that distributed engines offer over the wire (sample; forward and backward with one
//! weight per token; optimiser step; save; load), so that the same loop runs on this machine and on a cluster. A trainer
//! never sees an objective: it is asked for log-probs and is handed back one weight per token.

pub mod embedded;
pub mod openai;
mod options;
mod pngs;
pub mod recorded;
mod remote;
pub mod tinker;
pub mod torch;
pub mod vllm;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::chat::{Chat, Convention};
use crate::config::BadConfig;
use crate::episode::Stream;
use crate::image::{PictureCache, Processor};
use crate::model::Compute;
use crate::optim::Optim;

pub use self::options::{ComputeName, ModelOptions};

/// `[engine]` of a config: who holds the weights. `kind` says which; without the section it is `embedded`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Options {
    /// This program, on this machine; its settings stand in `[model]`.
    Embedded {},
    /// This program through LibTorch, on a GPU or the CPU; its settings stand in `[model]`.
    Torch(torch::Options),
    /// A server that speaks the Tinker API.
    Tinker(tinker::Options),
    /// A server of chat completions, which samples and does not train.
    Openai(openai::Options),
    /// Servers that sample in token ids, with what is trained here.
    Vllm(vllm::Options),
}

impl Default for Options {
    fn default() -> Options {
        Options::Embedded {}
    }
}

impl Options {
    /// LibTorch on a device that the command line names, or this program's own kernels.
    pub fn on_device(device: Option<&str>) -> Options {
        match device {
            Some(device) => Options::Torch(torch::Options { device: device.to_owned() }),
            None => Options::Embedded {},
        }
    }

    pub fn is_embedded(&self) -> bool {
        matches!(self, Options::Embedded {})
    }

    /// Whether this program's own kernels compute: then the memory of a run can be reckoned.
    pub fn has_own_kernels(&self) -> bool {
        match self {
            Options::Embedded {} => true,
            Options::Vllm(options) => options.device.is_none(),
            Options::Torch(_) | Options::Tinker(_) | Options::Openai(_) => false,
        }
    }

    /// Whether the weights that are trained are this program's.
    pub fn trains_here(&self) -> bool {
        matches!(self, Options::Embedded {} | Options::Torch(_) | Options::Vllm(_))
    }

    /// # Errors
    /// What this engine cannot do of what the rest of the config asks: `freeze` and `lora` of the model, the `temperature` that is trained at,
    /// and the entropy bonus.
    pub fn validate(&self, model: &ModelOptions, temperature: f32, entropy_coef: f64) -> Result<()> {
        if !self.trains_here() && model.compute != Compute::F32 {
            bail!(BadConfig(
                "model.compute is for engines that compute here; a server decides itself how it computes".into()
            ));
        }
        match self {
            Options::Embedded {} => Ok(()),
            Options::Torch(_) if model.compute == Compute::Bf16x6 => bail!(BadConfig(
                "model.compute = \"bf16x6\" is a way of the embedded engine; LibTorch computes in f32 or bf16".into()
            )),
            Options::Torch(options) => options.validate(),
            Options::Openai(options) => options.validate(),
            Options::Vllm(options) => options.validate(),
            Options::Tinker(options) => options.validate_for(model, temperature, entropy_coef),
        }
    }

    /// # Errors
    /// An engine that samples and does not train, or not as the rest of the config asks.
    pub fn ensure_trains(&self, model: &ModelOptions, temperature: f32) -> Result<()> {
        match self {
            Options::Embedded {} | Options::Torch(_) | Options::Tinker(_) => Ok(()),
            Options::Vllm(options) => {
                options.validate_training(model)?;
                if temperature != 1.0 {
                    bail!(BadConfig(format!(
                        "rollout.temperature = {temperature}: the servers tell log-probs at temperature 1, so training with them samples at 1"
                    )));
                }
                Ok(())
            }
            Options::Openai(_) => Err(only_samples()),
        }
    }
}

fn only_samples() -> anyhow::Error {
    BadConfig(
                "engine.kind = \"openai\" samples and does not train: a chat server tells neither tokens nor their log-probs; it is for eval, \
                 rollout and ask. Train with the embedded engine or kind = \"tinker\""
                    .into(),
    )
    .into()
}

/// What training needs beyond sampling.
#[derive(Clone, Debug)]
pub struct Training {
    pub optim: Optim,
    /// The temperature that episodes are sampled at.
    pub temperature: f32,
    /// Every id has its share of the probability, as in fine-tuning; else those that cannot be sampled (vision tokens) have none.
    pub all_ids: bool,
    /// Keep the first weights for a KL term.
    pub reference: bool,
    /// Whether conversations show pictures: a server that would drop them is refused.
    pub pictures: bool,
    /// Draws what an engine has to draw before the first update: the adapters of LoRA.
    pub seed: u64,
}

/// Opens the engine that a config names, for training. With `resumes` a checkpoint is going to be loaded, so an engine that would have to
/// make weights for it waits.
///
/// # Errors
/// A model, a server or options that cannot do what is asked.
pub fn open(engine: &Options, model: &ModelOptions, training: &Training, resumes: bool) -> Result<Box<dyn Trainer>> {
    Ok(match engine {
        Options::Openai(_) => return Err(only_samples()),
        Options::Embedded {} => Box::new(embedded::Embedded::open(model, Some(training))?),
        Options::Torch(options) => open_torch(options, model, Some(training))?,
        Options::Vllm(options) => {
            let mut engine = vllm::Fleet::open(options, model, Some(training))?;
            if !resumes {
                engine.publish()?;
            }
            Box::new(engine)
        }
        Options::Tinker(options) => {
            let mut engine = tinker::Tinker::open(options, model, Some(training), training.pictures)?;
            if !resumes {
                engine.prepare()?;
            }
            Box::new(engine)
        }
    })
}

fn open_torch(options: &torch::Options, model: &ModelOptions, training: Option<&Training>) -> Result<Box<dyn Trainer>> {
    options.validate()?;
    #[cfg(feature = "torch")]
    return Ok(Box::new(torch::Torch::open(options, model, training)?));
    #[cfg(not(feature = "torch"))]
    unreachable!("without LibTorch no option is valid: {model:?} {training:?}")
}

/// Opens the engine that a config names, for sampling alone. `pictures`: as in [`Training`].
///
/// # Errors
/// As [`open`].
pub fn open_sampler(engine: &Options, model: &ModelOptions, pictures: bool) -> Result<(Box<dyn Sampler>, Frontend)> {
    Ok(match engine {
        Options::Embedded {} => {
            let engine = embedded::Embedded::open(model, None)?;
            let frontend = engine.frontend.clone();
            (Box::new(engine), frontend)
        }
        Options::Torch(options) => {
            let engine = open_torch(options, model, None)?;
            let frontend = engine.frontend();
            (engine, frontend)
        }
        Options::Tinker(options) => {
            let mut engine = tinker::Tinker::open(options, model, None, pictures)?;
            engine.prepare()?;
            let frontend = engine.frontend();
            (Box::new(engine), frontend)
        }
        Options::Openai(options) => {
            let frontend = Frontend::load(&model.path, model.picture_cache_mib)?;
            (Box::new(openai::Served::open(options, frontend.clone())?), frontend)
        }
        Options::Vllm(options) => {
            let engine = vllm::Fleet::open(options, model, None)?;
            let frontend = engine.frontend();
            (Box::new(engine), frontend)
        }
    })
}

/// What stands before a model, on this machine whoever holds the weights: words to tokens and back, pictures to patches, and what
/// the model's coordinates mean.
#[derive(Clone)]
pub struct Frontend {
    pub chat: Arc<Chat>,
    pub pictures: Arc<PictureCache>,
    pub processor: Arc<Processor>,
    pub convention: Convention,
}

impl Frontend {
    /// From the folder of a checkpoint, which need not hold weights; decoded pictures are kept up to `picture_cache_mib`.
    ///
    /// # Errors
    /// A tokenizer, template or picture settings that are missing or not to be read.
    pub fn load(dir: &Path, picture_cache_mib: u64) -> Result<Frontend> {
        Ok(Frontend {
            chat: Arc::new(Chat::load(dir)?),
            pictures: Arc::new(PictureCache::new(picture_cache_mib << 20)),
            processor: Arc::new(Processor::load(dir)?),
            convention: Convention::of("qwen2_5_vl")?,
        })
    }

    /// Ids that have no share of the probability: those that cannot be sampled, or none ([`Training::all_ids`]).
    fn banned(&self, vocab: usize, training: Option<&Training>) -> Vec<u32> {
        match training.is_some_and(|training| training.all_ids) {
            true => Vec::new(),
            false => self.chat.banned(vocab),
        }
    }
}

/// A conversation to be continued `seeds.len()` times.
pub struct Prompt<'a> {
    /// Names the conversation, so that an engine may keep its cache from turn to turn. Unique within a step.
    pub session: u64,
    pub stream: &'a Stream,
    /// One independent continuation per seed; continuation i is remembered as session + i.
    pub seeds: &'a [u64],
}

/// How to sample. Training never truncates the distribution; `top_k` and `top_p` are for evaluation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 means greedy.
    pub temperature: f32,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub max_new_tokens: usize,
    /// The policy's turn also ends where one of these texts is complete (its tokens are kept and trained).
    pub stop: Vec<String>,
    /// Go on after an end of turn, so that exactly `max_new_tokens` are sampled; for benchmarks.
    pub ignore_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// An end-of-turn token was sampled; it is the last of `ids`.
    EndOfTurn,
    /// A stop text was completed; no end-of-turn token was sampled.
    StopText,
    /// The limit of new tokens was reached.
    Length,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "recorded::Line")]
pub struct Completion {
    pub ids: Vec<u32>,
    /// Of each id, under the distribution it was drawn from. NaN where the engine does not tell them; then nothing can be trained.
    #[serde(serialize_with = "recorded::numbers_or_null")]
    pub logprobs: Vec<f32>,
    pub finish: Finish,
}

impl Completion {
    /// Before the first token.
    fn empty() -> Completion {
        Completion { ids: vec![], logprobs: vec![], finish: Finish::Length }
    }

    /// Takes a token that was drawn, and says whether it ends the turn.
    fn hear(&mut self, id: u32, logprob: f32, chat: &Chat, sampling: &Sampling) -> Result<bool> {
        self.ids.push(id);
        self.logprobs.push(logprob);
        if chat.special.stops.contains(&id) && !sampling.ignore_end {
            self.finish = Finish::EndOfTurn;
        } else if completes(chat, &self.ids, &sampling.stop)? {
            self.finish = Finish::StopText;
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}

/// Per sampled token of one stream, in order of appearance.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    pub logprobs: Vec<f32>,
    /// Empty where the engine does not tell them.
    pub entropies: Vec<f32>,
}

/// What an objective hands back: the derivative of the loss by each log-prob, and the weight of each token's entropy.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    pub logprobs: Vec<f32>,
    pub entropies: Option<Vec<f32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Policy,
    /// The weights that training began with.
    Reference,
}

pub trait Sampler {
    /// One list per prompt, one completion per seed, in order.
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>>;
    /// Drops what was kept for the conversations of a step.
    fn end_step(&mut self);
    /// The model as a person reads it, and where its weights are, if these are here.
    fn about(&self) -> Option<String> {
        None
    }
}

/// Streams with a common prompt; the engine may share its work on it.
pub type Group<'a> = Vec<&'a Stream>;

pub trait Trainer: Sampler {
    fn frontend(&self) -> Frontend;
    /// Whether the log-probs of sampling are those of training, to the last bit. Where a server samples with other kernels than it
    /// trains with, they are not: then ratios start from the trainer's own, and the difference is measured.
    fn samples_exactly(&self) -> bool;
    /// Log-probs of every sampled token, without gradients.
    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>>;
    /// Runs the policy over the groups and adds the gradient of the weighted sum of log-probs (and entropies).
    /// `weigh(group, member, scores)` is asked once for each stream, between forward and backward.
    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()>;
    /// Clips, updates, forgets the gradient. Returns the norm of the gradient before clipping; NaN where the engine does not tell it.
    fn step(&mut self, learning_rate: f64) -> Result<f64>;
    /// Updates so far, those before the last [`Trainer::load`] included: the schedule of the learning rate goes by them.
    fn updates(&self) -> u64;
    /// What was seen since the last update is not what the next one is about (an evaluation has ended): nothing of it need be kept.
    fn forget_views(&mut self);
    /// Writes into `dir` what [`Trainer::load`] needs to go on: weights (Hugging Face layout) and optimiser state, or where they are.
    fn save(&mut self, dir: &Path) -> Result<()>;
    fn load(&mut self, dir: &Path) -> Result<()>;
    /// Writes the model, or its adapters, as other programs read them, and nothing that only training needs.
    ///
    /// # Errors
    /// Weights that are held elsewhere, and what cannot be written.
    fn export(&self, dir: &Path) -> Result<()> {
        bail!("this engine's weights are not here, so they cannot be written to {}", dir.display())
    }
}

/// Whether the text written so far ends a turn by a stop text.
fn completes(chat: &Chat, ids: &[u32], stops: &[String]) -> Result<bool> {
    if stops.is_empty() {
        return Ok(false);
    }
    // A token is at least one byte, so the end of the text is in the last tokens.
    let longest = stops.iter().map(String::len).max().unwrap_or(0);
    let tail = chat.decode(&ids[ids.len().saturating_sub(longest + 4)..], true)?;
    // The token that completes a stop text may carry on behind it ("```\n"); an earlier completion would have stopped.
    Ok(stops.iter().any(|s| tail.contains(s.as_str())))
}
