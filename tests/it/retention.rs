//! Retention by the maintenance scheduler, and its load on the store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::delivery::GroupConfig;
use aurora_bus::event::StreamName;
use aurora_bus::maintenance::{Retention, Scheduler, StreamSpec};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{HardLimits, MeteredStore, Outcome, Settlement, Start, Store};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;
use crate::support::until;

const BOUND: Duration = Duration::from_secs(20);

on_stores! { embedded redis valkey: [
    nothing_is_trimmed_before_every_declared_group_exists
    check_describes_a_stream_once_for_all_tasks
    stream_near_its_hard_limit_is_checked_often
] }

async fn nothing_is_trimmed_before_every_declared_group_exists(store: Arc<dyn Store>) {
    let made = cursor(&unique_stream(), "siem", "soc-a-0");
    let declared_later = cursor(&made.stream, "triage", "soc-a-0");
    let stream = &made.stream;
    for _ in 0..4 {
        store.append(stream, (0..500).map(|_| new_entry("x")).collect()).await.expect("appended");
    }
    store.ensure_group(stream, &made.group, Start::New).await.expect("a group");
    let spec = StreamSpec {
        name: stream.clone(),
        retention: Retention { max_len: 10, ..Retention::default() },
        groups: [&made, &declared_later].map(|cursor| GroupConfig::new(cursor.group.clone())).to_vec(),
    };
    let limits = HardLimits::new([(stream.clone(), spec.retention.hard_max_len)]);
    let (store_of_tasks, readiness) = (Arc::clone(&store), Readiness::default());
    let scheduler = Scheduler::new(store_of_tasks, vec![spec], limits.clone(), Metrics::new(), &readiness);
    let mut tasks = JoinSet::new();
    tasks.spawn(scheduler.run(CancellationToken::new()));
    until("a check of the stream", BOUND, async || (limits.known(stream) > 0).then_some(())).await;
    assert_eq!(limits.known(stream), 2000);

    // The new group receives all entries, and settled entries are trimmed.
    store.ensure_group(stream, &declared_later.group, Start::Oldest).await.expect("a group");
    let mut settlements = Vec::new();
    while settlements.len() < 2000 {
        let fetched = store.fetch(&declared_later, 500, Duration::ZERO).await.expect("fetched");
        assert!(!fetched.is_empty(), "after {} entries", settlements.len());
        let handled = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
        settlements.extend(fetched.into_iter().map(handled));
    }
    store.settle(&declared_later, &settlements).await.expect("settled");
    until("a trim", BOUND, async || (limits.known(stream) < 200).then_some(())).await;
}

/// A stream of nine entries with a group, under a scheduler, on a store that counts its operations.
struct Checked {
    store: Arc<dyn Store>,
    metrics: Metrics,
    stream: StreamName,
    started: Instant,
    tasks: JoinSet<()>,
}

impl Checked {
    async fn start(store: Arc<dyn Store>, retention: Retention) -> Self {
        let metrics = Metrics::new();
        let store: Arc<dyn Store> = Arc::new(MeteredStore::new(store, metrics.clone()));
        let idle = cursor(&unique_stream(), "siem", "soc-a-0");
        let stream = idle.stream.clone();
        store.append(&stream, (0..9).map(|_| new_entry("x")).collect()).await.expect("appended");
        store.ensure_group(&stream, &idle.group, Start::Oldest).await.expect("a group");
        let groups = vec![GroupConfig::new(idle.group)];
        let spec = StreamSpec { name: stream.clone(), retention, groups };
        let limits = HardLimits::new([(stream.clone(), retention.hard_max_len)]);
        let (store_of_tasks, readiness) = (Arc::clone(&store), Readiness::default());
        let scheduler = Scheduler::new(store_of_tasks, vec![spec], limits, metrics.clone(), &readiness);
        let (mut tasks, started) = (JoinSet::new(), Instant::now());
        tasks.spawn(scheduler.run(CancellationToken::new()));
        Self { store, metrics, stream, started, tasks }
    }

    /// Waits for a number of describes and returns the time since the start.
    async fn described(&self, times: u64) -> Duration {
        let described = self.metrics.store_seconds.with_label_values(&["describe"]);
        until("describes", BOUND, async || (described.get_sample_count() >= times).then(|| self.started.elapsed()))
            .await
    }
}

async fn check_describes_a_stream_once_for_all_tasks(store: Arc<dyn Store>) {
    let retention = Retention { max_len: 10, ..Retention::default() };
    let checked = Checked::start(store, retention).await;
    let labels = [checked.stream.as_str(), "siem"];
    until("gauges", BOUND, async || (checked.metrics.group_lag.with_label_values(&labels).get() == 9).then_some(()))
        .await;
    // Three checks, each 5 s apart, give or take a fifth.
    let elapsed = checked.described(3).await;
    assert!(elapsed >= Duration::from_secs(8), "three describes within {elapsed:?}");
    drop(checked.tasks);
    assert_eq!(checked.store.describe(&checked.stream).await.expect("described").expect("the stream").length, 9);
}

async fn stream_near_its_hard_limit_is_checked_often(store: Arc<dyn Store>) {
    let retention = Retention { max_len: 10, hard_max_len: 10, ..Retention::default() };
    let checked = Checked::start(store, retention).await;
    let elapsed = checked.described(7).await;
    assert!(elapsed >= Duration::from_secs(3), "seven describes within {elapsed:?}");
}
