//! `kill -9` at every boundary of durability: right before and right after each sync of a daemon.
//!
//! A small preloaded library counts the daemon's calls of `fsync` and `fdatasync`, and kills the process at the call
//! that the test selects. The short run is part of every test run. The long one is
//! `cargo test --release --test it -- --ignored two_hundred_kills`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::{AUDITED, Load, assert_nothing_lost, join_publishers};
use crate::support::app::Home;

/// Kills the process at the sync with the number in `KILL_AT_SYNC`: before it if negative, otherwise after it.
const LIBRARY: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_long syncs;

static int counted(const char *name, int file) {
    const char *text = getenv("KILL_AT_SYNC");
    long at = text ? atol(text) : 0, number = atomic_fetch_add(&syncs, 1) + 1;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (number == -at) kill(getpid(), SIGKILL);
    int result = real(file);
    if (number == at) kill(getpid(), SIGKILL);
    return result;
}

int fsync(int file) { return counted("fsync", file); }
int fdatasync(int file) { return counted("fdatasync", file); }
"#;

/// Makes a home with the library for its daemons.
fn home_with_library() -> (Home, PathBuf) {
    // Small audit files, because each start reads the last one.
    let home = Home::new(&format!("{AUDITED}max_file_size = \"1MiB\"\n"));
    let (source, library) = (home.path("kill.c"), home.path("kill.so"));
    fs::write(&source, LIBRARY).expect("a writable folder");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]).output();
    let compiled = compiled.expect("the C compiler that links this test runs");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    (home, library)
}

/// Runs daemons on one folder, one after another. Each is killed at its sync of this number.
async fn survives_kills_at(syncs: impl Iterator<Item = i64>) {
    let (mut home, library) = home_with_library();
    let load = Arc::new(Load::default());
    let (mut kills, mut at_the_start) = (0, 0);
    home.set_env("LD_PRELOAD", library.to_str().expect("temporary folders have names in UTF-8"));
    for sync in syncs {
        home.set_env("KILL_AT_SYNC", &sync.to_string());
        match home.spawn().await {
            Ok(daemon) => {
                let daemon = Arc::new(daemon);
                let mut publishers = load.start(&daemon);
                join_publishers(&mut publishers).await;
                let daemon = Arc::into_inner(daemon).expect("the last reference");
                let ended = daemon.ended().await;
                assert_eq!(ended.status.code(), None, "not killed at sync {sync}:\n{}", ended.log);
            }
            Err(ended) => {
                assert_eq!(ended.status.code(), None, "not killed at sync {sync}:\n{}", ended.log);
                at_the_start += 1;
            }
        }
        kills += 1;
        if kills % 20 == 0 {
            print_summary(kills, at_the_start, load.accepted_count().await);
        }
    }
    home.set_env("KILL_AT_SYNC", "0");
    print_summary(kills, at_the_start, load.accepted_count().await);
    assert_nothing_lost(&home, &load).await;
}

#[expect(clippy::print_stderr, reason = "the long run prints its result")]
fn print_summary(kills: u64, at_the_start: u64, accepted: usize) {
    eprintln!("{kills} kills, {at_the_start} of them before the daemon listened; {accepted} events accepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_before_and_after_syncs_lose_nothing() {
    survives_kills_at([1, -2, 3, -4, 6, -9, 14, -23, 40, -61].into_iter()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: cargo test --release --test it -- --ignored two_hundred_kills"]
async fn two_hundred_kills_before_and_after_syncs_lose_nothing() {
    survives_kills_at((1..=110).flat_map(|sync| [sync, -sync])).await;
}
