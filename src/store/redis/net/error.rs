//! What a call to the server can fail with: the server's own words, sorted by what can be done about them.

use fred::error::{Error as FredError, ErrorKind as FredKind};

use crate::store::redis::net::address::Address;
use crate::store::redis::net::reply::Reply;

use crate::store::{StoreError, StoreErrorKind};

/// Where a cluster wants a command that it did not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Elsewhere {
    pub(crate) address: Address,
    /// Only this once, and only when asked so: the key is being moved there.
    pub(crate) is_asking: bool,
}

/// A failed call: its kind, and what is wrong in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: StoreErrorKind,
    /// Follows "cannot do this: ", such as "the server is loading its data".
    pub(crate) reason: String,
    /// The server does not know the script; it was not run.
    pub(crate) is_unknown_script: bool,
    /// Nothing more may be sent on the connection: it is broken, or a reply may still be under way on it.
    pub(crate) breaks_connection: bool,
    /// The server is not the one that takes writes: another may be, or this one after a while. It ran nothing.
    pub(crate) is_wrong_server: bool,
    /// How many entries were stored all the same.
    pub(crate) stored: u64,
    /// What the script answered whose effect is not confirmed.
    pub(crate) unconfirmed: Option<Box<Reply>>,
    /// The cluster named another node for this.
    pub(crate) elsewhere: Option<Box<Elsewhere>>,
}

/// What the first words of a server's error mean, and what to do about it.
const KNOWN: [(&str, StoreErrorKind, &str); 39] = {
    use StoreErrorKind::{Denied, Full, Internal, LeaseLost, NoGroup, Unavailable, Unsuitable, WrongType};
    const NO_RIGHT: &str = "the user lacks the right to a command or a key (see ACL LOG on the server)";
    const ONE_SCRIPT: &str = "the server is busy with a script; wait, or end it with SCRIPT KILL";
    [
        ("LOADING", Unavailable, "the server is loading its data; it answers when it has"),
        ("READONLY", Unavailable, "the server is a read-only replica; the primary is looked for"),
        (
            "MASTERDOWN",
            Unavailable,
            "the server is a replica that has lost its primary (replica-serve-stale-data no); the primary is looked for",
        ),
        (
            "CLUSTERDOWN",
            Unavailable,
            "the cluster is down: a part of it has no server (see CLUSTER INFO and CLUSTER NODES)",
        ),
        ("TRYAGAIN", Unavailable, "the cluster is moving the key"),
        ("CROSSSLOT", Internal, "the keys of one command are in different parts of the cluster"),
        (
            "MISCONF",
            Unavailable,
            "the server refuses writes because it cannot save its data to disk: look at its log and its disk",
        ),
        (
            "NOREPLICAS",
            Unavailable,
            "the server refuses writes because too few replicas are connected (min-replicas-to-write)",
        ),
        ("NOGOODSLAVE", Unavailable, "no replica can take over"),
        ("BUSY ", Unavailable, ONE_SCRIPT),
        ("UNKILLABLE", Unavailable, "the server is busy with a script that writes and cannot be ended"),
        ("UNBLOCKED force unblock", Unavailable, "the server has changed its role"),
        ("ERR max number of clients", Unavailable, "the server has too many clients (maxclients)"),
        ("ERR Server started in protected mode", Denied, "the server is in protected mode"),
        ("DENIED", Denied, "the server is in protected mode: give it a password, or bind it to this machine"),
        ("OOM", Full, "the server has reached its memory limit (maxmemory): raise it, or keep less"),
        ("ERR command not allowed when used memory", Full, "the server has reached its memory limit (maxmemory)"),
        ("ERR The stream has exhausted", Full, "the stream has used up its last id"),
        ("WRONGTYPE", WrongType, "the key holds something that is no stream"),
        ("NOGROUP", NoGroup, "the group, or its stream, is gone"),
        ("UNBLOCKED", NoGroup, "the stream is gone"),
        ("ERR no such key", NoGroup, "the stream is gone"),
        ("LEASELOST", LeaseLost, "the lease is not held any more"),
        ("NOAUTH", Denied, "the server asks for a password (store.redis.password)"),
        ("WRONGPASS", Denied, "the server refuses the user name or the password"),
        ("ERR invalid password", Denied, "the server refuses the password"),
        ("ERR AUTH <password> called without any password", Denied, "a password is given, but the server has none"),
        ("ERR Client sent AUTH, but no password", Denied, "a password is given, but the server has none"),
        ("NOPERM", Denied, NO_RIGHT),
        ("ERR The user executing the script can't", Denied, NO_RIGHT),
        ("The user executing the script can't", Denied, NO_RIGHT),
        ("ACL failure in script", Denied, NO_RIGHT),
        ("ERR ACL failure in script", Denied, NO_RIGHT),
        (
            "ERR This instance has cluster support disabled",
            Unsuitable,
            "the server is no part of a cluster: write redis://",
        ),
        ("ERR DB index is out of range", Unsuitable, "the server has fewer databases than the url asks for"),
        ("ERR No such master with that name", Unsuitable, "the sentinels know no service of that name"),
        ("IDONTKNOW", Unavailable, "the sentinel does not know the primary yet"),
        (
            "ERR SELECT is not allowed in cluster mode",
            Unsuitable,
            "the server is part of a cluster: write redis-cluster://",
        ),
        ("NOSCRIPT", Internal, "the server does not know the script"),
    ]
};

impl Failure {
    /// The server can't be reached, or does not answer.
    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        Self::new(StoreErrorKind::Unavailable, reason)
    }

    /// No reply came in time. One may still come.
    pub(crate) fn timeout() -> Self {
        Self { breaks_connection: true, ..Self::unavailable("the server did not answer in time") }
    }

    /// A reply is not what the command is known to answer.
    pub(crate) fn unexpected(what: &str) -> Self {
        let reason = format!("the server's reply makes no sense: {what}");
        Self { breaks_connection: true, ..Self::new(StoreErrorKind::Internal, reason) }
    }

    pub(crate) fn new(kind: StoreErrorKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
            is_unknown_script: false,
            breaks_connection: false,
            is_wrong_server: false,
            stored: 0,
            unconfirmed: None,
            elsewhere: None,
        }
    }

    /// From the text of an error reply, such as `OOM command not allowed when used memory > 'maxmemory'.`
    pub(crate) fn from_reply(text: &str) -> Self {
        // Servers before 7.0 put a script's errors behind its name: "ERR Error running script (call to f_<sha>):
        // @user_script:7: WRONGTYPE …".
        let own_words = match text.strip_prefix("ERR Error running script") {
            Some(wrapped) => wrapped.split_once("@user_script:").map_or(text, |(_, rest)| {
                rest.trim_start_matches(|c: char| c.is_ascii_digit() || matches!(c, ':' | ' ' | '-' | '@'))
                    .trim_start_matches("user_script: ")
            }),
            None => text,
        };
        let own_words = own_words.trim_start_matches(|c: char| c.is_ascii_digit() || matches!(c, ':' | ' ' | '-'));
        if let Some((words, kind, reason)) = KNOWN.iter().find(|(words, ..)| own_words.starts_with(words)) {
            let is_wrong_server = matches!(*words, "READONLY" | "MASTERDOWN" | "UNBLOCKED force unblock");
            let is_unknown_script = *words == "NOSCRIPT";
            return Self { is_unknown_script, is_wrong_server, ..Self::new(*kind, *reason) };
        }
        let shown: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        Self::new(StoreErrorKind::Internal, format!("the server answers: {shown}"))
    }

    /// From an error reply of this server, which may name another one.
    pub(crate) fn from_reply_of(asked: &Address, text: &str) -> Self {
        let mut words = text.split_ascii_whitespace();
        let is_asking = match words.next() {
            Some("MOVED") => false,
            Some("ASK") => true,
            _ => return Self::from_reply(text),
        };
        match words.nth(1).and_then(|told| Address::told(told, asked)) {
            Some(address) => {
                let elsewhere = Some(Box::new(Elsewhere { address, is_asking }));
                Self { elsewhere, ..Self::unavailable("the cluster has moved the key") }
            }
            None => Self::from_reply(text),
        }
    }

    /// The error for whoever called: `what` could not be done.
    pub(crate) fn because(self, what: impl std::fmt::Display) -> StoreError {
        StoreError::new(self.kind, format!("{what}: {}", self.reason)).with_stored(self.stored)
    }
}

impl From<FredError> for Failure {
    fn from(error: FredError) -> Self {
        let details = error.details();
        match error.kind() {
            FredKind::Timeout => Self::timeout(),
            FredKind::Backpressure => Self::unavailable("too many commands are waiting for the server"),
            FredKind::Canceled => {
                Self { breaks_connection: true, ..Self::unavailable("the connection to the server was lost") }
            }
            FredKind::IO | FredKind::Tls | FredKind::Routing | FredKind::Sentinel => {
                let reason = format!("no connection to the server: {}", plain(details));
                Self { breaks_connection: true, ..Self::unavailable(reason) }
            }
            FredKind::Protocol | FredKind::Parse => Self::unexpected(details),
            _ => match Self::from_reply(details) {
                // The client's own words; what they are about is over with the connection.
                unknown if unknown.kind == StoreErrorKind::Internal && !unknown.is_unknown_script => {
                    Self { breaks_connection: true, ..Self::unavailable(format!("no connection: {details}")) }
                }
                known => known,
            },
        }
    }
}

/// The words of an error of the system that comes in its debugging form: `Os { code: 111, …, message: "…" }`, or
/// `Custom { kind: …, error: "…" }`.
fn plain(details: &str) -> &str {
    if let Some((_, why)) = details.split_once("InvalidCertificate(") {
        return match why {
            why if why.starts_with("NotValidForName") => {
                "its certificate is for another name (store.redis.tls_server_name can say for which)"
            }
            why if why.starts_with("UnknownIssuer") => {
                "its certificate is by an authority that is not trusted (store.redis.ca_file)"
            }
            why if why.starts_with("Expired") => "its certificate has expired",
            why if why.starts_with("NotValidYet") => "its certificate is not valid yet, or a clock is wrong",
            _ => "its certificate can't be trusted",
        };
    }
    let quoted = |mark| details.split_once(mark).and_then(|(_, rest)| rest.split('"').next());
    let words = quoted("message: \"").or_else(|| quoted("error: \"")).unwrap_or(details);
    match words {
        words if words.starts_with("failed to lookup address information") => {
            "its name is not known: check the host in store.redis.url, and the name service"
        }
        "" => "it was closed",
        words => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_errors_are_sorted_by_their_first_words() {
        use StoreErrorKind::{Denied, Full, Internal, NoGroup, Unavailable, Unsuitable, WrongType};
        let cases = [
            ("LOADING Redis is loading the dataset in memory", Unavailable),
            ("READONLY You can't write against a read only replica.", Unavailable),
            ("READONLY You can't write against a read only replica. script: 5a, on @user_script:5.", Unavailable),
            ("MISCONF Redis is configured to save RDB snapshots, but …", Unavailable),
            ("NOREPLICAS Not enough good replicas to write.", Unavailable),
            ("OOM command not allowed when used memory > 'maxmemory'.", Full),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", WrongType),
            ("NOGROUP No such key 'x' or consumer group 'y'", NoGroup),
            ("UNBLOCKED the stream key no longer exists", NoGroup),
            ("UNBLOCKED force unblock from blocking operation, instance state changed", Unavailable),
            ("ERR no such key", NoGroup),
            ("ERR max number of clients reached", Unavailable),
            ("NOAUTH Authentication required.", Denied),
            ("WRONGPASS invalid username-password pair or user is disabled.", Denied),
            ("NOPERM this user has no permissions to run the 'xadd' command", Denied),
            ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", Unavailable),
            ("CLUSTERDOWN Hash slot not served", Unavailable),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Unavailable),
            ("BUSY Redis is busy running a script.", Unavailable),
            ("NOREPLICAS Not enough good replicas to write.", Unavailable),
            ("ERR This instance has cluster support disabled", Unsuitable),
            ("ERR syntax error", Internal),
            ("", Internal),
            (
                "ERR Error running script (call to f_6b1bf486c81ceb7edf3c093f4c48582e38c0e791): @user_script:7: \
                 @user_script: 7: -WRONGTYPE Operation against a key holding the wrong kind of value",
                WrongType,
            ),
            ("ERR Error running script (call to f_6b1b): @user_script:2: NOGROUP No such key", NoGroup),
        ];
        for (text, kind) in cases {
            let failure = Failure::from_reply(text);
            assert_eq!(failure.kind, kind, "{text}: {failure:?}");
            assert!(!failure.breaks_connection, "{text}");
        }
        assert!(Failure::from_reply("NOSCRIPT No matching script. Please use EVAL.").is_unknown_script);
    }

    #[test]
    fn lost_connections_and_timeouts_are_unavailable() {
        for kind in [FredKind::IO, FredKind::Timeout, FredKind::Canceled, FredKind::Backpressure, FredKind::Unknown] {
            let failure = Failure::from(FredError::new(kind.clone(), "something"));
            assert_eq!(failure.kind, StoreErrorKind::Unavailable, "{kind:?}");
        }
        let refused = Failure::from(FredError::new(FredKind::Auth, "WRONGPASS invalid username-password pair"));
        assert_eq!(refused.kind, StoreErrorKind::Denied);
    }

    #[test]
    fn an_error_says_what_was_tried_and_what_is_wrong() {
        let error = Failure::from_reply("LOADING …").because("cannot append to stream `x`");
        assert_eq!(
            error.to_string(),
            "cannot append to stream `x`: the server is loading its data; it answers when it has"
        );
    }

    #[test]
    fn a_cluster_names_the_node_for_a_key() {
        let asked = Address::new("10.0.0.1", 7000);
        let told = |text| Failure::from_reply_of(&asked, text).elsewhere.map(|there| (there.address, there.is_asking));
        assert_eq!(told("MOVED 3999 10.0.0.2:7001"), Some((Address::new("10.0.0.2", 7001), false)));
        assert_eq!(told("ASK 3999 :7002"), Some((Address::new("10.0.0.1", 7002), true)));
        assert_eq!(told("MOVED"), None);
        assert_eq!(told("ERR syntax error"), None);
    }

    #[test]
    fn errors_of_the_system_are_told_in_its_words() {
        let told = |details: &'static str| Failure::from(FredError::new(FredKind::IO, details)).reason;
        let refused = "Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" }";
        assert_eq!(told(refused), "no connection to the server: Connection refused");
        let unknown = "Custom { kind: Uncategorized, error: \"failed to lookup address information: Name or service \
                       not known\" }";
        assert!(told(unknown).contains("its name is not known"), "{}", told(unknown));
        let issuer = "Custom { kind: InvalidData, error: InvalidCertificate(UnknownIssuer) }";
        assert!(told(issuer).contains("(store.redis.ca_file)"), "{}", told(issuer));
    }
}
