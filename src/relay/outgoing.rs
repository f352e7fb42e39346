//! What is being written to one socket: a few slices of shared bytes, never a growing queue.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// The most slices in one write.
pub(super) const MAX_SLICES: usize = 32;

/// The bytes after which nothing more is added; a last slice may go beyond.
pub(super) const MAX_BYTES: usize = 64 * 1024;

/// Whole frames on their way to a socket.
///
/// Bounded by [`MAX_SLICES`], and by [`MAX_BYTES`] and one more slice: this is all that a client which does not read can
/// keep alive here.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    slices: VecDeque<Bytes>,
    bytes: usize,
    /// Alerts in it.
    pub(super) alerts: u64,
    /// The oldest entry in it that was appended while the client was connected, in ms since 1970.
    pub(super) oldest_ms: Option<u64>,
}

impl Outgoing {
    /// Whether everything is written.
    pub(super) fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Whether it is time to write before adding more.
    pub(super) fn is_full(&self) -> bool {
        self.slices.len() >= MAX_SLICES || self.bytes >= MAX_BYTES
    }

    /// Adds whole frames.
    pub(super) fn push(&mut self, frames: Bytes) {
        if !frames.is_empty() {
            self.bytes += frames.len();
            self.slices.push_back(frames);
        }
    }

    /// Takes out what comes first.
    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let slice = self.slices.pop_front()?;
        self.bytes -= slice.len();
        Some(slice)
    }

    /// What to write next, if it is one slice.
    pub(super) fn only(&self) -> Option<&[u8]> {
        self.slices.front().filter(|_| self.slices.len() == 1).map(|slice| &**slice)
    }

    /// Fills in what to write next; says how many slices that is.
    pub(super) fn fill<'a>(&'a self, buffers: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        self.slices.iter().zip(buffers).map(|(slice, buffer)| *buffer = IoSlice::new(slice)).count()
    }

    /// So many bytes were written.
    pub(super) fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(front) = self.slices.front_mut() {
            if written < front.len() {
                front.advance(written);
                break;
            }
            written -= front.len();
            self.slices.pop_front();
        }
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
