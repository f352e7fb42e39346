//! How news reaches the clients that wait for it: a few tasks go from one to the next and write to each.
//!
//! To wake a task per client for every alert costs a good part of what the write costs: the task is queued and taken up,
//! and looks at all that could be the matter. So those who wait for nothing but news are given it in place; their own
//! tasks do whatever takes longer.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use slab::Slab;
use tokio::runtime::Handle;
use tokio::task::coop::unconstrained;
use tokio_util::task::TaskTracker;

use crate::relay::metrics::{Meter, Tally};
use crate::relay::session::notify::Bell;

/// How many are given news between two looks at what else there is to do: some 0.2 ms.
const ROUND: usize = 32;

/// How many one task gives news to before another one helps: some 3 ms. For fewer, waking another worker costs more than
/// it saves: measured with 500 clients on two cores.
const CROWD: usize = 512;

/// Someone who waits for news.
pub(crate) trait Recipient: Send + Sync {
    /// Is given what there is, as far as that can be done without waiting. What is left to do is done by its own task, which
    /// is woken for that.
    fn give(&self, tally: &mut Tally);

    /// Wakes its own task.
    fn wake(&self);
}

/// Those who wait for the news of a channel.
pub(crate) struct Fanout {
    bell: Arc<Bell>,
    meter: Meter,
    waiting: Mutex<Waiting>,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Waiting {
    recipients: Slab<Arc<dyn Recipient>>,
    /// Who is next: everyone before has been given what there was when this began.
    next: usize,
    /// Whether there was more news since.
    is_behind: bool,
    /// How many tasks go round.
    going: usize,
}

impl Fanout {
    pub(crate) fn new(bell: Arc<Bell>, meter: Meter) -> Arc<Self> {
        Arc::new(Self { bell, meter, waiting: Mutex::default(), tasks: TaskTracker::new() })
    }

    /// Takes in someone who has seen all news until that ring of the bell; nothing where there is more. Whoever is in is
    /// given all that comes until it leaves.
    pub(crate) fn join(&self, heard: u64, recipient: impl FnOnce() -> Arc<dyn Recipient>) -> Option<usize> {
        let mut waiting = self.waiting();
        (self.bell.rings() == heard).then(|| waiting.recipients.insert(recipient()))
    }

    /// Lets go of whoever has that place.
    pub(crate) fn leave(&self, place: usize) {
        let left = self.waiting().recipients.remove(place);
        // After the lock, which the end of a session would want.
        drop(left);
    }

    /// There is news: rings the bell, and begins to give it to all who are in. To be called within a runtime.
    pub(crate) fn announce(self: &Arc<Self>) {
        // First: whoever comes too late to be in has to hear that there is more.
        self.bell.ring();
        let mut waiting = self.waiting();
        if waiting.recipients.is_empty() {
            return;
        }
        if waiting.going == 0 {
            waiting.next = 0;
            if waiting.recipients.capacity() > 4 * waiting.recipients.len().max(ROUND) {
                // All places are looked at, also those that a crowd has left.
                waiting.recipients.shrink_to_fit();
            }
        } else {
            waiting.is_behind = true;
        }
        let wanted = waiting.recipients.len().div_ceil(CROWD).min(Handle::current().metrics().num_workers());
        for _ in waiting.going..wanted {
            waiting.going += 1;
            self.tasks.spawn(unconstrained(self.clone().go_round()));
        }
    }

    /// Gives to all what there is, together with the others that do.
    async fn go_round(self: Arc<Self>) {
        let (mut tally, mut round) = (self.meter.tally(), Vec::with_capacity(ROUND));
        while self.take_round(&mut round) {
            for recipient in round.drain(..) {
                // What is the matter with one is not the matter of the others. Its own task ends where this has failed.
                if catch_unwind(AssertUnwindSafe(|| recipient.give(&mut tally))).is_err() {
                    recipient.wake();
                }
            }
            tally.flush();
            make_way().await;
        }
    }

    /// Whose turn it is; nothing once all had theirs.
    fn take_round(&self, round: &mut Vec<Arc<dyn Recipient>>) -> bool {
        let mut waiting = self.waiting();
        let Waiting { recipients, next, is_behind, going } = &mut *waiting;
        loop {
            while round.len() < ROUND && *next < recipients.capacity() {
                round.extend(recipients.get(*next).cloned());
                *next += 1;
            }
            if !round.is_empty() {
                return true;
            }
            if !std::mem::take(is_behind) {
                *going -= 1;
                return false;
            }
            *next = 0;
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets others have their turn. Unlike after tokio's own yielding, any worker may go on: the one that was at it may be busy
/// for long with what comes next.
async fn make_way() {
    let mut has_made = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut has_made, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl std::fmt::Debug for Fanout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fanout").field("waiting", &self.waiting().recipients.len()).finish_non_exhaustive()
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

    /// Someone who sees how much news there is.
    #[derive(Default)]
    struct Reader {
        news: Arc<AtomicU64>,
        seen: AtomicU64,
        fails: bool,
        is_woken: AtomicBool,
    }

    impl Recipient for Reader {
        fn give(&self, _: &mut Tally) {
            assert!(!self.fails, "this is what it is for");
            self.seen.fetch_max(self.news.load(Ordering::SeqCst), Ordering::SeqCst);
        }

        fn wake(&self) {
            self.is_woken.store(true, Ordering::SeqCst);
        }
    }

    struct Site {
        bell: Arc<Bell>,
        news: Arc<AtomicU64>,
        fanout: Arc<Fanout>,
    }

    impl Site {
        fn new() -> Self {
            let bell = Arc::<Bell>::default();
            let fanout = Fanout::new(bell.clone(), Meter::new(&Metrics::new(), "alerts"));
            Self { bell, news: Arc::default(), fanout }
        }

        fn reader(&self, fails: bool) -> Arc<Reader> {
            Arc::new(Reader { news: self.news.clone(), fails, ..Reader::default() })
        }

        /// Lets someone in who looks as often as it takes.
        fn let_in(&self, reader: &Arc<Reader>) -> usize {
            loop {
                let heard = self.bell.rings();
                reader.seen.fetch_max(self.news.load(Ordering::SeqCst), Ordering::SeqCst);
                if let Some(place) = self.fanout.join(heard, || reader.clone()) {
                    return place;
                }
            }
        }

        fn publish(&self) {
            self.news.fetch_add(1, Ordering::SeqCst);
            self.fanout.announce();
        }
    }

    async fn becomes(what: &str, is_so: impl Fn() -> bool) {
        let waited = timeout(Duration::from_mins(1), async {
            while !is_so() {
                yield_now().await;
            }
        });
        assert!(waited.await.is_ok(), "{what}");
    }

    #[test]
    fn who_has_not_seen_all_news_is_not_let_in() {
        let site = Site::new();
        let (heard, reader) = (site.bell.rings(), site.reader(false));
        site.bell.ring();
        assert_eq!(site.fanout.join(heard, || reader.clone()), None);
        assert!(site.fanout.join(site.bell.rings(), || reader.clone()).is_some());
    }

    #[test]
    fn who_is_about_to_be_let_in_when_news_comes_is_not() {
        for _ in 0..1_000 {
            let (site, start) = (Site::new(), Barrier::new(2));
            let heard = site.bell.rings();
            let place = thread::scope(|scope| {
                let taken = site.fanout.waiting();
                let joining = scope.spawn(|| {
                    start.wait();
                    site.fanout.join(heard, || site.reader(false))
                });
                start.wait();
                (0..1_000).for_each(|_| std::hint::spin_loop());
                site.bell.ring();
                drop(taken);
                joining.join()
            });
            assert_eq!(place.expect("it does not panic"), None);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_news_is_missed_by_those_who_come_while_it_is_given() {
        const BURSTS: usize = 1_000;
        let site = Arc::new(Site::new());
        let readers: Vec<_> = (0..2 * CROWD).map(|_| site.reader(false)).collect();
        let mut places: Vec<_> = readers.iter().map(|reader| site.let_in(reader)).collect();
        for burst in 0..BURSTS {
            let mut publisher = JoinSet::new();
            publisher.spawn({
                let site = site.clone();
                async move { (0..3).for_each(|_| site.publish()) }
            });
            let index = burst * 7 % readers.len();
            site.fanout.leave(places[index]);
            places[index] = site.let_in(&readers[index]);
            publisher.join_all().await;
            becomes("all had their turn", || site.fanout.waiting().going == 0).await;
            let news = site.news.load(Ordering::SeqCst);
            let missed = readers.iter().position(|reader| reader.seen.load(Ordering::SeqCst) != news);
            assert_eq!(missed, None, "whoever missed news would wait for ever, in burst {burst} in which {index} came");
        }
    }

    #[tokio::test]
    async fn places_that_a_crowd_has_left_are_not_looked_at_for_ever() {
        let site = Site::new();
        let reader = site.reader(false);
        site.let_in(&reader);
        let places: Vec<_> = (0..2 * CROWD).map(|_| site.let_in(&site.reader(false))).collect();
        for place in places {
            site.fanout.leave(place);
        }
        site.publish();
        becomes("all had their turn", || site.fanout.waiting().going == 0).await;
        assert!(site.fanout.waiting().recipients.capacity() <= 4 * ROUND);
        assert_eq!(reader.seen.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn where_one_fails_its_task_is_woken_and_the_others_have_their_news() {
        let site = Site::new();
        let readers = [false, true, false].map(|fails| site.reader(fails));
        for reader in &readers {
            site.let_in(reader);
        }
        site.publish();
        becomes("all had their turn", || site.fanout.waiting().going == 0).await;
        let is_woken = readers.each_ref().map(|reader| reader.is_woken.load(Ordering::SeqCst));
        let seen = readers.each_ref().map(|reader| reader.seen.load(Ordering::SeqCst));
        assert_eq!((is_woken, seen), ([false, true, false], [1, 0, 1]));
    }

    #[tokio::test]
    async fn who_has_left_is_given_nothing_and_forgotten() {
        let site = Site::new();
        let (gone, here) = (site.reader(false), site.reader(false));
        let place = site.let_in(&gone);
        site.let_in(&here);
        site.fanout.leave(place);
        assert_eq!(Arc::strong_count(&gone), 1);
        site.publish();
        becomes("who is here is given it", || here.seen.load(Ordering::SeqCst) == 1).await;
        assert_eq!(gone.seen.load(Ordering::SeqCst), 0);
    }
}
