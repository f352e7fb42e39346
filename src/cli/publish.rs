//! `aurora-bus publish`: publishes NDJSON to a stream, and safely repeats requests without a response.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, BufReader};
use uuid::Uuid;

use super::client::{ClientArgs, endpoint, error_of};
use super::{ConfigArgs, eprint_text, print_line};

/// The events, and the stream that they are published to.
#[derive(Debug, Args)]
pub(super) struct PublishArgs {
    /// Name of the stream
    stream: String,
    /// File of NDJSON (one JSON object per line), or - for standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// Number of events per request, 1 to 5000
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    batch: u32,
    /// Number of retries per request if the daemon does not respond or is busy, with growing pauses
    #[arg(long, default_value_t = 8)]
    retries: u32,
    #[command(flatten)]
    client: ClientArgs,
}

/// Size in bytes from which a request is sent with fewer events.
const MAX_BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Time for which the daemon recognizes a repeated request. Longer than all retries take.
const DEDUP_WINDOW: &str = "1h";

#[derive(Debug, Default)]
struct PublishCounts {
    lines: u64,
    accepted: u64,
    refused: u64,
}

#[derive(Deserialize)]
struct PublishResponse {
    results: Vec<PublishResult>,
}

#[derive(Deserialize)]
struct PublishResult {
    error: Option<PublishRefusal>,
}

#[derive(Deserialize)]
struct PublishRefusal {
    detail: String,
    retry: bool,
}

/// Lines of one request, with their numbers in the input.
#[derive(Default)]
struct LineBatch {
    body: Vec<u8>,
    numbers: Vec<u64>,
}

pub(super) async fn run(config: &ConfigArgs, args: PublishArgs) -> anyhow::Result<()> {
    let (client, base) = args.client.connect(config, Duration::from_mins(1))?;
    let mut url = endpoint(&base, &["api", "v1", "streams", &args.stream, "events"])?;
    url.query_pairs_mut().append_pair("dedup_window", DEDUP_WINDOW);
    let (mut input, size): (Box<dyn AsyncBufRead + Unpin>, Option<u64>) = if args.file.as_os_str() == "-" {
        (Box::new(BufReader::new(tokio::io::stdin())), None)
    } else {
        let file = tokio::fs::File::open(&args.file).await;
        let file = file.with_context(|| format!("cannot open {}", args.file.display()))?;
        let size = file.metadata().await.ok().map(|metadata| metadata.len());
        (Box::new(BufReader::with_capacity(256 * 1024, file)), size)
    };
    let progress = progress(size);
    let mut counts = PublishCounts::default();
    loop {
        let batch = next_batch(&mut input, args.batch as usize, &mut counts.lines).await?;
        if batch.numbers.is_empty() {
            break;
        }
        let bytes = batch.body.len() as u64;
        let sent = send(&client, &url, batch, args.retries, &mut counts).await;
        progress.inc(bytes);
        progress.set_message(format!("{} accepted", counts.accepted));
        if let Err(error) = sent {
            progress.abandon();
            print_line(&summary(&counts))?;
            return Err(error);
        }
    }
    progress.finish_and_clear();
    print_line(&summary(&counts))?;
    if counts.refused > 0 {
        bail!("{} of {} events were refused", counts.refused, counts.accepted + counts.refused);
    }
    Ok(())
}

fn summary(counts: &PublishCounts) -> String {
    let PublishCounts { accepted, refused, .. } = counts;
    format!("{accepted} accepted, {refused} refused")
}

fn progress(size: Option<u64>) -> ProgressBar {
    let (bar, template) = match size {
        Some(size) => (ProgressBar::new(size), "{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {bytes} {bytes_per_sec} {msg}"),
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_error| ProgressStyle::default_bar());
    bar.with_style(style)
}

async fn next_batch(
    input: &mut (dyn AsyncBufRead + Unpin),
    max_events: usize,
    line_number: &mut u64,
) -> anyhow::Result<LineBatch> {
    let mut batch = LineBatch::default();
    while batch.numbers.len() < max_events && batch.body.len() < MAX_BATCH_BYTES {
        let start = batch.body.len();
        let read = input.read_until(b'\n', &mut batch.body).await.context("cannot read the input")?;
        if read == 0 {
            break;
        }
        *line_number += 1;
        let is_blank = batch.body.get(start..).is_none_or(|line| line.trim_ascii().is_empty());
        if is_blank {
            batch.body.truncate(start);
        } else {
            if batch.body.last() != Some(&b'\n') {
                batch.body.push(b'\n');
            }
            batch.numbers.push(*line_number);
        }
    }
    Ok(batch)
}

/// Sends a batch until each of its events is accepted or refused for good.
///
/// Each retry has the same idempotency key, so that an event with a lost response is not stored twice.
async fn send(
    client: &Client,
    url: &Url,
    batch: LineBatch,
    retries: u32,
    counts: &mut PublishCounts,
) -> anyhow::Result<()> {
    let key = Uuid::new_v4().to_string();
    let body = bytes::Bytes::from(batch.body);
    let mut pause = Duration::from_millis(250);
    for attempt in 0..=retries {
        let is_last = attempt == retries;
        let request = client.post(url.clone()).header("content-type", "application/x-ndjson");
        let response = request.header("idempotency-key", &key).body(body.clone()).send().await;
        let problem = match response {
            Ok(response) if matches!(response.status(), StatusCode::CREATED | StatusCode::MULTI_STATUS) => {
                match response.bytes().await {
                    Ok(body) => {
                        let response: PublishResponse =
                            serde_json::from_slice(&body).context("the response of the daemon is not valid")?;
                        let is_retried = |item: &PublishResult| item.error.as_ref().is_some_and(|error| error.retry);
                        if is_last || !response.results.iter().any(is_retried) {
                            count(&response, &batch.numbers, counts);
                            return Ok(());
                        }
                        "events were not stored".to_owned()
                    }
                    // The connection was lost.
                    Err(error) => error.to_string(),
                }
            }
            Ok(response) => {
                let status = response.status();
                let detail = error_of(response).await;
                let is_transient = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                if !is_transient {
                    bail!("the daemon refused the request: {detail}");
                }
                detail
            }
            Err(error) => error.to_string(),
        };
        if is_last {
            bail!("gave up after {} attempts: {problem}", retries + 1);
        }
        eprint_text(&format!("request failed, trying again in {} ms: {problem}\n", pause.as_millis()));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(10));
    }
    Ok(())
}

fn count(response: &PublishResponse, numbers: &[u64], counts: &mut PublishCounts) {
    for (item, number) in response.results.iter().zip(numbers) {
        match &item.error {
            Some(error) => {
                counts.refused += 1;
                eprint_text(&format!("line {number}: {}\n", error.detail));
            }
            // A duplicate also counts as accepted: only an earlier try of this batch can have stored it.
            None => counts.accepted += 1,
        }
    }
}
