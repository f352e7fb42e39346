//! The parameters of a subscription, in the query of its URL.

use std::mem;
use std::str::FromStr;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo, Timestamp};

use crate::event::{Attribute, Filter, Position, StreamName};

/// The maximum number of entries of a snapshot.
pub const MAX_SNAPSHOT: usize = 1000;

/// The maximum length of a text to compare with, in bytes.
const MAX_TEXT: usize = 256;

/// The maximum number of positions in `since`: more streams than any channel has.
const MAX_POSITIONS: usize = 64;

/// The start, filter and encoding of a subscription.
///
/// | parameter | value |
/// |---|---|
/// | `since` | positions (`<epoch>:<ms>-<seq>` per stream, comma-separated), an RFC 3339 time, `-15m`, or `earliest` |
/// | `snapshot` | 0 to 1000: start with this number of newest matching entries, then live; ignored with `since` |
/// | `min_severity` | `info`, `low`, `medium`, `high` or `critical` |
/// | `source`, `category`, `tenant`, `type`, `technique` | this exact text |
/// | `filter` | a filter as JSON, see [`Filter::parse`]; an entry must pass it and all conditions above |
/// | `stream` | one of the channel's streams instead of all |
/// | `key` | the key of the channel's families |
/// | `meta` | `1`: each alert carries `_pos` and `_stream` |
/// | `mode` | `lossless`, or `latest`: entries that a live client is too slow for are skipped |
/// | `lane` | `critical`: critical alerts are sent early when the client is far behind; or `off` |
/// | `strict` | `1`: the client is closed after a gap |
///
/// Unknown names are ignored, so that tokens and cache busters can be in the same query. Invalid values and repeated
/// names are rejected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a parameter of its own")]
pub struct SubscribeParams {
    /// The start. Without it the subscription starts with the next entry.
    pub since: Option<Since>,
    /// The number of newest matching alerts to start with, if `since` is absent.
    pub snapshot: usize,
    /// The filter of entries.
    pub filter: Filter,
    /// Whether each alert carries its position and stream.
    pub meta: bool,
    /// One stream of the channel instead of all.
    pub stream: Option<StreamName>,
    /// The key of the channel's families.
    pub key: Option<String>,
    /// Whether a live client that falls behind the ring continues with the newest entries, without catching up.
    pub is_latest: bool,
    /// Whether critical alerts are sent early when the client is far behind.
    pub has_lane: bool,
    /// Whether the client is closed after a gap.
    pub is_strict: bool,
}

/// A start position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// The oldest entry of the stream.
    Earliest,
    /// This long before now.
    Ago(Duration),
    /// The first entry at or after this time.
    Time(Timestamp),
    /// The first entry after each of these positions, one per stream.
    Positions(Vec<Position>),
}

/// A parameter whose value is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` {problem}")]
pub struct BadParameter {
    /// The name of the parameter.
    pub name: &'static str,
    /// The fault, and the allowed values.
    pub problem: String,
}

impl BadParameter {
    pub(crate) fn new(name: &'static str, problem: impl Into<String>) -> Self {
        Self { name, problem: problem.into() }
    }
}

impl SubscribeParams {
    /// Parses the query of a URL, without its question mark.
    pub fn parse(query: &str) -> Result<Self, BadParameter> {
        Self::read(query, &NAMES)
    }

    fn read(query: &str, names: &[&'static str]) -> Result<Self, BadParameter> {
        let mut seen = Vec::new();
        let mut params = Self::default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let Some(name) = names.iter().copied().find(|known| *known == name) else { continue };
            if seen.contains(&name) {
                return Err(BadParameter::new(name, "is given twice, must be given once"));
            }
            seen.push(name);
            params.set(name, &value).map_err(|problem| BadParameter { name, problem })?;
        }
        Ok(params)
    }

    fn set(&mut self, name: &'static str, value: &str) -> Result<(), String> {
        match name {
            "since" => self.since = Some(value.parse()?),
            "snapshot" => {
                let count = value.parse().ok().filter(|count| *count <= MAX_SNAPSHOT);
                self.snapshot = count.ok_or_else(|| format!("must be a number from 0 to {MAX_SNAPSHOT}"))?;
            }
            "min_severity" => {
                let severity = value.parse().map_err(|error| format!("is not valid: {error}"))?;
                self.narrow(Filter::min_severity(severity));
            }
            "source" => self.narrow(Filter::is(Attribute::Source, parse_text(value)?)),
            "category" => self.narrow(Filter::is(Attribute::Category, parse_text(value)?)),
            "tenant" => self.narrow(Filter::is(Attribute::Tenant, parse_text(value)?)),
            "type" => self.narrow(Filter::is(Attribute::Type, parse_text(value)?)),
            "technique" => self.narrow(Filter::is(Attribute::Technique, parse_text(value)?)),
            "filter" => self.narrow(Filter::parse(value).map_err(|invalid| format!("is not valid: {invalid}"))?),
            "meta" => self.meta = parse_switch(value)?,
            "lane" => self.has_lane = parse_lane(value)?,
            "strict" => self.is_strict = parse_switch(value)?,
            "mode" => {
                self.is_latest = match value {
                    "latest" => true,
                    "lossless" => false,
                    _ => return Err("must be lossless or latest".to_owned()),
                }
            }
            "key" => self.key = Some(parse_text(value)?.to_owned()),
            "stream" => self.stream = Some(value.parse().map_err(|error| format!("is not a stream name: {error}"))?),
            _ => unreachable!("the caller passes known names only"),
        }
        Ok(())
    }

    pub(crate) fn narrow(&mut self, filter: Filter) {
        self.filter = mem::take(&mut self.filter).and(filter);
    }
}

impl Filter {
    /// Returns the filter of the filter parameters in the query of a URL, and ignores other parameters.
    ///
    /// # Errors
    ///
    /// One of them is not valid.
    pub fn of_query(query: &str) -> Result<Self, BadParameter> {
        SubscribeParams::read(query, &FILTER_NAMES).map(|params| params.filter)
    }
}

/// The parameters that are filters.
const FILTER_NAMES: [&str; 7] = ["min_severity", "source", "category", "tenant", "type", "technique", "filter"];

const NAMES: [&str; 15] = [
    "since",
    "snapshot",
    "min_severity",
    "source",
    "category",
    "tenant",
    "type",
    "technique",
    "filter",
    "meta",
    "mode",
    "lane",
    "strict",
    "stream",
    "key",
];

fn parse_switch(value: &str) -> Result<bool, String> {
    match value {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("must be 1 or 0".to_owned()),
    }
}

/// Returns whether the priority lane is requested.
pub(crate) fn parse_lane(value: &str) -> Result<bool, String> {
    match value {
        "critical" => Ok(true),
        "off" => Ok(false),
        _ => Err("must be critical or off".to_owned()),
    }
}

fn parse_text(value: &str) -> Result<&str, String> {
    match value.len() {
        0 => Err("must not be empty; remove the parameter to match all entries".to_owned()),
        1..=MAX_TEXT => Ok(value),
        _ => Err(format!("must not be longer than {MAX_TEXT} bytes")),
    }
}

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "must be a position such as 9f3c21aa:1741076109120-0 (several with commas between), an RFC 3339 time such \
             as 2026-01-31T08:00:00Z, a time ago such as -15m, or earliest"
                .to_owned()
        };
        if text == "earliest" {
            return Ok(Self::Earliest);
        }
        if let Some(ago) = text.strip_prefix('-') {
            let span: Span = ago.parse().map_err(|_error| expected())?;
            let duration = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_error| expected())?;
            return Duration::try_from(duration).map(Self::Ago).map_err(|_error| expected());
        }
        // In a query, the plus of a zone such as +02:00 is decoded as a space.
        if let Ok(time) = text.replace(' ', "+").parse() {
            return Ok(Self::Time(time));
        }
        let positions: Result<Vec<Position>, _> = text.split(',').map(str::parse).collect();
        let positions = positions.map_err(|_error| expected())?;
        if positions.len() > MAX_POSITIONS {
            return Err(format!("must not have more than {MAX_POSITIONS} positions"));
        }
        Ok(Self::Positions(positions))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::Severity;

    fn since(value: &str) -> Result<Since, BadParameter> {
        let query: String = url::form_urlencoded::Serializer::new(String::new()).append_pair("since", value).finish();
        SubscribeParams::parse(&query).map(|params| params.since.expect("since was given"))
    }

    #[test]
    fn every_parameter_is_parsed() {
        let params = SubscribeParams::parse(
            "since=ab12:5-1,cd34:7-0&snapshot=50&min_severity=high&source=zeek&category=cps&tenant=a%20b&meta=1\
             &stream=aurora:alerts&token=secret&_=17",
        )
        .expect("valid");
        let positions = ["ab12:5-1", "cd34:7-0"].map(|p| p.parse().expect("a position")).to_vec();
        let filter = Filter::min_severity(Severity::High)
            .and(Filter::is(Attribute::Source, "zeek"))
            .and(Filter::is(Attribute::Category, "cps"))
            .and(Filter::is(Attribute::Tenant, "a b"));
        let stream = Some("aurora:alerts".parse().expect("a name"));
        let expected = SubscribeParams {
            since: Some(Since::Positions(positions)),
            snapshot: 50,
            filter,
            meta: true,
            stream,
            ..Default::default()
        };
        assert_eq!(params, expected);
        assert_eq!(SubscribeParams::parse(""), Ok(SubscribeParams::default()));
    }

    #[test]
    fn times_have_three_forms() {
        let time = |text: &str| Since::Time(text.parse().expect("a time"));
        assert_eq!(since("2026-01-31T08:00:00Z"), Ok(time("2026-01-31T08:00:00Z")));
        assert_eq!(since("2026-01-31T08:00:00+02:00"), Ok(time("2026-01-31T06:00:00Z")));
        let unescaped = SubscribeParams::parse("since=2026-01-31T08:00:00+02:00").expect("a plus is no space here");
        assert_eq!(unescaped.since, Some(time("2026-01-31T06:00:00Z")));
        assert_eq!(since("-15m"), Ok(Since::Ago(Duration::from_mins(15))));
        assert_eq!(since("-2d"), Ok(Since::Ago(Duration::from_hours(48))));
        assert_eq!(since("earliest"), Ok(Since::Earliest));
    }

    #[test]
    fn invalid_value_is_rejected_with_its_name() {
        let cases = [
            ("since=yesterday", "since"),
            ("since=", "since"),
            ("since=1741076109120-0", "since"),
            ("since=-soon", "since"),
            ("since=--5m", "since"),
            ("snapshot=-1", "snapshot"),
            ("snapshot=1001", "snapshot"),
            ("snapshot=many", "snapshot"),
            ("min_severity=urgent", "min_severity"),
            ("source=", "source"),
            ("meta=yes", "meta"),
            ("lane=high", "lane"),
            ("stream=a%20b", "stream"),
            ("source=a&source=b", "source"),
        ];
        for (query, name) in cases {
            let error = SubscribeParams::parse(query).expect_err(query);
            assert_eq!(error.name, name, "{query}");
        }
    }

    proptest! {
        #[test]
        fn any_query_is_parsed_or_rejected_with_its_name(name in "[a-z_&=]{0,10}", value in ".{0,60}") {
            for name in NAMES.iter().copied().chain([name.as_str()]) {
                if let Err(error) = SubscribeParams::parse(&format!("{name}={value}")) {
                    prop_assert!(NAMES.contains(&error.name));
                }
            }
        }

        #[test]
        fn positions_survive_their_text_form(ids in proptest::collection::vec((any::<u64>(), any::<u64>()), 1..10)) {
            let texts: Vec<String> = ids.iter().map(|(ms, seq)| format!("ab{}:{ms}-{seq}", ms % 7)).collect();
            let positions = texts.iter().map(|text| text.parse().expect("a position")).collect();
            prop_assert_eq!(since(&texts.join(",")), Ok(Since::Positions(positions)));
        }
    }
}
