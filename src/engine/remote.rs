//! What the engines that sample on servers have in common: a request for each seed, and where a sample ends.

use anyhow::{Result, bail};

use super::{Completion, Finish, Frontend, Prompt, Sampling, completes};
use crate::episode::Stream;
use crate::http::together;

/// A completion for each seed of each prompt, in their order; so many are asked for at once.
pub(super) fn one_by_one(
    prompts: &[Prompt],
    at_once: usize,
    ask: impl Fn(&Stream, u64) -> Result<Completion> + Sync,
) -> Result<Vec<Vec<Completion>>> {
    let jobs: Vec<(&Stream, u64)> =
        prompts.iter().flat_map(|prompt| prompt.seeds.iter().map(|&seed| (prompt.stream, seed))).collect();
    let mut completions = together(&jobs, at_once, |&(stream, seed)| ask(stream, seed))?.into_iter();
    Ok(prompts.iter().map(|prompt| completions.by_ref().take(prompt.seeds.len()).collect()).collect())
}

/// A sampled sequence as the loop knows it: servers keep other ends of turn than ours, and go on where ours would have stopped. `banned`: vision tokens; `cut`: the server stopped at its limit of tokens, not at a token.
///
/// # Errors
/// The server stopped at a token and does not give it.
pub(super) fn ended(
    frontend: &Frontend,
    banned: &[u32],
    sampling: &Sampling,
    (mut ids, mut logprobs): (Vec<u32>, Vec<f32>),
    cut: bool,
) -> Result<Completion> {
    let mut end = None;
    for (i, id) in ids.iter().enumerate() {
        end = if banned.contains(id) {
            // It would stand for a picture that does not exist. What stands before it is a turn without an end.
            Some((i, Finish::Length))
        } else if frontend.chat.special.stops.contains(id) {
            Some((i + 1, Finish::EndOfTurn))
        } else if completes(&frontend.chat, &ids[..=i], &sampling.stop)? {
            // A prefix of a sample is a sample, so stopping afterwards is the same as stopping at the server.
            Some((i + 1, Finish::StopText))
        } else {
            continue;
        };
        break;
    }
    let (length, finish) = match (end, cut) {
        (Some(end), _) => end,
        (None, true) => (ids.len(), Finish::Length),
        (None, false) => bail!(
            "the server stopped at the token {:?}, which ends no turn: it keeps the end of turn for itself, and then that could not be \
             trained",
            ids.last()
        ),
    };
    ids.truncate(length);
    logprobs.truncate(length);
    Ok(Completion { ids, logprobs, finish })
}
