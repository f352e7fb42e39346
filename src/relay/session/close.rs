//! The ways in which sessions end.

use std::borrow::Cow;
use std::fmt;

/// The reason why the relay closes a WebSocket, as a close code.
///
/// After 4000 to 4499 a client may reconnect. After 4500 to 4999 the same request would end in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseCode {
    /// 4000: this instance is stopping.
    GoingAway,
    /// 4001: the client lags more than the configuration allows.
    TooSlow,
    /// 4002: there is a gap, and the client asked to be closed after one.
    StateLost,
    /// 4003: the client's credentials have expired.
    Expired,
    /// 4004: the client did not answer a ping in time.
    NoPong,
    /// 4005: the client sends too much.
    RateLimited,
    /// 4006: the server cannot check the request now.
    ServerError,
    /// 4008: the socket accepted no bytes in time.
    WriteTimeout,
    /// 4500: the bytes are not a WebSocket frame, or the request is not valid.
    Protocol,
    /// 4501: credentials are missing or not valid.
    Unauthenticated,
    /// 4502: the client may not watch this channel or stream.
    Forbidden,
    /// 4503: too many connections.
    ConnectionLimit,
    /// 4504: the origin of the page is not allowed.
    Origin,
    /// 4505: the client sent a message that is too long.
    TooBig,
    /// 4506: none of the offered protocol versions is supported.
    Version,
}

impl CloseCode {
    /// Returns the number on the wire.
    pub const fn code(self) -> u16 {
        match self {
            Self::GoingAway => 4000,
            Self::TooSlow => 4001,
            Self::StateLost => 4002,
            Self::Expired => 4003,
            Self::NoPong => 4004,
            Self::RateLimited => 4005,
            Self::ServerError => 4006,
            Self::WriteTimeout => 4008,
            Self::Protocol => 4500,
            Self::Unauthenticated => 4501,
            Self::Forbidden => 4502,
            Self::ConnectionLimit => 4503,
            Self::Origin => 4504,
            Self::TooBig => 4505,
            Self::Version => 4506,
        }
    }

    /// Returns the reason on the wire: a word for programs, then a text for people.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::GoingAway => "going_away: this instance is stopping, reconnect",
            Self::TooSlow => "too_slow: too far behind, resume with your last position",
            Self::StateLost => "state_lost: entries are missing, load a snapshot",
            Self::Expired => "expired: your token has expired, reconnect with a new one",
            Self::NoPong => "no_pong: no answer to a ping in time",
            Self::RateLimited => "rate_limited: too many messages, reconnect after 10 s",
            Self::ServerError => "server_error: the server cannot check the request now, reconnect in a moment",
            Self::WriteTimeout => "write_timeout: the socket accepted no bytes in time",
            Self::Protocol => "protocol: the message or request is not valid",
            Self::Unauthenticated => "unauthenticated: credentials are missing or not valid",
            Self::Forbidden => "forbidden: you may not watch this channel or stream",
            Self::ConnectionLimit => "connection_limit: too many connections",
            Self::Origin => "origin: the origin of the page is not allowed",
            Self::TooBig => "too_big: the message is too long",
            Self::Version => "version: unsupported protocol version; supported: aurora.v1",
        }
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code())
    }
}

/// The way in which a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEnd {
    /// The relay closed the connection.
    Closed(CloseCode),
    /// The client closed it, with this code if it sent one.
    ByPeer(Option<u16>),
    /// The connection broke without a close frame.
    Lost,
}

impl SessionEnd {
    /// Returns the close code as a metric label. Unknown codes of clients count as `other`, so that their number has a
    /// limit.
    pub(crate) fn label(self) -> Cow<'static, str> {
        match self {
            Self::Closed(code) => Cow::Owned(code.to_string()),
            Self::ByPeer(None) => Cow::Borrowed("1005"),
            Self::ByPeer(Some(code @ 1000..=1015)) => Cow::Owned(code.to_string()),
            Self::ByPeer(Some(_)) => Cow::Borrowed("other"),
            Self::Lost => Cow::Borrowed("1006"),
        }
    }
}

/// Returns the start of `text` that fits into a close frame, which holds 123 bytes of reason.
pub(crate) fn fitting_reason(text: &str) -> &str {
    let end = (0..=text.len().min(123)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_fits_into_a_close_frame() {
        assert_eq!(fitting_reason("short"), "short");
        assert_eq!(fitting_reason(&"ä".repeat(100)).len(), 122);
    }

    #[test]
    fn labels_are_bounded() {
        assert_eq!(SessionEnd::Closed(CloseCode::TooSlow).label(), "4001");
        assert_eq!(SessionEnd::ByPeer(Some(1000)).label(), "1000");
        assert_eq!(SessionEnd::ByPeer(Some(4321)).label(), "other");
        assert_eq!(SessionEnd::Lost.label(), "1006");
    }
}
