//! Access: who asks, and what they may do, on every route.
//!
//! Owns the keys and issuers that are believed, where credentials are looked for, the scopes, the tickets, and what of
//! the entries each principal may see: its tenant's, and what its own filter lets pass. Promises that with credentials
//! asked for nobody gets past without them, that a principal is shown nothing else on any path, and that nothing of what
//! callers show is ever printed. Knows nothing of what the routes do: those ask [`Access`] and [`Principal`].

mod config;
mod extract;
mod jwks;
mod jwt;
mod keys;
mod principal;
mod scope;
mod ticket;

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

pub use config::{AuthConfig, AuthMode, IssuerConfig, KeyConfig, MetricsAccess};
pub use jwt::{NotSigned, TokenRequest, sign};
pub use keys::{InvalidKeyHash, KeyHash, new_key};
pub use scope::{Names, Scope, UnknownScope};

pub(super) use extract::{Page, Shown};
pub(super) use principal::Principal;
pub(super) use scope::Deed;
pub(super) use ticket::LIFETIME as TICKET_LIFETIME;

use crate::relay::{Admission, InvalidFilter, NotRenewed, Renewal};
use extract::Credential;
use jwt::Issuers;
use keys::Keys;
use ticket::Tickets;

/// The placeholder of families of streams that are of one tenant each.
pub(super) const TENANT: &str = "tenant";

/// Why someone is not let in, or may not do something. Holds nothing of what was shown, but for what is wrong with the
/// filter in a token that is believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error("the stream is another tenant's, and you are bound to `{0}`")]
    OtherTenant(String),
    #[error("credentials are needed: Authorization: Bearer, X-API-Key, cookie access_token; to watch, also a ticket")]
    Missing,
    #[error("the Authorization header must be: Bearer, and a key or token")]
    Scheme,
    #[error("the token makes no sense")]
    Malformed,
    #[error("the key is not known")]
    UnknownKey,
    #[error("the ticket is not known: it was used, is older than 30 seconds, or is for another page")]
    Ticket,
    #[error("the issuer of the token is not known")]
    UnknownIssuer,
    #[error("the token is signed with an algorithm that its issuer does not use")]
    Algorithm,
    #[error("the token is signed with a key that its issuer does not have")]
    UnknownKid,
    #[error("the signature of the token is wrong")]
    Signature,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token or key has expired")]
    Expired,
    #[error("the token is not good yet")]
    NotYet,
    #[error("the claim `{0}` of the token is missing or makes no sense")]
    Claim(&'static str),
    #[error("the token must name one tenant")]
    Tenant,
    #[error("the claim `{0}` of the token is refused: {1}")]
    Filter(String, InvalidFilter),
    #[error("the keys of the token's issuer can't be read now")]
    Unavailable,
    #[error("the scope {0} is needed")]
    Scope(String),
    #[error("this is about all entries, and you may see those of one tenant or of a filter alone")]
    AllEntries,
}

/// Who is let in, and to what. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    inner: Arc<Inner>,
}

struct Inner {
    is_required: bool,
    are_metrics_open: bool,
    keys: Keys,
    issuers: Issuers,
    tickets: Tickets,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access").field("is_required", &self.inner.is_required).finish_non_exhaustive()
    }
}

impl Access {
    /// Reads the files that the configuration names, and connects to nothing. Fails with every problem and its key
    /// below `auth`.
    pub fn open(config: &AuthConfig, is_loopback: bool) -> Result<Self, Vec<(String, String)>> {
        let is_required = config.is_required();
        let are_metrics_open = match config.metrics {
            MetricsAccess::Open => true,
            MetricsAccess::Loopback => is_loopback,
            MetricsAccess::Admin => false,
        };
        let inner = Inner {
            is_required,
            are_metrics_open,
            keys: Keys::new(&config.keys)?,
            issuers: Issuers::open(&config.issuers)?,
            tickets: Tickets::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Fetches the key sets of all issuers, to tell whether that works. Fails with the key below `auth`.
    pub async fn check(&self) -> Result<(), (String, String)> {
        self.inner.issuers.check().await
    }

    pub(super) fn are_metrics_open(&self) -> bool {
        !self.inner.is_required || self.inner.are_metrics_open
    }

    /// Whoever asks. Waits where an issuer's keys have to be fetched first, some seconds at most.
    pub(super) async fn principal(&self, shown: Shown<'_>) -> Result<Principal, Denied> {
        if !self.inner.is_required {
            return Ok(Principal::anyone());
        }
        match Credential::of(shown)?.ok_or(Denied::Missing)? {
            Credential::Token(token) => self.of_token(&token).await,
            Credential::Ticket { text, page } => {
                let principal = self.inner.tickets.take(&text, &page, Instant::now());
                let principal = principal.ok_or(Denied::Ticket)?;
                let is_over = principal.expires_at().is_some_and(|at| at <= SystemTime::now());
                if is_over { Err(Denied::Expired) } else { Ok(principal) }
            }
        }
    }

    async fn of_token(&self, token: &str) -> Result<Principal, Denied> {
        if token.starts_with(keys::PREFIX) {
            self.inner.keys.find(token, Timestamp::now())
        } else {
            self.inner.issuers.verify(token).await
        }
    }

    /// A ticket for one WebSocket or feed, to be opened by that page; nothing where too many wait.
    pub(super) fn ticket(&self, principal: &Principal, page: Page) -> Option<String> {
        self.inner.tickets.give(principal, page, Instant::now())
    }

    /// On what terms a principal may watch a channel.
    pub(super) fn admission(&self, principal: &Principal, channel: &str) -> Result<Admission, Denied> {
        let deed = Deed::Watch(channel);
        if !principal.may(deed) {
            return Err(Denied::Scope(deed.to_string()));
        }
        let renewer = || -> Arc<dyn Renewal> {
            Arc::new(Renewer { access: self.clone(), principal: principal.clone(), channel: channel.to_owned() })
        };
        Ok(Admission {
            filter: principal.sight().clone(),
            tenant: principal.tenant().map(Arc::from),
            principal: principal.shared_id(),
            expires_at: principal.expires_at(),
            renewal: self.inner.is_required.then(renewer),
            errands: None,
        })
    }
}

/// Lets a principal watch a channel for longer.
struct Renewer {
    access: Access,
    principal: Principal,
    channel: String,
}

impl fmt::Debug for Renewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renewer")
    }
}

impl Renewal for Renewer {
    fn renew(&self, token: String) -> BoxFuture<'static, Result<Option<SystemTime>, NotRenewed>> {
        let (access, principal, channel) = (self.access.clone(), self.principal.clone(), self.channel.clone());
        async move {
            let renewed = access.of_token(&token).await.map_err(|denied| match denied {
                Denied::Unavailable => NotRenewed::Unavailable(denied.to_string()),
                _ => NotRenewed::Unauthenticated(denied.to_string()),
            })?;
            if !renewed.is_same(&principal) {
                let text = "the token is another principal's or tenant's, or has another filter: connect anew with it";
                return Err(NotRenewed::Forbidden(text.to_owned()));
            }
            if !renewed.may_all_of(&principal) {
                let text = "the token allows less than the one before: connect anew with it";
                return Err(NotRenewed::Forbidden(text.to_owned()));
            }
            let admission = access.admission(&renewed, &channel);
            admission.map(|admission| admission.expires_at).map_err(|denied| NotRenewed::Forbidden(denied.to_string()))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pages_are_told_by_a_close_frame_is_whole() {
        let told = [
            Denied::Missing,
            Denied::Scheme,
            Denied::Malformed,
            Denied::UnknownKey,
            Denied::Ticket,
            Denied::UnknownIssuer,
            Denied::Algorithm,
            Denied::UnknownKid,
            Denied::Signature,
            Denied::Audience,
            Denied::Expired,
            Denied::NotYet,
            Denied::Claim("a_long_claim"),
            Denied::Tenant,
        ];
        for denied in told {
            let text = format!("unauthenticated: {denied}");
            assert!(text.len() <= 123, "{} bytes: {text}", text.len());
        }
    }
}
