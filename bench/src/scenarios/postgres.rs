//! The scenario `postgres`: rows written by the sink into a running `PostgreSQL`, beside `COPY` of them by `psql`.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aurora_bus::event::{Delivery, Entry, EntryId, Fields, field};
use aurora_bus::sink::{Origin, PostgresConfig, PostgresSink, Sink as _};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::bench::{Bench, GROUP};
use crate::payload::EventTemplate;
use crate::report::{Figure, Goal};
use crate::stats::to_f64;

/// Rows of one transaction.
const BATCH: u64 = 1000;
/// Concurrent calls of the sink, in two series of runs.
const CONCURRENCY: [usize; 2] = [1, 4];
const STREAM: &str = "aurora:agent:results";
/// The time limit of `psql`.
const LIMIT: Duration = Duration::from_mins(10);

/// Writes a backlog of rows into a new table, which is dropped at the end.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let Some(url) = bench.args.postgres_url.clone() else {
        bail!("--postgres-url is required");
    };
    let table = format!("aurora_bus_bench_{}", std::process::id());
    let figures = measure_into(bench, &url, &table);
    let dropped = psql(bench, &url, &[format!("DROP TABLE IF EXISTS {table}")]);
    bench.figures.extend(figures?);
    dropped.map(drop)
}

fn measure_into(bench: &Bench, url: &str, table: &str) -> Result<Vec<Figure>> {
    let rows = bench.args.backlog;
    let template = EventTemplate::new(bench.args.size);
    let file = bench.workspace.path("rows");
    fs::write(&file, copy_text(&template, rows)?).context("cannot write the rows for psql")?;
    let config = toml::toml! { url = url table = table batch = 1000 connections = 4 };
    let config: PostgresConfig = config.try_into()?;
    let sink = Arc::new(Handle::current().block_on(async { PostgresSink::open("bench", &config) })?);

    let columns = "stream, entry_id, event_id, received_at, severity, source, category, data";
    let copy = format!("\\copy {table} ({columns}) FROM '{}'", file.display());
    let (mut copied, mut written) = (Vec::new(), [Vec::new(), Vec::new()]);
    for round in 1..=bench.args.rounds {
        for (concurrency, runs) in CONCURRENCY.into_iter().zip(&mut written) {
            bench.step(format!("postgres, round {round}: aurora-bus, {concurrency} at a time"))?;
            let batches = batches(&template, rows);
            Handle::current().block_on(async { sink.check().await })?;
            let start = Instant::now();
            Handle::current().block_on(deliver(&sink, batches, concurrency))?;
            runs.push(to_f64(rows) / start.elapsed().as_secs_f64());
            psql(bench, url, &[format!("TRUNCATE {table}")])?;
        }
        bench.step(format!("postgres, round {round}: psql"))?;
        let start = Instant::now();
        psql(bench, url, std::slice::from_ref(&copy))?;
        copied.push(to_f64(rows) / start.elapsed().as_secs_f64());
        psql(bench, url, &[format!("TRUNCATE {table}")])?;
    }
    Handle::current().block_on(sink.close());
    let figure = |(concurrency, runs): (usize, &Vec<f64>)| {
        let name = format!("batches of {BATCH}, {concurrency} at a time");
        Figure::new("postgres", "none", name, "rows/s", runs)
            .beside("COPY of all rows by psql", &copied)
            .with_goal(Goal::RatioAtLeast(0.5))
    };
    Ok(CONCURRENCY.into_iter().zip(&written).map(figure).collect())
}

/// Runs commands of `psql` one after the other.
fn psql(bench: &Bench, url: &str, commands: &[String]) -> Result<String> {
    let mut command = Command::new("psql");
    command.args(["--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", url]);
    for text in commands {
        command.args(["-c", text]);
    }
    bench.workspace.run(&mut command, LIMIT)
}

async fn deliver(sink: &Arc<PostgresSink>, batches: Vec<Vec<Delivery>>, concurrency: usize) -> Result<()> {
    let origin = Origin { stream: STREAM.parse()?, group: GROUP.parse()? };
    let mut batches = batches.into_iter();
    let mut calls = JoinSet::new();
    loop {
        while calls.len() < concurrency
            && let Some(batch) = batches.next()
        {
            let (sink, origin) = (Arc::clone(sink), origin.clone());
            calls.spawn(async move { sink.deliver(&origin, &batch).await });
        }
        match calls.join_next().await {
            Some(done) => done??,
            None => return Ok(()),
        }
    }
}

/// Returns the time when an entry was accepted: each has a millisecond of its own.
fn accepted_ms(number: u64) -> u64 {
    1_800_000_000_000 + number
}

fn batches(template: &EventTemplate, rows: u64) -> Vec<Vec<Delivery>> {
    let name = |name: &'static str| Bytes::from_static(name.as_bytes());
    let delivery = |number| {
        let mut fields = Fields::with_capacity(6);
        fields.push(name(field::ID), format!("event-{number:012}"));
        fields.push(name(field::TIMESTAMP), accepted_at(number));
        fields.push(name(field::DATA), template.bytes(number, 0));
        fields.push(name(field::SEVERITY), name("high"));
        fields.push(name(field::SOURCE), name("suricata"));
        fields.push(name(field::CATEGORY), name("network"));
        let entry = Entry { id: EntryId::new(accepted_ms(number), 0), fields };
        Delivery { entry, attempt: 1, delivered_at: Instant::now() }
    };
    let starts = (0..rows).step_by(usize::try_from(BATCH).unwrap_or(usize::MAX));
    starts.map(|start| (start..rows.min(start + BATCH)).map(delivery).collect()).collect()
}

/// Returns the same rows in the text format of `COPY`. Payloads hold no characters that need escaping.
fn copy_text(template: &EventTemplate, rows: u64) -> Result<String> {
    let mut text = String::new();
    for number in 0..rows {
        let (ms, at) = (accepted_ms(number), accepted_at(number));
        let data = String::from_utf8(template.bytes(number, 0))?;
        writeln!(text, "{STREAM}\t{ms}-0\tevent-{number:012}\t{at}\thigh\tsuricata\tnetwork\t{data}")?;
    }
    Ok(text)
}

fn accepted_at(number: u64) -> String {
    let time = i64::try_from(accepted_ms(number)).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    format!("{:.3}", time.unwrap_or(Timestamp::UNIX_EPOCH))
}
