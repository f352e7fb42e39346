//! Calls of the sink: timeouts, panics, refused batches, and the check whether the sink is down.

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

/// How long a check of the sink may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// Calls the sink of one worker.
#[derive(Debug)]
pub(crate) struct SinkCaller {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) name: String,
    pub(crate) origin: Origin,
    pub(crate) timeout: Duration,
    pub(crate) deliveries: IntCounter,
    pub(crate) handler_seconds: Histogram,
    /// Cancelled when the calls under way must end.
    pub(crate) abort: CancellationToken,
    /// In an ordered group no call may begin after the group lease has ended.
    pub(crate) leases: LeaseWatch,
}

/// The entries of a call, and the parts of them that the sink did not take, in order.
#[derive(Debug)]
pub(crate) struct SinkCallResult {
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) failures: Vec<(Range<usize>, CallFailure)>,
}

/// The reason why the sink did not take a part of a batch.
#[derive(Debug)]
pub(crate) enum CallFailure {
    /// The sink failed.
    Refused(SinkError),
    /// The sink failed, and its check reports that it is down: the error of the call, and of the check.
    Outage(SinkError, String),
    /// The sink reports that it cannot take any entry now.
    SinkUnavailable(SinkError),
    /// The sink is down, so it was not called.
    NotStarted(String),
    /// The worker stopped during the call.
    Aborted,
    /// An earlier entry with the same key has failed, so the sink was not called.
    SkippedAfterFailure,
}

impl SinkCallResult {
    /// Returns whether the sink took an entry, or refused one for good.
    pub(crate) fn shows_sink_up(&self) -> bool {
        let failed: usize = self.failures.iter().map(|(part, _)| part.len()).sum();
        let is_final = |failure: &CallFailure| matches!(failure, CallFailure::Refused(e) if e.class() == SinkErrorClass::Permanent);
        failed < self.deliveries.len() || self.failures.iter().any(|(_, failure)| is_final(failure))
    }
}

impl SinkCaller {
    /// Delivers a batch. A refused batch is halved until the bad entries are alone.
    ///
    /// After an entry that failed, no other entry with its key is delivered. A probe checks first whether the sink is
    /// up.
    pub(crate) async fn deliver(&self, batch: SinkBatch, is_probe: bool) -> SinkCallResult {
        let SinkBatch { deliveries, keys } = batch;
        if is_probe && let Err(reason) = self.check().await {
            let failures = Vec::from([(Range { start: 0, end: deliveries.len() }, CallFailure::NotStarted(reason))]);
            return SinkCallResult { deliveries, failures };
        }
        let mut failures = Vec::new();
        let mut failed_keys: Vec<OrderingKey> = Vec::new();
        // A stack: the next part is the last element.
        let mut parts = Vec::from([Range { start: 0, end: deliveries.len() }]);
        while let Some(mut part) = parts.pop() {
            let is_skipped = |n: &usize| keys.get(*n).is_some_and(|key| failed_keys.contains(key));
            if let Some(skipped) = part.clone().find(is_skipped) {
                if skipped == part.start {
                    failures.push((skipped..skipped + 1, CallFailure::SkippedAfterFailure));
                    part.start += 1;
                    parts.extend((!part.is_empty()).then_some(part));
                    continue;
                }
                parts.push(skipped..part.end);
                part.end = skipped;
            }
            let Err((failure, may_be_one_entry)) = self.deliver_part(&deliveries[part.clone()]).await else { continue };
            if may_be_one_entry && part.len() > 1 {
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
                failed_keys.extend(keys.get(part.clone()).into_iter().flatten());
                failures.push((part, failure));
            }
        }
        SinkCallResult { deliveries, failures }
    }

    /// Delivers a part in one call. A failure comes with whether a single entry may have caused it.
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
        if !self.leases.may_deliver() {
            return Err(CallError::Aborted);
        }
        let started = Instant::now();
        let call = tokio::time::timeout(self.timeout, catch_panic(self.sink.deliver(&self.origin, part)));
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

    /// Checks whether the sink is up. The error is the reason if it is not.
    async fn check(&self) -> Result<(), String> {
        let check = tokio::time::timeout(CHECK_TIMEOUT, catch_panic(self.sink.check()));
        let checked = tokio::select! {
            biased;
            checked = check => checked,
            // The worker stops, so there is no time for the check.
            () = self.abort.cancelled() => return Ok(()),
        };
        match checked {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(chain(&error)),
            Ok(Err(panic)) => Err(format!("the check of the sink panicked: {panic}")),
            Err(_elapsed) => Err(format!("the check of the sink took more than {CHECK_TIMEOUT:?}")),
        }
    }
}

enum CallError {
    Refused(SinkError),
    Panicked(SinkError),
    Aborted,
}

/// Awaits a future that may panic. The error is the message of the panic.
pub(crate) async fn catch_panic<T>(future: impl Future<Output = T>) -> Result<T, String> {
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

    /// The result of the n-th call, with a batch of these ids.
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
            leases: LeaseWatch::unbounded(),
        };
        (sink, caller)
    }

    fn unordered(ids: Range<u64>) -> SinkBatch {
        let entry = |ms| Entry { id: EntryId::new(ms, 0), fields: Fields::default() };
        let delivery = |ms| Delivery { entry: entry(ms), attempt: 1, delivered_at: Instant::now() };
        SinkBatch { deliveries: ids.map(delivery).collect(), keys: Vec::new() }
    }

    fn refused(result: &SinkCallResult) -> Vec<(Range<usize>, String)> {
        let text = |failure: &CallFailure| match failure {
            CallFailure::Refused(error) => error.to_string(),
            CallFailure::Outage(error, reason) => format!("Outage({error}, {reason})"),
            CallFailure::SinkUnavailable(error) => format!("SinkUnavailable({error})"),
            CallFailure::NotStarted(reason) => format!("NotStarted({reason})"),
            CallFailure::Aborted => "Aborted".to_owned(),
            CallFailure::SkippedAfterFailure => "Skipped".to_owned(),
        };
        result.failures.iter().map(|(part, failure)| (part.clone(), text(failure))).collect()
    }

    #[tokio::test]
    async fn refused_batch_is_halved_until_bad_entries_are_alone() {
        let (sink, caller) = caller(
            |_, ids| match ids.iter().find(|id| [3, 6].contains(id)) {
                Some(bad) => Err(SinkError::new(SinkErrorClass::Permanent, format!("{bad}"))),
                None => Ok(()),
            },
            0,
        );
        let result = caller.deliver(unordered(0..8), false).await;
        assert_eq!(refused(&result), [(3..4, "3".to_owned()), (6..7, "6".to_owned())]);
        let first_ids: Vec<_> = sink.calls.lock().unwrap().iter().map(|ids| ids[0]).collect();
        assert!(first_ids.is_sorted(), "in order: {first_ids:?}");
    }

    #[tokio::test]
    async fn entries_after_a_refused_one_of_their_key_are_skipped() {
        let script: Script = |_, ids| match ids.iter().find(|id| [2, 5].contains(id)) {
            Some(bad) => Err(SinkError::new(SinkErrorClass::Permanent, format!("{bad}"))),
            None => Ok(()),
        };
        let (sink, caller) = caller(script, 0);
        let keys = (0..8).map(|n| OrderingKey::Key(n % 2)).collect();
        let result = caller.deliver(SinkBatch { keys, ..unordered(0..8) }, false).await;
        let (two, five) = ((2..3, "2".to_owned()), (5..6, "5".to_owned()));
        let skipped = |n| (n..n + 1, "Skipped".to_owned());
        assert_eq!(refused(&result), [two, skipped(4), five, skipped(6), skipped(7)]);
        let calls = sink.calls.lock().unwrap();
        let after_two = calls.iter().skip_while(|ids| **ids != [2]);
        assert!(after_two.flatten().all(|id| [2, 3, 5].contains(id)), "{calls:?}");
    }

    #[tokio::test]
    async fn panic_fails_only_its_entry() {
        let (_, caller) = caller(|_, ids| if ids.contains(&2) { panic!("bug {}", 7) } else { Ok(()) }, 0);
        let result = caller.deliver(unordered(0..5), false).await;
        assert_eq!(refused(&result), [(2..3, "the sink panicked: bug 7".to_owned())]);
    }

    #[tokio::test(start_paused = true)]
    async fn call_fails_after_its_timeout() {
        let (_, caller) = caller(|_, _| Ok(()), 0);
        let result = caller.deliver(unordered(99..100), false).await;
        assert_eq!(refused(&result), [(0..1, "the sink did not answer within 30s".to_owned())]);
    }

    #[tokio::test]
    async fn sink_that_is_down_is_not_called_again() {
        let fails = |_, ids: &[u64]| match ids {
            [0..4, .., 7] => Err(SinkError::new(SinkErrorClass::Permanent, "one is bad")),
            _ => Err(SinkError::new(SinkErrorClass::Transient, "connection reset")),
        };
        let (sink, caller) = caller(fails, usize::MAX);
        let result = caller.deliver(unordered(0..8), false).await;
        let expected = [(0..4, "Outage(connection reset, down)".to_owned()), (4..8, "NotStarted(down)".to_owned())];
        assert_eq!(refused(&result), expected);
        assert_eq!(sink.calls.lock().unwrap().len(), 2);
        assert!(!result.shows_sink_up());
    }

    #[tokio::test]
    async fn probe_checks_the_sink_first() {
        let (sink, caller) = caller(|_, _| Ok(()), 1);
        let result = caller.deliver(unordered(0..1), true).await;
        assert_eq!(refused(&result), [(0..1, "NotStarted(down)".to_owned())]);
        assert_eq!(sink.calls.lock().unwrap().len(), 0);
        let result = caller.deliver(SinkBatch { deliveries: result.deliveries, keys: Vec::new() }, true).await;
        assert_eq!(refused(&result), []);
        assert!(result.shows_sink_up());
    }

    #[tokio::test]
    async fn permanent_refusal_shows_that_the_sink_is_up() {
        let (_, caller) = caller(|_, _| Err(SinkError::new(SinkErrorClass::Permanent, "no")), 0);
        assert!(caller.deliver(unordered(0..1), false).await.shows_sink_up());
    }
}
