//! A session with the server: found, greeted, and kept alive by a heartbeat until it is dropped.
//!
//! Servers unload the models of a session that has been silent for some minutes (SkyRL: five), and a step of sampling or a person's
//! evaluation may take longer; so a thread speaks up every ten seconds, as the SDK does.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::client::{Client, Failure, text_of};
use super::transport::Body;
use crate::config::BadConfig;
use crate::progress::say;

const HEARTBEAT: Duration = Duration::from_secs(10);

pub struct Session {
    pub id: String,
    /// Numbers models within the session.
    pub next_model: u64,
    /// Numbers sampling sessions within it.
    pub next_sampler: u64,
    stop: Sender<()>,
    heart: Option<JoinHandle<()>>,
}

impl Session {
    /// Looks whether the server is there and has the model, and opens a session.
    ///
    /// # Errors
    /// Nobody there, a key that is refused, a model that the server does not have.
    pub fn open(client: &Arc<Client>, base_model: &str) -> Result<Session> {
        let url = client.transport.url();
        let found = |failure: Failure| match failure {
            Failure::Away(why) => anyhow!(BadConfig(format!(
                "nobody answers at engine.url: {why}; see whether the server runs and this is its address"
            ))),
            Failure::Refused { status: 404 | 405, why } | Failure::Failed(why) => {
                anyhow!(BadConfig(format!("engine.url is no server of the Tinker API: {why}")))
            }
            other => client.explain(other, "greeting the server"),
        };
        client.look("healthz").map_err(found)?;
        let capabilities = client.look("get_server_capabilities").map_err(found)?;
        let models: Vec<&str> = capabilities
            .get("supported_models")
            .and_then(Value::as_array)
            .with_context(|| format!("{url}/get_server_capabilities does not say which models there are"))?
            .iter()
            .filter_map(|model| model.get("model_name")?.as_str())
            .collect();
        if !models.contains(&base_model) {
            let alike = |a: &&&str, b: &&&str| {
                strsim::jaro_winkler(a, base_model).total_cmp(&strsim::jaro_winkler(b, base_model))
            };
            bail!(BadConfig(match models.iter().max_by(alike) {
                None => format!("engine.base_model = {base_model:?}: the server has no model at all"),
                Some(near) => format!(
                    "engine.base_model = {base_model:?}: the server does not have it; did you mean {near:?}? It has {}",
                    models.join(", ")
                ),
            }));
        }
        let opened = client
            .ask(
                "create_session",
                &json!({"type": "create_session", "tags": ["foveate"], "user_metadata": {},
                        "sdk_version": concat!("foveate-", env!("CARGO_PKG_VERSION"))}),
            )
            .map_err(|failure| client.explain(failure, "opening a session"))?;
        for field in ["info_message", "warning_message", "error_message"] {
            if let Some(text) = opened.get(field).and_then(Value::as_str) {
                say(&format!("the server says: {text}"));
            }
        }
        let id = text_of(&opened, "session_id")?;
        let (stop, stopped) = channel();
        let body = Body::json(json!({"type": "session_heartbeat", "session_id": id}).to_string().into_bytes());
        let client = client.clone();
        let heart = thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                while stopped.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                    // A missed beat harms nothing by itself, and when the server is lost the next request says so.
                    let _ = client.transport.post("session_heartbeat", &body, false);
                }
            })
            .context("starting the heartbeat of the session")?;
        Ok(Session { id, next_model: 0, next_sampler: 0, stop, heart: Some(heart) })
    }

    pub fn count_model(&mut self) -> u64 {
        self.next_model += 1;
        self.next_model - 1
    }

    pub fn count_sampler(&mut self) -> u64 {
        self.next_sampler += 1;
        self.next_sampler - 1
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        // Not waited for: it may be in the middle of a call to a server that is away, and holds nothing that matters.
        drop(self.heart.take());
    }
}
