//! The turn loop with a scripted policy: exact tokens, masks, views, stops and box outcomes.
//!
//! The picture is 1120x896 and the budget 280x224, so one pixel of the view is exactly four of the original. Expected
//! streams come from encoding the whole conversation at once, a path that the loop itself never takes.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;

use anyhow::Result;
use foveate::chat::{Message, Part};
use foveate::data::{Sample, Target};
use foveate::engine::{Completion, Finish, Frontend, Prompt, Sampler, Sampling};
use foveate::episode::{BoxOutcome, Episode, Stop};
use foveate::geometry::{BBox, Size, View};
use foveate::rollout::{self, Stage};
use foveate::tasks::Task;
use foveate::tasks::crop::{Crop, Judge, OnInvalid, Options, Show};
use foveate::tasks::protocol::Protocol;

use crate::tiny;

/// Says its lines in order, whatever it is asked.
struct Script {
    lines: VecDeque<(Vec<u32>, Finish)>,
    /// The ids it was shown before each line.
    heard: Vec<Vec<u32>>,
}

/// Log-prob of the k-th token of a turn: recognisable numbers.
fn logprob(k: usize) -> f32 {
    -0.25 * (k + 1) as f32
}

impl Sampler for Script {
    fn sample(&mut self, prompts: &[Prompt], _: &Sampling) -> Result<Vec<Vec<Completion>>> {
        let mut say = |prompt: &Prompt| {
            self.heard.push(prompt.stream.ids.clone());
            let (ids, finish) = self.lines.pop_front().expect("the script is at its end");
            let logprobs = (0..ids.len()).map(logprob).collect();
            Completion { ids, logprobs, finish }
        };
        Ok(prompts.iter().map(|p| p.seeds.iter().map(|_| say(p)).collect()).collect())
    }

    fn end_step(&mut self) {}
}

struct World {
    frontend: Frontend,
    sample: Sample,
    _dir: tempfile::TempDir,
}

const ORIGINAL: Size = Size { width: 1120, height: 896 };
/// Tokens of the whole picture: 280 x 224 pixels in squares of 28.
const WHOLE: usize = 80;
const ANSWER: &str = "It says \\boxed{7}";

fn looking(bbox: [i64; 4]) -> String {
    let [x1, y1, x2, y2] = bbox;
    format!("There.\n```json\n[{{\"bbox_2d\":[{x1},{y1},{x2},{y2}],\"label\":\"plate\"}}]\n```")
}

fn options() -> Options {
    Options {
        template: "short".into(),
        max_pixels: 62_720,
        min_pixels: 38_416,
        judge: Judge::Number,
        ..Options::default()
    }
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("picture.png");
        tiny::picture(&path, ORIGINAL.width, ORIGINAL.height);
        let mut sample = Sample::question(&[path], "What number is on the plate?", Vec::new());
        sample.answer = "7".into();
        sample.targets = vec![Target { image: 1, bbox: BBox::new(600.0, 500.0, 640.0, 520.0), label: None }];
        World { frontend: Frontend::load(&tiny::nano(), 1 << 10).unwrap(), sample, _dir: dir }
    }

    fn play_with(&self, task: &Options, play: &rollout::Options, lines: &[(&str, Finish)]) -> (Episode, Script) {
        self.play_task(&Crop::new(task.clone(), 28).unwrap(), play, lines)
    }

    fn play_task(&self, task: &dyn Task, play: &rollout::Options, lines: &[(&str, Finish)]) -> (Episode, Script) {
        let stage = Stage { task, frontend: &self.frontend, options: play };
        let lines = lines
            .iter()
            .map(|(text, finish)| {
                let mut ids = self.frontend.chat.assistant_ids(text).unwrap();
                if *finish == Finish::EndOfTurn {
                    ids.push(self.frontend.chat.special.end_of_turn);
                }
                (ids, *finish)
            })
            .collect();
        let mut script = Script { lines, heard: Vec::new() };
        let mut played = rollout::play(&stage, &mut script, &[(3, &self.sample)], 1, 11, 5).unwrap();
        assert_eq!(played.len(), 1);
        let episode = played.remove(0);
        self.check(&episode);
        (episode, script)
    }

    /// Plays turns that all end as they should.
    fn play(&self, task: &Options, lines: &[&str]) -> Episode {
        let lines: Vec<(&str, Finish)> = lines.iter().map(|l| (*l, Finish::EndOfTurn)).collect();
        let (episode, script) = self.play_with(task, &rollout::Options::default(), &lines);
        assert!(script.lines.is_empty(), "{} turns were never asked for", script.lines.len());
        episode
    }

    /// What must be true of every stream.
    fn check(&self, episode: &Episode) {
        let s = &episode.stream;
        assert_eq!((s.sampled.len(), s.logprobs.len()), (s.ids.len(), s.ids.len()));
        let said: usize = episode.turns.iter().filter(|t| t.role == "assistant").map(|t| t.tokens).sum();
        assert_eq!(s.sampled_count(), said, "the mask's sum is the number of sampled tokens");
        // Every trained token is one that the script said, in order, with its log-prob.
        for (row, (&sampled, &l)) in s.sampled.iter().zip(&s.logprobs).enumerate() {
            assert_eq!(sampled, l != 0.0, "row {row}");
        }
        for placed in &s.images {
            let rows = placed.first..placed.first + placed.grid.tokens(2);
            assert!(s.ids[rows.clone()].iter().all(|id| *id == self.frontend.chat.special.image_pad));
            assert!(!s.sampled[rows].iter().any(|s| *s), "no image token is trained");
            let r: [f64; 4] = placed.view.region.into();
            assert!(r.iter().all(|x| x.fract() == 0.0) && ORIGINAL.bounds().contains(&placed.view.region));
        }
    }

    /// The ids of a whole conversation, encoded at once, without the newline behind its last turn.
    fn whole(&self, messages: &[Message], image_tokens: &[usize]) -> Vec<u32> {
        let mut ids = self.frontend.chat.encode(messages, false, image_tokens).unwrap().ids;
        ids.pop();
        ids
    }
}

fn user(before: &str, after: &str) -> Message {
    let mut parts = vec![Part::image(), Part::text(after)];
    if !before.is_empty() {
        parts.insert(0, Part::text(before));
    }
    Message::user(parts)
}

const ASK: &str = "\nQuestion: What number is on the plate? Output the coordinates of the key image area in JSON.";
const FOUND: &str = "\nQuestion: What number is on the plate? Put the final answer in \\boxed{}.";

fn regions(episode: &Episode) -> Vec<([f64; 4], Size)> {
    episode.stream.images.iter().map(|p| (p.view.region.into(), p.view.size)).collect()
}

fn outcomes(episode: &Episode) -> Vec<Option<BoxOutcome>> {
    episode.turns.iter().filter(|t| t.role == "assistant").map(|t| t.outcome).collect()
}

const ALL: ([f64; 4], Size) = ([0.0, 0.0, 1120.0, 896.0], Size { width: 280, height: 224 });

#[test]
fn a_row_without_a_picture_is_asked_once_in_words() {
    let mut world = World::new();
    (world.sample.images, world.sample.targets) = (Vec::new(), Vec::new());
    let task = Crop::new(options(), 28).unwrap();
    task.check(&world.sample).unwrap();
    let e = world.play(&options(), &[ANSWER]);
    let asked =
        Message::user(vec![Part::text("Question: What number is on the plate? Put the final answer in \\boxed{}.")]);
    assert_eq!(e.stream.ids, world.whole(&[asked, Message::assistant(ANSWER)], &[]));
    assert_eq!((e.stop, e.reward, outcomes(&e)), (Stop::Answered, 1.0, vec![None]));
    assert_eq!(
        world.play(&Options { free: true, turns: 4, ..options() }, &[&looking([28, 28, 84, 84])]).stop,
        Stop::TurnLimit
    );
    // Nothing to look at, so nothing to move a crop onto; and a template of one's own may have no words for it.
    let error = |task: Options| Crop::new(task, 28).unwrap().check(&world.sample).unwrap_err().to_string();
    assert!(error(Options { show: Show::Target, ..options() }).contains("the row has no target"));
    let file = world._dir.path().join("own.toml");
    let own = include_str!("../../src/tasks/templates/short.toml").replace("\nwords =", "\ngiven_words =");
    std::fs::write(&file, own).unwrap();
    let own = std::fs::read_to_string(&file).unwrap();
    let (before, after) = own.split_once("given_words").unwrap();
    std::fs::write(&file, format!("{before}{}", &after[after.find("choices = ").unwrap()..])).unwrap();
    let error = error(Options { template: file.to_str().unwrap().into(), ..options() });
    assert!(error.contains("no slot `words`"), "{error}");
}

#[test]
fn a_good_box_then_the_answer() {
    let world = World::new();
    let look = looking([28, 28, 84, 84]);
    let e = world.play(&options(), &[&look, ANSWER]);
    let messages = [
        user("", ASK),
        Message::assistant(&look),
        user("Here is the enlarged area.\n", FOUND),
        Message::assistant(ANSWER),
    ];
    assert_eq!(e.stream.ids, world.whole(&messages, &[WHOLE, 64]));
    // 56 view pixels are 224 original ones, shown as they are: 8 x 8 tokens.
    assert_eq!(regions(&e), [ALL, ([112.0, 112.0, 336.0, 336.0], Size::new(224, 224))]);
    assert_eq!(outcomes(&e), [Some(BoxOutcome::Valid), None]);
    assert_eq!(e.first_box(), Some(BBox::new(112.0, 112.0, 336.0, 336.0)));
    assert_eq!((e.stop, e.reward), (Stop::Answered, 1.0));

    // The trained rows are the two spoken turns, the end of each included, and carry their own log-probs.
    let s = &e.stream;
    let spoken = |text: &str| {
        let mut ids = world.frontend.chat.assistant_ids(text).unwrap();
        ids.push(world.frontend.chat.special.end_of_turn);
        ids
    };
    let trained: Vec<u32> = s.ids.iter().zip(&s.sampled).filter(|(_, t)| **t).map(|(id, _)| *id).collect();
    assert_eq!(trained, [spoken(&look), spoken(ANSWER)].concat());
    let first = s.prompt_len();
    let n = spoken(&look).len();
    assert!((0..n).all(|k| s.sampled[first + k] && s.logprobs[first + k] == logprob(k)));
    assert!(!s.sampled[first + n], "the newline behind the turn is the template's");
}

#[test]
fn every_bad_box_is_counted_by_its_class() {
    let world = World::new();
    let json = |inside: &str| format!("```json\n{inside}\n```");
    let thin = Options { max_aspect: 4.0, ..options() };
    let cases: Vec<(String, BoxOutcome)> = vec![
        ("I see nothing.".into(), BoxOutcome::Missing),
        (json("[{\"bbox_2d\":[28,28,84"), BoxOutcome::Malformed),
        (json("[{\"bbox_2d\":[28,28,84,84]}]"), BoxOutcome::Malformed),
        (json("[{\"bbox_2d\":[28,28,84],\"label\":\"x\"}]"), BoxOutcome::Malformed),
        ("```json\n[{\"bbox_2d\":[28,28,84,84],\"label\":\"x\"}]".into(), BoxOutcome::Malformed),
        (json("[{\"bbox_2d\":[28.5,28,84,84],\"label\":\"x\"}]"), BoxOutcome::NotInteger),
        (json("[{\"bbox_2d\":[\"28\",28,84,84],\"label\":\"x\"}]"), BoxOutcome::NotInteger),
        (looking([84, 28, 28, 84]), BoxOutcome::Inverted),
        (looking([28, 84, 84, 84]), BoxOutcome::Inverted),
        (looking([0, 0, 281, 100]), BoxOutcome::OutOfRange),
        (looking([-1, 0, 100, 100]), BoxOutcome::OutOfRange),
        (looking([10, 10, 38, 110]), BoxOutcome::TooSmall),
        (looking([0, 0, 280, 60]), BoxOutcome::TooThin),
    ];
    for (said, class) in &cases {
        let e = world.play(&thin, &[said, ANSWER]);
        assert_eq!(outcomes(&e), [Some(*class), None], "{said}");
        assert_eq!(e.first_box(), None, "{said}");
        // The whole picture comes a second time, as in the paper.
        assert_eq!(regions(&e), [ALL, ALL], "{said}");
        let messages = [
            user("", ASK),
            Message::assistant(said),
            user("The coordinates were invalid.\n", FOUND),
            Message::assistant(ANSWER),
        ];
        assert_eq!(e.stream.ids, world.whole(&messages, &[WHOLE, WHOLE]), "{said}");
        assert_eq!((e.stop, e.reward), (Stop::Answered, 1.0), "a bad box costs nothing by itself");

        let words = Options { on_invalid: OnInvalid::TextError, ..thin.clone() };
        let e = world.play(&words, &[said, ANSWER]);
        assert_eq!((regions(&e), outcomes(&e)), (vec![ALL], vec![Some(*class), None]), "{said}");
        assert!(e.turns[2].text.starts_with("The coordinates were invalid.\nQuestion: What"), "{}", e.turns[2].text);

        let stop = Options { on_invalid: OnInvalid::Stop, ..thin.clone() };
        let e = world.play(&stop, &[said]);
        assert_eq!((e.stop, e.reward, outcomes(&e)), (Stop::InvalidBox, 0.0, vec![Some(*class)]), "{said}");
    }
}

#[test]
fn boxes_at_the_limits_are_good() {
    let world = World::new();
    for (said, region) in [
        ([10, 10, 39, 110], [40.0, 40.0, 156.0, 440.0]), // 29 wide
        ([0, 0, 280, 100], [0.0, 0.0, 1120.0, 400.0]),   // the right edge belongs to the picture
        ([180, 124, 280, 224], [720.0, 496.0, 1120.0, 896.0]),
    ] {
        let e = world.play(&options(), &[&looking(said), ANSWER]);
        assert_eq!(outcomes(&e)[0], Some(BoxOutcome::Valid), "{said:?}");
        assert_eq!(regions(&e)[1].0, region, "{said:?}");
    }
    // A grown region stays inside the picture.
    let grown = Options { pad_ratio: 0.5, ..options() };
    let e = world.play(&grown, &[&looking([0, 28, 56, 84]), ANSWER]);
    assert_eq!(regions(&e)[1].0, [0.0, 0.0, 336.0, 448.0]);
}

#[test]
fn only_the_first_box_counts() {
    let world = World::new();
    let said =
        "```json\n[{\"bbox_2d\":[28,28,84,84],\"label\":\"a\"},{\"bbox_2d\":[0,0,100,100],\"label\":\"b\"}]\n```";
    let e = world.play(&options(), &[said, ANSWER]);
    assert_eq!(regions(&e)[1].0, [112.0, 112.0, 336.0, 336.0]);
}

#[test]
fn box_and_answer_in_one_turn() {
    let world = World::new();
    let both = format!("{} {ANSWER}", looking([28, 28, 84, 84]));
    // The fixed conversation goes on: the first turn is for the box, the answer is read from the last turn alone.
    let e = world.play(&options(), &[&both, "I am not sure."]);
    assert_eq!((regions(&e).len(), e.stop, e.reward), (2, Stop::TurnLimit, 0.0));
    // The free one is over; the box is kept for the record.
    let e = world.play(&Options { free: true, turns: 4, ..options() }, &[&both]);
    assert_eq!((regions(&e).len(), e.stop, e.reward), (1, Stop::Answered, 1.0));
    assert_eq!(outcomes(&e), [Some(BoxOutcome::Valid)]);
    // One turn: the baseline.
    let e = world.play(&Options { turns: 1, ..options() }, &[&both]);
    assert_eq!((regions(&e).len(), e.stop, e.reward), (1, Stop::Answered, 1.0));
}

#[test]
fn free_turns_nest_and_stop_early() {
    let world = World::new();
    let free = Options { free: true, turns: 5, ..options() };
    let e = world.play(&free, &[&looking([28, 28, 84, 84]), &looking([56, 56, 168, 168]), ANSWER]);
    // The second box is in pixels of the crop, which shows the original one to one from (112, 112).
    assert_eq!(
        regions(&e),
        [ALL, ([112.0, 112.0, 336.0, 336.0], Size::new(224, 224)), ([168.0, 168.0, 280.0, 280.0], Size::new(196, 196)),]
    );
    assert_eq!((e.stop, e.reward), (Stop::Answered, 1.0));
    let placed: Vec<usize> = e.record().views.iter().map(|v| v.turn).collect();
    assert_eq!(placed, [0, 1, 2]);

    // The same region a second time is refused, by name.
    let again = [&looking([28, 28, 84, 84])[..], &looking([0, 0, 224, 224]), ANSWER];
    let e = world.play(&free, &again);
    assert_eq!(outcomes(&e), [Some(BoxOutcome::Valid), Some(BoxOutcome::Duplicate), None]);
    // Whoever never answers runs out of turns.
    let two = Options { turns: 2, ..free };
    let e = world.play(&two, &[&looking([28, 28, 84, 84]), &looking([56, 56, 168, 168])]);
    assert_eq!((e.stop, e.reward, regions(&e).len()), (Stop::TurnLimit, 0.0, 2));
}

#[test]
fn a_cut_turn_ends_the_episode_and_is_not_closed_for_it() {
    let world = World::new();
    let look = looking([28, 28, 84, 84]);
    let (e, _) = world.play_with(&options(), &rollout::Options::default(), &[(&look, Finish::Length)]);
    assert_eq!((e.stop, regions(&e).len()), (Stop::Truncated, 1));
    assert_eq!(e.stream.len(), e.stream.prompt_len() + world.frontend.chat.assistant_ids(&look).unwrap().len());
    assert!(e.stream.ids.last() != Some(&world.frontend.chat.special.end_of_turn));
    // An answer that was complete before the cut still counts; that it was cut is told.
    let lines = [(&look[..], Finish::EndOfTurn), (ANSWER, Finish::Length)];
    let (e, _) = world.play_with(&options(), &rollout::Options::default(), &lines);
    assert_eq!((e.stop, e.reward), (Stop::Truncated, 1.0));
}

#[test]
fn an_end_of_turn_that_was_not_sampled_is_context() {
    let world = World::new();
    let look = looking([28, 28, 84, 84]);
    let lines = [(&look[..], Finish::StopText), (ANSWER, Finish::EndOfTurn)];
    let (e, _) = world.play_with(&options(), &rollout::Options::default(), &lines);
    let sampled_end = world.play(&options(), &[&look, ANSWER]);
    assert_eq!(e.stream.ids, sampled_end.stream.ids, "the conversation reads the same");
    let end = e.stream.prompt_len() + world.frontend.chat.assistant_ids(&look).unwrap().len();
    assert_eq!(e.stream.ids[end], world.frontend.chat.special.end_of_turn);
    assert!(!e.stream.sampled[end] && sampled_end.stream.sampled[end]);
    assert_eq!(e.stream.sampled_count() + 1, sampled_end.stream.sampled_count());
}

#[test]
fn a_conversation_too_long_stops_before_the_picture() {
    let world = World::new();
    let look = looking([28, 28, 84, 84]);
    let whole = world.play(&options(), &[&look, ANSWER]);
    let answer = world.frontend.chat.assistant_ids(ANSWER).unwrap().len() + 1;
    let before_answer = whole.stream.len() - answer;
    let play = |max_tokens| {
        let play = rollout::Options { max_new_tokens: 30, max_tokens, ..rollout::Options::default() };
        let lines = [(&look[..], Finish::EndOfTurn), (ANSWER, Finish::EndOfTurn)];
        world.play_with(&options(), &play, &lines).0
    };
    // With room for the crop and 30 tokens it goes on, with one less it does not, and nothing of the crop is there.
    assert_eq!(play(before_answer + 30).stop, Stop::Answered);
    let e = play(before_answer + 29);
    assert_eq!((e.stop, regions(&e).len(), e.reward), (Stop::OverLong, 1, 0.0));
    assert_eq!(e.stream.ids.last(), Some(&world.frontend.chat.special.end_of_turn));
    assert_eq!(outcomes(&e), [Some(BoxOutcome::Valid)]);
}

#[test]
fn an_answer_without_the_second_look_earns_nothing() {
    let world = World::new();
    // The right answer stands in the first turn already, and the conversation ends there.
    let hasty = format!("{ANSWER} {}", looking([28, 28, 20, 20]));
    let stop = Options { on_invalid: OnInvalid::Stop, ..options() };
    let e = world.play(&stop, &[&hasty]);
    assert_eq!(
        (e.stop, e.turns.iter().filter(|t| t.role == "assistant").count(), e.reward),
        (Stop::InvalidBox, 1, 0.0)
    );
    let cut = world.play_with(&options(), &rollout::Options::default(), &[(ANSWER, Finish::Length)]).0;
    assert_eq!((cut.stop, cut.reward), (Stop::Truncated, 0.0));
    // Judging is a function of row and episode alone.
    let e = world.play(&options(), &[&looking([28, 28, 84, 84]), ANSWER]);
    let task = Crop::new(options(), 28).unwrap();
    assert_eq!(task.judge(&world.sample, &e), task.judge(&world.sample, &e));
    assert_eq!((e.reward, e.advantage), (1.0, None), "the reward is known, the advantage is another number");
}

#[test]
fn controls_change_what_is_shown_and_nothing_else() {
    let world = World::new();
    let look = looking([28, 28, 84, 84]);
    let play = |show| world.play(&Options { show, ..options() }, &[&look, ANSWER]);
    let random = play(Show::Random);
    let shown: View = random.stream.images[1].view;
    // Somewhere else, but as large as asked (rounding outward may add a row and a column), and the same every time.
    assert!((224.0..=225.0).contains(&shown.region.width()) && (224.0..=225.0).contains(&shown.region.height()));
    assert_ne!(shown.region, BBox::new(112.0, 112.0, 336.0, 336.0));
    assert_eq!(regions(&play(Show::Random)), regions(&random));
    // Centred on the target (600..640, 500..520): 620 - 112, 510 - 112.
    assert_eq!(regions(&play(Show::Target))[1].0, [508.0, 398.0, 732.0, 622.0]);
    // A region too small for the target grows as far as it must; several targets are one.
    let mut wide = World::new();
    wide.sample.targets.push(Target { image: 1, bbox: BBox::new(900.0, 500.0, 960.0, 540.0), label: None });
    let shown = wide.play(&Options { show: Show::Target, ..options() }, &[&look, ANSWER]);
    assert_eq!(regions(&shown)[1].0, [600.0, 408.0, 960.0, 632.0]);
    let nothing = play(Show::Nothing);
    assert_eq!(regions(&nothing), [ALL]);
    for e in [&random, &nothing, &play(Show::Target)] {
        assert_eq!(outcomes(e), [Some(BoxOutcome::Valid), None]);
        assert_eq!(e.first_box(), Some(BBox::new(112.0, 112.0, 336.0, 336.0)), "the record keeps what was named");
        assert_eq!((e.stop, e.reward), (Stop::Answered, 1.0));
    }
}

#[test]
fn what_was_named_is_given_without_the_words_that_named_it() {
    let world = World::new();
    let named = BBox::new(112.0, 112.0, 336.0, 336.0);
    let play = |protocol: Protocol, regions: &[(&str, BBox)]| {
        let regions: HashMap<String, BBox> = regions.iter().map(|(id, named)| ((*id).to_owned(), *named)).collect();
        let task = protocol.task(&options(), 4, 28, regions).unwrap();
        world.play_task(&*task, &rollout::Options::default(), &[(ANSWER, Finish::EndOfTurn)]).0
    };
    let close = world.play(&options(), &[&looking([28, 28, 84, 84]), ANSWER]);
    let of = [(world.sample.id.as_str(), named)];
    let both = play(Protocol::ResultOnly, &of);
    assert_eq!(regions(&both), regions(&close), "the same views as in the conversation");
    let before = close.stream.images[1].first - close.stream.images[0].first;
    assert!(
        both.stream.images[1].first - both.stream.images[0].first < before,
        "nothing that was said stands between them"
    );
    let asked = Message::user(vec![
        Part::image(),
        Part::text("\nHere is the enlarged area.\n"),
        Part::image(),
        Part::text(FOUND),
    ]);
    let tokens: Vec<usize> = both.stream.images.iter().map(|placed| placed.grid.tokens(2)).collect();
    assert_eq!(both.stream.ids, world.whole(&[asked, Message::assistant(ANSWER)], &tokens));
    let alone = play(Protocol::CropAlone, &of);
    assert_eq!(regions(&alone), regions(&close)[1..]);
    // Where nothing was named for the row, and where no tool is played, the whole picture is asked about.
    let other = [("another row", named)];
    for (protocol, of) in [(Protocol::ResultOnly, &other), (Protocol::CropAlone, &other), (Protocol::NoTool, &of)] {
        let episode = play(protocol, of);
        assert_eq!((regions(&episode), episode.reward), (vec![ALL], 1.0), "{protocol:?}");
        // Of this template the one-turn baseline is the same question.
        let glance = world.play(&Options { turns: 1, ..options() }, &[ANSWER]);
        assert_eq!(episode.stream.ids, glance.stream.ids, "{protocol:?}");
    }
}

#[test]
fn choices_wait_for_the_second_turn_and_a_boxed_prompt_earns_nothing() {
    let mut world = World::new();
    world.sample.question = "Is it \\boxed{A} or not?".into();
    world.sample.choices = vec!["seven".into(), "eight".into()];
    world.sample.answer = "A".into();
    let task = Options { template: "mgpo".into(), judge: Judge::Choice, ..options() };
    let look = looking([28, 28, 84, 84]);
    let lines = [(&look[..], Finish::EndOfTurn), ("I cannot tell.", Finish::EndOfTurn)];
    let (e, script) = world.play_with(&task, &rollout::Options::default(), &lines);
    assert_eq!(e.reward, 0.0, "the prompt's own \\boxed{{A}} is not an answer");
    let heard: Vec<String> = script.heard.iter().map(|ids| world.frontend.chat.decode(ids, false).unwrap()).collect();
    assert!(heard[0].contains("\\boxed{A}") && !heard[0].contains("(A)") && !heard[0].contains("seven"));
    assert!(heard[1].contains("(A) seven\n(B) eight"));
    for (said, reward) in
        [("\\boxed{A}", 1.0), ("\\boxed{seven}", 1.0), ("\\boxed{B}", 0.0), ("A", 0.0), ("\\boxed{B} \\boxed{A}", 1.0)]
    {
        assert_eq!(world.play(&task, &[&look, said]).reward, reward, "{said}");
    }
    let early = Options { choices_in_turn_1: true, ..task };
    let (_, script) = world.play_with(&early, &rollout::Options::default(), &lines);
    assert!(world.frontend.chat.decode(&script.heard[0], false).unwrap().contains("(A) seven\n(B) eight\n\nOutput"));
}

#[test]
fn two_pictures_are_an_error_and_never_half_seen() {
    let world = World::new();
    let two: Vec<PathBuf> = vec![world.sample.images[0].clone(), world.sample.images[0].clone()];
    let sample = Sample::question(&two, "?", Vec::new());
    let task = Crop::new(options(), 28).unwrap();
    let play = rollout::Options::default();
    let stage = Stage { task: &task, frontend: &world.frontend, options: &play };
    let mut script = Script { lines: VecDeque::new(), heard: Vec::new() };
    let error = rollout::play(&stage, &mut script, &[(0, &sample)], 1, 1, 1).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("the question") && text.contains("picture.png") && text.contains("2 pictures"), "{text}");
}
