//! Replies of a Redis server, from the bytes to the values of the store.
#![no_main]

use aurora_bus::store::redis::fuzz_reply;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use redis_protocol::resp2::decode::decode_bytes as decode_resp2;
use redis_protocol::resp3::decode::complete::decode_bytes as decode_resp3;

fuzz_target!(|input: &[u8]| {
    let bytes = Bytes::copy_from_slice(input);
    if let Ok(Some((frame, _))) = decode_resp3(&bytes) {
        fuzz_reply(&frame);
    }
    if let Ok(Some((frame, _))) = decode_resp2(&bytes) {
        fuzz_reply(&frame.into_resp3());
    }
});
