//! Pulling, as HTTP requests and WebSocket commands share it: desks, deliveries and nacks.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::bus::PublishError;
use crate::event::{GroupName, StreamName};
use crate::http::api::Api;
use crate::http::problem::ApiError;
use crate::http::views::EventView;
use crate::pull::{Desk, GiveBack, Task};

/// The maximum number of tokens in one request.
pub(super) const MAX_TOKENS: usize = 1_000;
/// The part of a nack's reason that is kept.
const MAX_REASON_BYTES: usize = 2_048;

/// A leased entry. `id` is the same in every delivery of the entry.
#[derive(Debug, Serialize)]
pub(super) struct DeliveryView {
    token: String,
    attempt: u32,
    lease_ms: u64,
    expires: String,
    #[serde(flatten)]
    entry: EventView,
}

impl From<&Task> for DeliveryView {
    fn from(task: &Task) -> Self {
        let mut entry = EventView::from(&task.entry);
        if task.entry.is_for_one_group() {
            entry.id = task.entry.first_id().to_string();
            entry.fields.retain(|(name, _)| !name.starts_with("replay."));
        }
        Self {
            token: task.token.to_string(),
            attempt: task.token.attempt(),
            lease_ms: u64::try_from(task.lease.as_millis()).unwrap_or(u64::MAX),
            expires: expires(task.lease),
            entry,
        }
    }
}

/// Returns the end of a lease that begins now, by this machine's clock.
pub(super) fn expires(lease: Duration) -> String {
    let at = Timestamp::now().checked_add(lease).unwrap_or(Timestamp::MAX);
    format!("{at:.3}")
}

/// Returns the parameters of a nack, within their limits.
pub(super) fn nack(
    desk: &Desk,
    delay_ms: u64,
    reason: Option<String>,
    is_permanent: bool,
) -> Result<GiveBack, ApiError> {
    let delay = Duration::from_millis(delay_ms);
    if delay > desk.max_lease() {
        let detail = format!("must be at most {} (claim_idle of the group)", desk.max_lease().as_millis());
        return Err(ApiError::bad_parameter("delay_ms", detail));
    }
    let reason = reason.map(|mut reason| {
        reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
        reason
    });
    Ok(GiveBack { delay, reason, is_permanent })
}

/// Returns the desk of a pull group whose stream exists, to settle entries that were leased from it.
pub(super) async fn existing_desk(api: &Api, stream: &str, group: &str) -> Result<Arc<Desk>, ApiError> {
    let (stream, group) = pull_group(api, stream, group)?;
    let catalogue = api.services().bus.catalogue();
    if let Some(roster) = catalogue.families().of(&stream) {
        roster.finds(&*api.services().store, &stream).await.map_err(|error| ApiError::from(&error))?;
    }
    let no_such_stream = || ApiError::no_such_stream(stream.as_str(), catalogue.names());
    api.services().pull.desk(&stream, &group).ok_or_else(no_such_stream)
}

/// Returns the desk of a pull group, to pull from it. Makes the stream a member if it belongs to a family.
pub(super) async fn open_desk(api: &Api, stream: &str, group: &str) -> Result<Arc<Desk>, ApiError> {
    let (stream, group) = pull_group(api, stream, group)?;
    if let Some(roster) = api.services().bus.catalogue().families().of(&stream) {
        let joined = roster.join(&*api.services().store, &stream).await;
        joined.map_err(|error| ApiError::from(&PublishError::from(error)))?;
    }
    api.services().pull.desk(&stream, &group).ok_or_else(ApiError::internal)
}

/// Parses the names of a stream and of one of its pull groups.
pub(super) fn pull_group(api: &Api, stream: &str, group: &str) -> Result<(StreamName, GroupName), ApiError> {
    let catalogue = api.services().bus.catalogue();
    let known = stream.parse::<StreamName>().ok().filter(|stream| catalogue.contains(stream));
    let known = known.ok_or_else(|| ApiError::no_such_stream(stream, catalogue.names()))?;
    let pull = &api.services().pull;
    let named = group.parse().ok().filter(|group| pull.groups(&known).any(|known| known == group));
    let named = named.ok_or_else(|| ApiError::no_such_group(group, pull.groups(&known).map(GroupName::as_str)))?;
    Ok((known, named))
}
