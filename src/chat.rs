//! Messages to tokens and back: the checkpoint's tokenizer, chat template and special tokens, and what a turn's text means.
//!
//! It hides the tokenizer file, the template and the placeholder of an image: outside there are messages on one side and token ids
//! with image spans on the other. The coordinate convention of each model family is here too ([`Convention`]) and nowhere else.
//!
//! What must stay true:
//! - ordinary messages give exactly the ids of the Hugging Face processor, each image placeholder expanded to its image's tokens, once;
//! - a control token comes from the template or the policy, never out of somebody's text: a question that contains `<|im_end|>`
//!   is encoded as those characters;
//! - a conversation grows by appending only: [`Chat::continuation`] gives the ids of the next turn, and nothing before it is encoded again.

mod action;
mod convention;
mod dialogue;
mod message;
mod special;
mod template;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value as Json;
use tokenizers::Tokenizer;

use crate::model::config::no_checkpoint;
use crate::model::lora;

pub use action::{Action, BoxClaim, Flaw, Reading, has_answer};
pub use convention::Convention;
pub use message::{Content, Message, Part};
pub use special::Special;

use message::template_json;
use special::read_object;
use template::Template;

/// Token ids and where each image's placeholder tokens stand in them, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// T ids.
    pub ids: Vec<u32>,
    /// One range a image, all image tokens, none overlapping.
    pub images: Vec<Range<usize>>,
}

/// Tokenizer, template and special tokens of one checkpoint.
pub struct Chat {
    tokenizer: Tokenizer,
    /// The same without added tokens: whatever it is given comes out as plain characters.
    plain: Tokenizer,
    /// Every added token, longest first.
    added: Vec<AddedText>,
    template: Template,
    pub special: Special,
    /// Number images in the prompt ("Picture 1: "), if the template can.
    pub add_vision_id: bool,
}

struct AddedText {
    content: String,
    /// Whether it steers nothing (boxes, names, thinking, tool calls): the assistant may write those, nobody else.
    annotates: bool,
}

/// Stands for what the assistant said when the template is asked how a turn ends.
const SAID: &str = "quokka";

/// Control tokens in the tokenizer's eyes, but only words about places to us.
const ANNOTATIONS: [&str; 6] =
    ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"];

impl Chat {
    /// Reads tokenizer.json, tokenizer_config.json, the chat template, and, where present, config.json and generation_config.json.
    ///
    /// # Errors
    /// A missing or unreadable file; ids in config.json that are not the tokenizer's; a template that ends turns with no token of its own.
    pub fn load(dir: &Path) -> Result<Chat> {
        ensure!(dir.is_dir(), no_checkpoint(dir));
        let dir = &lora::home(dir, &["tokenizer.json"])?;
        let path = dir.join("tokenizer.json");
        let tokenizer =
            Tokenizer::from_file(&path).map_err(|e| anyhow!("reading the tokenizer: {e}; {}", path.display()))?;
        let tokenizer_config = read_object(&dir.join("tokenizer_config.json"))?
            .with_context(|| format!("reading the tokenizer: tokenizer_config.json is missing in {}", dir.display()))?;
        let config = read_object(&dir.join("config.json"))?.unwrap_or_default();
        let generation = read_object(&dir.join("generation_config.json"))?.unwrap_or_default();

        let mut plain = Tokenizer::new(tokenizer.get_model().clone());
        plain.with_normalizer(tokenizer.get_normalizer().cloned());
        plain.with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned());
        let mut added: Vec<AddedText> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .map(|t| AddedText {
                annotates: !t.special || ANNOTATIONS.contains(&t.content.as_str()),
                content: t.content,
            })
            .filter(|t| !t.content.is_empty())
            .collect();
        // Where one token is the beginning of another, the longer is meant.
        added.sort_by(|a, b| b.content.len().cmp(&a.content.len()).then_with(|| a.content.cmp(&b.content)));

        let special = Special::find(&tokenizer, &config, &generation, &tokenizer_config, dir)?;
        let template = Template::load(dir, &tokenizer_config)?;
        let mut chat = Chat { tokenizer, plain, added, template, special, add_vision_id: false };
        let probe = [Message { role: "user".into(), content: Content::Text("a".into()) }, Message::assistant(SAID)];
        let answered = chat.render(&probe, false)?;
        let tail = answered.rsplit_once(SAID).map_or("", |(_, tail)| tail);
        let first = chat.tokenize(tail, true)?.first().copied();
        chat.special.end_of_turn = first.filter(|&id| chat.is_added(id)).with_context(|| {
            format!(
                "reading the chat template: an assistant turn ends with {tail:?}, expected a control token first; {}",
                dir.display()
            )
        })?;
        if !chat.special.stops.contains(&chat.special.end_of_turn) {
            chat.special.stops.push(chat.special.end_of_turn);
        }
        Ok(chat)
    }

    /// The conversation as one string, as `apply_chat_template(messages, tokenize=False)` gives it.
    ///
    /// # Errors
    /// The template refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template.render(
            messages.iter().map(|m| template_json(m, |text| text.to_string())).collect(),
            add_generation_prompt,
            self.add_vision_id,
        )
    }

    /// The conversation as token ids; image k (counted over all messages) becomes `image_tokens[k]` placeholder tokens.
    ///
    /// # Errors
    /// The template refuses the messages, or shows another number of images than the messages hold or `image_tokens` counts.
    pub fn encode(&self, messages: &[Message], add_generation_prompt: bool, image_tokens: &[usize]) -> Result<Encoded> {
        let images: usize = messages.iter().map(Message::images).sum();
        let mark = self.mark_for(messages)?;
        let rendered = self.template.render(self.marked(messages, mark), add_generation_prompt, self.add_vision_id)?;
        self.expand(self.tokenize_marked(&rendered, mark)?, images, image_tokens)
    }

    /// The ids that append a user turn, and the opening of the assistant's, to a conversation that ends right after the assistant's
    /// sampled tokens. The end-of-turn token is supplied when the policy did not sample it.
    ///
    /// `images_before`: images shown so far (templates may number them). `last_sampled`: the last token of the turn so far.
    ///
    /// # Errors
    /// As [`Chat::encode`]; and a template that is not append-only (one that rewrites earlier turns).
    ///
    /// ```no_run
    /// # use foveate::chat::{Chat, Message, Part};
    /// # fn f(chat: &Chat, mut ids: Vec<u32>, sampled: &[u32], tokens: usize) -> anyhow::Result<()> {
    /// ids.extend_from_slice(sampled);
    /// let next = Message::user(vec![Part::image(), Part::text("Here is the enlarged area.")]);
    /// let more = chat.continuation(1, &next, &[tokens], sampled.last().copied())?;
    /// ids.extend_from_slice(&more.ids); // more.images counts from the start of more.ids
    /// # Ok(()) }
    /// ```
    pub fn continuation(
        &self,
        images_before: usize,
        message: &Message,
        image_tokens: &[usize],
        last_sampled: Option<u32>,
    ) -> Result<Encoded> {
        let mark = self.mark_for(std::slice::from_ref(message))?;
        let text = self.next_turn(images_before, &self.marked_message(message, mark))?;
        let mut ids = self.tokenize_marked(&text, mark)?;
        if last_sampled == Some(self.special.end_of_turn) {
            ids.remove(0);
        }
        self.expand(ids, message.images(), image_tokens)
    }

    /// Words for the policy's mouth (a written assistant turn), without its end of turn: control tokens in it are plain characters,
    /// but box and name tokens are tokens.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn assistant_ids(&self, text: &str) -> Result<Vec<u32>> {
        let message = Message::assistant(text);
        let mark = self.mark_for(std::slice::from_ref(&message))?;
        self.tokenize_marked(&self.mark_text(text, true, mark), mark)
    }

    /// Text as characters: no added token can come of it.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn plain_ids(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenize(text, false)
    }

    /// Token ids as text. An id without a token (a padding row of the model's table) becomes U+FFFD, so whatever was sampled can be shown.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut out = String::new();
        for (k, known) in ids.split(|&id| self.tokenizer.id_to_token(id).is_none()).enumerate() {
            if k > 0 {
                out.push('\u{FFFD}');
            }
            out += &self
                .tokenizer
                .decode(known, skip_special)
                .map_err(|e| anyhow!("decoding {} tokens: {e}", known.len()))?;
        }
        Ok(out)
    }

    /// Each token's own share of the text: joined, the pieces are what [`Chat::decode`] gives with special tokens. A character that several tokens
    /// spell belongs to the last of them; the ones before it have an empty piece.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn pieces(&self, ids: &[u32]) -> Result<Vec<String>> {
        let mut words = self.words(false);
        let mut pieces = ids.iter().map(|&id| words.push(id)).collect::<Result<Vec<String>>>()?;
        if let Some(last) = pieces.last_mut() {
            last.push_str(&words.rest()?);
        }
        Ok(pieces)
    }

    /// Text that grows token by token.
    pub fn words(&self, skip_special: bool) -> Words<'_> {
        Words { chat: self, skip_special, held: Vec::new() }
    }

    /// The token with this id as the tokenizer spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The id of a token by its exact spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Ids in use: one more than the largest.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// What a policy whose table has `rows` rows must not sample: the tokens of images and video, and rows without a token. Ascending.
    pub fn banned(&self, rows: usize) -> Vec<u32> {
        let s = &self.special;
        let vision = [Some(s.image_pad), Some(s.vision_start), Some(s.vision_end), s.video_pad, s.vision_pad];
        let mut banned: BTreeSet<u32> = vision.into_iter().flatten().collect();
        let used: BTreeSet<u32> = self.tokenizer.get_vocab(true).into_values().collect();
        banned.extend((0..rows as u32).filter(|id| !used.contains(id)));
        banned.into_iter().collect()
    }

    /// From the end of an assistant turn to the opening of the next, found by rendering a conversation with and without the new turn.
    fn next_turn(&self, images_before: usize, message: &Message) -> Result<String> {
        // Templates of text-only models take plain text alone.
        let asked = if images_before == 0 {
            Content::Text("a".into())
        } else {
            let mut parts = vec![Part::image(); images_before];
            parts.push(Part::text("a"));
            Content::Parts(parts)
        };
        let mut talk = vec![Message { role: "user".into(), content: asked }];
        let prompt = self.render(&talk, true)?;
        talk.push(Message::assistant(SAID));
        let answered = self.render(&talk, false)?;
        talk.push(message.clone());
        let next = self.render(&talk, true)?;
        let said = answered.strip_prefix(&prompt).and_then(|rest| rest.strip_prefix(SAID));
        match (said, next.starts_with(&answered)) {
            (Some(tail), true) => Ok(format!("{tail}{}", &next[answered.len()..])),
            _ => bail!(
                "appending a turn: the chat template is not append-only (a later turn changes what stands before it): \
                 {prompt:?} was followed by {answered:?} and {next:?}"
            ),
        }
    }

    fn is_added(&self, id: u32) -> bool {
        self.tokenizer.id_to_token(id).is_some_and(|token| self.added.iter().any(|a| a.content == token))
    }

    /// The whole tokenizer, or the one without added tokens.
    fn tokenize(&self, text: &str, with_added: bool) -> Result<Vec<u32>> {
        let tokenizer = if with_added { &self.tokenizer } else { &self.plain };
        let encoding =
            tokenizer.encode_fast(text, false).map_err(|e| anyhow!("encoding {} bytes of text: {e}", text.len()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A character found in none of the messages; it is put into every control string that is only text, and so survives the template.
    fn mark_for(&self, messages: &[Message]) -> Result<char> {
        let used = |c: char| {
            messages.iter().any(|m| match &m.content {
                Content::Text(text) => text.contains(c),
                Content::Parts(parts) => parts.iter().any(|p| matches!(p, Part::Text { text } if text.contains(c))),
            })
        };
        ('\u{F0000}'..='\u{FFFFD}')
            .find(|&c| !used(c))
            .context("encoding messages: they use every private character there is")
    }

    fn marked(&self, messages: &[Message], mark: char) -> Vec<Json> {
        messages.iter().map(|m| template_json(m, |text| self.mark_text(text, m.role == "assistant", mark))).collect()
    }

    fn marked_message(&self, message: &Message, mark: char) -> Message {
        let own = message.role == "assistant";
        let content = match &message.content {
            Content::Text(text) => Content::Text(self.mark_text(text, own, mark)),
            Content::Parts(parts) => Content::Parts(
                parts
                    .iter()
                    .map(|p| match p {
                        Part::Text { text } => Part::Text { text: self.mark_text(text, own, mark) },
                        Part::Image { image } => Part::Image { image: image.clone() },
                    })
                    .collect(),
            ),
        };
        Message { role: message.role.clone(), content }
    }

    /// `<|im_end|>` becomes `<` mark `|im_end|>`, wherever one starts, overlapping ones too.
    fn mark_text(&self, text: &str, may_annotate: bool, mark: char) -> String {
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            out.push(c);
            let rest = &text[at..];
            if self.added.iter().any(|a| !(may_annotate && a.annotates) && rest.starts_with(&a.content)) {
                out.push(mark);
            }
        }
        out
    }

    /// Without a mark: the whole tokenizer, so the result is the processor's. With one: control tokens are cut out by hand, and
    /// the text between them is encoded as characters, marks removed.
    fn tokenize_marked(&self, text: &str, mark: char) -> Result<Vec<u32>> {
        if !text.contains(mark) {
            return self.tokenize(text, true);
        }
        let mut ids = Vec::new();
        let mut start = 0;
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            match self.added.iter().find(|a| rest.starts_with(&a.content)) {
                Some(control) => {
                    ids.extend(self.tokenize(&text[start..at].replace(mark, ""), false)?);
                    let id = self.tokenizer.token_to_id(&control.content);
                    ids.push(id.with_context(|| {
                        format!("encoding text: the tokenizer lost its token {:?}", control.content)
                    })?);
                    at += control.content.len();
                    start = at;
                }
                None => at += rest.chars().next().map_or(1, char::len_utf8),
            }
        }
        ids.extend(self.tokenize(&text[start..].replace(mark, ""), false)?);
        Ok(ids)
    }

    /// Each placeholder, which stands once for its image, becomes as many as the image has tokens.
    fn expand(&self, ids: Vec<u32>, images: usize, image_tokens: &[usize]) -> Result<Encoded> {
        let places = ids.iter().filter(|&&id| id == self.special.image_pad).count();
        ensure!(
            places == images && places == image_tokens.len(),
            "placing images: the messages hold {images}, the template shows {places}, and sizes were given for {}",
            image_tokens.len()
        );
        let mut counts = image_tokens.iter();
        let mut out = Encoded::default();
        for id in ids {
            if id != self.special.image_pad {
                out.ids.push(id);
            } else if let Some(&count) = counts.next() {
                ensure!(count > 0, "placing images: image {} has no tokens", out.images.len());
                let from = out.ids.len();
                out.ids.resize(from + count, id);
                out.images.push(from..from + count);
            }
        }
        Ok(out)
    }
}

/// Text that grows token by token; a character that several tokens spell comes with the last of them.
pub struct Words<'a> {
    chat: &'a Chat,
    skip_special: bool,
    /// Tokens whose character is not complete.
    held: Vec<u32>,
}

impl Words<'_> {
    /// What this token adds to the text.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.held.push(id);
        let text = self.chat.decode(&self.held, self.skip_special)?;
        // A cut character shows as U+FFFD; one of more than four bytes does not exist, so after four tokens it is a broken one.
        if text.ends_with('\u{FFFD}') && self.held.len() < 4 {
            return Ok(String::new());
        }
        self.held.clear();
        Ok(text)
    }

    /// What is left of a text that ends here: a character that was cut off, as U+FFFD.
    pub fn rest(&mut self) -> Result<String> {
        self.chat.decode(&std::mem::take(&mut self.held), self.skip_special)
    }
}

#[cfg(test)]
mod tests;
