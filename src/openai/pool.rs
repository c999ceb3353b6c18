//! Several servers that share the work: calls go round, and where one is away the next is asked.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::server::{Fault, Outcome, Pace, Server};
use crate::http::{self, backoff, chance};

/// A server that asks to wait longer than this is not waited for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

pub(crate) struct Pool {
    pub servers: Vec<Server>,
    /// Further attempts after the first.
    pub max_retries: usize,
    /// Before the second attempt; it doubles with each one after.
    pub first_pause: Duration,
    pub pace: Pace,
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
    pub fn new(servers: Vec<Server>, max_retries: usize, first_pause: Duration, pace: Pace) -> Pool {
        Pool { servers, max_retries, first_pause, pace, turn: AtomicUsize::new(0) }
    }

    /// The same at one server, whether it is of the pool or not.
    pub fn ask_one<'a, T>(
        &'a self,
        server: &'a Server,
        call: impl Fn(&Server) -> (Option<u16>, Outcome<T>),
    ) -> Result<T, Unanswered<'a>> {
        self.attempts(|_| server, call, |_| Ok(()))
    }

    /// Calls until there is an answer. `seen` is told of every attempt before anything else happens.
    pub fn ask<T>(
        &self,
        call: impl Fn(&Server) -> (Option<u16>, Outcome<T>),
        seen: impl Fn(Attempt<T>) -> anyhow::Result<()>,
    ) -> Result<T, Unanswered<'_>> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        self.attempts(|away| &self.servers[(first + away) % self.servers.len()], call, seen)
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
