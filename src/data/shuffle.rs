//! Options of multiple choice in an order of each row's own: whether a model knows the answer or likes a letter (spec 7.8).
//!
//! What must stay true: the order follows from the seed and the row's id alone; the options and the answer as published stay with the row,
//! and `order` says how the ones shown come from them; the answer is the letter of the same option as before.

use super::published::{PUBLISHED, Published, order_of};
use super::{Format, Sample};
use crate::reward::letter;

/// What was done to a file's rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shuffled {
    pub shuffled: usize,
    /// Rows whose options speak of each other ("A and B", "none of the above"), which would be wrong in another order.
    pub kept: usize,
}

impl Shuffled {
    /// For the notes of a table.
    pub fn note(self, seed: u64) -> Option<String> {
        let kept = match self.kept {
            0 => String::new(),
            n => format!("; {n} questions whose options speak of each other keep theirs"),
        };
        (self != Shuffled::default())
            .then(|| format!("options are shuffled with seed {seed} in {} questions{kept}", self.shuffled))
    }
}

/// Puts the options of every question that has some into an order of its own. Rows without options, and those whose answer is none
/// of them, stay as they are.
pub fn shuffle_options(rows: &mut [Sample], seed: u64) -> Shuffled {
    let mut done = Shuffled::default();
    for row in rows.iter_mut().filter(|row| row.choices.len() > 1) {
        if speak_of_each_other(&row.choices) {
            done.kept += 1;
        } else if shuffle(row, seed).is_some() {
            done.shuffled += 1;
        }
    }
    done
}

fn shuffle(row: &mut Sample, seed: u64) -> Option<()> {
    let count = row.choices.len();
    let right = usize::from(u8::try_from(letter(&row.answer, &row.choices)?).ok()? - b'A');
    let order = order_of(&format!("{seed}/{}", row.id), count);
    let mut published = Published::of_row(row).unwrap_or_else(|| Published {
        name: Format::Own.name().to_owned(),
        options: row.choices.clone(),
        answer: row.answer.clone().into(),
        ..Published::default()
    });
    // Some are shown in another order than the published one already.
    let before = |place: usize| published.order.get(place).copied().unwrap_or(place);
    published.order = order.iter().map(|&place| before(place)).collect();
    row.choices = order.iter().map(|&place| row.choices[place].clone()).collect();
    let at = order.iter().position(|&place| place == right)?;
    row.answer = char::from(b'A' + u8::try_from(at).ok()?).to_string();
    row.extra.insert(PUBLISHED.into(), serde_json::to_value(published).ok()?);
    Some(())
}

/// Whether some option names others by their letters or places.
fn speak_of_each_other(choices: &[String]) -> bool {
    let last = char::from(b'A' + u8::try_from(choices.len() - 1).unwrap_or(25).min(25));
    let speaks = |choice: &String| {
        let words: Vec<&str> = choice.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
        let is_letter = |word: &str| word.len() == 1 && word.chars().all(|c| ('A'..=last).contains(&c));
        let joined = |w: &[&str]| {
            is_letter(w[0]) && matches!(w[1].to_ascii_lowercase().as_str(), "and" | "or" | "nor") && is_letter(w[2])
        };
        let lower = choice.to_lowercase();
        words.windows(3).any(joined)
            || ["the above", "the below", "these options"].iter().any(|what| lower.contains(what))
    };
    choices.iter().any(speaks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(id: usize, choices: &[&str], answer: &str) -> Sample {
        let mut row = Sample::question(&["a.png".into()], "Which?", choices.iter().map(|c| (*c).to_owned()).collect());
        (row.id, row.answer) = (id.to_string(), answer.to_owned());
        row
    }

    const COLOURS: [&str; 4] = ["red", "green", "blue", "white"];

    #[test]
    fn the_answer_stays_the_same_option_and_the_published_one_stands_beside_it() {
        let mut places = [0; 4];
        for seed in 0..100 {
            let mut rows = vec![row(1, &COLOURS, "C"), row(2, &COLOURS, "blue")];
            assert_eq!(shuffle_options(&mut rows, seed), Shuffled { shuffled: 2, kept: 0 });
            for row in &rows {
                let at = usize::from(row.answer.as_bytes()[0] - b'A');
                assert_eq!(row.choices[at], "blue");
                let published = Published::of_row(row).unwrap();
                assert_eq!(published.options, COLOURS);
                let shown: Vec<&str> = published.order.iter().map(|&k| COLOURS[k]).collect();
                assert_eq!(row.choices, shown);
                places[at] += 1;
            }
            assert_eq!(Published::of_row(&rows[0]).unwrap().answer, json!("C"));
            assert_eq!(Published::of_row(&rows[1]).unwrap().answer, json!("blue"));
        }
        // Each place is expected 50 times with a deviation of 6: four of them.
        assert!(places.iter().all(|n| (26..75).contains(n)), "{places:?}");
    }

    #[test]
    fn an_order_follows_from_seed_and_row_and_builds_on_the_one_that_was_there() {
        let shuffled = |id, seed| {
            let mut rows = [row(id, &COLOURS, "A")];
            shuffle_options(&mut rows, seed);
            rows[0].choices.join(" ")
        };
        assert_eq!(shuffled(5, 1), shuffled(5, 1));
        let orders: std::collections::HashSet<String> = (0..8).map(|seed| shuffled(5, seed)).collect();
        assert!(orders.len() > 2 && (0..8).any(|id| shuffled(id, 1) != shuffled(5, 1)));
        // As a folder of V* is read: published with the right one first, shown otherwise.
        let mut other = row(9, &["white", "red", "blue", "green"], "B");
        let published = Published {
            name: "vstar_folder".into(),
            options: COLOURS.map(String::from).to_vec(),
            order: vec![3, 0, 2, 1],
            ..Published::default()
        };
        other.extra.insert(PUBLISHED.into(), serde_json::to_value(published).unwrap());
        let mut rows = [other];
        shuffle_options(&mut rows, 3);
        let published = Published::of_row(&rows[0]).unwrap();
        assert_eq!(published.name, "vstar_folder");
        assert_eq!(rows[0].choices, published.order.iter().map(|&k| COLOURS[k]).collect::<Vec<_>>());
        assert_eq!(rows[0].choices[usize::from(rows[0].answer.as_bytes()[0] - b'A')], "red");
    }

    #[test]
    fn options_that_speak_of_each_other_and_free_answers_keep_their_order() {
        let kept = |choices: &[&str]| {
            let mut rows = [row(1, choices, "A")];
            let before = rows.clone();
            let done = shuffle_options(&mut rows, 1);
            assert!(done.kept == 0 || rows == before);
            done.kept == 1
        };
        assert!(kept(&["1", "2", "A and B"]) && kept(&["1", "2", "Neither (A) nor (B)"]));
        assert!(kept(&["1", "2", "None of the above"]) && kept(&["All of the above.", "2"]));
        assert!(!kept(&["The dog is above the cat", "The dog is below the cat"]));
        assert!(!kept(&["a hat and a cup", "Y and Z"]));
        let mut rows = [row(1, &[], "7"), row(2, &COLOURS, "violet")];
        let before = rows.clone();
        assert_eq!(shuffle_options(&mut rows, 1), Shuffled::default());
        assert_eq!(rows, before);
        assert!(Shuffled::default().note(1).is_none());
        assert!(Shuffled { shuffled: 3, kept: 1 }.note(7).unwrap().contains("seed 7 in 3 questions; 1 questions"));
    }
}
