//! Tokens of an issuer that publishes its keys as a JWK set.

use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use reqwest::StatusCode;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::{EVENTS, STREAMS, request_as};
use crate::support::app::{BOUND, Home};
use crate::support::receiver::{Receiver, Reply};
use crate::support::until;

/// A key pair of an issuer, with its key id.
struct Pair {
    kid: &'static str,
    private: EncodingKey,
}

impl Pair {
    fn new(kid: &'static str) -> Self {
        let pair = aws_lc_rs::signature::Ed25519KeyPair::generate().expect("a key");
        let der = pair.to_pkcs8v1().expect("a key");
        Self { kid, private: EncodingKey::from_ed_der(der.as_ref()) }
    }

    fn jwk(&self) -> Jwk {
        let mut jwk = Jwk::from_encoding_key(&self.private, Algorithm::EdDSA).expect("a key");
        jwk.common.key_id = Some(self.kid.to_owned());
        jwk
    }

    fn token(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let claims = json!({"iss": "far", "aud": "bus", "sub": "ann", "exp": now + 600, "scope": "read:*"});
        let header = Header { kid: Some(self.kid.to_owned()), ..Header::new(Algorithm::EdDSA) };
        encode(&header, &claims, &self.private).expect("a token")
    }
}

fn set(pairs: &[&Pair]) -> String {
    json!({"keys": pairs.iter().map(|pair| pair.jwk()).collect::<Vec<_>>()}).to_string()
}

fn home(url: &str, floor: &str) -> Home {
    let issuer = format!(
        "[[auth.issuers]]\nissuer = \"far\"\naudience = \"bus\"\nalgorithms = [\"EdDSA\"]\njwks_url = \"{url}\"\n\
         refresh_floor = \"{floor}\"\n"
    );
    Home::new(&format!("{STREAMS}\n{issuer}"))
}

#[tokio::test]
async fn changed_issuer_keys_are_used_without_a_restart() {
    let (one, two) = (Pair::new("one"), Pair::new("two"));
    let published = Arc::new(Mutex::new(set(&[&one])));
    let shown = published.clone();
    let server = Receiver::start(move |_| {
        let body = shown.lock().expect("not poisoned").clone();
        Reply::With(200, ("content-type", "application/json".to_owned()), body)
    })
    .await;
    let home = home(&server.url("/jwks"), "200ms");
    let daemon = home.start().await;
    assert_eq!(request_as(&daemon, &one.token(), "GET", EVENTS, "").await.0, StatusCode::OK);
    for _ in 0..20 {
        assert_eq!(request_as(&daemon, &one.token(), "GET", EVENTS, "").await.0, StatusCode::OK);
    }
    assert_eq!(server.received().len(), 1, "the keys are cached");
    assert_eq!(request_as(&daemon, &two.token(), "GET", EVENTS, "").await.0, StatusCode::UNAUTHORIZED);

    *published.lock().expect("not poisoned") = set(&[&one, &two]);
    until("accepted token of the new key", BOUND, async || {
        (request_as(&daemon, &two.token(), "GET", EVENTS, "").await.0 == StatusCode::OK).then_some(())
    })
    .await;
    assert_eq!(request_as(&daemon, &one.token(), "GET", EVENTS, "").await.0, StatusCode::OK, "both keys are valid");

    *published.lock().expect("not poisoned") = set(&[&two]);
    let unknown = Pair::new("three");
    until("a refresh without the old key", BOUND, async || {
        request_as(&daemon, &unknown.token(), "GET", EVENTS, "").await;
        (request_as(&daemon, &one.token(), "GET", EVENTS, "").await.0 == StatusCode::UNAUTHORIZED).then_some(())
    })
    .await;
    assert_eq!(request_as(&daemon, &two.token(), "GET", EVENTS, "").await.0, StatusCode::OK);

    let before = server.received().len();
    let began = std::time::Instant::now();
    for _ in 0..50 {
        request_as(&daemon, &unknown.token(), "GET", EVENTS, "").await;
    }
    let most = began.elapsed().as_millis() / 200 + 2;
    let fetches = server.received().len() - before;
    assert!(fetches as u128 <= most, "unknown keys caused {fetches} fetches in {:?}", began.elapsed());
    daemon.stop().await;
}

#[tokio::test]
async fn issuer_failure_blocks_tokens_only_until_it_recovers() {
    let pair = Pair::new("one");
    let mut server = Receiver::start({
        let body = set(&[&pair]);
        let responses =
            Mutex::new(vec![Reply::Endless(200), Reply::Status(500), Reply::With(200, ("x", "y".into()), "{}".into())]);
        move |_| {
            let first = responses.lock().expect("not poisoned").pop();
            first.unwrap_or_else(|| Reply::With(200, ("content-type", "application/json".to_owned()), body.clone()))
        }
    })
    .await;
    let home = home(&server.url("/jwks"), "200ms");
    server.go_down().await;
    let daemon = home.start().await;
    let (status, problem) = request_as(&daemon, &pair.token(), "GET", EVENTS, "").await;
    assert_eq!((status, &problem["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("auth_unavailable")));
    server.come_up().await;
    until("accepted token", BOUND, async || {
        (request_as(&daemon, &pair.token(), "GET", EVENTS, "").await.0 == StatusCode::OK).then_some(())
    })
    .await;
    assert_eq!(server.received().len(), 4, "three bad responses before the good one");
    server.go_down().await;
    assert_eq!(request_as(&daemon, &Pair::new("two").token(), "GET", EVENTS, "").await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(request_as(&daemon, &pair.token(), "GET", EVENTS, "").await.0, StatusCode::OK, "known keys stay");
    daemon.stop().await;
}

#[tokio::test]
async fn cancelled_requests_do_not_multiply_key_set_fetches() {
    let server = Receiver::start(|_| Reply::Silence).await;
    let home = home(&server.url("/jwks"), "1m");
    let daemon = home.start().await;
    let token = Pair::new("one").token();
    let address = daemon.url("").replacen("http://", "", 1);
    let mut gone = TcpStream::connect(address).await.expect("a connection");
    let head = format!("GET {EVENTS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\r\n");
    gone.write_all(head.as_bytes()).await.expect("sent");
    until("a fetch from the issuer", BOUND, async || (server.received().len() == 1).then_some(())).await;
    drop(gone);
    let open = async || daemon.metric("aurora_bus_http_connections").await;
    until("end of the connection", BOUND, async || (open().await == 1).then_some(())).await;
    let (status, _) = request_as(&daemon, &token, "GET", EVENTS, "").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.received().len(), 1, "the attempt in progress counts");
    daemon.stop().await;
}
