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

use crate::delivery::FamilyGroup;
use crate::delivery::redelivery::{LEAVE_TIME, Pace, Ward};
use crate::event::{ConsumerName, EntryId, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::store::{Store, StoreError, StoreErrorKind};

/// How often it is seen which members there are, and which of them are due.
const TICK: Duration = Duration::from_secs(1);
/// The most members looked at between two words to readiness, and how long that may take before no other is looked at.
const LOOKS: usize = 16;
const ROUND: Duration = Duration::from_secs(5);
/// The most rings that are heard at a time.
const RINGS: usize = 64;

/// Guards one group without a sink of every member of a family.
#[derive(Debug)]
pub struct Patrol {
    store: Arc<dyn Store>,
    group: FamilyGroup,
    consumer: ConsumerName,
    metrics: Metrics,
    part: Part,
    trouble: ThrottledWarning,
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
    /// Why it could not be looked at the last time.
    failure: Option<StoreError>,
}

impl Patrol {
    /// A patrol that does not go round yet.
    ///
    /// `consumer` is the name under which it holds entries while it gives them up.
    pub fn new(
        store: Arc<dyn Store>,
        group: FamilyGroup,
        consumer: ConsumerName,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        let (trouble, members) = (ThrottledWarning::default(), BTreeMap::new());
        let (_, bell) = mpsc::channel(1);
        let go_at = Instant::now();
        Self { store, group, consumer, metrics, part, trouble, members, go_at, bell }
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
            self.go_round(&stop).await;
            self.report();
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
        for (stream, newest) in self.group.roster.newest() {
            match self.members.get_mut(&stream) {
                Some(member) if newest > member.newest => {
                    member.newest = newest;
                    member.ward.hear_news();
                }
                Some(_) => {}
                None => {
                    let ward = self.ward(stream.clone());
                    self.members.insert(stream, Member { ward, newest, failure: None });
                }
            }
        }
    }

    fn ward(&self, stream: StreamName) -> Ward {
        let (family, pace) = (self.group.roster.family(), Pace::of_member(self.group.config.claim_idle));
        let spec = self.group.member(stream);
        Ward::new(Arc::clone(&self.store), spec, self.consumer.clone(), &self.metrics, family.name(), pace)
    }

    /// Looks at members that are due, the longest overdue first.
    async fn go_round(&mut self, stop: &CancellationToken) {
        let now = Instant::now();
        if self.go_at <= now {
            self.go_at = now + TICK;
        }
        let mut due: Vec<&mut Member> = self.members.values_mut().filter(|m| m.ward.next_at() <= now).collect();
        due.sort_by_key(|member| member.ward.next_at());
        for (looks, member) in due.into_iter().enumerate() {
            if looks == LOOKS || now.elapsed() >= ROUND || stop.is_cancelled() {
                self.go_at = now;
                break;
            }
            member.failure = match member.ward.step().await {
                // What is no stream has nothing to be guarded; who follows the family tells of it.
                Err(error) if error.kind() == StoreErrorKind::WrongType => None,
                looked => looked.err(),
            };
            match &member.failure {
                None => self.go_at = self.go_at.min(member.ward.next_at()),
                Some(error) => {
                    if let Some(times) = self.trouble.occurred() {
                        let (family, group, kind) =
                            (self.group.roster.family(), &self.group.config.name, error.kind().as_str());
                        warn!(%family, %group, error = %error, kind, times, "cannot guard the group of the family's members");
                    }
                }
            }
        }
    }

    fn report(&mut self) {
        if let Some(error) = self.members.values().find_map(|member| member.failure.as_ref()) {
            return self.part.not_ready(error.to_string());
        }
        self.part.ready();
        if let Some(after) = self.trouble.ended() {
            let (family, group) = (self.group.roster.family(), &self.group.config.name);
            info!(%family, %group, ?after, "guards the group of the family's members again");
        }
    }
}
