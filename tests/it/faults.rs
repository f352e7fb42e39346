//! Faults of Redis, the network and the daemon, each with the test that proves the recovery.
//!
//! After every fault a [`Ledger`] is balanced: every accepted event was handled, is dead, or is still pending or
//! undelivered; every acknowledged entry was handled or is dead; nothing is stored twice; the counters agree. The tests
//! cause only the fault itself: the daemon recovers without a restart.
//!
//! | # | fault | shown by |
//! |---|---|---|
//! | 1 | `FLUSHALL` while readers wait | `groups::flush_while_readers_wait_loses_no_later_event` |
//! | 2 | `DEL`, `RENAME`, `PEXPIRE`, `SWAPDB`, `SET` on the key while readers wait | `groups::key_removed_while_readers_wait_is_followed_again`, `groups::foreign_key_affects_its_stream_only_and_recovers` |
//! | 3 | `XGROUP DESTROY` with a part acknowledged | `groups::destroyed_group_resumes_with_unhandled_entries` |
//! | 4 | a daemon that starts after its producers | `groups::late_daemon_handles_existing_entries` |
//! | 5 | a killed server with a slow load or a torn file | `states::killed_server_with_slow_load_loses_nothing`, `crash::redis_killed_under_load_loses_no_accepted_event`, `redis_faults::killed_server_with_aof_keeps_accepted_entries`, `redis_torn_writes::torn_write_does_not_reappear` |
//! | 6 | a primary that becomes a replica, or has too few replicas | `redis_states::every_server_state_is_reported_and_recovers` |
//! | 7 | a failover under load | `redis_sentinel::failover_under_load_keeps_replicated_and_recovers` |
//! | 8 | a full server, with dead letters to write | `states::full_server_serves_other_calls_and_recovers`, `redis_faults::full_server_refuses_appends_and_serves_the_rest` |
//! | 9 | a server that evicts | `redis_states::evicting_server_is_refused_unless_allowed` |
//! | 10 | a server that cannot save | `redis_states::every_server_state_is_reported_and_recovers` |
//! | 11 | a paused server | `network::paused_server_loses_and_duplicates_nothing`, `crash::redis_hanging_under_load_loses_no_accepted_event` |
//! | 12 | black holes: the connections of a reader, of control and of appends | `network::each_black_hole_connection_is_replaced_in_time` |
//! | 13 | lost replies: append, fetch, acknowledgement, dead letter, replay | `network::lost_replies_lose_and_duplicate_nothing`, `dead_letters::second_replay_repairs_crash_between_append_and_removal` |
//! | 14 | publishing while readers wait | `network::waiting_readers_do_not_delay_producers` |
//! | 15 | pending and undelivered entries that another program trims | `accounts::foreign_trim_is_counted_once_by_two_daemons_on_redis`, `accounts::worker_counts_losses_of_its_downtime_on_redis` |
//! | 16 | a handler that kills its process | `poison::entry_that_kills_its_handler_is_dead_lettered`, `redelivery::entry_that_kills_every_consumer_is_dead_lettered` |
//! | 17 | entries in hand for longer than the claim idle, a paused daemon that resumes late | `delivery::entries_in_flight_are_not_claimed_by_others`, `fleet::entries_of_a_frozen_daemon_are_handled_once_elsewhere`, `fleet::late_result_of_a_frozen_daemon_is_ignored` |
//! | 18 | a dead letter that is written twice, or cannot be written | `store_contract::dead_letter_is_moved_atomically_and_once`, `redis_faults::lost_dead_letter_reply_writes_it_once`, `redis_faults::failed_dead_letter_leaves_its_entry_pending`, `redis_faults::full_server_refuses_appends_and_serves_the_rest` |
//! | 19 | kills between commit and acknowledgement | `postgres::ten_kills_between_commit_and_ack_keep_each_row_once`, `postgres::fifty_kills_between_commit_and_ack_keep_each_row_once` |
//! | 20 | two daemons with one name, rolling restarts and kills | `fleet::two_daemons_of_one_name_deliver_each_entry_once`, `fleet::ten_rolling_restarts_lose_no_entry_and_leave_no_consumer`, `fleet::two_hundred_rolling_restarts_lose_no_entry` |
//! | 21 | a clock that steps | `clock::server_clock_step_claims_nothing_and_keeps_order`, `clock::daemon_clock_step_keeps_ids_growing_and_repeats_none` |
//! | 22 | undecodable entries | `poison::undecodable_entries_are_dead_lettered_unchanged` |
//! | 23 | a server at its client limit, or absent | `redis_states::reconnects_to_full_or_absent_server_are_limited` |
//! | 24 | dashboards: a slow one, trims, flushes, restarts | `dashboards::dashboards_survive_trims_flushes_and_restarts`, `relay::client_that_never_reads_is_closed_at_no_cost_to_others`, `relay::lagging_client_catches_up_from_the_store`, `relay::trimmed_entries_are_counted_and_the_rest_is_sent` |
//! | 25 | all faults for half an hour | `soak::soak_of_two_minutes`, `soak::soak_of_half_an_hour` |

mod clock;
mod dashboards;
mod groups;
mod network;
mod poison;
mod states;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use aurora_bus::store::Store;
use aurora_bus::store::redis::Config;
use serde_json::Value;

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::ledger::{Account, Balance, Ledger};
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAM: &str = "aurora:alerts";
const GROUP: &str = "alert-processor";
const OTHER_STREAM: &str = "aurora:audit";
/// Bytes that only a fetch from [`STREAM`] contains.
pub(crate) const FETCH: &[u8] = b"STREAMS\r\n$13\r\naurora:alerts\r\n$1\r\n>\r\n";
/// Bytes that only an acknowledgement contains: the name of its counter.
pub(crate) const ACKNOWLEDGEMENT: &[u8] = b"$13\r\nacknowledged:\r\n";
/// The maximum number of entries that a worker has in hand.
const MAX_IN_FLIGHT: usize = 100;

/// Two streams with the sink `log`, and limits so short that recovery takes seconds.
const CONFIG: &str = r#"
[[streams]]
name = "aurora:alerts"
relay = true
retention = { max_len = 900_000 }
[[streams.groups]]
name = "alert-processor"
sink = "log"
min_severity = "low"
claim_idle = "2s"
handler_timeout = "1s"
batch = 100
max_in_flight = 100

[[streams]]
name = "aurora:audit"
retention = { max_len = 900_000 }
[[streams.groups]]
name = "alert-processor"
sink = "log"
claim_idle = "2s"
handler_timeout = "1s"

[sinks.log]
type = "log"

[relay]
max_connections_per_address = 1000

[store]
backend = "redis"
[store.redis]
command_timeout = "2s"
"#;

/// A server, a proxy in front of it, and a home for daemons that connect through the proxy.
struct Site {
    server: RedisServer,
    proxy: Proxy,
    home: Home,
    ledger: Ledger,
    /// The account of [`STREAM`].
    account: Account,
    /// Connects past the proxy, for queries.
    store: Arc<dyn Store>,
}

impl Site {
    async fn new(product: Product) -> Self {
        Self::with(RedisServer::start(product, &[]).await).await
    }

    async fn with(server: RedisServer) -> Self {
        let proxy = Proxy::start(server.port()).await;
        let home = Home::new(&format!("{CONFIG}\nurl = \"{}\"\n", proxy.url()));
        let store = Config { url: server.url().into(), ..Config::default() };
        let store = Arc::new(store.connect().await.expect("a valid configuration"));
        Self { server, proxy, home, ledger: Ledger::default(), account: Account::new(STREAM, GROUP), store }
    }

    /// Publishes new events, and waits until they are accepted.
    async fn publish(&self, daemon: &Daemon, count: u64) {
        for events in self.ledger.events(count, 100).chunks(100) {
            self.ledger.publish_until_accepted(daemon, &self.account.stream, events).await;
        }
    }

    /// Publishes events, and waits until every accepted event is handled. Returns the daemon's other log lines.
    async fn publish_and_handle(&self, daemon: &Daemon, count: u64) -> Vec<String> {
        self.publish(daemon, count).await;
        self.ledger.wait_handled(daemon, self.ledger.accepted_count()).await
    }

    /// Like [`Self::publish_and_handle`], after the accepted events were removed from the ledger.
    async fn publish_and_handle_more(&self, daemon: &Daemon, count: u64) -> Vec<String> {
        let handled = self.ledger.handled_count();
        self.publish(daemon, count).await;
        self.ledger.wait_handled(daemon, handled + usize::try_from(count).expect("few")).await
    }

    async fn balance(&self) -> Balance {
        self.ledger.balance(&*self.store, &self.account).await
    }

    /// Waits until everything is settled, and returns the balance.
    async fn settled(&self) -> Balance {
        until("a settled account", BOUND, async || {
            let balance = self.balance().await;
            (balance.pending == 0 && balance.undelivered == 0).then_some(balance)
        })
        .await
    }

    /// Waits until this many readers wait at the server.
    async fn readers_wait(&self, count: u64) {
        until("waiting readers", BOUND, async || {
            let clients = self.server.cli(&["INFO", "clients"]);
            let blocked = clients.lines().find_map(|line| line.trim().strip_prefix("blocked_clients:"))?;
            (blocked.parse::<u64>().expect("a count") >= count).then_some(())
        })
        .await;
    }
}

/// Returns the number of errors in a log.
fn errors(lines: &[String]) -> usize {
    let level = |line: &String| serde_json::from_str::<Value>(line).ok().map(|record| record["level"].clone());
    lines.iter().filter(|line| level(line).is_some_and(|level| level == "ERROR")).count()
}

/// Fails if a log has more than five errors per second since `since`.
#[track_caller]
fn assert_quiet(lines: &[String], since: Instant) {
    let bound = 5 * since.elapsed().as_secs().max(1);
    assert!((errors(lines) as u64) < bound, "{} errors:\n{}", errors(lines), lines.join("\n"));
}

#[test]
fn every_named_test_exists() {
    let named = include_str!("faults.rs").lines().map_while(|line| line.strip_prefix("//!"));
    let named: Vec<&str> =
        named.filter_map(|line| line.strip_prefix(" | ")?.rsplit_once(" | `")).map(|row| row.1).collect();
    assert_eq!(named.len(), 25);
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it"))];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((path.clone(), fs::read_to_string(path).expect("a source file")));
            }
        }
    }
    for test in named.iter().flat_map(|names| names.trim_end_matches(" |").split(", ")) {
        let test = test.trim_matches('`');
        let (file, name) = test.rsplit_once("::").expect("a file and a test");
        let is_there = |(path, text): &(PathBuf, String)| {
            let is_file = path.components().any(|part| Path::new(part.as_os_str()).file_stem() == Some(file.as_ref()));
            is_file && text.contains(&format!("async fn {name}("))
        };
        assert!(files.iter().any(is_there), "there is no test `{test}`");
    }
}

/// Makes a test per product of each case. A case is an async function that takes the product.
macro_rules! on_every_product {
    ($($case:ident)*) => {
        mod on_redis {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case($crate::support::redis::Product::Redis).await;
            })*
        }
        mod on_valkey {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case($crate::support::redis::Product::Valkey).await;
            })*
        }
    };
}
use on_every_product;
