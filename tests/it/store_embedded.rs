//! The embedded store: the contract, and what only it promises about files, restarts and damage.

use std::sync::Arc;

use aurora_bus::store::Store;
use aurora_bus::store::embedded::Config;
use bytesize::ByteSize;

use crate::store_contract::{TestStore, contract_tests};
use crate::store_model::{self, Traits};

async fn open() -> TestStore {
    open_with(Config::default()).await
}

async fn open_without_memory() -> TestStore {
    open_with(Config { recent: ByteSize::b(0), ..Config::default() }).await
}

async fn open_with(config: Config) -> TestStore {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config { path: folder.path().join("data"), ..config };
    let store: Arc<dyn Store> = Arc::new(config.open().await.expect("opened"));
    TestStore::new(store, folder)
}

mod contract {
    use super::{contract_tests, open};
    contract_tests!(open);
}

/// The same with nothing in memory, so that every entry is read back from its row.
mod contract_from_disk {
    use super::{contract_tests, open_without_memory};
    contract_tests!(open_without_memory);
}

#[test]
fn random_operations_agree_with_the_model() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    // So little memory that some entries are read from it and some from their rows.
    let config = Config { path: folder.path().to_owned(), recent: ByteSize::kib(40), ..Config::default() };
    let open = async || Arc::new(config.clone().open().await.expect("opened")) as Arc<dyn Store>;
    let store = runtime.block_on(open());
    let reopen = async |store: Arc<dyn Store>| {
        store.close().await;
        open().await
    };
    store_model::check(&runtime, store, reopen, Traits { cases: 150, is_lag_exact: true });
}
