//! A middleware that checks the access that a route needs, and passes the principal on to its handler.

use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::auth::{Action, AuthError, Principal, TENANT};
use crate::event::StreamName;
use crate::http::api::Api;
use crate::http::middleware::credentials::PresentedCredentials;

/// The access that a route needs if credentials are required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// None: for probes, and for pages that are the same for every client.
    Open,
    /// None or the scope `admin`, as `auth.metrics` requires.
    Metrics,
    /// Any valid credentials.
    Credentials,
    /// `publish:` for the stream in the path.
    Publish,
    /// `publish:` for the stream of each event. The handler checks it per event.
    PublishEach,
    /// `read:` for the stream in the path, or `admin` for a stream of dead letters.
    Read,
    /// `consume:` for the stream in the path, by an unrestricted principal: a group has all entries.
    Consume,
    /// `ws:` for the channel in the path. The handler checks it, because pages get a close code.
    Watch,
    /// `admin`.
    Administer,
}

/// Passes on requests with the needed access, together with their principal.
pub(crate) async fn authorize(
    State((api, access)): State<(Api, Access)>,
    params: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let authenticator = &api.services().authenticator;
    let is_open = match access {
        Access::Open | Access::Watch => true,
        Access::Metrics => authenticator.are_metrics_open(),
        _ => false,
    };
    if is_open {
        return next.run(request).await;
    }
    let presented = PresentedCredentials { headers: request.headers(), query: None, origins: &api.config().origins };
    // A malformed path names no stream, so it needs `admin`. The handler then reports what is wrong with it.
    let params = params.as_ref().ok();
    let stream = params.and_then(|params| params.iter().find(|(name, _)| *name == "stream"));
    let stream = stream.map(|(_, stream)| stream).unwrap_or_default();
    let admitted = authenticator.principal(presented).await.and_then(|principal| {
        check(&api, &principal, access, stream)?;
        Ok(principal)
    });
    match admitted {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(error) => api.deny(&error).into_response(),
    }
}

fn check(api: &Api, principal: &Principal, access: Access, stream: &str) -> Result<(), AuthError> {
    let action = match access {
        Access::Open | Access::Credentials | Access::PublishEach | Access::Watch => return Ok(()),
        Access::Publish => Action::Publish(stream),
        Access::Consume => Action::Consume(stream),
        Access::Read if is_declared(api, stream) => Action::Read(stream),
        Access::Read | Access::Metrics | Access::Administer => Action::Administer,
    };
    if !principal.may(action) {
        return Err(AuthError::Scope(action.to_string()));
    }
    if let Ok(stream) = stream.parse() {
        require_tenant(api, principal, &stream)?;
    }
    let covers_all_entries = matches!(access, Access::Metrics | Access::Consume);
    if covers_all_entries && principal.is_restricted() { Err(AuthError::AllEntries) } else { Ok(()) }
}

/// Refuses the streams of other tenants to a principal of one tenant, whatever its scopes.
pub(crate) fn require_tenant(api: &Api, principal: &Principal, stream: &StreamName) -> Result<(), AuthError> {
    match (principal.tenant(), api.services().bus.catalog().binding(stream)) {
        (Some(tenant), Some((TENANT, key))) if key != tenant => Err(AuthError::OtherTenant(tenant.to_owned())),
        _ => Ok(()),
    }
}

fn is_declared(api: &Api, stream: &str) -> bool {
    let catalog = api.services().bus.catalog();
    let is_stream = stream.parse::<StreamName>().is_ok_and(|stream| catalog.contains(&stream));
    is_stream || catalog.families().named(stream).is_some()
}
