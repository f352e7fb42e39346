//! The HTTP client of the sub-commands.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url};
use secrecy::{ExposeSecret as _, SecretString};

use super::{ConfigArgs, say};

/// Where the daemon is.
#[derive(Debug, Clone, Args)]
pub(super) struct ClientArgs {
    /// The daemon's URL [default: where the configuration says it listens]
    #[arg(long, env = "AURORA_BUS_URL", value_name = "URL")]
    url: Option<Url>,
    /// The API key or token to show, where the daemon asks for one
    #[arg(long, env = "AURORA_BUS_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<SecretString>,
}

impl ClientArgs {
    /// A client for that daemon: no proxy, no redirects.
    pub(super) fn http(&self, timeout: Duration) -> anyhow::Result<Client> {
        let builder = Client::builder().user_agent(crate::http::CLI_AGENT).no_proxy().redirect(Policy::none());
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose_secret()));
            let mut value = value.map_err(|_error| anyhow!("the token has characters that no token has"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let builder = builder.default_headers(headers).timeout(timeout).connect_timeout(Duration::from_secs(5));
        builder.build().context("cannot make an HTTP client")
    }

    /// The daemon's URL: as given, or where the configuration says that it listens.
    pub(super) fn base(&self, config: &ConfigArgs) -> anyhow::Result<Url> {
        if let Some(url) = &self.url {
            return Ok(url.clone());
        }
        let mut listen = config.load()?.http.listen;
        if listen.ip().is_unspecified() {
            let loopback: std::net::IpAddr =
                if listen.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            listen.set_ip(loopback);
        }
        Url::parse(&format!("http://{listen}")).context("cannot make a URL of http.listen")
    }
}

/// The daemon's URL with a path of its API.
pub(super) fn endpoint(base: &Url, segments: &[&str]) -> anyhow::Result<Url> {
    let mut url = base.clone();
    match url.path_segments_mut() {
        Ok(mut path) => path.pop_if_empty().extend(segments),
        Err(()) => bail!("{base} can't have a path: use http://host:port"),
    };
    Ok(url)
}

/// What the daemon said when it refused, in its own words.
pub(super) async fn refusal(response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct Problem {
        detail: String,
    }
    let status = response.status();
    let body = response.bytes().await.unwrap_or_default();
    match serde_json::from_slice::<Problem>(&body) {
        Ok(problem) => format!("{}: {}", status.as_u16(), problem.detail),
        Err(_) => status.to_string(),
    }
}

/// `aurora-bus health`
pub(super) async fn health(config: &ConfigArgs, args: &ClientArgs) -> anyhow::Result<()> {
    let url = endpoint(&args.base(config)?, &["health"])?;
    let response = args.http(Duration::from_secs(3))?.get(url.clone()).send().await;
    let response = response.with_context(|| format!("no answer from {url}"))?;
    if !response.status().is_success() {
        bail!("{url} answered {}", refusal(response).await);
    }
    say("healthy")?;
    Ok(())
}
