//! A plain decoder of random weights, without pictures and with nothing to share: how fast the bare products are, beside PyTorch's.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::{Value, json};

use foveate_kernels::sample;

use super::{DtypeName, median, round};
use crate::batch;
use crate::engine::Group;
use crate::episode::Stream;
use crate::model::block::Keep;
use crate::model::generate::{Cache, Extension, SequenceId};
use crate::model::{Gradients, Head, Slopes, Trainable, Vlm, presets};
use crate::optim::{AdamW, Optim, Trained};
use crate::run::peak_rss;

/// A decoder of random weights.
#[derive(Args)]
pub struct Decoder {
    #[arg(long, default_value_t = 8)]
    layers: usize,
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 4)]
    kv_heads: usize,
    #[arg(long, default_value_t = 768)]
    mlp: usize,
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// Sequences
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 3)]
    steps: usize,
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// What products with the weights are computed in
    #[arg(long, value_enum, default_value = "float32")]
    dtype: DtypeName,
}

#[derive(Args)]
pub struct Train {
    #[command(flatten)]
    decoder: Decoder,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 512)]
    tokens: usize,
}

#[derive(Args)]
pub struct Speak {
    #[command(flatten)]
    decoder: Decoder,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    #[arg(long, default_value_t = 64)]
    new_tokens: usize,
}

impl Decoder {
    fn model(&self) -> Result<Vlm> {
        ensure!(
            self.heads > 0 && self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "--heads {}: expected a multiple of --kv-heads {}",
            self.heads,
            self.kv_heads
        );
        ensure!(
            self.hidden.is_multiple_of(self.heads * 4) && self.vocab > 16 && self.layers > 0 && self.batch > 0,
            "--hidden {}: expected a multiple of 4 × --heads {}; --vocab above 16, --layers and --batch above 0",
            self.hidden,
            self.heads
        );
        let mut config = presets::nano(self.vocab);
        let half = self.hidden / self.heads / 2;
        let text = &mut config.text;
        (text.layers, text.hidden, text.heads, text.kv_heads) = (self.layers, self.hidden, self.heads, self.kv_heads);
        (text.mlp, text.sections) =
            (self.mlp, [half / 4, (half - half / 4) / 2, half - half / 4 - (half - half / 4) / 2]);
        config.vision.out_hidden = self.hidden;
        Ok(Vlm { compute: self.dtype.compute(), ..presets::initialise(config, 1) })
    }

    fn ids(&self, rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
        // The last ids are special.
        (0..n).map(|_| rng.random_range(0..self.vocab as u32 - 16)).collect()
    }
}

impl Train {
    pub(super) fn run(self) -> Result<Value> {
        let Train { decoder, tokens } = self;
        ensure!(tokens > 1, "--tokens {tokens}: expected at least 2");
        let mut model = decoder.model()?;
        // Only what such a decoder has is trained.
        let train = Trainable { vision: false, merger: false, ..Trainable::ALL };
        let layout = model.weights.layout().clone();
        let trained = Trained::of(&layout, train);
        let params: usize = trained.iter().map(|t| t.range.len()).sum();
        let mut optimizer = AdamW::new(trained)?;
        let mut gradients = Gradients::zeros(&layout);
        let optim = Optim { lr: 1e-6, weight_decay: 0.01, ..Optim::default() };
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        // As if all but the first token of each had been sampled.
        let mut streams = vec![Stream::default(); decoder.batch];
        for stream in &mut streams {
            stream.push_sampled(&decoder.ids(&mut rng, tokens), &vec![0.0; tokens]);
        }
        let groups: Vec<Group> = streams.iter().map(Stream::alone).collect();
        let packed = batch::pack(&model.config, &groups)?.packed;
        let slopes = vec![-1.0 / packed.targets.len() as f32; packed.targets.len()];
        let mut times = Vec::new();
        let mut loss = 0.0;
        for step in 0..decoder.warmup + decoder.steps {
            let started = Instant::now();
            let out = model.evaluate(&packed, Head::PLAIN, Keep::Everything, train)?;
            loss = -out.logprobs.iter().map(|l| f64::from(*l)).sum::<f64>() / slopes.len() as f64;
            let tape = out.tape.context("the forward pass kept nothing for the backward pass")?;
            model.backward(&packed, tape, &Slopes::of(&slopes), train, &mut gradients)?;
            optimizer.step(&mut model.weights.arena_mut()?.data, &gradients.data, &optim, optim.lr)?;
            gradients.data.fill(0.0);
            if step >= decoder.warmup {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        let seconds = median(times);
        Ok(json!({
            "impl": "foveate", "dtype": decoder.dtype.name(), "threads": rayon::current_num_threads(), "params": params,
            "batch": decoder.batch, "tokens": tokens, "loss": loss, "seconds": round(seconds),
            "tokens_per_second": round((decoder.batch * tokens) as f64 / seconds), "peak_rss_mib": peak_rss() >> 20,
        }))
    }
}

impl Speak {
    pub(super) fn run(self) -> Result<Value> {
        let Speak { decoder, prompt, new_tokens } = self;
        ensure!(prompt > 0 && new_tokens > 0, "--prompt and --new-tokens: expected at least 1");
        let model = decoder.model()?;
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let prompts: Vec<Vec<u32>> = (0..decoder.batch).map(|_| decoder.ids(&mut rng, prompt)).collect();
        let mut times = Vec::new();
        for step in 0..decoder.warmup + decoder.steps {
            let started = Instant::now();
            let first = Cache::new(&model);
            let at_once = prompts.len().div_ceil(model.lanes(prompts.len()));
            prompts.par_chunks(at_once).try_for_each(|prompts| speak(&model, first.beside(), prompts, new_tokens))?;
            if step >= decoder.warmup {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        let seconds = median(times);
        Ok(json!({
            "impl": "foveate", "dtype": decoder.dtype.name(), "threads": rayon::current_num_threads(),
            "batch": decoder.batch, "prompt": prompt, "new_tokens": new_tokens, "seconds": round(seconds),
            "new_tokens_per_second": round((decoder.batch * new_tokens) as f64 / seconds), "peak_rss_mib": peak_rss() >> 20,
        }))
    }
}

/// Continues prompts of equal length by so many tokens each.
fn speak(model: &Vlm, mut cache: Cache, prompts: &[Vec<u32>], new_tokens: usize) -> Result<()> {
    let v = model.config.text.vocab;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let prompt = prompts.first().map_or(0, Vec::len);
    let ids = prompts.iter().map(|_| cache.add_sequence(None, prompt + new_tokens));
    let sequences: Vec<SequenceId> = ids.collect::<Result<_>>()?;
    let mut said: Vec<Vec<u32>> = prompts.to_vec();
    let mut position: Vec<i32> = (0..prompt as i32).collect();
    for n in 0..new_tokens {
        let from = if n == 0 { 0 } else { prompt + n - 1 };
        let extensions: Vec<Extension> = sequences
            .iter()
            .zip(&said)
            .map(|(sequence, ids)| Extension {
                sequence: *sequence,
                ids: &ids[from..],
                positions: [&position; 3],
                features: &[],
            })
            .collect();
        let hidden = model.extend(&mut cache, &extensions)?;
        let mut logits = model.next_logits(&cache, &hidden, &[]);
        for (row, ids) in logits.chunks_exact_mut(v).zip(&mut said) {
            ids.push(sample::categorical(row, 1.0, rng.random()).0);
        }
        position = vec![(prompt + n) as i32];
    }
    Ok(())
}
