//! Sampler: updates the gauges of a stream or family, and runs the loss detection.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::event::StreamName;
use crate::maintenance::StreamSpec;
use crate::maintenance::loss_detector::{LossDetector, Observation};
use crate::maintenance::stream_gauges::StreamGauges;
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::store::{FamilyMembers, Store, StoreError, StreamStatus};

/// Samples one stream, or all members of a family, under one label.
#[derive(Debug)]
pub(super) struct Sampler {
    label: String,
    family_members: Option<Arc<FamilyMembers>>,
    part: Part,
    metrics: Metrics,
    samples: BTreeMap<StreamName, StreamSample>,
}

/// The result of the last check of a stream.
#[derive(Debug, Default)]
struct StreamSample {
    detector: LossDetector,
    gauges: StreamGauges,
    warning: Option<String>,
}

impl Sampler {
    /// Creates the sampler of a stream. Its part of `readiness` is always ready.
    pub(super) fn of_stream(stream: &StreamName, metrics: Metrics, readiness: &Readiness) -> Self {
        Self::new(stream.to_string(), None, readiness.part(&format!("stream {stream}"), None), metrics)
    }

    /// Creates the sampler of a family. Its part of `readiness` is always ready.
    pub(super) fn of_family(family_members: Arc<FamilyMembers>, metrics: Metrics, readiness: &Readiness) -> Self {
        let label = family_members.family().name().to_owned();
        let part = readiness.part(&format!("streams {label}"), None);
        Self::new(label, Some(family_members), part, metrics)
    }

    fn new(label: String, family_members: Option<Arc<FamilyMembers>>, part: Part, metrics: Metrics) -> Self {
        part.ready();
        Self { label, family_members, part, metrics, samples: BTreeMap::new() }
    }

    /// Returns the label of the stream or family in metrics.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// Returns the streams with unsettled entries, whose gauges will change.
    pub(super) fn unsettled(&self) -> impl Iterator<Item = &StreamName> {
        self.samples.iter().filter(|(_, sample)| sample.gauges.has_unsettled()).map(|(stream, _)| stream)
    }

    /// Takes the gauges of a stream from its status, and counts lost entries.
    pub(super) async fn sample(
        &mut self,
        store: &dyn Store,
        spec: &StreamSpec,
        status: Option<&StreamStatus>,
    ) -> Result<(), StoreError> {
        let sample = self.samples.entry(spec.name.clone()).or_default();
        let Some(status) = status else {
            sample.gauges = StreamGauges::default();
            return Ok(());
        };
        sample.gauges = StreamGauges::new(spec, status);
        let observation = Observation { store, metrics: &self.metrics, label: &self.label, spec, status };
        sample.detector.check(observation).await?;
        sample.warning = sample.detector.warning(spec, status);
        Ok(())
    }

    /// Updates the metrics and the readiness part from the last samples.
    pub(super) fn show(&self) {
        if self.family_members.is_none() && self.samples.is_empty() {
            return;
        }
        let mut sum = StreamGauges::default();
        for sample in self.samples.values() {
            sum.add(&sample.gauges);
        }
        sum.show(&self.metrics, &self.label);
        let warned = self.samples.iter().filter_map(|(stream, sample)| Some((stream, sample.warning.as_ref()?)));
        let warnings: Vec<(&StreamName, &String)> = warned.collect();
        let Some(family_members) = &self.family_members else {
            return match warnings.first() {
                Some((_, warning)) => self.part.ready_but(*warning),
                None => self.part.ready(),
            };
        };
        let members = i64::try_from(family_members.len()).unwrap_or(i64::MAX);
        self.metrics.family_members.with_label_values(&[&self.label]).set(members);
        match warnings.first() {
            Some((stream, warning)) => {
                self.part.ready_but(format!("{stream}: {warning} (and {} more)", warnings.len() - 1));
            }
            None => self.part.ready(),
        }
    }
}
