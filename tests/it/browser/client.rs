//! The client module in real tabs, through crashes, drains and network faults.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::PageServer;
use super::chromium::{Chromium, Tab};
use crate::support::app::{Daemon, Home};
use crate::support::proxy::Proxy;
use crate::support::redis::free_port;

/// Connects as its fragment requests, with a base and options, and keeps all events in `seen`.
pub(super) const PAGE: &str = r#"<!doctype html>
<meta charset="utf-8">
<title>client</title>
<script type="module">
  const [base, { tokens, ...options }] = JSON.parse(decodeURIComponent(location.hash.slice(1)));
  const seen = (window.seen = { events: [], states: [], gaps: [], lives: [], resets: 0, needs: [] });
  const { connect, AuroraBus } = await import(base + "/client/aurora-bus.js");
  if (tokens) {
    window.tokens = tokens;
    options.token = async ({ renew }) => {
      seen.needs.push(renew);
      const token = window.tokens.shift();
      if (token === undefined) throw new Error("no more tokens");
      return token;
    };
  }
  window.connect = connect;
  window.bus = connect({
    ...options,
    onEvent: ({ stream, position, data }) => seen.events.push([stream, position, data.n]),
    onState: (change) => seen.states.push(change),
    onGap: (gap) => seen.gaps.push(gap),
    onLive: ({ stream }) => seen.lives.push(stream),
    onReset: () => (seen.resets += 1),
  });
</script>
"#;

pub(super) const STREAMS: &str = r#"
[relay]
ping_interval = "1s"
drain_window = "500ms"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
"#;
pub(super) const ALERTS: &str = "aurora:alerts";
const CPS: &str = "aurora:cps:alerts";

/// Opens a tab with the module of the daemon at `base`.
pub(super) async fn open(browser: &Chromium, server: &PageServer, base: &str, options: &Value) -> Tab {
    let fragment: String =
        reqwest::Url::parse_with_params("x:", [("x", json!([base, options]).to_string())]).expect("a URL").to_string();
    let (_, fragment) = fragment.split_once("?x=").expect("a query");
    let mut tab = browser.open(&format!("{}/client#{}", server.origin, fragment.replace('+', "%20"))).await;
    tab.until("window.bus").await;
    tab
}

/// Returns a home whose daemons all listen on the same port, so that reconnecting clients find the next one.
fn home_with_port(config: &str) -> (Home, u16) {
    let port = free_port();
    let mut home = Home::new(config);
    home.set_env("AURORA_BUS__HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    (home, port)
}

fn alert(n: usize) -> String {
    let severity = ["info", "low", "medium", "high", "critical"][n % 5];
    format!(r#"{{"n":{n},"severity":"{severity}"}}"#)
}

/// Publishes alerts of these numbers, some to each stream.
async fn publish(daemon: &Daemon, numbers: std::ops::Range<usize>) {
    for n in numbers {
        let stream = if n % 3 == 0 { CPS } else { ALERTS };
        daemon.publish(stream, &[alert(n)]).await.expect("accepted");
    }
}

/// Returns all entries of a stream, as `tail` prints them: id and number, if the number passes.
fn tail(home: &Home, daemon: &Daemon, stream: &str, passes: impl Fn(u64) -> bool) -> Vec<(String, u64)> {
    let url = daemon.url("");
    let output = home.run(&["tail", stream, "--since", "earliest", "--no-follow", "--url", &url]);
    let text = String::from_utf8(output.stdout).expect("text");
    let entries = text.lines().map(|line| {
        let entry: Value = serde_json::from_str(line).expect("an entry");
        (entry["id"].as_str().expect("an id").to_owned(), entry["data"]["n"].as_u64().expect("a number"))
    });
    entries.filter(|(_, n)| passes(*n)).collect()
}

/// Returns the entries of each stream that a tab has seen: id and number.
async fn seen(tab: &mut Tab) -> BTreeMap<String, Vec<(String, u64)>> {
    let mut seen: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for event in tab.get("seen.events").await.as_array().expect("a list") {
        let (_, id) = event[1].as_str().expect("a position").split_once(':').expect("an epoch");
        let of_stream: &mut Vec<_> = seen.entry(event[0].as_str().expect("a stream").to_owned()).or_default();
        of_stream.push((id.to_owned(), event[2].as_u64().expect("a number")));
    }
    seen
}

async fn has_seen(tab: &mut Tab, n: usize) {
    tab.until(&format!("seen.events.some((event) => event[2] === {n})")).await;
}

async fn is_live(tab: &mut Tab) {
    tab.until("bus.state === 'live'").await;
}

/// Returns a filter for this severity or higher.
pub(super) fn at_least(severity: &str) -> Value {
    json!({"key": "severity", "cmp": "gte", "val": severity})
}

#[tokio::test(flavor = "multi_thread")]
async fn tabs_see_matching_alerts_once_through_every_fault() {
    let (home, port) = home_with_port(STREAMS);
    let mut daemon = home.start().await;
    let (server, browser, proxy) = (PageServer::start().await, Chromium::start().await, Proxy::start(port).await);
    let base = format!("http://127.0.0.1:{}", proxy.port());
    publish(&daemon, 0..30).await;
    let all = open(&browser, &server, &base, &json!({"since": "earliest"})).await;
    let options = json!({"since": "earliest", "filter": at_least("high")});
    let severe = open(&browser, &server, &base, &options).await;
    let mut tabs = [all, severe];
    for tab in &mut tabs {
        is_live(tab).await;
        has_seen(tab, 29).await;
    }

    // Connections are reset while alerts are being sent.
    publish(&daemon, 30..60).await;
    proxy.reset();
    publish(&daemon, 60..90).await;
    for tab in &mut tabs {
        has_seen(tab, 89).await;
        is_live(tab).await;
    }
    // A network that drops all packets: the silence is noticed within twice the ping interval.
    let before = proxy.connections();
    proxy.black_hole_existing();
    let begun = Instant::now();
    publish(&daemon, 90..120).await;
    for tab in &mut tabs {
        has_seen(tab, 119).await;
        tab.until("seen.states.some(({ reason }) => reason === 'silence')").await;
    }
    assert!(proxy.connections() >= before + 2 && begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // A network that is down for a while.
    proxy.refuse(true);
    proxy.reset();
    publish(&daemon, 120..150).await;
    for tab in &mut tabs {
        tab.until("seen.states.slice(-4).filter(({ state }) => state === 'waiting').length === 2").await;
    }
    proxy.refuse(false);
    for tab in &mut tabs {
        has_seen(tab, 149).await;
    }
    // A daemon that is killed, and one that is stopped.
    daemon.crash();
    daemon = home.start().await;
    publish(&daemon, 150..180).await;
    for tab in &mut tabs {
        has_seen(tab, 179).await;
        is_live(tab).await;
    }
    daemon.stop().await;
    daemon = home.start().await;
    publish(&daemon, 180..210).await;
    for tab in &mut tabs {
        has_seen(tab, 209).await;
        tab.until("seen.states.some(({ code }) => code === 4000)").await;
    }

    let filters: [fn(u64) -> bool; 2] = [|_| true, |n| n % 5 >= 3];
    for (tab, passes) in tabs.iter_mut().zip(filters) {
        is_live(tab).await;
        let seen = seen(tab).await;
        for stream in [ALERTS, CPS] {
            let expected = tail(&home, &daemon, stream, passes);
            assert!(expected.len() >= 25, "{expected:?}");
            assert_eq!(seen[stream], expected, "{stream}");
        }
        assert_eq!(tab.get("[seen.gaps.length, seen.resets]").await, json!([0, 0]));
        assert_eq!(tab.complaints().await, Vec::<String>::new());
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tab_backs_off_offline_and_reconnects_when_online() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let port = daemon.url("").rsplit(':').next().expect("a port").parse().expect("a port");
    let proxy = Proxy::start(port).await;
    let base = format!("http://127.0.0.1:{}", proxy.port());
    let mut tab = open(&browser, &server, &base, &json!({"snapshot": 5})).await;
    is_live(&mut tab).await;
    proxy.refuse(true);
    proxy.reset();
    // Full jitter: each wait is below its bound, and the bounds double.
    let waits = "seen.states.filter(({ state }) => state === 'waiting').map(({ wait }) => wait)";
    tab.get("Math.random = () => 0.999").await;
    tab.until(&format!("{waits}.length >= 3")).await;
    let within = tab.get(&format!("{waits}.every((wait, turn) => wait <= Math.min(20000, 500 * 2 ** turn))")).await;
    assert_eq!(within, true, "{}", tab.get(waits).await);
    // A wait of nearly 4 s, ended early by the network.
    tab.until(&format!("{waits}.at(-1) > 3000 && bus.state === 'waiting'")).await;
    proxy.refuse(false);
    tab.get("dispatchEvent(new Event('online'))").await;
    assert_ne!(tab.get("bus.state").await, "waiting");
    is_live(&mut tab).await;
    publish(&daemon, 0..1).await;
    has_seen(&mut tab, 0).await;
    // A closed client stays closed.
    tab.get("bus.close()").await;
    tab.get("dispatchEvent(new Event('online'))").await;
    tab.get("bus.resume()").await;
    publish(&daemon, 1..2).await;
    assert_eq!(
        tab.get("[bus.state, seen.states.at(-1).state, seen.events.length]").await,
        json!(["closed", "closed", 1])
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_page_waits_as_long_as_requested() {
    // On a busy machine, two short ping intervals may pass in silence before the close arrives.
    let home = Home::new(&STREAMS.replace("ping_interval = \"1s\"\n", ""));
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let mut tab = open(&browser, &server, &daemon.url(""), &json!({})).await;
    is_live(&mut tab).await;
    tab.get("void Array.from({ length: 300 }, () => bus.filter())").await;
    tab.until("bus.state === 'waiting'").await;
    tab.get("dispatchEvent(new Event('online'))").await;
    let state = tab.get("[bus.state, seen.states.at(-1).code, seen.states.at(-1).wait >= 10000]").await;
    assert_eq!(state, json!(["waiting", 4005, true]));
    // The page may continue.
    tab.get("bus.pause(), bus.resume()").await;
    is_live(&mut tab).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filter_is_replaced_and_an_invalid_one_is_rejected() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let options = json!({"filter": at_least("critical"), "streams": [ALERTS]});
    let mut tab = open(&browser, &server, &daemon.url(""), &options).await;
    is_live(&mut tab).await;
    let numbers: Vec<String> = (0..10).map(alert).collect();
    daemon.publish(ALERTS, &numbers).await.expect("accepted");
    tab.until("seen.events.length === 2").await;
    tab.get(&format!("bus.filter({})", at_least("high"))).await;
    daemon.publish(ALERTS, &numbers).await.expect("accepted");
    tab.until("seen.events.length === 6").await;
    let refused =
        tab.get("bus.filter({ key: 'colour', cmp: 'exists' }).catch(({ code, message }) => [code, message])").await;
    assert_eq!(refused[0], 422, "{refused}");
    assert!(refused[1].as_str().is_some_and(|message| message.contains("`filter`")), "{refused}");
    daemon.publish(ALERTS, &numbers).await.expect("accepted");
    tab.until("seen.events.length === 10").await;
    // The filter also applies to the next connection.
    tab.get("bus.pause()").await;
    daemon.publish(ALERTS, &numbers).await.expect("accepted");
    tab.get("bus.resume()").await;
    tab.until("seen.events.length === 14").await;
    let numbers: Vec<u64> = seen(&mut tab).await[ALERTS].iter().map(|(_, n)| *n).collect();
    assert_eq!(numbers, [4, 9, 3, 4, 8, 9, 3, 4, 8, 9, 3, 4, 8, 9]);
    // After a restart it has all of them, without those that were in transit before.
    tab.get("bus.filter()").await;
    tab.get("seen.events.length = 0, bus.reload(), bus.reload()").await;
    daemon.publish(ALERTS, &[alert(77)]).await.expect("accepted");
    has_seen(&mut tab, 77).await;
    assert_eq!(tab.get("[seen.resets, seen.events.length, seen.events[0][2]]").await, json!([2, 41, 0]));
    assert_eq!(tab.get("seen.states.filter(({ state }) => state === 'waiting').length").await, 0);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reloaded_page_resumes_or_starts_with_a_snapshot() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    publish(&daemon, 0..30).await;
    let options = json!({"snapshot": 5, "streams": [ALERTS], "remember": "tab", "strict": true});
    let mut tab = open(&browser, &server, &daemon.url(""), &options).await;
    is_live(&mut tab).await;
    assert_eq!(tab.get("seen.events.length").await, 5);
    tab.get("seen.isOld = true").await;
    tab.call("Page.reload", json!({})).await;
    tab.until("!seen.isOld && bus.state === 'live'").await;
    assert_eq!(tab.get("seen.events.length").await, 0, "all events were seen before");
    publish(&daemon, 31..32).await;
    has_seen(&mut tab, 31).await;
    // A position of a lost stream: closed with 4002, and then the snapshot.
    tab.get("bus.close()").await;
    tab.get("sessionStorage.setItem('aurora-bus tab', JSON.stringify({ 'aurora:alerts': '0123abcd:5-0' }))").await;
    tab.get("seen.isOld = true").await;
    tab.call("Page.reload", json!({})).await;
    tab.until("!seen.isOld && bus.state === 'live'").await;
    let result = tab.get("[seen.resets, seen.events.length, seen.states.find(({ code }) => code).code]").await;
    assert_eq!(result, json!([1, 5, 4002]));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_loop_pauses_its_connection_and_misses_no_alert() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let numbers: Vec<String> = (0..2500).map(alert).collect();
    daemon.publish(ALERTS, &numbers).await.expect("accepted");
    let mut tab = open(&browser, &server, &daemon.url(""), &json!({"streams": []})).await;
    let options = json!({"url": daemon.url("/api/v1/ws/alerts"), "since": "earliest", "streams": [ALERTS]});
    let script = format!(
        "(async () => {{
            const slow = connect({options});
            const numbers = [];
            let pauses = 0;
            slow.addEventListener('state', ({{ detail }}) => (pauses += detail.state === 'paused'));
            for await (const {{ data }} of slow) {{
                const isSlow = [0, 1200].includes(numbers.length);
                while (isSlow && slow.state !== 'paused') await new Promise((resolve) => setTimeout(resolve, 10));
                numbers.push(data.n);
                if (numbers.length === 2500) slow.close();
            }}
            return [pauses, numbers];
        }})()"
    );
    let result = tab.get(&script).await;
    assert_eq!(result[0], 2);
    assert_eq!(result[1], json!((0..2500).collect::<Vec<_>>()));
    daemon.stop().await;
}
