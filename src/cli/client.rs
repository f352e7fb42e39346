//! The HTTP client of the subcommands.

mod trust;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};

use super::{ConfigArgs, print_line};
use crate::tls;
use trust::Trust;

/// The daemon to connect to.
#[derive(Debug, Clone, Args)]
pub(super) struct ClientArgs {
    /// URL of the daemon [default: derived from `http.listen`]
    #[arg(long, env = "AURORA_BUS_URL", value_name = "URL")]
    url: Option<Url>,
    /// API key or token, if the daemon requires credentials
    #[arg(long, env = "AURORA_BUS_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    token: Option<SecretString>,
    /// Trusted certificates for --url https://…, in PEM [default: those of the system]
    #[arg(long, env = "AURORA_BUS_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Client certificate in PEM, if the daemon requires one
    #[arg(long, env = "AURORA_BUS_CLIENT_CERT_FILE", value_name = "FILE", requires = "client_key_file")]
    client_cert_file: Option<PathBuf>,
    /// Private key of the client certificate, in PEM
    #[arg(long, env = "AURORA_BUS_CLIENT_KEY_FILE", value_name = "FILE", requires = "client_cert_file")]
    client_key_file: Option<PathBuf>,
}

impl ClientArgs {
    /// Creates a client for the daemon, without proxy and redirects. Returns it with the URL of the daemon, which is
    /// given or derived from the configuration.
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
        let url = Url::parse(&format!("{scheme}://{listen}")).context("http.listen does not form a URL")?;
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
            let mut value = value.map_err(|_error| anyhow!("the token must consist of visible ASCII characters"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let tls = if url.scheme() == "https" {
            trust::config(trust, self.client_cert_file.as_deref().zip(self.client_key_file.as_deref()))?
        } else {
            tls::trusting_none()
        };
        let builder = builder.default_headers(headers).timeout(timeout).connect_timeout(Duration::from_secs(5));
        builder.tls_backend_preconfigured(tls).build().context("cannot create an HTTP client")
    }
}

/// Returns the URL of an API path.
pub(super) fn endpoint(base: &Url, segments: &[&str]) -> anyhow::Result<Url> {
    let mut url = base.clone();
    match url.path_segments_mut() {
        Ok(mut path) => path.pop_if_empty().extend(segments),
        Err(()) => bail!("{base} is not a base URL: use http://host:port"),
    };
    Ok(url)
}

/// Returns the error of a response, with its detail.
pub(super) async fn error_of(response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct ProblemDetail {
        detail: String,
    }
    let status = response.status();
    let body = response.bytes().await.unwrap_or_default();
    match serde_json::from_slice::<ProblemDetail>(&body) {
        Ok(problem) if status == StatusCode::UNAUTHORIZED => {
            let detail = problem.detail;
            format!("401: {detail}; set a key or token with --token or AURORA_BUS_TOKEN")
        }
        Ok(problem) => format!("{}: {}", status.as_u16(), problem.detail),
        Err(_) => status.to_string(),
    }
}

/// `aurora-bus health`
pub(super) async fn health(config: &ConfigArgs, args: &ClientArgs) -> anyhow::Result<()> {
    // Health needs no credentials, and does not depend on a valid certificate.
    let args = ClientArgs { token: None, ..args.clone() };
    let (client, base) = args.connect_with(config, Duration::from_secs(3), false)?;
    let url = endpoint(&base, &["health"])?;
    let response = client.get(url.clone()).send().await;
    let response = response.with_context(|| format!("no response from {url}"))?;
    if !response.status().is_success() {
        bail!("{url} responded with {}", error_of(response).await);
    }
    print_line("healthy")?;
    Ok(())
}
