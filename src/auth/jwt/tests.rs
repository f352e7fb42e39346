//! Valid tokens, and every way in which a token can be invalid.

use std::io::Write as _;
use std::path::Path;

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;

use crate::auth::jwt::*;
use crate::auth::scope::Action::{Administer, Publish, Read, Watch};
use crate::event::Attribute;

const SECRET: &str = "this secret is known to two parties";

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs()
}

fn issuer(name: &str, algorithms: &str, key: &str) -> IssuerConfig {
    toml::from_str(&format!("issuer = \"{name}\"\naudience = \"bus\"\nalgorithms = [{algorithms}]\n{key}"))
        .expect("TOML")
}

fn shared() -> IssuerConfig {
    issuer("shared", "\"HS256\"", &format!("secret = \"{SECRET}\""))
}

fn open(configs: &[IssuerConfig]) -> Issuers {
    Issuers::open(configs).unwrap_or_else(|problems| panic!("{problems:?}"))
}

fn claims() -> Value {
    json!({"iss": "shared", "aud": "bus", "sub": "ann", "exp": now() + 600, "scope": "ws:alerts openid read:*"})
}

fn with(member: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[member] = value;
    claims
}

fn without(member: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().expect("an object").remove(member);
    claims
}

fn signed(header: &Header, claims: &Value, secret: &[u8]) -> String {
    encode(header, claims, &EncodingKey::from_secret(secret)).expect("a token")
}

fn by_secret(claims: &Value) -> String {
    signed(&Header::new(Algorithm::HS256), claims, SECRET.as_bytes())
}

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

async fn outcome(issuers: &Issuers, token: &str) -> Result<String, AuthError> {
    issuers.verify(token).await.map(|principal| principal.id().expect("an id").to_owned())
}

#[tokio::test]
async fn valid_token_yields_its_principal_and_scopes() {
    let issuers = open(&[shared()]);
    let mut good = claims();
    good["scopes"] = json!(["publish:aurora:alerts", 17, "nonsense"]);
    good["aud"] = json!(["other", "bus"]);
    good["tenant"] = json!("acme");
    good["nbf"] = json!(now());
    let principal = issuers.verify(&by_secret(&good)).await.expect("a valid token");
    assert_eq!((principal.id(), principal.tenant()), (Some("shared#ann"), Some("acme")));
    let may = [Watch("alerts"), Read("x"), Publish("aurora:alerts"), Publish("x"), Watch("other"), Administer];
    assert_eq!(may.map(|action| principal.may(action)), [true, true, true, false, false, false]);
    let left = principal.expires_at().expect("an expiry").duration_since(SystemTime::now()).expect("later");
    assert!((590..=600).contains(&left.as_secs()), "{left:?}");
}

#[tokio::test]
async fn invalid_token_is_rejected_with_its_reason() {
    let issuers = open(&[shared()]);
    let unsigned = |alg: &str| format!("{}.{}.", part(&json!({"alg": alg, "typ": "JWT"})), part(&claims()));
    let critical = Header { crit: Some(vec!["b64".to_owned()]), ..Header::new(Algorithm::HS256) };
    let good = by_secret(&claims());
    let (front, _) = good.rsplit_once('.').expect("three parts");
    let cases = [
        (by_secret(&with("exp", json!(now() - 61))), AuthError::Expired),
        (by_secret(&with("exp", json!("soon"))), AuthError::Claim("exp")),
        (by_secret(&without("exp")), AuthError::Claim("exp")),
        (by_secret(&with("nbf", json!(now() + 90))), AuthError::NotYet),
        (by_secret(&with("nbf", json!("now"))), AuthError::Claim("nbf")),
        (by_secret(&with("aud", json!("other"))), AuthError::Audience),
        (by_secret(&with("aud", json!([]))), AuthError::Audience),
        (by_secret(&without("aud")), AuthError::Claim("aud")),
        (by_secret(&with("iss", json!("other"))), AuthError::UnknownIssuer),
        (by_secret(&with("iss", json!(["shared"]))), AuthError::Malformed),
        (by_secret(&without("iss")), AuthError::Malformed),
        (by_secret(&without("sub")), AuthError::Claim("sub")),
        (by_secret(&with("sub", json!(""))), AuthError::Claim("sub")),
        (by_secret(&with("sub", json!("a\nb"))), AuthError::Claim("sub")),
        (by_secret(&with("tenant", json!(7))), AuthError::Tenant),
        (by_secret(&with("tenant", json!(""))), AuthError::Tenant),
        (by_secret(&with("tenant", json!(["a", "b"]))), AuthError::Tenant),
        (
            signed(&Header::new(Algorithm::HS256), &claims(), b"another secret that is long enough"),
            AuthError::Signature,
        ),
        (signed(&Header::new(Algorithm::HS512), &claims(), SECRET.as_bytes()), AuthError::Algorithm),
        (signed(&critical, &claims(), SECRET.as_bytes()), AuthError::Malformed),
        (unsigned("none"), AuthError::Malformed),
        (unsigned("None"), AuthError::Malformed),
        (unsigned("HS256"), AuthError::Signature),
        (format!("{front}."), AuthError::Signature),
        (format!("{good}.x"), AuthError::Malformed),
        ("x".repeat(MAX_TOKEN_BYTES + 1), AuthError::Malformed),
        (String::new(), AuthError::Malformed),
    ];
    for (token, expected) in cases {
        assert_eq!(outcome(&issuers, &token).await, Err(expected), "{token}");
    }
}

#[tokio::test]
async fn token_times_allow_a_minute_of_clock_skew() {
    let issuers = open(&[shared()]);
    let late = issuers.verify(&by_secret(&with("exp", json!(now() - 30)))).await.expect("within the leeway");
    let left = late.expires_at().expect("an expiry").duration_since(SystemTime::now()).expect("later");
    assert!(left <= Duration::from_secs(30), "{left:?}");
    assert!(issuers.verify(&by_secret(&with("nbf", json!(now() + 30)))).await.is_ok());
    let eternal = issuers.verify(&by_secret(&with("exp", json!(u64::MAX)))).await.expect("a valid token");
    assert!(eternal.expires_at().expect("an expiry") <= SystemTime::now() + MAX_LIFETIME);
}

#[tokio::test]
async fn token_without_required_tenant_is_rejected() {
    let mut config = shared();
    (config.require_tenant, config.tenant_claim) = (true, "org".to_owned());
    let issuers = open(&[config]);
    assert_eq!(outcome(&issuers, &by_secret(&claims())).await, Err(AuthError::Tenant));
    assert_eq!(outcome(&issuers, &by_secret(&with("tenant", json!("acme")))).await, Err(AuthError::Tenant));
    let principal = issuers.verify(&by_secret(&with("org", json!("acme")))).await.expect("a tenant");
    assert_eq!(principal.tenant(), Some("acme"));
}

fn severe() -> Value {
    json!({"key": "severity", "cmp": "gte", "val": "high"})
}

#[tokio::test]
async fn token_filter_restricts_and_an_invalid_one_is_rejected() {
    let issuers = open(&[shared()]);
    let own = Filter::from_value(&severe()).expect("a filter");
    for written in [severe(), json!(severe().to_string())] {
        let principal = issuers.verify(&by_secret(&with("filter", written))).await.expect("a valid token");
        assert_eq!((principal.filter(), principal.is_restricted(), principal.tenant()), (&own, true, None));
    }
    assert!(!issuers.verify(&by_secret(&claims())).await.expect("a valid token").is_restricted());
    let cases = [
        (Value::Null, "is not a filter: "),
        (json!(""), "is not a filter: "),
        (json!("null"), "is not a filter: "),
        (json!(true), "is not a filter: "),
        (json!({}), "must have either op and nodes, or key, cmp and val or vals"),
        (json!({"key": "sauce", "cmp": "exists"}), "key must be severity or one of "),
        (json!([severe()]), "is not a filter: "),
    ];
    for (filter, problem) in cases {
        let denied =
            outcome(&issuers, &by_secret(&with("filter", filter.clone()))).await.expect_err("an invalid filter");
        let text = denied.to_string();
        assert!(
            text.starts_with(&format!("the claim `filter` of the token is not accepted: {problem}")),
            "{filter}: {text}"
        );
    }
    let mut config = shared();
    config.filter_claim = "https://bus.example/sees".to_owned();
    let issuers = open(&[config]);
    let principal =
        issuers.verify(&by_secret(&with("https://bus.example/sees", severe()))).await.expect("a valid token");
    assert_eq!(*principal.filter(), own);
    assert!(issuers.verify(&by_secret(&with("filter", json!("another service's")))).await.is_ok());
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| str::from_utf8(line).expect("ASCII")).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

fn in_file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("written");
    file
}

fn with_public_key(algorithm: &str, path: &Path) -> IssuerConfig {
    issuer("shared", &format!("\"{algorithm}\""), &format!("public_key_file = {:?}", path.to_str().expect("UTF-8")))
}

/// A key pair of each kind: algorithm, public key in PEM, signing key.
fn pairs() -> Vec<(Algorithm, String, EncodingKey)> {
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
    let rsa_public = AsDer::<PublicKeyX509Der<'_>>::as_der(rsa.public_key()).expect("a key");
    let rsa_private = AsDer::<Pkcs8V1Der<'_>>::as_der(&rsa).expect("a key");
    let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
    let ec_public = AsDer::<PublicKeyX509Der<'_>>::as_der(ec.public_key()).expect("a key");
    let ec_private = ec.to_pkcs8v1().expect("a key");
    let ed = Ed25519KeyPair::generate().expect("a key");
    let ed_public = AsDer::<PublicKeyX509Der<'_>>::as_der(ed.public_key()).expect("a key");
    let ed_private = ed.to_pkcs8v1().expect("a key");
    let private = |der: &[u8]| pem("PRIVATE KEY", der);
    vec![
        (
            Algorithm::RS256,
            pem("PUBLIC KEY", rsa_public.as_ref()),
            EncodingKey::from_rsa_pem(private(rsa_private.as_ref()).as_bytes()).expect("a key"),
        ),
        (
            Algorithm::ES256,
            pem("PUBLIC KEY", ec_public.as_ref()),
            EncodingKey::from_ec_pem(private(ec_private.as_ref()).as_bytes()).expect("a key"),
        ),
        (
            Algorithm::EdDSA,
            pem("PUBLIC KEY", ed_public.as_ref()),
            EncodingKey::from_ed_pem(private(ed_private.as_ref()).as_bytes()).expect("a key"),
        ),
    ]
}

#[tokio::test]
async fn public_key_accepts_only_tokens_of_its_own_kind() {
    let pairs = pairs();
    for (algorithm, public, private) in &pairs {
        let name = format!("{algorithm:?}");
        let file = in_file(public);
        let issuers = open(&[with_public_key(&name, file.path())]);
        let token = encode(&Header::new(*algorithm), &claims(), private).expect("a token");
        assert_eq!(outcome(&issuers, &token).await, Ok("shared#ann".to_owned()), "{name}");

        // The known attack: a public key used as an HMAC secret.
        for secret in [public.as_bytes(), public.trim().as_bytes()] {
            let forged = signed(&Header::new(Algorithm::HS256), &claims(), secret);
            assert_eq!(outcome(&issuers, &forged).await, Err(AuthError::Algorithm), "{name}");
        }
        for (other, _, private) in pairs.iter().filter(|(other, ..)| other != algorithm) {
            let token = encode(&Header::new(*other), &claims(), private).expect("a token");
            assert_eq!(outcome(&issuers, &token).await, Err(AuthError::Algorithm), "{name} {other:?}");
        }
    }
    let (_, public, _) = &pairs[0];
    let file = in_file(public);
    let problems = Issuers::open(&[shared(), with_public_key("ES256", file.path())]).err().expect("the wrong kind");
    assert!(problems[0].0 == "issuers[1].public_key_file" && problems[0].1.contains("a public key"), "{problems:?}");
    let as_secret = issuer("a", "\"HS256\"", &format!("secret_file = {:?}", file.path().to_str().expect("UTF-8")));
    let problems = Issuers::open(&[as_secret]).err().expect("a public key is no secret");
    assert!(problems[0].0 == "issuers[0].secret_file" && problems[0].1.contains("PEM"), "{problems:?}");
}

#[tokio::test]
async fn key_set_file_is_read_again_for_an_unknown_key() {
    let pairs = pairs();
    let set = |kid: &str, private: &EncodingKey, algorithm| {
        let mut jwk = jsonwebtoken::jwk::Jwk::from_encoding_key(private, algorithm).expect("a key");
        jwk.common.key_id = Some(kid.to_owned());
        json!({"keys": [jwk]}).to_string()
    };
    let (first, _, first_private) = &pairs[0];
    let (second, _, second_private) = &pairs[1];
    let file = in_file(&set("one", first_private, *first));
    let key = format!("jwks_file = {:?}\nrefresh_floor = \"100ms\"", file.path().to_str().expect("UTF-8"));
    let issuers = open(&[issuer("shared", "\"RS256\", \"ES256\"", &key)]);
    let token = |kid: &str, algorithm, private| {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(algorithm) };
        encode(&header, &claims(), private).expect("a token")
    };
    let (old, new) = (token("one", *first, first_private), token("two", *second, second_private));
    assert!(outcome(&issuers, &old).await.is_ok());
    assert_eq!(outcome(&issuers, &new).await, Err(AuthError::UnknownKid));
    std::fs::write(file.path(), set("two", second_private, *second)).expect("written");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while outcome(&issuers, &new).await.is_err() {
        assert!(std::time::Instant::now() < deadline, "the new key is never read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(outcome(&issuers, &old).await, Err(AuthError::UnknownKid), "a removed key is no longer accepted");

    std::fs::remove_file(file.path()).expect("removed");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while outcome(&issuers, &old).await != Err(AuthError::Unavailable) {
        assert!(std::time::Instant::now() < deadline, "an unreadable key set counts as an unknown key");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(outcome(&issuers, &new).await.is_ok(), "known keys stay valid");
}

#[tokio::test]
async fn signed_token_is_accepted() {
    let config = shared();
    let scopes = vec!["ws:alerts".parse().expect("a scope")];
    let request = TokenRequest {
        subject: "ann".to_owned(),
        scopes,
        tenant: Some("acme".to_owned()),
        filter: Some(severe()),
        lifetime: Duration::from_mins(1),
    };
    let token = sign(&config, &request).expect("a token");
    let principal = open(&[config]).verify(&token).await.expect("a valid token");
    assert_eq!((principal.id(), principal.tenant()), (Some("shared#ann"), Some("acme")));
    let own = Filter::from_value(&severe()).expect("a filter");
    assert_eq!(*principal.filter(), Filter::is(Attribute::Tenant, "acme").and(own));
    let file = in_file("{}");
    let key = format!("jwks_file = {:?}", file.path().to_str().expect("UTF-8"));
    assert_eq!(sign(&issuer("far", "\"RS256\"", &key), &request), Err(SignError::NoSecret("far".to_owned())));
}

proptest! {
    #[test]
    fn random_texts_and_changed_tokens_are_rejected(text in ".{0,200}", place in any::<prop::sample::Index>(), flip in 1_u8..128) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let issuers = open(&[shared()]);
        prop_assert!(runtime.block_on(issuers.verify(&text)).is_err());
        let mut token = by_secret(&claims()).into_bytes();
        let place = place.index(token.len());
        token[place] ^= flip;
        if let Ok(token) = String::from_utf8(token) {
            prop_assert!(runtime.block_on(issuers.verify(&token)).is_err(), "byte {place} changed: {token}");
        }
    }
}
