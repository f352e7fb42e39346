//! Input of a WebSocket client, in pieces of any size.
#![no_main]

use aurora_bus::relay::fuzz_inbound;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if let Some((piece, bytes)) = input.split_first() {
        fuzz_inbound(usize::from(*piece), bytes);
    }
});
