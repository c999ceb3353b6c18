//! Servers that speak OpenAI's chat completions: one call and the pace of calls (`openai/server.rs`), and the record of calls from which work that
//! was stopped goes on (`openai/journal.rs`). The teacher of trajectories and the engine `openai` ask through it.

mod journal;
mod server;

pub(crate) use journal::{Answer, Call, End, Journal};
pub(crate) use server::{Fault, Outcome, Pace, Server, data_uri};
