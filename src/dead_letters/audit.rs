//! Audit entries for actions on dead letters.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::selection::{DeadLetterEntry, Selection};
use super::{Inner, SharedStoreError, store_failure};
use crate::bus::{Dedup, PublishError, PublishOptions};
use crate::event::{EntryId, NewEvent, StreamName};
use crate::store::{StoreError, StoreErrorKind};

/// The stream for audit entries unless `dead_letters.audit` names another.
pub const DEFAULT_AUDIT_STREAM: &str = "aurora:audit";

/// Maximum number of ids in one audit entry. The first and the last id are always there.
const MAX_IDS: usize = 100;

/// An action on dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AuditAction {
    Replay,
    Discard,
    Expire,
}

impl AuditAction {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Replay => "dead_letters.replay",
            Self::Discard => "dead_letters.discard",
            Self::Expire => "dead_letters.expire",
        }
    }
}

/// The content of an audit entry, written before the action.
#[derive(Debug, Serialize)]
struct AuditRecord<'a> {
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
    filter: Option<SelectionView>,
}

/// The conditions of the request.
#[derive(Debug, Serialize)]
struct SelectionView {
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

/// An action, without the dead letters that it is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct AuditContext<'a> {
    pub(super) kind: AuditAction,
    pub(super) actor: &'a str,
    /// The stream of dead letters.
    pub(super) stream: &'a StreamName,
    /// The conditions, if there was a request.
    pub(super) selection: Option<&'a Selection>,
    /// The target of a replay, and whether it is forced.
    pub(super) replay: Option<(&'a super::ReplayTarget, bool)>,
}

impl Inner {
    /// Writes the audit entry of an action, before the action. Returns whether it is in the audit stream.
    ///
    /// Fails if the store is unavailable. If only the audit stream cannot take the entry, the log gets it instead: a
    /// discard must work even if the store is full.
    pub(super) async fn write_audit(
        &self,
        action: &AuditContext<'_>,
        about: &[&DeadLetterEntry],
    ) -> Result<bool, SharedStoreError> {
        let record = self.record(action, about);
        let text = serde_json::to_string(&record).expect("a record is JSON");
        let Some(audit) = &self.audit else {
            tracing::info!(
                action = record.action,
                actor = record.actor,
                record = text,
                "dead letters changed, no audit stream is declared"
            );
            return Ok(false);
        };
        match self.publish(audit, &text).await {
            Ok(()) => {
                let (stream, count) = (record.stream, record.count);
                tracing::info!(action = record.action, actor = record.actor, stream, count, "dead letters changed");
                Ok(true)
            }
            Err(error) if error.kind() == StoreErrorKind::Unavailable => Err(error),
            Err(error) => {
                tracing::error!(error = %error, record = text, "audit entry not written to the audit stream, kept in the log only");
                Ok(false)
            }
        }
    }

    async fn publish(&self, audit: &StreamName, text: &str) -> Result<(), SharedStoreError> {
        let internal = |message: String| std::sync::Arc::new(StoreError::new(StoreErrorKind::Internal, message));
        let event = NewEvent::parse(bytes::Bytes::copy_from_slice(text.as_bytes()));
        let event = event.map_err(|error| internal(error.to_string()))?;
        let results: Vec<Result<_, PublishError>> =
            self.bus.publish(audit, vec![(Dedup::Off, event)], PublishOptions::default()).await;
        let failed = results.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |error| Err(store_failure(error)))
    }

    fn record<'a>(&'a self, action: &AuditContext<'a>, about: &[&'a DeadLetterEntry]) -> AuditRecord<'a> {
        let id = |found: &&DeadLetterEntry| found.entry.id.to_string();
        let mut groups = BTreeMap::new();
        let mut reasons = BTreeMap::new();
        for found in about {
            if let Some(dead_letter) = &found.dead_letter {
                *groups.entry(dead_letter.group.as_str()).or_default() += 1;
            }
            *reasons.entry(found.reason()).or_default() += 1;
        }
        AuditRecord {
            action: action.kind.as_str(),
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
            filter: action.selection.map(|selection| SelectionView {
                group: selection.group.as_ref().map(ToString::to_string),
                reason: selection.reason.map(|reason| reason.to_string()),
                after: (selection.after > EntryId::MIN).then(|| selection.after.to_string()),
                alerts: selection.filter.as_ref().map(|requested| requested.text.clone()),
                by_ids: selection.ids.is_some(),
            }),
        }
    }
}
