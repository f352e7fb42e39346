//! The byte format of chunks: up to 64 entries in one row.
//!
//! A sealed chunk is never changed in place. Its first four bytes are the CRC-32C of all others, so that damage is
//! detected before an entry is read. Pure values, no I/O.
//!
//! Layout, integers little-endian: `crc u32, version u8, stream u32, count u32, added u64, first id, last id`, then per
//! entry `varint ms - first ms, varint seq, varint length, fields`. Fields: `varint count`, then per field a byte that
//! is the number of a well-known name or 0 and `varint length, name`, then `varint length, value`.

use bytes::Bytes;

use crate::event::{Entry, EntryId, Fields, field};
use crate::store::{Order, Range};

/// The maximum number of entries in a chunk.
const MAX_ENTRIES: u32 = 64;
/// A chunk is closed once it has this many bytes; a single entry may be larger.
const FULL_BYTES: usize = 32 * 1024;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 53;

/// Names that are written as one byte: the index in this table plus one. Only append to this table.
const WELL_KNOWN: [&str; 8] = [
    field::ID,
    field::TIMESTAMP,
    field::DATA,
    field::SEVERITY,
    field::SOURCE,
    field::CATEGORY,
    field::TENANT,
    field::TRACEPARENT,
];

/// The header of a chunk, which the index keeps in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkHead {
    /// The stream's number.
    pub(crate) stream: u32,
    /// The number of its entries.
    pub(crate) count: u32,
    /// The number of entries ever added to the stream when this chunk was sealed.
    pub(crate) added: u64,
    /// Its first entry.
    pub(crate) first: EntryId,
    /// Its last entry.
    pub(crate) last: EntryId,
}

/// A sealed chunk whose checksum is right.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(crate) head: ChunkHead,
    body: Bytes,
}

/// One entry of a chunk, not decoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) id: EntryId,
    from: usize,
    to: usize,
}

/// Why bytes are not a valid chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChunkDamage {
    #[error("the checksum is wrong")]
    Checksum,
    #[error("it was written by a newer version of aurora-bus (chunk version {0})")]
    Version(u8),
    #[error("its content is invalid")]
    Content,
}

impl Chunk {
    /// Opens the bytes of a row. Fails if they are not a sealed chunk.
    pub(crate) fn open(body: Bytes) -> Result<Self, ChunkDamage> {
        let mut reader = ByteReader { bytes: &body, at: 0 };
        let checksum = reader.u32().ok_or(ChunkDamage::Content)?;
        if body.get(4..).map(crc32c::crc32c) != Some(checksum) {
            return Err(ChunkDamage::Checksum);
        }
        match reader.u8().ok_or(ChunkDamage::Content)? {
            VERSION => {}
            other => return Err(ChunkDamage::Version(other)),
        }
        let mut head = || {
            Some(ChunkHead {
                stream: reader.u32()?,
                count: reader.u32()?,
                added: reader.u64()?,
                first: EntryId::new(reader.u64()?, reader.u64()?),
                last: EntryId::new(reader.u64()?, reader.u64()?),
            })
        };
        let head = head().ok_or(ChunkDamage::Content)?;
        Ok(Self { head, body })
    }

    /// Returns the bytes of the row.
    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// Returns the entries, oldest first, not decoded.
    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots {
            reader: ByteReader { bytes: &self.body, at: HEADER_BYTES },
            first_ms: self.head.first.ms,
            before: None,
            left: self.head.count,
        }
    }

    /// Decodes an entry of this chunk. Names and values share the chunk's memory.
    pub(crate) fn entry(&self, slot: Slot) -> Result<Entry, ChunkDamage> {
        let fields = self.fields(slot).ok_or(ChunkDamage::Content)?;
        Ok(Entry { id: slot.id, fields })
    }

    fn fields(&self, slot: Slot) -> Option<Fields> {
        let mut reader = ByteReader { bytes: self.body.get(..slot.to)?, at: slot.from };
        let count = reader.varint()?;
        let mut fields = Fields::with_capacity(usize::try_from(count).ok()?.min(slot.to - slot.from));
        for _ in 0..count {
            let name = match reader.u8()? {
                0 => self.body.slice(reader.sized()?),
                known => Bytes::from_static(WELL_KNOWN.get(usize::from(known) - 1)?.as_bytes()),
            };
            let value = self.body.slice(reader.sized()?);
            fields.push(name, value);
        }
        Some(fields)
    }

    /// Adds the entries of a range to `entries`, in its order, until there are `limit`.
    pub(crate) fn collect(&self, range: Range, limit: usize, entries: &mut Vec<Entry>) -> Result<(), ChunkDamage> {
        let mut slots = Vec::with_capacity(MAX_ENTRIES as usize);
        for slot in self.slots() {
            let slot = slot?;
            if slot.id >= range.from && slot.id <= range.to {
                slots.push(slot);
            }
        }
        if range.order == Order::Backward {
            slots.reverse();
        }
        for slot in slots.into_iter().take(limit.saturating_sub(entries.len())) {
            entries.push(self.entry(slot)?);
        }
        Ok(())
    }

    /// Returns the chunk without the entries for which `is_gone` is true, or `None` if none is left.
    pub(crate) fn without(&self, is_gone: impl Fn(EntryId) -> bool) -> Result<Option<Self>, ChunkDamage> {
        let mut builder = ChunkBuilder::new(self.head.stream);
        for slot in self.slots() {
            let slot = slot?;
            if !is_gone(slot.id) {
                builder.push_slot(self, slot);
            }
        }
        Ok((builder.count > 0).then(|| builder.seal(self.head.added)))
    }
}

/// The iterator of [`Chunk::slots`].
#[derive(Debug)]
pub(crate) struct Slots<'a> {
    reader: ByteReader<'a>,
    first_ms: u64,
    /// The id of the previous slot. Ids that do not grow are damage, because callers rely on their order.
    before: Option<EntryId>,
    left: u32,
}

impl Iterator for Slots<'_> {
    type Item = Result<Slot, ChunkDamage>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let mut slot = || {
            let ms = self.first_ms.checked_add(self.reader.varint()?)?;
            let id = EntryId::new(ms, self.reader.varint()?);
            if self.before.replace(id).is_some_and(|before| before >= id) {
                return None;
            }
            let fields = self.reader.sized()?;
            Some(Slot { id, from: fields.start, to: fields.end })
        };
        let slot = slot();
        if slot.is_none() {
            self.left = 0;
        }
        Some(slot.ok_or(ChunkDamage::Content))
    }
}

/// A chunk that is being filled.
#[derive(Debug)]
pub(crate) struct ChunkBuilder {
    stream: u32,
    body: Vec<u8>,
    first: EntryId,
    last: EntryId,
    count: u32,
}

impl ChunkBuilder {
    pub(crate) fn new(stream: u32) -> Self {
        Self { stream, body: vec![0; HEADER_BYTES], first: EntryId::MIN, last: EntryId::MIN, count: 0 }
    }

    /// Returns whether the next entry needs another chunk.
    pub(crate) fn is_full(&self) -> bool {
        self.count >= MAX_ENTRIES || self.body.len() >= FULL_BYTES
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Adds an entry with fields encoded by [`encode`]. Its id must be greater than the ids before.
    pub(crate) fn push(&mut self, id: EntryId, fields: &[u8]) {
        if self.count == 0 {
            self.first = id;
        }
        self.last = id;
        self.count += 1;
        self.body.reserve(fields.len() + 24);
        put_varint(&mut self.body, id.ms - self.first.ms);
        put_varint(&mut self.body, id.seq);
        put_sized(&mut self.body, fields);
    }

    /// Adds an entry of another chunk.
    pub(crate) fn push_slot(&mut self, chunk: &Chunk, slot: Slot) {
        self.push(slot.id, &chunk.body[slot.from..slot.to]);
    }

    /// Seals the chunk. `added` is the number of entries ever added to the stream, these included.
    pub(crate) fn seal(mut self, added: u64) -> Chunk {
        let head = ChunkHead { stream: self.stream, count: self.count, added, first: self.first, last: self.last };
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(&[0; 4]);
        header.push(VERSION);
        header.extend_from_slice(&head.stream.to_le_bytes());
        header.extend_from_slice(&head.count.to_le_bytes());
        for number in [head.added, head.first.ms, head.first.seq, head.last.ms, head.last.seq] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        self.body[..HEADER_BYTES].copy_from_slice(&header);
        let checksum = crc32c::crc32c(&self.body[4..]);
        self.body[..4].copy_from_slice(&checksum.to_le_bytes());
        self.body.shrink_to_fit();
        Chunk { head, body: self.body.into() }
    }
}

/// Reads arbitrary bytes as a chunk with a correct checksum, and returns the readable entries.
///
/// It must never panic, and the entries must stay the same after a copy into another chunk.
#[cfg(any(test, fuzzing))]
pub fn fuzz(input: &[u8]) -> Vec<Entry> {
    let all = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    if let Some(ids) = unpack_ids(input) {
        assert_eq!(unpack_ids(&pack_ids(&ids)), Some(ids));
    }
    let checksum = input.get(4..).map_or(0, crc32c::crc32c);
    let body: Vec<u8> = checksum.to_le_bytes().into_iter().chain(input.iter().skip(4).copied()).collect();
    let Ok(chunk) = Chunk::open(body.into()) else { return Vec::new() };
    let (mut entries, mut again) = (Vec::new(), Vec::new());
    if chunk.collect(all, usize::MAX, &mut entries).is_ok() {
        let copy = chunk.without(|_| false).expect("every entry was read");
        assert_eq!(copy.is_some(), !entries.is_empty());
        if let Some(copy) = copy {
            copy.collect(all, usize::MAX, &mut again).expect("it was made just now");
        }
        assert_eq!(entries, again);
    }
    entries
}

/// Appends fields to `to` in the format of a chunk.
pub(crate) fn encode(fields: &Fields, to: &mut Vec<u8>) {
    to.reserve(fields.size_bytes() + fields.len() * 6 + 4);
    put_varint(to, fields.len() as u64);
    for (name, value) in fields.iter() {
        if let Some(place) = WELL_KNOWN.iter().position(|known| known.as_bytes() == name.as_ref()) {
            to.push(u8::try_from(place + 1).expect("the table is short"));
        } else {
            to.push(0);
            put_sized(to, name);
        }
        put_sized(to, value);
    }
}

/// Packs ids in ascending order.
pub(crate) fn pack_ids(ids: &[EntryId]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(8 + ids.len() * 3);
    let mut last_ms = 0;
    put_varint(&mut packed, ids.len() as u64);
    for id in ids {
        put_varint(&mut packed, id.ms - last_ms);
        put_varint(&mut packed, id.seq);
        last_ms = id.ms;
    }
    packed
}

/// Unpacks the output of [`pack_ids`].
pub(crate) fn unpack_ids(packed: &[u8]) -> Option<Vec<EntryId>> {
    let mut reader = ByteReader { bytes: packed, at: 0 };
    let count = usize::try_from(reader.varint()?).ok()?;
    let mut ids = Vec::with_capacity(count.min(packed.len()));
    let mut ms = 0_u64;
    for _ in 0..count {
        ms = ms.checked_add(reader.varint()?)?;
        ids.push(EntryId::new(ms, reader.varint()?));
    }
    (reader.at == packed.len()).then_some(ids)
}

fn put_varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    to.push(number.to_le_bytes()[0]);
}

fn put_sized(to: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

/// Reads forward through bytes. Each method returns `None` if too few bytes are left.
#[derive(Debug)]
struct ByteReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl ByteReader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let end = self.at.checked_add(N)?;
        let array = self.bytes.get(self.at..end)?.try_into().ok()?;
        self.at = end;
        Some(array)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    /// Returns the range of the next length-prefixed bytes.
    fn sized(&mut self) -> Option<std::ops::Range<usize>> {
        let length = usize::try_from(self.varint()?).ok()?;
        let start = self.at;
        let end = start.checked_add(length).filter(|end| *end <= self.bytes.len())?;
        self.at = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fuzz_seeds_contain_readable_entries() {
        let seeds = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/entry")).expect("seeds");
        let read = seeds.map(|seed| fuzz(&std::fs::read(seed.expect("a seed").path()).expect("a seed")).len());
        assert!(read.sum::<usize>() > 0, "no seed has entries");
    }

    fn fields() -> impl Strategy<Value = Fields> {
        let name = prop_oneof![
            proptest::sample::select(WELL_KNOWN.as_slice()).prop_map(|name| name.as_bytes().to_vec()),
            vec(any::<u8>(), 0..40),
        ];
        vec((name, vec(any::<u8>(), 0..200)), 0..9)
            .prop_map(|fields| fields.into_iter().map(|(n, v)| (Bytes::from(n), Bytes::from(v))).collect())
    }

    fn build(entries: &[(EntryId, Fields)]) -> Chunk {
        let mut builder = ChunkBuilder::new(7);
        for (id, fields) in entries {
            let mut encoded = Vec::new();
            encode(fields, &mut encoded);
            builder.push(*id, &encoded);
        }
        builder.seal(1000)
    }

    fn read(chunk: &Chunk, range: Range, limit: usize) -> Vec<(EntryId, Fields)> {
        let mut entries = Vec::new();
        chunk.collect(range, limit, &mut entries).expect("an undamaged chunk");
        entries.into_iter().map(|entry| (entry.id, entry.fields)).collect()
    }

    fn entries() -> impl Strategy<Value = Vec<(EntryId, Fields)>> {
        let step = (prop_oneof![Just(0_u64), 1..1_000_u64], 1..5_u64, fields());
        (0..u64::from(u32::MAX), vec(step, 1..20)).prop_map(|(start, steps)| {
            let mut id = EntryId::new(start, 0);
            steps
                .into_iter()
                .map(|(ms, seq, fields)| {
                    id = if ms == 0 { EntryId::new(id.ms, id.seq + seq) } else { EntryId::new(id.ms + ms, seq - 1) };
                    (id, fields)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn entries_survive_a_chunk(entries in entries(), from in 0..20_usize, to in 0..20_usize, limit in 0..25_usize) {
            let chunk = Chunk::open(build(&entries).body).expect("an undamaged chunk");
            prop_assert_eq!(chunk.head.count as usize, entries.len());
            prop_assert_eq!((chunk.head.stream, chunk.head.added), (7, 1000));
            prop_assert_eq!((chunk.head.first, chunk.head.last), (entries[0].0, entries[entries.len() - 1].0));
            let (from, to) = (from.min(entries.len() - 1), to.min(entries.len() - 1));
            let mut expected = entries.get(from..=to).unwrap_or_default().to_vec();
            let mut range = Range { from: entries[from].0, to: entries[to].0, order: Order::Forward };
            prop_assert_eq!(&read(&chunk, range, limit), &expected[..limit.min(expected.len())]);
            range.order = Order::Backward;
            expected.reverse();
            prop_assert_eq!(&read(&chunk, range, limit), &expected[..limit.min(expected.len())]);
        }

        #[test]
        fn any_flipped_bit_is_detected(entries in entries(), place: prop::sample::Index, bit in 0..8_u8) {
            let mut body = build(&entries).body.to_vec();
            body[place.index(entries.len().max(1) * 8)] ^= 1 << bit;
            prop_assert_eq!(Chunk::open(body.into()).map(|_| ()), Err(ChunkDamage::Checksum));
        }

        #[test]
        fn any_bytes_with_right_checksum_never_panic(mut body in vec(any::<u8>(), 60..300)) {
            body[4] = VERSION;
            body[9..13].copy_from_slice(&20_u32.to_le_bytes());
            let checksum = crc32c::crc32c(&body[4..]);
            body[..4].copy_from_slice(&checksum.to_le_bytes());
            let chunk = Chunk::open(body.into()).expect("a right checksum");
            for slot in chunk.slots().map_while(Result::ok) {
                prop_assert!(chunk.entry(slot).is_ok_and(|entry| entry.id == slot.id) || chunk.fields(slot).is_none());
            }
        }

        #[test]
        fn ids_survive_packing(entries in entries()) {
            let ids: Vec<EntryId> = entries.iter().map(|(id, _)| *id).collect();
            prop_assert_eq!(unpack_ids(&pack_ids(&ids)), Some(ids));
        }

        #[test]
        fn unpacking_any_bytes_never_panics(packed in vec(any::<u8>(), 0..60)) {
            if let Some(ids) = unpack_ids(&packed) {
                prop_assert!(ids.len() <= packed.len());
            }
        }
    }

    #[test]
    fn chunk_without_some_entries_keeps_the_others() {
        let entries: Vec<(EntryId, Fields)> = (0..5).map(|n| (EntryId::new(9, n), Fields::default())).collect();
        let chunk = build(&entries);
        let left = chunk.without(|id| id.seq.is_multiple_of(2)).expect("undamaged").expect("two are left");
        assert_eq!(
            left.head,
            ChunkHead { count: 2, first: EntryId::new(9, 1), last: EntryId::new(9, 3), ..chunk.head }
        );
        assert!(chunk.without(|_| true).expect("undamaged").is_none());
    }
}
