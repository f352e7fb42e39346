//! The PostgreSQL sink in the suite.

use std::sync::Arc;

use async_trait::async_trait;
use aurora_bus::sink::{PostgresConfig, SinkConfig};

use super::{Outage, World};
use crate::support::postgres::{PASSWORD, PostgresServer, new_table, url_by};
use crate::support::proxy::Proxy;

/// A table of its own in a shared server, behind a network that can be down.
pub(super) struct Rows {
    server: Arc<PostgresServer>,
    proxy: Proxy,
    table: String,
}

impl Rows {
    fn config_of(&self, url: &str) -> PostgresConfig {
        let text = format!("url = \"{url}\"\ntable = \"{}\"\ntimeout = \"10s\"", self.table);
        toml::from_str(&text).expect("every key is known")
    }
}

#[async_trait]
impl World for Rows {
    const TYPE: &str = "postgres";
    const REFUSES_DUPLICATES: bool = true;

    async fn open() -> Self {
        // On its own thread, because waiting for a server makes a future that is not `Send`.
        let runtime = tokio::runtime::Handle::current();
        let start = move || runtime.block_on(PostgresServer::shared());
        let server = tokio::task::spawn_blocking(start).await.expect("a server");
        let proxy = Proxy::start(server.port()).await;
        Self { server, proxy, table: new_table() }
    }

    fn config(&self) -> SinkConfig {
        SinkConfig::Postgres(self.config_of(&url_by(self.proxy.port())))
    }

    async fn effects(&self) -> Vec<String> {
        let is_there = self.server.sql(&format!("SELECT to_regclass('{}') IS NOT NULL", self.table)) == "t";
        let rows = format!("SELECT stream || '/' || entry_id FROM {}", self.table);
        let rows = if is_there { self.server.sql(&rows) } else { String::new() };
        rows.lines().map(str::to_owned).collect()
    }

    fn secrets(&self) -> Vec<String> {
        vec![PASSWORD.to_owned(), "hunter2".to_owned()]
    }

    fn misconfigured(&self) -> Vec<(SinkConfig, &'static str)> {
        let url = self.server.url();
        let wrong = [
            (url.replace(PASSWORD, "hunter2"), "password authentication failed"),
            (format!("{}/elsewhere", url.trim_end_matches("/aurora")), "does not exist"),
            (url.replace("postgres://", "mysql://"), "postgres://"),
            (format!("{url}?sslmode=sometimes"), "sslmode"),
        ];
        wrong.into_iter().map(|(url, part)| (SinkConfig::Postgres(self.config_of(&url)), part)).collect()
    }
}

#[async_trait]
impl Outage for Rows {
    async fn go_down(&mut self) {
        self.proxy.refuse(true);
        self.proxy.reset();
    }

    async fn come_up(&mut self) {
        self.proxy.refuse(false);
    }
}

mod suite {
    super::super::sink_tests!(Rows: outage_is_reported_and_loses_nothing entry_without_json_is_given_up_at_once);
}
