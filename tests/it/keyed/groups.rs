//! Every member has the groups of its family.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::support::receiver::{Received, Receiver, Reply};

fn siem(receiver: &Receiver) -> String {
    format!("[sinks.siem]\ntype = \"webhook\"\nurl = \"{}\"\nallow_private = true\n", receiver.url("/"))
}

const GROUP: &str = "[[streams.groups]]\nname = \"siem\"\nsink = \"siem\"\nclaim_idle = \"2s\"\nhandler_timeout = \"1s\"\n\
                     retry = { max_attempts = 3, base = \"50ms\", cap = \"100ms\" }";

fn bodies(receiver: &Receiver) -> BTreeSet<String> {
    let taken = receiver.received().into_iter().filter(|received| received.is_taken);
    taken.map(|received| String::from_utf8_lossy(&received.body).into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undeliverable_entry_is_a_dead_letter_of_its_key() {
    let refuses = Arc::new(AtomicBool::new(true));
    let answers = Arc::clone(&refuses);
    let receiver = Receiver::start(move |received: &Received| {
        let is_acme =
            received.body.windows(4).any(|part| part == b"\"n\":".as_slice()) && received.body.ends_with(b"7}");
        Reply::Status(if is_acme && answers.load(Ordering::Relaxed) { 400 } else { 204 })
    })
    .await;
    let home = Home::new(&config(GROUP, &siem(&receiver)));
    let daemon = home.start().await;
    publish(&daemon, "acme", 7).await;
    publish(&daemon, "globex", 8).await;
    for key in ["acme", "globex"] {
        daemon.handled(&member(key), "siem").await;
    }
    let letters = async |name: String| {
        let page: Value =
            serde_json::from_str(&daemon.get(&format!("/api/v1/dead-letters/{name}")).await).expect("JSON");
        page["dead_letters"].as_array().expect("a list").clone()
    };
    let dead = letters(member("acme")).await;
    assert_eq!((dead.len(), &dead[0]["entry"]["data"]["n"]), (1, &json!(7)), "{dead:?}");
    assert_eq!(letters(format!("{}:dead_letter", member("acme"))).await.len(), 1);
    assert_eq!(letters(member("globex")).await, Vec::<Value>::new());
    let listed: Value = serde_json::from_str(&daemon.get("/api/v1/dead-letters").await).expect("JSON");
    let streams: BTreeSet<&str> = listed["dead_letters"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|level| level["stream"].as_str())
        .collect();
    assert!(streams.contains("aurora:tenant:acme:alerts:dead_letter"), "{streams:?}");

    refuses.store(false, Ordering::Relaxed);
    let replay = daemon.url(&format!("/api/v1/dead-letters/{}/replay", member("acme")));
    let response = client().post(replay).body(r#"{"all":true}"#).send().await.expect("an answer");
    let done: Value = response.json().await.expect("JSON");
    assert_eq!(done["replayed"], 1, "{done}");
    until("the replayed event", BOUND, async || {
        bodies(&receiver).iter().any(|body| body.ends_with("7}")).then_some(())
    })
    .await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_members_are_handled_with_few_workers_and_a_crash() {
    const KEYS: usize = 90;
    let receiver = Receiver::start(|_| Reply::Status(204)).await;
    let server = RedisServer::start(Product::Redis, &[]).await;
    let home = Home::new(&config(GROUP, &format!("{}{}", siem(&receiver), on_redis(&server))));
    let mut daemon = home.start().await;
    let mut expected = BTreeSet::new();
    for round in 0..2 {
        for key in 0..KEYS {
            let n = round * KEYS + key;
            publish(&daemon, &format!("k{key}"), n).await;
            expected.insert(event(n));
        }
        if round == 0 {
            daemon.crash();
            daemon = home.start().await;
        }
    }
    until("every event delivered", BOUND, async || (bodies(&receiver) == expected).then_some(())).await;
    for key in (0..KEYS).step_by(30) {
        daemon.handled(&member(&format!("k{key}")), "siem").await;
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_leave_an_idle_member_and_return_at_once() {
    let receiver = Receiver::start(|_| Reply::Status(204)).await;
    let home = Home::new(&config(GROUP, &siem(&receiver)));
    let daemon = home.start().await;
    publish(&daemon, "acme", 1).await;
    daemon.handled(&member("acme"), "siem").await;
    let consumers = async || {
        let stream: Value =
            serde_json::from_str(&daemon.get(&format!("/api/v1/streams/{}", member("acme"))).await).expect("JSON");
        stream["groups"][0]["consumers"].as_array().expect("a list").len()
    };
    until("a member without workers", BOUND, async || (consumers().await == 0).then_some(())).await;
    publish(&daemon, "acme", 2).await;
    until("the next event", BOUND, async || bodies(&receiver).contains(&event(2)).then_some(())).await;
    daemon.stop().await;
}
