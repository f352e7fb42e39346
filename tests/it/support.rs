//! Helpers that several tests share: servers, the daemon, a proxy, and the installation of their programs.

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

/// Polls until `ask` returns a value. Panics after `bound` and names `what` as missing.
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

/// Returns the sum of all counters whose line begins with `name`, which may include the first labels.
pub(crate) fn counted(metrics: &Metrics, name: &str) -> u64 {
    let text = metrics.render();
    let values = text.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<u64>().expect("a number")).sum()
}

/// Returns a random number below `limit`.
pub(crate) fn random_below(limit: u64) -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1 % limit
}
