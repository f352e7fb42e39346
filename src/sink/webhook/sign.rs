//! Signatures of requests according to [Standard Webhooks], so that a receiver can verify the sender. Pure.
//!
//! [Standard Webhooks]: https://www.standardwebhooks.com/

use std::fmt;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use reqwest::header::HeaderValue;

/// The prefix of a secret in base64.
const BASE64_PREFIX: &str = "whsec_";

/// The reason why a text is not a secret. Never contains the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidSecret {
    #[error("is empty")]
    Empty,
    #[error("must be base64 after `whsec_`")]
    Base64,
}

/// The signing keys. Without keys requests are not signed.
#[derive(Clone, Default)]
pub(super) struct Signer(Vec<hmac::Key>);

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({} keys)", self.0.len())
    }
}

impl Signer {
    /// Creates a signer with several secrets, so that receivers can change from one to the next.
    pub(super) fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidSecret> {
        secrets.into_iter().map(key).collect::<Result<_, _>>().map(Self)
    }

    /// Returns the signatures of a request, separated by spaces.
    pub(super) fn sign(&self, id: &str, seconds: u64, body: &[u8]) -> Option<HeaderValue> {
        let head = format!("{id}.{seconds}.");
        let of_key = |key: &hmac::Key| {
            let mut context = hmac::Context::with_key(key);
            context.update(head.as_bytes());
            context.update(body);
            format!("v1,{}", STANDARD.encode(context.sign()))
        };
        let signatures: Vec<String> = self.0.iter().map(of_key).collect();
        let value = || HeaderValue::try_from(signatures.join(" ")).expect("base64 is visible ASCII");
        (!signatures.is_empty()).then(value)
    }
}

fn key(secret: &str) -> Result<hmac::Key, InvalidSecret> {
    let decoded = match secret.strip_prefix(BASE64_PREFIX) {
        Some(text) => {
            let text = text.trim_end_matches('=');
            STANDARD_NO_PAD.decode(text).map_err(|_undecodable| InvalidSecret::Base64)?
        }
        None => secret.as_bytes().to_vec(),
    };
    if decoded.is_empty() {
        return Err(InvalidSecret::Empty);
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &decoded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sign(secrets: &[&str], id: &str, seconds: u64, body: &str) -> Option<String> {
        let value = Signer::new(secrets.iter().copied()).unwrap().sign(id, seconds, body.as_bytes())?;
        Some(value.to_str().unwrap().to_owned())
    }

    #[test]
    fn example_of_the_standard_has_its_signature() {
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let signed = sign(&[secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signed.as_deref(), Some("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="));
    }

    #[test]
    fn request_has_a_signature_per_secret() {
        let one = sign(&["a plain secret"], "s/1-0", 5, "{}").unwrap();
        let other = sign(&["whsec_AAECAwQFBgc="], "s/1-0", 5, "{}").unwrap();
        assert_eq!(sign(&["a plain secret", "whsec_AAECAwQFBgc="], "s/1-0", 5, "{}"), Some(format!("{one} {other}")));
        assert_eq!(sign(&[], "s/1-0", 5, "{}"), None);
        assert_eq!(sign(&["whsec_AAECAwQFBgc"], "s/1-0", 5, "{}"), Some(other), "padding is optional");
    }

    #[test]
    fn invalid_secret_is_refused_without_its_text() {
        let refused = |secret| Signer::new([secret]).unwrap_err();
        assert_eq!([refused(""), refused("whsec_")], [InvalidSecret::Empty; 2]);
        assert_eq!(refused("whsec_no base64"), InvalidSecret::Base64);
        assert!(!refused("whsec_no base64").to_string().contains("no base64"));
        let shown = format!("{:?}", Signer::new(["hunter2hunter2"]).unwrap());
        assert_eq!(shown, "Signer(1 keys)");
    }
}
