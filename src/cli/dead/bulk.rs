//! Bulk replay and discard: sends requests until all dead letters are handled.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{BulkArgs, Remote};
use crate::cli::{ConfigArgs, eprint_text, print_line};

/// Maximum number of ids in one request.
const IDS_AT_A_TIME: usize = 500;

/// The result of one request, or the sum of all.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(default)]
struct BulkCounts {
    dry_run: bool,
    matched: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    replayed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repeated: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    discarded: Option<u64>,
    gone: u64,
    refused: BTreeMap<String, u64>,
    refusal: Option<String>,
    by_group: BTreeMap<String, u64>,
    by_reason: BTreeMap<String, u64>,
    first_id: Option<String>,
    last_id: Option<String>,
    #[serde(skip_serializing)]
    next: Option<String>,
}

impl BulkCounts {
    fn add(&mut self, other: Self) {
        let sum = |all: &mut Option<u64>, more: Option<u64>| {
            if let Some(more) = more {
                *all = Some(all.unwrap_or_default() + more);
            }
        };
        let merge = |all: &mut BTreeMap<String, u64>, more: BTreeMap<String, u64>| {
            for (name, count) in more {
                *all.entry(name).or_default() += count;
            }
        };
        self.dry_run = other.dry_run;
        self.matched += other.matched;
        sum(&mut self.replayed, other.replayed);
        sum(&mut self.repeated, other.repeated);
        sum(&mut self.discarded, other.discarded);
        self.gone += other.gone;
        merge(&mut self.refused, other.refused);
        merge(&mut self.by_group, other.by_group);
        merge(&mut self.by_reason, other.by_reason);
        self.refusal = self.refusal.take().or(other.refusal);
        self.first_id = self.first_id.take().or(other.first_id);
        self.last_id = other.last_id.or(self.last_id.take());
        self.next = other.next;
    }

    fn refused(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// A bulk action: the daemon, the URL and the body of its requests.
struct BulkRun<'a> {
    remote: &'a Remote,
    args: &'a BulkArgs,
    url: Url,
    body: Value,
}

pub(super) async fn run(config: &ConfigArgs, args: BulkArgs, replay: Option<(String, bool)>) -> anyhow::Result<()> {
    let remote = Remote::new(config, &args.client)?;
    let filters = &args.filters;
    let mut body = json!({
        "group": filters.group, "reason": filters.reason, "since": filters.since, "all": true,
    });
    if let Some(filter) = &filters.filter {
        body["filter"] = serde_json::from_str(filter).context("--filter is not JSON")?;
    }
    let verb = if let Some((to, force)) = &replay {
        (body["to"], body["force"]) = (json!(to), json!(force));
        "replay"
    } else {
        "discard"
    };
    let bulk_run = BulkRun { remote: &remote, args: &args, url: remote.url(&[&args.stream, verb])?, body };
    if args.dry_run {
        let counts = bulk_run.count().await?;
        return report(&counts, args.json);
    }
    if !args.ids.is_empty() {
        let counts = bulk_run.by_ids(false).await?;
        report(&counts, args.json)?;
        return check_counts(&counts);
    }
    let planned = bulk_run.count().await?;
    if !args.yes {
        report(&planned, args.json)?;
        bail!("nothing was done: add --yes to {verb} these dead letters, or give ids");
    }
    let bar = ProgressBar::new(planned.matched);
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_error| ProgressStyle::default_bar()));
    let (counts, ended) = bulk_run.matching(false, &bar).await;
    if ended.is_ok() {
        bar.finish_and_clear();
    } else {
        bar.abandon();
    }
    report(&counts, args.json)?;
    ended?;
    check_counts(&counts)
}

impl BulkRun<'_> {
    /// Counts the matching dead letters, and changes nothing.
    async fn count(&self) -> anyhow::Result<BulkCounts> {
        if !self.args.ids.is_empty() {
            return self.by_ids(true).await;
        }
        let spinner = ProgressBar::new_spinner();
        let (counts, ended) = self.matching(true, &spinner).await;
        spinner.finish_and_clear();
        ended.map(|()| counts)
    }

    async fn by_ids(&self, dry_run: bool) -> anyhow::Result<BulkCounts> {
        let mut all = BulkCounts { dry_run, ..BulkCounts::default() };
        for ids in self.args.ids.chunks(IDS_AT_A_TIME) {
            let mut body = self.body.clone();
            (body["ids"], body["dry_run"]) = (json!(ids), json!(dry_run));
            self.send_all(body, &mut all, &ProgressBar::hidden()).await?;
        }
        Ok(all)
    }

    /// Handles all matching dead letters. Returns the counts up to a failure together with it.
    async fn matching(&self, dry_run: bool, bar: &ProgressBar) -> (BulkCounts, anyhow::Result<()>) {
        let mut all = BulkCounts { dry_run, ..BulkCounts::default() };
        let mut body = self.body.clone();
        body["dry_run"] = json!(dry_run);
        let ended = self.send_all(body, &mut all, bar).await;
        (all, ended)
    }

    async fn send_all(&self, mut body: Value, all: &mut BulkCounts, bar: &ProgressBar) -> anyhow::Result<()> {
        loop {
            all.add(self.remote.send(&self.url, &body, self.args.retries).await?);
            bar.set_position(all.matched);
            match &all.next {
                Some(cursor) => body["cursor"] = json!(cursor),
                None => return Ok(()),
            }
        }
    }
}

fn report(counts: &BulkCounts, json: bool) -> anyhow::Result<()> {
    if json {
        return Ok(print_line(&serde_json::to_string(counts)?)?);
    }
    let BulkCounts { matched, replayed, repeated, discarded, gone, .. } = counts;
    let would = if counts.dry_run { "would be " } else { "" };
    let mut parts = vec![format!("{matched} matched")];
    parts.extend(replayed.map(|count| format!("{count} {would}replayed")));
    parts.extend(discarded.map(|count| format!("{count} {would}discarded")));
    parts.extend(repeated.filter(|count| *count > 0).map(|count| format!("{count} already replayed")));
    parts.extend(Some(counts.refused()).filter(|count| *count > 0).map(|count| format!("{count} refused")));
    parts.extend(Some(gone).filter(|count| **count > 0).map(|count| format!("{count} gone")));
    print_line(&parts.join(", "))?;
    if counts.dry_run {
        for (what, by) in [("group", &counts.by_group), ("reason", &counts.by_reason)] {
            for (name, count) in by {
                let name = if name.is_empty() { "none: foreign" } else { name };
                print_line(&format!("  {what} {name}: {count}"))?;
            }
        }
    }
    if let (Some(first), Some(last)) = (&counts.first_id, &counts.last_id) {
        print_line(&format!("  from {first} to {last}"))?;
    }
    for (code, count) in &counts.refused {
        eprint_text(&format!("{count} refused: {code}\n"));
    }
    if let Some(refusal) = &counts.refusal {
        eprint_text(&format!("first refusal: {refusal}\n"));
    }
    Ok(())
}

fn check_counts(counts: &BulkCounts) -> anyhow::Result<()> {
    match (counts.refused(), counts.gone) {
        (0, 0) => Ok(()),
        (0, gone) => bail!("{gone} dead letters are gone"),
        (refused, _) => bail!("{refused} of {} dead letters were refused", counts.matched),
    }
}
