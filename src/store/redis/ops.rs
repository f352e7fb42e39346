//! The operations of the store contract, as commands and scripts.

pub(super) mod account;
pub(super) mod append;
pub(super) mod dead_letter;
pub(super) mod keys;
pub(super) mod large_entry;
pub(super) mod lease;
pub(super) mod receipts;
pub(super) mod redeliver;
pub(super) mod settle;
pub(super) mod status;
pub(super) mod wait;
