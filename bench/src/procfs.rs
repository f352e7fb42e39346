//! CPU time, memory and limits of processes, as `/proc` reports them.

use std::fs;

use anyhow::{Context, Result};

/// Clock ticks per second in `/proc`, which are 100 on every architecture that Linux servers use.
const TICKS_PER_SECOND: f64 = 100.0;

/// Returns the CPU time that a process has used, in seconds, to a hundredth.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} has ended"))?;
    parse_cpu(&stat).context("/proc/PID/stat has an unknown format")
}

/// Returns the CPU time that this process has used, in seconds.
pub(crate) fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id()).unwrap_or_default()
}

/// The program's name in the second field may hold spaces and parentheses: count from the last parenthesis.
fn parse_cpu(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

/// Returns the resident memory of a process that no file backs, in bytes.
pub(crate) fn private_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "RssAnon:")
}

/// Returns the resident memory of a process, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmRSS:")
}

/// Returns the highest number of open files that a process may raise its limit to.
pub(crate) fn max_open_files() -> Option<u64> {
    parse_open_files(&fs::read_to_string("/proc/self/limits").ok()?)
}

fn parse_open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(u64::MAX),
        hard => hard.parse().ok(),
    }
}

/// Returns the memory that this machine can still allocate, in bytes.
pub(crate) fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_kib(&text, "MemAvailable:").unwrap_or_default()
}

fn status_bytes(pid: u32, name: &str) -> Result<u64> {
    let status =
        fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} has ended"))?;
    parse_kib(&status, name).with_context(|| format!("/proc/PID/status has no {name}"))
}

fn parse_kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_after_a_name_with_parentheses() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert!((parse_cpu(stat).unwrap() - 3.0).abs() < 1e-9);
        assert!(parse_cpu("42").is_none());
        assert!(cpu_seconds(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn open_file_limit_is_the_hard_one() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 20000                files     \n";
        assert_eq!(parse_open_files(limits), Some(20_000));
        assert!(max_open_files().is_some());
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(parse_kib("VmRSS:\t    12 kB\nRssAnon:\t 8 kB\n", "RssAnon:"), Some(8192));
        assert!(available_bytes() > 0);
        assert!(private_bytes(std::process::id()).unwrap() > 0);
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }
}
