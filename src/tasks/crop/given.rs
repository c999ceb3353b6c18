//! The question in one turn, with a region of the picture given beside it, instead of it, or not at all: what is left of a conversation
//! when the policy's own words are taken out of it. For evaluations ([`Protocol`](crate::tasks::protocol::Protocol)); nothing is trained on it.
//!
//! It hides where regions come from: whoever builds it says which region belongs to which row. What must stay true: wording, budget and
//! judge are those of the conversation that it is compared with; a row without a region is asked with its whole picture.

use std::collections::HashMap;

use anyhow::{Result, anyhow};

use super::{Crop, Options, answers};
use crate::chat::{Action, Part};
use crate::config::BadConfig;
use crate::data::Sample;
use crate::episode::{Episode, Stop};
use crate::geometry::{BBox, Size, View};
use crate::reward::Parts;
use crate::tasks::{Context, Opening, Reading, Reply, Shown, Task};

pub struct Given {
    crop: Crop,
    direct: String,
    given: String,
    /// Whether the picture is shown beside its region.
    whole: bool,
    /// By the row's id, in original pixels.
    regions: HashMap<String, BBox>,
}

impl Given {
    /// `factor` is what both sides of a view are multiples of.
    ///
    /// # Errors
    /// Options that cannot work, and a template without the slots `direct` and `given`.
    pub fn new(options: &Options, factor: u32, whole: bool, regions: HashMap<String, BBox>) -> Result<Given> {
        let crop = Crop::new(Options { turns: 1, free: false, ..options.clone() }, factor)?;
        let slot = |name: &str, text: &Option<String>| {
            let missing = || {
                anyhow!(BadConfig(format!(
                    "the template {} has no slot `{name}`, with which a question is asked without a conversation; copy it from the \
                     built-in templates",
                    options.template
                )))
            };
            text.clone().ok_or_else(missing)
        };
        let (direct, given) = (slot("direct", &crop.template.direct)?, slot("given", &crop.template.given)?);
        Ok(Given { crop, direct, given, whole, regions })
    }

    /// A slot with these views in the places of its images.
    fn shown(&self, slot: &str, sample: &Sample, views: Vec<View>) -> Shown {
        let parts: Vec<Part> = self.crop.template.fill(slot, &self.crop.fill(sample, true, ""));
        Shown { parts, views }
    }
}

impl Task for Given {
    fn name(&self) -> &'static str {
        "answer"
    }

    fn max_turns(&self) -> usize {
        1
    }

    fn check(&self, sample: &Sample) -> Result<()> {
        self.crop.check(sample)
    }

    fn open(&self, sample: &Sample, sizes: &[Size]) -> Result<Opening> {
        let &[size] = sizes else { return self.crop.open(sample, sizes) };
        let whole = View::whole(0, size, self.crop.budget)?;
        let region = self.regions.get(&sample.id).map(|region| self.crop.view_of(*region, 0, size)).transpose()?;
        let user = match region {
            Some(region) if self.whole => self.shown(&self.given, sample, vec![whole, region]),
            Some(region) => self.shown(&self.direct, sample, vec![region]),
            None => self.shown(&self.direct, sample, vec![whole]),
        };
        // The template's system message promises a conversation that is not held.
        Ok(Opening { system: None, user })
    }

    fn reply(&self, _: &Context, action: &Action) -> Result<Reply> {
        let stop = if answers(action) { Stop::Answered } else { Stop::TurnLimit };
        Ok(Reply::Close(stop, Reading::default()))
    }

    fn judge(&self, sample: &Sample, episode: &Episode) -> Parts {
        self.crop.judge(sample, episode)
    }
}
