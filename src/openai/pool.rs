//! Several servers that share the work: calls go round, and where one is away the next is asked.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::server::{Fault, Outcome, Pace, Server};
use crate::config::BadConfig;
use crate::http::{self, backoff, chance};

/// A server that asks to wait longer than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// What a million tokens cost, read and written, in whatever currency the bill is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Price(pub f64, pub f64);

impl Price {
    /// # Errors
    /// What is no price; `key` names it.
    pub fn validate(self, key: &str) -> Result<()> {
        let Price(read, written) = self;
        ensure!(
            [read, written].iter().all(|price| price.is_finite() && *price >= 0.0),
            BadConfig(format!(
                "{key} = [{read}, {written}]: expected what a million tokens cost, read and written, such as [0.15, 0.6]"
            ))
        );
        Ok(())
    }

    /// ```
    /// # use foveate::openai::Price;
    /// assert_eq!(Price(0.5, 2.0).of(3_000_000, 250_000), 2.0);
    /// ```
    pub fn of(self, read: u64, written: u64) -> f64 {
        (self.0 * read as f64 + self.1 * written as f64) / 1e6
    }
}

/// What a config says of a pool: `[engine]` of every kind that has one says it with these keys.
pub(crate) struct PoolOptions<'a> {
    pub kind: &'a str,
    pub urls: &'a [String],
    pub model: &'a str,
    pub api_key_env: &'a str,
    pub requests_per_minute: Option<f64>,
    pub max_in_flight: usize,
    pub max_retries: usize,
    pub timeout_s: f64,
    pub pause_s: f64,
    pub price: Option<Price>,
}

impl PoolOptions<'_> {
    /// # Errors
    /// What is missing or cannot work, named.
    pub fn validate(&self) -> Result<()> {
        if self.urls.is_empty() {
            bail!(BadConfig(format!(
                "engine.urls is missing; kind = {:?} needs it, for instance [\"http://localhost:8000/v1\"]",
                self.kind
            )));
        }
        if self.model.trim().is_empty() {
            bail!(BadConfig("engine.model is missing: the name under which the servers know the model".into()));
        }
        if self.max_in_flight == 0 {
            bail!(BadConfig("engine.max_in_flight is 0; nothing could be asked".into()));
        }
        if !(self.timeout_s.is_finite() && self.timeout_s > 0.0 && self.timeout_s < 1e9) {
            bail!(BadConfig(format!("engine.timeout_s = {}: expected a number above 0", self.timeout_s)));
        }
        if !(0.0..1e9).contains(&self.pause_s) {
            bail!(BadConfig(format!("engine.pause_s = {}: expected a number of seconds, at least 0", self.pause_s)));
        }
        self.price.map_or(Ok(()), |price| price.validate("engine.price"))?;
        self.pace().map(|_| ())
    }

    fn pace(&self) -> Result<Pace> {
        Pace::new(self.requests_per_minute).context("engine.requests_per_minute")
    }

    /// Reads the key; nothing is sent yet.
    ///
    /// # Errors
    /// Options that cannot work, an address that is none.
    pub fn open(&self) -> Result<Pool> {
        self.validate()?;
        let key = http::key_from(self.api_key_env);
        let timeout = Duration::from_secs_f64(self.timeout_s);
        let server = |url: &String| Server::new(url, key.clone(), timeout, ["engine.urls", "engine.api_key_env"]);
        Ok(Pool {
            servers: self.urls.iter().map(server).collect::<Result<_>>()?,
            spent: Spent { price: self.price, ..Spent::default() },
            max_retries: self.max_retries,
            first_pause: Duration::from_secs_f64(self.pause_s),
            pace: self.pace()?,
            turn: AtomicUsize::new(0),
        })
    }
}

/// What asking took, for the line that a run ends with.
#[derive(Default)]
pub(crate) struct Spent {
    answers: AtomicU64,
    read: AtomicU64,
    wrote: AtomicU64,
    price: Option<Price>,
}

impl Spent {
    /// An answer, and the tokens that the server read and wrote for it.
    pub fn count(&self, read: u64, wrote: u64) {
        for (count, more) in [(&self.answers, 1), (&self.read, read), (&self.wrote, wrote)] {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }

    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// In words; `answers` is what they are called.
    pub fn told(&self, answers: &str) -> String {
        let [n, read, wrote] = [&self.answers, &self.read, &self.wrote].map(|count| count.load(Ordering::Relaxed));
        let cost = self.price.map(|price| format!(", for {:.2}", price.of(read, wrote)));
        format!("{n} {answers}: {read} tokens read and {wrote} written{}", cost.unwrap_or_default())
    }
}

pub(crate) struct Pool {
    pub servers: Vec<Server>,
    pub spent: Spent,
    /// Further attempts after the first.
    max_retries: usize,
    /// Before the second attempt; it doubles with each one after.
    first_pause: Duration,
    pace: Pace,
    /// The server that the next call goes to, unless it is away.
    turn: AtomicUsize,
}

/// An attempt, as it ended.
pub(crate) struct Attempt<'a, T> {
    pub number: usize,
    pub took: Duration,
    pub status: Option<u16>,
    pub outcome: &'a Outcome<T>,
}

/// Why there is no answer.
pub(crate) enum Unanswered<'a> {
    Tired {
        server: &'a Server,
        attempts: usize,
        why: String,
    },
    Refused {
        server: &'a Server,
        status: Option<u16>,
        why: String,
    },
    /// What was done with an attempt failed.
    Own(anyhow::Error),
}

impl Pool {
    /// Calls until there is an answer. `seen` is told of every attempt before anything else happens.
    pub fn ask<T>(
        &self,
        call: impl Fn(&Server) -> (Option<u16>, Outcome<T>),
        seen: impl Fn(Attempt<T>) -> anyhow::Result<()>,
    ) -> Result<T, Unanswered<'_>> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        self.attempts(|away| &self.servers[(first + away) % self.servers.len()], call, seen)
    }

    /// The same at one of them.
    pub fn ask_one<'a, T>(
        &'a self,
        server: &'a Server,
        call: impl Fn(&Server) -> (Option<u16>, Outcome<T>),
    ) -> Result<T, Unanswered<'a>> {
        self.attempts(|_| server, call, |_| Ok(()))
    }

    /// `server` says whom to ask, by how many were found away.
    fn attempts<'a, T>(
        &'a self,
        server: impl Fn(usize) -> &'a Server,
        call: impl Fn(&Server) -> (Option<u16>, Outcome<T>),
        seen: impl Fn(Attempt<T>) -> anyhow::Result<()>,
    ) -> Result<T, Unanswered<'a>> {
        let mut away = 0;
        for number in 1.. {
            self.pace.turn(&|| false);
            let server = server(away);
            let began = Instant::now();
            let (status, outcome) = call(server);
            seen(Attempt { number, took: began.elapsed(), status, outcome: &outcome }).map_err(Unanswered::Own)?;
            match outcome {
                Outcome::Answer(answer) => return Ok(answer),
                Outcome::Again { why, wait, fault } => {
                    if number > self.max_retries || wait.is_some_and(|wait| wait > LONGEST_WAIT) {
                        return Err(Unanswered::Tired { server, attempts: number, why });
                    }
                    // Where there are others, one of them may be there, or in better health.
                    if fault == Fault::Away || number > 1 {
                        away += 1;
                    }
                    let pause = backoff(self.first_pause, number, chance()).max(wait.unwrap_or_default());
                    http::sleep(pause, &|| false);
                }
                Outcome::Refused(why) => return Err(Unanswered::Refused { server, status, why }),
            }
        }
        unreachable!("the loop ends at its last attempt")
    }
}
