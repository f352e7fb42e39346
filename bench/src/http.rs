//! A blocking HTTP/1.1 client with one keep-alive connection, and helpers for requests and heads.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// The time limit of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest response body, in bytes.
const MAX_BODY: usize = 64 << 20;

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

    /// Requests a page; returns the status and the body.
    pub(crate) fn get(&mut self, path: &str) -> Result<(u16, String)> {
        self.stream.write_all(&get_request(self.address, path)).context("cannot send a request")?;
        self.response()
    }

    /// Posts a body with further header lines, each ended by CR LF; returns the status and the body of the response.
    pub(crate) fn post(&mut self, path: &str, content_type: &str, headers: &str, body: &[u8]) -> Result<(u16, String)> {
        self.stream
            .write_all(&post_request(self.address, path, content_type, headers, body))
            .context("cannot send a request")?;
        self.response()
    }

    /// Publishes events to the daemon; fails unless all of them were accepted.
    pub(crate) fn publish(&mut self, path: &str, content_type: &str, body: &[u8]) -> Result<()> {
        let (status, body) = self.post(path, content_type, "", body)?;
        ensure!(status == 201, "publishing failed with status {status}: {}", body.trim());
        Ok(())
    }

    fn response(&mut self) -> Result<(u16, String)> {
        let (head, mut body) = read_head(&mut self.stream)?;
        let status = status_of(&head)?;
        if header(&head, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            let body = self.chunks(body)?;
            return Ok((status, String::from_utf8_lossy(&body).into_owned()));
        }
        let len = content_length(&head)?;
        let missing = len.checked_sub(body.len()).context("a response is longer than its content-length")?;
        (&mut self.stream).take(missing as u64).read_to_end(&mut body).context("cannot read a response")?;
        ensure!(body.len() == len, "the connection was closed within a response");
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Reads a chunked body of which `input` has arrived already.
    fn chunks(&mut self, mut input: Vec<u8>) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            match take_chunk(&mut input)? {
                Some(chunk) if chunk.is_empty() => return Ok(body),
                Some(chunk) => body.extend_from_slice(&chunk),
                None => {
                    let mut buffer = [0; 4096];
                    let count = self.stream.read(&mut buffer).context("cannot read a response")?;
                    ensure!(count > 0, "the connection was closed within a response");
                    input.extend_from_slice(&buffer[..count]);
                }
            }
            ensure!(body.len() + input.len() <= MAX_BODY, "a response is longer than {MAX_BODY} bytes");
        }
    }
}

/// Removes the next complete chunk from `input`; returns `None` while it is incomplete. The last chunk is empty.
fn take_chunk(input: &mut Vec<u8>) -> Result<Option<Vec<u8>>> {
    let Some(line) = input.windows(2).position(|window| window == b"\r\n") else { return Ok(None) };
    let digits = str::from_utf8(&input[..line]).context("a chunk length is not UTF-8")?;
    let Ok(len) = usize::from_str_radix(digits.trim(), 16) else { bail!("{digits:?} is not a chunk length") };
    ensure!(len <= MAX_BODY, "a response is longer than {MAX_BODY} bytes");
    let (start, end) = (line + 2, line + 2 + len);
    if input.len() < end + 2 {
        return Ok(None);
    }
    let chunk = input[start..end].to_vec();
    input.drain(..end + 2);
    Ok(Some(chunk))
}

/// Returns the status of a response from its head.
pub(crate) fn status_of(head: &str) -> Result<u16> {
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.split(' ').next());
    status.and_then(|digits| digits.parse().ok()).with_context(|| format!("not an HTTP response: {head:?}"))
}

/// Returns the length of the body from the head of a request or response.
pub(crate) fn content_length(head: &str) -> Result<usize> {
    let value = header(head, "content-length").context("an HTTP head has no content-length")?;
    value.parse().context("a content-length is not a number")
}

/// Builds a whole GET request.
pub(crate) fn get_request(address: SocketAddr, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").into_bytes()
}

/// Builds a whole POST request with further header lines, each ended by CR LF.
pub(crate) fn post_request(address: SocketAddr, path: &str, content_type: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    request
}

/// Reads the head of an HTTP request or response; returns it with the bytes read after it.
pub(crate) fn read_head(stream: &mut impl Read) -> Result<(String, Vec<u8>)> {
    let mut input = Vec::with_capacity(1024);
    loop {
        if let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = input.split_off(end + 4);
            return Ok((String::from_utf8(input).context("an HTTP head is not UTF-8")?, rest));
        }
        ensure!(input.len() < 64 << 10, "an HTTP head is longer than 64 KiB");
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).context("cannot read an HTTP head")?;
        ensure!(count > 0, "the connection was closed before an HTTP head was complete");
        input.extend_from_slice(&buffer[..count]);
    }
}

/// Returns the value of a header in an HTTP head.
pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Returns the value of a counter in Prometheus' text format, summed over its labels.
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
    fn counter_is_summed_over_its_labels_alone() {
        let text = "# TYPE a_total counter\na_total{stream=\"x\"} 3\na_total{stream=\"y\"} 4\na_total_more 9\nb 1.5\n";
        assert!((metric_sum(text, "a_total") - 7.0).abs() < f64::EPSILON);
        assert!((metric_sum(text, "b") - 1.5).abs() < f64::EPSILON);
        assert!(metric_sum(text, "c") == 0.0);
    }

    #[test]
    fn status_is_read_from_the_first_line() {
        assert_eq!(status_of("HTTP/1.1 201 Created\r\n\r\n").unwrap(), 201);
        status_of("SSH-2.0-x\r\n\r\n").unwrap_err();
    }

    #[test]
    fn header_names_ignore_case() {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n";
        assert_eq!(header(head, "Content-Length"), Some("12"));
        assert_eq!(header(head, "Content-Type"), None);
    }

    #[test]
    fn chunk_is_taken_once_it_is_complete() {
        let mut input = b"5\r\nhel".to_vec();
        assert_eq!(take_chunk(&mut input).unwrap(), None);
        input.extend_from_slice(b"lo\r\n0\r\n\r\n");
        assert_eq!(take_chunk(&mut input).unwrap().as_deref(), Some(&b"hello"[..]));
        assert_eq!(take_chunk(&mut input).unwrap().as_deref(), Some(&b""[..]));
        assert!(input.is_empty());
        take_chunk(&mut b"x\r\n".to_vec()).unwrap_err();
    }
}
