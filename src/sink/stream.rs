//! The stream sink: forwards entries to another stream of the same store.
//!
//! Owns the filter and the two forms of forwarded entries: unchanged, or as a task for agents. Promises that an entry
//! has one successor, however often it is delivered while its key is remembered. The id of the successor is the same
//! even after that. Does not know how streams are written, which is the task of [`Forward`].

use std::borrow::Cow;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::envelope::{Envelope, plain};
use super::{Forward, Origin, Sink, SinkError, SinkErrorClass};
use crate::event::{AlertView, Delivery, Entry, EntryId, Fields, NewEntry, Severity, StreamName, field};
use crate::validate::{Problems, Validate};

/// The highest priority of a task.
const MAX_PRIORITY: u8 = 10;
/// The prefix of fields that concern only the entry's own stream.
const REPLAY_PREFIX: &[u8] = b"replay.";
/// The field with the origin of a forwarded entry: `<stream>/<entry id>`.
const FORWARDED_FROM: &str = "forwarded.from";

/// The target stream, the filter, and the form of forwarded entries.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSinkConfig {
    /// The declared stream to append to.
    pub stream: StreamName,
    /// The form of forwarded entries.
    #[serde(default, rename = "as")]
    pub form: ForwardAs,
    /// Minimum severity of forwarded entries. Entries of unknown severity are forwarded: a surplus alert is better than
    /// a missing one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_severity: Option<Severity>,
    /// Sources of forwarded entries; all if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Categories of forwarded entries; all if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
    /// Tenants of forwarded entries; all if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tenants: Vec<String>,
    /// The kind of agent that tasks are for; required with `as = "task"`, not allowed otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_type: Option<String>,
    /// Priority of tasks, 0 to 10, with 10 the most urgent; only with `as = "task"`. By default it follows the
    /// severity: critical 10, high 8, medium 5, low 3, info 1, unknown 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u8>,
}

/// The form of forwarded entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ForwardAs {
    /// Unchanged, with all fields and the additional field `forwarded.from`, which has the origin.
    #[default]
    Event,
    /// A task for an agent, with the payload of the entry as its `alert`.
    Task,
}

impl Validate for StreamSinkConfig {
    fn validate(&self, problems: &mut Problems) {
        let agent_type = self.agent_type.as_deref().map(str::trim);
        match (self.form, agent_type) {
            (ForwardAs::Task, None) => problems.add("agent_type", "is missing: as = \"task\" needs it"),
            (ForwardAs::Task, Some("")) => problems.add("agent_type", "must not be empty"),
            (ForwardAs::Event, Some(_)) => problems.add("agent_type", "has no effect without as = \"task\""),
            _ => {}
        }
        match (self.form, self.priority) {
            (ForwardAs::Event, Some(_)) => problems.add("priority", "has no effect without as = \"task\""),
            (ForwardAs::Task, Some(priority)) if priority > MAX_PRIORITY => {
                problems.add("priority", format_args!("must be from 0 to {MAX_PRIORITY}, not {priority}"));
            }
            _ => {}
        }
    }
}

impl StreamSinkConfig {
    fn has_filter(&self) -> bool {
        self.min_severity.is_some_and(|severity| severity > Severity::Info)
            || [&self.sources, &self.categories, &self.tenants].iter().any(|words| !words.is_empty())
    }

    fn lets_through(&self, alert: &AlertProperties<'_>) -> bool {
        let is_severe = match (self.min_severity, alert.severity) {
            (Some(least), Some(severity)) => severity >= least,
            _ => true,
        };
        let is_one_of = |words: &[String], word: &Option<Cow<'_, str>>| {
            words.is_empty() || word.as_ref().is_some_and(|word| words.iter().any(|known| known == word))
        };
        is_severe
            && is_one_of(&self.sources, &alert.source)
            && is_one_of(&self.categories, &alert.category)
            && is_one_of(&self.tenants, &alert.tenant)
    }
}

/// Forwards entries.
#[derive(Debug)]
pub struct StreamSink {
    config: StreamSinkConfig,
    forward: Arc<dyn Forward>,
}

impl StreamSink {
    /// Creates a sink that appends with `forward`.
    pub fn new(config: StreamSinkConfig, forward: Arc<dyn Forward>) -> Self {
        Self { config, forward }
    }

    /// Returns the successor of an entry, or `None` if the filter excludes it.
    fn successor(&self, origin: &Origin, entry: &Entry) -> Result<Option<(String, Fields)>, SinkError> {
        let id = entry.first_id();
        let data = entry.data().ok_or_else(|| undecodable(id, "has no field `data`"))?;
        let key = SuccessorKey::of(origin, id);
        let from = format!("{}/{id}", origin.stream);
        if self.config.form == ForwardAs::Event && !self.config.has_filter() {
            return Ok(Some((key.text, unchanged(entry, from))));
        }
        let json = std::str::from_utf8(data).map_err(|error| undecodable(id, "is not UTF-8").with_source(error))?;
        let alert = AlertProperties::read(entry, json)
            .map_err(|error| undecodable(id, "is not one JSON object").with_source(error))?;
        if !self.config.lets_through(&alert) {
            return Ok(None);
        }
        let fields = match self.config.form {
            ForwardAs::Event => unchanged(entry, from),
            ForwardAs::Task => self.task(&key, &alert, json, from)?,
        };
        Ok(Some((key.text, fields)))
    }

    fn task(
        &self,
        key: &SuccessorKey,
        alert: &AlertProperties<'_>,
        json: &str,
        from: String,
    ) -> Result<Fields, SinkError> {
        let failed = |error: serde_json::Error| {
            SinkError::new(SinkErrorClass::Undecodable, "cannot convert the entry to a task").with_source(error)
        };
        let envelope = Envelope::parse(json).map_err(failed)?;
        let alert_id = match (plain(envelope.alert_id), envelope.alert_id) {
            (Some(_), Some(raw)) => Some(Cow::Borrowed(raw)),
            _ => alert.id.as_ref().map(to_raw_value).transpose().map_err(failed)?.map(Cow::Owned),
        };
        let task = NewTask {
            task_id: &key.task_id,
            agent_type: self.config.agent_type.as_deref().unwrap_or_default().trim(),
            priority: self.config.priority.unwrap_or_else(|| priority(alert.severity)),
            alert_id: alert_id.as_deref(),
            case_id: envelope.case_id,
            assignment_id: envelope.assignment_id,
            network_attack_id: envelope.network_attack_id,
            severity: alert.severity,
            source: alert.source.as_deref(),
            category: alert.category.as_deref(),
            tenant: alert.tenant.as_deref(),
            traceparent: alert.traceparent.as_deref(),
            alert: serde_json::from_str(json).map_err(failed)?,
        };
        let data = serde_json::to_vec(&task).map_err(failed)?;
        let mut fields = Fields::with_capacity(8);
        let name = |name: &'static str| Bytes::from_static(name.as_bytes());
        fields.push(name(field::ID), key.task_id.clone());
        fields.push(name(field::TIMESTAMP), NewEntry::timestamp_now());
        fields.push(name(field::DATA), data);
        let texts = [
            (field::SEVERITY, alert.severity.map(Severity::as_str)),
            (field::SOURCE, task.source),
            (field::CATEGORY, task.category),
            (field::TENANT, task.tenant),
            (field::TRACEPARENT, task.traceparent),
        ];
        for (field, text) in texts {
            if let Some(text) = text {
                fields.push(name(field), text.to_owned());
            }
        }
        fields.push(name(FORWARDED_FROM), from);
        Ok(fields)
    }
}

#[async_trait]
impl Sink for StreamSink {
    fn max_batch(&self) -> usize {
        500
    }

    async fn check(&self) -> Result<(), SinkError> {
        self.forward.check(&self.config.stream).await
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let mut successors = Vec::with_capacity(batch.len());
        for delivery in batch {
            successors.extend(self.successor(origin, &delivery.entry)?);
        }
        if successors.is_empty() {
            return Ok(());
        }
        self.forward.forward(&self.config.stream, successors).await
    }
}

fn undecodable(id: EntryId, what: &str) -> SinkError {
    SinkError::new(SinkErrorClass::Undecodable, format!("entry {id} {what}"))
}

/// Returns all fields except those that concern only the entry's own stream.
fn unchanged(entry: &Entry, from: String) -> Fields {
    let is_kept = |name: &Bytes| !name.starts_with(REPLAY_PREFIX) && name != FORWARDED_FROM.as_bytes();
    let kept = entry.fields.iter().filter(|(name, _)| is_kept(name)).map(|(name, value)| (name.clone(), value.clone()));
    kept.chain([(Bytes::from_static(FORWARDED_FROM.as_bytes()), from.into())]).collect()
}

const fn priority(severity: Option<Severity>) -> u8 {
    match severity {
        Some(Severity::Critical) => MAX_PRIORITY,
        Some(Severity::High) => 8,
        Some(Severity::Medium) | None => 5,
        Some(Severity::Low) => 3,
        Some(Severity::Info) => 1,
    }
}

/// The identity of one entry in one group.
struct SuccessorKey {
    /// The idempotency key.
    text: String,
    /// A task id derived from the key, always the same.
    task_id: String,
}

impl SuccessorKey {
    fn of(origin: &Origin, id: EntryId) -> Self {
        let text = format!("{}/{id}/{}", origin.stream, origin.group);
        let digest = Sha256::digest(text.as_bytes());
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(digest).for_each(|(byte, hashed)| *byte = hashed);
        let task_id = uuid::Builder::from_custom_bytes(bytes).into_uuid();
        // Long names may exceed the limit of a key.
        let text = if text.len() <= 256 { text } else { format!("{task_id}/{id}") };
        Self { text, task_id: task_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).to_owned() }
    }
}

/// The properties of an entry, from its fields or else from its payload.
struct AlertProperties<'a> {
    id: Option<Cow<'a, str>>,
    severity: Option<Severity>,
    source: Option<Cow<'a, str>>,
    category: Option<Cow<'a, str>>,
    tenant: Option<Cow<'a, str>>,
    traceparent: Option<Cow<'a, str>>,
}

impl<'a> AlertProperties<'a> {
    fn read(entry: &'a Entry, json: &'a str) -> Result<Self, serde_json::Error> {
        let view = AlertView::parse(json.as_bytes())?;
        let named = |name: &str| entry.fields.text(name).filter(|text| !text.is_empty()).map(Cow::Borrowed);
        let severity = entry.fields.text(field::SEVERITY).and_then(|text| text.parse().ok());
        Ok(Self {
            id: view.id.or_else(|| named(field::ID)),
            severity: severity.or(view.severity),
            source: named(field::SOURCE).or(view.source),
            category: named(field::CATEGORY).or(view.category),
            tenant: named(field::TENANT).or(view.tenant),
            traceparent: named(field::TRACEPARENT).or(view.traceparent),
        })
    }
}

/// A task in the format of the agents.
#[derive(Serialize)]
struct NewTask<'a> {
    task_id: &'a str,
    agent_type: &'a str,
    priority: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    alert_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    case_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    assignment_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_attack_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    severity: Option<Severity>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    category: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    /// The payload, byte for byte.
    alert: &'a RawValue,
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use serde_json::Value;

    use super::*;

    /// Records forwarded entries.
    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<(String, Fields)>>);

    #[async_trait]
    impl Forward for Recorder {
        async fn check(&self, _: &StreamName) -> Result<(), SinkError> {
            Ok(())
        }

        async fn forward(&self, _: &StreamName, entries: Vec<(String, Fields)>) -> Result<(), SinkError> {
            self.0.lock().expect("no panic").extend(entries);
            Ok(())
        }
    }

    fn config(text: &str) -> StreamSinkConfig {
        toml::from_str(&format!("stream = 'aurora:agent:tasks'\n{text}")).expect("every key is known")
    }

    fn delivery(fields: &[(&'static str, &'static str)]) -> Delivery {
        let fields = fields.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect();
        Delivery { entry: Entry { id: EntryId::new(7, 1), fields }, attempt: 1, delivered_at: Instant::now() }
    }

    async fn forwarded(text: &str, batch: &[Delivery]) -> Result<Vec<(String, Fields)>, SinkError> {
        let recorder = Arc::new(Recorder::default());
        let forward: Arc<dyn Forward> = Arc::<Recorder>::clone(&recorder);
        let sink = StreamSink::new(config(text), forward);
        let origin =
            Origin { stream: "aurora:alerts".parse().expect("a name"), group: "triage".parse().expect("a name") };
        sink.deliver(&origin, batch).await?;
        Ok(std::mem::take(&mut *recorder.0.lock().expect("no panic")))
    }

    #[tokio::test]
    async fn event_is_forwarded_without_replay_fields() {
        let batch =
            [delivery(&[("id", "e"), ("data", "not JSON"), ("x", "y"), ("replay.of", "3-0"), ("replay.group", "g")])];
        let sent = forwarded("", &batch).await.expect("forwarded");
        assert_eq!(sent[0].0, "aurora:alerts/3-0/triage");
        let names: Vec<_> = sent[0].1.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, ["id", "data", "x", "forwarded.from"]);
        assert_eq!(sent[0].1.text("forwarded.from"), Some("aurora:alerts/3-0"));
    }

    #[tokio::test]
    async fn task_has_correlation_keys_and_payload() {
        let data = r#"{"id":"a-1","severity":"critical","title":"t","case_id":5,"tenant":"acme"}"#;
        let batch = [delivery(&[("data", data), ("source", "zeek"), ("traceparent", "00-ab-cd-01")])];
        let text = "as = 'task'\nagent_type = 'triage'";
        let sent = forwarded(text, &batch).await.expect("forwarded");
        let fields = &sent[0].1;
        let task: Value = serde_json::from_slice(fields.get("data").expect("a payload")).expect("JSON");
        assert_eq!(task["agent_type"], "triage");
        assert_eq!(task["priority"], 10);
        assert_eq!((&task["alert_id"], &task["case_id"]), (&"a-1".into(), &5.into()));
        assert_eq!((&task["tenant"], &task["source"]), (&"acme".into(), &"zeek".into()));
        assert_eq!(task["traceparent"], "00-ab-cd-01");
        assert_eq!(task["alert"], serde_json::from_str::<Value>(data).expect("JSON"));
        assert_eq!(fields.text("id"), task["task_id"].as_str());
        assert_eq!((fields.text("severity"), fields.text("tenant")), (Some("critical"), Some("acme")));

        let again = forwarded(text, &batch).await.expect("forwarded");
        assert_eq!((again[0].0.clone(), again[0].1.text("id")), (sent[0].0.clone(), fields.text("id")));
        let fixed = forwarded(&format!("{text}\npriority = 2"), &batch).await.expect("forwarded");
        let task: Value = serde_json::from_slice(fixed[0].1.get("data").expect("a payload")).expect("JSON");
        assert_eq!(task["priority"], 2);
    }

    #[tokio::test]
    async fn filtered_entry_counts_as_delivered() {
        let low = [delivery(&[("data", r#"{"severity":"low","source":"zeek","category":"cps","tenant":"acme"}"#)])];
        let cases = [
            ("min_severity = 'low'", 1),
            ("min_severity = 'high'", 0),
            ("sources = ['suricata', 'zeek']", 1),
            ("sources = ['suricata']", 0),
            ("categories = ['network']", 0),
            ("tenants = ['acme']\ncategories = ['cps']", 1),
        ];
        for (text, count) in cases {
            assert_eq!(forwarded(text, &low).await.expect("forwarded").len(), count, "{text}");
        }
        let unknown = [delivery(&[("data", "{}")])];
        assert_eq!(forwarded("min_severity = 'high'", &unknown).await.expect("forwarded").len(), 1);
        assert_eq!(forwarded("sources = ['zeek']", &unknown).await.expect("forwarded").len(), 0);
    }

    #[tokio::test]
    async fn unreadable_entry_is_undecodable() {
        let class = async |text: &str, fields: &[(&'static str, &'static str)]| {
            forwarded(text, &[delivery(fields)]).await.err().map(|error| error.class())
        };
        assert_eq!(class("", &[]).await, Some(SinkErrorClass::Undecodable));
        assert_eq!(class("as = 'task'\nagent_type = 'a'", &[("data", "[]")]).await, Some(SinkErrorClass::Undecodable));
        assert_eq!(class("sources = ['a']", &[("data", "nope")]).await, Some(SinkErrorClass::Undecodable));
    }

    #[test]
    fn invalid_values_are_reported_with_their_keys() {
        let keys = |text: &str| config(text).problems().into_iter().map(|problem| problem.path).collect::<Vec<_>>();
        assert_eq!(keys(""), [""; 0]);
        assert_eq!(keys("agent_type = 'x'\npriority = 1"), ["agent_type", "priority"]);
        assert_eq!(keys("as = 'task'"), ["agent_type"]);
        assert_eq!(keys("as = 'task'\nagent_type = ' '\npriority = 11"), ["agent_type", "priority"]);
        assert_eq!(keys("as = 'task'\nagent_type = 'triage'\npriority = 10"), [""; 0]);
    }

    #[test]
    fn key_fits_with_the_longest_names() {
        let long = "x".repeat(200);
        let origin = Origin { stream: long.parse().expect("a name"), group: long.parse().expect("a name") };
        assert!(SuccessorKey::of(&origin, EntryId::MAX).text.len() <= 256);
    }
}
