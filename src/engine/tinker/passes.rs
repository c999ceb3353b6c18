//! Forward and backward passes: conversations dealt out to requests, and derivatives carried by a loss.
//!
//! It hides how many requests a pass takes and which loss carries the numbers. What must stay true: requests are numbered and sent in order, so that
//! the server sums in the order of the conversations; before an update is trusted to a server it was seen to add up losses as the config says.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use super::client::{Failure, Repeat};
use super::sequence::{digest, gather, spread};
use super::transport::Body;
use super::wire::{Datum, Forward, ForwardBackward, ForwardBackwardInput, Passed, Tensor, metric};
use super::{ATTEMPTS, Loss, Reduction, Tinker, as_json, protobuf};
use crate::config::BadConfig;
use crate::engine::Who;
use crate::episode::Stream;
use crate::http::together;

/// Sequences of a request at most, as in the SDK.
const DATA_AT_ONCE: usize = 1024;

/// A conversation and what its tokens are given: nothing, or a derivative for each that was sampled.
pub(super) struct Item<'a> {
    pub stream: &'a Stream,
    /// The policy's log-probs and the derivative of the loss by each of them.
    pub learns: Option<(Vec<f32>, Vec<f32>)>,
}

/// The result of a pass, in whatever form it came.
pub(super) fn passed(reply: &Body) -> Result<Passed> {
    if reply.protobuf { protobuf::passed(&reply.bytes) } else { Passed::from_json(&reply.bytes) }
}

/// One request of a pass: to which model, under which number, and which of the items.
struct Part {
    model: String,
    number: u64,
    items: Range<usize>,
}

impl Tinker {
    /// Runs conversations through a model; log-probs of all targets of each. With `updates` their gradients are added up there.
    pub(super) fn pass(&mut self, who: Who, items: &[Item], updates: bool) -> Result<Vec<Vec<f32>>> {
        self.policy()?;
        let parts = self.parts(who, items, updates)?;
        let (path, doing, repeat) = match updates {
            true => ("forward_backward", "computing gradients", self.repeat()),
            false => ("forward", "computing log-probs", Repeat::Always),
        };
        let mut done: Vec<Passed> = Vec::with_capacity(parts.len());
        // Submitted one after another, so that the server gets them in the order of their numbers and sums in that order.
        let mut futures = Vec::with_capacity(parts.len());
        for part in &parts {
            let sent = self.client.submit(path, &self.body(part, items, updates)?, repeat);
            let future = sent.map_err(|failure| self.client.explain(failure, doing))?;
            if updates && part.items.start == 0 && !self.reduction_seen {
                let reply = self.client.retrieve_numbers(&future);
                let passed = passed(&reply.map_err(|failure| self.client.explain(failure, doing))?)?;
                self.reduction_seen = self.check_reduction(&items[part.items.clone()], &passed)?;
                done.push(passed);
            } else {
                futures.push((future, part));
            }
        }
        done.extend(together(&futures, self.options.max_in_flight, |(future, part)| {
            let mut future = future.clone();
            for attempt in 1.. {
                match self.client.retrieve_numbers(&future) {
                    Err(Failure::Gone(why)) if attempt < ATTEMPTS => {
                        let again = self.again(path, &self.body(part, items, updates)?, repeat, &future, why);
                        future = again.map_err(|failure| self.client.explain(failure, doing))?;
                    }
                    reply => {
                        return passed(&reply.map_err(|failure| self.client.explain(failure, doing))?);
                    }
                }
            }
            unreachable!("the loop returns at its last attempt")
        })?);
        let logprobs: Vec<Vec<f32>> = done.into_iter().flat_map(|passed| passed.logprobs).collect();
        ensure!(
            logprobs.len() == items.len(),
            "{doing}: the server answered {} of {} sequences",
            logprobs.len(),
            items.len()
        );
        for (i, (item, own)) in items.iter().zip(&logprobs).enumerate() {
            ensure!(
                updates || own.len() == item.stream.len() - 1,
                "{doing}: sequence {i} has {} targets and came back with {} log-probs; a server that drops pictures does this",
                item.stream.len() - 1,
                own.len()
            );
        }
        Ok(logprobs)
    }

    /// Deals items out to requests of the size that the config says, numbered.
    fn parts(&mut self, who: Who, items: &[Item], updates: bool) -> Result<Vec<Part>> {
        let largest = (self.options.max_request_mib * 1048576.0) as usize;
        let mut runs = Vec::new();
        let (mut start, mut size) = (0, 0);
        for (i, item) in items.iter().enumerate() {
            let own = self.pngs.size(item.stream)?;
            // The first gradients go alone until it is seen how the server adds them up.
            let alone = updates && !self.reduction_seen && start == 0;
            if i > start && (size + own > largest || i - start == DATA_AT_ONCE || alone) {
                runs.push(start..i);
                (start, size) = (i, 0);
            }
            size += own;
        }
        runs.push(start..items.len());
        let model = match who {
            Who::Policy => self.model.as_mut(),
            Who::Reference => self.reference.as_mut(),
        };
        let model = model.with_context(|| format!("there is no model of the {who:?} at the server"))?;
        Ok(runs.into_iter().map(|items| Part { model: model.id.clone(), number: model.number(), items }).collect())
    }

    fn body(&self, part: &Part, items: &[Item], updates: bool) -> Result<Body> {
        let of_part = &items[part.items.clone()];
        let data = of_part.iter().map(|item| self.datum(item, items.len())).collect::<Result<_>>()?;
        let loss_fn = match (updates, self.options.loss) {
            (false, _) | (true, Loss::CrossEntropy) => "cross_entropy",
            (true, Loss::ImportanceSampling) => "importance_sampling",
        };
        self.pass_body(&part.model, part.number, &ForwardBackwardInput { data, loss_fn }, updates)
    }

    /// The request of a pass, as the config says that it is written.
    pub(super) fn pass_body(
        &self,
        model_id: &str,
        seq_id: u64,
        input: &ForwardBackwardInput,
        updates: bool,
    ) -> Result<Body> {
        match (self.client.protobuf, updates) {
            (true, _) => Ok(Body { bytes: protobuf::request(model_id, seq_id, input, !updates)?, protobuf: true }),
            (false, true) => as_json(&ForwardBackward { model_id, seq_id, forward_backward_input: input }),
            (false, false) => as_json(&Forward { model_id, seq_id, forward_input: input }),
        }
    }

    /// One sequence of an update that has `count`.
    fn datum(&self, item: &Item, count: usize) -> Result<Datum> {
        let stream = item.stream;
        let mut loss_fn_inputs = BTreeMap::from([("target_tokens", Tensor::ids(self.pngs.targets(stream)))]);
        match (&item.learns, self.options.loss) {
            (None, _) => {
                loss_fn_inputs.insert("weights", Tensor::numbers(vec![0.0; stream.len() - 1]));
            }
            // Loss = sum of -weight · logprob, so d loss / d logprob = -weight.
            (Some((_, slopes)), Loss::CrossEntropy) => {
                let weights: Vec<f32> = slopes.iter().map(|slope| -slope).collect();
                loss_fn_inputs.insert("weights", Tensor::numbers(spread(stream, &weights)));
            }
            // Loss = sum of -exp(logprob - own) · advantage with own = logprob, so d loss / d logprob = -advantage. Without `weights`
            // every target counts, and where nothing was sampled the advantage is 0.
            (Some((own, slopes)), Loss::ImportanceSampling) => {
                let times = match self.options.reduction {
                    // It divides by the targets of each sequence and by the number of sequences.
                    Some(Reduction::SequenceMean) => ((stream.len() - 1) * count) as f32,
                    Some(Reduction::Sum) | None => 1.0,
                };
                let advantages: Vec<f32> = slopes.iter().map(|slope| -slope * times).collect();
                loss_fn_inputs.insert("logprobs", Tensor::numbers(spread(stream, own)));
                loss_fn_inputs.insert("advantages", Tensor::numbers(spread(stream, &advantages)));
            }
        }
        Ok(Datum { model_input: self.pngs.chunks(stream, stream.len() - 1)?, loss_fn_inputs })
    }

    /// Holds the loss that a server reports for some gradients against what was asked. True when that showed that it sums (or the config says
    /// what it does); false when it showed nothing.
    ///
    /// # Errors
    /// A server that adds up differently, or does not say.
    fn check_reduction(&self, items: &[Item], passed: &Passed) -> Result<bool> {
        if self.options.reduction.is_some() {
            return Ok(true);
        }
        let Some(reported) = metric(&passed.metrics, &["loss:sum", "total_loss:sum"]) else {
            bail!(BadConfig(
                "the server does not report its loss, so it cannot be seen how it adds up the losses of tokens, and weights of both signs go wrong \
                 where it does not sum them. If it does, set engine.reduction = \"sum\"; SkyRL's JAX backend takes means: \
                 engine.reduction = \"sequence_mean\" with engine.loss = \"importance_sampling\""
                    .into()
            ));
        };
        let (mut sum, mut all) = (0.0, 0.0);
        for (own, slopes) in items.iter().filter_map(|item| item.learns.as_ref()) {
            for (logprob, slope) in own.iter().zip(slopes) {
                let term = match self.options.loss {
                    Loss::CrossEntropy => f64::from(*slope) * f64::from(*logprob),
                    Loss::ImportanceSampling => f64::from(*slope),
                };
                sum += term;
                all += term.abs();
            }
        }
        // Terms that nearly cancel show nothing beside a bf16 model's rounding.
        if sum.abs() < 0.2 * all || all == 0.0 {
            return Ok(false);
        }
        ensure!(
            (reported - sum).abs() <= 0.05 * all,
            BadConfig(format!(
                "the server does not add up losses as the protocol means it: it reports {reported}, and the sum over the tokens is {sum}. If it \
                 takes means as SkyRL's JAX backend does, set engine.reduction = \"sequence_mean\" and engine.loss = \
                 \"importance_sampling\""
            ))
        );
        Ok(true)
    }

    /// Log-probs of each conversation's sampled tokens; those of the policy are kept until the next update.
    pub(super) fn score(&mut self, streams: &[&Stream], who: Who) -> Result<Vec<Vec<f32>>> {
        let digests: Vec<[u8; 32]> = streams.iter().map(|stream| digest(stream)).collect();
        let known = |tinker: &Tinker, i: usize| who == Who::Policy && tinker.scored.contains_key(&digests[i]);
        let asked: Vec<usize> =
            (0..streams.len()).filter(|&i| streams[i].sampled_count() > 0 && !known(self, i)).collect();
        let mut scores: Vec<Vec<f32>> = vec![Vec::new(); streams.len()];
        if !asked.is_empty() {
            let items: Vec<Item> = asked.iter().map(|&i| Item { stream: streams[i], learns: None }).collect();
            for (&i, all) in asked.iter().zip(self.pass(who, &items, false)?) {
                scores[i] = gather(streams[i], &all);
                if who == Who::Policy {
                    self.scored.insert(digests[i], scores[i].clone());
                }
            }
        }
        if who == Who::Policy {
            for (score, digest) in scores.iter_mut().zip(&digests).filter(|(score, _)| score.is_empty()) {
                *score = self.scored.get(digest).cloned().unwrap_or_default();
            }
        }
        Ok(scores)
    }
}
