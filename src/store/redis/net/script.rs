//! The Lua scripts. Every change of several steps is one script, so that it happens completely or not at all.
//!
//! Each script is safe to run twice, writes nothing before its last check, and appends before it acknowledges.

use std::borrow::Cow;
use std::sync::OnceLock;

use bytes::Bytes;

/// The maximum of names and values of one entry that a script can pass to one command.
pub(crate) const MAX_ENTRY_ARGUMENTS: usize = 7000;

/// The maximum number of ids for one run of a script.
pub(crate) const MAX_IDS: usize = 500;

/// A script and its hash, which identifies it on the server.
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

    /// Returns the script with a check of a lease. It takes one more key, the lease, and one more argument, its value.
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

/// Prepends the functions shared by the scripts that keep accounts.
macro_rules! with_account {
    ($file:literal) => {
        concat!(include_str!("../lua/account.lua"), include_str!($file))
    };
}

pub(crate) static ACKNOWLEDGE: Script = Script::new(include_str!("../lua/acknowledge.lua"));
pub(crate) static APPEND: Script = Script::new(include_str!("../lua/append.lua"));
pub(crate) static APPEND_ONCE: Script = Script::new(include_str!("../lua/append_once.lua"));
pub(crate) static CLAIM: Script = Script::new(include_str!("../lua/claim.lua"));
pub(crate) static DEAD_LETTER_APPEND: Script = Script::new(include_str!("../lua/dead_letter_append.lua"));
pub(crate) static DEAD_LETTER_EXISTS: Script = Script::new(include_str!("../lua/dead_letter_exists.lua"));
pub(crate) static DEAD_LETTER_PREPARE: Script = Script::new(include_str!("../lua/dead_letter_prepare.lua"));
pub(crate) static DEAD_LETTER_FINISH: Script = Script::new(include_str!("../lua/dead_letter_finish.lua"));
pub(crate) static DEAD_LETTER: Script = Script::new(include_str!("../lua/dead_letter.lua"));
pub(crate) static DESCRIBE: Script = Script::new(include_str!("../lua/describe.lua"));
pub(crate) static DROP_OLDEST: Script = Script::new(with_account!("../lua/drop_oldest.lua"));
pub(crate) static ENSURE_GROUP: Script = Script::new(with_account!("../lua/ensure_group.lua"));
pub(crate) static EPOCH: Script = Script::new(include_str!("../lua/epoch.lua"));
pub(crate) static EXTEND: Script = Script::new(include_str!("../lua/extend.lua"));
pub(crate) static SETTLE_BY_RECEIPT: Script = Script::new(include_str!("../lua/settle_by_receipt.lua"));
pub(crate) static REDELIVER: Script = Script::new(include_str!("../lua/redeliver.lua"));
pub(crate) static FETCH: Script = Script::new(include_str!("../lua/fetch.lua"));
pub(crate) static LEASE: Script = Script::new(include_str!("../lua/lease.lua"));
pub(crate) static STORE_KEY: Script = Script::new(include_str!("../lua/store_key.lua"));
pub(crate) static RELEASE_LEASE: Script = Script::new(include_str!("../lua/release_lease.lua"));
pub(crate) static REMOVE_CONSUMER: Script = Script::new(include_str!("../lua/remove_consumer.lua"));
pub(crate) static SETTLE: Script = Script::new(include_str!("../lua/settle.lua"));
pub(crate) static TRIM: Script = Script::new(with_account!("../lua/trim.lua"));
pub(crate) static WRITE_OFF: Script = Script::new(with_account!("../lua/write_off.lua"));
