//! Access: who asks, and what they may do, on every route.
//!
//! Owns the keys and issuers that are believed, where credentials are looked for, the scopes, the tickets, and what of
//! the entries each principal may see: its tenant's, and what its own filter lets pass. Promises that with credentials
//! asked for nobody gets past without them, that a principal is shown nothing else on any path, and that nothing of what
//! callers show is ever printed. Knows nothing of what the routes do: those ask [`Access`] and [`Principal`].

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::auth::{
    Action, AuthConfig, AuthError, Issuers, KEY_PREFIX, Keys, MetricsAccess, PageOrigin, Principal, Tickets,
};
use crate::http::middleware::credentials::{Credential, PresentedCredentials};
use crate::relay::{Admission, Renewal, RenewalError};

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
    pub(super) async fn principal(&self, shown: PresentedCredentials<'_>) -> Result<Principal, AuthError> {
        if !self.inner.is_required {
            return Ok(Principal::anyone());
        }
        match Credential::of(shown)?.ok_or(AuthError::Missing)? {
            Credential::Token(token) => self.of_token(&token).await,
            Credential::Ticket { text, page } => {
                let principal = self.inner.tickets.take(&text, &page, Instant::now());
                let principal = principal.ok_or(AuthError::Ticket)?;
                let is_over = principal.expires_at().is_some_and(|at| at <= SystemTime::now());
                if is_over { Err(AuthError::Expired) } else { Ok(principal) }
            }
        }
    }

    async fn of_token(&self, token: &str) -> Result<Principal, AuthError> {
        if token.starts_with(KEY_PREFIX) {
            self.inner.keys.find(token, Timestamp::now())
        } else {
            self.inner.issuers.verify(token).await
        }
    }

    /// A ticket for one WebSocket or feed, to be opened by that page; nothing where too many wait.
    pub(super) fn ticket(&self, principal: &Principal, page: PageOrigin) -> Option<String> {
        self.inner.tickets.give(principal, page, Instant::now())
    }

    /// On what terms a principal may watch a channel.
    pub(super) fn admission(&self, principal: &Principal, channel: &str) -> Result<Admission, AuthError> {
        let deed = Action::Watch(channel);
        if !principal.may(deed) {
            return Err(AuthError::Scope(deed.to_string()));
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
            commands: None,
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
    fn renew(&self, token: String) -> BoxFuture<'static, Result<Option<SystemTime>, RenewalError>> {
        let (access, principal, channel) = (self.access.clone(), self.principal.clone(), self.channel.clone());
        async move {
            let renewed = access.of_token(&token).await.map_err(|denied| match denied {
                AuthError::Unavailable => RenewalError::Unavailable(denied.to_string()),
                _ => RenewalError::Unauthenticated(denied.to_string()),
            })?;
            if !renewed.is_same(&principal) {
                let text = "the token is another principal's or tenant's, or has another filter: connect anew with it";
                return Err(RenewalError::Forbidden(text.to_owned()));
            }
            if !renewed.may_all_of(&principal) {
                let text = "the token allows less than the one before: connect anew with it";
                return Err(RenewalError::Forbidden(text.to_owned()));
            }
            let admission = access.admission(&renewed, &channel);
            admission
                .map(|admission| admission.expires_at)
                .map_err(|denied| RenewalError::Forbidden(denied.to_string()))
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
            AuthError::Missing,
            AuthError::Scheme,
            AuthError::Malformed,
            AuthError::UnknownKey,
            AuthError::Ticket,
            AuthError::UnknownIssuer,
            AuthError::Algorithm,
            AuthError::UnknownKid,
            AuthError::Signature,
            AuthError::Audience,
            AuthError::Expired,
            AuthError::NotYet,
            AuthError::Claim("a_long_claim"),
            AuthError::Tenant,
        ];
        for denied in told {
            let text = format!("unauthenticated: {denied}");
            assert!(text.len() <= 123, "{} bytes: {text}", text.len());
        }
    }
}
