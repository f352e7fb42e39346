//! The stream sink in the suite.

use std::sync::Arc;

use async_trait::async_trait;
use aurora_bus::bus::{Bus, Config, StreamCatalog, StreamSettings};
use aurora_bus::event::{EntryId, StreamName};
use aurora_bus::metrics::Metrics;
use aurora_bus::sink::{Sink, SinkConfig};
use aurora_bus::store::{Families, HardLimits, Range, Store, embedded};
use tempfile::TempDir;

use super::World;

const TASKS: &str = "aurora:test.tasks";

/// An embedded store with the stream of the tasks.
pub(super) struct Tasks {
    store: Arc<dyn Store>,
    _folder: TempDir,
}

fn tasks() -> StreamName {
    TASKS.parse().expect("a valid name")
}

#[async_trait]
impl World for Tasks {
    const TYPE: &str = "stream";
    const REFUSES_DUPLICATES: bool = true;

    async fn open() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let config = embedded::Config { path: folder.path().to_owned(), ..embedded::Config::default() };
        Self { store: Arc::new(config.open().await.expect("a fresh folder")), _folder: folder }
    }

    fn config(&self) -> SinkConfig {
        let text = format!("type = \"stream\"\nstream = \"{TASKS}\"\nas = \"task\"\nagent_type = \"triage\"");
        toml::from_str(&text).expect("every key is known")
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        let streams = StreamCatalog::new(
            Families::default(),
            [(tasks().into(), StreamSettings::new(tasks().default_dead_letter()))],
        );
        let bus = Bus::new(Arc::clone(&self.store), Config::default(), streams, HardLimits::default(), Metrics::new());
        self.config().build("it", Arc::new(bus)).await.expect("a valid configuration")
    }

    async fn effects(&self) -> Vec<String> {
        let stored = self.store.range(&tasks(), Range::after(EntryId::MIN), 1000).await.expect("a stream");
        let from =
            stored.iter().map(|entry| entry.fields.text("forwarded.from").expect("where it comes from").to_owned());
        from.collect()
    }

    fn misconfigured(&self) -> Vec<(SinkConfig, &'static str)> {
        vec![(self.config(), "no stream")]
    }
}

mod suite {
    super::super::sink_tests!(Tasks: entry_without_json_is_given_up_at_once);
}
