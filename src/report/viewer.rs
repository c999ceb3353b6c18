//! The episodes for the page's viewer: which of them, and what the script needs to know of each, as data.
//!
//! Hides the shape of that data, which `list.js`, `stage.js`, `talk.js` and `viewer.js` read. What must stay true: text goes out as JSON strings and the
//! script puts it into text nodes alone, so a model's words are never markup; and an episode's key (its deep link) depends on the run's name, the step,
//! the group and the member, so a link stays good when the page is written again.

use super::episode::{caption, first_look, in_words, readings, right_answer};
use super::load::Run;
use super::pictures::{Pictures, Wanted};
use super::record::{self, Record, Turn, plain};
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// Of a run with held-out questions, one episode in so many is one of these.
const HELD_OUT: usize = 4;

/// An episode on the page.
pub struct Shown<'a> {
    pub run: &'a Run,
    /// The run's place on the page, and its colour.
    pub place: usize,
    pub colour: usize,
    pub record: &'a Record,
    /// Where it was played: training, held out, evaluation.
    pub set: &'static str,
    pub when: String,
    /// The deep link without its `#`.
    pub key: String,
}

/// The episodes to show: `wanted` shared among the runs, whole groups, early and late.
pub fn choose<'a>(runs: &[(&'a Run, usize)], wanted: usize) -> Vec<Shown<'a>> {
    let with: Vec<usize> =
        (0..runs.len()).filter(|&i| !runs[i].0.records.is_empty() || !runs[i].0.validation.is_empty()).collect();
    let mut shown = Vec::new();
    let mut keys = HashSet::new();
    for (nth, &place) in with.iter().enumerate() {
        let (run, colour) = runs[place];
        // The first runs take what does not divide.
        let share = wanted / with.len() + usize::from(nth < wanted % with.len());
        let held_out = if run.validation.is_empty() { 0 } else { (share / HELD_OUT).max(1) };
        let played = if run.metrics.is_empty() { "evaluation" } else { "training" };
        let parts = [(played, &run.records, share - held_out), ("held out", &run.validation, held_out)];
        for (set, records, share) in parts {
            for index in record::choose_groups(records, share) {
                let record = &records[index];
                let when = if set == "held out" { format!("step {}", record.step) } else { run.when(record.step) };
                let key = key(run, record, set, &mut keys);
                shown.push(Shown { run, place, colour, record, set, when, key });
            }
        }
    }
    shown
}

fn key(run: &Run, record: &Record, set: &str, taken: &mut HashSet<String>) -> String {
    let letter = if set == "held out" { 'v' } else { 's' };
    let said = format!("{}.{letter}{}.g{}.m{}", run.name, record.step, plain(&record.group), plain(&record.member));
    let plain: String =
        said.chars().map(|c| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' }).collect();
    let plain: String = plain.chars().take(120).collect();
    // Records that do not say their group or member still have links of their own.
    let unique =
        (1..).map(|n| if n == 1 { plain.clone() } else { format!("{plain}.{n}") }).find(|key| !taken.contains(key));
    let key = unique.unwrap_or(plain);
    taken.insert(key.clone());
    key
}

/// The pictures that the episodes need.
pub fn wanted(shown: &[Shown]) -> Vec<Wanted> {
    let of = |one: &Shown| -> Vec<Wanted> {
        let record = one.record;
        let originals = record.images.iter().map(|path| Wanted { path: one.run.locate(path), view: None });
        let views = record.views.iter().filter_map(|view| {
            Some(Wanted {
                path: one.run.locate(record.images.get(view.image)?),
                view: Some((view.region?, view.size?)),
            })
        });
        originals.chain(views).collect()
    };
    shown.iter().flat_map(of).collect()
}

/// One episode as data.
pub fn data(shown: &Shown, pictures: &mut Pictures) -> Value {
    let record = shown.record;
    let originals: Vec<Value> =
        record.images.iter().map(|path| picture(pictures.original(&shown.run.locate(path)), path)).collect();
    let mut crop = 0;
    let views: Vec<Value> = record
        .views
        .iter()
        .enumerate()
        .map(|(index, view)| {
            let first = first_look(record, index, view);
            crop += usize::from(!first);
            let mut value = match (record.images.get(view.image), view.region, view.size) {
                (Some(path), Some(region), Some(size)) => {
                    let mut value = picture(pictures.view(&shown.run.locate(path), region, size), path);
                    value["box"] = json!(region.map(whole));
                    value["caption"] = json!(caption(record, view, region, size));
                    value
                }
                _ => json!({"missing": "the record does not say which region of which picture"}),
            };
            value["image"] = json!(view.image);
            value["turn"] = json!(view.turn);
            value["crop"] = json!(if first { 0 } else { crop });
            value
        })
        .collect();
    let targets =
        record.targets.iter().map(|target| json!([target.index(), target.bbox.map(|b| b.map(whole)), target.label]));
    let said = record.said().map(|said| json!([said.index(), said.bbox.map(|b| b.map(whole)), said.label]));
    let looked = looked(record).into_iter().map(|(image, bbox)| json!([image, bbox.map(whole)]));
    json!({
        "key": shown.key, "run": shown.place, "set": shown.set, "step": record.step, "when": shown.when, "task": record.task,
        "split": record.split, "id": plain(&record.id), "group": plain(&record.group), "member": plain(&record.member),
        "question": record.question, "answer": right_answer(record), "right": record.right(), "said": answered(record),
        "reward": record.reward.filter(|x| x.is_finite()), "advantage": record.advantage.filter(|x| x.is_finite()),
        "stop": plain(&record.stop), "outcome": record.first_outcome(), "parts": record.rewards,
        "pictures": originals, "views": views, "targets": targets.collect::<Vec<_>>(), "boxes": said.collect::<Vec<_>>(),
        "looked": looked.collect::<Vec<_>>(), "turns": turns(record),
    })
}

fn picture(placed: Result<super::pictures::Placed, String>, path: &str) -> Value {
    match placed {
        Ok(placed) => json!({"id": placed.id, "width": placed.width, "height": placed.height}),
        Err(reason) => json!({"missing": reason, "path": path}),
    }
}

/// A tenth of a pixel is finer than any box.
fn whole(side: f64) -> f64 {
    (side * 10.0).round() / 10.0
}

/// The regions that the policy named, by picture, from 0.
pub fn looked(record: &Record) -> Vec<(usize, [f64; 4])> {
    let named = record.turns.iter().filter_map(|turn| Some((0, turn.bbox?)));
    let said = record.said().filter_map(|said| Some((said.index(), said.bbox?)));
    named.chain(said).filter(|(_, bbox)| bbox.iter().all(|side| side.is_finite())).collect()
}

/// What the policy answered, in a few words: what is in which of several pictures, or the text of the last `\boxed{}` or `<answer>`, else the
/// end of its last turn.
pub fn answered(record: &Record) -> String {
    if record.several_pictures() && record.said().next().is_some() {
        return shortened(&in_words(record.said()));
    }
    let is_policy = |turn: &&Turn| turn.role == "assistant" || turn.role == "policy";
    let Some(last) = record.turns.iter().rev().find(is_policy) else { return String::new() };
    let between = |open: &str, close: &str| {
        let (_, after) = last.text.rsplit_once(open)?;
        Some(after.split(close).next().unwrap_or(after).trim().to_owned())
    };
    let text = between("\\boxed{", "}").or_else(|| between("<answer>", "</answer>"));
    let text = text.unwrap_or_else(|| last.text.trim().to_owned());
    shortened(&text)
}

/// The end of a long text.
fn shortened(text: &str) -> String {
    let length = text.chars().count();
    if length <= 60 { text.to_owned() } else { format!("…{}", text.chars().skip(length - 59).collect::<String>()) }
}

/// The conversation. A policy's turn that was recorded token by token has its pieces and their numbers in place of its text.
fn turns(record: &Record) -> Vec<Value> {
    let logprobs: Vec<f32> = record.sampled_logprobs().collect();
    let mut from = 0;
    let mut turns = Vec::new();
    for turn in &record.turns {
        let mut value = Map::new();
        value.insert("role".into(), json!(turn.role));
        value.insert("tokens".into(), json!(plain(&turn.tokens)));
        let read = readings(turn);
        if !read.is_empty() {
            value.insert("read".into(), json!(read));
        }
        if turn.pieces.is_empty() {
            value.insert("text".into(), json!(turn.text.trim_end()));
            if turn.role == "assistant" {
                from += turn.tokens.as_u64().unwrap_or(0) as usize;
            }
        } else {
            let range = from..from + turn.pieces.len();
            from = range.end;
            value.insert("pieces".into(), json!(turn.pieces));
            let lists = [
                ("logprobs", &logprobs),
                ("ratios", &record.update.ratios),
                ("entropies", &record.update.entropies),
                ("advantages", &record.update.advantages),
            ];
            for (name, list) in lists {
                // Three digits are more than a colour shows and a reader reads.
                let short = |value: &f32| value.is_finite().then(|| (f64::from(*value) * 1e3).round() / 1e3);
                if let Some(own) = list.get(range.clone()) {
                    value.insert(name.into(), json!(own.iter().map(short).collect::<Vec<_>>()));
                }
            }
        }
        turns.push(Value::Object(value));
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::load::bare;

    fn record(value: Value) -> Record {
        Record::from_value(value).unwrap()
    }

    #[test]
    fn tokens_carry_their_own_numbers() {
        let played = record(json!({
            "turns": [
                {"role": "user", "text": "hm?", "tokens": 2},
                {"role": "assistant", "text": "a b", "tokens": 2, "pieces": ["a", " b"]},
                {"role": "user", "text": "and?", "tokens": 1},
                {"role": "assistant", "text": "c", "tokens": 1, "pieces": ["c"]}
            ],
            "sampled": [0, 0, 1, 1, 0, 1], "logprobs": [0, 0, -0.5, -0.25, 0, -1.5],
            "update": {"ratios": [1.0, 0.9, 1.1], "entropies": [0.1, 0.2, 0.3]}
        }));
        let turns = turns(&played);
        assert_eq!(turns[1]["logprobs"], json!([-0.5, -0.25]));
        assert_eq!((&turns[3]["logprobs"], &turns[3]["ratios"]), (&json!([-1.5]), &json!([1.1])));
        assert_eq!(turns[3].get("advantages"), None);
        assert_eq!(turns[0]["text"], "hm?");
    }

    /// Records of earlier versions have words without pieces; where the numbers do not fit, none are shown.
    #[test]
    fn old_records_keep_their_words() {
        let old = record(
            json!({"turns": [{"role": "assistant", "text": "a b", "tokens": 2}], "sampled": [1, 1], "logprobs": [-1, -2]}),
        );
        assert_eq!(turns(&old), [json!({"role": "assistant", "tokens": "2", "text": "a b"})]);
        let short =
            record(json!({"turns": [{"role": "assistant", "pieces": ["a", "b"]}], "sampled": [1], "logprobs": [-1]}));
        assert_eq!(turns(&short)[0].get("logprobs"), None);
    }

    #[test]
    fn links_are_plain_and_never_the_same() {
        let mut run = bare("a/<b>");
        run.records = (0..3).map(|_| record(json!({"id": "q", "group": "\"g\"", "member": 1, "step": 7}))).collect();
        let keys: Vec<String> = choose(&[(&run, 0)], 10).into_iter().map(|shown| shown.key).collect();
        assert_eq!(keys, ["a__b_.s7.g_g_.m1", "a__b_.s7.g_g_.m1.2", "a__b_.s7.g_g_.m1.3"]);
    }

    #[test]
    fn the_answer_in_a_few_words() {
        let said = |text: &str| answered(&record(json!({"turns": [{"role": "assistant", "text": text}]})));
        assert_eq!(said("so \\boxed{4}"), "4");
        assert_eq!(said("<answer> Image-1 </answer>"), "Image-1");
        assert_eq!(said("yes"), "yes");
        assert_eq!(said(&"x".repeat(100)).chars().count(), 60);
        let boxes = json!([{"image": 2, "bbox": [1, 2, 3, 4], "label": "fox"}, {"image": 1, "bbox": [1, 2, 3, 4]}]);
        let turn = json!({"role": "assistant", "text": "<answer>[]</answer>", "boxes": boxes});
        let several = record(json!({"images": ["a.jpg", "b.jpg"], "turns": [turn]}));
        assert_eq!(answered(&several), "fox in Image-2, the marked area in Image-1");
    }
}
