//! The default story: a small model that can find things and read close-ups, but does neither with much care, is trained twice from the
//! same weights, with the same steps and the same reward (is the answer right?): once answering at a glance (GRPO), once looking closer
//! first (MGPO). Then both, and the controls, on held-out questions.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{Folders, Request, draw, judge, minutes_and_memory, start_of, trained};
use crate::config;
use crate::data;
use crate::episode::Episode;
use crate::eval::items::{ITEMS, Items};
use crate::eval::{self, Figures};
use crate::progress;
use crate::rl::{self, Plan};
use crate::run::Interrupt;
use crate::synth::assets_dir;
use crate::synth::make::Set;
use crate::tasks::Options as TaskOptions;
use crate::tasks::crop::Options as CropOptions;
use crate::tasks::protocol::Protocol;

const GRPO: &str = include_str!("../../configs/demo_grpo.toml");
const MGPO: &str = include_str!("../../configs/demo_mgpo.toml");

/// How much of everything.
struct Scale {
    train: usize,
    test: usize,
    /// Overrides of both plans.
    plan: &'static [&'static str],
    /// The first held-out questions are asked every so many steps, for the report to show how the look at them changes.
    watch: (usize, u64),
}

const FULL: Scale = Scale { train: 480, test: 400, plan: &[], watch: (24, 10) };
const QUICK: Scale =
    Scale { train: 32, test: 24, plan: &["train.steps=3", "train.prompts=4", "train.group=4"], watch: (8, 1) };

pub fn main(request: &Request) -> Result<()> {
    let started = Instant::now();
    let scale = if request.quick { &QUICK } else { &FULL };
    let interrupt = Interrupt::install()?;
    let folders = Folders::open(request, &["grpo", "mgpo"])?;

    progress::say("1/4  drawing photographs with small numbered plates: what is on the plate under the fox?");
    let data = draw(request, Set::Plates, scale.train, scale.test)?;
    let test = data::read(&data.join("test.jsonl"))?;

    let base = assets_dir()?.join("nano");
    let grpo = plan("demo_grpo.toml", GRPO, request, "grpo", &data, scale)?;
    let mgpo = plan("demo_mgpo.toml", MGPO, request, "mgpo", &data, scale)?;
    progress::say("2/4  GRPO: answer at a glance, rewarded for the right answer");
    train(&grpo, &interrupt, request)?;
    progress::say(
        "3/4  MGPO: name a region, see it enlarged, answer; rewarded for the right answer, never for the box",
    );
    train(&mgpo, &interrupt, request)?;

    progress::say(&format!(
        "4/4  {} held-out questions: other photographs, other pictures of the things, other digits",
        test.len()
    ));
    let evals = folders.evals(&config::to_toml(&mgpo)?)?;
    let after_grpo = rl::newest_checkpoint(&grpo.train.out)?;
    let after_mgpo = rl::newest_checkpoint(&mgpo.train.out)?;
    let (one_turn, two_turns) = (looking(&grpo)?, looking(&mgpo)?);
    let entries: [(&str, &Path, Protocol); 7] = [
        ("base, one turn", &base, Protocol::OneTurn),
        ("base, two turns", &base, Protocol::TwoTurns),
        ("GRPO, one turn", &after_grpo, Protocol::OneTurn),
        ("MGPO, two turns", &after_mgpo, Protocol::TwoTurns),
        ("MGPO, its box elsewhere", &after_mgpo, Protocol::RandomCrop),
        ("MGPO, its box on the plate", &after_mgpo, Protocol::TrueCrop),
        ("MGPO, no crop shown", &after_mgpo, Protocol::FormatOnly),
    ];
    let mut rows: Vec<Figures> = Vec::new();
    let mut items = Items::default();
    for (k, (name, model, protocol)) in entries.iter().enumerate() {
        let of = if *protocol == Protocol::OneTurn { &one_turn } else { &two_turns };
        let task = TaskOptions::Crop(protocol.options(of, of.turns));
        let episodes = judge(name, model, &task, &mgpo.rollout, &test, request, &interrupt)?;
        let records: Vec<_> = episodes.iter().map(Episode::record).collect();
        evals.write_episodes(k as u64 + 1, &records)?;
        items.add(name, &episodes, &test, &[], &[]);
        let figures = Figures::of(name, &episodes, &test, &[]);
        rows.push(if protocol.is_control() { figures.without_boxes() } else { figures });
    }
    let seconds = started.elapsed().as_secs_f64();
    let notes = notes(&rows, &items, seconds);
    let title = format!("What number is on the plate? {} held-out questions, 95 % intervals", test.len());
    evals.save(ITEMS, &items.lines()?)?;
    folders.finish(&evals, vec![eval::table(&title, &rows, &notes)], &rows, seconds, request.json)
}

/// Trains, or goes on with a run of this demo that was interrupted.
fn train(plan: &Plan, interrupt: &Interrupt, request: &Request) -> Result<()> {
    trained(rl::train(plan, start_of(&plan.train.out), interrupt, &mut |_, _| {}), request)
}

fn plan(name: &str, text: &str, request: &Request, run: &str, data: &Path, scale: &Scale) -> Result<Plan> {
    let overrides: Vec<String> = scale.plan.iter().map(|s| (*s).to_owned()).collect();
    let mut plan: Plan = config::parse(text, &overrides).with_context(|| format!("in configs/{name}"))?;
    plan.model.path = assets_dir()?.join("nano");
    plan.engine.clone_from(&request.engine);
    plan.data.train = data.join("train.jsonl");
    plan.train.out = request.out.join(run);
    plan.train.seed = request.seed;
    // Nothing is chosen by these: the table at the end asks all of them of the last weights.
    plan.eval.rows = Some(data.join("test.jsonl"));
    (plan.eval.limit, plan.eval.every) = (Some(scale.watch.0), scale.watch.1);
    plan.resolve()
}

/// What a plan of this demo asks.
fn looking(plan: &Plan) -> Result<CropOptions> {
    match &plan.task {
        TaskOptions::Crop(options) => Ok(options.clone()),
        TaskOptions::MultiImage(_) => bail!("the plates are asked about one picture, and the plan is for several"),
    }
}

/// What the table means, in sentences with numbers.
fn notes(rows: &[Figures], items: &Items, seconds: f64) -> Vec<String> {
    let percent = |k: usize| 100.0 * rows[k].all.accuracy.value;
    let held = |k: usize| rows[k].all.containment.as_ref().map_or(f64::NAN, |c| 100.0 * c.value);
    let against =
        |a: usize, b: usize| items.difference(&rows[a].name, &rows[b].name).map_or(f64::NAN, |difference| difference.p);
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
        minutes_and_memory(seconds),
    ]
}
