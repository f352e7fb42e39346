//! What a request carries: the body, and the headers that say what it is. Pure.
//!
//! | header | of one entry | of a batch |
//! |---|---|---|
//! | `webhook-id` | the stream and the entry's id: the same at each attempt | the same for the same entries |
//! | `aurora-stream`, `aurora-group` | where it comes from | likewise |
//! | `aurora-attempt` | how many times it was delivered, this time included | the most of any entry |
//! | `aurora-entry-id`, `aurora-event-id`, `traceparent` | the entry's own, where it has them | |
//! | `aurora-count`, `aurora-entry-ids` | | how many, and the ids in the order of the body, with commas |
//!
//! The id of an entry that was replayed is the one it had first, so that a receiver knows it again.

use bytes::{BufMut as _, Bytes, BytesMut};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::de::IgnoredAny;
use sha2::{Digest as _, Sha256};

use crate::event::{Delivery, Entry, field};
use crate::sink::{Origin, SinkError, SinkErrorClass};

pub(super) const ID: HeaderName = HeaderName::from_static("webhook-id");
pub(super) const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
pub(super) const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const STREAM: HeaderName = HeaderName::from_static("aurora-stream");
const GROUP: HeaderName = HeaderName::from_static("aurora-group");
const ATTEMPT: HeaderName = HeaderName::from_static("aurora-attempt");
const ENTRY_ID: HeaderName = HeaderName::from_static("aurora-entry-id");
const EVENT_ID: HeaderName = HeaderName::from_static("aurora-event-id");
const COUNT: HeaderName = HeaderName::from_static("aurora-count");
const ENTRY_IDS: HeaderName = HeaderName::from_static("aurora-entry-ids");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The longest value that is copied from an entry into a header, in bytes.
const COPIED_BYTES: usize = 200;

/// One request, but for its time and signature.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) id: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Message {
    /// The payload of one entry, byte for byte.
    pub(super) fn of_entry(origin: &Origin, delivery: &Delivery) -> Result<Self, SinkError> {
        let entry = &delivery.entry;
        let body = payload(entry)?.clone();
        let entry_id = entry.first_id().to_string();
        let id = format!("{}/{entry_id}", safe(origin.stream.as_str()));
        let mut headers = headers(origin, &id, delivery.attempt);
        headers.insert(ENTRY_ID, text(&entry_id));
        for (header, field) in [(EVENT_ID, field::ID), (TRACEPARENT, field::TRACEPARENT)] {
            let value = entry.fields.text(field).filter(|text| text.len() <= COPIED_BYTES);
            if let Some(value) = value.and_then(|text| HeaderValue::from_str(text).ok()) {
                headers.insert(header, value);
            }
        }
        Ok(Self { id, headers, body })
    }

    /// The payloads of several entries as one JSON array.
    pub(super) fn of_batch(origin: &Origin, batch: &[Delivery]) -> Result<Self, SinkError> {
        let payloads = batch.iter().map(|delivery| payload(&delivery.entry)).collect::<Result<Vec<_>, _>>()?;
        let mut body = BytesMut::with_capacity(payloads.iter().map(|payload| payload.len() + 1).sum::<usize>() + 1);
        for (place, payload) in payloads.into_iter().enumerate() {
            body.put_u8(if place == 0 { b'[' } else { b',' });
            body.put_slice(payload);
        }
        body.put_u8(b']');
        let ids: Vec<String> = batch.iter().map(|delivery| delivery.entry.first_id().to_string()).collect();
        let ids = ids.join(",");
        // A batch that is retried may have other entries beside the same first one: it is another message then.
        let digest: [u8; 32] = Sha256::digest(&ids).into();
        let digest = u128::from_be_bytes(*digest.first_chunk().expect("a digest has 32 bytes"));
        let id = format!("{}/{digest:032x}", safe(origin.stream.as_str()));
        let attempt = batch.iter().map(|delivery| delivery.attempt).max().unwrap_or_default();
        let mut headers = headers(origin, &id, attempt);
        headers.insert(COUNT, HeaderValue::from(batch.len()));
        headers.insert(ENTRY_IDS, text(&ids));
        Ok(Self { id, headers, body: body.freeze() })
    }
}

fn headers(origin: &Origin, id: &str, attempt: u32) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(12);
    headers.insert(ID, text(id));
    headers.insert(STREAM, text(origin.stream.as_str()));
    headers.insert(GROUP, text(origin.group.as_str()));
    headers.insert(ATTEMPT, HeaderValue::from(attempt));
    headers
}

/// Names and ids are visible ASCII.
fn text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("names and ids are visible ASCII")
}

/// A name as part of an id that is signed. Full stops part what is signed; names have no slash, so none become alike.
fn safe(name: &str) -> String {
    name.replace('.', "/")
}

/// The payload, if it is JSON as the content type says.
fn payload(entry: &Entry) -> Result<&Bytes, SinkError> {
    let undecodable = |message: String| SinkError::new(SinkErrorClass::Undecodable, message);
    let data = entry.data().ok_or_else(|| undecodable("the entry has no `data`".to_owned()))?;
    let text = std::str::from_utf8(data).map_err(|error| {
        undecodable(format!("the entry's `data` is not UTF-8 from byte {} on", error.valid_up_to()))
    })?;
    serde_json::from_str::<IgnoredAny>(text)
        .map_err(|error| undecodable("the entry's `data` is not JSON".to_owned()).with_source(error))?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::event::{EntryId, Fields};

    type Field = (&'static str, &'static [u8]);

    fn origin() -> Origin {
        Origin { stream: "aurora:a.b".parse().unwrap(), group: "siem".parse().unwrap() }
    }

    fn delivery(ms: u64, attempt: u32, pairs: &[Field]) -> Delivery {
        let fields: Fields = pairs.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from_static(v))).collect();
        Delivery { entry: Entry { id: EntryId::new(ms, 0), fields }, attempt, delivered_at: Instant::now() }
    }

    fn shown(message: &Message) -> Vec<String> {
        let mut headers: Vec<String> =
            message.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        headers.sort();
        headers
    }

    #[test]
    fn an_entry_is_its_payload_with_headers_that_say_what_it_is() {
        let trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let fields: [(_, &[u8]); 4] =
            [("id", b"0195-x"), ("data", b"{ \"a\" : 1.50 }"), ("traceparent", trace), ("severity", b"high")];
        let message = Message::of_entry(&origin(), &delivery(7, 3, &fields)).unwrap();
        assert_eq!(message.body, &b"{ \"a\" : 1.50 }"[..]);
        assert_eq!(
            shown(&message),
            [
                "aurora-attempt: 3",
                "aurora-entry-id: 7-0",
                "aurora-event-id: 0195-x",
                "aurora-group: siem",
                "aurora-stream: aurora:a.b",
                "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                "webhook-id: aurora:a/b/7-0",
            ]
        );
    }

    #[test]
    fn what_would_break_a_header_is_left_out() {
        let long: &[u8] = &[b'x'; 201];
        for bad in [&b"a\r\nx-evil: 1"[..], b"\x00", long] {
            let fields = [("id", bad), ("data", b"{}")];
            let pairs: Fields = fields.iter().map(|(n, v)| (Bytes::from(*n), Bytes::copy_from_slice(v))).collect();
            let entry = Entry { id: EntryId::new(7, 0), fields: pairs };
            let delivery = Delivery { entry, attempt: 1, delivered_at: Instant::now() };
            let message = Message::of_entry(&origin(), &delivery).unwrap();
            assert_eq!(message.headers.get(EVENT_ID), None);
        }
    }

    #[test]
    fn a_batch_is_an_array_with_the_ids_in_its_order() {
        let batch = [delivery(7, 1, &[("data", b"{\"a\":\n1}")]), delivery(8, 4, &[("data", b"2")])];
        let message = Message::of_batch(&origin(), &batch).unwrap();
        assert_eq!(message.body, &b"[{\"a\":\n1},2]"[..]);
        let headers = shown(&message);
        for expected in ["aurora-attempt: 4", "aurora-count: 2", "aurora-entry-ids: 7-0,8-0"] {
            assert!(headers.iter().any(|header| header == expected), "{expected} is not in {headers:?}");
        }
        let id = |batch: &[Delivery]| Message::of_batch(&origin(), batch).unwrap().id;
        assert_eq!(id(&batch), id(&batch));
        assert_ne!(id(&batch), id(&batch[..1]));
        assert!(id(&batch).starts_with("aurora:a/b/") && !id(&batch).contains('.'));
    }

    #[test]
    fn a_replayed_entry_keeps_the_id_it_had_first() {
        let replayed = delivery(9, 1, &[("data", b"{}"), ("replay.of", b"7-0")]);
        let first = delivery(7, 1, &[("data", b"{}")]);
        let message = |delivery| Message::of_entry(&origin(), delivery).unwrap();
        assert_eq!(message(&replayed).id, message(&first).id);
        let forged = delivery(9, 1, &[("data", b"{}"), ("replay.of", b"first")]);
        assert_eq!(message(&forged).headers[ENTRY_ID], "9-0");
    }

    #[test]
    fn what_is_no_json_is_undecodable() {
        let cases: [(&[Field], &str); 5] = [
            (&[("severity", b"high")], "the entry has no `data`"),
            (&[("data", b"")], "the entry's `data` is not JSON"),
            (&[("data", b"{\"a\":1} x")], "the entry's `data` is not JSON"),
            (&[("data", b"NaN")], "the entry's `data` is not JSON"),
            (&[("data", b"{\"a\":\"\xff\"}")], "the entry's `data` is not UTF-8 from byte 6 on"),
        ];
        for (fields, problem) in cases {
            let error = Message::of_entry(&origin(), &delivery(1, 1, fields)).unwrap_err();
            assert_eq!((error.class(), error.to_string().as_str()), (SinkErrorClass::Undecodable, problem));
            let batch = [delivery(2, 1, &[("data", b"{}")]), delivery(1, 1, fields)];
            assert_eq!(Message::of_batch(&origin(), &batch).unwrap_err().class(), SinkErrorClass::Undecodable);
        }
    }
}
