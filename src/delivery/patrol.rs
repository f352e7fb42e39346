//! The guard of a family's group whose consumers live outside the daemon: one for all members, going round.
//!
//! Each member is looked at once it comes, soon after it has news, several times per `claim_idle` while entries are
//! pending there, and else about once per `claim_idle`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::guard::{LEAVE_TIME, Pace, Ward};
use super::patience::Trouble;
use super::{GroupConfig, GroupSpec};
use crate::event::{ConsumerName, EntryId, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::store::{Roster, Store, StoreError, StoreErrorKind};

/// How often it is seen which members there are, and which of them are due.
const TICK: Duration = Duration::from_secs(1);
/// The most members looked at between two words to readiness.
const LOOKS: usize = 16;
/// The most rings that are heard at a time.
const RINGS: usize = 64;

/// Guards one group without a sink of every member of a family.
#[derive(Debug)]
pub struct Patrol {
    store: Arc<dyn Store>,
    roster: Arc<Roster>,
    dead_letter: StreamPattern,
    config: GroupConfig,
    consumer: ConsumerName,
    metrics: Metrics,
    part: Part,
    trouble: Trouble,
    members: BTreeMap<StreamName, Member>,
    /// When to go round again: at the next tick, or sooner for members that were looked at just now, or rung for.
    go_at: Instant,
    bell: mpsc::Receiver<StreamName>,
}

#[derive(Debug)]
struct Member {
    ward: Ward,
    /// The newest entry when it was heard of last.
    newest: EntryId,
}

impl Patrol {
    /// A patrol that does not go round yet.
    ///
    /// `consumer` is the name under which it holds entries while it gives them up.
    pub fn new(
        store: Arc<dyn Store>,
        roster: Arc<Roster>,
        dead_letter: StreamPattern,
        config: GroupConfig,
        consumer: ConsumerName,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        let (trouble, members) = (Trouble::default(), BTreeMap::new());
        let (_, bell) = mpsc::channel(1);
        let go_at = Instant::now();
        Self { store, roster, dead_letter, config, consumer, metrics, part, trouble, members, go_at, bell }
    }

    /// The same with a bell: of whom it tells, there is something to hand on.
    #[must_use]
    pub fn with_bell(mut self, bell: mpsc::Receiver<StreamName>) -> Self {
        self.bell = bell;
        self
    }

    /// Goes round until `stop`; the member that it is at then, it finishes.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut rung_for = Vec::new();
        let mut hear_at = Instant::now();
        loop {
            if Instant::now() >= hear_at {
                self.hear_news();
                hear_at = Instant::now() + TICK;
            }
            let looked = self.go_round(&stop).await;
            self.report(looked);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = sleep_until(hear_at.min(self.go_at)) => {}
                1.. = self.bell.recv_many(&mut rung_for, RINGS) => {}
            }
            for stream in rung_for.drain(..) {
                if let Some(member) = self.members.get_mut(&stream) {
                    member.ward.hear_bell();
                    self.go_at = self.go_at.min(member.ward.next_at());
                }
            }
        }
        let leave = async {
            for member in self.members.values() {
                member.ward.leave().await;
            }
        };
        if timeout(LEAVE_TIME, leave).await.is_err() {
            debug!("the guard's consumer stays in some groups: the store does not answer in time");
        }
    }

    /// Takes notice of members that have come, and of those that have news.
    fn hear_news(&mut self) {
        for (stream, newest) in self.roster.newest() {
            match self.members.get_mut(&stream) {
                Some(member) if newest > member.newest => {
                    member.newest = newest;
                    member.ward.hear_news();
                }
                Some(_) => {}
                None => {
                    let ward = self.ward(stream.clone());
                    self.members.insert(stream, Member { ward, newest });
                }
            }
        }
    }

    fn ward(&self, stream: StreamName) -> Ward {
        let family = self.roster.family();
        let dead_letter = family.key_of(&stream).and_then(|key| self.dead_letter.of_key(key).ok());
        let dead_letter = dead_letter.expect("the configuration was checked with the longest key");
        let (config, pace) = (self.config.clone(), Pace::of_member(self.config.claim_idle));
        let spec = GroupSpec { stream, dead_letter, config };
        Ward::new(Arc::clone(&self.store), spec, self.consumer.clone(), &self.metrics, family.name(), pace)
    }

    /// Looks at members that are due, the longest overdue first.
    async fn go_round(&mut self, stop: &CancellationToken) -> Result<(), StoreError> {
        let now = Instant::now();
        if self.go_at <= now {
            self.go_at = now + TICK;
        }
        let due = self.members.values_mut().map(|member| &mut member.ward).filter(|ward| ward.next_at() <= now);
        let mut due: Vec<&mut Ward> = due.collect();
        due.sort_by_key(|ward| ward.next_at());
        let later = due.split_off(due.len().min(LOOKS));
        for ward in due {
            if stop.is_cancelled() {
                break;
            }
            match ward.step().await {
                // What is no stream has nothing to be guarded; who follows the family tells of it.
                Err(error) if error.kind() == StoreErrorKind::WrongType => {}
                looked => looked?,
            }
            self.go_at = self.go_at.min(ward.next_at());
        }
        if !later.is_empty() {
            self.go_at = now;
        }
        Ok(())
    }

    fn report(&mut self, looked: Result<(), StoreError>) {
        let (family, group) = (self.roster.family(), &self.config.name);
        match looked {
            Ok(()) => {
                self.part.ready();
                if let Some(after) = self.trouble.ended() {
                    info!(%family, %group, ?after, "guards the group of the family's members again");
                }
            }
            Err(error) => {
                if let Some(times) = self.trouble.occurred() {
                    let kind = error.kind().as_str();
                    warn!(%family, %group, error = %error, kind, times, "cannot guard the group of the family's members");
                }
                self.part.not_ready(error.to_string());
            }
        }
    }
}
