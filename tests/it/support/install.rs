//! Programs that tests need, installed from Debian's packages if they are missing.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

/// Returns the path of a program. Installs its package if necessary.
///
/// One installation runs at a time over all threads and processes. Without its program a test fails; it never skips.
pub(crate) fn program(name: &str, package: &str) -> PathBuf {
    if let Some(path) = find(name) {
        return path;
    }
    let lock_path = std::env::temp_dir().join("aurora-bus-tests-install.lock");
    let lock = File::create(&lock_path).unwrap_or_else(|e| panic!("cannot create {}: {e}", lock_path.display()));
    lock.lock().expect("a local file can be locked");
    if find(name).is_none() {
        install(name, package);
    }
    find(name).unwrap_or_else(|| panic!("the package `{package}` was installed, but there is no `{name}` in PATH"))
}

fn find(name: &str) -> Option<PathBuf> {
    // Debian keeps PostgreSQL's server programs outside the path, in a folder for each version.
    let script = "command -v \"$1\" || ls -d /usr/lib/postgresql/*/bin/\"$1\" 2>/dev/null | tail -n 1 | grep .";
    let output = Command::new("sh").args(["-c", script, "sh", name]).output().expect("sh runs");
    let path = String::from_utf8(output.stdout).expect("paths of programs are UTF-8");
    output.status.success().then(|| PathBuf::from(path.trim()))
}

fn install(name: &str, package: &str) {
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    let as_root = if is_root { "" } else { "sudo -n " };
    let script = format!(
        "{as_root}apt-get update -qq && {as_root}env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
         apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends {package}"
    );
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    assert!(
        output.status.success(),
        "`{name}` is missing and `{package}` could not be installed; install it by hand.\n$ {script}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}
