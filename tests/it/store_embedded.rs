//! Promises of the embedded store alone: files, restarts, full disks and damage.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{EntryId, IdempotencyKey, NewEntry, StreamName};
use aurora_bus::store::embedded::{Config, EmbeddedStore, SyncMode};
use aurora_bus::store::{Cursor, Order, Outcome, Range, Settlement, Start, Store, StoreErrorKind, Trim};
use bytes::Bytes;
use bytesize::ByteSize;
use rusqlite::Connection;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::store_model::{self, Traits};
use crate::support::stores::small;

const BOUND: Duration = Duration::from_mins(1);

async fn open_in(folder: &Path, config: Config) -> EmbeddedStore {
    small(folder, config).open().await.expect("opened")
}

#[test]
fn random_operations_match_the_model() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    // The cache is so small that some entries are read from memory and some from their rows.
    let config = small(folder.path(), Config { recent: ByteSize::kib(40), ..Config::default() });
    let open = async || Arc::new(config.clone().open().await.expect("opened")) as Arc<dyn Store>;
    let store = runtime.block_on(open());
    let reopen = async |store: Arc<dyn Store>| {
        store.close().await;
        open().await
    };
    store_model::check(&runtime, store, reopen, Traits { cases: 150, is_lag_exact: true, rearms_lost: true });
}

/// Copies the files as the kernel has them, which is the state after a kill of the process.
fn crash_image(of: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for file in fs::read_dir(of).expect("listed") {
        let file = file.expect("an entry");
        fs::copy(file.path(), to.join(file.file_name())).expect("copied");
    }
}

fn everything() -> Range {
    Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward }
}

async fn ids_of(store: &dyn Store, stream: &StreamName) -> Vec<EntryId> {
    let entries = store.range(stream, everything(), 1_000_000).await.expect("read");
    entries.into_iter().map(|entry| entry.id).collect()
}

async fn append(store: &dyn Store, stream: &StreamName, texts: impl Iterator<Item = String>) -> Vec<EntryId> {
    let entries: Vec<NewEntry> = texts.map(|text| new_entry(&text)).collect();
    let mut ids = Vec::new();
    for batch in entries.chunks(200) {
        let appended = store.append(stream, batch.to_vec()).await.expect("appended");
        ids.extend(appended.into_iter().map(|one| one.id));
    }
    ids
}

async fn fetch_ids(store: &dyn Store, cursor: &Cursor, limit: usize) -> Vec<EntryId> {
    let delivered = store.fetch(cursor, limit, Duration::ZERO).await.expect("fetched");
    delivered.into_iter().map(|delivery| delivery.entry.id).collect()
}

async fn acknowledge(store: &dyn Store, cursor: &Cursor, limit: usize) -> usize {
    let delivered = store.fetch(cursor, limit, Duration::ZERO).await.expect("fetched");
    let acknowledged = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
    let settlements: Vec<Settlement> = delivered.into_iter().map(acknowledged).collect();
    let settled = store.settle(cursor, &settlements).await.expect("settled");
    assert_eq!(settled.settled, settlements.len());
    settled.settled
}

#[tokio::test]
async fn confirmed_writes_survive_a_crash() {
    for durability in [SyncMode::Commit, SyncMode::Interval] {
        let folder = tempfile::tempdir().expect("a folder");
        let (before, after) = (folder.path().join("before"), folder.path().join("after"));
        let config = Config { durability, interval: Duration::from_hours(1), ..Config::default() };
        let store = open_in(&before, config.clone()).await;
        let stream = unique_stream();
        let (a, b) = (cursor(&stream, "g", "a"), cursor(&stream, "g", "b"));
        let dead: StreamName = format!("{stream}:dead").parse().expect("a valid name");
        store.ensure_group(&stream, &a.group, Start::Oldest).await.expect("a group");
        append(&store, &stream, (0..1000).map(|n| n.to_string())).await;
        acknowledge(&store, &a, 150).await;
        let mut delivered = store.fetch(&b, 100, Duration::ZERO).await.expect("fetched");
        let (to, fields) = (dead.clone(), new_entry("dead").fields);
        let letter = Settlement { delivery: delivered.remove(10), outcome: Outcome::DeadLetter { to, fields } };
        let retry = Settlement { delivery: delivered.remove(0), outcome: Outcome::Retry(Duration::ZERO) };
        store.settle(&b, &[letter, retry]).await.expect("settled");
        store.claim(&a, &[delivered[3].entry.id], Duration::ZERO).await.expect("claimed");
        store.discard(&stream, &[delivered[5].entry.id]).await.expect("discarded");
        store.trim(&stream, Trim::ToLength(850)).await.expect("trimmed");
        let epoch = store.epoch(&stream).await.expect("an epoch");

        crash_image(&before, &after);
        let restarted = open_in(&after, config).await;
        assert_eq!(restarted.check().await.expect("it works").warnings, Vec::<String>::new());
        for stream in [&stream, &dead] {
            let (old, new) = (store.range(stream, everything(), 2000), restarted.range(stream, everything(), 2000));
            assert_eq!(old.await.expect("read"), new.await.expect("read"));
        }
        let (old, new) = (store.describe(&stream), restarted.describe(&stream));
        let (old, new) = (old.await.expect("described"), new.await.expect("described"));
        let (old, new) = (old.expect("it exists"), new.expect("it exists"));
        assert_eq!((old.length, old.first_id, old.last_id), (new.length, new.first_id, new.last_id));
        let (old, new) = (&old.groups[0], &new.groups[0]);
        assert_eq!((old.lag, old.pending, old.last_delivered), (new.lag, new.pending, new.last_delivered));
        assert_eq!((old.lag, old.pending), (Some(750), 99));
        let list = async |store: &EmbeddedStore| {
            let pending = store.pending(&a, false, EntryId::MIN, 1000).await.expect("listed");
            pending.into_iter().map(|one| (one.id, one.consumer, one.attempts)).collect::<Vec<_>>()
        };
        assert_eq!(list(&store).await, list(&restarted).await);
        assert_eq!(restarted.epoch(&stream).await.expect("an epoch"), epoch);
        let last = append(&restarted, &stream, ["later".to_owned()].into_iter()).await;
        assert!(last[0] > *ids_of(&store, &stream).await.last().expect("entries"));
        store.close().await;
        restarted.close().await;
    }
}

#[tokio::test]
async fn second_store_on_open_folder_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = open_in(folder.path(), Config::default()).await;
    let error = small(folder.path(), Config::default()).open().await.expect_err("the folder is taken");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    let text = error.to_string();
    assert!(text.starts_with("another aurora-bus holds the folder `"), "{text}");
    assert!(text.contains(&folder.path().display().to_string()) && text.contains("store.embedded.path"), "{text}");
    first.check().await.expect("the first is not disturbed");
    first.close().await;
    open_in(folder.path(), Config::default()).await.close().await;
}

#[tokio::test]
async fn unusable_folder_is_named_with_the_fix() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, "in the way").expect("written");
    let error = small(&file.join("data"), Config::default()).open().await.expect_err("no folder");
    let text = error.to_string();
    assert!(text.contains(&file.display().to_string()) && text.contains("store.embedded.path"), "{text}");

    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).expect("a folder");
    let other = Connection::open(foreign.join("bus.sqlite3")).expect("a database");
    other.execute_batch("CREATE TABLE other (x)").expect("a table");
    drop(other);
    let error = small(&foreign, Config::default()).open().await.expect_err("a foreign database");
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    assert!(error.to_string().contains("was not written by aurora-bus"), "{error}");

    fs::write(foreign.join("bus.sqlite3"), "no database at all, just some text that is long enough").expect("written");
    let error = small(&foreign, Config::default()).open().await.expect_err("no database");
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
}

#[tokio::test]
async fn newer_format_is_refused_with_its_number() {
    let folder = tempfile::tempdir().expect("a folder");
    open_in(folder.path(), Config::default()).await.close().await;
    let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
    database.execute("UPDATE meta SET value = 7 WHERE key = 'format'", []).expect("changed");
    drop(database);
    let error = small(folder.path(), Config::default()).open().await.expect_err("a newer format");
    assert!(error.to_string().contains("has format 7, but this aurora-bus reads formats up to 2"), "{error}");
}

/// Makes a closed store with 300 entries in chunks of 64. A group has read the first ten.
async fn store_to_damage(folder: &Path) -> (StreamName, Cursor, Vec<EntryId>) {
    let store = open_in(folder, Config::default()).await;
    let stream = unique_stream();
    let cursor = cursor(&stream, "g", "a");
    store.ensure_group(&stream, &cursor.group, Start::Oldest).await.expect("a group");
    let entries: Vec<NewEntry> = (0..300).map(|n| new_entry(&format!("needle-{n}-"))).collect();
    let ids = store.append(&stream, entries).await.expect("appended").into_iter().map(|one| one.id).collect();
    assert_eq!(acknowledge(&store, &cursor, 10).await, 10);
    store.close().await;
    (stream, cursor, ids)
}

/// Checks that the chunk of entries 64 to 127 is reported as damaged, and that the store works after its removal.
async fn assert_damaged_chunk_is_reported(folder: &Path, stream: &StreamName, cursor: &Cursor, ids: &[EntryId]) {
    let store = open_in(folder, Config::default()).await;
    let name = format!("64 entries of stream `{stream}`, from {} to {}, cannot be read", ids[64], ids[127]);
    for range in [everything(), Range { from: ids[100], to: ids[100], order: Order::Backward }] {
        let error = store.range(stream, range, 1000).await.expect_err("damaged");
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        assert!(error.to_string().starts_with(&name), "{error}");
    }
    let tailed = store.tail(stream, ids[20], 1000, Duration::ZERO).await.expect("the entries before the damage");
    assert_eq!(tailed.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[21..64]);
    let after = store.range(stream, Range::after(ids[127]), 1000).await.expect("read");
    assert_eq!(after.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[128..]);

    assert_eq!(fetch_ids(&store, cursor, 100).await, ids[10..64], "the entries before the damage are delivered");
    for _ in 0..2 {
        let error = store.fetch(cursor, 100, Duration::ZERO).await.expect_err("damaged");
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        assert!(error.to_string().starts_with(&name), "{error}");
    }
    let error = store.discard(stream, &[ids[64]]).await.expect_err("one end does not discard the range");
    assert_eq!(error.kind(), StoreErrorKind::Corrupt);
    assert_eq!(store.discard(stream, &[ids[64], ids[127]]).await.expect("discarded"), 64);
    assert_eq!(fetch_ids(&store, cursor, 1000).await, ids[128..]);
    let status = store.describe(stream).await.expect("described").expect("it exists");
    assert_eq!((status.length, status.entries_added, status.groups[0].lag), (236, 300, Some(0)));
    store.close().await;

    let store = open_in(folder, Config::default()).await;
    assert_eq!(ids_of(&store, stream).await, [&ids[..64], &ids[128..]].concat());
    store.close().await;
}

#[tokio::test]
async fn flipped_byte_is_reported_and_never_returned() {
    let folder = tempfile::tempdir().expect("a folder");
    let (stream, cursor, ids) = store_to_damage(folder.path()).await;
    let file = folder.path().join("bus.sqlite3");
    let mut bytes = fs::read(&file).expect("read");
    let needle = b"needle-100-";
    let places: Vec<usize> =
        bytes.windows(needle.len()).enumerate().filter(|(_, window)| window == needle).map(|(n, _)| n).collect();
    assert!(!places.is_empty());
    for place in places {
        bytes[place] ^= 0x20;
    }
    fs::write(&file, bytes).expect("written");
    assert_damaged_chunk_is_reported(folder.path(), &stream, &cursor, &ids).await;
}

#[tokio::test]
async fn missing_chunk_is_reported() {
    let chunk = "(SELECT chunk FROM chunk_index ORDER BY chunk LIMIT 1 OFFSET 1)";
    let body = format!("DELETE FROM chunks WHERE chunk = {chunk}");
    let both = format!("{body}; DELETE FROM chunk_index WHERE chunk = {chunk}");
    let swapped = format!("UPDATE chunks SET body = (SELECT body FROM chunks LIMIT 1) WHERE chunk = {chunk}");
    for damage in [body, both, swapped] {
        let folder = tempfile::tempdir().expect("a folder");
        let (stream, cursor, ids) = store_to_damage(folder.path()).await;
        let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
        database.execute_batch(&damage).expect("damaged");
        drop(database);
        assert_damaged_chunk_is_reported(folder.path(), &stream, &cursor, &ids).await;
    }
}

#[tokio::test]
async fn damaged_index_row_is_rebuilt_from_its_chunk() {
    let folder = tempfile::tempdir().expect("a folder");
    let (stream, cursor, ids) = store_to_damage(folder.path()).await;
    let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
    database.execute_batch("UPDATE chunk_index SET last_ms = last_ms - 100000, count = 3").expect("damaged");
    drop(database);
    let store = open_in(folder.path(), Config::default()).await;
    assert_eq!(ids_of(&store, &stream).await, ids);
    assert_eq!(fetch_ids(&store, &cursor, 1000).await, ids[10..]);
    store.close().await;
}

#[tokio::test]
async fn damaged_delivery_state_is_reported_at_start() {
    let damages = [
        ("UPDATE groups SET cursor_ms = 0", "the row of group `g` is damaged"),
        ("UPDATE leases SET attempts = 9", "pending entries of group `g` are damaged"),
        ("UPDATE streams SET added = 1", "the row of stream `contract:"),
    ];
    for (damage, expected) in damages {
        let folder = tempfile::tempdir().expect("a folder");
        let (_, cursor, _) = store_to_damage(folder.path()).await;
        let store = open_in(folder.path(), Config::default()).await;
        assert_eq!(fetch_ids(&store, &cursor, 5).await.len(), 5);
        store.close().await;
        let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
        database.execute_batch(damage).expect("damaged");
        drop(database);
        let error = small(folder.path(), Config::default()).open().await.expect_err("damaged");
        assert_eq!(error.kind(), StoreErrorKind::Corrupt);
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[tokio::test]
async fn truncated_log_is_reported_and_starts_new_epoch() {
    let folder = tempfile::tempdir().expect("a folder");
    let (before, after) = (folder.path().join("before"), folder.path().join("after"));
    let (stream, cursor, mut ids) = store_to_damage(&before).await;
    // The log has room, so that no checkpoint runs.
    let config = Config { path: before.clone(), reserve: ByteSize::mib(2), ..Config::default() };
    let store = config.open().await.expect("opened");
    let epoch = store.epoch(&stream).await.expect("an epoch");
    ids.extend(append(&store, &stream, (0..5).map(|n| n.to_string())).await);
    ids.extend(append(&store, &stream, (0..5).map(|n| n.to_string())).await);
    crash_image(&before, &after);
    fs::write(after.join("bus.sqlite3-wal"), "").expect("the log is truncated");

    let restarted = open_in(&after, Config::default()).await;
    let warnings = restarted.check().await.expect("it works").warnings;
    let left = ids_of(&restarted, &stream).await;
    assert!(left.len() < ids.len() && left == ids[..left.len()], "{} are left", left.len());
    let lost = ids.len() - left.len();
    let expected = format!(
        "{lost} accepted entries of stream `{stream}`, after {} up to {}, are lost",
        left.last().expect("entries"),
        ids.last().expect("entries")
    );
    assert!(warnings.len() == 1 && warnings[0].starts_with(&expected), "{warnings:?}");
    assert_ne!(restarted.epoch(&stream).await.expect("an epoch"), epoch);
    let next = append(&restarted, &stream, ["next".to_owned()].into_iter()).await;
    assert!(next[0] > *ids.last().expect("entries"), "lost ids are not assigned again");
    assert_eq!(fetch_ids(&restarted, &cursor, 1000).await, [&left[10..], &next].concat());
    let status = restarted.describe(&stream).await.expect("described").expect("it exists");
    assert_eq!(status.groups[0].lag, Some(0));
    let epoch = restarted.epoch(&stream).await.expect("an epoch");
    restarted.close().await;

    let restarted = open_in(&after, Config::default()).await;
    assert_eq!(restarted.check().await.expect("it works").warnings, Vec::<String>::new(), "a loss is reported once");
    assert_eq!(restarted.epoch(&stream).await.expect("an epoch"), epoch);
    assert_eq!(ids_of(&restarted, &stream).await, [&left[..], &next].concat(), "lost entries are not damage");
    store.close().await;
    restarted.close().await;
}

#[tokio::test]
async fn single_appends_are_merged_into_larger_chunks() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config { durability: SyncMode::Interval, ..Config::default() };
    let store = open_in(folder.path(), config.clone()).await;
    let stream = unique_stream();
    let (mut ids, mut gone) = (Vec::new(), Vec::new());
    for n in 0..1500 {
        ids.extend(append(&store, &stream, [n.to_string()].into_iter()).await);
        if n % 37 == 5 {
            gone.push(ids.remove(ids.len() - 3));
            assert_eq!(store.discard(&stream, &gone[gone.len() - 1..]).await.expect("discarded"), 1);
        }
    }
    assert_eq!(ids_of(&store, &stream).await, ids);
    store.close().await;
    let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
    let chunks: i64 = database.query_row("SELECT count(*) FROM chunks", [], |row| row.get(0)).expect("counted");
    let refs: i64 = database.query_row("SELECT count(*) FROM chunk_index", [], |row| row.get(0)).expect("counted");
    assert_eq!(chunks, refs);
    assert!(chunks <= 100, "{chunks} chunks for 1500 entries");
    drop(database);
    let store = open_in(folder.path(), config).await;
    assert_eq!(ids_of(&store, &stream).await, ids, "discarded entries are not reported as damage");
    let status = store.describe(&stream).await.expect("described").expect("it exists");
    assert_eq!((status.length, status.entries_added), (ids.len() as u64, 1500));
    store.close().await;
}

#[tokio::test]
async fn idempotency_keys_survive_a_restart_and_are_pruned() {
    let folder = tempfile::tempdir().expect("a folder");
    let stream = unique_stream();
    let keyed = |key: &'static str, window| {
        let key = IdempotencyKey { key: Bytes::from_static(key.as_bytes()), window };
        vec![NewEntry { idempotency: Some(key), ..new_entry("x") }]
    };
    let hour = Duration::from_hours(1);
    let store = open_in(folder.path(), Config::default()).await;
    let first = store.append(&stream, keyed("long", hour)).await.expect("appended");
    store.append(&stream, keyed("short", Duration::from_millis(1))).await.expect("appended");
    store.close().await;
    let store = open_in(folder.path(), Config::default()).await;
    let second = store.append(&stream, keyed("long", hour)).await.expect("appended");
    assert!(second[0].duplicate && second[0].id == first[0].id && second[0].event_id == "id-x");
    let database = Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
    let begun = Instant::now();
    loop {
        // The writer prunes keys along with other work.
        store.check().await.expect("it works");
        let keys: i64 = database.query_row("SELECT count(*) FROM idempotency", [], |row| row.get(0)).expect("counted");
        if keys == 1 {
            break;
        }
        assert!(begun.elapsed() < BOUND, "{keys} keys are kept");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    store.close().await;
}

/// A small file system, unmounted on drop.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(folder.path())
            .status();
        assert!(mounted.is_ok_and(|status| status.success()), "this test mounts a tmpfs, which requires root");
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("data")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking(), "not unmounted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_refuses_appends_loses_none_and_recovers() {
    let disk = SmallDisk::mount("6m");
    let config = Config { path: disk.path(), reserve: ByteSize::mib(2), ..Config::default() };
    let store = config.clone().open().await.expect("opened");
    let stream = unique_stream();
    let cursor = cursor(&stream, "g", "a");
    store.ensure_group(&stream, &cursor.group, Start::Oldest).await.expect("a group");
    let batch: Vec<NewEntry> = (0..20).map(|n| new_entry(&format!("{n:0>1000}"))).collect();
    let until_full = async || {
        let mut accepted = Vec::new();
        loop {
            match store.append(&stream, batch.clone()).await {
                Ok(appended) => accepted.extend(appended.into_iter().map(|one| one.id)),
                Err(error) if error.kind() == StoreErrorKind::Full => return accepted,
                Err(error) => panic!("neither accepted nor full: {error}"),
            }
            assert!(accepted.len() < 10_000, "the disk does not become full");
        }
    };
    // Acknowledgements share their commits with the appends that fill the disk, and do not fail with them.
    let mut settled = 0;
    let appending = async { tokio::join!(until_full(), until_full(), until_full()) };
    tokio::pin!(appending);
    let (mut accepted, more, still_more) = loop {
        tokio::select! {
            accepted = &mut appending => break accepted,
            more = acknowledge(&store, &cursor, 3) => settled += more,
        }
    };
    accepted.extend(more.into_iter().chain(still_more));
    accepted.sort_unstable();
    assert!(accepted.len() > 500, "only {} were accepted", accepted.len());
    assert_eq!(store.append(&stream, batch.clone()).await.expect_err("still full").kind(), StoreErrorKind::Full);
    assert_eq!(store.check().await.expect_err("still full").kind(), StoreErrorKind::Full);

    assert_eq!(ids_of(&store, &stream).await, accepted, "reads work");
    loop {
        let more = acknowledge(&store, &cursor, 10).await;
        settled += more;
        if more == 0 {
            break;
        }
    }
    // The last acknowledgement beside the appends was interrupted, and its entries may be pending.
    let left = store.reclaim(&cursor, Duration::ZERO, EntryId::MIN, 100).await.expect("claimed").claimed.deliveries;
    let acknowledged = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
    let left: Vec<Settlement> = left.into_iter().map(acknowledged).collect();
    assert!(left.len() <= 3, "{} are pending", left.len());
    store.settle(&cursor, &left).await.expect("settled");
    assert!(settled + left.len() <= accepted.len() && settled + left.len() + 3 >= accepted.len());
    store.close().await;

    let store = config.open().await.expect("opened on the full disk");
    assert_eq!(ids_of(&store, &stream).await, accepted);
    assert!(fetch_ids(&store, &cursor, 10).await.is_empty(), "no acknowledgement was lost");
    store.trim(&stream, Trim::ToLength(0)).await.expect("trims work");
    let begun = Instant::now();
    let appended = loop {
        match store.append(&stream, batch.clone()).await {
            Ok(appended) => break appended,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Full),
        }
        assert!(begun.elapsed() < BOUND, "the space that the trim freed is not used");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(appended[0].id > *accepted.last().expect("entries"));
    store.check().await.expect("all is well again");
    store.close().await;
}
