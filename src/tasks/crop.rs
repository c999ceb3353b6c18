//! MGPO's task: the policy names a region, is shown that region cut from the ORIGINAL picture, and answers from it.
//! Rewarded is the answer alone (arXiv 2507.05920, section 3; spec 1).
//!
//! With `turns = 1` it is the one-turn baseline; with `free = true` the policy decides itself, up to `turns` turns,
//! whether to look again or to answer. A row without a picture is asked in one turn, in words alone. The controls of spec 1.14 (a random region, the true region, none) are settings of
//! what is shown, never of what is rewarded.

mod given;

pub use given::Given;

use anyhow::{Context as _, Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::template::{Fill, Template};
use super::{Context, Opening, Reading, Reply, Shown, Task, view_budget};
use crate::chat::{Action, Flaw, Part};
use crate::config::BadConfig;
use crate::data::Sample;
use crate::episode::{BoxOutcome, Episode, Stop};
use crate::geometry::{BBox, BoxLimits, BoxVerdict, Budget, Size, View, judge_box};
use crate::reward::{self, Parts, Place};

/// What the policy gets to see when it asks for a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Show {
    /// The region that it named.
    Region,
    /// A region of the size it named, somewhere else (control: does the place matter?).
    Random,
    /// A region of the size it named, moved onto the target and grown where the target would not fit (control: what would perfect
    /// aim bring?). Several targets are one, all of them.
    Target,
    /// Nothing: the box is written, no crop comes back (control: format only).
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnInvalid {
    /// Show the whole picture again, as the paper does.
    ResendImage,
    /// Say so in words.
    TextError,
    /// End the episode.
    Stop,
}

/// What kind of answer the rows have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judge {
    Choice,
    Text,
    Number,
}

impl Judge {
    /// Whether a row's own answer is one that this judge could ever find right.
    fn check(self, sample: &Sample) -> Result<()> {
        let known = match self {
            Judge::Choice => reward::letter(&sample.answer, &sample.choices).is_some(),
            Judge::Text => !sample.answer.trim().is_empty(),
            Judge::Number => reward::number(&sample.answer).is_some(),
        };
        let expected = match self {
            Judge::Choice => format!("the letter or the text of one of its {} choices", sample.choices.len()),
            Judge::Text => "some text".into(),
            Judge::Number => "a number".into(),
        };
        ensure!(
            known,
            "the answer is {:?}, and task.judge = \"{}\" expects {expected}",
            sample.answer,
            format!("{self:?}").to_lowercase()
        );
        Ok(())
    }

    /// Whether the last turn's `\boxed{}` is the answer; nothing else in the turn counts (spec 1.7).
    fn right(self, said: &str, answer: &str, choices: &[String]) -> bool {
        let Some(declared) = reward::extract(said, Place::Boxed) else { return false };
        match self {
            Judge::Choice => {
                let named = reward::letter(declared, choices);
                named.is_some() && named == reward::letter(answer, choices)
            }
            Judge::Text => reward::same_text(declared, answer),
            Judge::Number => match (reward::number(declared), reward::number(answer)) {
                (Some(declared), Some(answer)) => declared.answers(&answer),
                _ => false,
            },
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Wording: `mgpo`, `short`, or the path of a template file.
    pub template: String,
    /// 1 is the one-turn baseline, 2 the fixed conversation of the paper.
    pub turns: usize,
    /// Let the policy stop or look again by itself, up to `turns` turns.
    pub free: bool,
    /// Show the choices in the first turn already.
    pub choices_in_turn_1: bool,
    /// Pixel budget of every view, in pixels after resizing.
    pub max_pixels: u64,
    pub min_pixels: u64,
    /// A box must be wider and higher than this, in pixels of the view.
    pub min_side: f64,
    pub max_aspect: f64,
    pub on_invalid: OnInvalid,
    /// The region is grown by this share of its size on every side before it is cut.
    pub pad_ratio: f64,
    pub show: Show,
    /// How the answer is compared.
    pub judge: Judge,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            template: "mgpo".into(),
            turns: 2,
            free: false,
            choices_in_turn_1: false,
            max_pixels: 1_003_520,
            min_pixels: 200_704,
            min_side: 28.0,
            max_aspect: 100.0,
            on_invalid: OnInvalid::ResendImage,
            pad_ratio: 0.0,
            show: Show::Region,
            judge: Judge::Choice,
        }
    }
}

pub struct Crop {
    options: Options,
    template: Template,
    budget: Budget,
}

impl Crop {
    /// `factor` is what both sides of a view are multiples of (patch times merge, 28 for Qwen2.5-VL).
    pub fn new(options: Options, factor: u32) -> Result<Crop> {
        ensure!(options.turns >= 1, BadConfig("task.turns is 0, expected at least 1".into()));
        ensure!(
            options.turns <= 2 || options.free,
            BadConfig(format!(
                "task.turns = {}: the fixed conversation has two turns (name a region, answer); set task.free = true to let the \
                 policy look again",
                options.turns
            ))
        );
        let budget = view_budget(options.min_pixels, options.max_pixels, factor)?;
        for (key, value, least) in [
            ("pad_ratio", options.pad_ratio, 0.0),
            ("min_side", options.min_side, 0.0),
            ("max_aspect", options.max_aspect, 1.0),
        ] {
            ensure!(
                value.is_finite() && value >= least,
                BadConfig(format!("task.{key} = {value}: expected a number of at least {least}"))
            );
        }
        let template = Template::load(&options.template).map_err(|e| BadConfig(format!("task.template: {e:#}")))?;
        ensure!(
            !options.choices_in_turn_1 || template.ask.contains("{choices}"),
            BadConfig(format!(
                "task.choices_in_turn_1 is set, but slot `ask` of the template {} has no {{choices}}",
                options.template
            ))
        );
        Ok(Crop { options, template, budget })
    }

    /// How a question without a picture is asked.
    fn words(&self) -> Result<&str> {
        self.template.words.as_deref().with_context(|| {
            let template = &self.options.template;
            format!("there is no picture, and the template {template} has no slot `words` to ask such a question with")
        })
    }

    fn fill<'a>(&self, sample: &'a Sample, choices: bool, reason: &'a str) -> Fill<'a> {
        Fill {
            question: &sample.question,
            choices: (choices && !sample.choices.is_empty()).then_some(sample.choices.as_slice()),
            reason,
        }
    }

    fn shown(&self, slot: &str, fill: &Fill, view: Option<View>) -> Shown {
        let parts = self.template.fill(slot, fill);
        Shown { parts, views: view.into_iter().collect() }
    }

    /// The region that is shown for the region that was named; both in original pixels.
    fn region(&self, named: BBox, context: &Context, image: usize) -> Result<Option<BBox>> {
        let size = context.sizes[image];
        let (w, h) = (named.width(), named.height());
        let (room_x, room_y) = (f64::from(size.width) - w, f64::from(size.height) - h);
        let at = |x1: f64, y1: f64| BBox { x1, y1, x2: x1 + w, y2: y1 + h };
        Ok(match self.options.show {
            Show::Region => Some(named),
            Show::Nothing => None,
            Show::Random => {
                let mut rng = ChaCha8Rng::seed_from_u64(context.seed);
                Some(at(rng.random_range(0.0..=room_x.max(0.0)), rng.random_range(0.0..=room_y.max(0.0))))
            }
            Show::Target => {
                let here = context.sample.targets.iter().filter(|t| t.image == image + 1).map(|t| t.bbox);
                let target = here.reduce(|all, one| all.hull(&one));
                let target = target.context("task.show = \"target\" needs a row with a target")?;
                let (cx, cy) = target.center();
                let there = at((cx - w / 2.0).clamp(0.0, room_x.max(0.0)), (cy - h / 2.0).clamp(0.0, room_y.max(0.0)));
                Some(there.hull(&target))
            }
        })
    }

    /// The view of a region of an original.
    fn view_of(&self, region: BBox, image: usize, original: Size) -> Result<View> {
        // A view of the original at its own size: its pixels are the original's.
        let itself = View { image, region: original.bounds(), size: original };
        itself.crop(region.pad(self.options.pad_ratio).clamp(&original.bounds()), original, self.budget)
    }

    /// What is said after an unusable box, or after none.
    fn refuse(&self, context: &Context, outcome: BoxOutcome) -> Result<Reply> {
        let reading = Reading::of(outcome);
        let sample = context.sample;
        Ok(match self.options.on_invalid {
            OnInvalid::Stop => Reply::Close(Stop::InvalidBox, reading),
            OnInvalid::TextError => {
                let fill = self.fill(sample, true, reason(outcome));
                Reply::Show(self.shown(&self.template.invalid_text, &fill, None), reading)
            }
            OnInvalid::ResendImage => {
                let view = View::whole(0, context.sizes[0], self.budget)?;
                let fill = self.fill(sample, true, reason(outcome));
                Reply::Show(self.shown(&self.template.invalid, &fill, Some(view)), reading)
            }
        })
    }
}

fn reason(outcome: BoxOutcome) -> &'static str {
    match outcome {
        BoxOutcome::Valid => "the box is fine",
        BoxOutcome::Missing => "no JSON was found",
        BoxOutcome::Malformed => "the JSON is not a list of objects with bbox_2d and label",
        BoxOutcome::NotInteger => "the coordinates are not whole numbers",
        BoxOutcome::Inverted => "the corners are the wrong way round",
        BoxOutcome::OutOfRange => "the box leaves the image",
        BoxOutcome::TooSmall => "the box is too small",
        BoxOutcome::TooThin => "the box is too narrow",
        BoxOutcome::Duplicate => "this region was shown already",
    }
}

impl Task for Crop {
    fn name(&self) -> &'static str {
        if self.options.turns == 1 { "answer" } else { "crop" }
    }

    fn max_turns(&self) -> usize {
        self.options.turns
    }

    fn check(&self, sample: &Sample) -> Result<()> {
        if sample.images.is_empty() {
            self.words()?;
        }
        ensure!(
            sample.images.len() <= 1,
            "there are {} pictures, and this task shows one at most",
            sample.images.len()
        );
        ensure!(
            self.options.show != Show::Target || sample.targets.iter().any(|t| t.image == 1),
            "the row has no target, and task.show = \"target\" moves the crop onto it"
        );
        self.options.judge.check(sample)
    }

    fn open(&self, sample: &Sample, sizes: &[Size]) -> Result<Opening> {
        let size = match sizes {
            &[size] => size,
            // There is nothing to look at, so there is one turn, and no word of boxes.
            [] => {
                return Ok(Opening {
                    system: None,
                    user: self.shown(self.words()?, &self.fill(sample, true, ""), None),
                });
            }
            several => anyhow::bail!("there are {} pictures, and this task shows one at most", several.len()),
        };
        let view = View::whole(0, size, self.budget)?;
        let (slot, choices) = if self.options.turns == 1 {
            (&self.template.one_turn, true)
        } else if self.options.free {
            (&self.template.free, true)
        } else {
            (&self.template.ask, self.options.choices_in_turn_1)
        };
        let user = self.shown(slot, &self.fill(sample, choices, ""), Some(view));
        Ok(Opening { system: self.template.system.clone(), user })
    }

    fn reply(&self, context: &Context, action: &Action) -> Result<Reply> {
        let last = context.turn >= self.options.turns || context.sizes.is_empty();
        if last || (self.options.free && answers(action)) {
            // A box beside the answer is read for the record, not acted on; none is no fault here.
            let named =
                !context.sizes.is_empty() && (!action.boxes().is_empty() || matches!(action, Action::Malformed { .. }));
            let reading = if named && context.turn == 1 { self.read(context, action) } else { Reading::default() };
            let stop = if answers(action) { Stop::Answered } else { Stop::TurnLimit };
            return Ok(Reply::Close(stop, reading));
        }
        let reading = self.read(context, action);
        let (Some(BoxOutcome::Valid), Some(named)) = (reading.outcome, reading.bbox) else {
            return self.refuse(context, reading.outcome.unwrap_or(BoxOutcome::Missing));
        };
        let image = context.views[context.views.len() - 1].image;
        let fill = self.fill(context.sample, true, "");
        let Some(region) = self.region(named, context, image)? else {
            return Ok(Reply::Show(self.shown(&self.template.withheld, &fill, None), reading));
        };
        let view = self.view_of(region, image, context.sizes[image])?;
        if self.options.free && context.views.contains(&view) {
            return self.refuse(context, BoxOutcome::Duplicate);
        }
        let slot = if self.options.free && context.turn + 1 < self.options.turns {
            &self.template.free
        } else {
            &self.template.found
        };
        Ok(Reply::Show(self.shown(slot, &fill, Some(view)), reading))
    }

    /// The answer of the last turn. In the fixed conversation an episode that ended before its last turn has none, whatever stands
    /// in the turns it had: else a policy could earn the reward without ever looking closer.
    fn judge(&self, sample: &Sample, episode: &Episode) -> Parts {
        let said: Vec<&str> = episode.turns.iter().filter(|t| t.role == "assistant").map(|t| t.text.as_str()).collect();
        let complete = self.options.free || sample.images.is_empty() || said.len() == self.options.turns;
        let last = said.last().filter(|_| complete);
        let right = last.is_some_and(|said| self.options.judge.right(said, &sample.answer, &sample.choices));
        Parts::from([("accuracy", f64::from(u8::from(right)))])
    }
}

impl Crop {
    /// Reads the first box of a turn: its class, and where it lies in the original if it is usable.
    fn read(&self, context: &Context, action: &Action) -> Reading {
        let Some(claim) = action.boxes().first() else {
            return Reading::of(unread(action));
        };
        // Which view the numbers are measured in: the last one, or, when the policy may look as often as it likes, the one that it
        // names (`"source": 1` is the whole picture, 2 the first crop).
        let source =
            claim.source.filter(|_| self.options.free).map_or(Some(context.views.len()), |k| k.try_into().ok());
        let Some(seen) = source.and_then(|k: usize| context.views.get(k.checked_sub(1)?)) else {
            return Reading::of(BoxOutcome::OutOfRange);
        };
        let named = context.convention.box_in_view(claim.bbox_2d, seen.size);
        let limits = BoxLimits { min_side: self.options.min_side, max_aspect: self.options.max_aspect };
        let outcome = match judge_box(&named, seen.size, limits) {
            BoxVerdict::Valid => BoxOutcome::Valid,
            BoxVerdict::Inverted => BoxOutcome::Inverted,
            BoxVerdict::OutOfRange => BoxOutcome::OutOfRange,
            BoxVerdict::TooSmall => BoxOutcome::TooSmall,
            BoxVerdict::TooThin => BoxOutcome::TooThin,
            // Whole numbers of the model are finite; a convention that scales them keeps them so.
            BoxVerdict::NotFinite => BoxOutcome::OutOfRange,
        };
        let bbox = (outcome == BoxOutcome::Valid).then(|| seen.original_from_view(named));
        Reading { bbox, ..Reading::of(outcome) }
    }
}

fn answers(action: &Action) -> bool {
    matches!(action, Action::Answer { .. } | Action::Both { .. })
}

/// The class of a turn without a readable box.
fn unread(action: &Action) -> BoxOutcome {
    match action {
        Action::Malformed { flaw } => match flaw {
            Flaw::NotWhole | Flaw::NotNumbers => BoxOutcome::NotInteger,
            Flaw::Reversed => BoxOutcome::Inverted,
            Flaw::Unclosed
            | Flaw::BadJson
            | Flaw::NotAList
            | Flaw::Empty
            | Flaw::NoBox
            | Flaw::NotFour
            | Flaw::NoLabel => BoxOutcome::Malformed,
        },
        Action::Look { .. } | Action::Both { .. } | Action::Answer { .. } | Action::None => BoxOutcome::Missing,
    }
}

impl Part {
    /// As a person reads it.
    pub fn readable(&self) -> String {
        match self {
            Part::Text { text } => text.clone(),
            Part::Image { .. } => "[image]".to_owned(),
        }
    }
}
