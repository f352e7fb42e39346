//! The ticket handler: a page opens a WebSocket with a ticket, because a token in a URL would be logged.

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};

use crate::auth::{PageOrigin, Principal, TICKET_LIFETIME};
use crate::http::api::Api;
use crate::http::body::read_json_or_default;
use crate::http::middleware::credentials::page_origin;
use crate::http::middleware::origin::is_own;
use crate::http::problem::ApiError;

/// The page that the ticket is for, if a program requests it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TicketBody {
    origin: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TicketView {
    ticket: String,
    expires_in: u64,
}

/// `POST /api/v1/ws/ticket`
pub(crate) async fn issue(
    State(api): State<Api>,
    principal: Principal,
    request: Request,
) -> Result<Json<TicketView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: TicketBody = read_json_or_default(&api, &head, body).await?;
    let requested = body.origin.map(|origin| origin.to_ascii_lowercase());
    let sender = page_origin(&head.headers);
    let page = match requested {
        Some(origin) if sender.origin.is_none() => {
            let may_be_own = is_own(&head.headers, &origin);
            PageOrigin { origin: Some(origin), may_be_own }
        }
        Some(origin) if sender.origin != Some(origin.clone()) => {
            return Err(ApiError::bad_parameter("origin", "must be the origin of the page that sends the request"));
        }
        _ => sender,
    };
    let ticket = api.services().authenticator.issue_ticket(&principal, page).ok_or_else(ApiError::too_many_tickets)?;
    Ok(Json(TicketView { ticket, expires_in: TICKET_LIFETIME.as_secs() }))
}
