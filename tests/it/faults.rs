//! The faults that a Redis, a network and a daemon can have, each with what must hold after it.
//!
//! After every fault a [`Ledger`] is balanced: every event that was answered with success was handled, is dead, or is
//! still pending or undelivered; nothing was acknowledged that is neither handled nor dead; nothing is stored twice;
//! the counters agree. Nothing but the fault itself is done to the daemon: it recovers without a restart.
//!
//! | # | fault | shown by |
//! |---|---|---|
//! | 1 | `FLUSHALL` while readers wait | `groups::a_flush_while_readers_wait_costs_no_later_event` |
//! | 2 | `DEL`, `RENAME`, `PEXPIRE`, `SWAPDB`, `SET` on the key while readers wait | `groups::a_key_that_is_taken_away_while_readers_wait_is_followed_anew`, `groups::a_stream_whose_name_is_taken_concerns_that_stream_only_and_heals` |
//! | 3 | `XGROUP DESTROY` with a part acknowledged | `groups::a_destroyed_group_goes_on_with_what_it_had_not_handled` |
//! | 4 | a daemon that starts after its publishers | `groups::a_daemon_that_starts_late_handles_what_was_there_before` |
//! | 5 | a killed server that loads for seconds, or has torn its file | `states::a_server_that_is_killed_and_loads_for_seconds_costs_nothing`, `crash::a_redis_killed_under_load_costs_nothing_accepted`, `redis_faults::a_killed_server_with_an_append_only_file_loses_nothing_accepted`, `redis_torn::what_was_written_by_half_does_not_come_back` |
//! | 6 | a primary that becomes a replica, or has too few replicas | `redis_states::every_state_is_told_and_heals` |
//! | 7 | a failover under load | `redis_sentinel::a_failover_under_load_loses_nothing_that_was_replicated_and_heals_by_itself` |
//! | 8 | a full server, with dead letters to write | `states::a_full_server_goes_on_with_what_needs_no_room_and_heals`, `redis_faults::a_full_server_refuses_appends_and_lets_the_rest_go_on` |
//! | 9 | a server that evicts | `redis_states::a_server_that_may_evict_streams_is_refused_unless_that_is_wanted` |
//! | 10 | a server that can't save | `redis_states::every_state_is_told_and_heals` |
//! | 11 | a server that stands still | `network::a_server_that_stands_still_costs_nothing_and_doubles_nothing`, `crash::a_redis_that_hangs_under_load_costs_nothing_accepted` |
//! | 12 | connections that swallow everything: reader, control, publisher | `network::each_connection_that_swallows_everything_is_replaced_in_time` |
//! | 13 | lost replies: append, fetch, acknowledgement, dead letter, replay | `network::lost_replies_double_nothing_and_lose_nothing`, `dead_letters::second_replay_repairs_crash_between_append_and_removal` |
//! | 14 | publishing while readers wait | `network::readers_that_wait_do_not_hold_up_publishers` |
//! | 15 | entries that others trim, pending and not delivered yet | `accounts::foreign_trim_is_counted_once_by_two_daemons_on_redis`, `accounts::worker_counts_losses_of_its_downtime_on_redis` |
//! | 16 | a handler that kills its process | `poison::an_entry_that_kills_its_handler_ends_as_a_dead_letter`, `redelivery::entry_that_kills_every_consumer_is_dead_lettered` |
//! | 17 | entries in hand for longer than others wait, a daemon that stands still and comes back late | `delivery::entries_in_flight_are_not_claimed_by_others`, `fleet::entries_of_a_frozen_daemon_are_handled_once_elsewhere`, `fleet::late_result_of_a_frozen_daemon_is_ignored` |
//! | 18 | a dead letter that is written twice, or can't be written | `store_contract::a_dead_letter_is_moved_in_one_step_and_once`, `redis_faults::a_lost_reply_to_a_dead_letter_writes_it_once`, `redis_faults::a_dead_letter_that_cannot_be_written_leaves_its_entry_pending`, `redis_faults::a_full_server_refuses_appends_and_lets_the_rest_go_on` |
//! | 19 | kills between commit and acknowledgement | `postgres::ten_kills_between_commit_and_ack_keep_each_row_once`, `postgres::fifty_kills_between_commit_and_ack_keep_each_row_once` |
//! | 20 | two daemons of one name, rolling restarts and kills | `fleet::two_daemons_of_one_name_deliver_each_entry_once`, `fleet::ten_rolling_restarts_lose_no_entry_and_leave_no_consumer`, `fleet::two_hundred_rolling_restarts_lose_no_entry` |
//! | 21 | a clock that steps | `clock::a_clock_that_steps_takes_nothing_out_of_hands_and_keeps_the_order`, `clock::a_daemon_whose_clock_steps_gives_ids_that_rise_and_handles_each_event_once` |
//! | 22 | entries that make no sense | `poison::entries_that_make_no_sense_become_dead_letters_byte_for_byte` |
//! | 23 | a server without room for more clients, and gone | `redis_states::stores_that_find_a_server_full_of_clients_or_gone_do_not_storm_it` |
//! | 24 | dashboards: a slow one, trims, flushes, restarts | `dashboards::dashboards_go_on_through_flushes_and_restarts`, `relay::client_that_never_reads_is_closed_at_no_cost_to_others`, `relay::lagging_client_catches_up_from_the_store`, `relay::trimmed_entries_are_counted_and_the_rest_is_sent` |
//! | 25 | half an hour of everything | `soak::soak_of_two_minutes`, `soak::soak_of_half_an_hour` |

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
/// What a fetch from [`STREAM`] has in it and no other request, as it is sent.
pub(crate) const FETCH: &[u8] = b"STREAMS\r\n$13\r\naurora:alerts\r\n$1\r\n>\r\n";
/// What an acknowledgement has in it: the counter that it counts under.
pub(crate) const ACKNOWLEDGEMENT: &[u8] = b"$13\r\nacknowledged:\r\n";
/// The most entries that a worker has in hand.
const MAX_IN_FLIGHT: usize = 100;

/// Two streams whose sink is the daemon's log, with limits so short that recovery is a matter of seconds.
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

/// A server, a proxy in front of it, and a daemon's home that uses it through the proxy.
struct Site {
    server: RedisServer,
    proxy: Proxy,
    home: Home,
    ledger: Ledger,
    /// The account of [`STREAM`].
    account: Account,
    /// Past the proxy, to ask with.
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

    /// Publishes so many new events, and waits until they are accepted.
    async fn publish(&self, daemon: &Daemon, count: u64) {
        for events in self.ledger.events(count, 100).chunks(100) {
            self.ledger.publish_until_accepted(daemon, &self.account.stream, events).await;
        }
    }

    /// Publishes so many, and waits until a sink has taken all that was ever accepted. Gives the daemon's other lines.
    async fn publish_and_handle(&self, daemon: &Daemon, count: u64) -> Vec<String> {
        self.publish(daemon, count).await;
        self.ledger.has_handled(daemon, self.ledger.promised()).await
    }

    /// The same where earlier promises were forgiven.
    async fn publish_and_handle_more(&self, daemon: &Daemon, count: u64) -> Vec<String> {
        let handled = self.ledger.handled();
        self.publish(daemon, count).await;
        self.ledger.has_handled(daemon, handled + usize::try_from(count).expect("few")).await
    }

    async fn balance(&self) -> Balance {
        self.ledger.balance(&*self.store, &self.account).await
    }

    /// Waits until everything is settled, and gives the balance.
    async fn settled(&self) -> Balance {
        until("a settled account", BOUND, async || {
            let balance = self.balance().await;
            (balance.pending == 0 && balance.undelivered == 0).then_some(balance)
        })
        .await
    }

    /// Waits until so many readers wait at the server.
    async fn readers_wait(&self, count: u64) {
        until("waiting readers", BOUND, async || {
            let clients = self.server.cli(&["INFO", "clients"]);
            let blocked = clients.lines().find_map(|line| line.trim().strip_prefix("blocked_clients:"))?;
            (blocked.parse::<u64>().expect("a count") >= count).then_some(())
        })
        .await;
    }
}

/// How many lines of a log are errors.
fn errors(lines: &[String]) -> usize {
    let level = |line: &String| serde_json::from_str::<Value>(line).ok().map(|told| told["level"].clone());
    lines.iter().filter(|line| level(line).is_some_and(|level| level == "ERROR")).count()
}

/// Fails where a log has more than five errors per second since then.
#[track_caller]
fn assert_quiet(lines: &[String], since: Instant) {
    let bound = 5 * since.elapsed().as_secs().max(1);
    assert!((errors(lines) as u64) < bound, "{} errors:\n{}", errors(lines), lines.join("\n"));
}

#[test]
fn the_tests_that_are_named_exist() {
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

/// Makes a test per product of each case, an async function that takes the product.
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
