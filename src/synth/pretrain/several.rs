//! Dialogues over several pictures, spoken of as Image-1, Image-2 and so on: find, which and say, point, describe, name, what is shared.
//!
//! They teach what every question across pictures needs, and none of those that `synth/pairs.rs` asks. What must stay true: each has
//! one right answer; boxes are exact, for carelessness belongs to the question about one picture.

use anyhow::Result;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::{Message, Part, Pretrain, Role, ShownView, Writer, between, count, is_object};
use crate::geometry::BBox;
use crate::synth::pick;
use crate::synth::recipe::{Phase, words};
use crate::synth::trajectories::listed;
use crate::synth::world::Scene;

/// What says in which picture something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Box,
    Number,
    /// The words of the question once more, and the picture.
    Sentence,
}

impl Pretrain {
    /// Only one of the pictures shows the object: which, or where in it?
    pub(super) fn find(&self, rng: &mut ChaCha8Rng, phase: &Phase, form: Answer, out: &mut Writer) -> Result<()> {
        let views = self.pictures(rng, phase);
        let alone: Vec<(usize, &str, BBox)> = objects(&views)
            .filter(|(_, name, _)| objects(&views).filter(|(_, other, _)| other == name).count() == 1)
            .collect();
        let Some(&(k, name, bbox)) = alone.choose(rng) else { return self.point(rng, phase, out) };
        let number = (k + 1).to_string();
        let said = pick(rng, words::SAID).replace("{X}", name).replace("{K}", &number);
        let (wordings, request, answer) = match form {
            Answer::Box => {
                let boxes = words::boxes_in(&[(k + 1, self.exactly(bbox), name)]);
                (words::FIND, "", words::thought(&said) + &boxes)
            }
            Answer::Number => (words::WHICH, words::ANSWER_REQUEST, words::boxed(&number)),
            Answer::Sentence => (words::SAY, "", said),
        };
        let question = pick(rng, wordings).replace("{X}", name);
        self.ask(out, views, &question, request, answer);
        Ok(())
    }

    /// The picture is named, the object may be in others too.
    pub(super) fn point(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let views = self.pictures(rng, phase);
        let all: Vec<(usize, &str, BBox)> = objects(&views).collect();
        // Half of the time one that another picture shows as well, if there is one.
        let shared: Vec<_> =
            all.iter().filter(|(k, name, _)| all.iter().any(|(j, other, _)| j != k && other == name)).collect();
        let chosen = if rng.random_bool(0.5) && !shared.is_empty() {
            shared.choose(rng).copied().copied()
        } else {
            all.choose(rng).copied()
        };
        let Some((k, name, bbox)) = chosen else { return Ok(()) };
        let question = pick(rng, words::POINT).replace("{X}", name).replace("{K}", &(k + 1).to_string());
        let answer = words::boxes_in(&[(k + 1, self.exactly(bbox), name)]);
        self.ask(out, views, &question, "", answer);
        Ok(())
    }

    /// What one of the pictures shows, left to right.
    pub(super) fn describe(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let views = self.pictures(rng, phase);
        let k = rng.random_range(0..views.len());
        let seen = left_to_right(&views[k]);
        let number = (k + 1).to_string();
        let question = pick(rng, words::DESCRIBE).replace("{K}", &number);
        let answer = words::DESCRIPTION.replace("{K}", &number).replace("{X}", &seen);
        self.ask(out, views, &question, "", answer);
        Ok(())
    }

    pub(super) fn name_in(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let views = self.pictures(rng, phase);
        let all: Vec<(usize, &str, BBox)> = objects(&views).collect();
        let Some(&(k, name, bbox)) = all.choose(rng) else { return Ok(()) };
        let [x1, y1, x2, y2] = self.exactly(bbox);
        let question = pick(rng, words::NAME_IN)
            .replace("{BOX}", &format!("[{x1},{y1},{x2},{y2}]"))
            .replace("{K}", &(k + 1).to_string());
        let answer = words::boxed(name);
        self.ask(out, views, &question, words::ANSWER_REQUEST, answer);
        Ok(())
    }

    /// Two of the pictures have one kind of thing in common; it is pointed at in both.
    pub(super) fn common(&self, rng: &mut ChaCha8Rng, phase: &Phase, out: &mut Writer) -> Result<()> {
        let views = self.pictures(rng, phase);
        let all: Vec<(usize, &str, BBox)> = objects(&views).collect();
        let both: Vec<_> = all
            .iter()
            .flat_map(|a| all.iter().filter(move |b| a.0 < b.0 && a.1 == b.1).map(move |b| (*a, *b)))
            // No other thing is in the same two pictures.
            .filter(|(a, b)| {
                let has = |k: usize, name: &str| all.iter().any(|(view, other, _)| *view == k && *other == name);
                !all.iter().any(|(view, name, _)| *view == a.0 && *name != a.1 && has(b.0, name))
            })
            .collect();
        let Some(&((a, name, first), (b, _, second))) = both.choose(rng) else { return self.point(rng, phase, out) };
        let question =
            pick(rng, words::COMMON).replace("{A}", &(a + 1).to_string()).replace("{B}", &(b + 1).to_string());
        let answer = words::boxes_in(&[(a + 1, self.exactly(first), name), (b + 1, self.exactly(second), name)]);
        self.ask(out, views, &question, "", answer);
        Ok(())
    }

    /// Some scenes, most seen whole. Two of them share a kind of thing more often than chance would have it.
    fn pictures(&self, rng: &mut ChaCha8Rng, phase: &Phase) -> Vec<ShownView> {
        let mut scenes: Vec<Scene> = (0..count(rng, phase.pictures)).map(|_| self.any_scene(rng, phase)).collect();
        if scenes.len() > 1 && rng.random_bool(0.7) {
            let from = rng.random_range(0..scenes.len());
            let to = (from + rng.random_range(1..scenes.len())) % scenes.len();
            if let Some(class) = scenes[from].objects.choose(rng).map(|o| o.class) {
                self.give(rng, phase, &mut scenes[to], class);
            }
        }
        let view = |scene: &Scene| match scene.objects.choose(rng).filter(|_| rng.random_bool(phase.close_ups)) {
            Some(object) => self.shown(scene, around(rng, scene, object.bbox), self.view),
            None => self.whole(scene),
        };
        scenes.iter().map(view).collect()
    }

    /// One of a scene's things becomes one of another kind, in its place.
    fn give(&self, rng: &mut ChaCha8Rng, phase: &Phase, scene: &mut Scene, class: usize) {
        if scene.objects.is_empty() || scene.objects.iter().any(|o| o.class == class) {
            return;
        }
        let which = rng.random_range(0..scene.objects.len());
        let longest = between(rng, phase.object_size);
        let mut new = super::object(&self.library, rng, class, longest, self.augment());
        new.bbox = crate::synth::pairs::fitted(new.bbox, scene.objects[which].bbox);
        scene.objects[which] = new;
    }

    fn ask(&self, out: &mut Writer, views: Vec<ShownView>, question: &str, request: &str, answer: String) {
        let mut parts = Vec::new();
        for k in 0..views.len() {
            let after = if k == 0 { "" } else { words::AFTER_VIEW };
            parts.push(Part::Text(format!("{after}{}", words::BEFORE_VIEW.replace("{K}", &(k + 1).to_string()))));
            parts.push(Part::View(out.views.len() + k));
        }
        let asked = words::question(question, request);
        parts.push(Part::Text(format!("{}{}", words::AFTER_VIEW, asked.trim_end())));
        out.views.extend(views);
        out.messages.push(Message { role: Role::User, parts });
        out.say(answer);
    }

    /// The box as it is, in multiples of `snap`.
    fn exactly(&self, bbox: BBox) -> [i64; 4] {
        self.snapped_to(bbox, 1)
    }
}

/// A part of the scene, in its shape, that shows a thing large and whole.
fn around(rng: &mut ChaCha8Rng, scene: &Scene, thing: BBox) -> BBox {
    let all = scene.bounds();
    let least = (thing.width() / all.width()).max(thing.height() / all.height());
    let share = (least * rng.random_range(1.3..2.8)).min(1.0);
    let (width, height) = (share * all.width(), share * all.height());
    // Anywhere that holds the thing and stays in the scene.
    let start = |rng: &mut ChaCha8Rng, from: f64, to: f64, length: f64, end: f64| {
        let (first, last) = ((to - length).max(0.0), from.min(end - length));
        first + rng.random::<f64>() * (last - first).max(0.0)
    };
    let x = start(rng, thing.x1, thing.x2, width, all.x2);
    let y = start(rng, thing.y1, thing.y2, height, all.y2);
    BBox::new(x, y, x + width, y + height)
}

/// The names of a view's objects as a sentence has them.
pub(super) fn left_to_right(view: &ShownView) -> String {
    let mut seen: Vec<(&str, BBox)> = objects(std::slice::from_ref(view)).map(|(_, name, bbox)| (name, bbox)).collect();
    seen.sort_by(|a, b| a.1.center().0.total_cmp(&b.1.center().0));
    listed(&seen.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
}

/// Every object with the view it is in.
fn objects(views: &[ShownView]) -> impl Iterator<Item = (usize, &str, BBox)> {
    views.iter().enumerate().flat_map(|(k, view)| {
        view.objects.iter().filter(|(label, _)| is_object(label)).map(move |(label, bbox)| (k, label.as_str(), *bbox))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::recipe::{Recipe, Weights};
    use crate::synth::world::tests::SMALL;

    fn text(message: &Message) -> String {
        message.parts.iter().map(|p| if let Part::Text(t) = p { t.as_str() } else { "<view>" }).collect()
    }

    #[test]
    fn answers_hold_against_what_the_pictures_show() {
        let tasks = Weights {
            find: 1.0,
            which: 1.0,
            say: 1.0,
            point: 1.0,
            describe: 1.0,
            name_in: 1.0,
            common: 1.0,
            ..Weights::default()
        };
        let phase = Phase { tasks, pictures: [2, 4], close_ups: 0.3, objects: [1, 4], ..Phase::default() };
        let recipe = Recipe { phases: vec![phase], ..Recipe::default() };
        let pretrain = Pretrain::new(SMALL[0].clone(), recipe).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for i in 0..200 {
            let dialogue = pretrain.dialogue(5, 1, i).unwrap();
            seen.insert(dialogue.task);
            let (asked, said) = (text(&dialogue.messages[0]), text(&dialogue.messages[1]));
            assert!(asked.starts_with("Image-1: <view>\nImage-2: <view>\n"), "{asked}");
            assert_eq!(asked.matches("<view>").count(), dialogue.views.len());
            let shows = |k: usize, name: &str| dialogue.views[k - 1].objects.iter().any(|(label, _)| label == name);
            let pictures_with = |name: &str| (1..=dialogue.views.len()).filter(|&k| shows(k, name)).collect::<Vec<_>>();
            let (thought, said) = match said.strip_prefix("<think>").and_then(|said| said.split_once("</think>")) {
                Some((thought, said)) => (thought.to_owned(), said.to_owned()),
                None => (String::new(), said),
            };
            let says_where = |sentence: &str| -> Option<(String, usize)> {
                let rest = sentence.strip_prefix("The ").or(sentence.strip_prefix("So the "))?;
                let (name, k) = rest.strip_suffix('.')?.split_once(" is in Image-")?;
                Some((name.to_owned(), k.parse().ok()?))
            };
            if let Some((name, k)) = says_where(&thought) {
                assert_eq!(pictures_with(&name), [k], "{asked} {thought}");
            }
            if let Some(json) = said.strip_prefix("<answer>").and_then(|json| json.strip_suffix("</answer>")) {
                let boxes: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
                for entry in &boxes {
                    let (k, label) = (entry["image"].as_u64().unwrap() as usize, entry["label"].as_str().unwrap());
                    let said: BBox = serde_json::from_value(entry["bbox_2d"].clone()).unwrap();
                    // Within the rounding to multiples of 7 of an object of that name in that picture.
                    let near = |b: &BBox| {
                        <[f64; 4]>::from(*b).iter().zip(<[f64; 4]>::from(said)).all(|(a, b)| (a - b).abs() <= 7.0)
                    };
                    let found = dialogue.views[k - 1].objects.iter().any(|(name, b)| name == label && near(b));
                    assert!(found, "{asked} {said}");
                    if dialogue.task == "find"
                        && !asked.contains("Image-1?")
                        && !asked.contains(&format!("in Image-{k}"))
                        && !asked.contains(&format!("of Image-{k}"))
                    {
                        assert_eq!(pictures_with(label), [k], "{asked}");
                    }
                }
                if asked.contains("Which object is in Image-") {
                    assert_eq!(boxes.len(), 2, "{asked}");
                }
            } else if let Some((name, k)) = says_where(&said) {
                assert_eq!(pictures_with(&name), [k], "{asked} {said}");
            } else if let Some(rest) = said.strip_prefix("Image-") {
                let k: usize = rest[..1].parse().unwrap();
                let view = &dialogue.views[k - 1];
                assert!(
                    view.objects.iter().filter(|(l, _)| is_object(l)).all(|(label, _)| said.contains(label.as_str())),
                    "{said}"
                );
            } else {
                assert!(said.starts_with("\\boxed{"), "{said}");
            }
        }
        assert_eq!(seen.len(), 7, "{seen:?}");
    }
}
