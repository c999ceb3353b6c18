//! The story over several pictures (MIRG-RL): reasoning traces are composed from annotation, a small model learns to write them before its
//! boxes (SFT), and RL with a reward for the right picture and one for the right place goes on from there. Beside it stand what it is
//! compared with: answers without reasoning, and RL without either half of the reward.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{Folders, Request, draw, judge, minutes_and_memory, start_of, trained};
use crate::config;
use crate::data;
use crate::episode::Episode;
use crate::eval::items::{ITEMS, Items};
use crate::eval::{self, Figures};
use crate::progress;
use crate::rl;
use crate::run::Interrupt;
use crate::sft;
use crate::synth::assets_dir;
use crate::synth::make::Set;
use crate::synth::trajectories;

const SFT: &str = include_str!("../../configs/mirg_sft.toml");
const RL: &str = include_str!("../../configs/mirg_rl.toml");

/// How much of everything.
struct Scale {
    train: usize,
    test: usize,
    sft: &'static [&'static str],
    rl: &'static [&'static str],
    /// The first held-out questions are asked every so many steps of RL, for the report to show how the answers change.
    watch: (usize, u64),
}

const FULL: Scale = Scale { train: 3600, test: 360, sft: &[], rl: &[], watch: (24, 20) };
const QUICK: Scale = Scale {
    train: 60,
    test: 24,
    sft: &["train.steps=3", "train.batch=8"],
    rl: &["train.steps=2", "train.prompts=2", "train.group=4"],
    watch: (6, 1),
};

/// Share of the rows that the fine-tuning learns from; RL has the others: of fewer than two thousand it learns the rows by heart (LOG.md).
const SHARE: f64 = 0.34;

/// The runs: folder, what it is called in the table, what it changes in its config.
const SFTS: [(&str, &str, &[&str]); 2] =
    [("sft_direct", "SFT, answers alone", &["data.reason=false"]), ("sft", "SFT, trajectories", &["data.reason=true"])];
const RLS: [(&str, &str, &[&str]); 3] = [
    ("rl_no_image", "RL, no reward for the picture", &["task.weights.image=0", "task.reward.gate=none"]),
    ("rl_no_object", "RL, no reward for the object", &["task.weights.object=0"]),
    ("rl", "RL, both", &[]),
];

pub fn main(request: &Request) -> Result<()> {
    let started = Instant::now();
    let scale = if request.quick { &QUICK } else { &FULL };
    let interrupt = Interrupt::install()?;
    let runs: Vec<&str> = SFTS.iter().chain(&RLS).map(|(run, ..)| *run).chain(["traces"]).collect();
    let folders = Folders::open(request, &runs)?;

    progress::say("1/5  drawing questions over several pictures: the same object, what changed, where it went");
    let data = draw(request, Set::Pairs, scale.train, scale.test)?;
    let test = data::read(&data.join("test.jsonl"))?;

    progress::say("2/5  composing reasoning traces from the annotation");
    let traces = build_traces(request, &data, &interrupt)?;

    let base = assets_dir()?.join("nano");
    let mut models: Vec<(&str, PathBuf)> = vec![("base", base.clone())];
    progress::say("3/5  fine-tuning: answers alone, and with the traces before them");
    for (run, name, changes) in SFTS {
        let mut plan: sft::Plan = parsed("mirg_sft.toml", SFT, scale.sft, changes)?;
        plan.model.path.clone_from(&base);
        plan.engine.clone_from(&request.engine);
        plan.data.train = Some(traces.join("sft.jsonl"));
        (plan.train.out, plan.train.seed) = (request.out.join(run), request.seed);
        trained(sft::train(&plan, start_of(&plan.train.out), &interrupt), request)?;
        models.push((name, rl::newest_checkpoint(&plan.train.out)?));
    }
    progress::say("4/5  RL from there: rewarded for the right picture and for the right place, or for one of the two");
    let from = rl::newest_checkpoint(&request.out.join("sft"))?;
    let mut full = None;
    for (run, name, changes) in RLS {
        let mut plan: rl::Plan = parsed("mirg_rl.toml", RL, scale.rl, changes)?;
        plan.model.path.clone_from(&from);
        plan.engine.clone_from(&request.engine);
        plan.data.train = traces.join("rl.jsonl");
        (plan.train.out, plan.train.seed) = (request.out.join(run), request.seed);
        // Nothing is chosen by these: the table at the end asks all of them of the last weights.
        plan.eval.rows = Some(data.join("test.jsonl"));
        (plan.eval.limit, plan.eval.every) = (Some(scale.watch.0), scale.watch.1);
        let plan = plan.resolve()?;
        trained(rl::train(&plan, start_of(&plan.train.out), &interrupt, &mut |_, _| {}), request)?;
        models.push((name, rl::newest_checkpoint(&plan.train.out)?));
        full = Some(plan);
    }
    let Some(full) = full else { bail!("the story has no RL") };

    progress::say(&format!("5/5  {} held-out questions: other photographs, other pictures of the things", test.len()));
    let evals = folders.evals(&config::to_toml(&full)?)?;
    let mut rows: Vec<Figures> = Vec::new();
    let mut items = Items::default();
    // Greedy, as benchmarks of grounding are.
    let rollout = crate::rollout::Options { temperature: 0.0, ..full.rollout.clone() };
    for (k, (name, model)) in models.iter().enumerate() {
        let episodes = judge(name, model, &full.task, &rollout, &test, request, &interrupt)?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        evals.write_episodes(k as u64 + 1, &records)?;
        items.add(name, &episodes, &test, &[], &[]);
        rows.push(Figures::of(name, &episodes, &test, &[]));
    }
    let seconds = started.elapsed().as_secs_f64();
    let title = format!("Which picture, and where in it? {} held-out questions, 95 % intervals", test.len());
    let mut tables = vec![eval::table(&title, &rows, &notes(&items, seconds))];
    tables.extend(eval::tables_by_task(&rows));
    evals.save(ITEMS, &items.lines()?)?;
    folders.finish(&evals, tables, &rows, seconds, request.json)
}

/// A plan of `configs/`, changed for this run.
fn parsed<T: serde::de::DeserializeOwned>(name: &str, text: &str, scale: &[&str], changes: &[&str]) -> Result<T> {
    let overrides: Vec<String> = scale.iter().chain(changes).map(|s| (*s).to_owned()).collect();
    config::parse(text, &overrides).with_context(|| format!("in configs/{name}"))
}

/// Traces for some of the rows; the same seed gives the same.
fn build_traces(request: &Request, data: &Path, interrupt: &Interrupt) -> Result<PathBuf> {
    let out = request.out.join("traces");
    if out.exists() {
        std::fs::remove_dir_all(&out).with_context(|| format!("removing the earlier traces: {}", out.display()))?;
    }
    let options = trajectories::Options {
        rows: data.join("train.jsonl"),
        out: out.clone(),
        per_task: None,
        share: SHARE,
        seed: request.seed,
        // A model this small loses its way in long lists.
        teacher: trajectories::Teacher::Rules(trajectories::Detail::Brief),
        episodes: None,
    };
    let report = trajectories::build(&options, interrupt)?;
    progress::say(&format!("     {} rows have a trace, {} are kept for RL", report.kept, report.for_rl));
    Ok(out)
}

/// What the table means, in sentences with numbers.
fn notes(items: &Items, seconds: f64) -> Vec<String> {
    let against = |a: &str, b: &str| -> Option<String> {
        let difference = items.difference(a, b)?;
        Some(format!("{:+.1} points (McNemar p = {:.1e})", 100.0 * difference.estimate.value, difference.p))
    };
    let gaps: Option<String> = (|| {
        Some(format!(
            "Trajectories and RL against SFT with trajectories: {}; against SFT of answers alone: {}; against the base: {}.",
            against("RL, both", "SFT, trajectories")?,
            against("RL, both", "SFT, answers alone")?,
            against("RL, both", "base")?
        ))
    })();
    let halves: Option<String> = (|| {
        Some(format!(
            "Both halves of the reward against the object's alone: {}; against the picture's alone: {}.",
            against("RL, both", "RL, no reward for the picture")?,
            against("RL, both", "RL, no reward for the object")?
        ))
    })();
    gaps.into_iter().chain(halves).chain([minutes_and_memory(seconds)]).collect()
}
