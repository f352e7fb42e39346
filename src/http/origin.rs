//! Which web pages may use the daemon through their visitors' browsers.
//!
//! A browser says with each request which page it is for. Without this check, any page that someone on this machine
//! opens could publish to a daemon that asks nobody for credentials, or watch its alerts.

use axum::http::HeaderMap;
use axum::http::header::{HOST, ORIGIN};

/// Whether the page that asks comes from this very host, on whatever port, or from an origin that is let in by name.
/// Programs send no origin and are not meant.
pub(super) fn is_allowed(headers: &HeaderMap, origins: &[String]) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    if origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin)) {
        return true;
    }
    let host =
        headers.get(HOST).and_then(|host| host.to_str().ok()).and_then(|host| host_name(&format!("ws://{host}")));
    host.is_some() && host == host_name(origin)
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
}
