//! The engine on a chat server: any server of OpenAI's chat completions that takes pictures answers in place of a model of our own.
//!
//! For `eval`, `rollout` and `ask`. Words go out and words come back, so a conversation is read back into messages ([`Chat::messages`]) and an
//! answer becomes tokens of the tokenizer in `model.path`; the loop, the crops, the judges and the record stay as they are. It hides retries,
//! several servers, and the record of calls. What must stay true: pictures are sent as the very pixels that were to be seen; an answer comes to
//! the conversation that asked for it, in whatever order answers come; nothing of it can be trained on, for its log-probs are unknown (NaN); an
//! answer that is in the record of calls is not paid for again.
//!
//! [`Chat::messages`]: crate::chat::Chat::messages

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pngs::Pngs;
use super::remote::one_by_one;
use super::{Completion, Finish, Frontend, Prompt, Sampler, Sampling};
use crate::chat::{Content, Message, Part};
use crate::config::BadConfig;
use crate::episode::Stream;
use crate::openai::{
    Answer, Attempt, Call, End, Journal, Outcome, Pool, PoolOptions, Price, Server, Unanswered, data_uri, sha256,
    with_pictures,
};
use crate::progress;
use crate::run;

/// `[engine]` with `kind = "openai"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Addresses up to `/v1`; several share the work.
    pub urls: Vec<String>,
    /// The model as the servers name it; `model.path` is a folder with its tokenizer, template and picture settings.
    pub model: String,
    /// The environment variable that holds the key; unset, none is sent.
    pub api_key_env: String,
    /// Requests under way at once.
    pub max_in_flight: usize,
    /// Unset: as fast as answers come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<f64>,
    /// Further attempts at an answer after the first.
    pub max_retries: usize,
    /// Of one call, from connecting to the last byte.
    pub timeout_s: f64,
    /// The pause before a second attempt; it doubles with each one after.
    pub pause_s: f64,
    /// A file that records every call; what is answered there is not asked again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calls: Option<PathBuf>,
    /// What a million tokens cost, read and written, for the sum at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            urls: Vec::new(),
            model: String::new(),
            api_key_env: "OPENAI_API_KEY".into(),
            max_in_flight: 16,
            requests_per_minute: None,
            max_retries: 5,
            timeout_s: 300.0,
            pause_s: 1.0,
            calls: None,
            price: None,
        }
    }
}

impl Options {
    /// # Errors
    /// What is missing or cannot work, named.
    pub fn validate(&self) -> Result<()> {
        self.pool().validate()
    }

    fn pool(&self) -> PoolOptions<'_> {
        PoolOptions {
            kind: "openai",
            urls: &self.urls,
            model: &self.model,
            api_key_env: &self.api_key_env,
            requests_per_minute: self.requests_per_minute,
            max_in_flight: self.max_in_flight,
            max_retries: self.max_retries,
            timeout_s: self.timeout_s,
            pause_s: self.pause_s,
            price: self.price,
        }
    }
}

/// Servers that answer.
pub struct Served {
    options: Options,
    frontend: Frontend,
    pngs: Pngs,
    pool: Pool,
    journal: Option<Journal>,
    /// Answers that were in the record.
    known: AtomicU64,
}

impl Served {
    /// Reads the key and the record; nothing is sent yet.
    ///
    /// # Errors
    /// Options that cannot work, a record that cannot be read.
    pub fn open(options: &Options, frontend: Frontend) -> Result<Served> {
        Ok(Served {
            pool: options.pool().open()?,
            journal: options.calls.as_deref().map(Journal::open).transpose()?,
            pngs: Pngs::new(frontend.clone()),
            frontend,
            options: options.clone(),
            known: AtomicU64::new(0),
        })
    }

    /// A request with each picture as the digest of what is sent, and the pictures.
    fn request(&self, stream: &Stream, sampling: &Sampling, seed: u64) -> Result<(Value, Vec<String>)> {
        let mut pictures = Vec::with_capacity(stream.images.len());
        let mut digests = Vec::with_capacity(stream.images.len());
        for placed in &stream.images {
            let png = self.pngs.of(placed).with_context(|| format!("sending a view of {}", placed.path.display()))?;
            pictures.push(data_uri("png", &png));
            digests.push(format!("sha256:{}", sha256(&png)));
        }
        let messages = self.frontend.chat.messages(&stream.ids)?;
        let shown: usize = messages.iter().map(Message::images).sum();
        ensure!(shown == digests.len(), "a conversation of {} pictures was read back with {shown}", digests.len());
        let mut digests = digests.into_iter();
        let messages: Vec<Value> = messages.iter().map(|message| as_sent(message, &mut digests)).collect();
        let mut request = json!({
            "model": self.options.model, "messages": messages, "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            // Servers take signed numbers of 32 or 64 bits.
            "seed": seed % (1 << 31),
        });
        if let Some(p) = sampling.top_p {
            request["top_p"] = json!(p);
        }
        // Not OpenAI's; vLLM, SGLang and llama.cpp know it.
        if let Some(k) = sampling.top_k {
            request["top_k"] = json!(k);
        }
        Ok((request, pictures))
    }

    /// Asks until there is an answer.
    fn answer(&self, stream: &Stream, sampling: &Sampling, seed: u64) -> Result<Answer> {
        let (record, pictures) = self.request(stream, sampling, seed)?;
        let digest = sha256(record.to_string().as_bytes());
        if let Some(known) = self.journal.as_ref().and_then(|journal| journal.answer(&digest)) {
            self.known.fetch_add(1, Ordering::Relaxed);
            return Ok(known);
        }
        let body = serde_json::to_vec(&with_pictures(record.clone(), pictures)).context("writing a request as JSON")?;
        let record_of = |attempt: Attempt<Answer>| {
            let Some(journal) = &self.journal else { return Ok(()) };
            let end = match attempt.outcome {
                Outcome::Answer(answer) => End::Answer(answer),
                Outcome::Again { why, .. } | Outcome::Refused(why) => End::Error(why),
            };
            journal.append(&Call {
                digest: &digest,
                row: "",
                attempt: attempt.number,
                at: run::now(),
                seconds: attempt.took.as_secs_f64(),
                status: attempt.status,
                end,
                request: &record,
            })
        };
        match self.pool.ask(|server| server.call(&body), record_of) {
            Ok(answer) => {
                self.count(&answer);
                Ok(answer)
            }
            Err(Unanswered::Tired { server, attempts, why }) => {
                bail!("no answer from {} after {attempts} attempts: {why}{}", server.url(), self.kept())
            }
            Err(Unanswered::Refused { server, status, why }) => {
                bail!("{} refuses with {why}; {}{}", server.url(), self.advice(status, server), self.kept())
            }
            Err(Unanswered::Own(error)) => Err(error),
        }
    }

    fn count(&self, answer: &Answer) {
        let tokens = |key: &str| answer.usage.as_ref().and_then(|usage| usage.get(key)?.as_u64()).unwrap_or(0);
        self.pool.spent.count(tokens("prompt_tokens"), tokens("completion_tokens"));
    }

    fn advice(&self, status: Option<u16>, server: &Server) -> String {
        match status {
            Some(401 | 403) => server.about_key(&self.options.api_key_env),
            Some(404 | 405) => "look at engine.urls (up to /v1) and engine.model".into(),
            Some(413) => "lower the task's max_pixels".into(),
            Some(300..=399) => "write the address that it points to into engine.urls".into(),
            _ => "see whether engine.model takes pictures, and rollout.max_new_tokens".into(),
        }
    }

    fn kept(&self) -> String {
        match &self.options.calls {
            Some(calls) => {
                format!(
                    ". The same command (with --resume, once its folder holds answers) goes on and pays for no answer twice; they are in {}",
                    calls.display()
                )
            }
            None => ". With engine.calls = FILE every answer is recorded as it comes, and none would be paid for twice"
                .into(),
        }
    }

    /// The words as tokens, ended as the server says they ended.
    fn completion(&self, answer: &Answer) -> Result<Completion> {
        let chat = &self.frontend.chat;
        // Servers that know of reasoning hand thoughts and answer out apart; the model wrote them as one.
        let thoughts =
            answer.reasoning.as_ref().map(|thoughts| format!("<think>{thoughts}</think>")).unwrap_or_default();
        let mut ids = chat.assistant_ids(&(thoughts + &answer.text))?;
        let finish = match answer.finish_reason.as_deref() {
            Some("length") => Finish::Length,
            _ => {
                ids.push(chat.special.end_of_turn);
                Finish::EndOfTurn
            }
        };
        Ok(Completion { logprobs: vec![f32::NAN; ids.len()], ids, finish })
    }
}

/// A message as servers take it; pictures by what `urls` gives.
fn as_sent(message: &Message, urls: &mut impl Iterator<Item = String>) -> Value {
    let content = match &message.content {
        Content::Text(text) => json!(text),
        Content::Parts(parts) => parts
            .iter()
            .map(|part| match part {
                Part::Text { text } => json!({"type": "text", "text": text}),
                Part::Image { .. } => json!({"type": "image_url", "image_url": {"url": urls.next()}}),
            })
            .collect(),
    };
    json!({"role": message.role, "content": content})
}

impl Sampler for Served {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        ensure!(!sampling.ignore_end, "a server cannot be told to go on after an end of turn");
        ensure!(
            sampling.stop.is_empty(),
            BadConfig(
                "rollout.stop: a chat server leaves out the text that it stopped at, which would then be missing in the conversation; \
                 leave the key out with engine.kind = \"openai\""
                    .into()
            )
        );
        one_by_one(prompts, self.options.max_in_flight, |stream, seed| {
            self.completion(&self.answer(stream, sampling, seed)?)
        })
    }

    fn end_step(&mut self) {}
}

impl Drop for Served {
    fn drop(&mut self) {
        let known = self.known.load(Ordering::Relaxed);
        if self.pool.spent.answers() + known > 0 {
            let spent = self.pool.spent.told("answers");
            let known = if known > 0 { format!(", {known} more were in the record") } else { String::new() };
            progress::say(&format!("{} gave {spent}, as the server counts them{known}", self.options.model));
        }
    }
}
