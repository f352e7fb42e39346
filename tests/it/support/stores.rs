//! A store of each kind, and a macro that runs tests on several of them.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use aurora_bus::store::{Store, embedded as file, redis as server};
use bytesize::ByteSize;

use super::cluster::Cluster;
use super::redis::{Product, RedisServer};

/// A store under test, and the values that must live as long as the store.
pub(crate) struct TestStore {
    pub(crate) store: Arc<dyn Store>,
    _keep: Box<dyn Any + Send>,
}

impl TestStore {
    pub(crate) fn new(store: Arc<dyn Store>, keep: impl Any + Send) -> Self {
        Self { store, _keep: Box::new(keep) }
    }
}

/// Opens an embedded store in its own folder.
pub(crate) async fn embedded() -> TestStore {
    in_a_folder(file::Config::default()).await
}

/// Opens an embedded store without a cache, so that every entry is read from its row.
pub(crate) async fn embedded_from_disk() -> TestStore {
    in_a_folder(file::Config { recent: ByteSize::b(0), ..file::Config::default() }).await
}

async fn in_a_folder(config: file::Config) -> TestStore {
    let folder = tempfile::tempdir().expect("a folder");
    let store = small(&folder.path().join("data"), config).open().await.expect("opened");
    TestStore::new(Arc::new(store), folder)
}

/// Returns a configuration with a small disk reserve, so that a test does not write megabytes.
pub(crate) fn small(folder: &Path, mut config: file::Config) -> file::Config {
    folder.clone_into(&mut config.path);
    config.reserve = ByteSize::kib(64);
    config
}

/// Connects to the Redis that the tests share.
pub(crate) async fn redis() -> TestStore {
    on(RedisServer::shared(Product::Redis).await).await
}

/// Connects to the Valkey that the tests share.
pub(crate) async fn valkey() -> TestStore {
    on(RedisServer::shared(Product::Valkey).await).await
}

/// Starts a Redis for one test, and connects to it.
pub(crate) async fn own_redis() -> (RedisServer, Arc<dyn Store>) {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let store = connect(&server.url()).await;
    (server, store)
}

/// Connects to a server, which lives as long as the store.
async fn on(server: Arc<RedisServer>) -> TestStore {
    TestStore::new(connect(&server.url()).await, server)
}

/// Connects to the cluster that the tests share.
pub(crate) async fn cluster() -> TestStore {
    let cluster = Cluster::shared().await;
    TestStore::new(connect(&cluster.url()).await, cluster)
}

pub(crate) async fn connect(url: &str) -> Arc<dyn Store> {
    let config = server::Config { url: url.into(), ..server::Config::default() };
    Arc::new(config.connect().await.expect("a valid configuration"))
}

/// Makes one test per case and store, in a module with the name of the store. A case is an async function that takes
/// the store.
macro_rules! on_stores {
    ($($store:ident)*: $cases:tt) => {
        $(mod $store {
            $crate::support::stores::on_stores!(@$store $cases);
        })*
    };
    (@$store:ident [$($case:ident)*]) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let test = $crate::support::stores::$store().await;
            super::$case(test.store.clone()).await;
        })*
    };
}
pub(crate) use on_stores;
