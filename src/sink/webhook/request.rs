//! The content of a request: body and headers. Pure.
//!
//! | header | one entry | a batch |
//! |---|---|---|
//! | `webhook-id` | stream and entry id: the same at each attempt | the same for the same entries |
//! | `aurora-stream`, `aurora-group` | the source | the source |
//! | `aurora-attempt` | number of deliveries, including this one | the maximum of all entries |
//! | `aurora-entry-id`, `aurora-event-id`, `traceparent` | the values of the entry, if it has them | |
//! | `aurora-count`, `aurora-entry-ids` | | number of entries, and their ids in the order of the body, with commas |
//!
//! A replayed entry has the id of its first delivery, so that a receiver recognizes it.

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

/// Maximum size of a value that is copied from an entry into a header, in bytes.
const COPIED_BYTES: usize = 200;

/// A request without its time and signature.
#[derive(Debug)]
pub(super) struct WebhookRequest {
    pub(super) id: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl WebhookRequest {
    /// Creates the request of one entry. The body is the payload, byte for byte.
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

    /// Creates the request of several entries. The body is a JSON array of the payloads.
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
        // A retried batch may have the same first entry and others after it: then it is a different request.
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

/// Converts a name or an id. Both are visible ASCII.
fn text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("names and ids are visible ASCII")
}

/// Makes a name usable in a signed id. A full stop separates the signed parts. Names have no slash, so replaced names
/// stay distinct.
fn safe(name: &str) -> String {
    name.replace('.', "/")
}

/// Returns the payload if it is JSON, as the content type claims.
fn payload(entry: &Entry) -> Result<&Bytes, SinkError> {
    let undecodable = |request: String| SinkError::new(SinkErrorClass::Undecodable, request);
    let data = entry.data().ok_or_else(|| undecodable("the entry has no `data`".to_owned()))?;
    let text = std::str::from_utf8(data)
        .map_err(|error| undecodable(format!("the entry's `data` is not UTF-8 from byte {}", error.valid_up_to())))?;
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

    fn shown(request: &WebhookRequest) -> Vec<String> {
        let mut headers: Vec<String> =
            request.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        headers.sort();
        headers
    }

    #[test]
    fn entry_is_sent_as_payload_with_headers() {
        let trace = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let fields: [(_, &[u8]); 4] =
            [("id", b"0195-x"), ("data", b"{ \"a\" : 1.50 }"), ("traceparent", trace), ("severity", b"high")];
        let request = WebhookRequest::of_entry(&origin(), &delivery(7, 3, &fields)).unwrap();
        assert_eq!(request.body, &b"{ \"a\" : 1.50 }"[..]);
        assert_eq!(
            shown(&request),
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
    fn values_that_break_a_header_are_omitted() {
        let long: &[u8] = &[b'x'; 201];
        for bad in [&b"a\r\nx-evil: 1"[..], b"\x00", long] {
            let fields = [("id", bad), ("data", b"{}")];
            let pairs: Fields = fields.iter().map(|(n, v)| (Bytes::from(*n), Bytes::copy_from_slice(v))).collect();
            let entry = Entry { id: EntryId::new(7, 0), fields: pairs };
            let delivery = Delivery { entry, attempt: 1, delivered_at: Instant::now() };
            let request = WebhookRequest::of_entry(&origin(), &delivery).unwrap();
            assert_eq!(request.headers.get(EVENT_ID), None);
        }
    }

    #[test]
    fn batch_is_an_array_with_ids_in_order() {
        let batch = [delivery(7, 1, &[("data", b"{\"a\":\n1}")]), delivery(8, 4, &[("data", b"2")])];
        let request = WebhookRequest::of_batch(&origin(), &batch).unwrap();
        assert_eq!(request.body, &b"[{\"a\":\n1},2]"[..]);
        let headers = shown(&request);
        for expected in ["aurora-attempt: 4", "aurora-count: 2", "aurora-entry-ids: 7-0,8-0"] {
            assert!(headers.iter().any(|header| header == expected), "{expected} is not in {headers:?}");
        }
        let id = |batch: &[Delivery]| WebhookRequest::of_batch(&origin(), batch).unwrap().id;
        assert_eq!(id(&batch), id(&batch));
        assert_ne!(id(&batch), id(&batch[..1]));
        assert!(id(&batch).starts_with("aurora:a/b/") && !id(&batch).contains('.'));
    }

    #[test]
    fn replayed_entry_keeps_its_first_id() {
        let replayed = delivery(9, 1, &[("data", b"{}"), ("replay.of", b"7-0")]);
        let first = delivery(7, 1, &[("data", b"{}")]);
        let request = |delivery| WebhookRequest::of_entry(&origin(), delivery).unwrap();
        assert_eq!(request(&replayed).id, request(&first).id);
        let forged = delivery(9, 1, &[("data", b"{}"), ("replay.of", b"first")]);
        assert_eq!(request(&forged).headers[ENTRY_ID], "9-0");
    }

    #[test]
    fn payload_without_json_is_undecodable() {
        let cases: [(&[Field], &str); 5] = [
            (&[("severity", b"high")], "the entry has no `data`"),
            (&[("data", b"")], "the entry's `data` is not JSON"),
            (&[("data", b"{\"a\":1} x")], "the entry's `data` is not JSON"),
            (&[("data", b"NaN")], "the entry's `data` is not JSON"),
            (&[("data", b"{\"a\":\"\xff\"}")], "the entry's `data` is not UTF-8 from byte 6"),
        ];
        for (fields, problem) in cases {
            let error = WebhookRequest::of_entry(&origin(), &delivery(1, 1, fields)).unwrap_err();
            assert_eq!((error.class(), error.to_string().as_str()), (SinkErrorClass::Undecodable, problem));
            let batch = [delivery(2, 1, &[("data", b"{}")]), delivery(1, 1, fields)];
            assert_eq!(WebhookRequest::of_batch(&origin(), &batch).unwrap_err().class(), SinkErrorClass::Undecodable);
        }
    }
}
