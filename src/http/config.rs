//! The section `http` of the configuration.

use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::http::middleware::origin;
use crate::http::server::tls::TlsConfig;
use crate::validate::{Problems, Validate};

/// The maximum of every count in this section.
const MAX_COUNT: usize = 1_000_000;

/// The listener and its limits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The address and port to listen on.
    pub listen: SocketAddr,
    /// The maximum size of a request body.
    pub max_body: ByteSize,
    /// The maximum number of events in one request.
    pub max_batch: usize,
    /// The maximum number of open connections, including dashboards. More are rejected with 503.
    pub max_connections: usize,
    /// The maximum number of connections per address without a request: new ones, those in a TLS handshake, and those
    /// kept open for the next request. At most half of `max_connections`. More are rejected with 503, or closed after
    /// the response.
    pub max_idle_per_address: usize,
    /// The maximum number of concurrent publish requests. More are rejected with 429.
    pub max_in_flight: usize,
    /// The maximum number of request bodies in transfer per address. More are rejected with 429.
    pub max_bodies_per_address: usize,
    /// The maximum number of requests per second and address. More are rejected with 429.
    pub rate_limit: u32,
    /// The origins of pages that may publish, read and open a WebSocket, such as `https://soc.example`. Pages on the
    /// daemon's own host always may. `*` allows every page.
    pub origins: Vec<String>,
    /// Whether the client module for pages and the examples are served below `/client/`.
    pub pages: bool,
    /// The time limit for the head of a request.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// The time limit for the body of a request.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// The time for which a client may read nothing of a pending response.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// TLS. Without this section the listener uses plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_body: ByteSize::mib(8),
            max_batch: 5_000,
            max_connections: 25_000,
            max_idle_per_address: 8_192,
            max_in_flight: 1_024,
            max_bodies_per_address: 256,
            rate_limit: 20_000,
            origins: Vec::new(),
            pages: true,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            tls: None,
        }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let counts = [
            ("max_batch", self.max_batch),
            ("max_connections", self.max_connections),
            ("max_idle_per_address", self.max_idle_per_address),
            ("max_in_flight", self.max_in_flight),
            ("max_bodies_per_address", self.max_bodies_per_address),
            ("rate_limit", self.rate_limit as usize),
        ];
        for (key, count) in counts {
            problems.require((1..=MAX_COUNT).contains(&count), key, format_args!("must be from 1 to {MAX_COUNT}"));
        }
        for origin in self.origins.iter().filter(|origin| !origin::is_well_formed(origin)) {
            let message =
                format_args!("`{origin}` is not an origin; it must be like https://soc.example, without a path");
            problems.add("origins", message);
        }
        problems.require(self.max_body.as_u64() > 0, "max_body", "must be at least 1 byte");
        let times = [
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("write_timeout", self.write_timeout),
        ];
        for (key, time) in times {
            problems.require(!time.is_zero(), key, "must be longer than 0s");
        }
        if let Some(tls) = &self.tls {
            problems.check("tls", tls);
        }
    }
}
