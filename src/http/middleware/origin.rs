//! Which web pages may use the daemon through their visitors' browsers.
//!
//! A browser says with each request which page it is for. Without this check, any page that someone on this machine
//! opens could publish to a daemon that asks nobody for credentials, or watch its alerts.

use std::net::IpAddr;

use axum::http::HeaderMap;
use axum::http::header::{HOST, ORIGIN};

/// Whether the page that asks comes from this very host, on whatever port, or from an origin that is let in by name.
/// Programs send no origin and are not meant.
pub(crate) fn is_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    if origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin)) {
        return true;
    }
    is_own(headers, origin)
}

/// Whether pages of that origin come from the very host that is asked, on whatever port.
pub(crate) fn is_own(headers: &HeaderMap, origin: &str) -> bool {
    let host =
        headers.get(HOST).and_then(|host| host.to_str().ok()).and_then(|host| host_name(&format!("ws://{host}")));
    host.is_some() && host == host_name(origin)
}

/// Whether the request is for a name of this machine, or one that is let in. A page whose own name was made to point
/// here (DNS rebinding) asks for that name.
pub(crate) fn is_host_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let Some(name) = host.to_str().ok().and_then(|host| host_name(&format!("ws://{host}"))) else { return false };
    let literal = name.trim_start_matches('[').trim_end_matches(']');
    let is_own = name == "localhost" || literal.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_own || origins.iter().any(|origin| origin == "*" || host_name(origin).as_ref() == Some(&name))
}

/// Whether a configured origin can ever match what browsers send.
pub(crate) fn is_well_formed(origin: &str) -> bool {
    let parsed = url::Url::parse(origin).map(|url| url.origin().ascii_serialization());
    origin == "*" || origin == "null" || parsed.is_ok_and(|serialized| serialized.eq_ignore_ascii_case(origin))
}

fn host_name(url: &str) -> Option<String> {
    url::Url::parse(url).ok()?.host_str().map(str::to_ascii_lowercase)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn pages_of_other_hosts_are_let_in_by_name_only() {
        let asks = |origin: &'static str, origins: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static("bus.example:8080"));
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
            is_allowed(&headers, &origins.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert!(asks("http://bus.example", &[]));
        assert!(asks("https://BUS.example:3000", &[]));
        assert!(!asks("https://evil.example", &[]));
        assert!(!asks("null", &[]));
        assert!(asks("https://soc.example", &["https://soc.example"]));
        assert!(asks("null", &["*"]));
        assert!(is_allowed(&HeaderMap::new(), &[]), "programs send no origin");
    }

    #[test]
    fn names_that_are_not_this_machines_are_not_answered_to() {
        let asks = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static(host));
            is_host_allowed(&headers, &["https://soc.example".to_owned()])
        };
        for own in ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "127.9.9.9", "soc.example:8080"] {
            assert!(asks(own), "{own}");
        }
        for other in ["evil.example:8080", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "a b"] {
            assert!(!asks(other), "{other}");
        }
    }

    #[test]
    fn an_origin_with_a_path_could_never_match() {
        assert!(
            is_well_formed("https://soc.example") && is_well_formed("http://soc.example:3000") && is_well_formed("*")
        );
        assert!(!is_well_formed("https://soc.example/") && !is_well_formed("soc.example"));
    }
}
