//! `foveate score`: the judges of [`crate::reward`] on rows of JSON, one result a row.
//!
//! A row is `{"kind": "choice"|"text"|"number"|"box"|"multi_image", "prediction": TEXT, "answer": …, "choices"?: […],
//! "mode"?: "strict"|"official:NAME"}` with the names of [`Official`] and `mig_bench`, its result `{"total", "parts", "extracted"}`. What
//! must stay true: one line out for each line in that is not blank, in order; a bad row is one line `{"error": "row N: …"}` (N
//! counts lines from 1, blank ones too) and the rest goes on; no input at all makes it panic.
//!
//! Where answers are read: from the last `\boxed{}` of the last assistant turn, else its last `<answer>`, else the turn
//! itself, which is right only if it is nothing but an answer. Boxes and their answer share one coordinate space, but for MIG-Bench's
//! own rule: there the answer is as it was published (shares of a side, or thousandths in the revised version), the prediction is in either,
//! or in pixels of a picture shown at `"shown": [width, height]`; `"official:mig_bench:enlarged"` enlarges as that script does for Migician.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::geometry::Size;
use crate::reward::mig::{Item, Rule, Version};
use crate::reward::{
    MultiImage, Official, Parts, Place, extract, last_turn, letter, number, same_text, single_box, truth, truth_box,
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
    #[serde(default)]
    shown: Option<[u32; 2]>,
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

/// How a row is judged.
enum Mode {
    Strict,
    Official(Official),
    MigBench { enlarge: bool },
}

impl Mode {
    fn of(row: &Row) -> Result<Mode> {
        let mode = match row.mode.as_deref() {
            None | Some("strict") => return Ok(Mode::Strict),
            Some("official:mig_bench") => Mode::MigBench { enlarge: false },
            Some("official:mig_bench:enlarged") => Mode::MigBench { enlarge: true },
            Some(said) => {
                let names = Official::ALL.map(|rule| format!("\"official:{}\"", rule.name())).join(", ");
                let rule = said
                    .strip_prefix("official:")
                    .and_then(|name| Official::ALL.into_iter().find(|rule| rule.name() == name));
                Mode::Official(rule.with_context(|| {
                    format!("\"mode\" is {said:?}, expected \"strict\", {names} or \"official:mig_bench\"")
                })?)
            }
        };
        let kind = match mode {
            Mode::Official(rule) if rule.of_choices() => "choice",
            Mode::Official(Official::Counting) => "number",
            Mode::MigBench { .. } => "multi_image",
            Mode::Official(_) | Mode::Strict => "text",
        };
        let said = row.mode.as_deref().unwrap_or_default();
        ensure!(row.kind == kind, "\"mode\" {said:?} is for kind {kind:?}, and this row's kind is {:?}", row.kind);
        Ok(mode)
    }
}

fn judge(row: &Row) -> Result<Judgement> {
    let mode = Mode::of(row)?;
    ensure!(
        row.shown.is_none() || matches!(mode, Mode::MigBench { .. }),
        "\"shown\" is for mode \"official:mig_bench\"; elsewhere boxes share one space"
    );
    match mode {
        Mode::Strict => strict(row),
        Mode::Official(rule) => official(row, rule),
        Mode::MigBench { enlarge } => mig_bench(row, enlarge),
    }
}

/// What the declared answer is worth, and nothing else.
fn strict(row: &Row) -> Result<Judgement> {
    let declared = extract(&row.prediction, Place::Declared).filter(|answer| !answer.is_empty());
    let (parts, extracted) = match row.kind.as_str() {
        "choice" => choice(row, declared)?,
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

/// MIG-Bench's published rule: the first box of the text, whichever picture it is on. The total is Acc@0.5.
fn mig_bench(row: &Row, enlarge: bool) -> Result<Judgement> {
    let answer = row.answer.get("box").or(row.answer.get("bbox")).unwrap_or(&row.answer);
    let published: [f64; 4] = serde_json::from_value(answer.clone()).ok().with_context(|| {
        format!("\"answer\" is {}, expected [x1,y1,x2,y2] or {{\"box\": [x1,y1,x2,y2]}}", row.answer)
    })?;
    let shown = row.shown.map(|[width, height]| Size { width, height });
    ensure!(shown.is_none_or(|size| size.area() > 0), "\"shown\" is {:?}, expected [width, height]", row.shown);
    let rule = Rule { version: Version::of([&published]), enlarge, shown };
    let found = rule.read(last_turn(&row.prediction));
    let item = Item { image: 1, published };
    let iou = item.official_iou(found);
    let at = |least: f64| f64::from(u8::from(iou >= least));
    let parts = Parts::from([("acc@0.5", at(0.5)), ("acc@0.7", at(0.7)), ("acc@0.3", at(0.3)), ("iou", iou)]);
    Ok(Judgement { id: row.id.clone(), total: at(0.5), parts, extracted: json!(found) })
}

/// A benchmark's rule, on the whole last turn.
fn official(row: &Row, rule: Official) -> Result<Judgement> {
    let choices = row.choices.as_deref().unwrap_or(&[]);
    let answer = match &row.answer {
        _ if rule.of_choices() => right_letter(row, choices)?.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => s.clone(),
        other => bail!("\"answer\" is {other}, expected a word or a number"),
    };
    let response = last_turn(&row.prediction);
    let parts = accuracy(rule.right(response, &answer, choices));
    let total = parts.iter().map(|(_, value)| value).sum();
    Ok(Judgement { id: row.id.clone(), total, parts, extracted: json!(rule.read(response, choices)) })
}

fn choice(row: &Row, declared: Option<&str>) -> Result<(Parts, Value)> {
    let choices = row.choices.as_deref().unwrap_or(&[]);
    let answer = right_letter(row, choices)?;
    let found = declared.and_then(|d| letter(d, choices));
    Ok((accuracy(found == Some(answer)), json!(found)))
}

fn right_letter(row: &Row, choices: &[String]) -> Result<char> {
    let written = row
        .answer
        .as_str()
        .with_context(|| format!("\"answer\" is {}, expected a letter or the text of a choice", row.answer))?;
    letter(written, choices).with_context(|| {
        format!("\"answer\" is {written:?}, expected a letter or the text of one of {} choices", choices.len())
    })
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
        assert_eq!(total(row("official:hr_bench", "A")), 1.0);
        let other = |kind: &str, mode: &str, said: &str, answer: Value| {
            total(json!({"kind": kind, "prediction": said, "answer": answer, "mode": mode}))
        };
        assert_eq!(other("text", "official:pope", "Yes", json!("yes")), 1.0);
        assert_eq!(other("text", "strict", "Yes.", json!("yes")), 1.0);
        assert_eq!(other("text", "official:pope", "Yes.", json!("yes")), 0.0);
        assert_eq!(other("number", "official:counting", "I see 4 or 5 birds", json!(4)), 1.0);
        assert_eq!(other("number", "strict", "I see 4 or 5 birds", json!(4)), 0.0);
        let (_, out) = score(&row("official:nobody", "A").to_string());
        assert!(out[0]["error"].as_str().unwrap().contains("official:nobody"));
    }

    #[test]
    fn mig_bench_reads_the_first_box_in_any_unit_and_no_picture() {
        let judged = |said: &str, answer: Value, more: Value| {
            let mut row =
                json!({"kind": "multi_image", "mode": "official:mig_bench", "prediction": said, "answer": answer});
            row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let (_, out) = score(&row.to_string());
            (out[0]["total"].as_f64(), out[0]["parts"]["iou"].as_f64(), out[0]["extracted"].clone())
        };
        let (original, revised) = (json!([0.25, 0.25, 0.5, 0.5]), json!({"image": 2, "box": [250, 250, 500, 500]}));
        let whole = (Some(1.0), Some(1.0), original.clone());
        assert_eq!(judged("<|box_start|>(250,250),(500,500)<|box_end|>", original.clone(), json!({})), whole);
        assert_eq!(judged("[0.25, 0.25, 0.5, 0.5]", original.clone(), json!({})), whole);
        let shown = json!({"shown": [800, 400]});
        assert_eq!(judged(r#"[{"image": 9, "bbox_2d": [200, 100, 400, 200]}]"#, original.clone(), shown), whole);
        assert_eq!(judged("(250,250),(500,500)", revised.clone(), json!({})).0, Some(1.0));
        assert_eq!(judged("[0.25, 0.25, 0.5, 0.5]", revised, json!({})).0, Some(0.0));
        assert_eq!(judged("(250,250),(500,500)", json!([0.5, 0.5, 0.25, 0.25]), json!({})).0, Some(0.0), "upside down");
        let enlarged = json!({"mode": "official:mig_bench:enlarged"});
        assert_eq!(judged("(250,200),(500,500)", json!([0.25, 0.21, 0.5, 0.55]), enlarged).1, Some(1.0));
        let (_, out) =
            score(r#"{"kind": "box", "mode": "official:mig_bench", "prediction": "", "answer": [0, 0, 1, 1]}"#);
        assert!(out[0]["error"].as_str().unwrap().contains("is for kind \"multi_image\""), "{}", out[0]);
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
                if kind == "multi_image" {
                    let mut published = row.clone();
                    published["mode"] = json!("official:mig_bench:enlarged");
                    published["answer"] = json!([0, 0, 1, 1]);
                    let (_, out) = score(&published.to_string());
                    prop_assert!(out[0]["total"].is_f64(), "{} → {}", published, out[0]);
                }
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
