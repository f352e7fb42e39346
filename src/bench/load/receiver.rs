//! The receiver of webhooks: the least that answers a POST request.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

use crate::bench::frames::{header, read_head};

/// Answers every request with 204 until the process is ended; `on_ready` is told the address.
pub(super) fn receive(on_ready: impl FnOnce(SocketAddr) -> Result<()>) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on the loopback address")?;
    on_ready(listener.local_addr()?)?;
    for stream in listener.incoming() {
        let stream = stream.context("cannot accept a connection")?;
        // A sender ends its connections as it likes.
        thread::spawn(move || answer(stream).ok());
    }
    Ok(())
}

/// One request after the other, each read to its end.
fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut rest = vec![0; 64 << 10];
    loop {
        let (head, body) = read_head(&mut stream)?;
        let len: usize = header(&head, "content-length").context("a request has no content-length")?.parse()?;
        let mut missing = len.saturating_sub(body.len());
        while missing > 0 {
            let most = missing.min(rest.len());
            let count = stream.read(&mut rest[..most])?;
            anyhow::ensure!(count > 0, "the connection was closed within a request");
            missing -= count;
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
    }
}
