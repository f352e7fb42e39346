//! How a desk serves: one reader for all who wait, and one clock for all leases.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::token::Token;
use crate::event::{ConsumerName, DeadLetterReason, Delivery, Entry, EntryId, Fields, field};
use crate::pull::consumer::{Desk, PullError, Task, Waiter};
use crate::store::{Cursor, Outcome, Pending, Receipt, Redemption, Settlement, StoreError, StoreErrorKind};

/// How long one read of the store waits for entries.
const READ_WAIT: Duration = Duration::from_secs(1);
/// The most entries that one read takes for all who wait.
const READ_LIMIT: usize = 500;
/// Before the store is asked again after it has failed.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How many leases that ended are looked up in the store, to tell those that were settled elsewhere.
const LOOKED_UP: usize = 100;
/// The most entries of one page of what an earlier life has left.
const SWEEP: usize = 100;

impl Desk {
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::join!(self.serve(&stop), self.ring(&stop), self.close_at(&stop));
    }

    /// Lets those who wait go at once when this instance stops.
    async fn close_at(&self, stop: &CancellationToken) {
        stop.cancelled().await;
        self.close();
    }

    /// Rings for the guard whenever a lease ends.
    async fn ring(&self, stop: &CancellationToken) {
        loop {
            let next = self.lock().ledger.next_end();
            let end = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.sooner.notified() => continue,
                () = end => {}
            }
            let ended = self.change(|ledger| ledger.take_ended(Instant::now()));
            self.count_expired(&ended).await;
            self.group.bell.ring(&self.group.stream);
        }
    }

    /// Counts the leases that really ended; others were settled elsewhere.
    async fn count_expired(&self, ended: &[(EntryId, Option<ConsumerName>)]) {
        for (id, consumer) in ended.iter().take(LOOKED_UP) {
            let Some(consumer) = consumer else { continue };
            let Ok(found) = self.store.pending(&self.reader, false, *id, 1).await else { return };
            let is_still =
                |one: &Pending| one.id == *id && one.consumer == *consumer && one.idle >= self.group.claim_idle;
            if found.first().is_some_and(is_still) {
                self.meters.expired.inc();
            }
        }
    }

    /// Reads for those who wait.
    async fn serve(&self, stop: &CancellationToken) {
        // What an earlier life of this name had fetched for someone who never got it.
        let mut is_swept = false;
        loop {
            if !self.has_work() {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = self.changed.notified() => {}
                }
                continue;
            }
            let served = if is_swept { self.turn(stop).await } else { self.sweep().await };
            is_swept = served.is_ok();
            if let Err(error) = served {
                self.fail(error);
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(TRY_AGAIN_AFTER) => {}
                }
            }
            if stop.is_cancelled() {
                return;
            }
        }
    }

    /// Whether anyone waits, or has gone without what was leased to it.
    fn has_work(&self) -> bool {
        self.has_waiters() || !self.lock().unseen.is_empty()
    }

    /// Whether anyone waits; those who have gone are let go.
    fn has_waiters(&self) -> bool {
        let mut state = self.lock();
        state.waiters.retain(|waiter| !waiter.answer.is_closed());
        !state.waiters.is_empty()
    }

    /// Answers those who wait with a failure. Where the group is being made, those go on who have time left.
    fn fail(&self, error: StoreError) {
        let is_passing = error.kind() == StoreErrorKind::NoGroup;
        let error = if is_passing { PullError::NoGroup } else { PullError::Store(Arc::new(error)) };
        let now = Instant::now();
        let mut state = self.lock();
        let (go_on, failed) = std::mem::take(&mut state.waiters)
            .into_iter()
            .partition::<VecDeque<_>, _>(|waiter| is_passing && waiter.deadline > now);
        state.waiters = go_on;
        drop(state);
        for waiter in failed {
            // One that has gone needs no answer.
            drop(waiter.answer.send(Err(error.clone())));
        }
    }

    /// Gives back what is pending on the reader and was given to no one: after a crash, or a reply that was lost.
    async fn sweep(&self) -> Result<(), StoreError> {
        let mut from = EntryId::MIN;
        loop {
            let found = self.store.pending(&self.reader, true, from, SWEEP).await?;
            let Some(last) = found.last() else { return Ok(()) };
            from = last.id.next();
            let left = found.into_iter().filter(|one| one.idle < self.group.claim_idle);
            self.release(&self.reader, left.map(|one| (one.id, one.attempts))).await?;
        }
    }

    /// Makes entries claimable for others at once, as if they had never been delivered.
    async fn release(&self, cursor: &Cursor, entries: impl Iterator<Item = (EntryId, u32)>) -> Result<(), StoreError> {
        let settlement = |(id, attempt)| {
            let entry = Entry { id, fields: Fields::default() };
            let delivery = Delivery { entry, attempt, delivered_at: std::time::Instant::now() };
            Settlement { delivery, outcome: Outcome::Release }
        };
        let settlements: Vec<_> = entries.map(settlement).collect();
        if !settlements.is_empty() {
            self.store.settle(cursor, &settlements).await?;
            self.group.bell.ring(&self.group.stream);
        }
        Ok(())
    }

    async fn turn(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        self.release_unseen().await?;
        if self.has_waiters() { self.read(stop).await } else { Ok(()) }
    }

    /// Gives to others what was leased to those who had gone by then. What fails comes back with the end of its lease.
    async fn release_unseen(&self) -> Result<(), StoreError> {
        let mut by_consumer: BTreeMap<ConsumerName, Vec<Receipt>> = BTreeMap::new();
        for receipt in std::mem::take(&mut self.lock().unseen) {
            by_consumer.entry(receipt.consumer.clone()).or_default().push(receipt);
        }
        for (consumer, receipts) in by_consumer {
            for receipt in &receipts {
                self.forget(receipt.id);
            }
            let cursor = Cursor { consumer, ..self.reader.clone() };
            self.release(&cursor, receipts.into_iter().map(|receipt| (receipt.id, receipt.attempt))).await?;
        }
        Ok(())
    }

    /// What is there, or, where there is nothing, what comes within a while.
    async fn read(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        let mut found = self.store.fetch(&self.reader, self.wanted(), Duration::ZERO).await?;
        if found.is_empty() {
            let Some(wait) = self.begin_reading() else { return Ok(()) };
            // Never dropped halfway: what is fetched would be pending with nobody holding it.
            let read = self.store.fetch(&self.reader, self.wanted(), wait).await;
            self.lock().is_reading = false;
            found = read?;
        }
        if stop.is_cancelled() {
            return self.release(&self.reader, found.into_iter().map(|one| (one.entry.id, one.attempt))).await;
        }
        self.give_out(found).await
    }

    fn wanted(&self) -> usize {
        let state = self.lock();
        state.waiters.iter().map(|waiter| waiter.wanted.max).sum::<usize>().clamp(1, READ_LIMIT)
    }

    /// Lets those go who don't wait, for there is nothing; says for how long to wait for the others, if there are any.
    fn begin_reading(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut state = self.lock();
        let (stay, go) =
            std::mem::take(&mut state.waiters).into_iter().partition::<VecDeque<_>, _>(|waiter| waiter.deadline > now);
        state.waiters = stay;
        let latest = state.waiters.iter().map(|waiter| waiter.deadline).max();
        state.is_reading = latest.is_some();
        drop(state);
        for waiter in go {
            drop(waiter.answer.send(Ok(Vec::new())));
        }
        latest.map(|latest| (latest - now).clamp(Duration::from_millis(1), READ_WAIT))
    }

    /// Leases what was fetched to those who wait, in their order.
    async fn give_out(&self, found: Vec<Delivery>) -> Result<(), StoreError> {
        let (fit, unfit): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|one| one.entry.is_for(&self.group.group) && one.entry.data().is_some());
        self.sort_out(unfit).await?;
        let mut left: VecDeque<Delivery> = fit.into();
        while !left.is_empty() {
            let Some((waiter, share)) = self.next_share(&mut left) else { break };
            self.lease(waiter, share).await?;
        }
        let left = left.into_iter().map(|one| (one.entry.id, one.attempt));
        self.release(&self.reader, left).await
    }

    /// The next who waits, and what is for it.
    fn next_share(&self, left: &mut VecDeque<Delivery>) -> Option<(Waiter, Vec<Delivery>)> {
        let mut state = self.lock();
        while let Some(waiter) = state.waiters.pop_front() {
            if waiter.answer.is_closed() {
                continue;
            }
            let room = self.max_leases.saturating_sub(state.ledger.held_by(&waiter.wanted.consumer));
            if room == 0 {
                drop(waiter.answer.send(Err(PullError::TooManyLeases(self.max_leases))));
                continue;
            }
            let share = waiter.wanted.max.min(room).min(left.len());
            return Some((waiter, left.drain(..share).collect()));
        }
        None
    }

    async fn lease(&self, waiter: Waiter, share: Vec<Delivery>) -> Result<(), StoreError> {
        let Waiter { wanted, answer, .. } = waiter;
        let hold = |one: &Delivery| {
            let receipt = Receipt { id: one.entry.id, consumer: self.reader.consumer.clone(), attempt: one.attempt };
            (receipt, Redemption::Hold { by: wanted.consumer.clone(), lease: wanted.lease })
        };
        let items: Vec<_> = share.iter().map(hold).collect();
        let good = match self.store.redeem(&self.reader, &items).await {
            Ok(good) => good,
            Err(error) => {
                let told = StoreError::new(error.kind(), error.to_string());
                drop(answer.send(Err(PullError::Store(Arc::new(told)))));
                return Err(error);
            }
        };
        let mut tasks = Vec::with_capacity(share.len());
        for (Delivery { entry, attempt, .. }, _) in share.into_iter().zip(good).filter(|(_, is_good)| *is_good) {
            let receipt = Receipt { id: entry.id, consumer: wanted.consumer.clone(), attempt };
            let token = Token::new(&self.group.stream, &self.group.group, receipt, earlier_attempts(&entry));
            self.note(entry.id, Some(wanted.consumer.clone()), wanted.lease);
            tasks.push(Task { token, entry, lease: wanted.lease });
        }
        let given = tasks.len() as u64;
        match answer.send(Ok(tasks)) {
            Ok(()) => self.meters.delivered.inc_by(given),
            // It has gone meanwhile, and never saw them.
            Err(tasks) => self.take_back(tasks.unwrap_or_default()),
        }
        Ok(())
    }

    /// Settles what no worker is to get: what is for another group, and what has no payload.
    async fn sort_out(&self, unfit: Vec<Delivery>) -> Result<(), StoreError> {
        let (payloadless, foreign): (Vec<_>, Vec<_>) =
            unfit.into_iter().partition(|one| one.entry.is_for(&self.group.group));
        for one in payloadless {
            let (stream, group) = (&self.group.stream, &self.group.group);
            warn!(%stream, %group, entry.id = %one.entry.id, "an entry without payload goes to the dead letters");
            let attempts = one.attempt.saturating_add(earlier_attempts(&one.entry));
            let error = "the entry has no field `data`".to_owned();
            self.bury(&self.reader, one.entry, attempts, DeadLetterReason::Undecodable, error).await?;
        }
        if !foreign.is_empty() {
            let settle = |delivery| Settlement { delivery, outcome: Outcome::Filter };
            let foreign: Vec<_> = foreign.into_iter().map(settle).collect();
            let settled = self.store.settle(&self.reader, &foreign).await?;
            self.meters.filtered.inc_by(settled.settled as u64);
        }
        Ok(())
    }
}

/// How many times an entry was delivered before it was appended again. Anyone can write to the stream: only a plain
/// number counts.
fn earlier_attempts(entry: &Entry) -> u32 {
    let text = entry.fields.text(field::REPLAY_ATTEMPTS).filter(|text| text.len() <= 9);
    let text = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}
