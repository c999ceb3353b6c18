//! Numbers as people and LaTeX write them, with a unit perhaps.
//!
//! It hides signs, thousands separators, fractions, percent and powers of ten. What must stay true: a text that is not one number
//! (with at most a unit after it) is no number: "3 or 4" is not 3.

use super::text::unwrapped;

/// A number and what stood after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    pub value: f64,
    /// Letters and signs after the number, lower case, without spaces; empty for none.
    pub unit: String,
}

impl Number {
    /// Equal within a relative 1e-6. A unit of this prediction must be the answer's; it may be left out.
    ///
    /// ```
    /// use foveate::reward::number;
    /// let answer = number("12 cm").unwrap();
    /// assert!(number("12").unwrap().answers(&answer));
    /// assert!(!number("12 m").unwrap().answers(&answer));
    /// assert!(!number("12 cm").unwrap().answers(&number("12").unwrap()));
    /// ```
    pub fn answers(&self, answer: &Number) -> bool {
        let tolerance = 1e-6 * self.value.abs().max(answer.value.abs());
        (self.value - answer.value).abs() <= tolerance && (self.unit.is_empty() || self.unit == answer.unit)
    }
}

/// Reads a text that is one number: `-3`, `1,234.5`, `.5`, `1/2`, `1 1/2`, `50%`, `\frac{1}{2}`, `1.5e3`,
/// `1.5 \times 10^{3}`, `12 cm`; `$…$`, `\text{…}` and a lead-in such as "answer:" are seen through. Percent is a
/// hundredth: 50% is 0.5.
///
/// ```
/// use foveate::reward::number;
/// assert_eq!(number(r"\frac{1}{2}").unwrap().value, number("50%").unwrap().value);
/// assert_eq!(number("3 or 4"), None);
/// ```
pub fn number(text: &str) -> Option<Number> {
    // Longer texts say more than a number, and rewriting them piece by piece would take the square of their length.
    if text.len() > 512 {
        return None;
    }
    let plain = plain(text);
    let rest = without_lead_in(plain.trim());
    let (value, rest) = signed(rest)?;
    let rest = rest.trim();
    let (value, rest) = match rest.strip_prefix('%') {
        Some(rest) => (value / 100.0, rest.trim()),
        None => (value, rest),
    };
    let rest = rest.strip_suffix('.').unwrap_or(rest);
    // What follows is a unit only if it is short and says nothing more about numbers ("cm^2" does not).
    let unit: String = rest.chars().filter(|c| !c.is_whitespace()).flat_map(char::to_lowercase).collect();
    let is_unit =
        |c: char| c.is_alphabetic() || matches!(c, '°' | '/' | '^' | '²' | '³' | 'µ' | '$' | '€' | '£' | '2' | '3');
    let starts_well = unit.chars().next().is_none_or(|c| !matches!(c, '/' | '^' | '2' | '3'));
    let words = rest.split_whitespace().count();
    (value.is_finite() && words <= 3 && unit.chars().count() <= 24 && starts_well && unit.chars().all(is_unit))
        .then_some(Number { value, unit })
}

/// LaTeX and typography taken down to plain signs.
fn plain(text: &str) -> String {
    let mut plain = text.trim().to_string();
    for (from, to) in [
        ("\u{2212}", "-"),
        (r"\dfrac", r"\frac"),
        (r"\tfrac", r"\frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"\%", "%"),
        (r"\$", ""),
        ("$", ""),
        (r"\,", ""),
        (r"\!", ""),
        (r"\;", " "),
        (r"\ ", " "),
        ("{,}", ","),
        (r"^\circ", "°"),
        (r"^{\circ}", "°"),
        (r"\times", "×"),
        (r"\cdot", "×"),
        ("**", ""),
        ("~", " "),
    ] {
        if plain.contains(from) {
            plain = plain.replace(from, to);
        }
    }
    unwrapped(&plain)
}

fn without_lead_in(text: &str) -> &str {
    let lower = text.to_ascii_lowercase();
    for lead_in in ["the answer is", "the final answer is", "final answer", "answer is", "answer"] {
        if lower.starts_with(lead_in) {
            return text.get(lead_in.len()..).unwrap_or("").trim_start_matches([':', ' ', '\n', '=']);
        }
    }
    text
}

fn signed(text: &str) -> Option<(f64, &str)> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest.trim_start()),
        None => (1.0, text.strip_prefix('+').unwrap_or(text).trim_start()),
    };
    let (value, rest) = unsigned(rest)?;
    Some((sign * value, rest))
}

fn unsigned(text: &str) -> Option<(f64, &str)> {
    if let Some(found) = latex_fraction(text) {
        return Some(found);
    }
    let (first, rest) = decimal(text)?;
    // A mixed number: "1 1/2", "1\frac{1}{2}".
    if first.fract() == 0.0 {
        if let Some((part, rest)) = latex_fraction(rest.trim_start()) {
            return Some((first + part, rest));
        }
        if rest.starts_with(' ')
            && let Some((top, after)) = decimal(rest.trim_start())
            && let Some((bottom, after)) = over(after)
        {
            return Some((first + top / bottom, after));
        }
    }
    if let Some((bottom, rest)) = over(rest) {
        return Some((first / bottom, rest));
    }
    if let Some(power) = rest.trim_start().strip_prefix('×') {
        let power = power.trim_start().strip_prefix("10^")?;
        let braced = power.starts_with('{');
        let power = power.trim_start_matches('{');
        let (minus, power) = match power.strip_prefix('-') {
            Some(power) => (true, power),
            None => (false, power),
        };
        let digits = power.bytes().take_while(u8::is_ascii_digit).count();
        let exponent: i32 = power.get(..digits)?.parse().ok()?;
        let rest = power.get(digits..)?;
        let rest = if braced { rest.strip_prefix('}')? } else { rest };
        return Some((first * 10f64.powi(if minus { -exponent } else { exponent }), rest));
    }
    Some((first, rest))
}

/// `/ number`, not zero.
fn over(text: &str) -> Option<(f64, &str)> {
    let (bottom, rest) = decimal(text.trim_start().strip_prefix('/')?.trim_start())?;
    (bottom != 0.0).then_some((bottom, rest))
}

fn latex_fraction(text: &str) -> Option<(f64, &str)> {
    let (top, rest) = braced(text.strip_prefix(r"\frac")?)?;
    let (bottom, rest) = braced(rest)?;
    (bottom != 0.0).then_some((top / bottom, rest))
}

/// `{number}`, or a single digit as in `\frac12`.
fn braced(text: &str) -> Option<(f64, &str)> {
    let text = text.trim_start();
    if let Some(body) = text.strip_prefix('{') {
        let close = body.find('}')?;
        let inner = body.get(..close)?.trim();
        let (minus, digits) = match inner.strip_prefix('-') {
            Some(digits) => (-1.0, digits),
            None => (1.0, inner),
        };
        let (value, left) = decimal(digits)?;
        return left.trim().is_empty().then_some((minus * value, body.get(close + 1..)?));
    }
    let digit = text.chars().next()?.to_digit(10)?;
    Some((f64::from(digit), text.get(1..)?))
}

/// Digits with correct thousands separators, a fraction part, an exponent.
fn decimal(text: &str) -> Option<(f64, &str)> {
    let bytes = text.as_bytes();
    let digits_from = |from: usize| bytes.get(from..).unwrap_or(&[]).iter().take_while(|b| b.is_ascii_digit()).count();
    let mut end = digits_from(0);
    let mut written: String = text.get(..end)?.to_string();
    while (1..=3).contains(&end) || written.len() > 3 || end == 0 {
        // "1,234": a comma and exactly three digits, after one to three digits at first.
        if end == 0 || bytes.get(end) != Some(&b',') || digits_from(end + 1) != 3 {
            break;
        }
        if written.len() == end && end > 3 {
            return None;
        }
        written.push_str(text.get(end + 1..end + 4)?);
        end += 4;
    }
    // "1,23" or "12345,678": not a number that has one reading.
    if bytes.get(end) == Some(&b',') && digits_from(end + 1) > 0 {
        return None;
    }
    if bytes.get(end) == Some(&b'.') {
        let n = digits_from(end + 1);
        if end == 0 && n == 0 {
            return None;
        }
        if n > 0 {
            written.push_str(text.get(end..=end + n)?);
            end += n + 1;
        } else if bytes.get(end + 1).is_none() {
            end += 1;
        }
    }
    if end == 0 {
        return None;
    }
    if matches!(bytes.get(end), Some(b'e' | b'E')) {
        let signed = usize::from(matches!(bytes.get(end + 1), Some(b'-' | b'+')));
        let n = digits_from(end + 1 + signed);
        if n > 0 {
            written.push_str(text.get(end..end + 1 + signed + n)?);
            end += 1 + signed + n;
        }
    }
    Some((written.parse().ok()?, text.get(end..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        for (text, expected) in [
            ("42", 42.0),
            ("-3", -3.0),
            ("\u{2212}3", -3.0),
            ("+7.", 7.0),
            (".5", 0.5),
            ("1,234,567.5", 1234567.5),
            ("1{,}234", 1234.0),
            ("1234567", 1234567.0),
            ("1/2", 0.5),
            ("-1 / 4", -0.25),
            ("1 1/2", 1.5),
            (r"\frac{1}{2}", 0.5),
            (r"-\dfrac{3}{4}", -0.75),
            (r"\frac12", 0.5),
            (r"2\frac{1}{2}", 2.5),
            ("50%", 0.5),
            (r"12.5\%", 0.125),
            ("1.5e3", 1500.0),
            (r"1.5 \times 10^{-3}", 0.0015),
            ("$42$", 42.0),
            (r"\text{42}", 42.0),
            ("The answer is 12.", 12.0),
            ("answer: 12", 12.0),
        ] {
            let found = number(text).unwrap_or_else(|| panic!("{text} is a number"));
            // Decimal fractions are rounded once in parsing and once in the operation.
            assert!((found.value - expected).abs() <= 1e-12 * expected.abs(), "{text}: {found:?}");
            assert_eq!(found.unit, "", "{text}");
        }
    }

    #[test]
    fn what_is_not_one_number() {
        for text in [
            "",
            "cat",
            "3 or 4",
            "1,23",
            "12345,678",
            "1/0",
            "3, 4",
            "-",
            ".",
            r"\frac{1}{0}",
            "1 2",
            "10 to 12 cm",
            "1e999",
        ] {
            assert_eq!(number(text), None, "{text}");
        }
    }

    #[test]
    fn units_are_tolerated_only_when_the_answer_has_them() {
        let read = |text| number(text).unwrap();
        assert!(read(r"12\,\text{cm}").answers(&read("12 cm")));
        assert!(read("12 cm^2").answers(&read("12 cm^2")));
        assert!(read("90°").answers(&read(r"90^\circ")));
        assert!(!read("12 cats").answers(&read("12")));
        assert!(!read("12 m").answers(&read("12 cm")));
        assert!(!read("50%").answers(&read("50")));
        assert!(read("0.3333333").answers(&read("1/3")));
        assert!(!read("0.3333").answers(&read("1/3")));
        assert!(read("0").answers(&read("-0")));
    }
}
