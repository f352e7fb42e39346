//! HTTP requests in a closed loop: one in flight on each of many keep-alive connections, all on one thread.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

use crate::http::{content_length, get_request, post_request, status_of};
use crate::payload::EventTemplate;
use crate::procfs::own_cpu_seconds;
use crate::stats::Percentiles;

/// The time limit of the last responses after the end.
const GRACE: Duration = Duration::from_secs(30);

/// Sends requests as fast as the server responds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HttpRequestsJob {
    pub(crate) address: SocketAddr,
    pub(crate) connections: usize,
    pub(crate) request: Request,
    pub(crate) seconds: u64,
    /// The number of requests that ends the job early.
    pub(crate) max_requests: u64,
}

/// The request of a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// A page with the status 200.
    Get { path: String },
    /// A body of `events` events of `size` bytes, with the status 201.
    Publish { path: String, events: u64, size: usize },
}

impl Request {
    fn bytes(&self, address: SocketAddr) -> Vec<u8> {
        match self {
            Self::Get { path } => get_request(address, path),
            Self::Publish { path, events: 1, size } => {
                post_request(address, path, "application/json", "", &EventTemplate::new(*size).bytes(0, 0))
            }
            Self::Publish { path, events, size } => {
                let template = EventTemplate::new(*size);
                let mut body = Vec::new();
                for sequence in 0..*events {
                    template.write(sequence, 0, &mut body);
                    body.push(b'\n');
                }
                post_request(address, path, "application/x-ndjson", "", &body)
            }
        }
    }

    fn expected_status(&self) -> u16 {
        match self {
            Self::Get { .. } => 200,
            Self::Publish { .. } => 201,
        }
    }
}

/// The number of responses and their latency.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct HttpRequestsReport {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    pub(crate) latency: Percentiles,
    /// CPU time of the generator, in seconds.
    pub(crate) generator_cpu_seconds: f64,
}

#[derive(Debug)]
struct Exchange {
    stream: TcpStream,
    sent: usize,
    started: Instant,
    /// Whether the last read emptied the socket, so that new data causes a new event.
    is_drained: bool,
    response: Response,
}

impl HttpRequestsJob {
    pub(crate) fn run(&self) -> Result<HttpRequestsReport> {
        let request = self.request.bytes(self.address);
        let mut poll = Poll::new()?;
        let mut exchanges = HashMap::with_capacity(self.connections);
        for index in 0..self.connections {
            let stream = std::net::TcpStream::connect(self.address)
                .with_context(|| format!("cannot connect to {}", self.address))?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
            let response = Response::expecting(self.request.expected_status());
            exchanges.insert(
                Token(index),
                Exchange { stream, sent: 0, started: Instant::now(), is_drained: true, response },
            );
        }

        let (start, cpu) = (Instant::now(), own_cpu_seconds());
        let end = start + Duration::from_secs(self.seconds);
        let mut started = self.connections as u64;
        let mut latencies = Vec::new();
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 256 << 10];
        while !exchanges.is_empty() {
            poll.poll(&mut events, Some(Duration::from_millis(100))).or_else(|error| match error.kind() {
                ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            })?;
            let is_in_time = Instant::now() < end;
            ensure!(
                Instant::now() < end + GRACE,
                "responses are missing {} s after the end of the job",
                GRACE.as_secs()
            );
            for event in &events {
                let Some(exchange) = exchanges.get_mut(&event.token()) else { continue };
                while exchange.advance(&request, &mut buffer)? {
                    latencies.push(u64::try_from(exchange.started.elapsed().as_nanos()).unwrap_or(u64::MAX));
                    if !is_in_time || started >= self.max_requests {
                        exchanges.remove(&event.token());
                        break;
                    }
                    started += 1;
                    (exchange.sent, exchange.started) = (0, Instant::now());
                }
            }
        }
        Ok(HttpRequestsReport {
            requests: latencies.len() as u64,
            seconds: start.elapsed().as_secs_f64(),
            latency: Percentiles::of(latencies),
            generator_cpu_seconds: own_cpu_seconds() - cpu,
        })
    }
}

impl Exchange {
    /// Sends and receives until the socket would block; returns whether a response was completed.
    fn advance(&mut self, request: &[u8], buffer: &mut [u8]) -> Result<bool> {
        while self.sent < request.len() {
            match self.stream.write(&request[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("cannot send a request"),
            }
            // Saves a system call per request: the response cannot have arrived yet.
            if self.sent == request.len() && self.is_drained {
                return Ok(false);
            }
        }
        loop {
            match self.stream.read(buffer) {
                Ok(0) => bail!("the connection was closed before the response was complete"),
                Ok(count) => {
                    self.is_drained = count < buffer.len();
                    if self.response.feed(&buffer[..count])? {
                        return Ok(true);
                    }
                    if self.is_drained {
                        return Ok(false);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).context("cannot read a response"),
            }
        }
    }
}

/// A response while it arrives; the body is counted, not kept.
#[derive(Debug)]
struct Response {
    expected_status: u16,
    head: Vec<u8>,
    missing: Option<usize>,
}

impl Response {
    fn expecting(expected_status: u16) -> Self {
        Self { expected_status, head: Vec::with_capacity(512), missing: None }
    }

    /// Parses `input`; returns whether the response is complete, and then starts the next one.
    fn feed(&mut self, input: &[u8]) -> Result<bool> {
        let missing = if let Some(missing) = self.missing {
            missing.checked_sub(input.len())
        } else {
            self.head.extend_from_slice(input);
            let Some(end) = self.head.windows(4).position(|window| window == b"\r\n\r\n") else {
                ensure!(self.head.len() < 64 << 10, "the head of a response is longer than 64 KiB");
                return Ok(false);
            };
            let body = self.head.split_off(end + 4);
            let head = std::str::from_utf8(&self.head).context("the head of a response is not UTF-8")?;
            let status = status_of(head)?;
            if status != self.expected_status {
                bail!("a request failed with status {status}: {}", String::from_utf8_lossy(&body).trim());
            }
            content_length(head)?.checked_sub(body.len())
        };
        let missing = missing.context("a response is longer than its content-length")?;
        if missing > 0 {
            self.missing = Some(missing);
            return Ok(false);
        }
        self.missing = None;
        self.head.clear();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn response_is_complete_with_its_last_byte(
            body in prop::collection::vec(any::<u8>(), 0..200),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut wire = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
            wire.extend_from_slice(&body);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| 1 + cut.index(wire.len() - 1)).collect();
            cuts.extend([0, wire.len()]);
            cuts.sort_unstable();
            cuts.dedup();
            let mut response = Response::expecting(201);
            for _ in 0..2 {
                for pair in cuts.windows(2) {
                    prop_assert_eq!(response.feed(&wire[pair[0]..pair[1]]).unwrap(), pair[1] == wire.len());
                }
            }
        }
    }

    #[test]
    fn unexpected_status_is_an_error_with_the_body() {
        let error = Response::expecting(201).feed(b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno").unwrap_err();
        assert_eq!(error.to_string(), "a request failed with status 503: no");
    }
}
