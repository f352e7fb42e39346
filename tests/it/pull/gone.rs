//! Workers that have gone when their answer is ready.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use aurora_bus::delivery::{GroupConfig, GroupSpec, Guard};
use aurora_bus::metrics::Metrics;
use aurora_bus::pull::{Bell, Config, Pull, PullGroup, Wanted};
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{Start, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::store_contract::{new_entry, unique_stream};
use crate::support::stores::on_stores;

/// Far longer than the test: only what is given back comes again.
const CLAIM_IDLE: Duration = Duration::from_mins(10);

async fn what_was_answered_to_someone_who_had_gone_is_given_to_others_at_once(store: Arc<dyn Store>) {
    let (stream, metrics, readiness) = (unique_stream(), Metrics::new(), Readiness::default());
    let name = |text: &str| text.parse().expect("a valid name");
    let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
    config.claim_idle = CLAIM_IDLE;
    store.ensure_group(&stream, &config.name, Start::Oldest).await.expect("a group");
    let bell = Arc::<Notify>::default();
    let group = PullGroup {
        stream: stream.clone(),
        label: stream.to_string(),
        group: config.name.clone(),
        dead_letter: stream.default_dead_letter(),
        claim_idle: CLAIM_IDLE,
        max_deliveries: 3,
        bell: Bell::OfStream(Arc::clone(&bell)),
    };
    let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let spec = GroupSpec { dead_letter: stream.default_dead_letter(), stream: stream.clone(), config };
    let guard = Guard::new(store.clone(), spec, name("it-guard"), &metrics, readiness.part("guard", None));
    tasks.spawn(guard.with_bell(bell).run(stop.clone()));
    let key = (group.stream.clone(), group.group.clone());
    let pull = Pull::new(&store, Config::default(), [group], Vec::new(), &name("it-pull"), &name("it-guard"), &metrics);
    let running = pull.clone();
    let stopped = stop.clone();
    tasks.spawn(async move { running.run(stopped).await });
    let desk = pull.desk(&key.0, &key.1).expect("the desk");

    let wanted = |consumer: &str| Wanted { consumer: name(consumer), max: 1, lease: CLAIM_IDLE, wait: BOUND };
    {
        let mut pulling = pin!(desk.pull(wanted("gone")));
        let is_waiting = poll_fn(|cx| Poll::Ready(pulling.as_mut().poll(cx).is_pending())).await;
        assert!(is_waiting, "there is nothing yet");
        store.append(&stream, vec![new_entry("task")]).await.expect("appended");
        let given = metrics.pull_deliveries.with_label_values(&[stream.as_str(), "agents"]);
        until("answer", BOUND, async || (given.get() == 1).then_some(())).await;
    }
    let tasks_of_other = desk.pull(wanted("other")).await.expect("served");
    let attempts: Vec<u32> = tasks_of_other.iter().map(|task| task.token.attempt()).collect();
    assert_eq!(attempts, [1], "it was nobody's attempt");
    stop.cancel();
    tasks.join_all().await;
}

on_stores! { embedded redis valkey: [
    what_was_answered_to_someone_who_had_gone_is_given_to_others_at_once
] }
