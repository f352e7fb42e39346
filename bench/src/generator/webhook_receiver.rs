//! A receiver of webhooks, the cheapest server that responds to POST requests.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

use crate::http::{content_length, read_head};

/// Responds to every request with 204 until the process is ended; calls `on_ready` with the address.
pub(super) fn run(on_ready: impl FnOnce(SocketAddr) -> Result<()>) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on the loopback address")?;
    on_ready(listener.local_addr()?)?;
    for stream in listener.incoming() {
        let stream = stream.context("cannot accept a connection")?;
        // An error is the end of the connection, which the sender may close at any time.
        thread::spawn(move || serve(stream).ok());
    }
    Ok(())
}

/// Responds to one request after the other, each read to its end.
fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut rest = vec![0; 64 << 10];
    loop {
        let (head, body) = read_head(&mut stream)?;
        let mut missing = content_length(&head)?.saturating_sub(body.len());
        while missing > 0 {
            let wanted = missing.min(rest.len());
            let count = stream.read(&mut rest[..wanted])?;
            anyhow::ensure!(count > 0, "the connection was closed within a request");
            missing -= count;
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")?;
    }
}
