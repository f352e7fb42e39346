//! Dead letters of a real daemon: listed, replayed, discarded, and kept within limits.
//!
//! Every case of [`on_both_stores`] runs on the embedded store and on Redis.

mod broken_off;
mod command_line;
mod limits;

use std::collections::BTreeMap;
use std::sync::Arc;

use aurora_bus::event::{DeadLetter, DeadLetterReason, EntryId, Fields, NewEntry};
use aurora_bus::store::{MAX_APPEND, Store, embedded, redis};
use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::app::{BOUND, Daemon, Home, client, next_text};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAMS: &str = r#"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams.groups]]
name = "siem"
sink = "log"
min_severity = "low"
[[streams.groups]]
name = "soar"
sink = "log"

[[streams]]
name = "aurora:agent:tasks"
[[streams]]
name = "aurora:agent:results"

[[streams]]
name = "aurora:audit"
relay = true
[[streams.groups]]
name = "audit-logger"
sink = "audit"
"#;

const ALERTS: &str = "aurora:alerts";
const DEAD: &str = "aurora:alerts:dead_letter";
const AGENTS_DEAD: &str = "aurora:agent:dead_letter";

/// The store of a test.
#[derive(Debug)]
struct Site {
    server: Option<RedisServer>,
}

impl Site {
    fn embedded() -> Self {
        Self { server: None }
    }

    async fn redis() -> Self {
        Self { server: Some(RedisServer::start(Product::Redis, &[]).await) }
    }

    /// Creates a folder with a configuration of the streams above and more.
    fn home(&self, config: &str) -> Home {
        let store = self
            .server
            .as_ref()
            .map(|server| format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", server.url()));
        Home::new(&format!("{STREAMS}\n{config}\n{}", store.unwrap_or_default()))
    }

    /// Opens the store while no daemon uses it.
    async fn store(&self, home: &Home) -> Arc<dyn Store> {
        match &self.server {
            None => {
                let config = embedded::Config { path: home.path("data"), ..embedded::Config::default() };
                Arc::new(config.open().await.expect("no daemon runs"))
            }
            Some(server) => {
                let config = redis::Config { url: server.url().into(), ..redis::Config::default() };
                Arc::new(config.connect().await.expect("a valid configuration"))
            }
        }
    }

    /// Appends entries to a stream of dead letters. Returns their ids.
    async fn bury(&self, home: &Home, dead_letter: &str, entries: Vec<Fields>) -> Vec<String> {
        let store = self.store(home).await;
        let stream = dead_letter.parse().expect("a name");
        let entries: Vec<NewEntry> = entries.into_iter().map(|fields| NewEntry { fields, idempotency: None }).collect();
        let mut ids = Vec::new();
        for entries in entries.chunks(MAX_APPEND) {
            let appended = store.append(&stream, entries.to_vec()).await.expect("appended");
            ids.extend(appended.into_iter().map(|appended| appended.id.to_string()));
        }
        store.close().await;
        ids
    }
}

/// Creates a dead letter of an alert.
fn letter(n: u64, group: &str, reason: DeadLetterReason) -> DeadLetter {
    let mut fields = Fields::default();
    fields.push("id", format!("event-{n}"));
    fields.push("data", json!({ "n": n, "severity": "high" }).to_string());
    fields.push("x-producer", "ä");
    DeadLetter {
        stream: ALERTS.parse().expect("a name"),
        id: EntryId::new(1_000 + n, 0),
        group: group.parse().expect("a name"),
        reason,
        error: format!("HTTP 400 for {n}"),
        attempts: 3,
        first_failure: Timestamp::from_second(1_741_076_109).expect("in range"),
        last_failure: Timestamp::from_second(1_741_076_209).expect("in range"),
        replays: 0,
        fields,
    }
}

fn rejected(n: u64) -> Fields {
    letter(n, "siem", DeadLetterReason::Rejected).to_fields()
}

fn foreign() -> Fields {
    [("note".into(), "not from the bus".into())].into_iter().collect()
}

async fn ask(daemon: &Daemon, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
    let request = client().request(method, daemon.url(&format!("/api/v1/dead-letters{path}")));
    let request = match body {
        Some(body) => request.body(body.to_string()),
        None => request,
    };
    let response = request.send().await.expect("an answer");
    let status = response.status();
    (status, response.json().await.expect("JSON"))
}

async fn get(daemon: &Daemon, path: &str) -> Value {
    let (status, body) = ask(daemon, Method::GET, path, None).await;
    assert_eq!(status, StatusCode::OK, "{path}: {body}");
    body
}

async fn post(daemon: &Daemon, path: &str, body: Value) -> Value {
    let (status, answer) = ask(daemon, Method::POST, path, Some(body)).await;
    assert_eq!(status, StatusCode::OK, "{path}: {answer}");
    answer
}

/// Returns status and code of an error response.
async fn refused(daemon: &Daemon, method: Method, path: &str, body: Option<Value>) -> (u16, String) {
    let (status, problem) = ask(daemon, method, path, body).await;
    (status.as_u16(), problem["code"].as_str().unwrap_or_default().to_owned())
}

fn ids(page: &Value) -> Vec<String> {
    let letters = page["dead_letters"].as_array().expect("a list");
    letters.iter().map(|letter| letter["id"].as_str().expect("an id").to_owned()).collect()
}

/// Returns every entry of a stream as JSON.
async fn entries(daemon: &Daemon, stream: &str) -> Vec<Value> {
    let body = daemon.get(&format!("/api/v1/streams/{stream}/events?limit=1000")).await;
    let body: Value = serde_json::from_str(&body).expect("JSON");
    body["events"].as_array().expect("a list").clone()
}

fn fields(entry: &Value) -> BTreeMap<String, String> {
    serde_json::from_value::<Vec<(String, String)>>(entry["fields"].clone()).expect("pairs").into_iter().collect()
}

/// Returns the audit entries of one action, oldest first.
async fn audited(daemon: &Daemon, action: &str) -> Vec<Value> {
    let events = daemon.events("aurora:audit").await;
    let events = events.into_values().map(|text| serde_json::from_str::<Value>(&text).expect("JSON"));
    events.filter(|event| event["action"] == action).collect()
}

async fn metric(daemon: &Daemon, name: &str) -> Option<f64> {
    let metrics = daemon.get("/metrics").await;
    metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

async fn metric_is(daemon: &Daemon, name: &str, value: f64) {
    until(&format!("{name} {value}"), BOUND, async || {
        (metric(daemon, name).await.is_some_and(|found| (found - value).abs() < f64::EPSILON)).then_some(())
    })
    .await;
}

async fn dead_letters_are_listed_by_filter_and_page(site: Site) {
    use DeadLetterReason::{Exhausted, Rejected};
    let home = site.home("");
    let dead = vec![
        letter(1, "siem", Rejected).to_fields(),
        letter(2, "soar", Exhausted).to_fields(),
        foreign(),
        letter(3, "siem", Exhausted).to_fields(),
        letter(4, "siem", Rejected).to_fields(),
    ];
    let all = site.bury(&home, DEAD, dead).await;
    let daemon = home.start().await;
    let pick = |places: &[usize]| places.iter().map(|n| all[*n].clone()).collect::<Vec<_>>();
    let cases: [(&str, &[usize]); 9] = [
        ("", &[0, 1, 2, 3, 4]),
        ("?group=siem", &[0, 3, 4]),
        ("?reason=exhausted", &[1, 3]),
        ("?group=siem&reason=rejected", &[0, 4]),
        ("?reason=foreign", &[2]),
        ("?group=nobody", &[]),
        ("?since=-1h", &[0, 1, 2, 3, 4]),
        ("?since=earliest&reason=rejected", &[0, 4]),
        ("?since=2100-01-01T00:00:00Z", &[]),
    ];
    for (query, expected) in cases {
        for name in [ALERTS, DEAD] {
            assert_eq!(ids(&get(&daemon, &format!("/{name}{query}")).await), pick(expected), "{name}{query}");
        }
    }
    let mut paged = Vec::new();
    let mut query = "?limit=2".to_owned();
    loop {
        let page = get(&daemon, &format!("/{ALERTS}{query}")).await;
        paged.extend(ids(&page));
        let Some(next) = page["next"].as_str() else { break };
        query = format!("?limit=2&cursor={next}");
    }
    assert_eq!(paged, all);

    let streams = get(&daemon, "").await;
    let streams: Vec<_> = streams["dead_letters"].as_array().expect("a list").iter().collect();
    let lengths: Vec<_> = streams.iter().map(|level| (level["stream"].as_str(), level["length"].as_u64())).collect();
    let expected = [(AGENTS_DEAD, 0), (DEAD, 5), ("aurora:audit:dead_letter", 0)];
    assert_eq!(lengths, expected.map(|(stream, length)| (Some(stream), Some(length))));
    assert_eq!(streams[0]["of"], json!(["aurora:agent:tasks", "aurora:agent:results"]));
    for path in ["?reason=broken", "?since=soon", "?cursor=x", "?grup=siem", "?group=a%20b"] {
        let found = refused(&daemon, Method::GET, &format!("/{ALERTS}{path}"), None).await;
        assert_eq!(found, (400, "bad_parameter".to_owned()), "{path}");
    }
    assert_eq!(refused(&daemon, Method::GET, "/aurora:alarms", None).await, (404, "no_such_stream".to_owned()));
}

async fn list_begins_at_a_position(site: Site) {
    let home = site.home("");
    let all = site.bury(&home, DEAD, (0..3).map(rejected).collect()).await;
    let store = site.store(&home).await;
    let epoch = store.epoch(&DEAD.parse().expect("a name")).await.expect("an epoch");
    store.close().await;
    let daemon = home.start().await;
    let later = get(&daemon, &format!("/{ALERTS}?since={epoch}:{}", all[0])).await;
    assert_eq!(ids(&later), all[1..]);
    let other_life = format!("/{ALERTS}?since=abcdef:{}", all[0]);
    assert_eq!(refused(&daemon, Method::GET, &other_life, None).await, (400, "bad_parameter".to_owned()));
}

async fn dead_letter_is_shown_with_its_original_entry(site: Site) {
    let home = site.home("");
    let mut odd = letter(1, "siem", DeadLetterReason::Undecodable);
    odd.fields = [("data".into(), "{\"n\":".into())].into_iter().collect();
    let mut bytes = letter(2, "siem", DeadLetterReason::Undecodable);
    bytes.fields = [("data".into(), bytes::Bytes::from_static(b"\xff\x00"))].into_iter().collect();
    let dead = vec![rejected(7), odd.to_fields(), bytes.to_fields(), foreign()];
    let all = site.bury(&home, DEAD, dead).await;
    let daemon = home.start().await;
    let shown = get(&daemon, &format!("/{ALERTS}/{}", all[0])).await;
    let expected = json!({
        "id": all[0], "stream": ALERTS, "group": "siem", "reason": "rejected", "error": "HTTP 400 for 7",
        "attempts": 3, "replays": 0,
        "first_failure": "2025-03-04T08:15:09.000Z", "last_failure": "2025-03-04T08:16:49.000Z",
        "entry": {
            "id": "1007-0", "event_id": "event-7", "data": { "n": 7, "severity": "high" },
            "fields": [["x-producer", "ä"]],
        },
    });
    assert_eq!(shown, expected);
    assert_eq!(get(&daemon, &format!("/{ALERTS}/{}", all[1])).await["entry"]["data_text"], "{\"n\":");
    assert_eq!(get(&daemon, &format!("/{ALERTS}/{}", all[2])).await["entry"]["data_hex"], "ff00");
    let foreign = get(&daemon, &format!("/{ALERTS}/{}", all[3])).await;
    assert_eq!(foreign["foreign"], json!(true));
    assert_eq!(foreign["entry"]["fields"], json!([["note", "not from the bus"]]));
    let missing = refused(&daemon, Method::GET, &format!("/{ALERTS}/1-1"), None).await;
    assert_eq!(missing, (404, "no_such_dead_letter".to_owned()));
    let nonsense = refused(&daemon, Method::GET, &format!("/{ALERTS}/first"), None).await;
    assert_eq!(nonsense, (400, "bad_parameter".to_owned()));
}

async fn replay_is_for_the_failed_group_only(site: Site) {
    let home = site.home("");
    let all = site.bury(&home, DEAD, vec![rejected(7), rejected(8)]).await;
    let daemon = home.start().await;
    let mut dashboard = daemon.watch("/api/v1/ws/alerts").await;
    let replayed = post(&daemon, &format!("/{ALERTS}/{}/replay", all[0]), json!({})).await;
    assert_eq!((&replayed["stream"], &replayed["repeated"]), (&json!(ALERTS), &json!(false)));
    daemon.handled(ALERTS, "siem").await;
    daemon.handled(ALERTS, "soar").await;
    let of = |name: &str, group: &str| format!("aurora_bus_{name}_total{{group=\"{group}\",stream=\"{ALERTS}\"}}");
    metric_is(&daemon, &of("acknowledged", "siem"), 1.0).await;
    metric_is(&daemon, &of("filtered", "soar"), 1.0).await;
    assert_eq!(metric(&daemon, &of("deliveries", "soar")).await, Some(0.0));

    let stored = entries(&daemon, ALERTS).await;
    assert_eq!((stored.len(), &stored[0]["id"]), (1, &replayed["id"]));
    assert_eq!((&stored[0]["event_id"], &stored[0]["data"]["n"]), (&json!("event-7"), &json!(7)));
    let expected = [("replay.count", "1"), ("replay.group", "siem"), ("replay.of", "1007-0"), ("x-producer", "ä")];
    assert_eq!(fields(&stored[0]), expected.map(|(n, v)| (n.to_owned(), v.to_owned())).into());
    assert_eq!(ids(&get(&daemon, &format!("/{ALERTS}")).await), all[1..]);

    // First to one group by name, then an alert for all, which is the first that the dashboard sees.
    post(&daemon, &format!("/{ALERTS}/{}/replay", all[1]), json!({ "to": "group:soar" })).await;
    daemon.publish(ALERTS, &["{\"n\":99,\"severity\":\"high\"}".to_owned()]).await.expect("accepted");
    assert_eq!(next_text(&mut dashboard).await, "{\"n\":99,\"severity\":\"high\"}");
    metric_is(&daemon, &of("acknowledged", "soar"), 2.0).await;
    metric_is(&daemon, &of("filtered", "siem"), 1.0).await;
    let mut late = daemon.watch("/api/v1/ws/alerts?since=earliest").await;
    assert_eq!(next_text(&mut late).await, "{\"n\":99,\"severity\":\"high\"}", "nor does one that comes later");
    assert!(!daemon.get("/metrics").await.contains("reason=\"undecodable\"} 1"), "nor is it counted as a gap");

    let again = refused(&daemon, Method::POST, &format!("/{ALERTS}/{}/replay", all[1]), None).await;
    assert_eq!(again, (404, "no_such_dead_letter".to_owned()));
}

async fn replay_to_the_stream_reaches_all_groups_and_dashboards(site: Site) {
    let home = site.home("");
    let all = site.bury(&home, DEAD, vec![rejected(7)]).await;
    let daemon = home.start().await;
    let mut dashboard = daemon.watch("/api/v1/ws/alerts").await;
    post(&daemon, &format!("/{DEAD}/{}/replay", all[0]), json!({ "to": "stream" })).await;
    assert_eq!(next_text(&mut dashboard).await, "{\"n\":7,\"severity\":\"high\"}");
    for group in ["siem", "soar"] {
        let acknowledged = format!("aurora_bus_acknowledged_total{{group=\"{group}\",stream=\"{ALERTS}\"}}");
        metric_is(&daemon, &acknowledged, 1.0).await;
    }
    let stored = entries(&daemon, ALERTS).await;
    assert!(!fields(&stored[0]).contains_key("replay.group"), "{stored:?}");
}

async fn replays_of_one_entry_are_limited(site: Site) {
    let home = site.home("[dead_letters]\nmax_replays = 2\n");
    let mut hopeless = letter(7, "siem", DeadLetterReason::Undecodable);
    hopeless.fields = [("data".into(), "no json".into())].into_iter().collect();
    site.bury(&home, DEAD, vec![hopeless.to_fields()]).await;
    let daemon = home.start().await;
    let dead = async |replays: u64| {
        until("dead letter", BOUND, async || {
            let page = get(&daemon, &format!("/{ALERTS}")).await;
            let letter = page["dead_letters"].get(0)?.clone();
            (letter["replays"] == json!(replays)).then_some(letter)
        })
        .await
    };
    for replays in 0..2 {
        let letter = dead(replays).await;
        let path = format!("/{ALERTS}/{}/replay", letter["id"].as_str().expect("an id"));
        post(&daemon, &path, json!({})).await;
    }
    let letter = dead(2).await;
    assert_eq!((&letter["reason"], &letter["group"]), (&json!("undecodable"), &json!("siem")));
    assert_eq!(letter["entry"]["data_text"], "no json");
    let path = format!("/{ALERTS}/{}/replay", letter["id"].as_str().expect("an id"));
    let (status, problem) = ask(&daemon, Method::POST, &path, None).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("too_many_replays")));
    assert!(problem["detail"].as_str().is_some_and(|text| text.contains("replayed 2 times")), "{problem}");
    let bulk = post(&daemon, &format!("/{ALERTS}/replay"), json!({ "all": true })).await;
    assert_eq!((&bulk["replayed"], &bulk["refused"]), (&json!(0), &json!({ "too_many_replays": 1 })));
    post(&daemon, &path, json!({ "force": true })).await;
    dead(3).await;
    let first_id = fields(&entries(&daemon, ALERTS).await[2]);
    assert_eq!(first_id.get("replay.of").map(String::as_str), Some("1007-0"), "it names the very first entry");
}

async fn dry_run_counts_and_changes_nothing(site: Site) {
    use DeadLetterReason::{Exhausted, Rejected};
    let home = site.home("");
    let dead = vec![
        letter(1, "siem", Rejected).to_fields(),
        letter(2, "soar", Exhausted).to_fields(),
        letter(3, "gone", Rejected).to_fields(),
        foreign(),
    ];
    let all = site.bury(&home, DEAD, dead).await;
    let daemon = home.start().await;
    let planned = post(&daemon, &format!("/{ALERTS}/replay"), json!({ "dry_run": true })).await;
    let expected = json!({
        "dry_run": true, "matched": 4, "replayed": 2, "repeated": 0, "gone": 0,
        "refused": { "no_such_group": 1, "not_a_dead_letter": 1 },
        "refusal": "the stream has no group `gone`: replay to another group (group:NAME) or to the stream",
        "by_group": { "siem": 1, "soar": 1, "gone": 1, "": 1 },
        "by_reason": { "rejected": 2, "exhausted": 1, "foreign": 1 },
        "first_id": all[0], "last_id": all[3], "audited": false, "next": null,
    });
    assert_eq!(planned, expected);
    let planned = post(&daemon, &format!("/{ALERTS}/discard"), json!({ "group": "siem", "dry_run": true })).await;
    assert_eq!((&planned["matched"], &planned["discarded"]), (&json!(1), &json!(1)));
    assert_eq!(ids(&get(&daemon, &format!("/{ALERTS}")).await), all);
    assert!(entries(&daemon, ALERTS).await.is_empty() && entries(&daemon, "aurora:audit").await.is_empty());
}

async fn request_without_or_with_unknown_conditions_is_refused(site: Site) {
    let home = site.home("");
    let all = site.bury(&home, DEAD, vec![rejected(1)]).await;
    let daemon = home.start().await;
    for body in [
        json!({}),
        json!({ "grup": "siem" }),
        json!({ "to": "siem", "all": true }),
        json!({ "ids": ["x"] }),
        json!({ "group": 7 }),
        json!([]),
    ] {
        let found = refused(&daemon, Method::POST, &format!("/{ALERTS}/replay"), Some(body.clone())).await;
        assert_eq!(found, (400, "bad_parameter".to_owned()), "{body}");
    }
    for path in ["", "?grup=siem&all=true", "?ids=1-1"] {
        let found = refused(&daemon, Method::DELETE, &format!("/{ALERTS}{path}"), None).await;
        assert_eq!(found, (400, "bad_parameter".to_owned()), "{path}");
    }
    let forced = json!({ "force": true, "all": true });
    let found = refused(&daemon, Method::POST, &format!("/{ALERTS}/discard"), Some(forced)).await;
    assert_eq!(found, (400, "bad_parameter".to_owned()));
    assert_eq!(ids(&get(&daemon, &format!("/{ALERTS}")).await), all);
}

async fn foreign_entry_can_be_discarded_but_not_replayed(site: Site) {
    let home = site.home("");
    let all = site.bury(&home, DEAD, vec![foreign(), rejected(1), foreign()]).await;
    let daemon = home.start().await;
    let found = refused(&daemon, Method::POST, &format!("/{ALERTS}/{}/replay", all[0]), None).await;
    assert_eq!(found, (409, "not_a_dead_letter".to_owned()));
    let (status, body) = ask(&daemon, Method::DELETE, &format!("/{ALERTS}/{}", all[0]), None).await;
    assert_eq!((status, body), (StatusCode::OK, json!({ "discarded": 1, "audited": true })));
    let found = refused(&daemon, Method::DELETE, &format!("/{ALERTS}/{}", all[0]), None).await;
    assert_eq!(found, (404, "no_such_dead_letter".to_owned()));
    let (_, body) = ask(&daemon, Method::DELETE, &format!("/{ALERTS}?reason=foreign"), None).await;
    assert_eq!(body["discarded"], json!(1));
    assert_eq!(ids(&get(&daemon, &format!("/{ALERTS}")).await), all[1..2]);
}

async fn streams_with_shared_dead_letters_see_only_their_own(site: Site) {
    let home = site.home("");
    let of = |stream: &str, n| {
        let letter = letter(n, "agents", DeadLetterReason::Rejected);
        DeadLetter { stream: stream.parse().expect("a name"), ..letter }.to_fields()
    };
    let (tasks, results) = ("aurora:agent:tasks", "aurora:agent:results");
    let dead = vec![of(tasks, 1), of(results, 2), foreign(), of(tasks, 3), of("aurora:agent:old", 4)];
    let all = site.bury(&home, AGENTS_DEAD, dead).await;
    let daemon = home.start().await;
    assert_eq!(ids(&get(&daemon, &format!("/{tasks}")).await), [all[0].clone(), all[3].clone()]);
    assert_eq!(ids(&get(&daemon, &format!("/{AGENTS_DEAD}")).await), all);
    let not_its_own = refused(&daemon, Method::GET, &format!("/{results}/{}", all[0]), None).await;
    assert_eq!(not_its_own, (404, "no_such_dead_letter".to_owned()));
    let discarded = post(&daemon, &format!("/{tasks}/discard"), json!({ "all": true })).await;
    assert_eq!(discarded["discarded"], json!(2));
    // Each returns to its own stream.
    let replayed = post(&daemon, &format!("/{AGENTS_DEAD}/replay"), json!({ "all": true, "to": "stream" })).await;
    let refused = json!({ "not_a_dead_letter": 1, "no_such_stream": 1 });
    assert_eq!((&replayed["replayed"], &replayed["refused"]), (&json!(1), &refused));
    assert_eq!(entries(&daemon, results).await.len(), 1);
    assert!(entries(&daemon, tasks).await.is_empty());
}

async fn bulk_replay_continues_and_every_action_is_audited(site: Site) {
    let home = site.home("");
    let count: usize = 1_300;
    let all = site.bury(&home, DEAD, (0..count as u64).map(rejected).collect()).await;
    let daemon = home.start().await;
    let named = post(&daemon, &format!("/{ALERTS}/discard"), json!({ "ids": [all[0], all[1], "1-1"] })).await;
    assert_eq!((&named["discarded"], &named["gone"], &named["audited"]), (&json!(2), &json!(1), &json!(true)));
    let mut body = json!({ "group": "siem", "limit": 500 });
    let mut requests = 0;
    loop {
        let done = post(&daemon, &format!("/{ALERTS}/replay"), body.clone()).await;
        assert!(done["matched"].as_u64().is_some_and(|matched| matched <= 500), "{done}");
        requests += 1;
        if done["next"].is_null() {
            break;
        }
        body["cursor"] = done["next"].clone();
    }
    assert_eq!(requests, 3);
    daemon.handled(ALERTS, "siem").await;
    let mut numbers: Vec<u64> = daemon.events(ALERTS).await.into_values().map(|text| number(&text)).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (2..count as u64).collect::<Vec<_>>());
    assert!(ids(&get(&daemon, &format!("/{ALERTS}")).await).is_empty());
    metric_is(&daemon, &format!("aurora_bus_dead_letters_replayed_total{{stream=\"{DEAD}\"}}"), 1_298.0).await;
    metric_is(&daemon, &format!("aurora_bus_dead_letters_discarded_total{{stream=\"{DEAD}\"}}"), 2.0).await;

    let discards = audited(&daemon, "dead_letters.discard").await;
    assert_eq!(discards.len(), 1);
    let told = (&discards[0]["count"], &discards[0]["ids"], &discards[0]["actor"], &discards[0]["stream"]);
    assert_eq!(told, (&json!(2), &json!([all[0], all[1]]), &json!("http:loopback"), &json!(DEAD)));
    let replays = audited(&daemon, "dead_letters.replay").await;
    let total: u64 = replays.iter().filter_map(|event| event["count"].as_u64()).sum();
    assert_eq!(total, 1_298, "{replays:?}");
    assert!(replays.iter().all(|event| event["filter"]["group"] == "siem" && event["to"] == "group"));
    assert!(replays.iter().all(|event| event["ids"].as_array().is_some_and(|ids| ids.len() <= 100)));
    daemon.handled("aurora:audit", "audit-logger").await;
    daemon.stop().await;
    let verified = home.run(&["audit", "verify", "data/audit"]);
    assert!(verified.status.success(), "{verified:?}");
}

fn number(text: &str) -> u64 {
    let payload: Value = serde_json::from_str(text).expect("JSON");
    payload["n"].as_u64().expect("a number")
}

/// Instantiates cases on every store.
macro_rules! on_both_stores {
    ($($case:ident),* $(,)?) => {
        mod embedded_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(crate::dead_letters::Site::embedded()).await;
            })*
        }
        mod redis_store {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                super::$case(crate::dead_letters::Site::redis().await).await;
            })*
        }
    };
}
use on_both_stores;

on_both_stores!(
    dead_letters_are_listed_by_filter_and_page,
    list_begins_at_a_position,
    dead_letter_is_shown_with_its_original_entry,
    replay_is_for_the_failed_group_only,
    replay_to_the_stream_reaches_all_groups_and_dashboards,
    replays_of_one_entry_are_limited,
    dry_run_counts_and_changes_nothing,
    request_without_or_with_unknown_conditions_is_refused,
    foreign_entry_can_be_discarded_but_not_replayed,
    streams_with_shared_dead_letters_see_only_their_own,
    bulk_replay_continues_and_every_action_is_audited,
);
