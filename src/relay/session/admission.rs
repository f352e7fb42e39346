//! What a client may see, and for how long: told by whoever lets it in.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::event::Filter;
use crate::relay::Errands;

/// The terms on which a client is let in. By default it may see everything for as long as it likes.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// What it may see at most: its own filters come on top, and can only narrow this.
    pub filter: Filter,
    /// The tenant that it is bound to: of families by tenant it may watch this one's streams alone.
    pub tenant: Option<Arc<str>>,
    /// Whose it is: connections of one principal are counted together.
    pub principal: Option<Arc<str>>,
    /// When it is closed, unless it shows something newer before.
    pub expires_at: Option<SystemTime>,
    /// Who judges what it shows then; without one it can't.
    pub renewal: Option<Arc<dyn Renewal>>,
    /// Who does what it asks for that is not the relay's, in rich mode.
    pub errands: Option<Arc<dyn Errands>>,
}

/// Judges what a client shows to stay for longer.
pub trait Renewal: fmt::Debug + Send + Sync {
    /// Until when the client may stay with this token; nothing for "for as long as it likes". The token must be of the
    /// same principal and must not let it see anything else.
    fn renew(&self, token: String) -> BoxFuture<'static, Result<Option<SystemTime>, NotRenewed>>;
}

/// Why a client may not stay for longer than it may anyway.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRenewed {
    /// The token is no good.
    #[error("{0}")]
    Unauthenticated(String),
    /// The token is another principal's, or allows something else.
    #[error("{0}")]
    Forbidden(String),
    /// Nobody can tell now.
    #[error("{0}")]
    Unavailable(String),
}

impl Admission {
    /// When the client is closed, by the clock that timers go by.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.expires_at.map(deadline)
    }
}

/// That moment by the clock that timers go by.
pub(crate) fn deadline(expires_at: SystemTime) -> Instant {
    Instant::now() + expires_at.duration_since(SystemTime::now()).unwrap_or_default()
}
