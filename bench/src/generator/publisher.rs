//! Publishes events with marks: over HTTP, or directly into Redis, NATS or Centrifugo.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::centrifugo::CentrifugoPublisher;
use super::endpoint::RedisStream;
use super::nats::NatsPublisher;
use crate::clock::StampClock;
use crate::http::HttpClient;
use crate::payload::EventTemplate;
use crate::resp::RespConnection;

/// The destination of events.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// XADD on one connection.
    Redis(RedisStream),
    /// POST on a keep-alive connection.
    Http { address: SocketAddr, path: String },
    /// PUB on one connection.
    Nats { address: SocketAddr, subject: String },
    /// The HTTP API on a keep-alive connection.
    Centrifugo { address: SocketAddr, channel: String },
}

/// A target and the size of its events.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PublisherSpec {
    pub(crate) target: Target,
    /// Bytes per event.
    pub(crate) size: usize,
}

/// One connection that publishes.
#[derive(Debug)]
pub(crate) struct Publisher {
    connection: PublishConnection,
    template: EventTemplate,
    clock: StampClock,
    body: Vec<u8>,
}

#[derive(Debug)]
enum PublishConnection {
    Redis { connection: Box<RespConnection>, stream: String },
    Http { client: HttpClient, path: String },
    Nats { publisher: NatsPublisher, subject: String },
    Centrifugo(CentrifugoPublisher),
}

impl PublisherSpec {
    pub(crate) fn open(&self, clock: StampClock) -> Result<Publisher> {
        let connection = match &self.target {
            Target::Redis(target) => {
                PublishConnection::Redis { connection: Box::new(target.connect()?), stream: target.stream.clone() }
            }
            Target::Http { address, path } => {
                PublishConnection::Http { client: HttpClient::open(*address)?, path: path.clone() }
            }
            Target::Nats { address, subject } => {
                PublishConnection::Nats { publisher: NatsPublisher::open(*address)?, subject: subject.clone() }
            }
            Target::Centrifugo { address, channel } => {
                PublishConnection::Centrifugo(CentrifugoPublisher::open(*address, channel)?)
            }
        };
        Ok(Publisher { connection, template: EventTemplate::new(self.size), clock, body: Vec::new() })
    }
}

impl Publisher {
    /// Publishes `count` events with numbers from `first` on; returns when all of them are accepted.
    ///
    /// Each event is stamped just before it is buffered.
    pub(crate) fn publish(&mut self, first: u64, count: u64) -> Result<()> {
        let Self { connection, template, clock, body } = self;
        for sequence in first..first + count {
            if !matches!(connection, PublishConnection::Http { .. }) || sequence == first {
                body.clear();
            }
            template.write(sequence, clock.nanos(), body);
            match connection {
                PublishConnection::Redis { connection, stream } => {
                    connection.push(&[b"XADD", stream.as_bytes(), b"*", b"data", body]);
                }
                PublishConnection::Http { .. } => body.push(b'\n'),
                PublishConnection::Nats { publisher, subject } => publisher.push(subject, body),
                PublishConnection::Centrifugo(publisher) => publisher.push(body),
            }
        }
        match connection {
            PublishConnection::Redis { connection, .. } => {
                connection.flush()?;
                for _ in 0..count {
                    connection.reply().context("cannot publish to Redis")?;
                }
                Ok(())
            }
            PublishConnection::Http { client, path } => {
                let content_type = if count == 1 { "application/json" } else { "application/x-ndjson" };
                client.publish(path, content_type, body)
            }
            PublishConnection::Nats { publisher, .. } => publisher.flush(),
            PublishConnection::Centrifugo(publisher) => publisher.flush(),
        }
    }
}
