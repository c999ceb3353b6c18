//! The endpoint teacher against a server that misbehaves: nothing is lost, nothing is paid for twice, and the files that come out
//! are those of an undisturbed run.
//!
//! The server is a real one on a loopback port and follows a script: what it does hangs on the row it is asked about and on how often
//! it was asked before. The rows share their pictures; each names itself in its question.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::served::{self, Listening};
use crate::tiny;
use foveate::openai::Price;
use foveate::run::Interrupt;
use foveate::synth::teacher;
use foveate::synth::trajectories::{self, Episodes, Rejected, Report, Teacher, build};

/// What the server does with a call.
#[derive(Clone, Debug, PartialEq)]
enum Reply {
    /// The row's trace.
    Good,
    Text(String),
    Status(u16, &'static str, &'static str),
    /// Takes the request and hangs up.
    HangUp,
    /// Hangs up in the middle of a body of known length, and of one in chunks.
    Cut,
    CutChunk,
    /// 200 with this body.
    Body(&'static str),
    /// Good, but after more than a second.
    Late,
}

/// A call as the server saw it.
#[derive(Clone, Debug)]
struct Asked {
    row: usize,
    reply: Reply,
    key: Option<String>,
    body: Value,
    at: Instant,
}

impl Asked {
    fn paid(&self) -> bool {
        matches!(self.reply, Reply::Good | Reply::Text(_))
    }
}

/// From the row and the number of its earlier calls to what happens.
type Script = dyn Fn(usize, usize) -> Reply + Send + Sync;

struct Server {
    listening: Listening,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    /// Each answer takes `delay` and a little more or less, so that they do not come in the order of their questions.
    fn start(delay: Duration, script: impl Fn(usize, usize) -> Reply + Send + Sync + 'static) -> Server {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        Server { listening: Listening::with(move |stream| serve(stream, &seen, &script, delay)), asked }
    }

    fn url(&self) -> String {
        format!("http://{}/v1", self.listening.address)
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// How many answers each row was paid for.
    fn paid(&self) -> BTreeMap<usize, usize> {
        let mut paid = BTreeMap::new();
        for call in self.asked().iter().filter(|call| call.paid()) {
            *paid.entry(call.row).or_default() += 1;
        }
        paid
    }
}

/// Reads one request, does what the script says and hangs up.
fn serve(stream: TcpStream, seen: &Mutex<Vec<Asked>>, script: &Script, delay: Duration) {
    let mut reader = BufReader::new(stream);
    let Some(mut request) = served::request(&mut reader) else { return };
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/chat/completions"));
    let key = request.headers.remove("authorization");
    let body: Value = serde_json::from_slice(&request.body).unwrap();
    let text = body["messages"][1]["content"].as_array().unwrap().last().unwrap()["text"].as_str().unwrap();
    let row: usize = text.split("row-").nth(1).unwrap().split('?').next().unwrap().parse().unwrap();
    let reply = {
        let mut seen = seen.lock().unwrap();
        let reply = script(row, seen.iter().filter(|call| call.row == row).count());
        seen.push(Asked { row, reply: reply.clone(), key, body, at: Instant::now() });
        reply
    };
    let delay = if reply == Reply::Late { Duration::from_millis(1500) } else { delay };
    thread::sleep(delay + Duration::from_millis(row as u64 * 7 % 5));
    let head = |status: &str, headers: &str, length: usize| {
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        )
    };
    let answer = |text: &str| {
        json!({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
               "usage": {"prompt_tokens": 100, "completion_tokens": 20}})
        .to_string()
    };
    let said = match reply {
        Reply::Good | Reply::Late => whole(&head, &answer(&trace(row))),
        Reply::Text(text) => whole(&head, &answer(&text)),
        Reply::Body(body) => whole(&head, body),
        Reply::Status(status, headers, body) => head(&format!("{status} Told"), headers, body.len()) + body,
        Reply::HangUp => String::new(),
        Reply::Cut => {
            let answer = answer(&trace(row));
            head("200 OK", "", answer.len()) + &answer[..answer.len() / 2]
        }
        Reply::CutChunk => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\n{\"choices\": [".into(),
    };
    let _ = reader.get_mut().write_all(said.as_bytes());
}

fn whole(head: &dyn Fn(&str, &str, usize) -> String, body: &str) -> String {
    head("200 OK", "", body.len()) + body
}

/// What the server has to say of a row: as long as a real trace, and unlike the others.
fn trace(row: usize) -> String {
    let colours = ["red", "green", "blue", "white", "black", "grey", "brown"];
    let places = ["a tree", "a door", "the sea", "some grass"];
    let (colour, place) = (colours[row % 7], places[row / 7 % 4]);
    format!(
        "Image-1 shows a {colour} fox by {place}. In Image-2 I see a {colour} fox and {place} behind. So the {colour} fox of Image-1 is in Image-2."
    )
}

/// A folder with `count` rows on two pictures.
fn rows(count: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny::picture(&dir.path().join("1.png"), 60, 40);
    tiny::picture(&dir.path().join("2.png"), 40, 60);
    let rows = (0..count).map(|k| {
        json!({"id": format!("id-{k}"), "images": ["1.png", "2.png"], "question": format!("Where is the fox of row-{k}?"),
               "answer": "2", "targets": [{"image": 2, "bbox": [4, 6, 20, 30], "label": "fox"}], "task": "find",
               "objects": [[{"name": "fox", "bbox": [1, 2, 30, 20]}], [{"name": "fox", "bbox": [4, 6, 20, 30]}]],
               "relations": [{"relation": "same_object", "reference": 1, "target": 2, "name": "fox"}]})
        .to_string()
    });
    std::fs::write(dir.path().join("rows.jsonl"), rows.collect::<Vec<_>>().join("\n")).unwrap();
    dir
}

fn endpoint(dir: &Path, server: &Server, out: &str) -> teacher::Options {
    let first_pause = Duration::from_millis(2);
    teacher::Options {
        first_pause,
        ..teacher::Options::new(&server.url(), "m", dir.join(format!("{out}.calls.jsonl")))
    }
}

fn options(dir: &Path, out: &str, endpoint: teacher::Options) -> trajectories::Options {
    trajectories::Options {
        rows: dir.join("rows.jsonl"),
        out: dir.join(out),
        per_task: None,
        share: 1.0,
        seed: 1,
        teacher: Teacher::Endpoint(Box::new(endpoint)),
        episodes: None,
    }
}

fn run(options: &trajectories::Options) -> anyhow::Result<Report> {
    build(options, &Interrupt::none())
}

/// The files of a finished folder.
fn files(out: &Path) -> [String; 3] {
    ["sft.jsonl", "rl.jsonl", "report.json"].map(|name| std::fs::read_to_string(out.join(name)).unwrap())
}

/// What an undisturbed run of the rows writes.
fn undisturbed(dir: &Path) -> [String; 3] {
    let server = Server::start(Duration::ZERO, |_, _| Reply::Good);
    run(&options(dir, "calm", endpoint(dir, &server, "calm"))).unwrap();
    files(&dir.join("calm"))
}

fn journal(dir: &Path, out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join(format!("{out}.calls.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The rows that have an answer on record.
fn answered(journal: &[Value]) -> Vec<usize> {
    let row = |call: &Value| call["row"].as_str().unwrap().strip_prefix("id-").unwrap().parse().unwrap();
    journal.iter().filter(|call| call["answer"].is_object()).map(row).collect()
}

#[test]
fn every_way_to_misbehave_ends_in_the_files_of_an_undisturbed_run() {
    let ways = [
        Reply::Status(500, "", "oops"),
        Reply::Status(429, "retry-after: 0\r\n", "{\"error\": \"slow down\"}"),
        Reply::Status(503, "retry-after: Sun, 06 Nov 1994 08:49:37 GMT\r\n", ""),
        Reply::Status(408, "", ""),
        Reply::HangUp,
        Reply::Cut,
        Reply::CutChunk,
        Reply::Body("<html>busy</html>"),
        Reply::Body("{\"error\": {\"message\": \"no room\"}}"),
        Reply::Body("{\"choices\": [{\"message\": {\"content\": 7}}]}"),
    ];
    let n = ways.len() + 2;
    let dir = rows(n);
    let dir = dir.path();
    // Row k misbehaves in way k at first, the last but one in all ways, the last in none.
    let script = {
        let ways = ways.clone();
        move |row: usize, before: usize| match ways.get(if row == ways.len() { before } else { row }) {
            Some(way) if before == 0 || row == ways.len() => way.clone(),
            _ => Reply::Good,
        }
    };
    let server = Server::start(Duration::ZERO, script);
    let price = Some(Price(5000.0, 10_000.0));
    let patient = teacher::Options { max_retries: ways.len(), price, ..endpoint(dir, &server, "wild") };
    let report = run(&options(dir, "wild", patient)).unwrap();
    let spent = report.spent.unwrap();
    assert_eq!((spent.answered, spent.calls, spent.failed.len()), (n, 2 * ways.len() + n, 0));
    assert_eq!((spent.prompt_tokens, spent.completion_tokens), (100 * n as u64, 20 * n as u64));
    // 0.5 for what the server read of a row, 0.2 for what it wrote.
    assert!((spent.cost.unwrap() - 0.7 * n as f64).abs() < 1e-9);
    assert_eq!(files(&dir.join("wild")), undisturbed(dir));
    assert!(files(&dir.join("wild"))[0].contains(&trace(3)), "the traces are in the rows");

    // Every call is on record, with what went wrong.
    let calls = journal(dir, "wild");
    assert_eq!(calls.len(), server.asked().len());
    let errors: Vec<&str> = calls.iter().filter_map(|call| call["error"].as_str()).collect();
    assert_eq!(errors.len(), 2 * ways.len());
    for words in ["500", "oops", "slow down", "gave no response", "broke off", "not JSON", "no room", "content"] {
        assert!(errors.iter().any(|error| error.contains(words)), "{words:?} is not in {errors:?}");
    }
    let (first, good) = (&server.asked()[0], calls.iter().find(|call| call["answer"].is_object()).unwrap());
    assert_eq!(first.body["model"], "m");
    assert_eq!((&good["status"], &good["answer"]["usage"]["prompt_tokens"]), (&json!(200), &json!(100)));
    assert!(good["request"]["messages"][1]["content"][1]["image_url"]["url"].as_str().unwrap().starts_with("sha256:"));
}

#[test]
fn all_wait_as_long_as_the_server_asks() {
    let dir = rows(4);
    let dir = dir.path();
    let script = |row, before| match (row, before) {
        (0, 0) => Reply::Status(429, "retry-after: 1\r\n", ""),
        _ => Reply::Good,
    };
    let server = Server::start(Duration::ZERO, script);
    let one = teacher::Options { concurrency: 1.try_into().unwrap(), ..endpoint(dir, &server, "out") };
    run(&options(dir, "out", one)).unwrap();
    let asked = server.asked();
    assert_eq!(asked.len(), 5);
    assert!(asked[1].at - asked[0].at >= Duration::from_millis(990), "{:?}", asked[1].at - asked[0].at);
    // A server that wants to be left alone for a day is not waited for.
    let server = Server::start(Duration::ZERO, |_, _| Reply::Status(429, "retry-after: 86400\r\n", "quota"));
    let error = run(&options(dir, "later", endpoint(dir, &server, "later"))).unwrap_err().to_string();
    assert!(error.contains("24 h") && error.contains("quota") && error.contains("later.calls.jsonl"), "{error}");
}

#[test]
fn a_call_that_takes_too_long_is_made_again() {
    let dir = rows(2);
    let dir = dir.path();
    let server = Server::start(Duration::ZERO, |row, before| if row + before == 0 { Reply::Late } else { Reply::Good });
    let hurried = teacher::Options { timeout: Duration::from_secs(1), ..endpoint(dir, &server, "out") };
    let report = run(&options(dir, "out", hurried)).unwrap();
    assert_eq!((report.kept, report.spent.unwrap().calls), (2, 3));
    let calls = journal(dir, "out");
    let error = calls.iter().find_map(|call| call["error"].as_str()).unwrap();
    assert!(error.contains("timeout"), "{error}");
}

#[test]
fn a_refusal_stops_the_run_and_a_restart_pays_for_no_row_twice() {
    let dir = rows(24);
    let dir = dir.path();
    let refuses = Arc::new(AtomicBool::new(true));
    let script = {
        let (refuses, paid) = (Arc::clone(&refuses), Mutex::new(0));
        move |_, _| {
            let mut paid = paid.lock().unwrap();
            if *paid >= 9 && refuses.load(Ordering::SeqCst) {
                return Reply::Status(401, "", "{\"error\": \"the credit is used up\"}");
            }
            *paid += 1;
            Reply::Good
        }
    };
    let server = Server::start(Duration::from_millis(2), script);
    let options = options(dir, "out", endpoint(dir, &server, "out"));
    let error = run(&options).unwrap_err().to_string();
    for words in ["401", "the credit is used up", "OPENAI_API_KEY", "row id-", "out.calls.jsonl"] {
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
    assert!(!dir.join("out").exists());
    assert_eq!(answered(&journal(dir, "out")).len(), 9, "what was under way when the refusal came is kept too");

    refuses.store(false, Ordering::SeqCst);
    let report = run(&options).unwrap();
    let spent = report.spent.unwrap();
    assert_eq!((spent.reused, spent.answered, spent.calls), (9, 15, 15));
    assert_eq!(server.paid(), (0..24).map(|row| (row, 1)).collect());
    assert_eq!(journal(dir, "out").len(), server.asked().len());
    assert_eq!(files(&dir.join("out")), undisturbed(dir));
}

#[test]
fn a_row_without_an_answer_is_counted_and_asked_again_later() {
    let dir = rows(6);
    let dir = dir.path();
    let broken = Arc::new(AtomicBool::new(true));
    let script = {
        let broken = Arc::clone(&broken);
        move |row, _| match row == 2 && broken.load(Ordering::SeqCst) {
            true => Reply::Status(500, "", "only this one"),
            false => Reply::Good,
        }
    };
    let server = Server::start(Duration::ZERO, script);
    let mut options = options(dir, "out", teacher::Options { max_retries: 2, ..endpoint(dir, &server, "out") });
    let report = run(&options).unwrap();
    assert_eq!((report.kept, report.rejected[&Rejected::Teacher]), (5, 1));
    let failed = report.spent.unwrap().failed;
    assert_eq!((failed.len(), failed[0].0.as_str()), (1, "id-2"));
    assert!(failed[0].1.contains("only this one"));
    assert_eq!(server.asked().iter().filter(|call| call.row == 2).count(), 3);
    assert!(files(&dir.join("out"))[1].contains("id-2"), "it is kept for RL");

    broken.store(false, Ordering::SeqCst);
    options.out = dir.join("again");
    let spent = run(&options).unwrap().spent.unwrap();
    assert_eq!((spent.reused, spent.answered, spent.calls), (5, 1, 1));
    assert_eq!(files(&dir.join("again")), undisturbed(dir));
}

#[test]
fn a_server_that_is_not_there_is_not_waited_for_row_by_row() {
    let dir = rows(40);
    let dir = dir.path();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (out, share) in [("all", 1.0), ("few", 0.1)] {
        let first_pause = Duration::from_millis(1);
        let calls = dir.join(format!("{out}.calls.jsonl"));
        let endpoint = teacher::Options {
            first_pause,
            max_retries: 1,
            ..teacher::Options::new(&format!("http://{address}/v1"), "m", calls)
        };
        let error = run(&trajectories::Options { share, ..options(dir, out, endpoint) }).unwrap_err().to_string();
        assert!(error.contains("gave no response") && error.contains("--url"), "{error}");
        assert!(!dir.join(out).exists());
        assert!(journal(dir, out).len() <= 2 * (8 + 4), "eight rows in succession, and those under way");
    }
}

#[test]
fn no_answer_is_bought_that_no_task_has_room_for() {
    let dir = rows(20);
    let dir = dir.path();
    // Rows 0 and 3 say a coordinate: two more are needed for four traces.
    let script = |row, _| match row {
        0 | 3 => Reply::Text("The fox of Image-2 is at 40.".into()),
        _ => Reply::Good,
    };
    let server = Server::start(Duration::ZERO, script);
    let mut options = options(dir, "out", endpoint(dir, &server, "out"));
    options.per_task = Some(4);
    let report = run(&options).unwrap();
    assert_eq!((report.kept, report.rejected[&Rejected::Leak], report.rejected[&Rejected::Balance]), (4, 2, 14));
    assert_eq!(server.paid().into_keys().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_trace_is_kept_where_it_makes_the_answer_better() {
    let dir = rows(6);
    let dir = dir.path();
    let server = Server::start(Duration::ZERO, |_, _| Reply::Good);
    let mut options = options(dir, "out", endpoint(dir, &server, "out"));
    run(&options).unwrap();
    // Without and with the trace; row 5 was not played.
    let played = [(0.6, 0.7), (0.6, 0.62), (0.2, 0.6), (0.1, 0.35), (0.1, 0.2)];
    let lines = |pick: fn(&(f64, f64)) -> f64| {
        let line = |(k, pair): (usize, &(f64, f64))| {
            let iou = pick(pair);
            json!({"id": format!("id-{k}"), "rewards": {"image": 1.0, "iou": iou, "joint": f64::from(u8::from(iou >= 0.5))}}).to_string()
        };
        played.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    };
    let (direct, reasoned) = (dir.join("direct.jsonl"), dir.join("reasoned.jsonl"));
    std::fs::write(&direct, lines(|pair| pair.0)).unwrap();
    std::fs::write(&reasoned, lines(|pair| pair.1)).unwrap();
    options.out = dir.join("better");
    options.episodes = Some(Episodes { direct, reasoned });
    let report = run(&options).unwrap();
    assert_eq!((report.kept, report.rejected[&Rejected::NoGain], report.rejected[&Rejected::Unmeasured]), (3, 2, 1));
    let kept: Vec<String> = files(&dir.join("better"))[0]
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(kept, ["id-0", "id-2", "id-3"]);
    assert_eq!(report.spent.unwrap().calls, 0, "the traces were paid for already");
}

/// The program itself, with a key in its environment.
fn program(dir: &Path, server: &Server, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    let url = server.url();
    command
        .current_dir(dir)
        .env("TEACHERS_KEY", "sk-very-secret")
        .args([
            "data",
            "trajectories",
            "rows.jsonl",
            "--out",
            "out",
            "--share",
            "1",
            "--teacher",
            "endpoint",
            "--url",
            &url,
        ])
        .args(["--model", "m", "--api-key-env", "TEACHERS_KEY"])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Waits until the server has given this many answers.
fn after(server: &Server, answers: usize) {
    let began = Instant::now();
    while server.asked().len() < answers {
        assert!(began.elapsed() < Duration::from_secs(60), "the server was not asked");
        thread::sleep(Duration::from_millis(5));
    }
}

fn everything_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { everything_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_killed_program_goes_on_and_the_key_is_nowhere() {
    let dir = rows(16);
    let dir = dir.path();
    let server = Server::start(Duration::from_millis(40), |_, _| Reply::Good);
    let mut killed = program(dir, &server, &["--concurrency", "2"]).spawn().unwrap();
    after(&server, 8);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!dir.join("out").exists());
    // As if it had died in the middle of a line, too.
    let path = dir.join("out.calls.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let whole = &text[..=text.rfind('\n').unwrap()];
    std::fs::write(&path, &whole[..whole.len() - 20]).unwrap();
    let on_record = whole.lines().count() - 1;
    let kept: Vec<Value> = whole.lines().take(on_record).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!((1..16).contains(&on_record), "{on_record}");

    let done = program(dir, &server, &["--concurrency", "4", "--json"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&said["spent"]["reused"], &said["report"]["kept"]), (&json!(on_record), &json!(16)), "{said}");
    for row in answered(&kept) {
        assert_eq!(server.paid()[&row], 1, "row {row} was on record and is asked for again");
    }
    let mut rows = answered(&journal(dir, "out"));
    rows.sort_unstable();
    assert_eq!(rows, (0..16).collect::<Vec<_>>());
    assert_eq!(files(&dir.join("out")), undisturbed(dir));
    assert!(server.asked().iter().all(|call| call.key.as_deref() == Some("Bearer sk-very-secret")));
    for path in everything_below(dir) {
        assert!(
            !String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("sk-very-secret"),
            "{}",
            path.display()
        );
    }
}

#[cfg(unix)]
#[test]
fn an_interrupt_lets_calls_end_and_says_how_to_go_on() {
    let dir = rows(12);
    let dir = dir.path();
    let server = Server::start(Duration::from_millis(60), |_, _| Reply::Good);
    // One thread has to make the pictures smaller and to hand them over.
    let flags = ["--threads", "1", "--max-pixels", "1000"];
    let child = program(dir, &server, &[&flags[..], &["--concurrency", "2"]].concat()).spawn().unwrap();
    after(&server, 3);
    // SAFETY: a signal to a process that we started and have not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(130), "{said}");
    assert!(said.contains("out.calls.jsonl") && said.contains("the same command goes on"), "{said}");
    assert!(!dir.join("out").exists());
    assert_eq!(journal(dir, "out").len(), server.asked().len(), "what was under way came to its end");
    let done = program(dir, &server, &flags).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(server.paid().values().all(|&paid| paid == 1) && server.paid().len() == 12);
}

#[test]
fn a_wrong_combination_is_bad_usage() {
    let dir = rows(1);
    for (flags, word) in [
        (&["--teacher", "endpoint"][..], "--url"),
        (&["--teacher", "endpoint", "--url", "http://h"], "--model"),
        (&["--teacher", "endpoint", "--url", "h:1", "--model", "m"], "--url h:1"),
        (&["--url", "http://h"], "--teacher endpoint"),
        (&["--teacher", "parrot"], "parrot"),
        (&["--direct", "a.jsonl"], "--reasoned"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
        let command = command.current_dir(dir.path()).args(["data", "trajectories", "rows.jsonl", "--out", "out"]);
        let done = command.args(flags).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.contains(word), "{flags:?}: {said}");
        assert_eq!(everything_below(dir.path()).len(), 3, "{flags:?} leaves nothing behind");
    }
}
