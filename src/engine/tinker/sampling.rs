//! Sampling: weights made ready for it, continuations asked for, and ended where ours would have ended.
//!
//! It hides sampling sessions and what servers keep of a stop. What must stay true: samples are drawn from the weights as they stand; an end of
//! turn that was sampled is kept, for it is trained; no vision token gets into a conversation.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::client::{Failure, Repeat, read, text_of};
use super::wire::{self, SamplingParams, StopReason};
use super::{ATTEMPTS, Tinker, as_json, protobuf};
use crate::engine::remote::ended;
use crate::engine::{Completion, Prompt, Sampler, Sampling};
use crate::http::together;

/// The weights as they stand, ready to be sampled from.
pub(super) struct Published {
    sampling_session: String,
    next_request: AtomicU64,
}

impl Tinker {
    /// Makes the weights as they stand ready to be sampled from.
    pub(super) fn publish(&mut self) -> Result<()> {
        if self.published.is_some() {
            return Ok(());
        }
        let doing = "making the weights ready for sampling";
        let (id, number) = {
            let model = self.policy()?;
            (model.id.clone(), model.number())
        };
        let mut attempt = 1;
        let saved = loop {
            let body = json!({
                "type": "save_weights_for_sampler", "model_id": id, "seq_id": number,
                "sampling_session_seq_id": self.session.count_sampler(),
            });
            let sent = self.client.submit("save_weights_for_sampler", &as_json(&body)?, Repeat::Always);
            match sent.and_then(|future| self.client.retrieve(&future)) {
                // The answer to an earlier attempt got lost. Saved a second time under another number it is the same.
                Err(Failure::Refused { status: 409, .. } | Failure::Gone(_)) if attempt < 2 * ATTEMPTS => attempt += 1,
                other => break other.map_err(|failure| self.client.explain(failure, doing))?,
            }
        };
        let saved = read(&saved).map_err(|failure| self.client.explain(failure, doing))?;
        let sampling_session = match (saved.get("sampling_session_id"), saved.get("path")) {
            (Some(Value::String(id)), _) => id.clone(),
            (_, Some(Value::String(path))) => {
                let body = json!({
                    "type": "create_sampling_session", "session_id": self.session.id, "model_path": path,
                    "sampling_session_seq_id": self.session.count_sampler(),
                });
                let opened = self.client.ask("create_sampling_session", &body);
                text_of(&opened.map_err(|failure| self.client.explain(failure, doing))?, "sampling_session_id")?
            }
            _ => bail!("{doing}: the server gives neither a sampling_session_id nor a path: {saved}"),
        };
        self.published = Some(Published { sampling_session, next_request: AtomicU64::new(0) });
        Ok(())
    }

    /// Continuations of one prompt.
    pub(super) fn ask_for_samples(
        &self,
        prompt: wire::ModelInput,
        count: usize,
        params: SamplingParams,
        of_prompt: bool,
    ) -> Result<wire::Sampled> {
        let doing = "sampling";
        let published = self.published.as_ref().context("no weights were made ready for sampling")?;
        let mut sample = wire::Sample {
            kind: "sample",
            sampling_session_id: &published.sampling_session,
            seq_id: 0,
            num_samples: count,
            prompt,
            sampling_params: params,
            prompt_logprobs: of_prompt,
        };
        for attempt in 1.. {
            // Sampling changes nothing: what was forgotten or failed is asked anew, under a number of its own.
            sample.seq_id = published.next_request.fetch_add(1, Ordering::SeqCst);
            let body = as_json(&sample)?;
            let reply = self
                .client
                .submit("asample", &body, Repeat::Always)
                .and_then(|future| self.client.retrieve_numbers(&future));
            match reply {
                Err(Failure::Gone(_) | Failure::Failed(_)) if attempt < ATTEMPTS => {}
                reply => {
                    let reply = reply.map_err(|failure| self.client.explain(failure, doing))?;
                    let sampled: wire::Sampled = match reply.protobuf {
                        true => protobuf::sampled(&reply.bytes)?,
                        false => serde_json::from_slice(&reply.bytes).context("reading what the server sampled")?,
                    };
                    ensure!(
                        sampled.sequences.len() == count,
                        "{doing}: {} sequences were asked for and {} came",
                        count,
                        sampled.sequences.len()
                    );
                    return Ok(sampled);
                }
            }
        }
        unreachable!("the loop returns at its last attempt")
    }

    /// A sampled sequence as the loop knows it: ended where ours would have ended.
    fn completion(&self, sequence: wire::Sequence, sampling: &Sampling) -> Result<Completion> {
        let wire::Sequence { stop_reason, tokens: ids, logprobs } = sequence;
        let logprobs = logprobs
            .context("the server sampled without telling log-probs, and nothing can be trained without them")?;
        ensure!(
            ids.len() == logprobs.len(),
            "the server sampled {} tokens and tells {} log-probs",
            ids.len(),
            logprobs.len()
        );
        ended(&self.frontend, &self.banned, sampling, (ids, logprobs), stop_reason == StopReason::Length)
    }
}

impl Sampler for Tinker {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        ensure!(!sampling.ignore_end, "a server cannot be told to go on after an end of turn");
        self.publish()?;
        together(prompts, self.options.max_in_flight, |prompt| {
            let count = prompt.seeds.len();
            let params = SamplingParams {
                max_tokens: sampling.max_new_tokens,
                // One number for the members of a group, and room above it for their own.
                seed: prompt.seeds.first().copied().unwrap_or(0) % ((1 << 31) - (1 << 16)),
                stop: self.stops.clone(),
                temperature: sampling.temperature,
                top_k: sampling.top_k.map_or(-1, |k| k as i64),
                top_p: sampling.top_p.unwrap_or(1.0),
            };
            let input = self.pngs.chunks(prompt.stream, prompt.stream.len())?;
            let sampled = self.ask_for_samples(input, count, params, false)?;
            sampled.sequences.into_iter().map(|sequence| self.completion(sequence, sampling)).collect()
        })
    }

    fn end_step(&mut self) {}
}
