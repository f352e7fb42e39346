//! Pulling, as HTTP requests and WebSocket commands share it: pull consumers, deliveries and nacks.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use crate::bus::PublishError;
use crate::event::{GroupName, StreamName};
use crate::http::api::Api;
use crate::http::problem::ApiError;
use crate::http::views::EventView;
use crate::pull::{LeasedEntry, Nack, PullConsumer};

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

impl From<&LeasedEntry> for DeliveryView {
    fn from(leased: &LeasedEntry) -> Self {
        let mut entry = EventView::from(&leased.entry);
        if leased.entry.is_for_one_group() {
            entry.id = leased.entry.first_id().to_string();
            entry.fields.retain(|(name, _)| !name.starts_with("replay."));
        }
        Self {
            token: leased.token.to_string(),
            attempt: leased.token.attempt(),
            lease_ms: u64::try_from(leased.lease.as_millis()).unwrap_or(u64::MAX),
            expires: expires(leased.lease),
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
    pull_consumer: &PullConsumer,
    delay_ms: u64,
    reason: Option<String>,
    is_permanent: bool,
) -> Result<Nack, ApiError> {
    let delay = Duration::from_millis(delay_ms);
    if delay > pull_consumer.max_lease() {
        let detail = format!("must be at most {} (claim_idle of the group)", pull_consumer.max_lease().as_millis());
        return Err(ApiError::bad_parameter("delay_ms", detail));
    }
    let reason = reason.map(|mut reason| {
        reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
        reason
    });
    Ok(Nack { delay, reason, is_permanent })
}

/// Returns the pull consumer of a pull group whose stream exists, to settle entries that were leased from it.
pub(super) async fn existing_consumer(api: &Api, stream: &str, group: &str) -> Result<Arc<PullConsumer>, ApiError> {
    let (stream, group) = pull_group(api, stream, group)?;
    let catalog = api.services().bus.catalog();
    if let Some(family_members) = catalog.families().of(&stream) {
        family_members.finds(&*api.services().store, &stream).await.map_err(|error| ApiError::from(&error))?;
    }
    let no_such_stream = || ApiError::no_such_stream(stream.as_str(), catalog.names());
    api.services().pull.consumer(&stream, &group).ok_or_else(no_such_stream)
}

/// Returns the pull consumer of a pull group, to pull from it. Makes the stream a member if it belongs to a family.
pub(super) async fn open_consumer(api: &Api, stream: &str, group: &str) -> Result<Arc<PullConsumer>, ApiError> {
    let (stream, group) = pull_group(api, stream, group)?;
    if let Some(family_members) = api.services().bus.catalog().families().of(&stream) {
        let joined = family_members.join(&*api.services().store, &stream).await;
        joined.map_err(|error| ApiError::from(&PublishError::from(error)))?;
    }
    api.services().pull.consumer(&stream, &group).ok_or_else(ApiError::internal)
}

/// Parses the names of a stream and of one of its pull groups.
pub(super) fn pull_group(api: &Api, stream: &str, group: &str) -> Result<(StreamName, GroupName), ApiError> {
    let catalog = api.services().bus.catalog();
    let known = stream.parse::<StreamName>().ok().filter(|stream| catalog.contains(stream));
    let known = known.ok_or_else(|| ApiError::no_such_stream(stream, catalog.names()))?;
    let pull = &api.services().pull;
    let named = group.parse().ok().filter(|group| pull.groups(&known).any(|known| known == group));
    let named = named.ok_or_else(|| ApiError::no_such_group(group, pull.groups(&known).map(GroupName::as_str)))?;
    Ok((known, named))
}
