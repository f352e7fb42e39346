//! Every instance finds all members, after restarts and after the store has lost all data.

use super::*;
use crate::auth::watching::{frame, open, send_frame};
use crate::support::cluster::Cluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_are_known_to_all_instances_and_after_restart() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    let text = config("[[streams.groups]]\nname = \"siem\"\nsink = \"log\"", &on_redis(&server));
    let (home_a, home_b) = (Home::named("soc-a", &text), Home::named("soc-b", &text));
    let (a, b) = (home_a.start().await, home_b.start().await);
    let mut watching = watch_by_key(&b, "acme").await;
    publish(&a, "acme", 1).await;
    assert_eq!(next_text(&mut watching).await, event(1));
    publish(&a, "globex", 2).await;
    let both = [member("acme"), member("globex")];
    until("the members of the other instance", BOUND, async || (members(&b).await == both).then_some(())).await;
    b.handled(&both[1], "siem").await;

    a.crash();
    b.stop().await;
    server.cli(&["XADD", &both[0], "*", "data", &event(3)]);
    let b = home_b.start().await;
    until("the members again", BOUND, async || (members(&b).await == both).then_some(())).await;
    b.handled(&both[0], "siem").await;
    let mut past = b.watch("/api/v1/ws/tenant-alerts?key=acme&since=earliest").await;
    assert_eq!([next_text(&mut past).await, next_text(&mut past).await], [event(1), event(3)]);

    // The instances write the lost key index again.
    server.cli(&["FLUSHALL"]);
    until("the key index again", BOUND, async || {
        (server.cli(&["XLEN", "aurora:tenant:~keys:alerts"]) == "2").then_some(())
    })
    .await;
    publish(&b, "acme", 4).await;
    assert_eq!(next_text(&mut past).await, event(4));
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_key_index_is_rewritten_and_members_survive() {
    const KEY_INDEX: &str = "aurora:tenant:~keys:alerts";
    let server = RedisServer::start(Product::Redis, &[]).await;
    let home = Home::new(&config("[[streams.groups]]\nname = \"siem\"\nsink = \"log\"", &on_redis(&server)));
    let daemon = home.start().await;
    let keys = ["acme", "globex", "initech"];
    for (n, key) in keys.into_iter().enumerate() {
        publish(&daemon, key, n).await;
    }
    let whole = || server.cli(&["XRANGE", KEY_INDEX, "-", "+"]);
    let names = || keys.into_iter().filter(|key| whole().lines().any(|line| line.contains(key))).count();
    assert_eq!(server.cli(&["DEL", KEY_INDEX]), "1");
    until("the key index again", BOUND, async || (names() == 3).then_some(())).await;
    // Trims one of its entries, which is not the last.
    assert_eq!(server.cli(&["XTRIM", KEY_INDEX, "MAXLEN", "2"]), "1");
    until("the rewritten key index", BOUND, async || (names() == 3).then_some(())).await;
    daemon.crash();
    server.cli(&["XADD", &member("acme"), "*", "data", &event(9)]);
    let daemon = home.start().await;
    let all = keys.map(member);
    until("the members again", BOUND, async || (members(&daemon).await == all).then_some(())).await;
    daemon.handled(&all[0], "siem").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rich_socket_watches_many_keys() {
    let home = Home::new(&config("", ""));
    let daemon = home.start().await;
    let rich = [("sec-websocket-protocol", "aurora.v1")];
    let (mut socket, _) = open(&daemon, "tenant-alerts", &rich).await.expect("let in");
    assert_eq!(frame(&mut socket).await["streams"], json!([]));
    for (id, key) in ["acme", "globex", "initech"].into_iter().enumerate() {
        send_frame(&mut socket, json!({"op": "subscribe", "id": id, "stream": member(key)})).await;
        let subscribed = frame(&mut socket).await;
        assert_eq!((&subscribed["t"], &subscribed["stream"]), (&json!("subscribed"), &json!(member(key))));
        assert_eq!(frame(&mut socket).await["t"], "live");
    }
    for (n, key) in ["initech", "acme", "globex"].into_iter().enumerate() {
        publish(&daemon, key, n).await;
        let event = frame(&mut socket).await;
        assert_eq!((&event["s"], &event["d"]["n"]), (&json!(member(key)), &json!(n)), "{event}");
        send_frame(&mut socket, json!({"op": "ack", "id": 7, "s": event["s"], "p": event["p"]})).await;
        let seen = frame(&mut socket).await;
        assert_eq!(seen["t"], "ok", "{seen}");
    }
    send_frame(&mut socket, json!({"op": "subscribe", "id": 9, "stream": "aurora:tenant:a:b:alerts"})).await;
    assert_eq!(frame(&mut socket).await["code"], 404);

    let (mut keyed, _) = open(&daemon, "tenant-alerts?key=acme", &rich).await.expect("let in");
    let welcome = frame(&mut keyed).await;
    assert_eq!(welcome["streams"], json!([member("acme")]));
    send_frame(&mut keyed, json!({"op": "subscribe", "id": 1, "since": "earliest"})).await;
    assert_eq!(frame(&mut keyed).await["t"], "subscribed");
    let first = frame(&mut keyed).await;
    assert_eq!(first["d"]["n"], 1, "{first}");
    // A client resumes from a position.
    let position = first["p"].as_str().expect("a position");
    publish(&daemon, "acme", 5).await;
    let mut again = daemon.watch(&format!("/api/v1/ws/tenant-alerts?key=acme&since={position}")).await;
    assert_eq!(next_text(&mut again).await, event(5));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_on_different_cluster_nodes_are_served() {
    let cluster = Cluster::shared().await;
    let store = format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", cluster.url());
    let family = format!("aurora:c{}:{{tenant}}:alerts", uuid::Uuid::new_v4().simple());
    let home =
        Home::new(&config("[[streams.groups]]\nname = \"siem\"\nsink = \"log\"", &store).replace(FAMILY, &family));
    let daemon = home.start().await;
    let keys: Vec<String> = (0..12).map(|n| format!("t{n}")).collect();
    let mut sockets = join_all(keys.iter().map(|key| watch_by_key(&daemon, key))).await;
    for (n, (key, socket)) in keys.iter().zip(&mut sockets).enumerate() {
        let stream = family.replace("{tenant}", key);
        daemon.publish(&stream, &[event(n)]).await.expect("accepted");
        assert_eq!(next_text(socket).await, event(n));
        daemon.handled(&stream, "siem").await;
    }
    daemon.stop().await;
}
