//! Episodes as the page reads them, and the choice of the few it shows.
//!
//! The page must open whatever wrote the folder: every field has a default, null counts as missing, and ids may be numbers or text. What must
//! stay true: the choice depends on nothing but the records, so the same folder gives the same page.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// One episode of `episodes/STEP.jsonl`. Boxes are in pixels of the original pictures.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Record {
    pub id: Value,
    pub step: u64,
    pub group: Value,
    pub member: Value,
    pub task: String,
    pub split: String,
    pub question: String,
    pub answer: Value,
    pub images: Vec<String>,
    pub targets: Vec<Target>,
    pub views: Vec<View>,
    pub turns: Vec<Turn>,
    pub stop: Value,
    pub rewards: Map<String, Value>,
    pub reward: Option<f64>,
    pub advantage: Option<f64>,
    /// Which tokens the policy wrote, and their log-probs, one entry a token of the whole conversation.
    pub sampled: Vec<u8>,
    pub logprobs: Vec<f32>,
    /// What the update saw at each token that the policy wrote.
    pub update: Update,
}

/// One entry a token that the policy wrote; empty where nothing was recorded.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Update {
    pub ratios: Vec<f32>,
    pub entropies: Vec<f32>,
    pub advantages: Vec<f32>,
}

/// A box on one of the pictures: where the answer is (for judging and showing; the policy never saw it), or where the policy says it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Target {
    /// Counts from 1, as data rows do; a target that does not say belongs to the first picture.
    pub image: usize,
    pub bbox: Option<[f64; 4]>,
    pub label: String,
}

/// What was shown to the policy: a region of an original picture at a size, from turn `turn` on.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct View {
    /// The picture's place in [`Record::images`], from 0.
    pub image: usize,
    pub region: Option<[f64; 4]>,
    pub size: Option<[u32; 2]>,
    pub turn: usize,
}

/// One message.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Turn {
    pub role: String,
    pub text: String,
    pub tokens: Value,
    /// What the program read in the policy's words: any of these may be there.
    pub action: Value,
    pub outcome: Value,
    pub bbox: Option<[f64; 4]>,
    /// The answer in boxes on several pictures, as it was read.
    pub boxes: Vec<Target>,
    /// The words token by token; records of earlier versions have none.
    pub pieces: Vec<String>,
}

impl Target {
    /// The picture's place in [`Record::images`], from 0 as views count.
    pub fn index(&self) -> usize {
        self.image.saturating_sub(1)
    }
}

impl Record {
    /// Reads one record.
    ///
    /// # Errors
    /// When a field has another type than it should.
    pub fn from_value(value: Value) -> Result<Self> {
        serde_json::from_value(without_nulls(value)).context("this is not an episode")
    }

    /// Whether the answer was right: the part of the reward that judges the answer where it has a known name, else the whole reward.
    pub fn right(&self) -> bool {
        ["answer", "accuracy", "correct", "acc", "joint"]
            .iter()
            .find_map(|name| self.rewards.get(*name)?.as_f64())
            .or(self.reward)
            .is_some_and(|score| score > 0.5)
    }
}

impl Record {
    /// Whether the question was about several pictures at once, not about one and closer looks at it.
    pub fn several_pictures(&self) -> bool {
        self.images.len() > 1
    }

    /// Log-probs of the tokens that the policy wrote, in order.
    pub fn sampled_logprobs(&self) -> impl Iterator<Item = f32> {
        self.sampled.iter().zip(&self.logprobs).filter(|(sampled, _)| **sampled > 0).map(|(_, logprob)| *logprob)
    }

    /// The class of the first box that the policy named, empty where none was asked for.
    pub fn first_outcome(&self) -> String {
        self.turns.iter().map(|turn| plain(&turn.outcome)).find(|outcome| !outcome.is_empty()).unwrap_or_default()
    }

    /// The boxes that the policy answered with.
    pub fn said(&self) -> impl Iterator<Item = &Target> {
        self.turns.iter().flat_map(|turn| &turn.boxes)
    }
}

/// Text of a value that may be text or a number: ids, answers, stop reasons.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| (name, without_nulls(value)))
                .collect(),
        ),
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

/// The indices of at most `wanted` episodes, in the order given: half right and half wrong where there are enough, spread evenly from early to late,
/// and no two of one group while other groups are left.
pub fn choose(records: &[Record], wanted: usize) -> Vec<usize> {
    let (right, wrong): (Vec<usize>, Vec<usize>) = (0..records.len()).partition(|&index| records[index].right());
    let half = wanted / 2;
    let from_right = right.len().min(half.max(wanted.saturating_sub(wrong.len())));
    let from_wrong = wrong.len().min(wanted - from_right);
    let mut chosen = spread(records, &right, from_right);
    chosen.extend(spread(records, &wrong, from_wrong));
    chosen.sort_unstable();
    chosen
}

/// The indices of about `wanted` episodes, in the order given: whole groups, at even distances over the steps, and of each step the same share at even
/// distances. So siblings stay together, and where every step asks the same questions (an evaluation), the same ones are taken from each.
pub fn choose_groups(records: &[Record], wanted: usize) -> Vec<usize> {
    let mut steps: Vec<(u64, Vec<Vec<usize>>)> = Vec::new();
    for (index, record) in records.iter().enumerate() {
        if steps.last().is_none_or(|(step, _)| *step != record.step) {
            steps.push((record.step, Vec::new()));
        }
        let Some((_, groups)) = steps.last_mut() else { continue };
        match groups.last_mut() {
            Some(group) if plain(&records[group[0]].group) == plain(&record.group) => group.push(index),
            _ => groups.push(vec![index]),
        }
    }
    let groups: usize = steps.iter().map(|(_, groups)| groups.len()).sum();
    if records.len() <= wanted || groups == 0 {
        return (0..records.len()).collect();
    }
    let wanted_groups = (wanted * groups / records.len()).max(1);
    // At most a fifth more than was wanted, rather than half of it.
    let (kept, a_step) = match (wanted_groups + wanted_groups / 5) / steps.len() {
        0 => (wanted_groups, 1),
        a_step => (steps.len(), a_step),
    };
    let chosen = evenly(&(0..steps.len()).collect::<Vec<_>>(), kept).into_iter().flat_map(|step| {
        let groups = &steps[step].1;
        evenly(&(0..groups.len()).collect::<Vec<_>>(), a_step).into_iter().flat_map(|group| groups[group].clone())
    });
    chosen.collect()
}

/// `wanted` of `from`, at even distances; one of each group first.
fn spread(records: &[Record], from: &[usize], wanted: usize) -> Vec<usize> {
    let mut seen = std::collections::HashSet::new();
    let group = |index: usize| (records[index].step, plain(&records[index].group), plain(&records[index].id));
    let (firsts, others): (Vec<usize>, Vec<usize>) = from.iter().partition(|&&index| seen.insert(group(index)));
    let mut chosen = evenly(&firsts, wanted);
    chosen.extend(evenly(&others, wanted - chosen.len()));
    chosen
}

fn evenly(from: &[usize], wanted: usize) -> Vec<usize> {
    let take = wanted.min(from.len());
    match take {
        0 => Vec::new(),
        1 => vec![from[from.len() / 2]],
        _ => (0..take).map(|i| from[i * (from.len() - 1) / (take - 1)]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(step: u64, group: u64, reward: f64) -> Record {
        Record::from_value(json!({"id": format!("{step}/{group}"), "step": step, "group": group, "reward": reward}))
            .unwrap()
    }

    #[test]
    fn missing_and_null_fields_have_defaults_and_ids_may_be_numbers() {
        let got = Record::from_value(json!({"id": 7, "group": null, "reward": null, "turns": [{"role": "user", "action": null}], "new_field": {}})).unwrap();
        assert_eq!((plain(&got.id).as_str(), plain(&got.group).as_str(), got.reward), ("7", "", None));
        assert_eq!(got.turns[0].role, "user");
        assert!(Record::from_value(json!({})).is_ok());
        assert!(Record::from_value(json!({"views": 3})).is_err());
    }

    #[test]
    fn the_answers_part_decides_what_is_right() {
        let got = Record::from_value(json!({"rewards": {"format": 1, "answer": 0}, "reward": 1.0})).unwrap();
        assert!(!got.right());
        assert!(record(0, 0, 1.0).right());
        assert!(!Record::default().right());
    }

    #[test]
    fn right_and_wrong_early_and_late() {
        // Steps 1 to 10; right from step 6 on; five groups a step.
        let records: Vec<Record> = (0..50).map(|i| record(i / 5 + 1, i % 5, if i >= 25 { 1.0 } else { 0.0 })).collect();
        let chosen = choose(&records, 6);
        assert_eq!(chosen, [0, 12, 24, 25, 37, 49]);
        assert_eq!(choose(&records, 500).len(), 50);
        assert!(choose(&[], 20).is_empty());
    }

    #[test]
    fn groups_are_chosen_whole_and_the_same_questions_at_each_step() {
        // Three rows of a table, ten questions, two answers each.
        let records: Vec<Record> = (0..60).map(|i| record(i / 20, i % 20 / 2, 1.0)).collect();
        let chosen = choose_groups(&records, 18);
        let questions: Vec<(u64, String)> =
            chosen.iter().map(|&i| (records[i].step, plain(&records[i].group))).collect();
        let of = |step| questions.iter().filter(|q| q.0 == step).map(|q| q.1.as_str()).collect::<Vec<_>>();
        assert_eq!(of(0), ["0", "0", "4", "4", "9", "9"]);
        assert!(of(1) == of(0) && of(2) == of(0));
        assert_eq!(choose_groups(&records, 4).len(), 4);
        assert_eq!(choose_groups(&records, 100).len(), 60);
        assert!(choose_groups(&[], 5).is_empty());
    }

    #[test]
    fn a_shortage_on_one_side_is_made_up_by_the_other() {
        let records: Vec<Record> = (0..30).map(|i| record(i, 0, if i == 3 { 1.0 } else { 0.0 })).collect();
        let chosen = choose(&records, 10);
        assert_eq!(chosen.len(), 10);
        assert!(chosen.contains(&3));
    }

    #[test]
    fn one_of_each_group_before_a_second() {
        // Two questions of four members each, all wrong.
        let members: Vec<Record> = (0..8)
            .map(|i| Record::from_value(json!({"id": format!("q{}", i / 4), "group": i / 4, "member": i % 4})).unwrap())
            .collect();
        let groups: Vec<usize> = choose(&members, 2).iter().map(|index| index / 4).collect();
        assert_eq!(groups, [0, 1]);
    }
}
