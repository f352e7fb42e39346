//! The load generator, a process of its own, so that its cost is not counted as the cost of the daemon.
//!
//! It takes one [`Job`] as JSON, does it within a bounded time and writes one line of JSON. It talks to the daemon as
//! any client does, over HTTP and WebSocket, and to the store as the cheapest possible client.

mod baseline_relay;
mod centrifugo;
mod client_pool;
mod dashboard_fleet;
mod drain;
mod embedded_ceiling;
mod endpoint;
mod fanout;
mod filter_matching;
mod http_requests;
mod idle_clients;
mod nats;
mod pacing;
mod publisher;
mod reconnect_storm;
mod redis_ceiling;
mod slow_clients;
mod webhook_receiver;

use std::io::Write;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub(crate) use baseline_relay::BaselineRelayJob;
pub(crate) use centrifugo::API_KEY as CENTRIFUGO_API_KEY;
pub(crate) use drain::{DrainJob, DrainReport};
pub(crate) use embedded_ceiling::{EngineAppendJob, StoreMixedJob};
pub(crate) use endpoint::{FleetEndpoint, FleetProtocol, Protocol, RedisStream, RelayEndpoint};
pub(crate) use fanout::{FanoutJob, FanoutReport};
pub(crate) use filter_matching::{FilterMatchJob, FilterMatchReport};
pub(crate) use http_requests::{HttpRequestsJob, HttpRequestsReport, Request};
pub(crate) use idle_clients::{IdleClientsJob, IdleClientsReport};
pub(crate) use pacing::Pace;
pub(crate) use publisher::{PublisherSpec, Target};
pub(crate) use reconnect_storm::{ReconnectStormJob, ReconnectStormReport};
pub(crate) use redis_ceiling::{RedisConsumeJob, RedisPublishJob, fill_stream};
pub(crate) use slow_clients::{SlowClientsJob, SlowClientsReport};

/// Arguments of the hidden sub-command `generate`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct GenerateArgs {
    /// The job, as JSON
    #[arg(value_name = "JOB")]
    job: String,
}

/// One job of a generator process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    /// Sends HTTP requests, one after the other on each of many connections.
    HttpRequests(HttpRequestsJob),
    /// Sends XADD in pipelines: the ceiling of publishing to Redis.
    RedisPublish(RedisPublishJob),
    /// Loops XREADGROUP and XACK: the ceiling of consuming from Redis.
    RedisConsume(RedisConsumeJob),
    /// Commits to the engine of the embedded store: the ceiling of publishing to it.
    EngineAppend(EngineAppendJob),
    /// Appends to and consumes from the embedded store without a daemon: the ceiling of both at once.
    StoreMixed(StoreMixedJob),
    /// Publishes events and counts them at WebSocket clients.
    Fanout(FanoutJob),
    /// Opens connections and leaves them idle.
    IdleClients(IdleClientsJob),
    /// Reconnects all dashboards after the server was killed.
    ReconnectStorm(ReconnectStormJob),
    /// Stops reading at some of the dashboards for a while.
    SlowClients(SlowClientsJob),
    /// Records when a stopping daemon closes its dashboards.
    Drain(DrainJob),
    /// Matches filters in a loop.
    FilterMatch(FilterMatchJob),
    /// Serves as a baseline relay until it is ended: the ceiling of any relay.
    BaselineRelay(BaselineRelayJob),
    /// Accepts webhooks until it is ended.
    WebhookReceiver,
}

/// Does one job and writes its report as a line of JSON to the standard output.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not valid JSON of a known job")?;
    match job {
        Job::HttpRequests(job) => report(&job.run()?),
        Job::RedisPublish(job) => report(&job.run()?),
        Job::RedisConsume(job) => report(&job.run()?),
        Job::EngineAppend(job) => report(&job.run()?),
        Job::StoreMixed(job) => report(&job.run()?),
        Job::Fanout(job) => report(&job.run()?),
        Job::IdleClients(job) => report(&job.run()?),
        Job::ReconnectStorm(job) => report(&job.run()?),
        Job::SlowClients(job) => report(&job.run()?),
        Job::Drain(job) => report(&job.run()?),
        Job::FilterMatch(job) => report(&job.run()?),
        Job::BaselineRelay(job) => job.run(|address| report(&address)),
        Job::WebhookReceiver => webhook_receiver::run(|address| report(&address)),
    }
}

fn report(report: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut output = std::io::stdout().lock();
    output.write_all(&line).and_then(|()| output.flush()).context("cannot write the report")
}
