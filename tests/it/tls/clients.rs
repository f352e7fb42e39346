//! Clients that use TLS correctly, and TLS configurations.

use std::process::{Command, Stdio};

use reqwest::StatusCode;

use super::{STREAMS, address, curl, home, next_text, text, watch};
use crate::support::app::{BOUND, Home};
use crate::support::{install, until};

#[tokio::test]
async fn curl_openssl_and_web_sockets_connect_over_tls() {
    let (home, authority) = home("");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let mut socket = watch(&daemon, &ca).await;
    let published =
        curl(&ca, &[&daemon.url("/api/v1/alerts"), "-d", r#"{"n":1}"#, "-w", "%{http_code} %{http_version}"]);
    let printed = text(&published.stdout);
    assert!(published.status.success() && printed.ends_with("201 1.1"), "{printed}{}", text(&published.stderr));
    assert_eq!(next_text(&mut socket).await, r#"{"n":1}"#);

    let stranger = curl(std::path::Path::new("/dev/null"), &[&daemon.url("/health")]);
    assert!(!stranger.status.success(), "a client without the authority does not trust the daemon");

    let ask = |arguments: &[&str]| {
        let output = Command::new(install::program("openssl", "openssl"))
            .args(["s_client", "-connect", &address(&daemon), "-CAfile", ca.to_str().expect("UTF-8")])
            .args(arguments)
            .stdin(Stdio::null())
            .output();
        let output = output.expect("openssl runs");
        text(&output.stdout) + &text(&output.stderr)
    };
    let printed = ask(&["-alpn", "h2,http/1.1"]);
    for words in ["TLSv1.3", "ALPN protocol: http/1.1", "Verify return code: 0 (ok)"] {
        assert!(printed.contains(words), "{words} is not in {printed}");
    }
    assert!(ask(&["-tls1_2"]).contains("Protocol  : TLSv1.2"));
    assert!(ask(&["-alpn", "h2"]).contains("no application protocol"), "HTTP/2 is not supported");
    assert!(ask(&["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]).contains("Cipher is (NONE)"), "TLS 1.1 is not supported");
    assert!(daemon.metric("aurora_bus_http_tls_handshakes_total").await >= 5);
    daemon.stop().await;
}

#[tokio::test]
async fn min_version_1_3_rejects_tls_1_2() {
    let (home, authority) = home("min_version = \"1.3\"");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    assert!(!curl(&ca, &["--tls-max", "1.2", &daemon.url("/health")]).status.success());
    assert!(curl(&ca, &["--tls-max", "1.3", &daemon.url("/health")]).status.success());
    daemon.stop().await;
}

#[tokio::test]
async fn cli_connects_over_tls_by_url_and_by_configuration() {
    let (mut home, authority) = home("");
    let daemon = home.start().await;
    let url = daemon.url("");
    let config = home.path("aurora-bus.toml");
    let config = config.to_str().expect("UTF-8");
    let event = home.path("event.json");
    std::fs::write(&event, "{\"n\":1}\n").expect("written");
    let event = event.to_str().expect("UTF-8");
    let run = |home: &Home, arguments: &[&str], is_success: bool| {
        let output = home.run(arguments);
        let printed = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.success(), is_success, "{arguments:?}: {printed}");
        printed
    };
    let ca = authority.path("ca.pem");
    let ca = ca.to_str().expect("UTF-8");
    let publish = ["publish", "aurora:alerts", event, "--url", &url];
    run(&home, &publish, false);
    run(&home, &[&publish[..], &["--ca-file", ca]].concat(), true);
    let printed = run(&home, &["publish", "aurora:alerts", event, "--url", &url, "--ca-file", event], false);
    assert!(printed.contains("--ca-file: ") && printed.contains("holds no usable certificate"), "{printed}");
    let tail = ["tail", "aurora:alerts", "--since", "earliest", "--no-follow", "--data"];
    assert_eq!(run(&home, &[&tail[..], &["--url", &url, "--ca-file", ca]].concat(), true), "{\"n\":1}\n");

    // The configuration has the listen address and the certificate.
    home.set_env("AURORA_BUS__HTTP__LISTEN", &address(&daemon));
    assert_eq!(run(&home, &[&tail[..], &["--config", config]].concat(), true), "{\"n\":1}\n");
    assert_eq!(run(&home, &["health", "--config", config], true), "healthy\n");
    // Another server on the port gets no credentials, only the health check.
    let (cert, old) = (authority.path("server.pem"), authority.path("server.pem.old"));
    std::fs::copy(&cert, &old).expect("a copy");
    authority.issue("other", 30);
    std::fs::copy(authority.path("other.pem"), &cert).expect("a copy");
    run(&home, &[&tail[..], &["--config", config, "--token", "x"]].concat(), false);
    assert_eq!(run(&home, &["health", "--config", config, "--token", "x"], true), "healthy\n");
    std::fs::copy(&old, &cert).expect("a copy");
    daemon.ready(StatusCode::OK).await;
    daemon.stop().await;
}

#[tokio::test]
async fn required_client_certificate_rejects_clients_without_one() {
    let required = "client_ca_file = \"ca.pem\"\nclient_certificates = \"required\"";
    let (mut home, authority) = home(required);
    authority.issue("client", 30);
    let strangers = home.path("strangers");
    std::fs::create_dir(&strangers).expect("a folder");
    let strangers = super::Authority::new(&strangers);
    strangers.issue("client", 30);
    let daemon = home.spawn().await.expect("it listens");
    let ca = authority.path("ca.pem");
    let connects = |authority: &super::Authority| {
        let file = |name: &str| authority.path(name).to_str().expect("UTF-8").to_owned();
        let arguments = ["--cert", &file("client.pem"), "--key", &file("client.key"), &daemon.url("/health")];
        curl(&ca, &arguments).status.success()
    };
    assert!(!curl(&ca, &[&daemon.url("/health")]).status.success(), "no certificate");
    assert!(!connects(&strangers), "a certificate of an unknown authority");
    assert!(connects(&authority));
    home.set_env("AURORA_BUS__HTTP__LISTEN", &address(&daemon));
    let config = home.path("aurora-bus.toml");
    let health = ["health", "--config", config.to_str().expect("UTF-8")];
    assert!(!home.run(&health).status.success());
    home.set_env("AURORA_BUS_CLIENT_CERT_FILE", "client.pem");
    home.set_env("AURORA_BUS_CLIENT_KEY_FILE", "client.key");
    let output = home.run(&health);
    assert!(output.status.success(), "{}", text(&output.stderr));
    daemon.stop().await;
}

#[tokio::test]
async fn optional_client_certificate_must_be_valid_if_presented() {
    let (home, authority) = home("client_ca_file = \"ca.pem\"\nclient_certificates = \"optional\"");
    authority.issue("expired", -1);
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    assert!(curl(&ca, &[&daemon.url("/health")]).status.success());
    let file = |name: &str| authority.path(name).to_str().expect("UTF-8").to_owned();
    let expired = ["--cert", &file("expired.pem"), "--key", &file("expired.key"), &daemon.url("/health")];
    assert!(!curl(&ca, &expired).status.success());
    daemon.stop().await;
}

#[tokio::test]
async fn mismatched_tls_files_fail_check_and_serve() {
    let cases: [(&str, &str, &str); 5] = [
        ("", "openssl ecparam -name prime256v1 -genkey -noout -out server.key", "http.tls.key_file: is not the key"),
        ("", "rm server.pem", "http.tls.cert_file: cannot read server.pem"),
        ("", "echo nothing > server.pem", "http.tls.cert_file: server.pem holds no usable certificate"),
        (
            "",
            "openssl pkcs8 -topk8 -in server.key -out k -passout pass:x; mv k server.key",
            "http.tls.key_file: server.key must contain a private key in PEM: it is encrypted",
        ),
        (
            "client_ca_file = \"server.key\"\nclient_certificates = \"required\"",
            "true",
            "http.tls.client_ca_file: server.key holds no usable certificate",
        ),
    ];
    for (more, script, expected) in cases {
        let (home, authority) = home(more);
        authority.run(script);
        for command in ["check", "serve"] {
            let output = home.run(&[command, "--config", "aurora-bus.toml"]);
            let printed = text(&output.stderr);
            assert!(output.status.code() == Some(2) && printed.contains(expected), "{command}, {script}: {printed}");
        }
    }
    let (home, authority) = home("");
    let printed = text(&home.run(&["check", "--config", "aurora-bus.toml"]).stdout);
    assert!(printed.contains("certificate: fits its key, good for 29 days"), "{printed}");
    authority.issue("server", -1);
    let output = home.run(&["check", "--config", "aurora-bus.toml"]);
    assert!(!output.status.success() && text(&output.stderr).contains("has expired"), "{}", text(&output.stderr));

    let keys = "[http.tls]\ncert_file = \"a\"\nkey_file = \"b\"\nclient_ca_file = \"c\"\nmax_handshakes_per_address = 0\n\
                handshake_timeout = \"1ms\"\n";
    let output = Home::new(&format!("{STREAMS}\n{keys}")).run(&["check", "--config", "aurora-bus.toml"]);
    let printed = text(&output.stderr);
    for key in ["client_ca_file: requires", "max_handshakes_per_address: must", "handshake_timeout: must"] {
        assert!(printed.contains(&format!("http.tls.{key}")), "{key} is not in {printed}");
    }
}

#[tokio::test]
async fn trace_log_has_no_keys_and_no_client_credentials() {
    let token = "ab_not-a-key-but-shown-as-one";
    let required = "client_ca_file = \"ca.pem\"\nclient_certificates = \"optional\"\n[log]\nlevel = \"trace\"";
    let (home, authority) = home(required);
    authority.issue("client", 30);
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let file = |name: &str| authority.path(name).to_str().expect("UTF-8").to_owned();
    let (cert, key) = (file("client.pem"), file("client.key"));
    let header = format!("Authorization: Bearer {token}");
    let url = daemon.url("/api/v1/alerts");
    assert!(curl(&ca, &["--cert", &cert, "--key", &key, "-H", &header, &url, "-d", r#"{"n":1}"#]).status.success());
    assert!(!curl(std::path::Path::new("/dev/null"), &[&url, "-H", &header]).status.success());
    authority.run("cp client.pem server.pem; cp client.pem server.key");
    daemon.signal("HUP");
    let failed = async || (daemon.metric("aurora_bus_http_tls_reloads_total").await > 0).then_some(());
    until("a reload of the files", BOUND, failed).await;
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert!(ended.log.contains("request completed"), "the log has trace level");
    let keys = ["server.key", "client.key"].map(|name| std::fs::read_to_string(authority.path(name)).expect("a key"));
    let lines = keys.iter().flat_map(|key| key.lines()).filter(|line| !line.starts_with("-----"));
    for secret in lines.chain([token]) {
        let leak = ended.log.lines().find(|line| line.contains(secret));
        assert_eq!(leak, None, "{secret} is in the log");
    }
}
