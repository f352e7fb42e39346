//! Events gathered into arrays, for clients in rich mode that ask for it: fewer messages for a while of waiting.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::event::StreamName;
use crate::relay::wire::encoding::text_message;
use crate::relay::wire::frames;
use crate::relay::wire::write_buffer::Outgoing;

/// Bytes after which a message is not made longer.
const MAX_BYTES: usize = 64 * 1024;

/// How a client wants its events gathered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batching {
    /// The most events in one message.
    pub(crate) max: usize,
    /// How long the first of them may wait for others.
    pub(crate) wait: Duration,
}

/// Events of one stream that wait for others, bounded by count, bytes and time.
#[derive(Debug)]
pub(crate) struct Gathering {
    batching: Batching,
    stream: StreamName,
    /// `["<position>",<event>]`, parted by commas.
    events: String,
    count: usize,
    due: Instant,
    /// Where the client stood before the first of them.
    from: String,
    /// Where it will stand after the last of them.
    to: String,
}

impl Gathering {
    pub(crate) fn new(batching: Batching, stream: StreamName) -> Self {
        Self {
            batching,
            stream,
            events: String::new(),
            count: 0,
            due: Instant::now(),
            from: String::new(),
            to: String::new(),
        }
    }

    /// Takes over what a subscription has written, which stood at `from` before. Events wait for others; all else goes
    /// out at once, and what waits before it.
    pub(crate) fn add(&mut self, mut written: Outgoing, from: String, out: &mut Outgoing) {
        if self.count == 0 {
            self.from = from;
        }
        out.alerts += std::mem::take(&mut written.alerts);
        out.oldest_ms = out.oldest_ms.into_iter().chain(written.oldest_ms.take()).min();
        while let Some(slice) = written.pop() {
            let mut rest = &*slice;
            while let Some((frame, after)) = frames::split(rest) {
                rest = after;
                match std::str::from_utf8(frames::payload(frame)) {
                    Ok(event) if event.starts_with('[') => self.take(event, out),
                    _ => {
                        self.flush(out);
                        out.push(slice.slice_ref(frame));
                    }
                }
            }
        }
        self.flush_due(out);
    }

    fn take(&mut self, event: &str, out: &mut Outgoing) {
        if self.count == 0 {
            self.due = Instant::now() + self.batching.wait;
        } else {
            self.events.push(',');
        }
        self.events.push_str(event);
        self.to.clear();
        self.to.push_str(event.split('"').nth(1).unwrap_or_default());
        self.count += 1;
        if self.count >= self.batching.max || self.events.len() >= MAX_BYTES {
            self.flush(out);
        }
    }

    /// Writes what has waited for long enough.
    pub(crate) fn flush_due(&mut self, out: &mut Outgoing) {
        if self.due <= Instant::now() {
            self.flush(out);
        }
    }

    /// Writes what waits.
    pub(crate) fn flush(&mut self, out: &mut Outgoing) {
        if self.count > 0 {
            let message = format!(r#"{{"t":"events","s":"{}","e":[{}]}}"#, self.stream, self.events);
            out.push(Bytes::from(text_message(&message)));
            // What a large one needed is not kept by a client that may be idle from now on.
            (self.events, self.count) = (String::new(), 0);
            self.from = std::mem::take(&mut self.to);
        }
    }

    /// When what waits is to be written.
    pub(crate) fn due(&self) -> Option<Instant> {
        (self.count > 0).then_some(self.due)
    }

    /// Where the client stands, if something waits that it has not been given.
    pub(crate) fn position(&self) -> Option<&str> {
        (self.count > 0).then_some(&*self.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(payloads: &[&str]) -> Outgoing {
        let mut out = Outgoing::default();
        let mut run = Vec::new();
        for payload in payloads {
            frames::push_text(&mut run, payload.as_bytes());
        }
        out.push(run.into());
        out
    }

    fn texts(out: &mut Outgoing) -> Vec<String> {
        let slices = std::iter::from_fn(|| out.pop());
        slices.map(|slice| String::from_utf8_lossy(frames::payload(&slice)).into_owned()).collect()
    }

    fn gathering(max: usize, wait: Duration) -> Gathering {
        Gathering::new(Batching { max, wait }, "s".parse().expect("a valid name"))
    }

    #[tokio::test(start_paused = true)]
    async fn events_wait_for_others_until_they_are_enough_or_their_time_has_come() {
        let wait = Duration::from_millis(50);
        let (mut gathering, mut out) = (gathering(2, wait), Outgoing::default());
        gathering.add(written(&[r#"["a",1]"#, r#"["b",2]"#, r#"["c",3]"#]), "z".to_owned(), &mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["a",1],["b",2]]}"#]);
        assert_eq!((gathering.position(), gathering.due()), (Some("b"), Some(Instant::now() + wait)));
        tokio::time::advance(wait).await;
        gathering.flush_due(&mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["c",3]]}"#]);
        assert_eq!((gathering.position(), gathering.due()), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_event_keeps_its_place_among_them() {
        let (mut gathering, mut out) = (gathering(64, Duration::from_secs(1)), Outgoing::default());
        gathering.add(written(&[r#"["a",1]"#, r#"{"t":"live"}"#, r#"["b",2]"#]), String::new(), &mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["a",1]]}"#, r#"{"t":"live"}"#]);
        assert_eq!(gathering.count, 1);
    }
}
