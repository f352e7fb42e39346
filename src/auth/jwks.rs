//! The keys that an issuer signs with: fixed ones, or a set that it changes from time to time.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, Header};
use reqwest::Client;
use reqwest::redirect::Policy;
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;

use crate::auth::AuthError;
use crate::auth::config::{IssuerConfig, secret_problem};
use crate::telemetry::innermost;
use crate::tls;

/// The largest JWK set, in bytes, and the most keys of it that are looked at.
const MAX_SET_BYTES: usize = 256 * 1024;
const MAX_KEYS: usize = 64;
/// How long fetching a JWK set may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// One key of an issuer.
#[derive(Clone)]
struct Known {
    /// Its name in tokens; a fixed key has none and serves them all.
    kid: Option<String>,
    /// The one algorithm that it is for, where that is told.
    algorithm: Option<Algorithm>,
    key: DecodingKey,
}

/// Where keys come from.
pub(crate) enum KeySource {
    Fixed(DecodingKey),
    Set(Arc<KeySet>),
}

/// A JWK set as it was read last.
pub(crate) struct KeySet {
    issuer: String,
    origin: Origin,
    refresh: Duration,
    floor: Duration,
    known: RwLock<Option<Arc<[Known]>>>,
    /// When it was tried to read it last, and when that came off.
    tried: Arc<Mutex<Tried>>,
    /// The attempt to read it that is under way.
    reading: TaskTracker,
}

#[derive(Default)]
struct Tried {
    at: Option<Instant>,
    read_at: Option<Instant>,
}

enum Origin {
    File(PathBuf),
    Url { client: Client, url: String },
}

/// What is wrong with the files and addresses that are named: the key below the issuer, and the reason.
type Problem = (&'static str, String);

impl KeySource {
    /// Reads the files that are named. What is at an address is read when it is needed first.
    pub(crate) fn open(config: &IssuerConfig) -> Result<Self, Problem> {
        if let Some(secret) = &config.secret {
            return Ok(Self::Fixed(DecodingKey::from_secret(secret.expose_secret().as_bytes())));
        }
        if let Some(path) = &config.secret_file {
            let text = read_secret(path).map_err(|problem| ("secret_file", problem))?;
            return Ok(Self::Fixed(DecodingKey::from_secret(text.as_bytes())));
        }
        if let Some(path) = &config.public_key_file {
            let pem = std::fs::read(path).map_err(|e| ("public_key_file", cannot_read(path, &e)))?;
            let key = match config.family() {
                Some(AlgorithmFamily::Rsa) => DecodingKey::from_rsa_pem(&pem),
                Some(AlgorithmFamily::Ec) => DecodingKey::from_ec_pem(&pem),
                _ => DecodingKey::from_ed_pem(&pem),
            };
            let unusable =
                |error| format!("{} holds no public key in PEM that fits the algorithms: {error}", path.display());
            return key.map(Self::Fixed).map_err(|error| ("public_key_file", unusable(error)));
        }
        let origin = match (&config.jwks_file, &config.jwks_url) {
            (Some(path), _) => Origin::File(path.clone()),
            (None, Some(url)) => Origin::Url { client: client(config)?, url: url.clone() },
            (None, None) => return Err(("secret", "is missing".to_owned())),
        };
        let known = match &origin {
            Origin::File(path) => Some(read_file(path).map_err(|problem| ("jwks_file", problem))?),
            Origin::Url { .. } => None,
        };
        let now = known.is_some().then(Instant::now);
        Ok(Self::Set(Arc::new(KeySet {
            issuer: config.issuer.clone(),
            origin,
            refresh: config.refresh,
            floor: config.refresh_floor,
            known: RwLock::new(known),
            tried: Arc::new(Mutex::new(Tried { at: now, read_at: now })),
            reading: TaskTracker::new(),
        })))
    }

    /// The keys that could have signed a token with this header, at least one.
    pub(crate) async fn candidates(&self, header: &Header) -> Result<Vec<DecodingKey>, AuthError> {
        match self {
            Self::Fixed(key) => Ok(vec![key.clone()]),
            Self::Set(set) => set.candidates(header).await,
        }
    }

    /// Reads the set anew, where there is one.
    pub(crate) async fn check(&self) -> Result<(), String> {
        match self {
            Self::Fixed(_) => Ok(()),
            Self::Set(set) => set.origin.read().await.map(drop),
        }
    }
}

impl KeySet {
    async fn candidates(self: &Arc<Self>, header: &Header) -> Result<Vec<DecodingKey>, AuthError> {
        let known = self.known();
        let found = known.as_deref().map(|known| fitting(known, header)).unwrap_or_default();
        // A set that could be read has no say over keys that were taken out of it, unless it is read again.
        let found = match self.refreshed(found.is_empty()).await {
            Some(known) => fitting(&known, header),
            None => found,
        };
        if !found.is_empty() {
            return Ok(found);
        }
        // Where the set could not be read last, the key may be a new one.
        let tried = self.tried.lock().await;
        let is_current = tried.read_at.is_some() && tried.at == tried.read_at;
        Err(if is_current { AuthError::UnknownKid } else { AuthError::Unavailable })
    }

    fn known(&self) -> Option<Arc<[Known]>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The set, if it was due to be read again, or had to be, and that came off. Attempts keep their distance: tokens
    /// are anyone's to make up.
    async fn refreshed(self: &Arc<Self>, is_needed: bool) -> Option<Arc<[Known]>> {
        let tried = Arc::clone(&self.tried);
        let mut tried = if is_needed { tried.lock_owned().await } else { tried.try_lock_owned().ok()? };
        let is_older = |at: Option<Instant>, age: Duration| at.is_none_or(|at| at.elapsed() >= age);
        if !is_older(tried.at, self.floor) {
            // Someone else may have read it while this one waited for its turn.
            return if is_needed { self.known() } else { None };
        }
        if !is_needed && !is_older(tried.read_at, self.refresh) {
            return None;
        }
        let set = Arc::clone(self);
        // An attempt goes on when whoever asked for it goes away, or it would not count, and those who come and go could
        // have the issuer asked without end.
        let attempt = self.reading.spawn(async move { set.read(&mut tried).await });
        attempt.await.ok()?
    }

    async fn read(&self, tried: &mut Tried) -> Option<Arc<[Known]>> {
        let outcome = self.origin.read().await;
        tried.at = Some(Instant::now());
        match outcome {
            Ok(read) => {
                tried.read_at = tried.at;
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(read.clone());
                tracing::info!(issuer = self.issuer, keys = read.len(), "read the issuer's keys");
                Some(read)
            }
            Err(error) => {
                tracing::warn!(issuer = self.issuer, error, "cannot read the issuer's keys; going on with those known");
                None
            }
        }
    }
}

impl Origin {
    async fn read(&self) -> Result<Arc<[Known]>, String> {
        match self {
            Self::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read_file(&path)).await;
                read.map_err(|_error| "reading the file was broken off".to_owned())?
            }
            Self::Url { client, url } => {
                let answer = tokio::time::timeout(FETCH_TIMEOUT, fetch(client, url)).await;
                parse(&answer.map_err(|_elapsed| format!("no answer within {FETCH_TIMEOUT:?}"))??)
            }
        }
    }
}

async fn fetch(client: &Client, url: &str) -> Result<Vec<u8>, String> {
    let failed = |error: reqwest::Error| innermost(&error.without_url());
    let mut response = client.get(url).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(format!("the answer is {}", response.status()));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_SET_BYTES {
            return Err(format!("the answer has more than {MAX_SET_BYTES} bytes"));
        }
    }
    Ok(body)
}

fn client(config: &IssuerConfig) -> Result<Client, Problem> {
    let is_tls = config.jwks_url.as_ref().is_some_and(|url| url.starts_with("https:"));
    let trust = if is_tls {
        tls::client_config(config.ca_file.as_deref()).map_err(|error| ("ca_file", error.to_string()))?
    } else {
        tls::trusting_none()
    };
    let builder = Client::builder().redirect(Policy::none()).no_proxy().referer(false).timeout(FETCH_TIMEOUT);
    builder.tls_backend_preconfigured(trust).build().map_err(|error| ("jwks_url", innermost(&error)))
}

fn cannot_read(path: &Path, error: &std::io::Error) -> String {
    format!("cannot read {}: {error}", path.display())
}

/// The secret in a file, without the line's end.
pub(crate) fn read_secret(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| cannot_read(path, &error))?;
    let text = text.trim_end_matches(['\r', '\n']);
    secret_problem(text).map_or_else(|| Ok(text.to_owned()), |problem| Err(format!("what is in it {problem}")))
}

fn read_file(path: &Path) -> Result<Arc<[Known]>, String> {
    let text = std::fs::read(path).map_err(|error| cannot_read(path, &error))?;
    parse(&text).map_err(|problem| format!("{}: {problem}", path.display()))
}

/// The usable keys of a set, at least one. Those of other kinds are passed over.
fn parse(text: &[u8]) -> Result<Arc<[Known]>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(text).map_err(|_error| "it is no JWK set".to_owned())?;
    let keys = set.keys.into_iter().take(MAX_KEYS).filter_map(|key| usable(serde_json::from_value(key).ok()?));
    let known: Arc<[Known]> = keys.collect();
    if known.is_empty() {
        Err("there is no public key in it that signatures can be checked with".to_owned())
    } else {
        Ok(known)
    }
}

fn usable(jwk: Jwk) -> Option<Known> {
    let is_known = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => true,
        AlgorithmParameters::EllipticCurve(key) => matches!(key.curve, EllipticCurve::P256 | EllipticCurve::P384),
        AlgorithmParameters::OctetKeyPair(key) => key.curve == EllipticCurve::Ed25519,
        // A secret in a set that everyone can read is none.
        _ => false,
    };
    let is_for_signatures = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    let algorithm = match jwk.common.key_algorithm {
        Some(algorithm) => Some(Algorithm::try_from(algorithm).ok()?),
        None => None,
    };
    let key = DecodingKey::from_jwk(&jwk).ok().filter(|_| is_known && is_for_signatures)?;
    Some(Known { kid: jwk.common.key_id, algorithm, key })
}

fn fitting(known: &[Known], header: &Header) -> Vec<DecodingKey> {
    let fits = |known: &&Known| {
        known.key.family() == header.alg.family()
            && known.algorithm.is_none_or(|algorithm| algorithm == header.alg)
            && (header.kid.is_none() || header.kid == known.kid)
    };
    known.iter().filter(fits).map(|known| known.key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_keys_for_signatures_are_taken_from_a_set() {
        let set = r#"{"keys":[
            {"kty":"oct","k":"c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0","kid":"secret","alg":"HS256"},
            {"kty":"RSA","n":"AQAB","e":"AQAB","kid":"enc","use":"enc"},
            {"kty":"RSA","n":"AQAB","e":"AQAB","kid":"oaep","alg":"RSA-OAEP"},
            {"kty":"EC","crv":"P-521","x":"AQAB","y":"AQAB","kid":"p521"},
            {"kty":"new","kid":"new"},
            17,
            {"kty":"OKP","crv":"Ed25519","x":"AQAB","kid":"ed","use":"sig","alg":"EdDSA"},
            {"kty":"RSA","n":"AQAB","e":"AQAB","kid":"rsa","use":"sig"}
        ]}"#;
        let known = parse(set.as_bytes()).expect("a set");
        let names: Vec<_> = known.iter().filter_map(|known| known.kid.as_deref()).collect();
        assert_eq!(names, ["ed", "rsa"]);
        let header = |algorithm, kid: Option<&str>| Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) };
        assert_eq!(fitting(&known, &header(Algorithm::RS256, Some("rsa"))).len(), 1);
        assert_eq!(fitting(&known, &header(Algorithm::RS256, None)).len(), 1);
        assert_eq!(fitting(&known, &header(Algorithm::RS256, Some("ed"))).len(), 0, "a key is of one kind");
        assert_eq!(fitting(&known, &header(Algorithm::HS256, Some("rsa"))).len(), 0);
        for text in ["", "[]", "{}", r#"{"keys":[]}"#] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?} was accepted");
        }
    }
}
