//! What the tests share: the servers they need, and how they come onto the machine.

pub(crate) mod install;
pub(crate) mod proxy;
pub(crate) mod redis;

use std::time::{Duration, Instant};

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
