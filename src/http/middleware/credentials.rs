//! The places of credentials in a request: headers, a cookie, and the query for clients that can set neither.

use axum::http::header::{AUTHORIZATION, COOKIE, HeaderName, ORIGIN, SEC_WEBSOCKET_PROTOCOL};
use axum::http::{HeaderMap, HeaderValue};

use crate::auth::{AuthError, PageOrigin};
use crate::http::middleware::origin;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// The relation between the page and the requested URL. Only the browser can set it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The cookie that may hold a token.
const COOKIE_NAME: &str = "access_token";
/// The prefix of a subprotocol that contains a token. A page can set no header but this when it opens a WebSocket.
const SUBPROTOCOL_PREFIX: &str = "bearer.";

/// The credentials of a request. Never printed.
#[derive(PartialEq, Eq)]
pub(crate) enum Credential {
    /// An API key or a token.
    Token(String),
    /// A ticket, and the page that presents it.
    Ticket { text: String, page: PageOrigin },
}

/// Returns the page that a request comes from.
pub(crate) fn page_origin(headers: &HeaderMap) -> PageOrigin {
    let origin = headers.get(ORIGIN).and_then(|origin| origin.to_str().ok()).map(str::to_ascii_lowercase);
    let may_be_own = match headers.get(SEC_FETCH_SITE) {
        Some(site) => site == "same-origin",
        // Browsers send this header only over TLS and on loopback.
        None => origin.as_deref().is_none_or(|origin| origin::is_own(headers, origin)),
    };
    PageOrigin { origin, may_be_own }
}

/// The parts of a request that may contain credentials.
#[derive(Clone, Copy)]
pub(crate) struct PresentedCredentials<'a> {
    pub(crate) headers: &'a HeaderMap,
    /// The query, if credentials are allowed in it. Proxies log URLs, so only clients without another place use it.
    pub(crate) query: Option<&'a str>,
    /// The allowed origins, as configured.
    pub(crate) origins: &'a [String],
}

impl Credential {
    /// Returns the first of: `Authorization`, `X-API-Key`, subprotocol, ticket or token in the query, cookie.
    ///
    /// If that one is malformed, the later ones do not count.
    pub(crate) fn of(presented: PresentedCredentials<'_>) -> Result<Option<Self>, AuthError> {
        let PresentedCredentials { headers, query, origins } = presented;
        if let Some(value) = headers.get(AUTHORIZATION) {
            let text = text(value)?;
            let token = text.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
            return token.map(|(_, token)| Some(Self::Token(token.trim().to_owned()))).ok_or(AuthError::Scheme);
        }
        if let Some(value) = headers.get(X_API_KEY) {
            return Ok(Some(Self::Token(text(value)?.trim().to_owned())));
        }
        let offered = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter().filter_map(|value| value.to_str().ok());
        let mut offered = offered.flat_map(|value| value.split(',')).map(str::trim);
        if let Some(token) = offered.find_map(|name| name.strip_prefix(SUBPROTOCOL_PREFIX)) {
            return Ok(Some(Self::Token(token.to_owned())));
        }
        let query = query.unwrap_or_default();
        let param = |wanted: &str| {
            let mut pairs = url::form_urlencoded::parse(query.as_bytes());
            pairs.find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned())
        };
        if let Some(text) = param("ticket") {
            return Ok(Some(Self::Ticket { text, page: page_origin(headers) }));
        }
        if let Some(token) = param("token") {
            return Ok(Some(Self::Token(token)));
        }
        // Browsers send cookies with the requests of every page, so `*` is not enough here.
        let named: Vec<String> = origins.iter().filter(|origin| *origin != "*").cloned().collect();
        Ok(cookie(headers).filter(|_| origin::is_allowed(headers, &named)).map(Self::Token))
    }
}

fn text(value: &HeaderValue) -> Result<&str, AuthError> {
    value.to_str().map_err(|_error| AuthError::Malformed)
}

fn cookie(headers: &HeaderMap) -> Option<String> {
    let cookies = headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE_NAME).map(|(_, value)| value.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(
        headers: &[(&'static str, &'static str)],
        query: &str,
        origins: &[&str],
    ) -> Result<Option<String>, AuthError> {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
        let credential =
            Credential::of(PresentedCredentials { headers: &headers, query: Some(query), origins: &origins })?;
        Ok(credential.map(|credential| match credential {
            Credential::Token(token) => token,
            Credential::Ticket { text, page } => format!("ticket {text} of {}", page.origin.unwrap_or_default()),
        }))
    }

    /// Headers, a query, and the credentials in them.
    type Case = (&'static [(&'static str, &'static str)], &'static str, &'static str);

    #[test]
    fn credentials_are_found_in_every_place() {
        let cases: [Case; 9] = [
            (&[("authorization", "Bearer abc")], "", "abc"),
            (&[("authorization", "bearer  abc ")], "", "abc"),
            (&[("x-api-key", "abc")], "", "abc"),
            (&[("sec-websocket-protocol", "aurora.v1, bearer.a.b.c")], "", "a.b.c"),
            (&[], "since=-5m&token=a%2Eb", "a.b"),
            (&[("origin", "https://SOC.example")], "ticket=abc", "ticket abc of https://soc.example"),
            (&[("cookie", "theme=dark; access_token=abc; x=y")], "", "abc"),
            (&[("cookie", "access_token=\"abc\""), ("host", "bus"), ("origin", "http://bus")], "", "abc"),
            (&[("authorization", "Bearer one"), ("x-api-key", "two"), ("cookie", "access_token=three")], "", "one"),
        ];
        for (headers, query, expected) in cases {
            assert_eq!(found(headers, query, &[]), Ok(Some(expected.to_owned())), "{headers:?} {query}");
        }
        assert_eq!(found(&[("cookie", "other=abc")], "tokens=abc", &[]), Ok(None));
        assert_eq!(found(&[("authorization", "Basic abc")], "token=abc", &[]), Err(AuthError::Scheme));
    }

    #[test]
    fn own_page_matches_with_and_without_origin_header() {
        let page = |headers: &[(&'static str, &'static str)]| {
            let headers = [("host", "bus.example:8080")].iter().chain(headers);
            page_origin(
                &headers
                    .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                    .collect(),
            )
        };
        let (own, other) = (("origin", "https://bus.example"), ("origin", "https://soc.example"));
        let (here, there) = (("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site"));
        for given in [page(&[own]), page(&[own, here]), page(&[other, here])] {
            assert!(given.matches(&page(&[])) && given.matches(&page(&[here])) && given.matches(&given), "{given:?}");
            assert!(
                !given.matches(&page(&[there])) && !given.matches(&page(&[("sec-fetch-site", "none")])),
                "{given:?}"
            );
            assert!(!given.matches(&page(&[("origin", "https://evil.example")])), "{given:?}");
        }
        for given in [page(&[other]), page(&[other, there]), page(&[own, ("sec-fetch-site", "same-site")])] {
            assert!(given.matches(&given) && !given.matches(&page(&[])) && !given.matches(&page(&[here])), "{given:?}");
        }
        let program = page(&[]);
        assert!(program.matches(&page(&[])) && program.matches(&page(&[there])) && !program.matches(&page(&[own])));
    }

    #[test]
    fn cookie_counts_only_for_origins_configured_by_name() {
        let cookie = ("cookie", "access_token=abc");
        let of = |origins: &[&str]| found(&[cookie, ("host", "bus"), ("origin", "https://soc.example")], "", origins);
        assert_eq!(of(&["*"]), Ok(None));
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["*", "https://soc.example"]), Ok(Some("abc".to_owned())));
    }
}
