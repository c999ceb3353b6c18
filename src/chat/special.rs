//! The special tokens of a checkpoint: which ids mean something to the program.
//!
//! It hides the three files they are found in. What must stay true: no id is a constant of ours, and where config.json and
//! the tokenizer both speak they say the same.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer;

use super::template::token_text;

/// Ids of the tokens that have a meaning to the program, as this checkpoint numbers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Special {
    pub image_pad: u32,
    pub vision_start: u32,
    pub vision_end: u32,
    pub video_pad: Option<u32>,
    pub vision_pad: Option<u32>,
    /// What the template ends a turn with, `<|im_end|>` for Qwen.
    pub end_of_turn: u32,
    /// What ends sampling; `end_of_turn` is always among them.
    pub stops: Vec<u32>,
}

impl Special {
    pub(super) fn find(
        tokenizer: &Tokenizer,
        config: &Map<String, Json>,
        generation: &Map<String, Json>,
        tokenizer_config: &Map<String, Json>,
        dir: &Path,
    ) -> Result<Special> {
        let lookup = Lookup { tokenizer, config, dir };
        Ok(Special {
            image_pad: lookup.required("image_token_id", "<|image_pad|>")?,
            vision_start: lookup.required("vision_start_token_id", "<|vision_start|>")?,
            vision_end: lookup.required("vision_end_token_id", "<|vision_end|>")?,
            video_pad: lookup.optional("video_token_id", "<|video_pad|>")?,
            vision_pad: lookup.optional("vision_token_id", "<|vision_pad|>")?,
            // Known once the template is read.
            end_of_turn: 0,
            stops: lookup.stops(generation, tokenizer_config)?,
        })
    }
}

/// A JSON object from a file; `None` when there is no file.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Json>>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let object =
        serde_json::from_str(&text).with_context(|| format!("reading a JSON object from {}", path.display()))?;
    Ok(Some(object))
}

/// Where special tokens are found: config.json's ids first, the tokenizer's names else, and both must agree.
struct Lookup<'a> {
    tokenizer: &'a Tokenizer,
    config: &'a Map<String, Json>,
    dir: &'a Path,
}

impl Lookup<'_> {
    fn optional(&self, key: &str, name: &str) -> Result<Option<u32>> {
        let named = self.tokenizer.token_to_id(name);
        let Some(value) = self.config.get(key).filter(|v| !v.is_null()) else {
            return Ok(named);
        };
        let id = self.number(key, value)?;
        match named {
            Some(named) if named != id => bail!(
                "looking up special tokens: config.json says {key} is {id}, but tokenizer.json has {name} at {named}; in {}",
                self.dir.display()
            ),
            // Ids the tokenizer does not have are left-overs of a default config; they matter only where the token is needed.
            _ => Ok(self.tokenizer.id_to_token(id).map(|_| id)),
        }
    }

    fn required(&self, key: &str, name: &str) -> Result<u32> {
        self.optional(key, name)?.with_context(|| {
            format!(
                "looking up special tokens: no {key} in config.json that the tokenizer knows and no token {name}, expected one; in {}",
                self.dir.display()
            )
        })
    }

    fn number(&self, key: &str, value: &Json) -> Result<u32> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.with_context(|| {
            format!("looking up special tokens: {key} is {value}, expected a token id; in {}", self.dir.display())
        })
    }

    /// generation_config.json's `eos_token_id` (one or several), else the tokenizer's `eos_token`, else config.json's id.
    fn stops(&self, generation: &Map<String, Json>, tokenizer_config: &Map<String, Json>) -> Result<Vec<u32>> {
        let list = |value: &Json| -> Result<Vec<u32>> {
            match value {
                Json::Array(ids) => ids.iter().map(|id| self.number("eos_token_id", id)).collect(),
                one => Ok(vec![self.number("eos_token_id", one)?]),
            }
        };
        let ids =
            |object: &Map<String, Json>| object.get("eos_token_id").filter(|v| !v.is_null()).map(list).transpose();
        if let Some(stops) = ids(generation)? {
            return Ok(stops);
        }
        if let Some(token) = token_text(tokenizer_config.get("eos_token")) {
            let id = self.tokenizer.token_to_id(&token);
            let id = id.with_context(|| {
                format!(
                    "looking up special tokens: eos_token {token:?} is not in tokenizer.json of {}",
                    self.dir.display()
                )
            })?;
            return Ok(vec![id]);
        }
        Ok(ids(self.config)?.unwrap_or_default())
    }
}
