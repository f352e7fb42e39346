//! A notification for all sessions of a channel, or of the relay.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// Wakes all subscribers, and counts its notifications as generations.
///
/// Compared with `tokio::sync::watch`: sessions read the generation each time they are polled, and here that takes no
/// lock. And waiters are not linked through their own memory, which with many of them is in no cache: their wakers lie
/// side by side.
#[derive(Debug, Default)]
pub(crate) struct Broadcast {
    /// The number of notifications. Changes only under the lock of `wakers`.
    generation: AtomicU64,
    /// The subscribers that wait for the next generation.
    wakers: Mutex<Slab<Waker>>,
}

impl Broadcast {
    /// Starts a new generation and wakes all subscribers.
    pub(crate) fn notify_all(&self) {
        let mut wakers = self.wakers();
        self.generation.fetch_add(1, Ordering::Release);
        // As many are likely to wait again. Woken subscribers return at once, and should not find the lock taken.
        let fresh = Slab::with_capacity(wakers.len());
        let woken = std::mem::replace(&mut *wakers, fresh);
        drop(wakers);
        woken.into_iter().for_each(|(_, waker)| waker.wake());
    }

    /// Returns whether there was any notification.
    pub(crate) fn was_notified(&self) -> bool {
        self.generation() > 0
    }

    /// Returns the number of notifications.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn wakers(&self) -> MutexGuard<'_, Slab<Waker>> {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Receives the notifications of a [`Broadcast`].
#[derive(Debug)]
pub(crate) struct Subscriber {
    broadcast: Arc<Broadcast>,
    /// The last generation that this subscriber has seen.
    seen: u64,
    /// The registered waker, the generation in which it was registered, and its key.
    registration: Option<(Waker, u64, usize)>,
}

impl Subscriber {
    /// Creates a subscriber that has seen nothing: it is ready at once if there was a notification.
    pub(crate) fn new(broadcast: Arc<Broadcast>) -> Self {
        Self { broadcast, seen: 0, registration: None }
    }

    /// Marks all notifications until now as seen.
    pub(crate) fn mark_seen(&mut self) {
        self.seen = self.broadcast.generation();
    }

    /// Ready if there was a notification since [`Self::mark_seen`].
    pub(crate) fn poll_notified(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.broadcast.generation() != self.seen {
            return Poll::Ready(());
        }
        if matches!(&self.registration, Some((waker, since, _)) if *since == self.seen && waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.deregister();
        let mut wakers = self.broadcast.wakers();
        if self.broadcast.generation() != self.seen {
            return Poll::Ready(());
        }
        let key = wakers.insert(cx.waker().clone());
        match &mut self.registration {
            Some((waker, since, known)) if waker.will_wake(cx.waker()) => (*since, *known) = (self.seen, key),
            registration => *registration = Some((cx.waker().clone(), self.seen, key)),
        }
        Poll::Pending
    }

    /// Waits for a notification, unless there was one since [`Self::mark_seen`]. Cancel-safe: yes.
    pub(crate) async fn notified(&mut self) {
        poll_fn(|cx| self.poll_notified(cx)).await;
    }

    /// Removes the registered waker.
    fn deregister(&self) {
        // A woken subscriber is no longer registered.
        if let Some((_, since, key)) = &self.registration
            && *since == self.broadcast.generation()
        {
            let mut wakers = self.broadcast.wakers();
            if *since == self.broadcast.generation() {
                wakers.remove(*key);
            }
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.deregister();
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

    /// Returns a broadcast, a subscriber, and a counter of its wakes.
    fn subscribed() -> (Arc<Broadcast>, Subscriber, Arc<Count>) {
        let broadcast = Arc::new(Broadcast::default());
        (broadcast.clone(), Subscriber::new(broadcast), Arc::new(Count::default()))
    }

    fn is_notified(subscriber: &mut Subscriber, count: &Arc<Count>) -> bool {
        subscriber.poll_notified(&mut Context::from_waker(&count.clone().into())).is_ready()
    }

    fn woken(count: &Count) -> usize {
        count.0.load(Ordering::SeqCst)
    }

    #[test]
    fn notification_is_ready_until_marked_as_seen() {
        let (broadcast, mut subscriber, count) = subscribed();
        broadcast.notify_all();
        assert!(is_notified(&mut subscriber, &count) && is_notified(&mut subscriber, &count));
        subscriber.mark_seen();
        assert!(!is_notified(&mut subscriber, &count));
        assert_eq!(woken(&count), 0);
    }

    #[test]
    fn waiting_subscriber_is_woken_once() {
        let (broadcast, mut subscriber, count) = subscribed();
        assert!(!is_notified(&mut subscriber, &count) && !is_notified(&mut subscriber, &count));
        broadcast.notify_all();
        broadcast.notify_all();
        assert_eq!(woken(&count), 1);
        assert!(is_notified(&mut subscriber, &count));
        subscriber.mark_seen();
        assert!(!is_notified(&mut subscriber, &count));
        broadcast.notify_all();
        assert_eq!(woken(&count), 2);
    }

    #[test]
    fn last_polled_task_is_woken() {
        let (broadcast, mut subscriber, first) = subscribed();
        let second = Arc::new(Count::default());
        assert!(!is_notified(&mut subscriber, &first) && !is_notified(&mut subscriber, &second));
        broadcast.notify_all();
        assert_eq!((woken(&first), woken(&second)), (0, 1));
    }

    #[test]
    fn dropped_subscriber_is_removed() {
        let (broadcast, mut subscriber, count) = subscribed();
        let (mut other, other_count) = (Subscriber::new(broadcast.clone()), Arc::new(Count::default()));
        assert!(!is_notified(&mut subscriber, &count) && !is_notified(&mut other, &other_count));
        drop(subscriber);
        assert_eq!((broadcast.wakers().len(), Arc::strong_count(&count)), (1, 1));
        broadcast.notify_all();
        assert_eq!((woken(&count), woken(&other_count)), (0, 1));
        drop(other);
        assert!(broadcast.wakers().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn notification_between_check_and_wait_is_not_missed() {
        const RINGS: u64 = 20_000;
        let (broadcast, published) = (Arc::new(Broadcast::default()), Arc::new(AtomicU64::new(0)));
        let mut subscribers = JoinSet::new();
        for _ in 0..8 {
            let (mut subscriber, published) = (Subscriber::new(broadcast.clone()), published.clone());
            subscribers.spawn(async move {
                loop {
                    subscriber.mark_seen();
                    if published.load(Ordering::Acquire) == RINGS {
                        return;
                    }
                    subscriber.notified().await;
                }
            });
        }
        for _ in 0..RINGS {
            published.fetch_add(1, Ordering::Release);
            broadcast.notify_all();
        }
        let all = tokio::time::timeout(Duration::from_mins(1), subscribers.join_all());
        assert_eq!(all.await.map(|seen| seen.len()), Ok(8), "a missed notification would wait for ever");
    }
}
