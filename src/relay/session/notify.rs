//! What wakes those who wait for something that concerns all of them.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// Rung for every change; wakes whoever listens.
///
/// Does what a `tokio::sync::watch` of nothing would, but for two things. Whether it was rung is told without a lock, which
/// sessions ask each time they are polled. And those who wait are not linked through their own memory, which with many
/// of them is in no cache: their wakers are side by side.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    /// How often it was rung. Changes only under the lock.
    rings: AtomicU64,
    /// Who has asked to be woken since.
    waiting: Mutex<Slab<Waker>>,
}

impl Bell {
    /// Wakes everyone who listens.
    pub(crate) fn ring(&self) {
        let mut waiting = self.waiting();
        self.rings.fetch_add(1, Ordering::Release);
        // As many are likely to come back. Who is woken comes back at once, and should not find the lock taken.
        let fresh = Slab::with_capacity(waiting.len());
        let woken = std::mem::replace(&mut *waiting, fresh);
        drop(waiting);
        woken.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// Whether it was rung at all.
    pub(crate) fn is_rung(&self) -> bool {
        self.rings() > 0
    }

    /// How often it was rung.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.load(Ordering::Acquire)
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Waker>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears a bell.
#[derive(Debug)]
pub(crate) struct Listener {
    bell: Arc<Bell>,
    /// Up to which ring it has heard.
    heard: u64,
    /// Whom it wakes, after which ring that one began to wait, and its place among those who do.
    waits: Option<(Waker, u64, usize)>,
}

impl Listener {
    /// Has heard nothing: where the bell was rung before, this is ready at once.
    pub(crate) fn new(bell: Arc<Bell>) -> Self {
        Self { bell, heard: 0, waits: None }
    }

    /// Leaves alone every ring until now.
    pub(crate) fn catch_up(&mut self) {
        self.heard = self.bell.rings();
    }

    /// Ready if the bell was rung since this has caught up.
    pub(crate) fn poll_ring(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.bell.rings() != self.heard {
            return Poll::Ready(());
        }
        if matches!(&self.waits, Some((waker, since, _)) if *since == self.heard && waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.leave();
        let mut waiting = self.bell.waiting();
        if self.bell.rings() != self.heard {
            return Poll::Ready(());
        }
        let place = waiting.insert(cx.waker().clone());
        match &mut self.waits {
            Some((waker, since, known)) if waker.will_wake(cx.waker()) => (*since, *known) = (self.heard, place),
            waits => *waits = Some((cx.waker().clone(), self.heard, place)),
        }
        Poll::Pending
    }

    /// Waits until the bell is rung, unless it was since this has caught up.
    pub(crate) async fn rung(&mut self) {
        poll_fn(|cx| self.poll_ring(cx)).await;
    }

    /// Waits no more.
    fn leave(&self) {
        // Whoever was woken has no place any more.
        if let Some((_, since, place)) = &self.waits
            && *since == self.bell.rings()
        {
            let mut waiting = self.bell.waiting();
            if *since == self.bell.rings() {
                waiting.remove(*place);
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;
    use std::time::Duration;

    use tokio::task::JoinSet;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A bell, and someone who listens and counts how often it was woken.
    fn one() -> (Arc<Bell>, Listener, Arc<Count>) {
        let bell = Arc::new(Bell::default());
        (bell.clone(), Listener::new(bell), Arc::new(Count::default()))
    }

    fn hears(listener: &mut Listener, count: &Arc<Count>) -> bool {
        listener.poll_ring(&mut Context::from_waker(&count.clone().into())).is_ready()
    }

    fn woken(count: &Count) -> usize {
        count.0.load(Ordering::SeqCst)
    }

    #[test]
    fn a_ring_is_heard_until_the_listener_has_caught_up() {
        let (bell, mut listener, count) = one();
        bell.ring();
        assert!(hears(&mut listener, &count) && hears(&mut listener, &count));
        listener.catch_up();
        assert!(!hears(&mut listener, &count));
        assert_eq!(woken(&count), 0);
    }

    #[test]
    fn whoever_waits_is_woken_once_however_often_it_asked() {
        let (bell, mut listener, count) = one();
        assert!(!hears(&mut listener, &count) && !hears(&mut listener, &count));
        bell.ring();
        bell.ring();
        assert_eq!(woken(&count), 1);
        assert!(hears(&mut listener, &count));
        listener.catch_up();
        assert!(!hears(&mut listener, &count));
        bell.ring();
        assert_eq!(woken(&count), 2);
    }

    #[test]
    fn who_asked_last_is_woken() {
        let (bell, mut listener, first) = one();
        let second = Arc::new(Count::default());
        assert!(!hears(&mut listener, &first) && !hears(&mut listener, &second));
        bell.ring();
        assert_eq!((woken(&first), woken(&second)), (0, 1));
    }

    #[test]
    fn those_who_are_gone_are_forgotten() {
        let (bell, mut listener, count) = one();
        let (mut other, other_count) = (Listener::new(bell.clone()), Arc::new(Count::default()));
        assert!(!hears(&mut listener, &count) && !hears(&mut other, &other_count));
        drop(listener);
        assert_eq!((bell.waiting().len(), Arc::strong_count(&count)), (1, 1));
        bell.ring();
        assert_eq!((woken(&count), woken(&other_count)), (0, 1));
        drop(other);
        assert!(bell.waiting().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_ring_is_missed_by_those_who_look_before_they_wait() {
        const RINGS: u64 = 20_000;
        let (bell, news) = (Arc::new(Bell::default()), Arc::new(AtomicU64::new(0)));
        let mut listeners = JoinSet::new();
        for _ in 0..8 {
            let (mut listener, news) = (Listener::new(bell.clone()), news.clone());
            listeners.spawn(async move {
                loop {
                    listener.catch_up();
                    if news.load(Ordering::Acquire) == RINGS {
                        return;
                    }
                    listener.rung().await;
                }
            });
        }
        for _ in 0..RINGS {
            news.fetch_add(1, Ordering::Release);
            bell.ring();
        }
        let all = tokio::time::timeout(Duration::from_mins(1), listeners.join_all());
        assert_eq!(all.await.map(|heard| heard.len()), Ok(8), "whoever missed the last ring would wait for ever");
    }
}
