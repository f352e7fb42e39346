//! Tickets over HTTP: what a page opens a WebSocket with, instead of a token in its URL.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};

use super::auth::{Principal, TICKET_LIFETIME, page};
use super::publish::read;
use super::{Api, ApiError};

/// Which page the ticket is for, where it is not that page that asks.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Body {
    origin: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct TicketView {
    ticket: String,
    expires_in: u64,
}

/// `POST /api/v1/ws/ticket`
pub(super) async fn give(
    State(api): State<Api>,
    principal: Principal,
    request: Request,
) -> Result<Json<TicketView>, ApiError> {
    let (head, body) = request.into_parts();
    let body = read(&api, &head, body).await?;
    let body: Body = if body.iter().all(u8::is_ascii_whitespace) {
        Body::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| ApiError::bad_parameter("body", error.to_string()))?
    };
    let asked_for = body.origin.map(|origin| origin.to_ascii_lowercase());
    let origin = match (page(&head.headers), asked_for) {
        (Some(page), Some(origin)) if page != origin => {
            return Err(ApiError::bad_parameter("origin", "a page can have a ticket for itself only"));
        }
        (page, origin) => page.or(origin),
    };
    let ticket = api.inner.access.ticket(&principal, origin).ok_or_else(ApiError::too_many_tickets)?;
    Ok(Json(TicketView { ticket, expires_in: TICKET_LIFETIME.as_secs() }))
}
