//! MIRG's task: several pictures, spoken of as Image-1 to Image-N; the policy reasons across them and answers with boxes, each of
//! which says which picture it lies in. Rewarded are the picture and the object (spec 2.3; MG-Thinker, arXiv 2609.37374).
//!
//! It hides the wording, the reading of an answer into boxes of the original pictures, and how the parts of the reward are weighed.
//! What must stay true: a box is read in the view of the picture that it names; an answer that cannot be read, or is asked for by a row
//! whose annotation cannot be right, earns nothing in any part; the parts beside the reward (`iou`, `joint`) are for tables
//! and never rewarded.

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::asking::Ask;
use super::template::{self, finished};
use super::{Context, Opening, Reading, Reply, Shown, Task, view_budget};
use crate::chat::{Action, Convention, Part};
use crate::config::BadConfig;
use crate::data::{Sample, Target};
use crate::episode::{Episode, Stop};
use crate::geometry::{BBox, Budget, Size, View};
use crate::reward::{self, MultiImage, Named, Parts};
use crate::synth::trajectories::TRAJECTORY;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Wording: `mirg` (think, then answer), `mirg_direct` (answer at once), `mirg_traced` (answer from the row's own trajectory, to
    /// see whether it helps), `mirg_short` (few words, for small models), or the path of a template file.
    pub template: String,
    /// Pixel budget of every picture, in pixels after resizing.
    pub max_pixels: u64,
    pub min_pixels: u64,
    /// More pictures than this in a row are refused.
    pub most_images: usize,
    /// `poll`: each picture is asked about alone. `all`: what is asked of the same pictures is asked at once. Without it, rows are
    /// asked as they stand.
    pub ask: Option<Ask>,
    pub weights: PartWeights,
    /// The reward for picture and object is multiplied by the format's: what is read out of a text without form is worth little.
    pub format_gate: bool,
    pub reward: MultiImage,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            template: "mirg".into(),
            max_pixels: 401_408,
            min_pixels: 12_544,
            most_images: 16,
            ask: None,
            weights: PartWeights::default(),
            format_gate: false,
            reward: MultiImage::default(),
        }
    }
}

/// What each part of the judgement counts in the reward, and so in the advantage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PartWeights {
    /// Off: the advantage is taken over image and object alone, as in MG-Thinker.
    pub format: f64,
    pub image: f64,
    pub object: f64,
}

impl Default for PartWeights {
    fn default() -> PartWeights {
        PartWeights { format: 0.0, image: 1.0, object: 1.0 }
    }
}

/// The wording.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wording {
    system: Option<String>,
    /// Before each picture; `{k}` is its number.
    image: String,
    /// After the pictures; `{trajectory}`, if it is there, is the row's.
    ask: String,
}

const TRAJECTORY_SLOT: &str = "{trajectory}";

impl Wording {
    fn load(name: &str) -> Result<Wording> {
        let built_in = [
            ("mirg", include_str!("templates/mirg.toml")),
            ("mirg_direct", include_str!("templates/mirg_direct.toml")),
            ("mirg_traced", include_str!("templates/mirg_traced.toml")),
            ("mirg_short", include_str!("templates/mirg_short.toml")),
        ];
        let (wording, origin): (Wording, _) = template::read(name, &built_in)?;
        for (slot, text, placeholder) in [("image", &wording.image, "{k}"), ("ask", &wording.ask, "{question}")] {
            if text.matches(placeholder).count() != 1 {
                bail!("{origin}: slot `{slot}` must hold {placeholder} once");
            }
        }
        Ok(wording)
    }
}

pub struct MultiImageTask {
    options: Options,
    wording: Wording,
    budget: Budget,
}

impl MultiImageTask {
    /// `factor` is what both sides of a view are multiples of (patch times merge, 28 for Qwen2.5-VL).
    pub fn new(options: Options, factor: u32) -> Result<MultiImageTask> {
        let budget = view_budget(options.min_pixels, options.max_pixels, factor)?;
        ensure!(options.most_images > 0, BadConfig("task.most_images is 0, expected at least 1".into()));
        let PartWeights { format, image, object } = options.weights;
        ensure!(
            [format, image, object].iter().all(|w| w.is_finite()),
            BadConfig("task.weights: expected numbers".into())
        );
        let MultiImage { low, high, .. } = options.reward;
        ensure!(
            (0.0..=1.0).contains(&low) && (low..=1.0).contains(&high),
            BadConfig(format!("task.reward.low = {low} and high = {high}: expected two rising numbers from 0 to 1"))
        );
        let wording = Wording::load(&options.template).map_err(|e| BadConfig(format!("task.template: {e:#}")))?;
        Ok(MultiImageTask { options, wording, budget })
    }

    fn shows_trajectory(&self) -> bool {
        self.wording.ask.contains(TRAJECTORY_SLOT)
    }

    /// The words around the pictures, with a place for each.
    ///
    /// # Errors
    /// The wording shows the row's trajectory, and there is none.
    fn question(&self, sample: &Sample, images: usize) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(2 * images + 1);
        for k in 1..=images {
            // One text between two pictures: the end of the last line and the start of the next.
            let (before, after) = match self.wording.image.split_once("{image}") {
                Some((before, after)) => (before, after),
                None => (self.wording.image.as_str(), ""),
            };
            push(&mut parts, &before.replace("{k}", &k.to_string()));
            parts.push(Part::image());
            push(&mut parts, after);
        }
        let ask = match self.shows_trajectory() {
            true => self.wording.ask.replace(TRAJECTORY_SLOT, trajectory(sample)?),
            false => self.wording.ask.clone(),
        };
        let ask = ask.replace("{question}", &finished(&sample.question));
        push(&mut parts, &ask);
        Ok(parts)
    }
}

/// How an answer is written for a model to learn.
#[derive(Clone, Debug)]
pub struct Writing {
    pub convention: Convention,
    /// The row's trajectory comes first.
    pub reason: bool,
    /// Coordinates are multiples of this.
    pub snap: u32,
}

impl MultiImageTask {
    /// What a model should write for a row: the strict form of what [`reward::parse_named`] reads.
    pub fn written(&self, sample: &Sample, views: &[View], writing: &Writing) -> Result<String> {
        let snap = f64::from(writing.snap.max(1));
        let entry = |target: &Target| -> Result<String> {
            let view = views.get(target.image - 1).context("a target names a picture that is not shown")?;
            let numbers = writing.convention.numbers(view.view_from_original(target.bbox), view.size);
            let [x1, y1, x2, y2] = numbers.map(|n| ((n as f64 / snap).round() * snap) as i64);
            // Rounding must not close a narrow box.
            let (x2, y2) = (x2.max(x1 + snap as i64), y2.max(y1 + snap as i64));
            let label = serde_json::Value::from(target.label.as_deref().unwrap_or("target"));
            Ok(format!("{{\"image\":{},\"bbox_2d\":[{x1},{y1},{x2},{y2}],\"label\":{label}}}", target.image))
        };
        let entries = sample.targets.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let answer = format!("<answer>[{}]</answer>", entries.join(","));
        Ok(match self.written_reason(sample, writing)? {
            Some(reason) => format!("<think>{reason}</think>{answer}"),
            None => answer,
        })
    }

    /// The trajectory, if it is to be written.
    ///
    /// # Errors
    /// The row has none.
    pub fn written_reason<'a>(&self, sample: &'a Sample, writing: &Writing) -> Result<Option<&'a str>> {
        if !writing.reason {
            return Ok(None);
        }
        trajectory(sample).map(Some).context("set data.reason = false to learn the answers alone")
    }
}

fn trajectory(sample: &Sample) -> Result<&str> {
    let trace = sample.extra.get(TRAJECTORY).and_then(serde_json::Value::as_str);
    trace.with_context(|| format!("there is no text under \"{TRAJECTORY}\"; `foveate data trajectories` writes it"))
}

/// Appends words to those that stand last.
fn push(parts: &mut Vec<Part>, words: &str) {
    match parts.last_mut() {
        _ if words.is_empty() => {}
        Some(Part::Text { text }) => text.push_str(words),
        _ => parts.push(Part::text(words)),
    }
}

/// The target as the judges take it.
fn named(target: &Target) -> Named {
    Named { image: target.image, bbox: target.bbox, label: target.label.clone() }
}

impl Task for MultiImageTask {
    fn name(&self) -> &'static str {
        "multi_image"
    }

    fn max_turns(&self) -> usize {
        1
    }

    fn check(&self, sample: &Sample) -> Result<()> {
        let n = sample.images.len();
        ensure!(
            (1..=self.options.most_images).contains(&n),
            "there are {n} pictures, and task.most_images allows 1 to {}",
            self.options.most_images
        );
        ensure!(
            !sample.targets.is_empty() || sample.answer.trim() == "[]" || sample.faulty(),
            "the row has no targets; where nothing is to be found, its answer must be \"[]\""
        );
        if self.shows_trajectory() {
            trajectory(sample)?;
        }
        Ok(())
    }

    fn open(&self, sample: &Sample, sizes: &[Size]) -> Result<Opening> {
        let view = |(k, size): (usize, &Size)| {
            View::whole(k, *size, self.budget).with_context(|| format!("picture {} of {}", k + 1, sizes.len()))
        };
        let views = sizes.iter().enumerate().map(view).collect::<Result<Vec<_>>>()?;
        let user = Shown { parts: self.question(sample, views.len())?, views };
        Ok(Opening { system: self.wording.system.clone(), user })
    }

    fn reply(&self, context: &Context, _: &Action) -> Result<Reply> {
        let boxes = reward::parse_named(context.said).map(|boxes| read(boxes, context));
        let stop = if boxes.is_some() { Stop::Answered } else { Stop::TurnLimit };
        Ok(Reply::Close(stop, Reading { boxes, ..Reading::default() }))
    }

    fn judge(&self, sample: &Sample, episode: &Episode) -> Parts {
        let truth: Vec<Named> = sample.targets.iter().map(named).collect();
        let last = episode.turns.iter().rev().find(|t| t.role == "assistant");
        let said = last.and_then(|turn| Some((turn, turn.boxes.as_ref()?)));
        let Some((turn, boxes)) = said.filter(|_| !sample.faulty()) else {
            return ["format", "image", "object", "iou", "joint"].map(|part| (part, 0.0)).into();
        };
        let mut parts = Parts::from([("format", self.options.reward.format(&turn.text))]);
        for (name, value) in reward::multi_image(boxes, &truth, &self.options.reward).iter() {
            parts.set(name, value);
        }
        let (iou, joint) = reward::found(boxes, &truth);
        parts.set("iou", iou);
        parts.set("joint", joint);
        parts
    }

    fn reward(&self, parts: &Parts) -> f64 {
        let PartWeights { format, image, object } = self.options.weights;
        let form = parts.get("format").unwrap_or(0.0);
        let gate = if self.options.format_gate { form } else { 1.0 };
        format * form + gate * parts.total(&Parts::from([("image", image), ("object", object)]))
    }
}

/// Boxes in the model's numbers -> in pixels of the original pictures. A box on a picture that is not there, or on none of
/// several, keeps its number and has no area: it can be right nowhere.
fn read(boxes: Vec<Named>, context: &Context) -> Vec<Named> {
    let place = |said: Named| {
        let image = if said.image == 0 && context.views.len() == 1 { 1 } else { said.image };
        let view = image.checked_sub(1).and_then(|k| context.views.get(k));
        let bbox = match view {
            Some(view) => view.original_from_view(context.convention.place_in_view(said.bbox, view.size)),
            None => BBox::new(0.0, 0.0, 0.0, 0.0),
        };
        Named { image, bbox, ..said }
    };
    boxes.into_iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::Reading as Reader;
    use crate::data::FAULTY;
    use crate::episode::{Stream, Turn};
    use serde_json::Map;

    fn sample() -> Sample {
        Sample {
            id: "a".into(),
            images: vec!["1.png".into(), "2.png".into()],
            question: "Where is the cup".into(),
            choices: vec![],
            answer: "2".into(),
            targets: vec![Target { image: 2, bbox: BBox::new(100.0, 0.0, 200.0, 100.0), label: None }],
            task: None,
            split: None,
            extra: Map::new(),
        }
    }

    fn task(options: Options) -> MultiImageTask {
        MultiImageTask::new(options, 28).unwrap()
    }

    /// Two pictures of 400 x 400, shown as 112 x 112, and what is said about them.
    fn judged(task: &MultiImageTask, said: &str) -> (Parts, f64, Stop) {
        judged_on(task, sample(), said)
    }

    fn judged_on(task: &MultiImageTask, sample: Sample, said: &str) -> (Parts, f64, Stop) {
        let sizes = [Size::new(400, 400), Size::new(400, 400)];
        let views = task.open(&sample, &sizes).unwrap().user.views;
        assert_eq!(views[1].size, Size::new(112, 112));
        let convention = Convention::Qwen25;
        let context = Context { sample: &sample, sizes: &sizes, views: &views, convention, turn: 1, seed: 0, said };
        let Reply::Close(stop, reading) = task.reply(&context, &Action::read(said, &Reader::of(convention))).unwrap()
        else {
            panic!("one turn")
        };
        let Reading { outcome, bbox, boxes } = reading;
        let turn = Turn { outcome, bbox, boxes, ..Turn::new("assistant", said.into(), 1) };
        let episode = Episode {
            id: "a".into(),
            step: 1,
            group: 0,
            member: 0,
            task: "multi_image".into(),
            question: sample.question.clone(),
            answer: sample.answer.clone(),
            images: sample.images.clone(),
            targets: sample.targets.clone(),
            split: None,
            stream: Stream::default(),
            turns: vec![turn],
            stop,
            parts: Parts::default(),
            reward: 0.0,
            advantage: None,
            update: None,
        };
        let parts = task.judge(&sample, &episode);
        let reward = task.reward(&parts);
        (parts, reward, stop)
    }

    fn small() -> Options {
        Options { max_pixels: 112 * 112, min_pixels: 112 * 112, ..Options::default() }
    }

    #[test]
    fn every_picture_is_named_before_it_is_shown() {
        let task = task(Options { template: "mirg_short".into(), ..small() });
        let opening = task.open(&sample(), &[Size::new(400, 400), Size::new(300, 300)]).unwrap();
        let text: String = opening.user.parts.iter().map(Part::readable).collect();
        assert_eq!(text, "Image-1: [image]\nImage-2: [image]\nQuestion: Where is the cup.");
        assert_eq!(opening.user.views.len(), 2);
    }

    #[test]
    fn a_template_can_show_the_trajectory_of_the_row() {
        let task = task(Options { template: "mirg_traced".into(), ..small() });
        let mut row = sample();
        let missing = task.check(&row).unwrap_err().to_string();
        assert!(missing.contains("\"trajectory\"") && missing.contains("data trajectories"), "{missing}");
        row.question = "Where is {trajectory}".into();
        row.extra.insert(TRAJECTORY.into(), "Image-2 has it.".into());
        task.check(&row).unwrap();
        let opening = task.open(&row, &[Size::new(400, 400), Size::new(300, 300)]).unwrap();
        let text: String = opening.user.parts.iter().map(Part::readable).collect();
        assert!(
            text.contains("Question: Where is {trajectory}.\nA careful reader thought: Image-2 has it.\n"),
            "{text}"
        );
    }

    #[test]
    fn a_box_is_read_in_the_view_of_the_picture_it_names() {
        let task = task(small());
        // 28 of 112 pixels are 100 of 400.
        let right = r#"<think>Image-2 has it.</think><answer>[{"image": 2, "bbox_2d": [28, 0, 56, 28], "label": "cup"}]</answer>"#;
        let (parts, reward, stop) = judged(&task, right);
        assert_eq!(
            parts,
            Parts::from([("format", 1.0), ("image", 1.0), ("object", 1.0), ("iou", 1.0), ("joint", 1.0)])
        );
        assert_eq!((reward, stop), (2.0, Stop::Answered));
        let (parts, reward, _) = judged(&task, &right.replace("\"image\": 2", "\"image\": 1"));
        assert_eq!((parts.get("image"), parts.get("object"), parts.get("joint")), (Some(0.0), Some(0.0), Some(0.0)));
        assert_eq!(reward, 0.0, "the format alone earns nothing");
        // Not gated, the box counts wherever it is said to be.
        let ungated = task_with(|o| o.reward.gate = reward::Gate::None);
        assert_eq!(judged(&ungated, &right.replace("\"image\": 2", "\"image\": 1")).1, 1.0);
        // A tag is missing: the parts are what they are, the reward is less.
        let by_form = task_with(|o| o.format_gate = true);
        assert_eq!(judged(&by_form, right).1, 2.0);
        let (parts, reward, _) = judged(&by_form, &right.replace("</think>", ""));
        assert_eq!((parts.get("image"), reward), (Some(1.0), 1.5));
    }

    fn task_with(change: impl FnOnce(&mut Options)) -> MultiImageTask {
        let mut options = small();
        change(&mut options);
        task(options)
    }

    #[test]
    fn what_cannot_be_read_or_names_no_picture_earns_nothing() {
        let task = task_with(|o| o.weights.format = 1.0);
        for said in ["", "Image-2", "<think></think><answer>[{\"image\": 2}]</answer>", "<answer>[]]</answer>"] {
            let (parts, reward, stop) = judged(&task, said);
            assert_eq!((parts.get("format"), reward, stop), (Some(0.0), 0.0, Stop::TurnLimit), "{said}");
        }
        for image in ["0", "3", "99999999999"] {
            let said =
                format!("<answer>[{{\"image\": {image}, \"bbox_2d\": [28, 0, 56, 28], \"label\": \"cup\"}}]</answer>");
            let (parts, ..) = judged(&task, &said);
            assert_eq!((parts.get("image"), parts.get("object")), (Some(0.0), Some(0.0)), "{said}");
        }
        // Nothing was asked for in vain: the row has a target.
        let (parts, ..) = judged(&task, "<answer>[]</answer>");
        assert_eq!((parts.get("image"), parts.get("object")), (Some(0.0), Some(0.0)));
    }

    #[test]
    fn nothing_is_right_where_the_annotation_cannot_be() {
        let mut sample = sample();
        sample.targets.clear();
        sample.extra.insert(FAULTY.into(), true.into());
        for said in ["<answer>[]</answer>", r#"<answer>[{"image": 2, "bbox_2d": [28, 0, 56, 28]}]</answer>"#] {
            let (parts, reward, _) = judged_on(&task(small()), sample.clone(), said);
            assert_eq!((parts.get("image"), parts.get("joint"), reward), (Some(0.0), Some(0.0), 0.0), "{said}");
        }
    }

    #[test]
    fn rows_that_cannot_be_asked_are_refused() {
        let task = task(small());
        let with = |change: fn(&mut Sample)| {
            let mut sample = sample();
            change(&mut sample);
            task.check(&sample)
        };
        assert!(with(|_| ()).is_ok());
        assert!(with(|s| s.targets.clear()).unwrap_err().to_string().contains("no targets"));
        assert!(with(|s| (s.targets.clear(), s.answer = "[]".into()).1).is_ok());
        assert!(with(|s| (s.targets.clear(), s.extra.insert(FAULTY.into(), true.into())).0).is_ok());
        assert!(with(|s| s.images.clear()).unwrap_err().to_string().contains("0 pictures"));
        assert!(with(|s| s.images = vec!["x.png".into(); 20]).unwrap_err().to_string().contains("20 pictures"));
    }

    #[test]
    fn options_that_cannot_work_are_named() {
        let refused = |o: Options| MultiImageTask::new(o, 28).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(refused(Options { max_pixels: 100, ..small() }).contains("max_pixels = 100"));
        assert!(refused(Options { template: "none.toml".into(), ..small() }).contains("none.toml"));
        let reward = MultiImage { low: 0.9, high: 0.1, ..MultiImage::default() };
        assert!(refused(Options { reward, ..small() }).contains("low = 0.9"));
    }
}
