//! What every client of a server has to know of HTTP: addresses as people write them, keys, pauses between attempts, and how much of a
//! body an error shows. Who is asked what, and what an answer means, stands with the clients (`openai.rs`, `engine/tinker/`).

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, ensure};
use ureq::http::{HeaderMap, Uri};

use crate::config::BadConfig;

/// The longest pause between two attempts that we choose ourselves.
pub const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Characters of a body that an error shows.
const SHOWN: usize = 200;
/// How often a thread that has nothing to compute looks whether it should.
const IDLE: Duration = Duration::from_millis(1);
/// How often a wait looks whether it should end.
pub const TICK: Duration = Duration::from_millis(20);

/// The host of an address. `name` is the option that it was given as, `example` a good one, `key` the option that names the key.
///
/// # Errors
/// What is no address, and one that holds a secret: errors name addresses, so nothing secret may stand in them.
pub fn host(base: &str, name: &str, example: &str, key: &str) -> Result<String> {
    let uri = base.parse::<Uri>().ok().filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
    let Some((uri, host)) = uri.as_ref().and_then(|uri| Some((uri, uri.host()?))) else {
        return Err(BadConfig(format!("{name} {base}: expected an address such as {example}")).into());
    };
    ensure!(
        !uri.authority().is_some_and(|a| a.as_str().contains('@')) && !base.contains('?'),
        BadConfig(format!("{name}: expected an address without a password and without ?...; the key comes from {key}"))
    );
    Ok(host.to_owned())
}

/// # Errors
/// A key that cannot stand in a header.
pub fn check_key(key: Option<&str>) -> Result<()> {
    ensure!(
        key.iter().all(|key| key.bytes().all(|b| b.is_ascii_graphic())),
        BadConfig("the API key holds characters that no key has (spaces, line ends?); look at its variable".into())
    );
    Ok(())
}

/// The key in an environment variable; None where it is not set or empty.
pub fn key_from(variable: &str) -> Option<String> {
    std::env::var(variable).ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
}

/// Some servers repeat the key that they refuse.
pub fn without_key(why: String, key: Option<&str>) -> String {
    match key {
        Some(key) => why.replace(key, "[key]"),
        None => why,
    }
}

/// What calls to a host go through. Time limits are set with each call.
pub fn agent(host: &str) -> ureq::Agent {
    let mut config = ureq::Agent::config_builder()
        // The body of a refusal says why.
        .http_status_as_error(false)
        // A call elsewhere than the user said is not made.
        .max_redirects(0)
        .max_redirects_will_error(false)
        // A kept connection that the server closed meanwhile would cost an attempt; a new one costs little beside a call.
        .max_idle_connections(0)
        .user_agent(concat!("foveate/", env!("CARGO_PKG_VERSION")));
    if matches!(host, "localhost" | "127.0.0.1" | "[::1]") {
        // What runs on this machine is not behind the proxy of the environment.
        config = config.proxy(None);
    }
    config.build().into()
}

/// The start of a body, in one line.
pub fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(SHOWN).collect()
}

/// How long the server asks to wait: seconds or a date (RFC 9110, 10.2.3). What is neither is passed over.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get("retry-after")?.to_str().ok()?.trim();
    match value.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(if seconds < 0.0 { 0.0 } else { seconds }).ok(),
        // A date that is past asks for nothing.
        Err(_) => Some(httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default()),
    }
}

/// The pause after a failed attempt (counted from 1): `first`, doubled each time, at most a minute; of that between half and all, as
/// `chance` says, so that rows which failed together do not come back together.
pub fn backoff(first: Duration, attempt: usize, chance: f64) -> Duration {
    let doubled = 2f64.powi(attempt.saturating_sub(1).min(30) as i32) * first.as_secs_f64();
    LONGEST_BACKOFF.min(Duration::from_secs_f64(doubled)).mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

/// Sleeps; false when `stop` came first.
pub fn sleep(wait: Duration, stop: &dyn Fn() -> bool) -> bool {
    let until = Instant::now() + wait;
    loop {
        if stop() {
            return false;
        }
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => return true,
            left => std::thread::sleep(left.min(TICK)),
        }
    }
}

/// Between 0 and 1, so that clients which failed together do not come back together. Nothing that is computed depends on it.
pub fn chance() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    f64::from(now.subsec_nanos() % 1_000_003) / 1_000_003.0
}

/// Does some work for each job, so many at once, on threads that mostly wait. In the order of the jobs; of several errors the first to come. A panic, like an error, stops the others.
pub fn together<T: Sync, R: Send>(jobs: &[T], at_once: usize, work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let run = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::SeqCst) {
            let i = next.fetch_add(1, Ordering::SeqCst);
            let Some(job) = jobs.get(i) else { break };
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| work(job)));
            failed.fetch_or(!matches!(result, Ok(Ok(_))), Ordering::SeqCst);
            match result {
                Ok(result) => done.push((i, result)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    };
    let mut all: Vec<(usize, Result<R>)> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..if jobs.len() > 1 { at_once.min(jobs.len()) } else { 0 } {
            // A machine that gives no more threads does the work with those it gave.
            let Ok(thread) = std::thread::Builder::new().name("waits".into()).spawn_scoped(scope, run) else { break };
            threads.push(thread);
        }
        let mut all = if threads.is_empty() { run() } else { Vec::new() };
        for thread in threads {
            // This thread may be the only one that computes: what the others ask of it meanwhile must not wait for them.
            while !thread.is_finished() {
                if rayon::yield_now() != Some(rayon::Yield::Executed) {
                    std::thread::sleep(IDLE);
                }
            }
            match thread.join() {
                Ok(done) => all.extend(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    all.sort_by_key(|(i, _)| *i);
    // An error stops the others, so a gap is only ever behind an error.
    let mut results = Vec::with_capacity(jobs.len());
    let mut error = None;
    for (_, result) in all {
        match result {
            Ok(result) => results.push(result),
            Err(e) => error = Some(error.unwrap_or(e)),
        }
    }
    match error {
        Some(error) => Err(error),
        None if results.len() == jobs.len() => Ok(results),
        None => Err(anyhow!("{} of {} jobs were done", results.len(), jobs.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_TIME: Duration = Duration::ZERO;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asks = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", value.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(asks("7"), Some(Duration::from_secs(7)));
        assert_eq!(asks(" 0.5 "), Some(Duration::from_millis(500)));
        assert_eq!(asks("-3"), Some(NO_TIME));
        assert_eq!(asks("Sun, 06 Nov 1994 08:50:07 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(asks("Sun, 06 Nov 1994 08:00:00 GMT"), Some(NO_TIME), "a date that is past");
        assert_eq!(asks("soon"), None);
        assert_eq!(asks("NaN"), None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        let second = Duration::from_secs(1);
        assert_eq!([1, 2, 3].map(|k| backoff(second, k, 1.0).as_secs_f64()), [1.0, 2.0, 4.0]);
        assert_eq!([1, 2, 3].map(|k| backoff(second, k, 0.0).as_secs_f64()), [0.5, 1.0, 2.0]);
        assert_eq!(backoff(second, 1000, 1.0), LONGEST_BACKOFF);
        assert_eq!(backoff(NO_TIME, 1000, 1.0), NO_TIME);
    }
}
