//! The surroundings of a worker's loop: its fixed context, and the facts that its parts share.

use std::sync::Arc;

use crate::delivery::GroupSpec;
use crate::delivery::worker::leases::LeaseWatch;
use crate::delivery::worker::metrics::GroupMetrics;
use crate::delivery::worker::sink_call::SinkCaller;
use crate::readiness::Part;
use crate::store::{Cursor, Store};

/// The store, the sink and the settings of one worker. All parts of the loop read them, none changes them.
#[derive(Debug)]
pub(crate) struct WorkerContext {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) cursor: Cursor,
    pub(crate) group: GroupSpec,
    pub(crate) caller: Arc<SinkCaller>,
    pub(crate) max_batch: usize,
    pub(crate) leases: LeaseWatch,
    pub(crate) part: Part,
    pub(crate) metrics: GroupMetrics,
    /// Whether the group keeps an order. All pending entries of the group then belong to this worker.
    pub(crate) is_ordered: bool,
}

/// Facts about all parts that decide whether one of them may start its next task.
///
/// `start` and `next_due` of a part read the same facts, so that they agree.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts of different parts")]
pub(crate) struct Conditions {
    /// Whether entries may be taken in: the worker runs, and its leases are valid.
    pub(crate) is_open: bool,
    pub(crate) is_sink_down: bool,
    /// Whether the intake fetches new entries, and recovers none.
    pub(crate) is_fetching: bool,
    pub(crate) is_searching: bool,
    /// Whether an entry waits that must be in flight alone.
    pub(crate) awaits_isolation: bool,
    /// Whether other members of the family wait for a worker.
    pub(crate) is_crowded: bool,
    /// Entries that may still come in; 0 while the sink is down.
    pub(crate) free_slots: usize,
    /// Entries that may come in as probes while the sink is down: 0 or 1.
    pub(crate) probe_slots: usize,
    /// Entries that may be retried as probes while the sink is down: 0 or 1.
    pub(crate) retry_slots: usize,
    /// Entries that a crash would deliver once more.
    pub(crate) unsettled: usize,
}
