//! `foveate score`: the judges of [`crate::reward`] on rows of JSON, one result a row.
//!
//! A row is `{"kind": "choice"|"text"|"number"|"box"|"multi_image", "prediction": TEXT, "answer": …, "choices"?: […],
//! "mode"?: "strict"|"official:vstar"|"official:mme_realworld"}`, its result `{"total", "parts", "extracted"}`. What must stay true: one
//! line out for each line in that is not blank, in order; a bad row is one line `{"error": "row N: …"}` (N counts
//! lines from 1, blank ones too) and the rest goes on; no input at all makes it panic.
//!
//! Where answers are read: from the last `\boxed{}` of the last assistant turn, else its last `<answer>`, else the turn
//! itself, which is right only if it is nothing but an answer. Boxes and their answer share one coordinate space.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::reward::{
    MultiImage, Official, Parts, Place, extract, last_turn, letter, mme_realworld_letter, number, same_text,
    single_box, truth, truth_box, vstar_letter,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    kind: String,
    prediction: String,
    answer: Value,
    #[serde(default)]
    choices: Option<Vec<String>>,
    #[serde(default)]
    mode: Option<String>,
    /// Anything the caller wants to recognise its row by; handed back.
    #[serde(default)]
    id: Option<Value>,
}

/// The judgement of one row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judgement {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
    pub total: f64,
    pub parts: Parts,
    /// What the judge took for the answer: a letter, a text, a number, a box, a list of boxes, or null.
    pub extracted: Value,
}

/// What a whole run came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Rows judged, and rows that were bad.
    pub rows: usize,
    pub errors: usize,
    /// Mean total of the judged rows; 0 without any.
    pub mean: f64,
}

/// Judges every row of `input`, writing as it goes. `Err` only when reading or writing fails.
///
/// ```
/// let rows = r#"{"kind": "choice", "prediction": "\\boxed{B}", "answer": "B"}"#;
/// let mut out = Vec::new();
/// let summary = foveate::score::run(rows.as_bytes(), &mut out).unwrap();
/// assert_eq!((summary.rows, summary.mean), (1, 1.0));
/// assert_eq!(String::from_utf8(out).unwrap(), "{\"total\":1.0,\"parts\":{\"accuracy\":1.0},\"extracted\":\"B\"}\n");
/// ```
pub fn run(mut input: impl BufRead, mut output: impl Write) -> Result<Summary> {
    let mut summary = Summary::default();
    let mut sum = 0.0;
    let mut line = Vec::new();
    for number in 1usize.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line).with_context(|| format!("reading row {number}"))?;
        if read == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let written = match score_line(&line) {
            Ok(judgement) => {
                summary.rows += 1;
                sum += judgement.total;
                serde_json::to_string(&judgement)
            }
            Err(error) => {
                summary.errors += 1;
                serde_json::to_string(&json!({ "error": format!("row {number}: {error:#}") }))
            }
        };
        let written = written.with_context(|| format!("writing the result of row {number} as JSON"))?;
        writeln!(output, "{written}").with_context(|| format!("writing the result of row {number}"))?;
    }
    output.flush().context("writing results")?;
    summary.mean = sum / summary.rows.max(1) as f64;
    Ok(summary)
}

fn score_line(line: &[u8]) -> Result<Judgement> {
    let text = std::str::from_utf8(line).context("reading the row: not UTF-8")?;
    let text = text.trim_start_matches('\u{feff}');
    let row: Row = serde_json::from_str(text).context("reading the row")?;
    judge(&row)
}

fn official(mode: Option<&str>) -> Result<Option<Official>> {
    Ok(match mode {
        None | Some("strict") => None,
        Some("official:vstar") => Some(Official::VStar),
        Some("official:mme_realworld") => Some(Official::MmeRealWorld),
        Some(other) => {
            bail!("\"mode\" is {other:?}, expected \"strict\", \"official:vstar\" or \"official:mme_realworld\"")
        }
    })
}

fn judge(row: &Row) -> Result<Judgement> {
    let official = official(row.mode.as_deref())?;
    ensure!(
        official.is_none() || row.kind == "choice",
        "\"mode\" {:?} is for kind \"choice\", and this row's kind is {:?}",
        row.mode.as_deref().unwrap_or(""),
        row.kind
    );
    let declared = extract(&row.prediction, Place::Declared).filter(|answer| !answer.is_empty());
    let (parts, extracted) = match row.kind.as_str() {
        "choice" => choice(row, official, declared)?,
        "text" => {
            let answers = texts(&row.answer)?;
            let right = declared.is_some_and(|d| answers.iter().any(|a| same_text(d, a)));
            (accuracy(right), json!(declared))
        }
        "number" => {
            let written = match &row.answer {
                Value::Number(n) => n.to_string(),
                Value::String(s) => s.clone(),
                other => bail!("\"answer\" is {other}, expected a number or its text"),
            };
            let answer = number(&written).with_context(|| format!("\"answer\" is {written:?}, expected one number"))?;
            let found = declared.and_then(number);
            let right = found.as_ref().is_some_and(|n| n.answers(&answer));
            (accuracy(right), json!(found.map(|n| n.value)))
        }
        "box" => {
            let answer = truth_box(&row.answer)?;
            let found = single_box(&row.prediction);
            let iou = found.map_or(0.0, |b| b.iou(&answer));
            (Parts::from([("iou", iou)]), json!(found))
        }
        "multi_image" => {
            let (parts, found) = MultiImage::default().judge(&row.prediction, &truth(&row.answer)?);
            (parts, json!(found))
        }
        other => bail!("\"kind\" is {other:?}, expected \"choice\", \"text\", \"number\", \"box\" or \"multi_image\""),
    };
    let total = parts.iter().map(|(_, value)| value).sum();
    Ok(Judgement { id: row.id.clone(), total, parts, extracted })
}

fn choice(row: &Row, official: Option<Official>, declared: Option<&str>) -> Result<(Parts, Value)> {
    let choices = row.choices.as_deref().unwrap_or(&[]);
    let written = row
        .answer
        .as_str()
        .with_context(|| format!("\"answer\" is {}, expected a letter or the text of a choice", row.answer))?;
    let answer = letter(written, choices).with_context(|| {
        format!("\"answer\" is {written:?}, expected a letter or the text of one of {} choices", choices.len())
    })?;
    let found = match official {
        None => declared.and_then(|d| letter(d, choices)),
        Some(Official::VStar) => vstar_letter(last_turn(&row.prediction)),
        Some(Official::MmeRealWorld) => mme_realworld_letter(last_turn(&row.prediction), choices),
    };
    Ok((accuracy(found == Some(answer)), json!(found)))
}

fn accuracy(right: bool) -> Parts {
    Parts::from([("accuracy", f64::from(u8::from(right)))])
}

/// One accepted text, or a list of them. Numbers and booleans are their text.
fn texts(answer: &Value) -> Result<Vec<String>> {
    let one = |value: &Value| match value {
        Value::String(s) => Ok(s.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        other => bail!("\"answer\" is {other}, expected a text or a list of texts"),
    };
    match answer {
        Value::Array(all) => {
            ensure!(!all.is_empty(), "\"answer\" is an empty list, expected at least one text");
            all.iter().map(one).collect()
        }
        other => Ok(vec![one(other)?]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn score(rows: &str) -> (Summary, Vec<Value>) {
        let mut out = Vec::new();
        let summary = run(rows.as_bytes(), &mut out).unwrap();
        let lines = String::from_utf8(out).unwrap();
        (summary, lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    fn total(row: Value) -> f64 {
        let (_, out) = score(&row.to_string());
        out[0]["total"].as_f64().unwrap_or_else(|| panic!("{row} → {}", out[0]))
    }

    #[test]
    fn choices() {
        let row =
            |prediction: &str, answer: &str| json!({"kind": "choice", "prediction": prediction, "answer": answer});
        assert_eq!(total(row(r"so \boxed{B}", "B")), 1.0);
        assert_eq!(total(row(r"\boxed{A} no, \boxed{B}", "A")), 0.0);
        assert_eq!(total(row("I think it is A, a cat", "A")), 0.0);
        assert_eq!(total(row("<|im_start|>user\n\\boxed{A}<|im_end|>\n<|im_start|>assistant\na cat", "A")), 0.0);
        let with = json!({"kind": "choice", "prediction": r"\boxed{a dog}", "answer": "B", "choices": ["cat", "dog"]});
        assert_eq!(total(with), 1.0);
    }

    #[test]
    fn official_and_strict_differ_where_the_official_rule_fails() {
        let text = "Based on the picture, the answer is (A)";
        let row =
            |mode: &str, answer: &str| json!({"kind": "choice", "prediction": text, "answer": answer, "mode": mode});
        assert_eq!(total(row("official:vstar", "B")), 1.0);
        assert_eq!(total(row("strict", "A")), 1.0);
        assert_eq!(total(row("official:mme_realworld", "B")), 1.0);
        let (_, out) = score(&row("official:nobody", "A").to_string());
        assert!(out[0]["error"].as_str().unwrap().contains("official:nobody"));
    }

    #[test]
    fn the_other_kinds() {
        let row = |kind: &str, prediction: &str, answer: Value| {
            total(json!({"kind": kind, "prediction": prediction, "answer": answer}))
        };
        assert_eq!(row("text", r"\boxed{The red ball.}", json!("red ball")), 1.0);
        assert_eq!(row("text", "<answer>blue</answer>", json!(["red", "Blue"])), 1.0);
        assert_eq!(row("text", r"\boxed{\text{stop}}", json!("stop")), 1.0);
        assert_eq!(row("text", r"\boxed{3.5}", json!("35")), 0.0);
        assert_eq!(row("text", r"\boxed{-5}", json!(5)), 0.0);
        assert_eq!(row("number", r"\boxed{\frac{1}{2}}", json!(0.5)), 1.0);
        assert_eq!(row("number", r"\boxed{1,200}", json!("1200 m")), 1.0);
        assert_eq!(row("number", r"\boxed{1200 cats}", json!(1200)), 0.0);
        assert_eq!(row("box", r#"```json [{"bbox_2d": [0,0,10,5], "label": "x"}]```"#, json!([0, 0, 10, 10])), 0.5);
        assert_eq!(row("box", "nowhere", json!([0, 0, 10, 10])), 0.0);
        let answer = json!([{"image": 2, "bbox": [0, 0, 10, 10]}]);
        let said = r#"<think>.</think><answer>[{"image": 2, "bbox_2d": [0,0,10,10], "label": "x"}]</answer>"#;
        assert_eq!(row("multi_image", said, answer.clone()), 3.0);
        assert_eq!(row("multi_image", &said.replace(": 2,", ": 1,"), answer), 1.0);
    }

    #[test]
    fn a_bad_row_is_named_and_the_rest_goes_on() {
        let good = r#"{"id": 7, "kind": "choice", "prediction": "A", "answer": "A"}"#;
        let rows = format!("{good}\n\nnot json\n{{\"kind\": \"poem\", \"prediction\": \"\", \"answer\": 1}}\n{good}");
        let (summary, out) = score(&rows);
        assert_eq!(summary, Summary { rows: 2, errors: 2, mean: 1.0 });
        assert!(out[1]["error"].as_str().unwrap().starts_with("row 3: "), "{}", out[1]);
        assert!(out[2]["error"].as_str().unwrap().contains("poem"));
        assert_eq!(out[3], json!({"id": 7, "total": 1.0, "parts": {"accuracy": 1.0}, "extracted": "A"}));
        for (kind, answer) in [
            ("box", json!([10, 10, 0, 0])),
            ("box", json!([0, 5, 10, 5])),
            ("multi_image", json!([{"image": 1, "bbox": [10, 10, 0, 0]}])),
        ] {
            let row = json!({"kind": kind, "prediction": "[0, 0, 10, 10]", "answer": answer});
            let (_, out) = score(&row.to_string());
            let error = out[0]["error"].as_str().unwrap();
            assert!(error.starts_with("row 1: \"answer\"") && error.contains("x1 < x2"), "{error}");
        }
        let mut out = Vec::new();
        assert_eq!(run(&b"\xff\xfe\n"[..], &mut out).unwrap().errors, 1);
    }

    /// Texts made of the pieces that the readers look for, so that odd combinations are common.
    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just(r"\boxed{".to_string()),
            Just("}".to_string()),
            Just("<answer>".to_string()),
            Just("</answer>".to_string()),
            Just("```json".to_string()),
            Just("```".to_string()),
            Just("<|im_start|>assistant".to_string()),
            Just("<|im_end|>".to_string()),
            Just(r#"[{"image": 1, "bbox_2d": [1,2,3,4]}]"#.to_string()),
            Just("Image-".to_string()),
            Just(r"\frac{".to_string()),
            Just(r"\text{".to_string()),
            Just("1,234".to_string()),
            Just("-.5e".to_string()),
            Just("×10^{".to_string()),
            Just("ANSWER IS ".to_string()),
            Just("(A".to_string()),
            "[\\[\\](),.0-9A-E% /{}-]{0,6}",
            "\\PC{0,4}",
            any::<String>(),
        ];
        proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_prediction_is_judged(
            prediction in hostile(),
            mode in prop_oneof![Just("strict"), Just("official:vstar"), Just("official:mme_realworld")],
            choices in proptest::collection::vec("\\PC{0,6}", 0..4),
        ) {
            for (kind, answer) in [
                ("choice", json!("A")),
                ("text", json!("cat")),
                ("number", json!(3)),
                ("box", json!([0, 0, 1, 1])),
                ("multi_image", json!([{"image": 1, "bbox": [0, 0, 1, 1]}])),
            ] {
                let mut row = json!({"kind": kind, "prediction": prediction, "answer": answer});
                if kind == "choice" {
                    row["mode"] = json!(mode);
                    row["choices"] = json!(if choices.is_empty() { vec!["A".to_string()] } else { choices.clone() });
                }
                let (_, out) = score(&row.to_string());
                let total = out[0]["total"].as_f64();
                prop_assert!(total.is_some_and(|t| (0.0..=3.0).contains(&t)), "{} → {}", row, out[0]);
            }
        }

        #[test]
        fn any_line_and_any_answer_is_survived(line in any::<Vec<u8>>(), text in hostile()) {
            let mut out = Vec::new();
            run(&line[..], &mut out).unwrap();
            for kind in ["choice", "text", "number", "box", "multi_image"] {
                let row = json!({"kind": kind, "prediction": text, "answer": text, "choices": [text]});
                score(&row.to_string());
            }
        }
    }
}
