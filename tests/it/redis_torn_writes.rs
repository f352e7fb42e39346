//! A server that is killed while it writes its append-only file, and killed again later.

use std::time::Duration;

use aurora_bus::event::EntryId;
use aurora_bus::store::redis::Config;
use aurora_bus::store::{Order, Range, Store};

use crate::store_contract::{keyed, unique_stream};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const BOUND: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// A torn write was never confirmed, so its producer retries. Neither the torn write nor the entries after it may
/// change at the second start of the server.
async fn torn_write_does_not_reappear(product: Product) {
    let mut server = RedisServer::start(product, &["--appendonly", "yes", "--appendfsync", "always"]).await;
    let store = Config { url: server.url().into(), ..Config::default() }.connect().await.expect("a configuration");
    let stream = unique_stream();
    let append = async |key: &str| {
        until("accepted append", BOUND, async || {
            store.append(&stream, vec![keyed(key, key, HOUR)]).await.ok().map(|mut appended| appended.remove(0))
        })
        .await
    };
    append("whole").await;
    append("half").await;
    server.crash();
    server.tear_last_transaction();
    server.restart().await;
    let again = append("half").await;
    assert!(!again.duplicate, "the torn write counts as stored");
    server.crash();
    server.restart().await;
    append("after").await;
    let entries = until("answer", BOUND, async || store.range(&stream, EVERYTHING, 10).await.ok()).await;
    let stored: Vec<_> = entries.iter().map(|entry| entry.fields.text("data").expect("text")).collect();
    assert_eq!(stored, ["whole", "half", "after"]);
    assert_eq!(entries[1].id, again.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torn_write_does_not_reappear_on_redis() {
    torn_write_does_not_reappear(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torn_write_does_not_reappear_on_valkey() {
    torn_write_does_not_reappear(Product::Valkey).await;
}
