//! One call to a server, and what its end says about what the server may have done.
//!
//! It hides connections, time limits, status codes and keys. What must stay true: a call that the server may have carried out is never
//! taken for one that it has not ([`Fault::Unknown`]), because on that hangs whether an update can be applied twice; the key stands
//! in the header and nowhere else.

use std::io;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::Value;

use crate::http::{self, retry_after, shown};

const JSON: &str = "application/json";
const PROTOBUF: &str = "application/x-protobuf";
/// Log-probs of a large batch in JSON are tens of MB.
const LARGEST_REPLY: u64 = 1 << 30;

/// Why there is no answer to use.
#[derive(Debug)]
pub enum Fault {
    /// The server has surely not begun: nobody was there, or it said so.
    NotTaken { why: String, wait: Option<Duration> },
    /// It may have done what was asked, or not: the connection broke, or something between us and it answered.
    Unknown { why: String, wait: Option<Duration>, status: Option<u16> },
    /// It answered no.
    Refused { status: u16, why: String },
}

/// What is sent, and what came.
#[derive(Clone, Debug)]
pub struct Body {
    pub bytes: Vec<u8>,
    /// Else it is JSON.
    pub protobuf: bool,
}

impl Body {
    pub fn json(bytes: Vec<u8>) -> Body {
        Body { bytes, protobuf: false }
    }
}

pub struct Transport {
    agent: ureq::Agent,
    /// Up to `/api/v1`.
    base: String,
    key: Option<String>,
    timeout: Duration,
}

impl Transport {
    /// # Errors
    /// The address is none, or the key cannot stand in a header.
    pub fn new(url: &str, key: Option<String>, timeout: Duration) -> Result<Transport> {
        let url = url.trim().trim_end_matches('/').trim_end_matches("/api/v1");
        let host = http::host(url, "engine.url", "http://localhost:8000", "engine.api_key_env")?;
        http::check_key(key.as_deref())?;
        Ok(Transport { agent: http::agent(&host), base: format!("{url}/api/v1"), key, timeout })
    }

    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    pub fn url(&self) -> &str {
        &self.base
    }

    /// The body of a reply with a status of 2xx.
    pub fn get(&self, path: &str) -> Result<Body, Fault> {
        let request = self.agent.get(format!("{}/{path}", self.base)).config().timeout_global(Some(self.timeout));
        let mut request = request.build();
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        self.judge(request.call(), path)
    }

    /// The same for a request with a body; `protobuf` says whether the reply may be such.
    pub fn post(&self, path: &str, body: &Body, protobuf: bool) -> Result<Body, Fault> {
        let request = self.agent.post(format!("{}/{path}", self.base)).config().timeout_global(Some(self.timeout));
        let kind = |protobuf| if protobuf { PROTOBUF } else { JSON };
        let mut request = request.build().header("content-type", kind(body.protobuf)).header("accept", kind(protobuf));
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        self.judge(request.send(&body.bytes[..]), path)
    }

    fn judge(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        path: &str,
    ) -> Result<Body, Fault> {
        let named = |why: String| format!("{}/{path}: {why}", self.base);
        let mut response = match response {
            Ok(response) => response,
            Err(error) if never_connected(&error) => {
                return Err(Fault::NotTaken { why: named(format!("nobody answers ({error})")), wait: None });
            }
            Err(error) => {
                let why = named(format!("the connection broke off ({error})"));
                return Err(Fault::Unknown { why, wait: None, status: None });
            }
        };
        let status = response.status();
        let wait = retry_after(response.headers(), SystemTime::now());
        let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let protobuf = kind.contains("protobuf");
        let body = response.body_mut().with_config().limit(LARGEST_REPLY).read_to_vec();
        if status.is_success() {
            return body.map(|bytes| Body { bytes, protobuf }).map_err(|error| Fault::Unknown {
                why: named(format!("the reply broke off ({error})")),
                wait,
                status: None,
            });
        }
        // Some servers repeat the key that they refuse; it goes before the text is cut to a length.
        let said = String::from_utf8_lossy(&body.unwrap_or_default()).into_owned();
        let why = named(match detail(http::without_key(said, self.key.as_deref()).as_bytes()) {
            text if text.is_empty() => status.to_string(),
            text => format!("{status}: {text}"),
        });
        let status = status.as_u16();
        Err(match status {
            // It says itself that it has not begun: too many requests, too early, no room.
            425 | 429 | 503 => Fault::NotTaken { why, wait },
            408 | 500..=599 => Fault::Unknown { why, wait, status: Some(status) },
            _ => Fault::Refused { status, why },
        })
    }
}

/// Whether not a byte of the request can have reached a server.
fn never_connected(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => true,
        ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
        ureq::Error::Io(error) => {
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable
            )
        }
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl | ureq::Error::Tls(_) => true,
        _ => false,
    }
}

/// What a refusal says: FastAPI puts it under `detail`, as a sentence or as a list of what was wrong where.
fn detail(body: &[u8]) -> String {
    let Ok(reply) = serde_json::from_slice::<Value>(body) else { return shown(body) };
    match reply.get("detail") {
        Some(Value::String(text)) => shown(text.as_bytes()),
        Some(Value::Array(faults)) => {
            let fault = |fault: &Value| -> Option<String> {
                let place: Vec<String> =
                    fault.get("loc")?.as_array()?.iter().map(|at| at.to_string().replace('"', "")).collect();
                Some(format!("{} at {}", fault.get("msg")?.as_str()?, place.join(".")))
            };
            let faults: Vec<String> = faults.iter().filter_map(fault).collect();
            if faults.is_empty() { shown(body) } else { shown(faults.join("; ").as_bytes()) }
        }
        _ => shown(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_in_their_own_words() {
        assert_eq!(detail(br#"{"detail": "Model not found"}"#), "Model not found");
        let fields = br#"{"detail": [{"loc": ["body", "data", 0], "msg": "Field required", "type": "missing"}]}"#;
        assert_eq!(detail(fields), "Field required at body.data.0");
        assert_eq!(detail(b"<html>\n busy </html>"), "<html> busy </html>");
        assert_eq!(detail(b""), "");
    }

    #[test]
    fn addresses_are_taken_with_and_without_the_path() {
        let base = |url: &str| Transport::new(url, None, Duration::from_secs(1)).map(|transport| transport.base);
        for url in ["http://h:1", " http://h:1/ ", "http://h:1/api/v1", "http://h:1/api/v1/"] {
            assert_eq!(base(url).unwrap(), "http://h:1/api/v1");
        }
        let error = base("h:1").unwrap_err().to_string();
        assert!(error.contains("engine.url") && error.contains("http://localhost:8000"), "{error}");
    }

    #[test]
    fn only_what_never_left_counts_as_not_sent() {
        let io = |kind| ureq::Error::Io(io::Error::from(kind));
        assert!(never_connected(&io(io::ErrorKind::ConnectionRefused)));
        assert!(never_connected(&ureq::Error::Timeout(ureq::Timeout::Connect)));
        assert!(!never_connected(&io(io::ErrorKind::ConnectionReset)));
        assert!(!never_connected(&io(io::ErrorKind::BrokenPipe)));
        assert!(!never_connected(&ureq::Error::Timeout(ureq::Timeout::Global)));
    }
}
