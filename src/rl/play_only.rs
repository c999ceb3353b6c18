//! `foveate rollout CONFIG`: plays what a run of RL would play, and trains nothing.

use anyhow::Result;
use serde_json::json;

use super::metrics::count;
use super::{Loop, Plan, Ready, State};
use crate::config;
use crate::data::{self, Order};
use crate::engine;
use crate::engine::recorded::Recorded;
use crate::episode::Episode;
use crate::eval;
use crate::need;
use crate::progress::{Progress, say};
use crate::run::{Interrupt, Interrupted, Invocation, Kind, Metrics, RunFolder, of_answers};

/// `foveate rollout CONFIG`: plays one step's worth of questions per step and writes the episodes; nothing is trained.
pub fn main(invocation: &Invocation) -> Result<()> {
    let plan: Plan = config::load_for::<Plan>("rl", &invocation.config, &invocation.overrides)?.resolve()?;
    let Ready { rows, task, objective, .. } = Ready::of(&plan, false)?;
    if invocation.dry_run {
        invocation.show(&plan)?;
        eprintln!("{} rows; {} episodes a step", rows.len(), plan.train.prompts * plan.train.group);
        return Ok(());
    }
    let written_plan = config::to_toml(&plan)?;
    RunFolder::check(&plan.train.out, Kind::Rollout, invocation.start, &written_plan)?;
    if plan.engine.is_embedded() {
        need::of_rl(&plan, &*task, &rows, false)?.ensure_fits(&plan.model)?;
    }
    let interrupt = Interrupt::install()?;
    let (mut engine, frontend) = engine::open_sampler(&plan.engine, &plan.model, data::shows_pictures(&rows))?;
    engine.about().iter().for_each(|about| say(about));
    let context = Loop { plan: &plan, objective: &objective, task: &*task, frontend: &frontend };
    let (folder, _) = RunFolder::open(&plan.train.out, Kind::Rollout, invocation.start, &written_plan)?;
    // A record that cannot be read is told of before anything is taken back.
    let mut engine = Recorded::open(&mut *engine, folder.root(), &of_answers(&written_plan)?, &plan.model.path)?;
    folder.begin(&written_plan, None)?;
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
            return Err(Interrupted::among_answers(&plan.train.out).into());
        }
    }
    engine.finish()?;
    bar.finish();
    if invocation.json {
        println!("{}", json!({"run": plan.train.out}));
    } else {
        println!("{}", plan.train.out.display());
    }
    Ok(())
}
