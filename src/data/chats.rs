//! Training data of other programs: verl's parquet, TRL's `prompt` and `images`, conversations of ShareGPT and LLaVA (field.md, section 5).
//!
//! What must stay true: the question is what the user asks, without marks for pictures; a set's own instructions to the model (a system
//! message) are not asked again, for a task's template says how to answer; of a conversation with several turns the first is asked and
//! the others are counted under `extra.turns`, because a later one means nothing without the earlier.

use std::path::PathBuf;

use serde_json::Value;

use super::Sample;
use super::convert::words;
use super::fields::{Fault, Given, boxes, describe, fault, list, target, word};
use super::published::{Published, split_options};

/// Key of a row that was more than one question: how many turns of the user there were.
const TURNS: &str = "turns";

/// verl, and MGPO's rows, which bring `question`, `choices` and the path of the original picture too (spec 1.10).
pub(super) fn verl(given: &Given) -> Result<Sample, Fault> {
    let truth = match given.value("reward_model") {
        Some(model) => model["ground_truth"].clone(),
        None => Value::Null,
    };
    let Some(answer) = word(&truth).filter(|answer| !answer.trim().is_empty()) else {
        return fault(
            "reward_model.ground_truth",
            format!("found {}, expected a text that says something", describe(&truth)),
        );
    };
    let extra = given.value("extra_info").cloned().unwrap_or_default();
    let text = match given.maybe(&["question"]).or_else(|| word(&extra["question"])) {
        Some(question) => question,
        None => given.value("prompt").and_then(asked).map_or_else(|| missing("prompt"), Ok)?,
    };
    let index = word(&extra["index"]);
    let published = Published { category: given.maybe(&["data_source"]), answer: truth, ..Published::of(given, index) };
    // The file at that path is the original; what lies in the row may have been shrunk. Without the file the row's own is shown.
    let original = given.maybe(&["image_path"]).and_then(|_| given.pictures(&["image_path"]).ok());
    let original = original.filter(|paths: &Vec<PathBuf>| paths.iter().all(|path| path.is_file()));
    let images = match original {
        Some(images) => images,
        None => given.pictures(&["images", "image", "image_path"])?,
    };
    let row = given.sample(given.id(None), images, words(&text), answer.clone());
    let published = published.keep(given, &["ability", "extra_info", "image_path"]);
    chosen(given, row, published, &answer)
}

/// Options under `choices`, as a list or in one text, make it a question of choice.
fn chosen(given: &Given, row: Sample, mut published: Published, answer: &str) -> Result<Sample, Fault> {
    let listed = given.value("choices").and_then(list).map(|l| l.iter().filter_map(word).collect::<Vec<_>>());
    let in_text = given.value("choices").and_then(Value::as_str).and_then(split_options).map(|(_, options)| options);
    match listed.or(in_text).filter(|options| !options.is_empty()) {
        Some(options) => {
            let letter = crate::reward::letter(answer, &options).map_or_else(|| answer.to_owned(), String::from);
            published.options = options;
            published.into_choices(row, &letter, false)
        }
        None => published.into_row(row),
    }
}

fn missing<T>(key: &str) -> Result<T, Fault> {
    fault(key, "there is no message of the user with words in it")
}

/// The last thing that the user says in a prompt: a text, or messages.
fn asked(prompt: &Value) -> Option<String> {
    match prompt {
        Value::String(text) => Some(text.clone()),
        Value::Array(messages) => {
            let of_user = messages.iter().rev().filter(|message| message["role"] == "user");
            of_user.map(|message| content(&message["content"])).find(|text| !text.trim().is_empty())
        }
        _ => None,
    }
}

/// The words of a message: a text, or parts of which some are.
fn content(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part["text"].as_str().or(part.as_str()));
            texts.collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// Where sets for TRL keep the answer.
pub(super) const ANSWERS: [&str; 4] = ["solution", "answer", "ground_truth", "completion"];

/// TRL: `prompt` as text or messages, `image` or `images`.
pub(super) fn trl(given: &Given) -> Result<Sample, Fault> {
    let Some(text) = given.value("prompt").and_then(asked) else { return missing("prompt") };
    let said = ANSWERS.iter().find_map(|key| Some((*key, given.value(key)?)));
    let answer = match said {
        Some((_, Value::Array(messages))) => messages.iter().map(|message| content(&message["content"])).collect(),
        Some((_, other)) => word(other).unwrap_or_default(),
        None => String::new(),
    };
    if answer.trim().is_empty() {
        return fault(ANSWERS[0], format!("found no answer, expected one under {}", ANSWERS.join(", ")));
    }
    let images = given.pictures(&["images", "image"])?;
    let published = Published { answer: answer.clone().into(), ..Published::of(given, given.maybe(&["id", "index"])) };
    let row = given.sample(given.id(None), images, words(&text), answer.trim().to_owned());
    chosen(given, row, published, answer.trim())
}

/// ShareGPT and LLaVA (`conversations` of `from` and `value`), and the same as `messages` of `role` and `content`.
pub(super) fn sharegpt(given: &Given) -> Result<Sample, Fault> {
    let (key, who, what) = match given.value("conversations") {
        Some(_) => ("conversations", "from", "value"),
        None => ("messages", "role", "content"),
    };
    let Some(turns) = given.value(key).and_then(Value::as_array) else {
        return fault(key, "expected a list of messages");
    };
    let is = |turn: &Value, names: [&str; 2]| turn[who].as_str().is_some_and(|name| names.contains(&name));
    let pairs = turns.windows(2).filter(|two| is(&two[0], ["human", "user"]) && is(&two[1], ["gpt", "assistant"]));
    let pairs: Vec<(String, String)> = pairs.map(|two| (content(&two[0][what]), content(&two[1][what]))).collect();
    let Some((question, answer)) = pairs.first() else {
        return fault(key, "found no question with an answer, expected human and gpt (or user and assistant)");
    };
    let (question, answer) = (words(question), answer.trim());
    if question.is_empty() || answer.is_empty() {
        return fault(key, "the first question or its answer is empty");
    }
    let images = given.pictures(&["images", "image"])?;
    let id = given.maybe(&["id"]);
    let published = Published { answer: answer.into(), ..Published::of(given, id) };
    let mut row = given.sample(given.id(None), images, question, answer.to_owned());
    if pairs.len() > 1 {
        row.extra.insert(TURNS.into(), pairs.len().into());
    }
    // LLaMA-Factory's way to say where what was asked for is.
    let found = given.value("objects").map(|objects| boxes(&objects["bbox"])).unwrap_or_default();
    row.targets = found
        .iter()
        .enumerate()
        .map(|(k, &corners)| target(&format!("objects.bbox[{k}]"), corners, None))
        .collect::<Result<_, _>>()?;
    published.into_row(row)
}
