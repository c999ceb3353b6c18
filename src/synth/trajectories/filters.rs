//! What a trace must be to be kept (spec 2.3, step 4): well formed, without a leak, about the right pictures, and unlike the others.
//!
//! It hides how faults are told apart. What must stay true: a filter looks at words, never at who wrote them; each rejection has one
//! class, the first fault in the order below.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use serde::Serialize;

use super::Facts;
use crate::data::Sample;

/// Share of three-word runs that two traces of the same pictures may have in common.
const ALIKE: f64 = 0.9;

/// Why a trace is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejected {
    /// The row has no annotation to reason from.
    NoFacts,
    /// The teacher gave no answer; it is asked again in the next run.
    Teacher,
    /// The teacher's answer hit the limit of tokens.
    CutShort,
    /// Empty, or with the tags of an answer in it.
    Format,
    /// It holds a number that is not a picture's, in digits or in words, or speaks of boxes and coordinates.
    Leak,
    /// A sentence speaks of an object and of no picture, or there is a picture that the row has not.
    UnnamedImage,
    /// The picture of a target is never named.
    TargetImage,
    /// The conclusion stands at the start.
    ConclusionFirst,
    /// There are no episodes that tell whether it helps.
    Unmeasured,
    /// With it, the answer is not better enough than without.
    NoGain,
    /// Nearly the words of another trace of the same pictures.
    NearDuplicate,
    /// Its task has enough.
    Balance,
}

/// Holds a trace against its row; what it says of coordinates, pictures and order. The first fault.
pub fn judge(trace: &str, sample: &Sample, facts: &Facts) -> Result<(), Rejected> {
    let trace = trace.trim();
    if trace.is_empty() || ["<think>", "</think>", "<answer>", "</answer>"].iter().any(|tag| trace.contains(tag)) {
        return Err(Rejected::Format);
    }
    let (bare, named) = without_image_names(trace);
    let lower = bare.to_lowercase();
    let words = || lower.split(|c: char| !c.is_alphabetic());
    if bare.contains(char::is_numeric) || bare.contains('%') || words().any(|word| TELLING.contains(&word)) {
        return Err(Rejected::Leak);
    }
    if named.iter().any(|image| !(1..=sample.images.len()).contains(image)) {
        return Err(Rejected::UnnamedImage);
    }
    if sample.targets.iter().any(|t| !named.contains(&t.image)) {
        return Err(Rejected::TargetImage);
    }
    let sentences: Vec<&str> =
        trace.split_inclusive(['.', '!', '?']).map(str::trim).filter(|s| !s.is_empty()).collect();
    let labels = sample.targets.iter().filter_map(|t| t.label.as_deref());
    let names: HashSet<String> = labels
        .chain(facts.objects.iter().flatten().map(|object| object.name.as_str()))
        .map(str::to_lowercase)
        .collect();
    let speaks = |sentence: &&str| {
        let lower = sentence.to_lowercase();
        names.iter().any(|name| has_words(&lower, name))
    };
    if sentences.iter().any(|s| speaks(s) && !s.contains("Image-")) {
        return Err(Rejected::UnnamedImage);
    }
    let concludes = |s: &str| {
        let lower = s.to_lowercase();
        ["so ", "therefore", "the answer", "hence", "thus "].iter().any(|word| lower.starts_with(word))
    };
    match sentences.as_slice() {
        [first, _, ..] if concludes(first) => Err(Rejected::ConclusionFirst),
        _ => Ok(()),
    }
}

/// Words that tell a place in numbers, or that a place was told. Small numbers count things.
const TELLING: [&str; 24] = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
    "hundred",
    "thousand",
    "percent",
    "pixels",
    "coordinates",
    "bbox",
];

/// Whether words stand in a text, and not as a part of others.
fn has_words(text: &str, words: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text.match_indices(words)
        .any(|(at, found)| !part(text[..at].chars().next_back()) && !part(text[at + found.len()..].chars().next()))
}

/// The text without its "Image-k", and which k there were.
fn without_image_names(text: &str) -> (String, HashSet<usize>) {
    let mut rest = text;
    let (mut bare, mut named) = (String::new(), HashSet::new());
    while let Some(at) = rest.find("Image-") {
        bare.push_str(&rest[..at]);
        rest = &rest[at + "Image-".len()..];
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        named.extend(rest[..digits].parse::<usize>().ok());
        rest = &rest[digits..];
    }
    bare.push_str(rest);
    (bare, named)
}

/// Traces so far, by the pictures they speak of.
#[derive(Default)]
pub(super) struct Seen(HashMap<Vec<PathBuf>, Vec<HashSet<String>>>);

impl Seen {
    pub(super) fn add(&mut self, sample: &Sample, trace: &str) -> Result<(), Rejected> {
        let words: Vec<&str> = trace.split_whitespace().collect();
        let runs: HashSet<String> = words.windows(3).map(|run| run.join(" ")).collect();
        let others = self.0.entry(sample.images.clone()).or_default();
        let alike = |other: &HashSet<String>| {
            let common = runs.intersection(other).count();
            common as f64 >= ALIKE * runs.union(other).count().max(1) as f64
        };
        if others.iter().any(alike) {
            return Err(Rejected::NearDuplicate);
        }
        others.push(runs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::BBox;
    use crate::synth::trajectories::Object;
    use crate::synth::trajectories::tests::row;
    use serde_json::json;

    #[test]
    fn faults_have_classes() {
        let row = row(json!([]), json!([]));
        let facts = Facts {
            objects: vec![
                vec![],
                vec![Object { name: "Dog".into(), bbox: BBox::new(0.0, 0.0, 1.0, 1.0), attributes: vec![] }],
            ],
            relations: vec![],
        };
        let fault = |trace: &str| judge(trace, &row, &facts).err();
        assert_eq!(fault("Image-1 shows a fox. The fox of Image-1 is in Image-2."), None);
        assert_eq!(fault(" "), Some(Rejected::Format));
        assert_eq!(fault("a </think> b Image-2"), Some(Rejected::Format));
        assert_eq!(fault("The fox of Image-2 is at 10."), Some(Rejected::Leak));
        assert_eq!(fault("The fox of Image-2 is at (0.25)."), Some(Rejected::Leak));
        for leak in [
            "The fox of Image-2 is at \u{ff14}\u{ff18}.",
            "Image-2 has the fox at four hundred eighty-seven.",
            "The fox of Image-2 fills 3 %.",
            "Image-2 has the fox, its bbox is known.",
        ] {
            assert_eq!(fault(leak), Some(Rejected::Leak), "{leak}");
        }
        assert_eq!(fault("The place is Image-487 Image-159. The fox is in Image-2."), Some(Rejected::UnnamedImage));
        assert_eq!(fault("A dog stands there. Image-2 shows a fox."), Some(Rejected::UnnamedImage));
        assert_eq!(fault("THE FOX stands there. It is Image-2."), Some(Rejected::UnnamedImage));
        assert_eq!(fault("Two foxes of ten are dogged. Image-2."), Some(Rejected::Leak));
        assert_eq!(fault("They are dogged. The fox is in Image-2."), None);
        assert_eq!(fault("The fox is in Image-1."), Some(Rejected::TargetImage));
        assert_eq!(fault("There is a fox. Image-2 has it."), Some(Rejected::UnnamedImage));
        assert_eq!(fault("So the fox is in Image-2. Image-1 has none."), Some(Rejected::ConclusionFirst));
    }
}
