//! Where callers show what they have: headers, a cookie, and for those that can set neither, the URL.

use axum::extract::FromRequestParts;
use axum::http::header::{AUTHORIZATION, COOKIE, HeaderName, ORIGIN, SEC_WEBSOCKET_PROTOCOL};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};

use crate::auth::AuthError;
use crate::auth::{PageOrigin, Principal};
use crate::http::ApiError;
use crate::http::middleware::origin;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// How far the page is from what it asks, which no page can set by itself.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The cookie that may hold a token.
const COOKIE_NAME: &str = "access_token";
/// How a subprotocol begins that is a token: the one thing that a page can say of itself when it opens a WebSocket.
const SUBPROTOCOL: &str = "bearer.";

/// What a caller shows. Never printed.
#[derive(PartialEq, Eq)]
pub(crate) enum Credential {
    /// A key, or a token.
    Token(String),
    /// A ticket, with who uses it.
    Ticket { text: String, page: PageOrigin },
}

pub(crate) fn page_origin(headers: &HeaderMap) -> PageOrigin {
    let origin = headers.get(ORIGIN).and_then(|origin| origin.to_str().ok()).map(str::to_ascii_lowercase);
    let may_be_own = match headers.get(SEC_FETCH_SITE) {
        Some(site) => site == "same-origin",
        // Browsers say it over TLS and on loopback only.
        None => origin.as_deref().is_none_or(|origin| origin::is_own(headers, origin)),
    };
    PageOrigin { origin, may_be_own }
}

/// What of a request is looked at.
#[derive(Clone, Copy)]
pub(crate) struct PresentedCredentials<'a> {
    pub(crate) headers: &'a HeaderMap,
    /// The query, where credentials may be in it: it ends up in logs on the way, so that only those who have no other
    /// place for them should use it.
    pub(crate) query: Option<&'a str>,
    /// The pages that are let in by name.
    pub(crate) origins: &'a [String],
}

impl Credential {
    /// What is shown, the first of: `Authorization`, `X-API-Key`, a subprotocol, a ticket or a token in the query, the
    /// cookie. A bad one is not made up for by a good one that comes after it.
    pub(crate) fn of(shown: PresentedCredentials<'_>) -> Result<Option<Self>, AuthError> {
        let PresentedCredentials { headers, query, origins } = shown;
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
        if let Some(token) = offered.find_map(|name| name.strip_prefix(SUBPROTOCOL)) {
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
        // A browser sends cookies along with whatever any page asks for: those pages must be named one by one.
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

/// Whoever made the request, as the layer in front of every route has found out.
impl<S: Sync> FromRequestParts<S> for Principal {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(
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

    /// Headers, a query, and what is found in them.
    type Case = (&'static [(&'static str, &'static str)], &'static str, &'static str);

    #[test]
    fn credentials_are_found_in_every_place_they_may_be_in() {
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
            assert_eq!(shown(headers, query, &[]), Ok(Some(expected.to_owned())), "{headers:?} {query}");
        }
        assert_eq!(shown(&[("cookie", "other=abc")], "tokens=abc", &[]), Ok(None));
        assert_eq!(shown(&[("authorization", "Basic abc")], "token=abc", &[]), Err(AuthError::Scheme));
    }

    #[test]
    fn a_page_of_the_daemons_own_origin_is_the_same_when_it_reads_and_says_no_origin() {
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
            assert!(given.is(&page(&[])) && given.is(&page(&[here])) && given.is(&given), "{given:?}");
            assert!(!given.is(&page(&[there])) && !given.is(&page(&[("sec-fetch-site", "none")])), "{given:?}");
            assert!(!given.is(&page(&[("origin", "https://evil.example")])), "{given:?}");
        }
        for given in [page(&[other]), page(&[other, there]), page(&[own, ("sec-fetch-site", "same-site")])] {
            assert!(given.is(&given) && !given.is(&page(&[])) && !given.is(&page(&[here])), "{given:?}");
        }
        let program = page(&[]);
        assert!(program.is(&page(&[])) && program.is(&page(&[there])) && !program.is(&page(&[own])));
    }

    #[test]
    fn a_cookie_counts_for_pages_that_are_named_only() {
        let cookie = ("cookie", "access_token=abc");
        let of = |origins: &[&str]| shown(&[cookie, ("host", "bus"), ("origin", "https://soc.example")], "", origins);
        assert_eq!(of(&["*"]), Ok(None));
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["*", "https://soc.example"]), Ok(Some("abc".to_owned())));
    }
}
