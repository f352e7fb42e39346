//! Idle clients, and their cost to the relay.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::client_pool::ClientPool;
use super::endpoint::RelayEndpoint;
use super::fanout::SETTLE;
use crate::clock::StampClock;
use crate::procfs::{cpu_seconds, private_bytes};
use crate::stats::to_f64;

/// Connects clients step by step and watches the relay at each step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct IdleClientsJob {
    pub(crate) relay: RelayEndpoint,
    /// The number of clients at each step, in ascending order.
    pub(crate) steps: Vec<usize>,
    /// The time to watch each step.
    pub(crate) seconds: f64,
    pub(crate) relay_pid: u32,
}

/// The cost of one step.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct IdleClientsReport {
    pub(crate) clients: usize,
    /// Private memory of the relay before the first client.
    pub(crate) before_bytes: u64,
    /// Private memory of the relay with these clients.
    pub(crate) with_bytes: u64,
    /// CPU seconds of the relay per second.
    pub(crate) cpu: f64,
    /// Clients that the relay disconnected.
    pub(crate) closed: u64,
}

impl IdleClientsReport {
    /// Returns the private memory of the relay per client, in KiB.
    pub(crate) fn kib_per_client(&self) -> f64 {
        let bytes = self.with_bytes.saturating_sub(self.before_bytes);
        to_f64(bytes) / 1024.0 / self.client_count()
    }

    /// Returns the CPU time of the relay per client and second, in microseconds.
    pub(crate) fn cpu_micros_per_client(&self) -> f64 {
        self.cpu * 1e6 / self.client_count()
    }

    fn client_count(&self) -> f64 {
        to_f64(self.clients.max(1) as u64)
    }
}

impl IdleClientsJob {
    pub(crate) fn run(&self) -> Result<Vec<IdleClientsReport>> {
        let before_bytes = private_bytes(self.relay_pid)?;
        let mut pool = ClientPool::new(StampClock::start())?;
        let mut reports = Vec::new();
        for clients in &self.steps {
            pool.grow(&self.relay, *clients)?;
            pool.receive_until(Instant::now() + SETTLE, None)?;
            let (start, cpu) = (Instant::now(), cpu_seconds(self.relay_pid)?);
            pool.receive_until(start + Duration::from_secs_f64(self.seconds), None)?;
            let closed = pool.counters.closed;
            reports.push(IdleClientsReport {
                clients: *clients,
                before_bytes,
                with_bytes: private_bytes(self.relay_pid)?,
                cpu: (cpu_seconds(self.relay_pid)? - cpu) / start.elapsed().as_secs_f64(),
                closed,
            });
            ensure!(closed == 0, "{closed} of {clients} idle clients were disconnected");
        }
        Ok(reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generator::baseline_relay::tests::start_relay;

    #[test]
    fn idle_clients_are_held_at_each_step() {
        let relay = RelayEndpoint::new(start_relay(), "/");
        let relay_pid = std::process::id();
        let reports = IdleClientsJob { relay, steps: vec![2, 5], seconds: 0.05, relay_pid }.run().unwrap();
        assert_eq!(reports.iter().map(|report| report.clients).collect::<Vec<_>>(), [2, 5]);
        assert!(reports.iter().all(|report| report.with_bytes > 0 && report.closed == 0));
    }
}
