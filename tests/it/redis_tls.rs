//! Clusters and sentinels over TLS: whose certificates are taken, and that every way to a server is checked.

use std::path::Path;
use std::time::Duration;

use aurora_bus::store::redis::Config;
use aurora_bus::store::{Store, StoreErrorKind};
use serde_json::json;
use tempfile::TempDir;

use crate::store_contract::{new_entry, unique_stream};
use crate::support::app::Home;
use crate::support::cluster::Cluster;
use crate::support::redis::{make_certificates, make_certificates_for};
use crate::support::sentinel::Watched;
use crate::support::until;

/// Long enough for every server to be asked, on a busy machine.
const SOON: Duration = Duration::from_mins(1);
const NAME: &str = "redis.soc.example";

fn folder(make: impl Fn(&Path)) -> TempDir {
    let folder = TempDir::new().expect("a temporary folder");
    make(folder.path());
    folder
}

fn config(url: &str, certificates: &Path) -> Config {
    Config { url: url.into(), ca_file: Some(certificates.join("ca.pem")), ..Config::default() }
}

async fn is_ready(config: Config) -> impl Store {
    let store = config.connect().await.expect("a valid configuration");
    until("ready store", SOON, async || store.check().await.ok()).await;
    store
}

/// What is wrong, in words.
async fn is_refused(config: Config) -> String {
    let store = config.connect().await.expect("a valid configuration");
    let error = store.check().await.expect_err("not to be trusted");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_on_a_cluster_over_tls_follows_every_stream_to_its_node() {
    let certificates = folder(make_certificates);
    let cluster = Cluster::with_tls(certificates.path()).await;
    let streams: Vec<String> = (0..8).map(|n| format!("it:tls-{n}")).collect();
    let declare =
        |name: &String| format!("[[streams]]\nname = \"{name}\"\n[[streams.groups]]\nname = \"g\"\nsink = \"log\"\n");
    let declared = streams.iter().map(declare).collect::<Vec<_>>().concat();
    let home = Home::new(&format!(
        "[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\nca_file = \"{}\"\n[sinks.log]\ntype = \"log\"\n\
         [relay]\nchannels = {{}}\n{declared}",
        cluster.url(),
        certificates.path().join("ca.pem").display(),
    ));
    let daemon = home.start().await;
    let mut nodes = Vec::new();
    for name in &streams {
        let payloads: Vec<String> = (0..20).map(|n| json!({ "n": n }).to_string()).collect();
        daemon.publish(name, &payloads).await.expect("accepted");
        daemon.handled(name, "g").await;
        nodes.push(cluster.nodes_of(name).0);
    }
    nodes.sort_unstable();
    nodes.dedup();
    assert!(nodes.len() > 1, "all streams are on one node");
    daemon.stop().await;

    let stranger = folder(make_certificates);
    let told = is_refused(config(&cluster.url(), stranger.path())).await;
    assert!(told.contains("certificate"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_announce_addresses_may_have_certificates_for_a_name() {
    let certificates = folder(|folder| make_certificates_for(&format!("DNS:{NAME}"), folder));
    let cluster = Cluster::with_tls(certificates.path()).await;
    let told = is_refused(config(&cluster.url(), certificates.path())).await;
    assert!(told.contains("store.redis.tls_server_name"), "{told}");
    let wrong = Config { tls_server_name: Some("other.example".into()), ..config(&cluster.url(), certificates.path()) };
    assert!(is_refused(wrong).await.contains("certificate"));
    let named = Config { tls_server_name: Some(NAME.into()), ..config(&cluster.url(), certificates.path()) };
    let store = is_ready(named).await;
    for _ in 0..8 {
        store.append(&unique_stream(), vec![new_entry("x")]).await.expect("appended");
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_over_tls_name_a_primary_over_tls_before_and_after_a_failover() {
    let certificates = folder(make_certificates);
    let watched = Watched::with_tls(certificates.path()).await;
    let stranger = folder(make_certificates);
    let told = is_refused(config(&watched.url(), stranger.path())).await;
    assert!(told.contains("certificate"), "{told}");
    let store = is_ready(config(&watched.url(), certificates.path())).await;
    watched.fail_over_under(&store).await;
    store.close().await;
}
