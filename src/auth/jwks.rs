//! The signing keys of an issuer: one fixed key, or a JWK set that is read again from time to time.

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

use crate::auth::config::{IssuerConfig, secret_problem};
use crate::auth::error::AuthError;
use crate::telemetry::innermost;
use crate::tls;

/// The maximum size of a JWK set, and the number of its keys that are used.
const MAX_SET_BYTES: usize = 256 * 1024;
const MAX_KEYS: usize = 64;
/// The time limit for fetching a JWK set.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// One key of a JWK set.
#[derive(Clone)]
struct CachedKey {
    /// The key id in token headers.
    kid: Option<String>,
    /// The algorithm that the key is limited to, if the set names one.
    algorithm: Option<Algorithm>,
    key: DecodingKey,
}

/// The source of an issuer's keys.
pub(crate) enum KeySource {
    Fixed(DecodingKey),
    Set(Arc<KeySet>),
}

/// A JWK set, with the keys of the last successful read.
pub(crate) struct KeySet {
    issuer: String,
    location: KeySetLocation,
    refresh: Duration,
    refresh_floor: Duration,
    keys: RwLock<Option<Arc<[CachedKey]>>>,
    attempts: Arc<Mutex<ReadAttempts>>,
    /// Runs the reads, so that a request that goes away does not cancel one.
    tasks: TaskTracker,
}

/// The times of the last attempt to read a JWK set and of the last success.
#[derive(Default)]
struct ReadAttempts {
    tried_at: Option<Instant>,
    read_at: Option<Instant>,
}

enum KeySetLocation {
    File(PathBuf),
    Url { client: Client, url: String },
}

/// A config key of the issuer, and the problem with its file or URL.
type KeySourceProblem = (&'static str, String);

impl KeySource {
    /// Reads the named files. A URL is fetched when a token needs it.
    pub(crate) fn open(config: &IssuerConfig) -> Result<Self, KeySourceProblem> {
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
            let unusable = |error| {
                format!("{} must contain a public key in PEM that fits the algorithms: {error}", path.display())
            };
            return key.map(Self::Fixed).map_err(|error| ("public_key_file", unusable(error)));
        }
        let location = match (&config.jwks_file, &config.jwks_url) {
            (Some(path), _) => KeySetLocation::File(path.clone()),
            (None, Some(url)) => KeySetLocation::Url { client: client(config)?, url: url.clone() },
            (None, None) => return Err(("secret", "is required".to_owned())),
        };
        let keys = match &location {
            KeySetLocation::File(path) => Some(read_file(path).map_err(|problem| ("jwks_file", problem))?),
            KeySetLocation::Url { .. } => None,
        };
        let now = keys.is_some().then(Instant::now);
        Ok(Self::Set(Arc::new(KeySet {
            issuer: config.issuer.clone(),
            location,
            refresh: config.refresh,
            refresh_floor: config.refresh_floor,
            keys: RwLock::new(keys),
            attempts: Arc::new(Mutex::new(ReadAttempts { tried_at: now, read_at: now })),
            tasks: TaskTracker::new(),
        })))
    }

    /// Returns the keys that may have signed a token with this header, at least one.
    pub(crate) async fn candidates(&self, header: &Header) -> Result<Vec<DecodingKey>, AuthError> {
        match self {
            Self::Fixed(key) => Ok(vec![key.clone()]),
            Self::Set(set) => set.candidates(header).await,
        }
    }

    /// Reads the key set, if there is one, to check that it works.
    pub(crate) async fn check(&self) -> Result<(), String> {
        match self {
            Self::Fixed(_) => Ok(()),
            Self::Set(set) => set.location.read().await.map(drop),
        }
    }
}

impl KeySet {
    async fn candidates(self: &Arc<Self>, header: &Header) -> Result<Vec<DecodingKey>, AuthError> {
        let cached = self.cached();
        let found = cached.as_deref().map(|keys| matching(keys, header)).unwrap_or_default();
        // After a refresh only the new set counts: it may lack keys of the old one.
        let found = match self.refreshed(found.is_empty()).await {
            Some(keys) => matching(&keys, header),
            None => found,
        };
        if !found.is_empty() {
            return Ok(found);
        }
        // If the last read failed, the key may be a new one.
        let attempts = self.attempts.lock().await;
        let is_current = attempts.read_at.is_some() && attempts.tried_at == attempts.read_at;
        Err(if is_current { AuthError::UnknownKid } else { AuthError::Unavailable })
    }

    fn cached(&self) -> Option<Arc<[CachedKey]>> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the set again if it is too old or `is_needed`. Returns the keys if a read succeeded.
    ///
    /// Attempts are at least `refresh_floor` apart, because anyone can make up tokens with unknown keys.
    async fn refreshed(self: &Arc<Self>, is_needed: bool) -> Option<Arc<[CachedKey]>> {
        let attempts = Arc::clone(&self.attempts);
        let mut attempts = if is_needed { attempts.lock_owned().await } else { attempts.try_lock_owned().ok()? };
        let is_older = |at: Option<Instant>, age: Duration| at.is_none_or(|at| at.elapsed() >= age);
        if !is_older(attempts.tried_at, self.refresh_floor) {
            // Another request may have read the set while this one waited for the lock.
            return if is_needed { self.cached() } else { None };
        }
        if !is_needed && !is_older(attempts.read_at, self.refresh) {
            return None;
        }
        let set = Arc::clone(self);
        // The read goes on if its request is cancelled. Otherwise the attempt would not count, and clients that
        // disconnect early could make the daemon query the issuer without limit.
        let read = self.tasks.spawn(async move { set.read(&mut attempts).await });
        read.await.ok()?
    }

    async fn read(&self, attempts: &mut ReadAttempts) -> Option<Arc<[CachedKey]>> {
        let outcome = self.location.read().await;
        attempts.tried_at = Some(Instant::now());
        match outcome {
            Ok(keys) => {
                attempts.read_at = attempts.tried_at;
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Some(keys.clone());
                tracing::info!(issuer = self.issuer, keys = keys.len(), "issuer keys read");
                Some(keys)
            }
            Err(error) => {
                tracing::warn!(issuer = self.issuer, error, "issuer keys unavailable, using the cached ones");
                None
            }
        }
    }
}

impl KeySetLocation {
    async fn read(&self) -> Result<Arc<[CachedKey]>, String> {
        match self {
            Self::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read_file(&path)).await;
                read.map_err(|_error| "reading the file was cancelled".to_owned())?
            }
            Self::Url { client, url } => {
                let response = tokio::time::timeout(FETCH_TIMEOUT, fetch(client, url)).await;
                parse(&response.map_err(|_elapsed| format!("no response within {FETCH_TIMEOUT:?}"))??)
            }
        }
    }
}

async fn fetch(client: &Client, url: &str) -> Result<Vec<u8>, String> {
    let failed = |error: reqwest::Error| innermost(&error.without_url());
    let mut response = client.get(url).send().await.map_err(failed)?;
    if !response.status().is_success() {
        return Err(format!("the response has status {}", response.status()));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_SET_BYTES {
            return Err(format!("the response has more than {MAX_SET_BYTES} bytes"));
        }
    }
    Ok(body)
}

fn client(config: &IssuerConfig) -> Result<Client, KeySourceProblem> {
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

/// Returns the secret in a file, without line breaks at its end.
pub(crate) fn read_secret(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| cannot_read(path, &error))?;
    let text = text.trim_end_matches(['\r', '\n']);
    secret_problem(text).map_or_else(|| Ok(text.to_owned()), |problem| Err(format!("its content {problem}")))
}

fn read_file(path: &Path) -> Result<Arc<[CachedKey]>, String> {
    let text = std::fs::read(path).map_err(|error| cannot_read(path, &error))?;
    parse(&text).map_err(|problem| format!("{}: {problem}", path.display()))
}

/// Returns the usable keys of a set, at least one. Skips keys of other kinds.
fn parse(text: &[u8]) -> Result<Arc<[CachedKey]>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(text).map_err(|_error| "not a JWK set".to_owned())?;
    let keys = set.keys.into_iter().take(MAX_KEYS).filter_map(|key| usable(serde_json::from_value(key).ok()?));
    let keys: Arc<[CachedKey]> = keys.collect();
    if keys.is_empty() { Err("no public key for signatures in the JWK set".to_owned()) } else { Ok(keys) }
}

fn usable(jwk: Jwk) -> Option<CachedKey> {
    let is_supported = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => true,
        AlgorithmParameters::EllipticCurve(key) => matches!(key.curve, EllipticCurve::P256 | EllipticCurve::P384),
        AlgorithmParameters::OctetKeyPair(key) => key.curve == EllipticCurve::Ed25519,
        // A secret in a public set is not secret.
        _ => false,
    };
    let is_for_signatures = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    let algorithm = match jwk.common.key_algorithm {
        Some(algorithm) => Some(Algorithm::try_from(algorithm).ok()?),
        None => None,
    };
    let key = DecodingKey::from_jwk(&jwk).ok().filter(|_| is_supported && is_for_signatures)?;
    Some(CachedKey { kid: jwk.common.key_id, algorithm, key })
}

fn matching(keys: &[CachedKey], header: &Header) -> Vec<DecodingKey> {
    let matches = |cached: &&CachedKey| {
        cached.key.family() == header.alg.family()
            && cached.algorithm.is_none_or(|algorithm| algorithm == header.alg)
            && (header.kid.is_none() || header.kid == cached.kid)
    };
    keys.iter().filter(matches).map(|cached| cached.key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_set_yields_only_public_keys_for_signatures() {
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
        let keys = parse(set.as_bytes()).expect("a set");
        let names: Vec<_> = keys.iter().filter_map(|key| key.kid.as_deref()).collect();
        assert_eq!(names, ["ed", "rsa"]);
        let header = |algorithm, kid: Option<&str>| Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) };
        assert_eq!(matching(&keys, &header(Algorithm::RS256, Some("rsa"))).len(), 1);
        assert_eq!(matching(&keys, &header(Algorithm::RS256, None)).len(), 1);
        assert_eq!(matching(&keys, &header(Algorithm::RS256, Some("ed"))).len(), 0, "a key has one kind");
        assert_eq!(matching(&keys, &header(Algorithm::HS256, Some("rsa"))).len(), 0);
        for text in ["", "[]", "{}", r#"{"keys":[]}"#] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?} was accepted");
        }
    }
}
