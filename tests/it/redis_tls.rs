//! Clusters and sentinels over TLS: accepted certificates, and the check of every route to a server.

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
use crate::support::sentinel::SentinelGroup;
use crate::support::until;

/// Long enough for a query to every server, on a busy machine.
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

async fn connect_ready(config: Config) -> impl Store {
    let store = config.connect().await.expect("a valid configuration");
    until("ready store", SOON, async || store.check().await.ok()).await;
    store
}

/// Returns the text of the error.
async fn connect_refused(config: Config) -> String {
    let store = config.connect().await.expect("a valid configuration");
    let error = store.check().await.expect_err("not to be trusted");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_on_tls_cluster_reaches_every_node() {
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
    let error = connect_refused(config(&cluster.url(), stranger.path())).await;
    assert!(error.contains("certificate"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cluster_nodes_may_have_certificates_for_a_name() {
    let certificates = folder(|folder| make_certificates_for(&format!("DNS:{NAME}"), folder));
    let cluster = Cluster::with_tls(certificates.path()).await;
    let error = connect_refused(config(&cluster.url(), certificates.path())).await;
    assert!(error.contains("store.redis.tls_server_name"), "{error}");
    let wrong = Config { tls_server_name: Some("other.example".into()), ..config(&cluster.url(), certificates.path()) };
    assert!(connect_refused(wrong).await.contains("certificate"));
    let named = Config { tls_server_name: Some(NAME.into()), ..config(&cluster.url(), certificates.path()) };
    let store = connect_ready(named).await;
    for _ in 0..8 {
        store.append(&unique_stream(), vec![new_entry("x")]).await.expect("appended");
    }
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_sentinels_name_tls_primary_across_failover() {
    let certificates = folder(make_certificates);
    let watched = SentinelGroup::with_tls(certificates.path()).await;
    let stranger = folder(make_certificates);
    let error = connect_refused(config(&watched.url(), stranger.path())).await;
    assert!(error.contains("certificate"), "{error}");
    let store = connect_ready(config(&watched.url(), certificates.path())).await;
    watched.fail_over_under(&store).await;
    store.close().await;
}
