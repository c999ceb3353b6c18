//! The SFT loop: written dialogues instead of played ones, the same streams, packing and gradient.
//!
//! Trained are the assistant's tokens, the end of turn included. The loss is the mean over the trained tokens of the whole
//! step, so splitting a step into micro-batches changes nothing.

mod learner;
mod plan;
mod source;
mod stream;

use std::path::Path;

use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::learner::Learner;
pub use self::plan::{DataOptions, Loss, Plan, TrainOptions};
pub use self::source::Example;
use self::source::{Batch, Source};
pub use self::stream::{stream_of, stream_of_dialogue};
use crate::config;
use crate::data::Order;
use crate::engine::{Frontend, Training};
use crate::image::{BadPicture, Processor};
use crate::need::{self, Need};
use crate::progress::{self, Progress};
use crate::run::{Interrupt, Interrupted, Invocation, Kind, Metrics, RunFolder, Start, Stopwatch, peak_rss};

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    /// Next dialogue of the generator, or the order of the file's rows.
    next: u64,
    order: Option<Order>,
}

/// `foveate sft CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load_for("sft", &invocation.config, &invocation.overrides)?;
    plan.check()?;
    if invocation.dry_run {
        let source = Source::open(&plan, &Processor::load(&plan.model.path)?)?;
        invocation.show(&plan)?;
        if let Some(rows) = source.rows() {
            eprintln!("{rows} dialogues in {}", plan.data.train.as_deref().unwrap_or(Path::new("")).display());
        }
        eprintln!("{} dialogues a step, {} in all", plan.train.batch, plan.train.batch as u64 * plan.train.steps);
        return Ok(());
    }
    let last = train(&plan, invocation.start, &Interrupt::install()?)?;
    if invocation.json {
        println!("{}", json!({"run": plan.train.out, "metrics": last}));
    } else {
        println!("{}", plan.train.out.display());
    }
    Ok(())
}

pub fn train(plan: &Plan, start: Start, interrupt: &Interrupt) -> Result<Metrics> {
    plan.check()?;
    let frontend = Frontend::load(&plan.model.path, 0)?;
    let source = Source::open(plan, &frontend.processor)?;
    if plan.engine.has_own_kernels() {
        need::of_sft(plan, &longest_examples(plan, &source, &frontend)?, source.different())?
            .ensure_fits(&plan.model)?;
    }
    let training = Training {
        optim: plan.optim.clone(),
        temperature: 1.0,
        all_ids: true,
        reference: false,
        pictures: source.different() > 0,
        seed: plan.train.seed,
    };
    let mut learner = Learner::open(plan, &training, &source, start)?;
    // Its pictures are those that the tower is going to ask for.
    let frontend = learner.engine().frontend();
    let mut state = State { next: 0, order: source.rows().map(|rows| Order::new(rows, plan.train.seed)).transpose()? };
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let written_plan = config::to_toml(plan)?;
    let (folder, checkpoint) = RunFolder::open(&plan.train.out, Kind::Sft, start, &written_plan)?;
    let mut done = 0;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.leaves_steps(plan.train.steps)?;
        checkpoint.load(|folder| learner.load(folder))?;
        let saved: State = checkpoint.state()?;
        // The same file must have the same rows, or an index would name another dialogue, or none.
        let order = match (saved.order, source.rows()) {
            (Some(order), Some(rows)) => Some(order.resume(rows)?),
            (order, _) => order,
        };
        state = State { order, ..saved };
        done = checkpoint.step;
        progress::say(&format!("resuming after step {done}"));
    }
    folder.begin(&written_plan, checkpoint.map(|c| c.step))?;
    let mut log = folder.metrics_log()?;
    if plan.train.tensorboard {
        log = log.with_events()?;
    }
    let bar = Progress::start("fine-tuning", "step", done, plan.train.steps);
    let saves = |error: &anyhow::Error| plan.engine.trains_here() || error.is::<BadPicture>();
    let rescue = |learner: &mut Learner, done, state: &State, error| match saves(&error) {
        true => folder.rescue(done, plan.train.keep_checkpoints, state, |to| learner.save(to), error),
        // A server that went away is not asked to save.
        false => error,
    };
    let mut last = Metrics::new();
    for step in done + 1..=plan.train.steps {
        let mut watch = Stopwatch::start();
        let mut metrics = Metrics::new();
        let before_step = state.clone();
        let drawn = watch.time("data", || source.batch(plan, &frontend, &mut state, step));
        let started = std::time::Instant::now();
        let learnt = drawn.and_then(|Batch { examples, left_out }| {
            metrics.insert("data/left_out".into(), json!(left_out));
            learner.update(&examples, step, plan, &mut metrics)
        });
        if let Err(error) = learnt {
            return Err(rescue(&mut learner, step - 1, &before_step, error));
        }
        watch.add("update", started.elapsed());
        watch.write(&mut metrics);
        metrics.insert("perf/max_memory_gb".into(), json!(peak_rss() as f64 / 1e9));
        if let Err(error) = log.append(step, &metrics) {
            return Err(rescue(&mut learner, step, &state, error));
        }
        let number = |key: &str| metrics.get(key).and_then(|v| v.as_f64()).unwrap_or(f64::NAN);
        bar.step(format!("loss {:.3} · likely tokens {:.2}", number("loss"), number("tokens/likely")));
        last = metrics;
        let asked = interrupt.asked();
        let due = plan.train.checkpoint_every > 0 && step % plan.train.checkpoint_every == 0;
        if asked || due || step == plan.train.steps {
            folder.checkpoint(step, plan.train.keep_checkpoints, &state, |to| learner.save(to))?;
        }
        if asked {
            return Err(Interrupted::after(step, &plan.train.out).into());
        }
    }
    bar.finish();
    Ok(last)
}

/// What a run of this plan will hold in memory.
pub fn need(plan: &Plan) -> Result<Need> {
    let frontend = Frontend::load(&plan.model.path, 0)?;
    let source = Source::open(plan, &frontend.processor)?;
    need::of_sft(plan, &longest_examples(plan, &source, &frontend)?, source.different())
}

/// The longest dialogues that a step may have, to reckon with; drawn ones as the last step has them, for a curriculum begins with its smallest.
fn longest_examples(plan: &Plan, source: &Source, frontend: &Frontend) -> Result<Vec<Example>> {
    let (rows, count) = match source.rows() {
        None => (plan.train.batch, plan.train.batch),
        Some(rows) => (rows, rows.min(need::LOOKED_AT)),
    };
    let indices = (0..count).into_par_iter().map(|i| (i * rows / count.max(1)) as u64);
    let mut read: Vec<Result<Example>> = indices.map(|i| source.example(frontend, i, plan.train.steps)).collect();
    if plan.data.leave_out_bad && read.iter().any(Result::is_ok) {
        read.retain(Result::is_ok);
    }
    let mut examples: Vec<Example> = read.into_iter().collect::<Result<_>>()?;
    examples.retain(|e| e.stream.len() <= plan.data.max_tokens);
    examples.sort_by_key(|e| std::cmp::Reverse(e.stream.len()));
    examples.truncate(plan.train.batch);
    Ok(examples)
}
