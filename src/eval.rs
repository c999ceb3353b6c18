//! Tasks x splits -> a table. The same turn loop as training, with its own sampling, and an interval on every number. Rows of MIG-Bench
//! get the benchmark's own tables by task (`eval/mig_bench.rs`).

pub mod benchmarks;
pub mod mig_bench;
mod rows;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::chat::{Chat, Convention};
use crate::config::{self, BadConfig};
use crate::data::{self, Format, Read, ReadAs, Sample};
use crate::engine::{self, Frontend, Sampler, embedded};
use crate::episode::{BoxOutcome, Episode, Stop};
use crate::image::{PictureCache, Processor};
use crate::need;
use crate::progress::Progress;
use crate::report::{self, Cell, Row, TABLE, Table, Unit};
use crate::reward::mig::Truth;
use crate::rollout::{self, Stage};
use crate::run::{Interrupt, Interrupted, Invocation, RunFolder, Start};
use crate::stats;
use crate::tasks::{Options as TaskOptions, Task};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub model: embedded::Options,
    #[serde(default, skip_serializing_if = "engine::Options::is_embedded")]
    pub engine: engine::Options,
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
    /// For boxes on several pictures: answers that name the right pictures, and the mean IoU. `accuracy` is then the joint one: the
    /// right picture and an IoU of at least 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub right_image: Option<stats::Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iou: Option<stats::Estimate>,
}

/// One row of the tables: the figures of all questions, and of those of each kind, where the rows say of which they are.
#[derive(Clone, Debug)]
pub struct Figures {
    pub name: String,
    pub all: Summary,
    pub by_task: Vec<(String, Summary)>,
}

impl Figures {
    /// Of the episodes that [`play_all`] returned for these samples.
    pub fn of(name: &str, episodes: &[Episode], samples: &[Sample]) -> Figures {
        let mut by_task: Vec<(String, Vec<&Episode>)> = Vec::new();
        for episode in episodes {
            let Some(task) = samples.get(episode.group as usize).and_then(|sample| sample.task.clone()) else {
                continue;
            };
            match by_task.iter_mut().find(|(name, _)| *name == task) {
                Some((_, of_task)) => of_task.push(episode),
                None => by_task.push((task, vec![episode])),
            }
        }
        let by_task = by_task.into_iter().map(|(task, episodes)| (task, summarise(episodes))).collect();
        Figures { name: name.to_owned(), all: summarise(episodes), by_task }
    }
}

/// A box holds a target when at least this share of the target's area lies in it: whole, up to rounding outward.
const HOLDS: f64 = 0.95;

/// Whether the first grounding turn of an episode names a region that contains the target; None without target or grounding.
pub fn contains_target(episode: &Episode) -> Option<bool> {
    let target = episode.targets.first()?;
    episode.turns.iter().find(|t| t.outcome.is_some())?;
    Some(episode.first_box().is_some_and(|b| b.contains_fraction(&target.bbox) >= HOLDS))
}

pub fn summarise<'a>(episodes: impl IntoIterator<Item = &'a Episode>) -> Summary {
    let episodes: &[&Episode] = &episodes.into_iter().collect::<Vec<_>>();
    let share = |items: Vec<(u64, bool)>| (!items.is_empty()).then(|| share_by_question(&items));
    let right = Episode::right;
    let parts = |name: &str| -> Vec<(u64, f64)> {
        episodes.iter().filter_map(|e| Some((e.group, e.parts.get(name)?))).collect()
    };
    let grounded: Vec<(&Episode, BoxOutcome)> =
        episodes.iter().filter_map(|&e| e.turns.iter().find_map(|t| t.outcome).map(|o| (e, o))).collect();
    let held: Vec<(&Episode, bool)> = episodes.iter().filter_map(|&e| contains_target(e).map(|c| (e, c))).collect();
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
    let areas: Vec<f64> = episodes.iter().copied().filter_map(box_area_share).collect();
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
        // Where several pictures are asked for, the part is their F1; right are only all of them.
        right_image: share(parts("image").into_iter().map(|(question, f1)| (question, f1 > 1.0 - 1e-9)).collect()),
        iou: {
            let (questions, ious): (Vec<u64>, Vec<f64>) = parts("iou").into_iter().unzip();
            (!ious.is_empty()).then(|| stats::clustered_mean(&ious, &questions))
        },
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

/// The value in percent with its interval.
fn cell(estimate: Option<&stats::Estimate>) -> Cell {
    let Some(e) = estimate else { return Cell::default() };
    let percent = |share: f64| 100.0 * share;
    Cell::from(stats::Estimate { value: percent(e.value), low: percent(e.low), high: percent(e.high), n: e.n })
}

/// What stands in a column of a table.
type Figure = (&'static str, fn(&Summary) -> Option<&stats::Estimate>);

const ANSWERS: &[Figure] = &[
    ("right answers", |s| Some(&s.accuracy)),
    ("box contains the target", |s| s.containment.as_ref()),
    ("box usable", |s| s.valid_box.as_ref()),
];
const BOXES: &[Figure] = &[
    ("right picture and IoU ≥ 0.5", |s| Some(&s.accuracy)),
    ("right picture", |s| s.right_image.as_ref()),
    ("mean IoU", |s| s.iou.as_ref()),
];

fn figures_of<'a>(mut summaries: impl Iterator<Item = &'a Summary>) -> &'static [Figure] {
    if summaries.any(|s| s.iou.is_some()) { BOXES } else { ANSWERS }
}

/// All questions: a row each, the main figures.
pub fn table(title: &str, rows: &[Figures], notes: &[String]) -> Table {
    let columns = figures_of(rows.iter().map(|row| &row.all));
    Table {
        title: title.to_owned(),
        columns: columns.iter().map(|(heading, _)| (*heading).to_owned()).collect(),
        rows: rows
            .iter()
            .map(|row| Row {
                name: row.name.clone(),
                cells: columns.iter().map(|(_, of)| cell(of(&row.all))).collect(),
                about: String::new(),
            })
            .collect(),
        notes: notes.to_vec(),
        unit: Some(Unit::Percent),
    }
}

/// Where the questions are of several kinds: each of the main figures by kind.
pub fn tables_by_task(rows: &[Figures]) -> Vec<Table> {
    let mut tasks: Vec<&str> = Vec::new();
    for (task, _) in rows.iter().flat_map(|row| &row.by_task) {
        if !tasks.contains(&task.as_str()) {
            tasks.push(task);
        }
    }
    if tasks.len() < 2 {
        return Vec::new();
    }
    let table = |(heading, of): &Figure| {
        let cell_of = |row: &Figures, task: &str| {
            cell(row.by_task.iter().find(|(name, _)| name == task).and_then(|(_, summary)| of(summary)))
        };
        let rows: Vec<Row> = rows
            .iter()
            .map(|row| Row {
                name: row.name.clone(),
                cells: tasks.iter().map(|task| cell_of(row, task)).collect(),
                about: String::new(),
            })
            .collect();
        let columns = tasks.iter().map(|task| task.replace('_', " ")).collect();
        Table { title: format!("{heading}, by task"), columns, rows, notes: Vec::new(), unit: Some(Unit::Percent) }
    };
    let shown = figures_of(rows.iter().map(|row| &row.all)).iter().map(table);
    // Containment and boxes mean nothing where nobody was asked for a box.
    shown.filter(|table| table.rows.iter().flat_map(|row| &row.cells).any(|cell| cell.value.is_some())).collect()
}

/// The tables for a terminal, on stdout.
pub fn print_tables(tables: &[Table]) {
    for table in tables {
        println!("\n{table}");
    }
}

/// The figures of each row by its name, for programs to read.
pub fn summaries(rows: &[Figures]) -> Value {
    let row = |row: &Figures| {
        let by_task: serde_json::Map<String, Value> = row.by_task.iter().map(|(t, s)| (t.clone(), json!(s))).collect();
        let mut value = json!(row.all);
        if by_task.len() > 1 {
            value["by_task"] = by_task.into();
        }
        (row.name.clone(), value)
    };
    Value::Object(rows.iter().map(row).collect())
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
    let Read { samples, report, .. } = plan.data.read_as().good(file)?;
    ensure!(!samples.is_empty(), "reading data: {}: {}", report.faults().unwrap_or_default(), file.display());
    let mut unasked = rows::bad(&report);
    let factor = Processor::load(&plan.model.path)?.budget.factor;
    let mut asked: Vec<Asked> = plan
        .tasks
        .iter()
        .map(|(name, options)| {
            let mut rows = options.asked(samples.clone());
            rows.truncate(plan.data.limit.unwrap_or(usize::MAX));
            let task = options.task(factor).with_context(|| format!("[tasks.{name}]"))?;
            unasked.extend(rows::keep_askable(name, &*task, &mut rows, file)?);
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
        rows::say(&unasked);
        return Ok(());
    }
    // Headers were read; what is damaged behind them would stop the evaluation where it is met.
    let every: Vec<&Sample> = asked.iter().flat_map(|asked| &asked.rows).collect();
    let damaged = data::damaged(&every);
    for Asked { name, rows, truths, .. } in &mut asked {
        unasked.extend(rows::leave_out(name, rows, truths, &damaged, file)?);
    }
    rows::say(&unasked);
    let all: Vec<(&dyn Task, &[Sample])> = asked.iter().map(|a| (&*a.task, &a.rows[..])).collect();
    if plan.engine.is_embedded() {
        need::of_eval(&plan, &all)?.ensure_fits(&plan.model)?;
    }
    let interrupt = Interrupt::install()?;
    let mut engine = engine::open(&plan.engine, &plan.model, None, false)?;
    let Frontend { chat, pictures, processor, convention } = engine.frontend();
    let bench = Bench {
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention,
        rollout: &plan.rollout,
        options: &plan.eval,
        interrupt: &interrupt,
    };
    // Claimed only now that everything a person can get wrong has been read: a failed start leaves no folder behind.
    let folder = RunFolder::create(&plan.eval.out)?;
    folder.begin(&config::to_toml(&plan)?, None)?;
    let (mut rows, mut of_bench) = (Vec::new(), Vec::new());
    for (k, Asked { name, task, rows: samples, truths }) in asked.iter().enumerate() {
        let episodes = play_all(&bench, name, &**task, &mut *engine, samples)?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        folder.write_episodes(k as u64, &records)?;
        of_bench.extend(mig_bench::tables(name, &mig_bench::judged(&episodes, samples, truths)));
        of_bench.extend(benchmarks::tables(name, &episodes, samples));
        rows.push(Figures::of(name, &episodes, samples));
    }
    let title = format!("{} on {}", plan.model.path.display(), plan.data.test.display());
    let mut tables = vec![table(&title, &rows, &rows::notes(&unasked))];
    tables.extend(if of_bench.is_empty() { tables_by_task(&rows) } else { of_bench });
    folder.save(TABLE, &report::tables_json(&tables)?)?;
    if invocation.json {
        println!(
            "{}",
            json!({"table": tables[0], "by_task": tables[1..], "rows": summaries(&rows), "unasked": unasked})
        );
    } else {
        print_tables(&tables);
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
