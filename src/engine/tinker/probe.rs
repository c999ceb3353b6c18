//! What a server is asked before it is trusted: whether it sees pictures, where it trains and where it samples, and whether it knows a repeated
//! request by its number.
//!
//! Some servers take a picture and drop it without a word: SkyRL's JAX backend everywhere (`skyrl/backends/renderer.py`,
//! `render_model_input`), its FSDP and Megatron backends in samples where inference is not colocated with training
//! (`skyrl/tinker/extra/skyrl_train_inference_forwarding.py`). A policy would be trained blind there, so such a server is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::Tinker;
use super::client::Repeat;
use super::wire::{Chunk, Datum, ForwardBackwardInput, ModelInput, Sampled, SamplingParams, Tensor};
use crate::chat::{Message, Part};
use crate::config::BadConfig;
use crate::geometry::{Size, smart_resize};
use crate::image::{RgbImage, encode_png};

/// A prompt with one picture, or in words alone.
struct Question {
    ids: Vec<u32>,
    picture: Option<Picture>,
}

struct Picture {
    /// Where its tokens stand.
    range: std::ops::Range<usize>,
    size: Size,
}

/// Asks, and notes what was learnt in `tinker`.
///
/// # Errors
/// A server that drops pictures, where conversations show any, or one that does not do what the protocol says.
pub(super) fn run(tinker: &mut Tinker) -> Result<()> {
    let question = Question::new(tinker, tinker.pictures)?;
    forward(tinker, &question).context("trying the server's forward pass")?;
    tinker.publish()?;
    sample(tinker, &question).context("trying the server's sampler")
}

impl Question {
    fn new(tinker: &Tinker, picture: bool) -> Result<Question> {
        let frontend = &tinker.frontend;
        let text = Part::text("What colour is it?");
        if !picture {
            let encoded = frontend.chat.encode(&[Message::user(vec![text])], true, &[])?;
            return Ok(Question { ids: encoded.ids, picture: None });
        }
        let budget = frontend.processor.budget;
        let size = smart_resize(Size::new(budget.factor, budget.factor), budget)?;
        let tokens = frontend.processor.tokens(size);
        let mut encoded = frontend.chat.encode(&[Message::user(vec![Part::image(), text])], true, &[tokens])?;
        let range = encoded.images.pop().context("a prompt with a picture has no place for it")?;
        Ok(Question { ids: encoded.ids, picture: Some(Picture { range, size }) })
    }

    /// The first `tokens` tokens, with a picture of one colour.
    fn chunks(&self, tokens: usize, grey: u8) -> Result<ModelInput> {
        let text = |range: std::ops::Range<usize>| Chunk::EncodedText { tokens: self.ids[range].to_vec() };
        let Some(Picture { range, size }) = &self.picture else {
            return Ok(ModelInput { chunks: vec![text(0..tokens)] });
        };
        let picture = RgbImage::from_pixel(size.width, size.height, [grey; 3].into());
        let image = Chunk::Image { data: Arc::new(encode_png(&picture)?), format: "png", expected_tokens: range.len() };
        Ok(ModelInput { chunks: vec![text(0..range.start), image, text(range.end..tokens)] })
    }
}

/// As many log-probs as there are tokens. A server that drops the picture has too few of them, or stumbles over targets that are too many.
fn forward(tinker: &mut Tinker, question: &Question) -> Result<()> {
    let expected = question.ids.len() - 1;
    let seen = match (passed(tinker, question), &question.picture) {
        (Ok(found), _) if found == expected => return Ok(()),
        (Ok(found), None) => bail!("the server's forward pass gives {found} log-probs for {expected} tokens"),
        (Ok(found), Some(_)) => format!("{expected} log-probs were expected and {found} came"),
        (Err(error), None) => return Err(error),
        (Err(error), Some(_)) => {
            let words = Question::new(tinker, false)?;
            if passed(tinker, &words).ok() != Some(words.ids.len() - 1) {
                return Err(error);
            }
            format!("words alone pass, a picture among them does not ({error:#})")
        }
    };
    bail!(blind("its forward pass", &seen))
}

/// The log-probs that a forward pass gives. It is sent twice under one number: both must be the same future where repeats are known.
fn passed(tinker: &mut Tinker, question: &Question) -> Result<usize> {
    let inputs = question.ids.len() - 1;
    let mut targets = question.ids[1..].to_vec();
    if let Some(Picture { range, .. }) = &question.picture {
        targets[range.start - 1..range.end - 1].fill(0);
    }
    let loss_fn_inputs =
        BTreeMap::from([("target_tokens", Tensor::ids(targets)), ("weights", Tensor::numbers(vec![0.0; inputs]))]);
    let model_input = question.chunks(inputs, 128)?;
    let input = ForwardBackwardInput { data: vec![Datum { model_input, loss_fn_inputs }], loss_fn: "cross_entropy" };
    let model = tinker.model.as_mut().context("there is no model at the server")?;
    let (id, number) = (model.id.clone(), model.number());
    let body = tinker.pass_body(&id, number, &input, false)?;
    let explain = |tinker: &Tinker, failure| tinker.client.explain(failure, "asking for log-probs");
    let first = tinker.client.submit("forward", &body, Repeat::Always).map_err(|failure| explain(tinker, failure))?;
    tinker.knows_repeats = tinker.client.submit("forward", &body, Repeat::Always).is_ok_and(|second| second == first);
    let reply = tinker.client.retrieve_numbers(&first).map_err(|failure| explain(tinker, failure))?;
    Ok(super::passes::passed(&reply)?.logprobs.first().map_or(0, Vec::len))
}

/// What is said of a picture: enough tokens for one among them that is not certain whatever is shown.
const SAID: usize = 16;

const UNTOLD: &str = "the server told no log-probs, and nothing can be trained without them";

/// Two pictures that nobody can take for each other: a sampler that sees is not equally sure of all that it says.
fn sample(tinker: &Tinker, question: &Question) -> Result<()> {
    let ask = |grey: u8| -> Result<Sampled> {
        let params = SamplingParams {
            max_tokens: SAID,
            seed: 0,
            stop: tinker.stops.clone(),
            temperature: 0.0,
            top_k: -1,
            top_p: 1.0,
        };
        tinker.ask_for_samples(question.chunks(question.ids.len(), grey)?, 1, params, true)
    };
    let black = ask(0)?;
    if question.picture.is_none() {
        ensure!(black.sequences.iter().all(|said| said.logprobs.is_some()), UNTOLD);
        return Ok(());
    }
    // Where the log-probs of the prompt are told, they can be counted.
    if let Some(told) = &black.prompt_logprobs {
        let expected = question.ids.len();
        ensure!(
            told.len() == expected,
            blind("its sampler", &format!("a prompt of {expected} tokens has {} there", told.len()))
        );
    }
    let white = ask(255)?;
    let said = |sampled: Sampled| -> Option<(Vec<u32>, Vec<f32>)> {
        let sequence = sampled.sequences.into_iter().next()?;
        Some((sequence.tokens, sequence.logprobs?))
    };
    let (Some(of_black), Some(of_white)) = (said(black), said(white)) else {
        bail!(UNTOLD);
    };
    let seen = "a black and a white picture are answered alike, with the same certainty to the last bit";
    ensure!(of_black != of_white, blind("its sampler", seen));
    Ok(())
}

/// Why a server is refused.
fn blind(part: &str, seen: &str) -> BadConfig {
    BadConfig(format!(
        "the server drops pictures in {part}: {seen}. It would train a policy that sees nothing; take a server that supports pictures in \
         sampling and in training (SkyRL: an FSDP backend with colocated inference)"
    ))
}
