//! `foveate demo`: a whole story on this machine, from drawing the pictures to the report. `plates` is the default (MGPO), `mirg` the one
//! over several pictures.
//!
//! The runs are those of files in `configs/`; a demo only says where things are. What must stay true: an interrupted demo goes on when it is
//! started again, and a finished one is not touched unless its owner says so.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::json;

use crate::data::Sample;
use crate::engine::{self, ModelOptions};
use crate::episode::Episode;
use crate::eval::{self, Bench, EvalOptions, Figures};
use crate::progress::Progress;
use crate::report::{self, TABLE, Table};
use crate::rollout;
use crate::run::{Interrupt, Interrupted, Kind, RunFolder, Start, holds_run, peak_rss};
use crate::synth::make::{MakeOptions, Set, make};
use crate::tasks::Options as TaskOptions;

mod mirg;
mod plates;

/// Written last: its presence says that a demo is finished.
const SUMMARY: &str = "summary.json";

/// Which story.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Story {
    /// Look closer, then answer: MGPO against GRPO at a glance
    Mgpo,
    /// Reason across several pictures and point: trajectories, then RL with a reward for picture and object
    Mirg,
}

impl Story {
    /// Where it goes unless told otherwise.
    pub fn folder(self) -> &'static str {
        match self {
            Story::Mgpo => "runs/demo",
            Story::Mirg => "runs/demo_mirg",
        }
    }
}

/// What was asked for on the command line.
pub struct Request {
    pub story: Story,
    pub out: PathBuf,
    pub quick: bool,
    pub seed: u64,
    pub overwrite: bool,
    /// Who trains and answers.
    pub engine: engine::Options,
    pub json: bool,
}

pub fn main(request: &Request) -> Result<()> {
    if let engine::Options::Torch(options) = &request.engine {
        options.validate()?;
    }
    match request.story {
        Story::Mgpo => plates::main(request),
        Story::Mirg => mirg::main(request),
    }
}

/// Where a demo keeps what it makes.
struct Folders {
    out: PathBuf,
    eval: PathBuf,
}

impl Folders {
    /// Looked at first, so that an old demo in the same place is noticed before any work is done.
    fn open(request: &Request, runs: &[&str]) -> Result<Folders> {
        let out = request.out.clone();
        if request.overwrite {
            for part in runs.iter().chain(&["data", "eval"]).map(|part| out.join(part)) {
                if part.exists() {
                    ensure!(
                        written_here(&part),
                        "--overwrite removes an earlier demo, and this folder is of none; choose another --out: {}",
                        part.display()
                    );
                    std::fs::remove_dir_all(&part)
                        .with_context(|| format!("removing the earlier demo's {}", part.display()))?;
                }
            }
        }
        let eval = out.join("eval");
        ensure!(
            !eval.join(SUMMARY).exists(),
            "this folder holds a finished demo; look at its report.html, choose another --out, or add --overwrite: {}",
            out.display()
        );
        Ok(Folders { out, eval })
    }

    /// The folder of the evaluations, which are made anew where a demo goes on.
    fn evals(&self, plan: &str) -> Result<RunFolder> {
        let (evals, _) = RunFolder::open(&self.eval, Kind::Demo, start_of(&self.eval), plan)?;
        evals.begin(plan, None)?;
        Ok(evals)
    }

    /// Tables, summary, report: to files and to the terminal.
    fn finish(
        &self,
        evals: &RunFolder,
        tables: Vec<Table>,
        rows: &[Figures],
        seconds: f64,
        as_json: bool,
    ) -> Result<()> {
        evals.save(TABLE, &report::tables_json(&tables)?)?;
        let summary = json!({"rows": eval::summaries(rows), "seconds": seconds, "peak_memory_bytes": peak_rss()});
        evals.save(SUMMARY, &serde_json::to_vec_pretty(&summary)?)?;
        let options = report::Options {
            out: Some(self.out.join(report::REPORT)),
            episodes: report::EPISODES,
            ..report::Options::default()
        };
        let page = report::write(std::slice::from_ref(&self.out), &options)?.page;
        if as_json {
            println!("{}", json!({"table": tables[0], "by_task": tables[1..], "summary": summary, "report": page}));
        } else {
            eval::print_tables(&tables);
            println!("report: {}", page.display());
        }
        Ok(())
    }
}

/// Whether a part of a demo's folder is what a demo leaves there, or empty.
fn written_here(part: &Path) -> bool {
    let marks = ["set.json", "config.toml", "run.lock", "sft.jsonl"];
    marks.iter().any(|mark| part.join(mark).exists())
        || std::fs::read_dir(part).is_ok_and(|mut entries| entries.next().is_none())
}

/// The outcome of a training: an interrupted one says how the demo goes on.
fn trained<T>(result: Result<T>, request: &Request) -> Result<()> {
    match result {
        Err(error) if error.is::<Interrupted>() => Err(Interrupted::in_demo(&request.out).into()),
        result => result.map(|_| ()),
    }
}

/// A run that an interrupted demo left behind is gone on with.
fn start_of(folder: &Path) -> Start {
    if holds_run(folder) { Start::Resume } else { Start::New }
}

/// Draws the data set; the same seed gives the same pictures.
fn draw(request: &Request, set: Set, train: usize, test: usize) -> Result<PathBuf> {
    let data = request.out.join("data");
    let options = MakeOptions {
        set,
        out: data.clone(),
        train,
        test,
        size: set.size(),
        seed: request.seed,
        world: crate::synth::WorldOptions::default(),
        pairs: crate::synth::pairs::PairOptions::default(),
        overwrite: true,
    };
    let bar = Progress::start("drawing", "picture", 0, 0);
    make(&options, &|done, all| bar.at(done as u64, all as u64))?;
    bar.finish();
    Ok(data)
}

/// Plays the held-out questions with a model.
fn judge(
    name: &str,
    model: &Path,
    task: &TaskOptions,
    rollout: &rollout::Options,
    test: &[Sample],
    request: &Request,
    interrupt: &Interrupt,
) -> Result<Vec<Episode>> {
    let model = ModelOptions { path: model.to_owned(), ..ModelOptions::default() };
    let (mut engine, frontend) = engine::open_sampler(&request.engine, &model, true)?;
    let task = task.task(frontend.processor.budget.factor)?;
    let options = EvalOptions { seed: request.seed, ..EvalOptions::default() };
    let bench = Bench { frontend: &frontend, rollout, options: &options, interrupt };
    eval::play_all(&bench, name, &*task, &mut *engine, test)
}

fn minutes_and_memory(seconds: f64) -> String {
    format!(
        "{:.1} minutes and {:.2} GB at most, from drawing the pictures to this table.",
        seconds / 60.0,
        peak_rss() as f64 / 1e9
    )
}
