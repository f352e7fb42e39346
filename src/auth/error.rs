//! Why a request is refused access.

use crate::event::InvalidFilter;

/// Why someone is not let in, or may not do something. Holds nothing of what was shown, but for what is wrong with the
/// filter in a token that is believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthError {
    #[error("the stream is another tenant's, and you are bound to `{0}`")]
    OtherTenant(String),
    #[error("credentials are needed: Authorization: Bearer, X-API-Key, cookie access_token; to watch, also a ticket")]
    Missing,
    #[error("the Authorization header must be: Bearer, and a key or token")]
    Scheme,
    #[error("the token makes no sense")]
    Malformed,
    #[error("the key is not known")]
    UnknownKey,
    #[error("the ticket is not known: it was used, is older than 30 seconds, or is for another page")]
    Ticket,
    #[error("the issuer of the token is not known")]
    UnknownIssuer,
    #[error("the token is signed with an algorithm that its issuer does not use")]
    Algorithm,
    #[error("the token is signed with a key that its issuer does not have")]
    UnknownKid,
    #[error("the signature of the token is wrong")]
    Signature,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token or key has expired")]
    Expired,
    #[error("the token is not good yet")]
    NotYet,
    #[error("the claim `{0}` of the token is missing or makes no sense")]
    Claim(&'static str),
    #[error("the token must name one tenant")]
    Tenant,
    #[error("the claim `{0}` of the token is refused: {1}")]
    Filter(String, InvalidFilter),
    #[error("the keys of the token's issuer can't be read now")]
    Unavailable,
    #[error("the scope {0} is needed")]
    Scope(String),
    #[error("this is about all entries, and you may see those of one tenant or of a filter alone")]
    AllEntries,
}
