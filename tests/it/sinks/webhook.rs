//! The webhook sink: in the suite, and with its own tests.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aurora_bus::event::field;
use aurora_bus::sink::{Sink, SinkConfig, SinkErrorClass, WebhookConfig};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use secrecy::SecretString;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Outage, STREAM, World, build, deliver, deliveries, delivery, of_fields, origin, told};
use crate::support::install;
use crate::support::receiver::{Receiver, Reply};
use crate::support::redis::make_certificates;

const SECRET: &str = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3";
const TOKEN: &str = "token-4711-0815";
const PATH: &str = "/hooks/T0815/path-that-is-a-password";

/// A receiver that takes every entry once: it skips known ids, of `webhook-id` or of a batch.
pub(super) struct Posted<const BATCH: usize> {
    receiver: Receiver,
}

/// One entry per request.
pub(super) type Single = Posted<1>;
/// Several entries per request.
pub(super) type Batched = Posted<15>;

fn config(receiver: &Receiver) -> WebhookConfig {
    WebhookConfig { allow_private: true, ..WebhookConfig::new(receiver.url(PATH)) }
}

async fn sink(config: WebhookConfig) -> Arc<dyn Sink> {
    build(SinkConfig::Webhook(config)).await.expect("a valid configuration")
}

/// Returns the result of a delivery to a receiver with this behaviour.
async fn outcome_of(reply: Reply) -> (Receiver, Result<(), aurora_bus::sink::SinkError>) {
    let receiver = Receiver::start(move |_| reply.clone()).await;
    let sink = sink(config(&receiver)).await;
    let outcome = deliver(&*sink, STREAM, &[delivery(1, 1)]).await;
    (receiver, outcome)
}

#[async_trait]
impl<const BATCH: usize> World for Posted<BATCH> {
    const TYPE: &str = "webhook";
    const REFUSES_DUPLICATES: bool = true;

    async fn open() -> Self {
        Self { receiver: Receiver::start(|_| Reply::Status(204)).await }
    }

    fn config(&self) -> SinkConfig {
        SinkConfig::Webhook(WebhookConfig {
            batch: BATCH,
            secret: Some(SECRET.into()),
            headers: [("Authorization".to_owned(), SecretString::from(format!("Bearer {TOKEN}")))].into(),
            ..config(&self.receiver)
        })
    }

    async fn effects(&self) -> Vec<String> {
        let mut known = BTreeSet::new();
        let mut effects = Vec::new();
        for request in self.receiver.received().into_iter().filter(|request| request.is_taken) {
            let ids = request.header(if BATCH == 1 { "aurora-entry-id" } else { "aurora-entry-ids" }).to_owned();
            let ids: Vec<&str> = ids.split(',').collect();
            if BATCH > 1 {
                let payloads: Vec<Value> = serde_json::from_slice(&request.body).expect("a JSON array");
                assert_eq!((payloads.len(), request.header("aurora-count")), (ids.len(), &*ids.len().to_string()));
            }
            for id in ids {
                let key = if BATCH == 1 { request.header("webhook-id").to_owned() } else { id.to_owned() };
                if known.insert((request.header("aurora-stream").to_owned(), key)) {
                    effects.push(format!("{}/{id}", request.header("aurora-stream")));
                }
            }
        }
        effects
    }

    fn secrets(&self) -> Vec<String> {
        [SECRET, TOKEN, PATH].map(str::to_owned).into()
    }

    fn misconfigured(&self) -> Vec<(SinkConfig, &'static str)> {
        let SinkConfig::Webhook(good) = self.config() else { unreachable!("it is one") };
        let port = self.receiver.port();
        let url = |url: String| WebhookConfig { url: url.into(), ..good.clone() };
        let file = |name: &str| Some(std::env::temp_dir().join("aurora-bus-it-no-such-folder").join(name));
        let unfiled = WebhookConfig { secret: None, secret_file: file("secret"), ..good.clone() };
        let untrusted = WebhookConfig { ca_file: file("ca.pem"), ..url(format!("https://127.0.0.1:{port}{PATH}")) };
        let cases = [
            (url(format!("http://user:{TOKEN}@127.0.0.1:{port}/")), "url: must not hold a user and password"),
            (url(format!("ftp://127.0.0.1:{port}{PATH}")), "url: the scheme must be https or http, not `ftp`"),
            (url("http://169.254.169.254/latest/meta-data".to_owned()), "is not allowed: it is link-local"),
            (WebhookConfig { allow_private: false, ..good.clone() }, "url: 127.0.0.1 is a private address"),
            (url(format!("http://no-such-host.invalid:{port}{PATH}")), "cannot connect to http://no-such-host.invalid"),
            (url(format!("http://127.0.0.1:1{PATH}")), "cannot connect to http://127.0.0.1:1: "),
            (WebhookConfig { batch: 0, ..good.clone() }, "batch: must be from 1 to 100"),
            (unfiled, "secret_file: cannot read "),
            (untrusted, "ca_file: cannot read "),
        ];
        cases.map(|(config, part)| (SinkConfig::Webhook(config), part)).into()
    }
}

#[async_trait]
impl<const BATCH: usize> Outage for Posted<BATCH> {
    async fn go_down(&mut self) {
        self.receiver.go_down().await;
    }

    async fn come_up(&mut self) {
        self.receiver.come_up().await;
    }
}

mod suite {
    super::super::sink_tests!(Single: outage_is_reported_and_loses_nothing entry_without_json_is_given_up_at_once);
}

mod suite_in_batches {
    super::super::sink_tests!(Batched: outage_is_reported_and_loses_nothing entry_without_json_is_given_up_at_once);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payload_arrives_byte_for_byte_with_headers() {
    let receiver = Receiver::start(|_| Reply::Status(201)).await;
    let headers = [("X-Siem", "one"), ("Authorization", "Bearer two")];
    let headers = headers.map(|(name, value)| (name.to_owned(), SecretString::from(value))).into();
    let sink = sink(WebhookConfig { headers, ..config(&receiver) }).await;
    let data = "{ \"title\" : \"ümlaut \\u00e9\",\n \"n\": 1.50, \"a\": 1, \"a\": 2 }";
    let entry = of_fields(7, 3, &[(field::ID, b"0195-x"), (field::DATA, data.as_bytes())]);
    deliver(&*sink, STREAM, &[entry]).await.expect("taken");
    let request = receiver.received().remove(0);
    assert_eq!((request.method.as_str(), request.path.as_str(), &request.body[..]), ("POST", PATH, data.as_bytes()));
    for (name, value) in [
        ("content-type", "application/json"),
        ("user-agent", concat!("aurora-bus/", env!("CARGO_PKG_VERSION"))),
        ("webhook-id", "aurora:test/alerts/7-0"),
        ("aurora-stream", STREAM),
        ("aurora-group", "siem"),
        ("aurora-entry-id", "7-0"),
        ("aurora-event-id", "0195-x"),
        ("aurora-attempt", "3"),
        ("x-siem", "one"),
        ("authorization", "Bearer two"),
        ("webhook-signature", ""),
    ] {
        assert_eq!(request.header(name), value, "{name}");
    }
}

/// Verifies requests like a receiver in Python that uses only the standard library.
const VERIFY: &str = r#"
import base64, hashlib, hmac, json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    key = base64.b64decode(request["secret"].removeprefix("whsec_"))
    signed = f'{request["id"]}.{request["timestamp"]}.'.encode() + base64.b64decode(request["body"])
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert expected in request["signature"].split(" "), request
    assert abs(time.time() - int(request["timestamp"])) < 60, request
    assert "." not in request["id"] + request["timestamp"], request
    print("verified")
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_receiver_verifies_requests_with_either_secret() {
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let folder = TempDir::new().expect("a temporary folder");
    let secret_file = folder.path().join("secrets");
    let secrets = [SECRET, "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBk="];
    fs::write(&secret_file, secrets.join("\n")).expect("a writable folder");
    for batch in [1, 4] {
        let secret_file = Some(secret_file.clone());
        let sink = sink(WebhookConfig { batch, secret_file, ..config(&receiver) }).await;
        deliver(&*sink, STREAM, &deliveries(1..=4, 1)).await.expect("taken");
    }
    let requests = receiver.received();
    let lines = requests.iter().flat_map(|request| {
        secrets.map(|secret| {
            let header = |name| request.header(name);
            json!({
                "secret": secret,
                "id": header("webhook-id"),
                "timestamp": header("webhook-timestamp"),
                "signature": header("webhook-signature"),
                "body": BASE64.encode(&request.body),
            })
            .to_string()
        })
    });
    let lines: Vec<String> = lines.collect();
    let python = install::program("python3", "python3");
    let mut child = Command::new(python)
        .args(["-c", VERIFY])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python runs");
    child.stdin.take().expect("piped").write_all(lines.join("\n").as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("a child");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let verified = String::from_utf8_lossy(&output.stdout).lines().count();
    assert_eq!((requests.len(), verified), (5, 10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusal_quotes_the_receiver() {
    let text = "no such\r\n  severity\u{1b}[2J".to_owned();
    let (_, outcome) = outcome_of(Reply::With(422, ("x-a", "b".to_owned()), text)).await;
    let error = outcome.expect_err("refused");
    assert_eq!(error.class(), SinkErrorClass::Permanent);
    assert_eq!(error.to_string(), "the receiver responded with 422 Unprocessable Entity: no such severity\u{fffd}[2J");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_after_of_the_receiver_is_kept() {
    let in_an_hour = jiff::Timestamp::now() + Duration::from_hours(1);
    let date = in_an_hour.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    for (status, value, at_least, at_most) in [(429, "7".to_owned(), 7, 7), (503, date, 3500, 3600)] {
        let (_, outcome) = outcome_of(Reply::With(status, ("retry-after", value), String::new())).await;
        let error = outcome.expect_err("throttled");
        assert_eq!(error.class(), SinkErrorClass::Transient);
        let asked = error.retry_after().expect("a time").as_secs();
        assert!((at_least..=at_most).contains(&asked), "{asked}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redirect_is_not_followed() {
    let elsewhere = Receiver::start(|_| Reply::Status(204)).await;
    for status in [301, 302, 303, 307, 308] {
        let (_, outcome) = outcome_of(Reply::With(status, ("location", elsewhere.url("/in")), String::new())).await;
        let error = outcome.expect_err("a redirect is no success");
        assert_eq!(error.class(), SinkErrorClass::Transient, "no entry is to blame: {error}");
        assert!(error.to_string().contains("redirects are not followed"), "{error}");
        assert!(error.to_string().contains(&elsewhere.url("/in")), "{error}");
    }
    assert_eq!(elsewhere.connections(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn name_with_a_private_address_is_refused() {
    let receiver = Receiver::start(|_| Reply::Status(204)).await;
    let url = format!("http://localhost:{}/in", receiver.port());
    let refusing = sink(WebhookConfig::new(url.clone())).await;
    let delivered = deliver(&*refusing, STREAM, &[delivery(1, 1)]).await.expect_err("private");
    let checked = refusing.check().await.expect_err("private");
    for error in [delivered, checked] {
        // The entry is not given up: the wrong address may be a mistake in the DNS.
        assert_eq!(error.class(), SinkErrorClass::Transient);
        assert!(told(&error).contains("is a private address"), "{}", told(&error));
    }
    assert_eq!(receiver.connections(), 0);
    let letting = sink(WebhookConfig { allow_private: true, ..WebhookConfig::new(url) }).await;
    letting.check().await.expect("let in");
    deliver(&*letting, STREAM, &[delivery(1, 1)]).await.expect("let in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_receiver_is_given_up_in_time() {
    let receiver = Receiver::start(|_| Reply::Silence).await;
    let sink = sink(WebhookConfig { timeout: Duration::from_millis(200), ..config(&receiver) }).await;
    let started = Instant::now();
    let error = deliver(&*sink, STREAM, &[delivery(1, 1)]).await.expect_err("too slow");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(error.class(), SinkErrorClass::Transient);
    assert_eq!(error.to_string(), format!("{} did not respond within 200ms", receiver.url("")));
    sink.check().await.expect("it can be connected to");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_response_is_read_up_to_the_limit() {
    let (receiver, outcome) = outcome_of(Reply::Endless(200)).await;
    outcome.expect("its status says that it was taken");
    assert!(receiver.endless_bytes() < 32 * 1024 * 1024, "{}", receiver.endless_bytes());
    let (receiver, outcome) = outcome_of(Reply::Endless(500)).await;
    let error = outcome.expect_err("refused");
    assert_eq!(error.class(), SinkErrorClass::Transient);
    assert!(error.to_string().len() < 1200, "{}", error.to_string().len());
    assert!(receiver.endless_bytes() < 32 * 1024 * 1024, "{}", receiver.endless_bytes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_is_reused_after_any_response() {
    let receiver = Receiver::start(|request| match request.header("aurora-attempt") {
        "1" => Reply::Status(204),
        "2" => Reply::With(200, ("content-type", "application/json".to_owned()), json!({"ok": true}).to_string()),
        _ => Reply::With(503, ("content-type", "text/html".to_owned()), "busy ".repeat(1000)),
    })
    .await;
    let sink = sink(config(&receiver)).await;
    for n in 1..=60 {
        let outcome = deliver(&*sink, STREAM, &[delivery(n, u32::try_from(n % 3 + 1).expect("small"))]).await;
        assert_eq!(outcome.is_ok(), n % 3 != 2);
    }
    // A request that begins before the connection is back in the pool may open another one.
    assert_eq!(receiver.received().len(), 60);
    assert!(receiver.connections() < 6, "{} connections", receiver.connections());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_in_responses_are_masked() {
    let receiver = Receiver::start(|request| {
        let said = format!("Cannot POST {} with {:?} key {SECRET}", request.path, request.headers);
        Reply::With(400, ("x-a", "b".to_owned()), said)
    })
    .await;
    let headers = [("Authorization".to_owned(), SecretString::from(format!("Bearer {TOKEN}")))].into();
    let sink = sink(WebhookConfig { secret: Some(SECRET.into()), headers, ..config(&receiver) }).await;
    let error = deliver(&*sink, STREAM, &[delivery(1, 1)]).await.expect_err("refused");
    let told = told(&error);
    assert!(told.contains("Cannot POST ********"), "{told}");
    for secret in [SECRET, TOKEN, PATH] {
        assert!(!told.contains(secret), "{secret} is in {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receiver_with_a_trusted_authority_is_reached() {
    let (folder, stranger) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    make_certificates(folder.path());
    make_certificates(stranger.path());
    let receiver = Receiver::with_tls(folder.path()).await;
    let trusting = |folder: &TempDir| {
        let ca_file = Some(folder.path().join("ca.pem"));
        sink(WebhookConfig { ca_file, ..config(&receiver) })
    };
    let sink = trusting(&folder).await;
    sink.check().await.expect("trusted");
    deliver(&*sink, STREAM, &deliveries(1..=3, 1)).await.expect("trusted");

    let sink = trusting(&stranger).await;
    let delivered = deliver(&*sink, STREAM, &[delivery(4, 1)]).await.expect_err("not trusted");
    let checked = sink.check().await.expect_err("not trusted");
    for error in [delivered, checked] {
        assert_eq!(error.class(), SinkErrorClass::Transient);
        assert!(told(&error).contains("certificate"), "{}", told(&error));
    }
    assert_eq!(receiver.received().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_is_one_request_with_an_array() {
    let receiver = Receiver::start(|_| Reply::Status(204)).await;
    let sink = sink(WebhookConfig { batch: 3, ..config(&receiver) }).await;
    assert_eq!(sink.max_batch(), 3);
    let payloads = ["{\n\"a\": 1}", "[2]", "\"three\""];
    let batch: Vec<_> =
        payloads.iter().zip(1..).map(|(data, n)| of_fields(n, 1, &[(field::DATA, data.as_bytes())])).collect();
    sink.deliver(&origin(STREAM), &batch).await.expect("taken");
    deliver(&*sink, STREAM, &[delivery(4, 1)]).await.expect("taken");
    let received = receiver.received();
    assert_eq!(received[0].body, "[{\n\"a\": 1},[2],\"three\"]");
    assert_eq!(received[0].header("aurora-entry-ids"), "1-0,2-0,3-0");
    assert!(received[1].body.starts_with(b"[{") && received[1].body.ends_with(b"}]"), "one entry is an array too");
}
