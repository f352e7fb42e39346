//! What one address can take of the listener, on the real binary.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::FutureExt as _;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::app::{BOUND, Home};

/// An address of its own: the tests themselves ask from another one.
const GREEDY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const EVENTS: &str = "/api/v1/streams/aurora:alerts/events";

fn home(http: &str) -> Home {
    let stream = "[[streams]]\nname = \"aurora:alerts\"\nrelay = true\n";
    let cps = "[[streams]]\nname = \"aurora:cps:alerts\"\nrelay = true\n";
    Home::new(&format!("{stream}{cps}[relay]\ndrain_window = \"200ms\"\n[http]\n{http}\n"))
}

#[tokio::test]
async fn one_address_can_have_half_of_those_who_wait_for_events() {
    let home = home("");
    let daemon = home.start().await;
    let greedy = reqwest::Client::builder().local_address(IpAddr::from(GREEDY)).build().expect("a client");
    let mut waiting = JoinSet::new();
    for _ in 0..33 {
        let request = greedy.get(daemon.url(&format!("{EVENTS}?wait_ms=20000"))).send();
        waiting.spawn(request.map(|answer| answer.expect("an answer")));
    }
    // The others wait for longer than that.
    let refused = timeout(BOUND, waiting.join_next()).await.expect("a refusal").expect("an answer").expect("a task");
    assert_eq!(
        (refused.status(), &refused.headers()["retry-after"]),
        (StatusCode::TOO_MANY_REQUESTS, &"1".parse().expect("a value"))
    );
    let problem: Value = serde_json::from_slice(&refused.bytes().await.expect("a body")).expect("JSON");
    assert_eq!(problem["code"], json!("too_many_waiting"));
    let other = daemon.get(&format!("{EVENTS}?wait_ms=50")).await;
    assert!(other.starts_with(r#"{"events":[],"#), "another address may wait: {other}");
    daemon.publish("aurora:alerts", &["{}".to_owned()]).await.expect("accepted");
    for answer in waiting.join_all().await {
        assert_eq!(answer.status(), StatusCode::OK);
    }
    daemon.stop().await;
}
