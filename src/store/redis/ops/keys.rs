//! The auxiliary keys of a stream. They share its hash tag, so that one script may use them together in a cluster.

use bytes::{BufMut, Bytes, BytesMut};

use crate::event::{EntryId, GroupName, StreamName};

/// The key that checks of the write path write. The server must grant it, `aurora:*` and `{aurora:*`.
const PROBE: &str = "aurora:bus:probe";

/// The key that stores an idempotency key of a stream.
pub(crate) fn idempotency(stream: &StreamName, key: &[u8]) -> Bytes {
    beside(stream, b"dedup:", key)
}

/// The key of a stream's epoch, with the last known id.
pub(crate) fn epoch(stream: &StreamName) -> Bytes {
    beside(stream, b"epoch", b"")
}

/// The hash of a stream's accounts.
pub(crate) fn account(stream: &StreamName) -> Bytes {
    beside(stream, b"account", b"")
}

/// The marker that an entry of another slot was moved to these dead letters.
pub(crate) fn moved(dead_letters: &StreamName, from: &StreamName, group: &GroupName, id: EntryId) -> Bytes {
    beside(dead_letters, b"moved:", format!("{from}/{group}/{id}").as_bytes())
}

/// The hash of entries that are being moved to dead letters in another slot, with their destinations.
pub(crate) fn moving(stream: &StreamName) -> Bytes {
    beside(stream, b"moving", b"")
}

/// The key that is written only to have a write to wait for.
pub(crate) fn mark(stream: &[u8]) -> Bytes {
    let mut key = BytesMut::with_capacity(stream.len() + 7);
    key.put_u8(b'{');
    key.put_slice(stream);
    key.put_slice(b"}:mark");
    key.freeze()
}

/// The key that a check writes. The number decides its slot.
pub(crate) fn probe(number: u32) -> Bytes {
    if number == 0 { Bytes::from_static(PROBE.as_bytes()) } else { format!("{PROBE}:{number}").into() }
}

/// The key of a lease while it is held.
pub(crate) fn lease(stream: &StreamName, name: &str) -> Bytes {
    beside(stream, b"lease:", name.as_bytes())
}

/// The counter of a stream's lease fences.
pub(crate) fn fence(stream: &StreamName) -> Bytes {
    beside(stream, b"fence", b"")
}

fn beside(stream: &StreamName, kind: &[u8], name: &[u8]) -> Bytes {
    let stream = stream.as_str().as_bytes();
    let mut key = BytesMut::with_capacity(stream.len() + kind.len() + name.len() + 3);
    key.put_u8(b'{');
    key.put_slice(stream);
    key.put_slice(b"}:");
    key.put_slice(kind);
    key.put_slice(name);
    key.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auxiliary_keys_share_the_slot_of_the_stream() {
        let stream: StreamName = "aurora:alerts".parse().expect("a valid name");
        assert_eq!(idempotency(&stream, b"a}{b"), "{aurora:alerts}:dedup:a}{b");
        assert_eq!(epoch(&stream), "{aurora:alerts}:epoch");
        let slot = fred::util::redis_keyslot(stream.as_str().as_bytes());
        assert_eq!(account(&stream), "{aurora:alerts}:account");
        let group: GroupName = "g".parse().expect("a valid name");
        let moved = moved(&stream, &"other".parse().expect("a valid name"), &group, EntryId::MIN);
        assert_eq!(moved, "{aurora:alerts}:moved:other/g/0-0");
        let (lease, fence) = (lease(&stream, "group/siem"), fence(&stream));
        let dedup = idempotency(&stream, b"a}{b");
        let beside =
            [dedup, epoch(&stream), account(&stream), moving(&stream), moved, mark(b"aurora:alerts"), lease, fence];
        for key in beside {
            assert_eq!(fred::util::redis_keyslot(&key), slot);
        }
    }
}
