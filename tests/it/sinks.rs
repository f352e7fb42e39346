//! The promises of all sinks and of single kinds: one suite, run for each kind in its own [`World`].

mod audit;
mod daemon;
mod log;
mod postgres;
mod stream;
mod webhook;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aurora_bus::event::{Delivery, Entry, EntryId, Fields, StreamName, field};
use aurora_bus::metrics::Metrics;
use aurora_bus::sink::{Forward, MeteredSink, Origin, Sink, SinkConfig, SinkError, SinkErrorClass};
use aurora_bus::validate::Validate as _;
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::support::until;

/// Limit of a wait for a state.
const PATIENCE: Duration = Duration::from_mins(1);

/// The receiver of a sink, with access to its effects.
#[async_trait]
trait World: Sized + Send + Sync + 'static {
    /// The `type` of the sink.
    const TYPE: &str;
    /// Whether a repeated delivery has no second effect.
    const REFUSES_DUPLICATES: bool;

    /// Creates a fresh receiver.
    async fn open() -> Self;

    /// Returns a configuration that reaches it.
    fn config(&self) -> SinkConfig;

    /// Creates a sink that reaches it.
    async fn sink(&self) -> Arc<dyn Sink> {
        build(self.config()).await.expect("a valid configuration")
    }

    /// Returns every effect as `stream/entry id`, in any order, read by the receiver. The sink is closed.
    async fn effects(&self) -> Vec<String>;

    /// Returns the secrets in the configuration.
    fn secrets(&self) -> Vec<String> {
        Vec::new()
    }

    /// Returns configurations that cannot work, each with a part of the expected error.
    fn misconfigured(&self) -> Vec<(SinkConfig, &'static str)> {
        Vec::new()
    }
}

/// A receiver that can be unavailable.
#[async_trait]
trait Outage: World {
    async fn go_down(&mut self);
    async fn come_up(&mut self);
}

/// A store without streams, for sinks that do not forward.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Forward for Nowhere {
    async fn check(&self, stream: &StreamName) -> Result<(), SinkError> {
        Err(SinkError::new(SinkErrorClass::Transient, format!("there is no stream `{stream}`")))
    }

    async fn forward(&self, stream: &StreamName, _: Vec<(String, Fields)>) -> Result<(), SinkError> {
        self.check(stream).await
    }
}

/// Creates a sink like the daemon.
async fn build(config: SinkConfig) -> Result<Arc<dyn Sink>, SinkError> {
    config.build("it", Arc::new(Nowhere)).await
}

/// Creates the delivery of entry number `n` of its stream.
fn delivery(n: u64, attempt: u32) -> Delivery {
    let data = format!(r#"{{ "title": "event {n}", "severity": "high", "pad": "{}" }}"#, "x".repeat(300));
    let event_id = format!("0195e2a0-0000-7000-8000-{n:012}");
    of_fields(n, attempt, &[(field::ID, event_id.as_bytes()), (field::DATA, data.as_bytes())])
}

fn of_fields(n: u64, attempt: u32, fields: &[(&'static str, &[u8])]) -> Delivery {
    let fields: Fields = fields.iter().map(|(n, v)| (Bytes::from(*n), Bytes::copy_from_slice(v))).collect();
    Delivery { entry: Entry { id: EntryId::new(n, 0), fields }, attempt, delivered_at: Instant::now() }
}

fn deliveries(numbers: impl IntoIterator<Item = u64>, attempt: u32) -> Vec<Delivery> {
    numbers.into_iter().map(|n| delivery(n, attempt)).collect()
}

fn origin(stream: &str) -> Origin {
    Origin { stream: stream.parse().expect("a valid name"), group: "siem".parse().expect("a valid name") }
}

const STREAM: &str = "aurora:test.alerts";

/// Delivers like a worker: in batches of the size that the sink takes, up to the first error.
async fn deliver(sink: &dyn Sink, stream: &str, batch: &[Delivery]) -> Result<(), SinkError> {
    for part in batch.chunks(sink.max_batch()) {
        sink.deliver(&origin(stream), part).await?;
    }
    Ok(())
}

/// Returns the effects in order, after closing the sink.
async fn outcome<W: World>(world: &W, sink: Arc<dyn Sink>) -> Vec<String> {
    sink.close().await;
    drop(sink);
    let mut effects = world.effects().await;
    effects.sort_by_key(|effect| {
        let (stream, id) = effect.rsplit_once('/').expect("stream/id");
        (stream.to_owned(), id.parse::<EntryId>().expect("an id"))
    });
    if !W::REFUSES_DUPLICATES {
        effects.dedup();
    }
    effects
}

fn expected(stream: &str, numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    numbers.into_iter().map(|n| format!("{stream}/{n}-0")).collect()
}

/// Formats an error with all its causes.
fn told(error: &SinkError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    format!("{text} {error:?}")
}

/// Returns the error of creating or checking a sink with a configuration that cannot work.
async fn complaint(config: SinkConfig) -> String {
    match build(config).await {
        Err(error) => told(&error),
        Ok(sink) => told(&sink.check().await.expect_err("this can't work")),
    }
}

async fn every_entry_has_its_effect_once<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    deliver(&*sink, STREAM, &deliveries(1..=40, 1)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=40));
}

async fn largest_batch_is_delivered_whole<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    let most = sink.max_batch() as u64;
    sink.deliver(&origin(STREAM), &deliveries(1..=most, 1)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=most));
}

async fn repeated_delivery_has_no_second_effect_if_promised<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    for attempt in 1..=3 {
        deliver(&*sink, STREAM, &deliveries(1..=10, attempt)).await.expect("taken");
    }
    sink.close().await;
    drop(sink);
    // A restarted daemon does not know the deliveries of the one before.
    let sink = world.sink().await;
    deliver(&*sink, STREAM, &deliveries(1..=10, 4)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=10));
}

async fn same_id_in_two_streams_has_two_effects<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    for stream in ["a.b", "a:b"] {
        deliver(&*sink, stream, &deliveries(1..=3, 1)).await.expect("taken");
    }
    let both = [expected("a.b", 1..=3), expected("a:b", 1..=3)].concat();
    assert_eq!(outcome(&world, sink).await, both);
}

async fn workers_share_a_sink<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    let mut workers = JoinSet::new();
    for worker in 0..8 {
        let sink = Arc::clone(&sink);
        workers.spawn(async move {
            let batch = deliveries(worker * 10 + 1..=worker * 10 + 10, 1);
            deliver(&*sink, STREAM, &batch).await.expect("taken");
        });
    }
    workers.join_all().await;
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=80));
}

async fn cancelled_delivery_does_no_harm<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    let batch = deliveries(1..=20, 1);
    for micros in [0, 20, 100, 500, 1000, 2000, 5000] {
        // The delivery may or may not have finished in that time.
        drop(tokio::time::timeout(Duration::from_micros(micros), deliver(&*sink, STREAM, &batch)).await);
    }
    deliver(&*sink, STREAM, &deliveries(1..=20, 2)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=20));
}

async fn check_has_no_effect<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    for _ in 0..3 {
        sink.check().await.expect("it can work");
    }
    assert_eq!(outcome(&world, sink).await, [""; 0]);
}

async fn invalid_configuration_is_reported<W: World>() {
    let world = W::open().await;
    for (config, part) in world.misconfigured() {
        let complaint = complaint(config).await;
        assert!(complaint.contains(part), "{part:?} is not in {complaint:?}");
    }
}

async fn secrets_are_never_shown<W: World>() {
    let world = W::open().await;
    let config = world.config();
    let mut shown = vec![format!("{config:?}"), toml::to_string(&config).expect("TOML")];
    for (config, _) in world.misconfigured() {
        shown.push(format!("{config:?} {:?}", config.problems()));
        shown.push(complaint(config).await);
    }
    shown.push(format!("{:?}", world.sink().await));
    for secret in world.secrets() {
        for shown in &shown {
            assert!(!shown.contains(&secret), "{secret:?} is in {shown}");
        }
    }
}

async fn all_sinks_have_the_same_metrics<W: World>() {
    let world = W::open().await;
    let metrics = Metrics::new();
    let inner = world.sink().await;
    let sink = MeteredSink::new("the-sink", Arc::clone(&inner), &metrics);
    assert_eq!(sink.max_batch(), inner.max_batch());
    let calls = 30_usize.div_ceil(sink.max_batch());
    deliver(&sink, STREAM, &deliveries(1..=30, 1)).await.expect("taken");
    let text = metrics.render();
    for line in [
        "aurora_bus_sink_deliveries_total{sink=\"the-sink\"} 30".to_owned(),
        format!("aurora_bus_sink_seconds_count{{sink=\"the-sink\"}} {calls}"),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
    sink.check().await.expect("it can work");
}

async fn outage_is_reported_and_loses_nothing<W: Outage>() {
    let mut world = W::open().await;
    let sink = world.sink().await;
    deliver(&*sink, STREAM, &deliveries(1..=5, 1)).await.expect("taken");
    world.go_down().await;
    let batch = deliveries(6..=45, 1);
    let error = deliver(&*sink, STREAM, &batch).await.expect_err("it is down");
    assert_eq!(error.class(), SinkErrorClass::Transient, "{}", told(&error));
    let down = sink.check().await.expect_err("it is down");
    for secret in world.secrets() {
        let told = format!("{} {}", told(&error), told(&down));
        assert!(!told.contains(&secret), "{secret:?} is in {told}");
    }
    world.come_up().await;
    until("a sink that is up", PATIENCE, async || sink.check().await.ok()).await;
    deliver(&*sink, STREAM, &deliveries(6..=45, 2)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=45));
}

/// Returns entries without JSON.
fn unreadable() -> Vec<Delivery> {
    [
        &[(field::SEVERITY, &b"high"[..])][..],
        &[(field::DATA, b"{\"title\":")],
        &[(field::DATA, b"no json")],
        &[(field::DATA, b"{\"title\":\"\xff\"}")],
        &[],
    ]
    .into_iter()
    .zip(100..)
    .map(|(fields, n)| of_fields(n, 1, fields))
    .collect()
}

async fn entry_without_json_is_given_up_at_once<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    for bad in unreadable() {
        let mut batch = vec![bad];
        if sink.max_batch() > 1 {
            batch.insert(0, delivery(1, 1));
        }
        let error = sink.deliver(&origin(STREAM), &batch).await.expect_err("it has no JSON");
        assert_eq!(error.class(), SinkErrorClass::Undecodable, "{}", told(&error));
    }
    deliver(&*sink, STREAM, &deliveries(1..=2, 1)).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 1..=2));
}

async fn any_bytes_are_delivered<W: World>() {
    let world = W::open().await;
    let sink = world.sink().await;
    deliver(&*sink, STREAM, &unreadable()).await.expect("taken");
    assert_eq!(outcome(&world, sink).await, expected(STREAM, 100..=104));
}

/// Runs the suite for a world: the promises of every sink, then those of this one.
macro_rules! sink_tests {
    ($world:ident: $($promise:ident)*) => {
        $crate::sinks::sink_tests!(@ $world;
            every_entry_has_its_effect_once
            largest_batch_is_delivered_whole
            repeated_delivery_has_no_second_effect_if_promised
            same_id_in_two_streams_has_two_effects
            workers_share_a_sink
            cancelled_delivery_does_no_harm
            check_has_no_effect
            invalid_configuration_is_reported
            secrets_are_never_shown
            all_sinks_have_the_same_metrics
            $($promise)*
        );
    };
    (@ $world:ident; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::sinks::$case::<super::$world>().await;
            }
        )*
    };
}

use sink_tests;

#[test]
fn every_kind_of_sink_is_in_the_suite() {
    let suite = [log::Log::TYPE, audit::Audit::TYPE, webhook::Single::TYPE, postgres::Rows::TYPE, stream::Tasks::TYPE];
    assert_eq!(SinkConfig::TYPES, suite);
}
