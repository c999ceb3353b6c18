//! MIG-Bench: ten tasks of grounding over several pictures, in its original and its revised annotation (spec 3.4).
//!
//! A row keeps the published box beside its target under `mig_bench` ([`Truth`]), because the published scoring compares with that and
//! not with pixels; its `split` says which annotation it is. What must stay true: the seven impossible items become rows too, marked
//! `"faulty": true` and without a target, so that official scores count them and cleaned ones do not; each row is a question as it was
//! published, and where a set of questions differs only in the picture they ask for, their key `all` holds the one question that asks
//! for all. <https://huggingface.co/datasets/Michael4933/MIG-Bench>

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, json};

use super::convert::{Draft, Drafts, Mention, Place, Unit, items, mentions, referred, words};
use super::{ALL, FAULTY, in_words};
use crate::geometry::BBox;
use crate::reward::mig::{Item, MIG_BENCH, TASKS, Truth, Version};

#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
struct Row {
    task: String,
    images: Vec<String>,
    question: String,
    answer: [f64; 4],
    #[serde(default)]
    additional_info: String,
}

pub(super) fn read(text: &str) -> Result<Drafts> {
    let rows = items::<Row>(text)?;
    let version = Version::of(rows.iter().map(|(_, row)| &row.answer));
    let thousandths = |row: &Row| row.answer.iter().any(|side| *side > 2.0);
    // Among thousandths few boxes are so small; among shares none is so large.
    if version == Version::Revised && 2 * rows.iter().filter(|(_, row)| thousandths(row)).count() < rows.len() {
        let odd = rows.iter().find(|(_, row)| thousandths(row)).map_or(0, |(number, _)| *number);
        bail!(
            "row {odd} has a box in thousandths, and most rows have shares of the picture's sides; the original and the revised set do not go into one file"
        );
    }
    let mut drafts = Drafts { read: rows.len(), ..Drafts::default() };
    let mut faulty = 0;
    for (number, row) in &rows {
        let draft = draft(*number, row, version).with_context(|| format!("row {number}"))?;
        faulty += usize::from(draft.extra.contains_key(FAULTY));
        drafts.rows.push(draft);
    }
    ask_for_all(&rows, &mut drafts.rows);
    drafts.notes.push(format!("{} annotations, {faulty} impossible boxes among them", version.name()));
    Ok(drafts)
}

fn draft(number: usize, row: &Row, version: Version) -> Result<Draft> {
    let image = target(row)?;
    ensure!(
        (1..=row.images.len()).contains(&image),
        "the target is in picture {image}, and the row has {}",
        row.images.len()
    );
    let item = Item { image, published: row.answer };
    let mut extra = Map::new();
    let mut places = Vec::new();
    if item.faulty(version) {
        extra.insert(FAULTY.into(), true.into());
    } else {
        let label = asked(row).filter(|_| row.task == "region").map(|mention| format!("Image-{}", mention.number + 1));
        let unit = Unit::Sides(version.side());
        let bbox = BBox::from(row.answer);
        places.push(Place { image, bbox, unit, label: label.or_else(|| referred(&row.question)) });
    }
    let truth = Truth { version, items: vec![item] };
    extra.insert(MIG_BENCH.into(), serde_json::to_value(truth).context("writing the published answer")?);
    Ok(Draft {
        number,
        id: id(number, version),
        images: row.images.clone(),
        question: words(&row.question),
        places,
        task: Some(row.task.clone()),
        split: Some(version.name().to_owned()),
        extra,
    })
}

fn id(number: usize, version: Version) -> String {
    format!("mig-{}-{number:04}", version.name())
}

/// Which picture the answer is in.
fn target(row: &Row) -> Result<usize> {
    Ok(match row.task.as_str() {
        // Parts of the first picture are looked for in it.
        "region" => 1,
        "diff" | "view_diff" | "refer_grounding" | "reasoning" | "correspondence" => 2,
        "common_object" | "multi_view" | "object_tracking" => {
            asked(row).context("\"question\" asks for no picture, expected \"in the 2th image\" or the like")?.number
        }
        "group_grounding" => {
            let named = mentions(&row.additional_info, "image").into_iter().next();
            named
                .context("\"additional_info\" names no picture, expected \"It is in the first image\" or the like")?
                .number
        }
        other => bail!("\"task\" is {other:?}, expected one of {}", TASKS.map(|(key, _)| key).join(", ")),
    })
}

/// What the question asks for: a picture, or a part of the first one.
fn asked(row: &Row) -> Option<Mention> {
    let noun = if row.task == "region" { "region picture" } else { "image" };
    mentions(&row.question, noun).pop()
}

/// Finds the questions that stand one after another and differ only in the number they ask for, and gives each of a set the
/// question that asks for all of it ("all" instead of "poll", MG-Thinker, arXiv 2609.37374).
fn ask_for_all(rows: &[(usize, Row)], drafts: &mut [Draft]) {
    let mut start = 0;
    while let Some((_, first)) = rows.get(start) {
        let set = set(first, &rows[start + 1..]);
        let end = start + set.len().max(1);
        if let [mention, _, ..] = &set[..] {
            let region = first.task == "region";
            let named: Vec<String> = set.iter().map(|m| format!("Image-{}", m.number + usize::from(region))).collect();
            let list = format!("{}{}", if region { "the region pictures " } else { "" }, in_words(&named));
            let (before, after) = around(first, mention);
            let all = json!({"set": drafts[start].id, "question": words(&format!("{before}{list}{after}"))});
            for draft in &mut drafts[start..end] {
                draft.extra.insert(ALL.into(), all.clone());
            }
        }
        start = end;
    }
}

/// What the questions of the set that begins with `first` ask for; one or none: it is no set.
fn set(first: &Row, following: &[(usize, Row)]) -> Vec<Mention> {
    let several = |row: &Row| {
        let task = ["common_object", "multi_view", "object_tracking", "region"].contains(&row.task.as_str());
        asked(row).filter(|_| task)
    };
    let Some(mention) = several(first) else { return Vec::new() };
    let words = around(first, &mention);
    let mut set = vec![mention];
    for (_, next) in following {
        let Some(mention) = several(next) else { break };
        // A number that does not rise begins another set: one was published twice.
        let rises = set.iter().all(|before| before.number < mention.number);
        if !rises || next.task != first.task || next.images != first.images || around(next, &mention) != words {
            break;
        }
        set.push(mention);
    }
    set
}

/// The words before and after what a question asks for.
fn around<'a>(row: &'a Row, mention: &Mention) -> (&'a str, &'a str) {
    let (before, after) = (row.question.get(..mention.words.start), row.question.get(mention.words.end..));
    (before.unwrap_or_default(), after.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::Sample;
    use super::super::convert::tests::{converted, converted_with, pictures};
    use super::super::convert::{Converted, Format};
    use super::*;
    use serde_json::Value;

    const NAMES: [&str; 4] = ["images/a.png", "images/b.png", "images/c.png", "images/d.png"];

    fn row(task: &str, pictures: usize, question: &str, answer: [f64; 4]) -> Value {
        let images: Vec<String> = NAMES[..pictures].iter().map(|name| format!("./MIG-Bench/{name}")).collect();
        json!({"task": task, "images": images, "question": question, "answer": answer, "additional_info": "", "need_format": true})
    }

    fn read(rows: &[Value]) -> Result<(Converted, Vec<Sample>)> {
        let dir = pictures(&NAMES);
        let text = serde_json::to_string(rows).unwrap();
        converted_with(dir.path(), Format::MigBench, &text, |o| o.remap = vec!["./MIG-Bench=.".parse().unwrap()])
    }

    const HERE: [f64; 4] = [0.25, 0.5, 0.5, 1.0];
    const MARKED: &str = "For the object in the first image marked with red bounding box(<|box_start|>(1,2),(3,4)<|box_end|>), please locate it in the ";

    #[test]
    fn each_task_has_its_target_picture() {
        let mut group = row("group_grounding", 4, "Find <|object_ref_start|>a dog<|object_ref_end|>.", HERE);
        group["additional_info"] = "It is in the third image. <|box_start|>(250,500),(500,1000)<|box_end|>. ".into();
        let cases = [
            (row("diff", 2, "Compare these two images carefully.", HERE), 2, "Compare these two images carefully."),
            (row("view_diff", 2, "Find it in the second image.", HERE), 2, "Find it in the second image."),
            (
                row("common_object", 4, "Locate this object in the 3th image. ", HERE),
                3,
                "Locate this object in the 3th image.",
            ),
            (
                row("object_tracking", 3, &format!("{MARKED}2th image. "), HERE),
                2,
                "For the object in the first image marked with red bounding box((1,2),(3,4)), please locate it in the 2th image.",
            ),
            (row("multi_view", 3, "In the first image(x). Locate this object in the 2th image.", HERE), 2, ""),
            (row("region", 3, "Please locate the 2th region picture in the source image. ", HERE), 1, ""),
            (row("refer_grounding", 2, "Where does the object in image-1 locate in the image-2.", HERE), 2, ""),
            (group, 3, "Find a dog."),
            (row("reasoning", 2, "What in Image-2 eats Image-1?", HERE), 2, ""),
            (row("correspondence", 2, "For the area in the first image, locate its like.", HERE), 2, ""),
        ];
        let (report, rows) = read(&cases.clone().map(|(row, ..)| row)).unwrap();
        assert_eq!((report.read, report.rows), (10, 10));
        assert_eq!(report.notes, ["original annotations, 0 impossible boxes among them"]);
        for (sample, (source, image, question)) in rows.iter().zip(&cases) {
            let target = &sample.targets[0];
            assert_eq!((target.image, target.bbox), (*image, BBox::new(50.0, 50.0, 100.0, 100.0)), "{source}");
            assert!(question.is_empty() || sample.question == *question, "{}", sample.question);
            assert_eq!(sample.split.as_deref(), Some("original"));
            assert_eq!(sample.task.as_deref(), source["task"].as_str());
            let truth: Truth = serde_json::from_value(sample.extra[MIG_BENCH].clone()).unwrap();
            assert_eq!(
                truth,
                Truth { version: Version::Original, items: vec![Item { image: *image, published: HERE }] }
            );
        }
        assert_eq!(rows[0].id, "mig-original-0001");
        assert_eq!(rows[5].targets[0].label.as_deref(), Some("Image-3"));
        assert_eq!(rows[7].targets[0].label.as_deref(), Some("a dog"));
    }

    #[test]
    fn impossible_boxes_stay_as_they_were_published_and_have_no_target() {
        let question = "Locate this object in the 1th image.";
        let inverted = [0.027, 0.18, 0.143, 0.051];
        let beyond = [0.319, 0.186, 1.048, 0.535];
        let boxes = [HERE, inverted, beyond];
        let (report, rows) = read(&boxes.map(|b| row("common_object", 3, question, b))).unwrap();
        assert_eq!(report.notes, ["original annotations, 2 impossible boxes among them"]);
        for (sample, b) in rows.iter().zip(boxes) {
            assert_eq!((sample.faulty(), sample.targets.is_empty()), (b != HERE, b != HERE));
            let truth: Truth = serde_json::from_value(sample.extra[MIG_BENCH].clone()).unwrap();
            assert_eq!(truth.items[0].published, b);
        }
        assert_eq!(rows[1].answer, "unknown");
    }

    #[test]
    fn the_revised_annotation_is_known_by_its_thousandths() {
        let question = "Compare.";
        let rows = [[250.0, 500.0, 500.0, 1000.0], [0.0, 0.0, 1.0, 1.0]].map(|b| row("diff", 2, question, b));
        let mixed =
            [rows.as_slice(), &[[0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.6, 0.6]].map(|b| row("diff", 2, question, b))]
                .concat();
        assert!(format!("{:#}", read(&mixed).unwrap_err()).contains("row 1 has a box in thousandths"));
        let (report, rows) = read(&rows).unwrap();
        assert_eq!(report.notes, ["revised annotations, 0 impossible boxes among them"]);
        assert_eq!((rows[0].split.as_deref(), rows[0].id.as_str()), (Some("revised"), "mig-revised-0001"));
        assert_eq!(rows[0].targets[0].bbox, BBox::new(50.0, 50.0, 100.0, 100.0));
        assert_eq!(rows[1].targets[0].bbox, BBox::new(0.0, 0.0, 0.2, 0.1));
    }

    #[test]
    fn questions_that_differ_in_a_number_share_one_that_asks_for_all() {
        let common = |n: usize| row("common_object", 3, &format!("Locate this object in the {n}th image."), HERE);
        let region =
            |n: usize| row("region", 3, &format!("Please locate the {n}th region picture in the source image."), HERE);
        let mut other = common(3);
        other["images"] = json!([NAMES[3], NAMES[2], NAMES[1]]);
        let dir = pictures(&NAMES);
        let rows = [
            common(1),
            common(2),
            common(1),
            common(3),
            other,
            region(1),
            region(2),
            region(1),
            row("diff", 2, "?", HERE),
        ];
        let text = serde_json::to_string(&rows).unwrap().replace("./MIG-Bench/", "");
        let (_, rows) = converted(dir.path(), Format::MigBench, &text).unwrap();
        let all = |k: usize| {
            rows[k].extra.get(ALL).map(|all| (all["set"].as_str().unwrap(), all["question"].as_str().unwrap()))
        };
        assert_eq!(all(0), Some(("mig-original-0001", "Locate this object in Image-1 and Image-2.")));
        assert_eq!(all(1), all(0));
        assert_eq!(all(2), Some(("mig-original-0003", "Locate this object in Image-1 and Image-3.")));
        assert_eq!(all(3), all(2));
        assert_eq!(
            all(5),
            Some(("mig-original-0006", "Please locate the region pictures Image-2 and Image-3 in the source image."))
        );
        assert_eq!(all(6), all(5));
        assert_eq!([all(4), all(7), all(8)], [None; 3]);
    }

    #[test]
    fn a_bad_item_is_named() {
        let good = row("diff", 2, "Compare.", HERE);
        let refused = |change: fn(&mut Value), words: &str| {
            let mut bad = row("common_object", 3, "Locate it in the 2th image.", HERE);
            change(&mut bad);
            let said = format!("{:#}", read(&[good.clone(), bad]).unwrap_err());
            assert!(said.contains("row 2") && said.contains(words) && said.ends_with("in.json"), "{said}");
        };
        refused(|row| row["question"] = "Locate it in the 5th image.".into(), "in picture 5, and the row has 3");
        refused(|row| row["question"] = "Locate it.".into(), "\"question\" asks for no picture");
        refused(|row| row["task"] = "group_grounding".into(), "\"additional_info\" names no picture");
        refused(|row| row["task"] = "poem".into(), "\"task\" is \"poem\", expected one of diff");
        refused(|row| row["answer"] = json!([1, 2]), "length 2");
        refused(|row| row["images"][1] = "lost.png".into(), "lost.png");
    }
}
