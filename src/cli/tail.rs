//! `aurora-bus tail`: follows a stream through the API.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::client::{ClientArgs, endpoint, error_of};
use super::{ConfigArgs, eprint_text, print_line};

/// The entries to print, and their format.
#[derive(Debug, Args)]
pub(super) struct TailArgs {
    /// Name of the stream
    stream: String,
    /// Start: `earliest`, `latest`, or an entry id to continue after
    #[arg(long, default_value = "latest")]
    since: String,
    /// Number of entries to print before it ends
    #[arg(short = 'n', long)]
    count: Option<u64>,
    /// End after the current entries instead of waiting for new ones
    #[arg(long)]
    no_follow: bool,
    /// Print the payloads alone, byte for byte
    #[arg(long)]
    data: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Deserialize)]
struct EventPage<'a> {
    #[serde(borrow)]
    events: Vec<&'a RawValue>,
    next: Option<String>,
}

#[derive(Deserialize)]
struct Payload<'a> {
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    data_text: Option<String>,
}

#[derive(Deserialize)]
struct Stream {
    last_id: Option<String>,
}

pub(super) async fn run(config: &ConfigArgs, args: TailArgs) -> anyhow::Result<()> {
    let (client, base) = args.client.connect(config, Duration::from_secs(40))?;
    let events = endpoint(&base, &["api", "v1", "streams", &args.stream, "events"])?;
    let mut from = start(&client, &base, &args).await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut is_waiting_for_daemon = false;
    while left > 0 {
        let mut url = events.clone();
        url.query_pairs_mut()
            .append_pair("from", &from)
            .append_pair("limit", &left.min(1_000).to_string())
            .append_pair("wait_ms", if args.no_follow { "0" } else { "20000" });
        let response = match client.get(url).send().await {
            Ok(response) if is_transient(response.status()) && !args.no_follow => Err(error_of(response).await),
            Ok(response) if !response.status().is_success() => bail!("{}", error_of(response).await),
            Ok(response) => response.bytes().await.map_err(|error| error.to_string()),
            Err(error) if args.no_follow => return Err(error).with_context(|| format!("no response from {base}")),
            Err(error) => Err(error.to_string()),
        };
        let body = match response {
            Ok(body) => body,
            Err(error) => {
                if !is_waiting_for_daemon {
                    eprint_text(&format!("daemon unavailable, trying again every second: {error}\n"));
                }
                is_waiting_for_daemon = true;
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        is_waiting_for_daemon = false;
        let page: EventPage<'_> = serde_json::from_slice(&body).context("the response of the daemon is not valid")?;
        for event in &page.events {
            print(event, args.data)?;
        }
        left -= page.events.len() as u64;
        let next = page.next.context("the response of the daemon has no `next`")?;
        if page.events.is_empty() && args.no_follow && next == from {
            break;
        }
        from = next;
    }
    Ok(())
}

fn is_transient(status: reqwest::StatusCode) -> bool {
    status.is_server_error() || status == reqwest::StatusCode::TOO_MANY_REQUESTS
}

fn print(event: &RawValue, data_only: bool) -> anyhow::Result<()> {
    if !data_only {
        return Ok(print_line(event.get())?);
    }
    let payload: Payload<'_> = serde_json::from_str(event.get()).context("the response of the daemon is not valid")?;
    match (payload.data, payload.data_text) {
        (Some(data), _) => print_line(data.get())?,
        (None, Some(text)) => print_line(&text)?,
        (None, None) => {}
    }
    Ok(())
}

/// Returns the id of the first entry to request.
async fn start(client: &reqwest::Client, base: &reqwest::Url, args: &TailArgs) -> anyhow::Result<String> {
    use crate::event::EntryId;

    match args.since.as_str() {
        "earliest" => Ok(EntryId::MIN.to_string()),
        "latest" => {
            let url = endpoint(base, &["api", "v1", "streams", &args.stream])?;
            let response = client.get(url).send().await.with_context(|| format!("no response from {base}"))?;
            if !response.status().is_success() {
                bail!("{}", error_of(response).await);
            }
            let stream: Stream = response.json().await.context("the response of the daemon is not valid")?;
            let last: EntryId = stream.last_id.as_deref().unwrap_or("0-0").parse()?;
            Ok(last.next().to_string())
        }
        id => Ok(id.parse::<EntryId>().context("--since must be earliest, latest or an entry id")?.next().to_string()),
    }
}
