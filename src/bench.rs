//! `foveate bench`: the standard workloads, measured. One JSON object on stdout; `step` prints the fields of the Python
//! yardstick, which does the same amount of work from the same rows. Lengths and boxes are fixed, so the work does not
//! depend on what a random model writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand, ValueEnum};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::model::Compute;
use foveate_kernels::sample;

use crate::batch;
use crate::chat::{Message, Part};
use crate::config::BadConfig;
use crate::engine::embedded::{Options, memory};
use crate::engine::{self, Frontend, Group, Prompt, Sampling, Trainer, Training, Weights, Who};
use crate::episode::Stream;
use crate::geometry::{BBox, Budget, View};
use crate::image::bench_image;
use crate::model::block::Keep;
use crate::model::generate::{Cache, Extension, SequenceId};
use crate::model::{Config, Gradients, Head, Layout, Slopes, Trainable, Vlm, lora, presets};
use crate::need::{Need, PROGRAM};
use crate::objective::{Advantage, Objective, Sequence};
use crate::optim::{AdamW, Optim, Trained};
use crate::run::peak_rss;

#[derive(Subcommand)]
pub enum Workload {
    /// One MGPO step: two sampled turns, reference, update
    Step(Step),
    /// One SFT step: forward, backward and update of written two-turn conversations
    Sft(Step),
    /// Tokens per second of sampling
    Decode(Step),
    /// Training steps of a plain decoder with random weights: no picture, nothing shared
    Train(Train),
    /// Sampling after short prompts of words with a decoder of random weights
    Speak(Speak),
    /// Decode, crop, resize and cut a picture into patches
    Image {
        picture: PathBuf,
        #[arg(long, default_value_t = 1_003_520)]
        max_pixels: u64,
        #[arg(long, default_value_t = 200_704)]
        min_pixels: u64,
    },
}

#[derive(Args)]
pub struct Step {
    #[arg(long)]
    model: PathBuf,
    /// JSONL of {"image", "question", "boxes": [[x1,y1,x2,y2], ...]}
    #[arg(long)]
    rows: PathBuf,
    #[arg(long, default_value_t = 4)]
    prompts: usize,
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Tokens of the two turns
    #[arg(long, default_value = "32,16")]
    new_tokens: String,
    #[arg(long, default_value_t = 3)]
    steps: usize,
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    #[arg(long, default_value_t = 0.01)]
    kl: f64,
    #[arg(long)]
    max_pixels: Option<u64>,
    #[arg(long)]
    min_pixels: Option<u64>,
    /// Budget of the second turn's views, where it is another
    #[arg(long)]
    crop_max_pixels: Option<u64>,
    /// Rows (tokens) of one forward and backward pass
    #[arg(long, default_value_t = 8192)]
    micro_batch_tokens: usize,
    #[arg(long)]
    recompute: bool,
    /// What products with the weights are computed in
    #[arg(long, value_enum, default_value = "float32")]
    dtype: DtypeName,
    /// Train adapters of this rank instead of the model's own weights
    #[arg(long)]
    lora_rank: Option<usize>,
    /// Leave the vision tower as it is
    #[arg(long)]
    freeze_vision: bool,
    /// Compute with LibTorch on this device (cpu, cuda, cuda:N) instead of the embedded engine
    #[arg(long)]
    device: Option<String>,
}

impl Step {
    fn name(&self) -> String {
        match &self.device {
            Some(device) => format!("foveate on LibTorch, {device}"),
            None => "foveate".into(),
        }
    }
}

/// As the peer names them.
#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    Float32,
    Bfloat16,
}

impl DtypeName {
    fn compute(self) -> Compute {
        match self {
            DtypeName::Float32 => Compute::F32,
            DtypeName::Bfloat16 => Compute::Bf16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            DtypeName::Float32 => "float32",
            DtypeName::Bfloat16 => "bfloat16",
        }
    }
}

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

#[derive(Deserialize)]
struct Row {
    image: PathBuf,
    question: String,
    boxes: Vec<BBox>,
}

impl Workload {
    pub fn run(self) -> Result<()> {
        let out = match self {
            Workload::Step(step) => Rig::open(&step)?.step(&step)?,
            Workload::Sft(step) => Rig::open(&step)?.sft(&step)?,
            Workload::Decode(step) => Rig::open(&step)?.decode(&step)?,
            Workload::Train(train) => train.run()?,
            Workload::Speak(speak) => speak.run()?,
            Workload::Image { picture, max_pixels, min_pixels } => {
                bench_image(&picture, Budget::new(min_pixels, max_pixels, 28))?
            }
        };
        println!("{out}");
        Ok(())
    }
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
    fn run(self) -> Result<Value> {
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
    fn run(self) -> Result<Value> {
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

fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading the rows: {}", path.display()))?;
    let base = path.parent().unwrap_or(Path::new("."));
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let mut row: Row =
            serde_json::from_str(line).with_context(|| format!("row {} of {}", i + 1, path.display()))?;
        ensure!(
            !row.boxes.is_empty(),
            "row {} of {}: \"boxes\" is empty, expected at least one",
            i + 1,
            path.display()
        );
        row.image = base.join(&row.image);
        rows.push(row);
    }
    ensure!(!rows.is_empty(), "there are no rows in {}", path.display());
    Ok(rows)
}

/// A model, its rows and its fixed lengths.
struct Rig {
    engine: Box<dyn Trainer>,
    frontend: Frontend,
    config: Config,
    layout: Arc<Layout>,
    trainable: Trainable,
    options: Options,
    training: Training,
    rows: Vec<Row>,
    budget: Budget,
    crop_budget: Budget,
    lengths: [usize; 2],
}

impl Rig {
    fn open(step: &Step) -> Result<Rig> {
        let lengths = step
            .new_tokens
            .split_once(',')
            .and_then(|(a, b)| Some([a.trim().parse().ok()?, b.trim().parse().ok()?]))
            .filter(|l: &[usize; 2]| l.iter().all(|n| *n > 0));
        let Some(lengths) = lengths else {
            return Err(BadConfig(format!(
                "--new-tokens {}: expected two numbers, for instance 32,16",
                step.new_tokens
            ))
            .into());
        };
        let options = Options {
            path: step.model.clone(),
            micro_batch_tokens: step.micro_batch_tokens,
            recompute: step.recompute,
            compute: step.dtype.compute(),
            lora: step.lora_rank.map(|rank| lora::Options {
                rank,
                alpha: 2.0 * rank as f32,
                ..lora::Options::default()
            }),
            freeze: if step.freeze_vision { vec!["vision".into(), "merger".into()] } else { Vec::new() },
            ..Options::default()
        };
        let training = Training {
            optim: Optim { lr: 1e-6, weight_decay: 0.01, ..Optim::default() },
            temperature: 1.0,
            all_ids: false,
            reference: step.kl > 0.0,
            pictures: true,
            seed: 0,
        };
        let kind = engine::Options::on_device(step.device.as_deref());
        let engine = engine::open(&kind, &options, &training, false)?;
        let (config, frontend) = (Config::load(&step.model)?, engine.frontend());
        let (layout, trainable) = options.learns(Layout::new(&config))?;
        let own = frontend.processor.budget;
        let budget = Budget::new(
            step.min_pixels.unwrap_or(own.min_pixels),
            step.max_pixels.unwrap_or(own.max_pixels),
            own.factor,
        );
        let crop_budget = match step.crop_max_pixels {
            Some(max) => Budget::new(budget.min_pixels.min(max), max, own.factor),
            None => budget,
        };
        let rows = read_rows(&step.rows)?;
        Ok(Rig { engine, frontend, config, layout, trainable, options, training, rows, budget, crop_budget, lengths })
    }

    fn view(&self, row: &Row, region: Option<BBox>) -> Result<View> {
        let size = self.frontend.pictures.get(&row.image)?.size();
        match region {
            None => View::whole(0, size, self.budget),
            Some(region) => View { image: 0, region: size.bounds(), size }.crop(region, size, self.crop_budget),
        }
    }

    /// The first turn's prompt.
    fn open_turn(&self, row: &Row) -> Result<Stream> {
        let mut stream = Stream::default();
        let view = self.view(row, None)?;
        let grid = self.frontend.processor.grid(view.size);
        let ask = format!(
            "Question: {} Output the coordinates of the key image area relevant to the problem in JSON format.",
            row.question
        );
        let message = Message::user(vec![Part::image(), Part::text(ask)]);
        let merge = self.frontend.processor.merge;
        let encoded = self.frontend.chat.encode(&[message], true, &[grid.tokens(merge)])?;
        let pad = self.frontend.chat.special.image_pad;
        stream.push_context(&encoded.ids, vec![(Arc::from(row.image.as_path()), view, grid)], pad, merge)?;
        Ok(stream)
    }

    /// The second turn's message with the crop of box `i`.
    fn next_turn(&self, stream: &mut Stream, row: &Row, i: usize) -> Result<()> {
        let view = self.view(row, Some(row.boxes[i % row.boxes.len()]))?;
        let grid = self.frontend.processor.grid(view.size);
        let merge = self.frontend.processor.merge;
        let answer = format!("\nQuestion: {} Put the final answer in \\boxed{{}}.", row.question);
        let message = Message::user(vec![Part::text("The enlarged region:\n"), Part::image(), Part::text(answer)]);
        let ids = self.frontend.chat.continuation(1, &message, &[grid.tokens(merge)], stream.ids.last().copied())?.ids;
        let pad = self.frontend.chat.special.image_pad;
        stream.push_context(&ids, vec![(Arc::from(row.image.as_path()), view, grid)], pad, merge)
    }

    fn sampling(&self, turn: usize) -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            max_new_tokens: self.lengths[turn],
            stop: Vec::new(),
            ignore_end: true,
        }
    }

    /// Both sampled turns of some rows: [prompt][member], and the seconds of each turn.
    fn play(&mut self, chosen: &[usize], group: usize, seed: u64) -> Result<(Vec<Vec<Stream>>, [f64; 2])> {
        let started = Instant::now();
        let prompts: Vec<Stream> = chosen.iter().map(|&r| self.open_turn(&self.rows[r])).collect::<Result<_>>()?;
        let seeds: Vec<Vec<u64>> =
            (0..prompts.len()).map(|p| (0..group).map(|m| seed ^ (p * 1000 + m) as u64).collect()).collect();
        let asked: Vec<Prompt> = prompts
            .iter()
            .zip(&seeds)
            .enumerate()
            .map(|(p, (stream, seeds))| Prompt { session: (p * group) as u64, stream, seeds })
            .collect();
        let sampling = self.sampling(0);
        let said = self.engine.sample(&asked, &sampling)?;
        let mut streams: Vec<Vec<Stream>> = Vec::new();
        for (prompt, completions) in prompts.iter().zip(said) {
            let members = completions.into_iter().map(|c| {
                let mut stream = prompt.clone();
                stream.push_sampled(&c.ids, &c.logprobs);
                stream
            });
            streams.push(members.collect());
        }
        let first = started.elapsed().as_secs_f64();

        let started = Instant::now();
        for (members, &r) in streams.iter_mut().zip(chosen) {
            for (i, stream) in members.iter_mut().enumerate() {
                self.next_turn(stream, &self.rows[r], i)?;
            }
        }
        let asked: Vec<Prompt> = streams
            .iter()
            .flatten()
            .zip(seeds.iter().flatten())
            .enumerate()
            .map(|(s, (stream, seed))| Prompt { session: s as u64, stream, seeds: std::slice::from_ref(seed) })
            .collect();
        let sampling = self.sampling(1);
        let said = self.engine.sample(&asked, &sampling)?;
        for (stream, completion) in streams.iter_mut().flatten().zip(said.into_iter().flatten()) {
            stream.push_sampled(&completion.ids, &completion.logprobs);
        }
        self.engine.end_step();
        Ok((streams, [first, started.elapsed().as_secs_f64()]))
    }

    fn chosen(&self, step: &Step, k: usize) -> Vec<usize> {
        (0..step.prompts).map(|j| (k * step.prompts + j) % self.rows.len()).collect()
    }

    fn step(mut self, step: &Step) -> Result<Value> {
        let objective = Objective { kl_coef: step.kl, ..Objective::default() };
        let mut times: Vec<[f64; 4]> = Vec::new();
        let mut length = 0.0;
        let mut predicted = 0;
        for k in 0..step.warmup + step.steps {
            let chosen = self.chosen(step, k);
            let (streams, [turn1, turn2]) = self.play(&chosen, step.group, k as u64)?;
            let groups: Vec<Group> = streams.iter().map(|g| g.iter().collect()).collect();
            let n = step.prompts * step.group;
            length = streams.iter().flatten().map(|s| s.len() as f64).sum::<f64>() / n as f64;
            let learns = memory::Learns { reference: self.training.reference, steps: 1 };
            let Rig { config, layout, options, trainable, .. } = &self;
            let held = memory::of_step(config, layout, options, *trainable, Some(learns), &groups, self.lengths[0]);
            predicted = Need { held, pictures: self.frontend.pictures.stats().bytes, program: PROGRAM, mapped: false }
                .total()
                .max(predicted);
            let started = Instant::now();
            let reference = match objective.needs_reference() {
                true => Some(self.engine.logprobs(&groups, Who::Reference)?),
                false => None,
            };
            let in_reference = started.elapsed().as_secs_f64();

            let started = Instant::now();
            let mut rng = ChaCha8Rng::seed_from_u64(k as u64);
            let advantages: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
            let totals = objective.totals(groups.iter().flatten().map(|s| (0, s.sampled_count(), false)));
            self.engine.accumulate(&groups, &mut |g, m, scores| {
                let sequence = Sequence {
                    group: 0,
                    advantage: Advantage::One(advantages[g * step.group + m]),
                    masked: false,
                    new: &scores.logprobs,
                    old: &scores.logprobs,
                    sampler: None,
                    reference: reference.as_ref().map(|r| r[g][m].logprobs.as_slice()),
                    entropy: None,
                };
                let mut out = objective.evaluate(&[sequence], &totals)?;
                Ok(Weights { logprobs: out.gradient.pop().unwrap_or_default(), entropies: None })
            })?;
            let rate = self.training.optim.lr;
            self.engine.step(rate)?;
            if k >= step.warmup {
                times.push([turn1, turn2, in_reference, started.elapsed().as_secs_f64()]);
            }
        }
        let part = |i: usize| round(median(times.iter().map(|t| t[i]).collect()));
        let total = round(median(times.iter().map(|t| t.iter().sum()).collect()));
        Ok(json!({
            "impl": step.name(), "dtype": step.dtype.name(), "threads": rayon::current_num_threads(),
            "prompts": step.prompts, "group": step.group, "new_tokens": self.lengths,
            "mean_sequence_tokens": length as u64, "params": self.layout.len,
            "seconds": {"turn1": part(0), "turn2": part(1), "ref": part(2), "update": part(3), "total": total},
            "samples_per_second": round((step.prompts * step.group) as f64 / total),
            "peak_rss_mib": peak_rss() >> 20, "predicted_mib": step.device.is_none().then_some(predicted >> 20),
        }))
    }

    fn sft(mut self, step: &Step) -> Result<Value> {
        let mut times = Vec::new();
        let mut tokens = 0;
        for k in 0..step.warmup + step.steps {
            let chosen = self.chosen(step, k);
            let (streams, _) = self.play(&chosen, step.group, k as u64)?;
            // Every conversation for itself, as in fine-tuning: no prompt is shared.
            let groups: Vec<Group> = streams.iter().flatten().map(|s| s.alone()).collect();
            tokens = groups.iter().flatten().map(|s| s.len()).sum();
            let trained: usize = groups.iter().flatten().map(|s| s.sampled_count()).sum();
            let started = Instant::now();
            self.engine.accumulate(&groups, &mut |_, _, scores| {
                Ok(Weights { logprobs: vec![-1.0 / trained as f32; scores.logprobs.len()], entropies: None })
            })?;
            let rate = self.training.optim.lr;
            self.engine.step(rate)?;
            if k >= step.warmup {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        let seconds = median(times);
        Ok(json!({
            "impl": step.name(), "dtype": step.dtype.name(), "threads": rayon::current_num_threads(),
            "conversations": step.prompts * step.group, "tokens": tokens, "params": self.layout.len,
            "seconds": round(seconds), "tokens_per_second": round(tokens as f64 / seconds), "peak_rss_mib": peak_rss() >> 20,
        }))
    }

    fn decode(mut self, step: &Step) -> Result<Value> {
        let mut times = Vec::new();
        for k in 0..step.warmup + step.steps {
            let chosen = self.chosen(step, k);
            let (_, seconds) = self.play(&chosen, step.group, k as u64)?;
            if k >= step.warmup {
                times.push(seconds);
            }
        }
        let turn = |i: usize| median(times.iter().map(|t| t[i]).collect());
        let n = (step.prompts * step.group) as f64;
        Ok(json!({
            "impl": step.name(), "dtype": step.dtype.name(), "threads": rayon::current_num_threads(),
            "prompts": step.prompts, "group": step.group, "new_tokens": self.lengths,
            "seconds": {"turn1": round(turn(0)), "turn2": round(turn(1))},
            "new_tokens_per_second": {
                "turn1": round(n * self.lengths[0] as f64 / turn(0)),
                "turn2": round(n * self.lengths[1] as f64 / turn(1)),
            },
            "peak_rss_mib": peak_rss() >> 20,
        }))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 1e4).round() / 1e4
}
