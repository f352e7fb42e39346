//! Authentication and authorisation: keys, tokens, tickets, scopes, and the principal that they identify.
//!
//! Owns the configured API keys and token issuers, the scopes, the tickets, and the limits of what each principal can
//! read: the entries of its tenant that pass its own filter. Promises that a principal never reads other entries, and
//! that no credentials are printed. Knows neither HTTP nor the routes: `http` reads the credentials from a request, and
//! each route checks the `Principal`.

mod config;
mod error;
mod jwks;
mod jwt;
mod key_hash;
mod keys;
mod page_origin;
mod principal;
mod scope;
mod ticket;

pub use config::{AuthConfig, AuthMode, IssuerConfig, KeyConfig, MetricsAccess};
pub use jwt::{SignError, TokenRequest, sign};
pub use key_hash::{InvalidKeyHash, KeyHash};
pub use keys::new_key;
pub use scope::{NamePattern, Scope, UnknownScope};

pub(crate) use error::AuthError;
pub(crate) use jwt::Issuers;
pub(crate) use keys::{ApiKeys, PREFIX as KEY_PREFIX};
pub(crate) use page_origin::PageOrigin;
pub(crate) use principal::Principal;
pub(crate) use scope::Action;
pub(crate) use ticket::{LIFETIME as TICKET_LIFETIME, Tickets};

/// The placeholder of families whose members each belong to one tenant.
pub(crate) const TENANT: &str = "tenant";
