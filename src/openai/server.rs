//! One call to an OpenAI-compatible server, and when the next may go out.
//!
//! It hides HTTP: connections, time limits, status codes, bodies that are cut short or are not what they should be. What must stay
//! true: whatever a server does ends as an [`Outcome`], never as a panic; what the server asks us to wait is part of it;
//! the key stands in the request's header and nowhere else, not even where a server repeats it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use ureq::http::StatusCode;

use super::journal::Answer;
use crate::config::BadConfig;
use crate::http::{self, TICK, retry_after, shown};

/// How a call ended.
#[derive(Debug)]
pub(crate) enum Outcome<T = Answer> {
    Answer(T),
    /// Another attempt may go better.
    Again {
        why: String,
        wait: Option<Duration>,
        fault: Fault,
    },
    /// Another attempt would end the same way, for this row and most likely for all.
    Refused(String),
}

const BRIEFLY: Duration = Duration::from_secs(5);

/// Whose fault it is that a call should be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server is not there or takes nothing now: 429, 502, 503, 504, or no response at all.
    Away,
    /// It responded, but with nothing to use.
    Reply,
}

/// The address and how to call it.
pub(crate) struct Server {
    agent: ureq::Agent,
    /// Of one call, from connecting to the last byte.
    timeout: Duration,
    /// Up to `/v1`.
    base: String,
    key: Option<String>,
}

/// Reads the body of a reply, or says what it lacks.
pub(crate) type Read<'a, T> = &'a dyn Fn(&[u8]) -> Result<T, String>;

/// What `read` finds in a body that is JSON; `lacks` is said of one in which it finds nothing.
pub(crate) fn from_json<T>(body: &[u8], lacks: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T, String> {
    let reply =
        serde_json::from_slice(body).map_err(|error| format!("the reply is not JSON ({error}): {}", shown(body)))?;
    read(&reply).ok_or_else(|| format!("{lacks}: {}", shown(body)))
}

fn completion(body: &[u8]) -> Result<Answer, String> {
    from_json(body, "the reply has no text at choices[0].message.content", answer)
}

impl Server {
    /// `base` is an address such as `http://localhost:8000/v1`; the path of the whole call is taken too. `names` are the options of address and key,
    /// for messages.
    ///
    /// # Errors
    /// The address is none, or the key cannot stand in a header.
    pub fn new(base: &str, key: Option<String>, timeout: Duration, names: [&str; 2]) -> Result<Server> {
        let base = base.trim().trim_end_matches('/').trim_end_matches("/chat/completions");
        let host = http::host(base, names[0], "http://localhost:8000/v1", names[1])?;
        http::check_key(key.as_deref())?;
        Ok(Server { agent: http::agent(&host), timeout, base: base.into(), key })
    }

    /// Up to `/v1`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Of chat completions.
    pub fn url(&self) -> String {
        format!("{}/chat/completions", self.base)
    }

    /// What to do where the key is refused. `variable`: of the environment, from which it comes.
    pub fn about_key(&self, variable: &str) -> String {
        match self.key {
            Some(_) => format!("look at the key in the environment variable {variable}"),
            None => format!("no key was sent, because the environment variable {variable} is not set"),
        }
    }

    /// Sends one request for a chat completion and reads the whole reply; with the status, if there was one.
    pub fn call(&self, body: &[u8]) -> (Option<u16>, Outcome) {
        self.post(&self.url(), body, &completion)
    }

    /// The same to any address.
    pub fn post<T>(&self, url: &str, body: &[u8], read: Read<T>) -> (Option<u16>, Outcome<T>) {
        self.post_within(self.timeout, url, body, read)
    }

    fn post_within<T>(&self, limit: Duration, url: &str, body: &[u8], read: Read<T>) -> (Option<u16>, Outcome<T>) {
        let request = self.agent.post(url).config().timeout_global(Some(limit)).build();
        let mut request = request.header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) => return (None, self.failed(url, &error)),
        };
        let status = response.status();
        let wait = retry_after(response.headers(), SystemTime::now());
        let outcome = match response.body_mut().read_to_vec() {
            Ok(body) => judge(status, wait, &body, self.key.as_deref(), read),
            Err(error) if status.is_success() => {
                Outcome::Again { why: format!("the body of the reply broke off ({error})"), wait, fault: Fault::Reply }
            }
            // The status says enough.
            Err(_) => judge(status, wait, b"", None, read),
        };
        (Some(status.as_u16()), outcome)
    }

    /// Has something done that nobody waits for: a server that is away is not worth more than a few seconds.
    pub fn tell_briefly(&self, url: &str, body: &[u8]) -> (Option<u16>, Outcome<()>) {
        self.post_within(self.timeout.min(BRIEFLY), url, body, &|_| Ok(()))
    }

    /// Has something done, whatever is said of it.
    pub fn tell(&self, url: &str, body: &[u8]) -> (Option<u16>, Outcome<()>) {
        self.post(url, body, &|_| Ok(()))
    }

    fn failed<T>(&self, url: &str, error: &ureq::Error) -> Outcome<T> {
        let why = format!("{url} gave no response ({error})");
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => Outcome::Refused(why),
            _ => Outcome::Again { why, wait: None, fault: Fault::Away },
        }
    }
}

/// A file as an address that holds it.
pub(crate) fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:image/{kind};base64,{}", BASE64.encode(bytes))
}

/// What a reply means. Some servers repeat the `key` that they refuse; it goes before words of a body are cut to a length.
fn judge<T>(status: StatusCode, wait: Option<Duration>, body: &[u8], key: Option<&str>, read: Read<T>) -> Outcome<T> {
    let clean = || http::without_key(String::from_utf8_lossy(body).into_owned(), key);
    if status.is_success() {
        // Read again without the key only for the words that are shown of it.
        let found = read(body).map_err(|why| read(clean().as_bytes()).err().unwrap_or(why));
        return match found {
            Ok(answer) => Outcome::Answer(answer),
            Err(why) => Outcome::Again { why, wait, fault: Fault::Reply },
        };
    }
    let why = match shown(clean().as_bytes()) {
        text if text.is_empty() => status.to_string(),
        text => format!("{status}: {text}"),
    };
    match status.as_u16() {
        429 | 502 | 503 | 504 => Outcome::Again { why, wait, fault: Fault::Away },
        // Of 501 there is nothing to expect: the server does not have what was asked for.
        408 | 409 | 425 | 500 | 502..=599 => Outcome::Again { why, wait, fault: Fault::Reply },
        _ => Outcome::Refused(why),
    }
}

/// The text of a chat completion. One that ended without any (a refusal, or all tokens spent on thinking) has an empty one: it was
/// paid for, and asking again would pay again.
fn answer(reply: &Value) -> Option<Answer> {
    let choice = reply.get("choices")?.get(0)?;
    let finish_reason = choice.get("finish_reason").and_then(Value::as_str).map(str::to_owned);
    let text = match choice.get("message")?.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts.iter().filter_map(|part| part.get("text")?.as_str()).collect(),
        None | Some(Value::Null) if finish_reason.is_some() => String::new(),
        _ => return None,
    };
    let usage = reply.get("usage").filter(|usage| usage.is_object()).cloned();
    // vLLM, SGLang and transformers, by their versions.
    let thoughts =
        |key: &str| choice["message"][key].as_str().filter(|text| !text.trim().is_empty()).map(str::to_owned);
    let reasoning = ["reasoning_content", "reasoning"].iter().find_map(|key| thoughts(key));
    Some(Answer { text, reasoning, finish_reason, usage })
}

/// When calls may go out, for all who call: so many a minute, evenly, and none while the server asks to wait.
pub(crate) struct Pace {
    gap: Duration,
    next: Mutex<Instant>,
}

impl Pace {
    pub fn new(per_minute: Option<f64>) -> Result<Pace> {
        let gap = Duration::try_from_secs_f64(60.0 / per_minute.unwrap_or(f64::INFINITY))
            .ok()
            .filter(|_| per_minute.is_none_or(|n| n > 0.0))
            .ok_or_else(|| BadConfig("requests per minute: expected more than 0".into()))?;
        Ok(Pace { gap, next: Mutex::new(Instant::now()) })
    }

    /// Holds everyone back for so long.
    pub fn hold(&self, wait: Duration) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        *next = (*next).max(Instant::now() + wait);
    }

    /// Waits for a turn; false when `stop` came first.
    pub fn turn(&self, stop: &dyn Fn() -> bool) -> bool {
        loop {
            if stop() {
                return false;
            }
            let now = Instant::now();
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            if *next <= now {
                *next = now + self.gap;
                return true;
            }
            let left = *next - now;
            drop(next);
            std::thread::sleep(left.min(TICK));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NO_TIME: Duration = Duration::ZERO;

    fn judge(status: StatusCode, body: &str) -> Outcome {
        super::judge(status, None, body.as_bytes(), None, &completion)
    }

    const NAMES: [&str; 2] = ["--url", "--api-key-env"];

    #[test]
    fn replies_are_answers_or_worth_another_attempt_or_not() {
        let kind = |status: u16, body: &str| match judge(StatusCode::from_u16(status).unwrap(), body) {
            Outcome::Answer(answer) => answer.text,
            Outcome::Again { fault, .. } => format!("{fault:?}"),
            Outcome::Refused(why) => format!("refused: {why}"),
        };
        let said = |message: Value, finish: Value| {
            json!({"choices": [{"message": message, "finish_reason": finish}]}).to_string()
        };
        assert_eq!(kind(200, &said(json!({"content": "so"}), json!("stop"))), "so");
        assert_eq!(kind(200, &said(json!({"content": [{"type": "text", "text": "so"}]}), json!(null))), "so");
        assert_eq!(kind(200, &said(json!({"content": null, "refusal": "no"}), json!("stop"))), "");
        assert_eq!(kind(200, &said(json!({"content": null}), json!(null))), "Reply");
        assert_eq!(kind(200, &said(json!({"content": 7}), json!("stop"))), "Reply");
        assert_eq!(kind(200, "{\"error\": {\"message\": \"overloaded\"}}"), "Reply");
        assert_eq!(kind(200, "{\"choices\": []}"), "Reply");
        assert_eq!(kind(200, "<html>"), "Reply");
        for status in [408, 409, 425, 500, 505, 599] {
            assert_eq!(kind(status, ""), "Reply", "{status}");
        }
        for status in [429, 502, 503, 504] {
            assert_eq!(kind(status, ""), "Away", "{status}");
        }
        for status in [300, 307, 400, 401, 402, 403, 404, 413, 422, 501] {
            assert!(kind(status, "").starts_with("refused"), "{status}");
        }
        assert_eq!(kind(401, "{\n \"no\": 1 }"), "refused: 401 Unauthorized: { \"no\": 1 }");
        assert!(kind(400, &"x".repeat(1000)).len() < 240);
    }

    #[test]
    fn thoughts_that_were_taken_out_are_kept_apart() {
        for key in ["reasoning_content", "reasoning"] {
            let body =
                json!({"choices": [{"message": {"content": "so", key: "I see"}, "finish_reason": "stop"}]}).to_string();
            let Outcome::Answer(answer) = judge(StatusCode::OK, &body) else { panic!("{key}") };
            assert_eq!((answer.text.as_str(), answer.reasoning.as_deref()), ("so", Some("I see")));
        }
    }

    #[test]
    fn addresses_are_taken_as_people_write_them() {
        let url = |base: &str| Server::new(base, None, Duration::from_secs(1), NAMES).map(|server| server.url());
        for base in ["http://h:1/v1", " http://h:1/v1/ ", "http://h:1/v1/chat/completions"] {
            assert_eq!(url(base).unwrap(), "http://h:1/v1/chat/completions");
        }
        for base in
            ["", "localhost:8000/v1", "ftp://h/v1", "http://", "http://me:secret@h/v1", "http://h/v1?key=secret"]
        {
            let error = url(base).unwrap_err();
            assert!(error.is::<BadConfig>() && error.to_string().contains("--url"), "{base}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert!(Server::new("http://h", Some("two words".into()), NO_TIME, NAMES).is_err());
        assert!(Pace::new(Some(0.0)).is_err() && Pace::new(Some(-1.0)).is_err() && Pace::new(Some(f64::NAN)).is_err());
    }

    #[test]
    fn a_key_that_a_server_repeats_is_not_passed_on() {
        let said = |status: StatusCode, body: &str| match super::judge(
            status,
            None,
            body.as_bytes(),
            Some("sk-secret"),
            &completion,
        ) {
            Outcome::Answer(answer) => answer.text,
            Outcome::Again { why, .. } | Outcome::Refused(why) => why,
        };
        assert_eq!(said(StatusCode::UNAUTHORIZED, "bad key sk-secret!"), "401 Unauthorized: bad key [key]!");
        // Also where the words of a server are cut in the middle of it.
        for before in 180..210 {
            let body = format!("{}sk-secret", "x".repeat(before));
            for status in [StatusCode::UNAUTHORIZED, StatusCode::OK] {
                assert!(!said(status, &body).contains("sk"), "{before}");
            }
        }
    }

    #[test]
    fn calls_keep_their_distance_and_a_wait_holds_for_all() {
        let pace = Pace::new(Some(6000.0)).unwrap();
        let began = Instant::now();
        for _ in 0..4 {
            assert!(pace.turn(&|| false));
        }
        // 6000 a minute are 10 ms each; the first goes at once.
        assert!(began.elapsed() >= Duration::from_millis(30));
        pace.hold(Duration::from_secs(3600));
        let looked = std::cell::Cell::new(0);
        let stop = || looked.replace(looked.get() + 1) > 1;
        assert!(!pace.turn(&stop), "an hour is not waited where a stop is asked");
    }
}
