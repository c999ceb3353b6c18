//! Text into HTML: the one gate every string from a run folder passes before it reaches the page.
//!
//! A model's output is hostile text: it may hold tags, quotes, `]]>` or control characters. What must stay true: nothing outside
//! this file puts a string it did not write itself into the page without [`escape`].

/// Escapes text for HTML content and for attribute values in double or single quotes.
///
/// Control characters other than tab and newline are shown as their picture (U+2400 block): a browser would drop or misread them.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(character),
            '\u{0}'..='\u{1f}' => out.extend(char::from_u32(0x2400 + character as u32)),
            '\u{7f}' => out.push('\u{2421}'),
            _ => out.push(character),
        }
    }
    out
}

/// JSON for a `<script type="application/json">`. Nothing in it can end the element or open a comment there: `<`, `>` and `&`, which stand in
/// strings only, are written as their escapes, and so are the two line ends that JavaScript knows and JSON does not.
pub fn json_in_script(value: &serde_json::Value) -> String {
    let mut out = String::new();
    for character in value.to_string().chars() {
        match character {
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", character as u32)),
            _ => out.push(character),
        }
    }
    out
}

/// Escapes a model's words and shows special tokens (`<|im_end|>`) as small marks; a row of the same token becomes one mark with its count.
pub fn words(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, token, after)) = next_token(rest) {
        out.push_str(&escape(before));
        let mut count = 1;
        rest = after;
        while let Some(("", same, after)) = next_token(rest).filter(|(_, same, _)| *same == token) {
            debug_assert_eq!(same, token);
            count += 1;
            rest = after;
        }
        let times = if count > 1 { format!(" ×{count}") } else { String::new() };
        out.push_str(&format!("<span class=\"token\">{}{times}</span>", escape(token)));
    }
    out.push_str(&escape(rest));
    out
}

/// The first special token: what stands before it, its name without brackets, what comes after.
fn next_token(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(found) = text[from..].find("<|") {
        let start = from + found;
        let inner = &text[start + 2..];
        let end = inner.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(inner.len());
        if end > 0 && inner[end..].starts_with("|>") {
            return Some((&text[..start], &inner[..end], &inner[end + 2..]));
        }
        from = start + 2;
    }
    None
}

/// A number for reading: short, no trailing zeros, `—` when it is not one.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "—".into();
    }
    let size = value.abs();
    let text = match size {
        0.0 => return "0".into(),
        _ if !(1e-3..1e6).contains(&size) => {
            let text = format!("{value:.2e}");
            let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
            return format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'));
        }
        _ if size >= 1000.0 => format!("{value:.0}"),
        _ if size >= 100.0 => format!("{value:.1}"),
        _ if size >= 1.0 => format!("{value:.2}"),
        _ if size >= 0.01 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_becomes_harmless() {
        assert_eq!(
            escape("<script>alert(\"x\")</script> & 'y' ]]> \u{0}\u{1b}"),
            "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &#39;y&#39; ]]&gt; ␀␛"
        );
        assert_eq!(escape("über 4 µm\n\tja"), "über 4 µm\n\tja");
    }

    #[test]
    fn json_in_a_script_cannot_leave_it_and_reads_back() {
        let evil = serde_json::json!({"</script>": "<!--<script> & ]]> \u{2028}\\u003c"});
        let text = json_in_script(&evil);
        assert!(!text.contains(['<', '>', '&', '\u{2028}']), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), evil);
    }

    #[test]
    fn special_tokens_become_marks_and_their_rows_are_counted() {
        assert_eq!(
            words("a<|image_pad|><|image_pad|><|image_pad|><|im_end|>\nb"),
            "a<span class=\"token\">image_pad ×3</span><span class=\"token\">im_end</span>\nb"
        );
    }

    #[test]
    fn what_only_looks_like_a_token_is_text() {
        assert_eq!(words("<|<b>|> <||> <|x"), "&lt;|&lt;b&gt;|&gt; &lt;||&gt; &lt;|x");
        assert_eq!(words("<|\"onload=x|><|ok|>"), "&lt;|&quot;onload=x|&gt;<span class=\"token\">ok</span>");
        assert_eq!(words("<|<|ok|>"), "&lt;|<span class=\"token\">ok</span>");
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.5, "0.5"),
            (2.0, "2"),
            (-12.345, "-12.35"),
            (431.25, "431.2"),
            (1234.5, "1234"),
            (0.0025, "0.0025"),
            (0.00025, "2.5e-4"),
            (1e-6, "1e-6"),
            (-2.346e7, "-2.35e7"),
            (f64::NAN, "—"),
        ];
        for (value, expected) in cases {
            assert_eq!(number(value), expected, "{value}");
        }
    }
}
