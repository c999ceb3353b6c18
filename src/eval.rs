//! Tasks x splits -> a table. The same turn loop as training, with its own sampling, and an interval on every number. The same rows can be
//! played under several protocols (`eval/asked.rs`), which are compared question by question (`eval/items.rs`). Published benchmarks get tables
//! of their own (`eval/benchmarks.rs`, `eval/mig_bench.rs`).

mod asked;
pub mod benchmarks;
pub mod compare;
mod figures;
pub mod items;
pub mod mig_bench;
mod rows;
pub mod size;

pub use asked::Asked;
pub use figures::{
    Figures, Over, Summary, average, box_area_share, contains_target, name_of, print_tables, summaries, summarise,
    table, tables_by_task,
};
pub(crate) use rows::keep_askable;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::config::{self, BadConfig};
use crate::data::{self, Format, Read, ReadAs, Sample};
use crate::engine::recorded::Recorded;
use crate::engine::{self, Frontend, ModelOptions, Sampler};
use crate::episode::Episode;
use crate::image::Processor;
use crate::need;
use crate::progress::{self, Progress};
use crate::report::{self, TABLE};
use crate::rollout::{self, Stage};
use crate::run::{Interrupt, Interrupted, Invocation, Kind, RunFolder, of_answers, write_atomic};
use crate::tasks::protocol::Protocol;
use crate::tasks::{Options as TaskOptions, Task};
use items::{ITEMS, Items};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: ModelOptions,
    #[serde(default, skip_serializing_if = "engine::Options::is_embedded")]
    pub engine: engine::Options,
    pub data: DataOptions,
    #[serde(default)]
    pub rollout: rollout::Options,
    /// Each is one row of the table, or one for each of `eval.protocols`.
    pub tasks: BTreeMap<String, TaskOptions>,
    #[serde(default)]
    pub eval: EvalOptions,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    /// Rows of our own or of any format that docs/data.md names.
    pub test: PathBuf,
    /// The format, where the keys of the rows do not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Where relative paths of pictures start, if not in the folder of the rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Only the first so many good rows.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Options of multiple choice are shown in an order that follows from this number and the row's id. Without it, as published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shuffle_options: Option<u64>,
}

impl DataOptions {
    pub fn read_as(&self) -> ReadAs {
        ReadAs { format: self.format, images: self.images.clone(), leave_out_bad: true }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalOptions {
    /// Where episodes and table.json go.
    pub out: PathBuf,
    pub seed: u64,
    /// Answers per question; above 1 the figures are averages (Avg@k).
    pub samples: usize,
    /// Questions that advance together.
    pub batch: usize,
    /// Plays every task under each of these; differences are over the first of them. Without any, tasks are played as they are written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub protocols: Vec<Protocol>,
    /// The most turns under the protocol `free`.
    pub free_turns: usize,
}

impl Default for EvalOptions {
    fn default() -> EvalOptions {
        EvalOptions { out: "runs/eval".into(), seed: 1, samples: 1, batch: 64, protocols: vec![], free_turns: 4 }
    }
}

/// Everything that stays the same between the rows of a table.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub frontend: &'a Frontend,
    pub rollout: &'a rollout::Options,
    pub options: &'a EvalOptions,
    /// Looked at between batches. Training passes one that is never raised: it stops between steps, with a checkpoint.
    pub interrupt: &'a Interrupt,
}

/// Plays all samples under one task; the episodes carry `name` as theirs.
pub fn play_all(
    bench: &Bench,
    name: &str,
    task: &dyn Task,
    sampler: &mut dyn Sampler,
    samples: &[Sample],
) -> Result<Vec<Episode>> {
    let stage = Stage { task, frontend: bench.frontend, options: bench.rollout };
    let progress = Progress::start(&format!("evaluating {name}"), "question", 0, samples.len() as u64);
    let mut episodes = Vec::with_capacity(samples.len() * bench.options.samples);
    let numbered: Vec<(u64, &Sample)> = samples.iter().enumerate().map(|(i, s)| (i as u64, s)).collect();
    for chunk in numbered.chunks(bench.options.batch.max(1)) {
        if bench.interrupt.asked() {
            return Err(Interrupted::without_checkpoint().into());
        }
        episodes.extend(rollout::play(&stage, sampler, chunk, bench.options.samples, bench.options.seed, 0)?);
        let right = average(episodes.iter().map(|e| f64::from(u8::from(e.right()))));
        progress.add(chunk.len() as u64);
        progress.note(format!("right {:.1} %", 100.0 * right));
    }
    progress.finish();
    for episode in &mut episodes {
        name.clone_into(&mut episode.task);
    }
    Ok(episodes)
}

/// `foveate eval CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load_for("eval", &invocation.config, &invocation.overrides)?;
    plan.validate()?;
    let file = &plan.data.test;
    let Read { mut samples, report, sizes } = plan.data.read_as().good(file).context("data.test")?;
    ensure!(!samples.is_empty(), "reading data: {}: {}", report.faults().unwrap_or_default(), file.display());
    let mut notes = plan.notes();
    if let Some(seed) = plan.data.shuffle_options {
        notes.extend(data::shuffle_options(&mut samples, seed).note(seed));
    }
    let mut unasked = rows::bad(&report);
    let factor = Processor::load(&plan.model.path)?.budget.factor;
    let mut asked = plan.asks(factor, &sizes, &|options| Ok(options.asked(samples.clone())))?;
    for Asked { name, of, task, samples, truths, .. } in &mut asked {
        rows::add(&mut unasked, keep_askable(name, &**task, samples, file)?);
        if let Some(TaskOptions::MultiImage(_)) = plan.tasks.get(of) {
            *truths = mig_bench::truths(samples, file)?;
        }
    }
    if invocation.dry_run {
        invocation.show(&plan)?;
        for Asked { name, samples, .. } in &asked {
            eprintln!("{name}: {} questions, {} answers each", samples.len(), plan.eval.samples);
        }
        rows::say(&unasked, asked.len());
        return Ok(());
    }
    let written_plan = config::to_toml(&plan)?;
    RunFolder::check(&plan.eval.out, Kind::Eval, invocation.start, &written_plan)?;
    // Headers were read; what is damaged behind them would stop the evaluation where it is met.
    let every: Vec<&Sample> = asked.iter().flat_map(|asked| asked.samples.iter()).collect();
    let damaged = data::damaged(&every);
    for Asked { name, samples, truths, .. } in &mut asked {
        rows::add(&mut unasked, rows::leave_out(name, samples, truths, &damaged, file)?);
    }
    notes.iter().for_each(|note| progress::say(note));
    rows::say(&unasked, asked.len());
    if plan.engine.is_embedded() {
        need::of_eval(&plan, &asked)?.ensure_fits(&plan.model)?;
    }
    let interrupt = Interrupt::install()?;
    let (mut engine, frontend) = engine::open_sampler(
        &plan.engine,
        &plan.model,
        data::shows_pictures(asked.iter().flat_map(|asked| asked.samples.iter())),
    )?;
    engine.about().iter().for_each(|about| progress::say(about));
    let bench = Bench { frontend: &frontend, rollout: &plan.rollout, options: &plan.eval, interrupt: &interrupt };
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let (folder, _) = RunFolder::open(&plan.eval.out, Kind::Eval, invocation.start, &written_plan)?;
    // A record that cannot be read is told of before anything is taken back.
    let mut engine = Recorded::open(&mut *engine, folder.root(), &of_answers(&written_plan)?, &plan.model.path)?;
    folder.begin(&written_plan, None)?;
    // Those that show what was named under `two_turns` come last, but stand in the table where the config has them.
    let mut order: Vec<usize> = (0..asked.len()).collect();
    order.sort_by_key(|&k| asked[k].protocol.as_ref().is_some_and(|(protocol, _)| protocol.needs_regions()));
    let mut regions: BTreeMap<&str, asked::Regions> = BTreeMap::new();
    let mut items = Items::default();
    let mut played: Vec<Option<(Figures, Vec<report::Table>)>> = asked.iter().map(|_| None).collect();
    for k in order {
        let Asked { name, of, protocol, samples, truths, .. } = &asked[k];
        let named = regions.get(of.as_str()).map_or(&[][..], |regions| &regions[..]);
        let episodes = asked[k].play(&bench, plan.eval.free_turns, &mut engine, named).map_err(|error| {
            if error.is::<Interrupted>() { Interrupted::among_answers(folder.root()).into() } else { error }
        })?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        folder.write_episodes(k as u64, &records)?;
        let areas: Vec<Option<f64>> = samples.iter().map(|row| size::target_area(row, &sizes)).collect();
        let mut of_bench = mig_bench::tables(name, &mig_bench::judged(&episodes, samples, truths));
        of_bench.extend(benchmarks::tables(name, &episodes, samples, frontend.convention));
        items.add(name, &episodes, samples, &areas, &benchmarks::verdicts(&episodes, samples, frontend.convention));
        let mut figures = Figures::of(name, &episodes, samples, &areas);
        if let Some((protocol, _)) = protocol {
            protocol.about().clone_into(&mut figures.about);
            if protocol.is_control() {
                figures = figures.without_boxes();
            }
            if *protocol == Protocol::TwoTurns {
                regions.insert(of, asked::regions(&episodes, plan.eval.samples));
            }
        }
        played[k] = Some((figures, of_bench));
    }
    engine.finish()?;
    let (mut rows, of_bench): (Vec<Figures>, Vec<Vec<report::Table>>) = played.into_iter().flatten().unzip();
    let of_bench: Vec<report::Table> = of_bench.into_iter().flatten().collect();
    let necessity = compare_protocols(&asked, &mut rows, &mut items);
    let title = format!("{} on {}", plan.model.path.display(), plan.data.test.display());
    if rows.iter().any(|row| row.over.is_some()) {
        notes.push(OVER.to_owned());
    }
    notes.extend(rows::notes(&unasked, asked.len()));
    let mut tables = vec![table(&title, &rows, &notes)];
    tables.extend(necessity);
    tables.extend(size::table(&rows));
    tables.extend(if of_bench.is_empty() { tables_by_task(&rows) } else { of_bench });
    folder.save(TABLE, &report::tables_json(&tables)?)?;
    write_atomic(folder.root().join(ITEMS), &items.lines()?)?;
    if invocation.json {
        println!(
            "{}",
            json!({
                "table": tables[0],
                "by_task": tables[1..],
                "rows": summaries(&rows),
                "unasked": unasked,
                "items": folder.root().join(ITEMS),
            })
        );
    } else {
        print_tables(&tables);
    }
    Ok(())
}

const OVER: &str = "differences in points, question by question, with 95 % intervals; p: McNemar's exact test, or the sign-flip test where a \
                    question has several answers";

impl Plan {
    /// # Errors
    /// Values that no evaluation can be played with, named.
    fn validate(&self) -> Result<()> {
        ensure!(!self.tasks.is_empty(), BadConfig("the config has no task; add a section [tasks.NAME]".into()));
        ensure!(self.eval.samples > 0, BadConfig("eval.samples is 0, expected at least 1".into()));
        ensure!(self.data.limit != Some(0), BadConfig("data.limit is 0, which leaves no question to ask".into()));
        ensure!(
            self.eval.free_turns > 0 || !self.eval.protocols.contains(&Protocol::Free),
            BadConfig("eval.free_turns is 0, expected at least 1".into())
        );
        self.rollout.validate()
    }

    /// What a reader of the table must know of how it came about.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let k = self.eval.samples;
        if k > 1 {
            notes.push(format!(
                "every question is answered {k} times: shares of right answers are Avg@{k}, intervals count questions"
            ));
            if self.rollout.temperature == 0.0 {
                notes.push(format!("rollout.temperature is 0, so the {k} answers to a question are all the same"));
            }
        }
        notes
    }
}

/// Compares the protocols of each task with its first one, and classes the questions by whether a crop was needed.
fn compare_protocols(asked: &[Asked], rows: &mut [Figures], items: &mut Items) -> Vec<report::Table> {
    let mut tables = Vec::new();
    let mut done: Vec<&str> = Vec::new();
    for first in asked.iter().filter(|asked| asked.protocol.is_some()) {
        if done.contains(&first.of.as_str()) {
            continue;
        }
        done.push(&first.of);
        let of_task: Vec<(&str, Protocol)> = asked
            .iter()
            .filter(|other| other.of == first.of)
            .filter_map(|other| Some((other.name.as_str(), other.protocol.as_ref()?.0)))
            .collect();
        for (name, _) in &of_task[1..] {
            let over = items.difference(name, &first.name);
            if let Some(row) = rows.iter_mut().find(|row| row.name == *name) {
                row.over = over.map(|difference| Over { row: first.name.clone(), difference });
            }
        }
        let named = |wanted: Protocol| of_task.iter().find(|(_, protocol)| *protocol == wanted).map(|(name, _)| *name);
        let with: Vec<&str> =
            of_task.iter().filter(|(_, protocol)| protocol.shows_a_crop()).map(|(name, _)| *name).collect();
        if let (Some(without), false) = (named(Protocol::NoTool).or(named(Protocol::OneTurn)), with.is_empty()) {
            with.iter().for_each(|name| items.class(name, without));
            tables.push(items.necessity(&with, without));
        }
    }
    tables
}
