//! Conversations as data: turns of text and images, in the JSON that everybody uses.
//!
//! It hides how templates want them. What must stay true: a message read from JSON and written again is the same JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// One turn of a conversation, in the usual JSON: `{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "…"}]}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant` (templates may know more).
    pub role: String,
    pub content: Content,
}

/// What a turn says: plain text, or text and images in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A piece of a turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Part {
    /// An image; the path is for whoever reads the file, the tokens do not depend on it.
    Image {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        image: Option<PathBuf>,
    },
    Text {
        text: String,
    },
}

impl Part {
    pub fn text(text: impl Into<String>) -> Part {
        Part::Text { text: text.into() }
    }

    pub fn image() -> Part {
        Part::Image { image: None }
    }
}

impl Message {
    pub fn system(text: impl Into<String>) -> Message {
        Message { role: "system".into(), content: Content::Text(text.into()) }
    }

    pub fn user(parts: Vec<Part>) -> Message {
        Message { role: "user".into(), content: Content::Parts(parts) }
    }

    pub fn assistant(text: impl Into<String>) -> Message {
        Message { role: "assistant".into(), content: Content::Text(text.into()) }
    }

    /// The pieces of the turn; plain text is one piece.
    pub fn parts(&self) -> Vec<Part> {
        match &self.content {
            Content::Text(text) => vec![Part::text(text.as_str())],
            Content::Parts(parts) => parts.clone(),
        }
    }

    /// The words of the turn without its images.
    pub fn text(&self) -> String {
        let words = |part| match part {
            Part::Text { text } => Some(text),
            Part::Image { .. } => None,
        };
        self.parts().into_iter().filter_map(words).collect()
    }

    /// How many images the turn shows.
    pub fn images(&self) -> usize {
        match &self.content {
            Content::Text(_) => 0,
            Content::Parts(parts) => parts.iter().filter(|p| matches!(p, Part::Image { .. })).count(),
        }
    }
}

/// A message in the shape templates read, every text passed through `words`.
pub(super) fn template_json(message: &Message, words: impl Fn(&str) -> String) -> Json {
    let content = match &message.content {
        Content::Text(text) => Json::String(words(text)),
        Content::Parts(parts) => Json::Array(
            parts
                .iter()
                .map(|part| match part {
                    Part::Image { .. } => serde_json::json!({"type": "image"}),
                    Part::Text { text } => serde_json::json!({"type": "text", "text": words(text)}),
                })
                .collect(),
        ),
    };
    serde_json::json!({"role": message.role, "content": content})
}
