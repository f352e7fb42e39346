//! Looks at the files again and again, and shows what is new in them: all of it, or nothing.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::http::server::tls::files::{Files, Read};
use crate::http::server::tls::{Shown, Tls, Unusable};
use crate::metrics::Metrics;
use crate::readiness::Part;

/// How often the files are looked at. What is new is tried once two looks have found the same, for a certificate and
/// its key are rarely replaced in one go.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What one look at the files has found.
type Found = Result<Read, Unusable>;

impl Tls {
    /// Keeps what is shown as the files are, until `stop`. What can't be used is told once, and what was shown stays.
    pub async fn watch(self, part: Part, metrics: Metrics, stop: CancellationToken) {
        let mut watch = Watch { tls: self, part, metrics, last: None, failed: None, told: None };
        watch.tell();
        loop {
            let is_asked = tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => false,
                () = watch.tls.inner.look_now.notified() => true,
                () = stop.cancelled() => return,
            };
            watch.look(is_asked).await;
            watch.tell();
        }
    }
}

struct Watch {
    tls: Tls,
    part: Part,
    metrics: Metrics,
    /// What the last look has found.
    last: Option<Found>,
    /// What was tried and can't be used, and why.
    failed: Option<(Found, String)>,
    /// What the log was told of the certificate's validity.
    told: Option<String>,
}

impl Watch {
    async fn look(&mut self, is_asked: bool) {
        let config = self.tls.inner.config.clone();
        let shown = self.tls.shown().files;
        let read = tokio::task::spawn_blocking(move || {
            let files = match Files::read(&config) {
                Ok(files) => files,
                Err(error) => return (Err(error.clone()), Some(Err(error))),
            };
            let found = files.fingerprint();
            (Ok(found), (found != shown).then(|| files.build(&config)))
        });
        let Ok((found, new)) = read.await else { return };
        let is_settled = is_asked || self.last.as_ref() == Some(&found);
        self.last = Some(found.clone());
        let Some(new) = new else {
            self.failed = None;
            return;
        };
        let is_told = self.failed.as_ref().is_some_and(|(failed, _)| *failed == found);
        if is_asked || is_settled && !is_told {
            self.take(found, new);
        }
    }

    fn take(&mut self, found: Found, built: Result<Shown, Unusable>) {
        let is_valid_now = self.tls.shown().validity.is_now();
        let judged = built.and_then(|shown| {
            let is_worse = is_valid_now && !shown.validity.is_now();
            match shown.validity.concern().filter(|_| is_worse) {
                Some(concern) => Err(("cert_file", concern)),
                None => Ok(shown),
            }
        });
        match judged {
            Ok(shown) => {
                tracing::info!(days_left = shown.validity.days_left().floor(), "showing a new certificate from now on");
                *self.tls.inner.shown.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(shown);
                self.failed = None;
                self.metrics.tls_reloads.with_label_values(&["ok"]).inc();
            }
            Err((key, error)) => {
                let reason = format!("http.tls.{key}: {error}");
                tracing::error!(error = reason, "cannot use the new certificate; going on with the one before");
                self.failed = Some((found, reason));
                self.metrics.tls_reloads.with_label_values(&["failed"]).inc();
            }
        }
    }

    /// Tells readiness, metrics and, where it has changed, the log.
    fn tell(&mut self) {
        let validity = self.tls.shown().validity;
        self.metrics.tls_certificate_days.with_label_values::<&str>(&[]).set(validity.days_left());
        let concern = validity.concern();
        if concern != self.told {
            if let Some(concern) = &concern {
                tracing::warn!("{concern}");
            }
            self.told.clone_from(&concern);
        }
        let failed = self
            .failed
            .as_ref()
            .map(|(_, reason)| format!("the new certificate can't be used, the one before is still shown: {reason}"));
        match failed.into_iter().chain(concern).reduce(|all, next| format!("{all}; {next}")) {
            Some(note) => self.part.ready_but(note),
            None => self.part.ready(),
        }
    }
}
