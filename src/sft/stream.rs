//! A written dialogue as the tokens that a step learns.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::chat::{Chat, Message};
use crate::data::Dialogue;
use crate::episode::Stream;
use crate::geometry::{Budget, Grid, Size, View};
use crate::image::Processor;

/// A written conversation -> a stream whose trained tokens are the assistant's.
pub fn stream_of(
    chat: &Chat,
    processor: &Processor,
    messages: &[Message],
    views: &[(Arc<Path>, View)],
) -> Result<Stream> {
    let mut stream = Stream::default();
    let mut waiting: Vec<Message> = Vec::new();
    let mut shown = 0;
    for message in messages {
        if message.role != "assistant" {
            waiting.push(message.clone());
            continue;
        }
        ensure!(message.images() == 0, "a message of the assistant holds an image; only others can show one");
        let images = waiting.iter().map(Message::images).sum::<usize>();
        ensure!(
            shown + images <= views.len(),
            "the messages show {} images, {} were given",
            shown + images,
            views.len()
        );
        let new = &views[shown..shown + images];
        shown += images;
        let grids: Vec<Grid> = new.iter().map(|(_, v)| processor.grid(v.size)).collect();
        let tokens: Vec<usize> = grids.iter().map(|g| g.tokens(processor.merge)).collect();
        let encoded = if stream.is_empty() {
            chat.encode(&waiting, true, &tokens)?
        } else {
            let [user] = waiting.as_slice() else {
                anyhow::bail!(
                    "{} messages stand between two of the assistant's, expected one of the user's",
                    waiting.len()
                );
            };
            chat.continuation(stream.images.len(), user, &tokens, stream.ids.last().copied())?
        };
        let placed = new.iter().zip(&grids).map(|((path, view), grid)| (path.clone(), *view, *grid)).collect();
        stream.push_context(&encoded.ids, placed, chat.special.image_pad, processor.merge)?;
        let mut said = chat.assistant_ids(&message.text())?;
        said.push(chat.special.end_of_turn);
        let zeros = vec![0.0; said.len()];
        stream.push_sampled(&said, &zeros);
        waiting.clear();
    }
    ensure!(
        shown == views.len(),
        "{} of {} images stand behind the last message of the assistant, where nothing is learnt from them",
        views.len() - shown,
        views.len()
    );
    ensure!(
        stream.sampled_count() > 0,
        "the dialogue has no message of the assistant, so there is nothing to train on"
    );
    Ok(stream)
}

/// The same of a dialogue from a file, whose pictures are shown whole within `budget`.
///
/// # Errors
/// Those of [`stream_of`] and of `size`, with the row.
pub fn stream_of_dialogue(
    chat: &Chat,
    processor: &Processor,
    dialogue: &Dialogue,
    budget: Budget,
    size: impl Fn(&Path) -> Result<Size>,
) -> Result<Stream> {
    let of_row = || format!("row {}", dialogue.number);
    let mut views = Vec::new();
    for (k, path) in dialogue.images.iter().enumerate() {
        let size = size(path).with_context(of_row)?;
        views.push((Arc::from(path.as_path()), View::whole(k, size, budget)?));
    }
    stream_of(chat, processor, &dialogue.messages, &views).with_context(of_row)
}
