//! Workers on the embedded store.

use std::sync::Arc;

use aurora_bus::store::embedded::Config;

use crate::store_contract::TestStore;

async fn open() -> TestStore {
    let folder = tempfile::TempDir::new().expect("a temporary folder");
    let config = Config { path: folder.path().to_owned(), ..Config::default() };
    TestStore::new(Arc::new(config.open().await.expect("a fresh folder")), folder)
}

super::delivery_tests!(open);
super::names::name_tests!(open);
super::ordering::ordering_tests!(open);
