//! Tokens (JWT): whose they are, and whether they are to be believed.

use std::time::{Duration, SystemTime};

use jsonwebtoken::dangerous::insecure_decode_claims;
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, EncodingKey, Header, Validation, decode, decode_header, encode};
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::auth::AuthError;
use crate::auth::config::{IssuerConfig, MAX_TENANT};
use crate::auth::jwks::{KeySource, read_secret};
use crate::auth::principal::Principal;
use crate::auth::scope::Scope;
use crate::clock::since_epoch;
use crate::event::Filter;

/// The longest token that is looked at, in bytes.
const MAX_TOKEN: usize = 8 * 1024;
/// How far the clocks of an issuer and of this machine may differ.
const LEEWAY: Duration = Duration::from_mins(1);
/// The longest time that a token counts for, whatever it says.
const MAX_LIFETIME: Duration = Duration::from_hours(10 * 365 * 24);
/// The longest name of a subject, in bytes.
const MAX_SUBJECT: usize = 256;

/// Everyone whose tokens are believed.
pub(crate) struct Issuers(Vec<Issuer>);

struct Issuer {
    config: IssuerConfig,
    keys: KeySource,
}

impl Issuers {
    /// Reads the files that are named. Tells every problem, each with the key below `auth`.
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

    /// Whose token it is. Waits where the issuer's keys have to be fetched first.
    pub(crate) async fn verify(&self, token: &str) -> Result<Principal, AuthError> {
        if token.len() > MAX_TOKEN {
            return Err(AuthError::Malformed);
        }
        let header = decode_header(token).map_err(|_error| AuthError::Malformed)?;
        // What must be understood is not.
        if header.crit.is_some() {
            return Err(AuthError::Malformed);
        }
        // Says only whose keys to check it with.
        let claimed: Claimed = insecure_decode_claims(token).map_err(|_error| AuthError::Malformed)?;
        let issuer =
            self.0.iter().find(|issuer| issuer.config.issuer == claimed.iss).ok_or(AuthError::UnknownIssuer)?;
        issuer.verify(token, &header).await
    }

    /// Fetches what is to be fetched, to tell whether it can be. Fails with the key below `auth`, and the reason.
    pub(crate) async fn check(&self) -> Result<(), (String, String)> {
        for (index, issuer) in self.0.iter().enumerate() {
            issuer.keys.check().await.map_err(|error| (format!("issuers[{index}]"), error))?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Claimed {
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
                // Without a name of the key in the token, another one may fit.
                Err(error) if matches!(error.kind(), ErrorKind::InvalidSignature) => {}
                Err(error) => return Err(denied(&error)),
            }
        }
        Err(AuthError::Signature)
    }

    fn principal(&self, claims: &Map<String, Value>, now: SystemTime) -> Result<Principal, AuthError> {
        let subject = claims.get("sub").and_then(Value::as_str).ok_or(AuthError::Claim("sub"))?;
        let is_usable = (1..=MAX_SUBJECT).contains(&subject.len()) && !subject.chars().any(char::is_control);
        if !is_usable {
            return Err(AuthError::Claim("sub"));
        }
        let tenant = match claims.get(&self.config.tenant_claim) {
            None | Some(Value::Null) if self.config.require_tenant => return Err(AuthError::Tenant),
            None | Some(Value::Null) => None,
            Some(Value::String(tenant)) if (1..=MAX_TENANT).contains(&tenant.len()) => Some(tenant.clone()),
            // To see everything because of a claim that makes no sense would be the wrong way round.
            Some(_) => return Err(AuthError::Tenant),
        };
        let name = &self.config.filter_claim;
        let filter = claims.get(name).map(Filter::from_value).transpose();
        let filter = filter.map_err(|invalid| AuthError::Filter(name.clone(), invalid))?.unwrap_or_default();
        let expires = claims.get("exp").and_then(seconds).ok_or(AuthError::Claim("exp"))?;
        let id = format!("{}#{subject}", self.config.issuer);
        Ok(Principal::new(id, scopes(claims), tenant, filter, Some(end_of(expires, now))))
    }
}

/// Whole seconds, also of a number with a fraction.
fn seconds(value: &Value) -> Option<u64> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "too large and too small ones saturate"
    )]
    value.as_u64().or_else(|| value.as_f64().map(|seconds| seconds as u64))
}

/// Until when a token that expires then counts: one that is let in only because clocks differ, as long as they may.
fn end_of(expires: u64, now: SystemTime) -> SystemTime {
    let latest = now + MAX_LIFETIME;
    let expires = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(expires)).unwrap_or(latest).min(latest);
    if expires > now { expires } else { expires + LEEWAY }
}

/// What the claims `scope` (words with spaces between) and `scopes` (a list) allow here. Words of other services are
/// passed over.
fn scopes(claims: &Map<String, Value>) -> Vec<Scope> {
    let words = |value: &Value| match value {
        Value::String(text) => text.split_whitespace().map(str::to_owned).collect(),
        Value::Array(list) => list.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    let named = ["scope", "scopes"].into_iter().filter_map(|claim| claims.get(claim));
    named.flat_map(words).filter_map(|word| word.parse().ok()).collect()
}

fn denied(error: &Error) -> AuthError {
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

/// What a token is to say.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// Whose it is.
    pub subject: String,
    /// What it allows.
    pub scopes: Vec<Scope>,
    /// The tenant that it is bound to.
    pub tenant: Option<String>,
    /// What of the entries it lets see at most: the tree of a filter, or its text.
    pub filter: Option<Value>,
    /// How long it is good for.
    pub lifetime: Duration,
}

/// Why no token can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotSigned {
    /// The issuer keeps its key to itself.
    #[error("the issuer `{0}` has no secret here: only it can make tokens")]
    NoSecret(String),
    /// The secret can't be read.
    #[error("auth.issuers: {0}")]
    Secret(String),
    /// The library refuses.
    #[error("cannot sign: {0}")]
    Failed(String),
}

/// Makes a token in the name of an issuer that shares its secret with us, signed with the first of its algorithms.
pub fn sign(issuer: &IssuerConfig, request: &TokenRequest) -> Result<String, NotSigned> {
    let secret = match (&issuer.secret, &issuer.secret_file) {
        (Some(secret), _) => secret.expose_secret().to_owned(),
        (None, Some(path)) => read_secret(path).map_err(NotSigned::Secret)?,
        (None, None) => return Err(NotSigned::NoSecret(issuer.issuer.clone())),
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
    encode(&Header::new(algorithm), &claims, &key).map_err(|error| NotSigned::Failed(error.to_string()))
}

#[cfg(test)]
mod tests;
