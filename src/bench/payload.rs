//! The event that every measurement publishes: an alert with a number and a time stamp at fixed places.

use std::time::Instant;

/// Where the sequence number stands in a payload, as 16 hexadecimal digits.
const SEQUENCE_AT: usize = 8;
/// Where the time stamp stands in a payload, as 16 hexadecimal digits.
const STAMP_AT: usize = 35;
/// The smallest payload, in bytes: what the alert needs without its description.
pub(crate) const MIN_SIZE: usize = 320;

const HEAD: &str = r#"{"seq":"0000000000000000","stamp":"0000000000000000","severity":"high","status":"new","title":"Remote service creation over SMB","source":"suricata","category":"network","host":{"name":"fin-ws-0142","ip":"10.20.31.142"},"dst_port":445,"mitre_techniques":["T1021.002","T1569.002"],"description":""#;
const FILLER: &str = "An unsigned binary was run from an administrative share by a service made over the network. ";
const TAIL: &str = r#""}"#;

/// An alert of a given size, ready to be numbered and stamped.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    text: Vec<u8>,
}

impl Template {
    /// An alert of exactly `size` bytes, or [`MIN_SIZE`] where that is more.
    pub(crate) fn new(size: usize) -> Self {
        let filler = size.max(MIN_SIZE) - HEAD.len() - TAIL.len();
        let mut text = HEAD.as_bytes().to_vec();
        text.extend(FILLER.bytes().cycle().take(filler));
        text.extend_from_slice(TAIL.as_bytes());
        Self { text }
    }

    /// Appends the alert with its marks set to `out`.
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

    /// The alert with its marks set.
    pub(crate) fn bytes(&self, sequence: u64, stamp: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.text.len());
        self.write(sequence, stamp, &mut out);
        out
    }
}

/// The sequence number and the time stamp of a payload, from its first bytes; nothing where it is not one of ours.
pub(crate) fn read_marks(head: &[u8]) -> Option<(u64, u64)> {
    Some((hexadecimal(head.get(SEQUENCE_AT..SEQUENCE_AT + 16)?)?, hexadecimal(head.get(STAMP_AT..STAMP_AT + 16)?)?))
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(value << 4 | u64::from(digit))
    })
}

/// A clock that publisher and receiver share: nanoseconds since its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn nanos(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_json_of_the_size_asked_for_and_carries_its_marks() {
        for size in [MIN_SIZE, 500, 4096] {
            let payload = Template::new(size).bytes(0x0123_4567_89ab_cdef, 42);
            assert_eq!(payload.len(), size);
            let value: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            assert_eq!(value["severity"], "high");
            assert_eq!(read_marks(&payload), Some((0x0123_4567_89ab_cdef, 42)));
            assert_eq!(read_marks(&payload[..51]), Some((0x0123_4567_89ab_cdef, 42)));
        }
    }

    #[test]
    fn a_foreign_payload_has_no_marks() {
        assert_eq!(read_marks(b"{}"), None);
        assert_eq!(read_marks(&[b'z'; 100]), None);
    }
}
