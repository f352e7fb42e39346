//! The baseline relay: writes the same bytes to the same sockets, and does nothing else.
//!
//! It reads a Redis stream, or accepts events over HTTP without Redis. It frames each payload once and writes all
//! frames of a batch to each socket with one call. Without slow clients, filters, positions and limits it is an upper
//! bound for any relay, not one to run.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::endpoint::RedisStream;
use crate::http::{content_length, header, read_head};
use crate::resp::{RespConnection, RespReply, RespToken};
use crate::websocket::write_server_text;

/// Serves a baseline relay with one source of events.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BaselineRelayJob {
    /// Reads a Redis stream from its end on.
    Redis(RedisStream),
    /// Accepts POST requests at the address of the relay, with one event per line.
    Http,
}

type Clients = Arc<Mutex<Vec<TcpStream>>>;

impl BaselineRelayJob {
    /// Serves until the process is ended; calls `on_ready` with the address.
    pub(crate) fn run(&self, on_ready: impl FnOnce(SocketAddr) -> Result<()>) -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on the loopback address")?;
        let clients = Clients::default();
        let address = listener.local_addr()?;
        match self {
            Self::Redis(source) => {
                let mut connection = source.connect()?;
                let last = connection.call(&[b"XREVRANGE", source.stream.as_bytes(), b"+", b"-", b"COUNT", b"1"])?;
                let last = last.tokens().find_map(text).unwrap_or(b"0-0").to_vec();
                let accepting = Arc::clone(&clients);
                thread::spawn(move || accept(&listener, &accepting));
                on_ready(address)?;
                relay(&mut connection, &source.stream, last, &clients)
            }
            Self::Http => {
                on_ready(address)?;
                accept(&listener, &clients);
                Ok(())
            }
        }
    }
}

fn text(token: RespToken<'_>) -> Option<&[u8]> {
    match token {
        RespToken::Text(text) => Some(text),
        _ => None,
    }
}

fn relay(connection: &mut RespConnection, stream: &str, mut last: Vec<u8>, clients: &Clients) -> Result<()> {
    let mut frames = Vec::new();
    loop {
        frames.clear();
        let read = [b"XREAD".as_slice(), b"COUNT", b"256", b"BLOCK", b"1000", b"STREAMS", stream.as_bytes(), &last];
        let reply = connection.call(&read)?;
        if let Some(id) = frame_entries(reply, &mut frames) {
            last = id;
            write_all(clients, &frames);
        }
    }
}

/// Appends a frame for the last field of each entry in an XREAD reply of one stream; returns the last id.
fn frame_entries(reply: RespReply<'_>, frames: &mut Vec<u8>) -> Option<Vec<u8>> {
    let mut tokens = reply.tokens().skip(4);
    let mut last = None;
    while let Some(RespToken::Array(2)) = tokens.next() {
        last = tokens.next().and_then(text);
        let Some(RespToken::Array(fields)) = tokens.next() else { break };
        let mut payload = None;
        for _ in 0..fields {
            payload = tokens.next().and_then(text);
        }
        write_server_text(payload.unwrap_or_default(), frames);
    }
    last.map(<[u8]>::to_vec)
}

fn write_all(clients: &Clients, frames: &[u8]) {
    let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
    clients.retain_mut(|client| client.write_all(frames).is_ok());
}

/// Accepts WebSocket clients, and serves each publisher on a thread of its own.
fn accept(listener: &TcpListener, clients: &Clients) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let Ok((head, rest)) = stream.set_nodelay(true).context("no delay").and_then(|()| read_head(&mut stream))
        else {
            continue;
        };
        if head.starts_with("POST ") {
            let clients = Arc::clone(clients);
            thread::spawn(move || serve_publisher(stream, head, rest, &clients));
            continue;
        }
        let key = header(&head, "sec-websocket-key").unwrap_or_default();
        let response = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        if stream.write_all(response.as_bytes()).is_ok() {
            clients.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        }
    }
}

/// Serves one publisher until it disconnects or sends an invalid request.
fn serve_publisher(mut stream: TcpStream, mut head: String, mut body: Vec<u8>, clients: &Clients) {
    let mut frames = Vec::new();
    loop {
        let Ok(len) = content_length(&head) else { return };
        let missing = len.saturating_sub(body.len());
        if (&mut stream).take(missing as u64).read_to_end(&mut body).is_err() || body.len() < len {
            return;
        }
        frames.clear();
        for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            write_server_text(line, &mut frames);
        }
        write_all(clients, &frames);
        if stream.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n").is_err() {
            return;
        }
        match read_head(&mut stream) {
            Ok(next) => (head, body) = next,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Starts a baseline relay that accepts events over HTTP; returns its address.
    pub(in crate::generator) fn start_relay() -> SocketAddr {
        let (send, receive) = mpsc::channel();
        thread::spawn(move || BaselineRelayJob::Http.run(|address| Ok(send.send(address)?)));
        receive.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}
