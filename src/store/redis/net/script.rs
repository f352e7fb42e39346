//! The scripts: every change of several steps is one of them, so that it happens as a whole or not at all.
//!
//! Each is safe to run twice, writes nothing before its last check, and appends before it acknowledges.

use std::borrow::Cow;
use std::sync::OnceLock;

use bytes::Bytes;

/// The most names and values of one entry: a script can't hand more to one command.
pub(crate) const MAX_ENTRY_ARGUMENTS: usize = 7000;

/// The most ids that one run of a script takes.
pub(crate) const MAX_IDS: usize = 500;

/// A script and its hash, by which the server knows it.
#[derive(Debug)]
pub(crate) struct Script {
    source: Cow<'static, str>,
    sha: OnceLock<Bytes>,
    under_lease: OnceLock<Box<Self>>,
}

impl Script {
    const fn new(source: &'static str) -> Self {
        Self { source: Cow::Borrowed(source), sha: OnceLock::new(), under_lease: OnceLock::new() }
    }

    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// The same script, run only where a lease is held: one more key, the lease's, and one more argument, its value.
    pub(crate) fn under_lease(&self) -> &Self {
        self.under_lease.get_or_init(|| {
            let source = Cow::Owned(format!("{}{}", include_str!("../lua/under_lease.lua"), self.source));
            Box::new(Self { source, sha: OnceLock::new(), under_lease: OnceLock::new() })
        })
    }

    pub(crate) fn sha(&self) -> &Bytes {
        self.sha.get_or_init(|| fred::util::sha1_hash(&self.source).into())
    }
}

/// A script after what those share that keep accounts.
macro_rules! with_account {
    ($file:literal) => {
        concat!(include_str!("../lua/account.lua"), include_str!($file))
    };
}

pub(crate) static ACKNOWLEDGE: Script = Script::new(include_str!("../lua/acknowledge.lua"));
pub(crate) static APPEND: Script = Script::new(include_str!("../lua/append.lua"));
pub(crate) static APPEND_ONCE: Script = Script::new(include_str!("../lua/append_once.lua"));
pub(crate) static CLAIM: Script = Script::new(include_str!("../lua/claim.lua"));
pub(crate) static BURY: Script = Script::new(include_str!("../lua/bury.lua"));
pub(crate) static BURIED: Script = Script::new(include_str!("../lua/buried.lua"));
pub(crate) static BURY_BEGIN: Script = Script::new(include_str!("../lua/bury_begin.lua"));
pub(crate) static BURY_END: Script = Script::new(include_str!("../lua/bury_end.lua"));
pub(crate) static DEAD_LETTER: Script = Script::new(include_str!("../lua/dead_letter.lua"));
pub(crate) static DESCRIBE: Script = Script::new(include_str!("../lua/describe.lua"));
pub(crate) static DROP_OLDEST: Script = Script::new(with_account!("../lua/drop_oldest.lua"));
pub(crate) static ENSURE_GROUP: Script = Script::new(with_account!("../lua/ensure_group.lua"));
pub(crate) static EPOCH: Script = Script::new(include_str!("../lua/epoch.lua"));
pub(crate) static EXTEND: Script = Script::new(include_str!("../lua/extend.lua"));
pub(crate) static REDEEM: Script = Script::new(include_str!("../lua/redeem.lua"));
pub(crate) static REDELIVER: Script = Script::new(include_str!("../lua/redeliver.lua"));
pub(crate) static FETCH: Script = Script::new(include_str!("../lua/fetch.lua"));
pub(crate) static LEASE: Script = Script::new(include_str!("../lua/lease.lua"));
pub(crate) static REMEMBER: Script = Script::new(include_str!("../lua/remember.lua"));
pub(crate) static RELEASE_LEASE: Script = Script::new(include_str!("../lua/release_lease.lua"));
pub(crate) static REMOVE_CONSUMER: Script = Script::new(include_str!("../lua/remove_consumer.lua"));
pub(crate) static SETTLE: Script = Script::new(include_str!("../lua/settle.lua"));
pub(crate) static TRIM: Script = Script::new(with_account!("../lua/trim.lua"));
pub(crate) static WRITE_OFF: Script = Script::new(with_account!("../lua/write_off.lua"));
