//! What goes of a stream, and what must not go yet.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::delivery::GroupConfig;
use aurora_bus::maintenance::{Janitor, Retention, StreamSpec};
use aurora_bus::metrics::Metrics;
use aurora_bus::store::{Limits, Outcome, Settlement, Start, Store};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;
use crate::support::until;

const BOUND: Duration = Duration::from_secs(20);

on_stores! { embedded redis valkey: [
    nothing_goes_before_every_declared_group_is_made
] }

async fn nothing_goes_before_every_declared_group_is_made(store: Arc<dyn Store>) {
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
    let limits = Limits::new([(stream.clone(), spec.retention.hard_max_len)]);
    let janitor = Janitor::new(Arc::clone(&store), vec![spec], limits.clone(), Metrics::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(janitor.run(CancellationToken::new()));
    until("a look at the stream", BOUND, async || (limits.known(stream) > 0).then_some(())).await;
    assert_eq!(limits.known(stream), 2000);

    // Once it is made it is given what there was, and what is handled goes.
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
