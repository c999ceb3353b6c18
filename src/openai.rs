//! Servers that speak OpenAI's chat completions: one call and the pace of calls (`openai/server.rs`), several
//! servers that share the work (`openai/pool.rs`), and the record of calls from which work that
//! was stopped goes on (`openai/journal.rs`). The teacher of trajectories and the engine `openai` ask through it.

mod journal;
mod pool;
mod server;

use serde_json::Value;
use sha2::{Digest, Sha256};

pub(crate) use journal::{Answer, Call, End, Journal};
pub use pool::Price;
pub(crate) use pool::{Attempt, Pool, PoolOptions, Unanswered};
pub(crate) use server::{Fault, Outcome, Pace, Server, data_uri, from_json};

/// SHA-256 as `sha256sum` prints it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request as it is sent: pictures in the places of what stands for them in the record, in order.
pub(crate) fn with_pictures(mut request: Value, pictures: Vec<String>) -> Value {
    let messages = request["messages"].as_array_mut().into_iter().flatten();
    let parts = messages.filter_map(|message| message["content"].as_array_mut()).flatten();
    for (part, picture) in parts.filter(|part| part["type"] == "image_url").zip(pictures) {
        part["image_url"]["url"] = picture.into();
    }
    request
}
