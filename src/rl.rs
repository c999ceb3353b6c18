//! The RL loop. Read this first: a step is play, compare, learn, write down.
//!
//! ```text
//! samples -> rollout::play -> episodes -> advantages -> (log-probs, loss, gradient) per micro-batch -> one update
//! ```
//!
//! Every random number comes from (seed, step, group, member, turn), so a resumed run goes on bit for bit as the
//! uninterrupted one would have.

mod metrics;
mod plan;
mod play_only;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use plan::{DataOptions, EvalOptions, Plan, TrainOptions};
pub use play_only::main as rollout_main;

use crate::config;
use crate::data::{self, Order, ReadAs, Sample};
use crate::engine::{self, Frontend, Group, Sampler, Scores, Trainer, Training, Weights, Who};
use crate::episode::{Episode, Record, Stop, Update};
use crate::eval;
use crate::image::{BadPicture, Processor};
use crate::need;
use crate::objective::{Advantages, Correction, Objective, Outcome, Sequence, Tally};
use crate::progress::{self, Progress};
use crate::rollout::{self, Stage};
use crate::run::{Interrupt, Interrupted, Invocation, Kind, Metrics, RunFolder, Start, Stopwatch, peak_rss};
use crate::tasks::{Task, check_rows, ensure_possible};
use metrics::{count, largest_ratio_gap};

/// What the loop itself must remember between steps; weights and optimiser are the engine's.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    order: Order,
    /// Groups played so far; numbers them.
    groups: u64,
}

/// `foveate rl CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load_for::<Plan>("rl", &invocation.config, &invocation.overrides)?.resolve()?;
    plan.engine.ensure_trains(&plan.model, plan.rollout.temperature)?;
    if invocation.dry_run {
        let Ready { rows, held_out, .. } = Ready::of(&plan, true)?;
        invocation.show(&plan)?;
        let asked = plan.train.prompts as u64 * plan.train.steps;
        eprintln!(
            "{} rows to train on, {} held out; {} episodes and {} updates a step, {asked} questions in all, each row about {:.1} times",
            rows.len(),
            held_out.len(),
            plan.train.prompts * plan.train.group,
            plan.train.updates,
            asked as f64 / rows.len() as f64
        );
        return Ok(());
    }
    let last = train(&plan, invocation.start, &Interrupt::install()?, &mut |_, _| {})?;
    if invocation.json {
        println!("{}", json!({"run": plan.train.out, "metrics": last}));
    } else {
        println!("{}", plan.train.out.display());
    }
    Ok(())
}

/// What can be read and checked before any weight is.
struct Ready {
    rows: Vec<Sample>,
    held_out: Vec<Sample>,
    task: Box<dyn Task>,
    objective: Objective,
}

impl Ready {
    /// `learns`: it evaluates held-out rows along the way.
    fn of(plan: &Plan, learns: bool) -> Result<Ready> {
        let task = plan.task.task(Processor::load(&plan.model.path)?.budget.factor)?;
        plan.model.check_lora()?;
        let rows = plan.task.read(&plan.data.train, &plan.data.read_as()).context("data.train")?;
        check_rows(&*task, &rows, &plan.data.train)?;
        let mut held_out = Vec::new();
        if let Some(path) = plan.eval.rows.as_ref().filter(|_| learns) {
            held_out = plan.task.read(path, &ReadAs::default()).context("eval.rows")?;
            held_out.truncate(plan.eval.limit.unwrap_or(usize::MAX));
            check_rows(&*task, &held_out, path)?;
            // What is damaged behind its header would end the run at the first evaluation.
            let damaged = data::damaged(&held_out.iter().collect::<Vec<_>>());
            if let Some(row) = held_out.iter().find(|row| row.images.iter().any(|path| damaged.contains_key(path))) {
                let reason = row.images.iter().find_map(|path| damaged.get(path)).map_or("", |reason| reason);
                bail!("{} of {}: {reason}", row.named(), path.display());
            }
        }
        Ok(Ready { rows, held_out, task, objective: plan.objective()? })
    }
}

/// Everything that a step needs beside the engine.
struct Loop<'a> {
    plan: &'a Plan,
    objective: &'a Objective,
    task: &'a dyn Task,
    frontend: &'a Frontend,
}

/// Trains as planned and returns the metrics of the last step. `watch` sees the metrics of each step as it ends.
pub fn train(
    plan: &Plan,
    start: Start,
    interrupt: &Interrupt,
    watch: &mut dyn FnMut(u64, &Metrics),
) -> Result<Metrics> {
    let ready = Ready::of(plan, true)?;
    ensure_possible(&ready.rows, &plan.data.train)?;
    if plan.engine.has_own_kernels() {
        need::of_rl(plan, &*ready.task, &ready.rows, true)?.ensure_fits(&plan.model)?;
    }
    let pictures = data::shows_pictures(ready.rows.iter().chain(&ready.held_out));
    let training = Training { pictures, ..plan.training()? };
    let mut engine = engine::open(&plan.engine, &plan.model, &training, start != Start::New)?;
    train_on(&mut *engine, plan, &ready, start, interrupt, watch)
}

/// The same on an engine of one's own, opened as [`Plan::training`] says.
pub fn train_with(
    engine: &mut dyn Trainer,
    plan: &Plan,
    start: Start,
    interrupt: &Interrupt,
    watch: &mut dyn FnMut(u64, &Metrics),
) -> Result<Metrics> {
    train_on(engine, plan, &Ready::of(plan, true)?, start, interrupt, watch)
}

fn train_on(
    engine: &mut dyn Trainer,
    plan: &Plan,
    ready: &Ready,
    start: Start,
    interrupt: &Interrupt,
    watch: &mut dyn FnMut(u64, &Metrics),
) -> Result<Metrics> {
    let Ready { rows, held_out, task, objective } = ready;
    let frontend = engine.frontend();
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let written_plan = config::to_toml(plan)?;
    let (folder, checkpoint) = RunFolder::open(&plan.train.out, Kind::Rl, start, &written_plan)?;
    let mut state = State { order: Order::new(rows.len(), plan.train.seed)?, groups: 0 };
    let mut done = 0;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.leaves_steps(plan.train.steps)?;
        checkpoint.load(|folder| engine.load(folder))?;
        let saved: State = checkpoint.state()?;
        state = State { order: saved.order.resume(rows.len())?, ..saved };
        done = checkpoint.step;
        progress::say(&format!("resuming after step {done}"));
    }
    folder.begin(&written_plan, checkpoint.map(|c| c.step))?;
    let context = Loop { plan, objective, task: &**task, frontend: &frontend };
    let mut log = folder.metrics_log()?;
    if plan.train.tensorboard {
        log = log.with_events()?;
    }
    let bar = Progress::start("training", "step", done, plan.train.steps);
    let mut last = Metrics::new();
    for step in done + 1..=plan.train.steps {
        let mut watch_time = Stopwatch::start();
        let mut metrics = Metrics::new();
        let before = (state.clone(), engine.updates());
        // A server that went away is not asked to save.
        let rescue =
            |engine: &mut dyn Trainer, done, state: &State, error: anyhow::Error| match plan.engine.trains_here()
                || error.is::<BadPicture>()
            {
                true => folder.rescue(done, plan.train.keep_checkpoints, state, |to| engine.save(to), error),
                false => error,
            };
        let episodes = match context.step(engine, rows, &mut state, step, &mut watch_time, &mut metrics) {
            Ok(episodes) => episodes,
            // Of a step of several updates some may be made.
            Err(error) if engine.updates() != before.1 => return Err(error),
            Err(error) => return Err(rescue(engine, step - 1, &before.0, error)),
        };
        let last_step = step == plan.train.steps;
        let due = |every: u64| every > 0 && (step % every == 0 || last_step);
        let mut written = Ok(());
        if due(plan.eval.every) {
            let played = watch_time.time("eval", || context.evaluate(engine, held_out, &mut metrics));
            written = played.and_then(|played| folder.write_validation(step, &records(&played)));
        }
        watch_time.write(&mut metrics);
        metrics.insert("perf/max_memory_gb".into(), json!(peak_rss() as f64 / 1e9));
        if due(plan.train.episodes_every) {
            written = written.and(folder.write_episodes(step, &records(&episodes)));
        }
        written = written.and(log.append(step, &metrics));
        if let Err(error) = written {
            let error = error
                .context(format!("what belongs to step {step} is not all written, and --resume does not repeat it"));
            return Err(rescue(engine, step, &state, error));
        }
        let number = |key: &str| metrics.get(key).and_then(|v| v.as_f64());
        let found = [("right picture and place", "rewards/joint/mean"), ("target in box", "grounding/contains_target")];
        let found = found.iter().find_map(|(name, key)| Some(format!(" · {name} {:.2}", number(key)?)));
        bar.step(format!("reward {:.3}{}", number("reward/mean").unwrap_or(f64::NAN), found.unwrap_or_default()));
        watch(step, &metrics);
        last = metrics;
        let asked = interrupt.asked();
        if asked || due(plan.train.checkpoint_every) || last_step {
            folder.checkpoint(step, plan.train.keep_checkpoints, &state, |to| engine.save(to))?;
        }
        if asked {
            return Err(Interrupted::after(step, &plan.train.out).into());
        }
    }
    bar.finish();
    Ok(last)
}

impl Loop<'_> {
    /// Whether an episode gets no policy loss.
    fn masked(&self, episode: &Episode) -> bool {
        self.plan.train.mask_truncated && matches!(episode.stop, Stop::Truncated | Stop::OverLong)
    }

    fn step(
        &self,
        engine: &mut dyn Trainer,
        rows: &[Sample],
        state: &mut State,
        step: u64,
        watch: &mut Stopwatch,
        metrics: &mut Metrics,
    ) -> Result<Vec<Episode>> {
        let (mut episodes, teaches) = watch.time("gen", || self.play(engine, rows, state, step, metrics))?;
        let masked: Vec<bool> = episodes.iter().map(|e| self.masked(e)).collect();
        let mut groups = by_group(&episodes);
        if self.plan.train.bands {
            let mean = |group: &Vec<usize>| eval::average(group.iter().map(|&i| episodes[i].reward));
            groups.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        }
        let reference = match self.objective.needs_reference() {
            true => Some(watch.time("ref", || scored(engine, &episodes, &groups, Who::Reference))?),
            false => None,
        };
        let sampled: Vec<Vec<f32>> = episodes.iter().map(sampled_logprobs).collect();
        let rescored = match engine.samples_exactly() {
            true => None,
            false => Some(watch.time("old_log_prob", || scored(engine, &episodes, &groups, Who::Policy))?),
        };
        let old = rescored.as_ref().unwrap_or(&sampled);
        // An exact sampler has nothing to correct, and no mismatch to report.
        let report_sampler = !engine.samples_exactly() || self.objective.correction != Correction::Off;
        let outcomes: Vec<Outcome> = episodes
            .iter()
            .enumerate()
            .map(|(i, e)| Outcome {
                group: e.group,
                reward: e.reward,
                tokens: old[i].len(),
                masked: masked[i],
                old: Some(&old[i]),
                reference: reference.as_ref().map(|r| r[i].as_slice()),
            })
            .collect();
        let mut advantages = self.objective.advantages(&outcomes)?;
        if self.plan.train.weigh_hard {
            advantages.weigh(&difficulty(&episodes, &groups));
        }
        if !teaches {
            advantages.weigh(&vec![0.0; episodes.len()]);
        }
        for (name, value) in advantages.report() {
            metrics.insert(name.into(), json!(value));
        }

        let mut norms = Vec::new();
        let mut seen: Vec<Option<Update>> = vec![None; episodes.len()];
        let mut tally = Tally::default();
        let mut first_ratio = None;
        let mut skipped = 0;
        let update_watch = std::time::Instant::now();
        let updates = self.plan.train.updates.min(groups.len());
        for update in 0..updates {
            let part = &groups[update * groups.len() / updates..(update + 1) * groups.len() / updates];
            let members: Vec<usize> = part.iter().flatten().copied().collect();
            let totals = self.objective.totals(members.iter().map(|&i| (episodes[i].group, old[i].len(), masked[i])));
            if totals.tokens == 0 {
                continue;
            }
            // What gives no gradient needs no pass: a group whose answers are all as good as each other.
            let learns = |group: &&Vec<usize>| {
                self.objective.moves_without_advantage() || group.iter().any(|&i| !masked[i] && advantages.moves(i))
            };
            let moving: Vec<&Vec<usize>> = part.iter().filter(learns).collect();
            skipped += part.len() - moving.len();
            // A gradient of 0 is one: the step that follows has its momentum and decay, and servers want to see it.
            let part = if moving.is_empty() { part[..1].iter().collect() } else { moving };
            let streams: Vec<Group> = part.iter().map(|g| g.iter().map(|&i| &episodes[i].stream).collect()).collect();
            let mut of_update = Tally::default();
            engine.accumulate(&streams, &mut |g, m, scores: &Scores| {
                let i = part[g][m];
                let sequence = Sequence {
                    group: episodes[i].group,
                    advantage: advantages.of(i).context("an episode has no advantage")?,
                    masked: masked[i],
                    new: &scores.logprobs,
                    old: &old[i],
                    sampler: report_sampler.then_some(sampled[i].as_slice()),
                    reference: reference.as_ref().map(|r| r[i].as_slice()),
                    entropy: (!scores.entropies.is_empty()).then_some(&scores.entropies),
                };
                let mut out = self.objective.evaluate(&[sequence], &totals)?;
                of_update.merge(&out.tally);
                seen[i] = Some(looked_at(&old[i], scores, sequence_advantages(&advantages, i)));
                Ok(Weights {
                    logprobs: out.gradient.pop().unwrap_or_default(),
                    entropies: out.entropy_weight.and_then(|mut w| w.pop()),
                })
            })?;
            if update == 0 {
                first_ratio = largest_ratio_gap(&of_update);
            }
            let rate = self.plan.optim.lr_at(engine.updates(), self.plan.total_updates());
            norms.push(engine.step(rate)?);
            metrics.insert("actor/lr".into(), json!(rate));
            tally.merge(&of_update);
        }
        watch.add("update_actor", update_watch.elapsed());
        for (name, value) in tally.of_steps(norms.len()).report() {
            metrics.insert(name.into(), json!(value));
        }
        metrics.insert("actor/groups_without_gradient".into(), json!(skipped));
        // Before the first update the policy is the one that sampled: anything but 0 here is a bug of the engine.
        if let Some(gap) = first_ratio {
            metrics.insert("ratio/first_update_gap".into(), json!(gap));
        }
        if norms.iter().all(|norm| norm.is_finite()) {
            metrics.insert("actor/grad_norm".into(), json!(eval::average(norms.iter().copied())));
        }
        for (i, episode) in episodes.iter_mut().enumerate() {
            episode.advantage = Some(advantages.trajectory[i]);
            episode.update = seen[i].take();
        }
        count(&episodes, metrics);
        Ok(episodes)
    }

    /// Plays the questions of a step; with dynamic sampling, until enough groups teach something. False where none does: then some are
    /// kept all the same, for the step still has to be one, and must get no advantage.
    fn play(
        &self,
        engine: &mut dyn Sampler,
        rows: &[Sample],
        state: &mut State,
        step: u64,
        metrics: &mut Metrics,
    ) -> Result<(Vec<Episode>, bool)> {
        let train = &self.plan.train;
        let mut teaches = true;
        let stage = Stage { task: self.task, frontend: self.frontend, options: &self.plan.rollout };
        let min_spread = self.objective.min_spread * train.share_of_spread(step);
        let gate = Objective { min_spread, ..self.objective.clone() };
        let mut kept: Vec<Episode> = Vec::new();
        let (mut played, mut dropped, mut left_out) = (0, 0, 0);
        loop {
            let missing = train.prompts - kept.len() / train.group;
            let chosen = self.draw(rows, state, missing, &mut left_out)?;
            let episodes = rollout::play(&stage, engine, &chosen, train.group, train.seed, step)?;
            played += missing;
            let outcomes: Vec<Outcome> = episodes
                .iter()
                .map(|e| Outcome {
                    masked: self.masked(e),
                    ..Outcome::new(e.group, e.reward, e.stream.sampled_count())
                })
                .collect();
            let keep = gate.keep_groups(&outcomes);
            dropped += keep.dropped_groups;
            let last = played >= train.prompts * train.refill.max(1);
            if last && kept.is_empty() && keep.keep.iter().all(|k| !k) {
                (kept, teaches) = (episodes, false);
                break;
            }
            kept.extend(episodes.into_iter().zip(&keep.keep).filter(|(_, k)| **k).map(|(e, _)| e));
            if last || kept.len() >= train.prompts * train.group {
                break;
            }
        }
        if self.plan.data.leave_out_bad {
            metrics.insert("data/left_out".into(), json!(left_out));
        }
        if self.objective.drop_equal_groups {
            metrics.insert("dynamic_sampling/played_groups".into(), json!(played));
            metrics.insert("dynamic_sampling/dropped_groups".into(), json!(dropped));
        }
        Ok((kept, teaches))
    }

    /// The next rows, with the numbers of their groups. Headers were read when the run began; for a picture that turns out to be damaged behind its
    /// header another row is drawn, where bad rows may be left out.
    fn draw<'r>(
        &self,
        rows: &'r [Sample],
        state: &mut State,
        count: usize,
        left_out: &mut usize,
    ) -> Result<Vec<(u64, &'r Sample)>> {
        let mut chosen = Vec::with_capacity(count);
        let mut in_vain = 0;
        while chosen.len() < count {
            let drawn: Vec<&Sample> = (chosen.len()..count).map(|_| &rows[state.order.next_row()]).collect();
            let sizes =
                |row: &&Sample| row.images.iter().try_for_each(|path| self.frontend.pictures.size(path).map(drop));
            let opened: Vec<Result<()>> = drawn.par_iter().map(sizes).collect();
            for (row, opened) in drawn.into_iter().zip(opened) {
                match opened {
                    Ok(()) => {
                        state.groups += 1;
                        chosen.push((state.groups, row));
                        in_vain = 0;
                    }
                    Err(error) if !error.is::<BadPicture>() => return Err(error.context(row.named())),
                    Err(error) if !self.plan.data.leave_out_bad => {
                        return Err(BadPicture::told(format!("{}: {error:#}; {}", row.named(), data::BAD_ROW)));
                    }
                    Err(error) => {
                        progress::say_once(&format!("{} is left out: {error:#}", row.named()));
                        (in_vain, *left_out) = (in_vain + 1, *left_out + 1);
                    }
                }
            }
            // Twice round, for the order changes behind each.
            ensure!(
                in_vain < 2 * rows.len(),
                "no row has pictures that can be read: {}",
                self.plan.data.train.display()
            );
        }
        Ok(chosen)
    }

    fn evaluate(&self, engine: &mut dyn Trainer, rows: &[Sample], metrics: &mut Metrics) -> Result<Vec<Episode>> {
        let options = eval::EvalOptions { seed: self.plan.train.seed, ..eval::EvalOptions::default() };
        let rollout = self.plan.held_out_rollout();
        let (frontend, interrupt) = (self.frontend, Interrupt::none());
        let bench = eval::Bench { frontend, rollout: &rollout, options: &options, interrupt: &interrupt };
        let episodes = eval::play_all(&bench, "held-out rows", self.task, engine, rows)?;
        let summary = eval::summarise(&episodes);
        engine.forget_views();
        metrics.insert("val/accuracy".into(), json!(summary.accuracy.value));
        if let Some(c) = summary.containment {
            metrics.insert("val/contains_target".into(), json!(c.value));
        }
        Ok(episodes)
    }
}

/// What the update sees at each token of an episode, for the record.
fn looked_at(old: &[f32], scores: &Scores, advantages: Vec<f32>) -> Update {
    Update {
        ratios: scores.logprobs.iter().zip(old).map(|(new, old)| (new - old).exp()).collect(),
        entropies: scores.entropies.clone(),
        advantages,
    }
}

/// The advantages of an episode's tokens where they differ, nothing where they are all the episode's.
fn sequence_advantages(advantages: &Advantages, i: usize) -> Vec<f32> {
    let tokens = advantages.token.as_ref().and_then(|tokens| tokens.get(i));
    tokens.map(|tokens| tokens.iter().map(|&a| a as f32).collect()).unwrap_or_default()
}

fn records(episodes: &[Episode]) -> Vec<Record> {
    episodes.iter().map(Episode::record).collect()
}

/// Indices of the episodes of each group, in order.
fn by_group(episodes: &[Episode]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, e) in episodes.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if episodes[group[0]].group == e.group => group.push(i),
            _ => groups.push(vec![i]),
        }
    }
    groups
}

fn sampled_logprobs(episode: &Episode) -> Vec<f32> {
    let s = &episode.stream;
    s.logprobs.iter().zip(&s.sampled).filter(|(_, sampled)| **sampled).map(|(l, _)| *l).collect()
}

/// Log-probs of each episode's sampled tokens under the weights of `who`.
fn scored(engine: &mut dyn Trainer, episodes: &[Episode], groups: &[Vec<usize>], who: Who) -> Result<Vec<Vec<f32>>> {
    let streams: Vec<Group> = groups.iter().map(|g| g.iter().map(|&i| &episodes[i].stream).collect()).collect();
    let scores = engine.logprobs(&streams, who)?;
    // By the episode's own index: groups may stand in any order.
    let mut flat: Vec<Option<Vec<f32>>> = vec![None; episodes.len()];
    for (group, scores) in groups.iter().zip(scores) {
        for (&i, score) in group.iter().zip(scores) {
            flat[i] = Some(score.logprobs);
        }
    }
    let scored = flat.iter().flatten().count();
    flat.into_iter()
        .collect::<Option<_>>()
        .with_context(|| format!("the engine scored {scored} of {} episodes ({who:?})", episodes.len()))
}

/// What each episode's advantage is multiplied with for the difficulty of its question.
fn difficulty(episodes: &[Episode], groups: &[Vec<usize>]) -> Vec<f64> {
    let mut weights = vec![1.0; episodes.len()];
    for group in groups {
        let solved = |&i: &usize| episodes[i].parts.get("iou").unwrap_or(episodes[i].reward).clamp(0.0, 1.0);
        let weight = (1.0 - eval::average(group.iter().map(solved))).exp();
        group.iter().for_each(|&i| weights[i] = weight);
    }
    weights
}

/// The newest checkpoint of a run, or an error that says where none was found.
pub fn newest_checkpoint(run: &Path) -> Result<PathBuf> {
    Ok(crate::run::latest_checkpoint(run)?
        .with_context(|| format!("the run has no checkpoint yet: {}", run.display()))?
        .path)
}
