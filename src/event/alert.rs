//! One view over the formats of alerts, for filters and the console.
//!
//! The payload is never changed. Unknown values are no error: they are absent from the view.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The severity of an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// For information only.
    Info,
    /// Can wait for a day.
    Low,
    /// Can wait for hours.
    Medium,
    /// Needs action within the hour.
    High,
    /// Needs action at once.
    Critical,
}

/// A text that is not a severity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a severity must be critical, high, medium, low or info, not {0:?}")]
pub struct UnknownSeverity(String);

impl Severity {
    /// Returns the word in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }

    /// Converts an OCSF `severity_id`: 1 informational to 5 critical, 6 fatal.
    const fn from_ocsf(id: i64) -> Option<Self> {
        match id {
            1 => Some(Self::Info),
            2 => Some(Self::Low),
            3 => Some(Self::Medium),
            4 => Some(Self::High),
            5 | 6 => Some(Self::Critical),
            _ => None,
        }
    }

    /// Converts `alert.severity` of Suricata: 1 is the highest, 4 the lowest.
    const fn from_suricata(level: i64) -> Option<Self> {
        match level {
            1 => Some(Self::Critical),
            2 => Some(Self::High),
            3 => Some(Self::Medium),
            4 => Some(Self::Low),
            _ => None,
        }
    }
}

impl FromStr for Severity {
    type Err = UnknownSeverity;

    fn from_str(text: &str) -> Result<Self, UnknownSeverity> {
        const WORDS: [(&str, Severity); 8] = [
            ("critical", Severity::Critical),
            ("high", Severity::High),
            ("medium", Severity::Medium),
            ("low", Severity::Low),
            ("info", Severity::Info),
            ("informational", Severity::Info),
            ("information", Severity::Info),
            ("fatal", Severity::Critical),
        ];
        let found = WORDS.iter().find(|(word, _)| text.eq_ignore_ascii_case(word));
        found.map(|(_, severity)| *severity).ok_or_else(|| UnknownSeverity(text.chars().take(32).collect()))
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The properties of an alert in any known format: API alerts, normalizer events, OCSF findings, Suricata EVE, and each
/// of these inside a `CloudEvents` 1.0 envelope.
#[derive(Debug, Default, PartialEq)]
pub struct AlertView<'a> {
    /// The id of the alert.
    pub id: Option<Cow<'a, str>>,
    /// The severity. Absent if the format or the word is unknown.
    pub severity: Option<Severity>,
    /// One line for people.
    pub title: Option<Cow<'a, str>>,
    /// The product that raised it.
    pub source: Option<Cow<'a, str>>,
    /// The category in the words of the format: `cps`, `Potentially Bad Traffic`, `Findings`.
    pub category: Option<Cow<'a, str>>,
    /// The tenant.
    pub tenant: Option<Cow<'a, str>>,
    /// Whether the tenant is from OCSF `metadata`, and so in the terms of the product. Then the publisher or the stream
    /// decides about the tenant.
    pub(super) is_tenant_of_product: bool,
    /// The type of event: `type`, `event_type` or the OCSF `class_name`.
    pub kind: Option<Cow<'a, str>>,
    /// Time of the event in milliseconds since 1970, if the format has a number.
    pub time_ms: Option<i64>,
    /// MITRE ATT&CK technique ids.
    pub techniques: Vec<Cow<'a, str>>,
    /// The W3C trace context of the payload.
    pub traceparent: Option<Cow<'a, str>>,
}

/// Maximum number of nested `CloudEvents` envelopes.
const ENVELOPES: u8 = 4;

impl<'a> AlertView<'a> {
    /// Reads a payload. Fails only if it is not one JSON object.
    pub fn parse(data: &'a [u8]) -> Result<Self, serde_json::Error> {
        let raw: RawAlert<'a> = serde_json::from_slice(data)?;
        Ok(raw.into_view(ENVELOPES))
    }

    /// Reads a payload that is known to be UTF-8.
    pub(super) fn parse_text(data: &'a str) -> Result<Self, serde_json::Error> {
        let raw: RawAlert<'a> = serde_json::from_str(data)?;
        Ok(raw.into_view(ENVELOPES))
    }
}

/// The properties of all formats, before the format is known. Its 24 fields are a parse buffer for one pass over the
/// JSON: a map or nested structs would allocate.
#[derive(Default)]
struct RawAlert<'a> {
    id: LooseValue<'a>,
    severity: LooseValue<'a>,
    severity_id: LooseValue<'a>,
    title: LooseValue<'a>,
    message: LooseValue<'a>,
    source: LooseValue<'a>,
    category: LooseValue<'a>,
    tenant: LooseValue<'a>,
    tenant_id: LooseValue<'a>,
    time: LooseValue<'a>,
    timestamp_ms: LooseValue<'a>,
    traceparent: LooseValue<'a>,
    kind: LooseValue<'a>,
    event_type: LooseValue<'a>,
    class_name: LooseValue<'a>,
    techniques: TextArray<'a>,
    is_cloud_event: bool,
    data: Option<&'a RawValue>,
    suricata: Option<&'a RawValue>,
    is_ocsf: bool,
    category_name: Option<&'a RawValue>,
    metadata: Option<&'a RawValue>,
    finding: Option<&'a RawValue>,
    attacks: Option<&'a RawValue>,
}

impl<'a> RawAlert<'a> {
    /// Converts to a view. `envelopes` limits the nesting, because a deep one must not overflow the stack.
    fn into_view(self, envelopes: u8) -> AlertView<'a> {
        if self.is_cloud_event
            && let Some(fewer) = envelopes.checked_sub(1)
            && let Some(inner) = self.data.and_then(|data| serde_json::from_str::<Self>(data.get()).ok())
        {
            let mut view = inner.into_view(fewer);
            view.id = self.id.text().or(view.id);
            view.source = view.source.or(self.source.text());
            view.kind = view.kind.or(self.kind.text());
            view.traceparent = self.traceparent.text().or(view.traceparent);
            if (view.tenant.is_none() || view.is_tenant_of_product)
                && let Some(tenant) = self.tenant.text()
            {
                view.tenant = Some(tenant);
                view.is_tenant_of_product = false;
            }
            return view;
        }
        let nested = self.nested();
        let word = match &self.severity {
            LooseValue::Text(text) => text.parse().ok(),
            _ => None,
        };
        let tenant = self.tenant.text().or(self.tenant_id.text());
        let mut techniques = self.techniques.0;
        techniques.extend(nested.techniques);
        AlertView {
            id: self.id.text(),
            severity: word.or_else(|| self.severity_id.integer().and_then(Severity::from_ocsf)).or(nested.severity),
            title: self.title.text().or(nested.title).or(self.message.text()),
            source: self.source.text().or(nested.source),
            category: self.category.text().or(nested.category),
            is_tenant_of_product: tenant.is_none() && nested.tenant.is_some(),
            tenant: tenant.or(nested.tenant),
            kind: self.kind.text().or(self.event_type.text()).or(self.class_name.text()),
            time_ms: self.timestamp_ms.integer().or(self.time.integer()),
            techniques,
            traceparent: self.traceparent.text(),
        }
    }

    /// Returns the properties that Suricata and OCSF keep in objects inside the alert.
    fn nested(&self) -> AlertView<'a> {
        let mut view = AlertView::default();
        let is_suricata = matches!(&self.event_type, LooseValue::Text(kind) if kind == "alert");
        if is_suricata {
            view.source = Some(Cow::Borrowed("suricata"));
        }
        if self.suricata.is_some() {
            let [severity, signature, category, metadata] =
                members(self.suricata, ["severity", "signature", "category", "metadata"]);
            view.severity = loose(severity).integer().and_then(Severity::from_suricata).filter(|_| is_suricata);
            view.title = loose(signature).text();
            view.category = loose(category).text();
            let [techniques] = members(metadata, ["mitre_technique_id"]);
            view.techniques = elements(techniques).filter_map(|technique| loose(Some(technique)).text()).collect();
        }
        if !self.is_ocsf {
            return view;
        }
        let [product, tenant] = members(self.metadata, ["product", "tenant_uid"]);
        let [product] = members(product, ["name"]);
        let [title, attacks] = members(self.finding, ["title", "attacks"]);
        view.source = view.source.or_else(|| loose(product).text());
        view.title = view.title.or_else(|| loose(title).text());
        view.category = view.category.or_else(|| loose(self.category_name).text());
        view.tenant = loose(tenant).text();
        for attack in elements(self.attacks).chain(elements(attacks)) {
            for technique in members(Some(attack), ["technique", "sub_technique"]) {
                let [uid] = members(technique, ["uid"]);
                view.techniques.extend(loose(uid).text());
            }
        }
        view
    }
}

impl<'de> Deserialize<'de> for RawAlert<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = RawAlert<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawAlert<'de>, A::Error> {
                let mut raw = RawAlert::default();
                while let Some(Key(key)) = map.next_key()? {
                    match key.as_ref() {
                        "id" => raw.id = map.next_value()?,
                        "severity" => raw.severity = map.next_value()?,
                        "severity_id" => raw.severity_id = map.next_value()?,
                        "title" => raw.title = map.next_value()?,
                        "message" => raw.message = map.next_value()?,
                        "source" => raw.source = map.next_value()?,
                        "category" => raw.category = map.next_value()?,
                        "tenant" => raw.tenant = map.next_value()?,
                        "tenant_id" => raw.tenant_id = map.next_value()?,
                        "time" => raw.time = map.next_value()?,
                        "timestamp_ms" => raw.timestamp_ms = map.next_value()?,
                        "traceparent" => raw.traceparent = map.next_value()?,
                        "type" => raw.kind = map.next_value()?,
                        "class_name" => raw.class_name = map.next_value()?,
                        "event_type" => raw.event_type = map.next_value()?,
                        "mitre_techniques" => raw.techniques = map.next_value()?,
                        "alert" => raw.suricata = map.next_value()?,
                        "class_uid" => raw.is_ocsf = map.next_value::<Option<IgnoredAny>>()?.is_some(),
                        "category_name" => raw.category_name = map.next_value()?,
                        "metadata" => raw.metadata = map.next_value()?,
                        // The name up to OCSF 1.0.
                        "finding" => raw.finding = raw.finding.or(map.next_value()?),
                        "finding_info" => raw.finding = map.next_value::<Option<_>>()?.or(raw.finding),
                        "attacks" => raw.attacks = map.next_value()?,
                        "specversion" => {
                            let version: LooseValue<'de> = map.next_value()?;
                            raw.is_cloud_event = matches!(version, LooseValue::Text(v) if v == "1.0");
                        }
                        "data" => raw.data = Some(map.next_value()?),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(raw)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// A key of an object, borrowed if it has no escapes.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// A value that is a text, an integer, or irrelevant.
#[derive(Default)]
enum LooseValue<'a> {
    Text(Cow<'a, str>),
    Integer(i64),
    #[default]
    Other,
}

impl<'a> LooseValue<'a> {
    fn text(self) -> Option<Cow<'a, str>> {
        match self {
            Self::Text(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    fn integer(&self) -> Option<i64> {
        match self {
            Self::Integer(number) => Some(*number),
            _ => None,
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for LooseValue<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = LooseValue<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<LooseValue<'de>, E> {
                Ok(i64::try_from(number).map_or(LooseValue::Other, LooseValue::Integer))
            }

            fn visit_f64<E>(self, _: f64) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Other)
            }

            fn visit_unit<E>(self) -> Result<LooseValue<'de>, E> {
                Ok(LooseValue::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LooseValue<'de>, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(LooseValue::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LooseValue<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(LooseValue::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// The texts of an array, or none.
#[derive(Default)]
struct TextArray<'a>(Vec<Cow<'a, str>>);

impl<'de> Deserialize<'de> for TextArray<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw: &'de RawValue = Deserialize::deserialize(deserializer)?;
        let items: Vec<LooseValue<'de>> = serde_json::from_str(raw.get()).unwrap_or_default();
        Ok(Self(items.into_iter().filter_map(LooseValue::text).collect()))
    }
}

/// Reads a value on its own, so that an unreadable one is ignored without others.
fn loose(value: Option<&RawValue>) -> LooseValue<'_> {
    value.and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default()
}

/// Returns the elements of an array, or none.
fn elements(value: Option<&RawValue>) -> impl Iterator<Item = &RawValue> {
    let elements: Vec<&RawValue> = value.and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default();
    elements.into_iter()
}

/// Returns the named properties of an object. Other values have none.
fn members<'a, const N: usize>(value: Option<&'a RawValue>, names: [&str; N]) -> [Option<&'a RawValue>; N] {
    let mut found = [None; N];
    if let Some(value) = value {
        find(value, &names, &mut found);
    }
    found
}

fn find<'a>(value: &'a RawValue, names: &[&str], found: &mut [Option<&'a RawValue>]) {
    struct Find<'f, 'a>(&'f [&'f str], &'f mut [Option<&'a RawValue>]);

    impl<'de> Visitor<'de> for Find<'_, 'de> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(Key(key)) = map.next_key()? {
                let place = self.0.iter().position(|name| *name == key);
                match place.and_then(|place| self.1.get_mut(place)) {
                    Some(found) => *found = map.next_value()?,
                    None => drop(map.next_value::<IgnoredAny>()?),
                }
            }
            Ok(())
        }
    }

    // Properties before an unreadable key are kept.
    serde_json::Deserializer::from_str(value.get()).deserialize_map(Find(names, found)).unwrap_or_default();
}

#[cfg(test)]
mod tests;
