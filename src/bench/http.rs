//! A blocking HTTP/1.1 client with one keep-alive connection: enough to publish, to ask and to wait for readiness.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::frames::{header, read_head};

/// How long a response may take.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// One keep-alive connection.
#[derive(Debug)]
pub(crate) struct HttpClient {
    stream: TcpStream,
    address: SocketAddr,
}

impl HttpClient {
    pub(crate) fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, RESPONSE_TIMEOUT)
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        stream.set_write_timeout(Some(RESPONSE_TIMEOUT))?;
        Ok(Self { stream, address })
    }

    /// Asks for a page; returns the status and the body.
    pub(crate) fn get(&mut self, path: &str) -> Result<(u16, String)> {
        self.stream.write_all(&get_request(self.address, path)).context("cannot send a request")?;
        self.response()
    }

    /// Posts events; fails unless all of them were accepted.
    pub(crate) fn publish(&mut self, path: &str, content_type: &str, body: &[u8]) -> Result<()> {
        self.stream
            .write_all(&post_request(self.address, path, content_type, body))
            .context("cannot send a request")?;
        let (status, body) = self.response()?;
        ensure!(status == 201, "publishing was answered with {status}: {}", body.trim());
        Ok(())
    }

    fn response(&mut self) -> Result<(u16, String)> {
        let (head, mut body) = read_head(&mut self.stream)?;
        let status = status_of(&head)?;
        let len: usize = header(&head, "content-length")
            .context("a response has no content-length")?
            .parse()
            .context("a content-length is not a number")?;
        let missing = len.checked_sub(body.len()).context("a response is longer than its content-length")?;
        (&mut self.stream).take(missing as u64).read_to_end(&mut body).context("cannot read a response")?;
        ensure!(body.len() == len, "the connection was closed within a response");
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

/// The status of a response from its head.
pub(crate) fn status_of(head: &str) -> Result<u16> {
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.split(' ').next());
    status.and_then(|digits| digits.parse().ok()).with_context(|| format!("not an HTTP response: {head:?}"))
}

/// A whole GET request.
pub(crate) fn get_request(address: SocketAddr, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").into_bytes()
}

/// A whole POST request.
pub(crate) fn post_request(address: SocketAddr, path: &str, content_type: &str, body: &[u8]) -> Vec<u8> {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    request
}

/// The value of a counter in Prometheus' text format, summed over its labels.
pub(crate) fn metric_sum(text: &str, name: &str) -> f64 {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = if rest.starts_with('{') { rest.rsplit_once('}')?.1 } else { rest };
            value.strip_prefix(' ')?.trim().parse::<f64>().ok()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_summed_over_its_labels_and_not_confused_with_others() {
        let text = "# TYPE a_total counter\na_total{stream=\"x\"} 3\na_total{stream=\"y\"} 4\na_total_more 9\nb 1.5\n";
        assert!((metric_sum(text, "a_total") - 7.0).abs() < f64::EPSILON);
        assert!((metric_sum(text, "b") - 1.5).abs() < f64::EPSILON);
        assert!(metric_sum(text, "c") == 0.0);
    }

    #[test]
    fn a_status_is_read_from_the_first_line() {
        assert_eq!(status_of("HTTP/1.1 201 Created\r\n\r\n").unwrap(), 201);
        status_of("SSH-2.0-x\r\n\r\n").unwrap_err();
    }
}
