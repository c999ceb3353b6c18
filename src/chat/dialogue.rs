//! A conversation read back from its ids, for servers that take messages and not tokens.

use anyhow::{Context, Result, ensure};

use super::{Chat, Content, Message, Part};

/// How the templates of Qwen's family (ChatML) begin a turn.
const TURN: &str = "<|im_start|>";

impl Chat {
    /// The messages that ids were made of, a part for each image: what [`Chat::encode`] and [`Chat::continuation`] make of them is the same ids
    /// again. A turn that was opened for an answer and has no words is left out.
    ///
    /// # Errors
    /// A template that begins its turns otherwise, and ids that do not begin with a turn.
    pub fn messages(&self, ids: &[u32]) -> Result<Vec<Message>> {
        let start = self.id(TURN).with_context(|| {
            format!("the chat template has no {TURN}, so its conversations cannot be sent as messages")
        })?;
        let mut turns = ids.split(|&id| id == start);
        ensure!(turns.next().is_some_and(<[u32]>::is_empty), "a conversation does not begin with {TURN}");
        let mut messages = Vec::new();
        for turn in turns {
            let said = turn.split(|&id| id == self.special.end_of_turn).next().unwrap_or_default();
            let message = self.message(said)?;
            // An assistant's turn that ended without a word was one; the last that was never ended is the one to be written.
            if message.role != "assistant" || turn.len() > said.len() || !message.text().is_empty() {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    /// One turn without its end.
    fn message(&self, said: &[u32]) -> Result<Message> {
        let special = &self.special;
        let mut parts = Vec::new();
        let mut rest = said;
        while !rest.is_empty() {
            let image = rest.windows(2).position(|two| two == [special.vision_start, special.image_pad]);
            let words = self.decode(&rest[..image.unwrap_or(rest.len())], false)?;
            parts.push(Part::text(words));
            let Some(at) = image else { break };
            let pads = rest[at + 1..].iter().take_while(|&&id| id == special.image_pad).count();
            ensure!(rest.get(at + 1 + pads) == Some(&special.vision_end), "an image of a conversation has no end");
            parts.push(Part::image());
            rest = &rest[at + pads + 2..];
        }
        let Some(Part::Text { text }) = parts.first_mut() else { return Ok(Message::user(parts)) };
        let (role, words) = text.split_once('\n').context("a turn of a conversation names no role")?;
        let (role, words) = (role.to_owned(), words.to_owned());
        *text = words;
        parts.retain(|part| *part != Part::text(""));
        let content = match &parts[..] {
            [] => Content::Text(String::new()),
            [Part::Text { text }] => Content::Text(text.clone()),
            _ => Content::Parts(parts),
        };
        Ok(Message { role, content })
    }
}
