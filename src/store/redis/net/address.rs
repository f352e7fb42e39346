//! Server addresses: parses URLs with one host or several.

use std::fmt;
use std::sync::Arc;

use url::{Host, Url};

use crate::store::redis::config::InvalidRedisConfig;

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// The address of one server.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
}

impl Address {
    pub(crate) fn new(host: &str, port: u16) -> Self {
        Self { host: host.into(), port }
    }

    /// Parses `host:port` as a cluster node reports it. Without a host it is the address of that node.
    pub(crate) fn reported(text: &str, asked: &Self) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok()?;
        Some(Self::named(host, port, asked))
    }

    /// Builds an address from a reported host and port. A node that does not know its own name omits the host.
    pub(crate) fn named(host: &str, port: u16, asked: &Self) -> Self {
        let host = if host.is_empty() || host == "?" { &*asked.host } else { host };
        Self::new(host.trim_matches(['[', ']']), port)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// How the servers are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Topology {
    /// One fixed server.
    Single(Address),
    /// The primary of a service, found by sentinels.
    Sentinel { sentinels: Vec<Address>, service: String },
    /// The nodes of a cluster, found by some of them.
    Cluster(Vec<Address>),
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |all: &[Address]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        match self {
            Self::Single(address) => write!(f, "{address}"),
            Self::Sentinel { sentinels, service } => write!(f, "`{service}` by sentinels {}", list(sentinels)),
            Self::Cluster(seeds) => write!(f, "cluster {}", list(seeds)),
        }
    }
}

/// The content of a URL.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) with_tls: bool,
    pub(crate) topology: Topology,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) database: Option<u8>,
}

/// The parts of a URL that may contain several hosts.
struct Parts<'a> {
    scheme: &'a str,
    /// Including the final `@`; empty if there are no credentials.
    credentials: &'a str,
    hosts: &'a str,
    /// Including the first slash.
    path: &'a str,
}

impl<'a> Parts<'a> {
    fn of(text: &'a str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (credentials, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        Some(Self { scheme, credentials, hosts, path })
    }
}

impl Target {
    /// Parses a URL: `redis[s][-sentinel|-cluster]://[user:password@]host[:port][,host…][/service][/database]`.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidRedisConfig> {
        let Some(parts) = Parts::of(text) else {
            return Err(match Url::parse(text) {
                Err(error) => InvalidRedisConfig::Url(error),
                Ok(url) => InvalidRedisConfig::Scheme(url.scheme().to_owned()),
            });
        };
        let (with_tls, kind) = match parts.scheme.strip_prefix("rediss") {
            Some(kind) => (true, kind),
            None => (false, parts.scheme.strip_prefix("redis").unwrap_or("?")),
        };
        if !matches!(kind, "" | "-sentinel" | "-cluster") {
            return Err(InvalidRedisConfig::Scheme(parts.scheme.to_owned()));
        }
        let default_port = if kind == "-sentinel" { SENTINEL_PORT } else { PORT };
        let hosts = parts
            .hosts
            .split(',')
            .map(|host| {
                let url = Url::parse(&format!("redis://{}", host.trim())).map_err(InvalidRedisConfig::Url)?;
                address(&url, default_port)
            })
            .collect::<Result<Vec<_>, _>>()?;
        // Parses the credentials with any host.
        let url =
            Url::parse(&format!("redis://{}host{}", parts.credentials, parts.path)).map_err(InvalidRedisConfig::Url)?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(InvalidRedisConfig::Query);
        }
        let path = url.path().trim_matches('/');
        let (topology, database) = match kind {
            "-sentinel" => {
                let (service, database) = path.split_once('/').unwrap_or((path, ""));
                if service.is_empty() {
                    return Err(InvalidRedisConfig::Service);
                }
                (Topology::Sentinel { sentinels: hosts, service: decoded(service)? }, database)
            }
            "-cluster" => {
                if !matches!(path, "" | "0") {
                    return Err(InvalidRedisConfig::ClusterDatabase(path.chars().take(64).collect()));
                }
                (Topology::Cluster(hosts), "")
            }
            _ => {
                let [host] = hosts.try_into().map_err(|_several: Vec<_>| InvalidRedisConfig::SeveralHosts)?;
                (Topology::Single(host), path)
            }
        };
        Ok(Self {
            with_tls,
            topology,
            username: Some(decoded(url.username())?).filter(|name| !name.is_empty()),
            password: url.password().map(decoded).transpose()?,
            database: match database {
                "" => None,
                text => {
                    Some(text.parse().map_err(|_none| InvalidRedisConfig::Database(text.chars().take(64).collect()))?)
                }
            },
        })
    }
}

/// Returns the URL with its password replaced, or `None` if the password cannot be located.
pub(crate) fn masked(text: &str, mask: &str) -> Option<String> {
    let Parts { scheme, credentials, hosts, path } = Parts::of(text)?;
    Some(match credentials.split_once(':') {
        Some((user, _)) => format!("{scheme}://{user}:{mask}@{hosts}{path}"),
        None => text.to_owned(),
    })
}

fn address(url: &Url, default_port: u16) -> Result<Address, InvalidRedisConfig> {
    let host = match url.host().ok_or(InvalidRedisConfig::Host)? {
        Host::Domain("") => return Err(InvalidRedisConfig::Host),
        Host::Domain(name) => name.to_owned(),
        Host::Ipv4(address) => address.to_string(),
        Host::Ipv6(address) => address.to_string(),
    };
    Ok(Address::new(&host, url.port().unwrap_or(default_port)))
}

/// Decodes the percent-escapes of a URL's text.
fn decoded(text: &str) -> Result<String, InvalidRedisConfig> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push(high * 16 + low),
            _ => return Err(InvalidRedisConfig::Credentials),
        }
    }
    String::from_utf8(out).or(Err(InvalidRedisConfig::Credentials))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(url: &str) -> Topology {
        Target::parse(url).unwrap_or_else(|error| panic!("{url}: {error}")).topology
    }

    #[test]
    fn url_with_several_hosts_is_parsed() {
        let two = vec![Address::new("a.example", 26379), Address::new("::1", 5)];
        let service = "soc main".to_owned();
        let sentinel = "rediss-sentinel://bob:p%40ss@a.example,[::1]:5/soc%20main/3";
        assert_eq!(topology(sentinel), Topology::Sentinel { sentinels: two, service });
        let target = Target::parse(sentinel).unwrap_or_else(|error| panic!("{error}"));
        assert!(target.with_tls);
        assert_eq!((target.username.as_deref(), target.password.as_deref()), (Some("bob"), Some("p@ss")));
        assert_eq!(target.database, Some(3));
        let nodes = vec![Address::new("10.0.0.1", 7000), Address::new("n2", 6379)];
        assert_eq!(topology("redis-cluster://10.0.0.1:7000,n2"), Topology::Cluster(nodes));
        assert_eq!(topology("redis://h/2"), Topology::Single(Address::new("h", 6379)));
    }

    #[test]
    fn invalid_urls_are_refused_with_reason() {
        let refused = |url: &str| match Target::parse(url) {
            Ok(_) => panic!("{url} is accepted"),
            Err(error) => error.to_string(),
        };
        let cases = [
            ("redis-sentinel://h:1", "the service name is missing"),
            ("redis-sentinel://h/x/db", "database `db` is not a number"),
            ("redis-cluster://h/1", "has database 0 only"),
            ("redis://a,b/0", "several hosts"),
            ("redis-cluster://a,,b", "the host is missing"),
            ("redis-ring://a", "the scheme `redis-ring`"),
            ("redis://a/0?db=1", "nothing may follow"),
        ];
        for (url, words) in cases {
            let error = refused(url);
            assert!(error.contains(words), "{url}: {error}");
        }
    }

    #[test]
    fn passwords_are_masked_with_any_hosts() {
        let cases = [
            ("redis://u:secret@h/0", Some("redis://u:*@h/0")),
            ("redis-cluster://:se@cret@a,b:1", Some("redis-cluster://:*@a,b:1")),
            ("redis://u@h", Some("redis://u@h")),
            ("secret@h", None),
        ];
        for (url, expected) in cases {
            assert_eq!(masked(url, "*").as_deref(), expected);
        }
    }

    #[test]
    fn node_without_a_name_has_the_requested_address() {
        let asked = Address::new("10.0.0.1", 7000);
        assert_eq!(Address::reported(":7001", &asked), Some(Address::new("10.0.0.1", 7001)));
        assert_eq!(Address::reported("fd00::2:7002", &asked), Some(Address::new("fd00::2", 7002)));
        assert_eq!(Address::reported("nowhere", &asked), None);
    }
}
