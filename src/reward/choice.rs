//! Multiple choice: the letter a declared answer names, read leniently.
//!
//! What must stay true: nothing is guessed from prose. What benchmarks do, who do guess, is in `reward/official.rs`.

use super::normalise;
use super::text::unwrapped;

/// The letter that a declared answer names: `A`, `(a)`, `A.`, `A) cat`, `answer: a`, or the full text of one choice.
///
/// `choices` may be bare texts or carry their letter (`(A) cat`); without them the letters are A to E. Prose that only
/// contains a letter names none, except when exactly one letter stands in parentheses: `… so it is (B)`.
///
/// ```
/// use foveate::reward::letter;
/// assert_eq!(letter("(B) a dog", &[]), Some('B'));
/// assert_eq!(letter("A dog", &["a cat".to_string(), "a dog".to_string()]), Some('B'));
/// assert_eq!(letter("Based on the picture", &[]), None);
/// ```
pub fn letter(answer: &str, choices: &[String]) -> Option<char> {
    let count = if choices.is_empty() { 5 } else { choices.len().min(26) };
    let plain = undress(answer);
    form(&plain, count)
        // Not undressed: between two digits the star of "5*3" carries meaning.
        .or_else(|| choice_text(answer, choices))
        .or_else(|| {
            let rest = without_lead_in(&plain)?;
            form(rest, count).or_else(|| choice_text(rest, choices))
        })
        .or_else(|| only_parenthesised(&plain, count))
}

/// Takes off `$`, `*`, backquotes, quotes and LaTeX wrappers such as `\text{…}`.
fn undress(text: &str) -> String {
    let plain: String = unwrapped(text).chars().filter(|c| !matches!(c, '$' | '*' | '`' | '"')).collect();
    plain.trim().to_string()
}

fn as_letter(c: char, count: usize) -> Option<char> {
    let upper = c.to_ascii_uppercase();
    (upper.is_ascii_uppercase() && usize::from(upper as u8 - b'A') < count).then_some(upper)
}

/// A letter alone or set off by a bracket, full stop or colon from what follows.
fn form(text: &str, count: usize) -> Option<char> {
    let opened = text.starts_with(['(', '[']);
    let mut chars = text.trim_start_matches(['(', '[']).chars();
    let found = as_letter(chars.next()?, count)?;
    let rest = chars.as_str().trim_start_matches(' ');
    let after = rest.chars().next();
    let set_off = match after {
        None => true,
        Some(')' | ']') => true,
        // "A. cat" but not "A.M."; "B: dog"; "C, because".
        Some('.' | ':' | ',' | ';') => {
            !opened && rest.chars().nth(1).is_none_or(char::is_whitespace) && rest.len() == chars.as_str().len()
        }
        Some('\n') => true,
        Some(_) => false,
    };
    set_off.then_some(found)
}

/// Drops "The answer is", "Best option:", … ; `None` when there is no such beginning.
fn without_lead_in(text: &str) -> Option<&str> {
    let mut rest = text;
    let word = |rest: &str, word: &str| -> Option<usize> {
        let head = rest.get(..word.len())?;
        let next = rest.get(word.len()..)?.chars().next();
        (head.eq_ignore_ascii_case(word) && next.is_none_or(|c| !c.is_alphanumeric())).then_some(word.len())
    };
    let skip = |rest: &mut &str, words: &[&str]| -> bool {
        let Some(n) = words.iter().find_map(|w| word(rest, w)) else {
            return false;
        };
        *rest = rest.get(n..).unwrap_or("").trim_start();
        true
    };
    while skip(&mut rest, &["the", "my", "so", "therefore", "final", "best", "correct", "right"]) {
        rest = rest.trim_start_matches([',', ' ']);
    }
    if !skip(&mut rest, &["answer", "option", "choice"]) {
        return None;
    }
    while skip(&mut rest, &["is", "option", "choice"]) {}
    let rest = rest.trim_start_matches([':', ' ', '\n']);
    (!rest.is_empty()).then_some(rest)
}

/// The letter of the one choice whose text this is.
fn choice_text(text: &str, choices: &[String]) -> Option<char> {
    let wanted = normalise(text);
    if wanted.is_empty() {
        return None;
    }
    let mut found = choices.iter().take(26).enumerate().filter(|(i, choice)| {
        let choice = choice.trim();
        let bare = without_letter(choice, *i);
        normalise(choice) == wanted || normalise(bare) == wanted
    });
    let (i, _) = found.next()?;
    found.next().is_none().then(|| char::from(b'A' + i as u8))
}

/// A choice without its own "(B)", "B." or "B)".
pub(super) fn without_letter(choice: &str, index: usize) -> &str {
    let own = char::from(b'A' + index as u8);
    let inner = choice.strip_prefix('(').unwrap_or(choice);
    let Some(rest) = inner.strip_prefix(own) else {
        return choice;
    };
    match rest.strip_prefix([')', '.', ':']) {
        Some(rest) => rest.trim_start(),
        None => choice,
    }
}

fn only_parenthesised(text: &str, count: usize) -> Option<char> {
    let mut found = None;
    for (at, _) in text.match_indices('(') {
        let mut chars = text.get(at + 1..).unwrap_or("").chars();
        // Capitals only: "(a)" in prose numbers a point.
        let Some(c) = chars.next().filter(char::is_ascii_uppercase).and_then(|c| as_letter(c, count)) else {
            continue;
        };
        if chars.next() != Some(')') {
            continue;
        }
        if found.is_some_and(|f| f != c) {
            return None;
        }
        found = Some(c);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [String; 0] = [];

    fn own<const N: usize>(choices: [&str; N]) -> Vec<String> {
        choices.map(str::to_string).to_vec()
    }

    #[test]
    fn lenient_letters() {
        for text in
            ["A", "a", "(A)", "A.", "A)", "[A]", "A) cat", "(A) cat", "A. cat", "A: cat", "answer: a", "Answer: (A)"]
        {
            assert_eq!(letter(text, &NONE), Some('A'), "{text}");
        }
        for text in
            [r"\text{A}", r"\textbf{(A)}", "$A$", "**A**", "The answer is A.", "The best option is: A", "a) cat"]
        {
            assert_eq!(letter(text, &NONE), Some('A'), "{text}");
        }
        for text in ["", "F", "Apple", "A cat", "An answer", "Based on the picture", "A or B", "(A) or", "not A", "AB"]
        {
            let expected = if text == "(A) or" { Some('A') } else { None };
            assert_eq!(letter(text, &NONE), expected, "{text}");
        }
        assert_eq!(letter("Based on the picture the answer is (A).", &NONE), Some('A'));
        assert_eq!(letter("either (A) or (B)", &NONE), None);
    }

    #[test]
    fn the_text_of_a_choice_is_its_letter() {
        let pets = own(["(A) a cat", "(B) a dog", "(C) A.M. radio"]);
        assert_eq!(letter("A dog", &pets), Some('B'));
        assert_eq!(letter("the answer is a dog", &pets), Some('B'));
        assert_eq!(letter("(B) a dog", &pets), Some('B'));
        assert_eq!(letter("A.M. radio", &pets), Some('C'));
        assert_eq!(letter("D", &pets), None);
        assert_eq!(letter("dog", &own(["dog", "dog"])), None);
        assert_eq!(letter("F", &own(["1", "2", "3", "4", "5", "6"])), Some('F'));
        assert_eq!(letter("2.5", &own(["25", "2.5", "-2.5"])), Some('B'));
        assert_eq!(letter("$5*3$", &own(["53", "5*3"])), Some('B'));
        assert_eq!(letter(r"\text{a dog}", &pets), Some('B'));
    }
}
