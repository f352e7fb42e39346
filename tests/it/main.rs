//! The tests that need servers, sockets or files: one binary for all of them.

mod api;
mod bench;
mod browser;
mod crash;
mod dashboards;
mod dead_letters;
mod delivery;
mod deploy;
mod docs;
mod forward;
mod postgres;
mod redis_durability;
mod redis_faults;
mod redis_sentinel;
mod redis_states;
mod relay;
mod sinks;
mod store_accounts;
mod store_cluster;
mod store_contract;
mod store_embedded;
mod store_model;
mod store_redis;
mod support;
mod tidy;
