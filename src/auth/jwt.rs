//! Tokens (JWT): verification, and signing with a shared secret.

use std::time::{Duration, SystemTime};

use jsonwebtoken::dangerous::insecure_decode_claims;
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, EncodingKey, Header, Validation, decode, decode_header, encode};
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::auth::config::{IssuerConfig, MAX_TENANT_BYTES};
use crate::auth::error::AuthError;
use crate::auth::jwks::{KeySource, read_secret};
use crate::auth::principal::Principal;
use crate::auth::scope::Scope;
use crate::clock::since_epoch;
use crate::event::Filter;

/// The maximum length of a token.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// The allowed difference between the clocks of an issuer and of this machine.
const LEEWAY: Duration = Duration::from_mins(1);
/// The maximum lifetime of a token. A later `exp` is cut to it.
const MAX_LIFETIME: Duration = Duration::from_hours(10 * 365 * 24);
/// The maximum length of a subject.
const MAX_SUBJECT_BYTES: usize = 256;

/// The issuers whose tokens are accepted.
pub(crate) struct Issuers(Vec<Issuer>);

struct Issuer {
    config: IssuerConfig,
    keys: KeySource,
}

impl Issuers {
    /// Reads the named files. Fails with every problem, each with its key below `auth`.
    pub(crate) fn open(configs: &[IssuerConfig]) -> Result<Self, Vec<(String, String)>> {
        let (mut issuers, mut problems) = (Vec::new(), Vec::new());
        for (index, config) in configs.iter().enumerate() {
            match KeySource::open(config) {
                Ok(keys) => issuers.push(Issuer { config: config.clone(), keys }),
                Err((key, problem)) => problems.push((format!("issuers[{index}].{key}"), problem)),
            }
        }
        if problems.is_empty() { Ok(Self(issuers)) } else { Err(problems) }
    }

    /// Verifies a token and returns its principal. Waits if the issuer's keys must be fetched first.
    pub(crate) async fn verify(&self, token: &str) -> Result<Principal, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Malformed);
        }
        let header = decode_header(token).map_err(|_error| AuthError::Malformed)?;
        // The token requires an extension (RFC 7515, 4.1.11). None is supported.
        if header.crit.is_some() {
            return Err(AuthError::Malformed);
        }
        // Not verified yet: selects only the keys to verify with.
        let unverified: UnverifiedClaims = insecure_decode_claims(token).map_err(|_error| AuthError::Malformed)?;
        let issuer =
            self.0.iter().find(|issuer| issuer.config.issuer == unverified.iss).ok_or(AuthError::UnknownIssuer)?;
        issuer.verify(token, &header).await
    }

    /// Fetches the keys of all issuers. Fails with the key below `auth` and the reason.
    pub(crate) async fn check(&self) -> Result<(), (String, String)> {
        for (index, issuer) in self.0.iter().enumerate() {
            issuer.keys.check().await.map_err(|error| (format!("issuers[{index}]"), error))?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct UnverifiedClaims {
    iss: String,
}

impl Issuer {
    async fn verify(&self, token: &str, header: &Header) -> Result<Principal, AuthError> {
        if !self.config.algorithms.contains(&header.alg) {
            return Err(AuthError::Algorithm);
        }
        let mut validation = Validation::new(header.alg);
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY.as_secs();
        for key in self.keys.candidates(header).await? {
            match decode::<Map<String, Value>>(token, &key, &validation) {
                Ok(token) => return self.principal(&token.claims, SystemTime::now()),
                // Without a key id in the token, another candidate may have signed it.
                Err(error) if matches!(error.kind(), ErrorKind::InvalidSignature) => {}
                Err(error) => return Err(auth_error(&error)),
            }
        }
        Err(AuthError::Signature)
    }

    fn principal(&self, claims: &Map<String, Value>, now: SystemTime) -> Result<Principal, AuthError> {
        let subject = claims.get("sub").and_then(Value::as_str).ok_or(AuthError::Claim("sub"))?;
        let is_usable = (1..=MAX_SUBJECT_BYTES).contains(&subject.len()) && !subject.chars().any(char::is_control);
        if !is_usable {
            return Err(AuthError::Claim("sub"));
        }
        let tenant = match claims.get(&self.config.tenant_claim) {
            None | Some(Value::Null) if self.config.require_tenant => return Err(AuthError::Tenant),
            None | Some(Value::Null) => None,
            Some(Value::String(tenant)) if (1..=MAX_TENANT_BYTES).contains(&tenant.len()) => Some(tenant.clone()),
            // A malformed claim must not lift the restriction.
            Some(_) => return Err(AuthError::Tenant),
        };
        let name = &self.config.filter_claim;
        let filter = claims.get(name).map(Filter::from_value).transpose();
        let filter = filter.map_err(|invalid| AuthError::Filter(name.clone(), invalid))?.unwrap_or_default();
        let expires = claims.get("exp").and_then(seconds).ok_or(AuthError::Claim("exp"))?;
        let id = format!("{}#{subject}", self.config.issuer);
        Ok(Principal::new(id, scopes(claims), tenant, filter, Some(expiry(expires, now))))
    }
}

/// Returns whole seconds, also for a number with a fraction.
fn seconds(value: &Value) -> Option<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "values out of range saturate")]
    value.as_u64().or_else(|| value.as_f64().map(|seconds| seconds as u64))
}

/// Returns the time until which a token is accepted. One that is accepted only by the leeway gets the leeway.
fn expiry(expires: u64, now: SystemTime) -> SystemTime {
    let latest = now + MAX_LIFETIME;
    let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(expires)).unwrap_or(latest).min(latest);
    if expires > now { expires } else { expires + LEEWAY }
}

/// Returns the scopes in the claims `scope` (separated by spaces) and `scopes` (a list).
///
/// Skips the scopes of other services.
fn scopes(claims: &Map<String, Value>) -> Vec<Scope> {
    let words = |value: &Value| match value {
        Value::String(text) => text.split_whitespace().map(str::to_owned).collect(),
        Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let named = ["scope", "scopes"].into_iter().filter_map(|claim| claims.get(claim));
    named.flat_map(words).filter_map(|word| word.parse().ok()).collect()
}

fn auth_error(error: &Error) -> AuthError {
    match error.kind() {
        ErrorKind::ExpiredSignature => AuthError::Expired,
        ErrorKind::ImmatureSignature => AuthError::NotYet,
        ErrorKind::InvalidAudience => AuthError::Audience,
        ErrorKind::InvalidIssuer => AuthError::UnknownIssuer,
        ErrorKind::InvalidAlgorithm | ErrorKind::MissingAlgorithm => AuthError::Algorithm,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            let known = ["exp", "nbf", "iss", "aud", "sub"].into_iter().find(|known| known == claim);
            AuthError::Claim(known.unwrap_or("exp"))
        }
        _ => AuthError::Malformed,
    }
}

/// The content of a token to sign.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// The claim `sub`.
    pub subject: String,
    /// The scopes.
    pub scopes: Vec<Scope>,
    /// The tenant that the token is restricted to.
    pub tenant: Option<String>,
    /// The filter that the token is restricted to: its JSON, or that JSON as a text.
    pub filter: Option<Value>,
    /// The time until the token expires.
    pub lifetime: Duration,
}

/// The reason why a token cannot be signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// The issuer has no shared secret.
    #[error("the issuer `{0}` has no secret in this configuration, so only the issuer can sign its tokens")]
    NoSecret(String),
    /// The secret cannot be read.
    #[error("auth.issuers: {0}")]
    Secret(String),
    /// The library failed.
    #[error("cannot sign: {0}")]
    Failed(String),
}

/// Signs a token with the shared secret and the first algorithm of an issuer.
pub fn sign(issuer: &IssuerConfig, request: &TokenRequest) -> Result<String, SignError> {
    let secret = match (&issuer.secret, &issuer.secret_file) {
        (Some(secret), _) => secret.expose_secret().to_owned(),
        (None, Some(path)) => read_secret(path).map_err(SignError::Secret)?,
        (None, None) => return Err(SignError::NoSecret(issuer.issuer.clone())),
    };
    let now = since_epoch().as_secs();
    let scope = request.scopes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let mut claims = json!({
        "iss": issuer.issuer,
        "aud": issuer.audience,
        "sub": request.subject,
        "iat": now,
        "exp": now.saturating_add(request.lifetime.as_secs()),
        "scope": scope,
    });
    if let Some(tenant) = &request.tenant {
        claims[&issuer.tenant_claim] = tenant.as_str().into();
    }
    if let Some(filter) = &request.filter {
        claims[&issuer.filter_claim] = filter.clone();
    }
    let algorithm = issuer.algorithms.first().copied().unwrap_or(Algorithm::HS256);
    let key = EncodingKey::from_secret(secret.as_bytes());
    encode(&Header::new(algorithm), &claims, &key).map_err(|error| SignError::Failed(error.to_string()))
}

#[cfg(test)]
mod tests;
