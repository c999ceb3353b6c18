//! Work that is spread over the threads only where that is worth waking them.

use rayon::prelude::*;

/// Runs `work` for every part, in parallel or not.
pub(crate) fn each<P: Send, S>(
    threads: bool,
    parts: impl Iterator<Item = P>,
    start: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, P) + Sync + Send,
) {
    if threads {
        parts.collect::<Vec<P>>().into_par_iter().for_each_init(start, work);
    } else {
        let mut state = start();
        parts.for_each(|part| work(&mut state, part));
    }
}
