//! What is being written to one socket: a few slices of shared bytes, never a growing queue.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

use crate::relay::metrics::Written;

/// The most slices in one write.
pub(crate) const MAX_SLICES: usize = 32;

/// The bytes after which nothing more is added; a last slice may go beyond.
pub(crate) const MAX_BYTES: usize = 64 * 1024;

/// Whole frames on their way to a socket.
///
/// Bounded by [`MAX_SLICES`], and by [`MAX_BYTES`] and one more slice: this is all that a client which does not read can
/// keep alive here.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// Empty only where all is. While little happens there is no other one, and nothing to look up elsewhere.
    first: Bytes,
    rest: VecDeque<Bytes>,
    bytes: usize,
    /// Alerts in it.
    pub(crate) alerts: u64,
    /// The oldest entry in it that was appended while the client was connected, in ms since 1970.
    pub(crate) oldest_ms: Option<u64>,
}

impl Outgoing {
    /// Whether everything is written.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether it is time to write before adding more.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES || self.rest.len() + 1 >= MAX_SLICES
    }

    /// Adds whole frames.
    pub(crate) fn push(&mut self, frames: Bytes) {
        if frames.is_empty() {
            return;
        }
        self.bytes += frames.len();
        if self.first.is_empty() {
            self.first = frames;
        } else {
            self.rest.push_back(frames);
        }
    }

    /// Takes out what comes first.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let next = self.rest.pop_front().unwrap_or_default();
        let slice = std::mem::replace(&mut self.first, next);
        self.bytes -= slice.len();
        (!slice.is_empty()).then_some(slice)
    }

    /// What to write next, if it is one slice.
    pub(crate) fn only(&self) -> Option<&[u8]> {
        self.rest.is_empty().then_some(&*self.first)
    }

    /// Fills in what to write next; says how many slices that is.
    pub(crate) fn fill<'a>(&'a self, buffers: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        let slices = std::iter::once(&self.first).chain(&self.rest);
        slices.zip(buffers).map(|(slice, buffer)| *buffer = IoSlice::new(slice)).count()
    }

    /// What is counted of what went in since this was asked last.
    pub(crate) fn take_written(&mut self) -> Written {
        Written { writes: 0, alerts: std::mem::take(&mut self.alerts), oldest_ms: self.oldest_ms.take() }
    }

    /// So many bytes were written.
    pub(crate) fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while written > 0 && written >= self.first.len() {
            written -= self.first.len();
            self.first = self.rest.pop_front().unwrap_or_default();
        }
        self.first.advance(written);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            slices in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..MAX_SLICES),
            steps in proptest::collection::vec(1_usize..70, 1..100),
        ) {
            let mut outgoing = Outgoing::default();
            let expected = slices.concat();
            for slice in slices {
                outgoing.push(slice.into());
            }
            let mut written = Vec::new();
            for step in steps {
                let mut buffers = [IoSlice::new(&[]); MAX_SLICES];
                let count = outgoing.fill(&mut buffers);
                let front: Vec<u8> = buffers[..count].iter().flat_map(|b| b.iter().copied()).take(step).collect();
                outgoing.advance(front.len());
                written.extend(front);
            }
            prop_assert_eq!(&written[..], &expected[..written.len()]);
            prop_assert_eq!(outgoing.is_empty(), written.len() == expected.len());
        }
    }
}
