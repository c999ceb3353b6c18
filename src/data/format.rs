//! Which set a file is from: told by the keys of its rows, or said by name.
//!
//! It hides the readers of the formats behind [`Format::read`]. What must stay true: a format is recognised by keys that its authors
//! publish, never by the name of a file; where two fit, or none, the error names what was found and what is known. docs/data.md lists
//! the layouts, with those that were never held against a published file.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::fields::{self, Fault, Given};
use super::{Sample, answers, chats, choices, grounding, row};
use crate::config::BadConfig;

/// The layouts of rows that are read as they are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Our own rows.
    Own,
    /// V*: the file of questions.
    Vstar,
    /// V*: a JSON beside each picture, the right option first.
    VstarFolder,
    /// MME-RealWorld, Lite and CN: the JSON of the authors.
    MmeRealworld,
    /// The same as lmms-eval has it, in parquet.
    MmeRealworldTable,
    HrBench,
    TreeBench,
    /// Any other set of VLMEvalKit's with columns of options.
    OptionsTable,
    VisualProbe,
    ZoomBench,
    Pope,
    /// A picture, a question and a number (pixmo_count as lmms-eval has it).
    Counting,
    Fsc147,
    /// A picture, a question and an answer in words.
    Vqa,
    /// RefCOCO, + and g as lmms-lab has them.
    Refcoco,
    /// The same as VLM-R1 has them.
    VlmR1,
    Coco,
    Verl,
    Trl,
    /// ShareGPT and LLaVA.
    Sharegpt,
}

impl Format {
    pub const ALL: [Format; 20] = [
        Format::Own,
        Format::Vstar,
        Format::VstarFolder,
        Format::MmeRealworld,
        Format::MmeRealworldTable,
        Format::HrBench,
        Format::TreeBench,
        Format::OptionsTable,
        Format::VisualProbe,
        Format::ZoomBench,
        Format::Pope,
        Format::Counting,
        Format::Fsc147,
        Format::Vqa,
        Format::Refcoco,
        Format::VlmR1,
        Format::Coco,
        Format::Verl,
        Format::Trl,
        Format::Sharegpt,
    ];

    /// As configs, `--format` and records call it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Own => "own",
            Format::Vstar => "vstar",
            Format::VstarFolder => "vstar_folder",
            Format::MmeRealworld => "mme_realworld",
            Format::MmeRealworldTable => "mme_realworld_table",
            Format::HrBench => "hr_bench",
            Format::TreeBench => "tree_bench",
            Format::OptionsTable => "options_table",
            Format::VisualProbe => "visual_probe",
            Format::ZoomBench => "zoom_bench",
            Format::Pope => "pope",
            Format::Counting => "counting",
            Format::Fsc147 => "fsc147",
            Format::Vqa => "vqa",
            Format::Refcoco => "refcoco",
            Format::VlmR1 => "vlm_r1",
            Format::Coco => "coco",
            Format::Verl => "verl",
            Format::Trl => "trl",
            Format::Sharegpt => "sharegpt",
        }
    }

    /// # Errors
    /// There is no format of that name.
    pub fn named(name: &str) -> Result<Format> {
        let found = Format::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| BadConfig(format!("--format {name}: expected one of {}", names(&Format::ALL))).into())
    }

    /// The rows that a record becomes; RefCOCO's have a question for each expression.
    pub(super) fn read(self, given: &Given) -> Result<Vec<Sample>, Fault> {
        let one = |row: Result<Sample, Fault>| row.map(|row| vec![row]);
        match self {
            Format::Own => one(row::parse(given)),
            Format::Vstar => one(choices::vstar(given)),
            Format::VstarFolder => one(choices::vstar_beside(given)),
            Format::MmeRealworld => one(choices::mme_realworld(given)),
            Format::MmeRealworldTable => one(choices::mme_realworld_table(given)),
            Format::HrBench | Format::TreeBench | Format::OptionsTable => one(choices::columns(given)),
            Format::VisualProbe => one(answers::visual_probe(given)),
            Format::ZoomBench => one(answers::zoom_bench(given)),
            Format::Pope => one(answers::pope(given)),
            Format::Counting | Format::Vqa => one(answers::plain(given)),
            Format::Fsc147 => one(answers::fsc147(given)),
            Format::Refcoco | Format::VlmR1 => grounding::expressions(given),
            Format::Coco => grounding::coco(given),
            Format::Verl => one(chats::verl(given)),
            Format::Trl => one(chats::trl(given)),
            Format::Sharegpt => one(chats::sharegpt(given)),
        }
    }

    /// Whether a row has the keys by which this format is known. At most one format should say so of any row.
    fn fits(self, row: &Map<String, Value>) -> bool {
        let has = |keys: &[&str]| keys.iter().all(|key| row.contains_key(*key));
        let any = |keys: &[&str]| keys.iter().any(|key| row.contains_key(*key));
        let picture = any(&["image", "images", "image_path"]);
        let options = has(&["question", "A", "B", "answer"]);
        let conversation = any(&["conversations", "messages"]);
        let boxed = |key: &str| row.get(key).is_some_and(|value| fields::boxes(value).len() == 1);
        let yes_no = |key: &str| {
            let said = row.get(key).and_then(Value::as_str).map(|said| said.trim().to_ascii_lowercase());
            matches!(said.as_deref(), Some("yes" | "no"))
        };
        let pope = (has(&["question_id", "text"]) && yes_no("label") && !has(&["category"]))
            || (has(&["question_id", "question"]) && yes_no("answer"));
        let counted = any(&answers::COUNTS) && any(&answers::CAPTIONS);
        let own = has(&["id", "images"])
            && any(&["question", "answer"])
            && !conversation
            && !pope
            && !has(&["problem"])
            && (has(&["question"]) || !has(&["prompt"]));
        let question = has(&["question", "answer"])
            && picture
            && !options
            && !pope
            && !has(&["bbox"])
            && !any(&["prompt", "additional_info", "l2-category", "multi-choice options"])
            && !own
            && !row.get("answer").is_some_and(Value::is_array);
        let number = row.get("answer").and_then(fields::word).is_some_and(|a| answers::whole_number(&a).is_some());
        match self {
            Format::Own => own && !has(&["reward_model"]),
            Format::Vstar => has(&["text", "label", "category"]) && picture,
            Format::VstarFolder => has(&["question", "options", "target_object"]),
            Format::MmeRealworld => has(&["Text", "Answer choices", "Ground truth"]),
            Format::MmeRealworldTable => {
                has(&["question", "multi-choice options", "answer"]) && !has(&["target_instances"])
            }
            Format::HrBench => options && has(&["cycle_category"]),
            Format::TreeBench => {
                has(&["target_instances"]) && (options || has(&["question", "multi-choice options", "answer"]))
            }
            Format::OptionsTable => options && !any(&["cycle_category", "target_instances"]),
            Format::VisualProbe => has(&["problem", "solution"]) && picture && !boxed("solution") && !has(&["prompt"]),
            Format::ZoomBench => has(&["query", "response"]) && any(&["image", "images", "crop_image"]),
            Format::Pope => pope,
            Format::Counting => question && number,
            Format::Fsc147 => counted && !question && !has(&["label", "category"]),
            Format::Vqa => question && !number,
            Format::Refcoco => has(&["bbox"]) && row.get("answer").is_some_and(Value::is_array),
            Format::VlmR1 => has(&["problem", "solution"]) && boxed("solution"),
            Format::Coco => has(&["coco_image", "coco_annotations"]),
            Format::Verl => has(&["prompt", "reward_model"]),
            Format::Trl => {
                has(&["prompt"]) && picture && !has(&["reward_model"]) && any(&chats::ANSWERS) && !conversation && !own
            }
            Format::Sharegpt => conversation && !has(&["prompt"]),
        }
    }

    /// The format of a row, or why it cannot be told.
    pub(super) fn of(row: &Map<String, Value>) -> Result<Format, String> {
        let fit: Vec<Format> = Format::ALL.into_iter().filter(|format| format.fits(row)).collect();
        let keys = row.keys().map(|key| format!("{key:?}")).collect::<Vec<_>>().join(", ");
        let say = "say which with --format NAME or [data] format";
        if row.contains_key("task") && row.contains_key("additional_info") {
            return Err("this is MIG-Bench, whose rows are made with: foveate data convert --from mig_bench".into());
        }
        // Its boxes are in thousandths of a picture that its words name, which only the converter knows.
        let spoken = row.get("conversations").or(row.get("messages")).map(Value::to_string);
        if fit == [Format::Sharegpt] && spoken.is_some_and(|text| text.contains("<|box_start|>")) {
            return Err("these conversations have boxes as MGrounding-630k has them, whose rows are made with: foveate data convert --from \
                        mgrounding; to read the words alone, --format sharegpt or [data] format"
                .into());
        }
        match fit[..] {
            [one] => Ok(one),
            [] => Err(format!("no known format has the keys {keys}; {say}, one of {}", names(&Format::ALL))),
            _ => Err(format!("the keys {keys} fit {}; {say}", names(&fit))),
        }
    }
}

fn names(formats: &[Format]) -> String {
    formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_not_known_or_fits_twice_is_named() {
        let of = |value: Value| Format::of(value.as_object().unwrap());
        let said = of(json!({"picture": 1, "words": 2})).unwrap_err();
        assert!(
            said.contains("\"picture\", \"words\"") && said.contains("--format") && said.contains("hr_bench"),
            "{said}"
        );
        let both =
            of(json!({"question": "?", "A": "", "B": "", "answer": "A", "cycle_category": 0, "target_instances": []}));
        assert!(both.as_ref().is_err_and(|e| e.contains("fit hr_bench, tree_bench")), "{both:?}");
        let mig = of(json!({"task": "", "images": [], "question": "", "answer": [], "additional_info": ""}));
        assert!(mig.unwrap_err().contains("data convert"));
        let talk = |text: &str| json!({"images": [], "conversations": [{"from": "gpt", "value": text}]});
        assert!(of(talk("<|box_start|>(0,0),(9,9)<|box_end|>")).unwrap_err().contains("--from mgrounding"));
        assert_eq!(of(talk("A cat.")).unwrap(), Format::Sharegpt);
        for format in Format::ALL {
            assert_eq!(Format::named(format.name()).unwrap(), format);
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        assert!(Format::named("coca").unwrap_err().to_string().contains("coco"));
    }
}
