//! The one record. A rollout writes an [`Episode`], training reads it, the run folder stores it, the report shows it.
//!
//! Its heart is the [`Stream`]: token ids, who wrote each of them, and where images stand, in one append-only structure.
//! Nothing is ever decoded and tokenised again, and an image's tokens cannot come apart from its features, because both
//! are made from one [`Grid`] that is checked when the image is appended.
//!
//! A small worked example, with `#` for tokens that the policy sampled:
//!
//! ```text
//! row      0    1     2     3     4     5    6    7    8    9
//! id       user vis   pad   pad   evis  q    asst #look #end ...
//! sampled  0    0     0     0     0     0    0    1    1
//! logprob  0    0     0     0     0     0    0   -0.7 -0.1        (of this token, given all before it)
//! images   [ first: 2, grid: 1x2x4 (2 tokens) ]
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::data::Target;
use crate::geometry::{BBox, Grid, View};
use crate::reward::{Named, Parts};

/// An image inside a stream: which picture, which part of it, and the rows its tokens take.
#[derive(Clone, Debug)]
pub struct Placed {
    pub path: Arc<Path>,
    pub view: View,
    pub grid: Grid,
    /// Row of the first of the image's placeholder tokens.
    pub first: usize,
}

/// Token ids with their authorship and their images; append only.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    pub ids: Vec<u32>,
    /// Whether the policy sampled this token. Exactly these are trained.
    pub sampled: Vec<bool>,
    /// Log-prob of a sampled token under the distribution it was drawn from (temperature and bans included), else 0. NaN where the engine
    /// told only words.
    pub logprobs: Vec<f32>,
    pub images: Vec<Placed>,
}

impl Stream {
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// How many tokens the policy wrote: the sum of the training mask.
    pub fn sampled_count(&self) -> usize {
        self.sampled.iter().filter(|&&s| s).count()
    }

    /// Rows before the first sampled token; what the members of a group share.
    pub fn prompt_len(&self) -> usize {
        self.sampled.iter().position(|&s| s).unwrap_or(self.len())
    }

    /// Appends tokens that the policy did not write. `images` are the views whose placeholders stand in `ids`, in order.
    ///
    /// Errors if the runs of `image_pad` do not match the grids one to one: then an image would be shown
    /// with another's features, which no later check could notice.
    pub fn push_context(
        &mut self,
        ids: &[u32],
        images: Vec<(Arc<Path>, View, Grid)>,
        image_pad: u32,
        merge: u32,
    ) -> Result<()> {
        let base = self.len();
        let mut row = 0;
        let mut placed = Vec::with_capacity(images.len());
        for (path, view, grid) in images {
            while row < ids.len() && ids[row] != image_pad {
                row += 1;
            }
            let want = grid.tokens(merge);
            let run = ids[row..].iter().take(want).take_while(|&&id| id == image_pad).count();
            ensure!(
                run == want,
                "image {} should stand as {want} placeholder tokens, but the text holds {run}; the image comes from {}",
                placed.len() + 1,
                path.display()
            );
            placed.push(Placed { path, view, grid, first: base + row });
            row += want;
        }
        let left = ids[row..].iter().filter(|&&id| id == image_pad).count();
        ensure!(left == 0, "{left} image placeholder tokens are left over after {} images were placed", placed.len());
        self.ids.extend_from_slice(ids);
        self.sampled.resize(self.ids.len(), false);
        self.logprobs.resize(self.ids.len(), 0.0);
        self.images.extend(placed);
        Ok(())
    }

    /// Appends what the policy sampled.
    pub fn push_sampled(&mut self, ids: &[u32], logprobs: &[f32]) {
        assert_eq!(ids.len(), logprobs.len(), "one log-prob for each sampled token");
        self.ids.extend_from_slice(ids);
        self.sampled.resize(self.ids.len(), true);
        self.logprobs.extend_from_slice(logprobs);
    }

    /// The grids of all images, in order of appearance.
    pub fn grids(&self) -> Vec<Grid> {
        self.images.iter().map(|p| p.grid).collect()
    }
}

/// Why an episode ended. A bad answer of the model is data, never an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The last turn that the task allows was taken, or the policy gave its answer.
    Answered,
    /// Every turn was used and there is no answer.
    TurnLimit,
    /// A turn hit the limit of new tokens before the policy ended it.
    Truncated,
    /// The next turn (with its image) would not have fitted into the length limit; it was not begun.
    OverLong,
    /// The box was unusable and the configuration says to stop then.
    InvalidBox,
}

/// What became of the box of a grounding turn, by class. Counted in the metrics as `box/CLASS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoxOutcome {
    Valid,
    /// No JSON block was found.
    Missing,
    /// A block was found, but it is not the JSON that was asked for.
    Malformed,
    /// Coordinates that are not whole numbers.
    NotInteger,
    /// x1 >= x2 or y1 >= y2.
    Inverted,
    /// A corner lies outside of the picture.
    OutOfRange,
    /// A side of at most `min_side` pixels.
    TooSmall,
    /// Longer than `max_aspect` times its width, or the other way round.
    TooThin,
    /// The same region as before.
    Duplicate,
}

/// One message of the conversation, as a person reads it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Turn {
    pub role: String,
    pub text: String,
    pub tokens: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<BoxOutcome>,
    /// The box that the policy named, in pixels of the original picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bbox: Option<BBox>,
    /// In a task of several pictures: the boxes that the policy answered with, in pixels of the original pictures they name. `None`
    /// where the answer cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boxes: Option<Vec<Named>>,
    /// The words of a policy's turn token by token, as the report colours them. For looking: training reads ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pieces: Vec<String>,
}

impl Turn {
    /// Words that name no box, or none yet.
    pub fn new(role: &str, text: String, tokens: usize) -> Turn {
        Turn { role: role.into(), text, tokens, outcome: None, bbox: None, boxes: None, pieces: Vec::new() }
    }
}

/// What the update saw at each token that the policy sampled, in order. For looking: nothing reads it back. Written with four decimals.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Probability under the policy that was updated, over that under the one that sampled: 1 in the first update of a step.
    #[serde(serialize_with = "four_decimals")]
    pub ratios: Vec<f32>,
    /// Entropy of the distribution that the token was drawn from, nats.
    #[serde(serialize_with = "four_decimals")]
    pub entropies: Vec<f32>,
    /// Only where the tokens of one episode have different ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty", serialize_with = "four_decimals")]
    pub advantages: Vec<f32>,
}

fn four_decimals<S: serde::Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|&value| (f64::from(value) * 1e4).round() / 1e4))
}

/// One conversation with everything that is known about it.
#[derive(Clone, Debug)]
pub struct Episode {
    pub id: String,
    pub step: u64,
    /// Episodes of one group answer the same prompt and are compared with each other.
    pub group: u64,
    pub member: usize,
    pub task: String,
    pub question: String,
    pub answer: String,
    pub images: Vec<PathBuf>,
    pub targets: Vec<Target>,
    pub split: Option<String>,
    pub stream: Stream,
    pub turns: Vec<Turn>,
    pub stop: Stop,
    pub parts: Parts,
    pub reward: f64,
    pub advantage: Option<f64>,
    /// Only of episodes that an update was made of.
    pub update: Option<Update>,
}

impl Episode {
    /// Whether the answer was right: the part of the judgement that says so (`accuracy`; for boxes on several pictures `joint`), or, for
    /// a task without one, more than half of the reward.
    pub fn right(&self) -> bool {
        right(&self.parts, self.reward)
    }
}

/// [`Episode::right`] of a record.
pub fn right(parts: &Parts, reward: f64) -> bool {
    parts.get("accuracy").or(parts.get("joint")).unwrap_or(reward) > 0.5
}

/// The turn of the conversation and the region it showed; what the report draws.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShownView {
    pub image: usize,
    pub region: BBox,
    pub size: [u32; 2],
    pub turn: usize,
}

/// The episode as a line of `episodes/STEP.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub step: u64,
    pub group: u64,
    pub member: usize,
    pub task: String,
    pub question: String,
    pub answer: String,
    pub images: Vec<PathBuf>,
    pub targets: Vec<Target>,
    pub views: Vec<ShownView>,
    pub turns: Vec<Turn>,
    pub stop: Stop,
    pub rewards: Parts,
    pub reward: f64,
    pub advantage: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Ids, mask and log-probs, so that a record can be trained on or looked into again. Without log-probs it cannot be trained on: the ids
    /// are those of the words that a server told.
    pub ids: Vec<u32>,
    pub sampled: Vec<u8>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<Update>,
}

impl Episode {
    /// The box of the first grounding turn that was usable, in original pixels.
    pub fn first_box(&self) -> Option<BBox> {
        self.turns.iter().find_map(|t| t.bbox)
    }

    /// The views that were shown, each with the number of turns that the policy had taken before it.
    pub fn views(&self) -> Vec<ShownView> {
        // An image belongs to the message during which it was placed: count the sampled runs before it.
        let mut views = Vec::new();
        for placed in &self.stream.images {
            let mut turn = 0;
            let mut before = false;
            for &s in &self.stream.sampled[..placed.first] {
                if s && !before {
                    turn += 1;
                }
                before = s;
            }
            views.push(ShownView {
                image: placed.view.image,
                region: placed.view.region,
                size: [placed.view.size.width, placed.view.size.height],
                turn,
            });
        }
        views
    }

    pub fn record(&self) -> Record {
        Record {
            id: self.id.clone(),
            step: self.step,
            group: self.group,
            member: self.member,
            task: self.task.clone(),
            question: self.question.clone(),
            answer: self.answer.clone(),
            images: self.images.clone(),
            targets: self.targets.clone(),
            views: self.views(),
            turns: self.turns.clone(),
            stop: self.stop,
            rewards: self.parts.clone(),
            reward: self.reward,
            advantage: self.advantage,
            split: self.split.clone(),
            ids: self.stream.ids.clone(),
            sampled: self.stream.sampled.iter().map(|&s| u8::from(s)).collect(),
            logprobs: match self.stream.logprobs.iter().any(|l| l.is_nan()) {
                true => Vec::new(),
                false => self.stream.logprobs.clone(),
            },
            update: self.update.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Size;

    const PAD: u32 = 9;

    fn view() -> View {
        View { image: 0, region: BBox { x1: 0.0, y1: 0.0, x2: 56.0, y2: 28.0 }, size: Size { width: 56, height: 28 } }
    }

    fn image() -> (Arc<Path>, View, Grid) {
        (Arc::from(Path::new("a.png")), view(), Grid { t: 1, h: 2, w: 4 })
    }

    #[test]
    fn images_and_placeholders_cannot_come_apart() {
        let mut s = Stream::default();
        s.push_context(&[1, PAD, PAD, 2], vec![image()], PAD, 2).unwrap();
        assert_eq!(s.images[0].first, 1);
        assert_eq!(s.prompt_len(), 4);
        s.push_sampled(&[5, 6], &[-0.5, -0.25]);
        s.push_context(&[3, PAD, PAD], vec![image()], PAD, 2).unwrap();
        assert_eq!(s.images[1].first, 7);
        assert_eq!(s.sampled_count(), 2);
        assert_eq!(s.prompt_len(), 4);

        let before = s.ids.clone();
        assert!(s.push_context(&[1, PAD, 2], vec![image()], PAD, 2).is_err(), "one placeholder too few");
        assert!(s.push_context(&[1, PAD, PAD, PAD], vec![image()], PAD, 2).is_err(), "one too many");
        assert!(s.push_context(&[1, PAD, PAD], vec![], PAD, 2).is_err(), "no image for them");
        assert_eq!(s.ids, before, "a refused append changes nothing");
    }

    #[test]
    fn two_images_side_by_side_are_two_images() {
        let mut s = Stream::default();
        s.push_context(&[PAD, PAD, PAD, PAD], vec![image(), image()], PAD, 2).unwrap();
        assert_eq!((s.images[0].first, s.images[1].first), (0, 2));
    }
}
