//! Free text: equal but for case, spaces, punctuation and articles.
//!
//! What must stay true: two different numbers never become the same text, so a sign that stands inside a number or begins one
//! is not punctuation.

/// LaTeX that changes how a text looks and not what it says.
const WRAPPERS: [&str; 9] =
    [r"\text{", r"\textbf{", r"\textit{", r"\textrm{", r"\texttt{", r"\mathrm{", r"\mathbf{", r"\mathit{", r"\mbox{"];

/// Takes off LaTeX wrappers such as `\text{…}`, each with its own closing brace; other braces stay. For every judge.
pub(super) fn unwrapped(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    // Of each brace that is open, whether a wrapper opened it.
    let mut open = Vec::new();
    let mut rest = text.chars();
    loop {
        if let Some(inside) = WRAPPERS.iter().find_map(|wrapper| rest.as_str().strip_prefix(wrapper)) {
            open.push(true);
            rest = inside.chars();
            continue;
        }
        match rest.next() {
            None => return plain,
            Some('}') if open.pop() == Some(true) => {}
            Some(c) => {
                if c == '{' {
                    open.push(false);
                }
                plain.push(c);
            }
        }
    }
}

/// LaTeX wrappers gone, lower case, punctuation gone (hyphens, slashes and underscores become spaces), articles a, an, the
/// gone, single spaces. When nothing but articles was said they stay.
///
/// Numbers stay what they are: a minus or point that begins one stays, and so does whatever stands between two digits, but for
/// hyphens (spaces, as in "3-1") and commas that separate thousands (gone).
///
/// ```
/// use foveate::reward::normalise;
/// assert_eq!(normalise("  The well-known U.S. Flag! "), "well known us flag");
/// assert_eq!(normalise(r"\text{about} $-1,234.5$."), "about -1234.5");
/// assert_eq!(normalise("A"), "a");
/// ```
pub fn normalise(text: &str) -> String {
    let lower: Vec<char> = unwrapped(text).trim().chars().flat_map(char::to_lowercase).collect();
    let mut plain = String::with_capacity(lower.len());
    let mut rest = &lower[..];
    while let Some(&first) = rest.first() {
        let number = rest.iter().take_while(|c| c.is_ascii_digit() || **c == ',').count();
        let signs = rest.iter().take_while(|c| is_spacer(**c) || is_punctuation(**c)).count();
        let taken = if first.is_ascii_digit() {
            // A comma at the end belongs to the sentence.
            let taken = number - rest[..number].iter().rev().take_while(|c| **c == ',').count();
            push_digits(&mut plain, &rest[..taken]);
            taken
        } else if signs > 0 {
            // A text that begins "- 5" means minus five; later on such a hyphen is a dash.
            let gap = rest[signs..].iter().take_while(|c| plain.is_empty() && c.is_whitespace()).count();
            push_signs(&mut plain, &rest[..signs], rest.get(signs + gap).is_some_and(|c| c.is_numeric()));
            signs + gap
        } else {
            plain.push(if first.is_whitespace() { ' ' } else { first });
            1
        };
        rest = &rest[taken..];
    }
    let words: Vec<&str> = plain.split(' ').filter(|w| !w.is_empty()).collect();
    let kept: Vec<&str> = words.iter().copied().filter(|w| !matches!(*w, "a" | "an" | "the")).collect();
    if kept.is_empty() { words.join(" ") } else { kept.join(" ") }
}

/// Digits with commas between them: "1,234,567" loses its commas, "1,5" and "1,2,3" keep them.
fn push_digits(plain: &mut String, run: &[char]) {
    let mut groups = run.split(|c| *c == ',').map(<[char]>::len);
    let thousands = groups.next().is_some_and(|first| first <= 3) && groups.all(|later| later == 3);
    plain.extend(run.iter().filter(|c| !thousands || **c != ','));
}

/// Signs between what is written already and what follows.
fn push_signs(plain: &mut String, signs: &[char], number_follows: bool) {
    let hyphen = signs.iter().any(|c| is_hyphen(*c));
    let spaced = signs.iter().any(|c| is_spacer(*c));
    match plain.chars().next_back() {
        Some(before) if number_follows && before.is_numeric() => match signs {
            ['/'] => plain.push('/'),
            _ if spaced => plain.push(' '),
            _ => plain.extend(signs),
        },
        // "5%-7%" is a range.
        Some(before) if before.is_alphanumeric() || matches!(before, '%' | '°') => plain.extend(spaced.then_some(' ')),
        _ if number_follows => {
            plain.extend(hyphen.then_some('-'));
            // One point begins a fraction, several are an ellipsis.
            if let [.., '.'] = signs
                && !signs.ends_with(&['.', '.'])
            {
                plain.push('.');
            }
        }
        _ => plain.extend(spaced.then_some(' ')),
    }
}

/// Hyphens, dashes and the minus sign.
fn is_hyphen(c: char) -> bool {
    matches!(c, '-' | '\u{2010}'..='\u{2015}' | '\u{2212}')
}

/// Signs that separate words.
fn is_spacer(c: char) -> bool {
    is_hyphen(c) || matches!(c, '/' | '_')
}

/// ASCII punctuation less the signs that carry meaning (`+ = < > % °` stay), and the usual typographic marks.
fn is_punctuation(c: char) -> bool {
    (c.is_ascii_punctuation() && !matches!(c, '+' | '=' | '<' | '>' | '%'))
        || matches!(
            c,
            '\u{2018}'..='\u{201f}' | '\u{2026}' | '\u{3001}' | '\u{3002}' | '\u{ff0c}' | '\u{ff01}' | '\u{ff1f}'
        )
}

/// Whether two texts say the same. Texts of nothing but punctuation are compared as they stand.
pub fn same_text(a: &str, b: &str) -> bool {
    match (normalise(a), normalise(b)) {
        (a_plain, b_plain) if a_plain.is_empty() || b_plain.is_empty() => a.trim() == b.trim(),
        (a_plain, b_plain) => a_plain == b_plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_same_and_what_is_not() {
        assert!(same_text("The  Red ball.", "red ball"));
        assert!(same_text("STOP!", "stop"));
        assert!(same_text("it’s", "its"));
        assert!(!same_text("red ball", "ball red"));
        assert!(!same_text("50%", "50"));
        assert!(!same_text("?", "!"));
        assert!(same_text("?", " ? "));
        assert!(!same_text("", "the"));
    }

    #[test]
    fn different_numbers_are_different_texts() {
        for (a, b) in [
            ("3.5", "35"),
            ("1.5", "15"),
            ("-5", "5"),
            (".5", "5"),
            ("-.5", ".5"),
            ("(-5)", "(5)"),
            ("- 5", "5"),
            ("about -5 degrees", "about 5 degrees"),
            ("1,5", "15"),
            ("1,2,3", "123"),
            ("12345,678", "12345678"),
            ("1/2", "1 2"),
            ("10:30", "1030"),
            ("5*3", "53"),
            (r"\frac{1}{23}", r"\frac{12}{3}"),
        ] {
            assert!(!same_text(a, b), "{a} and {b}");
        }
        for (a, b) in [
            ("3.5.", "3.5"),
            ("$-5$", "-5"),
            ("- 5", "-5"),
            ("\u{2212}5", "-5"),
            ("1,234", "1234"),
            ("1,234,567.5 m", "1234567.5 m"),
            ("5, I think", "5 I think"),
            ("... 5", "5"),
            ("...5", "5"),
            ("COVID-19", "covid 19"),
            ("3-1", "3 - 1"),
            ("No. 5", "no 5"),
        ] {
            assert!(same_text(a, b), "{a} and {b}");
        }
    }

    #[test]
    fn wrappers_come_off_with_their_own_braces() {
        assert!(same_text(r"\text{stop}", "stop"));
        assert!(same_text(r"\textbf{\text{Stop} sign}", "stop sign"));
        assert_eq!(unwrapped(r"\text{a {b} c} {d}"), "a {b} c {d}");
        assert_eq!(unwrapped(r"12\,\text{cm"), r"12\,cm");
    }
}
