//! Members that the server denies to the daemon, beside members that it allows.

use aurora_bus::delivery::{FamilyWorkers, Quarantine};
use aurora_bus::sink::{LogConfig, LogSink};

use super::*;
use crate::support::counted;
use crate::support::redis::RedisServer;

/// The number of denied members, whose names come before the others. More than one pass checks.
const DENIED: usize = 70;

/// Returns a family on a server of its own, which denies all members whose keys begin with `denied`.
async fn partly_denied() -> (RedisServer, FamilySetup) {
    let (server, store) = own_redis().await;
    let setup = FamilySetup::new(store, 15);
    for n in 0..DENIED {
        setup.publish(&format!("denied-{n}"), "kept").await;
    }
    for key in ["served-1", "served-2"] {
        setup.publish(key, "one").await;
    }
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "resetkeys", "~*:served*", "~*keys*"]), "OK");
    (server, setup)
}

impl FamilySetup {
    /// Starts the workers of one daemon for the group, with a sink.
    fn start_workers(&mut self, name: &str) {
        let (store, sink) = (self.store.clone(), Arc::new(LogSink::new("log", &LogConfig::default())));
        let (part, names) = (self.readiness.part(name, None), vec![name.parse().expect("a valid name")]);
        let (group, quarantine, metrics) = (self.spec.clone(), Quarantine::default(), self.metrics.clone());
        let workers = FamilyWorkers::new(store, sink, group, names, quarantine, metrics, part);
        self.tasks.spawn(workers.run(self.stop.clone()));
    }

    fn reason(&self, part: &str) -> Option<String> {
        self.readiness.report().into_iter().find(|report| report.name == part).expect("a part").reason
    }

    /// Waits until the part reports the same member, and keeps reporting it while the server denies more calls.
    async fn stays_not_ready(&self, part: &str) {
        let reported = || self.reason(part).filter(|reason| reason.contains("denied-0"));
        until("report of it", PATIENCE, async || reported()).await;
        let denied = || self.denied();
        let enough = denied() + 2 * DENIED as u64;
        until("more of it", PATIENCE, async || {
            assert!(reported().is_some(), "{:?}", self.reason(part));
            (denied() >= enough).then_some(())
        })
        .await;
    }

    /// Returns the number of denied calls.
    fn denied(&self) -> u64 {
        counted(&self.metrics, "aurora_bus_store_errors_total{kind=\"denied\"")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn family_workers_deliver_entries_of_allowed_members() {
    let (server, mut setup) = partly_denied().await;
    setup.start_workers("soc-a-0");
    let is_handled = async |key: &str| {
        let stream = setup.spec.family_members.family().member(key).expect("a key");
        until(&format!("end of {key}"), PATIENCE, async || {
            setup.group(&stream).await.filter(|group| group.pending == 0 && group.lag == Some(0))
        })
        .await;
    };
    for key in ["served-1", "served-2"] {
        is_handled(key).await;
    }
    setup.stays_not_ready("soc-a-0").await;
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "allkeys"]), "OK");
    for n in 0..DENIED {
        is_handled(&format!("denied-{n}")).await;
    }
    until("ready workers", PATIENCE, async || setup.reason("soc-a-0").is_none().then_some(())).await;
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redeliverer_checks_allowed_members() {
    let (server, mut setup) = partly_denied().await;
    // So long that a pass without failures comes between two searches of one member.
    setup.spec.config.claim_idle = Duration::from_secs(10);
    setup.start_redeliverer("soc-a-guard");
    for key in ["served-1", "served-2"] {
        let stream = setup.spec.family_members.family().member(key).expect("a key");
        assert_eq!(text(&setup.take(&stream, "agent-1").await), b"one");
    }
    setup.stays_not_ready("soc-a-guard").await;
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "allkeys"]), "OK");
    let stream = setup.spec.family_members.family().member("denied-0").expect("a key");
    assert_eq!(text(&setup.take(&stream, "agent-1").await), b"kept");
    until("ready redeliverer", PATIENCE, async || setup.reason("soc-a-guard").is_none().then_some(())).await;
    setup.end().await;
}
