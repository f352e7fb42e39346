//! Entries in the format of the embedded store, and the dead letters in them.
#![no_main]

use aurora_bus::event::{DeadLetter, Entry};
use aurora_bus::store::embedded::fuzz_chunk;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    for entry in fuzz_chunk(input) {
        let _ = entry.severity();
        if let Some(letter) = DeadLetter::from_entry(&entry) {
            let again = Entry { id: entry.id, fields: letter.to_fields() };
            let again = DeadLetter::from_entry(&again).expect("it was written just now");
            assert_eq!((&again.stream, again.id, &again.group), (&letter.stream, letter.id, &letter.group));
            assert_eq!((again.reason, again.attempts, &again.fields), (letter.reason, letter.attempts, &letter.fields));
        }
    }
});
