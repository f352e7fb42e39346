use super::*;

fn view(json: &str) -> AlertView<'_> {
    AlertView::parse(json.as_bytes()).expect("a JSON object")
}

#[test]
fn every_known_format_has_the_same_view() {
    let cases = [
        (r#"{"severity":"high","source":"wazuh","title":"t"}"#, Some(Severity::High), Some("wazuh"), Some("t")),
        (
            r#"{"severity":"Critical","source":"mqtt","category":"cps","timestamp_ms":5}"#,
            Some(Severity::Critical),
            Some("mqtt"),
            None,
        ),
        (
            r#"{"class_uid":2004,"severity_id":6,"severity":"Fatal","message":"m"}"#,
            Some(Severity::Critical),
            None,
            Some("m"),
        ),
        (r#"{"class_uid":2004,"severity_id":3,"severity":"Moderate"}"#, Some(Severity::Medium), None, None),
        (
            r#"{"event_type":"alert","alert":{"severity":2,"signature":"ET"}}"#,
            Some(Severity::High),
            Some("suricata"),
            Some("ET"),
        ),
        (r#"{"event_type":"dns","alert":{"severity":1}}"#, None, None, None),
        (
            r#"{"data":{"severity":"low"},"specversion":"1.0","source":"/edge","id":"e1"}"#,
            Some(Severity::Low),
            Some("/edge"),
            None,
        ),
        (r#"{"severity":["high"],"source":{"a":1},"title":7,"alert":"x","mitre_techniques":"T1"}"#, None, None, None),
    ];
    for (json, severity, source, title) in cases {
        let view = view(json);
        assert_eq!((view.severity, view.source.as_deref(), view.title.as_deref()), (severity, source, title), "{json}");
    }
}

/// Returns severity, title, source, category, tenant, kind and techniques, with `-` for absent ones.
fn summary_of(json: &str) -> String {
    let view = view(json);
    let texts = [&view.title, &view.source, &view.category, &view.tenant, &view.kind];
    let texts = texts.map(|text| text.as_deref().unwrap_or("-")).join("|");
    format!("{}|{texts}|{}", view.severity.map_or("-", Severity::as_str), view.techniques.join(","))
}

#[test]
fn alerts_of_products_have_the_filter_attributes() {
    let cases = [
        // OCSF 1.1 and later.
        (
            r#"{"activity_id":1,"category_name":"Findings","category_uid":2,"class_name":"Detection Finding",
            "class_uid":2004,"time":1716000000000,"severity":"Critical","severity_id":5,"message":"long",
            "finding_info":{"uid":"f-1","title":"Modbus write from a workstation","attacks":[
            {"tactics":[{"uid":"TA0106"}],"technique":{"name":"Unauthorized Command Message","uid":"T0855"}},
            {"technique":{"uid":"T1021"},"sub_technique":{"uid":"T1021.002"}}]},
            "metadata":{"version":"1.3.0","tenant_uid":"acme","product":{"name":"OT Sensor","vendor_name":"V"}}}"#,
            "critical|Modbus write from a workstation|OT Sensor|Findings|acme|Detection Finding|T0855,T1021,T1021.002",
        ),
        // OCSF 1.0.
        (
            r#"{"class_uid":2001,"class_name":"Security Finding","category_name":"Findings","severity_id":1,
            "severity":"Informational ","message":"Infection detected by a sinkhole","attacks":[
            {"technique":{"uid":"T1071"},"version":"12.1"}],"data":"{}","finding":{"uid":"2b79","types":["malware"],
            "title":"Infection found"},"metadata":{"product":{"feature":{"name":"f"},"name":"SecurityScorecard"}}}"#,
            "info|Infection found|SecurityScorecard|Findings|-|Security Finding|T1071",
        ),
        (
            r#"{"timestamp":"2024-05-02T10:11:12.131415+0000","event_type":"alert","src_ip":"10.0.0.5","proto":"TCP",
            "alert":{"action":"allowed","signature_id":2027865,"signature":"ET INFO DNS Query","severity":2,
            "category":"Potentially Bad Traffic","metadata":{"mitre_tactic_id":["TA0011"],
            "mitre_technique_id":["T1071","T1571"]}},"metadata":{"flowbits":["x"]}}"#,
            "high|ET INFO DNS Query|suricata|Potentially Bad Traffic|-|alert|T1071,T1571",
        ),
        (r#"{"ts":1.5,"uid":"C1","note":"Scan::Port_Scan","msg":"scanned 20 ports","peer":"zeek"}"#, "-|-|-|-|-|-|"),
        (r#"{"ts":950988235.15,"name":"fragment_overlap","notice":false,"source":"UDP"}"#, "-|-|UDP|-|-|-|"),
        (
            r#"{"@timestamp":"2024-05-02T10:11:12Z","ecs":{"version":"8.11"},"event":{"kind":"alert","category":["x"],
            "severity":73},"rule":{"name":"r"},"message":"m","threat":{"technique":[{"id":"T1"}]}}"#,
            "-|m|-|-|-|-|",
        ),
        (
            r#"{"id":"1b9e","title":"Beacon","severity":"high","status":"new","source":"zeek","category":"network",
            "tenant":"acme","mitre_techniques":["T1071.001"],"metadata":{"product":{"name":"x"},"tenant_uid":"y"}}"#,
            "high|Beacon|zeek|network|acme|-|T1071.001",
        ),
        (
            r#"{"specversion":"1.0","type":"finding","source":"/edge","tenant":"acme","data":{"class_uid":2004,
            "metadata":{"product":{"name":"EDR"},"tenant_uid":"directory-7"}}}"#,
            "-|-|EDR|-|acme|finding|",
        ),
    ];
    for (json, expected) in cases {
        assert_eq!(summary_of(json), expected, "{json}");
    }
}

#[test]
fn outer_properties_win_over_nested_ones() {
    let findings = [r#""finding":{"title":"old"}"#, r#""finding_info":{"title":"new"}"#];
    for [one, other] in [findings, [findings[1], findings[0]]] {
        assert_eq!(view(&format!(r#"{{{one},"class_uid":2004,{other}}}"#)).title.as_deref(), Some("new"));
    }
    let all = r#"{"class_uid":2004,"severity":"low","severity_id":5,"title":"t","source":"s","category":"c",
        "tenant_id":"t1","type":"k","class_name":"n","category_name":"n","event_type":"alert","mitre_techniques":["T1"],
        "alert":{"severity":1,"signature":"n","category":"n","metadata":{"mitre_technique_id":["T2"]}},
        "metadata":{"tenant_uid":"n","product":{"name":"n"}},"attacks":[{"technique":{"uid":"T3"}}],
        "finding_info":{"title":"n","attacks":[{"technique":{"uid":"T4"}}]}}"#;
    assert_eq!(summary_of(all), "low|t|s|c|t1|k|T1,T2,T3,T4");
}

#[test]
fn invalid_nested_properties_are_absent() {
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let odd = ["7", "1e999", "null", "true", "[]", "{}", "[[1],{}]", r#""\ud800""#, r#"{"\ud800":1}"#, &deep];
    for odd in odd {
        for inside in [
            r#""alert":{"severity":2,"signature":"t","category":ODD,"metadata":ODD},"event_type":"alert""#,
            r#""alert":{"severity":2,"signature":"t","metadata":{"mitre_technique_id":[ODD]}},"event_type":"alert""#,
            r#""severity":"high","title":"t","alert":ODD,"attacks":[ODD,{"technique":ODD},{"technique":{"uid":ODD}}]"#,
            r#""severity_id":4,"finding_info":{"title":"t","attacks":ODD},"attacks":ODD,"category_name":ODD"#,
            r#""severity_id":4,"message":"t","finding_info":ODD,"metadata":ODD"#,
            r#""severity_id":4,"finding":{"title":"t"},"metadata":{"product":ODD,"tenant_uid":ODD}"#,
            r#""severity_id":4,"message":"t","finding_info":{"title":ODD},"metadata":{"product":{"name":ODD}}"#,
        ] {
            let json = format!(r#"{{"class_uid":2004,{}}}"#, inside.replace("ODD", odd));
            let view = view(&json);
            assert_eq!((view.severity, view.title.as_deref()), (Some(Severity::High), Some("t")), "{inside}");
            assert_eq!((view.tenant, view.techniques.len()), (None, 0), "{inside}");
        }
    }
}

#[test]
fn plain_techniques_and_times_are_read() {
    let view = view(r#"{"mitre_techniques":["T1071.001",5,"T1059"],"time":1700239437000}"#);
    assert_eq!(view.techniques, ["T1071.001", "T1059"]);
    assert_eq!(view.time_ms, Some(1_700_239_437_000));
}

#[test]
fn escaped_text_is_unescaped() {
    assert_eq!(view(r#"{"title":"a\"b\u0041"}"#).title.as_deref(), Some("a\"bA"));
}

#[test]
fn severities_order_from_info_to_critical() {
    assert!(Severity::Critical > Severity::High && Severity::Low > Severity::Info);
    assert!("urgent".parse::<Severity>().is_err());
}
