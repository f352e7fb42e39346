//! What web pages are given: the client module with its types, and a page of examples. Nothing in them is secret.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::extract::State;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};

use crate::http::extract::Segment;
use crate::http::{Api, ApiError};

/// Scripts and styles of the daemon alone, connections to it alone, and no text ever taken for markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

struct Asset {
    /// Its name below `/client/`.
    name: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const ASSETS: [Asset; 5] = [
    Asset {
        name: "aurora-bus.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("../../../clients/browser/aurora-bus.js"),
    },
    Asset {
        name: "aurora-bus.d.ts",
        content_type: "text/plain; charset=utf-8",
        text: include_str!("../../../clients/browser/aurora-bus.d.ts"),
    },
    Asset {
        name: "",
        content_type: "text/html; charset=utf-8",
        text: include_str!("../../../clients/browser/examples.html"),
    },
    Asset {
        name: "examples.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("../../../clients/browser/examples.js"),
    },
    Asset {
        name: "examples.css",
        content_type: "text/css; charset=utf-8",
        text: include_str!("../../../clients/browser/examples.css"),
    },
];

/// What tells the versions of each asset apart.
static TAGS: LazyLock<[HeaderValue; ASSETS.len()]> = LazyLock::new(|| ASSETS.each_ref().map(tag));

fn tag(asset: &Asset) -> HeaderValue {
    let hash = Sha256::digest(asset.text.as_bytes());
    let mut tag = String::from("\"");
    for byte in hash.iter().take(12) {
        write!(tag, "{byte:02x}").expect("writing to a String succeeds");
    }
    tag.push('"');
    HeaderValue::from_str(&tag).expect("hexadecimal digits in quotes")
}

/// `GET /client`: the page is a folder to what it names.
pub(crate) async fn folder(State(api): State<Api>) -> Response {
    if !api.inner.config.pages {
        return ApiError::no_such_route().into_response();
    }
    (StatusCode::PERMANENT_REDIRECT, [(LOCATION, "/client/")]).into_response()
}

/// `GET /client/`: the page of examples.
pub(crate) async fn page(State(api): State<Api>, headers: HeaderMap) -> Response {
    answer(&api, "", &headers)
}

/// `GET /client/{file}`
pub(crate) async fn file(State(api): State<Api>, Segment(name): Segment, headers: HeaderMap) -> Response {
    answer(&api, &name, &headers)
}

fn answer(api: &Api, name: &str, headers: &HeaderMap) -> Response {
    let found = ASSETS.iter().zip(TAGS.iter()).find(|(asset, _)| asset.name == name);
    let Some((asset, tag)) = found.filter(|_| api.inner.config.pages) else {
        return ApiError::no_such_route().into_response();
    };
    let mut response = if is_known(headers, tag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(CONTENT_TYPE, HeaderValue::from_static(asset.content_type))], asset.text).into_response()
    };
    let answered = response.headers_mut();
    answered.insert(ETAG, tag.clone());
    // Kept, but asked for: another version of the daemon has another module.
    answered.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    answered.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    answered.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answered.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    answered.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    answered.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

/// Whether the client has this version already.
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let known = headers.get_all(IF_NONE_MATCH).into_iter().filter_map(|value| value.to_str().ok());
    known
        .flat_map(|value| value.split(','))
        .map(|known| known.trim().trim_start_matches("W/"))
        .any(|known| known == "*" || tag == known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_is_known_is_found_in_every_form_of_the_question() {
        let tag = HeaderValue::from_static("\"abc\"");
        let asks = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_static(value));
            is_known(&headers, &tag)
        };
        for known in ["\"abc\"", "W/\"abc\"", "\"x\", \"abc\"", "*"] {
            assert!(asks(known), "{known}");
        }
        assert!(!asks("\"abcd\"") && !asks("abc") && !is_known(&HeaderMap::new(), &tag));
    }

    #[test]
    fn the_page_has_no_script_or_style_in_it_that_its_policy_would_refuse() {
        let page = ASSETS.iter().find(|asset| asset.name.is_empty()).expect("a page").text;
        assert!(!page.contains("<style") && !page.contains(" style=") && !page.contains(" onclick"));
        assert_eq!(page.matches("<script").count(), page.matches("<script type=\"module\" src=").count());
        for asset in &ASSETS {
            for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!asset.text.contains(sink), "{} has {sink}", asset.name);
            }
        }
    }
}
