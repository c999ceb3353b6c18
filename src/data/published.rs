//! What a set published about a row, kept beside what we make of it.
//!
//! A row of another format than our own has its category in `task`, so that results are tabled by it, and a [`Published`] under the key
//! [`PUBLISHED`]. What must stay true: everything here stands as in the file (letters, order, units, spelling), so that a published
//! scoring rule can be repeated from it; `choices`, `answer` and `targets` of the row are ours, and `order` says how the choices
//! shown come from the options published.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::Sample;
use super::fields::{Fault, Given, fault};

/// Key of a row that was read in another format than our own, or whose options were shuffled.
pub const PUBLISHED: &str = "published";

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Published {
    /// The format it was read as, as `--format` calls it.
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subcategory: Option<String>,
    /// Which of the orders of its options this is (HR-Bench).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cycle: Option<String>,
    /// The whole text, where our question is a part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// With their letters, if they came with them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// The letter, word, number or list.
    pub answer: Value,
    /// The place among `options`, from 0, of each choice that is shown. Empty: as published.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub order: Vec<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub boxes: Vec<[f64; 4]>,
    /// The numbers of a box are x, y, width and height instead of two corners.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sides: bool,
    /// Other columns that scoring may ask for, under their own names.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub other: Map<String, Value>,
}

impl Published {
    pub(super) fn of(given: &Given, id: Option<String>) -> Published {
        Published { name: given.format.name().to_owned(), id, ..Published::default() }
    }

    /// Of a row, if it came from such a set.
    pub fn of_row(row: &Sample) -> Option<Published> {
        serde_json::from_value(row.extra.get(PUBLISHED)?.clone()).ok()
    }

    /// Keeps these columns as they are, where the row has them.
    pub(super) fn keep(mut self, given: &Given, keys: &[&str]) -> Published {
        for key in keys {
            if let Some(value) = given.value(key) {
                self.other.insert((*key).to_owned(), value.clone());
            }
        }
        self
    }

    /// Puts it into the row.
    pub(super) fn into_row(self, mut row: Sample) -> Result<Sample, Fault> {
        row.task = self.category.clone();
        let value = serde_json::to_value(self).or_else(|e| fault(PUBLISHED, e.to_string()))?;
        row.extra.insert(PUBLISHED.into(), value);
        Ok(row)
    }

    /// The same for a question with options: the choices without their letters, the answer as the letter of the choice.
    pub(super) fn into_choices(mut self, mut row: Sample, letter: &str, shuffled: bool) -> Result<Sample, Fault> {
        let count = self.options.len();
        if count < 2 {
            return fault("options", format!("found {count} options, expected at least 2: nothing can be chosen"));
        }
        let Some(right) = place(letter).filter(|place| *place < count) else {
            return fault("answer", format!("found {letter:?}, expected the letter of one of the {count} options"));
        };
        if shuffled {
            self.order = order_of(&row.id, count);
        }
        let bare = without_letters(&self.options);
        let shown = |k: usize| self.order.get(k).copied().unwrap_or(k);
        row.choices = (0..count).map(|k| bare[shown(k)].clone()).collect();
        let at = (0..count).find(|&k| shown(k) == right).unwrap_or(right);
        row.answer = char::from(b'A' + at as u8).to_string();
        self.into_row(row)
    }
}

/// The place of a letter: `B`, `b`, `(B)`, `B.`.
fn place(letter: &str) -> Option<usize> {
    let bare = letter.trim().trim_start_matches('(').trim_end_matches(['.', ')', ':', ' ']);
    let [byte] = bare.as_bytes() else { return None };
    byte.is_ascii_alphabetic().then(|| usize::from(byte.to_ascii_uppercase() - b'A'))
}

/// An order of `count` things. It follows from the name alone, so that a row has one order in every run and in any company.
pub(super) fn order_of(id: &str, count: usize) -> Vec<usize> {
    let digest = Sha256::digest(id.as_bytes());
    let mut seed = [0; 8];
    seed.copy_from_slice(&digest[..8]);
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(u64::from_le_bytes(seed)));
    order
}

/// Options without `(A)`, `A.`, `A)` or `A:`, if each begins with its own.
fn without_letters(options: &[String]) -> Vec<String> {
    let bare = |(k, option): (usize, &String)| {
        let letter = char::from(b'A' + u8::try_from(k).ok().filter(|k| *k < 26)?);
        let (text, opened) = match option.trim().strip_prefix('(') {
            Some(rest) => (rest, true),
            None => (option.trim(), false),
        };
        let rest = text.strip_prefix(letter)?;
        let rest = if opened { rest.strip_prefix(')') } else { rest.strip_prefix(['.', ')', ':']) };
        Some(rest?.trim().to_owned())
    };
    let all: Option<Vec<String>> = options.iter().enumerate().map(bare).collect();
    all.unwrap_or_else(|| options.iter().map(|option| option.trim().to_owned()).collect())
}

/// A question that holds its options, `(A) …` or `A. …` at beginnings of lines or `(A) … (B) …` in one: its words and the options
/// with their letters. What follows the line of the last option is an instruction and neither.
pub(super) fn split_options(text: &str) -> Option<(String, Vec<String>)> {
    let inside = |letter: char| format!("({letter})");
    let starts = |from: usize, letter: char, bracketed: bool| -> Option<usize> {
        let rest = text.get(from..)?;
        if bracketed {
            return Some(from + rest.find(&inside(letter))?);
        }
        let at_line = |at: &usize| *at == 0 || text[..*at].trim_end_matches([' ', '\t']).ends_with('\n');
        let marked = |at: &usize| text[at + 1..].starts_with(['.', ')']);
        rest.match_indices(letter).map(|(at, _)| from + at).find(|at| at_line(at) && marked(at))
    };
    let bracketed = starts(0, 'A', true).is_some();
    let mut places = Vec::new();
    let mut from = 0;
    for letter in 'A'..='Z' {
        let Some(at) = starts(from, letter, bracketed) else { break };
        places.push(at);
        from = at + 1;
    }
    if places.len() < 2 {
        return None;
    }
    let option = |(k, &at): (usize, &usize)| {
        let end = places.get(k + 1).copied().unwrap_or(text.len());
        let whole = text[at..end].trim();
        // The last one ends with its line.
        let one = if k + 1 == places.len() { whole.lines().next().unwrap_or_default() } else { whole };
        one.trim().to_owned()
    };
    let options = places.iter().enumerate().map(option).collect();
    Some((text[..places[0]].trim().to_owned(), options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_out_of_questions() {
        let split = |text: &str| split_options(text).map(|(q, o)| (q, o.join("|")));
        let wanted = |q: &str, o: &str| Some((q.to_owned(), o.to_owned()));
        assert_eq!(
            split(
                "What colour?\n(A) red\n(B) light blue\nAnswer with the option's letter from the given choices directly."
            ),
            wanted("What colour?", "(A) red|(B) light blue")
        );
        assert_eq!(
            split("Which? (A) a cat (B) a dog (C) A. Smith"),
            wanted("Which?", "(A) a cat|(B) a dog|(C) A. Smith")
        );
        assert_eq!(split("How many?\nA. 1\nB. 2\n\nC) 3"), wanted("How many?", "A. 1|B. 2|C) 3"));
        assert_eq!(split("Who is A. Smith, or B. Jones?"), None);
        assert_eq!(split("Nothing (A) alone"), None);
    }

    #[test]
    fn letters_go_only_where_every_option_has_its_own() {
        let bare =
            |options: &[&str]| without_letters(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>()).join("|");
        assert_eq!(bare(&["(A) 2", "(B) 3"]), "2|3");
        assert_eq!(bare(&["A. 2", "B. 3"]), "2|3");
        assert_eq!(bare(&["A cat", "B. 3"]), "A cat|B. 3");
        assert_eq!(bare(&["(B) 2", "(A) 3"]), "(B) 2|(A) 3");
    }

    #[test]
    fn an_order_is_a_rows_own_and_no_place_is_favoured() {
        assert_eq!(order_of("vstar-1", 4), order_of("vstar-1", 4));
        let mut first = [0; 4];
        for k in 0..400 {
            let order = order_of(&format!("vstar-{k}"), 4);
            first[order.iter().position(|&p| p == 0).unwrap()] += 1;
        }
        // Each place is expected 100 times with a deviation of 9: five of them.
        assert!(first.iter().all(|n| (55..145).contains(n)), "{first:?}");
    }
}
