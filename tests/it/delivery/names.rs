//! Consumer names: one worker at a time has each, also if several daemons are configured with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::store::Store;

use super::{Bus, PATIENCE, Reaction, TestSink, firsts, group};
use crate::support::stores::on_stores;
use crate::support::until;

on_stores! { embedded redis: [
    second_worker_of_a_name_takes_a_numbered_name
    released_name_is_free_at_once
    name_of_a_crashed_worker_is_free_soon
] }

impl Bus {
    async fn has_note(&self) -> String {
        until("note of a worker", PATIENCE, async || self.readiness.report()[0].note.clone()).await
    }

    async fn consumers(&self) -> Vec<String> {
        self.group().await.consumers.into_iter().map(|consumer| consumer.name.to_string()).collect()
    }
}

pub(super) async fn second_worker_of_a_name_takes_a_numbered_name(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // The second worker sees after a third of this time that the lease is renewed. The work takes longer.
    bus.name_lease = Duration::from_secs(3);
    bus.publish(1..=400).await;
    let sink = TestSink::new(1, |_, _| Reaction::Sleep(Duration::from_millis(20)));
    let mut config = group();
    config.max_in_flight = 20;
    bus.start("soc-a-0", &sink, config.clone());
    sink.has_taken(3).await;
    bus.start("soc-a-0", &sink, config.clone());
    until("note about the name", PATIENCE, async || {
        (bus.has_note().await == "works as soc-a-0~2: another daemon has the name soc-a-0").then_some(())
    })
    .await;
    until("two consumers", PATIENCE, async || (bus.consumers().await == ["soc-a-0", "soc-a-0~2"]).then_some(())).await;
    bus.start("soc-a-0", &sink, config);
    let mut taken = sink.has_taken(400).await;
    bus.is_settled().await;
    taken.sort_unstable();
    assert_eq!(taken, firsts(1..=400), "no worker recovered the entries of another one");
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 0);
}

pub(super) async fn released_name_is_free_at_once(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // A worker that waited for the end of a lease would exceed the time of the test.
    bus.name_lease = PATIENCE * 2;
    let sink = TestSink::takes_all(10);
    for pass in 0..3 {
        let worker = bus.start("soc-a-0", &sink, group());
        bus.publish(pass * 10 + 1..=pass * 10 + 10).await;
        assert_eq!(sink.has_taken(usize::try_from(pass + 1).expect("small") * 10).await, firsts(1..=pass * 10 + 10));
        assert_eq!(bus.consumers().await, ["soc-a-0"]);
        bus.stop(worker).await;
    }
}

pub(super) async fn name_of_a_crashed_worker_is_free_soon(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // Long enough for the second worker to see that the name is taken.
    bus.name_lease = Duration::from_secs(4);
    bus.publish(1..=10).await;
    let hanging = TestSink::new(1, |_, _| Reaction::Hang);
    let worker = bus.start("soc-a-0", &hanging, group());
    hanging.has_begun(1).await;
    until("pending entries", PATIENCE, async || (bus.group().await.pending == 10).then_some(())).await;
    bus.crash(worker).await;
    let sink = TestSink::takes_all(10);
    let began = Instant::now();
    bus.start("soc-a-0", &sink, group());
    assert!(bus.has_note().await.starts_with("waiting: "));
    sink.has_taken(10).await;
    assert!(began.elapsed() < bus.name_lease * 2, "it took {:?}", began.elapsed());
    assert_eq!(bus.consumers().await, ["soc-a-0"]);
    bus.is_settled().await;
}
