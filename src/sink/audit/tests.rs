use std::fs;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use proptest::prelude::*;
use tempfile::TempDir;

use super::files::list;
use super::*;
use crate::event::{Entry, EntryId};

fn origin(stream: &str) -> Origin {
    Origin { stream: stream.parse().unwrap(), group: "audit-logger".parse().unwrap() }
}

fn delivery(ms: u64) -> Delivery {
    let data = format!(r#"{{"title":"event {ms}","text":"{}"}}"#, "x".repeat(60));
    let fields = [(Bytes::from("id"), Bytes::from(format!("e-{ms}"))), (Bytes::from("data"), Bytes::from(data))];
    let entry = Entry { id: EntryId::new(ms, 0), fields: fields.into_iter().collect() };
    Delivery { entry, attempt: 1, delivered_at: Instant::now() }
}

fn deliveries(ids: impl IntoIterator<Item = u64>) -> Vec<Delivery> {
    ids.into_iter().map(delivery).collect()
}

fn config(folder: &TempDir) -> AuditConfig {
    AuditConfig { path: folder.path().to_owned(), ..AuditConfig::default() }
}

fn small_files(folder: &TempDir) -> AuditConfig {
    AuditConfig { max_file_size: MIN_FILE_SIZE, ..config(folder) }
}

/// Writes and closes the sink once per batch of ids.
async fn record(config: &AuditConfig, batches: &[&[u64]]) {
    for ids in batches {
        let sink = AuditSink::open("audit", config.clone()).await.unwrap();
        sink.deliver(&origin("aurora:audit"), &deliveries(ids.iter().copied())).await.unwrap();
        sink.close().await;
    }
}

/// Returns the ids of all recorded entries, in the order of the files.
fn recorded(folder: &Path) -> Vec<u64> {
    let files = list(folder).unwrap();
    let lines = files.iter().map(|file| fs::read_to_string(&file.path).unwrap());
    let text: String = lines.collect();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter_map(|record| Some(record["id"].as_str()?.parse::<EntryId>().unwrap().ms)).collect()
}

#[tokio::test]
async fn entry_delivered_again_or_late_is_recorded_once() {
    let folder = TempDir::new().unwrap();
    // 12 entries do not fit into one file of the smallest size, so earlier files are read too.
    let batches: [&[u64]; 5] =
        [&[1, 2, 3, 3, 4], &[10, 11, 12, 13, 14, 15, 16, 17, 18, 19], &[4, 1, 18, 30], &[5, 5, 2, 29], &[29, 5]];
    record(&small_files(&folder), &batches).await;
    let expected = [1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 30, 5, 29];
    assert_eq!(recorded(folder.path()), expected);
    let report = verify(folder.path()).unwrap();
    assert!(report.is_intact() && report.files > 1 && report.entries == 17, "{report:?}");
}

#[tokio::test]
async fn same_id_in_two_streams_is_two_entries() {
    let folder = TempDir::new().unwrap();
    let sink = AuditSink::open("audit", config(&folder)).await.unwrap();
    for stream in ["a", "b", "a"] {
        sink.deliver(&origin(stream), &deliveries([1, 2])).await.unwrap();
    }
    sink.close().await;
    assert_eq!(recorded(folder.path()), [1, 2, 1, 2]);
}

#[tokio::test]
async fn workers_of_one_sink_write_one_chain() {
    let folder = TempDir::new().unwrap();
    let sink = Arc::new(AuditSink::open("audit", small_files(&folder)).await.unwrap());
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..8_u64 {
        let sink = Arc::clone(&sink);
        workers.spawn(async move {
            for n in 0..10 {
                let ids = (0..5).map(|k| 1 + worker * 50 + n * 5 + k);
                sink.deliver(&origin("aurora:audit"), &deliveries(ids)).await.unwrap();
            }
        });
    }
    workers.join_all().await;
    sink.close().await;
    let mut ids = recorded(folder.path());
    ids.sort_unstable();
    assert_eq!(ids, (1..=400).collect::<Vec<_>>());
    let report = verify(folder.path()).unwrap();
    assert!(report.is_intact() && report.files > 10, "{report:?}");
}

#[tokio::test]
async fn second_process_on_the_folder_is_refused() {
    let folder = TempDir::new().unwrap();
    let first = AuditSink::open("audit", config(&folder)).await.unwrap();
    let error = AuditSink::open("audit", config(&folder)).await.unwrap_err();
    assert!(chain(&error).contains("another process uses the audit folder"), "{error:?}");
    assert!(verify(folder.path()).unwrap().is_in_use);
    first.close().await;
    AuditSink::open("audit", config(&folder)).await.unwrap();
}

#[tokio::test]
async fn record_cut_short_by_a_crash_is_recorded_again() {
    let folder = TempDir::new().unwrap();
    record(&config(&folder), &[&[1, 2, 3]]).await;
    let path = list(folder.path()).unwrap()[0].path.clone();
    let whole = fs::read(&path).unwrap();
    let record_bytes = whole.split(|b| *b == b'\n').rev().nth(1).unwrap().len() + 1;
    for cut in 1..=record_bytes {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        record(&config(&folder), &[&[3]]).await;
        assert_eq!(recorded(folder.path()), [1, 2, 3], "{cut} bytes cut off");
        assert!(verify(folder.path()).unwrap().is_intact(), "{cut} bytes cut off");
    }
}

#[tokio::test]
async fn file_with_a_cut_first_record_is_begun_again() {
    let folder = TempDir::new().unwrap();
    record(&small_files(&folder), &[&(1..=10).collect::<Vec<_>>(), &(11..=20).collect::<Vec<_>>()]).await;
    let last = list(folder.path()).unwrap().pop().unwrap();
    let before = recorded(folder.path()).len();
    let lost = fs::read_to_string(&last.path).unwrap().lines().count() - 1;
    fs::write(&last.path, "{\"seq\":1").unwrap();
    record(&small_files(&folder), &[&(1..=20).collect::<Vec<_>>()]).await;
    assert_eq!(recorded(folder.path()), (1..=20).collect::<Vec<_>>(), "{lost} of {before} lost");
    assert!(verify(folder.path()).unwrap().is_intact());
}

#[tokio::test]
async fn zeros_left_by_a_power_cut_are_moved_to_a_copy() {
    let folder = TempDir::new().unwrap();
    record(&config(&folder), &[&[1, 2, 3]]).await;
    let path = list(folder.path()).unwrap()[0].path.clone();
    let mut bytes = fs::read(&path).unwrap();
    let place = bytes.len() - 900;
    bytes[place..place + 100].fill(0);
    fs::write(&path, &bytes).unwrap();
    record(&config(&folder), &[&[1, 2, 3]]).await;
    let mut ids = recorded(folder.path());
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
    assert!(verify(folder.path()).unwrap().is_intact());
    let copies = fs::read_dir(folder.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x.to_string_lossy().starts_with("cut-at-")));
    assert_eq!(copies.count(), 1);
}

#[tokio::test]
async fn changed_record_in_the_last_file_is_refused() {
    let folder = TempDir::new().unwrap();
    record(&config(&folder), &[&[1, 2, 3]]).await;
    let path = list(folder.path()).unwrap()[0].path.clone();
    let text = fs::read_to_string(&path).unwrap().replace("event 2", "event 9");
    fs::write(&path, text).unwrap();
    let error = AuditSink::open("audit", config(&folder)).await.unwrap_err();
    assert!(chain(&error).contains("is damaged in line 3"), "{error:?}");
}

#[tokio::test]
async fn unwritable_folder_is_a_transient_failure() {
    let folder = TempDir::new().unwrap();
    let sink = AuditSink::open("audit", config(&folder)).await.unwrap();
    sink.deliver(&origin("aurora:audit"), &deliveries([1])).await.unwrap();
    // A folder in place of the next file stops even root, unlike missing permissions.
    let today = Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).strftime("%Y%m%d").to_string();
    let obstacle = folder.path().join(format!("audit-00000002-{today}.jsonl"));
    let yesterday = folder.path().join("audit-00000001-20200101.jsonl");
    sink.close().await;
    fs::rename(&list(folder.path()).unwrap()[0].path, yesterday).unwrap();
    let sink = AuditSink::open("audit", config(&folder)).await.unwrap();
    fs::create_dir(&obstacle).unwrap();
    let error = sink.deliver(&origin("aurora:audit"), &deliveries([2])).await.unwrap_err();
    assert_eq!(error.class(), SinkErrorClass::Transient);
    fs::remove_dir(&obstacle).unwrap();
    sink.check().await.unwrap();
    sink.deliver(&origin("aurora:audit"), &deliveries([2])).await.unwrap();
    sink.close().await;
    assert_eq!(recorded(folder.path()), [1, 2]);
    assert!(verify(folder.path()).unwrap().is_intact());
}

#[tokio::test]
async fn archived_files_leave_the_rest_verifiable() {
    let folder = TempDir::new().unwrap();
    record(&small_files(&folder), &[&(1..=30).collect::<Vec<_>>()]).await;
    let files = list(folder.path()).unwrap();
    fs::remove_file(&files[0].path).unwrap();
    let report = verify(folder.path()).unwrap();
    assert!(report.is_intact() && report.first_seq > 1, "{report:?}");
    fs::remove_file(&files[2].path).unwrap();
    let report = verify(folder.path()).unwrap();
    assert!(matches!(report.problems[0].flaw, AuditFlaw::Missing { .. }), "{report:?}");
}

/// Returns files with 30 entries, as they were written.
fn written() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = TempDir::new().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(record(&small_files(&folder), &[&(1..=30).collect::<Vec<_>>()]));
    let files = list(folder.path()).unwrap();
    files.iter().map(|file| (file.path.file_name().unwrap().into(), fs::read(&file.path).unwrap())).collect()
}

fn verify_files(files: &[(PathBuf, Vec<u8>)]) -> VerifyReport {
    let folder = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    verify(folder.path()).unwrap()
}

/// Returns all lines with their newlines, and the file of each.
fn lines(files: &[(PathBuf, Vec<u8>)]) -> Vec<(usize, Vec<u8>)> {
    let of_file = |(n, (_, bytes)): (usize, &(PathBuf, Vec<u8>))| {
        bytes.split_inclusive(|b| *b == b'\n').map(|line| (n, line.to_vec())).collect::<Vec<_>>()
    };
    files.iter().enumerate().flat_map(of_file).collect()
}

fn rebuilt(files: &[(PathBuf, Vec<u8>)], lines: &[(usize, Vec<u8>)]) -> Vec<(PathBuf, Vec<u8>)> {
    let content = |n: usize| lines.iter().filter(|(of, _)| *of == n).flat_map(|(_, line)| line.clone()).collect();
    files.iter().enumerate().map(|(n, (name, _))| (name.clone(), content(n))).collect()
}

#[test]
fn problem_names_file_line_and_record() {
    let files = written();
    let mut changed = files.clone();
    let text = String::from_utf8(changed[1].1.clone()).unwrap();
    let line = text.lines().nth(2).unwrap();
    changed[1].1 = text.replace(line, &line.replace("event", "EVENT")).into_bytes();
    let report = verify_files(&changed);
    assert_eq!((report.problem_count, report.problems[0].line), (1, 3), "{report:?}");
    assert_eq!(report.problems[0].flaw, AuditFlaw::Changed);
    assert!(report.problems[0].file.ends_with(&files[1].0), "{report:?}");
    assert!(line.starts_with(&format!("{{\"seq\":{},", report.problems[0].expected_seq)), "{line}");
}

#[test]
fn rewritten_record_is_found_by_the_next_one() {
    let files = written();
    let mut all = lines(&files);
    let body = br#""stream":"aurora:audit","id":"9-9","event_id":null,"fields":{}"#;
    let before = all[3].1.clone();
    let mut head = record::ChainRecord::parse(before.strip_suffix(b"\n").unwrap()).unwrap().head();
    all[4].1.clear();
    head.seal("2026-01-01T00:00:00.000Z", body, &mut all[4].1);
    let report = verify_files(&rebuilt(&files, &all));
    assert_eq!(report.problems[0].flaw, AuditFlaw::NotLinked, "{report:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_change_removal_move_or_repetition_is_found(
        action in 0..4, at: prop::sample::Index, to: prop::sample::Index, change in 1_u8..
    ) {
        let files = written();
        prop_assert!(verify_files(&files).is_intact());
        let mut all = lines(&files);
        let (place, other) = (at.index(all.len()), to.index(all.len()));
        match action {
            0 => {
                let byte = to.index(all[place].1.len());
                all[place].1[byte] ^= change;
            }
            // A missing last record does not show in a chain, and a first file can be archived.
            1 => {
                prop_assume!(place + 1 < all.len());
                all.remove(place);
            }
            2 => {
                prop_assume!(place != other);
                let moved = all[place].1.clone();
                all[place].1 = std::mem::replace(&mut all[other].1, moved);
            }
            _ => {
                let copy = all[place].clone();
                all.insert(place, copy);
            }
        }
        let report = verify_files(&rebuilt(&files, &all));
        prop_assert!(!report.is_intact(), "{report:?}");
    }
}
