//! Which alerts a client asked for: one compiled filter, one match function for live, catch-up and snapshot.

use std::str;

use crate::event::{AlertView, Entry, Fields, Severity, field};

/// What a client wants to see. Every condition that is set must hold; without any, everything passes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// At least this severe. An alert whose severity is unknown does not pass.
    pub min_severity: Option<Severity>,
    /// Exactly this source.
    pub source: Option<Box<str>>,
    /// Exactly this category.
    pub category: Option<Box<str>>,
    /// Exactly this tenant.
    pub tenant: Option<Box<str>>,
}

impl Filter {
    /// Whether everything passes.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an alert with these tags passes.
    pub(super) fn matches(&self, tags: &Tags) -> bool {
        let is = |wanted: &Option<Box<str>>, found: &Option<Box<str>>| wanted.is_none() || wanted == found;
        self.min_severity.is_none_or(|floor| tags.severity.is_some_and(|severity| severity >= floor))
            && is(&self.source, &tags.source)
            && is(&self.category, &tags.category)
            && is(&self.tenant, &tags.tenant)
    }
}

/// What filters read of one alert.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tags {
    severity: Option<Severity>,
    source: Option<Box<str>>,
    category: Option<Box<str>>,
    tenant: Option<Box<str>>,
}

impl Tags {
    /// What the entry's own fields say.
    pub(super) fn declared(fields: &Fields) -> Self {
        let text = |name: &str| fields.text(name).filter(|text| !text.is_empty());
        Self {
            severity: text(field::SEVERITY).and_then(|word| word.parse().ok()),
            source: text(field::SOURCE).map(Into::into),
            category: text(field::CATEGORY).map(Into::into),
            tenant: text(field::TENANT).map(Into::into),
        }
    }

    /// The same, with what is missing taken from the payload where that tells.
    pub(super) fn completed(&self, payload: &[u8]) -> Self {
        let mut tags = self.clone();
        let is_complete =
            tags.severity.is_some() && tags.source.is_some() && tags.category.is_some() && tags.tenant.is_some();
        if is_complete {
            return tags;
        }
        if let Ok(view) = AlertView::parse(payload) {
            tags.severity = tags.severity.or(view.severity);
            tags.source = tags.source.or_else(|| view.source.as_deref().map(Into::into));
            tags.category = tags.category.or_else(|| view.category.as_deref().map(Into::into));
            tags.tenant = tags.tenant.or_else(|| view.tenant.as_deref().map(Into::into));
        }
        tags
    }
}

/// The payload of an entry that can be sent as a text message: there is one, and it is UTF-8.
pub(super) fn relayable(entry: &Entry) -> Option<&[u8]> {
    entry.data().map(AsRef::as_ref).filter(|data| str::from_utf8(data).is_ok())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn tags(pairs: &[(&'static str, &'static str)], payload: &str) -> Tags {
        let fields: Fields = pairs.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect();
        Tags::declared(&fields).completed(payload.as_bytes())
    }

    fn min(severity: Severity) -> Filter {
        Filter { min_severity: Some(severity), ..Filter::default() }
    }

    #[test]
    fn an_unknown_severity_passes_no_floor() {
        let unknown = tags(&[], r#"{"severity":"urgent"}"#);
        assert!(!min(Severity::Info).matches(&unknown));
        assert!(Filter::default().matches(&unknown));
    }

    #[test]
    fn fields_come_before_the_payload() {
        let both = tags(&[("severity", "low"), ("source", "zeek")], r#"{"severity":"critical","source":"x"}"#);
        assert!(!min(Severity::Medium).matches(&both));
        assert!(Filter { source: Some("zeek".into()), ..Filter::default() }.matches(&both));
        let odd = tags(&[("severity", "???"), ("source", "")], r#"{"severity":"critical","source":"x"}"#);
        assert!(min(Severity::Critical).matches(&odd));
        assert!(Filter { source: Some("x".into()), ..Filter::default() }.matches(&odd));
    }

    #[test]
    fn every_condition_must_hold() {
        let tags = tags(&[("category", "cps"), ("tenant", "a")], r#"{"severity":"high"}"#);
        let mut filter = Filter { category: Some("cps".into()), tenant: Some("a".into()), ..min(Severity::High) };
        assert!(filter.matches(&tags));
        filter.tenant = Some("A".into());
        assert!(!filter.matches(&tags), "tenants are compared exactly");
    }

    #[test]
    fn a_payload_that_is_no_json_has_only_its_fields() {
        assert!(min(Severity::High).matches(&tags(&[("severity", "high")], "not json")));
    }
}
