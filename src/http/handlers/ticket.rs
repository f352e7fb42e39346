//! Tickets over HTTP: what a page opens a WebSocket with, instead of a token in its URL.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};

use crate::auth::{PageOrigin, Principal, TICKET_LIFETIME};
use crate::http::handlers::publish::read;
use crate::http::middleware::credentials::page_origin;
use crate::http::middleware::origin::is_own;
use crate::http::{Api, ApiError};

/// Which page the ticket is for, where it is not that page that asks.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Body {
    origin: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TicketView {
    ticket: String,
    expires_in: u64,
}

/// `POST /api/v1/ws/ticket`
pub(crate) async fn give(
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
    let asks = page_origin(&head.headers);
    let page = match asked_for {
        Some(origin) if asks.origin.is_none() => {
            let may_be_own = is_own(&head.headers, &origin);
            PageOrigin { origin: Some(origin), may_be_own }
        }
        Some(origin) if asks.origin != Some(origin.clone()) => {
            return Err(ApiError::bad_parameter("origin", "a page can have a ticket for itself only"));
        }
        _ => asks,
    };
    let ticket = api.inner.access.ticket(&principal, page).ok_or_else(ApiError::too_many_tickets)?;
    Ok(Json(TicketView { ticket, expires_in: TICKET_LIFETIME.as_secs() }))
}
