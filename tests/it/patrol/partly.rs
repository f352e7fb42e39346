//! Members that the server does not let the daemon look at, and the others beside them.

use aurora_bus::delivery::{Crew, Quarantine};
use aurora_bus::sink::{LogConfig, LogSink};

use super::*;
use crate::support::counted;
use crate::support::redis::RedisServer;

/// Members that the server denies, before the others by name: more than are looked at in one round.
const DENIED: usize = 70;

/// A family on a server of its own, of whose members those whose keys begin with `denied` are denied.
async fn partly_denied() -> (RedisServer, Guarded) {
    let (server, store) = own_redis().await;
    let guarded = Guarded::new(store, 15);
    for n in 0..DENIED {
        guarded.publish(&format!("denied-{n}"), "kept").await;
    }
    for key in ["served-1", "served-2"] {
        guarded.publish(key, "one").await;
    }
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "resetkeys", "~*:served*", "~*keys*"]), "OK");
    (server, guarded)
}

impl Guarded {
    /// Starts a crew, as each daemon has one for a group with a sink.
    fn crew(&mut self, name: &str) {
        let (store, sink) = (self.store.clone(), Arc::new(LogSink::new("log", &LogConfig::default())));
        let (part, names) = (self.readiness.part(name, None), vec![name.parse().expect("a valid name")]);
        let (group, quarantine, metrics) = (self.spec.clone(), Quarantine::default(), self.metrics.clone());
        let crew = Crew::new(store, sink, group, names, quarantine, metrics, part);
        self.tasks.spawn(crew.run(self.stop.clone()));
    }

    fn reason(&self, part: &str) -> Option<String> {
        self.readiness.report().into_iter().find(|report| report.name == part).expect("a part").reason
    }

    /// Waits until the part tells of the same member, and goes on to do so while the server denies more and more.
    async fn tells_and_goes_on_telling(&self, part: &str) {
        let told = || self.reason(part).filter(|reason| reason.contains("denied-0"));
        until("word of it", PATIENCE, async || told()).await;
        let denied = || self.denied();
        let enough = denied() + 2 * DENIED as u64;
        until("more of it", PATIENCE, async || {
            assert!(told().is_some(), "{:?}", self.reason(part));
            (denied() >= enough).then_some(())
        })
        .await;
    }

    /// How often the server has denied something.
    fn denied(&self) -> u64 {
        counted(&self.metrics, "aurora_bus_store_errors_total{kind=\"denied\"")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_deliver_what_there_is_at_the_members_that_they_can_look_at() {
    let (server, mut guarded) = partly_denied().await;
    guarded.crew("soc-a-0");
    let is_handled = async |key: &str| {
        let stream = guarded.spec.roster.family().member(key).expect("a key");
        until(&format!("end of {key}"), PATIENCE, async || {
            guarded.group(&stream).await.filter(|group| group.pending == 0 && group.lag == Some(0))
        })
        .await;
    };
    for key in ["served-1", "served-2"] {
        is_handled(key).await;
    }
    guarded.tells_and_goes_on_telling("soc-a-0").await;
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "allkeys"]), "OK");
    for n in 0..DENIED {
        is_handled(&format!("denied-{n}")).await;
    }
    until("ready crew", PATIENCE, async || guarded.reason("soc-a-0").is_none().then_some(())).await;
    guarded.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_patrol_guards_the_members_that_it_can_look_at() {
    let (server, mut guarded) = partly_denied().await;
    // So long that a round in which nothing fails comes between two searches of one member.
    guarded.spec.config.claim_idle = Duration::from_secs(10);
    guarded.patrol("soc-a-guard");
    for key in ["served-1", "served-2"] {
        let stream = guarded.spec.roster.family().member(key).expect("a key");
        assert_eq!(text(&guarded.take(&stream, "agent-1").await), b"one");
    }
    guarded.tells_and_goes_on_telling("soc-a-guard").await;
    assert_eq!(server.cli(&["ACL", "SETUSER", "default", "allkeys"]), "OK");
    let stream = guarded.spec.roster.family().member("denied-0").expect("a key");
    assert_eq!(text(&guarded.take(&stream, "agent-1").await), b"kept");
    until("ready patrol", PATIENCE, async || guarded.reason("soc-a-guard").is_none().then_some(())).await;
    guarded.end().await;
}
