//! The RL loop. Read this first: a step is play, compare, learn, write down.
//!
//! ```text
//! samples -> rollout::play -> episodes -> advantages -> (log-probs, loss, gradient) per micro-batch -> one update
//! ```
//!
//! Every random number comes from (seed, step, group, member, turn), so a resumed run goes on bit for bit as the
//! uninterrupted one would have.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::chat::{Chat, Convention};
use crate::config::{self, BadConfig};
use crate::data::{Format, Order, ReadAs, Sample};
use crate::engine::embedded::{self, Embedded};
use crate::engine::{Group, Scores, Trainer, Weights, Who};
use crate::episode::{BoxOutcome, Episode, Stop, Update};
use crate::eval;
use crate::image::{PictureCache, Processor};
use crate::need;
use crate::objective::{Advantages, Correction, Objective, Outcome, Sequence, Tally};
use crate::optim::Optim;
use crate::progress::{self, Progress};
use crate::rollout::{self, Stage};
use crate::run::{Interrupt, Interrupted, Invocation, Metrics, RunFolder, Start, Stopwatch, peak_rss};
use crate::tasks::{Options as TaskOptions, Task, check_rows, ensure_possible};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: embedded::Options,
    pub data: DataOptions,
    pub task: TaskOptions,
    #[serde(default)]
    pub rollout: rollout::Options,
    /// `preset` and any setting of `objective::Objective` over it.
    #[serde(default)]
    pub objective: toml::Table,
    #[serde(default)]
    pub optim: Optim,
    pub train: TrainOptions,
    #[serde(default)]
    pub eval: EvalOptions,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// Rows of our own or of any format that docs/data.md names.
    pub train: PathBuf,
    /// The format, where the keys of the rows do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where relative paths of pictures start, if not in the folder of the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Train on the good rows of a file that has bad ones too; otherwise such a file is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_out_bad: bool,
}

impl DataOptions {
    pub fn read_as(&self) -> ReadAs {
        ReadAs { format: self.format, images: self.images.clone(), leave_out_bad: self.leave_out_bad }
    }
}

/// Held-out questions during training, played as `[rollout]` says but for the temperature.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalOptions {
    pub rows: Option<PathBuf>,
    /// Only the first so many.
    pub limit: Option<usize>,
    /// Every so many steps, and after the last; 0 never.
    pub every: u64,
    /// 0 is greedy.
    pub temperature: f32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// Run folder.
    pub out: PathBuf,
    pub steps: u64,
    /// Questions per step.
    pub prompts: usize,
    /// Episodes per question.
    pub group: usize,
    /// Optimiser updates per step; the questions are dealt out evenly.
    pub updates: usize,
    /// With `drop_equal_groups`: play at most so many times the questions of a step to fill it.
    pub refill: usize,
    /// MG-Thinker's variance gate, for `drop_equal_groups`: the run has so many phases, and `min_spread` is halved with each; 1 keeps it.
    pub spread_phases: u64,
    /// Where a step has several updates: the questions with the highest mean reward first, the lowest last (MG-Thinker's bands). With
    /// the gate and `refill = 1`, the questions of a step are its candidate pool: what the gate leaves is dealt out to the updates.
    pub bands: bool,
    /// Multiply the advantages of a question by exp(1 - its mean IoU), or mean reward where no IoU is known (UniVG-R1, arXiv 2505.14231).
    pub weigh_hard: bool,
    /// Over-long and truncated episodes get no policy loss instead of their reward.
    pub mask_truncated: bool,
    pub seed: u64,
    /// 0 writes a checkpoint at the end only.
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    /// Write the episodes of every so many steps, and of the last; 0 writes none.
    pub episodes_every: u64,
    /// Write the metrics a second time as TensorBoard reads them.
    pub tensorboard: bool,
}

impl Default for TrainOptions {
    fn default() -> TrainOptions {
        TrainOptions {
            out: "runs/rl".into(),
            steps: 100,
            prompts: 16,
            group: 8,
            updates: 1,
            refill: 3,
            spread_phases: 1,
            bands: false,
            weigh_hard: false,
            mask_truncated: false,
            seed: 1,
            checkpoint_every: 20,
            keep_checkpoints: 2,
            episodes_every: 1,
            tensorboard: true,
        }
    }
}

impl TrainOptions {
    /// What the gate's spread is multiplied with in this step: halved with each phase.
    fn share_of_spread(&self, step: u64) -> f64 {
        let phase = (step - 1) * self.spread_phases / self.steps.max(1);
        0.5f64.powi(phase as i32)
    }
}

/// What the loop itself must remember between steps; weights and optimiser are the engine's.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    order: Order,
    /// Groups played so far; numbers them.
    groups: u64,
}

impl Plan {
    pub fn objective(&self) -> Result<Objective> {
        Objective::from_table(self.objective.clone())
            .map_err(|e| BadConfig(format!("[objective] {}", config::explain(&format!("{e:#}")))).into())
    }

    /// How held-out questions are sampled.
    fn held_out_rollout(&self) -> rollout::Options {
        rollout::Options { temperature: self.eval.temperature, ..self.rollout.clone() }
    }

    /// Refuses what cannot work, before anything is loaded, and writes every default of the objective out.
    pub fn resolve(mut self) -> Result<Plan> {
        let mut objective = self.objective()?;
        // Dr. GRPO's constant is the longest response that could have been written.
        objective.norm_length.get_or_insert((self.rollout.max_new_tokens * self.task.turns()) as f64);
        self.objective = toml::Table::try_from(&objective).context("writing out the objective")?;
        let t = &self.train;
        let bad = |text: String| Err(BadConfig(text).into());
        self.rollout.validate()?;
        self.optim.validate()?;
        self.model.trainable()?;
        if t.prompts == 0 || t.group == 0 || t.updates == 0 || t.steps == 0 {
            return bad("train.steps, train.prompts, train.group and train.updates must be at least 1".into());
        }
        if !t.prompts.is_multiple_of(t.updates) {
            return bad(format!(
                "train.prompts = {} cannot be dealt out to train.updates = {} evenly",
                t.prompts, t.updates
            ));
        }
        if t.spread_phases == 0 {
            return bad("train.spread_phases is 0, expected at least 1".into());
        }
        if t.spread_phases > 1 && !(objective.drop_equal_groups && objective.min_spread > 0.0) {
            return bad(format!(
                "train.spread_phases = {} halves objective.min_spread over the run; that needs objective.drop_equal_groups = true and a \
                 min_spread above 0",
                t.spread_phases
            ));
        }
        if t.bands && t.updates == 1 {
            return bad("train.bands orders the updates of a step, and train.updates is 1; take at least 2".into());
        }
        if t.group == 1 && objective.needs_siblings() {
            return bad(
                "train.group = 1: the objective compares the episodes of a question with each other, so every advantage would be 0; \
                 take at least 2"
                    .into(),
            );
        }
        if self.eval.every > 0 && self.eval.rows.is_none() {
            return bad(format!("eval.every = {}, but eval.rows names no file with held-out rows", self.eval.every));
        }
        self.held_out_rollout().validate().map_err(|e| BadConfig(format!("in [eval]: {e}")))?;
        if self.rollout.temperature <= 0.0 {
            return bad(format!(
                "rollout.temperature = {}: training needs a distribution, so more than 0",
                self.rollout.temperature
            ));
        }
        if self.rollout.top_k.is_some() || self.rollout.top_p.is_some() {
            return bad(
                "rollout.top_k and rollout.top_p truncate the distribution; they are for evaluation only".into()
            );
        }
        Ok(self)
    }
}

/// `foveate rl CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load::<Plan>(&invocation.config, &invocation.overrides)?.resolve()?;
    if invocation.dry_run {
        let Ready { rows, held_out, .. } = Ready::of(&plan)?;
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
    fn of(plan: &Plan) -> Result<Ready> {
        let task = plan.task.task(Processor::load(&plan.model.path)?.budget.factor)?;
        let rows = plan.task.read(&plan.data.train, &plan.data.read_as())?;
        check_rows(&*task, &rows, &plan.data.train)?;
        let mut held_out = Vec::new();
        if let Some(path) = &plan.eval.rows {
            held_out = plan.task.read(path, &ReadAs::default())?;
            held_out.truncate(plan.eval.limit.unwrap_or(usize::MAX));
            check_rows(&*task, &held_out, path)?;
        }
        Ok(Ready { rows, held_out, task, objective: plan.objective()? })
    }
}

/// Everything that a step needs beside the engine.
struct Loop<'a> {
    plan: &'a Plan,
    objective: &'a Objective,
    task: &'a dyn Task,
    chat: &'a Chat,
    pictures: &'a PictureCache,
    processor: &'a Processor,
    convention: Convention,
}

/// Trains as planned and returns the metrics of the last step. `watch` sees the metrics of each step as it ends.
pub fn train(
    plan: &Plan,
    start: Start,
    interrupt: &Interrupt,
    watch: &mut dyn FnMut(u64, &Metrics),
) -> Result<Metrics> {
    let Ready { rows, held_out, task, objective } = Ready::of(plan)?;
    ensure_possible(&rows, &plan.data.train)?;
    need::of_rl(plan, &*task, &rows, true)?.ensure_fits(&plan.model)?;
    let settings = embedded::Training {
        optim: plan.optim.clone(),
        steps: plan.train.steps * plan.train.updates as u64,
        temperature: plan.rollout.temperature,
        reference: objective.needs_reference(),
    };
    let mut engine = Embedded::open(&plan.model, Some(&settings))?;
    let (chat, pictures, processor) = (engine.chat.clone(), engine.pictures.clone(), engine.processor.clone());
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let written_plan = config::to_toml(plan)?;
    let (folder, checkpoint) = RunFolder::open(&plan.train.out, start, &written_plan)?;
    let mut state = State { order: Order::new(rows.len(), plan.train.seed)?, groups: 0 };
    let mut done = 0;
    if let Some(checkpoint) = &checkpoint {
        checkpoint.leaves_steps(plan.train.steps)?;
        engine.load(&checkpoint.path)?;
        let saved: State = checkpoint.state()?;
        state = State { order: saved.order.resume(rows.len())?, ..saved };
        done = checkpoint.step;
        progress::say(&format!("resuming after step {done}"));
    }
    folder.begin(&written_plan, checkpoint.map(|c| c.step))?;
    let context = Loop {
        plan,
        objective: &objective,
        task: &*task,
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention: engine.convention,
    };
    let mut log = folder.metrics_log()?;
    if plan.train.tensorboard {
        log = log.with_events()?;
    }
    let bar = Progress::start("training", "step", done, plan.train.steps);
    let mut last = Metrics::new();
    for step in done + 1..=plan.train.steps {
        let mut watch_time = Stopwatch::start();
        let mut metrics = Metrics::new();
        let episodes = context.step(&mut engine, &rows, &mut state, step, &mut watch_time, &mut metrics)?;
        let last_step = step == plan.train.steps;
        if plan.eval.every > 0 && (step % plan.eval.every == 0 || last_step) {
            let played = watch_time.time("eval", || context.evaluate(&mut engine, &held_out, &mut metrics))?;
            let records: Vec<_> = played.iter().map(Episode::record).collect();
            folder.write_validation(step, &records)?;
        }
        watch_time.write(&mut metrics);
        metrics.insert("perf/max_memory_gb".into(), json!(peak_rss() as f64 / 1e9));
        if plan.train.episodes_every > 0 && (step % plan.train.episodes_every == 0 || last_step) {
            let records: Vec<_> = episodes.iter().map(Episode::record).collect();
            folder.write_episodes(step, &records)?;
        }
        log.append(step, &metrics)?;
        let number = |key: &str| metrics.get(key).and_then(|v| v.as_f64()).unwrap_or(f64::NAN);
        let found = match metrics.contains_key("rewards/joint/mean") {
            true => ("right picture and place", "rewards/joint/mean"),
            false => ("target in box", "grounding/contains_target"),
        };
        bar.step(format!("reward {:.3} · {} {:.2}", number("reward/mean"), found.0, number(found.1)));
        watch(step, &metrics);
        last = metrics;
        let asked = interrupt.asked();
        let due = plan.train.checkpoint_every > 0 && step % plan.train.checkpoint_every == 0;
        if asked || due || last_step {
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
    fn stage(&self) -> Stage<'_> {
        Stage {
            task: self.task,
            chat: self.chat,
            pictures: self.pictures,
            processor: self.processor,
            convention: self.convention,
            options: &self.plan.rollout,
        }
    }

    /// Whether an episode gets no policy loss.
    fn masked(&self, episode: &Episode) -> bool {
        self.plan.train.mask_truncated && matches!(episode.stop, Stop::Truncated | Stop::OverLong)
    }

    fn step(
        &self,
        engine: &mut Embedded,
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
            true => Some(watch.time("ref", || reference_logprobs(engine, &episodes, &groups))?),
            false => None,
        };
        let old: Vec<Vec<f32>> = episodes.iter().map(sampled_logprobs).collect();
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
        let mut first_ratio = f64::NAN;
        let update_watch = std::time::Instant::now();
        let updates = self.plan.train.updates.min(groups.len());
        for update in 0..updates {
            let part = &groups[update * groups.len() / updates..(update + 1) * groups.len() / updates];
            let members: Vec<usize> = part.iter().flatten().copied().collect();
            let totals = self.objective.totals(members.iter().map(|&i| (episodes[i].group, old[i].len(), masked[i])));
            if totals.tokens == 0 {
                continue;
            }
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
                    // This engine's sampler is its trainer: there is nothing to correct, and no mismatch to report.
                    sampler: (self.objective.correction != Correction::Off).then_some(old[i].as_slice()),
                    reference: reference.as_ref().map(|r| r[i].as_slice()),
                    entropy: Some(&scores.entropies),
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
            let rate = engine.learning_rate();
            norms.push(engine.step(rate)?);
            metrics.insert("actor/lr".into(), json!(rate));
            tally.merge(&of_update);
        }
        watch.add("update_actor", update_watch.elapsed());
        for (name, value) in tally.of_steps(norms.len()).report() {
            metrics.insert(name.into(), json!(value));
        }
        // Before the first update the policy is the one that sampled: anything but 0 here is a bug of the engine.
        metrics.insert("ratio/first_update_gap".into(), json!(first_ratio));
        metrics.insert("actor/grad_norm".into(), json!(eval::average(norms.iter().copied())));
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
        engine: &mut Embedded,
        rows: &[Sample],
        state: &mut State,
        step: u64,
        metrics: &mut Metrics,
    ) -> Result<(Vec<Episode>, bool)> {
        let train = &self.plan.train;
        let mut teaches = true;
        let min_spread = self.objective.min_spread * train.share_of_spread(step);
        let gate = Objective { min_spread, ..self.objective.clone() };
        let mut kept: Vec<Episode> = Vec::new();
        let (mut played, mut dropped) = (0, 0);
        loop {
            let missing = train.prompts - kept.len() / train.group;
            let chosen: Vec<(u64, &Sample)> = (0..missing)
                .map(|_| {
                    state.groups += 1;
                    (state.groups, &rows[state.order.next_row()])
                })
                .collect();
            let episodes = rollout::play(&self.stage(), engine, &chosen, train.group, train.seed, step)?;
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
        if self.objective.drop_equal_groups {
            metrics.insert("dynamic_sampling/played_groups".into(), json!(played));
            metrics.insert("dynamic_sampling/dropped_groups".into(), json!(dropped));
        }
        Ok((kept, teaches))
    }

    fn evaluate(&self, engine: &mut Embedded, rows: &[Sample], metrics: &mut Metrics) -> Result<Vec<Episode>> {
        let options = eval::EvalOptions { seed: self.plan.train.seed, ..eval::EvalOptions::default() };
        let rollout = self.plan.held_out_rollout();
        let bench = eval::Bench {
            chat: self.chat,
            pictures: self.pictures,
            processor: self.processor,
            convention: self.convention,
            rollout: &rollout,
            options: &options,
            interrupt: &Interrupt::none(),
        };
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

fn reference_logprobs(engine: &mut Embedded, episodes: &[Episode], groups: &[Vec<usize>]) -> Result<Vec<Vec<f32>>> {
    let streams: Vec<Group> = groups.iter().map(|g| g.iter().map(|&i| &episodes[i].stream).collect()).collect();
    let scores = engine.logprobs(&streams, Who::Reference)?;
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
        .with_context(|| format!("the reference scored {scored} of {} episodes", episodes.len()))
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

/// The largest distance from 1 of any token's ratio.
fn largest_ratio_gap(tally: &Tally) -> f64 {
    let report: BTreeMap<&str, f64> = tally.report().into_iter().collect();
    let far = |key| report.get(key).map_or(0.0, |r| (r - 1.0).abs());
    far("ratio/min").max(far("ratio/max"))
}

/// What the episodes of a step were like, under the names users of verl and TRL know, and the grounding ones.
fn count(episodes: &[Episode], metrics: &mut Metrics) {
    let mut put = |key: &str, value: f64| {
        metrics.insert(key.to_owned(), json!(value));
    };
    let n = episodes.len().max(1) as f64;
    let lengths: Vec<f64> = episodes.iter().map(|e| e.stream.sampled_count() as f64).collect();
    put("response_length/mean", eval::average(lengths.iter().copied()));
    put("response_length/max", lengths.iter().copied().fold(0.0, f64::max));
    let cut = episodes.iter().filter(|e| e.stop == Stop::Truncated).count() as f64;
    put("response_length/clip_ratio", cut / n);
    put("prompt_length/mean", eval::average(episodes.iter().map(|e| e.stream.prompt_len() as f64)));
    put(
        "num_turns/mean",
        eval::average(episodes.iter().map(|e| e.turns.iter().filter(|t| t.role == "assistant").count() as f64)),
    );
    let mut parts: BTreeMap<String, f64> = BTreeMap::new();
    for e in episodes {
        for (name, value) in e.parts.iter() {
            *parts.entry(format!("rewards/{name}/mean")).or_default() += value / n;
        }
    }
    for (name, value) in parts {
        put(&name, value);
    }
    let outcomes: Vec<BoxOutcome> = episodes.iter().filter_map(|e| e.turns.iter().find_map(|t| t.outcome)).collect();
    if !outcomes.is_empty() {
        let m = outcomes.len() as f64;
        let mut classes: BTreeMap<String, usize> = BTreeMap::new();
        for o in &outcomes {
            *classes.entry(eval::name_of(o)).or_default() += 1;
        }
        let valid = outcomes.iter().filter(|o| **o == BoxOutcome::Valid).count();
        put("grounding/valid_box", valid as f64 / m);
        for (class, count) in classes {
            put(&format!("box/{class}"), count as f64 / m);
        }
    }
    let held: Vec<bool> = episodes.iter().filter_map(eval::contains_target).collect();
    if !held.is_empty() {
        put("grounding/contains_target", held.iter().filter(|h| **h).count() as f64 / held.len() as f64);
    }
    let areas: Vec<f64> = episodes.iter().filter_map(eval::box_area_share).collect();
    if !areas.is_empty() {
        put("grounding/box_area", eval::average(areas.iter().copied()));
    }
    for stop in [Stop::Answered, Stop::TurnLimit, Stop::Truncated, Stop::OverLong, Stop::InvalidBox] {
        let count = episodes.iter().filter(|e| e.stop == stop).count() as f64;
        put(&format!("stop/{}", eval::name_of(&stop)), count / n);
    }
}

/// `foveate rollout CONFIG`: plays one step's worth of questions per step and writes the episodes; nothing is trained.
pub fn rollout_main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load::<Plan>(&invocation.config, &invocation.overrides)?.resolve()?;
    if invocation.start != Start::New {
        return Err(BadConfig("a rollout keeps no checkpoint, so there is nothing to --resume".into()).into());
    }
    let Ready { rows, task, objective, .. } = Ready::of(&plan)?;
    if invocation.dry_run {
        invocation.show(&plan)?;
        eprintln!("{} rows; {} episodes a step", rows.len(), plan.train.prompts * plan.train.group);
        return Ok(());
    }
    need::of_rl(&plan, &*task, &rows, false)?.ensure_fits(&plan.model)?;
    let interrupt = Interrupt::install()?;
    let mut engine = Embedded::open(&plan.model, None)?;
    progress::say(&engine.about());
    let (chat, pictures, processor) = (engine.chat.clone(), engine.pictures.clone(), engine.processor.clone());
    let context = Loop {
        plan: &plan,
        objective: &objective,
        task: &*task,
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention: engine.convention,
    };
    let folder = RunFolder::create(&plan.train.out)?;
    folder.begin(&config::to_toml(&plan)?, None)?;
    let mut state = State { order: Order::new(rows.len(), plan.train.seed)?, groups: 0 };
    let mut log = folder.metrics_log()?;
    let bar = Progress::start("playing", "step", 0, plan.train.steps);
    for step in 1..=plan.train.steps {
        let mut metrics = Metrics::new();
        let (episodes, _) = context.play(&mut engine, &rows, &mut state, step, &mut metrics)?;
        count(&episodes, &mut metrics);
        metrics.insert("reward/mean".into(), json!(eval::average(episodes.iter().map(|e| e.reward))));
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        folder.write_episodes(step, &records)?;
        log.append(step, &metrics)?;
        bar.step(format!("reward {:.3}", eval::average(episodes.iter().map(|e| e.reward))));
        if interrupt.asked() {
            return Err(Interrupted::after(step, &plan.train.out).into());
        }
    }
    bar.finish();
    if invocation.json {
        println!("{}", json!({"run": plan.train.out}));
    } else {
        println!("{}", plan.train.out.display());
    }
    Ok(())
}

/// The newest checkpoint of a run, or an error that says where none was found.
pub fn newest_checkpoint(run: &Path) -> Result<PathBuf> {
    Ok(crate::run::latest_checkpoint(run)?
        .with_context(|| format!("the run has no checkpoint yet: {}", run.display()))?
        .path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_halved_with_each_phase() {
        let train = TrainOptions { steps: 8, spread_phases: 4, ..TrainOptions::default() };
        let shares: Vec<f64> = (1..=8).map(|step| train.share_of_spread(step)).collect();
        assert_eq!(shares, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]);
        assert_eq!(TrainOptions { spread_phases: 1, ..train }.share_of_spread(8), 1.0);
    }

    /// The reference config says something about every key there is, and holds the published values: the defaults.
    #[test]
    fn the_reference_config_names_every_key() {
        let text = include_str!("../configs/mgpo_paper.toml");
        let plan: Plan = config::parse::<Plan>(text, &[]).unwrap().resolve().unwrap();
        assert_eq!(plan.objective().unwrap().kl_coef, Objective::default().kl_coef);
        let TaskOptions::Crop(published) = plan.task.clone() else { panic!("another task") };
        let default = crate::tasks::crop::Options::default();
        assert_eq!((published.max_pixels, published.min_pixels), (default.max_pixels, default.min_pixels));
        let table = toml::Table::try_from(&plan).unwrap();
        let optional = ["top_k", "top_p", "dual_clip", "norm_length", "rows", "limit"];
        for key in
            table.values().filter_map(toml::Value::as_table).flat_map(|section| section.keys().map(String::as_str))
        {
            let named = text.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} =")));
            assert!(named || optional.contains(&key), "configs/mgpo_paper.toml does not mention {key}");
        }
        assert!(optional.iter().all(|key| text.contains(key)));
    }

    #[test]
    fn every_shipped_config_is_read() {
        for text in [include_str!("../configs/demo_mgpo.toml"), include_str!("../configs/demo_grpo.toml")] {
            config::parse::<Plan>(text, &[]).unwrap().resolve().unwrap();
        }
        // Every ablation that the file names.
        let mirg = include_str!("../configs/mirg_rl.toml");
        let changes: Vec<Vec<String>> = mirg
            .lines()
            .filter_map(|line| line.strip_prefix("#   "))
            .flat_map(|line| line.split("  ").filter(|words| words.contains('=')))
            .map(|words| words.split_whitespace().filter(|word| word.contains('=')).map(str::to_owned).collect())
            .collect();
        assert!(changes.len() >= 5, "{changes:?}");
        for overrides in
            changes.into_iter().filter(|all| !all.iter().any(|one| one.starts_with("data."))).chain([vec![]])
        {
            config::parse::<Plan>(mirg, &overrides).unwrap().resolve().unwrap();
        }
        for text in [
            include_str!("../configs/eval_plates.toml"),
            include_str!("../configs/eval_mig_bench.toml"),
            include_str!("../configs/mirg_gain.toml"),
        ] {
            config::parse::<eval::Plan>(text, &[]).unwrap();
        }
        config::parse::<crate::sft::Plan>(include_str!("../configs/sft_dialogues.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../configs/nano_pretrain.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../configs/nano_several.toml"), &[]).unwrap();
        config::parse::<crate::sft::Plan>(include_str!("../configs/mirg_sft.toml"), &[]).unwrap();
    }
}
