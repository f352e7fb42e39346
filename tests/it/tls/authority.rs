//! Certificates of a test authority, made by `openssl`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::install;

/// An authority with its files in a folder: `ca.pem`, and a `.pem` and a `.key` for each issued certificate.
pub(super) struct Authority {
    folder: PathBuf,
}

impl Authority {
    pub(super) fn new(folder: &Path) -> Self {
        let authority = Self { folder: folder.to_owned() };
        authority.run(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj '/CN=test authority' \
             -keyout ca.key -out ca.pem",
        );
        authority
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Issues a certificate for this machine with its key, valid for `days`. It has expired if that is negative.
    pub(super) fn issue(&self, name: &str, days: i32) {
        let script = format!(
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} \
                 -keyout {name}.new.key -out {name}.csr
             printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\\nbasicConstraints=critical,CA:FALSE\\n' > {name}.ext
             openssl x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days {days} \
                 -extfile {name}.ext -out {name}.new.pem
             mv {name}.new.key {name}.key; mv {name}.new.pem {name}.pem"
        );
        self.run(&script);
    }

    /// Runs a script in the folder.
    pub(super) fn run(&self, script: &str) {
        install::program("openssl", "openssl");
        let output = Command::new("sh").args(["-ec", script]).current_dir(&self.folder).output().expect("sh runs");
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Replaces the files of `to` by those of `from`.
    pub(super) fn replace(&self, to: &str, from: &str) {
        for ending in ["key", "pem"] {
            fs::copy(self.path(&format!("{from}.{ending}")), self.path(&format!("{to}.{ending}"))).expect("a copy");
        }
    }
}
