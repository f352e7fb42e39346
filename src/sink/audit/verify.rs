//! Reading all audit files back and finding what was done to them.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::files::{self, AuditFile, Lines};
use super::record::{Content, Head, Record, Unreadable};

/// Problems that a report lists one by one.
const LISTED_PROBLEMS: usize = 100;

/// What [`verify`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// How many files there are.
    pub files: usize,
    /// How many lines are whole records, those included that begin a file.
    pub records: u64,
    /// How many of them record an entry of a stream.
    pub entries: u64,
    /// Number of the first record; greater than 1 where the first files have been moved away.
    pub first_seq: u64,
    /// When the first record was written, RFC 3339.
    pub first_recorded_at: Option<String>,
    /// When the last record was written, RFC 3339.
    pub last_recorded_at: Option<String>,
    /// Number of the last record.
    pub head_seq: u64,
    /// SHA-256 of the last record, hex. Noted elsewhere, together with `head_seq`, it later proves that no record
    /// up to this one was changed or removed, the newest included.
    pub head_hash: String,
    /// Whether a process has the files open for writing now.
    pub is_in_use: bool,
    /// What is wrong, at most the first 100.
    pub problems: Vec<Problem>,
    /// How much is wrong.
    pub problem_count: u64,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_intact(&self) -> bool {
        self.problem_count == 0
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line in it, from 1.
    pub line: u64,
    /// The number of the record that should be there.
    pub expected_seq: u64,
    /// What is wrong.
    pub flaw: Flaw,
}

/// What can be wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Flaw {
    /// The line is no record.
    NotARecord,
    /// The record's content does not match its hash.
    Changed,
    /// Records are missing before this one, which has the number `seq`.
    Missing {
        /// The number found.
        seq: u64,
    },
    /// A record whose number, `seq`, had its turn before: repeated, or moved here.
    Repeated {
        /// The number found.
        seq: u64,
    },
    /// The number is right, but the record was not written after the one before it.
    NotLinked,
    /// The file does not begin with the record that names it.
    WrongFile,
    /// The last line is cut short: a crash amid a write; the sink repairs it when it opens the folder.
    Incomplete,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: record {}: ", self.file.display(), self.line, self.expected_seq)?;
        match self.flaw {
            Flaw::NotARecord => f.write_str("the line is no record"),
            Flaw::Changed => f.write_str("the record was changed"),
            Flaw::Missing { seq } => write!(f, "missing; the line holds record {seq}"),
            Flaw::Repeated { seq } => write!(f, "the line holds record {seq} again, or out of its order"),
            Flaw::NotLinked => f.write_str("the record does not follow from the one before it"),
            Flaw::WrongFile => f.write_str("the file does not begin with its own record"),
            Flaw::Incomplete => f.write_str("the line is incomplete"),
        }
    }
}

/// Reads all audit files of a folder and checks every record.
///
/// Finds records that were changed, removed, repeated or moved. It cannot see that the newest records are missing:
/// compare [`VerifyReport::head_seq`] and [`VerifyReport::head_hash`] with values noted before. Blocks; reads
/// several hundred MiB per second. May run while the sink writes.
pub fn verify(folder: &Path) -> io::Result<VerifyReport> {
    let mut report = VerifyReport { is_in_use: files::is_locked(folder)?, ..VerifyReport::default() };
    let files = files::list(folder)?;
    report.files = files.len();
    let mut check = Check { report, head: None, was_unreadable: false };
    for (n, file) in files.iter().enumerate() {
        let is_last = n + 1 == files.len();
        check.file(file, is_last)?;
    }
    let mut report = check.report;
    let head = check.head.unwrap_or_default();
    report.head_seq = head.seq;
    report.head_hash = head.hash.to_string();
    Ok(report)
}

struct Check {
    report: VerifyReport,
    /// The last record accepted.
    head: Option<Head>,
    /// Whether the line before could not be read, so that the next record can't be linked to it.
    was_unreadable: bool,
}

impl Check {
    fn file(&mut self, file: &AuditFile, is_last: bool) -> io::Result<()> {
        let mut lines = Lines::open(&file.path)?;
        let mut number = 0;
        while let Some(line) = lines.next()? {
            number += 1;
            if !line.is_complete {
                // The writer may be amid its next record.
                let is_being_written = is_last && self.report.is_in_use;
                if !is_being_written {
                    self.problem(file, number, Flaw::Incomplete);
                }
                self.was_unreadable = true;
                continue;
            }
            match Record::parse(line.bytes) {
                Ok(record) => self.record(file, number, &record),
                Err(unreadable) => {
                    let flaw = match unreadable {
                        Unreadable::NotARecord => Flaw::NotARecord,
                        Unreadable::Changed => Flaw::Changed,
                    };
                    self.problem(file, number, flaw);
                    self.skip_one();
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, file: &AuditFile, line: u64, record: &Record<'_>) {
        self.report.records += 1;
        let is_in_place = match &record.content {
            Content::File { number, .. } => line == 1 && *number == file.number,
            Content::Entry { .. } => line > 1,
        };
        if !is_in_place {
            self.problem(file, line, Flaw::WrongFile);
        }
        self.report.entries += u64::from(matches!(record.content, Content::Entry { .. }));
        if let Some(head) = self.head {
            if record.seq <= head.seq {
                self.problem(file, line, Flaw::Repeated { seq: record.seq });
                return;
            }
            if record.seq > head.seq + 1 {
                self.problem(file, line, Flaw::Missing { seq: record.seq });
            } else if !self.was_unreadable && record.prev != head.hash {
                self.problem(file, line, Flaw::NotLinked);
            }
        } else {
            self.report.first_seq = record.seq;
            self.report.first_recorded_at = Some(record.recorded_at.to_owned());
            let begins_chain = record.seq == 1 && !self.was_unreadable;
            if begins_chain && !Head::default().is_followed_by(record) {
                self.problem(file, line, Flaw::NotLinked);
            }
        }
        self.was_unreadable = false;
        self.report.last_recorded_at = Some(record.recorded_at.to_owned());
        self.head = Some(record.head());
    }

    /// Counts an unreadable line as the record that should have been there.
    fn skip_one(&mut self) {
        if let Some(head) = &mut self.head {
            head.seq += 1;
        }
        self.was_unreadable = true;
    }

    fn problem(&mut self, file: &AuditFile, line: u64, flaw: Flaw) {
        self.report.problem_count += 1;
        if self.report.problems.len() < LISTED_PROBLEMS {
            let expected_seq = self.head.map_or(1, |head| head.seq + 1);
            self.report.problems.push(Problem { file: file.path.clone(), line, expected_seq, flaw });
        }
    }
}
