//! The audit sink in the suite.

use std::fs;

use async_trait::async_trait;
use aurora_bus::sink::{AuditConfig, SinkConfig, verify};
use bytesize::ByteSize;
use serde_json::Value;
use tempfile::TempDir;

use super::{Outage, World};

/// A folder of audit files.
pub(super) struct Audit {
    folder: TempDir,
}

#[async_trait]
impl World for Audit {
    const TYPE: &str = "audit";
    const REFUSES_DUPLICATES: bool = true;

    async fn open() -> Self {
        Self { folder: TempDir::new().expect("a temporary folder") }
    }

    fn config(&self) -> SinkConfig {
        let path = self.folder.path().join("audit");
        SinkConfig::Audit(AuditConfig { path, max_file_size: ByteSize::kib(4), ..AuditConfig::default() })
    }

    async fn effects(&self) -> Vec<String> {
        let path = self.folder.path().join("audit");
        let report = verify(&path).expect("audit files");
        assert!(report.is_intact(), "{report:?}");
        let files = fs::read_dir(&path).expect("the audit folder").map(|entry| entry.expect("an entry").path());
        let text: String = files
            .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
            .map(|path| fs::read_to_string(path).expect("an audit file"))
            .collect();
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
        let entries =
            records.filter_map(|record| Some(format!("{}/{}", record["stream"].as_str()?, record["id"].as_str()?)));
        entries.collect()
    }

    fn misconfigured(&self) -> Vec<(SinkConfig, &'static str)> {
        let file = self.folder.path().join("a file");
        fs::write(&file, "").expect("a writable folder");
        let small = AuditConfig { max_file_size: ByteSize::b(1), ..AuditConfig::default() };
        vec![
            (SinkConfig::Audit(AuditConfig { path: file, ..AuditConfig::default() }), "cannot write audit files in"),
            (SinkConfig::Audit(small), "max_file_size"),
        ]
    }
}

#[async_trait]
impl Outage for Audit {
    // Like an unmounted disk: missing permissions would not stop root.
    async fn go_down(&mut self) {
        fs::rename(self.folder.path().join("audit"), self.folder.path().join("away")).expect("a writable folder");
    }

    async fn come_up(&mut self) {
        fs::rename(self.folder.path().join("away"), self.folder.path().join("audit")).expect("a writable folder");
    }
}

mod suite {
    super::super::sink_tests!(Audit: outage_is_reported_and_loses_nothing any_bytes_are_delivered);
}
