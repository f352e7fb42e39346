//! Endpoints of a job: a stream in Redis, and WebSocket servers with the protocol that clients speak.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use url::Url;

use crate::resp::RespConnection;

/// A stream in Redis.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RedisStream {
    /// The URL of the server.
    pub(crate) url: String,
    pub(crate) stream: String,
}

impl RedisStream {
    pub(super) fn connect(&self) -> Result<RespConnection> {
        RespConnection::open(&Url::parse(&self.url).context("not the URL of a Redis server")?)
    }
}

/// A WebSocket server for clients that only receive.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RelayEndpoint {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    /// Query strings of the URL, assigned to the clients in turn. Without any, clients send no query.
    pub(crate) queries: Vec<String>,
    pub(crate) protocol: Protocol,
}

/// The protocol within the WebSocket of a receiving client.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Protocol {
    /// One alert in each message.
    Alerts,
    Nats {
        subject: String,
    },
    /// Centrifugo's JSON protocol.
    Centrifugo {
        channel: String,
    },
}

impl RelayEndpoint {
    /// Returns the endpoint of a relay that sends one alert in each message.
    pub(crate) fn new(address: SocketAddr, path: &str) -> Self {
        Self { address, path: path.to_owned(), queries: Vec::new(), protocol: Protocol::Alerts }
    }

    /// Returns path and query of the client with this number.
    pub(super) fn path_of(&self, client: usize) -> String {
        match client.checked_rem(self.queries.len()) {
            Some(query) => format!("{}?{}", self.path, self.queries[query]),
            None => self.path.clone(),
        }
    }
}

/// A WebSocket server for dashboards that resume.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FleetEndpoint {
    pub(crate) address: SocketAddr,
    /// Path and query of the WebSocket.
    pub(crate) path: String,
    pub(crate) protocol: FleetProtocol,
}

/// The protocol of dashboards that resume.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FleetProtocol {
    /// The aurora.v1 protocol.
    Aurora { stream: String },
    /// Centrifugo's JSON protocol, with recovery.
    Centrifugo { channel: String },
}
