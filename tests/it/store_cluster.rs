//! The store on a Redis Cluster while the cluster changes.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aurora_bus::event::{EntryId, Fields, StreamName};
use aurora_bus::store::{Cursor, Durability, Order, Outcome, Range, Settled, Settlement, Start, StoreErrorKind};

use crate::store_contract::{cursor, keyed, new_entry, unique_stream};
use crate::support::cluster::Cluster;
use crate::support::redis::{Product, RedisServer};
use crate::support::stores::connect;
use crate::support::until;

const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
const BOUND: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

/// Returns a stream whose keys are on another node than those of `other`.
fn stream_on_other_node(cluster: &Cluster, other: &StreamName) -> StreamName {
    let (index, _) = cluster.nodes_of(other.as_str());
    std::iter::repeat_with(unique_stream)
        .find(|stream| cluster.nodes_of(stream.as_str()).0 != index)
        .expect("a name on another node")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letter_on_another_node_is_written_once() {
    let cluster = Cluster::shared().await;
    let store = connect(&cluster.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    let to = stream_on_other_node(&cluster, &a.stream);
    let ids: Vec<EntryId> = store
        .append(&a.stream, vec![new_entry("x"), new_entry("y")])
        .await
        .expect("appended")
        .into_iter()
        .map(|appended| appended.id)
        .collect();
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let dead_letters = || async {
        let deliveries = store.fetch(&a, 10, Duration::ZERO).await.expect("fetched");
        let letter = |delivery| {
            let mut fields = Fields::default();
            fields.push("reason", "x");
            Settlement { delivery, outcome: Outcome::DeadLetter { to: to.clone(), fields } }
        };
        deliveries.into_iter().map(letter).collect::<Vec<_>>()
    };
    let settlements = dead_letters().await;
    let other = Cursor { consumer: "b".parse().expect("a name"), ..a.clone() };
    assert_eq!(store.settle(&other, &settlements).await.expect("settled"), Settled { settled: 0, not_owned: 2 });
    assert_eq!(store.settle(&a, &settlements).await.expect("settled"), Settled { settled: 2, not_owned: 0 });
    assert_eq!(store.settle(&a, &settlements).await.expect("settled"), Settled { settled: 0, not_owned: 2 });
    assert_eq!(store.range(&to, EVERYTHING, 10).await.expect("read").len(), 2);

    // The state after a crash between the two steps: the dead letters are written and the entries are pending.
    let (index, _) = cluster.nodes_of(a.stream.as_str());
    cluster.node(index).cli(&["XGROUP", "SETID", a.stream.as_str(), "g", "0"]);
    let settlements = dead_letters().await;
    assert_eq!(settlements.len(), 2);
    assert_eq!(store.settle(&a, &settlements).await.expect("settled"), Settled { settled: 2, not_owned: 0 });
    assert_eq!(store.range(&to, EVERYTHING, 10).await.expect("read").len(), 2, "written again");
    assert!(store.pending(&a, false, EntryId::MIN, 10).await.expect("listed").is_empty());

    // A dead letter that was removed does not count as written.
    let first = store.range(&to, EVERYTHING, 1).await.expect("read")[0].id;
    store.discard(&to, &[first]).await.expect("discarded");
    cluster.node(index).cli(&["XGROUP", "SETID", a.stream.as_str(), "g", "0"]);
    store.settle(&a, &dead_letters().await).await.expect("settled");
    assert_eq!(store.range(&to, EVERYTHING, 10).await.expect("read").len(), 2);
    assert_eq!(store.range(&a.stream, EVERYTHING, 10).await.expect("read").len(), ids.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_moved_to_another_node_is_followed() {
    let cluster = Cluster::with_stable_roles().await;
    let store = connect(&cluster.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    store.append(&a.stream, vec![new_entry("before")]).await.expect("appended");
    let (from, _) = cluster.nodes_of(a.stream.as_str());
    let (to, _) = cluster.nodes_of(stream_on_other_node(&cluster, &a.stream).as_str());
    let (from, to) = (cluster.node(from), cluster.node(to));
    let slot = from.cli(&["CLUSTER", "KEYSLOT", a.stream.as_str()]);
    let (from_id, to_id) = (from.cli(&["CLUSTER", "MYID"]), to.cli(&["CLUSTER", "MYID"]));
    to.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
    from.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
    let port = to.port().to_string();
    let account = format!("{{{}}}:account", a.stream);
    let keys = ["", "0", "5000", "KEYS", a.stream.as_str(), &account];
    assert_eq!(from.cli(&[["MIGRATE", "127.0.0.1", &port].as_slice(), &keys].concat()), "OK");

    // The keys have moved already, the slot has not.
    store.append(&a.stream, vec![new_entry("while moving")]).await.expect("appended");
    let fetched = store.fetch(&a, 1, Duration::from_millis(100)).await.expect("fetched");
    assert_eq!(fetched.len(), 1);
    let acknowledge = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
    let settlements: Vec<_> = fetched.into_iter().map(acknowledge).collect();
    store.settle(&a, &settlements).await.expect("settled");
    assert_eq!(store.range(&a.stream, EVERYTHING, 10).await.expect("read").len(), 2);

    for node in [to, from] {
        assert_eq!(node.cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]), "OK");
    }
    store.append(&a.stream, vec![keyed("after", "after", HOUR)]).await.expect("appended");
    assert_eq!(store.fetch(&a, 10, Duration::from_millis(100)).await.expect("fetched").len(), 2);
    let tailed = store.tail(&a.stream, EntryId::MIN, 10, Duration::from_millis(100)).await.expect("tailed");
    assert_eq!(tailed.len(), 3);
    assert_eq!(store.describe(&a.stream).await.expect("described").expect("a stream").length, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_keeps_replicated_entries() {
    let mut cluster = Cluster::start().await;
    let store = connect(&cluster.url()).await;
    assert!(store.check().await.expect("ready").description.ends_with("a cluster of 3"));
    let stream = unique_stream();
    let a = cursor(&stream, "g", "a");
    store.ensure_group(&stream, &a.group, Start::Oldest).await.expect("a group");
    let elsewhere = stream_on_other_node(&cluster, &stream);
    let stop = tokio_util::sync::CancellationToken::new();
    let accepted = Arc::new(Mutex::new(Vec::new()));
    let mut publishers = tokio::task::JoinSet::new();
    for publisher in 0..4 {
        let (store, stream, stop) = (Arc::clone(&store), stream.clone(), stop.clone());
        let accepted = Arc::clone(&accepted);
        publishers.spawn(async move {
            for number in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                let key = format!("{publisher}-{number}");
                let id = loop {
                    let entries = vec![keyed(&key, &key, HOUR)];
                    if let Ok(appended) = store.append_durably(&stream, entries, Durability::REPLICATED).await {
                        break appended[0].id;
                    }
                };
                accepted.lock().expect("unpoisoned").push((id, key));
            }
        });
    }
    until("appends", BOUND, async || store.describe(&stream).await.ok().flatten().filter(|status| status.length > 200))
        .await;
    let (primary, replica) = cluster.nodes_of(stream.as_str());
    // The promoted primary has no replica: its writes from now on are not replicated.
    cluster.crash(primary);
    store.append(&elsewhere, vec![new_entry("x")]).await.expect("the other nodes work");
    stop.cancel();
    cluster.promoted(replica).await;
    let promoted = Instant::now();
    until("accepted append", BOUND, async || store.append(&stream, vec![new_entry("after")]).await.ok()).await;
    assert!(promoted.elapsed() < Duration::from_secs(10), "back after {:?}", promoted.elapsed());
    let replicated = store.append_durably(&stream, vec![new_entry("alone")], Durability::REPLICATED).await;
    let error = replicated.expect_err("there is no replica any more");
    assert_eq!(error.kind(), StoreErrorKind::NotDurable, "{error}");
    // Some wait for a replica that never connects.
    publishers.shutdown().await;
    let stored = store.range(&stream, EVERYTHING, 1_000_000).await.expect("read");
    let accepted = accepted.lock().expect("unpoisoned").clone();
    assert!(accepted.len() > 100, "only {} were accepted", accepted.len());
    for (id, key) in accepted {
        let entry = stored.iter().find(|entry| entry.id == id).unwrap_or_else(|| panic!("{key} is lost"));
        assert_eq!(entry.fields.text("data"), Some(key.as_str()));
    }
    until("ready store", BOUND, async || store.check().await.ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn url_of_wrong_server_kind_is_reported() {
    let cluster = Cluster::shared().await;
    let node = cluster.node(0);
    let error = connect(&node.url()).await.check().await.expect_err("a node of a cluster");
    assert_eq!(error.kind(), StoreErrorKind::Unsuitable, "{error}");
    assert!(error.to_string().contains("redis-cluster://"), "{error}");
    let server = RedisServer::shared(Product::Valkey).await;
    let url = format!("redis-cluster://127.0.0.1:{}", server.port());
    let error = connect(&url).await.check().await.expect_err("no cluster");
    assert_eq!(error.kind(), StoreErrorKind::Unsuitable, "{error}");
    assert!(error.to_string().contains("not part of a cluster"), "{error}");
}
