//! Where a sample of a server ends: servers keep other ends of turn than ours, and go on where ours would have stopped.

use anyhow::{Result, bail};

use super::{Completion, Finish, Frontend, Sampling, completes};

/// A sampled sequence as the loop knows it. `banned`: vision tokens; `cut`: the server stopped at its limit of tokens, not at a token.
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
