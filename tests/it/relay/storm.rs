//! Many clients that reconnect together and miss about the same entries.

use aurora_bus::relay::Config;
use aurora_bus::store::Trim;
use futures_util::future::join_all;
use tokio::task::JoinSet;

use super::server::{Client, Server, alerts, publish};
use super::store::FaultyStore;
use super::{config, member, number, numbered, tiny_ring};

const CLIENTS: usize = 300;
const BEFORE: usize = 60;
const MISSED: usize = 300;

/// Returns the positions of clients that have seen between 10 and 59 alerts when the relay stops. Then more is
/// published.
async fn stopped(store: &std::sync::Arc<FaultyStore>) -> Vec<(usize, String)> {
    let server = Server::start(store.clone(), config()).await;
    let connecting = (0..CLIENTS).map(|_| server.connect("alerts?meta=1&stream=aurora:alerts"));
    let clients: Vec<Client> = join_all(connecting).await;
    server.publish(&alerts(), numbered(0..BEFORE)).await;
    let reading = clients.into_iter().enumerate().map(async |(index, mut client)| {
        let seen = BEFORE - 1 - index % 50;
        let texts = client.texts(seen).await;
        (seen, member(texts.last().expect("some"), "_pos"))
    });
    let positions = join_all(reading).await;
    server.stop().await;
    publish(&**store, &alerts(), numbered(BEFORE..BEFORE + MISSED)).await;
    positions
}

/// Resumes all clients on a new relay, and checks that they receive all missed entries. Returns the number of store
/// reads.
async fn resume(server: &Server, positions: Vec<(usize, String)>) -> u64 {
    let mut clients = JoinSet::new();
    for (seen, position) in positions {
        let mut client = server.connect(&format!("alerts?stream=aurora:alerts&since={position}")).await;
        clients.spawn(async move {
            let texts = client.texts(BEFORE + MISSED - seen).await;
            assert!(texts.iter().map(|text| number(text)).eq(seen..BEFORE + MISSED), "gaps or duplicates after {seen}");
            client
        });
    }
    let mut clients = clients.join_all().await;
    server.publish(&alerts(), numbered([BEFORE + MISSED])).await;
    for client in &mut clients {
        assert_eq!(number(&client.text().await), BEFORE + MISSED, "no duplicate");
    }
    server.metrics.relay_store_reads.get()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_resume_from_memory_after_a_restart() {
    let store = FaultyStore::open().await;
    let positions = stopped(&store).await;
    let server = Server::start(store, config()).await;
    assert_eq!(resume(&server, positions).await, 0);
    assert_eq!(server.gaps("trimmed") + server.gaps("epoch"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_behind_the_ring_share_store_reads() {
    let store = FaultyStore::open().await;
    let positions = stopped(&store).await;
    let server = Server::start(store, tiny_ring()).await;
    let reads = resume(&server, positions).await;
    // Pages are small at first, and a few clients start from their own positions.
    assert!((2..=20).contains(&reads), "{reads} reads for {CLIENTS} clients");
    assert!(server.metrics.relay_shared_pages.get() > CLIENTS as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_share_the_page_that_shows_a_trim() {
    let store = FaultyStore::open().await;
    let positions = stopped(&store).await;
    let entries = (BEFORE + MISSED - 100) as u64;
    publish(&*store, &alerts(), numbered(BEFORE + MISSED..BEFORE + MISSED + 100)).await;
    aurora_bus::store::Store::trim(&*store, &alerts(), Trim::ToLength(100)).await.expect("trimmed");
    let config = Config { ring_entries: 40, ..config() };
    let server = Server::start(store, config).await;
    let resuming =
        positions.iter().map(async |(_, position)| server.connect(&format!("alerts?since={position}")).await);
    let reading = join_all(resuming).await.into_iter().map(async |mut client: Client| {
        let first = number(&client.text().await);
        let last = BEFORE + MISSED + 99;
        let rest = client.texts(last - first).await;
        assert!(rest.iter().map(|text| number(text)).eq(first + 1..=last), "the entries left have no gap");
        first
    });
    let firsts = join_all(reading).await;
    assert!(firsts.iter().all(|first| *first as u64 > entries - 100 && first == &firsts[0]), "{firsts:?}");
    assert_eq!(server.gaps("trimmed"), CLIENTS as u64);
    let reads = server.metrics.relay_store_reads.get();
    assert!(reads <= 20, "{reads} reads for {CLIENTS} clients");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_share_store_reads() {
    let store = FaultyStore::open().await;
    let alert =
        |n: usize| format!(r#"{{"n":{n},"severity":"{}"}}"#, if n.is_multiple_of(100) { "high" } else { "low" });
    publish(&*store, &alerts(), (0..3000).map(alert)).await;
    let server = Server::start(store, tiny_ring()).await;
    let connecting = (0..100).map(|_| server.connect("alerts?snapshot=20&min_severity=high&stream=aurora:alerts"));
    let reading = join_all(connecting).await.into_iter().map(async |mut client: Client| client.texts(20).await);
    let expected: Vec<String> = (1000..3000).step_by(100).map(alert).collect();
    for texts in join_all(reading).await {
        assert_eq!(texts, expected);
    }
    let reads = server.metrics.relay_store_reads.get();
    assert!(reads <= 40, "{reads} reads for 100 snapshots of 2000 entries");
}
