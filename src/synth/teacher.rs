//! The teacher at an endpoint: any OpenAI-compatible server that sees pictures writes the traces of `foveate data trajectories`.
//!
//! It hides the conversation with the server: what is asked (`request.rs`), one call, the pace of calls and their record
//! (`openai.rs`), and here who asks what, how often. What must stay true: an answer is recorded before it is used and never asked for
//! again; which traces come out hangs on the answers alone, not on the order in which they came; a row that the server cannot
//! answer costs that row, a server that refuses stops the run with everything paid for kept.

mod request;

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand::Rng;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use super::stream;
use super::trajectories::{Facts, Rejected};
use crate::data::Sample;
use crate::http::{self, backoff, sleep};
use crate::openai::{Answer, Call, End, Fault, Journal, Outcome, Pace, Price, Server};
use crate::progress::Progress;
use crate::run::{self, Interrupt, Interrupted};
use request::Request;

const PURPOSE: u64 = 6;
/// Rows that fail one after another because the server is away, before the run stops.
const PATIENCE: usize = 8;
/// A server that asks to wait longer than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// The server, what is asked of it, and how hard.
#[derive(Clone, Debug)]
pub struct Options {
    /// Up to `/v1`.
    pub url: String,
    pub model: String,
    /// The environment variable that holds the key; unset, none is sent.
    pub api_key_env: String,
    /// Calls under way at once.
    pub concurrency: NonZeroUsize,
    /// None: as fast as answers come.
    pub requests_per_minute: Option<f64>,
    /// Further attempts at a row after the first.
    pub max_retries: usize,
    /// Of one attempt, from connecting to the last byte.
    pub timeout: Duration,
    /// The pause before the second attempt; it doubles with each one after.
    pub first_pause: Duration,
    /// None: the server's own.
    pub temperature: Option<f64>,
    /// None: the server's own.
    pub max_tokens: Option<usize>,
    /// A picture with more pixels is sent smaller.
    pub max_pixels: u64,
    /// The record of all calls: what is answered there is not asked again.
    pub calls: PathBuf,
    /// What a million tokens cost, read and written.
    pub price: Option<Price>,
}

impl Options {
    /// As the command line has them when nothing else is said.
    pub fn new(url: &str, model: &str, calls: impl Into<PathBuf>) -> Options {
        Options {
            url: url.into(),
            model: model.into(),
            api_key_env: "OPENAI_API_KEY".into(),
            concurrency: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN),
            requests_per_minute: None,
            max_retries: 5,
            timeout: Duration::from_secs(300),
            first_pause: Duration::from_secs(1),
            temperature: None,
            max_tokens: None,
            max_pixels: 1 << 20,
            calls: calls.into(),
            price: None,
        }
    }
}

/// What asking took, in this run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// Calls made, answered or not.
    pub calls: usize,
    /// Rows that were answered now.
    pub answered: usize,
    /// Rows whose answer was in the record already.
    pub reused: usize,
    /// Tokens of the calls that were answered, as the server counts them.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Of these tokens, where their price is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Rows without an answer, and why the last attempt failed.
    pub failed: Vec<(String, String)>,
}

/// A server that is ready to be asked.
pub struct Endpoint<'a> {
    options: &'a Options,
    interrupt: &'a Interrupt,
    server: Server,
    pace: Pace,
    journal: Journal,
    spent: Mutex<Spent>,
    /// Rows that failed because the server was away since the last one that did not.
    away: AtomicUsize,
}

/// A request on its way from the pool, where pictures are made, to the threads that wait for the server.
type Job<'a> = (&'a Request<'a>, Vec<u8>);

impl<'a> Endpoint<'a> {
    /// Reads the key and the record; nothing is sent yet.
    ///
    /// # Errors
    /// Options that make no sense; a record that cannot be read, or that another process writes to.
    pub fn open(options: &'a Options, interrupt: &'a Interrupt) -> Result<Endpoint<'a>> {
        let key = http::key_from(&options.api_key_env);
        Ok(Endpoint {
            options,
            interrupt,
            server: Server::new(&options.url, key, options.timeout, ["--url", "--api-key-env"])?,
            pace: Pace::new(options.requests_per_minute)?,
            journal: Journal::open(&options.calls)?,
            spent: Mutex::default(),
            away: AtomicUsize::new(0),
        })
    }

    /// The traces of some rows, in their order; asks for what is not in the record.
    ///
    /// # Errors
    /// The server refuses or is away, a picture or the record fails, or a person interrupts. Every answer that came is in the record.
    pub fn traces(&self, rows: &[(&Sample, &Facts)]) -> Result<Vec<Result<String, Rejected>>> {
        let requests: Vec<Request> =
            rows.par_iter().map(|(row, facts)| Request::new(row, facts, self.options)).collect::<Result<_>>()?;
        let mut new: Vec<&Request> = Vec::new();
        let mut known = HashSet::new();
        for request in &requests {
            if self.journal.answer(&request.digest).is_some() {
                self.tally().reused += 1;
            } else if known.insert(&request.digest) {
                new.push(request);
            }
        }
        self.ask_all(&new)?;
        Ok(requests.iter().map(|request| read(self.journal.answer(&request.digest))).collect())
    }

    /// What was spent so far.
    pub fn spent(&self) -> Spent {
        let spent = self.tally().clone();
        let cost = self.options.price.map(|price| price.of(spent.prompt_tokens, spent.completion_tokens));
        Spent { cost, ..spent }
    }

    fn has_answered(&self) -> bool {
        let spent = self.tally();
        spent.answered + spent.reused > 0
    }

    fn tally(&self) -> MutexGuard<'_, Spent> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_all(&self, requests: &[&Request]) -> Result<()> {
        let progress = Progress::start("asking the teacher", "row", 0, requests.len() as u64);
        let halted = AtomicBool::new(false);
        let first_error = Mutex::new(None);
        let stop = || self.interrupt.asked() || halted.load(Ordering::SeqCst);
        let halt = |error: anyhow::Error| {
            halted.store(true, Ordering::SeqCst);
            first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        };
        // One request waits with its pictures made while the others are under way.
        let (jobs, waiting) = sync_channel::<Job>(1);
        let waiting = Mutex::new(waiting);
        thread::scope(|scope| {
            // Moved in, so that the line closes when this scope is done with it, however that comes.
            let jobs = jobs;
            for _ in 0..self.options.concurrency.get().min(requests.len()) {
                let work = || {
                    // After a stop what is in line is taken without being asked, so that nobody waits to hand it over.
                    while let Some((request, body)) = next(&waiting) {
                        if let Err(error) = self.ask(request, &body, &stop) {
                            halt(error);
                        }
                        progress.step(match self.tally().failed.len() {
                            0 => String::new(),
                            failed => format!("{failed} without an answer"),
                        });
                    }
                };
                if let Err(error) = thread::Builder::new().name("teacher".into()).spawn_scoped(scope, work) {
                    halt(anyhow::Error::from(error).context("starting a thread that asks the teacher"));
                }
            }
            for request in requests {
                if stop() {
                    break;
                }
                match request.body().with_context(|| format!("preparing row {} for the teacher", request.row)) {
                    Ok(body) => {
                        if jobs.send((request, body)).is_err() {
                            break;
                        }
                    }
                    Err(error) => halt(error),
                }
            }
        });
        if let Some(error) = first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        if self.interrupt.asked() {
            return Err(Interrupted::in_calls(self.journal.path()).into());
        }
        progress.finish();
        let spent = self.tally();
        if let Some((row, why)) = spent.failed.last()
            && spent.answered + spent.reused == 0
            && self.away.load(Ordering::SeqCst) == spent.failed.len()
        {
            return Err(self.nobody_there(spent.failed.len(), row, why));
        }
        Ok(())
    }

    /// Asks for one row until it is answered, failed or to be left.
    fn ask(&self, request: &Request, body: &[u8], stop: &dyn Fn() -> bool) -> Result<()> {
        let mut chance = stream(u64::from_str_radix(&request.digest[..16], 16).unwrap_or(0), PURPOSE, 0);
        let mut attempt = 0;
        loop {
            attempt += 1;
            if !self.pace.turn(stop) {
                return Ok(());
            }
            let began = Instant::now();
            let (status, outcome) = self.server.call(body);
            let end = match &outcome {
                Outcome::Answer(answer) => End::Answer(answer),
                Outcome::Again { why, .. } | Outcome::Refused(why) => End::Error(why),
            };
            self.journal.append(&Call {
                digest: &request.digest,
                row: request.row,
                attempt,
                at: run::now(),
                seconds: began.elapsed().as_secs_f64(),
                status,
                end,
                request: &request.record,
            })?;
            self.tally().calls += 1;
            match outcome {
                Outcome::Answer(answer) => {
                    self.count(&answer);
                    return Ok(());
                }
                Outcome::Again { why, wait, fault } => {
                    if let Some(wait) = wait {
                        self.hold(wait, request.row, &why)?;
                    }
                    if attempt > self.options.max_retries {
                        return self.give_up(request.row, why, fault);
                    }
                    if !sleep(backoff(self.options.first_pause, attempt, chance.random()), stop) {
                        return Ok(());
                    }
                }
                // A server that has answered others and will not take this one (too long, a content filter): that row alone is lost.
                Outcome::Refused(why) if matches!(status, Some(400 | 413 | 422)) && self.has_answered() => {
                    return self.give_up(request.row, why, Fault::Reply);
                }
                Outcome::Refused(why) => bail!(
                    "asking the teacher for row {}: it refuses with {why}; {}. {}",
                    request.row,
                    self.advice(status),
                    self.kept()
                ),
            }
        }
    }

    /// Waits as long as the server asks, all threads together.
    fn hold(&self, wait: Duration, row: &str, why: &str) -> Result<()> {
        if wait > LONGEST_WAIT {
            bail!(
                "asking the teacher for row {row}: it says to come back in {} ({why}). {}",
                crate::progress::duration(wait.as_secs_f64()),
                self.kept()
            );
        }
        self.pace.hold(wait);
        Ok(())
    }

    fn count(&self, answer: &Answer) {
        self.away.store(0, Ordering::SeqCst);
        let tokens =
            |key: &str| answer.usage.as_ref().and_then(|usage| usage.get(key)).and_then(Value::as_u64).unwrap_or(0);
        let mut spent = self.tally();
        spent.answered += 1;
        spent.prompt_tokens += tokens("prompt_tokens");
        spent.completion_tokens += tokens("completion_tokens");
    }

    /// Leaves a row without an answer; and the rest too, where the server is not there at all.
    fn give_up(&self, row: &str, why: String, fault: Fault) -> Result<()> {
        let away = match fault {
            Fault::Away => self.away.fetch_add(1, Ordering::SeqCst) + 1,
            Fault::Reply => {
                self.away.store(0, Ordering::SeqCst);
                0
            }
        };
        if away >= PATIENCE {
            return Err(self.nobody_there(away, row, &why));
        }
        self.tally().failed.push((row.to_owned(), why));
        Ok(())
    }

    fn nobody_there(&self, rows: usize, row: &str, why: &str) -> anyhow::Error {
        anyhow!(
            "asking the teacher: no answer to {rows} rows in succession, the last is row {row}: {why}; look at the server, and whether \
             --url is its address. {}",
            self.kept()
        )
    }

    fn advice(&self, status: Option<u16>) -> String {
        match status {
            Some(401 | 403) => self.server.about_key(&self.options.api_key_env),
            Some(404 | 405) => "look at --url (up to /v1) and --model".into(),
            Some(300..=399) => "give the address that it points to as --url".into(),
            Some(413) => "try a smaller --max-pixels".into(),
            _ => "see whether --model takes pictures, --temperature and --max-tokens; if only this row is refused, leave it out".into(),
        }
    }

    fn kept(&self) -> String {
        format!("The same command goes on and pays for no answer twice; they are in {}", self.journal.path().display())
    }
}

/// The next job in line; None when there will be no more.
fn next<'a>(jobs: &Mutex<Receiver<Job<'a>>>) -> Option<Job<'a>> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// The trace that an answer holds, if it got to its end.
fn read(answer: Option<Answer>) -> Result<String, Rejected> {
    match answer {
        None => Err(Rejected::Teacher),
        Some(Answer { finish_reason: Some(reason), .. }) if reason == "length" => Err(Rejected::CutShort),
        Some(answer) => Ok(request::trace(&answer.text)),
    }
}
