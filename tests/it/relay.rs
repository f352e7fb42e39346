//! The relay with real sockets.

mod feeds;
mod filters;
mod histories;
mod lane;
mod limits;
mod server;
mod store;
mod storm;
mod trims;

use std::collections::HashMap;
use std::time::Duration;

use aurora_bus::event::{Fields, NewEntry};
use aurora_bus::relay::{CloseCode, Config, SessionEnd};
use aurora_bus::store::Trim;
use bytes::Bytes;
use bytesize::ByteSize;
use futures_util::SinkExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use server::{Server, TEST_TIMEOUT, alerts, cps_alerts, publish};
use store::FaultyStore;

fn config() -> Config {
    Config { drain_window: Duration::from_millis(200), ..Config::default() }
}

/// A ring for one entry: clients that are not at the head are served from the store.
fn tiny_ring() -> Config {
    Config { ring_entries: 1, ..config() }
}

fn numbered(numbers: impl IntoIterator<Item = usize>) -> impl Iterator<Item = String> {
    numbers.into_iter().map(|n| format!(r#"{{"n":{n}}}"#))
}

/// Returns whether the alert with that number passes a filter.
type Passes = fn(usize) -> bool;

fn number(text: &str) -> usize {
    let digits: String = text.chars().filter(char::is_ascii_digit).collect();
    digits.parse().expect("a numbered alert")
}

/// Returns the value of a text property, for alerts without escapes.
fn member(text: &str, name: &str) -> String {
    let (_, rest) = text.split_once(&format!(r#""{name}":""#)).unwrap_or_else(|| panic!("no {name} in {text}"));
    rest.split('"').next().expect("a text").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_client_receives_every_alert_once_in_order() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let mut clients = JoinSet::new();
    for _ in 0..10 {
        let mut client = server.connect("alerts").await;
        clients.spawn(async move { client.texts(6000).await });
    }
    let odd = |n: usize| format!("{{ \"n\" : {n},\"ü\":\"\\u0000 \u{1F980}\", \"pad\":\"{}\" }}", "x".repeat(n % 300));
    let (one, other) = (alerts(), cps_alerts());
    tokio::join!(server.publish(&one, (0..3000).map(odd)), server.publish(&other, numbered(0..3000)));
    let one: Vec<String> = (0..3000).map(odd).collect();
    let other: Vec<String> = numbered(0..3000).collect();
    while let Some(texts) = clients.join_next().await {
        let (got_one, got_other): (Vec<String>, Vec<String>) =
            texts.expect("the client is done").into_iter().partition(|text| text.contains("pad"));
        assert_eq!(got_one, one);
        assert_eq!(got_other, other);
    }
    let delivered = 60_000;
    let counter = server.metrics.relay_deliveries.with_label_values(&["alerts"]);
    // Writes are counted after they are done.
    server.until("all are counted", || counter.get() >= delivered).await;
    assert_eq!(counter.get(), delivered);
    let writes = server.metrics.relay_writes.with_label_values(&["alerts"]).get();
    assert!(writes < delivered / 2, "one write carries many alerts: {writes} writes");
}

#[tokio::test]
async fn lagging_client_catches_up_from_the_store() {
    let config = Config { ring_bytes: ByteSize::kib(64), ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut slow = server.connect_slow("alerts").await;
    let mut fast = server.connect("alerts").await;
    let padded = |n: usize| format!(r#"{{"n":{n:05},"pad":"{}"}}"#, "x".repeat(1000));
    for burst in 0..20 {
        server.publish(&alerts(), (burst * 100..burst * 100 + 100).map(padded)).await;
        fast.texts(100).await;
    }
    let expected: Vec<String> = (0..2000).map(padded).collect();
    assert_eq!(slow.texts(2000).await, expected);
    assert!(server.catchups() > 0, "2 MB do not fit into the sockets and a ring of 64 KiB");
    assert_eq!(server.gaps("trimmed"), 0);
    server.publish(&alerts(), [padded(2000)]).await;
    assert_eq!(slow.text().await, padded(2000), "it is live again");
}

#[tokio::test]
async fn slow_client_in_mode_latest_skips_entries() {
    let config = Config { ring_bytes: ByteSize::kib(64), ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut slow = server.connect_slow("alerts?mode=latest").await;
    let mut fast = server.connect("alerts").await;
    let padded = |n: usize| format!(r#"{{"n":{n:05},"pad":"{}"}}"#, "x".repeat(1000));
    for burst in 0..20 {
        server.publish(&alerts(), (burst * 100..burst * 100 + 100).map(padded)).await;
        fast.texts(100).await;
    }
    let mut seen = vec![slow.text().await];
    while server.gaps("lossy") == 0 {
        seen.push(slow.text().await);
    }
    server.publish(&alerts(), [padded(2000)]).await;
    while seen.last() != Some(&padded(2000)) {
        seen.push(slow.text().await);
    }
    assert!(seen.len() < 2001, "nothing was skipped");
    assert!(seen.is_sorted(), "the alerts are in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshot_and_live_entries_join_without_a_gap() {
    for config in [config(), tiny_ring()] {
        let server = Server::start(FaultyStore::open().await, config).await;
        let published = server.publish(&alerts(), numbered(0..500)).await;
        server.until_relayed(&alerts(), &published).await;
        let store = server.store.clone();
        let mut publisher = JoinSet::new();
        publisher.spawn(async move {
            for first in (500..8000).step_by(5) {
                publish(&*store, &alerts(), numbered(first..first + 5)).await;
                tokio::task::yield_now().await;
            }
        });
        let mut clients = JoinSet::new();
        for snapshot in [1, 7, 50, 400] {
            for _ in 0..4 {
                let mut client = server.connect(&format!("alerts?snapshot={snapshot}&stream=aurora:alerts")).await;
                clients.spawn(async move {
                    let first = number(&client.text().await);
                    let rest: Vec<usize> = client.texts(8000 - first - 1).await.iter().map(|t| number(t)).collect();
                    assert!(rest.into_iter().eq(first + 1..8000), "gap or duplicate after {first}");
                    first
                });
            }
        }
        while let Some(first) = clients.join_next().await {
            assert!(first.expect("a client without gaps") >= 100, "it starts within its snapshot");
        }
        publisher.join_all().await;
    }
}

#[tokio::test]
async fn snapshot_merges_all_streams_by_time() {
    for config in [config(), tiny_ring()] {
        let server = Server::start(FaultyStore::open().await, config).await;
        let mut last = Vec::new();
        for n in 0..30 {
            let stream = if n % 3 == 0 { cps_alerts() } else { alerts() };
            last = server.publish(&stream, numbered([n])).await;
            // Ids are times: the next one must be later.
            let published = last[0].id.ms;
            server
                .until("the clock has moved", || jiff::Timestamp::now().as_millisecond().cast_unsigned() > published)
                .await;
        }
        server.until_relayed(&alerts(), &last).await;
        let mut client = server.connect("alerts?snapshot=10").await;
        let numbers: Vec<usize> = client.texts(10).await.iter().map(|text| number(text)).collect();
        assert_eq!(numbers, (20..30).collect::<Vec<_>>());
        let mut one = server.connect("alerts?snapshot=3&stream=aurora:cps:alerts").await;
        let numbers: Vec<usize> = one.texts(3).await.iter().map(|text| number(text)).collect();
        assert_eq!(numbers, [21, 24, 27]);
    }
}

#[tokio::test]
async fn client_resumes_after_its_positions() {
    for config in [config(), tiny_ring()] {
        let server = Server::start(FaultyStore::open().await, config).await;
        let mut client = server.connect("alerts?meta=1").await;
        server.publish(&alerts(), numbered(0..10)).await;
        server.publish(&cps_alerts(), numbered(100..110)).await;
        let mut positions = HashMap::new();
        let mut seen = Vec::new();
        for text in client.texts(14).await {
            positions.insert(member(&text, "_stream"), member(&text, "_pos"));
            seen.push(text);
        }
        drop(client);
        server.publish(&alerts(), numbered(10..300)).await;
        let since = positions.into_values().collect::<Vec<_>>().join(",");
        let mut client = server.connect(&format!("alerts?meta=1&since={since}")).await;
        seen.extend(client.texts(296).await);
        for (stream, expected) in [("aurora:alerts", 0..300), ("aurora:cps:alerts", 100..110)] {
            let of_stream = seen.iter().filter(|text| member(text, "_stream") == stream);
            let numbers = of_stream.map(|text| number(text.split(',').next().expect("n comes first")));
            assert!(numbers.eq(expected), "{stream}: {seen:?}");
        }
        assert_eq!(server.gaps("epoch") + server.gaps("trimmed"), 0);
    }
}

#[tokio::test]
async fn since_time_or_earliest_starts_in_the_past() {
    let server = Server::start(FaultyStore::open().await, tiny_ring()).await;
    server.publish(&alerts(), numbered(0..50)).await;
    let published = server.publish(&alerts(), numbered([50])).await;
    server.until_relayed(&alerts(), &published).await;
    for since in ["earliest", "-1h", "2020-01-01T00:00:00Z"] {
        let mut client = server.connect(&format!("alerts?since={since}")).await;
        assert_eq!(client.texts(51).await, numbered(0..51).collect::<Vec<_>>(), "{since}");
    }
    let mut client = server.connect("alerts?since=2999-01-01T00:00:00Z").await;
    server.publish(&alerts(), numbered([51])).await;
    assert_eq!(client.text().await, r#"{"n":51}"#, "a time in the future means now");
}

#[tokio::test]
async fn filter_passes_the_same_entries_live_and_from_the_store() {
    let alert = |n: usize| {
        let severity = ["info", "low", "medium", "high", "critical", "odd"][n % 6];
        let (source, tenant) = (["zeek", "suricata"][n % 2], ["a", "b", "c"][n % 3]);
        let technique = ["T0836", "T0855.001"][n / 2 % 2];
        format!(
            r#"{{"n":{n},"severity":"{severity}","source":"{source}","tenant":"{tenant}","mitre_techniques":["{technique}"]}}"#
        )
    };
    let tree = r#"{"op":"or","nodes":[{"key":"severity","cmp":"eq","val":"critical"},{"op":"and","nodes":[
        {"key":"tenant","cmp":"in","vals":["b","c"]},{"key":"technique","cmp":"prefix","val":"T0855"}]}]}"#;
    let tree = url::form_urlencoded::Serializer::new("source=zeek".to_owned()).append_pair("filter", tree).finish();
    let filters: [(&str, Passes); 6] = [
        ("min_severity=high", |n| n % 6 == 3 || n % 6 == 4),
        ("source=zeek&tenant=b", |n| n % 2 == 0 && n % 3 == 1),
        ("min_severity=info", |n| n % 6 != 5),
        ("category=cps", |_| false),
        ("technique=T0836", |n| n / 2 % 2 == 0),
        (&tree, |n| n % 2 == 0 && (n % 6 == 4 || n % 3 != 0 && n / 2 % 2 == 1)),
    ];
    for config in [config(), tiny_ring()] {
        let server = Server::start(FaultyStore::open().await, config).await;
        let mut live = Vec::new();
        for (query, passes) in filters {
            live.push((server.connect(&format!("alerts?{query}")).await, passes));
        }
        let published = server.publish(&alerts(), (0..600).map(alert)).await;
        for (client, passes) in &mut live {
            let expected: Vec<String> = (0..600).filter(|n| passes(*n)).map(alert).collect();
            assert_eq!(client.texts(expected.len()).await, expected);
        }
        server.until_relayed(&alerts(), &published).await;
        for (query, passes) in filters {
            let expected: Vec<String> = (0..600).filter(|n| passes(*n)).map(alert).collect();
            let mut past = server.connect(&format!("alerts?{query}&since=earliest")).await;
            assert_eq!(past.texts(expected.len()).await, expected, "{query}");
            let newest = &expected[expected.len().saturating_sub(20)..];
            let mut snapshot = server.connect(&format!("alerts?{query}&snapshot=20")).await;
            assert_eq!(snapshot.texts(newest.len()).await, newest, "{query}");
        }
    }
}

#[tokio::test]
async fn undecodable_entries_are_skipped_and_counted() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let mut client = server.connect("alerts").await;
    let entry = |name: &'static str, value: &'static [u8]| {
        let fields: Fields = [(Bytes::from(name), Bytes::from_static(value))].into_iter().collect();
        NewEntry { fields, idempotency: None }
    };
    let entries = vec![entry("other", b"x"), entry("data", b"\xff\xfe"), entry("data", b"no json")];
    server.store.append(&alerts(), entries).await.expect("the store takes anything");
    assert_eq!(client.text().await, "no json");
    assert_eq!(server.gaps("undecodable"), 2);
}

#[tokio::test]
async fn trimmed_entries_are_counted_and_the_rest_is_sent() {
    let server = Server::start(FaultyStore::open().await, tiny_ring()).await;
    let mut client = server.connect("alerts?meta=1").await;
    server.publish(&alerts(), numbered(0..100)).await;
    let position = member(&client.texts(10).await[9], "_pos");
    drop(client);
    let published = server.publish(&alerts(), numbered(100..300)).await;
    server.until_relayed(&alerts(), &published).await;
    let newest_hundred = published[100].id;
    server.store.trim(&alerts(), Trim::Before(newest_hundred)).await.expect("trimmed");
    let first = server.store.describe(&alerts()).await.expect("described").expect("it exists").first_id;
    assert!(first.is_some_and(|first| first > published[0].id), "the trim removed entries that no client has seen");
    let mut client = server.connect(&format!("alerts?since={position}")).await;
    let first = number(&client.text().await);
    let rest: Vec<usize> = client.texts(299 - first).await.iter().map(|text| number(text)).collect();
    assert!(rest.into_iter().eq(first + 1..300));
    assert_eq!(server.gaps("trimmed"), 1);
}

#[tokio::test]
async fn client_that_never_reads_is_closed_at_no_cost_to_others() {
    let config = Config { write_timeout: Duration::from_secs(1), ring_bytes: ByteSize::kib(256), ..config() };
    let limit = usize::try_from(config.ring_bytes.as_u64()).expect("small");
    let server = Server::start(FaultyStore::open().await, config).await;
    let _stuck = server.connect_slow("alerts").await;
    let mut reader = server.connect("alerts").await;
    let padded = |n: usize| format!(r#"{{"n":{n:05},"pad":"{}"}}"#, "x".repeat(4000));
    for burst in 0..20 {
        server.publish(&alerts(), (burst * 100..burst * 100 + 100).map(padded)).await;
        let expected: Vec<String> = (burst * 100..burst * 100 + 100).map(padded).collect();
        assert_eq!(reader.texts(100).await, expected);
        let held: usize = server.relay.status().streams.iter().map(|stream| stream.ring_bytes).max().expect("streams");
        assert!(held <= limit, "the ring holds {held} bytes");
    }
    assert_eq!(server.ends(1).await, [SessionEnd::Closed(CloseCode::WriteTimeout)]);
    assert_eq!(server.metrics.relay_closes.with_label_values(&["4008"]).get(), 1);
    assert_eq!(server.relay.status().connections, 1);
}

#[tokio::test]
async fn client_too_far_behind_is_closed() {
    let config = Config { ring_bytes: ByteSize::kib(64), max_lag_bytes: ByteSize::kib(512), ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut slow = server.connect_slow("alerts").await;
    let padded = |n: usize| format!(r#"{{"n":{n:05},"pad":"{}"}}"#, "x".repeat(4000));
    server.publish(&alerts(), [padded(0)]).await;
    slow.text().await;
    let published = server.publish(&alerts(), (1..1000).map(padded)).await;
    server.until_relayed(&alerts(), &published).await;
    let (texts, code, reason) = slow.close().await;
    assert_eq!(code, 4001);
    assert!(reason.starts_with("too_slow"), "{reason}");
    assert!(texts.into_iter().eq((1..1000).map(padded).take(texts_len(&server))), "in order until then");
}

fn texts_len(server: &Server) -> usize {
    let delivered = server.metrics.relay_deliveries.with_label_values(&["alerts"]).get();
    usize::try_from(delivered).expect("small") - 1
}

#[tokio::test]
async fn invalid_input_is_closed_with_its_code() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let garbage = server.connect("alerts").await;
    let mut socket = garbage.socket.into_inner();
    socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("written");
    let mut answer = Vec::new();
    timeout(TEST_TIMEOUT, socket.read_to_end(&mut answer)).await.expect("it ends").expect("a clean end");
    assert_eq!(answer.get(..4), Some(&[0x88, answer[1], 0x11, 0x94][..]), "a close frame with 4500");

    let mut big = server.connect("alerts").await;
    big.socket.send(Message::text("x".repeat(65_537))).await.expect("sent");
    assert_eq!(big.close().await.1, 4505);

    let mut chatty = server.connect("alerts").await;
    for _ in 0..300 {
        if chatty.socket.feed(Message::text("hello")).await.is_err() {
            break;
        }
    }
    chatty.socket.flush().await.expect("flushed");
    assert_eq!(chatty.close().await.1, 4005);
}

#[tokio::test]
async fn messages_are_ignored_and_pings_answered_in_plain_mode() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let mut client = server.connect("alerts").await;
    client.socket.send(Message::text("subscribe me to everything")).await.expect("sent");
    client.socket.send(Message::binary(vec![0; 60_000])).await.expect("sent");
    for n in 0..50 {
        client.socket.send(Message::Ping(Bytes::from(format!("ping {n}")))).await.expect("sent");
        server.publish(&alerts(), numbered(n * 10..n * 10 + 10)).await;
    }
    let (mut texts, mut pongs) = (Vec::new(), 0);
    while texts.len() < 500 || pongs == 0 {
        match client.message().await {
            Some(Message::Text(text)) => texts.push(text.as_str().to_owned()),
            Some(Message::Pong(payload)) => {
                assert!(payload.starts_with(b"ping "), "{payload:?}");
                pongs += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(texts, numbered(0..500).collect::<Vec<_>>());
}

#[tokio::test]
async fn client_without_pong_is_closed_and_others_stay() {
    let (ping_interval, pong_timeout) = (Duration::from_millis(100), Duration::from_secs(1));
    let server = Server::start(FaultyStore::open().await, Config { ping_interval, pong_timeout, ..config() }).await;
    let mut alive = server.connect("alerts").await;
    let dead = server.connect("alerts").await;
    // A bare socket answers no pings.
    let mut dead = dead.socket.into_inner();
    let mut killed = JoinSet::new();
    killed.spawn(async move {
        let mut bytes = Vec::new();
        dead.read_to_end(&mut bytes).await.expect("a clean end");
        bytes
    });
    let mut pings = 0;
    while server.metrics.relay_closes.with_label_values(&["4004"]).get() == 0 || pings < 8 {
        if matches!(alive.message().await, Some(Message::Ping(_))) {
            pings += 1;
        }
    }
    let bytes = killed.join_next().await.expect("one task").expect("it was closed");
    assert_eq!(bytes.get(..2), Some(&[0x89, 0][..]), "it was pinged first");
    assert_eq!(server.ends(1).await, [SessionEnd::Closed(CloseCode::NoPong)]);
    server.publish(&alerts(), numbered([1])).await;
    assert_eq!(alive.text().await, r#"{"n":1}"#);
}

#[tokio::test]
async fn close_of_a_client_is_answered() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let mut client = server.connect("alerts").await;
    let frame = CloseFrame { code: 1000.into(), reason: "done".into() };
    client.socket.close(Some(frame)).await.expect("sent");
    assert_eq!(client.close().await.1, 1000);
    assert!(client.message().await.is_none(), "the connection ends");
    drop(server.connect("alerts").await);
    let ends = server.ends(2).await;
    assert!(ends.contains(&SessionEnd::ByPeer(Some(1000))) && ends.contains(&SessionEnd::Lost), "{ends:?}");
    server.until("all connections are closed", || server.relay.status().connections == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_closes_every_client_within_the_window() {
    let config = Config { drain_window: Duration::from_millis(1500), ..config() };
    let window = config.drain_window;
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut clients = JoinSet::new();
    let began = Instant::now();
    for _ in 0..40 {
        let mut client = server.connect("alerts").await;
        clients.spawn(async move {
            let (texts, code, reason) = client.close().await;
            assert_eq!(code, 4000);
            assert!(reason.starts_with("going_away"), "{reason}");
            assert!(texts.iter().map(|text| number(text)).eq(0..texts.len()), "no gaps");
            (Instant::now(), texts.len())
        });
    }
    server.stop.cancel();
    let store = server.store.clone();
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    for n in 0..100 {
        pace.tick().await;
        publish(&*store, &alerts(), numbered([n])).await;
    }
    server.until("new clients are refused", || server.relay.status().is_draining).await;
    let mut ends = Vec::new();
    while let Some(end) = clients.join_next().await {
        ends.push(end.expect("closed in order"));
    }
    let spread =
        ends.iter().map(|(at, _)| *at).max().expect("clients") - ends.iter().map(|(at, _)| *at).min().expect("clients");
    assert!(spread > window / 3, "closes are spread: {spread:?}");
    assert!(began.elapsed() < window + Duration::from_secs(5));
    assert!(ends.iter().any(|(_, texts)| *texts > 20), "clients that are closed late were served until then");
    let ends = server.stop().await;
    assert_eq!(ends, [SessionEnd::Closed(CloseCode::GoingAway); 40]);
}

#[tokio::test]
async fn unavailable_store_is_retried_and_reported_to_readiness() {
    let store = FaultyStore::open().await;
    store.set_unavailable(true);
    let server = Server::start_cold(store.clone(), config());
    let reasons = |server: &Server| -> Vec<Option<String>> {
        server.readiness.report().into_iter().map(|part| part.reason).collect()
    };
    server
        .until("readiness has the reason", || {
            let reasons = reasons(&server);
            reasons.len() == 3 && reasons.iter().all(|r| r.as_ref().is_some_and(|r| r.contains("the store is away")))
        })
        .await;
    let mut early = server.connect("alerts").await;
    let mut snapshot = server.connect("alerts?snapshot=5").await;
    store.set_unavailable(false);
    server.until("it is ready", || reasons(&server).iter().all(Option::is_none)).await;
    server.publish(&alerts(), numbered(0..10)).await;
    assert_eq!(early.texts(10).await, numbered(0..10).collect::<Vec<_>>());
    assert_eq!(snapshot.texts(10).await, numbered(0..10).collect::<Vec<_>>());

    store.set_unavailable(true);
    server.until("it is not ready", || reasons(&server).iter().all(Option::is_some)).await;
    store.set_unavailable(false);
    server.publish(&alerts(), numbered(10..20)).await;
    assert_eq!(early.texts(10).await, numbered(10..20).collect::<Vec<_>>(), "an outage causes no gap");
    server.until("it is ready again", || reasons(&server).iter().all(Option::is_none)).await;
}

#[tokio::test]
async fn unreadable_stream_does_not_affect_other_streams() {
    let store = FaultyStore::open().await;
    store.set_unreadable(Some(cps_alerts()));
    let server = Server::start_cold(store.clone(), tiny_ring());
    let reason_of = |part: &str| {
        let report = server.readiness.report();
        report.into_iter().find(|p| p.name == part).expect("the part is declared").reason
    };
    let is_reported = || reason_of("relay aurora:cps:alerts").is_some_and(|reason| reason.contains("taken by a list"));
    server.until("readiness has the stream", is_reported).await;
    server.until("the other is ready", || reason_of("relay aurora:alerts").is_none()).await;
    let mut clients = [server.connect("alerts").await, server.connect("alerts?snapshot=3").await];
    for numbers in [0..19, 19..20] {
        server.publish(&alerts(), numbered(numbers.clone())).await;
        for client in &mut clients {
            assert_eq!(client.texts(numbers.len()).await, numbered(numbers.clone()).collect::<Vec<_>>());
        }
    }
    store.set_unreadable(None);
    server.until("all is ready", || reason_of("relay aurora:cps:alerts").is_none()).await;
    server.publish(&cps_alerts(), numbered([20])).await;
    for client in &mut clients {
        assert_eq!(client.text().await, r#"{"n":20}"#);
    }

    store.set_unreadable(Some(alerts()));
    server.until("readiness has it again", || reason_of("relay aurora:alerts").is_some()).await;
    let mut past = server.connect("alerts?since=earliest").await;
    assert_eq!(past.text().await, r#"{"n":19}"#, "entries in memory are sent");
    assert_eq!(past.text().await, r#"{"n":20}"#, "and those of the other stream");
    assert_eq!(server.gaps("unreadable"), 1);
}

#[tokio::test]
async fn lost_stream_is_followed_from_its_new_beginning() {
    let store = FaultyStore::open().await;
    let server = Server::start(store.clone(), config()).await;
    let mut client = server.connect("alerts?meta=1&stream=aurora:alerts").await;
    server.publish(&alerts(), numbered(0..5)).await;
    let old_position = member(&client.texts(5).await[4], "_pos");
    // After an outage the tail compares the stream with the store at once.
    store.set_unavailable(true);
    let is_out = || server.readiness.report().iter().all(|part| part.reason.is_some());
    server.until("the outage is noticed", is_out).await;
    store.lose_all_data().await;
    store.set_unavailable(false);
    server.until("the loss is noticed", || server.gaps("state_lost") > 0).await;
    server.publish(&alerts(), numbered(100..105)).await;
    let texts = client.texts(5).await;
    let numbers = texts.iter().map(|text| number(text.split(',').next().expect("n comes first")));
    assert!(numbers.eq(100..105), "{texts:?}");
    let new_position = member(&texts[4], "_pos");
    assert_ne!(old_position.split(':').next(), new_position.split(':').next(), "the epoch has changed");

    let mut resumed = server.connect(&format!("alerts?stream=aurora:alerts&since={old_position}")).await;
    assert_eq!(resumed.texts(5).await, numbered(100..105).collect::<Vec<_>>());
    assert_eq!(server.gaps("epoch"), 1);
}

#[tokio::test]
async fn refused_client_receives_the_reason() {
    let config = Config { max_connections: 3, max_connections_per_address: 2, ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let cases = [
        ("nothing", 4500, "unknown_channel: there is no channel `nothing`"),
        ("alerts?since=yesterday", 4500, "bad_parameter: `since` must be a position"),
        ("alerts?stream=aurora:audit", 4500, "bad_parameter: `stream` must be one of this channel's: aurora:alerts"),
    ];
    for (target, code, reason) in cases {
        let (_, got_code, got_reason) = server.connect(target).await.close().await;
        assert_eq!(got_code, code, "{target}");
        assert!(got_reason.starts_with(reason), "{got_reason}");
    }
    let first = server.connect("alerts").await;
    let _second = server.connect("alerts").await;
    server.until("two are in", || server.relay.status().connections == 2).await;
    assert_eq!(server.connect("alerts").await.close().await.1, 4503);
    drop(first);
    server.until("one client has left", || server.relay.status().connections == 1).await;
    let mut third = server.connect("alerts").await;
    server.until("there is room again", || server.relay.status().connections == 2).await;
    server.publish(&alerts(), numbered([1])).await;
    assert_eq!(third.text().await, r#"{"n":1}"#);
}
