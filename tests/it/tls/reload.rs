//! Certificates that are replaced at run time.

use std::fs;

use reqwest::StatusCode;
use serde_json::Value;

use super::{address, curl, home, next_text, served, text, watch};
use crate::support::app::{BOUND, Daemon};
use crate::support::until;

async fn note(daemon: &Daemon) -> String {
    let report: Value = serde_json::from_str(&daemon.body("/ready").await).expect("a report");
    let parts = report["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["name"] == "certificate").expect("the part");
    part["note"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn new_connections_get_the_new_certificate_and_old_ones_stay() {
    let (home, authority) = home("");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let first = served(&daemon, &ca).await;
    let mut old = watch(&daemon, &ca).await;

    authority.issue("second", 30);
    authority.replace("server", "second");
    daemon.signal("HUP");
    let second = until("the second certificate", BOUND, async || {
        let now = served(&daemon, &ca).await;
        (now != first).then_some(now)
    });
    let second = second.await;
    let mut new = watch(&daemon, &ca).await;
    let url = daemon.url("/api/v1/alerts");
    assert!(curl(&ca, &[&url, "-d", r#"{"n":1}"#]).status.success());
    for socket in [&mut old, &mut new] {
        assert_eq!(next_text(socket).await, r#"{"n":1}"#);
    }

    // Without a signal.
    authority.issue("third", 30);
    authority.replace("server", "third");
    until("the third certificate", BOUND, async || (served(&daemon, &ca).await != second).then_some(())).await;
    assert!(curl(&ca, &[&url, "-d", r#"{"n":2}"#]).status.success());
    for socket in [&mut old, &mut new] {
        assert_eq!(next_text(socket).await, r#"{"n":2}"#);
    }
    assert_eq!(daemon.metric("aurora_bus_http_tls_reloads_total").await, 2);
    daemon.stop().await;
}

#[tokio::test]
async fn unusable_certificate_keeps_the_previous_one_and_is_noted() {
    let (home, authority) = home("");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let first = served(&daemon, &ca).await;
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
        assert_eq!(served(&daemon, &ca).await, first, "{script}");
        assert_eq!(daemon.status("/ready").await, Some(StatusCode::OK), "ready, with a note");
        let body: Value = serde_json::from_str(&daemon.body("/ready").await).expect("a report");
        assert_eq!(body["status"], "degraded");
        authority.replace("server", "good");
        until("no note", BOUND, async || note(&daemon).await.is_empty().then_some(())).await;
    }
    let log = daemon.take_log().join("\n");
    assert!(log.contains("new certificate not usable, serving the previous one"), "{log}");
    let secret = fs::read_to_string(authority.path("good.key")).expect("a key");
    let secret = secret.lines().nth(1).expect("a line of the key");
    assert!(!log.contains(secret), "{log}");
    daemon.stop().await;
}

#[tokio::test]
async fn expired_certificate_is_served_and_noted() {
    let (home, authority) = home("");
    authority.issue("server", -1);
    let daemon = home.spawn().await.expect("starts with an expired certificate");
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
