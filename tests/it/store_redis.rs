//! The store's contract on Redis and on Valkey.

use std::sync::Arc;

use aurora_bus::store::redis::Config;

use crate::store_contract::TestStore;
use crate::support::redis::{Product, RedisServer};

async fn open(product: Product) -> TestStore {
    let server = RedisServer::shared(product).await;
    let config = Config { url: server.url().into(), ..Config::default() };
    let store = config.connect().await.expect("a valid configuration");
    TestStore::new(Arc::new(store), server)
}

mod redis {
    async fn open() -> crate::store_contract::TestStore {
        super::open(super::Product::Redis).await
    }

    crate::store_contract::contract_tests!(open);
}

mod valkey {
    async fn open() -> crate::store_contract::TestStore {
        super::open(super::Product::Valkey).await
    }

    crate::store_contract::contract_tests!(open);
}
