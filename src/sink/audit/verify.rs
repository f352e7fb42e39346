//! Verification of the audit files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::files::{self, AuditFile, FileLines};
use super::record::{ChainHead, ChainRecord, RecordContent, Unreadable};

/// Maximum number of problems that a report lists.
const LISTED_PROBLEMS: usize = 100;

/// The result of [`verify`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Number of files.
    pub files: usize,
    /// Number of lines that are whole records, including those that begin a file.
    pub records: u64,
    /// Number of records of entries.
    pub entries: u64,
    /// Number of the first record. It is greater than 1 if the first files have been moved away.
    pub first_seq: u64,
    /// Time of the first record, RFC 3339.
    pub first_recorded_at: Option<String>,
    /// Time of the last record, RFC 3339.
    pub last_recorded_at: Option<String>,
    /// Number of the last record.
    pub head_seq: u64,
    /// SHA-256 of the last record, hex. A copy of it and of `head_seq`, kept elsewhere, later proves that no record up
    /// to this one was changed or removed.
    pub head_hash: String,
    /// Whether a process has the files open for writing now.
    pub is_in_use: bool,
    /// The problems, at most the first 100.
    pub problems: Vec<AuditProblem>,
    /// Number of problems.
    pub problem_count: u64,
}

impl VerifyReport {
    /// Returns whether there are no problems.
    pub fn is_intact(&self) -> bool {
        self.problem_count == 0
    }
}

/// A problem and its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditProblem {
    /// The file.
    pub file: PathBuf,
    /// The line in the file, from 1.
    pub line: u64,
    /// The number of the expected record.
    pub expected_seq: u64,
    /// The kind of problem.
    pub flaw: AuditFlaw,
}

/// The kinds of problems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AuditFlaw {
    /// The line is not a record.
    NotARecord,
    /// The content of the record does not match its hash.
    Changed,
    /// Records are missing before this one.
    Missing {
        /// The number of this record.
        seq: u64,
    },
    /// The record is repeated or out of order.
    Repeated {
        /// The number of this record.
        seq: u64,
    },
    /// The number is right, but the record does not have the hash of the record before it.
    NotLinked,
    /// The file does not begin with its own record.
    WrongFile,
    /// The last line is incomplete, after a crash. The sink repairs it when it opens the folder.
    Incomplete,
}

impl fmt::Display for AuditProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: record {}: ", self.file.display(), self.line, self.expected_seq)?;
        match self.flaw {
            AuditFlaw::NotARecord => f.write_str("the line is not a record"),
            AuditFlaw::Changed => f.write_str("the record was changed"),
            AuditFlaw::Missing { seq } => write!(f, "missing; the line has record {seq}"),
            AuditFlaw::Repeated { seq } => write!(f, "record {seq} is repeated or out of order"),
            AuditFlaw::NotLinked => f.write_str("the record does not have the hash of the record before it"),
            AuditFlaw::WrongFile => f.write_str("the file does not begin with its own record"),
            AuditFlaw::Incomplete => f.write_str("the line is incomplete"),
        }
    }
}

/// Reads all audit files of a folder and checks every record.
///
/// Finds records that were changed, removed, repeated or moved. It cannot see that the newest records are missing:
/// compare [`VerifyReport::head_seq`] and [`VerifyReport::head_hash`] with a copy that is kept elsewhere. Blocks; reads
/// several hundred MiB per second. May run while the sink writes.
pub fn verify(folder: &Path) -> io::Result<VerifyReport> {
    let mut report = VerifyReport { is_in_use: files::is_locked(folder)?, ..VerifyReport::default() };
    let files = files::list(folder)?;
    report.files = files.len();
    let mut check = ChainCheck { report, head: None, was_unreadable: false };
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

struct ChainCheck {
    report: VerifyReport,
    /// The last accepted record.
    head: Option<ChainHead>,
    /// Whether the line before was unreadable, so that the next record cannot be linked to it.
    was_unreadable: bool,
}

impl ChainCheck {
    fn file(&mut self, file: &AuditFile, is_last: bool) -> io::Result<()> {
        let mut lines = FileLines::open(&file.path)?;
        let mut number = 0;
        while let Some(line) = lines.next()? {
            number += 1;
            if !line.is_complete {
                // The writer may be writing its next record.
                let is_being_written = is_last && self.report.is_in_use;
                if !is_being_written {
                    self.problem(file, number, AuditFlaw::Incomplete);
                }
                self.was_unreadable = true;
                continue;
            }
            match ChainRecord::parse(line.bytes) {
                Ok(record) => self.record(file, number, &record),
                Err(unreadable) => {
                    let flaw = match unreadable {
                        Unreadable::NotARecord => AuditFlaw::NotARecord,
                        Unreadable::Changed => AuditFlaw::Changed,
                    };
                    self.problem(file, number, flaw);
                    self.skip_one();
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, file: &AuditFile, line: u64, record: &ChainRecord<'_>) {
        self.report.records += 1;
        let is_in_place = match &record.content {
            RecordContent::File { number, .. } => line == 1 && *number == file.number,
            RecordContent::Entry { .. } => line > 1,
        };
        if !is_in_place {
            self.problem(file, line, AuditFlaw::WrongFile);
        }
        self.report.entries += u64::from(matches!(record.content, RecordContent::Entry { .. }));
        if let Some(head) = self.head {
            if record.seq <= head.seq {
                self.problem(file, line, AuditFlaw::Repeated { seq: record.seq });
                return;
            }
            if record.seq > head.seq + 1 {
                self.problem(file, line, AuditFlaw::Missing { seq: record.seq });
            } else if !self.was_unreadable && record.prev != head.hash {
                self.problem(file, line, AuditFlaw::NotLinked);
            }
        } else {
            self.report.first_seq = record.seq;
            self.report.first_recorded_at = Some(record.recorded_at.to_owned());
            let begins_chain = record.seq == 1 && !self.was_unreadable;
            if begins_chain && !ChainHead::default().is_followed_by(record) {
                self.problem(file, line, AuditFlaw::NotLinked);
            }
        }
        self.was_unreadable = false;
        self.report.last_recorded_at = Some(record.recorded_at.to_owned());
        self.head = Some(record.head());
    }

    /// Counts an unreadable line as the expected record.
    fn skip_one(&mut self) {
        if let Some(head) = &mut self.head {
            head.seq += 1;
        }
        self.was_unreadable = true;
    }

    fn problem(&mut self, file: &AuditFile, line: u64, flaw: AuditFlaw) {
        self.report.problem_count += 1;
        if self.report.problems.len() < LISTED_PROBLEMS {
            let expected_seq = self.head.map_or(1, |head| head.seq + 1);
            self.report.problems.push(AuditProblem { file: file.path.clone(), line, expected_seq, flaw });
        }
    }
}
