//! The published rules of benchmarks, faults included: how each reads an answer out of a whole response.
//!
//! What must stay true: a rule does bit by bit what its authors' script does, so that figures compare with published ones; it is never
//! a reward and never the only figure (the strict reading of a declared answer stands beside it). Where a script asks a language
//! model when its rules find nothing, the answer counts as wrong here.

use serde::{Deserialize, Serialize};

use super::choice::{letter, without_letter};
use crate::geometry::BBox;

/// Whose rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Official {
    /// lmms-eval's V* extractor.
    #[serde(rename = "vstar")]
    VStar,
    /// MME-RealWorld's extractor.
    #[serde(rename = "mme_realworld")]
    MmeRealWorld,
    /// VLMEvalKit's matching, without its language model: HR-Bench and others.
    HrBench,
    /// TreeBench: MME-RealWorld's extractor on what stands in `<answer>`.
    TreeBench,
    /// lmms-eval's comparison of POPE: the response is the word.
    Pope,
    /// lmms-eval's comparison of counts (Pixmo-Count): the first number of the response.
    Counting,
}

impl Official {
    pub const ALL: [Official; 6] = [
        Official::VStar,
        Official::MmeRealWorld,
        Official::HrBench,
        Official::TreeBench,
        Official::Pope,
        Official::Counting,
    ];

    /// As `score` calls it, behind `official:`.
    pub fn name(self) -> &'static str {
        match self {
            Official::VStar => "vstar",
            Official::MmeRealWorld => "mme_realworld",
            Official::HrBench => "hr_bench",
            Official::TreeBench => "tree_bench",
            Official::Pope => "pope",
            Official::Counting => "counting",
        }
    }

    /// Whether its questions have options, and answers are letters.
    pub fn of_choices(self) -> bool {
        match self {
            Official::VStar | Official::MmeRealWorld | Official::HrBench | Official::TreeBench => true,
            Official::Pope | Official::Counting => false,
        }
    }

    /// What it takes for the answer. `choices` are the options as they were shown, with or without letters.
    pub fn read(self, response: &str, choices: &[String]) -> Option<String> {
        match self {
            Official::VStar => vstar_letter(response).map(String::from),
            Official::MmeRealWorld => mme_realworld_letter(response, choices).map(String::from),
            Official::HrBench => matched_letter(response, choices).map(String::from),
            Official::TreeBench => tree_bench_letter(response).map(String::from),
            Official::Pope => Some(response.to_lowercase().trim_matches(is_space).to_owned()),
            Official::Counting => Some(first_number(response)),
        }
    }

    /// Whether that is the answer.
    ///
    /// ```
    /// use foveate::reward::Official;
    /// assert!(Official::Counting.right("There are 12 of them", "12", &[]));
    /// assert!(!Official::Pope.right("Yes.", "yes", &[]), "a full stop is one too many");
    /// ```
    pub fn right(self, response: &str, answer: &str, choices: &[String]) -> bool {
        let answer = match self {
            Official::VStar | Official::MmeRealWorld | Official::HrBench | Official::TreeBench => {
                letter(answer, choices).map(String::from)
            }
            Official::Pope | Official::Counting => self.read(answer, &[]),
        };
        answer.is_some() && self.read(response, choices) == answer
    }
}

/// Whitespace as Python's `str.strip` and `\s` see it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn a_to_d(c: char) -> bool {
    matches!(c, 'A'..='D')
}

/// V* as lmms-eval reads it (`lmms_eval/tasks/vstar_bench`): upper case, then the first of five patterns that
/// matches. Fault kept: the first takes any A to D that begins the response, so "Based on …" is B.
pub fn vstar_letter(response: &str) -> Option<char> {
    let upper = response.trim_matches(is_space).to_uppercase();
    let text: Vec<char> = upper.trim_matches(is_space).chars().collect();
    let at = |i: usize| text.get(i).copied();
    // 1. At the start.
    if let Some(c) = at(0).filter(|c| a_to_d(*c)) {
        return Some(c);
    }
    // 2. ANSWER, CHOICE or OPTION, perhaps IS, then colons or spaces, then the letter.
    let spaces = |from: usize| text[from.min(text.len())..].iter().take_while(|c| is_space(**c)).count();
    let gap = |from: usize| {
        let n = text[from.min(text.len())..].iter().take_while(|c| is_space(**c) || **c == ':').count();
        (n > 0).then(|| at(from + n)).flatten().filter(|c| a_to_d(*c))
    };
    for i in 0..text.len() {
        for word in ["ANSWER", "CHOICE", "OPTION"] {
            let end = i + word.len();
            if !text.get(i..end).is_some_and(|s| s.iter().copied().eq(word.chars())) {
                continue;
            }
            let n = spaces(end);
            let after_is = (n > 0 && at(end + n) == Some('I') && at(end + n + 1) == Some('S')).then_some(end + n + 2);
            if let Some(c) = after_is.and_then(gap).or_else(|| gap(end)) {
                return Some(c);
            }
        }
    }
    // 3. (A)
    for w in text.windows(3) {
        if w[0] == '(' && a_to_d(w[1]) && w[2] == ')' {
            return Some(w[1]);
        }
    }
    // 4. A letter, perhaps spaces, then . ) or ]
    for (i, c) in text.iter().enumerate().filter(|(_, c)| a_to_d(**c)) {
        if matches!(at(i + 1 + spaces(i + 1)), Some('.' | ')' | ']')) {
            return Some(*c);
        }
    }
    // 5. A letter between spaces.
    for (i, c) in text.iter().enumerate().filter(|(_, c)| a_to_d(**c)) {
        if (i == 0 || is_space(text[i - 1])) && at(i + 1).is_none_or(is_space) {
            return Some(*c);
        }
    }
    let letters: Vec<char> = text.iter().copied().filter(|c| a_to_d(*c)).collect();
    if let [only] = letters[..] { Some(only) } else { None }
}

/// MME-RealWorld's rule: known lead-ins are taken out; more than ten words without a capital A to E are no answer; else the first
/// capital A to E; else the letter of the first choice that contains the text (its second character, as in `(A) …`).
///
/// Faults kept: two commas are missing in the published list, so two of its entries are fused pairs that never occur;
/// "An apple" is A; an empty response is contained in every choice and is A. Without `choices` they are `(A)` to `(E)`.
pub fn mme_realworld_letter(response: &str, choices: &[String]) -> Option<char> {
    const LEAD_INS: [&str; 6] = [
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option isThe correct option is",
        "Best answer:Best option:",
    ];
    let mut text = response.trim_matches(is_space).to_string();
    for lead_in in LEAD_INS {
        text = text.replace(lead_in, "");
    }
    let first = text.chars().find(|c| matches!(c, 'A'..='E'));
    if first.is_some() {
        return first;
    }
    if text.split(is_space).filter(|w| !w.is_empty()).count() > 10 {
        return None;
    }
    let lower = text.to_lowercase();
    let second = |choice: &str| choice.to_lowercase().contains(&lower).then(|| choice.chars().nth(1)).flatten();
    match choices.is_empty() {
        true => ["(A)", "(B)", "(C)", "(D)", "(E)"].into_iter().find_map(second),
        false => choices.iter().find_map(|c| second(c)),
    }
}

/// VLMEvalKit's matching (`vlmeval/utils/matching_util.py`): punctuation becomes spaces; when exactly one option's letter stands among
/// the words, and within the last five of them, it is that; else the one option whose text is contained in the response, unless that
/// is more than twice as long as all options together.
///
/// Faults kept: "A" at the beginning of a short sentence is an answer; refusals that the script knows are answers of their own.
pub fn matched_letter(response: &str, choices: &[String]) -> Option<char> {
    const REFUSALS: [&str; 5] = [
        "Failed to obtain answer via API",
        "Sorry, I can't help with images of people yet.",
        "I can't process this file.",
        "I'm sorry, but without the image provided",
        "Cannot determine the answer",
    ];
    // The first alone goes on to the texts of the options.
    if REFUSALS[1..].iter().any(|refusal| response.contains(refusal)) {
        return None;
    }
    let count = if choices.is_empty() { 4 } else { choices.len().min(26) };
    let letters = || (0..count as u8).map(|k| char::from(b'A' + k));
    if !response.contains(REFUSALS[0]) {
        let spaced = response.replace(['.', '(', ')', '[', ']', ',', ':', ';', '!', '*', '#', '{', '}'], " ");
        let words: Vec<&str> = spaced.split(is_space).filter(|word| !word.is_empty()).collect();
        let place = |letter: char| words.iter().position(|word| word.len() == 1 && word.starts_with(letter));
        let found: Vec<(char, usize)> = letters().filter_map(|letter| Some((letter, place(letter)?))).collect();
        match found[..] {
            [(letter, place)] if place + 5 > words.len() => return Some(letter),
            [] if words.contains(&"Z") => return None,
            _ => {}
        }
    }
    let lower = response.to_lowercase();
    let texts: Vec<String> =
        choices.iter().enumerate().map(|(k, choice)| without_letter(choice, k).to_lowercase()).collect();
    if lower.chars().count() > 2 * texts.iter().map(|text| text.chars().count()).sum::<usize>() {
        return None;
    }
    let mut contained = letters().zip(&texts).filter(|(_, text)| lower.contains(text.as_str()));
    let (letter, _) = contained.next()?;
    contained.next().is_none().then_some(letter)
}

/// TreeBench as VLMEvalKit reads it (`TreeBench` in `vlmeval/dataset/image_mcq.py`): the first `<answer>`, in upper case, or else the whole
/// response as it is, by MME-RealWorld's rule for options without texts.
///
/// Faults kept: in capitals a sentence within the tag names the first letter A to E of its words.
pub fn tree_bench_letter(response: &str) -> Option<char> {
    let inside = between(response, "<answer>", "</answer>").map(|text| text.trim_matches(is_space).to_uppercase());
    mme_realworld_letter(inside.as_deref().unwrap_or(response), &[])
}

/// The boxes of TreeBench's second figure, in the numbers in which they were written: `<box>[x1,y1,x2,y2]</box>` within the first `<think>`,
/// or else anywhere. Only whole numbers without spaces count, and corners the right way round.
pub fn tree_bench_boxes(response: &str) -> Vec<[f64; 4]> {
    let mut rest = between(response, "<think>", "</think>").unwrap_or(response);
    let mut boxes = Vec::new();
    while let Some(open) = rest.find("<box>") {
        rest = &rest[open + "<box>".len()..];
        let Some(close) = rest.find("</box>") else { break };
        boxes.extend(whole_corners(rest[..close].trim_matches(is_space)));
        rest = &rest[close + "</box>".len()..];
    }
    boxes
}

/// TreeBench's mean IoU of one response: for each target the best of the boxes, on average over targets; 0 without a box. Without a target,
/// 1 if there is a box: the script's rule.
pub fn tree_bench_iou(boxes: &[[f64; 4]], targets: &[[f64; 4]]) -> f64 {
    if boxes.is_empty() || targets.is_empty() {
        return f64::from(u8::from(!boxes.is_empty()));
    }
    let best = |target: &[f64; 4]| boxes.iter().map(|b| BBox::from(*b).iou(&BBox::from(*target))).fold(0.0, f64::max);
    targets.iter().map(best).sum::<f64>() / targets.len() as f64
}

/// What stands between a first `open` and the next `close`.
fn between<'a>(text: &'a str, open: &str, close: &str) -> Option<&'a str> {
    let rest = &text[text.find(open)? + open.len()..];
    Some(&rest[..rest.find(close)?])
}

/// `[1,2,3,4]` at the beginning of a text.
fn whole_corners(text: &str) -> Option<[f64; 4]> {
    let inside = text.strip_prefix('[')?;
    let inside = &inside[..inside.find(']')?];
    let digits = |side: &str| !side.is_empty() && side.bytes().all(|b| b.is_ascii_digit());
    let sides: Option<Vec<f64>> = inside.split(',').map(|side| side.parse().ok().filter(|_| digits(side))).collect();
    let corners: [f64; 4] = sides?.try_into().ok()?;
    (corners[0] < corners[2] && corners[1] < corners[3]).then_some(corners)
}

/// The first run of digits, or the whole text where there is none.
fn first_number(text: &str) -> String {
    let text = text.trim_matches(is_space);
    let digits: String = text.chars().skip_while(|c| !c.is_numeric()).take_while(|c| c.is_numeric()).collect();
    if digits.is_empty() { text.to_owned() } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [String; 0] = [];

    fn own<const N: usize>(choices: [&str; N]) -> Vec<String> {
        choices.map(str::to_string).to_vec()
    }

    #[test]
    fn vstar_keeps_its_fault() {
        assert_eq!(vstar_letter("Based on the picture, the answer is (A)"), Some('B'));
        assert_eq!(vstar_letter("The answer is C."), Some('C'));
        assert_eq!(vstar_letter("It must be (D) here"), Some('D'));
        assert_eq!(vstar_letter("It is d."), Some('D'));
        assert_eq!(vstar_letter("no letter fits"), None);
        // ANSWER, then a gap, then the C of "choice".
        assert_eq!(vstar_letter("my answer choice is (D)"), Some('C'));
        assert_eq!(vstar_letter(""), None);
    }

    #[test]
    fn mme_realworld_keeps_its_faults() {
        assert_eq!(mme_realworld_letter("The best answer is (C)", &NONE), Some('C'));
        assert_eq!(mme_realworld_letter("An object on the left: (D)", &NONE), Some('A'));
        // "The best option is" is fused with its neighbour in the list, so its T, b, … stay; the first capital is D.
        assert_eq!(mme_realworld_letter("The best option is D", &NONE), Some('D'));
        assert_eq!(mme_realworld_letter("Best answer: C", &NONE), Some('B'));
        assert_eq!(mme_realworld_letter("", &NONE), Some('A'));
        assert_eq!(mme_realworld_letter("dog", &own(["(A) cat", "(B) dog"])), Some('B'));
        assert_eq!(mme_realworld_letter("one two three four five six seven nine ten ten eleven", &NONE), None);
    }

    #[test]
    fn matching_wants_one_letter_near_the_end_or_one_text() {
        let colours = own(["red", "green", "dark blue", "white"]);
        assert_eq!(matched_letter("B", &colours), Some('B'));
        assert_eq!(matched_letter("The answer is (C).", &colours), Some('C'));
        assert_eq!(matched_letter("It is green", &colours), Some('B'));
        assert_eq!(matched_letter("Dark blue!", &colours), Some('C'));
        assert_eq!(matched_letter("red or green", &colours), None);
        assert_eq!(matched_letter("A or B", &colours), None, "two letters, no text");
        // The letter is the sixth word from the end, and the text is too long for its options.
        assert_eq!(matched_letter("B is what I see, for it looks very much so", &colours), None);
        // An article of a short sentence is a letter.
        assert_eq!(matched_letter("A green car", &colours), Some('A'));
        assert_eq!(matched_letter("Cannot determine the answer", &colours), None);
        assert_eq!(matched_letter("a", &colours), None, "small letters are none, and no text is contained");
        assert_eq!(matched_letter("Z", &own(["z", "y"])), None);
        assert_eq!(matched_letter("green", &own(["(A) red", "(B) green"])), Some('B'));
        assert_eq!(matched_letter("", &NONE), None);
    }

    #[test]
    fn tree_bench_reads_a_tag_and_the_boxes_of_the_reasoning() {
        assert_eq!(tree_bench_letter("<think>A or B</think><answer>b</answer>"), Some('B'));
        assert_eq!(tree_bench_letter("<answer> a cat </answer>"), Some('A'), "in capitals an article is a letter");
        assert_eq!(tree_bench_letter("It is (D)."), Some('D'));
        assert_eq!(tree_bench_letter("it is d."), None);
        let said = "<think>The cup <box>[10,10,30,30]</box> is left of the hat <box> [50,50,70,90] </box>, not <box>[1, 2, 3, 4]</box> \
                    or <box>[9,9,2,2]</box> or <box>[1,2,3]</box> <box>[0,0,5,5]</think> <box>[1,1,2,2]</box><answer>A</answer>";
        let boxes = tree_bench_boxes(said);
        assert_eq!(boxes, [[10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 70.0, 90.0]]);
        // The first target is met exactly, the second by half, the third not at all.
        let targets = [[10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 70.0, 70.0], [200.0, 200.0, 300.0, 300.0]];
        assert_eq!(tree_bench_iou(&boxes, &targets), 0.5);
        assert_eq!(
            (tree_bench_iou(&[], &targets), tree_bench_iou(&boxes, &[]), tree_bench_iou(&[], &[])),
            (0.0, 1.0, 0.0)
        );
        assert_eq!(tree_bench_boxes("no thought: <box>[1,2,3,4]</box>"), [[1.0, 2.0, 3.0, 4.0]]);
    }

    #[test]
    fn words_and_counts_are_compared_as_they_stand() {
        assert!(Official::Pope.right(" Yes\n", "yes", &NONE) && !Official::Pope.right("Yes, it is", "yes", &NONE));
        assert!(Official::Counting.right("I count 7, or 8", "7", &NONE));
        assert!(!Official::Counting.right("seven", "7", &NONE));
        assert!(!Official::HrBench.right("A", "?", &own(["x", "y"])), "an answer that is none is never right");
        for rule in Official::ALL {
            assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
        }
    }
}
