//! Requests that are answered with a promise, and the promises kept: submitting, asking for results, and trying again.
//!
//! A long operation is two calls: the request gets the id of a future, and `retrieve_future` waits for its result. It hides pauses, lost
//! answers and lost futures. What must stay true: what may be done only once ([`Repeat::IfNotTaken`]) is sent a second time only
//! when the first certainly did not arrive; asking for the result of a future is always safe, for it changes nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::transport::{Body, Fault, Transport};
use crate::config::BadConfig;
use crate::http::{LONGEST_BACKOFF, backoff, chance};

/// Times that a server may fail with 5xx over one future while it is otherwise in good health.
const FAULTS_OF_A_FUTURE: usize = 8;
/// The longest pause before a pending future is asked for again.
const LONGEST_POLL: Duration = Duration::from_secs(2);

/// Whether a request whose answer was lost may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// It changes nothing, or the server knows a repeated request by its number.
    Always,
    /// It changes weights or gradients, and this server would do it twice.
    IfNotTaken,
}

/// Why a request has no result.
#[derive(Debug)]
pub enum Failure {
    /// No answer for as long as the run is willing to wait.
    Away(String),
    /// The answer was lost, and asking again might do twice what may be done once.
    InDoubt(String),
    /// The server does not know the future any more.
    Gone(String),
    /// The server began and failed.
    Failed(String),
    /// It will not take the request.
    Refused { status: u16, why: String },
}

pub struct Client {
    pub transport: Transport,
    /// Before the second attempt; doubled with each one after.
    pub first_pause: Duration,
    /// How long a server may be away.
    pub patience: Duration,
    /// The variable of the key, for messages.
    pub api_key_env: String,
    /// Whether passes and their results, and samples, go as protobuf.
    pub protobuf: bool,
}

impl Client {
    /// A request that is answered at once.
    pub fn ask(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let body = Body::json(body.to_string().into_bytes());
        read(&self.insist(Repeat::Always, || self.transport.post(path, &body, false))?.bytes)
    }

    /// What the server tells anybody who asks, without much patience: this is how a wrong address is found.
    pub fn look(&self, path: &str) -> Result<Value, Failure> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match self.transport.get(path) {
                Ok(reply) => return read(&reply.bytes),
                Err(Fault::Refused { status, why }) => return Err(Failure::Refused { status, why }),
                Err(Fault::NotTaken { why, .. } | Fault::Unknown { why, .. }) if attempt == 3 => {
                    return Err(Failure::Away(why));
                }
                Err(_) => std::thread::sleep(backoff(self.first_pause, attempt, chance())),
            }
        }
    }

    /// Sends a request and returns the id of its future.
    pub fn submit(&self, path: &str, body: &Body, repeat: Repeat) -> Result<String, Failure> {
        // As protobuf, going forward only is said in the message.
        let path = if body.protobuf && path == "forward" { "forward_backward" } else { path };
        let reply = read(&self.insist(repeat, || self.transport.post(path, body, false))?.bytes)?;
        match reply.get("request_id") {
            Some(Value::String(id)) => Ok(id.clone()),
            Some(Value::Number(id)) => Ok(id.to_string()),
            _ => Err(Failure::Failed(format!("{}/{path} answered without a request_id", self.transport.url()))),
        }
    }

    /// Waits for the result of a future, as long as the server says that it is working on it.
    pub fn retrieve(&self, request_id: &str) -> Result<Vec<u8>, Failure> {
        self.wait(request_id, false).map(|reply| reply.bytes)
    }

    /// The same for a result with many numbers, which may come as protobuf where the config asks for that.
    pub fn retrieve_numbers(&self, request_id: &str) -> Result<Body, Failure> {
        self.wait(request_id, self.protobuf)
    }

    fn wait(&self, request_id: &str, protobuf: bool) -> Result<Body, Failure> {
        let body = Body::json(json!({"request_id": request_id}).to_string().into_bytes());
        let (mut faults, mut silent, mut polls) = (0, 0, 0);
        let mut last_heard = Instant::now();
        loop {
            match self.transport.post("retrieve_future", &body, protobuf) {
                Ok(reply) if reply.protobuf => return Ok(reply),
                Ok(reply) => {
                    let Ok(said) = serde_json::from_slice::<Value>(&reply.bytes) else {
                        faults += 1;
                        if faults >= FAULTS_OF_A_FUTURE {
                            return Err(Failure::Failed(format!("the result of {request_id} is not JSON")));
                        }
                        self.pause(faults, None);
                        continue;
                    };
                    if said.get("type").and_then(Value::as_str) == Some("try_again") {
                        (silent, polls, last_heard) = (0, polls + 1, Instant::now());
                        std::thread::sleep(LONGEST_POLL.min(backoff(self.first_pause, polls, chance())));
                        continue;
                    }
                    if let Some(error) = said.get("error").and_then(Value::as_str) {
                        return Err(Failure::Failed(error.to_owned()));
                    }
                    return Ok(reply);
                }
                Err(Fault::Refused { status: 404 | 410, why }) => return Err(Failure::Gone(why)),
                Err(Fault::Refused { status: 400, why }) => return Err(Failure::Failed(why)),
                Err(Fault::Refused { status, why }) => return Err(Failure::Refused { status, why }),
                // The server held the call as long as it holds calls, and is still at work.
                Err(Fault::Unknown { status: Some(408), .. }) => {
                    (silent, last_heard) = (0, Instant::now());
                }
                Err(Fault::NotTaken { why, wait }) => {
                    self.still_there(&mut last_heard, &why)?;
                    silent += 1;
                    self.pause(silent, wait);
                }
                Err(Fault::Unknown { why, wait, status }) => {
                    // A call can end in a time-out of ours, or of a proxy, while the server is at work: its health tells these apart.
                    self.still_there(&mut last_heard, &why)?;
                    faults += usize::from(status == Some(500));
                    if faults >= FAULTS_OF_A_FUTURE {
                        return Err(Failure::Failed(why));
                    }
                    silent += 1;
                    self.pause(silent, wait);
                }
            }
        }
    }

    /// Notes when the server was last in good health.
    fn still_there(&self, last_heard: &mut Instant, why: &str) -> Result<(), Failure> {
        if self.transport.get("healthz").is_ok() {
            *last_heard = Instant::now();
        }
        match last_heard.elapsed() > self.patience {
            true => Err(Failure::Away(why.to_owned())),
            false => Ok(()),
        }
    }

    /// Calls until there is an answer, as far as `repeat` allows it and patience reaches.
    fn insist(&self, repeat: Repeat, call: impl Fn() -> Result<Body, Fault>) -> Result<Body, Failure> {
        let mut attempt = 0;
        let began = Instant::now();
        loop {
            attempt += 1;
            let (why, wait) = match call() {
                Ok(reply) => return Ok(reply),
                Err(Fault::Refused { status, why }) => return Err(Failure::Refused { status, why }),
                Err(Fault::Unknown { why, .. }) if repeat == Repeat::IfNotTaken => return Err(Failure::InDoubt(why)),
                Err(Fault::NotTaken { why, wait } | Fault::Unknown { why, wait, .. }) => (why, wait),
            };
            if began.elapsed() > self.patience {
                return Err(Failure::Away(why));
            }
            self.pause(attempt, wait);
        }
    }

    /// As long as the server asks, but no longer than a person would wait for it to come back.
    fn pause(&self, attempt: usize, wait: Option<Duration>) {
        let own = backoff(self.first_pause, attempt, chance());
        std::thread::sleep(wait.map_or(own, |wait| wait.clamp(own, LONGEST_BACKOFF.max(own))));
    }

    /// A failure in the words of a person, with what to do next. `doing` says what it was about.
    pub fn explain(&self, failure: Failure, doing: &str) -> anyhow::Error {
        let config = |text: String| anyhow!(BadConfig(text));
        match failure {
            Failure::Refused { status: 401 | 403, why } if !self.transport.has_key() => config(format!(
                "{doing}: {why}; no key was sent, because the environment variable {} is not set",
                self.api_key_env
            )),
            Failure::Refused { status: 401 | 403, why } => {
                config(format!("{doing}: {why}; look at the key in the environment variable {}", self.api_key_env))
            }
            Failure::Refused { status: 402, why } => anyhow!("{doing}: {why}; the account pays for no more. {GOES_ON}"),
            Failure::Refused { status: 404 | 405, why } => anyhow!(
                "{doing}: {why}; the server does not know this operation or has no such model (any more: it unloads those of a session \
                 that was silent). {GOES_ON}"
            ),
            Failure::Refused { status: 415, why } => {
                config(format!("{doing}: {why}; set engine.encoding = \"protobuf\", or \"json\" where it is that"))
            }
            Failure::Refused { status: 413, why } => config(format!(
                "{doing}: {why}; the request is too large for this server: lower engine.max_request_mib, or task.max_pixels where one conversation is too large already"
            )),
            Failure::Refused { status: 300..=399, why } => {
                config(format!("{doing}: {why}; give the address that it points to as engine.url"))
            }
            Failure::Refused { status: 422, why } => {
                anyhow!(
                    "{doing}: {why}; the server speaks another version of the protocol; docs/cluster.md names those that this program was written after"
                )
            }
            Failure::Refused { why, .. } => anyhow!("{doing}: the server refuses: {why}"),
            Failure::Away(why) => anyhow!(
                "{doing}: no answer: {why}. See whether the server runs and engine.url is its address. {GOES_ON}"
            ),
            Failure::InDoubt(why) => anyhow!(
                "{doing}: {why}; the server may have done it or not, and does not know a repeated request by its number, so it was not asked \
                 again: nothing is applied twice. {GOES_ON}"
            ),
            Failure::Gone(why) => anyhow!(
                "{doing}: the server has forgotten the request ({why}); it may have been started anew. {GOES_ON}"
            ),
            Failure::Failed(why) => anyhow!("{doing}: it failed at the server: {why}"),
        }
    }
}

/// What a person does after the server was lost.
const GOES_ON: &str = "The same command with --resume goes on from the last checkpoint";

/// A reply as JSON.
pub fn read(reply: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(reply)
        .map_err(|error| Failure::Failed(format!("the answer is not JSON ({error}): {}", crate::http::shown(reply))))
}

/// A field that an answer must have.
pub fn text_of(reply: &Value, field: &str) -> Result<String> {
    reply.get(field).and_then(Value::as_str).map(str::to_owned).with_context(|| {
        format!("the server's answer has no `{field}`: {}", crate::http::shown(reply.to_string().as_bytes()))
    })
}
