//! The admission of a client to a channel, for WebSockets and feeds.

use axum::http::HeaderMap;

use crate::auth::{AuthError, Principal};
use crate::http::api::Api;
use crate::http::middleware::credentials::PresentedCredentials;
use crate::http::middleware::origin::is_allowed;
use crate::relay::{Admission, ConnectError};

/// Checks that the daemon accepts clients from this page, and returns the principal and the terms for the channel.
pub(super) async fn admit(
    api: &Api,
    channel: &str,
    query: Option<&str>,
    headers: &HeaderMap,
) -> Result<(Principal, Admission), ConnectError> {
    let origins = &api.config().origins;
    if api.is_draining() {
        return Err(ConnectError::Draining);
    }
    if !is_allowed(headers, origins) {
        return Err(ConnectError::Origin);
    }
    let authenticator = &api.services().authenticator;
    let principal = authenticator.principal(PresentedCredentials { headers, query, origins }).await;
    let admitted = principal.and_then(|principal| {
        let admission = authenticator.admission(&principal, channel)?;
        Ok((principal, admission))
    });
    admitted.map_err(|error| {
        api.deny(&error);
        let text = error.to_string();
        match error {
            AuthError::Scope(_) | AuthError::AllEntries | AuthError::OtherTenant(_) => ConnectError::Forbidden(text),
            AuthError::Unavailable => ConnectError::Unavailable(text),
            _ => ConnectError::Unauthenticated(text),
        }
    })
}
