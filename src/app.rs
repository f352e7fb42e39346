//! The daemon, put together: what is built from what, what runs, and how it ends.

mod groups;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::groups::{Groups, Means};
use crate::bus::{Bus, Catalogue, Terms};
use crate::config::{Backend, Config, InvalidConfig, Problem, StreamConfig};
use crate::dead_letters::{DeadLetters, Keeper, Source};
use crate::delivery::Quarantine;
use crate::http::{self, Api, Authenticator, CertificateValidity, Services, Tls, TlsError};
use crate::maintenance::{FamilySpec, Janitor, Sampler, StreamSpec};
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::relay::Relay;
use crate::sink::{self, Sink};
use crate::store::{Families, Limits, Metered, Store, StoreError, StoreErrorKind, StoreStatus};

/// How often the store is asked whether it can do its work.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// How long the store may take to answer that.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// After how long without a word a part counts as stuck.
const STALE_AFTER: Duration = Duration::from_secs(20);
/// How long a sink or the store may take to close: a disk that hangs must not hold the process.
const CLOSE_GRACE: Duration = Duration::from_secs(10);
/// How long requests under way may take once everything else has ended.
const HTTP_GRACE: Duration = Duration::from_secs(5);

/// A daemon that is built, bound and not yet running.
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
    janitor: Janitor,
    sampler: Sampler,
    dead_letters: (Keeper, Part),
    relay: Relay,
    api: Api,
    store_part: Part,
    tls: Option<(Tls, Part)>,
    metrics: Metrics,
}

impl App {
    /// Binds the listener, opens the store and the sinks, and wires the parts. Nothing runs yet.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let metrics = Metrics::new();
        metrics.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let readiness = Readiness::default();

        let authenticator = open_authenticator(&config)?;
        let tls = config.http.tls.as_ref().map(Tls::open).transpose().map_err(in_tls)?;
        let tls = tls.map(|tls| (tls, readiness.part("certificate", None)));
        let listen = config.http.listen;
        let listener = TcpListener::bind(listen).await.with_context(|| {
            format!("cannot listen on {listen} (http.listen): is another daemon running, or the port taken?")
        })?;
        let address = listener.local_addr().context("cannot read the listener's address")?;
        let families = families_of(&config);
        let limits = limits_of(&config, &families);
        let store = Metered::new(open_store(&config).await?, metrics.clone()).with_families(families.clone());
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
        let sampler = Sampler::new(Arc::clone(&store), specs.clone(), metrics.clone(), &readiness)
            .with_families(family_specs.clone(), &readiness);
        let janitor =
            Janitor::new(Arc::clone(&store), specs, limits, metrics.clone()).with_families(family_specs.clone());

        let sinks = metered(sinks, &metrics);
        let checks = sinks.iter().map(|(name, sink)| {
            sink::StartCheck::new(name.clone(), Arc::clone(sink), readiness.part(&format!("sink {name}"), None))
        });
        let checks = checks.collect();
        let sources = config.streams.iter().map(|stream| Source {
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
        let keeper = (dead_letters.keeper(), readiness.part("dead letters", None));

        let quarantine = Quarantine::default();
        let means = Means {
            store: &store,
            sinks: &sinks,
            families: &families,
            quarantine: &quarantine,
            metrics: &metrics,
            readiness: &readiness,
        };
        let groups = Groups::build(&config, family_specs, means)?;
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
            janitor,
            sampler,
            dead_letters: keeper,
            relay,
            api,
            store_part,
            tls,
            metrics,
        })
    }

    /// The address the daemon listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificates that are shown, where TLS is spoken.
    pub fn tls(&self) -> Option<Tls> {
        self.tls.as_ref().map(|(tls, _)| tls.clone())
    }

    /// Runs until `stop`, then ends in order: no longer ready, workers and dashboards finish, requests finish, the
    /// store is closed. Fails when a part ends that should not, or when the grace was too short.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let work = CancellationToken::new();
        let serving = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (families, family_parts) = self.families;
        let store = Arc::clone(&self.store);
        tasks.spawn(named("families", families.run(store, family_parts, work.clone())));
        self.groups.spawn(&mut tasks, &work);
        for check in self.checks {
            tasks.spawn(named("check of a sink", check.run(work.clone())));
        }
        tasks.spawn(named("janitor", self.janitor.run(work.clone())));
        tasks.spawn(named("sampler", self.sampler.run(work.clone())));
        let (keeper, keeper_part) = self.dead_letters;
        tasks.spawn(named("keeper of dead letters", keeper.run(keeper_part, work.clone())));
        let relay = self.relay.clone();
        let relay_stop = work.clone();
        tasks.spawn(named("relay", async move { relay.run(relay_stop).await }));
        tasks.spawn(named("store watch", watch_store(Arc::clone(&self.store), self.store_part, work.clone())));
        let mut server = JoinSet::new();
        let tls = self.tls.as_ref().map(|(tls, _)| tls.clone());
        let scheme = if tls.is_some() { "https" } else { "http" };
        if let Some((tls, part)) = self.tls {
            tasks.spawn(named("watch of certificates", tls.watch(part, self.metrics, work.clone())));
        }
        server.spawn(http::serve(self.listener, tls, self.api.clone(), serving.clone()));
        tracing::info!("listening on {scheme}://{}", self.address);

        let failure = tokio::select! {
            () = stop.cancelled() => None,
            ended = tasks.join_next() => Some(why_ended(ended)),
            _ = server.join_next() => Some("the HTTP server ended by itself".to_owned()),
        };
        if let Some(failure) = &failure {
            tracing::error!(error = failure, "stopping");
        }

        self.api.drain();
        work.cancel();
        let drained = tokio::time::timeout(self.grace, async {
            while tasks.join_next().await.is_some() {}
            self.api.sessions_ended().await;
        });
        let is_late = drained.await.is_err();
        if is_late {
            tracing::warn!(grace_seconds = self.grace.as_secs(), "work under way did not end in time; it is abandoned");
            tasks.abort_all();
        }
        serving.cancel();
        let http_ended = tokio::time::timeout(HTTP_GRACE, async { while server.join_next().await.is_some() {} }).await;
        if http_ended.is_err() {
            tracing::warn!("requests under way did not end in time");
        }
        for (name, sink) in &self.sinks {
            if tokio::time::timeout(CLOSE_GRACE, sink.close()).await.is_err() {
                tracing::warn!(sink = name, "the sink did not close in time");
            }
        }
        if tokio::time::timeout(CLOSE_GRACE, self.store.close()).await.is_err() {
            tracing::warn!("the store did not close in time");
        }
        tracing::info!("stopped");
        match failure {
            Some(failure) => bail!("{failure}"),
            None => Ok(()),
        }
    }
}

/// Opens what `serve` would open, asks each part whether it can work, and lets go of it again.
pub async fn check(config: &Config) -> anyhow::Result<StoreStatus> {
    let access = open_authenticator(config)?;
    access.check().await.map_err(in_auth)?;
    let store = open_store(config).await?;
    let status = tokio::time::timeout(CHECK_TIMEOUT, async {
        loop {
            match store.check().await {
                // A connection that is still being made is no failure yet.
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
    let status = status.context("the store can't do its work");
    let checked = match status {
        Ok(status) => check_parts(config, &store).await.map(|()| status),
        Err(error) => Err(error),
    };
    store.close().await;
    checked
}

async fn check_parts(config: &Config, store: &Arc<dyn Store>) -> anyhow::Result<()> {
    refuse_unsuitable(store.as_ref(), config).await?;
    let bus = open_bus(config, Arc::clone(store), &Families::default(), Limits::default(), Metrics::new());
    for (name, sink) in open_sinks(config, &bus).await? {
        sink.check().await.with_context(|| format!("the sink `{name}` can't take entries"))?;
    }
    Ok(())
}

fn spec_of(stream: &StreamConfig) -> Option<StreamSpec> {
    let name = stream.name.stream()?.clone();
    Some(StreamSpec { name, retention: stream.retention, groups: stream.groups.clone() })
}

fn family_spec_of(stream: &StreamConfig, families: &Families) -> Option<FamilySpec> {
    let roster = Arc::clone(families.named(stream.name.family()?.name())?);
    Some(FamilySpec { roster, retention: stream.retention, groups: stream.groups.clone() })
}

fn families_of(config: &Config) -> Families {
    let family = |stream: &StreamConfig| Some((stream.name.family()?.clone(), stream.max_keys()));
    Families::new(config.streams.iter().filter_map(family))
}

fn limits_of(config: &Config, families: &Families) -> Limits {
    let fixed = |stream: &StreamConfig| Some((stream.name.stream()?.clone(), stream.retention.publish_limit()?));
    let of_family = |stream: &StreamConfig| Some((stream.name.family()?.clone(), stream.retention.publish_limit()?));
    Limits::new(config.streams.iter().filter_map(fixed))
        .with_families(families.clone(), config.streams.iter().filter_map(of_family))
}

fn open_bus(config: &Config, store: Arc<dyn Store>, families: &Families, limits: Limits, metrics: Metrics) -> Bus {
    let terms = |stream: &StreamConfig| Terms {
        dead_letter: stream.dead_letter(),
        durability: stream.durability,
        groups: stream.groups.iter().map(|group| (group.name.clone(), group.consumption())).collect(),
        abandoned_after: Some(stream.retention.abandoned_after),
    };
    let declared = config.streams.iter().map(|stream| (stream.name.clone(), terms(stream)));
    let catalogue = Catalogue::new(families.clone(), declared);
    Bus::new(store, config.publish.clone(), catalogue, limits, metrics)
}

/// Fails where the store would lose what it is given, or can't be as durable as a stream wants. One that can't be
/// reached yet is asked again once it can.
async fn refuse_unsuitable(store: &dyn Store, config: &Config) -> anyhow::Result<()> {
    let is_final =
        |error: &StoreError| matches!(error.kind(), StoreErrorKind::Unsuitable | StoreErrorKind::Unsupported);
    match tokio::time::timeout(CHECK_TIMEOUT, store.check()).await {
        Ok(Err(error)) if is_final(&error) => return Err(error).context("the store can't be used"),
        Ok(Ok(_)) => {}
        Ok(Err(_)) | Err(_) => return Ok(()),
    }
    for stream in &config.streams {
        match tokio::time::timeout(CHECK_TIMEOUT, store.check_durability(stream.durability)).await {
            Ok(Err(error)) if is_final(&error) => {
                let name = &stream.name;
                return Err(error).with_context(|| format!("the store can't be used for stream `{name}`"));
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
    InvalidConfig(vec![Problem::new(format!("auth.{key}"), message)])
}

/// Reads the files that `auth` and `http.tls` name, checks that they make sense and fit each other, and tells how long the
/// certificate is valid.
pub fn check_files(config: &Config) -> Result<Option<CertificateValidity>, InvalidConfig> {
    let tls = config.http.tls.as_ref().map(http::TlsConfig::check).transpose().map_err(in_tls);
    match (open_authenticator(config), tls) {
        (Ok(_), tls) => tls,
        (Err(access), Ok(_)) => Err(access),
        (Err(access), Err(tls)) => Err(InvalidConfig([access.0, tls.0].concat())),
    }
}

fn in_tls((key, message): TlsError) -> InvalidConfig {
    InvalidConfig(vec![Problem::new(format!("http.tls.{key}"), message)])
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

/// Opens the sinks that a group names; what they forward goes through the bus.
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
            .with_context(|| format!("cannot open the sink `{name}`"))?;
        sinks.insert(name.clone(), built);
    }
    Ok(sinks)
}

/// Gives every sink the same metrics.
fn metered(sinks: BTreeMap<String, Arc<dyn Sink>>, metrics: &Metrics) -> BTreeMap<String, Arc<dyn Sink>> {
    let metered = |(name, sink): (String, Arc<dyn Sink>)| {
        let metered: Arc<dyn Sink> = Arc::new(sink::Metered::new(&name, sink, metrics));
        (name, metered)
    };
    sinks.into_iter().map(metered).collect()
}

/// Gives a task's end its name.
async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

fn why_ended(ended: Option<Result<&'static str, tokio::task::JoinError>>) -> String {
    match ended {
        Some(Ok(name)) => format!("the {name} ended by itself"),
        Some(Err(error)) => format!("an essential task failed: {error}"),
        None => "nothing is left to run".to_owned(),
    }
}

/// Asks the store again and again whether it can do its work, and tells readiness and the log.
async fn watch_store(store: Arc<dyn Store>, part: Part, stop: CancellationToken) {
    let mut known: Option<Result<StoreStatus, String>> = None;
    loop {
        let checked = match tokio::time::timeout(CHECK_TIMEOUT, store.check()).await {
            // What is measured changes all the time, and is told by metrics.
            Ok(checked) => checked
                .map(|status| StoreStatus { clock_ahead_ms: None, evicted_keys: None, ..status })
                .map_err(|error| error.to_string()),
            Err(_) => Err("the store does not answer".to_owned()),
        };
        match &checked {
            Ok(_) => part.ready(),
            Err(reason) => part.not_ready(reason),
        }
        if known.as_ref() != Some(&checked) {
            tell_store(&checked, known.is_some());
            known = Some(checked);
        }
        tokio::select! {
            () = tokio::time::sleep(CHECK_EVERY) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn tell_store(checked: &Result<StoreStatus, String>, is_change: bool) {
    match checked {
        Ok(status) => {
            let message = if is_change { "the store can work again" } else { "the store can work" };
            tracing::info!(store = status.description, "{message}");
            for warning in &status.warnings {
                tracing::warn!(store = status.description, "{warning}");
            }
        }
        Err(reason) => tracing::error!(error = reason, "the store can't do its work; trying again"),
    }
}
