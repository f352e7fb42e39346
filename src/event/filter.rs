//! Filters of entries: one compiled form and one match function for live entries, catch-up, snapshots and ranges.

mod parse;

use std::str;

use crate::event::{AlertView, Entry, Fields, Severity, field};

pub use crate::event::filter::parse::InvalidFilter;

/// A compiled condition on entries. A filter without conditions passes everything.
///
/// The JSON form is a small tree, see [`Filter::parse`]. Matching reads only [`Tags`] and allocates nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    root: Option<FilterNode>,
}

/// The attributes that filters can test, besides the severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    /// The product that raised the alert.
    Source,
    /// The category.
    Category,
    /// The tenant.
    Tenant,
    /// The type of event: `type`, `event_type` or `class_name` of the payload.
    Type,
    /// One line for people.
    Title,
    /// A MITRE ATT&CK technique id. An alert may have several, and one match is enough.
    Technique,
}

impl Attribute {
    /// All attributes with their names in filters.
    const NAMES: [(&'static str, Self); 6] = [
        ("source", Self::Source),
        ("category", Self::Category),
        ("tenant", Self::Tenant),
        ("type", Self::Type),
        ("title", Self::Title),
        ("technique", Self::Technique),
    ];
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum FilterNode {
    /// Every node passes.
    All(Box<[Self]>),
    /// At least one node passes.
    Any(Box<[Self]>),
    Not(Box<Self>),
    Severity(Severities),
    Text(Attribute, TextTest),
}

/// A set of severities, which may contain "unknown".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Severities(u8);

/// A test of a text. Texts are compared byte by byte: `High` is not `high`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum TextTest {
    Exists,
    /// One of these, in order.
    OneOf(Box<[Box<str>]>),
    StartsWith(Box<str>),
    Contains(Box<str>),
}

impl Filter {
    /// Creates a filter for a minimum severity. An unknown severity does not pass.
    pub fn min_severity(floor: Severity) -> Self {
        Self::new(FilterNode::Severity(Severities::at_least(floor)))
    }

    /// Creates a filter for exactly this text.
    pub fn is(attribute: Attribute, text: &str) -> Self {
        Self::new(FilterNode::Text(attribute, TextTest::OneOf(Box::new([text.into()]))))
    }

    /// Returns a filter that passes if both pass. Filters are combined in no other way, so none can widen another.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self.root, other.root) {
            (Some(left), Some(right)) => Self::new(FilterNode::all(vec![left, right])),
            (root, None) | (None, root) => Self { root },
        }
    }

    /// Returns whether everything passes.
    pub fn is_empty(&self) -> bool {
        self.root.is_none()
    }

    /// Returns whether a stored entry passes, judged by its fields, then by its payload.
    pub fn passes(&self, entry: &Entry) -> bool {
        self.is_empty() || self.matches(&Tags::of(entry))
    }

    /// Returns whether an alert with these tags passes. All filtering goes through this function.
    pub fn matches(&self, tags: &Tags) -> bool {
        self.root.as_ref().is_none_or(|root| root.matches(tags))
    }

    fn new(root: FilterNode) -> Self {
        Self { root: Some(root) }
    }
}

impl FilterNode {
    /// Creates a conjunction. Cheap nodes come first.
    fn all(mut nodes: Vec<Self>) -> Self {
        nodes.sort_by_key(Self::cost);
        Self::All(nodes.into())
    }

    /// Creates a disjunction. Cheap nodes come first.
    fn any(mut nodes: Vec<Self>) -> Self {
        nodes.sort_by_key(Self::cost);
        Self::Any(nodes.into())
    }

    /// Estimates the time of a match, with a severity test as the unit.
    fn cost(&self) -> usize {
        match self {
            Self::All(nodes) | Self::Any(nodes) => 1 + nodes.iter().map(Self::cost).sum::<usize>(),
            Self::Not(node) => 1 + node.cost(),
            Self::Severity(_) => 1,
            Self::Text(attribute, test) => {
                let of_one = match test {
                    TextTest::Exists => 1,
                    TextTest::OneOf(texts) => 4 + texts.len().ilog2() as usize,
                    TextTest::StartsWith(_) => 4,
                    TextTest::Contains(_) => 20,
                };
                if *attribute == Attribute::Technique { of_one * 3 } else { of_one }
            }
        }
    }

    fn matches(&self, tags: &Tags) -> bool {
        match self {
            Self::All(nodes) => nodes.iter().all(|node| node.matches(tags)),
            Self::Any(nodes) => nodes.iter().any(|node| node.matches(tags)),
            Self::Not(node) => !node.matches(tags),
            Self::Severity(severities) => severities.contains(tags.severity),
            Self::Text(attribute, test) => {
                let text = match attribute {
                    Attribute::Source => &tags.source,
                    Attribute::Category => &tags.category,
                    Attribute::Tenant => &tags.tenant,
                    Attribute::Type => &tags.kind,
                    Attribute::Title => &tags.title,
                    Attribute::Technique => return tags.techniques.iter().any(|technique| test.holds(technique)),
                };
                text.as_deref().is_some_and(|text| test.holds(text))
            }
        }
    }
}

impl Severities {
    fn only(severity: Option<Severity>) -> Self {
        Self(1 << severity.map_or(0, |severity| severity as u8 + 1))
    }

    fn at_least(floor: Severity) -> Self {
        Self(!(Self::only(Some(floor)).0 - 1))
    }

    fn at_most(ceiling: Severity) -> Self {
        let Self(known) = Self::at_least(Severity::Info);
        Self((Self::only(Some(ceiling)).0 << 1).wrapping_sub(1) & known)
    }

    fn contains(self, severity: Option<Severity>) -> bool {
        self.0 & Self::only(severity).0 != 0
    }
}

impl TextTest {
    fn holds(&self, text: &str) -> bool {
        match self {
            Self::Exists => true,
            Self::OneOf(texts) => match &**texts {
                [one] => **one == *text,
                texts => texts.binary_search_by(|one| (**one).cmp(text)).is_ok(),
            },
            Self::StartsWith(prefix) => text.starts_with(&**prefix),
            Self::Contains(part) => text.contains(&**part),
        }
    }
}

/// The attributes of one alert, read once and matched by any number of filters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags {
    severity: Option<Severity>,
    source: Option<Box<str>>,
    category: Option<Box<str>>,
    tenant: Option<Box<str>>,
    kind: Option<Box<str>>,
    title: Option<Box<str>>,
    techniques: Box<[Box<str>]>,
}

impl Tags {
    /// Reads a stored entry: its fields, and for missing attributes its payload.
    pub fn of(entry: &Entry) -> Self {
        let declared = Self::declared(&entry.fields);
        entry.data().map_or_else(|| declared.clone(), |data| declared.completed(data))
    }

    /// Reads the fields of an entry only.
    pub(crate) fn declared(fields: &Fields) -> Self {
        let text = |name: &str| fields.text(name).filter(|text| !text.is_empty());
        Self {
            severity: text(field::SEVERITY).and_then(|word| word.parse().ok()),
            source: text(field::SOURCE).map(Into::into),
            category: text(field::CATEGORY).map(Into::into),
            tenant: text(field::TENANT).map(Into::into),
            ..Self::default()
        }
    }

    /// Returns the severity from the fields, or else from the payload.
    pub(crate) fn severity(&self, payload: &[u8]) -> Option<Severity> {
        self.severity.or_else(|| AlertView::parse(payload).ok()?.severity)
    }

    /// Returns the tags with missing attributes from the payload.
    pub(crate) fn completed(&self, payload: &[u8]) -> Self {
        let mut tags = self.clone();
        if let Ok(view) = AlertView::parse(payload) {
            tags.severity = tags.severity.or(view.severity);
            tags.source = tags.source.or_else(|| view.source.as_deref().map(Into::into));
            tags.category = tags.category.or_else(|| view.category.as_deref().map(Into::into));
            tags.tenant = tags.tenant.or_else(|| view.tenant.as_deref().map(Into::into));
            tags.kind = view.kind.as_deref().map(Into::into);
            tags.title = view.title.as_deref().map(Into::into);
            tags.techniques = view.techniques.iter().map(|technique| technique.as_ref().into()).collect();
        }
        tags
    }
}

/// Returns the payload if it can be sent as a text message. It must be UTF-8 and not appended for one group alone,
/// because dashboards have seen such an entry before.
pub(crate) fn relayable(entry: &Entry) -> Option<&[u8]> {
    let data = entry.data().map(AsRef::as_ref).filter(|data| str::from_utf8(data).is_ok());
    data.filter(|_| !entry.is_for_one_group())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn tags(pairs: &[(&'static str, &'static str)], payload: &str) -> Tags {
        let fields: Fields = pairs.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect();
        Tags::declared(&fields).completed(payload.as_bytes())
    }

    #[test]
    fn unknown_severity_passes_no_minimum() {
        let unknown = tags(&[], r#"{"severity":"urgent"}"#);
        assert!(!Filter::min_severity(Severity::Info).matches(&unknown));
        assert!(Filter::default().matches(&unknown));
    }

    #[test]
    fn severities_are_sets() {
        use Severity::{Critical, High, Info, Low, Medium};
        let all = [None, Some(Info), Some(Low), Some(Medium), Some(High), Some(Critical)];
        let within = |set: Severities| all.into_iter().filter(|one| set.contains(*one)).collect::<Vec<_>>();
        assert_eq!(within(Severities::at_least(High)), [Some(High), Some(Critical)]);
        assert_eq!(within(Severities::at_least(Info)), all[1..]);
        assert_eq!(within(Severities::at_most(Low)), [Some(Info), Some(Low)]);
        assert_eq!(within(Severities::at_most(Critical)), all[1..]);
        assert_eq!(within(Severities::only(None)), [None]);
    }

    #[test]
    fn fields_come_before_the_payload() {
        let both = tags(&[("severity", "low"), ("source", "zeek")], r#"{"severity":"critical","source":"x"}"#);
        assert!(!Filter::min_severity(Severity::Medium).matches(&both));
        assert!(Filter::is(Attribute::Source, "zeek").matches(&both));
        let odd = tags(&[("severity", "???"), ("source", "")], r#"{"severity":"critical","source":"x"}"#);
        assert!(Filter::min_severity(Severity::Critical).matches(&odd));
        assert!(Filter::is(Attribute::Source, "x").matches(&odd));
    }

    #[test]
    fn every_condition_must_hold() {
        let tags = tags(&[("category", "cps"), ("tenant", "a")], r#"{"severity":"high"}"#);
        let of_tenant = |tenant| {
            Filter::min_severity(Severity::High)
                .and(Filter::is(Attribute::Category, "cps"))
                .and(Filter::default())
                .and(Filter::is(Attribute::Tenant, tenant))
        };
        assert!(of_tenant("a").matches(&tags));
        assert!(!of_tenant("A").matches(&tags), "tenants are compared exactly");
    }

    #[test]
    fn cheap_nodes_are_tested_first() {
        let parse = |text: &str| Filter::parse(text).expect("a filter");
        let slow = r#"{"key":"title","cmp":"contains","val":"x"}"#;
        let fast = r#"{"key":"severity","cmp":"gte","val":"high"}"#;
        for op in ["and", "or"] {
            let [one, other] = [[slow, fast], [fast, slow]]
                .map(|nodes| parse(&format!(r#"{{"op":"{op}","nodes":[{}]}}"#, nodes.join(","))));
            assert_eq!(one, other);
        }
        assert_eq!(parse(slow).and(parse(fast)), parse(fast).and(parse(slow)));
    }

    #[test]
    fn one_of_many_techniques_is_enough() {
        let tags = tags(&[], r#"{"mitre_techniques":["T1021.002","T1569"],"event_type":"alert"}"#);
        assert!(Filter::is(Attribute::Technique, "T1569").matches(&tags));
        assert!(!Filter::is(Attribute::Technique, "T1021").matches(&tags), "a sub-technique is another text");
        assert!(Filter::is(Attribute::Type, "alert").matches(&tags));
    }

    #[test]
    fn matching_allocates_nothing() {
        let alert = tags(
            &[("severity", "high"), ("source", "zeek")],
            r#"{"title":"Remote service creation over SMB","mitre_techniques":["T1021.002","T1569"],"event_type":"alert"}"#,
        );
        let tree = r#"{"op":"and","nodes":[
            {"op":"or","nodes":[
                {"key":"source","cmp":"eq","val":"suricata"},
                {"key":"source","cmp":"in","vals":["edr","wazuh","zeek"]}]},
            {"key":"severity","cmp":"gte","val":"medium"},
            {"key":"technique","cmp":"prefix","val":"T1569"},
            {"key":"title","cmp":"contains","val":"creation"},
            {"key":"type","cmp":"exists"},
            {"op":"not","nodes":[{"key":"tenant","cmp":"eq","val":"x"}]}]}"#;
        let filters = [
            Filter::default(),
            Filter::min_severity(Severity::High).and(Filter::is(Attribute::Source, "zeek")),
            Filter::parse(tree).expect("a filter"),
        ];
        let mut all_pass = true;
        let allocated = allocation_counter::measure(|| all_pass = filters.iter().all(|filter| filter.matches(&alert)));
        assert!(all_pass);
        assert_eq!(allocated.count_total, 0);
        let control = allocation_counter::measure(|| drop(std::hint::black_box(alert.clone())));
        assert!(control.count_total > 0, "allocations are counted");
    }

    #[test]
    fn payload_that_is_not_json_has_only_its_fields() {
        assert!(Filter::min_severity(Severity::High).matches(&tags(&[("severity", "high")], "not json")));
    }
}
