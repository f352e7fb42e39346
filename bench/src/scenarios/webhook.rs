//! The scenario `webhook`: entries posted to a local receiver by the sink alone and by the daemon, beside a bare loop
//! of the same HTTP client.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aurora_bus::event::{Delivery, Entry, EntryId, Fields, field};
use aurora_bus::sink::{Origin, Sink as _, WebhookConfig, WebhookSink};
use bytes::Bytes;
use reqwest::Client;
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use url::Url;

use crate::bench::{Backend, Bench, GROUP, PUBLISH_PATH, Readers, STREAM, read_counter};
use crate::generator::Job;
use crate::http::HttpClient;
use crate::payload::EventTemplate;
use crate::report::{Figure, Goal};
use crate::stats::to_f64;

/// Concurrent requests.
const IN_FLIGHT: usize = 32;
/// The highest number of entries of one run: each is a request.
const MAX_ENTRIES: u64 = 40_000;
/// Events of one request that fills the backlog.
const BATCH: u64 = 500;
/// The time limit of a backlog.
const LIMIT: Duration = Duration::from_mins(5);

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let entries = bench.args.backlog.min(MAX_ENTRIES);
    let (receiver, address) = bench.workspace.start_service(&Job::WebhookReceiver)?;
    let url = Url::parse(&format!("http://{address}/in"))?;
    let config = toml::toml! { url = (url.as_str()) secret = "of the measurement" allow_private = true };
    let config: WebhookConfig = config.try_into()?;
    let sink = Arc::new(WebhookSink::open("bench", &config)?);
    // The receiver speaks no TLS, so the client needs no certificates.
    let tls = ClientConfig::builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let client = Client::builder().no_proxy().tls_backend_preconfigured(tls).build()?;
    let payload = Bytes::from(EventTemplate::new(bench.args.size).bytes(0, 0));

    let (mut bare, mut alone, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("webhook, round {round}: bare loop"))?;
        let post = {
            let (client, url, payload) = (client.clone(), url.clone(), payload.clone());
            move |_| {
                let request = client.post(url.clone()).header("content-type", "application/json");
                let request = request.body(payload.clone());
                async move {
                    request.send().await?.error_for_status()?.bytes().await?;
                    Ok(())
                }
            }
        };
        bare.push(Handle::current().block_on(in_flight(entries, post))?);

        bench.step(format!("webhook, round {round}: the sink alone"))?;
        let origin = Origin { stream: STREAM.parse()?, group: GROUP.parse()? };
        let deliver = {
            let (sink, payload) = (Arc::clone(&sink), payload.clone());
            move |number| {
                let (sink, origin, delivery) = (Arc::clone(&sink), origin.clone(), delivery(number, &payload));
                async move { Ok(sink.deliver(&origin, &[delivery]).await?) }
            }
        };
        alone.push(Handle::current().block_on(in_flight(entries, deliver))?);

        bench.step(format!("webhook, {}, round {round}: aurora-bus", backend.name()))?;
        bench.reset(backend)?;
        whole.push(through_daemon(bench, backend, &url, entries)?);
    }
    drop(receiver);
    let figure = |name: &str, runs: &[f64]| {
        Figure::new("webhook", backend.name(), format!("{name}, {IN_FLIGHT} in flight"), "entries/s", runs)
            .beside("bare loop of the same HTTP client", &bare)
            .with_goal(Goal::RatioAtLeast(0.6))
    };
    let figures = [figure("the sink alone", &alone), figure("a backlog", &whole)];
    bench.figures.extend(figures);
    Ok(())
}

/// Calls `act` with the numbers up to `calls`, [`IN_FLIGHT`] at a time; returns calls per second.
async fn in_flight<F, Fut>(calls: u64, act: F) -> Result<f64>
where
    F: Fn(u64) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<()>> + Send,
{
    let next = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let (next, act) = (Arc::clone(&next), act.clone());
        tasks.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= calls {
                    return anyhow::Ok(());
                }
                act(number).await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(to_f64(calls) / start.elapsed().as_secs_f64())
}

fn delivery(number: u64, payload: &Bytes) -> Delivery {
    let mut fields = Fields::with_capacity(1);
    fields.push(Bytes::from_static(field::DATA.as_bytes()), payload.clone());
    let entry = Entry { id: EntryId::new(1_800_000_000_000 + number, 0), fields };
    Delivery { entry, attempt: 1, delivered_at: Instant::now() }
}

/// Fills a stream and starts a daemon whose group posts all of it; returns entries per second.
fn through_daemon(bench: &Bench, backend: &Backend, url: &Url, entries: u64) -> Result<f64> {
    let filler = bench.start_daemon(backend, Readers::Nobody)?;
    let mut client = HttpClient::open(filler.address)?;
    let template = EventTemplate::new(bench.args.size);
    for start in (0..entries).step_by(usize::try_from(BATCH)?) {
        let mut body = Vec::new();
        for sequence in start..entries.min(start + BATCH) {
            template.write(sequence, 0, &mut body);
            body.push(b'\n');
        }
        client.publish(PUBLISH_PATH, "application/x-ndjson", &body)?;
    }
    drop((client, filler));

    let group = format!("[[streams.groups]]\nname = \"{GROUP}\"\nsink = \"webhook\"\nconcurrency = {IN_FLIGHT}\n");
    let sink = format!(
        "[sinks.webhook]\ntype = \"webhook\"\nurl = \"{url}\"\nsecret = \"of the measurement\"\nallow_private = true\n"
    );
    let mut daemon = bench.workspace.start_daemon(&bench.daemon, None, |address| {
        let config = bench.daemon_config(backend, Readers::Nobody, "", address);
        config.replacen("[relay]", &format!("{group}[relay]"), 1) + &sink
    })?;
    let mut client = HttpClient::open(daemon.address)?;
    let mut wait_for = |at_least: u64| {
        bench.workspace.wait_for("entries acknowledged", LIMIT, || {
            let acknowledged = read_counter(&mut client, "aurora_bus_acknowledged_total")?;
            Ok((acknowledged >= at_least).then(|| (Instant::now(), acknowledged)))
        })
    };
    let (start, before) = wait_for(1)?;
    let (end, _) = wait_for(entries)?;
    daemon.ensure_running()?;
    let seconds = (end - start).as_secs_f64();
    (seconds > 0.0).then(|| to_f64(entries - before) / seconds).context("the backlog is too small; raise --backlog")
}
