//! A step on rows with pictures. Prints the fields of the Python yardstick, which does the same work from the same rows. Lengths and
//! boxes are fixed, so the work does not depend on what a random model writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{DtypeName, median, round};
use crate::chat::{Message, Part};
use crate::config::BadConfig;
use crate::engine::embedded::memory;
use crate::engine::{self, Frontend, Group, ModelOptions, Prompt, Sampling, Trainer, Training, Weights, Who};
use crate::episode::Stream;
use crate::geometry::{BBox, Budget, View};
use crate::model::{Config, Layout, Trainable, lora};
use crate::need::{Need, PROGRAM};
use crate::objective::{Advantage, Objective, Sequence};
use crate::optim::Optim;
use crate::run::peak_rss;

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

#[derive(Deserialize)]
struct Row {
    image: PathBuf,
    question: String,
    boxes: Vec<BBox>,
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
pub(super) struct Rig {
    engine: Box<dyn Trainer>,
    frontend: Frontend,
    config: Config,
    layout: Arc<Layout>,
    trainable: Trainable,
    options: ModelOptions,
    training: Training,
    rows: Vec<Row>,
    budget: Budget,
    crop_budget: Budget,
    lengths: [usize; 2],
}

impl Rig {
    pub(super) fn open(step: &Step) -> Result<Rig> {
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
        let options = ModelOptions {
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
            ..ModelOptions::default()
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

    pub(super) fn step(mut self, step: &Step) -> Result<Value> {
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

    pub(super) fn sft(mut self, step: &Step) -> Result<Value> {
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

    pub(super) fn decode(mut self, step: &Step) -> Result<Value> {
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
