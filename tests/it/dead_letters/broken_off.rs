//! Interrupted replays: a repetition neither loses nor doubles an entry.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::support::random_below;

/// Returns how often each number is in the stream.
async fn numbers(daemon: &Daemon) -> BTreeMap<u64, u64> {
    let mut times = BTreeMap::new();
    for text in daemon.events(ALERTS).await.into_values() {
        *times.entry(number(&text)).or_default() += 1;
    }
    times
}

#[tokio::test(flavor = "multi_thread")]
async fn second_replay_repairs_crash_between_append_and_removal() {
    let site = Site::redis().await;
    let home = site.home("");
    let all = site.bury(&home, DEAD, (0..5).map(rejected).collect()).await;
    let daemon = home.start().await;
    let server = site.server.as_ref().expect("a server");
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "-xdel"]), "OK");
    let one = format!("/{ALERTS}/{}/replay", all[0]);
    assert_eq!(refused(&daemon, Method::POST, &one, None).await, (503, "store_denied".to_owned()));
    let many = format!("/{ALERTS}/replay");
    let body = json!({ "all": true });
    assert_eq!(refused(&daemon, Method::POST, &many, Some(body.clone())).await, (503, "store_denied".to_owned()));
    assert_eq!(ids(&get(&daemon, &format!("/{ALERTS}")).await), all, "what was not removed is still there");
    daemon.crash();
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "+xdel"]), "OK");

    let daemon = home.start().await;
    let replayed = post(&daemon, &one, json!({})).await;
    assert_eq!(replayed["repeated"], json!(true));
    // A different request now still completes the interrupted one: the entry is in the stream.
    let replayed = post(&daemon, &many, json!({ "all": true, "to": "stream" })).await;
    assert_eq!((&replayed["replayed"], &replayed["repeated"]), (&json!(0), &json!(4)));
    assert_eq!(numbers(&daemon).await, (0..5).map(|n| (n, 1)).collect());
    assert!(ids(&get(&daemon, &format!("/{ALERTS}")).await).is_empty());
    metric_is(&daemon, &format!("aurora_bus_dead_letters_replayed_total{{stream=\"{DEAD}\"}}"), 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_bulk_returns_its_progress_and_a_cursor() {
    let site = Site::redis().await;
    let home = site.home("");
    let misplaced = DeadLetter {
        stream: "aurora:agent:results".parse().expect("a name"),
        ..letter(999, "siem", DeadLetterReason::Rejected)
    };
    for by_ids in [true, false] {
        let mut letters: Vec<Fields> = (0..70).map(rejected).collect();
        letters.push(misplaced.to_fields());
        let all = site.bury(&home, DEAD, letters).await;
        let server = site.server.as_ref().expect("a server");
        assert_eq!(server.cli(&["SET", "aurora:agent:results", "no stream"]), "OK");
        let daemon = home.start().await;
        let path = format!("/{DEAD}/replay");
        let mut body = if by_ids { json!({ "ids": all }) } else { json!({ "all": true }) };
        body["to"] = json!("stream");
        let mut replayed = 0;
        let failed = loop {
            let (status, done) = ask(&daemon, Method::POST, &path, Some(body.clone())).await;
            if status != StatusCode::OK {
                break done;
            }
            replayed += done["replayed"].as_u64().expect("a count");
            assert!(done["next"].is_string() && replayed < 71, "{done}");
            body["cursor"] = done["next"].clone();
        };
        assert_eq!(failed["code"], json!("not_a_stream"));
        // The invalid entry interrupts only its own step.
        assert!(replayed >= 60, "{replayed}");
        assert_eq!(server.cli(&["DEL", "aurora:agent:results"]), "1");
        let rest = post(&daemon, &path, body).await;
        assert_eq!((replayed + rest["replayed"].as_u64().expect("a count"), &rest["next"]), (71, &Value::Null));
        assert!(ids(&get(&daemon, &format!("/{DEAD}")).await).is_empty());
        daemon.stop().await;
    }
    let daemon = home.start().await;
    assert_eq!(numbers(&daemon).await, (0..70).map(|n| (n, 2)).collect(), "once each time");
}

async fn kills_during_bulk_replay_lose_and_double_nothing(site: Site) {
    const COUNT: u64 = 4_000;
    let home = site.home("");
    site.bury(&home, DEAD, (0..COUNT).map(rejected).collect()).await;
    let mut kills = 0;
    loop {
        let daemon = home.start().await;
        let url = daemon.url(&format!("/api/v1/dead-letters/{ALERTS}/replay"));
        let body = json!({ "group": "siem", "limit": 5_000 }).to_string();
        let replay = client().post(url).body(body).send();
        // Later each time, so that the test ends on any machine.
        let kill_after = Duration::from_millis(random_below(150 + 10 * kills));
        let Ok(answer) = tokio::time::timeout(kill_after, replay).await else {
            daemon.crash();
            kills += 1;
            continue;
        };
        assert_eq!(answer.expect("an answer").status(), StatusCode::OK);
        if ids(&get(&daemon, &format!("/{ALERTS}")).await).is_empty() {
            assert_eq!(numbers(&daemon).await, (0..COUNT).map(|n| (n, 1)).collect(), "after {kills} kills");
            return;
        }
    }
}

async fn concurrent_replays_append_every_entry_once(site: Site) {
    const COUNT: u64 = 600;
    let home = site.home("");
    site.bury(&home, DEAD, (0..COUNT).map(rejected).collect()).await;
    let daemon = home.start().await;
    let path = format!("/{ALERTS}/replay");
    let body = || json!({ "all": true });
    let (a, b, c) =
        tokio::join!(post(&daemon, &path, body()), post(&daemon, &path, body()), post(&daemon, &path, body()));
    let replayed: u64 = [&a, &b, &c].iter().filter_map(|done| done["replayed"].as_u64()).sum();
    assert_eq!(replayed, COUNT);
    assert_eq!(numbers(&daemon).await, (0..COUNT).map(|n| (n, 1)).collect());
}

on_both_stores!(kills_during_bulk_replay_lose_and_double_nothing, concurrent_replays_append_every_entry_once);
