//! Tasks of the declared groups: workers for groups with a sink, a redeliverer and pull consumers for groups without one.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{STALE_AFTER, named};
use crate::config::{Config, StreamConfig};
use crate::delivery::{FamilyGroup, FamilyWorkers, GroupConfig, GroupSpec, Quarantine, Redeliverer, Worker};
use crate::event::{ConsumerName, StreamName};
use crate::metrics::Metrics;
use crate::pull::{PullConsumers, PullFamily, PullGroup};
use crate::readiness::{Part, Readiness};
use crate::sink::Sink;
use crate::store::{Families, FamilyMembers, Store};

/// The maximum number of pending notifications for the redeliverer of a group.
const MAX_NOTIFICATIONS: usize = 1024;

/// The tasks of all groups, before they run.
#[derive(Debug)]
pub(super) struct Groups {
    workers: Vec<Worker>,
    family_workers: Vec<FamilyWorkers>,
    redeliverers: Vec<Redeliverer>,
    pull: PullConsumers,
    own_consumers: HashSet<ConsumerName>,
}

/// The dependencies of the tasks.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupDeps<'a> {
    pub(super) store: &'a Arc<dyn Store>,
    pub(super) sinks: &'a BTreeMap<String, Arc<dyn Sink>>,
    pub(super) families: &'a Families,
    pub(super) quarantine: &'a Quarantine,
    pub(super) metrics: &'a Metrics,
    pub(super) readiness: &'a Readiness,
}

impl Groups {
    pub(super) fn build(config: &Config, deps: GroupDeps<'_>) -> anyhow::Result<Self> {
        let instance = &config.instance;
        let redeliverer: ConsumerName = format!("{instance}-guard").parse()?;
        let reader: ConsumerName = format!("{instance}-pull").parse()?;
        let mut own = HashSet::from([redeliverer.clone(), reader.clone()]);
        let (mut workers, mut family_workers, mut redeliverers) = (Vec::new(), Vec::new(), Vec::new());
        let (mut pulled, mut pulled_families) = (Vec::new(), Vec::new());
        for (stream, group) in config.streams.iter().flat_map(|stream| stream.groups.iter().map(move |g| (stream, g))) {
            let consumers = consumers_of(instance, group)?;
            let Some(name) = stream.name.stream() else {
                if group.sink.is_some() {
                    family_workers.push(deps.family_workers(stream, group, consumers.clone())?);
                    own.extend(consumers);
                } else {
                    let (redeliver, notifications) = mpsc::channel(MAX_NOTIFICATIONS);
                    let of_family = deps.family_redeliverer(stream, group, redeliverer.clone())?;
                    redeliverers.push(of_family.with_notifications(notifications));
                    pulled_families.push(deps.pull_family(stream, group, redeliver)?);
                }
                continue;
            };
            let spec = spec_of(stream, name, group)?;
            if group.sink.is_some() {
                for (index, consumer) in consumers.into_iter().enumerate() {
                    workers.push(deps.worker(&spec, index, consumer.clone())?);
                    own.insert(consumer);
                }
            } else {
                let (redeliver, notifications) = mpsc::channel(MAX_NOTIFICATIONS);
                pulled.push(pull_group(&spec, redeliver));
                let part = deps.part(&format!("group {}", full_name(stream, group)));
                let (store, metrics) = (Arc::clone(deps.store), deps.metrics.clone());
                let of_stream = Redeliverer::of_stream(store, spec, redeliverer.clone(), metrics, part);
                redeliverers.push(of_stream.with_notifications(notifications));
            }
        }
        let (store, config) = (deps.store, config.pull.clone());
        let pull = PullConsumers::new(store, config, pulled, pulled_families, &reader, &redeliverer, deps.metrics);
        Ok(Self { workers, family_workers, redeliverers, pull, own_consumers: own })
    }

    /// Returns the pull consumers of the groups without a sink.
    pub(super) fn pull(&self) -> &PullConsumers {
        &self.pull
    }

    /// Returns the names of this daemon's own consumers.
    pub(super) fn own_consumers(&self) -> &HashSet<ConsumerName> {
        &self.own_consumers
    }

    /// Spawns the tasks of all groups. They run until `stop`.
    pub(super) fn spawn(self, tasks: &mut JoinSet<&'static str>, stop: &CancellationToken) {
        for workers in self.family_workers {
            tasks.spawn(named("family workers", workers.run(stop.clone())));
        }
        for worker in self.workers {
            tasks.spawn(named("worker", worker.run(stop.clone())));
        }
        for redeliverer in self.redeliverers {
            tasks.spawn(named("redeliverer", redeliverer.run(stop.clone())));
        }
        let (pull, stop) = (self.pull, stop.clone());
        tasks.spawn(named("pull consumers", async move { pull.run(stop).await }));
    }
}

impl GroupDeps<'_> {
    fn worker(&self, spec: &GroupSpec, index: usize, consumer: ConsumerName) -> anyhow::Result<Worker> {
        let full_name = format!("{}/{}", spec.stream, spec.config.name);
        let name = if spec.config.workers == 1 { full_name } else { format!("{full_name} {index}") };
        let part = self.part(&format!("worker {name}"));
        let sink = self.sink(&spec.config)?;
        let (store, quarantine, metrics) = (Arc::clone(self.store), self.quarantine.clone(), self.metrics.clone());
        Ok(Worker::new(store, sink, spec.clone(), consumer, quarantine, metrics, part))
    }

    fn family_workers(
        &self,
        stream: &StreamConfig,
        group: &GroupConfig,
        own: Vec<ConsumerName>,
    ) -> anyhow::Result<FamilyWorkers> {
        let part = self.part(&format!("workers {}", full_name(stream, group)));
        let (sink, family_group) = (self.sink(group)?, self.family_group(stream, group)?);
        let (store, quarantine, metrics) = (Arc::clone(self.store), self.quarantine.clone(), self.metrics.clone());
        Ok(FamilyWorkers::new(store, sink, family_group, own, quarantine, metrics, part))
    }

    fn family_redeliverer(
        &self,
        stream: &StreamConfig,
        group: &GroupConfig,
        consumer: ConsumerName,
    ) -> anyhow::Result<Redeliverer> {
        let part = self.part(&format!("group {}", full_name(stream, group)));
        let family_group = self.family_group(stream, group)?;
        Ok(Redeliverer::of_family(Arc::clone(self.store), family_group, consumer, self.metrics.clone(), part))
    }

    fn family_group(&self, stream: &StreamConfig, group: &GroupConfig) -> anyhow::Result<FamilyGroup> {
        Ok(FamilyGroup { family_members: self.family_members(stream)?, dead_letter: stream.dead_letter(), config: group.clone() })
    }

    /// Returns the group of every member for external consumers.
    fn pull_family(
        &self,
        stream: &StreamConfig,
        group: &GroupConfig,
        redeliver: mpsc::Sender<StreamName>,
    ) -> anyhow::Result<PullFamily> {
        Ok(PullFamily {
            family_members: self.family_members(stream)?,
            group: group.name.clone(),
            dead_letter: stream.dead_letter(),
            claim_idle: group.claim_idle,
            max_deliveries: group.max_deliveries,
            redeliver,
        })
    }

    fn family_members(&self, stream: &StreamConfig) -> anyhow::Result<Arc<FamilyMembers>> {
        self.families.named(stream.name.as_str()).cloned().context("a declared family is not registered")
    }

    fn sink(&self, group: &GroupConfig) -> anyhow::Result<Arc<dyn Sink>> {
        let sink = group.sink.as_ref().and_then(|sink| self.sinks.get(sink));
        sink.cloned().context("a group names a sink that is not open")
    }

    fn part(&self, name: &str) -> Part {
        self.readiness.part(name, Some(STALE_AFTER))
    }
}

fn spec_of(stream: &StreamConfig, name: &StreamName, group: &GroupConfig) -> anyhow::Result<GroupSpec> {
    let dead_letter = stream.dead_letter();
    let dead_letter = dead_letter.stream().context("the dead-letter stream of a single stream is a family")?;
    Ok(GroupSpec { stream: name.clone(), dead_letter: dead_letter.clone(), config: group.clone() })
}

/// Returns the group for external consumers.
fn pull_group(spec: &GroupSpec, redeliver: mpsc::Sender<StreamName>) -> PullGroup {
    PullGroup {
        stream: spec.stream.clone(),
        label: spec.stream.to_string(),
        group: spec.config.name.clone(),
        dead_letter: spec.dead_letter.clone(),
        claim_idle: spec.config.claim_idle,
        max_deliveries: spec.config.max_deliveries,
        redeliver,
    }
}

fn full_name(stream: &StreamConfig, group: &GroupConfig) -> String {
    format!("{}/{}", stream.name, group.name)
}

/// Returns the names of this daemon's consumers in a group.
fn consumers_of(instance: &str, group: &GroupConfig) -> anyhow::Result<Vec<ConsumerName>> {
    (0..group.workers).map(|index| Ok(format!("{instance}-{index}").parse()?)).collect()
}
