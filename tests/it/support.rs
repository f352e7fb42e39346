//! What the tests share: the servers they need, and how they come onto the machine.

pub(crate) mod app;
pub(crate) mod cluster;
pub(crate) mod install;
pub(crate) mod ledger;
pub(crate) mod postgres;
pub(crate) mod proxy;
pub(crate) mod python;
pub(crate) mod receiver;
pub(crate) mod redis;
pub(crate) mod sentinel;
pub(crate) mod stores;

use std::time::{Duration, Instant};

use aurora_bus::metrics::Metrics;

/// Asks again and again until there is an answer. Fails after `bound`, saying what was waited for.
pub(crate) async fn until<T>(what: &str, bound: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(started.elapsed() < bound, "no {what} within {bound:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The sum of the counters whose name, or name and first labels, begin with that.
pub(crate) fn counted(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.render();
    let values = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<u64>().expect("a number")).sum()
}

/// A number below `limit`, another one each time.
pub(crate) fn random_below(limit: u64) -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1 % limit
}
