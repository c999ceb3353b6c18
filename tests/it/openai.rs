//! The engine on a chat server: the model behind it answers as it does here, token for token, whatever happens on the way; and what cannot be done
//! is refused in one clear line.
//!
//! The server is a real one on a loopback port with the bundled model behind it. It reads messages and pictures as any other would, with the
//! chat template and the processor, and knows nothing of streams.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foveate::chat::{Content, Message, Part};
use foveate::config::{self, BadConfig};
use foveate::engine::ModelOptions;
use foveate::engine::embedded::Embedded;
use foveate::engine::openai::{Options, Served};
use foveate::engine::{Finish, Frontend, Prompt, Sampler, Sampling};
use foveate::episode::{Record, Stream};
use foveate::geometry::View;
use foveate::image::decode_bytes;
use foveate::rl;
use serde_json::{Value, json};

use crate::cli::{good, json, refused};
use crate::served::{self, Listening, Request};
use crate::tiny;

/// What happens to a call.
#[derive(Clone, Copy, PartialEq)]
enum Act {
    Good,
    /// Good, but later than those that came after it.
    Slow,
    Status(u16),
    HangUp,
}

type Script = dyn Fn(usize) -> Act + Send + Sync;

struct Shared {
    engine: Mutex<Embedded>,
    pictures: tempfile::TempDir,
    calls: AtomicUsize,
    pictures_seen: AtomicUsize,
    keys: Mutex<Vec<Option<String>>>,
    script: Box<Script>,
}

struct Server {
    listening: Listening,
    shared: Arc<Shared>,
}

impl Server {
    fn start(script: impl Fn(usize) -> Act + Send + Sync + 'static) -> Server {
        let options = ModelOptions { path: tiny::nano(), ..ModelOptions::default() };
        let shared = Arc::new(Shared {
            engine: Mutex::new(Embedded::open(&options, None).unwrap()),
            pictures: tempfile::tempdir().unwrap(),
            calls: AtomicUsize::new(0),
            pictures_seen: AtomicUsize::new(0),
            keys: Mutex::default(),
            script: Box::new(script),
        });
        let serving = Arc::clone(&shared);
        Server { listening: Listening::with(move |stream| serving.serve(stream)), shared }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.listening.address)
    }

    fn calls(&self) -> usize {
        self.shared.calls.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream);
        let Some(Request { method, path, mut headers, body }) = served::request(&mut reader) else { return };
        assert_eq!((method.as_str(), path.as_str()), ("POST", "/v1/chat/completions"));
        let body: Value = serde_json::from_slice(&body).unwrap();
        let act = (self.script)(self.calls.fetch_add(1, Ordering::SeqCst));
        self.keys.lock().unwrap().push(headers.remove("authorization"));
        let said = match act {
            Act::HangUp => return,
            Act::Status(status) => (status, json!({"error": {"message": "not now"}})),
            Act::Slow | Act::Good => (200, self.answer(&body)),
        };
        if act == Act::Slow {
            thread::sleep(Duration::from_millis(150));
        }
        let (status, said) = (said.0, said.1.to_string());
        let head = "content-type: application/json\r\nconnection: close\r\nretry-after: 0";
        let reply = format!("HTTP/1.1 {status} Said\r\n{head}\r\ncontent-length: {}\r\n\r\n{said}", said.len());
        let _ = reader.get_mut().write_all(reply.as_bytes());
    }

    /// Greedily, from the messages and pictures alone.
    fn answer(&self, body: &Value) -> Value {
        let mut engine = self.engine.lock().unwrap();
        let Frontend { chat, processor, .. } = engine.frontend.clone();
        let (mut placed, mut tokens) = (Vec::new(), Vec::new());
        let mut part = |part: &Value| match part["type"].as_str().unwrap() {
            "text" => Part::text(part["text"].as_str().unwrap()),
            _ => {
                let uri = part["image_url"]["url"].as_str().unwrap();
                let bytes = STANDARD.decode(uri.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
                let name = format!("{}.png", self.pictures_seen.fetch_add(1, Ordering::SeqCst));
                let path = self.pictures.path().join(name);
                std::fs::write(&path, &bytes).unwrap();
                let size = decode_bytes(&bytes, "sent").unwrap().size();
                let view = View::whole(0, size, processor.budget).unwrap();
                assert_eq!(view.size, size, "the processor leaves it as it is");
                let grid = processor.grid(view.size);
                tokens.push(grid.tokens(processor.merge));
                placed.push((Arc::from(path.as_path()), view, grid));
                Part::image()
            }
        };
        let mut message = |said: &Value| Message {
            role: said["role"].as_str().unwrap().into(),
            content: match &said["content"] {
                Value::Array(parts) => Content::Parts(parts.iter().map(&mut part).collect()),
                text => Content::Text(text.as_str().unwrap().into()),
            },
        };
        let messages: Vec<Message> = body["messages"].as_array().unwrap().iter().map(&mut message).collect();
        let encoded = chat.encode(&messages, true, &tokens).unwrap();
        let mut stream = Stream::default();
        stream.push_context(&encoded.ids, placed, chat.special.image_pad, processor.merge).unwrap();
        let sampling = Sampling {
            temperature: body["temperature"].as_f64().unwrap() as f32,
            top_k: None,
            top_p: None,
            max_new_tokens: body["max_tokens"].as_u64().unwrap() as usize,
            stop: vec![],
            ignore_end: false,
        };
        let said = engine.sample(&[Prompt { session: 0, stream: &stream, seeds: &[0] }], &sampling).unwrap();
        engine.end_step();
        let said = &said[0][0];
        let ended = said.finish == Finish::EndOfTurn;
        let words = &said.ids[..said.ids.len() - usize::from(ended)];
        json!({
            "choices": [{"index": 0, "message": {"role": "assistant", "content": chat.decode(words, false).unwrap()},
                         "finish_reason": if ended { "stop" } else { "length" }}],
            "usage": {"prompt_tokens": stream.len(), "completion_tokens": said.ids.len()},
        })
    }
}

/// Rows, and an evaluation in two turns of them on the bundled model.
fn world() -> tempfile::TempDir {
    let world = tempfile::tempdir().unwrap();
    tiny::rows(world.path(), 4);
    let config = format!(
        "[model]\npath = {:?}\n[data]\ntest = \"train.jsonl\"\n[rollout]\ntemperature = 0\nmax_new_tokens = 40\nmax_tokens = 2048\n\
         [eval]\nout = \"here\"\n[tasks.two]\nkind = \"crop\"\ntemplate = \"short\"\njudge = \"number\"\non_invalid = \"resend_image\"\n\
         max_pixels = {}\nmin_pixels = {}\n",
        tiny::nano(),
        budget().1,
        budget().0
    );
    std::fs::write(world.path().join("eval.toml"), config).unwrap();
    world
}

fn budget() -> (u64, u64) {
    let budget = foveate::image::Processor::load(&tiny::nano()).unwrap().budget;
    (budget.min_pixels, budget.max_pixels)
}

fn episodes(dir: &Path) -> Vec<Record> {
    let text = std::fs::read_to_string(dir.join("episodes/0.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_served_model_answers_as_it_does_here_token_for_token() {
    let world = world();
    let dir = world.path();
    good(dir, &["eval", "eval.toml"]);
    // Two servers; calls fail, break off and overtake each other.
    let one = Server::start(|call| match call {
        0 => Act::Status(500),
        2 => Act::HangUp,
        call if call % 3 == 1 => Act::Slow,
        _ => Act::Good,
    });
    let two = Server::start(|call| if call == 1 { Act::Status(429) } else { Act::Good });
    let urls = format!("engine.urls=[{:?}, {:?}]", one.url(), two.url());
    let served = ["eval", "eval.toml", "engine.kind=openai", &urls, "engine.model=nano", "engine.pause_s=0.01"];
    let more = ["engine.calls=calls.jsonl", "engine.api_key_env=FOVEATE_TEST_NO_SUCH_KEY", "--json"];
    let there = json(&good(dir, &[&served[..], &more, &["eval.out=there"]].concat()));
    assert_eq!(there["rows"]["two"]["questions"], 4);
    let (here, there) = (episodes(&dir.join("here")), episodes(&dir.join("there")));
    for (here, there) in here.iter().zip(&there) {
        assert_eq!((&here.id, &here.ids, &here.sampled), (&there.id, &there.ids, &there.sampled));
        assert_eq!(
            here.turns.iter().map(|t| &t.text).collect::<Vec<_>>(),
            there.turns.iter().map(|t| &t.text).collect::<Vec<_>>()
        );
        assert_eq!((here.reward, &here.views.len()), (there.reward, &there.views.len()));
        assert!(here.turns.len() == 4 && here.views.len() == 2, "two turns with a picture each");
        // What cannot be trained on says so.
        assert!(!here.logprobs.is_empty() && there.logprobs.is_empty());
    }
    assert!(one.calls() > 4 && two.calls() > 4);
    assert!(one.shared.keys.lock().unwrap().iter().all(Option::is_none));

    // Asked again, every answer is in the record.
    let before = one.calls() + two.calls();
    good(dir, &[&served[..], &more, &["eval.out=again"]].concat());
    assert_eq!(one.calls() + two.calls(), before);
    assert_eq!(episodes(&dir.join("again"))[3].ids, there[3].ids);
    // The one thread that computes must not wait for those that wait for it.
    let alone = Server::start(|_| Act::Good);
    let url = format!("engine.urls=[{:?}]", alone.url());
    let one_thread =
        ["--threads", "1", "eval", "eval.toml", "engine.kind=openai", "engine.model=nano", &url, "eval.out=alone"];
    good(dir, &one_thread);
    assert_eq!(episodes(&dir.join("alone"))[3].ids, there[3].ids);
    let calls = std::fs::read_to_string(dir.join("calls.jsonl")).unwrap();
    assert!(calls.contains("sha256:") && !calls.contains("base64"), "pictures are recorded by their digests");

    // One question, asked of the server; and a run that is played and not trained.
    let said = json(&good(
        dir,
        &[
            "ask",
            "--model",
            tiny::nano().to_str().unwrap(),
            "--url",
            &two.url(),
            "--served-as",
            "nano",
            "--image",
            "one.png",
            "--template",
            "short",
            "--max-new-tokens",
            "40",
            "--json",
            "What number is it, 0?",
        ],
    ));
    assert_eq!(said["turns"][1]["text"], json!(here[0].turns[1].text));
    let rl = std::fs::read_to_string(dir.join("eval.toml"))
        .unwrap()
        .replace("test =", "train =")
        .replace("[tasks.two]", "[task]")
        .replace("[eval]\nout = \"here\"\n", "[train]\nout = \"played\"\nsteps = 1\nprompts = 2\ngroup = 2\n")
        .replace("temperature = 0\n", "");
    let engine = format!("[engine]\nkind = \"openai\"\nurls = [{:?}]\nmodel = \"nano\"\n", two.url());
    std::fs::write(dir.join("rl.toml"), rl + &engine).unwrap();
    good(dir, &["rollout", "rl.toml"]);
    assert_eq!(std::fs::read_to_string(dir.join("played/episodes/1.jsonl")).unwrap().lines().count(), 4);
    refused(dir, &["rl", "rl.toml", "train.out=no"], 2, &["openai", "does not train", "tinker"]);
}

#[test]
fn what_cannot_be_asked_is_refused_in_one_line() {
    let world = world();
    let dir = world.path();
    let server = Server::start(|call| match call {
        0 => Act::Status(401),
        1 => Act::Status(404),
        2 => Act::Status(413),
        _ => Act::Status(503),
    });
    let url = format!("engine.urls=[{:?}]", server.url());
    let asked = |more: &[&str], code: i32, words: &[&str]| {
        let args = [
            "eval",
            "eval.toml",
            "engine.kind=openai",
            &url,
            "engine.model=nano",
            "engine.max_in_flight=1",
            "engine.pause_s=0",
            "engine.max_retries=2",
            "engine.api_key_env=FOVEATE_TEST_NO_SUCH_KEY",
            "eval.out=no",
        ];
        let _ = std::fs::remove_dir_all(dir.join("no"));
        refused(dir, &[&args[..], more].concat(), code, words);
    };
    asked(&[], 1, &["401", "no key was sent", "FOVEATE_TEST_NO_SUCH_KEY", "engine.calls"]);
    asked(&[], 1, &["404", "engine.model"]);
    asked(&[], 1, &["413", "max_pixels"]);
    asked(&["engine.calls=calls.jsonl"], 1, &["503", "after 3 attempts", "pays for no answer twice", "calls.jsonl"]);
    assert_eq!(std::fs::read_to_string(dir.join("calls.jsonl")).unwrap().lines().count(), 3);
    asked(&["rollout.stop=[\"x\"]"], 2, &["rollout.stop", "openai"]);
    asked(&["engine.urls=[]"], 2, &["engine.urls", "http://localhost:8000/v1"]);
    asked(&["engine.urls=[\"http://127.0.0.1:9/v1\"]"], 1, &["127.0.0.1:9", "after 3 attempts"]);
    asked(&["engine.model= "], 2, &["engine.model"]);
    asked(&["engine.requests_per_minute=0"], 2, &["requests per minute"]);
    asked(&["engine.price=[0.1,-1]"], 2, &["engine.price = [0.1, -1]", "a million tokens"]);

    let frontend = Frontend::load(&tiny::nano(), 1).unwrap();
    let good = Options { urls: vec![server.url()], model: "m".into(), ..Options::default() };
    assert!(Served::open(&good, frontend.clone()).is_ok());
    let error = Served::open(&Options { max_in_flight: 0, ..good }, frontend).err().unwrap();
    assert!(error.is::<BadConfig>(), "{error}");
    let plan = config::parse::<rl::Plan>(
        "[model]\n[data]\ntrain = \"x\"\n[task]\n[train]\n[engine]\nkind = \"openai\"\nurls = [\"http://h/v1\"]\nmodel = \"m\"\n",
        &[],
    );
    let plan = plan.unwrap();
    assert!(plan.engine.ensure_trains(&plan.model, 1.0).unwrap_err().is::<BadConfig>());
}
