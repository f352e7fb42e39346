//! Publish handlers: one JSON object, an array of objects, or NDJSON.

use axum::extract::{Request, State};
use axum::response::Response;

use crate::auth::Principal;
use crate::event::{NewEvent, StreamName};
use crate::http::api::Api;
use crate::http::extract::{Query, Segment};
use crate::http::problem::ApiError;
use crate::http::publishing::{PublishParams, publish};

/// `POST /api/v1/streams/{stream}/events`
pub(crate) async fn to_stream(
    State(api): State<Api>,
    Segment(name): Segment,
    Query(params): Query<PublishParams>,
    principal: Principal,
    request: Request,
) -> Result<Response, ApiError> {
    let catalog = api.services().bus.catalog();
    let stream = name.parse().ok().filter(|stream| catalog.contains(stream));
    let response = match stream {
        Some(stream) => publish(&api, &params, &principal, request, |_| &stream).await,
        None => Err(ApiError::no_such_stream(&name, catalog.names())),
    };
    count_rejected(&api, response)
}

/// `POST /api/v1/alerts`: publishes alerts of category `cps` to `aurora:cps:alerts` and all others to `aurora:alerts`.
pub(crate) async fn alerts(
    State(api): State<Api>,
    Query(params): Query<PublishParams>,
    principal: Principal,
    request: Request,
) -> Result<Response, ApiError> {
    let alerts: StreamName = "aurora:alerts".parse().expect("a valid name");
    let cps_alerts: StreamName = "aurora:cps:alerts".parse().expect("a valid name");
    let catalog = api.services().bus.catalog();
    let missing = [&alerts, &cps_alerts].into_iter().find(|stream| !catalog.contains(stream));
    let response = if let Some(stream) = missing {
        Err(ApiError::no_such_stream(stream.as_str(), catalog.names()))
    } else {
        let route = |event: &NewEvent| if event.category() == Some("cps") { &cps_alerts } else { &alerts };
        publish(&api, &params, &principal, request, route).await
    };
    count_rejected(&api, response)
}

fn count_rejected(api: &Api, response: Result<Response, ApiError>) -> Result<Response, ApiError> {
    response.inspect_err(|error| api.count_rejected(error.code()))
}
