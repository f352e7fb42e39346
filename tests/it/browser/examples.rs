//! The page of examples, as the daemon serves it.

use reqwest::StatusCode;
use serde_json::json;

use super::chromium::Chromium;
use super::client::{ALERTS, STREAMS};
use crate::auth::Keys;
use crate::support::app::{Home, client};

/// An alert title of an attacker.
const HOSTILE: &str = "<img src=x onerror=\"window.wasRun = true\"><script>window.wasRun = true</script>";

#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_shown_filtered_and_never_executed() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let browser = Chromium::start().await;
    let hostile = json!({"severity": "high", "title": HOSTILE, "source": HOSTILE});
    let alerts = [
        hostile.clone(),
        json!({"severity": HOSTILE, "title": "odd severity"}),
        json!({"class_uid": 2004, "severity_id": 5, "finding_info": {"title": "from OCSF"}}),
        json!({"event_type": "alert", "alert": {"severity": 1, "signature": "from Suricata"}}),
        json!({"severity": "low", "title": {"not": "a text"}}),
        json!([1, 2]),
    ];
    let alerts: Vec<String> = alerts.into_iter().filter(serde_json::Value::is_object).map(|a| a.to_string()).collect();
    daemon.publish(ALERTS, &alerts).await.expect("accepted");
    let mut tab = browser.open(&daemon.url("/client")).await;
    tab.until("document.querySelectorAll('#alerts tr').length === 5").await;
    tab.until("document.querySelector('#state').textContent === 'live'").await;
    let severities =
        tab.get("[...document.querySelectorAll('#alerts td:nth-child(2)')].map((td) => td.textContent)").await;
    assert_eq!(severities, json!(["low", "critical", "critical", HOSTILE.to_lowercase(), "high"]));
    // Also with all fields of an alert shown.
    tab.get("document.querySelectorAll('summary').forEach((summary) => summary.click())").await;
    tab.until("document.querySelectorAll('details pre').length === 5").await;
    daemon.publish(ALERTS, &[hostile.to_string()]).await.expect("accepted");
    tab.until("document.querySelectorAll('#alerts tr').length === 6").await;
    let shown = tab.get("document.querySelector('#alerts summary').textContent").await;
    assert_eq!(shown, HOSTILE);
    let made =
        tab.get("[document.querySelectorAll('main img, main script').length, window.wasRun === undefined]").await;
    assert_eq!(made, json!([0, true]));

    let choose = "document.querySelector('#severity').value = 'critical';
                  document.querySelector('#severity').dispatchEvent(new Event('change'))";
    tab.get(choose).await;
    tab.until("document.querySelectorAll('#alerts tr').length === 2").await;
    assert_eq!(tab.get("document.querySelector('#count').textContent").await, "2 alerts");
    tab.get("document.querySelector('#pause').click()").await;
    daemon.publish(ALERTS, &[r#"{"severity":"critical","title":"missed"}"#.to_owned()]).await.expect("accepted");
    tab.get("document.querySelector('#pause').click()").await;
    tab.until("document.querySelectorAll('#alerts tr').length === 3").await;
    tab.until("document.querySelector('#log').textContent.includes('resuming after')").await;
    // The page's own policy blocked nothing, although it is active.
    assert_eq!(tab.complaints().await, Vec::<String>::new());
    let tried = "new Promise((done) => {
        addEventListener('securitypolicyviolation', ({ violatedDirective }) => done(violatedDirective));
        const script = document.createElement('script');
        script.append('window.wasRun = true');
        document.body.append(script);
    })";
    let tried = tab.get(tried).await;
    let policies = [json!("require-trusted-types-for"), json!("script-src-elem")];
    assert!(policies.contains(&tried), "{tried}");
    assert_eq!(tab.get("window.wasRun === undefined").await, true);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shown_severity_is_the_filtered_severity() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let browser = Chromium::start().await;
    let alerts = [
        (json!({"severity_id": 0}), "unknown"),
        (json!({"severity_id": 1}), "info"),
        (json!({"severity_id": 3, "severity": "Moderate"}), "medium"),
        (json!({"severity_id": 5}), "critical"),
        (json!({"severity_id": 6}), "critical"),
        (json!({"severity_id": 6, "severity": "Fatal"}), "critical"),
        (json!({"severity": "Informational"}), "info"),
        (json!({"severity": "HIGH"}), "high"),
        (json!({"severity_id": 99}), "unknown"),
        (json!({"severity_id": 99, "severity": "Custom"}), "custom"),
        (json!({"severity_id": "constructor", "severity": "toString"}), "tostring"),
        (json!({"severity": ""}), "unknown"),
        (json!({"event_type": "alert", "alert": {"severity": 2}}), "high"),
        (json!({"event_type": "alert", "alert": {"severity": 4}}), "low"),
        (json!({"event_type": "flow", "alert": {"severity": 1}}), "unknown"),
        (json!({"specversion": "1.0", "data": {"severity_id": 6}}), "critical"),
    ];
    let published: Vec<String> = alerts.iter().map(|(alert, _)| alert.to_string()).collect();
    daemon.publish(ALERTS, &published).await.expect("accepted");
    let mut tab = browser.open(&daemon.url("/client/")).await;
    tab.until(&format!("document.querySelectorAll('#alerts tr').length === {}", alerts.len())).await;
    let shown = "[...document.querySelectorAll('#alerts td:nth-child(2)')].map((td) => td.textContent).reverse()";
    let expected: Vec<&str> = alerts.iter().map(|(_, severity)| *severity).collect();
    assert_eq!(tab.get(shown).await, json!(expected));
    for severity in ["info", "low", "medium", "high", "critical"] {
        let choose = format!(
            "document.querySelector('#alerts').replaceChildren();
             document.querySelector('#severity').value = {severity:?};
             document.querySelector('#severity').dispatchEvent(new Event('change'))"
        );
        tab.get(&choose).await;
        let rank = |of: &str| ["info", "low", "medium", "high", "critical"].iter().position(|known| *known == of);
        let passing: Vec<&str> =
            expected.iter().copied().filter(|shown| rank(shown).is_some() && rank(shown) >= rank(severity)).collect();
        tab.until(&format!("JSON.stringify({shown}) === JSON.stringify({})", json!(passing))).await;
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn example_page_asks_for_missing_credentials() {
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts", "publish:*"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let browser = Chromium::start().await;
    let mut tab = browser.open(&daemon.url("/client/")).await;
    tab.until("!document.querySelector('#access').hidden").await;
    let enter = |text: &str| {
        format!("document.querySelector('#token').value = {text:?}; document.querySelector('#access').requestSubmit()")
    };
    tab.get(&enter("ab_guess")).await;
    tab.until("document.querySelector('#refusal').textContent.includes('the API key is not valid')").await;
    for unfit in ["ab_a b", "ab_ü", &format!("{key}\u{a0}x")] {
        tab.get(&enter(unfit)).await;
        tab.until("document.querySelector('#refusal').textContent.includes('characters')").await;
        assert_eq!(tab.get("document.querySelector('#access').hidden").await, false, "the key is requested again");
        tab.get(&enter("ab_guess")).await;
        tab.until("document.querySelector('#refusal').textContent.includes('the API key is not valid')").await;
    }
    tab.get(&enter(&format!(" Bearer  {key} "))).await;
    tab.until("document.querySelector('#state').textContent === 'live'").await;
    let left = tab.get("[document.querySelector('#access').hidden, document.querySelector('#token').value]").await;
    assert_eq!(left, json!([true, ""]));
    let url = tab.get("location.href + JSON.stringify({ ...sessionStorage, ...localStorage }) + document.cookie").await;
    assert!(!url.as_str().expect("a text").contains(&key), "it is kept nowhere but in memory");
    let published = client().post(daemon.url("/api/v1/alerts")).header("x-api-key", &key);
    let published = published.body(r#"{"severity":"high","title":"seen"}"#).send().await.expect("an answer");
    assert_eq!(published.status(), StatusCode::CREATED);
    tab.until("document.querySelector('#alerts').textContent.includes('seen')").await;
    assert_eq!(tab.complaints().await, Vec::<String>::new());
    daemon.stop().await;
}

#[tokio::test]
async fn example_pages_are_cached_and_can_be_disabled() {
    let mut keys = Keys::default();
    keys.add("page", &["ws:alerts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let files = [
        ("", "text/html; charset=utf-8"),
        ("aurora-bus.js", "text/javascript; charset=utf-8"),
        ("aurora-bus.d.ts", "text/plain; charset=utf-8"),
        ("examples.js", "text/javascript; charset=utf-8"),
        ("examples.css", "text/css; charset=utf-8"),
    ];
    for (file, content_type) in files {
        let url = daemon.url(&format!("/client/{file}"));
        let answer = client().get(&url).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK, "no credentials are required");
        let headers = answer.headers().clone();
        assert_eq!(headers["content-type"], content_type);
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["cache-control"], "no-cache");
        assert!(headers["content-security-policy"].to_str().is_ok_and(|policy| policy.contains("default-src 'none'")));
        assert!(answer.text().await.is_ok_and(|text| text.len() > 500));
        let again = client().get(&url).header("if-none-match", &headers["etag"]).send().await.expect("an answer");
        assert_eq!((again.status(), &again.headers()["etag"]), (StatusCode::NOT_MODIFIED, &headers["etag"]));
        assert!(again.bytes().await.is_ok_and(|body| body.is_empty()));
    }
    for path in ["/client/nothing", "/client/../Cargo.toml", "/client/%2e%2e%2fCargo.toml"] {
        assert_eq!(daemon.status(path).await, Some(StatusCode::NOT_FOUND), "{path}");
    }
    daemon.stop().await;

    let home = Home::new(&format!("{STREAMS}\n[http]\npages = false\n"));
    let daemon = home.start().await;
    for path in ["/client", "/client/", "/client/aurora-bus.js"] {
        assert_eq!(daemon.status(path).await, Some(StatusCode::NOT_FOUND), "{path}");
    }
    daemon.stop().await;
}
