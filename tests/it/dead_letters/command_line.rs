//! `aurora-bus dead` with a running daemon.

use std::process::Output;

use super::*;

fn said(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

async fn commands_list_show_replay_and_discard(site: Site) {
    let home = site.home("");
    let mut letters: Vec<Fields> = (0..1_205).map(rejected).collect();
    letters.push(letter(9_000, "soar", DeadLetterReason::Exhausted).to_fields());
    letters.push(foreign());
    let all = site.bury(&home, DEAD, letters).await;
    let daemon = home.start().await;
    let url = daemon.url("");
    let dead = |arguments: &[&str]| said(&home.run(&[&["dead"], arguments, &["--url", &url]].concat()));

    let (out, _, code) = dead(&["list"]);
    assert!(out.contains("aurora:alerts:dead_letter  1207 of at most 100000  of aurora:alerts"), "{out}");
    assert_eq!(code, Some(0));
    let (out, err, code) = dead(&["list", ALERTS, "--limit", "3"]);
    assert_eq!((out.lines().count(), code), (3, Some(0)));
    assert!(out.starts_with(&all[0]) && out.contains("aurora:alerts/siem  rejected  attempts 3  replays 0"), "{out}");
    assert!(err.contains("there may be more"), "{err}");
    let (out, _, _) = dead(&["list", ALERTS, "--group", "soar", "--since", "-1h", "--json"]);
    let shown: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!(shown["id"], json!(all[1_205]));
    let high = r#"{"key":"severity","cmp":"gte","val":"high"}"#;
    let (out, _, _) = dead(&["list", ALERTS, "--filter", &format!(r#"{{"op":"not","nodes":[{high}]}}"#)]);
    assert_eq!((out.lines().count(), out.starts_with(&all[1_206])), (1, true), "{out}");
    let (out, _, _) = dead(&["discard", ALERTS, "--filter", high, "--dry-run"]);
    assert!(out.starts_with("1206 matched, 1206 would be discarded"), "{out}");
    let (_, err, code) = dead(&["list", ALERTS, "--filter", r#"{"key":"colour","cmp":"eq","val":"red"}"#]);
    assert!(err.contains("`filter` is not valid"), "{err}");
    assert_ne!(code, Some(0));
    let (out, _, _) = dead(&["list", ALERTS, "--reason", "foreign"]);
    assert_eq!(out, format!("{}  foreign: not written by aurora-bus", all[1_206]));
    let (out, _, code) = dead(&["show", ALERTS, &all[1]]);
    let shown: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!((&shown["entry"]["data"]["n"], code), (&json!(1), Some(0)));

    let (out, _, code) = dead(&["replay", ALERTS, "--group", "siem", "--dry-run"]);
    assert!(out.starts_with("1205 matched, 1205 would be replayed\n  group siem: 1205"), "{out}");
    assert_eq!(code, Some(0));
    let (_, err, code) = dead(&["replay", ALERTS, "--group", "siem"]);
    assert!(err.contains("nothing was done: add --yes"), "{err}");
    assert_eq!((code, entries(&daemon, ALERTS).await.len()), (Some(1), 0));

    let (out, _, code) = dead(&["discard", ALERTS, &all[0], &all[1]]);
    assert_eq!((out.lines().next(), code), (Some("2 matched, 2 discarded"), Some(0)));
    let (_, err, code) = dead(&["discard", ALERTS, &all[0]]);
    assert!(err.contains("1 dead letters are gone"), "{err}");
    assert_eq!(code, Some(1));
    let (out, err, code) = dead(&["replay", ALERTS, "--yes", "--json"]);
    let counts: Value = serde_json::from_str(&out).expect("one JSON object");
    assert_eq!((&counts["matched"], &counts["replayed"]), (&json!(1_205), &json!(1_204)));
    assert_eq!(counts["refused"], json!({ "not_a_dead_letter": 1 }));
    assert!(err.contains("1 of 1205 dead letters were refused"), "{err}");
    assert_eq!((code, daemon.events(ALERTS).await.len()), (Some(1), 1_204));
    let (out, _, code) = dead(&["discard", ALERTS, "--reason", "foreign", "--yes"]);
    assert_eq!((out.lines().next(), code), (Some("1 matched, 1 discarded"), Some(0)));
    assert_eq!(audited(&daemon, "dead_letters.discard").await[0]["actor"], json!("cli:loopback"));

    assert_eq!(dead(&["replay"]).2, Some(2));
    assert_eq!(dead(&["list", "aurora:alarms"]).2, Some(1));
    let (_, err, code) = dead(&["replay", ALERTS, "--to", "nobody", "--yes"]);
    assert!(err.contains("must be group (the one that failed), group:NAME or stream"), "{err}");
    assert_eq!(code, Some(1));
}

on_both_stores!(commands_list_show_replay_and_discard);
