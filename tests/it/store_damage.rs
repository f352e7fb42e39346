//! Files of the embedded store, damaged from outside. Each accepted entry is returned unchanged or reported as lost. It
//! is never lost silently and never returned with other content.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use aurora_bus::event::{EntryId, StreamName};
use aurora_bus::store::embedded::{Config, EmbeddedStore};
use aurora_bus::store::{Cursor, Order, Outcome, Range, Settlement, Start, Store, StoreError, StoreErrorKind};
use bytesize::ByteSize;
use reqwest::StatusCode;

use crate::store_contract::{cursor, new_entry};
use crate::support::app::{BOUND, Home};
use crate::support::until;

const DATABASE: &str = "bus.sqlite3";

/// Pseudo-random numbers that are the same in every run.
struct SeededRandom(u64);

impl SeededRandom {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % u64::try_from(limit).expect("fits")).expect("fits")
    }
}

fn config(folder: &Path) -> Config {
    Config { path: folder.to_owned(), reserve: ByteSize::kib(64), recent: ByteSize::b(0), ..Config::default() }
}

fn streams() -> [StreamName; 2] {
    ["test:one", "test:two"].map(|name| name.parse().expect("a valid name"))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for file in fs::read_dir(from).expect("listed") {
        let file = file.expect("an entry");
        fs::copy(file.path(), to.join(file.file_name())).expect("copied");
    }
}

/// The accepted entries by stream, and the pending entries of each stream's group.
#[derive(Debug, Default)]
struct Accepted {
    texts: BTreeMap<StreamName, BTreeMap<EntryId, String>>,
    pending: BTreeMap<StreamName, Vec<EntryId>>,
}

fn group(stream: &StreamName) -> Cursor {
    cursor(stream, "g", "a")
}

/// Fills two streams with some hundred entries of all sizes. A part of them is pending.
async fn fill(store: &EmbeddedStore, accepted: &mut Accepted, rounds: usize) {
    for stream in streams() {
        let group = group(&stream);
        store.ensure_group(&stream, &group.group, Start::Oldest).await.expect("a group");
        for round in 0..rounds {
            let texts: Vec<String> =
                (0..30).map(|n| format!("{stream} {round} {n} {}", "x".repeat(n * n * (round % 3)))).collect();
            let entries = texts.iter().map(|text| new_entry(text)).collect();
            let appended = store.append(&stream, entries).await.expect("appended");
            let known = accepted.texts.entry(stream.clone()).or_default();
            known.extend(appended.into_iter().map(|one| one.id).zip(texts));
        }
        let mut delivered = store.fetch(&group, 20, Duration::ZERO).await.expect("fetched");
        let rest = delivered.split_off(10);
        let pending = accepted.pending.entry(stream.clone()).or_default();
        pending.extend(rest.iter().map(|delivery| delivery.entry.id));
        let acknowledged = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
        let settlements: Vec<Settlement> = delivered.into_iter().map(acknowledged).collect();
        store.settle(&group, &settlements).await.expect("settled");
    }
}

/// Checks that an error reports damage, names the file and gives a remedy.
#[track_caller]
fn assert_refused(error: &StoreError, folder: &Path) {
    let text = error.to_string();
    let file = folder.join(DATABASE).display().to_string();
    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{text}");
    assert!(text.contains(&file), "the file is not named: {text}");
    assert!(text.contains("backup") || text.contains("store.embedded.path"), "no remedy: {text}");
}

/// Compares a store with the accepted entries. Returns the number of lost entries, which the store must have reported.
async fn assert_no_silent_loss(store: &EmbeddedStore, accepted: &Accepted, what: &str) -> usize {
    let mut reported = store.check().await.map_or_else(|error| vec![error.to_string()], |status| status.warnings);
    let (mut gone, mut damaged) = (Vec::new(), 0);
    for (stream, texts) in &accepted.texts {
        for (id, text) in texts {
            let range = Range { from: *id, to: *id, order: Order::Forward };
            match store.range(stream, range, 1).await {
                Ok(read) if read.is_empty() => gone.push(*id),
                Ok(read) => assert_eq!(read[0].fields.text("data"), Some(text.as_str()), "{what}: {id} has changed"),
                Err(error) => {
                    assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{what}: {error}");
                    damaged += 1;
                }
            }
        }
    }
    reported.extend(store.check().await.err().map(|error| error.to_string()));
    assert!(gone.is_empty() || !reported.is_empty(), "{what}: {} entries are lost silently: {gone:?}", gone.len());
    gone.len() + damaged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_bytes_are_refused_or_reported() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole");
    let mut accepted = Accepted::default();
    let store = config(&whole).open().await.expect("opened");
    fill(&store, &mut accepted, 12).await;
    store.close().await;
    let bytes = fs::read(whole.join(DATABASE)).expect("read");
    let (mut refused, mut reported, mut unharmed) = (0, 0, 0);
    for case in 0..150 {
        let mut random = SeededRandom(0x9e37_79b9_7f4a_7c15 ^ (case + 1));
        let mut bytes = bytes.clone();
        let what = match case % 4 {
            0 => {
                let place = random.below(bytes.len());
                bytes[place] ^= 1 << random.below(8);
                format!("case {case}: a bit at {place}")
            }
            1 => {
                let (place, length) = (random.below(bytes.len()), 1 + random.below(64));
                let end = bytes.len().min(place + length);
                bytes[place..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
                format!("case {case}: {length} bytes at {place}")
            }
            2 => {
                let page = random.below(bytes.len() / 4096) * 4096;
                bytes[page..page + 4096].fill(0);
                format!("case {case}: the page at {page}")
            }
            _ => {
                let length = random.below(bytes.len());
                bytes.truncate(length);
                format!("case {case}: cut at {length}")
            }
        };
        let damaged = folder.path().join(format!("case-{case}"));
        copy(&whole, &damaged);
        fs::write(damaged.join(DATABASE), bytes).expect("written");
        match config(&damaged).open().await {
            Err(error) => {
                assert_refused(&error, &damaged);
                refused += 1;
            }
            Ok(store) => {
                let lost = assert_no_silent_loss(&store, &accepted, &what).await;
                *(if lost > 0 { &mut reported } else { &mut unharmed }) += 1;
                // A damaged stream accepts no entries. An entry that it does accept is stored.
                let [stream, _] = streams();
                match store.append(&stream, vec![new_entry("later")]).await {
                    Ok(appended) => {
                        let range = Range { from: appended[0].id, to: appended[0].id, order: Order::Forward };
                        let read = store.range(&stream, range, 1).await.expect("it was accepted just now");
                        assert_eq!(read[0].fields.text("data"), Some("later"), "{what}");
                        assert!(appended[0].id > *accepted.texts[&stream].keys().last().expect("entries"), "{what}");
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{what}: {error}");
                        assert_refused(&store.check().await.expect_err(&what), &damaged);
                    }
                }
                store.close().await;
            }
        }
        fs::remove_dir_all(damaged).expect("removed");
    }
    assert!(
        refused > 10 && reported > 10 && unharmed > 0,
        "{refused} refused, {reported} reported, {unharmed} unharmed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torn_log_keeps_its_prefix_and_reports_the_loss() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole");
    // The log has room to grow.
    let config = |path: &Path| Config { reserve: ByteSize::mib(4), ..config(path) };
    let mut accepted = Accepted::default();
    let store = config(&whole).open().await.expect("opened");
    fill(&store, &mut accepted, 4).await;
    let image = folder.path().join("image");
    copy(&whole, &image);
    store.close().await;
    let log = format!("{DATABASE}-wal");
    let length = fs::metadata(image.join(&log)).expect("a log").len();
    assert!(length > 100_000, "a log of {length} bytes");
    let mut losses = 0;
    for case in 0..60 {
        let mut random = SeededRandom(0x2545_f491_4f6c_dd1d ^ (case + 1));
        let place = random.below(usize::try_from(length).expect("fits"));
        let torn = folder.path().join(format!("case-{case}"));
        copy(&image, &torn);
        let mut bytes = fs::read(torn.join(&log)).expect("read");
        if case % 2 == 0 {
            bytes.truncate(place);
        } else {
            bytes[place] ^= 0x11;
        }
        fs::write(torn.join(&log), bytes).expect("written");
        let what = format!("case {case}: torn at {place}");
        match config(&torn).open().await {
            Err(error) => assert_refused(&error, &torn),
            Ok(store) => {
                let lost = assert_no_silent_loss(&store, &accepted, &what).await;
                losses += usize::from(lost > 0);
                // Ids are never assigned twice, not even those of lost entries.
                let [stream, _] = streams();
                let appended = store.append(&stream, vec![new_entry("later")]).await.expect(&what);
                assert!(appended[0].id > *accepted.texts[&stream].keys().last().expect("entries"), "{what}");
                store.close().await;
            }
        }
        fs::remove_dir_all(torn).expect("removed");
    }
    assert!(losses > 10, "only {losses} of 60 logs lost anything");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removed_database_is_reported() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut accepted = Accepted::default();
    let store = config(folder.path()).open().await.expect("opened");
    fill(&store, &mut accepted, 2).await;
    store.close().await;
    fs::remove_file(folder.path().join(DATABASE)).expect("removed");
    let store = config(folder.path()).open().await.expect("a new database");
    let warnings = store.check().await.expect("it works").warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].starts_with("a stream with 60 accepted entries up to "), "{warnings:?}");
    store.close().await;
    let store = config(folder.path()).open().await.expect("opened");
    assert_eq!(store.check().await.expect("it works").warnings, Vec::<String>::new(), "reported once");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_found_later_stops_appends_and_names_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut accepted = Accepted::default();
    let store = config(folder.path()).open().await.expect("opened");
    fill(&store, &mut accepted, 30).await;
    store.close().await;
    let store = config(folder.path()).open().await.expect("opened");
    let file = folder.path().join(DATABASE);
    let mut bytes = fs::read(&file).expect("read");
    // The pages of the payloads, which were not read yet.
    let needle = format!("{} 20 5 ", streams()[0]);
    let place =
        bytes.windows(needle.len()).position(|window| window == needle.as_bytes()).expect("the payload is in the file");
    let page = place / 4096 * 4096;
    bytes[page - 40 * 4096..page + 40 * 4096].fill(0xff);
    fs::write(&file, bytes).expect("written");
    store.check().await.expect("the damage is not found yet");
    let lost = assert_no_silent_loss(&store, &accepted, "running").await;
    assert!(lost > 0, "the damage is not found");
    let refused = store.check().await.expect_err("damaged");
    assert_refused(&refused, folder.path());
    let error = store.append(&streams()[0], vec![new_entry("later")]).await.expect_err("damaged");
    assert_refused(&error, folder.path());
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_on_damaged_file_exits_with_name_and_remedy() {
    let home = Home::new("");
    let daemon = home.start().await;
    until("accepted events", BOUND, async || daemon.publish("aurora:audit", &vec!["{}".to_owned(); 200]).await.ok())
        .await;
    daemon.handled("aurora:audit", "audit-logger").await;
    assert_eq!(daemon.status("/ready").await, Some(StatusCode::OK));
    daemon.stop().await;
    let file = home.path("data").join(DATABASE);
    let mut bytes = fs::read(&file).expect("read");
    bytes[4096..].fill(0xa5);
    fs::write(&file, bytes).expect("written");
    let ended = home.spawn().await.expect_err("a damaged file");
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    for part in ["bus.sqlite3` is damaged", "backup", "an empty one"] {
        assert!(ended.log.contains(part), "no {part:?}:\n{}", ended.log);
    }
    let checked = home.run(&["check", "--connect"]);
    assert!(!checked.status.success());
}
