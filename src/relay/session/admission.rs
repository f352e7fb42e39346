//! The terms on which a client is admitted, and the reasons to refuse it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::event::Filter;
use crate::relay::session::close::CloseCode;
use crate::relay::session::commands::CommandHandlerFactory;
use crate::relay::subscription::params::BadParameter;

/// The terms on which a client is admitted. The default sets no limits.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// The entries that the client may receive. Its own filters can only narrow this.
    pub filter: Filter,
    /// The client's tenant. Of families by tenant, the client may watch the streams of this tenant only.
    pub tenant: Option<Arc<str>>,
    /// The client's principal. The connections of one principal are counted together.
    pub principal: Option<Arc<str>>,
    /// The time at which the client is closed, unless it presents a newer token before.
    pub expires_at: Option<SystemTime>,
    /// Checks newer tokens. Without it the client cannot extend its session.
    pub renewal: Option<Arc<dyn Renewal>>,
    /// Handles the requests of rich mode that are not subscriptions.
    pub commands: Option<Arc<dyn CommandHandlerFactory>>,
}

/// Checks the token with which a client extends its session.
pub trait Renewal: fmt::Debug + Send + Sync {
    /// Returns the time until which the token admits the client, or `None` for no limit.
    ///
    /// The token must belong to the same principal and must not permit anything else.
    fn renew(&self, token: String) -> BoxFuture<'static, Result<Option<SystemTime>, RenewalError>>;
}

/// The reason why a token does not extend a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenewalError {
    /// The token is not valid.
    #[error("{0}")]
    Unauthenticated(String),
    /// The token belongs to another principal, or permits something else.
    #[error("{0}")]
    Forbidden(String),
    /// The token cannot be checked now.
    #[error("{0}")]
    Unavailable(String),
}

impl Admission {
    /// Returns the expiry by the clock of timers.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.expires_at.map(deadline)
    }
}

/// Converts a time to the clock of timers.
pub(crate) fn deadline(expires_at: SystemTime) -> Instant {
    Instant::now() + expires_at.duration_since(SystemTime::now()).unwrap_or_default()
}

/// The reason why a client is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The channel does not exist.
    #[error("there is no channel `{0}`")]
    UnknownChannel(String),
    /// A parameter is not valid.
    #[error(transparent)]
    BadParameter(#[from] BadParameter),
    /// A limit of connections is reached: in total, per address or per principal. A later attempt may succeed.
    #[error("too many connections")]
    ConnectionLimit,
    /// The page belongs to an origin that is not allowed.
    #[error("origin is not allowed; add it to http.origins")]
    Origin,
    /// The client offers versions of the protocol, but none that is supported.
    #[error("unsupported protocol version; supported: aurora.v1 (or v=1)")]
    Version,
    /// The credentials are missing or not valid.
    #[error("{0}")]
    Unauthenticated(String),
    /// The principal may not watch this channel or stream.
    #[error("{0}")]
    Forbidden(String),
    /// The credentials cannot be checked now. A later attempt may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// The family has its maximum number of keys.
    #[error("{0}")]
    TooManyKeys(String),
    /// This instance is stopping. Another instance, or a later attempt, can serve the client.
    #[error("this instance is stopping; connect to another one, or later")]
    Draining,
}

impl ConnectError {
    /// Returns the close code for clients that cannot see the status of their handshake.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::UnknownChannel(_) | Self::BadParameter(_) => CloseCode::Protocol,
            Self::ConnectionLimit | Self::TooManyKeys(_) => CloseCode::ConnectionLimit,
            Self::Origin => CloseCode::Origin,
            Self::Version => CloseCode::Version,
            Self::Unauthenticated(_) => CloseCode::Unauthenticated,
            Self::Forbidden(_) => CloseCode::Forbidden,
            Self::Unavailable(_) => CloseCode::ServerError,
            Self::Draining => CloseCode::GoingAway,
        }
    }

    /// Returns the reason of the close frame: a word for programs, then a text for people.
    pub(crate) fn close_reason(&self) -> String {
        match self {
            Self::UnknownChannel(_) => format!("unknown_channel: {self}"),
            Self::BadParameter(_) => format!("bad_parameter: {self}"),
            Self::Unauthenticated(_) => format!("unauthenticated: {self}"),
            Self::Forbidden(_) => format!("forbidden: {self}"),
            Self::Unavailable(_) => format!("server_error: {self}"),
            Self::TooManyKeys(_) => format!("too_many_keys: {self}"),
            Self::ConnectionLimit | Self::Origin | Self::Version | Self::Draining => {
                self.close_code().reason().to_owned()
            }
        }
    }
}
