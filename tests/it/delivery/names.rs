//! Workers and their consumers' names: one of each, however many daemons are given it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::store::Store;

use super::{Bus, Deed, PATIENCE, TestSink, firsts, group};
use crate::support::stores::on_stores;
use crate::support::until;

on_stores! { embedded redis: [
    a_second_worker_of_a_name_takes_another_one
    a_name_that_was_given_up_is_free_at_once
    the_name_of_a_crashed_worker_is_free_soon
] }

impl Bus {
    async fn has_note(&self) -> String {
        until("note of a worker", PATIENCE, async || self.readiness.report()[0].note.clone()).await
    }

    async fn consumers(&self) -> Vec<String> {
        self.group().await.consumers.into_iter().map(|consumer| consumer.name.to_string()).collect()
    }
}

pub(super) async fn a_second_worker_of_a_name_takes_another_one(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // A third of it is how long the second worker takes to see that the first one lives; there is work for longer.
    bus.name_lease = Duration::from_secs(3);
    bus.publish(1..=400).await;
    let sink = TestSink::new(1, |_, _| Deed::Sleep(Duration::from_millis(20)));
    let mut config = group();
    config.max_in_flight = 20;
    bus.start("soc-a-0", &sink, config.clone());
    sink.has_taken(3).await;
    bus.start("soc-a-0", &sink, config.clone());
    until("word of the name", PATIENCE, async || {
        (bus.has_note().await == "works as soc-a-0~2: another daemon has the name soc-a-0").then_some(())
    })
    .await;
    until("two consumers", PATIENCE, async || (bus.consumers().await == ["soc-a-0", "soc-a-0~2"]).then_some(())).await;
    bus.start("soc-a-0", &sink, config);
    let mut taken = sink.has_taken(400).await;
    bus.is_settled().await;
    taken.sort_unstable();
    assert_eq!(taken, firsts(1..=400), "no one took what another had in hand for left over");
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 0);
}

pub(super) async fn a_name_that_was_given_up_is_free_at_once(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // Whoever had to wait for the end of a lease would not come to an end.
    bus.name_lease = PATIENCE * 2;
    let sink = TestSink::takes_all(10);
    for round in 0..3 {
        let worker = bus.start("soc-a-0", &sink, group());
        bus.publish(round * 10 + 1..=round * 10 + 10).await;
        assert_eq!(sink.has_taken(usize::try_from(round + 1).expect("small") * 10).await, firsts(1..=round * 10 + 10));
        assert_eq!(bus.consumers().await, ["soc-a-0"]);
        bus.stop(worker).await;
    }
}

pub(super) async fn the_name_of_a_crashed_worker_is_free_soon(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    // Long enough for the second worker to find the name taken.
    bus.name_lease = Duration::from_secs(4);
    bus.publish(1..=10).await;
    let hanging = TestSink::new(1, |_, _| Deed::Hang);
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
