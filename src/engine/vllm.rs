//! The engine whose samples come from a fleet of vLLM servers: token ids go in and token ids come out (`/inference/v1/generate`), with their
//! log-probs, and pictures as PNG of exactly the view that was shown.
//!
//! For `eval` and `rollout` the servers' own weights answer. For `rl` this program trains adapters (`[model.lora]`) and the servers sample with
//! them: before a step samples, the adapters as they stand are written into a folder that the servers read too, and loaded there under a name
//! that holds their version. It hides placeholders and their expansion, adapters and their versions, retries and which server answers.
//!
//! What must stay true: a sample is drawn from the weights as they stand, for a request names the version and a server that does not have it
//! refuses; the tokens that a server made of a prompt are the prompt's own, pictures included, or the run ends; log-probs of the servers are
//! never taken for the trainer's (`samples_exactly`).

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pngs::Pngs;
use super::remote::{ended, one_by_one};
use super::{self as engine, torch};
use super::{Completion, Frontend, Group, Prompt, Sampler, Sampling, Scores, Trainer, Training, Weights, Who};
use crate::config::BadConfig;
use crate::episode::Stream;
use crate::model::{Config, Layout};
use crate::openai::{Pool, PoolOptions, Server, Unanswered, data_uri, from_json, sha256};
use crate::progress::say;

/// `[engine]` with `kind = "vllm"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Addresses up to `/v1`; several share the work, and all get every version of the adapters.
    pub urls: Vec<String>,
    /// The model as the servers name it; `model.path` is the same model here: all of it to train adapters, else without weights.
    pub model: String,
    /// A folder that the servers see under the same path: versions of the adapters are written there. Needed by `rl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapters: Option<PathBuf>,
    /// Train with LibTorch on this device (`cpu`, `cuda`, `cuda:N`) instead of this program's own kernels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The environment variable that holds the key; unset, none is sent.
    pub api_key_env: String,
    /// Requests under way at once.
    pub max_in_flight: usize,
    /// Further attempts at an answer after the first.
    pub max_retries: usize,
    /// Of one call, from connecting to the last byte.
    pub timeout_s: f64,
    /// The pause before a second attempt; it doubles with each one after.
    pub pause_s: f64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            urls: Vec::new(),
            model: String::new(),
            adapters: None,
            device: None,
            api_key_env: "VLLM_API_KEY".into(),
            max_in_flight: 256,
            max_retries: 5,
            timeout_s: 600.0,
            pause_s: 1.0,
        }
    }
}

impl Options {
    /// # Errors
    /// What is missing or cannot work, named.
    pub fn validate(&self) -> Result<()> {
        self.trainer().map_or(Ok(()), |torch| torch.validate())?;
        self.pool().validate()
    }

    fn trainer(&self) -> Option<torch::Options> {
        self.device.clone().map(|device| torch::Options { device })
    }

    fn pool(&self) -> PoolOptions<'_> {
        PoolOptions {
            kind: "vllm",
            urls: &self.urls,
            model: &self.model,
            api_key_env: &self.api_key_env,
            requests_per_minute: None,
            max_in_flight: self.max_in_flight,
            max_retries: self.max_retries,
            timeout_s: self.timeout_s,
            pause_s: self.pause_s,
            price: None,
        }
    }

    /// # Errors
    /// What training through it needs besides.
    pub fn validate_training(&self, model: &super::ModelOptions) -> Result<()> {
        self.validate()?;
        if model.lora.is_none() || self.adapters.is_none() {
            bail!(BadConfig(
                "engine.kind = \"vllm\" trains adapters here and samples with them there: add [model.lora], and engine.adapters = a folder that \
                 the servers see under the same path"
                    .into()
            ));
        }
        Ok(())
    }
}

/// Servers that sample, and what is trained here.
pub struct Fleet {
    servers: Servers,
    training: Option<Adapters>,
}

/// What asking them takes; threads share it.
struct Servers {
    options: Options,
    frontend: Frontend,
    pngs: Pngs,
    pool: Pool,
    /// Ids that end a completion: ends of turn, and vision tokens, which would have no picture.
    stops: Vec<u32>,
    banned: Vec<u32>,
}

/// Adapters that are trained here and known there.
struct Adapters {
    trainer: Box<dyn Trainer>,
    /// Absolute, for the servers have working folders of their own.
    folder: PathBuf,
    /// Tells the versions of this run from those of another at the same servers.
    run: String,
    /// What the servers sample with: after how many updates, and its name.
    loaded: Option<(u64, String)>,
    /// Times that a checkpoint was read: the same number of updates then means other weights.
    restored: usize,
}

/// What a server sampled.
#[derive(Debug)]
struct Sampled {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    cut: bool,
    /// The prompt as the server had it, pictures expanded.
    prompt: Vec<u32>,
    versions: Vec<String>,
}

impl Fleet {
    /// Reads the key, and with `training` the model that is trained here; nothing is sent yet.
    ///
    /// # Errors
    /// Options that cannot work, a model that cannot be read.
    pub fn open(options: &Options, model: &super::ModelOptions, training: Option<&Training>) -> Result<Fleet> {
        let pool = options.pool().open()?;
        let training = training.map(|training| -> Result<Adapters> {
            options.validate_training(model)?;
            let folder = options.adapters.clone().unwrap_or_default();
            let folder =
                std::path::absolute(&folder).with_context(|| format!("engine.adapters = {}", folder.display()))?;
            let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let (layout, _) = model.learns(Layout::new(&Config::load(&model.path)?))?;
            if let Some(other) = layout.modules().iter().find(|module| !module.name.starts_with("model.layers.")) {
                bail!(BadConfig(format!(
                    "model.lora.targets gives {} an adapter, which vLLM would load and not use; with engine.kind = \"vllm\" take \
                     \"model.layers.*\", or add model.freeze = [\"vision\", \"merger\"]",
                    other.name
                )));
            }
            let trainer = options.trainer().map_or(engine::Options::Embedded {}, engine::Options::Torch);
            let trainer = engine::open(&trainer, model, training, false)?;
            Ok(Adapters {
                trainer,
                folder,
                run: format!("foveate-{:x}-{began:x}", std::process::id()),
                loaded: None,
                restored: 0,
            })
        });
        let training = training.transpose()?;
        let frontend = match &training {
            Some(Adapters { trainer, .. }) => trainer.frontend(),
            None => Frontend::load(&model.path, model.picture_cache_mib)?,
        };
        // Rows of the table without a token are as unlikely as they are untrained; the servers' table is not known here.
        let banned = frontend.chat.banned(0);
        let servers = Servers {
            pool,
            pngs: Pngs::new(frontend.clone()),
            stops: frontend.chat.special.stops.iter().chain(&banned).copied().collect(),
            banned,
            frontend,
            options: options.clone(),
        };
        Ok(Fleet { servers, training })
    }

    /// Gives the servers the adapters as they stand, and takes back those before.
    ///
    /// # Errors
    /// A server that is not there or does not take them.
    pub fn publish(&mut self) -> Result<()> {
        let Some(adapters) = &self.training else { return Ok(()) };
        let version = adapters.trainer.updates();
        if adapters.loaded.as_ref().is_some_and(|(loaded, _)| *loaded == version) {
            return Ok(());
        }
        let name = format!("{}-{}-{version}", adapters.run, adapters.restored);
        let path = adapters.folder.join(&name);
        // No other run's: a name that is there already is a mistake.
        std::fs::create_dir_all(&adapters.folder)
            .and_then(|()| std::fs::create_dir(&path))
            .with_context(|| format!("making the folder {}", path.display()))?;
        adapters.trainer.export(&path)?;
        let load = |server: &Server| {
            self.servers.told(server, "load_lora_adapter", &json!({"lora_name": name, "lora_path": path})).with_context(|| {
                format!(
                    "loading version {version} of the adapters at {}, which must see {} under this path (engine.adapters), with --enable-lora and \
                     a --max-lora-rank as high as theirs",
                    server.base(),
                    path.display()
                )
            })
        };
        if let Err(error) = self.servers.pool.servers.iter().try_for_each(load) {
            self.take_back(Some((version, name)));
            return Err(error);
        }
        let before = self.training.as_mut().and_then(|adapters| adapters.loaded.replace((version, name)));
        self.take_back(before);
        Ok(())
    }

    /// Has the servers forget adapters, and removes their folder. No matter if it fails: a server that was started anew does not have them.
    fn take_back(&self, loaded: Option<(u64, String)>) {
        let (Some((_, name)), Some(adapters)) = (loaded, &self.training) else { return };
        let body = json!({"lora_name": name}).to_string();
        for server in &self.servers.pool.servers {
            let _ = server.tell_briefly(&format!("{}/unload_lora_adapter", server.base()), body.as_bytes());
        }
        let _ = std::fs::remove_dir_all(adapters.folder.join(&name));
    }

    fn trainer(&mut self) -> Result<&mut dyn Trainer> {
        Ok(&mut *self.training.as_mut().context("the engine was opened for sampling only")?.trainer)
    }
}

impl Servers {
    /// Has one server do something about adapters. It answers in words.
    fn told(&self, server: &Server, what: &str, body: &Value) -> Result<()> {
        let url = format!("{}/{what}", server.base());
        let body = serde_json::to_vec(body).context("writing a request as JSON")?;
        match self.pool.ask_one(server, |server| server.tell(&url, &body)) {
            Ok(()) => Ok(()),
            // An attempt whose answer got lost has loaded it.
            Err(Unanswered::Refused { why, .. }) if why.contains("has already been loaded") => Ok(()),
            Err(unanswered) => Err(self.explained(unanswered)),
        }
    }

    fn explained(&self, unanswered: Unanswered) -> anyhow::Error {
        match unanswered {
            Unanswered::Own(error) => error,
            Unanswered::Tired { server, attempts, why } => {
                anyhow::anyhow!("no answer from {} after {attempts} attempts: {why}", server.base())
            }
            Unanswered::Refused { server, status, why } => {
                let closed = why.to_lowercase().contains("scale-out");
                let advice = match status.filter(|_| !closed) {
                    Some(401 | 403) => server.about_key(&self.options.api_key_env),
                    None | Some(404 | 405 | 501) => {
                        "look at engine.urls (up to /v1) and engine.model, and start vLLM with --enable-scale-out; for rl also with --enable-lora \
                         and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                            .into()
                    }
                    Some(413) => "lower the task's max_pixels".into(),
                    _ => "see whether the server holds engine.model, with pictures, and a context as long as rollout.max_tokens".into(),
                };
                anyhow::anyhow!("{} refuses with {why}; {advice}", server.base())
            }
        }
    }

    /// A request for one continuation. A picture stands among the ids as one token, which the server expands.
    fn request(&self, model: &str, stream: &Stream, sampling: &Sampling, seed: u64) -> Result<Value> {
        let (mut ids, mut pictures, mut at) = (Vec::with_capacity(stream.len()), Vec::new(), 0);
        for placed in &stream.images {
            ids.extend_from_slice(&stream.ids[at..=placed.first]);
            at = placed.first + placed.grid.tokens(self.frontend.processor.merge);
            let png = self.pngs.of(placed).with_context(|| format!("sending a view of {}", placed.path.display()))?;
            pictures.push(json!({"type": "image_url", "url": data_uri("png", &png), "uuid": sha256(&png)}));
        }
        ids.extend_from_slice(&stream.ids[at..]);
        let mut params = json!({
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "seed": seed >> 1,
            "logprobs": 0, "stop_token_ids": self.stops, "detokenize": false,
        });
        if let Some(p) = sampling.top_p {
            params["top_p"] = json!(p);
        }
        if let Some(k) = sampling.top_k {
            params["top_k"] = json!(k);
        }
        let mut request =
            json!({"model": model, "token_ids": ids, "sampling_params": params, "return_token_ids": true});
        if !pictures.is_empty() {
            request["content_parts"] = pictures.into();
        }
        Ok(request)
    }

    fn answer(&self, model: &str, stream: &Stream, sampling: &Sampling, seed: u64) -> Result<Completion> {
        let body =
            serde_json::to_vec(&self.request(model, stream, sampling, seed)?).context("writing a request as JSON")?;
        let read =
            |body: &[u8]| from_json(body, "the reply has no whole sample with its log-probs at choices[0]", sampled);
        let generate = |server: &Server| {
            let root = server.base();
            let root = root.strip_suffix("/v1").unwrap_or(root);
            server.post(&format!("{root}/inference/v1/generate"), &body, &read)
        };
        let Sampled { ids, logprobs, cut, prompt, versions } = match self.pool.ask(generate, |_| Ok(())) {
            Ok(sampled) => sampled,
            Err(unanswered) => return Err(self.explained(unanswered)),
        };
        ensure!(
            prompt == stream.ids,
            "a server made {} tokens of a prompt of {}: its tokenizer or picture settings are not those of model.path",
            prompt.len(),
            stream.len()
        );
        ensure!(
            versions.len() <= 1,
            "weights were changed at a server while it sampled (versions {}); nobody else may update them",
            versions.join(", ")
        );
        ensure!(
            ids.len() <= sampling.max_new_tokens && (!cut || ids.len() == sampling.max_new_tokens),
            "a server stopped after {} of {} tokens, behind a prompt of {}: start it with a --max-model-len of at least rollout.max_tokens",
            ids.len(),
            sampling.max_new_tokens,
            prompt.len()
        );
        self.pool.spent.count(prompt.len() as u64, ids.len() as u64);
        ended(&self.frontend, &self.banned, sampling, (ids, logprobs), cut)
    }
}

/// What is needed of a reply.
fn sampled(reply: &Value) -> Option<Sampled> {
    let choice = reply.get("choices")?.get(0)?;
    let ids =
        |list: &Value| list.as_array()?.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect::<Option<Vec<u32>>>();
    let told = choice.get("logprobs")?.get("content")?.as_array()?;
    let logprobs: Vec<f32> = told.iter().map(|one| Some(one["logprob"].as_f64()? as f32)).collect::<Option<_>>()?;
    let ids_said = ids(&choice["token_ids"])?;
    let spans = choice["weight_versions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut versions: Vec<String> = spans.iter().map(|span| span["version"].to_string()).collect();
    versions.dedup();
    // Where a number is missing vLLM says -9999; what is aborted may go better another time.
    let told = |logprob: &f32| (-9000.0..1e-3).contains(logprob);
    (ids_said.len() == logprobs.len() && logprobs.iter().all(told)).then_some(())?;
    let cut = match choice["finish_reason"].as_str()? {
        "length" => true,
        "stop" => false,
        _ => return None,
    };
    Some(Sampled { ids: ids_said, logprobs, cut, prompt: ids(&reply["prompt_token_ids"])?, versions })
}

impl Sampler for Fleet {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        ensure!(!sampling.ignore_end, "a server cannot be told to go on after an end of turn");
        self.publish()?;
        let Fleet { servers, training } = self;
        let loaded = training.as_ref().and_then(|adapters| adapters.loaded.as_ref());
        let model = loaded.map_or(&servers.options.model, |(_, name)| name);
        let servers = &*servers;
        one_by_one(prompts, servers.options.max_in_flight, |stream, seed| servers.answer(model, stream, sampling, seed))
    }

    fn end_step(&mut self) {
        if let Some(adapters) = &mut self.training {
            adapters.trainer.end_step();
        }
    }
}

impl Trainer for Fleet {
    fn frontend(&self) -> Frontend {
        self.servers.frontend.clone()
    }

    fn samples_exactly(&self) -> bool {
        false
    }

    fn logprobs(&mut self, groups: &[Group], who: Who) -> Result<Vec<Vec<Scores>>> {
        self.trainer()?.logprobs(groups, who)
    }

    fn accumulate(
        &mut self,
        groups: &[Group],
        weigh: &mut dyn FnMut(usize, usize, &Scores) -> Result<Weights>,
    ) -> Result<()> {
        self.trainer()?.accumulate(groups, weigh)
    }

    fn step(&mut self, learning_rate: f64) -> Result<f64> {
        self.trainer()?.step(learning_rate)
    }

    fn updates(&self) -> u64 {
        self.training.as_ref().map_or(0, |adapters| adapters.trainer.updates())
    }

    fn forget_views(&mut self) {
        if let Some(adapters) = &mut self.training {
            adapters.trainer.forget_views();
        }
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        self.trainer()?.save(dir)
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        let adapters = self.training.as_mut().context("the engine was opened for sampling only")?;
        adapters.restored += 1;
        let before = adapters.loaded.take();
        self.take_back(before);
        self.trainer()?.load(dir)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let Servers { options, pool, .. } = &self.servers;
        if pool.spent.answers() > 0 {
            say(&format!("{} gave {}", options.model, pool.spent.told("samples")));
        }
        let loaded = self.training.as_mut().and_then(|adapters| adapters.loaded.take());
        self.take_back(loaded);
    }
}
