//! Payloads of producers, and the alert view that filters read.
#![no_main]

use aurora_bus::event::{AlertView, NewEntry, NewEvent, field};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let view = AlertView::parse(input);
    let Ok(event) = NewEvent::parse(Bytes::copy_from_slice(input)) else { return };
    let view = view.expect("an event is an object");
    let entry = event.into_entry(&NewEntry::timestamp_now(), None);
    assert_eq!(entry.fields.get(field::DATA).map(|data| &data[..]), Some(input), "byte for byte");
    assert_eq!(entry.fields.text(field::SEVERITY), view.severity.map(|severity| severity.as_str()));
});
