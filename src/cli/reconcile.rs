//! `aurora-bus reconcile`: checks that every published entry is accounted for, per group.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use reqwest::{Client, Url};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::client::{ClientArgs, endpoint, error_of};
use super::{ConfigArgs, print_line};

/// Interval between two reads of accounts that do not add up.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The streams to check, and the output format.
#[derive(Debug, Args)]
pub(super) struct ReconcileArgs {
    /// Name of the stream or family [default: all declared streams]
    stream: Option<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Time in which an account must add up; losses are found within seconds
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = humantime_serde::re::humantime::parse_duration)]
    wait: Duration,
    #[command(flatten)]
    client: ClientArgs,
}

/// A failure to read the accounts. The exit code is 2.
#[derive(Debug)]
pub(super) struct CannotReconcile;

impl fmt::Display for CannotReconcile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot reconcile")
    }
}

#[derive(Debug, Deserialize)]
struct Streams {
    streams: Vec<Stream>,
}

#[derive(Debug, Deserialize)]
struct Stream {
    name: String,
    #[serde(default)]
    groups: Vec<Group>,
    #[serde(default)]
    family: Option<Family>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Family {
    #[serde(default)]
    streams: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Group {
    name: String,
    #[serde(skip_serializing)]
    declared: bool,
    published: Option<u64>,
    acknowledged: u64,
    filtered: u64,
    pending: u64,
    undelivered: Option<u64>,
    dead: u64,
    lost: u64,
    lost_by_reason: BTreeMap<String, u64>,
    balanced: Option<bool>,
    difference: Option<i64>,
    consumed_outside: bool,
}

/// The JSON output for one group.
#[derive(Debug, Serialize)]
struct GroupLine<'a> {
    stream: &'a str,
    #[serde(flatten)]
    group: &'a Group,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl Group {
    /// Returns the reason why the account does not add up, or `None` if it does.
    fn reason(&self) -> Option<&'static str> {
        match self.difference {
            Some(0) => None,
            Some(missing) if missing > 0 => {
                Some("published entries are missing: acknowledged outside of the daemon, or removed with a consumer")
            }
            Some(_) if self.consumed_outside => Some("surplus entries: the group was set back"),
            Some(_) => Some("surplus entries: the group was set back, or the stream was restored"),
            None => Some(
                "unknown: the server cannot count the entries until the group has reached the end of the \
                 stream (before Redis 7.0, never)",
            ),
        }
    }
}

/// `aurora-bus reconcile`
pub(super) async fn run(config: &ConfigArgs, args: ReconcileArgs) -> anyhow::Result<()> {
    let streams = read_accounts(config, &args).await.context(CannotReconcile)?;
    let lines: Vec<GroupLine<'_>> = streams
        .iter()
        .flat_map(|stream| stream.groups.iter().map(move |group| (stream, group)))
        .map(|(stream, group)| GroupLine { stream: &stream.name, group, reason: group.reason() })
        .collect();
    if args.json {
        print_line(&serde_json::to_string_pretty(&lines)?)?;
    } else {
        table(&lines)?;
    }
    let count = |is_open: fn(Option<i64>) -> bool| lines.iter().filter(|line| is_open(line.group.difference)).count();
    let wrong = count(|difference| difference.is_some_and(|difference| difference != 0));
    let unknown = count(|difference| difference.is_none());
    let of_all = lines.len();
    match (wrong, unknown) {
        (0, 0) => Ok(()),
        (0, _) => bail!("{unknown} of {of_all} accounts are unknown"),
        (_, 0) => bail!("{wrong} of {of_all} accounts do not add up"),
        _ => bail!("{wrong} of {of_all} accounts do not add up, and {unknown} are unknown"),
    }
}

/// Reads the declared groups until all accounts add up or the time is over. The numbers of a group are of one instant,
/// so traffic does not disturb them. Removals by other programs are found after some seconds.
async fn read_accounts(config: &ConfigArgs, args: &ReconcileArgs) -> anyhow::Result<Vec<Stream>> {
    let (client, base) = args.client.connect(config, Duration::from_secs(30))?;
    let deadline = Instant::now() + args.wait;
    loop {
        let mut streams = fetch(&client, &base, args.stream.as_deref()).await?;
        for stream in &mut streams {
            if let Some(error) = &stream.error {
                bail!("stream {}: {error}", stream.name);
            }
            stream.groups.retain(|group| group.declared);
        }
        let is_balanced = streams.iter().all(|stream| stream.groups.iter().all(|group| group.reason().is_none()));
        if is_balanced || Instant::now() >= deadline {
            return Ok(streams);
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

async fn fetch(client: &Client, base: &Url, stream: Option<&str>) -> anyhow::Result<Vec<Stream>> {
    let mut streams = ask(client, base, stream).await?;
    // A family stands for its members.
    let families: Vec<String> = streams.extract_if(.., |stream| stream.family.is_some()).map(|s| s.name).collect();
    for family in families {
        for found in ask(client, base, Some(&family)).await? {
            for member in found.family.map(|family| family.streams).unwrap_or_default() {
                streams.extend(ask(client, base, Some(&member)).await?);
            }
        }
    }
    Ok(streams)
}

async fn ask(client: &Client, base: &Url, stream: Option<&str>) -> anyhow::Result<Vec<Stream>> {
    let url = endpoint(base, &["api", "v1", "streams"])?;
    let url = match stream {
        Some(stream) => endpoint(&url, &[stream])?,
        None => url,
    };
    let response = client.get(url.clone()).send().await.with_context(|| format!("no response from {url}"))?;
    if !response.status().is_success() {
        bail!("{url} responded with {}", error_of(response).await);
    }
    let odd = || format!("the response of {url} is not valid");
    Ok(match stream {
        Some(_) => vec![response.json::<Stream>().await.with_context(odd)?],
        None => response.json::<Streams>().await.with_context(odd)?.streams,
    })
}

fn table(lines: &[GroupLine<'_>]) -> std::io::Result<()> {
    const HEAD: [&str; 10] = [
        "stream",
        "group",
        "published",
        "acknowledged",
        "filtered",
        "pending",
        "undelivered",
        "dead",
        "lost",
        "difference",
    ];
    let number = |value: Option<u64>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
    let rows: Vec<[String; 10]> = lines
        .iter()
        .map(|GroupLine { stream, group, .. }| {
            [
                (*stream).to_owned(),
                group.name.clone(),
                number(group.published),
                group.acknowledged.to_string(),
                group.filtered.to_string(),
                group.pending.to_string(),
                number(group.undelivered),
                group.dead.to_string(),
                group.lost.to_string(),
                group.difference.map_or_else(|| "unknown".to_owned(), |difference| difference.to_string()),
            ]
        })
        .collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].len());
        cells.chain([HEAD[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let line = |cells: [&str; 10]| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    print_line(&line(HEAD))?;
    for row in &rows {
        print_line(&line(std::array::from_fn(|column| row[column].as_str())))?;
    }
    for GroupLine { stream, group, reason } in lines {
        for (why, entries) in group.lost_by_reason.iter().filter(|(_, entries)| **entries > 0) {
            print_line(&format!("{stream} {}: {entries} lost: {why}", group.name))?;
        }
        if let Some(reason) = reason {
            let difference = group.difference.map_or_else(String::new, |difference| format!("{difference} "));
            print_line(&format!("{stream} {}: {difference}{reason}", group.name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(difference: Option<i64>) -> Group {
        Group {
            name: "siem".to_owned(),
            declared: true,
            published: Some(7),
            acknowledged: 7,
            filtered: 0,
            pending: 0,
            undelivered: Some(0),
            dead: 0,
            lost: 0,
            lost_by_reason: BTreeMap::new(),
            balanced: difference.map(|difference| difference == 0),
            difference,
            consumed_outside: false,
        }
    }

    #[test]
    fn only_balanced_account_has_no_reason() {
        assert_eq!(group(Some(0)).reason(), None);
        for difference in [Some(3), Some(-3), None] {
            assert!(group(difference).reason().is_some(), "{difference:?}");
        }
    }
}
