//! Principals: the authenticated senders of requests, with their permissions and restrictions.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::auth::scope::{Action, Scope};
use crate::event::{Attribute, Filter};
use crate::event::{DeadLetter, Entry, NewEvent};

/// The authenticated sender of a request. Cheap to clone.
#[derive(Clone, PartialEq)]
pub(crate) struct Principal(Arc<Identity>);

#[derive(PartialEq)]
struct Identity {
    /// `None` if no credentials are required.
    id: Option<Arc<str>>,
    scopes: Vec<Scope>,
    tenant: Option<Box<str>>,
    /// Passes the entries that the principal may read: those of its tenant that pass its own filter.
    filter: Filter,
    expires_at: Option<SystemTime>,
}

impl Principal {
    /// Returns the principal of all requests if no credentials are required.
    pub(crate) fn unauthenticated() -> Self {
        let scopes = vec![Scope::Admin];
        Self(Arc::new(Identity { id: None, scopes, tenant: None, filter: Filter::default(), expires_at: None }))
    }

    pub(crate) fn new(
        id: String,
        scopes: Vec<Scope>,
        tenant: Option<String>,
        filter: Filter,
        expires_at: Option<SystemTime>,
    ) -> Self {
        let of_tenant = tenant.as_ref().map(|tenant| Filter::is(Attribute::Tenant, tenant)).unwrap_or_default();
        let filter = of_tenant.and(filter);
        let tenant = tenant.map(String::into_boxed_str);
        Self(Arc::new(Identity { id: Some(id.into()), scopes, tenant, filter, expires_at }))
    }

    /// Returns `key:<name>` or `<issuer>#<subject>`; `None` if no credentials are required.
    pub(crate) fn id(&self) -> Option<&str> {
        self.0.id.as_deref()
    }

    pub(crate) fn shared_id(&self) -> Option<Arc<str>> {
        self.0.id.clone()
    }

    /// Returns the tenant that the principal is restricted to.
    pub(crate) fn tenant(&self) -> Option<&str> {
        self.0.tenant.as_deref()
    }

    pub(crate) fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at
    }

    pub(crate) fn may(&self, action: Action<'_>) -> bool {
        self.0.scopes.iter().any(|scope| scope.allows(action))
    }

    /// Returns the filter that passes the entries the principal may read.
    pub(crate) fn filter(&self) -> &Filter {
        &self.0.filter
    }

    /// Returns whether the principal may read only some entries. Then it may not use data that covers all entries.
    pub(crate) fn is_restricted(&self) -> bool {
        !self.0.filter.is_empty()
    }

    /// Returns whether the principal may read an entry. A dead letter counts as the entry that it records.
    pub(crate) fn sees(&self, entry: &Entry) -> bool {
        if !self.is_restricted() {
            return true;
        }
        match DeadLetter::from_entry(entry) {
            Some(letter) => self.0.filter.passes(&Entry { id: letter.id, fields: letter.fields }),
            None => self.0.filter.passes(entry),
        }
    }

    /// Assigns an event to the principal's tenant. Fails with that tenant if the event names another one.
    pub(crate) fn assign_tenant(&self, event: &mut NewEvent) -> Result<(), &str> {
        let Some(tenant) = self.tenant() else { return Ok(()) };
        event.set_tenant(tenant);
        if event.tenant() == Some(tenant) { Ok(()) } else { Err(tenant) }
    }

    /// Returns whether the principal has all scopes of `other`.
    pub(crate) fn has_all_scopes_of(&self, other: &Self) -> bool {
        self.0.scopes.contains(&Scope::Admin) || other.0.scopes.iter().all(|scope| self.0.scopes.contains(scope))
    }

    /// Returns whether both have the same id, tenant and filter. Their scopes may differ.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.id() == other.id() && self.tenant() == other.tenant() && self.filter() == other.filter()
    }
}

impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Principal").field("scopes", &self.0.scopes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::event::NewEntry;

    fn of_tenant(tenant: &str) -> Principal {
        principal(Some(tenant), Filter::default())
    }

    fn principal(tenant: Option<&str>, filter: Filter) -> Principal {
        Principal::new("key:x".to_owned(), Vec::new(), tenant.map(str::to_owned), filter, None)
    }

    fn event(payload: &'static str) -> NewEvent {
        NewEvent::parse(Bytes::from_static(payload.as_bytes())).expect("an event")
    }

    #[test]
    fn event_gets_the_tenant_unless_it_names_another() {
        for payload in
            ["{}", r#"{"tenant":"acme"}"#, r#"{"tenant_id":"acme"}"#, r#"{"tenant":null}"#, r#"{"tenant":""}"#]
        {
            let mut event = event(payload);
            assert_eq!(of_tenant("acme").assign_tenant(&mut event), Ok(()), "{payload}");
            assert_eq!(event.tenant(), Some("acme"));
        }
        for payload in [r#"{"tenant":"globex"}"#, r#"{"tenant":"ACME"}"#, r#"{"tenant_id":"globex"}"#] {
            assert_eq!(of_tenant("acme").assign_tenant(&mut event(payload)), Err("acme"), "{payload}");
        }
        let mut foreign = event(r#"{"tenant":"globex"}"#);
        assert_eq!(Principal::unauthenticated().assign_tenant(&mut foreign), Ok(()));
        assert_eq!(foreign.tenant(), Some("globex"));
    }

    #[test]
    fn tenant_of_a_product_schema_counts_without_own_field() {
        let finding = r#"{"class_uid":2004,"metadata":{"tenant_uid":"globex"}}"#;
        let seen = |fields: crate::event::Fields| {
            let entry = Entry { id: crate::event::EntryId::MIN, fields };
            ["acme", "globex"].map(|tenant| of_tenant(tenant).sees(&entry))
        };
        for (publisher, seen_by) in [(of_tenant("acme"), [true, false]), (Principal::unauthenticated(), [false, true])]
        {
            let mut event = event(finding);
            assert_eq!(publisher.assign_tenant(&mut event), Ok(()));
            assert_eq!(seen(event.into_entry(&NewEntry::timestamp_now(), None).fields), seen_by);
        }
        // An entry that the bus did not write.
        assert_eq!(seen([("data".into(), finding.into())].into_iter().collect()), [false, true]);
    }

    #[test]
    fn principal_of_a_tenant_reads_only_its_entries() {
        let entry = |tenant: &'static str| Entry {
            id: crate::event::EntryId::MIN,
            fields: [(Bytes::from_static(b"tenant"), Bytes::from_static(tenant.as_bytes()))].into_iter().collect(),
        };
        assert!(of_tenant("acme").sees(&entry("acme")) && !of_tenant("acme").sees(&entry("globex")));
        assert!(Principal::unauthenticated().sees(&entry("globex")));
        let without_tenant = Entry { id: crate::event::EntryId::MIN, fields: crate::event::Fields::default() };
        assert!(!of_tenant("acme").sees(&without_tenant), "entries without a tenant are not shown");
    }

    #[test]
    fn own_filter_narrows_the_tenant_and_never_widens_it() {
        let entry = |tenant: &'static str, severity: &'static str| Entry {
            id: crate::event::EntryId::MIN,
            fields: [("tenant", tenant), ("severity", severity)]
                .map(|(n, v)| (n.into(), v.into()))
                .into_iter()
                .collect(),
        };
        let severe = || Filter::parse(r#"{"key":"severity","cmp":"gte","val":"high"}"#).expect("a filter");
        let wide =
            Filter::parse(r#"{"op":"or","nodes":[{"key":"tenant","cmp":"exists"},{"key":"severity","cmp":"exists"}]}"#);
        let seen = |principal: &Principal| {
            [("acme", "high"), ("acme", "low"), ("globex", "critical")].map(|(t, s)| principal.sees(&entry(t, s)))
        };
        assert_eq!(seen(&principal(Some("acme"), severe())), [true, false, false]);
        assert_eq!(seen(&principal(Some("acme"), wide.expect("a filter"))), [true, true, false]);
        assert_eq!(seen(&principal(None, severe())), [true, false, true]);
        assert!(principal(None, severe()).is_restricted() && of_tenant("acme").is_restricted());
        assert!(!principal(None, Filter::default()).is_restricted() && !Principal::unauthenticated().is_restricted());
        assert!(principal(None, severe()).is_same(&principal(None, severe())));
        assert!(!principal(None, severe()).is_same(&principal(None, Filter::default())));
        assert!(!principal(Some("acme"), severe()).is_same(&of_tenant("acme")));
    }

    #[test]
    fn dead_letter_counts_as_the_entry_that_it_records() {
        let letter = |severity: &'static str| {
            let fields: crate::event::Fields = [("severity".into(), severity.into())].into_iter().collect();
            let letter = DeadLetter {
                stream: "aurora:alerts".parse().expect("a name"),
                id: crate::event::EntryId::MIN,
                group: "siem".parse().expect("a name"),
                reason: crate::event::DeadLetterReason::Rejected,
                error: String::new(),
                attempts: 1,
                first_failure: jiff::Timestamp::UNIX_EPOCH,
                last_failure: jiff::Timestamp::UNIX_EPOCH,
                replays: 0,
                fields,
            };
            Entry { id: crate::event::EntryId::MIN, fields: letter.to_fields() }
        };
        let severe = Filter::parse(r#"{"key":"severity","cmp":"gte","val":"high"}"#).expect("a filter");
        let severe = principal(None, severe);
        assert!(severe.sees(&letter("critical")) && !severe.sees(&letter("low")));
    }
}
