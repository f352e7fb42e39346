//! Certificates that are replaced while the daemon runs.

use std::fs;

use reqwest::StatusCode;
use serde_json::Value;

use super::{address, curl, home, next_text, shown, text, watch};
use crate::support::app::{BOUND, Daemon};
use crate::support::until;

async fn note(daemon: &Daemon) -> String {
    let report: Value = serde_json::from_str(&daemon.body("/ready").await).expect("a report");
    let parts = report["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["name"] == "certificate").expect("the part");
    part["note"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn new_connections_see_the_new_certificate_and_old_ones_live_on() {
    let (home, authority) = home("");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let first = shown(&daemon, &ca).await;
    let mut old = watch(&daemon, &ca).await;

    authority.issue("second", 30);
    authority.replace("server", "second");
    daemon.signal("HUP");
    let second = until("the second certificate", BOUND, async || {
        let now = shown(&daemon, &ca).await;
        (now != first).then_some(now)
    });
    let second = second.await;
    let mut new = watch(&daemon, &ca).await;
    let url = daemon.url("/api/v1/alerts");
    assert!(curl(&ca, &[&url, "-d", r#"{"n":1}"#]).status.success());
    for socket in [&mut old, &mut new] {
        assert_eq!(next_text(socket).await, r#"{"n":1}"#);
    }

    // Without being told.
    authority.issue("third", 30);
    authority.replace("server", "third");
    until("the third certificate", BOUND, async || (shown(&daemon, &ca).await != second).then_some(())).await;
    assert!(curl(&ca, &[&url, "-d", r#"{"n":2}"#]).status.success());
    for socket in [&mut old, &mut new] {
        assert_eq!(next_text(socket).await, r#"{"n":2}"#);
    }
    assert_eq!(daemon.metric("aurora_bus_http_tls_reloads_total").await, 2);
    daemon.stop().await;
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_leaves_the_one_before_and_is_told() {
    let (home, authority) = home("");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let first = shown(&daemon, &ca).await;
    assert_eq!(note(&daemon).await, "");
    authority.issue("other", 30);
    authority.issue("expired", -1);
    authority.run("cp server.pem good.pem; cp server.key good.key");

    let cases = [
        ("cp other.pem server.pem", "http.tls.key_file: is not the key"),
        ("echo torn > server.pem", "http.tls.cert_file: server.pem holds no usable certificate"),
        ("cp expired.pem server.pem; cp expired.key server.key", "http.tls.cert_file: the certificate has expired"),
        ("rm server.pem", "http.tls.cert_file: cannot read server.pem"),
    ];
    for (script, reason) in cases {
        authority.run(script);
        daemon.signal("HUP");
        until(reason, BOUND, async || note(&daemon).await.contains(reason).then_some(())).await;
        assert_eq!(shown(&daemon, &ca).await, first, "{script}");
        assert_eq!(daemon.status("/ready").await, Some(StatusCode::OK), "it works, an operator should look");
        let body: Value = serde_json::from_str(&daemon.body("/ready").await).expect("a report");
        assert_eq!(body["status"], "degraded");
        authority.replace("server", "good");
        until("all well again", BOUND, async || note(&daemon).await.is_empty().then_some(())).await;
    }
    let log = daemon.take_log().join("\n");
    assert!(log.contains("new certificate not usable, serving the previous one"), "{log}");
    let secret = fs::read_to_string(authority.path("good.key")).expect("a key");
    let secret = secret.lines().nth(1).expect("a line of the key");
    assert!(!log.contains(secret), "{log}");
    daemon.stop().await;
}

#[tokio::test]
async fn a_certificate_that_ends_soon_is_told() {
    let (home, authority) = home("");
    authority.issue("server", -1);
    let daemon = home.spawn().await.expect("an expired certificate is no reason to stay away");
    let insecure = ["-k", &daemon.url("/ready")];
    let ready = text(&curl(&authority.path("ca.pem"), &insecure).stdout);
    assert!(ready.contains("the certificate has expired"), "{ready}");
    authority.issue("server", 30);
    daemon.signal("HUP");
    daemon.ready(StatusCode::OK).await;
    until("a good certificate", BOUND, async || note(&daemon).await.is_empty().then_some(())).await;
    let metrics = daemon.get("/metrics").await;
    let days = metrics.lines().find_map(|line| line.strip_prefix("aurora_bus_http_tls_certificate_days "));
    let days: f64 = days.expect("the metric").parse().expect("a number");
    assert!(days > 29.0 && days < 30.0, "{days} of {}", address(&daemon));
    daemon.stop().await;
}
