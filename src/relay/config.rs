//! The configuration of the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::event::StreamPattern;
use crate::validate::{Problems, Validate};

/// The limits and channels of the relay. Every limit is per instance.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The size of framed alerts in memory per stream, in bytes. The variant with positions, if a client uses it, adds
    /// to this. So do pages of older alerts while clients catch up, by at most half.
    pub ring_bytes: ByteSize,
    /// The number of alerts in memory per stream.
    pub ring_entries: usize,
    /// The same as `ring_bytes` for a member of a family. Only members that a client watches are in memory.
    pub member_ring_bytes: ByteSize,
    /// The maximum lag of a client that was live. Beyond it the client is closed with 4001.
    pub max_lag_bytes: ByteSize,
    /// The same limit by the age of the client's next alert.
    #[serde(with = "humantime_serde")]
    pub max_lag_age: Duration,
    /// The interval between pings to each client.
    #[serde(with = "humantime_serde")]
    pub ping_interval: Duration,
    /// The time in which a client must answer a ping.
    #[serde(with = "humantime_serde")]
    pub pong_timeout: Duration,
    /// The maximum time for which a socket accepts no bytes while some wait to be written.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// The maximum length of a client's message.
    pub max_message_bytes: ByteSize,
    /// The maximum number of clients; 0 means no limit.
    pub max_connections: usize,
    /// The maximum number of clients per address (for IPv6: per /64 network); 0 means no limit.
    pub max_connections_per_address: usize,
    /// The maximum number of clients per API key or subject of tokens; 0 means no limit.
    pub max_connections_per_principal: usize,
    /// The time over which the clients are closed when this instance stops.
    #[serde(with = "humantime_serde")]
    pub drain_window: Duration,
    /// The streams of each channel, `/api/v1/ws/{channel}`. Of a family, a client receives the stream of its key.
    pub channels: BTreeMap<String, Vec<StreamPattern>>,
}

impl Default for Config {
    fn default() -> Self {
        let stream = |name: &str| name.parse::<StreamPattern>().expect("the default names are valid");
        Self {
            ring_bytes: ByteSize::mib(8),
            ring_entries: 65_536,
            member_ring_bytes: ByteSize::kib(256),
            max_lag_bytes: ByteSize::mib(256),
            max_lag_age: Duration::from_mins(15),
            ping_interval: Duration::from_secs(25),
            pong_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(10),
            max_message_bytes: ByteSize::kib(64),
            max_connections: 20_000,
            max_connections_per_address: 500,
            max_connections_per_principal: 100,
            drain_window: Duration::from_secs(5),
            channels: BTreeMap::from([
                ("alerts".to_owned(), vec![stream("aurora:alerts"), stream("aurora:cps:alerts")]),
                ("agent-thoughts".to_owned(), vec![stream("aurora:audit")]),
            ]),
        }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let sizes = [
            ("ring_bytes", self.ring_bytes, ByteSize::kib(64), ByteSize::gib(4)),
            ("member_ring_bytes", self.member_ring_bytes, ByteSize::kib(64), ByteSize::gib(4)),
            ("max_lag_bytes", self.max_lag_bytes, ByteSize::kib(64), ByteSize::tib(1)),
            ("max_message_bytes", self.max_message_bytes, ByteSize::b(125), ByteSize::mib(1)),
        ];
        for (key, size, min, max) in sizes {
            let is_valid = (min..=max).contains(&size);
            problems.require(is_valid, key, format_args!("must be from {min} to {max}, not {size}"));
        }
        let times = [
            ("max_lag_age", self.max_lag_age),
            ("ping_interval", self.ping_interval),
            ("pong_timeout", self.pong_timeout),
            ("write_timeout", self.write_timeout),
        ];
        for (key, time) in times {
            problems.require(time >= Duration::from_millis(100), key, "must be at least 100ms");
        }
        problems.require(self.ring_entries > 0, "ring_entries", "must be at least 1");
        for (name, streams) in &self.channels {
            let key = format!("channels.{name}");
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let is_name = !name.is_empty() && name.chars().all(is_allowed);
            problems.require(is_name, &key, "the name of a channel must have letters, digits and `-_.` only");
            problems.require(!streams.is_empty(), &key, "has no streams; name one or remove the channel");
            for (index, stream) in streams.iter().enumerate() {
                if streams.iter().take(index).any(|earlier| earlier == stream) {
                    problems.add(&key, format_args!("stream `{stream}` is listed twice"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_problems_and_survives_its_text_form() {
        let config = Config::default();
        assert_eq!(config.problems(), []);
        let text = toml::to_string(&config).expect("plain values");
        assert_eq!(toml::from_str::<Config>(&text).expect("its own text"), config);
    }

    #[test]
    fn unknown_keys_are_errors() {
        let error = toml::from_str::<Config>("ring_byte = '8MiB'").expect_err("a typo");
        assert!(error.to_string().contains("ring_byte"), "{error}");
    }

    #[test]
    fn every_problem_is_named_with_its_key() {
        let text = "
            ring_bytes = '1KiB'
            ring_entries = 0
            ping_interval = '1ms'
            [channels]
            'a b' = []
            alerts = ['aurora:alerts', 'aurora:alerts']
        ";
        let config: Config = toml::from_str(text).expect("well-formed");
        let keys: Vec<String> = config.problems().into_iter().map(|problem| problem.path).collect();
        let expected =
            ["ring_bytes", "ping_interval", "ring_entries", "channels.a b", "channels.a b", "channels.alerts"];
        assert_eq!(keys, expected);
    }
}
