//! `aurora-bus publish`: streams NDJSON into a stream, safely repeated where an answer was lost.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, BufReader};
use uuid::Uuid;

use super::client::{ClientArgs, endpoint, refusal};
use super::{ConfigArgs, say, tell};

/// What to publish, and where to.
#[derive(Debug, Args)]
pub(super) struct PublishArgs {
    /// The stream
    stream: String,
    /// A file of NDJSON (one JSON object per line), or - for standard input
    #[arg(default_value = "-")]
    file: PathBuf,
    /// Events per request
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    batch: u32,
    /// How often a request is repeated while the daemon does not answer or has no room, with growing pauses
    #[arg(long, default_value_t = 8)]
    retries: u32,
    #[command(flatten)]
    client: ClientArgs,
}

/// Bytes of one request after which it is sent, however few events it has.
const MAX_BATCH_BYTES: usize = 4 * 1024 * 1024;

/// How long the daemon recognises a repeated request. Longer than all repetitions take.
const DEDUP_WINDOW: &str = "1h";

#[derive(Debug, Default)]
struct Counts {
    lines: u64,
    accepted: u64,
    refused: u64,
}

#[derive(Deserialize)]
struct Answer {
    results: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    detail: String,
    retry: bool,
}

/// A batch of lines, and where each stood in the input.
#[derive(Default)]
struct Batch {
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
    let mut counts = Counts::default();
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
            say(&summary(&counts))?;
            return Err(error);
        }
    }
    progress.finish_and_clear();
    say(&summary(&counts))?;
    if counts.refused > 0 {
        bail!("{} of {} events were refused", counts.refused, counts.accepted + counts.refused);
    }
    Ok(())
}

fn summary(counts: &Counts) -> String {
    let Counts { accepted, refused, .. } = counts;
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
) -> anyhow::Result<Batch> {
    let mut batch = Batch::default();
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
/// Every repetition carries the same key, so an event whose first answer was lost is not stored twice.
async fn send(client: &Client, url: &Url, batch: Batch, retries: u32, counts: &mut Counts) -> anyhow::Result<()> {
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
                        let answer: Answer =
                            serde_json::from_slice(&body).context("the daemon's answer makes no sense")?;
                        let is_retried = |item: &Item| item.error.as_ref().is_some_and(|error| error.retry);
                        if is_last || !answer.results.iter().any(is_retried) {
                            count(&answer, &batch.numbers, counts);
                            return Ok(());
                        }
                        "some events were not stored".to_owned()
                    }
                    // It broke off.
                    Err(error) => error.to_string(),
                }
            }
            Ok(response) => {
                let status = response.status();
                let refusal = refusal(response).await;
                let may_pass = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                if !may_pass {
                    bail!("the daemon refused the request: {refusal}");
                }
                refusal
            }
            Err(error) => error.to_string(),
        };
        if is_last {
            bail!("gave up after {} attempts: {problem}", retries + 1);
        }
        tell(&format!("trying again in {} ms: {problem}\n", pause.as_millis()));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(10));
    }
    Ok(())
}

fn count(answer: &Answer, numbers: &[u64], counts: &mut Counts) {
    for (item, number) in answer.results.iter().zip(numbers) {
        match &item.error {
            Some(error) => {
                counts.refused += 1;
                tell(&format!("line {number}: {}\n", error.detail));
            }
            // Also a duplicate: the key is this batch's own, so its first copy was accepted a moment ago.
            None => counts.accepted += 1,
        }
    }
}
