//! One small view over the shapes in which alerts come, for filters and the console.
//!
//! The payload itself is never changed. Nothing is rejected for a value this module does not know: it is then
//! simply absent from the view.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// How severe an alert is, in the five words of the SOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// For information only.
    Info,
    /// Can wait for a day.
    Low,
    /// Can wait for hours.
    Medium,
    /// Within the hour.
    High,
    /// At once.
    Critical,
}

/// The text is none of the five words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a severity is one of critical, high, medium, low, info, not {0:?}")]
pub struct UnknownSeverity(String);

impl Severity {
    /// The lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }

    /// OCSF `severity_id`: 1 informational to 5 critical, 6 fatal.
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

    /// Suricata's `alert.severity`: 1 is the worst, 4 the least.
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

/// What filters and the console read of an alert, whatever its shape: API alerts, normalizer events, OCSF findings,
/// Suricata EVE, and any of these inside a `CloudEvents` 1.0 envelope.
#[derive(Debug, Default, PartialEq)]
pub struct AlertView<'a> {
    /// The alert's own id.
    pub id: Option<Cow<'a, str>>,
    /// Absent when the shape or the word is unknown.
    pub severity: Option<Severity>,
    /// One line for people.
    pub title: Option<Cow<'a, str>>,
    /// What raised it.
    pub source: Option<Cow<'a, str>>,
    /// Its category, as the shape has it: `cps`, `Potentially Bad Traffic`, `Findings`.
    pub category: Option<Cow<'a, str>>,
    /// Whose alert it is.
    pub tenant: Option<Cow<'a, str>>,
    /// The tenant is only what OCSF's `metadata` says, by the names of the product that raised the alert: who publishes
    /// it, or where, says better whose it is.
    pub(super) is_tenant_of_product: bool,
    /// What kind of event it is: `type`, `event_type` or OCSF's `class_name`.
    pub kind: Option<Cow<'a, str>>,
    /// When it happened, milliseconds since 1970, where the shape gives a number.
    pub time_ms: Option<i64>,
    /// MITRE ATT&CK technique ids.
    pub techniques: Vec<Cow<'a, str>>,
    /// The W3C trace that the payload itself carries.
    pub traceparent: Option<Cow<'a, str>>,
}

/// How many `CloudEvents` envelopes an alert may be inside of, one in the other.
const ENVELOPES: u8 = 4;

impl<'a> AlertView<'a> {
    /// Reads a payload. Fails only where it is not one JSON object.
    pub fn parse(data: &'a [u8]) -> Result<Self, serde_json::Error> {
        let raw: Raw<'a> = serde_json::from_slice(data)?;
        Ok(raw.into_view(ENVELOPES))
    }

    /// The same for text that is known to be UTF-8.
    pub(super) fn parse_text(data: &'a str) -> Result<Self, serde_json::Error> {
        let raw: Raw<'a> = serde_json::from_str(data)?;
        Ok(raw.into_view(ENVELOPES))
    }
}

/// The members of any of the shapes, before it is known which one it is.
#[derive(Default)]
struct Raw<'a> {
    id: Loose<'a>,
    severity: Loose<'a>,
    severity_id: Loose<'a>,
    title: Loose<'a>,
    message: Loose<'a>,
    source: Loose<'a>,
    category: Loose<'a>,
    tenant: Loose<'a>,
    tenant_id: Loose<'a>,
    time: Loose<'a>,
    timestamp_ms: Loose<'a>,
    traceparent: Loose<'a>,
    kind: Loose<'a>,
    event_type: Loose<'a>,
    class_name: Loose<'a>,
    techniques: Texts<'a>,
    is_cloud_event: bool,
    data: Option<&'a RawValue>,
    suricata: Option<&'a RawValue>,
    is_ocsf: bool,
    category_name: Option<&'a RawValue>,
    metadata: Option<&'a RawValue>,
    finding: Option<&'a RawValue>,
    attacks: Option<&'a RawValue>,
}

impl<'a> Raw<'a> {
    /// `envelopes` is how many more it may be inside of: what is deeper is no alert, and must not become a deep stack.
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
            Loose::Text(text) => text.parse().ok(),
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

    /// What Suricata and OCSF keep in objects inside the alert.
    fn nested(&self) -> AlertView<'a> {
        let mut view = AlertView::default();
        let is_suricata = matches!(&self.event_type, Loose::Text(kind) if kind == "alert");
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

impl<'de> Deserialize<'de> for Raw<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Raw<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw<'de>, A::Error> {
                let mut raw = Raw::default();
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
                        // As OCSF called it up to 1.0.
                        "finding" => raw.finding = raw.finding.or(map.next_value()?),
                        "finding_info" => raw.finding = map.next_value::<Option<_>>()?.or(raw.finding),
                        "attacks" => raw.attacks = map.next_value()?,
                        "specversion" => {
                            let version: Loose<'de> = map.next_value()?;
                            raw.is_cloud_event = matches!(version, Loose::Text(v) if v == "1.0");
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

/// An object's key, borrowed where the text allows it.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// A value of which only texts and integers are of interest.
#[derive(Default)]
enum Loose<'a> {
    Text(Cow<'a, str>),
    Integer(i64),
    #[default]
    Other,
}

impl<'a> Loose<'a> {
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

impl<'de: 'a, 'a> Deserialize<'de> for Loose<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Loose<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Loose<'de>, E> {
                Ok(Loose::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Loose<'de>, E> {
                Ok(Loose::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Loose<'de>, E> {
                Ok(Loose::Integer(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Loose<'de>, E> {
                Ok(i64::try_from(number).map_or(Loose::Other, Loose::Integer))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }

            fn visit_unit<E>(self) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Loose<'de>, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Loose::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Loose::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// The texts of an array, or of nothing.
#[derive(Default)]
struct Texts<'a>(Vec<Cow<'a, str>>);

impl<'de> Deserialize<'de> for Texts<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw: &'de RawValue = Deserialize::deserialize(deserializer)?;
        let items: Vec<Loose<'de>> = serde_json::from_str(raw.get()).unwrap_or_default();
        Ok(Self(items.into_iter().filter_map(Loose::text).collect()))
    }
}

/// A value on its own: one that can't be read is of no interest, and takes nothing else with it.
fn loose(value: Option<&RawValue>) -> Loose<'_> {
    value.and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default()
}

/// The elements of an array, or of nothing.
fn elements(value: Option<&RawValue>) -> impl Iterator<Item = &RawValue> {
    let elements: Vec<&RawValue> = value.and_then(|value| serde_json::from_str(value.get()).ok()).unwrap_or_default();
    elements.into_iter()
}

/// The members of these names of an object; of any other value there are none.
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

    // What was found before a key that can't be read stands.
    serde_json::Deserializer::from_str(value.get()).deserialize_map(Find(names, found)).unwrap_or_default();
}

#[cfg(test)]
mod tests;
