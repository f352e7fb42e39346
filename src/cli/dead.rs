//! `aurora-bus dead`: look at dead letters, replay them, discard them.

mod bulk;

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use reqwest::{Client, Method, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::client::{ClientArgs, endpoint, refusal};
use super::{ConfigArgs, say, tell};

/// What to do with dead letters.
#[derive(Debug, Subcommand)]
pub(super) enum DeadCommand {
    /// List dead letters, oldest first; without a stream, the streams that hold them
    List(ListArgs),
    /// Print one dead letter with its entry, as JSON
    Show(ShowArgs),
    /// Append dead letters to their streams once more, and remove them
    ///
    /// Safe to repeat: none is lost and none is appended twice, whatever was broken off. Exit code 1 where something
    /// failed, was refused or is gone, or where --yes is missing.
    Replay(ReplayArgs),
    /// Remove dead letters for good
    ///
    /// Exit code 1 where something failed or is gone, or where --yes is missing.
    Discard(DiscardArgs),
}

/// Which dead letters.
#[derive(Debug, Clone, Args)]
struct Filters {
    /// Only those that this group gave up
    #[arg(long)]
    group: Option<String>,
    /// Only those that died of this: rejected, exhausted, crashed, undecodable; or foreign: written by someone else
    #[arg(long)]
    reason: Option<String>,
    /// Only those that died since: a time such as 2026-01-31T08:00:00Z, a time ago such as -15m, or a position
    #[arg(long, allow_hyphen_values = true)]
    since: Option<String>,
    /// Only those whose entry passes this filter, a tree of conditions as dashboards have them, in JSON
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// The stream
    stream: Option<String>,
    #[command(flatten)]
    filters: Filters,
    /// The most to list
    #[arg(long, default_value_t = 100)]
    limit: u64,
    /// One JSON object per line, with the entries
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// The stream
    stream: String,
    /// The dead letter's id, as `list` shows it
    id: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Which dead letters to act on, and how.
#[derive(Debug, Args)]
struct BulkArgs {
    /// The stream
    stream: String,
    /// These dead letters, by their ids as `list` shows them; without ids all that match
    ids: Vec<String>,
    #[command(flatten)]
    filters: Filters,
    /// Count what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do it: needed where no ids are given
    #[arg(long)]
    yes: bool,
    /// Print the counts as one JSON object
    #[arg(long)]
    json: bool,
    /// How often a request is repeated while the daemon does not answer or has no room, with growing pauses
    #[arg(long, default_value_t = 8)]
    retries: u32,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    bulk: BulkArgs,
    /// Whom for: group (the one that failed), group:NAME, or stream (every group and dashboards)
    #[arg(long, default_value = "group")]
    to: String,
    /// Also those that were replayed as often as `dead_letters.max_replays` allows
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

/// The daemon's dead letters over HTTP.
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
        let response = response.with_context(|| format!("no answer from {}", self.base))?;
        if !response.status().is_success() {
            bail!("{}", refusal(response).await);
        }
        response.json().await.context("the daemon's answer makes no sense")
    }

    /// Sends until there is an answer that repeating won't change.
    async fn send<T: DeserializeOwned>(&self, url: &Url, body: &serde_json::Value, retries: u32) -> anyhow::Result<T> {
        let mut pause = Duration::from_millis(250);
        let mut attempt = 0;
        loop {
            let problem = match self.client.request(Method::POST, url.clone()).json(body).send().await {
                Ok(response) if response.status().is_success() => match response.bytes().await {
                    Ok(body) => return serde_json::from_slice(&body).context("the daemon's answer makes no sense"),
                    // It broke off.
                    Err(error) => error.to_string(),
                },
                Ok(response) => {
                    let status = response.status();
                    let refusal = refusal(response).await;
                    if !(status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS) {
                        bail!("the daemon refused the request: {refusal}");
                    }
                    refusal
                }
                Err(error) => error.to_string(),
            };
            if attempt == retries {
                bail!("gave up after {} attempts: {problem}", retries + 1);
            }
            attempt += 1;
            tell(&format!("trying again in {} ms: {problem}\n", pause.as_millis()));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }
}

#[derive(Deserialize)]
struct Streams {
    dead_letters: Vec<Level>,
}

#[derive(Deserialize)]
struct Level {
    stream: String,
    #[serde(default)]
    of: Vec<String>,
    length: u64,
    max_len: u64,
    alarm: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Page {
    dead_letters: Vec<Box<RawValue>>,
    next: Option<String>,
}

#[derive(Deserialize)]
struct Letter {
    id: String,
    stream: Option<String>,
    group: Option<String>,
    reason: Option<String>,
    error: Option<String>,
    attempts: Option<u32>,
    replays: Option<u32>,
    last_failure: Option<String>,
}

/// How much of an error a line shows, in characters.
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
        let page: Page = remote.get(url).await?;
        for letter in &page.dead_letters {
            left = left.saturating_sub(1);
            if args.json {
                say(letter.get())?;
            } else {
                say(&line(&serde_json::from_str(letter.get()).context("the daemon's answer makes no sense")?))?;
            }
        }
        cursor = page.next;
        if cursor.is_none() {
            return Ok(());
        }
    }
    tell(&format!("there may be more: --limit {} lists no more than that\n", args.limit));
    Ok(())
}

async fn list_streams(remote: &Remote, json: bool) -> anyhow::Result<()> {
    let url = remote.url(&[])?;
    if json {
        let raw: Box<RawValue> = remote.get(url).await?;
        return Ok(say(raw.get())?);
    }
    let streams: Streams = remote.get(url).await?;
    for level in streams.dead_letters {
        let Level { stream, of, length, max_len, alarm, error } = level;
        match error {
            Some(error) => say(&format!("{stream}  cannot be read: {error}"))?,
            None => say(&format!("{stream}  {length} of at most {max_len}  of {}", of.join(", ")))?,
        }
        if let Some(alarm) = alarm {
            tell(&format!("warning: {alarm}\n"));
        }
    }
    Ok(())
}

fn line(letter: &Letter) -> String {
    let Letter { id, stream, group, reason, error, attempts, replays, last_failure } = letter;
    let (Some(stream), Some(group), Some(reason)) = (stream, group, reason) else {
        return format!("{id}  foreign: no dead letter of the bus");
    };
    let time = last_failure.as_deref().unwrap_or_default();
    let (attempts, replays) = (attempts.unwrap_or_default(), replays.unwrap_or_default());
    let is_plain = |c: char| if c.is_control() { ' ' } else { c };
    let error: String = error.as_deref().unwrap_or_default().chars().map(is_plain).take(ERROR_WIDTH).collect();
    format!("{id}  {time}  {stream}/{group}  {reason}  attempts {attempts}  replays {replays}  {error}")
}

async fn show(config: &ConfigArgs, args: ShowArgs) -> anyhow::Result<()> {
    let remote = Remote::new(config, &args.client)?;
    let letter: Box<RawValue> = remote.get(remote.url(&[&args.stream, &args.id])?).await?;
    say(letter.get())?;
    Ok(())
}
