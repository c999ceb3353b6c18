//! How a question can be put to a policy that looks closer, and what each part of looking is worth: the same rows in one turn, in two, in as
//! many as it likes, and with single parts of the conversation taken out or replaced.
//!
//! The controls are those that critics of such policies ask for (spec 5: most of what they solve with a crop they also solve without). What
//! must stay true: protocols of one task differ in what is said and shown, never in the wording of the question, the pixel budget or the judge.

use std::collections::HashMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Task;
use super::crop::{Crop, Given, Options, Show};
use crate::geometry::BBox;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    NoTool,
    OneTurn,
    TwoTurns,
    Free,
    FormatOnly,
    ResultOnly,
    CropAlone,
    RandomCrop,
    TrueCrop,
}

impl Protocol {
    pub const ALL: [Protocol; 9] = [
        Protocol::NoTool,
        Protocol::OneTurn,
        Protocol::TwoTurns,
        Protocol::Free,
        Protocol::FormatOnly,
        Protocol::ResultOnly,
        Protocol::CropAlone,
        Protocol::RandomCrop,
        Protocol::TrueCrop,
    ];

    /// As configs and tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::NoTool => "no_tool",
            Protocol::OneTurn => "one_turn",
            Protocol::TwoTurns => "two_turns",
            Protocol::Free => "free",
            Protocol::FormatOnly => "format_only",
            Protocol::ResultOnly => "result_only",
            Protocol::CropAlone => "crop_alone",
            Protocol::RandomCrop => "random_crop",
            Protocol::TrueCrop => "true_crop",
        }
    }

    /// In a few words, for tables.
    pub fn about(self) -> &'static str {
        match self {
            Protocol::NoTool => "the question alone",
            Protocol::OneTurn => "box and answer in one turn, no crop",
            Protocol::TwoTurns => "it names a region, sees it enlarged, answers",
            Protocol::Free => "it looks closer as often as it likes",
            Protocol::FormatOnly => "it names a region, no crop is shown",
            Protocol::ResultOnly => "picture and the crop it named, without its words",
            Protocol::CropAlone => "only the crop it named, without its words",
            Protocol::RandomCrop => "a crop of the size it named, somewhere else",
            Protocol::TrueCrop => "a crop of the size it named, on the target",
        }
    }

    /// Whether a crop is shown, so that an answer may have come from it.
    pub fn shows_a_crop(self) -> bool {
        match self {
            Protocol::TwoTurns
            | Protocol::Free
            | Protocol::ResultOnly
            | Protocol::CropAlone
            | Protocol::RandomCrop
            | Protocol::TrueCrop => true,
            Protocol::NoTool | Protocol::OneTurn | Protocol::FormatOnly => false,
        }
    }

    /// Whether it shows regions that the policy named under `two_turns`, which must have been played.
    pub fn needs_regions(self) -> bool {
        matches!(self, Protocol::ResultOnly | Protocol::CropAlone)
    }

    /// Whether it changes what is shown for a box and nothing before it: then figures of its boxes say nothing that those of `two_turns`
    /// do not.
    pub fn is_control(self) -> bool {
        matches!(self, Protocol::FormatOnly | Protocol::RandomCrop | Protocol::TrueCrop)
    }

    /// The options of its conversation: those of the two-turn one with turns and crops as this protocol has them. Under `free` the
    /// policy has at most `free_turns` turns.
    pub fn options(self, base: &Options, free_turns: usize) -> Options {
        let (turns, free, show) = match self {
            Protocol::NoTool | Protocol::OneTurn | Protocol::ResultOnly | Protocol::CropAlone => {
                (1, false, Show::Region)
            }
            Protocol::TwoTurns => (2, false, Show::Region),
            Protocol::Free => (free_turns, true, Show::Region),
            Protocol::FormatOnly => (2, false, Show::Nothing),
            Protocol::RandomCrop => (2, false, Show::Random),
            Protocol::TrueCrop => (2, false, Show::Target),
        };
        Options { turns, free, show, ..base.clone() }
    }

    /// The task, for views whose sides are multiples of `factor`. `regions` are what the policy named, by the row's id, in original
    /// pixels; only protocols that need regions look at them.
    ///
    /// # Errors
    /// Options that cannot work, named.
    pub fn task(
        self,
        base: &Options,
        free_turns: usize,
        factor: u32,
        regions: HashMap<String, BBox>,
    ) -> Result<Box<dyn Task>> {
        let options = self.options(base, free_turns);
        Ok(match self {
            Protocol::NoTool => Box::new(Given::new(&options, factor, true, HashMap::new())?),
            Protocol::ResultOnly => Box::new(Given::new(&options, factor, true, regions)?),
            Protocol::CropAlone => Box::new(Given::new(&options, factor, false, regions)?),
            Protocol::OneTurn
            | Protocol::TwoTurns
            | Protocol::Free
            | Protocol::FormatOnly
            | Protocol::RandomCrop
            | Protocol::TrueCrop => Box::new(Crop::new(options, factor)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_configs() {
        for protocol in Protocol::ALL {
            assert_eq!(serde_json::to_value(protocol).unwrap(), protocol.name());
        }
    }

    #[test]
    fn a_protocol_changes_turns_and_crops_alone() {
        let base = Options { template: "short".into(), max_pixels: 300_000, pad_ratio: 0.1, ..Options::default() };
        for protocol in Protocol::ALL {
            let options = protocol.options(&base, 5);
            let back = Options { turns: base.turns, free: base.free, show: base.show, ..options };
            assert_eq!(serde_json::to_value(back).unwrap(), serde_json::to_value(&base).unwrap(), "{protocol:?}");
            protocol.task(&base, 5, 28, HashMap::new()).unwrap();
        }
        assert_eq!(Protocol::Free.options(&base, 5).turns, 5);
    }
}
