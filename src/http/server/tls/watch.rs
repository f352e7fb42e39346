//! The watcher of the TLS files: polls them, and serves a changed certificate if all files are valid.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::http::server::tls::files::{FileFingerprint, TlsFiles};
use crate::http::server::tls::{ServedCertificate, Tls, TlsError};
use crate::metrics::Metrics;
use crate::readiness::Part;

/// The interval between polls. A change is used after two equal polls, because a certificate and its key are rarely
/// replaced at the same moment.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// The result of one poll.
type PollResult = Result<FileFingerprint, TlsError>;

impl Tls {
    /// Serves the certificate in the files until `stop`. If they are invalid, the previous one stays.
    pub async fn watch(self, part: Part, metrics: Metrics, stop: CancellationToken) {
        let mut watcher = FileWatcher { tls: self, part, metrics, last: None, failed: None, logged_warning: None };
        watcher.report();
        loop {
            let is_requested = tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => false,
                () = watcher.tls.inner.reload.notified() => true,
                () = stop.cancelled() => return,
            };
            watcher.poll(is_requested).await;
            watcher.report();
        }
    }
}

struct FileWatcher {
    tls: Tls,
    part: Part,
    metrics: Metrics,
    last: Option<PollResult>,
    /// The last change that could not be used, with the reason.
    failed: Option<(PollResult, String)>,
    /// The last warning in the log.
    logged_warning: Option<String>,
}

impl FileWatcher {
    async fn poll(&mut self, is_requested: bool) {
        let config = self.tls.inner.config.clone();
        let served = self.tls.served().fingerprint;
        let read = tokio::task::spawn_blocking(move || {
            let files = match TlsFiles::read(&config) {
                Ok(files) => files,
                Err(error) => return (Err(error.clone()), Some(Err(error))),
            };
            let fingerprint = files.fingerprint();
            (Ok(fingerprint), (fingerprint != served).then(|| files.build(&config)))
        });
        let Ok((polled, changed)) = read.await else { return };
        let is_stable = is_requested || self.last.as_ref() == Some(&polled);
        self.last = Some(polled.clone());
        let Some(changed) = changed else {
            self.failed = None;
            return;
        };
        let has_failed_before = self.failed.as_ref().is_some_and(|(failed, _)| *failed == polled);
        if is_requested || is_stable && !has_failed_before {
            self.replace(polled, changed);
        }
    }

    fn replace(&mut self, polled: PollResult, built: Result<ServedCertificate, TlsError>) {
        let is_current_valid = self.tls.served().validity.is_valid_now();
        let checked = built.and_then(|new| {
            let is_worse = is_current_valid && !new.validity.is_valid_now();
            match new.validity.warning().filter(|_| is_worse) {
                Some(warning) => Err(("cert_file", warning)),
                None => Ok(new),
            }
        });
        match checked {
            Ok(new) => {
                tracing::info!(days_left = new.validity.days_left().floor(), "certificate replaced");
                *self.tls.inner.served.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
                self.failed = None;
                self.metrics.tls_reloads.with_label_values(&["ok"]).inc();
            }
            Err((key, error)) => {
                let reason = format!("http.tls.{key}: {error}");
                tracing::error!(error = reason, "new certificate not usable, serving the previous one");
                self.failed = Some((polled, reason));
                self.metrics.tls_reloads.with_label_values(&["failed"]).inc();
            }
        }
    }

    /// Updates readiness and metrics, and logs a new warning.
    fn report(&mut self) {
        let validity = self.tls.served().validity;
        self.metrics.tls_certificate_days.with_label_values::<&str>(&[]).set(validity.days_left());
        let warning = validity.warning();
        if warning != self.logged_warning {
            if let Some(warning) = &warning {
                tracing::warn!("{warning}");
            }
            self.logged_warning.clone_from(&warning);
        }
        let failed = self.failed.as_ref();
        let failed =
            failed.map(|(_, reason)| format!("the new certificate is not usable, serving the previous one: {reason}"));
        match failed.into_iter().chain(warning).reduce(|all, next| format!("{all}; {next}")) {
            Some(note) => self.part.ready_but(note),
            None => self.part.ready(),
        }
    }
}
