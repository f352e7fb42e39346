//! The stores on Redis and Valkey compared with the model.

use std::sync::Arc;

use aurora_bus::store::Store;

use crate::store_model::{self, Traits};
use crate::support::redis::{Product, RedisServer};
use crate::support::stores::connect;

fn check_against_the_model(product: Product) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = runtime.block_on(RedisServer::shared(product));
    let store = runtime.block_on(connect(&server.url()));
    let reopen = async |store: Arc<dyn Store>| {
        store.close().await;
        connect(&server.url()).await
    };
    store_model::check(&runtime, store, reopen, Traits { cases: 150, is_lag_exact: false, rearms_lost: false });
}

#[test]
fn random_operations_on_redis_match_the_model() {
    check_against_the_model(Product::Redis);
}

#[test]
fn random_operations_on_valkey_match_the_model() {
    check_against_the_model(Product::Valkey);
}
