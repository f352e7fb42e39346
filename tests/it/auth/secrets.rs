//! Credentials and secrets appear in no log, output or error.

use std::fs;

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::watching::{frame, open, send_frame};
use super::{EVENTS, Keys, SECRET, STREAMS, bearer, issuer_toml, request_as, send_request, token};
use crate::support::app::Home;
use crate::support::redis::free_port;

#[tokio::test]
async fn trace_log_has_no_credentials() {
    let mut keys = Keys::default();
    let key = keys.add("ops", &["admin"], None);
    let home = Home::new(&format!(
        "{STREAMS}\n[log]\nlevel = \"trace,tungstenite::protocol=trace\"\n{}{}",
        keys.toml,
        issuer_toml()
    ));
    let daemon = home.start().await;
    let good = token("ann", &["admin"], None, 600);
    let expired = {
        let token = token("ann", &["admin"], None, 0);
        format!("{token}x")
    };
    for shown in [&key, &good, &expired] {
        let cookie = format!("access_token={shown}");
        for (name, value) in [("authorization", bearer(shown)), ("x-api-key", shown.clone()), ("cookie", cookie)] {
            send_request(&daemon, "GET", EVENTS, &[(name, &value)], "").await;
            send_request(&daemon, "POST", "/api/v1/alerts", &[(name, &value)], "{}").await;
        }
        for target in ["alerts?v=1&token=", "alerts?token="] {
            let opened = open(&daemon, &format!("{target}{shown}"), &[]).await;
            assert_eq!(opened.is_ok(), *shown != expired);
        }
        let offer = format!("aurora.v1, bearer.{shown}");
        if let Ok((mut socket, _)) = open(&daemon, "alerts", &[("sec-websocket-protocol", &offer)]).await {
            assert_eq!(frame(&mut socket).await["t"], "welcome");
            send_frame(&mut socket, json!({"op": "auth", "id": 1, "token": shown})).await;
            assert_eq!(frame(&mut socket).await["t"], "ok");
        }
        let page = [("sec-websocket-protocol", offer.as_str()), ("origin", "http://127.0.0.1")];
        let (mut socket, _) = open(&daemon, "alerts", &page).await.expect("accepted for the close code");
        drop(socket.next().await);
        send_request(&daemon, "GET", &format!("/api/v1/feeds/alerts?token={shown}"), &[], "").await;
    }
    let (_, body) = request_as(&daemon, &key, "POST", "/api/v1/ws/ticket", "").await;
    let ticket = body["ticket"].as_str().expect("a ticket").to_owned();
    let feed = format!("/api/v1/feeds/alerts?ticket={ticket}");
    assert_eq!(send_request(&daemon, "GET", &feed, &[], "").await.status(), StatusCode::OK);
    assert_eq!(send_request(&daemon, "GET", &feed, &[], "").await.status(), StatusCode::UNAUTHORIZED);
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert!(ended.log.contains("request completed"), "the log has trace level");
    let signature = |token: &str| token.rsplit('.').next().expect("a part").to_owned();
    for secret in [&*key, &*good, &*expired, &*signature(&good), &*ticket, SECRET] {
        let leak = ended.log.lines().find(|line| line.contains(secret));
        assert_eq!(leak, None, "{secret} is in the log");
    }
}

#[test]
fn api_keys_are_compared_in_constant_time() {
    let source = |file: &str| {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/auth").join(file);
        fs::read_to_string(path).expect("the source")
    };
    let keys = source("keys.rs");
    let (_, rest) = keys.split_once("fn find(").expect("the search for a key");
    let (find, _) = rest.split_once("\n    }\n}").expect("its end");
    assert!(find.contains(".hash.is(&hash)") && !find.contains("=="), "{find}");
    let key_hash = source("key_hash.rs");
    let (_, rest) = key_hash.split_once("fn is(").expect("the comparison of hashes");
    assert!(rest.lines().nth(1).expect("a line").contains("verify_slices_are_equal"));
}

#[test]
fn config_command_masks_secrets() {
    let home = Home::new(&format!("{STREAMS}\n{}", issuer_toml()));
    let config = home.path("aurora-bus.toml");
    let output = home.run(&["config", "--config", config.to_str().expect("UTF-8")]);
    let printed = String::from_utf8(output.stdout).expect("text");
    assert!(printed.contains("[[auth.issuers]]") && printed.contains("secret = \"********\""), "{printed}");
    assert!(!printed.contains(SECRET));
}

#[test]
fn every_config_problem_is_reported_without_secrets() {
    let secret_file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(secret_file.path(), "tooshort").expect("written");
    let toml = format!(
        "{STREAMS}\n[auth]\nmode = \"none\"\n[[auth.keys]]\nname = \"a b\"\nhash = \"sha256:{}\"\nscopes = []\n\
         [[auth.issuers]]\nissuer = \"i\"\naudience = \"a\"\nalgorithms = [\"RS256\"]\nsecret = \"{SECRET}\"\n",
        "0".repeat(64)
    );
    let home = Home::new(&toml);
    let config = home.path("aurora-bus.toml");
    let output = home.run(&["check", "--config", config.to_str().expect("UTF-8")]);
    let printed = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(2), "{printed}");
    for path in ["auth.mode: ", "auth.keys[0].name: ", "auth.keys[0].scopes: ", "auth.issuers[0].algorithms: "] {
        assert!(printed.contains(path), "{path} is not in {printed}");
    }
    assert!(!printed.contains(SECRET), "{printed}");

    let issuers = format!(
        "[[auth.issuers]]\nissuer = \"i\"\naudience = \"a\"\nalgorithms = [\"HS256\"]\nsecret_file = {:?}\n\
         [[auth.issuers]]\nissuer = \"j\"\naudience = \"a\"\nalgorithms = [\"RS256\"]\npublic_key_file = \"nowhere.pem\"\n",
        secret_file.path()
    );
    let home = Home::new(&format!("{STREAMS}\n{issuers}"));
    let config = home.path("aurora-bus.toml");
    for arguments in [&["check"][..], &["check", "--connect"], &["serve"]] {
        let arguments = [arguments, &["--config", config.to_str().expect("UTF-8")]].concat();
        let output = home.run(&arguments);
        let printed = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(2), "{printed}");
        for path in ["auth.issuers[0].secret_file: ", "auth.issuers[1].public_key_file: cannot read nowhere.pem"] {
            assert!(printed.contains(path), "{path} is not in {printed}");
        }
        assert!(!printed.contains("tooshort"), "{printed}");
    }
}

#[tokio::test]
async fn public_listen_address_needs_credentials_or_mode_none() {
    let listen = format!("0.0.0.0:{}", free_port());
    let mut keys = Keys::default();
    keys.add("ops", &["admin"], None);
    for (toml, is_valid) in [("", false), ("[auth]\nmode = \"none\"", true), (keys.toml.as_str(), true)] {
        let home = Home::new(&format!("{STREAMS}\n{toml}"));
        let config = home.path("aurora-bus.toml");
        let output = home.run(&["check", "--config", config.to_str().expect("UTF-8"), "--listen", &listen]);
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), is_valid, "{toml}: {printed}");
        assert_eq!(printed.contains("http.listen: "), !is_valid, "{printed}");
    }
}

#[tokio::test]
async fn cli_makes_keys_and_tokens_and_uses_them() {
    let home = Home::new(STREAMS);
    let made = home.run(&[
        "token",
        "key",
        "--name",
        "ops",
        "--scope",
        "read:*",
        "--scope",
        "publish:*",
        "--expires-in",
        "90d",
    ]);
    let printed = String::from_utf8(made.stdout).expect("text");
    let (key, declared) = printed.split_once('\n').expect("a key and its declaration");
    assert!(key.starts_with("ab_") && !declared.contains(key), "{printed}");
    for (arguments, flag) in
        [(["--name", "a b", "--scope", "admin"], "--name"), (["--name", "a", "--scope", "root"], "--scope")]
    {
        let refused = home.run(&[&["token", "key"][..], &arguments].concat());
        let printed = String::from_utf8(refused.stderr).expect("text");
        assert!(!refused.status.success() && printed.contains(flag), "{printed}");
    }

    let home = Home::new(&format!("{STREAMS}\n{declared}\n{}", issuer_toml()));
    let daemon = home.start().await;
    let config = home.path("aurora-bus.toml");
    let config = config.to_str().expect("UTF-8");
    let made =
        home.run(&["token", "jwt", "--config", config, "--subject", "ann", "--scope", "read:*", "--tenant", "acme"]);
    let token = String::from_utf8(made.stdout).expect("text").trim().to_owned();
    let url = daemon.url("");
    let event = home.path("event.json");
    fs::write(&event, "{\"n\":1}\n").expect("written");
    let publish = ["publish", "aurora:alerts", event.to_str().expect("UTF-8"), "--url", &url];
    let refused = home.run(&publish);
    assert!(!refused.status.success(), "without a key");
    let printed = String::from_utf8(refused.stderr).expect("text");
    assert!(
        printed.contains("credentials are required") && printed.contains("--token or AURORA_BUS_TOKEN"),
        "{printed}"
    );
    let published = home.run(&[&publish[..], &["--token", key]].concat());
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    let tail = |token: &str| {
        let tail =
            ["tail", "aurora:alerts", "--since", "earliest", "--no-follow", "--data", "--url", &url, "--token", token];
        let output = home.run(&tail);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(tail(key), "{\"n\":1}\n");
    assert_eq!(tail(&token), "", "another tenant's");
    let (_, body) = request_as(&daemon, &token, "GET", EVENTS, "").await;
    assert_eq!(body["events"], Value::Array(Vec::new()));
    daemon.stop().await;
}
