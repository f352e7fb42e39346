//! Static files for web pages: the client module with its types, and a page of examples. None of them is secret.

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

use crate::http::api::Api;
use crate::http::extract::Segment;
use crate::http::problem::ApiError;

/// Allows scripts, styles and connections of the daemon only, and never interprets text as markup.
const SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

struct Asset {
    /// The name below `/client/`.
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

/// The entity tag of each asset.
static ETAGS: LazyLock<[HeaderValue; ASSETS.len()]> = LazyLock::new(|| ASSETS.each_ref().map(etag));

fn etag(asset: &Asset) -> HeaderValue {
    let hash = Sha256::digest(asset.text.as_bytes());
    let mut tag = String::from("\"");
    for byte in hash.iter().take(12) {
        write!(tag, "{byte:02x}").expect("writing to a String succeeds");
    }
    tag.push('"');
    HeaderValue::from_str(&tag).expect("hexadecimal digits in quotes")
}

/// `GET /client`: redirects to `/client/`, because the page has relative links.
pub(crate) async fn folder(State(api): State<Api>) -> Response {
    if !api.config().pages {
        return ApiError::no_such_route().into_response();
    }
    (StatusCode::PERMANENT_REDIRECT, [(LOCATION, "/client/")]).into_response()
}

/// `GET /client/`: the page of examples.
pub(crate) async fn page(State(api): State<Api>, headers: HeaderMap) -> Response {
    respond(&api, "", &headers)
}

/// `GET /client/{file}`
pub(crate) async fn file(State(api): State<Api>, Segment(name): Segment, headers: HeaderMap) -> Response {
    respond(&api, &name, &headers)
}

fn respond(api: &Api, name: &str, headers: &HeaderMap) -> Response {
    let found = ASSETS.iter().zip(ETAGS.iter()).find(|(asset, _)| asset.name == name);
    let Some((asset, tag)) = found.filter(|_| api.config().pages) else {
        return ApiError::no_such_route().into_response();
    };
    let mut response = if has_current_version(headers, tag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(CONTENT_TYPE, HeaderValue::from_static(asset.content_type))], asset.text).into_response()
    };
    let headers = response.headers_mut();
    headers.insert(ETAG, tag.clone());
    // Cached, but validated each time: another version of the daemon has another module.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(SECURITY_POLICY));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

/// Returns whether the client has the version with this tag.
fn has_current_version(headers: &HeaderMap, tag: &HeaderValue) -> bool {
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
    fn current_version_is_found_in_every_form_of_the_header() {
        let tag = HeaderValue::from_static("\"abc\"");
        let is_current = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_static(value));
            has_current_version(&headers, &tag)
        };
        for known in ["\"abc\"", "W/\"abc\"", "\"x\", \"abc\"", "*"] {
            assert!(is_current(known), "{known}");
        }
        assert!(!is_current("\"abcd\"") && !is_current("abc") && !has_current_version(&HeaderMap::new(), &tag));
    }

    #[test]
    fn page_has_no_inline_script_or_style() {
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
