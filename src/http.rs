//! The HTTP surface: listener, routes, request parsing, and the errors that clients see.
//!
//! Owns the accept loop, TLS, the routes with the access that each needs, and the problem documents. Promises that all
//! work for a client is within limits, and that malformed input is rejected here. The only module that knows axum and
//! HTTP statuses.

mod admission;
mod api;
mod authenticator;
mod body;
mod config;
mod extract;
mod handlers;
mod middleware;
mod problem;
mod publishing;
mod pulling;
mod routes;
mod server;
mod views;

pub use api::{Api, Services};
pub use authenticator::Authenticator;
pub use config::Config;
pub use handlers::dead_letters::CLI_AGENT;
pub use middleware::authorize::Access;
pub use problem::ApiError;
pub use routes::{Route, routes};
pub use server::accept::serve;
pub use server::tls::{CertificateValidity, ClientCertificates, Tls, TlsConfig, TlsError, TlsVersion};
