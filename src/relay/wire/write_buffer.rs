//! The bytes to write to one socket: a few slices of shared frames, never a growing queue.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

use crate::relay::metrics::WriteStats;

/// The maximum number of slices in one write.
pub(crate) const MAX_SLICES: usize = 32;

/// The size above which nothing more is added, in bytes. The last slice may go beyond.
pub(crate) const MAX_BYTES: usize = 64 * 1024;

/// Whole frames to write to a socket.
///
/// Bounded by [`MAX_SLICES`], and by [`MAX_BYTES`] and one more slice. A client that does not read keeps no more alive
/// here.
#[derive(Debug, Default)]
pub(crate) struct WriteBuffer {
    /// Empty only if the whole buffer is. At low rates it is the only slice, and no other memory is touched.
    first: Bytes,
    rest: VecDeque<Bytes>,
    bytes: usize,
    /// The number of alerts added.
    pub(crate) alerts: u64,
    /// The oldest entry in it that was appended while the client was connected, in ms since 1970.
    pub(crate) oldest_ms: Option<u64>,
}

impl WriteBuffer {
    /// Returns whether all bytes are written.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Returns whether the buffer must be written before more is added.
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

    /// Removes and returns the first slice.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let next = self.rest.pop_front().unwrap_or_default();
        let slice = std::mem::replace(&mut self.first, next);
        self.bytes -= slice.len();
        (!slice.is_empty()).then_some(slice)
    }

    /// Returns the next slice to write, if it is the only one.
    pub(crate) fn single_slice(&self) -> Option<&[u8]> {
        self.rest.is_empty().then_some(&*self.first)
    }

    /// Fills in the slices to write next. Returns their number.
    pub(crate) fn fill_slices<'a>(&'a self, buffers: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        let slices = std::iter::once(&self.first).chain(&self.rest);
        slices.zip(buffers).map(|(slice, buffer)| *buffer = IoSlice::new(slice)).count()
    }

    /// Takes the numbers of all frames added since the last call.
    pub(crate) fn take_stats(&mut self) -> WriteStats {
        WriteStats { writes: 0, alerts: std::mem::take(&mut self.alerts), oldest_ms: self.oldest_ms.take() }
    }

    /// Removes bytes that were written.
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
        fn slices_are_written_in_order(
            slices in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..MAX_SLICES),
            steps in proptest::collection::vec(1_usize..70, 1..100),
        ) {
            let mut output = WriteBuffer::default();
            let expected = slices.concat();
            for slice in slices {
                output.push(slice.into());
            }
            let mut written = Vec::new();
            for step in steps {
                let mut buffers = [IoSlice::new(&[]); MAX_SLICES];
                let count = output.fill_slices(&mut buffers);
                let front: Vec<u8> = buffers[..count].iter().flat_map(|b| b.iter().copied()).take(step).collect();
                output.advance(front.len());
                written.extend(front);
            }
            prop_assert_eq!(&written[..], &expected[..written.len()]);
            prop_assert_eq!(output.is_empty(), written.len() == expected.len());
        }
    }
}
