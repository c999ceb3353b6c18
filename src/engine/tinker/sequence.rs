//! Conversations as the protocol has them: runs of token ids, and pictures as PNG of exactly the view that was shown.
//!
//! It hides how a picture is cut and packed, and the shift by one: token t is predicted from what stands before it, so inputs are all tokens but
//! the last, targets all but the first, and a number about token t stands at t - 1. What must stay true: a picture is sent in the size
//! that the server's processor leaves as it is, so that it becomes the same patches there as here; the number of its tokens is
//! always said with it.
//!
//! ```text
//! stream   user vis  [pad pad pad pad]  evis  q   #look #end       (# sampled)
//! chunks   text(2)   image(4 tokens)    text(3)                    all but the last token
//! targets  vis   0   0   0   0   evis   q   #look #end             all but the first; 0 where a picture stands
//! weights  0     0   0   0   0   0      0    w     w
//! ```

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::wire::{Chunk, ModelInput};
use crate::engine::pngs::{Pngs, view_of};
use crate::episode::Stream;

impl Pngs {
    /// Bytes of a whole sequence in JSON, near enough to cut requests by.
    pub fn size(&self, stream: &Stream) -> Result<usize> {
        let pictures: usize =
            stream.images.iter().map(|placed| Ok(self.of(placed)?.len() * 4 / 3)).sum::<Result<usize>>()?;
        // An input id, a target id and a weight.
        Ok(pictures + stream.len() * (7 + 7 + 12))
    }

    /// The first `tokens` tokens of a conversation.
    ///
    /// # Errors
    /// A picture that cannot be read, or that the end would cut.
    pub fn chunks(&self, stream: &Stream, tokens: usize) -> Result<ModelInput> {
        let mut chunks = Vec::with_capacity(2 * stream.images.len() + 1);
        let mut at = 0;
        let text = |chunks: &mut Vec<Chunk>, ids: &[u32]| {
            if !ids.is_empty() {
                chunks.push(Chunk::EncodedText { tokens: ids.to_vec() });
            }
        };
        for placed in &stream.images {
            let expected_tokens = placed.grid.tokens(self.frontend.processor.merge);
            let end = placed.first + expected_tokens;
            ensure!(end <= tokens, "a picture stands at the end of a sequence, with no word behind it");
            text(&mut chunks, &stream.ids[at..placed.first]);
            let data = self.of(placed).with_context(|| format!("sending a view of {}", placed.path.display()))?;
            chunks.push(Chunk::Image { data, format: "png", expected_tokens });
            at = end;
        }
        text(&mut chunks, &stream.ids[at..tokens]);
        Ok(ModelInput { chunks })
    }

    /// What each input is to predict: the next token; 0 where that is part of a picture, as in tinker-cookbook's data.
    pub fn targets(&self, stream: &Stream) -> Vec<u32> {
        let mut targets = stream.ids[1..].to_vec();
        for placed in &stream.images {
            let tokens = placed.grid.tokens(self.frontend.processor.merge);
            targets[placed.first - 1..placed.first - 1 + tokens].fill(0);
        }
        targets
    }
}

/// Numbers about sampled tokens, in order, at the places of the targets that they are about; 0 elsewhere.
pub fn spread(stream: &Stream, numbers: &[f32]) -> Vec<f32> {
    let mut numbers = numbers.iter();
    stream.sampled[1..]
        .iter()
        .map(|&sampled| if sampled { numbers.next().copied().unwrap_or(0.0) } else { 0.0 })
        .collect()
}

/// The other way: of all targets those that were sampled.
pub fn gather(stream: &Stream, numbers: &[f32]) -> Vec<f32> {
    stream.sampled[1..].iter().zip(numbers).filter(|(sampled, _)| **sampled).map(|(_, number)| *number).collect()
}

/// What a conversation is known again by: its ids, who wrote them, and its views.
pub fn digest(stream: &Stream) -> [u8; 32] {
    let mut hash = Sha256::new();
    for (id, sampled) in stream.ids.iter().zip(&stream.sampled) {
        hash.update(id.to_le_bytes());
        hash.update([u8::from(*sampled)]);
    }
    for placed in &stream.images {
        let (path, region, (width, height)) = view_of(placed);
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update((placed.first as u64).to_le_bytes());
        region.iter().for_each(|side| hash.update(side.to_le_bytes()));
        hash.update(width.to_le_bytes());
        hash.update(height.to_le_bytes());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_one_place_before_their_token() {
        let mut stream = Stream { ids: vec![5, 6, 7], sampled: vec![false; 3], logprobs: vec![0.0; 3], images: vec![] };
        stream.push_sampled(&[8, 9], &[-0.5, -0.25]);
        assert_eq!(spread(&stream, &[1.0, 2.0]), [0.0, 0.0, 1.0, 2.0]);
        assert_eq!(gather(&stream, &[-4.0, -3.0, -2.0, -1.0]), [-2.0, -1.0]);
        let before = digest(&stream);
        stream.sampled[2] = true;
        assert_ne!(digest(&stream), before, "who wrote a token counts");
    }
}
