//! The meaning of a response. Pure.

use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::HeaderValue;

use crate::secret::MASK;
use crate::sink::{SinkError, SinkErrorClass};

/// Maximum length of a response excerpt in an error, in bytes.
const EXCERPT_BYTES: usize = 1024;
/// Minimum length of masked texts. To mask shorter ones would garble more than it hides.
const MASKED_BYTES: usize = 6;

/// Converts a response to a result. `body` returns an excerpt of the body, and is called only for errors.
///
/// Redirects are transient: no entry causes them, and they last until the URL is corrected. The same applies to every
/// status that is neither 2xx nor 4xx. A 4xx status concerns the entry, except for 408, 425 and 429, which request a
/// retry.
pub(super) fn result_of(
    status: StatusCode,
    retry_after: Option<&HeaderValue>,
    now: SystemTime,
    body: impl FnOnce() -> String,
) -> Result<(), SinkError> {
    let class = match status.as_u16() {
        200..=299 => return Ok(()),
        408 | 425 | 429 => SinkErrorClass::Transient,
        400..=499 => SinkErrorClass::Permanent,
        _ => SinkErrorClass::Transient,
    };
    let mut message = format!("the receiver responded with {}", status.as_u16());
    if let Some(reason) = status.canonical_reason() {
        message.push(' ');
        message.push_str(reason);
    }
    if status.is_redirection() {
        message.push_str(", and redirects are not followed");
    }
    let body = body();
    if !body.is_empty() {
        message.push_str(": ");
        message.push_str(&body);
    }
    let error = SinkError::new(class, message);
    let retry_after = retry_after.and_then(|value| value.to_str().ok()).and_then(|text| requested_pause(text, now));
    Err(match retry_after.filter(|_| class == SinkErrorClass::Transient) {
        Some(pause) => error.with_retry_after(pause),
        None => error,
    })
}

/// Returns the pause that `Retry-After` requests, in seconds or until a date. A past date requests no pause.
fn requested_pause(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

/// The secrets of a configuration, to hide in texts of a receiver.
#[derive(Clone, Default)]
pub(super) struct SecretMask(Vec<String>);

impl SecretMask {
    /// Hides these texts, and each of their words.
    pub(super) fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let words = |text: &'a str| std::iter::once(text).chain(text.split_whitespace());
        let mut texts: Vec<String> = secrets.into_iter().flat_map(words).map(str::to_owned).collect();
        texts.retain(|text| text.len() >= MASKED_BYTES);
        // Longer texts first, so that no part of one remains.
        texts.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        texts.dedup();
        Self(texts)
    }

    /// Returns a text of a receiver on one line: printable, without secrets, and not too long.
    pub(super) fn excerpt(&self, body: &[u8]) -> String {
        let text = String::from_utf8_lossy(body);
        let masked = self.0.iter().fold(text.into_owned(), |text, secret| text.replace(secret, MASK));
        let line = masked.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut line: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        if line.len() > EXCERPT_BYTES {
            line.truncate(line.floor_char_boundary(EXCERPT_BYTES));
            line.push('…');
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn judged(status: u16, retry_after: Option<&'static str>, now: SystemTime) -> Option<SinkError> {
        let retry_after = retry_after.map(HeaderValue::from_static);
        result_of(StatusCode::from_u16(status).unwrap(), retry_after.as_ref(), now, String::new).err()
    }

    #[test]
    fn every_status_has_its_class() {
        use SinkErrorClass::{Permanent, Transient};
        let cases = [
            (200, None),
            (201, None),
            (202, None),
            (204, None),
            (299, None),
            (300, Some(Transient)),
            (301, Some(Transient)),
            (302, Some(Transient)),
            (304, Some(Transient)),
            (307, Some(Transient)),
            (308, Some(Transient)),
            (400, Some(Permanent)),
            (401, Some(Permanent)),
            (403, Some(Permanent)),
            (404, Some(Permanent)),
            (405, Some(Permanent)),
            (408, Some(Transient)),
            (409, Some(Permanent)),
            (410, Some(Permanent)),
            (413, Some(Permanent)),
            (415, Some(Permanent)),
            (422, Some(Permanent)),
            (425, Some(Transient)),
            (429, Some(Transient)),
            (499, Some(Permanent)),
            (500, Some(Transient)),
            (501, Some(Transient)),
            (502, Some(Transient)),
            (503, Some(Transient)),
            (504, Some(Transient)),
            (599, Some(Transient)),
            (999, Some(Transient)),
        ];
        for (status, class) in cases {
            assert_eq!(judged(status, None, NOW).map(|error| error.class()), class, "{status}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let asked = |status, text| judged(status, Some(text), NOW).unwrap().retry_after();
        assert_eq!(asked(429, "120"), Some(Duration::from_mins(2)));
        assert_eq!(asked(503, " 0 "), Some(Duration::ZERO));
        assert_eq!(asked(503, "Thu, 01 Jan 1970 00:01:30 GMT"), Some(Duration::from_secs(90)));
        assert_eq!(asked(503, "Thursday, 01-Jan-70 00:01:30 GMT"), Some(Duration::from_secs(90)));
        assert_eq!(asked(503, "Thu Jan  1 00:01:30 1970"), Some(Duration::from_secs(90)));
        assert_eq!(asked(400, "120"), None, "trying again will not help");
        for senseless in ["", "soon", "-1", "1.5", "99999999999999999999"] {
            assert_eq!(asked(503, senseless), None, "{senseless:?}");
        }
        let later = NOW + Duration::from_mins(10);
        let past = judged(503, Some("Thu, 01 Jan 1970 00:01:30 GMT"), later).unwrap();
        assert_eq!(past.retry_after(), Some(Duration::ZERO));
    }

    #[test]
    fn error_has_the_text_of_the_receiver() {
        let told = |status, body: &str| {
            let error = result_of(StatusCode::from_u16(status).unwrap(), None, NOW, || body.to_owned()).unwrap_err();
            assert!(error.source().is_none());
            error.to_string()
        };
        assert_eq!(told(400, "no title"), "the receiver responded with 400 Bad Request: no title");
        assert_eq!(told(599, ""), "the receiver responded with 599");
        assert_eq!(
            told(302, "https://login.example/"),
            "the receiver responded with 302 Found, and redirects are not followed: https://login.example/"
        );
    }

    #[test]
    fn excerpt_is_one_short_line_without_secrets() {
        let mask = SecretMask::new(["Bearer tok-123456", "whsec_abc", "/T0/hook-path", "", "x"]);
        let cases = [
            (&b"plain"[..], "plain"),
            (b"two\r\n  lines\t", "two lines"),
            (b"\x1b[31mred\x00\xff", "\u{fffd}[31mred\u{fffd}\u{fffd}"),
            (b"you sent Bearer tok-123456 and x", "you sent ******** and x"),
            (b"token=tok-123456;key=whsec_abc", "token=********;key=********"),
            (b"Cannot POST /T0/hook-path/", "Cannot POST ********/"),
        ];
        for (body, expected) in cases {
            assert_eq!(mask.excerpt(body), expected);
        }
        let long = mask.excerpt("é".repeat(9000).as_bytes());
        assert_eq!((long.len(), long.ends_with("é…")), (EXCERPT_BYTES + '…'.len_utf8(), true));
    }
}
