//! Pulls whose client has disconnected before the reply.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use aurora_bus::delivery::{GroupConfig, GroupSpec, Redeliverer};
use aurora_bus::metrics::Metrics;
use aurora_bus::pull::{Config, PullConsumers, PullGroup, PullRequest};
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{Start, Store};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::store_contract::{new_entry, unique_stream};
use crate::support::stores::on_stores;

/// Far longer than the test: only released entries are delivered again.
const CLAIM_IDLE: Duration = Duration::from_mins(10);

async fn entries_of_a_cancelled_pull_go_to_others_at_once(store: Arc<dyn Store>) {
    let (stream, metrics, readiness) = (unique_stream(), Metrics::new(), Readiness::default());
    let name = |text: &str| text.parse().expect("a valid name");
    let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
    config.claim_idle = CLAIM_IDLE;
    store.ensure_group(&stream, &config.name, Start::Oldest).await.expect("a group");
    let (redeliver, notifications) = mpsc::channel(16);
    let group = PullGroup {
        stream: stream.clone(),
        label: stream.to_string(),
        group: config.name.clone(),
        dead_letter: stream.default_dead_letter(),
        claim_idle: CLAIM_IDLE,
        max_deliveries: 3,
        redeliver,
    };
    let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let spec = GroupSpec { dead_letter: stream.default_dead_letter(), stream: stream.clone(), config };
    let part = readiness.part("redeliverer", None);
    let redeliverer = Redeliverer::of_stream(store.clone(), spec, name("it-guard"), metrics.clone(), part);
    tasks.spawn(redeliverer.with_notifications(notifications).run(stop.clone()));
    let key = (group.stream.clone(), group.group.clone());
    let pull = PullConsumers::new(
        &store,
        Config::default(),
        [group],
        Vec::new(),
        &name("it-pull"),
        &name("it-guard"),
        &metrics,
    );
    let running = pull.clone();
    let stopped = stop.clone();
    tasks.spawn(async move { running.run(stopped).await });
    let pulled = pull.consumer(&key.0, &key.1).expect("the group");

    let request = |consumer: &str| PullRequest { consumer: name(consumer), max: 1, lease: CLAIM_IDLE, wait: BOUND };
    {
        let mut pulling = pin!(pulled.pull(request("gone")));
        let is_waiting = poll_fn(|cx| Poll::Ready(pulling.as_mut().poll(cx).is_pending())).await;
        assert!(is_waiting, "there is nothing yet");
        store.append(&stream, vec![new_entry("task")]).await.expect("appended");
        let given = metrics.pull_deliveries.with_label_values(&[stream.as_str(), "agents"]);
        until("answer", BOUND, async || (given.get() == 1).then_some(())).await;
    }
    let tasks_of_other = pulled.pull(request("other")).await.expect("served");
    let attempts: Vec<u32> = tasks_of_other.iter().map(|task| task.token.attempt()).collect();
    assert_eq!(attempts, [1], "a released delivery is not an attempt");
    stop.cancel();
    tasks.join_all().await;
}

on_stores! { embedded redis valkey: [
    entries_of_a_cancelled_pull_go_to_others_at_once
] }
