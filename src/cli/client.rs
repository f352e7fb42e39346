//! The HTTP client of the sub-commands.

mod trust;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};

use super::{ConfigArgs, say};
use crate::tls;
use trust::Trust;

/// Where the daemon is.
#[derive(Debug, Clone, Args)]
pub(super) struct ClientArgs {
    /// The daemon's URL [default: where the configuration says it listens]
    #[arg(long, env = "AURORA_BUS_URL", value_name = "URL")]
    url: Option<Url>,
    /// The API key or token to show, where the daemon asks for one
    #[arg(long, env = "AURORA_BUS_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<SecretString>,
    /// The certificates to trust with --url https://…, in PEM [default: the system's]
    #[arg(long, env = "AURORA_BUS_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// The certificate to show, in PEM, where the daemon asks for one
    #[arg(long, env = "AURORA_BUS_CLIENT_CERT_FILE", value_name = "FILE", requires = "client_key_file")]
    client_cert_file: Option<PathBuf>,
    /// The key of that certificate, in PEM
    #[arg(long, env = "AURORA_BUS_CLIENT_KEY_FILE", value_name = "FILE", requires = "client_cert_file")]
    client_key_file: Option<PathBuf>,
}

impl ClientArgs {
    /// A client for the daemon, without proxy and redirects, and the daemon's URL: as given, or where the configuration
    /// says that it listens.
    pub(super) fn connect(&self, config: &ConfigArgs, timeout: Duration) -> anyhow::Result<(Client, Url)> {
        self.connect_with(config, timeout, true)
    }

    fn connect_with(&self, config: &ConfigArgs, timeout: Duration, is_secret: bool) -> anyhow::Result<(Client, Url)> {
        if let Some(url) = &self.url {
            let trust = Trust::Authorities(self.ca_file.as_deref());
            return Ok((self.http(url, trust, timeout)?, url.clone()));
        }
        let http = config.load()?.http;
        let mut listen = http.listen;
        if listen.ip().is_unspecified() {
            let loopback: std::net::IpAddr =
                if listen.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            listen.set_ip(loopback);
        }
        let scheme = if http.tls.is_some() { "https" } else { "http" };
        let url = Url::parse(&format!("{scheme}://{listen}")).context("cannot make a URL of http.listen")?;
        let trust = match &http.tls {
            Some(tls) if is_secret && self.ca_file.is_none() => Trust::Own(&tls.cert_file),
            Some(_) if self.ca_file.is_none() => Trust::Anyone,
            _ => Trust::Authorities(self.ca_file.as_deref()),
        };
        Ok((self.http(&url, trust, timeout)?, url))
    }

    fn http(&self, url: &Url, trust: Trust<'_>, timeout: Duration) -> anyhow::Result<Client> {
        let builder = Client::builder().user_agent(crate::http::CLI_AGENT).no_proxy().redirect(Policy::none());
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.token {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.expose_secret()));
            let mut value = value.map_err(|_error| anyhow!("the token has characters that no token has"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let tls = if url.scheme() == "https" {
            trust::config(trust, self.client_cert_file.as_deref().zip(self.client_key_file.as_deref()))?
        } else {
            tls::trusting_none()
        };
        let builder = builder.default_headers(headers).timeout(timeout).connect_timeout(Duration::from_secs(5));
        builder.tls_backend_preconfigured(tls).build().context("cannot make an HTTP client")
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
        Ok(problem) if status == StatusCode::UNAUTHORIZED => {
            let detail = problem.detail;
            format!("401: {detail}; commands show the key or token of --token or AURORA_BUS_TOKEN")
        }
        Ok(problem) => format!("{}: {}", status.as_u16(), problem.detail),
        Err(_) => status.to_string(),
    }
}

/// `aurora-bus health`
pub(super) async fn health(config: &ConfigArgs, args: &ClientArgs) -> anyhow::Result<()> {
    // Nobody needs credentials for that, and whether a certificate is as it should be is no question of health.
    let args = ClientArgs { token: None, ..args.clone() };
    let (client, base) = args.connect_with(config, Duration::from_secs(3), false)?;
    let url = endpoint(&base, &["health"])?;
    let response = client.get(url.clone()).send().await;
    let response = response.with_context(|| format!("no answer from {url}"))?;
    if !response.status().is_success() {
        bail!("{url} answered {}", refusal(response).await);
    }
    say("healthy")?;
    Ok(())
}
