//! `aurora-bus serve`: runs the daemon as a process, with logs, signals and hints for a first try.

use std::io::IsTerminal as _;
use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::print_line;
use crate::app::App;
use crate::config::Config;
use crate::telemetry;

pub(super) async fn run(config: Config) -> anyhow::Result<()> {
    telemetry::init(&config.log)?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut reload = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    let app = Box::pin(App::build(config.clone())).await?;
    if std::io::stdout().is_terminal() {
        print_line(&hints(&config, app.address()))?;
    }
    let tls = app.tls();
    let stop = CancellationToken::new();
    let running = app.run(stop.clone());
    tokio::pin!(running);
    loop {
        tokio::select! {
            result = &mut running => return result,
            _ = reload.recv() => if let Some(tls) = &tls {
                tls.reload();
            } else {
                tracing::info!(signal = "SIGHUP", "nothing to reload, TLS is not configured");
            },
            name = either(&mut terminate, &mut interrupt) => {
                tracing::info!(signal = name, "stopping in order, a second signal ends at once");
                break;
            }
        }
    }
    stop.cancel();
    tokio::select! {
        result = &mut running => result,
        name = either(&mut terminate, &mut interrupt) => {
            anyhow::bail!("ended by a second signal ({name}): unfinished entries will be delivered again")
        }
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// Returns commands that a new user can try in another terminal.
fn hints(config: &Config, address: SocketAddr) -> String {
    let store = match config.store.backend {
        crate::config::Backend::Embedded => format!("embedded store in {}", config.store.embedded.path.display()),
        crate::config::Backend::Redis => "Redis".to_owned(),
    };
    let (s, ca) = if config.http.tls.is_some() { ("s", "--cacert ca.pem ") } else { ("", "") };
    let page = if config.http.pages { format!("http{s}://{address}/client/ in a browser, or ") } else { String::new() };
    format!(
        r#"
aurora-bus {version}: {streams} streams on the {store}. Try in another terminal:

  publish    curl {ca}http{s}://{address}/api/v1/alerts -d '{{"severity":"high","source":"zeek","title":"Beacon to a rare domain"}}'
  watch      {page}ws{s}://{address}/api/v1/ws/alerts
  streams    curl {ca}http{s}://{address}/api/v1/streams
  ready      curl {ca}http{s}://{address}/ready
  metrics    curl {ca}http{s}://{address}/metrics
"#,
        version = env!("CARGO_PKG_VERSION"),
        streams = config.streams.len(),
    )
}
