//! Rows in a `PostgreSQL` that runs already: the sink beside `COPY` of the same rows by `psql`.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::float;
use crate::bench::Bench;
use crate::bench::payload::Template;
use crate::bench::report::{Figure, Goal};
use crate::event::{Delivery, Entry, EntryId, Fields, field};
use crate::sink::{Origin, PostgresConfig, PostgresSink, Sink as _};

/// Rows of one transaction.
const BATCH: u64 = 1000;
/// How many calls of the sink are made at a time, in one series of runs and in the other.
const CONCURRENCY: [usize; 2] = [1, 4];
const STREAM: &str = "aurora:agent:results";
/// How long `psql` may take.
const LIMIT: Duration = Duration::from_mins(10);

/// Writes as many rows as a backlog has, into a table of its own that is dropped again.
pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let Some(url) = bench.args.postgres_url.clone() else {
        bail!("--postgres-url names no database to write to");
    };
    let table = format!("aurora_bus_bench_{}", std::process::id());
    let measured = series(bench, &url, &table);
    let dropped = psql(bench, &url, &[format!("DROP TABLE IF EXISTS {table}")]);
    bench.figures.extend(measured?);
    dropped.map(drop)
}

fn series(bench: &Bench, url: &str, table: &str) -> Result<Vec<Figure>> {
    let rows = bench.args.backlog;
    let template = Template::new(bench.args.size);
    let file = bench.site.path("rows");
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
            let began = Instant::now();
            Handle::current().block_on(deliver(&sink, batches, concurrency))?;
            runs.push(float(rows) / began.elapsed().as_secs_f64());
            psql(bench, url, &[format!("TRUNCATE {table}")])?;
        }
        bench.step(format!("postgres, round {round}: psql"))?;
        let began = Instant::now();
        psql(bench, url, std::slice::from_ref(&copy))?;
        copied.push(float(rows) / began.elapsed().as_secs_f64());
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

/// Runs commands one after another, as `psql` understands them.
fn psql(bench: &Bench, url: &str, commands: &[String]) -> Result<String> {
    let mut command = Command::new("psql");
    command.args(["--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", url]);
    for text in commands {
        command.args(["-c", text]);
    }
    bench.site.run(&mut command, LIMIT)
}

async fn deliver(sink: &Arc<PostgresSink>, batches: Vec<Vec<Delivery>>, concurrency: usize) -> Result<()> {
    let origin = Origin { stream: STREAM.parse()?, group: super::GROUP.parse()? };
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

/// When an entry was accepted: each in a millisecond of its own.
fn ms(number: u64) -> u64 {
    1_800_000_000_000 + number
}

fn batches(template: &Template, rows: u64) -> Vec<Vec<Delivery>> {
    let name = |name: &'static str| Bytes::from_static(name.as_bytes());
    let delivery = |number| {
        let mut fields = Fields::with_capacity(6);
        fields.push(name(field::ID), format!("event-{number:012}"));
        fields.push(name(field::TIMESTAMP), accepted_at(number));
        fields.push(name(field::DATA), template.bytes(number, 0));
        fields.push(name(field::SEVERITY), name("high"));
        fields.push(name(field::SOURCE), name("suricata"));
        fields.push(name(field::CATEGORY), name("network"));
        let entry = Entry { id: EntryId::new(ms(number), 0), fields };
        Delivery { entry, attempt: 1, delivered_at: Instant::now() }
    };
    let starts = (0..rows).step_by(usize::try_from(BATCH).unwrap_or(usize::MAX));
    starts.map(|start| (start..rows.min(start + BATCH)).map(delivery).collect()).collect()
}

/// The same rows in the text format of `COPY`. Payloads have nothing in them that it escapes.
fn copy_text(template: &Template, rows: u64) -> Result<String> {
    let mut text = String::new();
    for number in 0..rows {
        let (ms, at) = (ms(number), accepted_at(number));
        let data = String::from_utf8(template.bytes(number, 0))?;
        writeln!(text, "{STREAM}\t{ms}-0\tevent-{number:012}\t{at}\thigh\tsuricata\tnetwork\t{data}")?;
    }
    Ok(text)
}

fn accepted_at(number: u64) -> String {
    let time = i64::try_from(ms(number)).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    format!("{:.3}", time.unwrap_or(Timestamp::UNIX_EPOCH))
}
