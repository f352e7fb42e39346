//! Batches events into arrays, for clients in rich mode that ask for it: fewer messages for a short delay.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::event::StreamName;
use crate::relay::wire::encoding::text_message;
use crate::relay::wire::frames;
use crate::relay::wire::write_buffer::WriteBuffer;

/// The size after which a message takes no more events, in bytes.
const MAX_BYTES: usize = 64 * 1024;

/// The options of a client's batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchOptions {
    /// The maximum number of events in one message.
    pub(crate) max: usize,
    /// The maximum time that the first event waits for others.
    pub(crate) wait: Duration,
}

/// Events of one stream that wait for others, limited by count, bytes and time.
#[derive(Debug)]
pub(crate) struct EventBatcher {
    options: BatchOptions,
    stream: StreamName,
    /// `["<position>",<event>]` for each event, separated by commas.
    events: String,
    count: usize,
    flush_at: Instant,
    /// The client's position before the first of them.
    from: String,
    /// The client's position after the last of them.
    to: String,
}

impl EventBatcher {
    pub(crate) fn new(options: BatchOptions, stream: StreamName) -> Self {
        Self {
            options,
            stream,
            events: String::new(),
            count: 0,
            flush_at: Instant::now(),
            from: String::new(),
            to: String::new(),
        }
    }

    /// Takes the frames that a subscription has written from the position `from` on.
    ///
    /// Events wait for others. Other frames go out at once, after all waiting events.
    pub(crate) fn add(&mut self, mut written: WriteBuffer, from: String, out: &mut WriteBuffer) {
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
                    Ok(event) if event.starts_with('[') => self.push_event(event, out),
                    _ => {
                        self.flush(out);
                        out.push(slice.slice_ref(frame));
                    }
                }
            }
        }
        self.flush_due(out);
    }

    fn push_event(&mut self, event: &str, out: &mut WriteBuffer) {
        if self.count == 0 {
            self.flush_at = Instant::now() + self.options.wait;
        } else {
            self.events.push(',');
        }
        self.events.push_str(event);
        self.to.clear();
        self.to.push_str(event.split('"').nth(1).unwrap_or_default());
        self.count += 1;
        if self.count >= self.options.max || self.events.len() >= MAX_BYTES {
            self.flush(out);
        }
    }

    /// Writes the waiting events if their time is over.
    pub(crate) fn flush_due(&mut self, out: &mut WriteBuffer) {
        if self.flush_at <= Instant::now() {
            self.flush(out);
        }
    }

    /// Writes the waiting events.
    pub(crate) fn flush(&mut self, out: &mut WriteBuffer) {
        if self.count > 0 {
            let message = format!(r#"{{"t":"events","s":"{}","e":[{}]}}"#, self.stream, self.events);
            out.push(Bytes::from(text_message(&message)));
            // Not kept: the client may be idle from now on, and the buffer may be large.
            (self.events, self.count) = (String::new(), 0);
            self.from = std::mem::take(&mut self.to);
        }
    }

    /// Returns the time at which the waiting events must be written.
    pub(crate) fn flush_at(&self) -> Option<Instant> {
        (self.count > 0).then_some(self.flush_at)
    }

    /// Returns the client's position before the waiting events, if there are some.
    pub(crate) fn position(&self) -> Option<&str> {
        (self.count > 0).then_some(&*self.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(payloads: &[&str]) -> WriteBuffer {
        let mut out = WriteBuffer::default();
        let mut run = Vec::new();
        for payload in payloads {
            frames::push_text(&mut run, payload.as_bytes());
        }
        out.push(run.into());
        out
    }

    fn texts(out: &mut WriteBuffer) -> Vec<String> {
        let slices = std::iter::from_fn(|| out.pop());
        slices.map(|slice| String::from_utf8_lossy(frames::payload(&slice)).into_owned()).collect()
    }

    fn batcher(max: usize, wait: Duration) -> EventBatcher {
        EventBatcher::new(BatchOptions { max, wait }, "s".parse().expect("a valid name"))
    }

    #[tokio::test(start_paused = true)]
    async fn batch_is_written_when_full_or_due() {
        let wait = Duration::from_millis(50);
        let (mut batcher, mut out) = (batcher(2, wait), WriteBuffer::default());
        batcher.add(written(&[r#"["a",1]"#, r#"["b",2]"#, r#"["c",3]"#]), "z".to_owned(), &mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["a",1],["b",2]]}"#]);
        assert_eq!((batcher.position(), batcher.flush_at()), (Some("b"), Some(Instant::now() + wait)));
        tokio::time::advance(wait).await;
        batcher.flush_due(&mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["c",3]]}"#]);
        assert_eq!((batcher.position(), batcher.flush_at()), (None, None));
    }

    #[tokio::test(start_paused = true)]
    async fn control_message_keeps_its_order_among_events() {
        let (mut batcher, mut out) = (batcher(64, Duration::from_secs(1)), WriteBuffer::default());
        batcher.add(written(&[r#"["a",1]"#, r#"{"t":"live"}"#, r#"["b",2]"#]), String::new(), &mut out);
        assert_eq!(texts(&mut out), [r#"{"t":"events","s":"s","e":[["a",1]]}"#, r#"{"t":"live"}"#]);
        assert_eq!(batcher.count, 1);
    }
}
