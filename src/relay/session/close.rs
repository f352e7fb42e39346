//! How sessions end.

use std::borrow::Cow;
use std::fmt;

/// Why the relay closes a socket, as a WebSocket close code. After 4000 to 4499 a client may reconnect; after 4500 to
/// 4999 the same request would end the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseCode {
    /// 4000: this instance is going away.
    GoingAway,
    /// 4001: the client fell further behind than the configured lag.
    TooSlow,
    /// 4002: something can't be given, and the client asked to be told by this.
    StateLost,
    /// 4003: what the client showed has expired.
    Expired,
    /// 4004: no answer to a ping in time.
    NoPong,
    /// 4005: the client sends too much.
    RateLimited,
    /// 4006: something is missing here that the request needs.
    ServerError,
    /// 4008: the socket took no bytes in time.
    WriteTimeout,
    /// 4500: what the client sent is no WebSocket, or its request makes no sense.
    Protocol,
    /// 4501: credentials are asked for, and those shown are no good.
    Unauthenticated,
    /// 4502: whoever asks may not watch this.
    Forbidden,
    /// 4503: too many connections.
    ConnectionLimit,
    /// 4504: pages of this origin are not let in.
    Origin,
    /// 4505: the client sent a message that is too big.
    TooBig,
    /// 4506: no version of the protocol that the client offers is spoken here.
    Version,
}

impl CloseCode {
    /// The number on the wire.
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

    /// The reason on the wire: a word for programs, then words for people.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::GoingAway => "going_away: this instance stops, reconnect",
            Self::TooSlow => "too_slow: too far behind, resume with your last position",
            Self::StateLost => "state_lost: something can't be given any more, load a snapshot",
            Self::Expired => "expired: your token has expired, reconnect with a new one",
            Self::NoPong => "no_pong: no answer to a ping in time",
            Self::RateLimited => "rate_limited: you send too much, reconnect after 10 s",
            Self::ServerError => "server_error: something is missing here, reconnect in a moment",
            Self::WriteTimeout => "write_timeout: the socket took no bytes in time",
            Self::Protocol => "protocol: what was sent makes no sense here",
            Self::Unauthenticated => "unauthenticated: credentials are asked for, and those shown are no good",
            Self::Forbidden => "forbidden: you may not watch this",
            Self::ConnectionLimit => "connection_limit: too many connections",
            Self::Origin => "origin: pages of this origin are not let in",
            Self::TooBig => "too_big: the message is too long",
            Self::Version => "version: the version that you ask for is not spoken here; there is aurora.v1",
        }
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code())
    }
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The relay closed it.
    Closed(CloseCode),
    /// The client closed it, with this code if it gave one.
    ByPeer(Option<u16>),
    /// The connection broke without a word.
    Lost,
}

impl Ending {
    /// The close code as a metric label. What clients make up counts as `other`.
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

/// The front of `text` that fits into a close frame, which holds 123 bytes of reason.
pub(crate) fn fitting_reason(text: &str) -> &str {
    let end = (0..=text.len().min(123)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_fit_into_a_close_frame() {
        assert_eq!(fitting_reason("short"), "short");
        assert_eq!(fitting_reason(&"ä".repeat(100)).len(), 122);
    }

    #[test]
    fn labels_are_bounded() {
        assert_eq!(Ending::Closed(CloseCode::TooSlow).label(), "4001");
        assert_eq!(Ending::ByPeer(Some(1000)).label(), "1000");
        assert_eq!(Ending::ByPeer(Some(4321)).label(), "other");
        assert_eq!(Ending::Lost.label(), "1006");
    }
}
