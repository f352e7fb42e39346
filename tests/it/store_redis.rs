//! The store's contract on Redis and on Valkey.

use std::sync::Arc;

use aurora_bus::store::Store;
use aurora_bus::store::redis::Config;

use crate::store_contract::TestStore;
use crate::store_model::{self, Traits};
use crate::support::redis::{Product, RedisServer};

async fn open(product: Product) -> TestStore {
    let server = RedisServer::shared(product).await;
    TestStore::new(connect(&server).await, server)
}

pub(crate) async fn open_redis() -> TestStore {
    open(Product::Redis).await
}

pub(crate) async fn open_valkey() -> TestStore {
    open(Product::Valkey).await
}

async fn connect(server: &RedisServer) -> Arc<dyn Store> {
    let config = Config { url: server.url().into(), ..Config::default() };
    Arc::new(config.connect().await.expect("a valid configuration"))
}

fn check_against_the_model(product: Product) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = runtime.block_on(RedisServer::shared(product));
    let store = runtime.block_on(connect(&server));
    let reopen = async |store: Arc<dyn Store>| {
        store.close().await;
        connect(&server).await
    };
    store_model::check(&runtime, store, reopen, Traits { cases: 150, is_lag_exact: false, rearms_lost: false });
}

mod redis {
    async fn open() -> crate::store_contract::TestStore {
        super::open(super::Product::Redis).await
    }

    crate::store_contract::contract_tests!(open);
    crate::store_leases::lease_tests!(open);
    crate::store_news::news_tests!(open);

    #[test]
    fn random_operations_agree_with_the_model() {
        super::check_against_the_model(super::Product::Redis);
    }
}

mod valkey {
    async fn open() -> crate::store_contract::TestStore {
        super::open(super::Product::Valkey).await
    }

    crate::store_contract::contract_tests!(open);
    crate::store_leases::lease_tests!(open);
    crate::store_news::news_tests!(open);

    #[test]
    fn random_operations_agree_with_the_model() {
        super::check_against_the_model(super::Product::Valkey);
    }
}
