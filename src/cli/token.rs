//! `aurora-bus token`: creates API keys, and tokens for tests.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::{ConfigArgs, eprint_text, print_line};
use crate::auth::{AuthConfig, KeyConfig, KeyHash, Scope, TokenRequest, new_key, sign};
use crate::event::Filter;
use crate::validate::{ConfigProblem, Validate as _};

/// The credentials to create.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Create an API key and print it once, with the lines for the configuration
    Key(KeyArgs),
    /// Create a token (JWT) of a configured issuer that shares its secret with the daemon
    Jwt(JwtArgs),
}

/// The permissions of the key.
#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    /// Name of the key in the configuration and in the audit trail
    #[arg(long)]
    name: String,
    /// Scope, such as `publish:aurora:alerts`, `read:*`, `ws:alerts` or `admin`; may be repeated
    #[arg(long, required = true)]
    scope: Vec<Scope>,
    /// Tenant that the key is restricted to
    #[arg(long)]
    tenant: Option<String>,
    /// Filter that the key is restricted to, as JSON: {"key":"severity","cmp":"gte","val":"high"}
    #[arg(long)]
    filter: Option<String>,
    /// Lifetime of the key, such as 90d [default: unlimited]
    #[arg(long, value_parser = lifetime)]
    expires_in: Option<Duration>,
}

/// The claims of the token.
#[derive(Debug, Args)]
pub(super) struct JwtArgs {
    /// Issuer of the token; optional if only one is configured
    #[arg(long)]
    issuer: Option<String>,
    /// Subject of the token
    #[arg(long)]
    subject: String,
    /// Scope, such as `publish:aurora:alerts`, `read:*`, `ws:alerts` or `admin`; may be repeated
    #[arg(long)]
    scope: Vec<Scope>,
    /// Tenant that the token is restricted to
    #[arg(long)]
    tenant: Option<String>,
    /// Filter that the token is restricted to, as JSON: {"key":"severity","cmp":"gte","val":"high"}
    #[arg(long)]
    filter: Option<String>,
    /// Lifetime of the token
    #[arg(long, default_value = "1h", value_parser = lifetime)]
    expires_in: Duration,
}

fn lifetime(text: &str) -> Result<Duration, String> {
    humantime_serde::re::humantime::parse_duration(text).map_err(|error| error.to_string())
}

pub(super) fn run(config: &ConfigArgs, command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Key(args) => key(args),
        TokenCommand::Jwt(args) => jwt(config, args),
    }
}

fn key(args: KeyArgs) -> anyhow::Result<()> {
    let key = new_key();
    let expires = args.expires_in.map(|time| Timestamp::now().checked_add(time)).transpose();
    let expires = expires.context("--expires-in is too long")?;
    let expires = expires.and_then(|time| Timestamp::from_second(time.as_second()).ok());
    let KeyArgs { name, scope: scopes, tenant, filter, .. } = args;
    let declared = KeyConfig { name, hash: KeyHash::of(&key), scopes, tenant, filter, expires };
    let auth = AuthConfig { keys: vec![declared.clone()], ..AuthConfig::default() };
    if let Some(ConfigProblem { path, message }) = auth.problems().into_iter().next() {
        bail!("--{}: {message}", path.rsplit('.').next().unwrap_or(&path));
    }
    eprint_text("The key. It is not stored and cannot be shown again:\n");
    print_line(&key)?;
    eprint_text("\nFor the configuration of the daemon, which needs the hash only:\n");
    print_line(&format!("[[auth.keys]]\n{}", toml::to_string(&declared).context("a key is TOML")?.trim_end()))?;
    Ok(())
}

fn jwt(config: &ConfigArgs, args: JwtArgs) -> anyhow::Result<()> {
    let issuers = config.load()?.auth.issuers;
    let issuer = match (&args.issuer, issuers.as_slice()) {
        (Some(name), issuers) => issuers.iter().find(|issuer| issuer.issuer == *name),
        (None, [issuer]) => Some(issuer),
        (None, []) => bail!("no issuer is configured (auth.issuers)"),
        (None, _) => bail!("several issuers are configured: choose one with --issuer"),
    };
    let issuer = issuer.with_context(|| format!("there is no issuer `{}`", args.issuer.unwrap_or_default()))?;
    let JwtArgs { subject, scope: scopes, tenant, filter, expires_in: lifetime, .. } = args;
    if let Some(invalid) = filter.as_deref().and_then(|text| Filter::parse(text).err()) {
        bail!("--filter is not accepted: {invalid}");
    }
    let filter = filter.map(|text| serde_json::from_str(&text)).transpose().context("--filter is not JSON")?;
    print_line(&sign(issuer, &TokenRequest { subject, scopes, tenant, filter, lifetime })?)?;
    Ok(())
}
