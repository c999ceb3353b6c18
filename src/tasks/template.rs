//! The wording of a task, read from a file: what the policy is told, in the slots that MGPO's conversation has.
//!
//! Two are built in (`mgpo`, the content of the paper's prompts, and `short`, the same in few words for small models);
//! any other name is a path. The files are TOML with literal strings, so that a newline is a newline and `\boxed` has one
//! backslash: the reference lost both to its shell (spec 1.13, defect 3).

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::chat::Part;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// System message; without it the checkpoint's chat template puts its own.
    pub system: Option<String>,
    /// First turn of the grounding conversation.
    pub ask: String,
    /// The crop comes back.
    pub found: String,
    /// The box was unusable and the whole picture is shown again.
    pub invalid: String,
    /// The box was unusable and only words come back; `{reason}` says why.
    pub invalid_text: String,
    /// The box was fine, but no crop is shown (a control).
    pub withheld: String,
    /// The one-turn baseline.
    pub one_turn: String,
    /// First turn when the policy decides itself how often to look.
    pub free: String,
    /// The question and nothing else: no box is asked for and no crop promised. For evaluations (`Protocol`).
    #[serde(default)]
    pub direct: Option<String>,
    /// The same with a crop beside the picture: two images. For evaluations.
    #[serde(default)]
    pub given: Option<String>,
    /// A question that has no picture: asked in one turn.
    #[serde(default)]
    pub words: Option<String>,
    /// Lead-in of the choices; `{list}` becomes `(A) …` to `(E) …`, one a line.
    pub choices: String,
}

/// What is put into a slot's placeholders.
#[derive(Clone, Debug, Default)]
pub struct Fill<'a> {
    pub question: &'a str,
    pub choices: Option<&'a [String]>,
    pub reason: &'a str,
}

impl Template {
    pub fn load(name: &str) -> Result<Template> {
        let built_in = [("mgpo", include_str!("templates/mgpo.toml")), ("short", include_str!("templates/short.toml"))];
        let (template, origin): (Template, _) = read(name, &built_in)?;
        let slots = [
            ("ask", Some(&template.ask), 1),
            ("found", Some(&template.found), 1),
            ("invalid", Some(&template.invalid), 1),
            ("invalid_text", Some(&template.invalid_text), 0),
            ("withheld", Some(&template.withheld), 0),
            ("one_turn", Some(&template.one_turn), 1),
            ("free", Some(&template.free), 1),
            ("direct", template.direct.as_ref(), 1),
            ("given", template.given.as_ref(), 2),
            ("words", template.words.as_ref(), 0),
        ];
        for (slot, text, images) in slots.into_iter().filter_map(|(slot, text, images)| Some((slot, text?, images))) {
            let found = text.matches("{image}").count();
            if found != images {
                bail!("{origin}: slot `{slot}` holds {{image}} {found} times, expected {images}");
            }
            if !text.contains("{question}") {
                bail!("{origin}: slot `{slot}` lacks {{question}}");
            }
        }
        Ok(template)
    }

    /// A slot filled and split at its image: text, image, text.
    pub fn fill(&self, slot: &str, fill: &Fill) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut pieces = slot.split("{image}");
        if let Some(first) = pieces.next() {
            push_text(&mut parts, self.fill_text(first, fill));
        }
        for piece in pieces {
            parts.push(Part::image());
            push_text(&mut parts, self.fill_text(piece, fill));
        }
        parts
    }

    fn fill_text(&self, text: &str, fill: &Fill) -> String {
        let choices = match fill.choices {
            None => String::new(),
            Some(list) => {
                let lines: Vec<String> =
                    list.iter().zip('A'..='Z').map(|(choice, letter)| lettered(choice, letter)).collect();
                self.choices.replace("{list}", &lines.join("\n"))
            }
        };
        // The row's own words go in last, so that braces inside a question are never taken for a placeholder.
        // A line that held nothing but an empty choices block disappears with it.
        let text = if choices.is_empty() { text.replace("{choices}\n", "") } else { text.to_owned() };
        text.replace("{choices}", &choices)
            .replace("{reason}", fill.reason)
            .replace("{question}", &finished(fill.question))
    }
}

/// A built-in template or, by any other name, that of a file; and how errors speak of it.
pub(super) fn read<T: DeserializeOwned>(name: &str, built_in: &[(&str, &str)]) -> Result<(T, String)> {
    let (text, origin) = match built_in.iter().find(|(known, _)| *known == name) {
        Some((_, text)) => ((*text).to_owned(), format!("the built-in template {name}")),
        None => {
            let known: Vec<&str> = built_in.iter().map(|(known, _)| *known).collect();
            let reading = || format!("reading the template file {name} (built in are: {})", known.join(", "));
            (std::fs::read_to_string(name).with_context(reading)?, name.to_owned())
        }
    };
    Ok((toml::from_str(&text).with_context(|| format!("reading {origin}"))?, origin))
}

/// Many data sets bring the letter along already.
fn lettered(choice: &str, letter: char) -> String {
    if choice.trim_start().starts_with(&format!("({letter})")) {
        choice.trim().to_owned()
    } else {
        format!("({letter}) {}", choice.trim())
    }
}

/// The question, made to end in `.`, `?` or `!` (spec 1.3).
pub fn finished(question: &str) -> String {
    let question = question.trim();
    if question.ends_with(['.', '?', '!']) { question.to_owned() } else { format!("{question}.") }
}

fn push_text(parts: &mut Vec<Part>, text: String) {
    if !text.is_empty() {
        parts.push(Part::text(text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(parts: &[Part]) -> String {
        parts
            .iter()
            .map(|p| match p {
                Part::Text { text } => text.clone(),
                Part::Image { .. } => "<image>".to_owned(),
            })
            .collect()
    }

    #[test]
    fn golden_text_of_the_two_turns() {
        let t = Template::load("mgpo").unwrap();
        let choices = ["red".to_owned(), "(B) blue".to_owned()];
        let fill = Fill { question: "What colour is the car", choices: None, reason: "" };
        assert_eq!(
            text(&t.fill(&t.ask, &fill)),
            "<image>\nQuestion: What colour is the car.\n\nOutput the coordinates of the key image area relevant to the problem in JSON format."
        );
        let fill = Fill { choices: Some(&choices), ..fill };
        let second = text(&t.fill(&t.found, &fill));
        assert_eq!(
            second,
            "Here is the sub-image, cropped from the original image by your coordinates and enlarged:\n<image>\n\
             Question: What colour is the car.\nThe choices are listed below:\n(A) red\n(B) blue\n\
             Analyse the original image and the enlarged sub-image step by step. Where the sub-image does not suffice, fall back on \
             the original image. Reason clearly, and put the final answer in \\boxed{}."
        );
        assert!(!second.contains("\\\\boxed") && !second.contains("\\n"), "real newlines, one backslash");
        let system = t.system.as_deref().unwrap();
        assert!(system.contains("inside \\boxed{}") && !system.starts_with('\n') && !system.contains("\\\\"));
    }

    #[test]
    fn without_choices_no_empty_line_is_left() {
        let t = Template::load("mgpo").unwrap();
        let fill = Fill { question: "Which number?", ..Default::default() };
        assert!(text(&t.fill(&t.found, &fill)).contains("Question: Which number?\nAnalyse the original"));
        let t = Template::load("short").unwrap();
        assert_eq!(
            text(&t.fill(&t.found, &fill)),
            "Here is the enlarged area.\n<image>\nQuestion: Which number? Put the final answer in \\boxed{}."
        );
    }

    #[test]
    fn braces_in_a_question_stay() {
        let t = Template::load("short").unwrap();
        let fill = Fill { question: "What does {choices} mean?", ..Default::default() };
        assert!(text(&t.fill(&t.one_turn, &fill)).contains("What does {choices} mean?"));
    }

    #[test]
    fn a_template_without_its_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        let bad = include_str!("templates/short.toml").replacen("{image}\n", "", 1);
        std::fs::write(&path, bad).unwrap();
        let error = format!("{:#}", Template::load(path.to_str().unwrap()).unwrap_err());
        assert!(error.contains("slot `ask` holds {image} 0 times"), "{error}");
    }
}
