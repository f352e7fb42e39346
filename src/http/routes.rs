//! Every route, each with what it takes to be let in: there is no other way to add one.

use axum::Router;
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{RawPathParams, Request, State};
use axum::handler::Handler;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, delete, get, post};

use super::{Api, ApiError};
use crate::auth::{Action, AuthError, Principal, TENANT};
use crate::event::StreamName;
use crate::http::handlers::{assets, dead_letters, feed, health, publish, pull, streams, ticket, websocket};
use crate::http::middleware::credentials::PresentedCredentials;

/// What it takes to be let in, where credentials are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: for machines that watch the daemon, and for what is the same for all.
    Nothing,
    /// Nothing, or the scope `admin`, as `auth.metrics` says.
    Metrics,
    /// Any credentials.
    Credentials,
    /// `publish:` for the stream in the path.
    Publish,
    /// `publish:` for the streams that the events find by themselves, each event on its own.
    PublishEach,
    /// `read:` for the stream in the path; `admin` where that holds dead letters.
    Read,
    /// `consume:` for the stream in the path, and no bounds to what may be seen: a group has all entries.
    Consume,
    /// `ws:` for the channel in the path. Asked for by the handler, since pages are told by a close code.
    Watch,
    /// `admin`.
    Administer,
}

/// One route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Its method.
    pub method: &'static str,
    /// Its path, with `{names}` for what varies.
    pub path: &'static str,
    /// What it takes to be let in.
    pub need: Need,
}

struct Endpoint {
    route: Route,
    handler: MethodRouter<Api>,
}

fn read<T: 'static>(path: &'static str, need: Need, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "GET", path, need }, handler: get(handler) }
}

fn write<T: 'static>(path: &'static str, need: Need, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "POST", path, need }, handler: post(handler) }
}

fn remove<T: 'static>(path: &'static str, need: Need, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "DELETE", path, need }, handler: delete(handler) }
}

fn endpoints() -> Vec<Endpoint> {
    vec![
        read("/", Need::Nothing, health::index),
        read("/health", Need::Nothing, health::health),
        read("/ready", Need::Nothing, health::ready),
        read("/metrics", Need::Metrics, health::metrics),
        read("/client", Need::Nothing, assets::folder),
        read("/client/", Need::Nothing, assets::page),
        read("/client/{file}", Need::Nothing, assets::file),
        read("/api/v1/streams", Need::Credentials, streams::list),
        read("/api/v1/streams/{stream}", Need::Read, streams::show),
        read("/api/v1/streams/{stream}/events", Need::Read, streams::events),
        write("/api/v1/streams/{stream}/events", Need::Publish, publish::to_stream),
        write("/api/v1/streams/{stream}/groups/{group}/pull", Need::Consume, pull::pull),
        write("/api/v1/streams/{stream}/groups/{group}/ack", Need::Consume, pull::acknowledge),
        write("/api/v1/streams/{stream}/groups/{group}/nack", Need::Consume, pull::give_back),
        write("/api/v1/streams/{stream}/groups/{group}/extend", Need::Consume, pull::extend),
        write("/api/v1/alerts", Need::PublishEach, publish::alerts),
        write("/api/alerts", Need::PublishEach, publish::alerts),
        read("/api/v1/dead-letters", Need::Administer, dead_letters::streams),
        read("/api/v1/dead-letters/{stream}", Need::Administer, dead_letters::list),
        remove("/api/v1/dead-letters/{stream}", Need::Administer, dead_letters::discard_matching),
        write("/api/v1/dead-letters/{stream}/replay", Need::Administer, dead_letters::replay),
        write("/api/v1/dead-letters/{stream}/discard", Need::Administer, dead_letters::discard),
        read("/api/v1/dead-letters/{stream}/{id}", Need::Administer, dead_letters::show),
        remove("/api/v1/dead-letters/{stream}/{id}", Need::Administer, dead_letters::discard_one),
        write("/api/v1/dead-letters/{stream}/{id}/replay", Need::Administer, dead_letters::replay_one),
        write("/api/v1/ws/ticket", Need::Credentials, ticket::give),
        read("/api/v1/ws/{channel}", Need::Watch, websocket::connect),
        read("/api/v1/feeds/{channel}", Need::Watch, feed::open),
    ]
}

/// Every route that is answered, with what it takes.
pub fn routes() -> Vec<Route> {
    endpoints().into_iter().map(|endpoint| endpoint.route).collect()
}

/// The routes below `/api`, and the others.
pub(super) fn routers(api: &Api) -> (Router<Api>, Router<Api>) {
    let (mut guarded, mut open) = (Router::new(), Router::new());
    for Endpoint { route, handler } in endpoints() {
        let handler = handler.route_layer(from_fn_with_state((api.clone(), route.need), authorize));
        if route.path.starts_with("/api/") {
            guarded = guarded.route(route.path, handler);
        } else {
            open = open.route(route.path, handler);
        }
    }
    (guarded, open)
}

/// Lets in who may, and tells the handler who it is.
async fn authorize(
    State((api, need)): State<(Api, Need)>,
    params: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let access = &api.inner.access;
    let is_open = match need {
        Need::Nothing | Need::Watch => true,
        Need::Metrics => access.are_metrics_open(),
        _ => false,
    };
    if is_open {
        return next.run(request).await;
    }
    let shown = PresentedCredentials { headers: request.headers(), query: None, origins: &api.inner.config.origins };
    // A path that makes no sense names no stream: those who may do everything are told so by the handler.
    let params = params.as_ref().ok();
    let stream = params.and_then(|params| params.iter().find(|(name, _)| *name == "stream"));
    let stream = stream.map(|(_, stream)| stream).unwrap_or_default();
    let admitted = access.principal(shown).await.and_then(|principal| {
        check(&api, &principal, need, stream)?;
        Ok(principal)
    });
    match admitted {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(denied) => refuse(&api, &denied).into_response(),
    }
}

fn check(api: &Api, principal: &Principal, need: Need, stream: &str) -> Result<(), AuthError> {
    let deed = match need {
        Need::Nothing | Need::Credentials | Need::PublishEach | Need::Watch => return Ok(()),
        Need::Publish => Action::Publish(stream),
        Need::Consume => Action::Consume(stream),
        Need::Read if is_declared(api, stream) => Action::Read(stream),
        Need::Read | Need::Metrics | Need::Administer => Action::Administer,
    };
    if !principal.may(deed) {
        return Err(AuthError::Scope(deed.to_string()));
    }
    if let Ok(stream) = stream.parse() {
        keep_to_tenant(api, principal, &stream)?;
    }
    let is_of_all_entries = matches!(need, Need::Metrics | Need::Consume);
    if is_of_all_entries && principal.is_bounded() { Err(AuthError::AllEntries) } else { Ok(()) }
}

/// Who is bound to a tenant has to do with this tenant's streams alone, whatever the scopes say.
pub(super) fn keep_to_tenant(api: &Api, principal: &Principal, stream: &StreamName) -> Result<(), AuthError> {
    match (principal.tenant(), api.inner.bus.catalog().binding(stream)) {
        (Some(tenant), Some((TENANT, key))) if key != tenant => Err(AuthError::OtherTenant(tenant.to_owned())),
        _ => Ok(()),
    }
}

fn is_declared(api: &Api, stream: &str) -> bool {
    let catalogue = api.inner.bus.catalog();
    let is_stream = stream.parse::<StreamName>().is_ok_and(|stream| catalogue.contains(&stream));
    is_stream || catalogue.families().named(stream).is_some()
}

/// The answer to someone who is not let in, counted.
pub(super) fn refuse(api: &Api, denied: &AuthError) -> ApiError {
    let error = ApiError::from(denied);
    api.inner.metrics.rejected.with_label_values(&[error.code()]).inc();
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_machines_that_watch_the_daemon_and_what_is_the_same_for_all_need_nothing() {
        let open = endpoints().into_iter().map(|e| e.route).filter(|route| route.need == Need::Nothing);
        let expected = ["/", "/health", "/ready", "/client", "/client/", "/client/{file}"];
        assert_eq!(open.map(|route| route.path).collect::<Vec<_>>(), expected);
    }
}
