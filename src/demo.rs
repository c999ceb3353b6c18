//! `foveate demo`: the whole story on this machine. A small model that can find things and read close-ups, but does neither
//! with much care, is trained twice from the same weights, with the same steps and the same reward (is the answer right?):
//! once answering at a glance (GRPO), once looking closer first (MGPO). Then both, and the controls, on held-out questions.
//!
//! The runs are those of `configs/demo_grpo.toml` and `configs/demo_mgpo.toml`; the demo only says where things are.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::config;
use crate::data::{self, Sample};
use crate::engine::embedded::{Embedded, Options as EngineOptions};
use crate::episode::Episode;
use crate::eval::{self, Bench, EvalOptions, Summary};
use crate::geometry::Size;
use crate::progress::{self, Progress};
use crate::report;
use crate::rl::{self, Plan};
use crate::rollout;
use crate::run::{Interrupt, Interrupted, RunFolder, Start, holds_run, peak_rss};
use crate::stats;
use crate::synth::assets_dir;
use crate::synth::make::{MakeOptions, Set, make};
use crate::tasks::Options as TaskOptions;
use crate::tasks::crop::{Crop, Options as CropOptions, Show};

/// Written last: its presence says that a demo is finished.
const SUMMARY: &str = "summary.json";

const GRPO: &str = include_str!("../configs/demo_grpo.toml");
const MGPO: &str = include_str!("../configs/demo_mgpo.toml");

/// How much of everything.
struct Scale {
    train: usize,
    test: usize,
    size: Size,
    /// Overrides of both plans.
    plan: &'static [&'static str],
}

const FULL: Scale = Scale { train: 480, test: 400, size: Size { width: 2016, height: 1512 }, plan: &[] };
const QUICK: Scale = Scale {
    train: 32,
    test: 24,
    size: Size { width: 2016, height: 1512 },
    plan: &["train.steps=3", "train.prompts=4", "train.group=4"],
};

pub fn main(out: &Path, quick: bool, seed: u64, overwrite: bool, as_json: bool) -> Result<()> {
    let started = Instant::now();
    let scale = if quick { &QUICK } else { &FULL };
    let interrupt = Interrupt::install()?;
    // Looked at first, so that an old demo in the same place is noticed before any work is done.
    let eval_folder = out.join("eval");
    if overwrite {
        for part in ["data", "grpo", "mgpo", "eval"].map(|part| out.join(part)) {
            if part.exists() {
                std::fs::remove_dir_all(&part)
                    .with_context(|| format!("removing the earlier demo's {}", part.display()))?;
            }
        }
    }
    ensure!(
        !eval_folder.join(SUMMARY).exists(),
        "this folder holds a finished demo; look at its report.html, choose another --out, or add --overwrite: {}",
        out.display()
    );

    progress::say("1/4  drawing photographs with small numbered plates: what is on the plate under the fox?");
    let data = draw(out, scale, seed)?;
    let test = data::read(&data.join("test.jsonl"))?;

    let base = assets_dir()?.join("nano");
    let grpo = plan("demo_grpo.toml", GRPO, out, "grpo", &data, scale, seed)?;
    let mgpo = plan("demo_mgpo.toml", MGPO, out, "mgpo", &data, scale, seed)?;
    progress::say("2/4  GRPO: answer at a glance, rewarded for the right answer");
    train(&grpo, &interrupt, out)?;
    progress::say(
        "3/4  MGPO: name a region, see it enlarged, answer; rewarded for the right answer, never for the box",
    );
    train(&mgpo, &interrupt, out)?;

    progress::say(&format!(
        "4/4  {} held-out questions: other photographs, other pictures of the things, other digits",
        test.len()
    ));
    let resolved = config::to_toml(&mgpo)?;
    let (evals, _) = RunFolder::open(&eval_folder, start_of(&eval_folder), &resolved)?;
    evals.begin(&resolved, None)?;
    let after_grpo = rl::newest_checkpoint(&grpo.train.out)?;
    let after_mgpo = rl::newest_checkpoint(&mgpo.train.out)?;
    let (one_turn, two_turns) = (looking(&grpo)?, looking(&mgpo)?);
    let showing = |show: Show| CropOptions { show, ..two_turns.clone() };
    let entries: Vec<(&str, &Path, CropOptions)> = vec![
        ("base, one turn", &base, one_turn.clone()),
        ("base, two turns", &base, two_turns.clone()),
        ("GRPO, one turn", &after_grpo, one_turn.clone()),
        ("MGPO, two turns", &after_mgpo, two_turns.clone()),
        ("MGPO, its box elsewhere", &after_mgpo, showing(Show::Random)),
        ("MGPO, its box on the plate", &after_mgpo, showing(Show::Target)),
        ("MGPO, no crop shown", &after_mgpo, showing(Show::Nothing)),
    ];
    let mut rows: Vec<(String, Summary)> = Vec::new();
    let mut right: Vec<Vec<bool>> = Vec::new();
    for (k, (name, model, task)) in entries.iter().enumerate() {
        let episodes = judge(name, model, task, &mgpo.rollout, &test, seed, &interrupt)?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        evals.write_episodes(k as u64 + 1, &records)?;
        right.push(episodes.iter().map(|e| e.right()).collect());
        let mut summary = eval::summarise(&episodes);
        if task.show != Show::Region {
            // A control changes what is shown for the box, not the box: its figures are those of the row above.
            (summary.containment, summary.valid_box) = (None, None);
        }
        rows.push((name.to_string(), summary));
    }
    let seconds = started.elapsed().as_secs_f64();
    let notes = notes(&rows, &right, seconds);
    let title = format!("What number is on the plate? {} held-out questions, 95 % intervals", test.len());
    let table = eval::table(&title, &rows, &notes);
    evals.save("table.json", &serde_json::to_vec_pretty(&table)?)?;
    let summary = summary(&rows, seconds);
    evals.save(SUMMARY, &serde_json::to_vec_pretty(&summary)?)?;
    let page = report::write(&[out.to_owned()], Some(&out.join("report.html")), report::EPISODES)?;
    if as_json {
        println!("{}", json!({"table": table, "summary": summary, "report": page}));
    } else {
        eval::print_table(&table);
        println!("report: {}", page.display());
    }
    Ok(())
}

/// Trains, or goes on with a run of this demo that was interrupted.
fn train(plan: &Plan, interrupt: &Interrupt, out: &Path) -> Result<()> {
    match rl::train(plan, start_of(&plan.train.out), interrupt, &mut |_, _| {}) {
        Err(error) if error.is::<Interrupted>() => Err(Interrupted::in_demo(out).into()),
        result => result.map(|_| ()),
    }
}

/// A run that an interrupted demo left behind is gone on with.
fn start_of(folder: &Path) -> Start {
    if holds_run(folder) { Start::Resume } else { Start::New }
}

/// Draws the data set; the same seed gives the same pictures.
fn draw(out: &Path, scale: &Scale, seed: u64) -> Result<PathBuf> {
    let data = out.join("data");
    let options = MakeOptions {
        set: Set::Plates,
        out: data.clone(),
        train: scale.train,
        test: scale.test,
        size: scale.size,
        seed,
        world: crate::synth::WorldOptions::default(),
        pairs: crate::synth::pairs::PairOptions::default(),
        overwrite: true,
    };
    let bar = Progress::start("drawing", "picture", 0, 0);
    make(&options, &|done, all| bar.at(done as u64, all as u64))?;
    bar.finish();
    Ok(data)
}

fn plan(name: &str, text: &str, out: &Path, run: &str, data: &Path, scale: &Scale, seed: u64) -> Result<Plan> {
    let overrides: Vec<String> = scale.plan.iter().map(|s| (*s).to_owned()).collect();
    let mut plan: Plan = config::parse(text, &overrides).with_context(|| format!("in configs/{name}"))?;
    plan.model.path = assets_dir()?.join("nano");
    plan.data.train = data.join("train.jsonl");
    plan.train.out = out.join(run);
    plan.train.seed = seed;
    plan.resolve()
}

/// What a plan of this demo asks.
fn looking(plan: &Plan) -> Result<CropOptions> {
    match &plan.task {
        TaskOptions::Crop(options) => Ok(options.clone()),
        TaskOptions::MultiImage(_) => bail!("the plates are asked about one picture, and the plan is for several"),
    }
}

fn judge(
    name: &str,
    model: &Path,
    task: &CropOptions,
    rollout: &rollout::Options,
    test: &[Sample],
    seed: u64,
    interrupt: &Interrupt,
) -> Result<Vec<Episode>> {
    let mut engine = Embedded::open(&EngineOptions { path: model.to_owned(), ..EngineOptions::default() }, None)?;
    let task = Crop::new(task.clone(), engine.processor.budget.factor)?;
    let (chat, pictures, processor) = (engine.chat.clone(), engine.pictures.clone(), engine.processor.clone());
    let options = EvalOptions { seed, ..EvalOptions::default() };
    let bench = Bench {
        chat: &chat,
        pictures: &pictures,
        processor: &processor,
        convention: engine.convention,
        rollout,
        options: &options,
        interrupt,
    };
    eval::play_all(&bench, name, &task, &mut engine, test)
}

/// What the table means, in sentences with numbers.
fn notes(rows: &[(String, Summary)], right: &[Vec<bool>], seconds: f64) -> Vec<String> {
    let percent = |k: usize| 100.0 * rows[k].1.accuracy.value;
    let held = |k: usize| rows[k].1.containment.as_ref().map_or(f64::NAN, |c| 100.0 * c.value);
    let against = |a: usize, b: usize| stats::paired(&right[a], &right[b]).p;
    vec![
        format!(
            "MGPO against the base: {:+.1} points (McNemar p = {:.1e}); against one-turn GRPO: {:+.1} points (p = {:.1e}). Guessing gives 10 %.",
            percent(3) - percent(1),
            against(3, 1),
            percent(3) - percent(2),
            against(3, 2)
        ),
        format!(
            "Its box contains the plate in {:.1} % of first turns, before training in {:.1} %; no box was ever rewarded.",
            held(3),
            held(1)
        ),
        format!(
            "{:.1} minutes and {:.2} GB at most, from drawing the pictures to this table.",
            seconds / 60.0,
            peak_rss() as f64 / 1e9
        ),
    ]
}

fn summary(rows: &[(String, Summary)], seconds: f64) -> Value {
    let rows: serde_json::Map<String, Value> = rows.iter().map(|(name, s)| (name.clone(), json!(s))).collect();
    json!({"rows": rows, "seconds": seconds, "peak_memory_bytes": peak_rss()})
}
