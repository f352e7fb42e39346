//! Queries and filters of clients, and the text forms of ids, names and positions.
#![no_main]

use aurora_bus::event::{EntryId, Filter, GroupName, Position, Severity, StreamName};
use aurora_bus::relay::SubscribeParams;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = SubscribeParams::parse(text);
    let _ = Filter::parse(text);
    let _ = text.parse::<Severity>();
    let _ = text.parse::<StreamName>();
    let _ = text.parse::<GroupName>();
    if let Ok(id) = text.parse::<EntryId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    if let Ok(position) = text.parse::<Position>() {
        assert_eq!(position.to_string().parse(), Ok(position));
    }
});
