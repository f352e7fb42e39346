//! The faults that a Redis, a network and a daemon can have, each with what must hold after it.
//!
//! After every fault a [`Ledger`] is balanced: every event that was answered with success was handled, is dead, or is
//! still pending or undelivered; nothing was acknowledged that is neither handled nor dead; nothing is stored twice;
//! the counters agree. Nothing but the fault itself is done to the daemon: it recovers without a restart.
//!
//! | # | fault | proven by |
//! |---|---|---|
//! | 1 | `FLUSHALL` while readers wait | [`groups`] |
//! | 2 | `DEL`, `RENAME`, `PEXPIRE`, `SWAPDB`, `SET` on the key while readers wait | [`groups`] |
//! | 3 | `XGROUP DESTROY` with a part acknowledged | [`groups`], `delivery::redis` |
//! | 4 | a daemon that starts after its publishers | [`groups`] |
//! | 5 | a killed Redis that loads for seconds | `crash`, `redis_faults` |
//! | 6 | a primary that becomes a replica, or has too few replicas | `redis_faults` |
//! | 8 | a full server | `redis_faults` |
//! | 11 | a Redis that stands still | [`network`], `crash` |
//! | 12 | connections that swallow everything: reader, control, publisher | [`network`], `redis_faults` |
//! | 13 | lost replies: append, fetch, acknowledgement, dead letter | [`network`], `redis_faults`, `delivery::redis` |
//! | 14 | publishing while readers wait | [`network`] |
//! | 16 | a handler that kills its process | [`poison`], `delivery` |
//! | 18 | a dead letter that is written twice, or can't be written | `redis_faults`, `delivery::redis`, `store_contract` |
//! | 20 | rolling kills | `crash` |
//! | 21 | a server's clock that steps | [`clock`] |
//! | 22 | entries that make no sense | [`poison`] |
//! | 24 | dashboards during all this | [`dashboards`], `relay` |
//! | 25 | hours of everything | `soak` |

mod clock;
mod dashboards;
mod groups;
mod network;
mod poison;
mod states;

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
