//! A timer that costs nothing while it runs.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::task::coop;
use tokio::time::{Instant, Sleep};

/// Wakes whoever polls it at a moment that may be set anew.
///
/// A session polls its timer with every alert, and the timer has never anything to say: it is asked only where it was not
/// yet told whom to wake, or must have fired by the clock.
#[derive(Debug)]
pub(super) struct Alarm {
    at: Instant,
    /// Whom it will wake.
    waker: Option<Waker>,
    timer: Pin<Box<Sleep>>,
}

impl Alarm {
    pub(super) fn new(at: Instant) -> Self {
        Self { at, waker: None, timer: Box::pin(tokio::time::sleep_until(at)) }
    }

    /// When it goes off.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    /// Goes off at that moment instead.
    pub(super) fn set(&mut self, at: Instant) {
        (self.at, self.waker) = (at, None);
        self.timer.as_mut().reset(at);
    }

    /// Ready once its time has come, until it is set anew.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_running = self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if is_running && Instant::now() < self.at {
            return Poll::Pending;
        }
        // Without budget a timer is not ready, and has not taken notice of the waker either.
        let has_budget = coop::has_budget_remaining();
        let outcome = self.timer.as_mut().poll(cx);
        self.waker = (outcome.is_pending() && has_budget).then(|| cx.waker().clone());
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use futures_util::future::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_goes_off_when_it_was_set_to_however_often_it_is_asked() {
        let begun = Instant::now();
        let mut alarm = Alarm::new(begun + Duration::from_secs(10));
        for _ in 0..3 {
            assert!(poll_fn(|cx| Poll::Ready(alarm.poll(cx))).await.is_pending());
        }
        alarm.set(begun + Duration::from_secs(5));
        assert!(poll_fn(|cx| alarm.poll(cx)).now_or_never().is_none());
        poll_fn(|cx| alarm.poll(cx)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(5));
        alarm.set(begun + Duration::from_secs(7));
        poll_fn(|cx| alarm.poll(cx)).await;
        assert_eq!(begun.elapsed(), Duration::from_secs(7));
    }

    /// Waits for what must be ready at that moment, woken by the alarm and by nothing else.
    async fn ready_at(moment: Instant, poll: impl FnMut(&mut Context<'_>) -> Poll<()>) {
        let waited = timeout(Duration::from_mins(1), poll_fn(poll)).await;
        assert_eq!((waited, Instant::now()), (Ok(()), moment));
    }

    #[tokio::test(start_paused = true)]
    async fn who_asked_last_is_woken() {
        let mut alarm = Alarm::new(Instant::now() + Duration::from_secs(1));
        assert!(alarm.poll(&mut Context::from_waker(Waker::noop())).is_pending());
        ready_at(alarm.at(), |cx| alarm.poll(cx)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_has_used_up_its_turn_is_woken_all_the_same() {
        let (mut alarm, mut is_first) = (Alarm::new(Instant::now() + Duration::from_secs(1)), true);
        ready_at(alarm.at(), |cx| {
            while is_first && coop::has_budget_remaining() {
                std::task::ready!(coop::poll_proceed(cx)).made_progress();
            }
            is_first = false;
            alarm.poll(cx)
        })
        .await;
    }
}
