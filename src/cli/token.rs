//! `aurora-bus token`: API keys, and tokens to test with.

use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::{ConfigArgs, say, tell};
use crate::auth::{AuthConfig, KeyConfig, KeyHash, Scope, TokenRequest, new_key, sign};
use crate::event::Filter;
use crate::validate::{ConfigProblem, Validate as _};

/// What to make.
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Make an API key: print it, this once, and what to put into the configuration
    Key(KeyArgs),
    /// Make a token (JWT) in the name of a configured issuer that shares its secret with the daemon
    Jwt(JwtArgs),
}

/// What the key allows.
#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    /// What the key is called in the configuration and in the audit trail
    #[arg(long)]
    name: String,
    /// What it allows, such as `publish:aurora:alerts`, `read:*`, `ws:alerts` or `admin`; may be repeated
    #[arg(long, required = true)]
    scope: Vec<Scope>,
    /// The one tenant whose entries it lets see and publish
    #[arg(long)]
    tenant: Option<String>,
    /// What of the entries it lets see at most, as JSON: {"key":"severity","cmp":"gte","val":"high"}
    #[arg(long)]
    filter: Option<String>,
    /// How long it is good for, such as 90d
    #[arg(long, value_parser = lifetime)]
    expires_in: Option<Duration>,
}

/// What the token says.
#[derive(Debug, Args)]
pub(super) struct JwtArgs {
    /// The issuer; not needed where only one is configured
    #[arg(long)]
    issuer: Option<String>,
    /// Whose token it is
    #[arg(long)]
    subject: String,
    /// What it allows; may be repeated
    #[arg(long)]
    scope: Vec<Scope>,
    /// The tenant that it is bound to
    #[arg(long)]
    tenant: Option<String>,
    /// What of the entries it lets see at most, as JSON: {"key":"severity","cmp":"gte","val":"high"}
    #[arg(long)]
    filter: Option<String>,
    /// How long it is good for
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
    tell("The key, which is not kept anywhere and can't be shown again:\n");
    say(&key)?;
    tell("\nFor the configuration of the daemon, which needs its hash only:\n");
    say(&format!("[[auth.keys]]\n{}", toml::to_string(&declared).context("a key is TOML")?.trim_end()))?;
    Ok(())
}

fn jwt(config: &ConfigArgs, args: JwtArgs) -> anyhow::Result<()> {
    let issuers = config.load()?.auth.issuers;
    let issuer = match (&args.issuer, issuers.as_slice()) {
        (Some(name), issuers) => issuers.iter().find(|issuer| issuer.issuer == *name),
        (None, [issuer]) => Some(issuer),
        (None, []) => bail!("no issuer is configured (auth.issuers)"),
        (None, _) => bail!("several issuers are configured: name one by --issuer"),
    };
    let issuer = issuer.with_context(|| format!("there is no issuer `{}`", args.issuer.unwrap_or_default()))?;
    let JwtArgs { subject, scope: scopes, tenant, filter, expires_in: lifetime, .. } = args;
    if let Some(invalid) = filter.as_deref().and_then(|text| Filter::parse(text).err()) {
        bail!("--filter: is refused: {invalid}");
    }
    let filter = filter.map(|text| serde_json::from_str(&text)).transpose().context("--filter is no JSON")?;
    say(&sign(issuer, &TokenRequest { subject, scopes, tenant, filter, lifetime })?)?;
    Ok(())
}
