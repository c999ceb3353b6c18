//! Free text: equal but for case, spaces, punctuation and articles.

/// Lower case, punctuation gone (hyphens, slashes and underscores become spaces), articles a, an, the gone, single spaces. When
/// nothing but articles was said they stay.
///
/// ```
/// use foveate::reward::normalise;
/// assert_eq!(normalise("  The well-known U.S. Flag! "), "well known us flag");
/// assert_eq!(normalise("A"), "a");
/// ```
pub fn normalise(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars().flat_map(char::to_lowercase) {
        match c {
            '-' | '/' | '_' | '\u{2010}'..='\u{2015}' => plain.push(' '),
            c if c.is_alphanumeric() => plain.push(c),
            c if c.is_whitespace() => plain.push(' '),
            c if is_punctuation(c) => {}
            c => plain.push(c),
        }
    }
    let words: Vec<&str> = plain.split(' ').filter(|w| !w.is_empty()).collect();
    let kept: Vec<&str> = words.iter().copied().filter(|w| !matches!(*w, "a" | "an" | "the")).collect();
    if kept.is_empty() { words.join(" ") } else { kept.join(" ") }
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
}
