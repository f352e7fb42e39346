//! The daemon: builds the parts, runs them and stops them in order.

mod groups;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::groups::{GroupDeps, Groups};
use crate::bus::{Bus, StreamCatalog, StreamSettings};
use crate::config::{Backend, Config, InvalidConfig, StreamConfig};
use crate::dead_letters::{DeadLetterRetention, DeadLetterSource, DeadLetters};
use crate::delivery::Quarantine;
use crate::http::{self, Api, Authenticator, CertificateValidity, Services, Tls, TlsError};
use crate::maintenance::{FamilySpec, Scheduler, StreamSpec};
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::relay::Relay;
use crate::sink::{self, Sink};
use crate::store::{Families, HardLimits, MeteredStore, Store, StoreError, StoreErrorKind, StoreStatus};
use crate::validate::ConfigProblem;

/// Interval between two checks of the store.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Timeout of a check of the store.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without a report after which a part counts as stuck.
const STALE_AFTER: Duration = Duration::from_secs(20);
/// Time that a sink or the store may take to close. A disk that hangs must not hold the process.
const CLOSE_GRACE: Duration = Duration::from_secs(10);
/// Time that pending requests get after everything else has ended.
const HTTP_GRACE: Duration = Duration::from_secs(5);

/// A daemon that is built and bound, and not running yet.
#[derive(Debug)]
pub struct App {
    listener: TcpListener,
    address: SocketAddr,
    grace: Duration,
    store: Arc<dyn Store>,
    sinks: BTreeMap<String, Arc<dyn Sink>>,
    checks: Vec<sink::StartCheck>,
    families: (Families, Vec<Part>),
    groups: Groups,
    maintenance: Scheduler,
    dead_letters: (DeadLetterRetention, Part),
    relay: Relay,
    api: Api,
    store_part: Part,
    tls: Option<(Tls, Part)>,
    metrics: Metrics,
}

impl App {
    /// Binds the listener, opens the store and the sinks, and connects the parts. Starts nothing.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let readiness = Readiness::default();

        let authenticator = open_authenticator(&config)?;
        let tls = config.http.tls.as_ref().map(Tls::open).transpose().map_err(in_tls)?;
        let tls = tls.map(|tls| (tls, readiness.part("certificate", None)));
        let listen = config.http.listen;
        let listener = TcpListener::bind(listen).await.with_context(|| {
            format!("cannot listen on {listen} (http.listen): another daemon or program may use the port")
        })?;
        let address = listener.local_addr().context("cannot read the listener's address")?;
        let families = families_of(&config);
        let limits = limits_of(&config, &families);
        let store = MeteredStore::new(open_store(&config).await?, metrics.clone()).with_families(families.clone());
        let store: Arc<dyn Store> = Arc::new(store);
        refuse_unsuitable(store.as_ref(), &config).await?;
        let bus = open_bus(&config, Arc::clone(&store), &families, limits.clone(), metrics.clone());
        let sinks = open_sinks(&config, &bus).await?;

        let specs: Vec<StreamSpec> = config.streams.iter().filter_map(spec_of).collect();
        let family_specs: Vec<FamilySpec> =
            config.streams.iter().filter_map(|s| family_spec_of(s, &families)).collect();
        let relayed = config.relayed();
        let relay =
            Relay::new(Arc::clone(&store), config.relay.clone(), &relayed, &families, metrics.clone(), &readiness);
        let maintenance = Scheduler::new(Arc::clone(&store), specs, limits, metrics.clone(), &readiness).with_families(
            family_specs,
            &metrics,
            &readiness,
        );

        let sinks = metered(sinks, &metrics);
        let checks = sinks.iter().map(|(name, sink)| {
            sink::StartCheck::new(name.clone(), Arc::clone(sink), readiness.part(&format!("sink {name}"), None))
        });
        let checks = checks.collect();
        let sources = config.streams.iter().map(|stream| DeadLetterSource {
            stream: stream.name.clone(),
            dead_letter: stream.dead_letter(),
            groups: stream.groups.iter().map(|group| group.name.clone()).collect(),
        });
        let (dead_letters, instance) = (config.dead_letters.clone(), config.instance.clone());
        let dead_letters = DeadLetters::new(
            Arc::clone(&store),
            bus.clone(),
            dead_letters,
            sources.collect(),
            instance,
            metrics.clone(),
        );
        let dead_letter_retention = (dead_letters.retention(), readiness.part("dead letters", None));

        let quarantine = Quarantine::default();
        let deps = GroupDeps {
            store: &store,
            sinks: &sinks,
            families: &families,
            quarantine: &quarantine,
            metrics: &metrics,
            readiness: &readiness,
        };
        let groups = Groups::build(&config, deps)?;
        let maintenance = maintenance.with_own_consumers(groups.own_consumers().clone());
        let family_parts = families.parts(&readiness);
        let store_part = readiness.part("store", Some(STALE_AFTER));
        let services = Services {
            authenticator,
            bus,
            dead_letters,
            pull: groups.pull().clone(),
            store: Arc::clone(&store),
            relay: relay.clone(),
            metrics: metrics.clone(),
            readiness,
        };
        let api = Api::new(config.http, services);
        let grace = config.shutdown.grace;
        Ok(Self {
            listener,
            address,
            grace,
            store,
            sinks,
            checks,
            families: (families, family_parts),
            groups,
            maintenance,
            dead_letters: dead_letter_retention,
            relay,
            api,
            store_part,
            tls,
            metrics,
        })
    }

    /// Returns the address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the served certificates, if TLS is configured.
    pub fn tls(&self) -> Option<Tls> {
        self.tls.as_ref().map(|(tls, _)| tls.clone())
    }

    /// Runs until `stop`, then ends in order. The daemon becomes not ready, workers and dashboards finish, requests
    /// finish, and the store closes. Fails if a part ends early or the grace was too short.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let work = CancellationToken::new();
        let serving = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (families, family_parts) = self.families;
        let store = Arc::clone(&self.store);
        tasks.spawn(named("families", families.run(store, family_parts, work.clone())));
        self.groups.spawn(&mut tasks, &work);
        for check in self.checks {
            tasks.spawn(named("sink check", check.run(work.clone())));
        }
        tasks.spawn(named("maintenance", self.maintenance.run(work.clone())));
        let (dead_letter_retention, dead_letter_part) = self.dead_letters;
        tasks.spawn(named("dead-letter retention", dead_letter_retention.run(dead_letter_part, work.clone())));
        let relay = self.relay.clone();
        let relay_stop = work.clone();
        tasks.spawn(named("relay", async move { relay.run(relay_stop).await }));
        tasks.spawn(named("store watch", watch_store(Arc::clone(&self.store), self.store_part, work.clone())));
        let mut server = JoinSet::new();
        let tls = self.tls.as_ref().map(|(tls, _)| tls.clone());
        let scheme = if tls.is_some() { "https" } else { "http" };
        if let Some((tls, part)) = self.tls {
            tasks.spawn(named("certificate watch", tls.watch(part, self.metrics, work.clone())));
        }
        server.spawn(http::serve(self.listener, tls, self.api.clone(), serving.clone()));
        tracing::info!("listening on {scheme}://{}", self.address);

        let failure = tokio::select! {
            () = stop.cancelled() => None,
            ended = tasks.join_next() => Some(why_ended(ended)),
            _ = server.join_next() => Some("the HTTP server ended unexpectedly".to_owned()),
        };
        if let Some(failure) = &failure {
            tracing::error!(error = failure, "daemon failed, stopping");
        }

        self.api.drain();
        work.cancel();
        let drained = tokio::time::timeout(self.grace, async {
            while tasks.join_next().await.is_some() {}
            self.api.sessions_ended().await;
        });
        let is_late = drained.await.is_err();
        if is_late {
            tracing::warn!(
                grace_seconds = self.grace.as_secs(),
                "tasks did not finish within the grace, aborting them"
            );
            tasks.abort_all();
        }
        serving.cancel();
        let http_ended = tokio::time::timeout(HTTP_GRACE, async { while server.join_next().await.is_some() {} }).await;
        if http_ended.is_err() {
            tracing::warn!("requests did not finish in time");
        }
        for (name, sink) in &self.sinks {
            if tokio::time::timeout(CLOSE_GRACE, sink.close()).await.is_err() {
                tracing::warn!(sink = name, "sink did not close in time");
            }
        }
        if tokio::time::timeout(CLOSE_GRACE, self.store.close()).await.is_err() {
            tracing::warn!("store did not close in time");
        }
        tracing::info!("stopped");
        match failure {
            Some(failure) => bail!("{failure}"),
            None => Ok(()),
        }
    }
}

/// Opens everything that `serve` opens, checks each part, and closes it again.
pub async fn check(config: &Config) -> anyhow::Result<StoreStatus> {
    let authenticator = open_authenticator(config)?;
    authenticator.check().await.map_err(in_auth)?;
    let store = open_store(config).await?;
    let status = tokio::time::timeout(CHECK_TIMEOUT, async {
        loop {
            match store.check().await {
                // A connection may still be in progress, which is not a failure yet.
                Err(error) if error.kind() == StoreErrorKind::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                other => return other,
            }
        }
    });
    let status = match status.await {
        Ok(status) => status,
        Err(_) => store.check().await,
    };
    let status = status.context("the store is not usable");
    let checked = match status {
        Ok(status) => check_parts(config, &store).await.map(|()| status),
        Err(error) => Err(error),
    };
    store.close().await;
    checked
}

async fn check_parts(config: &Config, store: &Arc<dyn Store>) -> anyhow::Result<()> {
    refuse_unsuitable(store.as_ref(), config).await?;
    let bus = open_bus(config, Arc::clone(store), &Families::default(), HardLimits::default(), Metrics::new());
    for (name, sink) in open_sinks(config, &bus).await? {
        sink.check().await.with_context(|| format!("sink `{name}` cannot take entries"))?;
    }
    Ok(())
}

fn spec_of(stream: &StreamConfig) -> Option<StreamSpec> {
    let name = stream.name.stream()?.clone();
    Some(StreamSpec { name, retention: stream.retention, groups: stream.groups.clone() })
}

fn family_spec_of(stream: &StreamConfig, families: &Families) -> Option<FamilySpec> {
    let family_members = Arc::clone(families.named(stream.name.family()?.name())?);
    Some(FamilySpec { family_members, retention: stream.retention, groups: stream.groups.clone() })
}

fn families_of(config: &Config) -> Families {
    let family = |stream: &StreamConfig| Some((stream.name.family()?.clone(), stream.max_keys()));
    Families::new(config.streams.iter().filter_map(family))
}

fn limits_of(config: &Config, families: &Families) -> HardLimits {
    let fixed = |stream: &StreamConfig| Some((stream.name.stream()?.clone(), stream.retention.publish_limit()?));
    let of_family = |stream: &StreamConfig| Some((stream.name.family()?.clone(), stream.retention.publish_limit()?));
    HardLimits::new(config.streams.iter().filter_map(fixed))
        .with_families(families.clone(), config.streams.iter().filter_map(of_family))
}

fn open_bus(config: &Config, store: Arc<dyn Store>, families: &Families, limits: HardLimits, metrics: Metrics) -> Bus {
    let terms = |stream: &StreamConfig| StreamSettings {
        dead_letter: stream.dead_letter(),
        durability: stream.durability,
        groups: stream.groups.iter().map(|group| (group.name.clone(), group.consumption())).collect(),
        abandoned_after: Some(stream.retention.abandoned_after),
    };
    let declared = config.streams.iter().map(|stream| (stream.name.clone(), terms(stream)));
    let catalogue = StreamCatalog::new(families.clone(), declared);
    Bus::new(store, config.publish.clone(), catalogue, limits, metrics)
}

/// Fails if the store would lose entries, or cannot have the durability of a stream. An unreachable store is accepted:
/// it is checked again later.
async fn refuse_unsuitable(store: &dyn Store, config: &Config) -> anyhow::Result<()> {
    let is_final =
        |error: &StoreError| matches!(error.kind(), StoreErrorKind::Unsuitable | StoreErrorKind::Unsupported);
    match tokio::time::timeout(CHECK_TIMEOUT, store.check()).await {
        Ok(Err(error)) if is_final(&error) => return Err(error).context("the store is not usable"),
        Ok(Ok(_)) => {}
        Ok(Err(_)) | Err(_) => return Ok(()),
    }
    for stream in &config.streams {
        match tokio::time::timeout(CHECK_TIMEOUT, store.check_durability(stream.durability)).await {
            Ok(Err(error)) if is_final(&error) => {
                let name = &stream.name;
                return Err(error).with_context(|| format!("the store is not usable for stream `{name}`"));
            }
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

/// Reads the files that `auth` names.
fn open_authenticator(config: &Config) -> Result<Authenticator, InvalidConfig> {
    let opened = Authenticator::open(&config.auth, config.http.listen.ip().is_loopback());
    opened.map_err(|problems| InvalidConfig(problems.into_iter().flat_map(|problem| in_auth(problem).0).collect()))
}

fn in_auth((key, message): (String, String)) -> InvalidConfig {
    InvalidConfig(vec![ConfigProblem::new(format!("auth.{key}"), message)])
}

/// Reads and checks the files that `auth` and `http.tls` name. Returns the validity of the certificate.
pub fn check_files(config: &Config) -> Result<Option<CertificateValidity>, InvalidConfig> {
    let tls = config.http.tls.as_ref().map(http::TlsConfig::check).transpose().map_err(in_tls);
    match (open_authenticator(config), tls) {
        (Ok(_), tls) => tls,
        (Err(access), Ok(_)) => Err(access),
        (Err(access), Err(tls)) => Err(InvalidConfig([access.0, tls.0].concat())),
    }
}

fn in_tls((key, message): TlsError) -> InvalidConfig {
    InvalidConfig(vec![ConfigProblem::new(format!("http.tls.{key}"), message)])
}

async fn open_store(config: &Config) -> anyhow::Result<Arc<dyn Store>> {
    Ok(match config.store.backend {
        Backend::Embedded => {
            let embedded = config.store.embedded.clone();
            Arc::new(embedded.open().await.context("cannot open the embedded store (store.embedded.path)")?)
        }
        Backend::Redis => {
            let redis = config.store.redis.clone();
            Arc::new(redis.connect().await.context("cannot use the Redis store (store.redis)")?)
        }
    })
}

/// Opens the sinks that groups use. Sinks that forward publish through the bus.
async fn open_sinks(config: &Config, bus: &Bus) -> anyhow::Result<BTreeMap<String, Arc<dyn Sink>>> {
    let groups = config.streams.iter().flat_map(|stream| &stream.groups);
    let used: std::collections::BTreeSet<&String> = groups.filter_map(|group| group.sink.as_ref()).collect();
    let mut sinks = BTreeMap::new();
    for name in used {
        let sink = config.sinks.get(name).with_context(|| format!("there is no sink `{name}`"))?;
        let built = sink
            .clone()
            .build(name, Arc::new(bus.clone()))
            .await
            .with_context(|| format!("cannot open sink `{name}`"))?;
        sinks.insert(name.clone(), built);
    }
    Ok(sinks)
}

/// Wraps every sink so that its calls are counted.
fn metered(sinks: BTreeMap<String, Arc<dyn Sink>>, metrics: &Metrics) -> BTreeMap<String, Arc<dyn Sink>> {
    let metered = |(name, sink): (String, Arc<dyn Sink>)| {
        let metered: Arc<dyn Sink> = Arc::new(sink::MeteredSink::new(&name, sink, metrics));
        (name, metered)
    };
    sinks.into_iter().map(metered).collect()
}

/// Runs a task and returns its name when it ends.
async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

fn why_ended(ended: Option<Result<&'static str, tokio::task::JoinError>>) -> String {
    match ended {
        Some(Ok(name)) => format!("the task `{name}` ended unexpectedly"),
        Some(Err(error)) => format!("an essential task failed: {error}"),
        None => "no task is left".to_owned(),
    }
}

/// Checks the store at intervals, and reports changes to readiness and to the log.
async fn watch_store(store: Arc<dyn Store>, part: Part, stop: CancellationToken) {
    let mut known: Option<Result<StoreStatus, String>> = None;
    loop {
        let checked = match tokio::time::timeout(CHECK_TIMEOUT, store.check()).await {
            // Measured values change with each check. Metrics report them.
            Ok(checked) => checked
                .map(|status| StoreStatus { clock_ahead_ms: None, evicted_keys: None, ..status })
                .map_err(|error| error.to_string()),
            Err(_) => Err("the store does not respond".to_owned()),
        };
        match &checked {
            Ok(_) => part.ready(),
            Err(reason) => part.not_ready(reason),
        }
        if known.as_ref() != Some(&checked) {
            log_store(&checked, known.is_some());
            known = Some(checked);
        }
        tokio::select! {
            () = tokio::time::sleep(CHECK_INTERVAL) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn log_store(checked: &Result<StoreStatus, String>, is_change: bool) {
    match checked {
        Ok(status) => {
            let message = if is_change { "store available again" } else { "store available" };
            tracing::info!(store = status.description, "{message}");
            for warning in &status.warnings {
                tracing::warn!(store = status.description, "{warning}");
            }
        }
        Err(reason) => tracing::error!(error = reason, "store unavailable, trying again"),
    }
}
