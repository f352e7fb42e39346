//! The reasons to refuse access.

use crate::event::InvalidFilter;

/// The reason to refuse a request. Contains no credentials.
///
/// A close frame has room for 106 bytes of it. Only an invalid filter, in a token with a valid signature, is quoted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    #[error("the stream belongs to another tenant; your credentials are restricted to tenant `{0}`")]
    OtherTenant(String),
    #[error("credentials are required: Authorization: Bearer, X-API-Key, cookie access_token; to watch, also a ticket")]
    Missing,
    #[error("the Authorization header must be `Bearer` and an API key or token")]
    Scheme,
    #[error("the token is not a valid JWT")]
    Malformed,
    #[error("the API key is not valid")]
    UnknownKey,
    #[error("the ticket is not valid: it was used, is older than 30 seconds, or is for another page")]
    Ticket,
    #[error("the issuer of the token is not configured")]
    UnknownIssuer,
    #[error("the issuer of the token does not use its signature algorithm")]
    Algorithm,
    #[error("the issuer of the token does not have its signing key")]
    UnknownKid,
    #[error("the signature of the token is not valid")]
    Signature,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token or API key has expired")]
    Expired,
    #[error("the token is not valid yet")]
    NotYet,
    #[error("the claim `{0}` of the token is missing or not valid")]
    Claim(&'static str),
    #[error("the token must name exactly one tenant")]
    Tenant,
    #[error("the claim `{0}` of the token is not accepted: {1}")]
    Filter(String, InvalidFilter),
    #[error("the keys of the token's issuer are unavailable; try again later")]
    Unavailable,
    #[error("the scope `{0}` is required")]
    Scope(String),
    #[error("this covers all entries, and your credentials are restricted to a tenant or filter")]
    AllEntries,
}
