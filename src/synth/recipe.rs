//! What the nano model is pretrained on, and the exact words of it.
//!
//! A [`Recipe`] is a curriculum: phases by step, each with a mix of tasks and how hard they are. The wordings live in
//! [`words`] alone, so that they can be held against the templates of the RL task. What must stay true: no wording here
//! asks what stands on the plate under an object; that question belongs to RL.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Everything a user turn is made of. `{X}` is the name of an object, `{BOX}` a box in pixels of the view.
pub mod words {
    pub const LOCATE: &[&str] = &[
        "Where is the {X}?",
        "Find the {X}.",
        "Locate the {X}.",
        "Show me the {X}.",
        "Look at the {X}.",
        "What is next to the {X}?",
        "In which part of the picture is the {X}?",
        "Which area shows the {X}?",
    ];
    pub const LOCATE_REQUEST: &str = "Output the coordinates of the key image area in JSON.";
    pub const LIST: &[&str] = &["Which objects are in the picture?", "List all objects.", "What can be seen here?"];
    pub const LIST_REQUEST: &str = "Output the coordinates of all objects in JSON.";
    pub const NAME: &[&str] = &["What is in the area {BOX}?", "Which object is in the area {BOX}?"];
    pub const READ: &[&str] = &[
        "What number is written here?",
        "Which number do you see?",
        "What number does the plate show?",
        "Read the number on the plate.",
        "What number is this?",
    ];
    pub const ANSWER_REQUEST: &str = "Put the final answer in \\boxed{}.";
    pub const FIND: &[&str] = &["Find the {X}.", "Locate the {X}.", "Show me the {X}."];
    pub const WHICH: &[&str] = &["Which picture shows the {X}?", "In which picture is the {X}?"];
    pub const POINT: &[&str] = &["Where is the {X} in Image-{K}?", "Find the {X} of Image-{K}."];
    pub const SAY: &[&str] = &["Say in which picture the {X} is.", "Say which picture shows the {X}."];
    pub const SAID: &[&str] = &["The {X} is in Image-{K}.", "So the {X} is in Image-{K}."];
    pub const TELL: &[&str] = &["Say what can be seen here.", "Say which objects are in the picture."];
    pub const NAME_IN: &[&str] = &["What is in the area {BOX} of Image-{K}?"];
    pub const COMMON: &[&str] = &["Which object is in Image-{A} and in Image-{B}?"];
    pub const DESCRIBE: &[&str] = &["What is in Image-{K}?", "Which objects are in Image-{K}?"];
    pub const DESCRIPTION: &str = "Image-{K} shows {X}.";
    /// Before each view of a question over several, as the template `mirg_short` has it.
    pub const BEFORE_VIEW: &str = "Image-{K}: ";
    /// Before the second view of a dialogue.
    pub const ENLARGED: &str = "Here is the enlarged area.\n";
    /// Between a view and the text that follows it.
    pub const AFTER_VIEW: &str = "\n";

    /// `Question: ... request`, as every user turn ends.
    pub fn question(question: &str, request: &str) -> String {
        format!("Question: {question} {request}")
    }

    pub fn boxed(answer: &str) -> String {
        format!("\\boxed{{{answer}}}")
    }

    /// The grounding answer: boxes in whole pixels of the view, with labels.
    pub fn boxes(boxes: &[([i64; 4], &str)]) -> String {
        let rows: Vec<String> = boxes
            .iter()
            .map(|([x1, y1, x2, y2], label)| format!("{{\"bbox_2d\":[{x1},{y1},{x2},{y2}],\"label\":\"{label}\"}}"))
            .collect();
        format!("```json\n[{}]\n```", rows.join(","))
    }

    /// The same over several pictures, which count from 1, in the form of `tasks/multi_image.rs`.
    pub fn boxes_in(boxes: &[(usize, [i64; 4], &str)]) -> String {
        let row = |(image, [x1, y1, x2, y2], label): &(usize, [i64; 4], &str)| {
            format!("{{\"image\":{image},\"bbox_2d\":[{x1},{y1},{x2},{y2}],\"label\":\"{label}\"}}")
        };
        let rows: Vec<String> = boxes.iter().map(row).collect();
        format!("<answer>[{}]</answer>", rows.join(","))
    }

    pub fn thought(words: &str) -> String {
        format!("<think>{words}</think>")
    }
}

/// The curriculum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// System turn of every dialogue; none when empty.
    pub system: String,
    /// Most visual tokens of a scene, and fewest and most of a close-up.
    pub view_tokens: u64,
    pub crop_tokens: [u64; 2],
    /// Sides of views are multiples of this (patch x merge).
    pub factor: u32,
    /// Boxes in answers are rounded to multiples of this many pixels of the view.
    pub snap: u32,
    /// Sides of boxes in answers are longer than this many pixels of the view.
    pub min_side: u32,
    /// The size that scenes would have as pictures; decides the sizes of views and close-ups.
    pub picture: [u32; 2],
    /// Early ones first; the last goes on for ever.
    pub phases: Vec<Phase>,
}

/// One stretch of the curriculum. Ranges are `[from, to]`, both ends included; lengths in widths of the picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Phase {
    /// The first step that is no longer part of it; none for a phase without end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until_step: Option<u64>,
    pub tasks: Weights,
    /// Pictures of a question over several.
    pub pictures: [usize; 2],
    /// Share of these that show one of their things from close by.
    pub close_ups: f64,
    /// Objects in a scene.
    pub objects: [usize; 2],
    pub object_size: [f64; 2],
    /// Plates that belong to no object, in a scene.
    pub plates: [usize; 2],
    /// Digits on a plate.
    pub digits: [usize; 2],
    /// Height of a digit in a close-up, in pixels of the close-up.
    pub digit_pixels: [f64; 2],
    /// Height of a digit on the plates of scenes of the other tasks.
    pub digit_height: [f64; 2],
    /// How much the scanned digits are turned, slanted, stretched and thickened: 0 as they are, 1 in full.
    pub handwriting: f64,
    pub careless: Careless,
}

/// How often each task is asked, relative to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    pub locate: f64,
    pub list: f64,
    pub tell: f64,
    pub name: f64,
    pub read: f64,
    pub two_turns: f64,
    // Over several pictures.
    pub find: f64,
    pub which: f64,
    pub say: f64,
    pub point: f64,
    pub describe: f64,
    pub name_in: f64,
    pub common: f64,
}

impl Weights {
    pub fn named(&self) -> [(&'static str, f64); 13] {
        [
            ("locate", self.locate),
            ("list", self.list),
            ("name", self.name),
            ("read", self.read),
            ("two_turns", self.two_turns),
            ("find", self.find),
            ("which", self.which),
            ("say", self.say),
            ("tell", self.tell),
            ("point", self.point),
            ("describe", self.describe),
            ("name_in", self.name_in),
            ("common", self.common),
        ]
    }
}

/// How far the boxes of located objects are off, so that the base model is able but careless.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Careless {
    /// The middle moves by up to this share of the side.
    pub shift: f64,
    /// Each side is multiplied by a factor from this range.
    pub scale: [f64; 2],
}

impl Default for Careless {
    fn default() -> Careless {
        Careless { shift: 0.25, scale: [0.8, 1.6] }
    }
}

impl Default for Phase {
    fn default() -> Phase {
        Phase {
            until_step: None,
            tasks: Weights { locate: 3.0, list: 2.0, name: 1.0, read: 3.0, two_turns: 2.0, ..Weights::default() },
            pictures: [2, 3],
            close_ups: 0.0,
            objects: [3, 5],
            object_size: [0.12, 0.20],
            plates: [2, 5],
            digits: [1, 1],
            digit_pixels: [8.0, 60.0],
            digit_height: [0.014, 0.024],
            handwriting: 1.0,
            careless: Careless::default(),
        }
    }
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            system: String::new(),
            view_tokens: 80,
            crop_tokens: [49, 64],
            factor: 28,
            snap: 7,
            min_side: 28,
            picture: [2016, 1512],
            phases: vec![Phase::default()],
        }
    }
}

impl Recipe {
    /// The phase that `step` belongs to.
    pub fn phase(&self, step: u64) -> Option<&Phase> {
        self.phases.iter().find(|phase| phase.until_step.is_none_or(|end| step < end)).or(self.phases.last())
    }

    /// # Errors
    /// A value that no dialogue can be made with, named.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.phases.is_empty(), "the recipe has no phases, expected at least one [[phases]]");
        ensure!(
            (2..=280).contains(&self.factor),
            "factor is {}, expected 2 to 280 (patch x merge, for example 28)",
            self.factor
        );
        ensure!((1..=56).contains(&self.snap), "snap is {}, expected 1 to 56", self.snap);
        ensure!(self.view_tokens >= 16, "view_tokens is {}, expected at least 16", self.view_tokens);
        let [low, high] = self.crop_tokens;
        ensure!(9 <= low && low <= high, "crop_tokens is [{low}, {high}], expected two rising numbers from 9");
        let [width, height] = self.picture;
        ensure!(
            (64..=16384).contains(&width)
                && (64..=16384).contains(&height)
                && (0.3..=2.0).contains(&(f64::from(height) / f64::from(width))),
            "picture is [{width}, {height}], expected sides of 64 to 16384 pixels, height 0.3 to 2 times the width"
        );
        let mut before = 0;
        for (k, phase) in self.phases.iter().enumerate() {
            phase.validate().with_context(|| format!("phases[{k}]"))?;
            let last = k + 1 == self.phases.len();
            match phase.until_step {
                Some(end) => {
                    ensure!(end > before, "phases[{k}]: until_step is {end}, expected more than {before}");
                    before = end;
                }
                None => ensure!(
                    last,
                    "phases[{k}]: until_step is missing, expected a step; only the last phase may go on for ever"
                ),
            }
        }
        Ok(())
    }
}

impl Phase {
    fn validate(&self) -> Result<()> {
        let all = self.tasks.named().map(|(_, weight)| weight);
        ensure!(
            all.iter().all(|w| w.is_finite() && *w >= 0.0) && all.iter().sum::<f64>() > 0.0,
            "tasks has the weights {all:?}, expected none below 0 and one above"
        );
        let range = |name: &str, [from, to]: [f64; 2], low: f64, high: f64| {
            ensure!(
                low <= from && from <= to && to <= high,
                "{name} is [{from}, {to}], expected two rising numbers from {low} to {high}"
            );
            Ok(())
        };
        let count = |[from, to]: [usize; 2]| [from as f64, to as f64];
        range("pictures", count(self.pictures), 2.0, 8.0)?;
        range("objects", count(self.objects), 1.0, 12.0)?;
        range("object_size", self.object_size, 0.05, 0.6)?;
        range("plates", count(self.plates), 0.0, 12.0)?;
        range("digits", count(self.digits), 1.0, 4.0)?;
        range("digit_pixels", self.digit_pixels, 5.0, 120.0)?;
        range("digit_height", self.digit_height, 0.004, 0.2)?;
        range("handwriting", [0.0, self.handwriting], 0.0, 1.0)?;
        range("close_ups", [0.0, self.close_ups], 0.0, 1.0)?;
        range("careless.scale", self.careless.scale, 0.2, 4.0)?;
        range("careless.shift", [0.0, self.careless.shift], 0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_as_the_model_reads_them() {
        assert_eq!(
            words::boxes(&[([7, 14, 49, 56], "fox"), ([0, 0, 35, 35], "pig")]),
            "```json\n[{\"bbox_2d\":[7,14,49,56],\"label\":\"fox\"},{\"bbox_2d\":[0,0,35,35],\"label\":\"pig\"}]\n```"
        );
        assert_eq!(words::boxed("7"), r"\boxed{7}");
        assert_eq!(
            words::question(words::READ[0], words::ANSWER_REQUEST),
            r"Question: What number is written here? Put the final answer in \boxed{}."
        );
        let of_several =
            [words::FIND, words::WHICH, words::POINT, words::NAME_IN, words::COMMON, words::DESCRIBE].concat();
        for text in [words::LOCATE, words::LIST, words::NAME, words::READ].concat().into_iter().chain(of_several) {
            assert!(!text.contains("plate under"), "{text} is for RL");
        }
    }

    #[test]
    fn phases_follow_steps_and_bad_ones_are_named() {
        let until = |step, objects| Phase { until_step: Some(step), objects, ..Phase::default() };
        let phases = vec![until(600, [1, 1]), until(1400, [1, 3]), Phase::default()];
        let recipe = Recipe { phases, ..Recipe::default() };
        recipe.validate().unwrap();
        assert_eq!(recipe.phase(599).unwrap().objects, [1, 1]);
        assert_eq!(recipe.phase(600).unwrap().objects, [1, 3]);
        assert_eq!(recipe.phase(9999).unwrap().objects, [3, 5]);
        let mut bad = recipe;
        bad.phases[1].digits = [2, 1];
        let error = format!("{:#}", bad.validate().unwrap_err());
        assert!(error.contains("phases[1]") && error.contains("digits is [2, 1]"), "{error}");
    }

    #[test]
    fn a_recipe_is_read_from_toml() {
        let recipe: Recipe = toml::from_str("snap = 14\n[[phases]]\nobjects = [2, 2]\ntasks = { read = 1 }\n").unwrap();
        assert_eq!((recipe.snap, recipe.phases.len(), recipe.phases[0].tasks.locate), (14, 1, 0.0));
        assert!(toml::from_str::<Recipe>("snapp = 14").is_err());
    }
}
