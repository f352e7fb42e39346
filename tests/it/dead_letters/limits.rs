//! The retention of dead letters: warnings, counts and audit entries.

use super::*;

/// Returns the note of `/ready` on the dead letters.
async fn note(daemon: &Daemon) -> Option<String> {
    let ready: Value = serde_json::from_str(&daemon.get("/ready").await).expect("JSON");
    let parts = ready["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["name"] == "dead letters").expect("the part");
    assert_eq!(part["ready"], json!(true));
    part["note"].as_str().map(str::to_owned)
}

async fn excess_is_reported_and_the_oldest_are_removed(site: Site) {
    let home = site.home("[dead_letters]\nmax_len = 1_000\nalarm_at = 0.5\n");
    let all = site.bury(&home, DEAD, (0..1_750).map(rejected).collect()).await;
    let daemon = home.start().await;
    let of = |name: &str| format!("aurora_bus_{name}{{stream=\"{DEAD}\"}}");
    metric_is(&daemon, &of("dead_letters_expired_total"), 750.0).await;
    metric_is(&daemon, &of("dead_letter_length"), 1_000.0).await;
    metric_is(&daemon, &of("dead_letter_capacity_ratio"), 1.0).await;
    let left = get(&daemon, &format!("/{ALERTS}?limit=1000")).await;
    assert_eq!(ids(&left), all[750..], "exactly what was too much is gone, the oldest of them");

    let text = until("note", BOUND, async || note(&daemon).await).await;
    assert!(text.contains("`aurora:alerts:dead_letter` holds 1000 of at most 1000"), "{text}");
    let streams: Value = serde_json::from_str(&daemon.get("/api/v1/streams").await).expect("JSON");
    let alerts = streams["streams"].as_array().and_then(|s| s.iter().find(|s| s["name"] == ALERTS)).expect("it");
    assert_eq!(alerts["dead_letters"]["length"], json!(1_000));
    assert!(alerts["dead_letters"]["alarm"].as_str().is_some_and(|alarm| alarm.contains("1000")), "{alerts}");
    assert!(get(&daemon, "").await["dead_letters"][1]["alarm"].is_string());

    let expired = audited(&daemon, "dead_letters.expire").await;
    let total: u64 = expired.iter().filter_map(|event| event["count"].as_u64()).sum();
    assert_eq!(total, 750);
    assert_eq!((&expired[0]["first_id"], &expired[0]["actor"]), (&json!(all[0]), &json!("retention")));
    assert_eq!(expired.last().expect("one")["last_id"], json!(all[749]));
    assert_eq!(expired[0]["reasons"].as_object().expect("reasons").len(), 1);

    // There is room again, so the warning ends.
    post(&daemon, &format!("/{ALERTS}/discard"), json!({ "all": true, "limit": 600 })).await;
    until("end of the alarm", BOUND, async || note(&daemon).await.is_none().then_some(())).await;
    metric_is(&daemon, &of("dead_letter_length"), 400.0).await;
    daemon.signal("TERM");
    let log = daemon.ended().await.log;
    assert_eq!(log.matches("dead letters fill up").count(), 1, "told once: {log}");
    assert_eq!(log.matches("dead letters below the alarm level again").count(), 1);
}

async fn old_dead_letters_are_removed_and_young_ones_stay(site: Site) {
    let home = site.home("[dead_letters]\nmax_age = \"1s\"\n");
    site.bury(&home, DEAD, vec![rejected(1), foreign()]).await;
    let daemon = home.start().await;
    metric_is(&daemon, &format!("aurora_bus_dead_letters_expired_total{{stream=\"{DEAD}\"}}"), 2.0).await;
    assert!(ids(&get(&daemon, &format!("/{ALERTS}")).await).is_empty());
    let expired = audited(&daemon, "dead_letters.expire").await;
    assert_eq!(expired.len(), 1);
    assert_eq!((&expired[0]["groups"], &expired[0]["count"]), (&json!({ "siem": 1 }), &json!(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_together_remove_only_the_excess() {
    let site = Site::redis().await;
    let limit = "[dead_letters]\nmax_len = 500\n";
    let (one, two) = (site.home(limit), site.home(limit));
    let all = site.bury(&one, DEAD, (0..3_000).map(rejected).collect()).await;
    let (one, two) = tokio::join!(one.start(), two.start());
    until("dead letters within their limit", BOUND, async || {
        (get(&one, "").await["dead_letters"][1]["length"] == json!(500)).then_some(())
    })
    .await;
    assert_eq!(ids(&get(&two, &format!("/{ALERTS}?limit=1000")).await), all[2_500..]);
    let name = format!("aurora_bus_dead_letters_expired_total{{stream=\"{DEAD}\"}}");
    until("count of both", BOUND, async || {
        let both = metric(&one, &name).await? + metric(&two, &name).await?;
        ((both - 2_500.0).abs() < f64::EPSILON).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_audit_stream_is_reported_and_blocks_nothing() {
    let home =
        Home::new("[[streams]]\nname = \"aurora:alerts\"\n[[streams.groups]]\nname = \"siem\"\nsink = \"log\"\n");
    Site::embedded().bury(&home, DEAD, vec![rejected(1)]).await;
    let daemon = home.start().await;
    let done = post(&daemon, &format!("/{ALERTS}/discard"), json!({ "all": true })).await;
    assert_eq!((&done["discarded"], &done["audited"]), (&json!(1), &json!(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn full_audit_stream_is_reported_and_blocks_no_discard() {
    let site = Site::redis().await;
    let home = site.home("[[streams]]\nname = \"trail\"\n[dead_letters]\naudit = \"trail\"\n");
    let all = site.bury(&home, DEAD, vec![rejected(1), rejected(2)]).await;
    assert_eq!(site.server.as_ref().expect("a server").cli(&["SET", "trail", "no stream"]), "OK");
    let daemon = home.start().await;
    let (_, done) = ask(&daemon, Method::DELETE, &format!("/{ALERTS}/{}", all[0]), None).await;
    assert_eq!(done, json!({ "discarded": 1, "audited": false }));
    let replayed = post(&daemon, &format!("/{ALERTS}/{}/replay", all[1]), json!({})).await;
    assert_eq!(replayed["audited"], json!(false));
    daemon.signal("TERM");
    let log = daemon.ended().await.log;
    let told: Vec<_> = log.lines().filter(|line| line.contains("audit entry not written")).collect();
    assert_eq!(told.len(), 2, "{log}");
    assert!(told[0].contains("dead_letters.discard") && told[0].contains(&all[0]), "the log has it instead: {told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn occupied_dead_letter_key_leaves_the_daemon_ready() {
    let site = Site::redis().await;
    let home = site.home("");
    assert_eq!(site.server.as_ref().expect("a server").cli(&["SET", DEAD, "no stream"]), "OK");
    let daemon = home.start().await;
    assert_eq!(refused(&daemon, Method::GET, &format!("/{ALERTS}"), None).await, (409, "not_a_stream".to_owned()));
    let streams = get(&daemon, "").await;
    assert!(streams["dead_letters"][1]["error"].is_string(), "{streams}");
    let text = until("note", BOUND, async || note(&daemon).await).await;
    assert!(text.contains("retention of `aurora:alerts:dead_letter` failed"), "{text}");
}

#[test]
fn configured_audit_stream_must_be_declared() {
    let home = Home::new("[dead_letters]\naudit = \"aurora:audits\"\nalarm_at = 7.0\n");
    let checked = home.run(&["check", "--config", "aurora-bus.toml"]);
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert_eq!(checked.status.code(), Some(2), "{said}");
    assert!(said.contains("dead_letters.audit: stream `aurora:audits` is not declared"), "{said}");
    assert!(said.contains("dead_letters.alarm_at: must be more than 0 and at most 1, not 7"), "{said}");
}

on_both_stores!(excess_is_reported_and_the_oldest_are_removed, old_dead_letters_are_removed_and_young_ones_stay);
