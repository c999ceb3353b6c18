//! The engine on a cluster: any server that speaks the Tinker API holds the weights, samples, and computes gradients.
//!
//! The loop, crops, masks, rewards and the record stay here; over the wire go token ids, pictures exactly as they were shown, and one number a token.
//! It hides the protocol (`wire.rs`, `protobuf.rs`), pictures as chunks (`sequence.rs`), passes and samples (`passes.rs`, `sampling.rs`), promises and retries
//! (`client.rs`, `transport.rs`), the session (`session.rs`), and what a server is asked before it is trusted (`probe.rs`).
//!
//! An objective is a derivative a token, and so is a weighted cross-entropy: servers minimise `sum of -weight · logprob` (tinker SDK,
//! `forward_backward_custom`: "weights = -dC/dlogprobs"; SkyRL, `cross_entropy_loss` in `ppo_utils.py`: the same sum), so
//! weight = -derivative, and every objective is exact on every server that sums.
//!
//! What must stay true: no update is applied twice. Requests are numbered within a model; a server that knows a repeated request by its number
//! is asked again, one that does not is asked once, and where an answer is lost the model is left in doubt and never used again: a
//! resumed run loads the last saved state into a new model. (There is no step counter that could be asked.)

mod client;
mod options;
mod passes;
mod probe;
mod protobuf;
mod sampling;
mod sequence;
mod session;
mod transport;
mod wire;

pub use options::{Encoding, Loss, Options, Reduction};

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::client::{Client, Failure, Repeat, read, text_of};
use self::passes::Item;
use self::sampling::Published;
use self::session::Session;
use self::transport::{Body, Transport};
use self::wire::{AdamParams, metric};
use super::pngs::Pngs;
use super::{Frontend, Group, Scores, Trainer, Training, Weights, Who};
use crate::config::BadConfig;
use crate::episode::Stream;
use crate::http;
use crate::progress::say;
use crate::run::write_atomic;

/// What a checkpoint folder holds instead of weights.
const STATE: &str = "tinker.json";
/// Times that what changes nothing is asked anew where the server forgot it or failed.
const ATTEMPTS: usize = 3;

/// A model at the server. Requests that change it, or read it, are numbered from 1.
struct Model {
    id: String,
    next_request: u64,
}

impl Model {
    fn number(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request - 1
    }
}

/// Where a checkpoint's weights and optimiser state are.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    /// `tinker://MODEL/weights/NAME`.
    state: String,
    base_model: String,
    lora_rank: usize,
    updates: u64,
    url: String,
}

/// A model at a server, as the loop knows it.
pub struct Tinker {
    options: Options,
    training: Option<Training>,
    /// Whether conversations show any.
    pictures: bool,
    frontend: Frontend,
    client: Arc<Client>,
    session: Session,
    /// Made when first used, because a saved state can only be loaded into a model that nothing was asked of yet.
    model: Option<Model>,
    /// A second model that stays as it was made, for the KL.
    reference: Option<Model>,
    published: Option<Published>,
    pngs: Pngs,
    /// Whether the server answers a repeated request with the future of the first.
    knows_repeats: bool,
    /// Whether it was seen to add up losses as `options.reduction` says.
    reduction_seen: bool,
    /// Whether the answer to a change was lost.
    in_doubt: bool,
    updates: u64,
    /// Log-probs under the weights as they stand, by conversation: an update that follows needs no second forward pass.
    scored: HashMap<[u8; 32], Vec<f32>>,
    /// Ids that end a completion: ends of turn, and vision tokens, which would have no picture.
    stops: Vec<u32>,
    banned: Vec<u32>,
}

impl Tinker {
    /// Finds the server and opens a session. With `model`'s folder: tokenizer, chat template, processor and configs; no weights are
    /// read there. Where conversations show pictures, a server that would drop them is refused when it gets its model.
    ///
    /// # Errors
    /// Options that cannot work, a server that is not there, refuses the key or does not have the model.
    pub fn open(
        options: &Options,
        model: &super::ModelOptions,
        training: Option<&Training>,
        pictures: bool,
    ) -> Result<Tinker> {
        options.validate()?;
        let frontend = Frontend::load(&model.path, model.picture_cache_mib)?;
        let seconds = Duration::from_secs_f64;
        let key = http::key_from(&options.api_key_env);
        let client = Arc::new(Client {
            transport: Transport::new(&options.url, key, seconds(options.timeout_s))?,
            first_pause: seconds(options.pause_s),
            patience: seconds(options.patience_s),
            api_key_env: options.api_key_env.clone(),
            protobuf: options.encoding == Encoding::Protobuf,
        });
        let session = Session::open(&client, &options.base_model)?;
        // Rows of the table without a token are as unlikely as they are untrained; the server's table is not known here.
        let banned = frontend.chat.banned(0);
        let stops = frontend.chat.special.stops.iter().chain(&banned).copied().collect();
        Ok(Tinker {
            options: options.clone(),
            training: training.cloned(),
            pictures,
            pngs: Pngs::new(frontend.clone()),
            frontend,
            client,
            session,
            model: None,
            reference: None,
            published: None,
            knows_repeats: false,
            reduction_seen: false,
            in_doubt: false,
            updates: 0,
            scored: HashMap::new(),
            stops,
            banned,
        })
    }

    /// Makes the model, if there is none yet, and sees whether the server can do what will be asked of it.
    ///
    /// # Errors
    /// The server refuses, or would drop pictures.
    pub fn prepare(&mut self) -> Result<()> {
        if self.model.is_some() {
            return Ok(());
        }
        let from = self.options.state.clone();
        self.begin_model(from.as_deref(), false)
    }

    /// A new model with the weights of a saved state, or of the base model, then the probes.
    fn begin_model(&mut self, state: Option<&str>, optimizer: bool) -> Result<()> {
        self.forget_scores();
        let old = self.model.take();
        self.unload(old);
        self.in_doubt = false;
        self.model = Some(self.create_model(state, optimizer)?);
        if self.reference.is_none() && self.training.as_ref().is_some_and(|training| training.reference) {
            let first = self.options.state.clone();
            let made = self.create_model(first.as_deref(), false);
            self.reference = Some(made.context(
                "the KL term compares with the first weights, so they need a second model at the server; where it holds only one \
                 (SkyRL on FSDP, or with all weights trained), set objective.kl_coef = 0",
            )?);
        }
        probe::run(self)
    }

    fn create_model(&mut self, state: Option<&str>, optimizer: bool) -> Result<Model> {
        let doing = "making a model at the server";
        let seed = self.training.as_ref().map_or(0, |training| training.seed) % (1 << 31);
        let body = json!({
            "type": "create_model", "session_id": self.session.id, "model_seq_id": self.session.count_model(),
            "base_model": self.options.base_model,
            "lora_config": {"rank": self.options.lora_rank, "seed": seed,
                            "train_unembed": true, "train_mlp": true, "train_attn": true},
        });
        let created = self.finish("create_model", &as_json(&body)?, Repeat::Always, doing)?;
        let created = read(&created).map_err(|failure| self.client.explain(failure, doing))?;
        let mut model = Model { id: text_of(&created, "model_id")?, next_request: 1 };
        if let Some(path) = state {
            let doing = format!("loading the saved state {path}");
            let body = json!({
                "type": "load_weights", "model_id": model.id, "seq_id": model.number(), "path": path, "optimizer": optimizer,
            });
            // Loading the same twice into a model that has done nothing since is loading it once.
            let loaded = self.client.submit("load_weights", &as_json(&body)?, Repeat::Always);
            loaded
                .and_then(|future| self.client.retrieve(&future))
                .map_err(|failure| self.client.explain(failure, &doing))?;
        }
        Ok(model)
    }

    /// Sends a request and waits for its result. Where the server has forgotten the future, the same request is sent again as far as `repeat`
    /// allows.
    fn finish(&self, path: &str, body: &Body, repeat: Repeat, doing: &str) -> Result<Vec<u8>> {
        let explain = |failure| self.client.explain(failure, doing);
        let mut future = self.client.submit(path, body, repeat).map_err(explain)?;
        for _ in 1..ATTEMPTS {
            match self.client.retrieve(&future) {
                Err(Failure::Gone(why)) => {
                    future = self.again(path, body, repeat, &future, why).map_err(explain)?;
                }
                other => return other.map_err(explain),
            }
        }
        self.client.retrieve(&future).map_err(explain)
    }

    /// Sends a request again whose future is gone. Of one that changes the model the server must remember the number, or what it does now
    /// may be done for the second time.
    fn again(&self, path: &str, body: &Body, repeat: Repeat, gone: &str, why: String) -> Result<String, Failure> {
        if repeat == Repeat::IfNotTaken {
            return Err(Failure::InDoubt(why));
        }
        let future = self.client.submit(path, body, repeat)?;
        match changes(path) && future != gone {
            true => Err(Failure::InDoubt(why)),
            false => Ok(future),
        }
    }

    /// Of requests that change the policy.
    fn repeat(&self) -> Repeat {
        if self.knows_repeats { Repeat::Always } else { Repeat::IfNotTaken }
    }

    fn policy(&mut self) -> Result<&mut Model> {
        self.prepare()?;
        ensure!(
            !self.in_doubt,
            "an earlier change of the model got lost, so its weights are not known; go on from the last checkpoint with --resume"
        );
        self.model.as_mut().context("there is no model at the server")
    }

    /// The weights have changed, or may have.
    fn forget_scores(&mut self) {
        self.published = None;
        self.scored.clear();
    }

    /// Lets the server free a model. Not waited for, and no matter if it fails: the server does so itself when the session falls silent.
    fn unload(&self, model: Option<Model>) {
        let Some(model) = model else { return };
        let key = http::key_from(&self.options.api_key_env);
        let Ok(hurried) = Transport::new(&self.options.url, key, Duration::from_secs(3)) else { return };
        let body = Body::json(json!({"type": "unload_model", "model_id": model.id}).to_string().into_bytes());
        let _ = hurried.post("unload_model", &body, false);
    }
}

impl Drop for Tinker {
    fn drop(&mut self) {
        let models = [self.model.take(), self.reference.take()];
        models.into_iter().for_each(|model| self.unload(model));
    }
}

impl Trainer for Tinker {
    fn frontend(&self) -> Frontend {
        self.frontend.clone()
    }

    fn samples_exactly(&self) -> bool {
        false
    }

    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>> {
        let streams: Vec<&Stream> = groups.iter().flatten().copied().collect();
        let mut scores = self.score(&streams, who)?.into_iter();
        let own = |logprobs| Scores { logprobs, entropies: Vec::new() };
        Ok(groups.iter().map(|group| scores.by_ref().take(group.len()).map(own).collect()).collect())
    }

    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()> {
        let members: Vec<(usize, usize)> =
            groups.iter().enumerate().flat_map(|(g, group)| (0..group.len()).map(move |m| (g, m))).collect();
        let streams: Vec<&Stream> = groups.iter().flatten().copied().collect();
        let scores = self.score(&streams, Who::Policy)?;
        let mut items = Vec::with_capacity(streams.len());
        for (((g, m), &stream), logprobs) in members.into_iter().zip(&streams).zip(scores) {
            let scores = Scores { logprobs, entropies: Vec::new() };
            let Weights { logprobs: slopes, entropies } = weigh(g, m, &scores)?;
            ensure!(
                slopes.len() == scores.logprobs.len(),
                "{} weights for {} trained tokens",
                slopes.len(),
                scores.logprobs.len()
            );
            ensure!(
                entropies.iter().flatten().all(|weight| *weight == 0.0),
                "the protocol carries no weights of entropies; set objective.entropy_coef = 0"
            );
            items.push(Item { stream, learns: Some((scores.logprobs, slopes)) });
        }
        let says_something =
            |item: &Item| item.learns.as_ref().is_some_and(|(_, slopes)| slopes.iter().any(|s| *s != 0.0));
        let first = items.iter().position(|item| item.stream.sampled_count() > 0);
        if items.iter().any(says_something) {
            items.retain(says_something);
        } else if let Some(first) = first {
            // A gradient of 0 is a gradient: the step that follows still has its momentum and decay, as on the embedded engine.
            items.swap(0, first);
            items.truncate(1);
        } else {
            return Ok(());
        }
        let passed = self.pass(Who::Policy, &items, true);
        // Whatever went wrong left gradients behind that nobody knows.
        self.in_doubt |= passed.is_err();
        passed.map(drop)
    }

    fn step(&mut self, learning_rate: f64) -> Result<f64> {
        let doing = "updating the weights";
        let optim = self.training.as_ref().context("the engine was opened for sampling only")?.optim.clone();
        let adam_params = AdamParams {
            learning_rate,
            beta1: optim.beta1,
            beta2: optim.beta2,
            eps: optim.eps,
            weight_decay: optim.weight_decay,
            grad_clip_norm: optim.clip_norm,
        };
        let (id, number) = {
            let model = self.policy()?;
            (model.id.clone(), model.number())
        };
        self.forget_scores();
        let body = json!({"type": "optim_step", "model_id": id, "seq_id": number, "adam_params": adam_params});
        let reply = self.finish("optim_step", &as_json(&body)?, self.repeat(), doing);
        self.in_doubt |= reply.is_err();
        let stepped = wire::stepped(&reply?)?;
        self.updates += 1;
        let norm = metric(&stepped, &["grad_norm", "grad_norm:mean", "grad_norm:last", "grad_norm:max"]);
        if let Some(norm) = norm {
            ensure!(
                norm.is_finite(),
                "the server reports a gradient norm of {norm}, and has updated the weights with it; lower optim.lr, and go on from the last \
                 checkpoint with --resume"
            );
        }
        Ok(norm.unwrap_or(f64::NAN))
    }

    fn updates(&self) -> u64 {
        self.updates
    }

    fn forget_views(&mut self) {}

    fn save(&mut self, dir: &Path) -> Result<()> {
        let doing = "saving the state at the server";
        let updates = self.updates;
        let (id, number) = {
            let model = self.policy()?;
            (model.id.clone(), model.number())
        };
        let mut attempt = 1;
        let saved = loop {
            let name = match attempt {
                1 => format!("update-{updates}"),
                n => format!("update-{updates}-{n}"),
            };
            let body = json!({"type": "save_weights", "model_id": id, "seq_id": number, "path": name});
            let sent = self.client.submit("save_weights", &as_json(&body)?, Repeat::Always);
            match sent.and_then(|future| self.client.retrieve(&future)) {
                // The name is taken by an attempt whose answer got lost, and which may not be complete.
                Err(Failure::Refused { status: 409, .. } | Failure::Gone(_)) if attempt < 2 * ATTEMPTS => attempt += 1,
                other => break other.map_err(|failure| self.client.explain(failure, doing))?,
            }
        };
        let saved = read(&saved).map_err(|failure| self.client.explain(failure, doing))?;
        let saved = Saved {
            state: text_of(&saved, "path")?,
            base_model: self.options.base_model.clone(),
            lora_rank: self.options.lora_rank,
            updates,
            url: self.options.url.clone(),
        };
        write_atomic(dir.join(STATE), &serde_json::to_vec_pretty(&saved).context("writing down where the state is")?)
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE);
        let text = std::fs::read(&path)
            .with_context(|| format!("this is no checkpoint of a run on a server: {}", path.display()))?;
        let saved: Saved = serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
        let own = (&self.options.base_model, self.options.lora_rank);
        ensure!(
            (&saved.base_model, saved.lora_rank) == own,
            BadConfig(format!(
                "the checkpoint is of {} with LoRA rank {}, and the config says {} with rank {}: {}",
                saved.base_model,
                saved.lora_rank,
                own.0,
                own.1,
                path.display()
            ))
        );
        say(&format!("loading {}", saved.state));
        self.begin_model(Some(&saved.state), true)
            .with_context(|| format!("loading the checkpoint {}", dir.display()))?;
        self.updates = saved.updates;
        Ok(())
    }
}

/// Whether a request changes a model, so that doing it twice is not doing it once.
fn changes(path: &str) -> bool {
    matches!(path, "forward_backward" | "optim_step")
}

fn as_json(value: &impl Serialize) -> Result<Body> {
    Ok(Body::json(serde_json::to_vec(value).context("writing a request")?))
}
