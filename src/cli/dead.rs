//! `aurora-bus dead`: lists, shows, replays and discards dead letters.

mod bulk;

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use reqwest::{Client, Method, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::client::{ClientArgs, endpoint, error_of};
use super::{ConfigArgs, eprint_text, print_line};

/// The actions on dead letters.
#[derive(Debug, Subcommand)]
pub(super) enum DeadCommand {
    /// List dead letters, oldest first; without STREAM, list the streams of dead letters
    List(ListArgs),
    /// Print one dead letter with its entry, as JSON
    Show(ShowArgs),
    /// Append dead letters to their streams again, and remove them
    ///
    /// Safe to repeat after any interruption: no entry is lost or appended twice. Exit code 1 if a request failed, if a
    /// dead letter was refused or is gone, or if --yes is missing.
    Replay(ReplayArgs),
    /// Remove dead letters for good
    ///
    /// Exit code 1 if a request failed, if a dead letter is gone, or if --yes is missing.
    Discard(DiscardArgs),
}

/// Conditions on dead letters.
#[derive(Debug, Clone, Args)]
struct Filters {
    /// Filter by the group that gave them up
    #[arg(long)]
    group: Option<String>,
    /// Filter by reason: rejected, exhausted, crashed, undecodable, or foreign (not written by aurora-bus)
    #[arg(long)]
    reason: Option<String>,
    /// Filter by time: a time such as 2026-01-31T08:00:00Z, a duration ago such as -15m, or a position
    #[arg(long, allow_hyphen_values = true)]
    since: Option<String>,
    /// Filter by the original entry: a filter as for dashboards, as JSON
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Name of the stream
    stream: Option<String>,
    #[command(flatten)]
    filters: Filters,
    /// Maximum number of dead letters to list
    #[arg(long, default_value_t = 100)]
    limit: u64,
    /// Print one JSON object per line, with the entries
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Name of the stream
    stream: String,
    /// Id of the dead letter, as printed by `list`
    id: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// The dead letters to act on, and the options.
#[derive(Debug, Args)]
struct BulkArgs {
    /// Name of the stream
    stream: String,
    /// Ids of dead letters, as printed by `list`; without ids, all that match
    ids: Vec<String>,
    #[command(flatten)]
    filters: Filters,
    /// Count the matching dead letters, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Confirm the action; required without ids
    #[arg(long)]
    yes: bool,
    /// Print the counts as one JSON object
    #[arg(long)]
    json: bool,
    /// Number of retries per request if the daemon does not respond or is busy, with growing pauses
    #[arg(long, default_value_t = 8)]
    retries: u32,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    bulk: BulkArgs,
    /// Target: group (the one that failed), group:NAME, or stream (all groups and dashboards)
    #[arg(long, default_value = "group")]
    to: String,
    /// Replay entries that have reached `dead_letters.max_replays` too
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct DiscardArgs {
    #[command(flatten)]
    bulk: BulkArgs,
}

pub(super) async fn run(config: &ConfigArgs, command: DeadCommand) -> anyhow::Result<()> {
    match command {
        DeadCommand::List(args) => list(config, args).await,
        DeadCommand::Show(args) => show(config, args).await,
        DeadCommand::Replay(ReplayArgs { bulk, to, force }) => bulk::run(config, bulk, Some((to, force))).await,
        DeadCommand::Discard(DiscardArgs { bulk }) => bulk::run(config, bulk, None).await,
    }
}

/// The API of dead letters of a daemon.
struct Remote {
    client: Client,
    base: Url,
}

impl Remote {
    fn new(config: &ConfigArgs, args: &ClientArgs) -> anyhow::Result<Self> {
        let (client, base) = args.connect(config, Duration::from_mins(1))?;
        Ok(Self { client, base })
    }

    fn url(&self, segments: &[&str]) -> anyhow::Result<Url> {
        endpoint(&self.base, &[&["api", "v1", "dead-letters"], segments].concat())
    }

    async fn get<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<T> {
        let response = self.client.get(url).send().await;
        let response = response.with_context(|| format!("no response from {}", self.base))?;
        if !response.status().is_success() {
            bail!("{}", error_of(response).await);
        }
        response.json().await.context("the response of the daemon is not valid")
    }

    /// Sends a request, with retries while it fails transiently.
    async fn send<T: DeserializeOwned>(&self, url: &Url, body: &serde_json::Value, retries: u32) -> anyhow::Result<T> {
        let mut pause = Duration::from_millis(250);
        let mut attempt = 0;
        loop {
            let problem = match self.client.request(Method::POST, url.clone()).json(body).send().await {
                Ok(response) if response.status().is_success() => match response.bytes().await {
                    Ok(body) => {
                        return serde_json::from_slice(&body).context("the response of the daemon is not valid");
                    }
                    // The connection was lost.
                    Err(error) => error.to_string(),
                },
                Ok(response) => {
                    let status = response.status();
                    let detail = error_of(response).await;
                    if !(status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS) {
                        bail!("the daemon refused the request: {detail}");
                    }
                    detail
                }
                Err(error) => error.to_string(),
            };
            if attempt == retries {
                bail!("gave up after {} attempts: {problem}", retries + 1);
            }
            attempt += 1;
            eprint_text(&format!("request failed, trying again in {} ms: {problem}\n", pause.as_millis()));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
}

#[derive(Deserialize)]
struct Streams {
    dead_letters: Vec<LevelLine>,
}

#[derive(Deserialize)]
struct LevelLine {
    stream: String,
    #[serde(default)]
    of: Vec<String>,
    length: u64,
    max_len: u64,
    alarm: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct ListPage {
    dead_letters: Vec<Box<RawValue>>,
    next: Option<String>,
}

#[derive(Deserialize)]
struct DeadLetterLine {
    id: String,
    stream: Option<String>,
    group: Option<String>,
    reason: Option<String>,
    error: Option<String>,
    attempts: Option<u32>,
    replays: Option<u32>,
    last_failure: Option<String>,
}

/// Maximum number of characters of an error in a line.
const ERROR_WIDTH: usize = 100;

async fn list(config: &ConfigArgs, args: ListArgs) -> anyhow::Result<()> {
    let remote = Remote::new(config, &args.client)?;
    let Some(stream) = &args.stream else { return list_streams(&remote, args.json).await };
    let mut left = args.limit;
    let mut cursor: Option<String> = None;
    while left > 0 {
        let mut url = remote.url(&[stream])?;
        let limit = left.min(1_000).to_string();
        let filters = &args.filters;
        let pairs = [
            ("group", filters.group.as_deref()),
            ("reason", filters.reason.as_deref()),
            ("since", filters.since.as_deref()),
            ("filter", filters.filter.as_deref()),
            ("cursor", cursor.as_deref()),
            ("limit", Some(limit.as_str())),
        ];
        for (name, value) in pairs.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            url.query_pairs_mut().append_pair(name, value);
        }
        let page: ListPage = remote.get(url).await?;
        for dead_letter in &page.dead_letters {
            left = left.saturating_sub(1);
            if args.json {
                print_line(dead_letter.get())?;
            } else {
                print_line(&format_line(
                    &serde_json::from_str(dead_letter.get()).context("the response of the daemon is not valid")?,
                ))?;
            }
        }
        cursor = page.next;
        if cursor.is_none() {
            return Ok(());
        }
    }
    eprint_text(&format!("there may be more dead letters: --limit is {}\n", args.limit));
    Ok(())
}

async fn list_streams(remote: &Remote, json: bool) -> anyhow::Result<()> {
    let url = remote.url(&[])?;
    if json {
        let raw: Box<RawValue> = remote.get(url).await?;
        return Ok(print_line(raw.get())?);
    }
    let streams: Streams = remote.get(url).await?;
    for level in streams.dead_letters {
        let LevelLine { stream, of, length, max_len, alarm, error } = level;
        match error {
            Some(error) => print_line(&format!("{stream}  not readable: {error}"))?,
            None => print_line(&format!("{stream}  {length} of at most {max_len}  of {}", of.join(", ")))?,
        }
        if let Some(alarm) = alarm {
            eprint_text(&format!("warning: {alarm}\n"));
        }
    }
    Ok(())
}

fn format_line(dead_letter: &DeadLetterLine) -> String {
    let DeadLetterLine { id, stream, group, reason, error, attempts, replays, last_failure } = dead_letter;
    let (Some(stream), Some(group), Some(reason)) = (stream, group, reason) else {
        return format!("{id}  foreign: not written by aurora-bus");
    };
    let time = last_failure.as_deref().unwrap_or_default();
    let (attempts, replays) = (attempts.unwrap_or_default(), replays.unwrap_or_default());
    let is_plain = |c: char| if c.is_control() { ' ' } else { c };
    let error: String = error.as_deref().unwrap_or_default().chars().map(is_plain).take(ERROR_WIDTH).collect();
    format!("{id}  {time}  {stream}/{group}  {reason}  attempts {attempts}  replays {replays}  {error}")
}

async fn show(config: &ConfigArgs, args: ShowArgs) -> anyhow::Result<()> {
    let remote = Remote::new(config, &args.client)?;
    let dead_letter: Box<RawValue> = remote.get(remote.url(&[&args.stream, &args.id])?).await?;
    print_line(dead_letter.get())?;
    Ok(())
}
