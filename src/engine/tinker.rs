//! The engine on a cluster: any server that speaks the Tinker API holds the weights, samples, and computes gradients.
//!
//! The loop, crops, masks, rewards and the record stay here; over the wire go token ids, pictures exactly as they were shown, and one number a token.
//! It hides the protocol (`wire.rs`), pictures as chunks (`sequence.rs`), promises and retries (`client.rs`, `transport.rs`), the
//! session (`session.rs`), and what a server is asked before it is trusted (`probe.rs`).
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
mod probe;
mod sequence;
mod session;
mod transport;
mod wire;

pub use options::{Loss, Options, Reduction};

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::client::{Client, Failure, Repeat, read, text_of};
use self::sequence::{Pngs, digest, gather, spread};
use self::session::Session;
use self::transport::Transport;
use self::wire::{
    AdamParams, Datum, Forward, ForwardBackward, ForwardBackwardInput, Passed, SamplingParams, StopReason, Tensor,
    metric,
};
use super::{
    Completion, Finish, Frontend, Group, Prompt, Sampler, Sampling, Scores, Trainer, Training, Weights, Who, completes,
};
use crate::config::BadConfig;
use crate::episode::Stream;
use crate::http;
use crate::progress::say;
use crate::run::write_atomic;

/// What a checkpoint folder holds instead of weights.
const STATE: &str = "tinker.json";
/// Sequences of a request at most, as in the SDK.
const DATA_AT_ONCE: usize = 1024;
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

/// The weights as they stand, ready to be sampled from.
struct Published {
    sampling_session: String,
    next_request: AtomicU64,
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

/// A conversation and what its tokens are given: nothing, or a derivative for each that was sampled.
struct Item<'a> {
    stream: &'a Stream,
    /// The policy's log-probs and the derivative of the loss by each of them.
    learns: Option<(Vec<f32>, Vec<f32>)>,
}

/// One request of a pass: to which model, under which number, and which of the items.
struct Part {
    model: String,
    number: u64,
    items: Range<usize>,
}

pub struct Tinker {
    options: Options,
    training: Option<Training>,
    frontend: Frontend,
    client: Arc<Client>,
    session: Session,
    /// Made when first used, because a saved state can only be loaded into a model that nothing was asked of yet.
    model: Option<Model>,
    /// A second model that stays as it was made, for the KL.
    reference: Option<Model>,
    published: Option<Published>,
    pngs: Pngs,
    /// Whether prompts will hold pictures, so that the server must be able to see.
    pictures: bool,
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
    /// read there. `pictures`: whether prompts will hold any; a server that would drop them is then refused when it gets its model.
    ///
    /// # Errors
    /// Options that cannot work, a server that is not there, refuses the key or does not have the model.
    pub fn open(
        options: &Options,
        model: &super::embedded::Options,
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
        });
        let session = Session::open(&client, &options.base_model)?;
        // Rows of the table without a token are as unlikely as they are untrained; the server's table is not known here.
        let banned = frontend.chat.banned(0);
        let stops = frontend.chat.special.stops.iter().chain(&banned).copied().collect();
        Ok(Tinker {
            options: options.clone(),
            training: training.cloned(),
            pngs: Pngs::new(frontend.clone()),
            frontend,
            client,
            session,
            model: None,
            reference: None,
            published: None,
            pictures,
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
    fn finish(&self, path: &str, body: &[u8], repeat: Repeat, doing: &str) -> Result<Vec<u8>> {
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
    fn again(&self, path: &str, body: &[u8], repeat: Repeat, gone: &str, why: String) -> Result<String, Failure> {
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
        let body = json!({"type": "unload_model", "model_id": model.id}).to_string();
        let _ = hurried.post("unload_model", body.as_bytes());
    }

    /// Runs conversations through a model; log-probs of all targets of each. With `updates` their gradients are added up there.
    fn pass(&mut self, who: Who, items: &[Item], updates: bool) -> Result<Vec<Vec<f32>>> {
        self.policy()?;
        let parts = self.parts(who, items, updates)?;
        let (path, doing, repeat) = match updates {
            true => ("forward_backward", "computing gradients", self.repeat()),
            false => ("forward", "computing log-probs", Repeat::Always),
        };
        let mut done: Vec<Passed> = Vec::with_capacity(parts.len());
        // Submitted one after another, so that the server gets them in the order of their numbers and sums in that order.
        let mut futures = Vec::with_capacity(parts.len());
        for part in &parts {
            let sent = self.client.submit(path, &self.body(part, items, updates)?, repeat);
            let future = sent.map_err(|failure| self.client.explain(failure, doing))?;
            if updates && part.items.start == 0 && !self.reduction_seen {
                let reply = self.client.retrieve(&future).map_err(|failure| self.client.explain(failure, doing))?;
                let passed = Passed::from_json(&reply)?;
                self.reduction_seen = self.check_reduction(&items[part.items.clone()], &passed)?;
                done.push(passed);
            } else {
                futures.push((future, part));
            }
        }
        done.extend(together(&futures, self.options.max_in_flight, |(future, part)| {
            let mut future = future.clone();
            for attempt in 1.. {
                match self.client.retrieve(&future) {
                    Err(Failure::Gone(why)) if attempt < ATTEMPTS => {
                        let again = self.again(path, &self.body(part, items, updates)?, repeat, &future, why);
                        future = again.map_err(|failure| self.client.explain(failure, doing))?;
                    }
                    reply => {
                        return Passed::from_json(&reply.map_err(|failure| self.client.explain(failure, doing))?);
                    }
                }
            }
            unreachable!("the loop returns at its last attempt")
        })?);
        let logprobs: Vec<Vec<f32>> = done.into_iter().flat_map(|passed| passed.logprobs).collect();
        ensure!(
            logprobs.len() == items.len(),
            "{doing}: the server answered {} of {} sequences",
            logprobs.len(),
            items.len()
        );
        for (i, (item, own)) in items.iter().zip(&logprobs).enumerate() {
            ensure!(
                updates || own.len() == item.stream.len() - 1,
                "{doing}: sequence {i} has {} targets and came back with {} log-probs; a server that drops pictures does this",
                item.stream.len() - 1,
                own.len()
            );
        }
        Ok(logprobs)
    }

    /// Deals items out to requests of the size that the config says, numbered.
    fn parts(&mut self, who: Who, items: &[Item], updates: bool) -> Result<Vec<Part>> {
        let largest = (self.options.max_request_mib * 1048576.0) as usize;
        let mut runs = Vec::new();
        let (mut start, mut size) = (0, 0);
        for (i, item) in items.iter().enumerate() {
            let own = self.pngs.size(item.stream)?;
            // The first gradients go alone until it is seen how the server adds them up.
            let alone = updates && !self.reduction_seen && start == 0;
            if i > start && (size + own > largest || i - start == DATA_AT_ONCE || alone) {
                runs.push(start..i);
                (start, size) = (i, 0);
            }
            size += own;
        }
        runs.push(start..items.len());
        let model = match who {
            Who::Policy => self.model.as_mut(),
            Who::Reference => self.reference.as_mut(),
        };
        let model = model.with_context(|| format!("there is no model of the {who:?} at the server"))?;
        Ok(runs.into_iter().map(|items| Part { model: model.id.clone(), number: model.number(), items }).collect())
    }

    fn body(&self, part: &Part, items: &[Item], updates: bool) -> Result<Vec<u8>> {
        let of_part = &items[part.items.clone()];
        let data = of_part.iter().map(|item| self.datum(item, items.len())).collect::<Result<_>>()?;
        let loss_fn = match (updates, self.options.loss) {
            (false, _) | (true, Loss::CrossEntropy) => "cross_entropy",
            (true, Loss::ImportanceSampling) => "importance_sampling",
        };
        let (model_id, seq_id, input) = (&part.model, part.number, &ForwardBackwardInput { data, loss_fn });
        match updates {
            true => as_json(&ForwardBackward { model_id, seq_id, forward_backward_input: input }),
            false => as_json(&Forward { model_id, seq_id, forward_input: input }),
        }
    }

    /// One sequence of an update that has `count`.
    fn datum(&self, item: &Item, count: usize) -> Result<Datum> {
        let stream = item.stream;
        let mut loss_fn_inputs = BTreeMap::from([("target_tokens", Tensor::ids(self.pngs.targets(stream)))]);
        match (&item.learns, self.options.loss) {
            (None, _) => {
                loss_fn_inputs.insert("weights", Tensor::numbers(vec![0.0; stream.len() - 1]));
            }
            // Loss = sum of -weight · logprob, so d loss / d logprob = -weight.
            (Some((_, slopes)), Loss::CrossEntropy) => {
                let weights: Vec<f32> = slopes.iter().map(|slope| -slope).collect();
                loss_fn_inputs.insert("weights", Tensor::numbers(spread(stream, &weights)));
            }
            // Loss = sum of -exp(logprob - own) · advantage with own = logprob, so d loss / d logprob = -advantage. Without `weights`
            // every target counts, and where nothing was sampled the advantage is 0.
            (Some((own, slopes)), Loss::ImportanceSampling) => {
                let times = match self.options.reduction {
                    // It divides by the targets of each sequence and by the number of sequences.
                    Some(Reduction::SequenceMean) => ((stream.len() - 1) * count) as f32,
                    Some(Reduction::Sum) | None => 1.0,
                };
                let advantages: Vec<f32> = slopes.iter().map(|slope| -slope * times).collect();
                loss_fn_inputs.insert("logprobs", Tensor::numbers(spread(stream, own)));
                loss_fn_inputs.insert("advantages", Tensor::numbers(spread(stream, &advantages)));
            }
        }
        Ok(Datum { model_input: self.pngs.chunks(stream, stream.len() - 1)?, loss_fn_inputs })
    }

    /// Holds the loss that a server reports for some gradients against what was asked. True when that showed that it sums (or the config says
    /// what it does); false when it showed nothing.
    ///
    /// # Errors
    /// A server that adds up differently, or does not say.
    fn check_reduction(&self, items: &[Item], passed: &Passed) -> Result<bool> {
        if self.options.reduction.is_some() {
            return Ok(true);
        }
        let Some(reported) = metric(&passed.metrics, &["loss:sum", "total_loss:sum"]) else {
            bail!(BadConfig(
                "the server does not report its loss, so it cannot be seen how it adds up the losses of tokens, and weights of both signs go wrong \
                 where it does not sum them. If it does, set engine.reduction = \"sum\"; SkyRL's JAX backend takes means: \
                 engine.reduction = \"sequence_mean\" with engine.loss = \"importance_sampling\""
                    .into()
            ));
        };
        let (mut sum, mut all) = (0.0, 0.0);
        for (own, slopes) in items.iter().filter_map(|item| item.learns.as_ref()) {
            for (logprob, slope) in own.iter().zip(slopes) {
                let term = match self.options.loss {
                    Loss::CrossEntropy => f64::from(*slope) * f64::from(*logprob),
                    Loss::ImportanceSampling => f64::from(*slope),
                };
                sum += term;
                all += term.abs();
            }
        }
        // Terms that nearly cancel show nothing beside a bf16 model's rounding.
        if sum.abs() < 0.2 * all || all == 0.0 {
            return Ok(false);
        }
        ensure!(
            (reported - sum).abs() <= 0.05 * all,
            BadConfig(format!(
                "the server does not add up losses as the protocol means it: it reports {reported}, and the sum over the tokens is {sum}. If it \
                 takes means as SkyRL's JAX backend does, set engine.reduction = \"sequence_mean\" and engine.loss = \
                 \"importance_sampling\""
            ))
        );
        Ok(true)
    }

    /// Log-probs of each conversation's sampled tokens; those of the policy are kept until the next update.
    fn score(&mut self, streams: &[&Stream], who: Who) -> Result<Vec<Vec<f32>>> {
        let digests: Vec<[u8; 32]> = streams.iter().map(|stream| digest(stream)).collect();
        let known = |tinker: &Tinker, i: usize| who == Who::Policy && tinker.scored.contains_key(&digests[i]);
        let asked: Vec<usize> =
            (0..streams.len()).filter(|&i| streams[i].sampled_count() > 0 && !known(self, i)).collect();
        let mut scores: Vec<Vec<f32>> = vec![Vec::new(); streams.len()];
        if !asked.is_empty() {
            let items: Vec<Item> = asked.iter().map(|&i| Item { stream: streams[i], learns: None }).collect();
            for (&i, all) in asked.iter().zip(self.pass(who, &items, false)?) {
                scores[i] = gather(streams[i], &all);
                if who == Who::Policy {
                    self.scored.insert(digests[i], scores[i].clone());
                }
            }
        }
        if who == Who::Policy {
            for (score, digest) in scores.iter_mut().zip(&digests).filter(|(score, _)| score.is_empty()) {
                *score = self.scored.get(digest).cloned().unwrap_or_default();
            }
        }
        Ok(scores)
    }

    /// Makes the weights as they stand ready to be sampled from.
    fn publish(&mut self) -> Result<()> {
        if self.published.is_some() {
            return Ok(());
        }
        let doing = "making the weights ready for sampling";
        let (id, number) = {
            let model = self.policy()?;
            (model.id.clone(), model.number())
        };
        let mut attempt = 1;
        let saved = loop {
            let body = json!({
                "type": "save_weights_for_sampler", "model_id": id, "seq_id": number,
                "sampling_session_seq_id": self.session.count_sampler(),
            });
            let sent = self.client.submit("save_weights_for_sampler", &as_json(&body)?, Repeat::Always);
            match sent.and_then(|future| self.client.retrieve(&future)) {
                // The answer to an earlier attempt got lost. Saved a second time under another number it is the same.
                Err(Failure::Refused { status: 409, .. } | Failure::Gone(_)) if attempt < 2 * ATTEMPTS => attempt += 1,
                other => break other.map_err(|failure| self.client.explain(failure, doing))?,
            }
        };
        let saved = read(&saved).map_err(|failure| self.client.explain(failure, doing))?;
        let sampling_session = match (saved.get("sampling_session_id"), saved.get("path")) {
            (Some(Value::String(id)), _) => id.clone(),
            (_, Some(Value::String(path))) => {
                let body = json!({
                    "type": "create_sampling_session", "session_id": self.session.id, "model_path": path,
                    "sampling_session_seq_id": self.session.count_sampler(),
                });
                let opened = self.client.ask("create_sampling_session", &body);
                text_of(&opened.map_err(|failure| self.client.explain(failure, doing))?, "sampling_session_id")?
            }
            _ => bail!("{doing}: the server gives neither a sampling_session_id nor a path: {saved}"),
        };
        self.published = Some(Published { sampling_session, next_request: AtomicU64::new(0) });
        Ok(())
    }

    /// Continuations of one prompt.
    fn ask_for_samples(
        &self,
        prompt: wire::ModelInput,
        count: usize,
        params: SamplingParams,
        of_prompt: bool,
    ) -> Result<wire::Sampled> {
        let doing = "sampling";
        let published = self.published.as_ref().context("no weights were made ready for sampling")?;
        let mut sample = wire::Sample {
            kind: "sample",
            sampling_session_id: &published.sampling_session,
            seq_id: 0,
            num_samples: count,
            prompt,
            sampling_params: params,
            prompt_logprobs: of_prompt,
        };
        for attempt in 1.. {
            // Sampling changes nothing: what was forgotten or failed is asked anew, under a number of its own.
            sample.seq_id = published.next_request.fetch_add(1, Ordering::SeqCst);
            let body = as_json(&sample)?;
            let reply =
                self.client.submit("asample", &body, Repeat::Always).and_then(|future| self.client.retrieve(&future));
            match reply {
                Err(Failure::Gone(_) | Failure::Failed(_)) if attempt < ATTEMPTS => {}
                reply => {
                    let reply = reply.map_err(|failure| self.client.explain(failure, doing))?;
                    let sampled: wire::Sampled =
                        serde_json::from_slice(&reply).context("reading what the server sampled")?;
                    ensure!(
                        sampled.sequences.len() == count,
                        "{doing}: {} sequences were asked for and {} came",
                        count,
                        sampled.sequences.len()
                    );
                    return Ok(sampled);
                }
            }
        }
        unreachable!("the loop returns at its last attempt")
    }

    /// A sampled sequence as the loop knows it: ended where ours would have ended.
    fn completion(&self, sequence: wire::Sequence, sampling: &Sampling) -> Result<Completion> {
        let wire::Sequence { stop_reason, tokens: mut ids, logprobs } = sequence;
        let mut logprobs = logprobs
            .context("the server sampled without telling log-probs, and nothing can be trained without them")?;
        ensure!(
            ids.len() == logprobs.len(),
            "the server sampled {} tokens and tells {} log-probs",
            ids.len(),
            logprobs.len()
        );
        let special = &self.frontend.chat.special;
        let mut end = None;
        for (i, id) in ids.iter().enumerate() {
            end = if self.banned.contains(id) {
                // It would stand for a picture that does not exist. What stands before it is a turn without an end.
                Some((i, Finish::Length))
            } else if special.stops.contains(id) {
                Some((i + 1, Finish::EndOfTurn))
            } else if completes(&self.frontend.chat, &ids[..=i], &sampling.stop)? {
                // A prefix of a sample is a sample, so stopping afterwards is the same as stopping at the server.
                Some((i + 1, Finish::StopText))
            } else {
                continue;
            };
            break;
        }
        let (length, finish) = match (end, stop_reason) {
            (Some(end), _) => end,
            (None, StopReason::Length) => (ids.len(), Finish::Length),
            (None, StopReason::Stop) => bail!(
                "the server stopped at the token {:?}, which ends no turn: it keeps the end of turn for itself, and then that could not be \
                 trained",
                ids.last()
            ),
        };
        ids.truncate(length);
        logprobs.truncate(length);
        Ok(Completion { ids, logprobs, finish })
    }
}

impl Drop for Tinker {
    fn drop(&mut self) {
        let models = [self.model.take(), self.reference.take()];
        models.into_iter().for_each(|model| self.unload(model));
    }
}

impl Sampler for Tinker {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        ensure!(!sampling.ignore_end, "a server cannot be told to go on after an end of turn");
        self.publish()?;
        together(prompts, self.options.max_in_flight, |prompt| {
            let count = prompt.seeds.len();
            let params = SamplingParams {
                max_tokens: sampling.max_new_tokens,
                // One number for the members of a group, and room above it for their own.
                seed: prompt.seeds.first().copied().unwrap_or(0) % ((1 << 31) - (1 << 16)),
                stop: self.stops.clone(),
                temperature: sampling.temperature,
                top_k: sampling.top_k.map_or(-1, |k| k as i64),
                top_p: sampling.top_p.unwrap_or(1.0),
            };
            let input = self.pngs.chunks(prompt.stream, prompt.stream.len())?;
            let sampled = self.ask_for_samples(input, count, params, false)?;
            sampled.sequences.into_iter().map(|sequence| self.completion(sequence, sampling)).collect()
        })
    }

    fn end_step(&mut self) {}
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

fn as_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).context("writing a request")
}

/// Does some work for each job, so many at once, on threads that mostly wait. In the order of the jobs; of several errors the first to come.
fn together<T: Sync, R: Send>(jobs: &[T], at_once: usize, work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let run = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::SeqCst) {
            let i = next.fetch_add(1, Ordering::SeqCst);
            let Some(job) = jobs.get(i) else { break };
            let result = work(job);
            failed.fetch_or(result.is_err(), Ordering::SeqCst);
            done.push((i, result));
        }
        done
    };
    let mut all: Vec<(usize, Result<R>)> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 1..at_once.min(jobs.len()) {
            // A machine that gives no more threads does the work with those it gave.
            let Ok(thread) = std::thread::Builder::new().name("waits".into()).spawn_scoped(scope, run) else { break };
            threads.push(thread);
        }
        let mut all = run();
        for thread in threads {
            match thread.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_by_key(|(i, _)| *i);
    // An error stops the others, so a gap is only ever behind an error.
    let mut results = Vec::with_capacity(jobs.len());
    let mut error = None;
    for (_, result) in all {
        match result {
            Ok(result) => results.push(result),
            Err(e) => error = Some(error.unwrap_or(e)),
        }
    }
    match error {
        Some(error) => Err(error),
        None if results.len() == jobs.len() => Ok(results),
        None => Err(anyhow!("{} of {} jobs were done", results.len(), jobs.len())),
    }
}
