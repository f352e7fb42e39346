//! The web pages that may use the daemon through a browser.
//!
//! A browser sends the origin of the page with each request. Without this check, any page that a user of this machine
//! opens could publish to a daemon without credentials, or watch its alerts.

use std::net::IpAddr;

use axum::http::HeaderMap;
use axum::http::header::{HOST, ORIGIN};

/// Returns whether the request comes from a page on the requested host, a configured origin, or a program.
///
/// The port of the page does not count. Programs send no origin.
pub(crate) fn is_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    if origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin)) {
        return true;
    }
    is_own(headers, origin)
}

/// Returns whether the origin has the requested host, on any port.
pub(crate) fn is_own(headers: &HeaderMap, origin: &str) -> bool {
    let host =
        headers.get(HOST).and_then(|host| host.to_str().ok()).and_then(|host| host_name(&format!("ws://{host}")));
    host.is_some() && host == host_name(origin)
}

/// Returns whether the request is for a name of this machine or of a configured origin.
///
/// This stops DNS rebinding: a page whose own host name resolves to this machine sends that host name.
pub(crate) fn is_host_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let Some(name) = host.to_str().ok().and_then(|host| host_name(&format!("ws://{host}"))) else { return false };
    let literal = name.trim_start_matches('[').trim_end_matches(']');
    let is_own = name == "localhost" || literal.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    is_own || origins.iter().any(|origin| origin == "*" || host_name(origin).as_ref() == Some(&name))
}

/// Returns whether a configured origin can match the ones that browsers send.
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
    fn foreign_pages_need_a_configured_origin() {
        let allows = |origin: &'static str, origins: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static("bus.example:8080"));
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
            is_allowed(&headers, &origins.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert!(allows("http://bus.example", &[]));
        assert!(allows("https://BUS.example:3000", &[]));
        assert!(!allows("https://evil.example", &[]));
        assert!(!allows("null", &[]));
        assert!(allows("https://soc.example", &["https://soc.example"]));
        assert!(allows("null", &["*"]));
        assert!(is_allowed(&HeaderMap::new(), &[]), "programs send no origin");
    }

    #[test]
    fn foreign_host_names_are_rejected() {
        let allows = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static(host));
            is_host_allowed(&headers, &["https://soc.example".to_owned()])
        };
        for own in ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "127.9.9.9", "soc.example:8080"] {
            assert!(allows(own), "{own}");
        }
        for other in ["evil.example:8080", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example", "a b"] {
            assert!(!allows(other), "{other}");
        }
    }

    #[test]
    fn origin_with_path_is_not_well_formed() {
        assert!(
            is_well_formed("https://soc.example") && is_well_formed("http://soc.example:3000") && is_well_formed("*")
        );
        assert!(!is_well_formed("https://soc.example/") && !is_well_formed("soc.example"));
    }
}
