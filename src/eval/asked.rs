//! The rows of an evaluation's table: each task of the config, or each protocol of each task, with the questions that it asks.
//!
//! What must stay true: what stands in the config is what is played; settings that the protocols decide are refused where they were written,
//! never overruled in silence.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::{Bench, EvalOptions, Plan, play_all};
use crate::config::BadConfig;
use crate::data::Sample;
use crate::engine::Sampler;
use crate::episode::Episode;
use crate::geometry::{BBox, Size};
use crate::reward::mig::Truth;
use crate::tasks::crop::{Options as CropOptions, Show};
use crate::tasks::protocol::Protocol;
use crate::tasks::{Options as TaskOptions, Task};

/// One row of the table.
pub struct Asked {
    /// What it is called there.
    pub name: String,
    /// The `[tasks.NAME]` that it belongs to.
    pub of: String,
    pub protocol: Option<(Protocol, CropOptions)>,
    pub task: Box<dyn Task>,
    /// Shared among the protocols of a task, as long as all can ask them.
    pub samples: Arc<Vec<Sample>>,
    /// Sample by sample, where they are of MIG-Bench and answered in boxes.
    pub truths: Vec<Option<Truth>>,
}

/// What the policy named under `two_turns`, by member of the group and id of the row.
pub type Regions = Vec<HashMap<String, BBox>>;

impl Plan {
    /// Every row of the table, in order. `rows` says what a task asks; `sizes` how large pictures are, as far as that is known.
    ///
    /// # Errors
    /// Options and protocols that cannot be played, named.
    pub fn asks(
        &self,
        factor: u32,
        sizes: &HashMap<PathBuf, Size>,
        rows: &dyn Fn(&TaskOptions) -> Result<Vec<Sample>>,
    ) -> Result<Vec<Asked>> {
        let protocols = &self.eval.protocols;
        if let Some(needs) = protocols.iter().find(|p| p.needs_regions() && !protocols.contains(&Protocol::TwoTurns)) {
            bail!(BadConfig(format!(
                "eval.protocols: {} shows the regions that are named under two_turns, which is not in the list",
                needs.name()
            )));
        }
        let twice = protocols.iter().enumerate().find(|(k, protocol)| protocols[..*k].contains(protocol));
        if let Some((_, protocol)) = twice {
            bail!(BadConfig(format!("eval.protocols has {} twice", protocol.name())));
        }
        let mut all = Vec::new();
        for (name, options) in &self.tasks {
            let within = || format!("[tasks.{name}]");
            let mut samples = rows(options)?;
            samples.truncate(self.data.limit.unwrap_or(usize::MAX));
            let samples = Arc::new(samples);
            if protocols.is_empty() {
                let task = options.task(factor).with_context(within)?;
                all.push(Asked { name: name.clone(), of: name.clone(), protocol: None, task, samples, truths: vec![] });
                continue;
            }
            let base = base(options).with_context(within)?;
            for &protocol in protocols {
                // Until something was named, all of the picture stands for it: so a prompt with a picture and a crop has its greatest length.
                let whole = |row: &Sample| Some((row.id.clone(), sizes.get(row.images.first()?)?.bounds()));
                let regions =
                    if protocol.needs_regions() { samples.iter().filter_map(whole).collect() } else { HashMap::new() };
                let task = protocol.task(base, self.eval.free_turns, factor, regions).with_context(within)?;
                let own = protocol.name();
                let called = if self.tasks.len() == 1 { own.to_owned() } else { format!("{name}: {own}") };
                all.push(Asked {
                    name: called,
                    of: name.clone(),
                    protocol: Some((protocol, base.clone())),
                    task,
                    samples: Arc::clone(&samples),
                    truths: vec![],
                });
            }
        }
        Ok(all)
    }
}

/// The options that protocols are made from.
fn base(options: &TaskOptions) -> Result<&CropOptions> {
    let TaskOptions::Crop(options) = options else {
        bail!(BadConfig(
            "eval.protocols are for tasks of one picture (kind = \"crop\"); take the key out, or the task".into()
        ));
    };
    let default = CropOptions::default();
    let decided = [
        ("turns", options.turns != default.turns),
        ("free", options.free != default.free),
        ("show", options.show != Show::Region),
    ];
    let written = decided.iter().find(|(_, written)| *written);
    ensure!(
        written.is_none(),
        BadConfig(format!(
            "eval.protocols say how many turns there are and what is shown; take out the key {}",
            written.map_or("", |(key, _)| key)
        ))
    );
    Ok(options)
}

/// What was named in these episodes.
pub fn regions(episodes: &[Episode], members: usize) -> Regions {
    let mut all = vec![HashMap::new(); members];
    for episode in episodes {
        if let (Some(of), Some(named)) = (all.get_mut(episode.member), episode.first_box()) {
            of.insert(episode.id.clone(), named);
        }
    }
    all
}

impl Asked {
    /// Plays it. `regions` is what was named under `two_turns` of the same task.
    ///
    /// # Errors
    /// Those of [`play_all`].
    pub fn play(
        &self,
        bench: &Bench,
        free_turns: usize,
        sampler: &mut dyn Sampler,
        regions: &[HashMap<String, BBox>],
    ) -> Result<Vec<Episode>> {
        let Some((protocol, base)) = self.protocol.as_ref().filter(|(protocol, _)| protocol.needs_regions()) else {
            return play_all(bench, &self.name, &*self.task, sampler, &self.samples);
        };
        // Each member of a group named a region of its own, so each is asked by itself, with a random stream of its own.
        let mut all = Vec::new();
        for (member, named) in regions.iter().enumerate() {
            let task = protocol.task(base, free_turns, bench.frontend.processor.budget.factor, named.clone())?;
            let seed = bench.options.seed.wrapping_add(member as u64);
            let options = EvalOptions { samples: 1, seed, ..bench.options.clone() };
            let bench = Bench { options: &options, ..*bench };
            let mut episodes = play_all(&bench, &self.name, &*task, sampler, &self.samples)?;
            episodes.iter_mut().for_each(|episode| episode.member = member);
            all.extend(episodes);
        }
        all.sort_by_key(|episode| (episode.group, episode.member));
        Ok(all)
    }
}
