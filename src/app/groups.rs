//! The tasks of the declared groups.
//!
//! A group with a sink has a worker per consumer, or family workers for all members of a family. A group without a sink
//! is consumed from outside: a redeliverer appends its abandoned entries again, and pull consumers serve requests.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{STALE_AFTER, named};
use crate::config::{Config, StreamConfig};
use crate::delivery::{Crew, FamilyGroup, GroupConfig, GroupSpec, Guard, Patrol, Quarantine, Worker};
use crate::event::{ConsumerName, StreamName};
use crate::maintenance::{FamilySpec, Reaper};
use crate::metrics::Metrics;
use crate::pull::{Bell, Pull, PullFamily, PullGroup};
use crate::readiness::{Part, Readiness};
use crate::sink::Sink;
use crate::store::{Families, Roster, Store};

/// Capacity of the channel that notifies the redeliverer of a family.
const NOTIFICATIONS: usize = 1024;

/// The tasks of all groups, before they run.
#[derive(Debug)]
pub(super) struct Groups {
    workers: Vec<Worker>,
    crews: Vec<Crew>,
    guards: Vec<Guard>,
    patrols: Vec<Patrol>,
    reaper: Reaper,
    pull: Pull,
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
    pub(super) fn build(config: &Config, family_specs: Vec<FamilySpec>, deps: GroupDeps<'_>) -> anyhow::Result<Self> {
        let instance = &config.instance;
        let guard: ConsumerName = format!("{instance}-guard").parse()?;
        let reader: ConsumerName = format!("{instance}-pull").parse()?;
        let mut own = HashSet::from([guard.clone(), reader.clone()]);
        let (mut workers, mut crews, mut guards, mut patrols) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut specs, mut pulled, mut pulled_families) = (Vec::new(), Vec::new(), Vec::new());
        for (stream, group) in config.streams.iter().flat_map(|stream| stream.groups.iter().map(move |g| (stream, g))) {
            let consumers = consumers_of(instance, group)?;
            let Some(name) = stream.name.stream() else {
                if group.sink.is_some() {
                    crews.push(deps.crew(stream, group, consumers.clone())?);
                    own.extend(consumers);
                } else {
                    let (ring, bell) = mpsc::channel(NOTIFICATIONS);
                    patrols.push(deps.patrol(stream, group, guard.clone())?.with_bell(bell));
                    pulled_families.push(deps.pull_family(stream, group, ring)?);
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
                let bell = Arc::<Notify>::default();
                let part = deps.part(&format!("group {}", full_name(stream, group)));
                let of_group = Guard::new(Arc::clone(deps.store), spec.clone(), guard.clone(), deps.metrics, part);
                guards.push(of_group.with_bell(Arc::clone(&bell)));
                pulled.push(pull_group(&spec, bell));
            }
            specs.push(spec);
        }
        let pull = Pull::new(deps.store, config.pull.clone(), pulled, pulled_families, &reader, &guard, deps.metrics);
        let reaper = Reaper::new(Arc::clone(deps.store), specs, own, deps.metrics.clone());
        Ok(Self { workers, crews, guards, patrols, reaper: reaper.with_families(family_specs), pull })
    }

    /// Returns the groups that are consumed from outside.
    pub(super) fn pull(&self) -> &Pull {
        &self.pull
    }

    /// Starts all tasks. They run until `stop`.
    pub(super) fn spawn(self, tasks: &mut JoinSet<&'static str>, stop: &CancellationToken) {
        for crew in self.crews {
            tasks.spawn(named("crew", crew.run(stop.clone())));
        }
        for worker in self.workers {
            tasks.spawn(named("worker", worker.run(stop.clone())));
        }
        for guard in self.guards {
            tasks.spawn(named("guard", guard.run(stop.clone())));
        }
        for patrol in self.patrols {
            tasks.spawn(named("patrol", patrol.run(stop.clone())));
        }
        tasks.spawn(named("reaper", self.reaper.run(stop.clone())));
        let (pull, stop) = (self.pull, stop.clone());
        tasks.spawn(named("desks", async move { pull.run(stop).await }));
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

    fn crew(&self, stream: &StreamConfig, group: &GroupConfig, own: Vec<ConsumerName>) -> anyhow::Result<Crew> {
        let part = self.part(&format!("workers {}", full_name(stream, group)));
        let (sink, family_group) = (self.sink(group)?, self.family_group(stream, group)?);
        let (store, quarantine, metrics) = (Arc::clone(self.store), self.quarantine.clone(), self.metrics.clone());
        Ok(Crew::new(store, sink, family_group, own, quarantine, metrics, part))
    }

    fn patrol(&self, stream: &StreamConfig, group: &GroupConfig, guard: ConsumerName) -> anyhow::Result<Patrol> {
        let part = self.part(&format!("group {}", full_name(stream, group)));
        let family_group = self.family_group(stream, group)?;
        Ok(Patrol::new(Arc::clone(self.store), family_group, guard, self.metrics.clone(), part))
    }

    fn family_group(&self, stream: &StreamConfig, group: &GroupConfig) -> anyhow::Result<FamilyGroup> {
        Ok(FamilyGroup { roster: self.roster(stream)?, dead_letter: stream.dead_letter(), config: group.clone() })
    }

    /// Creates the pull interface of a family's group without a sink.
    fn pull_family(
        &self,
        stream: &StreamConfig,
        group: &GroupConfig,
        bell: mpsc::Sender<StreamName>,
    ) -> anyhow::Result<PullFamily> {
        Ok(PullFamily {
            roster: self.roster(stream)?,
            group: group.name.clone(),
            dead_letter: stream.dead_letter(),
            claim_idle: group.claim_idle,
            max_deliveries: group.max_deliveries,
            bell,
        })
    }

    fn roster(&self, stream: &StreamConfig) -> anyhow::Result<Arc<Roster>> {
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

/// Creates the pull interface of a group without a sink.
fn pull_group(spec: &GroupSpec, bell: Arc<Notify>) -> PullGroup {
    PullGroup {
        stream: spec.stream.clone(),
        label: spec.stream.to_string(),
        group: spec.config.name.clone(),
        dead_letter: spec.dead_letter.clone(),
        claim_idle: spec.config.claim_idle,
        max_deliveries: spec.config.max_deliveries,
        bell: Bell::OfStream(bell),
    }
}

fn full_name(stream: &StreamConfig, group: &GroupConfig) -> String {
    format!("{}/{}", stream.name, group.name)
}

/// Returns the names of this daemon's consumers in a group.
fn consumers_of(instance: &str, group: &GroupConfig) -> anyhow::Result<Vec<ConsumerName>> {
    (0..group.workers).map(|index| Ok(format!("{instance}-{index}").parse()?)).collect()
}
