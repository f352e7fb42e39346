//! Every route with the access that it needs. No other place adds routes.

use axum::Router;
use axum::handler::Handler;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, delete, get, post};
use tower_http::catch_panic::CatchPanicLayer;

use crate::http::api::Api;
use crate::http::handlers::{assets, dead_letters, feed, health, publish, pull, streams, ticket, websocket};
use crate::http::middleware::authorize::{Access, authorize};
use crate::http::middleware::cors::add_cors_headers;
use crate::http::middleware::host_and_rate::{check_host, check_origin_and_rate};
use crate::http::middleware::trace::trace_request;
use crate::http::problem::{self, ApiError};

/// One route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The HTTP method.
    pub method: &'static str,
    /// The path, with `{name}` for variable segments.
    pub path: &'static str,
    /// The access that a request needs.
    pub access: Access,
}

struct Endpoint {
    route: Route,
    handler: MethodRouter<Api>,
}

fn read<T: 'static>(path: &'static str, access: Access, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "GET", path, access }, handler: get(handler) }
}

fn write<T: 'static>(path: &'static str, access: Access, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "POST", path, access }, handler: post(handler) }
}

fn remove<T: 'static>(path: &'static str, access: Access, handler: impl Handler<T, Api>) -> Endpoint {
    Endpoint { route: Route { method: "DELETE", path, access }, handler: delete(handler) }
}

fn endpoints() -> Vec<Endpoint> {
    vec![
        read("/", Access::Open, health::index),
        read("/health", Access::Open, health::health),
        read("/ready", Access::Open, health::ready),
        read("/metrics", Access::Metrics, health::metrics),
        read("/client", Access::Open, assets::folder),
        read("/client/", Access::Open, assets::page),
        read("/client/{file}", Access::Open, assets::file),
        read("/api/v1/streams", Access::Credentials, streams::list),
        read("/api/v1/streams/{stream}", Access::Read, streams::show),
        read("/api/v1/streams/{stream}/events", Access::Read, streams::events),
        write("/api/v1/streams/{stream}/events", Access::Publish, publish::to_stream),
        write("/api/v1/streams/{stream}/groups/{group}/pull", Access::Consume, pull::pull),
        write("/api/v1/streams/{stream}/groups/{group}/ack", Access::Consume, pull::acknowledge),
        write("/api/v1/streams/{stream}/groups/{group}/nack", Access::Consume, pull::nack),
        write("/api/v1/streams/{stream}/groups/{group}/extend", Access::Consume, pull::extend),
        write("/api/v1/alerts", Access::PublishEach, publish::alerts),
        write("/api/alerts", Access::PublishEach, publish::alerts),
        read("/api/v1/dead-letters", Access::Administer, dead_letters::streams),
        read("/api/v1/dead-letters/{stream}", Access::Administer, dead_letters::list),
        remove("/api/v1/dead-letters/{stream}", Access::Administer, dead_letters::discard_matching),
        write("/api/v1/dead-letters/{stream}/replay", Access::Administer, dead_letters::replay),
        write("/api/v1/dead-letters/{stream}/discard", Access::Administer, dead_letters::discard),
        read("/api/v1/dead-letters/{stream}/{id}", Access::Administer, dead_letters::show),
        remove("/api/v1/dead-letters/{stream}/{id}", Access::Administer, dead_letters::discard_one),
        write("/api/v1/dead-letters/{stream}/{id}/replay", Access::Administer, dead_letters::replay_one),
        write("/api/v1/ws/ticket", Access::Credentials, ticket::issue),
        read("/api/v1/ws/{channel}", Access::Watch, websocket::connect),
        read("/api/v1/feeds/{channel}", Access::Watch, feed::open),
    ]
}

/// Returns every route.
pub fn routes() -> Vec<Route> {
    endpoints().into_iter().map(|endpoint| endpoint.route).collect()
}

/// Returns the router with all routes and middleware. Origins and rates are checked below `/api/` only.
pub(super) fn router(api: &Api) -> Router {
    let (mut checked, mut open) = (Router::new(), Router::new());
    for Endpoint { route, handler } in endpoints() {
        let handler = handler.route_layer(from_fn_with_state((api.clone(), route.access), authorize));
        if route.path.starts_with("/api/") {
            checked = checked.route(route.path, handler);
        } else {
            open = open.route(route.path, handler);
        }
    }
    open.merge(checked.route_layer(from_fn_with_state(api.clone(), check_origin_and_rate)))
        .fallback(|| async { ApiError::no_such_route() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(CatchPanicLayer::custom(problem::after_panic))
        .layer(from_fn_with_state(api.clone(), check_host))
        .layer(from_fn_with_state(api.clone(), add_cors_headers))
        .layer(from_fn_with_state(api.clone(), trace_request))
        .with_state(api.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_probes_and_static_pages_are_open() {
        let open = endpoints().into_iter().map(|e| e.route).filter(|route| route.access == Access::Open);
        let expected = ["/", "/health", "/ready", "/client", "/client/", "/client/{file}"];
        assert_eq!(open.map(|route| route.path).collect::<Vec<_>>(), expected);
    }
}
