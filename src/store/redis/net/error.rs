//! Failures of calls to the server, classified by the reaction that they need.

use fred::error::{Error as FredError, ErrorKind as FredKind};

use crate::store::redis::net::address::Address;
use crate::store::redis::net::reply::Reply;

use crate::store::{StoreError, StoreErrorKind};

/// A redirect: the node of a cluster that takes the command. The command did not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Redirect {
    pub(crate) address: Address,
    /// Whether it is for this command only, after ASKING: the key is being moved there.
    pub(crate) is_asking: bool,
}

/// A failed call: its kind and its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: StoreErrorKind,
    /// Follows "cannot do this: ", such as "the server is loading its data".
    pub(crate) reason: String,
    /// Whether the server does not know the script, so that it did not run.
    pub(crate) is_unknown_script: bool,
    /// Whether the connection must be closed: it is broken, or a late reply may still arrive.
    pub(crate) breaks_connection: bool,
    /// Whether the server does not take writes. It ran nothing; another server is the primary, or this one later.
    pub(crate) is_wrong_server: bool,
    /// The number of entries that were stored nevertheless.
    pub(crate) stored: u64,
    /// The reply of the script whose durability is not confirmed.
    pub(crate) unconfirmed: Option<Box<Reply>>,
    /// The redirect to another node of the cluster.
    pub(crate) redirect: Option<Box<Redirect>>,
}

/// The first words of server errors, with their kind and a message that names the remedy.
const KNOWN: [(&str, StoreErrorKind, &str); 39] = {
    use StoreErrorKind::{Denied, Full, Internal, LeaseLost, NoGroup, Unavailable, Unsuitable, WrongType};
    const NO_RIGHT: &str = "the user lacks permission for a command or a key (see ACL LOG on the server)";
    const ONE_SCRIPT: &str = "the server is busy with a script; wait, or end the script with SCRIPT KILL";
    [
        ("LOADING", Unavailable, "the server is loading its data"),
        ("READONLY", Unavailable, "the server is a read-only replica; searching for the primary"),
        (
            "MASTERDOWN",
            Unavailable,
            "the server is a replica that has lost its primary (replica-serve-stale-data no); searching for the primary",
        ),
        (
            "CLUSTERDOWN",
            Unavailable,
            "the cluster is down: some slots have no server (see CLUSTER INFO and CLUSTER NODES)",
        ),
        ("TRYAGAIN", Unavailable, "the cluster is moving the key"),
        ("CROSSSLOT", Internal, "the keys of one command are in different slots"),
        (
            "MISCONF",
            Unavailable,
            "the server refuses writes because it cannot save its data to disk; check its log and its disk",
        ),
        (
            "NOREPLICAS",
            Unavailable,
            "the server refuses writes because too few replicas are connected (min-replicas-to-write)",
        ),
        ("NOGOODSLAVE", Unavailable, "no replica can take over"),
        ("BUSY ", Unavailable, ONE_SCRIPT),
        ("UNKILLABLE", Unavailable, "the server is busy with a script that has written and cannot be ended"),
        ("UNBLOCKED force unblock", Unavailable, "the role of the server has changed"),
        ("ERR max number of clients", Unavailable, "the server has too many clients (maxclients)"),
        ("ERR Server started in protected mode", Denied, "the server is in protected mode"),
        ("DENIED", Denied, "the server is in protected mode; set a password on the server, or bind it to this machine"),
        ("OOM", Full, "the server has reached its memory limit (maxmemory); raise it, or keep fewer entries"),
        ("ERR command not allowed when used memory", Full, "the server has reached its memory limit (maxmemory)"),
        ("ERR The stream has exhausted", Full, "the stream has used up its last id"),
        ("WRONGTYPE", WrongType, "the key is not a stream"),
        ("NOGROUP", NoGroup, "the group, or its stream, is gone"),
        ("UNBLOCKED", NoGroup, "the stream is gone"),
        ("ERR no such key", NoGroup, "the stream is gone"),
        ("LEASELOST", LeaseLost, "the lease is no longer held"),
        ("NOAUTH", Denied, "the server requires a password (store.redis.password)"),
        ("WRONGPASS", Denied, "the server refuses the user name or the password"),
        ("ERR invalid password", Denied, "the server refuses the password"),
        (
            "ERR AUTH <password> called without any password",
            Denied,
            "a password is set (store.redis.password), but the server has none",
        ),
        (
            "ERR Client sent AUTH, but no password",
            Denied,
            "a password is set (store.redis.password), but the server has none",
        ),
        ("NOPERM", Denied, NO_RIGHT),
        ("ERR The user executing the script can't", Denied, NO_RIGHT),
        ("The user executing the script can't", Denied, NO_RIGHT),
        ("ACL failure in script", Denied, NO_RIGHT),
        ("ERR ACL failure in script", Denied, NO_RIGHT),
        (
            "ERR This instance has cluster support disabled",
            Unsuitable,
            "the server is not part of a cluster; use the scheme redis:// (store.redis.url)",
        ),
        (
            "ERR DB index is out of range",
            Unsuitable,
            "the database number is too high for the server (store.redis.url)",
        ),
        (
            "ERR No such master with that name",
            Unsuitable,
            "the sentinels do not know a service of that name (store.redis.url)",
        ),
        ("IDONTKNOW", Unavailable, "the sentinel does not know the primary yet"),
        (
            "ERR SELECT is not allowed in cluster mode",
            Unsuitable,
            "the server is part of a cluster; use the scheme redis-cluster:// (store.redis.url)",
        ),
        ("NOSCRIPT", Internal, "the server does not know the script"),
    ]
};

impl Failure {
    /// The server cannot be reached, or does not reply.
    pub(crate) fn unavailable(reason: impl Into<String>) -> Self {
        Self::new(StoreErrorKind::Unavailable, reason)
    }

    /// No reply arrived in time. It may still arrive.
    pub(crate) fn timeout() -> Self {
        Self { breaks_connection: true, ..Self::unavailable("the server did not reply in time") }
    }

    /// A reply does not have the format of the command.
    pub(crate) fn unexpected(what: &str) -> Self {
        let reason = format!("unexpected reply of the server: {what}");
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
            redirect: None,
        }
    }

    /// Classifies the text of an error reply, such as `OOM command not allowed when used memory > 'maxmemory'.`
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
        Self::new(StoreErrorKind::Internal, format!("the server replied: {shown}"))
    }

    /// Classifies an error reply of this server, which may redirect to another one.
    pub(crate) fn from_reply_of(asked: &Address, text: &str) -> Self {
        let mut words = text.split_ascii_whitespace();
        let is_asking = match words.next() {
            Some("MOVED") => false,
            Some("ASK") => true,
            _ => return Self::from_reply(text),
        };
        match words.nth(1).and_then(|told| Address::reported(told, asked)) {
            Some(address) => {
                let redirect = Some(Box::new(Redirect { address, is_asking }));
                Self { redirect, ..Self::unavailable("the cluster has moved the key") }
            }
            None => Self::from_reply(text),
        }
    }

    /// Converts it to the error of an operation. `what` names the operation, such as "cannot append to stream `x`".
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
                // A message of the client library. The connection must be closed.
                unknown if unknown.kind == StoreErrorKind::Internal && !unknown.is_unknown_script => {
                    Self { breaks_connection: true, ..Self::unavailable(format!("no connection: {details}")) }
                }
                known => known,
            },
        }
    }
}

/// Extracts the message of a system error in its debug format: `Os { code: 111, …, message: "…" }`, or
/// `Custom { kind: …, error: "…" }`.
fn plain(details: &str) -> &str {
    if let Some((_, why)) = details.split_once("InvalidCertificate(") {
        return match why {
            why if why.starts_with("NotValidForName") => {
                "its certificate is for another name (set that name in store.redis.tls_server_name)"
            }
            why if why.starts_with("UnknownIssuer") => {
                "its certificate is from an authority that is not trusted (set store.redis.ca_file)"
            }
            why if why.starts_with("Expired") => "its certificate has expired",
            why if why.starts_with("NotValidYet") => "its certificate is not valid yet, or a clock is wrong",
            _ => "its certificate is not trusted",
        };
    }
    let quoted = |mark| details.split_once(mark).and_then(|(_, rest)| rest.split('"').next());
    let words = quoted("message: \"").or_else(|| quoted("error: \"")).unwrap_or(details);
    match words {
        words if words.starts_with("failed to lookup address information") => {
            "its name cannot be resolved; check the host in store.redis.url, and the name service"
        }
        "" => "closed",
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
    fn error_contains_operation_and_reason() {
        let error = Failure::from_reply("LOADING …").because("cannot append to stream `x`");
        assert_eq!(error.to_string(), "cannot append to stream `x`: the server is loading its data");
    }

    #[test]
    fn redirect_has_the_address_of_the_node() {
        let asked = Address::new("10.0.0.1", 7000);
        let redirect_of =
            |text| Failure::from_reply_of(&asked, text).redirect.map(|there| (there.address, there.is_asking));
        assert_eq!(redirect_of("MOVED 3999 10.0.0.2:7001"), Some((Address::new("10.0.0.2", 7001), false)));
        assert_eq!(redirect_of("ASK 3999 :7002"), Some((Address::new("10.0.0.1", 7002), true)));
        assert_eq!(redirect_of("MOVED"), None);
        assert_eq!(redirect_of("ERR syntax error"), None);
    }

    #[test]
    fn system_errors_keep_their_message() {
        let reason_of = |details: &'static str| Failure::from(FredError::new(FredKind::IO, details)).reason;
        let refused = "Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" }";
        assert_eq!(reason_of(refused), "no connection to the server: Connection refused");
        let unknown = "Custom { kind: Uncategorized, error: \"failed to lookup address information: Name or service \
                       not known\" }";
        assert!(reason_of(unknown).contains("its name cannot be resolved"), "{}", reason_of(unknown));
        let issuer = "Custom { kind: InvalidData, error: InvalidCertificate(UnknownIssuer) }";
        assert!(reason_of(issuer).contains("(set store.redis.ca_file)"), "{}", reason_of(issuer));
    }
}
