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
    /// Its category, lower-case in all shapes we know.
    pub category: Option<Cow<'a, str>>,
    /// Whose alert it is.
    pub tenant: Option<Cow<'a, str>>,
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
    is_cloud_event: bool,
    techniques: Texts<'a>,
    suricata: Suricata<'a>,
    data: Option<&'a RawValue>,
}

impl<'a> Raw<'a> {
    /// `envelopes` is how many it may be yet: what is deeper is no alert, and must not become a deep stack.
    fn into_view(self, envelopes: u8) -> AlertView<'a> {
        if self.is_cloud_event
            && let Some(fewer) = envelopes.checked_sub(1)
            && let Some(inner) = self.data.and_then(|data| serde_json::from_str::<Self>(data.get()).ok())
        {
            let mut view = inner.into_view(fewer);
            view.id = self.id.text().or(view.id);
            view.source = view.source.or(self.source.text());
            view.tenant = view.tenant.or(self.tenant.text());
            view.kind = view.kind.or(self.kind.text());
            view.traceparent = self.traceparent.text().or(view.traceparent);
            return view;
        }
        let is_suricata = matches!(&self.event_type, Loose::Text(kind) if kind == "alert");
        let suricata_severity = is_suricata.then_some(self.suricata.severity).flatten();
        let word = match &self.severity {
            Loose::Text(text) => text.parse().ok(),
            _ => None,
        };
        AlertView {
            id: self.id.text(),
            severity: word
                .or_else(|| self.severity_id.integer().and_then(Severity::from_ocsf))
                .or_else(|| suricata_severity.and_then(Severity::from_suricata)),
            title: self.title.text().or(self.suricata.signature).or(self.message.text()),
            source: self.source.text().or(is_suricata.then_some(Cow::Borrowed("suricata"))),
            category: self.category.text(),
            tenant: self.tenant.text().or(self.tenant_id.text()),
            kind: self.kind.text().or(self.event_type.text()).or(self.class_name.text()),
            time_ms: self.timestamp_ms.integer().or(self.time.integer()),
            techniques: self.techniques.0,
            traceparent: self.traceparent.text(),
        }
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

/// The part of a Suricata EVE alert that matters here.
#[derive(Default)]
struct Suricata<'a> {
    severity: Option<i64>,
    signature: Option<Cow<'a, str>>,
}

impl<'de> Deserialize<'de> for Suricata<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Alert<'a> {
            #[serde(borrow, default)]
            severity: Loose<'a>,
            #[serde(borrow, default)]
            signature: Loose<'a>,
        }

        let raw: &'de RawValue = Deserialize::deserialize(deserializer)?;
        let alert: Option<Alert<'de>> = serde_json::from_str(raw.get()).ok();
        Ok(alert.map_or_else(Self::default, |a| Self { severity: a.severity.integer(), signature: a.signature.text() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(json: &str) -> AlertView<'_> {
        AlertView::parse(json.as_bytes()).expect("a JSON object")
    }

    #[test]
    fn every_known_shape_reads_alike() {
        let cases = [
            (r#"{"severity":"high","source":"wazuh","title":"t"}"#, Some(Severity::High), Some("wazuh"), Some("t")),
            (
                r#"{"severity":"Critical","source":"mqtt","category":"cps","timestamp_ms":5}"#,
                Some(Severity::Critical),
                Some("mqtt"),
                None,
            ),
            (
                r#"{"class_uid":2004,"severity_id":6,"severity":"Fatal","message":"m"}"#,
                Some(Severity::Critical),
                None,
                Some("m"),
            ),
            (r#"{"class_uid":2004,"severity_id":3,"severity":"Moderate"}"#, Some(Severity::Medium), None, None),
            (
                r#"{"event_type":"alert","alert":{"severity":2,"signature":"ET"}}"#,
                Some(Severity::High),
                Some("suricata"),
                Some("ET"),
            ),
            (r#"{"event_type":"dns","alert":{"severity":1}}"#, None, None, None),
            (
                r#"{"data":{"severity":"low"},"specversion":"1.0","source":"/edge","id":"e1"}"#,
                Some(Severity::Low),
                Some("/edge"),
                None,
            ),
            (
                r#"{"severity":["high"],"source":{"a":1},"title":7,"alert":"x","mitre_techniques":"T1"}"#,
                None,
                None,
                None,
            ),
        ];
        for (json, severity, source, title) in cases {
            let view = view(json);
            assert_eq!(
                (view.severity, view.source.as_deref(), view.title.as_deref()),
                (severity, source, title),
                "{json}"
            );
        }
    }

    #[test]
    fn techniques_and_times_are_read_where_they_are_plain() {
        let view = view(r#"{"mitre_techniques":["T1071.001",5,"T1059"],"time":1700239437000}"#);
        assert_eq!(view.techniques, ["T1071.001", "T1059"]);
        assert_eq!(view.time_ms, Some(1_700_239_437_000));
    }

    #[test]
    fn an_alert_is_found_in_a_few_envelopes_and_any_number_of_them_is_no_harm() {
        let wrapped = |times: usize| {
            let (open, close) = (r#"{"specversion":"1.0","data":"#.repeat(times), "}".repeat(times));
            format!(r#"{open}{{"title":"t"}}{close}"#)
        };
        for (times, title) in [(1, Some("t")), (4, Some("t")), (5, None), (30_000, None)] {
            assert_eq!(view(&wrapped(times)).title.as_deref(), title, "{times}");
        }
    }

    #[test]
    fn an_escaped_text_is_unescaped() {
        assert_eq!(view(r#"{"title":"a\"b\u0041"}"#).title.as_deref(), Some("a\"bA"));
    }

    #[test]
    fn severities_order_from_info_to_critical() {
        assert!(Severity::Critical > Severity::High && Severity::Low > Severity::Info);
        assert!("urgent".parse::<Severity>().is_err());
    }
}
