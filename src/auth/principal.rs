//! Who asks, and what they may do.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::auth::scope::{Action, Scope};
use crate::event::{Attribute, Filter};
use crate::event::{DeadLetter, Entry, NewEvent};

/// Whoever made a request. Cheap to clone.
#[derive(Clone, PartialEq)]
pub(crate) struct Principal(Arc<Who>);

#[derive(PartialEq)]
struct Who {
    /// Nothing where nobody is asked for credentials.
    id: Option<Arc<str>>,
    scopes: Vec<Scope>,
    tenant: Option<Box<str>>,
    /// What of the entries this one may see: its tenant's, and of those what passes its own filter.
    sight: Filter,
    expires_at: Option<SystemTime>,
}

impl Principal {
    /// Whoever there is, where nobody is asked for credentials.
    pub(crate) fn anyone() -> Self {
        let scopes = vec![Scope::Admin];
        Self(Arc::new(Who { id: None, scopes, tenant: None, sight: Filter::default(), expires_at: None }))
    }

    pub(crate) fn new(
        id: String,
        scopes: Vec<Scope>,
        tenant: Option<String>,
        filter: Filter,
        expires_at: Option<SystemTime>,
    ) -> Self {
        let sight = tenant.as_ref().map(|tenant| Filter::is(Attribute::Tenant, tenant)).unwrap_or_default().and(filter);
        let tenant = tenant.map(String::into_boxed_str);
        Self(Arc::new(Who { id: Some(id.into()), scopes, tenant, sight, expires_at }))
    }

    /// `key:<name>`, or the issuer and subject of a token; nothing where nobody is asked for credentials.
    pub(crate) fn id(&self) -> Option<&str> {
        self.0.id.as_deref()
    }

    pub(crate) fn shared_id(&self) -> Option<Arc<str>> {
        self.0.id.clone()
    }

    /// The tenant that this one is bound to.
    pub(crate) fn tenant(&self) -> Option<&str> {
        self.0.tenant.as_deref()
    }

    pub(crate) fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at
    }

    pub(crate) fn may(&self, deed: Action<'_>) -> bool {
        self.0.scopes.iter().any(|scope| scope.allows(deed))
    }

    /// What of the entries this one may see at most.
    pub(crate) fn sight(&self) -> &Filter {
        &self.0.sight
    }

    /// Whether there are entries that this one may not see: then nothing is for it that is of all of them.
    pub(crate) fn is_bounded(&self) -> bool {
        !self.0.sight.is_empty()
    }

    /// Whether this one may see an entry; a dead letter is judged as the entry that it was before.
    pub(crate) fn sees(&self, entry: &Entry) -> bool {
        if !self.is_bounded() {
            return true;
        }
        match DeadLetter::from_entry(entry) {
            Some(letter) => self.0.sight.passes(&Entry { id: letter.id, fields: letter.fields }),
            None => self.0.sight.passes(entry),
        }
    }

    /// Makes an event the tenant's, whose it must be if it says. Fails with the tenant that it must be of.
    pub(crate) fn claim(&self, event: &mut NewEvent) -> Result<(), &str> {
        let Some(tenant) = self.tenant() else { return Ok(()) };
        event.set_tenant(tenant);
        if event.tenant() == Some(tenant) { Ok(()) } else { Err(tenant) }
    }

    /// Whether it may do whatever the other may.
    pub(crate) fn may_all_of(&self, other: &Self) -> bool {
        self.0.scopes.contains(&Scope::Admin) || other.0.scopes.iter().all(|scope| self.0.scopes.contains(scope))
    }

    /// Whether it is the same one, that sees the same, whatever it may do.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.id() == other.id() && self.tenant() == other.tenant() && self.sight() == other.sight()
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

    fn bound(tenant: &str) -> Principal {
        principal(Some(tenant), Filter::default())
    }

    fn principal(tenant: Option<&str>, filter: Filter) -> Principal {
        Principal::new("key:x".to_owned(), Vec::new(), tenant.map(str::to_owned), filter, None)
    }

    fn event(payload: &'static str) -> NewEvent {
        NewEvent::parse(Bytes::from_static(payload.as_bytes())).expect("an event")
    }

    #[test]
    fn an_event_becomes_the_tenants_unless_it_is_anothers() {
        for payload in
            ["{}", r#"{"tenant":"acme"}"#, r#"{"tenant_id":"acme"}"#, r#"{"tenant":null}"#, r#"{"tenant":""}"#]
        {
            let mut event = event(payload);
            assert_eq!(bound("acme").claim(&mut event), Ok(()), "{payload}");
            assert_eq!(event.tenant(), Some("acme"));
        }
        for payload in [r#"{"tenant":"globex"}"#, r#"{"tenant":"ACME"}"#, r#"{"tenant_id":"globex"}"#] {
            assert_eq!(bound("acme").claim(&mut event(payload)), Err("acme"), "{payload}");
        }
        let mut anothers = event(r#"{"tenant":"globex"}"#);
        assert_eq!(Principal::anyone().claim(&mut anothers), Ok(()));
        assert_eq!(anothers.tenant(), Some("globex"));
    }

    #[test]
    fn what_a_product_calls_its_tenant_counts_where_nothing_else_tells() {
        let finding = r#"{"class_uid":2004,"metadata":{"tenant_uid":"globex"}}"#;
        let seen = |fields: crate::event::Fields| {
            let entry = Entry { id: crate::event::EntryId::MIN, fields };
            ["acme", "globex"].map(|tenant| bound(tenant).sees(&entry))
        };
        for (publisher, seen_by) in [(bound("acme"), [true, false]), (Principal::anyone(), [false, true])] {
            let mut event = event(finding);
            assert_eq!(publisher.claim(&mut event), Ok(()));
            assert_eq!(seen(event.into_entry(&NewEntry::timestamp_now(), None).fields), seen_by);
        }
        // As written by others than the bus.
        assert_eq!(seen([("data".into(), finding.into())].into_iter().collect()), [false, true]);
    }

    #[test]
    fn a_bound_principal_sees_its_tenant_alone() {
        let entry = |tenant: &'static str| Entry {
            id: crate::event::EntryId::MIN,
            fields: [(Bytes::from_static(b"tenant"), Bytes::from_static(tenant.as_bytes()))].into_iter().collect(),
        };
        assert!(bound("acme").sees(&entry("acme")) && !bound("acme").sees(&entry("globex")));
        assert!(Principal::anyone().sees(&entry("globex")));
        let nobodys = Entry { id: crate::event::EntryId::MIN, fields: crate::event::Fields::default() };
        assert!(!bound("acme").sees(&nobodys), "what is nobody's is not this one's either");
    }

    #[test]
    fn an_own_filter_narrows_what_a_tenant_may_see_and_never_widens_it() {
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
        assert!(principal(None, severe()).is_bounded() && bound("acme").is_bounded());
        assert!(!principal(None, Filter::default()).is_bounded() && !Principal::anyone().is_bounded());
        assert!(principal(None, severe()).is_same(&principal(None, severe())));
        assert!(!principal(None, severe()).is_same(&principal(None, Filter::default())));
        assert!(!principal(Some("acme"), severe()).is_same(&bound("acme")));
    }

    #[test]
    fn a_dead_letter_is_judged_as_the_entry_that_it_was() {
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
