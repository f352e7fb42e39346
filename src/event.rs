//! The vocabulary of the bus: names, entry ids, entries, deliveries, dead letters, filters and the view of an alert.
//!
//! Owns the types that all modules share, and their encodings as text and as entry fields. Knows nothing of I/O, of the
//! runtime, or of any store: all types are pure values.

mod alert;
mod dead_letter;
mod entry;
mod family;
mod filter;
mod id;
mod name;

pub use alert::{AlertView, Severity, UnknownSeverity};
pub use dead_letter::{DeadLetter, DeadLetterReason};
pub use entry::{Delivery, Entry, Fields, IdempotencyKey, NewEntry, NewEvent, NotAnEvent, field};
pub use family::{Family, InvalidKey, InvalidPattern, StreamPattern};
pub(crate) use filter::relayable;
pub use filter::{Attribute, Filter, InvalidFilter, Tags};
pub use id::{EntryId, Epoch, InvalidEntryId, InvalidPosition, Position};
pub use name::{ConsumerName, GroupName, InvalidName, StreamName};
