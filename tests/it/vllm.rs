//! The engine on vLLM servers: what they sample from adapters that are trained here is what those adapters say, version by version, whatever
//! happens on the way; and what cannot be done is refused in one clear line.
//!
//! The server is a real one on a loopback port that takes what vLLM 0.32 takes: ids with one placeholder a picture, pictures beside them, adapters
//! by name and folder. Behind it is our engine, which reads the adapters from the folder as any reader of PEFT's layout would. The real vLLM was
//! asked in `tests/engines`.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foveate::config::BadConfig;
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::engine::vllm::{Fleet, Options};
use foveate::engine::{self, Finish, Frontend, Prompt, Sampler, Sampling};
use foveate::episode::Stream;
use foveate::geometry::View;
use foveate::image::decode_bytes;
use foveate::rl;
use foveate::run::Start;
use serde_json::{Value, json};

use crate::served::{self, Listening, Request};
use crate::tinker::{metrics, plan, taught, train, world};

/// What happens to a call.
#[derive(Clone, Copy, PartialEq)]
enum Act {
    Good,
    Status(u16),
    HangUp,
    /// Done, but nobody hears of it.
    Lost,
    Garbage,
}

/// What kind of server it is.
#[derive(Clone, Copy, Default, PartialEq)]
enum Kind {
    #[default]
    Good,
    /// Started without `--enable-scale-out`.
    Closed,
    /// Reads pictures in half their size.
    OtherPictures,
    /// Its weights are changed while it samples.
    Restless,
    /// Has room for a few tokens less than are asked for.
    Short,
}

type Script = dyn Fn(&str, usize) -> Act + Send + Sync;

struct Shared {
    kind: Kind,
    models: Mutex<BTreeMap<String, Embedded>>,
    pictures: tempfile::TempDir,
    calls: AtomicUsize,
    /// Names of adapters, in the order in which they were loaded.
    loaded: Mutex<Vec<String>>,
    script: Box<Script>,
}

struct Server {
    listening: Listening,
    shared: Arc<Shared>,
}

fn open(path: &Path) -> Embedded {
    Embedded::open(&ModelOptions { path: path.into(), ..ModelOptions::default() }, None).unwrap()
}

impl Server {
    fn start(base: &Path, kind: Kind, script: impl Fn(&str, usize) -> Act + Send + Sync + 'static) -> Server {
        let shared = Arc::new(Shared {
            kind,
            models: Mutex::new(BTreeMap::from([("tiny".into(), open(base))])),
            pictures: tempfile::tempdir().unwrap(),
            calls: AtomicUsize::new(0),
            loaded: Mutex::default(),
            script: Box::new(script),
        });
        let serving = Arc::clone(&shared);
        Server { listening: Listening::with(move |stream| serving.serve(stream)), shared }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.listening.address)
    }
}

type Reply = (u16, String);

fn fault(status: u16, why: String) -> Reply {
    (status, json!({"error": {"message": why, "code": status}}).to_string())
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream);
        let Some(Request { method, path, body, .. }) = served::request(&mut reader) else { return };
        assert_eq!(method, "POST");
        let act = (self.script)(&path, self.calls.fetch_add(1, Ordering::SeqCst));
        let body: Value = serde_json::from_slice(&body).unwrap();
        let (status, said) = match act {
            Act::HangUp => return,
            Act::Status(status) => fault(status, "not now".into()),
            Act::Garbage => (200, "<html>".into()),
            Act::Good | Act::Lost => match path.as_str() {
                "/inference/v1/generate" => self.generate(&body),
                "/v1/load_lora_adapter" => self.load(&body),
                "/v1/unload_lora_adapter" => {
                    let name = body["lora_name"].as_str().unwrap();
                    match self.models.lock().unwrap().remove(name) {
                        Some(_) => (200, format!("Success: LoRA adapter '{name}' removed successfully.")),
                        None => fault(404, format!("The lora adapter '{name}' cannot be found.")),
                    }
                }
                other => panic!("{other}"),
            },
        };
        if act == Act::Lost {
            return;
        }
        let head =
            format!("HTTP/1.1 {status} Said\r\nconnection: close\r\nretry-after: 0\r\ncontent-length: {}", said.len());
        let _ = reader.get_mut().write_all(format!("{head}\r\n\r\n{said}").as_bytes());
    }

    fn load(&self, body: &Value) -> Reply {
        let (name, path) = (body["lora_name"].as_str().unwrap(), PathBuf::from(body["lora_path"].as_str().unwrap()));
        assert!(path.is_absolute(), "the server has a working folder of its own");
        let mut models = self.models.lock().unwrap();
        if models.contains_key(name) {
            return fault(400, format!("The lora adapter '{name}' has already been loaded."));
        }
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            if !path.join(file).is_file() {
                return fault(404, format!("Loading lora {name} failed: No adapter found for {}", path.display()));
            }
        }
        models.insert(name.into(), open(&path));
        self.loaded.lock().unwrap().push(name.into());
        (200, format!("Success: LoRA adapter '{name}' added successfully."))
    }

    fn generate(&self, body: &Value) -> Reply {
        if self.kind == Kind::Closed {
            let why = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.";
            return fault(403, why.into());
        }
        let known = ["model", "token_ids", "content_parts", "sampling_params", "return_token_ids"];
        let unknown: Vec<&String> =
            body.as_object().unwrap().keys().filter(|key| !known.contains(&key.as_str())).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
        let name = body["model"].as_str().unwrap();
        let mut models = self.models.lock().unwrap();
        let Some(engine) = models.get_mut(name) else {
            return fault(404, format!("The model `{name}` does not exist."));
        };
        let Frontend { chat, processor, .. } = engine.frontend.clone();
        let ids: Vec<u32> =
            body["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let pad = chat.special.image_pad;
        let mut parts = body["content_parts"].as_array().cloned().unwrap_or_default().into_iter();
        let mut stream = Stream::default();
        for id in ids {
            if id != pad {
                stream.push_context(&[id], Vec::new(), pad, processor.merge).unwrap();
                continue;
            }
            let Some(part) = parts.next() else { return fault(400, "a placeholder without a picture".into()) };
            assert_eq!((part["type"].as_str(), part["uuid"].as_str().map(str::len)), (Some("image_url"), Some(64)));
            let bytes = part["url"].as_str().unwrap().strip_prefix("data:image/png;base64,").unwrap();
            let bytes = STANDARD.decode(bytes).unwrap();
            let path = self.pictures.path().join(part["uuid"].as_str().unwrap()).with_extension("png");
            std::fs::write(&path, &bytes).unwrap();
            let size = decode_bytes(&bytes, "sent").unwrap().size();
            let mut view = View::whole(0, size, processor.budget).unwrap();
            if self.kind == Kind::OtherPictures {
                view.size.width += processor.budget.factor;
            }
            let grid = processor.grid(view.size);
            let ids = vec![pad; grid.tokens(processor.merge)];
            stream.push_context(&ids, vec![(Arc::from(path.as_path()), view, grid)], pad, processor.merge).unwrap();
        }
        if parts.next().is_some() {
            return fault(400, "a picture without a placeholder".into());
        }
        let params = &body["sampling_params"];
        assert_eq!((&params["logprobs"], &params["detokenize"]), (&json!(0), &json!(false)));
        let sampling = Sampling {
            temperature: params["temperature"].as_f64().unwrap() as f32,
            top_k: params["top_k"].as_u64().map(|k| k as usize),
            top_p: params["top_p"].as_f64().map(|p| p as f32),
            max_new_tokens: params["max_tokens"].as_u64().unwrap() as usize
                - if self.kind == Kind::Short { 7 } else { 0 },
            stop: vec![],
            ignore_end: false,
        };
        let seeds = [params["seed"].as_u64().unwrap()];
        let said = engine.sample(&[Prompt { session: 0, stream: &stream, seeds: &seeds }], &sampling).unwrap();
        engine.end_step();
        let said = &said[0][0];
        let one =
            |(id, logprob): (&u32, &f32)| json!({"token_id": id, "logprob": logprob, "rank": 1, "top_logprobs": []});
        let content: Vec<Value> = said.ids.iter().zip(&said.logprobs).map(one).collect();
        let spans = match self.kind {
            Kind::Restless => json!([{"version": "1", "start": 0, "end": 1}, {"version": "2", "start": 1, "end": 2}]),
            _ => json!([{"version": "default", "start": 0, "end": said.ids.len()}]),
        };
        let choice = json!({
            "index": 0, "finish_reason": if said.finish == Finish::Length { "length" } else { "stop" }, "stop_reason": null,
            "token_ids": said.ids, "logprobs": {"content": content}, "weight_versions": spans,
        });
        (200, json!({"model": name, "prompt_token_ids": stream.ids, "choices": [choice]}).to_string())
    }
}

/// A run of adapters on these servers.
fn on(servers: &[&Server], dir: &Path, out: &str, extra: &[&str]) -> rl::Plan {
    let lora = ["model.lora.rank=4", "model.lora.alpha=8", "model.freeze=[\"vision\", \"merger\"]"];
    let mut plan = plan(dir, out, &[&lora, extra].concat());
    plan.engine = engine::Options::Vllm(options(servers, dir));
    plan.resolve().unwrap()
}

fn options(servers: &[&Server], dir: &Path) -> Options {
    Options {
        urls: servers.iter().map(|server| server.url()).collect(),
        model: "tiny".into(),
        adapters: Some(dir.join("adapters")),
        api_key_env: "FOVEATE_TEST_NO_SUCH_KEY".into(),
        max_in_flight: 4,
        pause_s: 0.002,
        timeout_s: 30.0,
        ..Options::default()
    }
}

fn adapters(plan: &rl::Plan) -> Vec<u8> {
    std::fs::read(plan.train.out.join("checkpoints/3/adapter_model.safetensors")).unwrap()
}

/// What a whole run with a server that does nothing wrong tells of each step.
#[cfg(feature = "torch")]
pub fn run(dir: &Path, out: &str, change: impl FnOnce(&mut Options)) -> Vec<Value> {
    let server = Server::start(&taught(dir), Kind::Good, |_, _| Act::Good);
    let mut plan = on(&[&server], dir, out, &["task.turns=2", "task.on_invalid=resend_image"]);
    change(settings_of(&mut plan));
    train(&plan, Start::New).unwrap();
    metrics(&plan)
}

#[test]
fn each_step_samples_from_the_adapters_as_they_stand_and_what_goes_wrong_changes_nothing() {
    let (_folder, dir) = world();
    let calm = Server::start(&taught(&dir), Kind::Good, |_, _| Act::Good);
    // Two turns: two pictures in one conversation.
    let extra = ["task.turns=2", "task.on_invalid=resend_image"];
    let first = on(&[&calm], &dir, "calm", &extra);
    train(&first, Start::New).unwrap();
    // Two updates a step, and only what is sampled from is loaded.
    let versions: Vec<String> =
        calm.shared.loaded.lock().unwrap().iter().map(|n| n.rsplit('-').next().unwrap().to_owned()).collect();
    assert_eq!(versions, ["0", "2", "4"]);
    assert_eq!(
        calm.shared.models.lock().unwrap().keys().collect::<Vec<_>>(),
        ["tiny"],
        "all adapters were handed back"
    );
    assert_eq!(std::fs::read_dir(dir.join("adapters")).unwrap().count(), 0);
    for (step, metrics) in metrics(&first).iter().enumerate() {
        // The server adds adapters into the weights, this program computes them beside: the last bits differ, and no more. A version behind would be
        // off by a hundred times as much.
        let off = metrics["mismatch_logprob/max"].as_f64().unwrap();
        assert!(off < 2e-4, "step {}: {off}", step + 1);
    }
    let moved = metrics(&first).iter().map(|m| m["actor/grad_norm"].as_f64().unwrap()).fold(0.0, f64::max);
    assert!(moved > 1e-3, "nothing was learnt, so nothing is shown");

    let hostile = |path: &str, call: usize| match (path.contains("lora"), call % 13) {
        (true, 0..4) => Act::Lost,
        (true, 4) => Act::Status(503),
        (_, 6) => Act::HangUp,
        (_, 8) => Act::Status(500),
        (false, 10) => Act::Garbage,
        (false, 12) => Act::Lost,
        _ => Act::Good,
    };
    let (one, other) = (
        Server::start(&taught(&dir), Kind::Good, hostile),
        Server::start(&taught(&dir), Kind::Good, move |path, call| hostile(path, call + 3)),
    );
    let second = on(&[&one, &other], &dir, "hostile", &extra);
    train(&second, Start::New).unwrap();
    assert!(adapters(&first) == adapters(&second), "a disturbed run ends with other adapters");
    assert_eq!(one.shared.loaded.lock().unwrap().len(), 3, "every server gets every version");
    assert_eq!(other.shared.loaded.lock().unwrap().len(), 3);
}

#[test]
fn a_run_that_was_stopped_goes_on_at_a_server_that_forgot_everything() {
    let (_folder, dir) = world();
    let whole = Server::start(&taught(&dir), Kind::Good, |_, _| Act::Good);
    let uninterrupted = on(&[&whole], &dir, "whole", &[]);
    train(&uninterrupted, Start::New).unwrap();

    // The second step finds nobody any more.
    let dying = Server::start(&taught(&dir), Kind::Good, |_, call| if call < 24 { Act::Good } else { Act::HangUp });
    let mut stopped = on(&[&dying], &dir, "stopped", &[]);
    let error = format!("{:#}", train(&stopped, Start::New).unwrap_err());
    assert!(error.contains("after 6 attempts") && error.contains("gave no response"), "{error}");
    settings_of(&mut stopped).urls = vec![whole.url()];
    train(&stopped, Start::Resume).unwrap();
    assert!(adapters(&uninterrupted) == adapters(&stopped));
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line() {
    let (_folder, dir) = world();
    let fails = |kind: Kind| {
        let server = Server::start(&taught(&dir), kind, |_, _| Act::Good);
        format!("{:#}", train(&on(&[&server], &dir, "fails", &[]), Start::New).unwrap_err())
    };
    let error = fails(Kind::Closed);
    assert!(error.contains("--enable-scale-out") && error.contains("engine.urls"), "{error}");
    let error = fails(Kind::OtherPictures);
    assert!(error.contains("tokens of a prompt of") && error.contains("picture settings"), "{error}");
    let error = fails(Kind::Short);
    assert!(error.contains("after 1 of 8 tokens") && error.contains("--max-model-len"), "{error}");
    let error = fails(Kind::Restless);
    assert!(error.contains("weights were changed at a server while it sampled"), "{error}");

    let server = Server::start(&taught(&dir), Kind::Good, |_, _| Act::Good);
    let mut other = on(&[&server], &dir, "other", &[]);
    settings_of(&mut other).adapters = None;
    let refused = |plan: &rl::Plan| plan.engine.ensure_trains(&plan.model, plan.rollout.temperature).unwrap_err();
    let error = refused(&other);
    assert!(error.is::<BadConfig>() && error.to_string().contains("engine.adapters"), "{error}");
    settings_of(&mut other).adapters = Some(dir.join("adapters"));
    let mut nobody = other.clone();
    settings_of(&mut nobody).urls = vec!["http://127.0.0.1:9/v1".into()];
    let error = format!("{:#}", train(&nobody, Start::New).unwrap_err());
    assert!(error.contains("loading version 0 of the adapters") && error.contains("gave no response"), "{error}");
    assert!(!nobody.train.out.exists(), "a failed start leaves no folder behind");
    assert_eq!(std::fs::read_dir(dir.join("adapters")).unwrap().count(), 0, "and no adapters");
    other.model.lora = None;
    assert!(refused(&other).to_string().contains("[model.lora]"));
    // Adapters that vLLM would take and not use.
    let tower = on(&[&server], &dir, "tower", &["model.freeze=[]", "model.lora.targets=[\"*\"]"]);
    let error = train(&tower, Start::New).unwrap_err().to_string();
    assert!(error.contains("which vLLM would load and not use"), "{error}");
}

fn settings_of(plan: &mut rl::Plan) -> &mut Options {
    match &mut plan.engine {
        engine::Options::Vllm(options) => options,
        _ => panic!("another engine"),
    }
}

/// The servers' own weights, for evaluations: what they say is what our engine says, with its log-probs.
#[test]
fn its_own_weights_answer_as_ours_do() {
    let (_folder, dir) = world();
    let server =
        Server::start(&taught(&dir), Kind::Good, |_, call| if call == 1 { Act::Status(429) } else { Act::Good });
    let mut here = open(&taught(&dir));
    let model = ModelOptions { path: taught(&dir), ..ModelOptions::default() };
    let mut there = Fleet::open(&Options { adapters: None, ..options(&[&server], &dir) }, &model, None).unwrap();
    let ids = here.frontend.chat.plain_ids("What number is it?").unwrap();
    let mut stream = Stream::default();
    stream.push_context(&ids, Vec::new(), here.frontend.chat.special.image_pad, 2).unwrap();
    for temperature in [0.0, 1.0] {
        let sampling =
            Sampling { temperature, top_k: None, top_p: None, max_new_tokens: 9, stop: vec![], ignore_end: false };
        let seeds = [8, 10, 12];
        let ours =
            here.sample(&[Prompt { session: 0, stream: &stream, seeds: &seeds.map(|s| s / 2) }], &sampling).unwrap();
        here.end_step();
        let theirs = there.sample(&[Prompt { session: 0, stream: &stream, seeds: &seeds }], &sampling).unwrap();
        for (a, b) in ours[0].iter().zip(&theirs[0]) {
            assert_eq!((&a.ids, &a.logprobs, a.finish), (&b.ids, &b.logprobs, b.finish));
        }
    }
}
