//! Tasks x splits -> a table. The same turn loop as training, with its own sampling, and an interval on every number. Rows of MIG-Bench
//! get the benchmark's own table beside it (`eval/mig_bench.rs`).

pub mod mig_bench;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chat::{Chat, Convention};
use crate::config::{self, BadConfig};
use crate::data::{self, Sample};
use crate::engine::Sampler;
use crate::engine::embedded::{self, Embedded};
use crate::episode::{BoxOutcome, Episode, Stop};
use crate::image::{PictureCache, Processor};
use crate::need;
use crate::progress::Progress;
use crate::reward::mig::Truth;
use crate::rollout::{self, Stage};
use crate::run::{Interrupt, Interrupted, Invocation, RunFolder, Start};
use crate::stats;
use crate::tasks::{Options as TaskOptions, Task, check_rows};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: embedded::Options,
    pub data: DataOptions,
    #[serde(default)]
    pub rollout: rollout::Options,
    /// Each is one row of the table.
    pub tasks: BTreeMap<String, TaskOptions>,
    #[serde(default)]
    pub eval: EvalOptions,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOptions {
    pub test: PathBuf,
    /// Only the first so many rows.
    #[serde(default)]
    pub limit: Option<usize>,
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
}

impl Default for EvalOptions {
    fn default() -> EvalOptions {
        EvalOptions { out: "runs/eval".into(), seed: 1, samples: 1, batch: 64 }
    }
}

/// The figures of one row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub questions: usize,
    pub episodes: usize,
    pub accuracy: stats::Estimate,
    /// Share of first grounding turns whose box holds the target; a bad box holds nothing. None where no row has a target.
    pub containment: Option<stats::Estimate>,
    /// Share of first grounding turns with a usable box.
    pub valid_box: Option<stats::Estimate>,
    /// Accuracy where the box held the target, and where it did not.
    pub accuracy_if_contained: Option<stats::Estimate>,
    pub accuracy_if_not: Option<stats::Estimate>,
    pub boxes: BTreeMap<String, usize>,
    pub stops: BTreeMap<String, usize>,
    pub response_length: f64,
    /// Mean area of the first usable box, as a share of the picture.
    pub box_area: Option<f64>,
}

/// A box holds a target when at least this share of the target's area lies in it: whole, up to rounding outward.
const HOLDS: f64 = 0.95;

/// Whether the first grounding turn of an episode names a region that contains the target; None without target or grounding.
pub fn contains_target(episode: &Episode) -> Option<bool> {
    let target = episode.targets.first()?;
    episode.turns.iter().find(|t| t.outcome.is_some())?;
    Some(episode.first_box().is_some_and(|b| b.contains_fraction(&target.bbox) >= HOLDS))
}

pub fn summarise(episodes: &[Episode]) -> Summary {
    let share = |items: Vec<(u64, bool)>| (!items.is_empty()).then(|| share_by_question(&items));
    let right = Episode::right;
    let grounded: Vec<(&Episode, BoxOutcome)> =
        episodes.iter().filter_map(|e| e.turns.iter().find_map(|t| t.outcome).map(|o| (e, o))).collect();
    let held: Vec<(&Episode, bool)> = episodes.iter().filter_map(|e| contains_target(e).map(|c| (e, c))).collect();
    let mut boxes = BTreeMap::new();
    let mut stops = BTreeMap::new();
    for (_, outcome) in &grounded {
        *boxes.entry(name_of(outcome)).or_insert(0) += 1;
    }
    for e in episodes {
        *stops.entry(name_of::<Stop>(&e.stop)).or_insert(0) += 1;
    }
    let mut questions: Vec<u64> = episodes.iter().map(|e| e.group).collect();
    questions.sort_unstable();
    questions.dedup();
    let areas: Vec<f64> = episodes.iter().filter_map(box_area_share).collect();
    Summary {
        questions: questions.len(),
        episodes: episodes.len(),
        accuracy: share_by_question(&episodes.iter().map(|e| (e.group, right(e))).collect::<Vec<_>>()),
        containment: share(held.iter().map(|(e, c)| (e.group, *c)).collect()),
        valid_box: share(grounded.iter().map(|(e, o)| (e.group, *o == BoxOutcome::Valid)).collect()),
        accuracy_if_contained: share(held.iter().filter(|(_, c)| *c).map(|(e, _)| (e.group, right(e))).collect()),
        accuracy_if_not: share(held.iter().filter(|(_, c)| !*c).map(|(e, _)| (e.group, right(e))).collect()),
        boxes,
        stops,
        response_length: average(episodes.iter().map(|e| e.stream.sampled_count() as f64)),
        box_area: (!areas.is_empty()).then(|| average(areas.iter().copied())),
    }
}

/// The mean, 0 of nothing.
pub fn average(values: impl Iterator<Item = f64>) -> f64 {
    stats::mean(&values.collect::<Vec<_>>()).unwrap_or(0.0)
}

/// A share with its interval; answers to one question are not independent, so questions are the clusters.
fn share_by_question(items: &[(u64, bool)]) -> stats::Estimate {
    let values: Vec<f64> = items.iter().map(|(_, right)| f64::from(u8::from(*right))).collect();
    let questions: Vec<u64> = items.iter().map(|(question, _)| *question).collect();
    stats::clustered_share(&values, &questions)
}

/// Area of the first usable box as a share of its picture; the first view of an episode is the whole picture.
pub fn box_area_share(episode: &Episode) -> Option<f64> {
    let whole = episode.stream.images.first()?.view.region;
    episode.first_box().map(|b| b.area() / whole.area())
}

/// The snake_case name that serde gives an enum.
pub fn name_of<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Everything that stays the same between the rows of a table.
pub struct Bench<'a> {
    pub chat: &'a Chat,
    pub pictures: &'a PictureCache,
    pub processor: &'a Processor,
    pub convention: Convention,
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
    let stage = Stage {
        task,
        chat: bench.chat,
        pictures: bench.pictures,
        processor: bench.processor,
        convention: bench.convention,
        options: bench.rollout,
    };
    let progress = Progress::start(&format!("evaluating {name}"), "question", 0, samples.len() as u64);
    let mut episodes = Vec::with_capacity(samples.len() * bench.options.samples);
    let numbered: Vec<(u64, &Sample)> = samples.iter().enumerate().map(|(i, s)| (i as u64, s)).collect();
    for chunk in numbered.chunks(bench.options.batch.max(1)) {
        if bench.interrupt.asked() {
            return Err(Interrupted::without_checkpoint().into());
        }
        episodes.extend(rollout::play(&stage, sampler, chunk, bench.options.samples, bench.options.seed, 0)?);
        let right = average(episodes.iter().map(|e| e.reward));
        progress.add(chunk.len() as u64);
        progress.note(format!("right {:.1} %", 100.0 * right));
    }
    progress.finish();
    for episode in &mut episodes {
        name.clone_into(&mut episode.task);
    }
    Ok(episodes)
}

/// A cell of table.json: the value in percent with its interval.
pub fn cell(share: Option<&stats::Estimate>) -> Value {
    match share {
        None => Value::Null,
        Some(s) => json!({"value": 100.0 * s.value, "low": 100.0 * s.low, "high": 100.0 * s.high, "n": s.n}),
    }
}

pub fn table(title: &str, rows: &[(String, Summary)], notes: &[String]) -> Value {
    json!({
        "title": title,
        "unit": "percent",
        "columns": ["right answers", "box contains the target", "box usable"],
        "rows": rows.iter().map(|(name, s)| json!({
            "name": name,
            "cells": [cell(Some(&s.accuracy)), cell(s.containment.as_ref()), cell(s.valid_box.as_ref())],
        })).collect::<Vec<_>>(),
        "notes": notes,
    })
}

/// The table for a terminal.
pub fn print_table(table: &Value) {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let empty = Vec::new();
    let rows = table["rows"].as_array().unwrap_or(&empty);
    let width = rows.iter().map(|r| text(&r["name"]).chars().count()).max().unwrap_or(4).max(4);
    println!("\n{}", text(&table["title"]));
    print!("{:width$}", "");
    for column in table["columns"].as_array().unwrap_or(&empty) {
        print!("  {:>24}", text(column));
    }
    println!();
    for row in rows {
        print!("{:width$}", text(&row["name"]));
        for cell in row["cells"].as_array().unwrap_or(&empty) {
            let shown = match cell["value"].as_f64() {
                Some(v) => format!(
                    "{v:5.1} % [{:4.1}, {:4.1}]",
                    cell["low"].as_f64().unwrap_or(f64::NAN),
                    cell["high"].as_f64().unwrap_or(f64::NAN)
                ),
                None => "-".to_owned(),
            };
            print!("  {shown:>24}");
        }
        println!();
    }
    for note in table["notes"].as_array().unwrap_or(&empty) {
        println!("{}", text(note));
    }
    println!();
}

/// `foveate eval CONFIG`.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load(&invocation.config, &invocation.overrides)?;
    ensure!(!plan.tasks.is_empty(), BadConfig("the config has no task; add a section [tasks.NAME]".into()));
    ensure!(plan.eval.samples > 0, BadConfig("eval.samples is 0, expected at least 1".into()));
    ensure!(
        invocation.start == Start::New,
        BadConfig("an evaluation keeps no checkpoint, so there is nothing to --resume".into())
    );
    ensure!(plan.data.limit != Some(0), BadConfig("data.limit is 0, which leaves no question to ask".into()));
    plan.rollout.validate()?;
    let file = &plan.data.test;
    let samples = data::read(file)?;
    let factor = Processor::load(&plan.model.path)?.budget.factor;
    let asked: Vec<Asked> = plan
        .tasks
        .iter()
        .map(|(name, options)| {
            let mut rows = options.asked(samples.clone());
            rows.truncate(plan.data.limit.unwrap_or(usize::MAX));
            let task = options.task(factor).with_context(|| format!("[tasks.{name}]"))?;
            check_rows(&*task, &rows, file).with_context(|| format!("[tasks.{name}]"))?;
            let truths = match options {
                TaskOptions::MultiImage(_) => mig_bench::truths(&rows, file)?,
                TaskOptions::Crop(_) => Vec::new(),
            };
            Ok(Asked { name, task, rows, truths })
        })
        .collect::<Result<_>>()?;
    if invocation.dry_run {
        invocation.show(&plan)?;
        for Asked { name, rows, .. } in &asked {
            eprintln!("{name}: {} questions, {} answers each", rows.len(), plan.eval.samples);
        }
        return Ok(());
    }
    let all: Vec<(&dyn Task, &[Sample])> = asked.iter().map(|a| (&*a.task, &a.rows[..])).collect();
    need::of_eval(&plan, &all)?.ensure_fits(&plan.model)?;
    let interrupt = Interrupt::install()?;
    let mut engine = Embedded::open(&plan.model, None)?;
    let (chat, pictures, processor) = (engine.chat.clone(), engine.pictures.clone(), engine.processor.clone());
    let bench = Bench {
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention: engine.convention,
        rollout: &plan.rollout,
        options: &plan.eval,
        interrupt: &interrupt,
    };
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let folder = RunFolder::create(&plan.eval.out)?;
    folder.begin(&config::to_toml(&plan)?, None)?;
    let (mut rows, mut by_task) = (Vec::new(), Vec::new());
    for (k, Asked { name, task, rows: samples, truths }) in asked.iter().enumerate() {
        let episodes = play_all(&bench, name, &**task, &mut engine, samples)?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        folder.write_episodes(k as u64, &records)?;
        by_task.extend(mig_bench::tables(name, &mig_bench::judged(&episodes, samples, truths)));
        rows.push(((*name).clone(), summarise(&episodes)));
    }
    let table = table(&format!("{} on {}", plan.model.path.display(), plan.data.test.display()), &rows, &[]);
    folder.save("table.json", &serde_json::to_vec_pretty(&table)?)?;
    if !by_task.is_empty() {
        folder.save(mig_bench::TABLES, &serde_json::to_vec_pretty(&by_task)?)?;
    }
    if invocation.json {
        let rows: serde_json::Map<String, Value> =
            rows.iter().map(|(n, s)| Ok((n.clone(), serde_json::to_value(s)?))).collect::<Result<_>>()?;
        let mut out = json!({"table": table, "rows": rows});
        if !by_task.is_empty() {
            out[mig_bench::KEY] = serde_json::to_value(&by_task)?;
        }
        println!("{out}");
    } else {
        print_table(&table);
        by_task.iter().for_each(|table| println!("{table}"));
    }
    Ok(())
}

/// What one `[tasks.NAME]` will ask.
struct Asked<'a> {
    name: &'a String,
    task: Box<dyn Task>,
    rows: Vec<Sample>,
    /// Row by row, where they are of MIG-Bench and answered in boxes.
    truths: Vec<Option<Truth>>,
}
