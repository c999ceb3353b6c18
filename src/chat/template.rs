//! The chat template of a checkpoint, rendered as transformers renders it: messages in, one string out.
//!
//! It hides where a checkpoint keeps its template (three places, one of them with two forms) and how Python's Jinja
//! differs from ours: whitespace rules, `tojson` with Python's separators and no HTML escapes, string methods, `raise_exception`, `strftime_now`.
//!
//! What must stay true: the same messages give the same string as `apply_chat_template(..., tokenize=False)`; a template that
//! asks for something we do not have is an error, never an empty string.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

/// A compiled template and the constants (`bos_token` and so on) it may name.
pub(super) struct Template {
    environment: Environment<'static>,
    constants: Map<String, Json>,
}

const NAME: &str = "chat";

impl Template {
    /// The template of a checkpoint folder: `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`'s own.
    ///
    /// # Errors
    /// No template anywhere, or one that does not compile.
    pub(super) fn load(dir: &Path, tokenizer_config: &Map<String, Json>) -> Result<Template> {
        let (source, origin) = find_source(dir, tokenizer_config)?;
        let mut constants = Map::new();
        for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            if let Some(token) = token_text(tokenizer_config.get(key)) {
                constants.insert(key.to_string(), Json::String(token));
            }
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("the template refuses these messages: {message}")))
        });
        environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            date_text(&format, seconds).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
        });
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| anyhow!("compiling the chat template: {e}; from {origin}"))?;
        Ok(Template { environment, constants })
    }

    /// `messages` as JSON objects in the shape transformers takes.
    ///
    /// # Errors
    /// The template raises, or uses a value or function that does not exist.
    pub(super) fn render(
        &self,
        messages: Vec<Json>,
        add_generation_prompt: bool,
        add_vision_id: bool,
    ) -> Result<String> {
        let mut context = self.constants.clone();
        context.insert("messages".into(), Json::Array(messages));
        context.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        context.insert("add_vision_id".into(), Json::Bool(add_vision_id));
        context.insert("tools".into(), Json::Null);
        context.insert("documents".into(), Json::Null);
        let template = self.environment.get_template(NAME).context("rendering the chat template")?;
        template.render(Value::from_serialize(&context)).map_err(|e| anyhow!("rendering the chat template: {e}"))
    }
}

fn find_source(dir: &Path, tokenizer_config: &Map<String, Json>) -> Result<(String, String)> {
    let jinja = dir.join("chat_template.jinja");
    if jinja.exists() {
        let source = std::fs::read_to_string(&jinja)
            .with_context(|| format!("reading the chat template {}", jinja.display()))?;
        return Ok((source, jinja.display().to_string()));
    }
    let json = dir.join("chat_template.json");
    let (value, origin) = if json.exists() {
        let text =
            std::fs::read_to_string(&json).with_context(|| format!("reading the chat template {}", json.display()))?;
        let file: Json =
            serde_json::from_str(&text).with_context(|| format!("reading the chat template {}", json.display()))?;
        (file.get("chat_template").cloned(), json)
    } else {
        (tokenizer_config.get("chat_template").cloned(), dir.join("tokenizer_config.json"))
    };
    let origin = origin.display().to_string();
    match value {
        Some(Json::String(source)) => Ok((source, origin)),
        // The older form: a list of named templates.
        Some(Json::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str().map(str::to_string))
            .map(|source| (source, origin.clone()))
            .with_context(|| {
                format!(
                    "reading the chat template: none of the {} templates is named \"default\" in {origin}",
                    named.len()
                )
            }),
        Some(other) => bail!("reading the chat template: chat_template is {other}, expected a string, in {origin}"),
        None => bail!(
            "reading the chat template: found none, expected chat_template.jinja, chat_template.json or a chat_template key in {origin}"
        ),
    }
}

/// A special token as tokenizer_config.json writes it: a string, or an object with `content`.
pub(super) fn token_text(value: Option<&Json>) -> Option<String> {
    match value? {
        Json::String(text) => Some(text.clone()),
        Json::Object(object) => object.get("content")?.as_str().map(str::to_string),
        _ => None,
    }
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what transformers puts in for the `tojson` filter.
fn python_json(value: Value, options: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let json = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut text = String::new();
    write_python_json(&json, indent, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

fn write_python_json(json: &Json, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(width) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match json {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                write_python_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        Json::Object(fields) if !fields.is_empty() => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                out.push_str(&Json::String(key.clone()).to_string());
                out.push_str(": ");
                write_python_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// The date in UTC, in the few `strftime` letters that templates use.
fn date_text(format: &str, unix_seconds: u64) -> Result<String> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, seconds) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let (mut year, mut rest) = (1970, days);
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    let (day, weekday) = (rest + 1, DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(c) = letters.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match letters.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{:02}", month + 1)),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(MONTHS[month]),
            Some('b') => out.push_str(&MONTHS[month][..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            Some('%') => out.push('%'),
            other => {
                bail!("strftime_now: %{} is not supported in {format:?}", other.map_or(String::new(), String::from))
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> Template {
        let config = json!({"chat_template": source, "eos_token": {"content": "<end>"}});
        let dir = tempfile::tempdir().unwrap();
        Template::load(dir.path(), config.as_object().unwrap()).unwrap()
    }

    #[test]
    fn blocks_take_their_line_with_them() {
        let t = template(
            "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}{{ eos_token }}\n  {% endif %}\n{% endfor %}\n",
        );
        let messages = vec![json!({"role": "user", "content": "a"}), json!({"role": "user", "content": "b"})];
        // What Jinja2 gives with trim_blocks and lstrip_blocks.
        assert_eq!(t.render(messages, false, false).unwrap(), "a<end>\nb<end>\n");
    }

    #[test]
    fn python_methods_and_json() {
        let t = template("{{ messages[0].content.split('x')[-1].strip() }}|{{ messages[0] | tojson }}");
        let out = t.render(vec![json!({"role": "user", "content": "1x 2 <é>"})], false, false).unwrap();
        assert_eq!(out, "2 <é>|{\"role\": \"user\", \"content\": \"1x 2 <é>\"}");
        let t = template("{{ messages[0] | tojson(indent=2) }}");
        let out = t.render(vec![json!({"a": [1, {}], "b": null})], false, false).unwrap();
        assert_eq!(out, "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": null\n}");
    }

    #[test]
    fn a_refusal_is_an_error_with_its_words() {
        let t = template("{{ raise_exception('only two roles') }}");
        let error = t.render(vec![], false, false).unwrap_err();
        assert!(format!("{error:#}").contains("only two roles"), "{error:#}");
    }

    #[test]
    fn dates() {
        // 2024-02-29 12:34:56 UTC was a Thursday: 1709210096.
        assert_eq!(date_text("%d %b %Y, %A %H:%M:%S %%", 1_709_210_096).unwrap(), "29 Feb 2024, Thursday 12:34:56 %");
        assert_eq!(date_text("%B %m %y", 0).unwrap(), "January 01 70");
        assert!(date_text("%Q", 0).is_err());
    }
}
