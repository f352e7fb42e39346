//! The HTTP API on the real binary: publishing, ranges, limits and errors.

use futures_util::future::join_all;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::support::app::{BOUND, Daemon, Home, client};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

/// Two streams without groups.
const SMALL: &str = r#"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
"#;

async fn post(daemon: &Daemon, path: &str, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> Response {
    let request =
        headers.iter().fold(client().post(daemon.url(path)), |request, (name, value)| request.header(*name, *value));
    request.body(body).send().await.expect("a response")
}

async fn status_and_body(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let body = response.bytes().await.expect("a body");
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

const EVENTS: &str = "/api/v1/streams/aurora:alerts/events";
const NDJSON: (&str, &str) = ("content-type", "application/x-ndjson");

#[tokio::test]
async fn event_is_stored_byte_for_byte_in_every_body_format() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let sent = [r#"{ "title" : "spaces  kept", "n": 1.50 }"#, r#"{"title":"two"}"#, "{\"title\":\"ümlaut \\u00e9\"}"];
    for (headers, body) in [
        (vec![], sent[0].to_owned()),
        (vec![("content-type", "application/json")], format!("[{}]", sent[1])),
        (vec![NDJSON], format!("\n{}\r\n", sent[2])),
    ] {
        let (status, body) = status_and_body(post(&daemon, EVENTS, &headers, body).await).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
        assert_eq!(body["results"][0]["duplicate"], json!(false));
        assert_eq!(body["results"][0]["event_id"].as_str().expect("a text").len(), 36);
    }
    let stored: Vec<String> = daemon.events("aurora:alerts").await.into_values().collect();
    assert_eq!(stored, sent);
}

#[tokio::test]
async fn alert_is_routed_by_its_category() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let alerts = json!([{"category":"cps","title":"a"}, {"category":"network","title":"b"}, {"title":"c"}]).to_string();
    for path in ["/api/v1/alerts", "/api/alerts"] {
        let (status, body) = status_and_body(post(&daemon, path, &[], alerts.clone()).await).await;
        assert_eq!((status, body["results"].as_array().map(Vec::len)), (StatusCode::CREATED, Some(3)), "{body}");
    }
    assert_eq!(daemon.events("aurora:cps:alerts").await.len(), 2);
    assert_eq!(daemon.events("aurora:alerts").await.len(), 4);
}

#[tokio::test]
async fn invalid_events_of_a_batch_are_rejected_and_others_stored() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let mut body = b"{\"n\":1}\nnot json\n{\"n\":\"\xff\"}\n[1]\n{\"n\":2}\n{\"pad\":\"".to_vec();
    body.extend(std::iter::repeat_n(b'x', 1024 * 1024));
    body.extend(b"\"}\n");
    let (status, body) = status_and_body(post(&daemon, EVENTS, &[NDJSON], body).await).await;
    assert_eq!(status, StatusCode::MULTI_STATUS, "{body}");
    let results = body["results"].as_array().expect("results");
    let codes: Vec<&str> = results.iter().map(|r| r["error"]["code"].as_str().unwrap_or("stored")).collect();
    assert_eq!(codes, ["stored", "invalid_event", "invalid_event", "invalid_event", "stored", "event_too_large"]);
    assert!(results[1]["error"]["detail"].as_str().is_some_and(|detail| detail.starts_with("line 2: ")), "{results:?}");
    assert!(results[2]["error"]["detail"].as_str().is_some_and(|detail| detail.contains("not UTF-8")), "{results:?}");
    assert_eq!(daemon.events("aurora:alerts").await.len(), 2);
}

#[tokio::test]
async fn invalid_request_gets_a_problem_document() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let many = "{}\n".repeat(10_000);
    let big = format!("{{\"pad\":\"{}\"}}", "x".repeat(1024 * 1024));
    let huge = " ".repeat(9 * 1024 * 1024);
    let window = format!("{EVENTS}?dedup_window=soon");
    let dedup = format!("{EVENTS}?dedup=hash");
    let own_id = format!("{EVENTS}?dedup=id");
    let cases = [
        (EVENTS, vec![], String::new(), 422, "invalid_event"),
        (EVENTS, vec![], "{\"a\":".to_owned(), 422, "invalid_event"),
        (EVENTS, vec![], "{} {}".to_owned(), 422, "invalid_event"),
        (EVENTS, vec![], "[]".to_owned(), 422, "invalid_event"),
        (EVENTS, vec![], "[{}] {}".to_owned(), 422, "invalid_event"),
        (EVENTS, vec![], "[{}]\n[{}]".to_owned(), 422, "invalid_event"),
        (EVENTS, vec![("idempotency-key", "")], "{}".to_owned(), 422, "invalid_idempotency_key"),
        (EVENTS, vec![NDJSON], many, 413, "batch_too_large"),
        (EVENTS, vec![], big, 413, "event_too_large"),
        (EVENTS, vec![], huge, 413, "body_too_large"),
        ("/api/v1/streams/aurora:alarms/events", vec![], "{}".to_owned(), 404, "no_such_stream"),
        (&window, vec![], "{}".to_owned(), 400, "bad_parameter"),
        (&dedup, vec![], "{}".to_owned(), 400, "bad_parameter"),
        (&own_id, vec![], "{}".to_owned(), 422, "event_without_id"),
        ("/api/v2", vec![], "{}".to_owned(), 404, "no_such_route"),
    ];
    for (path, headers, body, status, code) in cases {
        let response = post(&daemon, path, &headers, body).await;
        let kind = response.headers().get("content-type").cloned();
        let (found, problem) = status_and_body(response).await;
        assert_eq!((found.as_u16(), problem["code"].as_str()), (status, Some(code)), "{path}: {problem}");
        assert_eq!(kind.expect("a type"), "application/problem+json", "{path}");
        assert_eq!(problem["status"], json!(status), "{path}");
    }
    let response = client().request(Method::DELETE, daemon.url(EVENTS)).send().await.expect("a response");
    assert_eq!(status_and_body(response).await.0, StatusCode::METHOD_NOT_ALLOWED);
    let (status, body) = status_and_body(post(&daemon, EVENTS, &[("idempotency-key", "")], "[{},{}]").await).await;
    let is_refused = |n: usize| body["results"][n]["error"]["code"] == "invalid_idempotency_key";
    assert!(status == StatusCode::MULTI_STATUS && is_refused(0) && is_refused(1), "{body}");
    assert_eq!(daemon.events("aurora:alerts").await.len(), 0);
}

#[tokio::test]
async fn repeated_event_is_a_duplicate_by_key_or_own_id() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let batch = "{\"n\":1}\n{\"n\":2}\n";
    let key = ("idempotency-key", "batch-7");
    let (_, first) = status_and_body(post(&daemon, EVENTS, &[NDJSON, key], batch).await).await;
    let (status, second) = status_and_body(post(&daemon, EVENTS, &[NDJSON, key], batch).await).await;
    assert_eq!(status, StatusCode::CREATED);
    for n in 0..2 {
        assert_eq!(second["results"][n]["duplicate"], json!(true));
        assert_eq!(second["results"][n]["id"], first["results"][n]["id"]);
        assert_eq!(second["results"][n]["event_id"], first["results"][n]["event_id"]);
    }
    let by_id = format!("{EVENTS}?dedup=id&dedup_window=10m");
    let twice = r#"[{"id":"a","n":3},{"id":"a","n":4}]"#;
    let (_, body) = status_and_body(post(&daemon, &by_id, &[], twice).await).await;
    assert_eq!(body["results"][0]["duplicate"], json!(false), "{body}");
    assert_eq!(body["results"][1]["duplicate"], json!(true), "{body}");
    assert_eq!(daemon.events("aurora:alerts").await.len(), 3);
}

#[tokio::test]
async fn corrected_batch_sent_again_is_stored_once() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let key = ("idempotency-key", "k1");
    let (status, first) =
        status_and_body(post(&daemon, EVENTS, &[NDJSON, key], "{\"n\":1\n{\"n\":2}\n{\"n\":3}\n").await).await;
    assert_eq!(status, StatusCode::MULTI_STATUS);
    let (status, second) =
        status_and_body(post(&daemon, EVENTS, &[NDJSON, key], "{\"n\":1}\n{\"n\":2}\n{\"n\":3}\n").await).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(second["results"][0]["duplicate"], json!(false));
    for n in 1..3 {
        assert_eq!(second["results"][n]["duplicate"], json!(true));
        assert_eq!(second["results"][n]["id"], first["results"][n]["id"]);
    }
    let mut stored: Vec<String> = daemon.events("aurora:alerts").await.into_values().collect();
    stored.sort();
    assert_eq!(stored, ["{\"n\":1}", "{\"n\":2}", "{\"n\":3}"]);
}

#[tokio::test]
async fn foreign_host_name_on_loopback_is_rejected() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let get = async |path: &str, host: &str| {
        let request = client().get(daemon.url(path)).header("host", host);
        status_and_body(request.send().await.expect("a response")).await
    };
    for path in [EVENTS, "/", "/metrics", "/client/", "/nowhere"] {
        let (status, problem) = get(path, "evil.example:8080").await;
        assert_eq!((status, &problem["code"]), (StatusCode::MISDIRECTED_REQUEST, &json!("forbidden_host")), "{path}");
    }
    for path in ["/", "/metrics"] {
        for host in ["localhost:8080", "127.0.0.1", "[::1]:8080"] {
            assert_eq!(get(path, host).await.0, StatusCode::OK, "{path} of {host}");
        }
    }
    for path in ["/health", "/ready"] {
        assert_eq!(get(path, "host.docker.internal:8080").await.0, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn malformed_query_or_path_gets_a_problem_document() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    for path in ["/api/v1/streams/aurora:alerts/events?limit=1&limit=2", "/api/v1/streams/%ff/events"] {
        let (status, problem) = status_and_body(client().get(daemon.url(path)).send().await.expect("a response")).await;
        assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("bad_parameter")), "{path}");
    }
}

#[tokio::test]
async fn dashboards_count_as_open_connections() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let _sockets = [daemon.watch("/api/v1/ws/alerts").await, daemon.watch("/api/v1/ws/alerts").await];
    let metrics = daemon.get("/metrics").await;
    let open = metrics.lines().find_map(|line| line.strip_prefix("aurora_bus_http_connections ")).expect("the gauge");
    assert!(open.parse::<u32>().expect("a count") >= 3, "two dashboards and the request itself: {open}");
}

#[tokio::test]
async fn unread_response_is_dropped_after_write_timeout() {
    let home = Home::new(&format!("{SMALL}\n[http]\nwrite_timeout = \"500ms\"\n"));
    let daemon = home.start().await;
    let big = json!({ "pad": "x".repeat(900_000) }).to_string();
    for _ in 0..8 {
        daemon.publish("aurora:alerts", std::slice::from_ref(&big)).await.expect("accepted");
    }
    let address = daemon.url("").replacen("http://", "", 1);
    let mut unread = TcpStream::connect(address).await.expect("a connection");
    let request = format!("GET {EVENTS}?limit=1000 HTTP/1.1\r\nhost: localhost\r\n\r\n");
    unread.write_all(request.as_bytes()).await.expect("sent");
    until("end of the unread connection", BOUND, async || {
        // The connection is closed before the end of the response.
        let metrics = daemon.get("/metrics").await;
        let answered = metrics
            .contains("aurora_bus_http_requests_total{route=\"/api/v1/streams/{stream}/events\",status=\"200\"} 1");
        let open =
            metrics.lines().find_map(|line| line.strip_prefix("aurora_bus_http_connections ")).expect("the gauge");
        (answered && open == "1").then_some(())
    })
    .await;
}

#[tokio::test]
async fn slow_reader_address_cannot_take_all_memory() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let big = json!({ "pad": "x".repeat(900_000) }).to_string();
    for _ in 0..8 {
        daemon.publish("aurora:alerts", std::slice::from_ref(&big)).await.expect("accepted");
    }
    let address = daemon.url("").replacen("http://", "", 1);
    let request = format!("GET {EVENTS} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    // Each client reads the head of a 7 MiB response and no more. The limit for its address is 256 MiB.
    let (mut readers, mut statuses) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        let mut reader = TcpStream::connect(&address).await.expect("a connection");
        reader.write_all(request.as_bytes()).await.expect("sent");
        let mut status = [0; 12];
        reader.read_exact(&mut status).await.expect("a response");
        statuses.push(String::from_utf8_lossy(&status).into_owned());
        readers.push(reader);
    }
    let refused = statuses.iter().filter(|status| *status == "HTTP/1.1 429").count();
    assert!((1..40).contains(&refused) && statuses[0] == "HTTP/1.1 200", "{statuses:?}");
    drop(readers);
    let whole = until("a response", BOUND, async || {
        let response = client().get(daemon.url(EVENTS)).send().await.expect("a response");
        (response.status() == StatusCode::OK).then_some(response)
    })
    .await;
    let length = whole.content_length().expect("a length");
    let body = whole.bytes().await.expect("all of it");
    assert_eq!(body.len() as u64, length);
    let page: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!(page["events"].as_array().map(Vec::len), Some(8));
    daemon.stop().await;
}

#[tokio::test]
async fn range_is_read_page_by_page_in_both_orders() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let payloads: Vec<String> = (0..25).map(|n| json!({ "n": n }).to_string()).collect();
    daemon.publish("aurora:alerts", &payloads).await.expect("accepted");
    let page = |query: String| {
        let daemon = &daemon;
        async move {
            let body = daemon.get(&format!("{EVENTS}?{query}")).await;
            serde_json::from_str::<Value>(&body).expect("JSON")
        }
    };
    let numbers = |page: &Value| -> Vec<i64> {
        let events = page["events"].as_array().expect("events");
        events.iter().map(|event| event["data"]["n"].as_i64().expect("a number")).collect()
    };
    let first = page("limit=10".to_owned()).await;
    assert_eq!(numbers(&first), (0..10).collect::<Vec<_>>());
    let second = page(format!("limit=100&from={}", first["next"].as_str().expect("next"))).await;
    assert_eq!(numbers(&second), (10..25).collect::<Vec<_>>());
    let newest = page("limit=20&order=desc".to_owned()).await;
    assert_eq!(numbers(&newest), (5..25).rev().collect::<Vec<_>>());
    let oldest = page(format!("order=desc&to={}", newest["next"].as_str().expect("next"))).await;
    assert_eq!(numbers(&oldest), (0..5).rev().collect::<Vec<_>>());
    let waited = page(format!("from={}&wait_ms=50", second["next"].as_str().expect("next"))).await;
    assert_eq!(numbers(&waited), Vec::<i64>::new());
}

#[tokio::test]
async fn range_of_large_events_reads_no_more_than_it_returns() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let home = Home::new(&format!(
        "[[streams]]\nname = \"aurora:alerts\"\n[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n",
        server.url()
    ));
    let add = "local pad = string.rep('x', 900000)
        for n = 1, 60 do redis.call('XADD', KEYS[1], '*', 'data', '{\"n\":' .. n .. ',\"pad\":\"' .. pad .. '\"}') end";
    server.cli(&["EVAL", add, "1", "aurora:alerts"]);
    let daemon = home.start().await;
    let read_bytes = || -> u64 {
        let stats = server.cli(&["INFO", "stats"]);
        let bytes = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:"));
        bytes.expect("a count").trim().parse().expect("a number")
    };
    let (mut from, mut numbers, before) = ("0-0".to_owned(), Vec::new(), read_bytes());
    while numbers.len() < 60 {
        let page = daemon.get(&format!("{EVENTS}?limit=1000&from={from}")).await;
        let page: Value = serde_json::from_str(&page).expect("JSON");
        let events = page["events"].as_array().expect("events");
        assert!((1..=10).contains(&events.len()), "{} events", events.len());
        numbers.extend(events.iter().map(|event| event["data"]["n"].as_u64().expect("a number")));
        page["next"].as_str().expect("next").clone_into(&mut from);
    }
    assert_eq!(numbers, (1..=60).collect::<Vec<_>>());
    let read = (read_bytes() - before) / 900_000;
    assert!(read <= 120, "{read} events were read to return 60");
    daemon.stop().await;
}

#[tokio::test]
async fn range_takes_the_filter_parameters_of_dashboards() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let severity = |n: usize| if n.is_multiple_of(2) { "low" } else { "critical" };
    let alert = |n: usize| json!({ "n": n, "severity": severity(n), "source": "zeek" }).to_string();
    daemon.publish("aurora:alerts", &(0..150).map(alert).collect::<Vec<_>>()).await.expect("accepted");
    for (query, expected) in [
        ("min_severity=high&limit=100", 50),
        (r#"filter={"key":"severity","cmp":"eq","val":"low"}&source=zeek&limit=100"#, 50),
        ("source=suricata", 0),
    ] {
        let page: Value = serde_json::from_str(&daemon.get(&format!("{EVENTS}?{query}")).await).expect("JSON");
        assert_eq!(page["events"].as_array().map(Vec::len), Some(expected), "{query}");
    }
    let refused = client().get(daemon.url(&format!("{EVENTS}?min_severity=loud"))).send().await.expect("a response");
    let (status, problem) = status_and_body(refused).await;
    assert_eq!((status, &problem["field"]), (StatusCode::BAD_REQUEST, &json!("min_severity")), "{problem}");
}

#[tokio::test]
async fn waiting_read_ends_when_an_event_comes() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let waiting = daemon.get("/api/v1/streams/aurora:alerts/events?wait_ms=20000");
    let publishing = async {
        daemon.publish("aurora:cps:alerts", &["{}".to_owned()]).await.expect("accepted");
        daemon.publish("aurora:alerts", &["{\"n\":1}".to_owned()]).await.expect("accepted");
    };
    let started = std::time::Instant::now();
    let (body, ()) = tokio::join!(waiting, publishing);
    assert!(body.contains("{\"n\":1}"), "{body}");
    assert!(started.elapsed().as_secs() < 15, "the response came only after wait_ms");
}

#[tokio::test]
async fn address_over_rate_limit_gets_retry_after() {
    let config = format!("{SMALL}\n[http]\nrate_limit = 1\n");
    let home = Home::new(&config);
    let daemon = home.start().await;
    // Concurrently: sequential requests may be slower than the limit.
    let client = client();
    let responses = join_all((0..100).map(|_| client.post(daemon.url(EVENTS)).body("{}").send())).await;
    let mut responses = responses.into_iter().map(|response| response.expect("a response"));
    let refused = responses.find(|response| response.status() == StatusCode::TOO_MANY_REQUESTS);
    let refused = refused.expect("a refusal");
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(status_and_body(refused).await.1["code"], json!("rate_limited"));
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK), "probes are not limited");
}

/// Sends the head of a request and waits until the daemon expects its body.
async fn slow(daemon: &Daemon, path: &str) -> TcpStream {
    let address = daemon.url("").replacen("http://", "", 1);
    let mut request = TcpStream::connect(&address).await.expect("a connection");
    let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\nexpect: 100-continue\r\n\r\n");
    request.write_all(head.as_bytes()).await.expect("a connection");
    // The daemon sends this when it begins to read the body.
    let mut interim = [0; 12];
    request.read_exact(&mut interim).await.expect("a response");
    assert_eq!(&interim, b"HTTP/1.1 100", "{path}");
    request
}

#[tokio::test]
async fn slow_sender_address_cannot_take_all_publish_slots() {
    let home = Home::new(&format!("{SMALL}\n[http]\nmax_in_flight = 10\nmax_bodies_per_address = 2"));
    let daemon = home.start().await;
    let bodies = [slow(&daemon, EVENTS).await, slow(&daemon, EVENTS).await];
    let refused = post(&daemon, EVENTS, &[], "{}").await;
    assert_eq!(refused.headers()["retry-after"], "1");
    let (status, body) = status_and_body(refused).await;
    assert_eq!((status, &body["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("too_many_bodies")), "{body}");
    drop(bodies);
    until("a free slot", BOUND, async || {
        (post(&daemon, EVENTS, &[], "{}").await.status() == StatusCode::CREATED).then_some(())
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn slow_bodies_are_limited_on_every_route() {
    let paths = [
        "/api/v1/ws/ticket",
        "/api/v1/streams/aurora:alerts/groups/outside/pull",
        "/api/v1/dead-letters/aurora:alerts/discard",
        EVENTS,
    ];
    let group = "[[streams.groups]]\nname = \"outside\"\n";
    let alerts = SMALL.replacen("relay = true\n", &format!("relay = true\n{group}"), 1);
    let home = Home::new(&format!("{alerts}\n[http]\nmax_bodies_per_address = {}", paths.len()));
    let daemon = home.start().await;
    let mut bodies = Vec::new();
    for path in paths {
        bodies.push(slow(&daemon, path).await);
    }
    for path in paths {
        let (status, body) = status_and_body(post(&daemon, path, &[], "{}").await).await;
        assert_eq!(
            (status, &body["code"]),
            (StatusCode::TOO_MANY_REQUESTS, &json!("too_many_bodies")),
            "{path}: {body}"
        );
    }
    drop(bodies);
    until("a free slot", BOUND, async || {
        (post(&daemon, "/api/v1/ws/ticket", &[], "").await.status() == StatusCode::OK).then_some(())
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn page_of_foreign_origin_cannot_publish() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let (status, problem) =
        status_and_body(post(&daemon, EVENTS, &[("origin", "https://evil.example")], "{}").await).await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("forbidden_origin")));
    let ticket = post(&daemon, "/api/v1/ws/ticket", &[("origin", "https://evil.example")], "").await;
    let (status, problem) = status_and_body(ticket).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(problem["detail"], "pages of this origin may not use POST /api/v1/ws/ticket (http.origins)");
    let own = daemon.url("");
    let (status, _) = status_and_body(post(&daemon, EVENTS, &[("origin", &own)], "{}").await).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(daemon.events("aurora:alerts").await.len(), 1);
}

#[tokio::test]
async fn cli_tail_prints_what_cli_publish_sent() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    let lines: Vec<String> = (0..1_200).map(|n| format!("{{\"n\":{n}, \"text\":\"ä\"}}")).collect();
    std::fs::write(home.path("events.ndjson"), format!("{}\n\nnot json\n", lines.join("\n"))).expect("written");
    let url = daemon.url("");
    let published = home.run(&["publish", "aurora:alerts", "events.ndjson", "--url", &url]);
    let printed = String::from_utf8_lossy(&published.stdout).into_owned();
    assert_eq!(printed.trim(), "1200 accepted, 1 refused");
    assert_eq!(published.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&published.stderr).contains("line 1202: "), "{published:?}");
    let tailed = home.run(&["tail", "aurora:alerts", "--since", "earliest", "--no-follow", "--data", "--url", &url]);
    assert_eq!(String::from_utf8_lossy(&tailed.stdout).lines().collect::<Vec<_>>(), lines);
}

/// Starts a proxy that truncates the first response of a daemon in its body. Returns the URL.
async fn truncating_proxy(daemon: &Daemon, tasks: &mut JoinSet<()>) -> String {
    let behind = daemon.url("").replacen("http://", "", 1);
    let front = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", front.local_addr().expect("its address"));
    tasks.spawn(async move {
        let (client, _) = front.accept().await.expect("a connection");
        let server = TcpStream::connect(&behind).await.expect("it listens");
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let mut requests = JoinSet::new();
        requests.spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
        let mut response = Vec::new();
        while !response.ends_with(b"}") {
            assert!(from_server.read_buf(&mut response).await.expect("a response") > 0, "a whole response");
        }
        to_client.write_all(&response[..response.len() - 5]).await.expect("sent");
        drop((requests, to_client));
        loop {
            let (mut client, _) = front.accept().await.expect("a connection");
            let mut server = TcpStream::connect(&behind).await.expect("it listens");
            drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn cli_commands_retry_after_a_truncated_response() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    std::fs::write(home.path("events.ndjson"), "{\"n\":1}\n{\"n\":2}\n").expect("written");
    let commands = [
        (&["publish", "aurora:alerts", "events.ndjson"][..], "2 accepted, 0 refused"),
        (&["dead", "discard", "aurora:alerts", "--dry-run"], "0 matched, 0 would be discarded"),
    ];
    for (command, expected) in commands {
        let mut tasks = JoinSet::new();
        let url = truncating_proxy(&daemon, &mut tasks).await;
        let ended = home.run(&[command, &["--url", &url]].concat());
        let (stdout, stderr) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success() && stdout.starts_with(expected), "{stdout}{stderr}");
        assert!(stderr.contains("trying again"), "{stderr}");
    }
    assert_eq!(daemon.events("aurora:alerts").await.len(), 2);
    daemon.stop().await;
}

#[tokio::test]
async fn invalid_configuration_exits_with_2_and_every_problem() {
    let home = Home::new("[publish]\nmax_evnt = \"1MiB\"\n[[streams]]\nname = \"a b\"\n");
    let ended = home.run(&["check", "--config", "aurora-bus.toml"]);
    assert_eq!(ended.status.code(), Some(2));
    let printed = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(printed.contains("publish.max_evnt: unknown key, did you mean `max_event`?"), "{printed}");
    assert!(printed.contains("streams[0].name: "), "{printed}");
}

#[tokio::test]
async fn metrics_count_published_and_rejected_events() {
    let home = Home::new(SMALL);
    let daemon = home.start().await;
    daemon.publish("aurora:alerts", &["{}".to_owned(), "{}".to_owned()]).await.expect("accepted");
    post(&daemon, EVENTS, &[], "no json").await;
    let metrics = daemon.get("/metrics").await;
    assert!(metrics.contains("aurora_bus_published_total{stream=\"aurora:alerts\"} 2"), "{metrics}");
    assert!(metrics.contains("aurora_bus_rejected_total{reason=\"invalid_event\"} 1"), "{metrics}");
}
