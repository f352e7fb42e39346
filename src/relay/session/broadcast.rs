//! Delivers new entries to the clients that wait for them: a few tasks pass over all sessions and write to each.
//!
//! Waking one task per client for every alert costs a large part of the write itself. Such a task is queued,
//! scheduled, and checks everything that could have woken it. So sessions that wait for new entries only are written
//! to in place. Their own tasks do all work that takes longer.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use slab::Slab;
use tokio::runtime::Handle;
use tokio::task::coop::unconstrained;
use tokio_util::task::TaskTracker;

use crate::relay::metrics::{ChannelMetrics, LocalMetrics};
use crate::relay::session::notify::Broadcast;

/// The number of clients between two yields to the runtime: about 0.2 ms.
const CLIENTS_PER_YIELD: usize = 32;

/// The number of clients per task before another task helps: about 3 ms.
///
/// With fewer, waking another worker costs more than it saves: measured with 500 clients on two cores.
const CLIENTS_PER_TASK: usize = 512;

/// A session that waits for new entries.
pub(crate) trait Recipient: Send + Sync {
    /// Writes the new entries, if that needs no waiting. Otherwise wakes the session's task to do the rest.
    fn deliver(&self, local: &mut LocalMetrics);

    /// Wakes the session's own task.
    fn wake(&self);
}

/// The sessions that wait for new entries of a channel.
pub(crate) struct Fanout {
    broadcast: Arc<Broadcast>,
    metrics: ChannelMetrics,
    state: Mutex<FanoutState>,
    tasks: TaskTracker,
}

#[derive(Default)]
struct FanoutState {
    recipients: Slab<Arc<dyn Recipient>>,
    /// The key of the next session. All before it have received the entries that there were when this pass began.
    next: usize,
    /// Whether there are newer entries, so that another pass must follow.
    has_new_entries: bool,
    /// The number of tasks that run this pass.
    running_tasks: usize,
}

impl Fanout {
    pub(crate) fn new(broadcast: Arc<Broadcast>, metrics: ChannelMetrics) -> Arc<Self> {
        Arc::new(Self { broadcast, metrics, state: Mutex::default(), tasks: TaskTracker::new() })
    }

    /// Adds a session that has seen all entries up to this generation of the broadcast.
    ///
    /// Returns `None` if there are newer ones. The session then receives all entries until it leaves.
    pub(crate) fn join(&self, generation: u64, recipient: impl FnOnce() -> Arc<dyn Recipient>) -> Option<usize> {
        let mut state = self.state();
        (self.broadcast.generation() == generation).then(|| state.recipients.insert(recipient()))
    }

    /// Removes a session.
    pub(crate) fn leave(&self, key: usize) {
        let removed = self.state().recipients.remove(key);
        // After the lock: the end of a session needs it too.
        drop(removed);
    }

    /// Notifies the broadcast of new entries, and starts to deliver them to all sessions here. Must be called within a
    /// runtime.
    pub(crate) fn notify_all(self: &Arc<Self>) {
        // First, so that a session which joins too late sees the new generation.
        self.broadcast.notify_all();
        let mut state = self.state();
        if state.recipients.is_empty() {
            return;
        }
        if state.running_tasks == 0 {
            state.next = 0;
            if state.recipients.capacity() > 4 * state.recipients.len().max(CLIENTS_PER_YIELD) {
                // A pass visits all slots, and also those of clients that have left.
                state.recipients.shrink_to_fit();
            }
        } else {
            state.has_new_entries = true;
        }
        let wanted = state.recipients.len().div_ceil(CLIENTS_PER_TASK).min(Handle::current().metrics().num_workers());
        for _ in state.running_tasks..wanted {
            state.running_tasks += 1;
            self.tasks.spawn(unconstrained(self.clone().run_pass()));
        }
    }

    /// Delivers to all sessions, together with the other tasks of this pass.
    async fn run_pass(self: Arc<Self>) {
        let (mut local, mut clients) = (self.metrics.local(), Vec::with_capacity(CLIENTS_PER_YIELD));
        while self.next_clients(&mut clients) {
            for recipient in clients.drain(..) {
                // A panic concerns one session only. Its own task then ends it.
                if catch_unwind(AssertUnwindSafe(|| recipient.deliver(&mut local))).is_err() {
                    recipient.wake();
                }
            }
            local.flush();
            yield_to_runtime().await;
        }
    }

    /// Takes the next sessions of the pass. Returns false if none is left.
    fn next_clients(&self, clients: &mut Vec<Arc<dyn Recipient>>) -> bool {
        let mut state = self.state();
        let FanoutState { recipients, next, has_new_entries, running_tasks } = &mut *state;
        loop {
            while clients.len() < CLIENTS_PER_YIELD && *next < recipients.capacity() {
                clients.extend(recipients.get(*next).cloned());
                *next += 1;
            }
            if !clients.is_empty() {
                return true;
            }
            if !std::mem::take(has_new_entries) {
                *running_tasks -= 1;
                return false;
            }
            *next = 0;
        }
    }

    fn state(&self) -> MutexGuard<'_, FanoutState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Yields to the runtime.
///
/// Unlike tokio's own yield, any worker may continue this task: the present one may be busy for long with its next
/// task.
async fn yield_to_runtime() {
    let mut has_yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl std::fmt::Debug for Fanout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fanout").field("waiting", &self.state().recipients.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;
    use std::time::Duration;

    use tokio::task::{JoinSet, yield_now};
    use tokio::time::timeout;

    use super::*;
    use crate::metrics::Metrics;

    /// A client that records how many entries it has seen.
    #[derive(Default)]
    struct TestClient {
        published: Arc<AtomicU64>,
        seen: AtomicU64,
        fails: bool,
        is_woken: AtomicBool,
    }

    impl Recipient for TestClient {
        fn deliver(&self, _: &mut LocalMetrics) {
            assert!(!self.fails, "this client fails");
            self.seen.fetch_max(self.published.load(Ordering::SeqCst), Ordering::SeqCst);
        }

        fn wake(&self) {
            self.is_woken.store(true, Ordering::SeqCst);
        }
    }

    struct TestFanout {
        broadcast: Arc<Broadcast>,
        published: Arc<AtomicU64>,
        fanout: Arc<Fanout>,
    }

    impl TestFanout {
        fn new() -> Self {
            let broadcast = Arc::<Broadcast>::default();
            let fanout = Fanout::new(broadcast.clone(), ChannelMetrics::new(&Metrics::new(), "alerts"));
            Self { broadcast, published: Arc::default(), fanout }
        }

        fn client(&self, fails: bool) -> Arc<TestClient> {
            Arc::new(TestClient { published: self.published.clone(), fails, ..TestClient::default() })
        }

        /// Adds a client, which looks for entries until it has seen all.
        fn join(&self, client: &Arc<TestClient>) -> usize {
            loop {
                let generation = self.broadcast.generation();
                client.seen.fetch_max(self.published.load(Ordering::SeqCst), Ordering::SeqCst);
                if let Some(key) = self.fanout.join(generation, || client.clone()) {
                    return key;
                }
            }
        }

        fn publish(&self) {
            self.published.fetch_add(1, Ordering::SeqCst);
            self.fanout.notify_all();
        }
    }

    async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let waited = timeout(Duration::from_mins(1), async {
            while !is_so() {
                yield_now().await;
            }
        });
        assert!(waited.await.is_ok(), "{what}");
    }

    #[test]
    fn join_with_an_old_generation_is_refused() {
        let test = TestFanout::new();
        let (generation, client) = (test.broadcast.generation(), test.client(false));
        test.broadcast.notify_all();
        assert_eq!(test.fanout.join(generation, || client.clone()), None);
        assert!(test.fanout.join(test.broadcast.generation(), || client.clone()).is_some());
    }

    #[test]
    fn join_during_a_notification_is_refused() {
        for _ in 0..1_000 {
            let (test, start) = (TestFanout::new(), Barrier::new(2));
            let generation = test.broadcast.generation();
            let key = thread::scope(|scope| {
                let taken = test.fanout.state();
                let joining = scope.spawn(|| {
                    start.wait();
                    test.fanout.join(generation, || test.client(false))
                });
                start.wait();
                (0..1_000).for_each(|_| std::hint::spin_loop());
                test.broadcast.notify_all();
                drop(taken);
                joining.join()
            });
            assert_eq!(key.expect("it does not panic"), None);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn join_during_delivery_misses_no_entry() {
        const BURSTS: usize = 1_000;
        let test = Arc::new(TestFanout::new());
        let clients: Vec<_> = (0..2 * CLIENTS_PER_TASK).map(|_| test.client(false)).collect();
        let mut keys: Vec<_> = clients.iter().map(|client| test.join(client)).collect();
        for burst in 0..BURSTS {
            let mut publisher = JoinSet::new();
            publisher.spawn({
                let test = test.clone();
                async move { (0..3).for_each(|_| test.publish()) }
            });
            let index = burst * 7 % clients.len();
            test.fanout.leave(keys[index]);
            keys[index] = test.join(&clients[index]);
            publisher.join_all().await;
            wait_until("the pass is over", || test.fanout.state().running_tasks == 0).await;
            let published = test.published.load(Ordering::SeqCst);
            let missed = clients.iter().position(|client| client.seen.load(Ordering::SeqCst) != published);
            assert_eq!(missed, None, "a missed entry is never delivered: burst {burst}, client {index} joined");
        }
    }

    #[tokio::test]
    async fn slots_of_departed_clients_are_freed() {
        let test = TestFanout::new();
        let client = test.client(false);
        test.join(&client);
        let keys: Vec<_> = (0..2 * CLIENTS_PER_TASK).map(|_| test.join(&test.client(false))).collect();
        for key in keys {
            test.fanout.leave(key);
        }
        test.publish();
        wait_until("the pass is over", || test.fanout.state().running_tasks == 0).await;
        assert!(test.fanout.state().recipients.capacity() <= 4 * CLIENTS_PER_YIELD);
        assert_eq!(client.seen.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn panic_of_one_client_concerns_no_other() {
        let test = TestFanout::new();
        let clients = [false, true, false].map(|fails| test.client(fails));
        for client in &clients {
            test.join(client);
        }
        test.publish();
        wait_until("the pass is over", || test.fanout.state().running_tasks == 0).await;
        let is_woken = clients.each_ref().map(|client| client.is_woken.load(Ordering::SeqCst));
        let seen = clients.each_ref().map(|client| client.seen.load(Ordering::SeqCst));
        assert_eq!((is_woken, seen), ([false, true, false], [1, 0, 1]));
    }

    #[tokio::test]
    async fn departed_client_receives_nothing_and_is_dropped() {
        let test = TestFanout::new();
        let (gone, here) = (test.client(false), test.client(false));
        let key = test.join(&gone);
        test.join(&here);
        test.fanout.leave(key);
        assert_eq!(Arc::strong_count(&gone), 1);
        test.publish();
        wait_until("the client that is left receives it", || here.seen.load(Ordering::SeqCst) == 1).await;
        assert_eq!(gone.seen.load(Ordering::SeqCst), 0);
    }
}
