//! Correlation keys, which tasks for agents and their results have in common.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The correlation keys of a payload, as JSON values.
#[derive(Debug, Default)]
pub(super) struct Envelope<'a> {
    pub(super) task_id: Option<&'a RawValue>,
    pub(super) agent_type: Option<&'a RawValue>,
    pub(super) case_id: Option<&'a RawValue>,
    pub(super) alert_id: Option<&'a RawValue>,
    pub(super) assignment_id: Option<&'a RawValue>,
    pub(super) network_attack_id: Option<&'a RawValue>,
}

impl<'a> Envelope<'a> {
    /// Reads JSON text. Values that are not objects are only checked for syntax.
    pub(super) fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        if text.trim_start().starts_with('{') {
            serde_json::from_str(text)
        } else {
            serde_json::from_str::<IgnoredAny>(text).map(|_| Self::default())
        }
    }
}

/// Returns a value as text if it is a number or a text that is not empty.
pub(super) fn plain(value: Option<&RawValue>) -> Option<Cow<'_, str>> {
    let raw = value?.get();
    let text = if raw.starts_with('"') {
        serde_json::from_str::<Text<'_>>(raw).ok()?.0
    } else {
        let is_number = raw.starts_with(|c: char| c == '-' || c.is_ascii_digit());
        Cow::Borrowed(is_number.then_some(raw)?)
    };
    (!text.is_empty()).then_some(text)
}

/// A text, borrowed if it has no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Envelope<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Envelope<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Envelope<'de>, A::Error> {
                let mut envelope = Envelope::default();
                while let Some(Text(key)) = map.next_key()? {
                    let place = match key.as_ref() {
                        "task_id" => &mut envelope.task_id,
                        "agent_type" => &mut envelope.agent_type,
                        "case_id" => &mut envelope.case_id,
                        "alert_id" => &mut envelope.alert_id,
                        "assignment_id" => &mut envelope.assignment_id,
                        "network_attack_id" => &mut envelope.network_attack_id,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    *place = Some(map.next_value()?);
                }
                Ok(envelope)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_texts_and_numbers() {
        let text = r#" {"task_id":"t\u0031","case_id":7,"alert_id":["x"],"agent_type":"","x":{"task_id":"no"}}"#;
        let envelope = Envelope::parse(text).expect("JSON");
        assert_eq!(plain(envelope.task_id).as_deref(), Some("t1"));
        assert_eq!(plain(envelope.case_id).as_deref(), Some("7"));
        assert_eq!(
            [plain(envelope.alert_id), plain(envelope.agent_type), plain(envelope.assignment_id)],
            [None, None, None]
        );
    }

    #[test]
    fn only_json_is_accepted() {
        for json in ["[1,2]", "7", "null", "\"x\"", " {} "] {
            assert!(Envelope::parse(json).is_ok(), "{json}");
        }
        for bad in ["", "{", "{}{}", "[1,]", "nul", "{\"task_id\":}"] {
            assert!(Envelope::parse(bad).is_err(), "{bad}");
        }
    }
}
