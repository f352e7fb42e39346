//! Authentication of requests, and the terms on which a principal may watch a channel.
//!
//! Owns the configured keys and issuers, and the unused tickets. Promises that no request passes without credentials if
//! they are required. Knows no routes: their middleware and handlers check the principal that it returns.

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::auth::{
    Action, ApiKeys, AuthConfig, AuthError, Issuers, KEY_PREFIX, MetricsAccess, PageOrigin, Principal, Tickets,
};
use crate::http::middleware::credentials::{Credential, PresentedCredentials};
use crate::relay::{Admission, Renewal, RenewalError};

/// Turns credentials into principals. Cheap to clone.
#[derive(Clone)]
pub struct Authenticator {
    inner: Arc<Inner>,
}

struct Inner {
    is_required: bool,
    are_metrics_open: bool,
    keys: ApiKeys,
    issuers: Issuers,
    tickets: Tickets,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").field("is_required", &self.inner.is_required).finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Reads the named files, without connecting anywhere. Fails with every problem and its key below `auth`.
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
            keys: ApiKeys::new(&config.keys)?,
            issuers: Issuers::open(&config.issuers)?,
            tickets: Tickets::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Fetches the key sets of all issuers, to check that this works. Fails with the key below `auth`.
    pub async fn check(&self) -> Result<(), (String, String)> {
        self.inner.issuers.check().await
    }

    pub(super) fn are_metrics_open(&self) -> bool {
        !self.inner.is_required || self.inner.are_metrics_open
    }

    /// Returns the principal of a request. Waits up to some seconds if an issuer's keys must be fetched first.
    pub(super) async fn principal(&self, presented: PresentedCredentials<'_>) -> Result<Principal, AuthError> {
        if !self.inner.is_required {
            return Ok(Principal::unauthenticated());
        }
        match Credential::of(presented)?.ok_or(AuthError::Missing)? {
            Credential::Token(token) => self.verify(&token).await,
            Credential::Ticket { text, page } => {
                let principal = self.inner.tickets.redeem(&text, &page, Instant::now());
                let principal = principal.ok_or(AuthError::Ticket)?;
                let has_expired = principal.expires_at().is_some_and(|at| at <= SystemTime::now());
                if has_expired { Err(AuthError::Expired) } else { Ok(principal) }
            }
        }
    }

    async fn verify(&self, token: &str) -> Result<Principal, AuthError> {
        if token.starts_with(KEY_PREFIX) {
            self.inner.keys.find(token, Timestamp::now())
        } else {
            self.inner.issuers.verify(token).await
        }
    }

    /// Issues a ticket for one WebSocket or feed of that page. Returns `None` if too many are unused.
    pub(super) fn issue_ticket(&self, principal: &Principal, page: PageOrigin) -> Option<String> {
        self.inner.tickets.issue(principal, page, Instant::now())
    }

    /// Returns the terms on which a principal may watch a channel.
    pub(super) fn admission(&self, principal: &Principal, channel: &str) -> Result<Admission, AuthError> {
        let action = Action::Watch(channel);
        if !principal.may(action) {
            return Err(AuthError::Scope(action.to_string()));
        }
        let renewer = || -> Arc<dyn Renewal> {
            Arc::new(Renewer { authenticator: self.clone(), principal: principal.clone(), channel: channel.to_owned() })
        };
        Ok(Admission {
            filter: principal.filter().clone(),
            tenant: principal.tenant().map(Arc::from),
            principal: principal.shared_id(),
            expires_at: principal.expires_at(),
            renewal: self.inner.is_required.then(renewer),
            commands: None,
        })
    }
}

/// Extends the admission of a principal to a channel with a newer token.
struct Renewer {
    authenticator: Authenticator,
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
        let (authenticator, principal, channel) =
            (self.authenticator.clone(), self.principal.clone(), self.channel.clone());
        async move {
            let renewed = authenticator.verify(&token).await.map_err(|error| match error {
                AuthError::Unavailable => RenewalError::Unavailable(error.to_string()),
                _ => RenewalError::Unauthenticated(error.to_string()),
            })?;
            if !renewed.is_same(&principal) {
                let text = "the token has another principal, tenant or filter; open a new connection with it";
                return Err(RenewalError::Forbidden(text.to_owned()));
            }
            if !renewed.has_all_scopes_of(&principal) {
                let text = "the token has fewer scopes than the previous one; open a new connection with it";
                return Err(RenewalError::Forbidden(text.to_owned()));
            }
            let admission = authenticator.admission(&renewed, &channel);
            admission.map(|admission| admission.expires_at).map_err(|error| RenewalError::Forbidden(error.to_string()))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auth_errors_fit_a_close_frame() {
        let errors = [
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
        for error in errors {
            let text = format!("unauthenticated: {error}");
            assert!(text.len() <= 123, "{} bytes: {text}", text.len());
        }
    }
}
