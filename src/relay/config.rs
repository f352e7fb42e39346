//! The configuration of the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::event::StreamPattern;

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

impl Config {
    /// What is wrong with it, each with the key below `relay`. `relayed` are the streams declared with `relay = true`.
    pub fn problems(&self, relayed: &[StreamPattern]) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        let mut problem = |key: &str, text: String| problems.push((key.to_owned(), text));
        let sizes = [
            ("ring_bytes", self.ring_bytes, ByteSize::kib(64), ByteSize::gib(4)),
            ("member_ring_bytes", self.member_ring_bytes, ByteSize::kib(64), ByteSize::gib(4)),
            ("max_lag_bytes", self.max_lag_bytes, ByteSize::kib(64), ByteSize::tib(1)),
            ("max_message_bytes", self.max_message_bytes, ByteSize::b(125), ByteSize::mib(1)),
        ];
        for (key, size, min, max) in sizes {
            if !(min..=max).contains(&size) {
                problem(key, format!("must be from {min} to {max}, is {size}"));
            }
        }
        let times = [
            ("max_lag_age", self.max_lag_age),
            ("ping_interval", self.ping_interval),
            ("pong_timeout", self.pong_timeout),
            ("write_timeout", self.write_timeout),
        ];
        for (key, time) in times {
            if time < Duration::from_millis(100) {
                problem(key, "must be 100ms or more".to_owned());
            }
        }
        if self.ring_entries == 0 {
            problem("ring_entries", "must be 1 or more".to_owned());
        }
        for (name, streams) in &self.channels {
            let key = format!("channels.{name}");
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if name.is_empty() || !name.chars().all(is_name) {
                problem(&key, "a channel's name may hold letters, digits and `-_.`".to_owned());
            }
            if streams.is_empty() {
                problem(&key, "has no streams; name one or leave the channel out".to_owned());
            }
            for (index, stream) in streams.iter().enumerate() {
                if !relayed.contains(stream) {
                    problem(&key, format!("stream `{stream}` is not declared with `relay = true`"));
                }
                if streams.iter().take(index).any(|earlier| earlier == stream) {
                    problem(&key, format!("stream `{stream}` is listed twice"));
                }
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relayed() -> Vec<StreamPattern> {
        Config::default().channels.into_values().flatten().collect()
    }

    #[test]
    fn the_default_has_no_problems_and_survives_its_text_form() {
        let config = Config::default();
        assert_eq!(config.problems(&relayed()), []);
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
            alerts = ['aurora:alerts', 'aurora:alerts', 'elsewhere']
        ";
        let config: Config = toml::from_str(text).expect("well-formed");
        let keys: Vec<String> = config.problems(&relayed()).into_iter().map(|(key, _)| key).collect();
        let expected = [
            "ring_bytes",
            "ping_interval",
            "ring_entries",
            "channels.a b",
            "channels.a b",
            "channels.alerts",
            "channels.alerts",
        ];
        assert_eq!(keys, expected);
    }
}
