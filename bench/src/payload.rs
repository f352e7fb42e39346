//! The event that every measurement publishes: an alert with a number and a time stamp at fixed offsets.

/// The offset of the sequence number in a payload, as 16 hexadecimal digits.
const SEQUENCE_AT: usize = 8;
/// The offset of the time stamp in a payload, as 16 hexadecimal digits.
const STAMP_AT: usize = 35;
/// The first bytes of every payload.
pub(crate) const MARKS_PREFIX: &[u8] = br#"{"seq":""#;
/// The number of first bytes of a payload that hold its marks.
pub(crate) const MARKS_LEN: usize = STAMP_AT + 16;
/// The smallest payload, in bytes: the alert without its description.
pub(crate) const MIN_SIZE: usize = 320;

const HEAD: &str = r#"{"seq":"0000000000000000","stamp":"0000000000000000","severity":"high","status":"new","title":"Remote service creation over SMB","source":"suricata","category":"network","host":{"name":"fin-ws-0142","ip":"10.20.31.142"},"dst_port":445,"mitre_techniques":["T1021.002","T1569.002"],"description":""#;
const FILLER: &str = "An unsigned binary was run from an administrative share by a service made over the network. ";
const TAIL: &str = r#""}"#;

/// The number of an event and the time when it was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Marks {
    pub(crate) sequence: u64,
    /// Nanoseconds on the clock of the generator.
    pub(crate) stamp: u64,
}

/// An alert of a given size, to which number and time stamp are added.
#[derive(Debug, Clone)]
pub(crate) struct EventTemplate {
    text: Vec<u8>,
}

impl EventTemplate {
    /// Builds an alert of exactly `size` bytes, or [`MIN_SIZE`] if that is more.
    pub(crate) fn new(size: usize) -> Self {
        let filler = size.max(MIN_SIZE) - HEAD.len() - TAIL.len();
        let mut text = HEAD.as_bytes().to_vec();
        text.extend(FILLER.bytes().cycle().take(filler));
        text.extend_from_slice(TAIL.as_bytes());
        Self { text }
    }

    /// Appends the alert with these marks to `out`.
    pub(crate) fn write(&self, sequence: u64, stamp: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.text);
        for (at, value) in [(SEQUENCE_AT, sequence), (STAMP_AT, stamp)] {
            for (place, byte) in out[start + at..start + at + 16].iter_mut().enumerate() {
                let digit = value >> (60 - 4 * place) & 0xf;
                *byte = b"0123456789abcdef"[usize::try_from(digit).expect("it is less than 16")];
            }
        }
    }

    /// Returns the alert with these marks.
    pub(crate) fn bytes(&self, sequence: u64, stamp: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.text.len());
        self.write(sequence, stamp, &mut out);
        out
    }
}

/// Reads the marks from the first bytes of a payload; returns `None` for a payload that no measurement made.
pub(crate) fn read_marks(head: &[u8]) -> Option<Marks> {
    let sequence = hexadecimal(head.get(SEQUENCE_AT..SEQUENCE_AT + 16)?)?;
    let stamp = hexadecimal(head.get(STAMP_AT..STAMP_AT + 16)?)?;
    Some(Marks { sequence, stamp })
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(value << 4 | u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_is_json_of_its_size_and_carries_its_marks() {
        for size in [MIN_SIZE, 500, 4096] {
            let marks = Marks { sequence: 0x0123_4567_89ab_cdef, stamp: 42 };
            let payload = EventTemplate::new(size).bytes(0x0123_4567_89ab_cdef, 42);
            assert_eq!(payload.len(), size);
            let value: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            assert_eq!(value["severity"], "high");
            assert!(payload.starts_with(MARKS_PREFIX));
            assert_eq!(read_marks(&payload), Some(marks));
            assert_eq!(read_marks(&payload[..MARKS_LEN]), Some(marks));
        }
    }

    #[test]
    fn foreign_payload_has_no_marks() {
        assert_eq!(read_marks(b"{}"), None);
        assert_eq!(read_marks(&[b'z'; 100]), None);
    }
}
