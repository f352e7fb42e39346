//! The audit entry of every action on dead letters.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::selection::{Found, Selection};
use super::{Failure, Inner, store_failure};
use crate::bus::{Dedup, Promise, PublishError};
use crate::event::{EntryId, NewEvent, StreamName};
use crate::store::{StoreError, StoreErrorKind};

/// Where actions are written to unless the configuration says otherwise.
pub const DEFAULT_AUDIT_STREAM: &str = "aurora:audit";

/// The most ids that one audit entry lists; the first and the last are always named.
const MAX_IDS: usize = 100;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    Replay,
    Discard,
    Expire,
}

impl Deed {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "dead_letters.replay",
            Self::Discard => "dead_letters.discard",
            Self::Expire => "dead_letters.expire",
        }
    }
}

/// One action, told before it is carried out.
#[derive(Debug, Serialize)]
struct Record<'a> {
    action: &'static str,
    actor: &'a str,
    time: String,
    source: &'static str,
    severity: &'static str,
    instance: &'a str,
    /// The stream of dead letters.
    stream: &'a str,
    count: usize,
    first_id: Option<String>,
    last_id: Option<String>,
    ids: Vec<String>,
    groups: BTreeMap<&'a str, u64>,
    reasons: BTreeMap<&'static str, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    force: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filter: Option<Filter>,
}

/// What the operator asked for.
#[derive(Debug, Serialize)]
struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alerts: Option<String>,
    by_ids: bool,
}

/// What an action is, besides the dead letters that it is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Action<'a> {
    pub(super) deed: Deed,
    pub(super) actor: &'a str,
    /// The stream of dead letters.
    pub(super) stream: &'a StreamName,
    /// What was asked for, by whoever asked.
    pub(super) selection: Option<&'a Selection>,
    /// Whom a replay is for, and whether it is forced.
    pub(super) replay: Option<(&'a super::Target, bool)>,
}

impl Inner {
    /// Writes down what is about to be done, so that nothing is done that was not written down. Says whether it is in
    /// the audit stream.
    ///
    /// Fails while the store is away. Where the audit stream alone can't take it, for want of room or otherwise, the
    /// log has it instead: discarding is what makes room.
    pub(super) async fn write_down(&self, action: &Action<'_>, about: &[&Found]) -> Result<bool, Failure> {
        let record = self.record(action, about);
        let text = serde_json::to_string(&record).expect("a record is JSON");
        let Some(audit) = &self.audit else {
            tracing::info!(action = record.action, actor = record.actor, record = text, "an action on dead letters");
            return Ok(false);
        };
        match self.publish(audit, &text).await {
            Ok(()) => {
                let (stream, count) = (record.stream, record.count);
                tracing::info!(action = record.action, actor = record.actor, stream, count, "dead letters");
                Ok(true)
            }
            Err(error) if error.kind() == StoreErrorKind::Unavailable => Err(error),
            Err(error) => {
                tracing::error!(error = %error, record = text, "an action on dead letters is not in the audit stream");
                Ok(false)
            }
        }
    }

    async fn publish(&self, audit: &StreamName, text: &str) -> Result<(), Failure> {
        let internal = |message: String| std::sync::Arc::new(StoreError::new(StoreErrorKind::Internal, message));
        let event = NewEvent::parse(bytes::Bytes::copy_from_slice(text.as_bytes()));
        let event = event.map_err(|error| internal(error.to_string()))?;
        let results: Vec<Result<_, PublishError>> =
            self.bus.publish(audit, vec![(Dedup::Off, event)], Promise::default()).await;
        let failed = results.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |error| Err(store_failure(error)))
    }

    fn record<'a>(&'a self, action: &Action<'a>, about: &[&'a Found]) -> Record<'a> {
        let id = |found: &&Found| found.entry.id.to_string();
        let mut groups = BTreeMap::new();
        let mut reasons = BTreeMap::new();
        for found in about {
            if let Some(letter) = &found.letter {
                *groups.entry(letter.group.as_str()).or_default() += 1;
            }
            *reasons.entry(found.reason()).or_default() += 1;
        }
        Record {
            action: action.deed.as_str(),
            actor: action.actor,
            time: format!("{:.3}", Timestamp::now()),
            source: "aurora-bus",
            severity: "info",
            instance: &self.instance,
            stream: action.stream.as_str(),
            count: about.len(),
            first_id: about.first().map(id),
            last_id: about.last().map(id),
            ids: about.iter().take(MAX_IDS).map(id).collect(),
            groups,
            reasons,
            to: action.replay.map(|(to, _)| to.to_string()),
            force: action.replay.map(|(_, force)| force),
            filter: action.selection.map(|selection| Filter {
                group: selection.group.as_ref().map(ToString::to_string),
                reason: selection.reason.map(|reason| reason.to_string()),
                after: (selection.after > EntryId::MIN).then(|| selection.after.to_string()),
                alerts: selection.alerts.as_ref().map(|alerts| alerts.filter.clone()),
                by_ids: selection.ids.is_some(),
            }),
        }
    }
}
