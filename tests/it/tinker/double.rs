//! A server of the Tinker API inside the tests: strict, and hostile when told to be.
//!
//! Behind the protocol stands our own engine on a tiny model, one for each model that is made, so that what comes over the wire can be
//! held against what the engine does by itself. It refuses what the real servers refuse: fields that the SDK's types forbid, missing ones,
//! sequences whose targets are not shifted by one or whose lengths differ, pictures with another number of tokens, numbers out of turn,
//! weights loaded into a model that has done something, names used twice, models and sessions that it does not know. (SkyRL:
//! `skyrl/tinker/api.py`, `engine.py`, `backends/renderer.py`; SDK: `tinker/types/`.)

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::engine::{Finish, Group, Prompt, Sampler, Sampling, Trainer, Training, Weights, Who};
use foveate::episode::Stream;
use foveate::geometry::{View, smart_resize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::packed;
use crate::served::{self, Listening, Request};

const PROTOBUF: &str = "application/x-protobuf";

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    Good,
    /// Answered by somebody on the way, before the server sees it.
    Status(u16, &'static str),
    /// The connection is closed before the server sees the call.
    HangUp,
    /// Carried out, but the answer never arrives.
    LoseAnswer,
    /// Carried out, and the answer breaks off in its middle.
    CutAnswer,
    /// Carried out late: longer than the client waits.
    Late,
    /// Carried out, and then a proxy answers in the server's place.
    BadGateway,
    /// Of `retrieve_future`: not yet, in either way of saying so.
    TryAgain,
    Pending,
    /// The future is forgotten.
    Forget,
}

/// From an operation and how often it was called before to what happens.
pub type Script = dyn Fn(&str, usize) -> Act + Send + Sync;

/// What kind of server it is.
#[derive(Clone, Debug)]
pub struct Kind {
    pub key: Option<&'static str>,
    /// Answers a repeated request with the future of the first, as SkyRL does since #2035 and the hosted service.
    pub knows_repeats: bool,
    /// Pictures are dropped without a word in forward passes, or in samples.
    pub drops_in_training: bool,
    /// Where it drops them it pads by what is left, and fails: SkyRL's JAX backend.
    pub pads_by_inputs: bool,
    pub drops_in_samples: bool,
    /// Tells the log-probs of prompts.
    pub prompt_logprobs: bool,
    /// Divides each sequence's loss by the sum of its weights and takes the mean over sequences, as SkyRL's JAX backend does.
    pub means: bool,
    pub reports_loss: bool,
    pub models_at_once: usize,
    /// Of a request's body.
    pub largest: usize,
    /// Takes passes as protobuf alone, as TuFT does.
    pub protobuf_only: bool,
}

impl Default for Kind {
    fn default() -> Kind {
        Kind {
            key: None,
            knows_repeats: true,
            drops_in_training: false,
            pads_by_inputs: false,
            drops_in_samples: false,
            prompt_logprobs: false,
            means: false,
            reports_loss: true,
            models_at_once: 2,
            largest: 8 << 20,
            protobuf_only: false,
        }
    }
}

struct Model {
    engine: Embedded,
    /// The last number that a request had.
    number: u64,
    requests: usize,
    /// What was asked to be added up since the last update, with the derivative by each sampled token.
    pending: Vec<(Stream, Vec<f32>)>,
    /// Of the last update, in the places of the layout.
    gradient: Vec<f32>,
    /// Counts updates, so that a sampling session knows whether its weights are old.
    version: u64,
}

#[derive(Default)]
struct State {
    sessions: HashSet<String>,
    models: BTreeMap<String, Model>,
    made: usize,
    /// (model, version)
    samplers: HashMap<String, (String, u64)>,
    sampled: HashSet<(String, u64)>,
    futures: HashMap<String, Value>,
    /// (model, number) -> (operation and body, future)
    numbered: HashMap<(String, u64), (String, String)>,
    names: HashSet<String>,
    calls: Vec<(String, Act)>,
    updates: usize,
}

pub struct Double {
    listening: Listening,
    shared: Arc<Shared>,
}

struct Shared {
    kind: Kind,
    training: Training,
    checkpoint: PathBuf,
    dir: tempfile::TempDir,
    state: Mutex<State>,
    script: Box<Script>,
}

/// A refusal: status and detail.
type No = (u16, String);

fn no<T>(status: u16, why: impl Into<String>) -> Result<T, No> {
    Err((status, why.into()))
}

pub const BASE_MODEL: &str = "tiny/tiny-vl";

impl Double {
    /// A server whose base model is the checkpoint, and which updates as `training` says: AdamW parameters sent must be these.
    pub fn start(
        kind: Kind,
        checkpoint: &Path,
        training: Training,
        script: impl Fn(&str, usize) -> Act + Send + Sync + 'static,
    ) -> Double {
        let shared = Arc::new(Shared {
            kind,
            training,
            checkpoint: checkpoint.to_owned(),
            dir: tempfile::tempdir().unwrap(),
            state: Mutex::default(),
            script: Box::new(script),
        });
        let serving = shared.clone();
        Double { listening: Listening::with(move |stream| serving.serve(stream)), shared }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.listening.address)
    }

    /// The weights that a path of the server stands for, as written.
    pub fn weights(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.shared.folder(path).join("model.safetensors")).unwrap()
    }

    /// The gradient that the only model was last updated by.
    pub fn gradient(&self) -> Vec<f32> {
        let state = self.shared.state.lock().unwrap();
        state.models.values().next().unwrap().gradient.clone()
    }

    /// Updates that any model was ever given.
    pub fn updates(&self) -> usize {
        self.shared.state.lock().unwrap().updates
    }

    /// How often an operation was called, and how often that went well.
    pub fn calls(&self, operation: &str) -> (usize, usize) {
        let state = self.shared.state.lock().unwrap();
        let of = state.calls.iter().filter(|(name, _)| name == operation);
        (of.clone().count(), of.filter(|(_, act)| *act == Act::Good).count())
    }

    pub fn models(&self) -> usize {
        self.shared.state.lock().unwrap().models.len()
    }

    /// As a restart would: models, sessions and futures are gone, saved states are not.
    pub fn restart(&self) {
        let mut state = self.shared.state.lock().unwrap();
        *state = State {
            made: state.made,
            names: std::mem::take(&mut state.names),
            updates: state.updates,
            ..State::default()
        };
    }
}

impl Shared {
    /// Reads one request, does what the script says and hangs up.
    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream);
        let Some(Request { method, path, headers, body }) = served::request(&mut reader) else { return };
        let mut path = path.strip_prefix("/api/v1/").unwrap_or(&path).to_owned();
        let key = headers.get("x-api-key").map(String::as_str);
        let content = headers.get("content-type").map(String::as_str);
        let packed = content == Some(PROTOBUF);
        assert!(packed || content == Some("application/json") || body.is_empty(), "{content:?}");
        let mut read = serde_json::from_slice(&body).ok();
        if packed {
            assert_eq!(path, "forward_backward", "only passes are written so");
            let (operation, body) = packed::request(&body);
            (path, read) = (operation.to_owned(), Some(body));
        }
        let unpacked = self.kind.protobuf_only && !packed && path.starts_with("forward");
        let takes_packed = headers.get("accept").map(String::as_str) == Some(PROTOBUF) && path == "retrieve_future";
        let act = {
            let mut state = self.state.lock().unwrap();
            let before = state.calls.iter().filter(|(name, _)| *name == path).count();
            let act = (self.script)(&path, before);
            state.calls.push((path.clone(), act));
            act
        };
        let reply_of = |status: u16, kind: &str, body: &[u8]| {
            let n = body.len();
            let head =
                format!("HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\nconnection: close\r\ncontent-length: {n}");
            [format!("{head}\r\n\r\n").as_bytes(), body].concat()
        };
        let reply = |status: u16, body: &str| reply_of(status, "application/json", body.as_bytes());
        let said = match act {
            Act::HangUp => Vec::new(),
            Act::Status(status, body) => reply(status, body),
            Act::TryAgain => {
                reply(200, &json!({"type": "try_again", "request_id": "1", "queue_state": "active"}).to_string())
            }
            Act::Pending => reply(408, r#"{"detail": "Timeout waiting for result"}"#),
            Act::Good | Act::LoseAnswer | Act::CutAnswer | Act::Late | Act::BadGateway | Act::Forget => {
                if act == Act::Late {
                    thread::sleep(Duration::from_secs(4));
                }
                let (status, said) = match unpacked {
                    true => (415, json!({"detail": "expected application/x-protobuf"})),
                    false => self.answer((&method, &path), key, (body.len(), read), act == Act::Forget),
                };
                let whole = match packed::result(&said).filter(|_| takes_packed) {
                    Some(bytes) => reply_of(status, PROTOBUF, &bytes),
                    None => reply(status, &said.to_string()),
                };
                match act {
                    Act::LoseAnswer => Vec::new(),
                    Act::CutAnswer => whole[..whole.len() - 3].to_vec(),
                    Act::BadGateway => reply(502, "<html>bad gateway</html>"),
                    _ => whole,
                }
            }
        };
        let _ = reader.get_mut().write_all(&said);
    }

    /// `body`: its length as it came, and what it says.
    fn answer(
        &self,
        (method, path): (&str, &str),
        key: Option<&str>,
        body: (usize, Option<Value>),
        forget: bool,
    ) -> (u16, Value) {
        let mut state = self.state.lock().unwrap();
        let answered = || -> Result<Value, No> {
            if self.kind.key.is_some() && self.kind.key != key {
                return no(401, format!("invalid API key {}", key.unwrap_or("none")));
            }
            if body.0 > self.kind.largest {
                return no(413, "Request Entity Too Large");
            }
            match (method, path) {
                ("GET", "healthz") => return Ok(json!({"status": "ok"})),
                ("GET", "get_server_capabilities") => {
                    return Ok(
                        json!({"supported_models": [{"model_name": "other/model"}, {"model_name": BASE_MODEL}]}),
                    );
                }
                ("GET", _) => return no(404, "Not Found"),
                _ => {}
            }
            let body = body.1.ok_or((422, "the body is not JSON".to_owned()))?;
            if path == "retrieve_future" {
                let body = fields(&body, &["request_id"], &["allow_metadata_only"])?;
                let id = text(body, "request_id")?;
                if forget {
                    state.futures.remove(id);
                }
                return match state.futures.get(id) {
                    Some(result) => match result.get("failed").and_then(Value::as_str) {
                        Some(why) => no(400, why),
                        None => Ok(result.clone()),
                    },
                    None => no(404, "Future not found"),
                };
            }
            self.operation(&mut state, path, &body)
        }();
        match answered {
            Ok(said) => (200, said),
            Err((status, why)) => (status, json!({"detail": why})),
        }
    }

    /// Everything but futures. What a future will hold is computed at once.
    fn operation(&self, state: &mut State, path: &str, body: &Value) -> Result<Value, No> {
        match path {
            "create_session" => {
                fields(body, &["tags", "user_metadata", "sdk_version"], &["type", "project_id"])?;
                let id = format!("session_{}", state.sessions.len());
                state.sessions.insert(id.clone());
                return Ok(json!({"type": "create_session", "session_id": id, "info_message": null}));
            }
            "session_heartbeat" => {
                let body = fields(body, &["session_id"], &["type"])?;
                known_session(state, body)?;
                return Ok(json!({"type": "session_heartbeat"}));
            }
            "create_model" => {
                let body = fields(
                    body,
                    &["session_id", "model_seq_id", "base_model"],
                    &["user_metadata", "lora_config", "type"],
                )?;
                known_session(state, body)?;
                let lora =
                    fields(&body["lora_config"], &["rank"], &["seed", "train_unembed", "train_mlp", "train_attn"])?;
                if text(body, "base_model")? != BASE_MODEL {
                    return no(400, "unknown base model");
                }
                if lora["rank"] != 0 {
                    return Ok(self.future(state, Err("this server trains all weights: rank 0".into())));
                }
                if state.models.len() >= self.kind.models_at_once {
                    return Ok(self.future(state, Err("SkyRLTrainBackend already has a 'policy' model".into())));
                }
                state.made += 1;
                let id = format!("model_{}", state.made);
                let options = ModelOptions { path: self.checkpoint.clone(), ..ModelOptions::default() };
                let engine = Embedded::open(&options, Some(&self.training)).unwrap();
                let model =
                    Model { engine, number: 0, requests: 0, pending: Vec::new(), gradient: Vec::new(), version: 0 };
                state.models.insert(id.clone(), model);
                return Ok(
                    self.future(state, Ok(json!({"model_id": id, "base_model": BASE_MODEL, "type": "create_model"})))
                );
            }
            "unload_model" => {
                let body = fields(body, &["model_id"], &["type"])?;
                let id = text(body, "model_id")?;
                return match state.models.remove(id) {
                    Some(_) => Ok(self.future(state, Ok(json!({"model_id": id, "status": "unloaded"})))),
                    None => no(404, "Model not found"),
                };
            }
            "asample" => return self.sample(state, body),
            _ => {}
        }

        let (required, optional): (&[&str], &[&str]) = match path {
            "forward" => (&["model_id", "forward_input", "seq_id"], &[]),
            "forward_backward" => (&["model_id", "forward_backward_input", "seq_id"], &[]),
            "optim_step" => (&["model_id", "adam_params", "seq_id"], &["type"]),
            "save_weights" => (&["model_id", "path", "seq_id"], &["type", "ttl_seconds", "overwrite"]),
            "load_weights" => (&["model_id", "path", "seq_id", "optimizer"], &["type", "weights_access_token"]),
            "save_weights_for_sampler" => {
                (&["model_id", "seq_id", "sampling_session_seq_id"], &["type", "path", "ttl_seconds"])
            }
            _ => return no(404, "Not Found"),
        };
        let fields = fields(body, required, optional)?;
        let id = text(fields, "model_id")?.to_owned();
        let number = fields["seq_id"].as_u64().ok_or((422, "seq_id is no number".to_owned()))?;
        let asked = format!("{path} {body}");
        if !state.models.contains_key(&id) {
            return no(404, "Model not found");
        }
        let numbered = (id.clone(), number);
        // Saving is told from its repetition by name, not by number.
        let saving = path.starts_with("save_");
        if self.kind.knows_repeats
            && !saving
            && let Some((before, future)) = state.numbered.get(&numbered)
        {
            return match *before == asked {
                true => Ok(json!({"future_id": future, "request_id": future, "status": "pending"})),
                false => no(409, "Training request sequence number was reused"),
            };
        }
        let model = state.models.get_mut(&id).unwrap();
        if number > model.number + 1 || number == 0 {
            return no(400, format!("seq_id {number} after {}", model.number));
        }
        if path == "load_weights" && model.requests > 0 {
            return no(400, format!("LoadWeights is not permitted with seq_id {number}"));
        }
        if saving {
            let name = match path {
                "save_weights" => text(fields, "path")?.to_owned(),
                _ => format!("ss{}_seq{number}", fields["sampling_session_seq_id"]),
            };
            let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if name.is_empty() || !name.chars().all(good) {
                return no(422, format!("path {name:?} should match pattern '^[a-zA-Z0-9_-]+$'"));
            }
            if !state.names.insert(format!("{id}/{path}/{name}")) {
                return no(409, format!("Checkpoint '{name}' already exists for model '{id}'"));
            }
        }
        model.number = model.number.max(number);
        model.requests += 1;
        let result = match path {
            "forward" => self.pass(model, &fields["forward_input"], false),
            "forward_backward" => self.pass(model, &fields["forward_backward_input"], true),
            "optim_step" => {
                let result = self.step(model, &fields["adam_params"]);
                state.updates += usize::from(result.is_ok());
                result
            }
            "save_weights" => {
                let path = format!("tinker://{id}/weights/{}", text(fields, "path")?);
                let folder = self.folder(&path);
                std::fs::create_dir_all(&folder).unwrap();
                model.engine.save(&folder).unwrap();
                Ok(json!({"path": path, "type": "save_weights"}))
            }
            "load_weights" => {
                let folder = self.folder(text(fields, "path")?);
                if !folder.is_dir() {
                    return no(404, "Checkpoint not found");
                }
                if fields["optimizer"] == true {
                    model.engine.load(&folder).unwrap();
                } else {
                    return no(400, "this server loads the optimiser too");
                }
                Ok(json!({"type": "load_weights"}))
            }
            _ => {
                let session = format!("sampling_{}", state.samplers.len());
                state.samplers.insert(session.clone(), (id.clone(), model.version));
                Ok(json!({"path": null, "sampling_session_id": session, "type": "save_weights_for_sampler"}))
            }
        };
        // What is wrong with the data is found where it is used: the request is taken, and its future fails.
        let future = self.future(state, result.map_err(|(_, why)| why));
        let name = future["request_id"].as_str().unwrap().to_owned();
        state.numbered.insert(numbered, (asked, name));
        Ok(future)
    }

    fn future(&self, state: &mut State, result: Result<Value, String>) -> Value {
        let id = (state.futures.len() + 1).to_string();
        state.futures.insert(id.clone(), result.unwrap_or_else(|why| json!({"failed": why})));
        json!({"future_id": id, "request_id": id, "status": "pending"})
    }

    /// Where the server keeps what a path names.
    fn folder(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches("tinker://").replace('/', "+"))
    }

    fn pass(&self, model: &mut Model, input: &Value, backward: bool) -> Result<Value, No> {
        let input = fields(input, &["data", "loss_fn"], &["loss_fn_config"])?;
        let loss = text(input, "loss_fn")?;
        let known = ["cross_entropy", "importance_sampling"];
        if !known.contains(&loss) {
            return no(422, format!("Input should be one of {known:?}"));
        }
        let (mut outputs, mut sum) = (Vec::new(), 0.0);
        let data = input["data"].as_array().ok_or((422, "data is no list".to_owned()))?;
        for datum in data {
            let datum = fields(datum, &["model_input", "loss_fn_inputs"], &[])?;
            let (mut stream, pictures) = self.stream(model, &datum["model_input"], self.kind.drops_in_training)?;
            let own = match loss {
                "cross_entropy" => &["target_tokens", "weights"][..],
                _ => &["target_tokens", "logprobs", "advantages"],
            };
            let tensors = fields(&datum["loss_fn_inputs"], own, &[])?;
            let targets = numbers(tensors, "target_tokens", "int64")?;
            // Of a server that drops pictures nothing can be expected: it does not look.
            let blind = self.kind.drops_in_training && datum["model_input"]["chunks"].to_string().contains("\"image\"");
            if blind && self.kind.pads_by_inputs {
                return no(400, format!("Sequence length {} exceeds max_length {}", targets.len(), stream.len()));
            }
            if !blind {
                let n = stream.len();
                for name in own {
                    let found = tensors[*name]["data"].as_array().map_or(0, Vec::len);
                    if found != n {
                        return no(400, format!("{name} has {found} numbers for {n} inputs"));
                    }
                }
                for (i, target) in targets.iter().enumerate().take(n - 1) {
                    let next =
                        if pictures.iter().any(|range| range.contains(&(i + 1))) { 0 } else { stream.ids[i + 1] };
                    if *target != f64::from(next) {
                        return no(400, format!("target {i} is {target}, the next input is {next}"));
                    }
                }
                stream.push_context(&[targets[n - 1] as u32], Vec::new(), u32::MAX, 2).unwrap();
            }
            let logprobs = all_logprobs(model, &stream);
            if backward {
                let slopes: Vec<f32> = match loss {
                    "cross_entropy" => {
                        let weights = numbers(tensors, "weights", "float32")?;
                        let scale = if self.kind.means { 1.0 / weights.iter().sum::<f64>().max(1e-9) } else { 1.0 };
                        weights.iter().map(|w| (-w * scale) as f32).collect()
                    }
                    _ => {
                        let advantages = numbers(tensors, "advantages", "float32")?;
                        let before = numbers(tensors, "logprobs", "float32")?;
                        // All targets have the weight 1.
                        let scale = if self.kind.means { 1.0 / advantages.len() as f64 } else { 1.0 };
                        let ratio = |i: usize| (f64::from(logprobs[i]) - before[i]).exp();
                        advantages
                            .iter()
                            .enumerate()
                            .map(|(i, a)| (-a * scale * if *a == 0.0 { 0.0 } else { ratio(i) }) as f32)
                            .collect()
                    }
                };
                sum += match loss {
                    "cross_entropy" => {
                        slopes.iter().zip(&logprobs).map(|(s, l)| f64::from(*s) * f64::from(*l)).sum::<f64>()
                    }
                    _ => slopes.iter().map(|s| f64::from(*s)).sum::<f64>(),
                };
                // Only what has a weight is computed.
                stream.sampled = std::iter::once(false).chain(slopes.iter().map(|s| *s != 0.0)).collect();
                let slopes = slopes.into_iter().filter(|s| *s != 0.0).collect();
                model.pending.push((stream, slopes));
            }
            let n = logprobs.len();
            outputs.push(json!({"logprobs": {"data": logprobs, "dtype": "float32", "shape": [n]}}));
        }
        let metrics = if backward && self.kind.reports_loss { json!({"total_loss:sum": sum}) } else { json!({}) };
        Ok(json!({"loss_fn_output_type": "scalar", "loss_fn_outputs": outputs, "metrics": metrics}))
    }

    fn step(&self, model: &mut Model, params: &Value) -> Result<Value, No> {
        let optim = &self.training.optim;
        let params =
            fields(params, &["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"], &[])?;
        for (name, own) in [
            ("beta1", optim.beta1),
            ("beta2", optim.beta2),
            ("eps", optim.eps),
            ("weight_decay", optim.weight_decay),
            ("grad_clip_norm", optim.clip_norm),
        ] {
            if params[name] != json!(own) {
                return no(400, format!("{name} is {}, this test has {own}", params[name]));
            }
        }
        if model.pending.is_empty() {
            return no(400, "optim_step without a gradient");
        }
        let pending = std::mem::take(&mut model.pending);
        let scale = if self.kind.means { 1.0 / pending.len() as f32 } else { 1.0 };
        let groups: Vec<Group> = pending.iter().map(|(stream, _)| vec![stream]).collect();
        let mut weigh = |g: usize, _: usize, _: &foveate::engine::Scores| {
            Ok(Weights { logprobs: pending[g].1.iter().map(|slope| slope * scale).collect(), entropies: None })
        };
        model.engine.accumulate(&groups, &mut weigh).unwrap();
        model.gradient = model.engine.gradients().unwrap().data.clone();
        let norm = model.engine.step(params["learning_rate"].as_f64().unwrap()).unwrap();
        model.version += 1;
        Ok(json!({"metrics": {"skyrl.ai/grad_norm": norm, "skyrl.ai/learning_rate": params["learning_rate"]}}))
    }

    fn sample(&self, state: &mut State, body: &Value) -> Result<Value, No> {
        let body = fields(
            body,
            &["num_samples", "prompt", "sampling_params", "sampling_session_id", "seq_id"],
            &["type", "prompt_logprobs", "topk_prompt_logprobs"],
        )?;
        let session = text(body, "sampling_session_id")?.to_owned();
        let Some((id, version)) = state.samplers.get(&session).cloned() else {
            return no(404, "Sampling session not found");
        };
        let Some(model) = state.models.get_mut(&id) else { return no(404, "Model not found") };
        if model.version != version {
            return no(400, "the weights of this sampling session are old");
        }
        let params =
            fields(&body["sampling_params"], &["max_tokens", "seed", "temperature"], &["stop", "top_k", "top_p"])?;
        let Some(stop) = params["stop"].as_array().filter(|stop| stop.iter().all(Value::is_u64)) else {
            return no(400, "stop: expected token ids");
        };
        let (stream, _) = self.stream(model, &body["prompt"], self.kind.drops_in_samples)?;
        let seed = params["seed"].as_u64().ok_or((422, "seed".to_owned()))?;
        let seeds: Vec<u64> = (0..body["num_samples"].as_u64().unwrap_or(0)).map(|i| seed + i).collect();
        let sampling = Sampling {
            temperature: params["temperature"].as_f64().unwrap() as f32,
            top_k: params["top_k"].as_u64().map(|k| k as usize),
            top_p: None,
            max_new_tokens: params["max_tokens"].as_u64().filter(|n| *n > 0).ok_or((400, "max_tokens".to_owned()))?
                as usize,
            stop: Vec::new(),
            ignore_end: false,
        };
        let said = model.engine.sample(&[Prompt { session: 0, stream: &stream, seeds: &seeds }], &sampling).unwrap();
        model.engine.end_step();
        let sequences: Vec<Value> = said[0]
            .iter()
            .map(|said| {
                let reason = match said.finish {
                    Finish::EndOfTurn => {
                        assert!(stop.contains(&json!(said.ids.last())), "the end of turn is among the stops");
                        "stop"
                    }
                    _ => "length",
                };
                json!({"stop_reason": reason, "tokens": said.ids, "logprobs": said.logprobs})
            })
            .collect();
        let told = (self.kind.prompt_logprobs && body.get("prompt_logprobs") == Some(&json!(true)))
            .then(|| std::iter::once(Value::Null).chain((1..stream.len()).map(|_| json!(-1.0))).collect::<Vec<_>>());
        let number = body["seq_id"].as_u64().ok_or((422, "seq_id".to_owned()))?;
        // A number that comes again is the same request again; both are answered.
        state.sampled.insert((session, number));
        Ok(self.future(state, Ok(json!({"type": "sample", "sequences": sequences, "prompt_logprobs": told}))))
    }

    /// Chunks as a conversation, and the rows of its pictures.
    fn stream(&self, model: &Model, input: &Value, drops: bool) -> Result<(Stream, Vec<std::ops::Range<usize>>), No> {
        let input = fields(input, &["chunks"], &[])?;
        let processor = &model.engine.frontend.processor;
        let pad = model.engine.frontend.chat.special.image_pad;
        let (mut stream, mut pictures) = (Stream::default(), Vec::new());
        let chunks = input["chunks"].as_array().ok_or((422, "chunks is no list".to_owned()))?;
        for chunk in chunks {
            match chunk["type"].as_str() {
                Some("encoded_text") => {
                    let chunk = fields(chunk, &["type", "tokens"], &[])?;
                    let ids: Vec<u32> = chunk["tokens"]
                        .as_array()
                        .and_then(|ids| ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect())
                        .ok_or((422, "tokens: expected whole numbers".to_owned()))?;
                    if ids.is_empty() || ids.contains(&pad) {
                        return no(400, "an empty text chunk, or one with placeholders of pictures");
                    }
                    stream.push_context(&ids, Vec::new(), pad, processor.merge).unwrap();
                }
                Some("image") => {
                    let chunk = fields(chunk, &["type", "data", "format"], &["expected_tokens"])?;
                    let bytes = STANDARD.decode(text(chunk, "data")?).map_err(|e| (422, e.to_string()))?;
                    if chunk["format"] != "png" || !bytes.starts_with(b"\x89PNG") {
                        return no(422, "format: expected a png");
                    }
                    if drops {
                        continue;
                    }
                    let name: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                    let path = self.dir.path().join(name).with_extension("png");
                    std::fs::write(&path, &bytes).unwrap();
                    let size = model.engine.frontend.pictures.get(&path).map_err(|e| (400, format!("{e:#}")))?.size();
                    // As the server's own processor would, whatever the client thinks.
                    let shown = smart_resize(size, processor.budget).map_err(|e| (400, e.to_string()))?;
                    let view = View { image: 0, region: size.bounds(), size: shown };
                    let grid = processor.grid(view.size);
                    let tokens = grid.tokens(processor.merge);
                    if chunk.get("expected_tokens").is_some_and(|expected| *expected != json!(tokens)) {
                        return no(
                            400,
                            format!("Image: expected_tokens={} but render returned {tokens}", chunk["expected_tokens"]),
                        );
                    }
                    pictures.push(stream.len()..stream.len() + tokens);
                    let ids = vec![pad; tokens];
                    stream
                        .push_context(&ids, vec![(Arc::from(path.as_path()), view, grid)], pad, processor.merge)
                        .unwrap();
                }
                other => return no(422, format!("chunk of type {other:?}")),
            }
        }
        Ok((stream, pictures))
    }
}

/// Log-probs of all tokens but the first; of those that cannot be sampled, 0.
fn all_logprobs(model: &mut Model, stream: &Stream) -> Vec<f32> {
    let mut stream = stream.clone();
    let banned = model.engine.frontend.chat.banned(model.engine.model.config.text.vocab);
    stream.sampled = stream.ids.iter().enumerate().map(|(i, id)| i > 0 && !banned.contains(id)).collect();
    let scores = model.engine.logprobs(&[vec![&stream]], Who::Policy).unwrap().remove(0).remove(0).logprobs;
    let mut scores = scores.into_iter();
    stream.sampled[1..].iter().map(|&s| if s { scores.next().unwrap() } else { 0.0 }).collect()
}

fn known_session(state: &State, body: &Map<String, Value>) -> Result<(), No> {
    match state.sessions.contains(text(body, "session_id")?) {
        true => Ok(()),
        false => no(404, "Session not found"),
    }
}

/// An object with these fields and no others, as the SDK's types have it.
fn fields<'a>(body: &'a Value, required: &[&str], optional: &[&str]) -> Result<&'a Map<String, Value>, No> {
    let Some(object) = body.as_object() else { return no(422, format!("expected an object, found {body}")) };
    if let Some(missing) = required.iter().find(|name| !object.contains_key(**name)) {
        return no(422, format!("Field required: {missing}"));
    }
    match object.keys().find(|name| !required.contains(&name.as_str()) && !optional.contains(&name.as_str())) {
        Some(extra) => no(422, format!("Extra inputs are not permitted: {extra}")),
        None => Ok(object),
    }
}

fn text<'a>(body: &'a Map<String, Value>, name: &str) -> Result<&'a str, No> {
    body.get(name).and_then(Value::as_str).ok_or((422, format!("{name}: Input should be a valid string")))
}

fn numbers(tensors: &Map<String, Value>, name: &str, dtype: &str) -> Result<Vec<f64>, No> {
    let tensor = fields(&tensors[name], &["data", "dtype"], &["shape"])?;
    let data: Option<Vec<f64>> = tensor["data"].as_array().and_then(|data| data.iter().map(Value::as_f64).collect());
    match data {
        Some(data) if tensor["dtype"] == dtype && tensor["shape"] == json!([data.len()]) => Ok(data),
        _ => no(422, format!("{name}: expected numbers of {dtype}")),
    }
}
