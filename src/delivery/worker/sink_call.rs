//! Calling the sink: deadlines, panics, refused batches, and asking whether it is down.

use std::any::Any;
use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use prometheus::{Histogram, IntCounter};
use tokio_util::sync::CancellationToken;

use crate::delivery::worker::leases::LeaseWatch;
use crate::delivery::worker::queue::{OrderingKey, SinkBatch};
use crate::event::Delivery;
use crate::sink::{Origin, Sink, SinkError, SinkErrorClass};
use crate::telemetry::chain;

/// How long a sink may take to say whether it is up.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// A sink as one worker calls it.
#[derive(Debug)]
pub(crate) struct SinkCaller {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) name: String,
    pub(crate) origin: Origin,
    pub(crate) timeout: Duration,
    pub(crate) deliveries: IntCounter,
    pub(crate) handler_seconds: Histogram,
    /// Cancelled when calls under way must end.
    pub(crate) abort: CancellationToken,
    /// Whether the worker's turn lasts: where order matters, no call may begin after it.
    pub(crate) permit: LeaseWatch,
}

/// A batch after it was delivered, and the parts of it that were not taken, in order.
#[derive(Debug)]
pub(crate) struct Delivered {
    pub(crate) batch: Vec<Delivery>,
    pub(crate) failures: Vec<(Range<usize>, CallFailure)>,
}

/// Why a part of a batch was not taken.
#[derive(Debug)]
pub(crate) enum CallFailure {
    /// The sink failed.
    Refused(SinkError),
    /// The sink failed, and says that it is down: why it failed, and what it says.
    Outage(SinkError, String),
    /// The sink says that it can take nothing now, whichever entry it is.
    SinkUnavailable(SinkError),
    /// The sink says that it is down, so it was not called.
    NotStarted(String),
    /// The worker stopped amid the call.
    Aborted,
    /// Not begun: an entry before it in its lane has failed.
    SkippedAfterFailure,
}

impl Delivered {
    /// Whether the sink took anything, or said no to anything for good.
    pub(crate) fn was_answered(&self) -> bool {
        let failed: usize = self.failures.iter().map(|(part, _)| part.len()).sum();
        let is_final = |failure: &CallFailure| matches!(failure, CallFailure::Refused(e) if e.class() == SinkErrorClass::Permanent);
        failed < self.batch.len() || self.failures.iter().any(|(_, failure)| is_final(failure))
    }
}

impl SinkCaller {
    /// Delivers a batch; what the sink refuses of it is halved until the bad entries are alone. Of a lane, nothing is
    /// begun behind an entry that failed. With `is_probe`, the sink is asked first whether it is up.
    pub(crate) async fn deliver(&self, batch: SinkBatch, is_probe: bool) -> Delivered {
        let SinkBatch { deliveries: batch, lanes } = batch;
        if is_probe && let Err(reason) = self.check().await {
            let failures = Vec::from([(Range { start: 0, end: batch.len() }, CallFailure::NotStarted(reason))]);
            return Delivered { batch, failures };
        }
        let mut failures = Vec::new();
        let mut failed: Vec<OrderingKey> = Vec::new();
        // The next part is the last one here.
        let mut parts = Vec::from([Range { start: 0, end: batch.len() }]);
        while let Some(mut part) = parts.pop() {
            let is_behind = |n: &usize| lanes.get(*n).is_some_and(|lane| failed.contains(lane));
            if let Some(behind) = part.clone().find(is_behind) {
                if behind == part.start {
                    failures.push((behind..behind + 1, CallFailure::SkippedAfterFailure));
                    part.start += 1;
                    parts.extend((!part.is_empty()).then_some(part));
                    continue;
                }
                parts.push(behind..part.end);
                part.end = behind;
            }
            let Err((failure, may_be_of_one_entry)) = self.deliver_part(&batch[part.clone()]).await else { continue };
            if may_be_of_one_entry && part.len() > 1 {
                let middle = part.start + part.len() / 2;
                parts.push(middle..part.end);
                parts.push(part.start..middle);
                continue;
            }
            let down = match &failure {
                CallFailure::Outage(_, reason) => Some(reason.clone()),
                CallFailure::SinkUnavailable(error) => Some(chain(error)),
                _ => None,
            };
            if let Some(reason) = down {
                failures.push((part, failure));
                failures.extend(parts.drain(..).rev().map(|part| (part, CallFailure::NotStarted(reason.clone()))));
            } else {
                failed.extend(lanes.get(part.clone()).into_iter().flatten());
                failures.push((part, failure));
            }
        }
        Delivered { batch, failures }
    }

    /// Delivers a part at once. A failure comes with whether a single entry of it may have caused it.
    async fn deliver_part(&self, part: &[Delivery]) -> Result<(), (CallFailure, bool)> {
        let Err(call) = self.call(part).await else { return Ok(()) };
        let error = match call {
            CallError::Aborted => return Err((CallFailure::Aborted, false)),
            CallError::Panicked(error) => return Err((CallFailure::Refused(error), true)),
            CallError::Refused(error) => error,
        };
        if error.class() != SinkErrorClass::Transient {
            return Err((CallFailure::Refused(error), true));
        }
        if error.is_outage() {
            return Err((CallFailure::SinkUnavailable(error), false));
        }
        match self.check().await {
            Ok(()) => Err((CallFailure::Refused(error), false)),
            Err(reason) => Err((CallFailure::Outage(error, reason), false)),
        }
    }

    async fn call(&self, part: &[Delivery]) -> Result<(), CallError> {
        if !self.permit.may_deliver() {
            return Err(CallError::Aborted);
        }
        let started = Instant::now();
        let call = tokio::time::timeout(self.timeout, guarded(self.sink.deliver(&self.origin, part)));
        let outcome = tokio::select! {
            biased;
            outcome = call => outcome,
            () = self.abort.cancelled() => return Err(CallError::Aborted),
        };
        self.handler_seconds.observe(started.elapsed().as_secs_f64());
        self.deliveries.inc_by(part.len() as u64);
        match outcome {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(CallError::Refused(error)),
            Ok(Err(panic)) => {
                let message = format!("the sink panicked: {panic}");
                Err(CallError::Panicked(SinkError::new(SinkErrorClass::Transient, message)))
            }
            Err(_elapsed) => {
                let message = format!("the sink did not answer within {:?}", self.timeout);
                Err(CallError::Refused(SinkError::new(SinkErrorClass::Transient, message)))
            }
        }
    }

    /// Whether the sink says it is up; if not, what it says.
    async fn check(&self) -> Result<(), String> {
        let check = tokio::time::timeout(CHECK_TIMEOUT, guarded(self.sink.check()));
        let checked = tokio::select! {
            biased;
            checked = check => checked,
            // There is no time to find out.
            () = self.abort.cancelled() => return Ok(()),
        };
        match checked {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(chain(&error)),
            Ok(Err(panic)) => Err(format!("its check panicked: {panic}")),
            Err(_elapsed) => Err(format!("its check took more than {CHECK_TIMEOUT:?}")),
        }
    }
}

enum CallError {
    Refused(SinkError),
    Panicked(SinkError),
    Aborted,
}

/// Awaits a future that may panic; an error holds what the panic said.
pub(crate) async fn guarded<T>(future: impl Future<Output = T>) -> Result<T, String> {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map_or_else(|_other| "no message".to_owned(), |text| (*text).to_owned()),
    };
    AssertUnwindSafe(future).catch_unwind().await.map_err(text)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;

    use super::*;
    use crate::event::{Entry, EntryId, Fields};
    use crate::metrics::Metrics;

    /// What a sink does with a batch of those ids at its n-th call.
    type Script = fn(usize, &[u64]) -> Result<(), SinkError>;

    #[derive(Debug)]
    struct Scripted {
        script: Script,
        calls: Mutex<Vec<Vec<u64>>>,
        failing_checks: AtomicUsize,
    }

    #[async_trait]
    impl Sink for Scripted {
        async fn check(&self) -> Result<(), SinkError> {
            let left = self.failing_checks.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if left.is_ok() { Err(SinkError::new(SinkErrorClass::Transient, "down")) } else { Ok(()) }
        }

        async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
            let ids: Vec<u64> = batch.iter().map(|delivery| delivery.entry.id.ms).collect();
            let call = self.calls.lock().unwrap().len();
            self.calls.lock().unwrap().push(ids.clone());
            if ids == [99] {
                std::future::pending::<()>().await;
            }
            (self.script)(call, &ids)
        }
    }

    fn caller(script: Script, failing_checks: usize) -> (Arc<Scripted>, SinkCaller) {
        let failing_checks = AtomicUsize::new(failing_checks);
        let sink = Arc::new(Scripted { script, calls: Mutex::default(), failing_checks });
        let metrics = Metrics::new();
        let caller = SinkCaller {
            sink: Arc::<Scripted>::clone(&sink),
            name: "scripted".to_owned(),
            origin: Origin { stream: "s".parse().unwrap(), group: "g".parse().unwrap() },
            timeout: Duration::from_secs(30),
            deliveries: metrics.deliveries.with_label_values(&["s", "g"]),
            handler_seconds: metrics.handler_seconds.with_label_values(&["s", "g"]),
            abort: CancellationToken::new(),
            permit: LeaseWatch::unbounded(),
        };
        (sink, caller)
    }

    fn unordered(ids: Range<u64>) -> SinkBatch {
        let entry = |ms| Entry { id: EntryId::new(ms, 0), fields: Fields::default() };
        let delivery = |ms| Delivery { entry: entry(ms), attempt: 1, delivered_at: Instant::now() };
        SinkBatch { deliveries: ids.map(delivery).collect(), lanes: Vec::new() }
    }

    fn refused(delivered: &Delivered) -> Vec<(Range<usize>, String)> {
        let text = |failure: &CallFailure| match failure {
            CallFailure::Refused(error) => error.to_string(),
            CallFailure::Outage(error, reason) => format!("Down({error}, {reason})"),
            CallFailure::SinkUnavailable(error) => format!("Unable({error})"),
            CallFailure::NotStarted(reason) => format!("NotBegun({reason})"),
            CallFailure::Aborted => "Aborted".to_owned(),
            CallFailure::SkippedAfterFailure => "Behind".to_owned(),
        };
        delivered.failures.iter().map(|(part, failure)| (part.clone(), text(failure))).collect()
    }

    #[tokio::test]
    async fn a_refused_batch_is_halved_until_the_bad_entries_are_alone() {
        let (sink, caller) = caller(
            |_, ids| match ids.iter().find(|id| [3, 6].contains(id)) {
                Some(bad) => Err(SinkError::new(SinkErrorClass::Permanent, format!("{bad}"))),
                None => Ok(()),
            },
            0,
        );
        let delivered = caller.deliver(unordered(0..8), false).await;
        assert_eq!(refused(&delivered), [(3..4, "3".to_owned()), (6..7, "6".to_owned())]);
        let first_ids: Vec<_> = sink.calls.lock().unwrap().iter().map(|ids| ids[0]).collect();
        assert!(first_ids.is_sorted(), "in order: {first_ids:?}");
    }

    #[tokio::test]
    async fn behind_a_refused_entry_nothing_of_its_lane_is_begun() {
        let script: Script = |_, ids| match ids.iter().find(|id| [2, 5].contains(id)) {
            Some(bad) => Err(SinkError::new(SinkErrorClass::Permanent, format!("{bad}"))),
            None => Ok(()),
        };
        let (sink, caller) = caller(script, 0);
        let lanes = (0..8).map(|n| OrderingKey::Key(n % 2)).collect();
        let delivered = caller.deliver(SinkBatch { lanes, ..unordered(0..8) }, false).await;
        let (two, five) = ((2..3, "2".to_owned()), (5..6, "5".to_owned()));
        let behind = |n| (n..n + 1, "Behind".to_owned());
        assert_eq!(refused(&delivered), [two, behind(4), five, behind(6), behind(7)]);
        let calls = sink.calls.lock().unwrap();
        let after_two = calls.iter().skip_while(|ids| **ids != [2]);
        assert!(after_two.flatten().all(|id| [2, 3, 5].contains(id)), "{calls:?}");
    }

    #[tokio::test]
    async fn a_panic_is_blamed_on_its_entry_alone() {
        let (_, caller) = caller(|_, ids| if ids.contains(&2) { panic!("bug {}", 7) } else { Ok(()) }, 0);
        let delivered = caller.deliver(unordered(0..5), false).await;
        assert_eq!(refused(&delivered), [(2..3, "the sink panicked: bug 7".to_owned())]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_has_a_deadline() {
        let (_, caller) = caller(|_, _| Ok(()), 0);
        let delivered = caller.deliver(unordered(99..100), false).await;
        assert_eq!(refused(&delivered), [(0..1, "the sink did not answer within 30s".to_owned())]);
    }

    #[tokio::test]
    async fn a_sink_that_says_it_is_down_is_not_called_any_more() {
        let fails = |_, ids: &[u64]| match ids {
            [0..4, .., 7] => Err(SinkError::new(SinkErrorClass::Permanent, "one is bad")),
            _ => Err(SinkError::new(SinkErrorClass::Transient, "connection reset")),
        };
        let (sink, caller) = caller(fails, usize::MAX);
        let delivered = caller.deliver(unordered(0..8), false).await;
        let expected = [(0..4, "Down(connection reset, down)".to_owned()), (4..8, "NotBegun(down)".to_owned())];
        assert_eq!(refused(&delivered), expected);
        assert_eq!(sink.calls.lock().unwrap().len(), 2);
        assert!(!delivered.was_answered());
    }

    #[tokio::test]
    async fn a_probe_asks_first() {
        let (sink, caller) = caller(|_, _| Ok(()), 1);
        let delivered = caller.deliver(unordered(0..1), true).await;
        assert_eq!(refused(&delivered), [(0..1, "NotBegun(down)".to_owned())]);
        assert_eq!(sink.calls.lock().unwrap().len(), 0);
        let delivered = caller.deliver(SinkBatch { deliveries: delivered.batch, lanes: Vec::new() }, true).await;
        assert_eq!(refused(&delivered), []);
        assert!(delivered.was_answered());
    }

    #[tokio::test]
    async fn a_sink_that_refuses_for_good_has_answered() {
        let (_, caller) = caller(|_, _| Err(SinkError::new(SinkErrorClass::Permanent, "no")), 0);
        assert!(caller.deliver(unordered(0..1), false).await.was_answered());
    }
}
