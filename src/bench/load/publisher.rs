//! Publishing with marks: over HTTP, or straight into Redis or NATS where only the relay is to be measured.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::RedisStream;
use super::nats::NatsPublisher;
use crate::bench::http::HttpClient;
use crate::bench::payload::{Clock, Template};
use crate::bench::resp::Connection;

/// Where events go.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// XADD on one connection.
    Redis(RedisStream),
    /// POST on a keep-alive connection.
    Http { address: SocketAddr, path: String },
    /// PUB on one connection.
    Nats { address: SocketAddr, subject: String },
}

/// A target and what to send there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PublisherSpec {
    pub(crate) target: Target,
    /// Bytes per event.
    pub(crate) size: usize,
}

/// One connection that publishes.
#[derive(Debug)]
pub(crate) struct Publisher {
    connection: Link,
    template: Template,
    clock: Clock,
    body: Vec<u8>,
}

#[derive(Debug)]
enum Link {
    Redis { connection: Box<Connection>, stream: String },
    Http { client: HttpClient, path: String },
    Nats { publisher: NatsPublisher, subject: String },
}

impl PublisherSpec {
    pub(crate) fn open(&self, clock: Clock) -> Result<Publisher> {
        let connection = match &self.target {
            Target::Redis(at) => Link::Redis { connection: Box::new(at.connect()?), stream: at.stream.clone() },
            Target::Http { address, path } => Link::Http { client: HttpClient::open(*address)?, path: path.clone() },
            Target::Nats { address, subject } => {
                Link::Nats { publisher: NatsPublisher::open(*address)?, subject: subject.clone() }
            }
        };
        Ok(Publisher { connection, template: Template::new(self.size), clock, body: Vec::new() })
    }
}

impl Publisher {
    /// Publishes `count` events numbered from `first` on, each stamped now; returns when all are accepted.
    pub(crate) fn publish(&mut self, first: u64, count: u64) -> Result<()> {
        match &mut self.connection {
            Link::Redis { connection, stream } => {
                for sequence in first..first + count {
                    self.body.clear();
                    self.template.write(sequence, self.clock.nanos(), &mut self.body);
                    connection.push(&[b"XADD", stream.as_bytes(), b"*", b"data", &self.body]);
                }
                connection.flush()?;
                for _ in 0..count {
                    connection.reply().context("cannot publish to Redis")?;
                }
            }
            Link::Http { client, path } => {
                self.body.clear();
                for sequence in first..first + count {
                    self.template.write(sequence, self.clock.nanos(), &mut self.body);
                    self.body.push(b'\n');
                }
                let content_type = if count == 1 { "application/json" } else { "application/x-ndjson" };
                client.publish(path, content_type, &self.body)?;
            }
            Link::Nats { publisher, subject } => {
                for sequence in first..first + count {
                    self.body.clear();
                    self.template.write(sequence, self.clock.nanos(), &mut self.body);
                    publisher.push(subject, &self.body);
                }
                publisher.flush()?;
            }
        }
        Ok(())
    }
}
