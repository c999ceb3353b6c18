//! Polling or asking at once: the same annotation as several questions or as one.
//!
//! A question about one picture at a time ("where is it in the second image?") says which picture the answer is in, and so flatters
//! models that cannot tell pictures apart: asked for all places at once, one published model falls from 79 to 26 (MG-Thinker, arXiv
//! 2609.37374, table 2). So both are reported. MIG-Bench is published as a poll; rows with targets in several
//! pictures ask at once already. What must stay true: no target is lost or doubled, and rows that are only one question stay as they are.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::template::finished;
use crate::data::{ALL, FAULTY, Sample, convert};
use crate::reward::mig::MIG_BENCH;
use crate::synth::trajectories::TRAJECTORY;

/// How what a set knows of some pictures is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Poll,
    All,
}

impl Ask {
    /// The rows, asked this way.
    pub fn rows(self, rows: Vec<Sample>) -> Vec<Sample> {
        match self {
            Ask::Poll => rows.into_iter().flat_map(one_a_picture).collect(),
            Ask::All => at_once(rows),
        }
    }
}

/// One question for each picture with targets.
fn one_a_picture(row: Sample) -> Vec<Sample> {
    let mut pictures: Vec<usize> = row.targets.iter().map(|target| target.image).collect();
    pictures.sort_unstable();
    pictures.dedup();
    if pictures.len() < 2 {
        return vec![row];
    }
    let about = |&k: &usize| {
        let mut one = row.clone();
        one.id = format!("{}-{k}", row.id);
        one.question = format!("{} Answer for Image-{k} alone.", finished(&row.question));
        one.targets.retain(|target| target.image == k);
        rewrite(&mut one);
        one
    };
    pictures.iter().map(about).collect()
}

/// Neighbours of one set as the one question that they all hold.
fn at_once(rows: Vec<Sample>) -> Vec<Sample> {
    let mut asked: Vec<Sample> = Vec::with_capacity(rows.len());
    for row in rows {
        let all = row.extra.get(ALL).cloned();
        match asked.last_mut() {
            Some(last) if all.is_some() && last.extra.get(ALL) == all.as_ref() => join(last, row),
            _ => asked.push(row),
        }
    }
    asked
}

fn join(into: &mut Sample, row: Sample) {
    into.targets.extend(row.targets);
    let items = row.extra.get(MIG_BENCH).and_then(|truth| truth["items"].as_array()).cloned().unwrap_or_default();
    if let Some(Value::Array(all)) = into.extra.get_mut(MIG_BENCH).and_then(|truth| truth.get_mut("items")) {
        all.extend(items);
    }
    if let Some(question) = into.extra.get(ALL).and_then(|all| all["question"].as_str()) {
        into.question = question.to_owned();
    }
    rewrite(into);
}

/// What follows from a row's targets, which are others now. A written trajectory was about the old ones.
fn rewrite(row: &mut Sample) {
    row.answer = convert::answer(&row.targets);
    row.extra.shift_remove(TRAJECTORY);
    if !row.targets.is_empty() {
        row.extra.shift_remove(FAULTY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Target;
    use crate::geometry::BBox;
    use crate::reward::mig::Truth;
    use serde_json::{Map, json};

    fn row(id: &str, images: &[usize]) -> Sample {
        let bbox = BBox::new(1.0, 2.0, 3.0, 4.0);
        let targets = images.iter().map(|&image| Target { image, bbox, label: None }).collect();
        let mut sample = Sample::question(&["1.png".into(), "2.png".into(), "3.png".into()], "Where is it", vec![]);
        (sample.id, sample.targets) = (id.into(), targets);
        sample.extra = Map::from_iter([(TRAJECTORY.to_owned(), json!("Seen."))]);
        sample
    }

    #[test]
    fn a_poll_asks_about_each_picture_alone() {
        let polled = Ask::Poll.rows(vec![row("a", &[3, 1, 3]), row("b", &[2])]);
        let seen: Vec<(&str, &str, usize)> =
            polled.iter().map(|r| (r.id.as_str(), r.question.as_str(), r.targets.len())).collect();
        assert_eq!(
            seen,
            [
                ("a-1", "Where is it. Answer for Image-1 alone.", 1),
                ("a-3", "Where is it. Answer for Image-3 alone.", 2),
                ("b", "Where is it", 1)
            ]
        );
        assert!(polled[1].targets.iter().all(|t| t.image == 3) && polled[1].images.len() == 3);
        assert_eq!(polled[0].answer, r#"[{"image":1,"bbox":[1.0,2.0,3.0,4.0]}]"#);
        assert!(!polled[0].extra.contains_key(TRAJECTORY) && polled[2].extra.contains_key(TRAJECTORY));
    }

    #[test]
    fn a_set_is_asked_at_once_with_all_that_was_published() {
        let of = |id: &str, image: usize, faulty: bool, set: &str| {
            let mut row = row(id, if faulty { &[] } else { std::slice::from_ref(&image) });
            let item = json!({"image": image, "box": [0.1, 0.2, 0.3, 0.4]});
            row.extra.insert(MIG_BENCH.into(), json!({"version": "original", "items": [item]}));
            row.extra.insert(ALL.into(), json!({"set": set, "question": "Where in each?"}));
            if faulty {
                row.extra.insert(FAULTY.into(), true.into());
            }
            row
        };
        let rows = vec![of("a", 1, true, "x"), of("b", 2, false, "x"), of("c", 3, false, "y"), row("d", &[1])];
        let asked = Ask::All.rows(rows.clone());
        let ids: Vec<&str> = asked.iter().map(|r| r.id.as_str()).collect();
        assert_eq!(ids, ["a", "c", "d"]);
        assert_eq!((asked[0].question.as_str(), asked[0].targets.len()), ("Where in each?", 1));
        let truth: Truth = serde_json::from_value(asked[0].extra[MIG_BENCH].clone()).unwrap();
        let items: Vec<usize> = truth.items.iter().map(|item| item.image).collect();
        assert_eq!(items, [1, 2], "the impossible one is asked for too");
        assert!(!asked[0].faulty());
        assert_eq!(asked[1..], rows[2..], "what is alone stays as it was");
        // As published it is a poll already.
        assert_eq!(Ask::Poll.rows(rows.clone()), rows);
    }
}
