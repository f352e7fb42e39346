//! Checks of forwarding sinks: a declared target, no circles, and a long enough deduplication window.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::config::Config;
use crate::delivery::GroupConfig;
use crate::event::StreamName;
use crate::validate::Problems;

/// Reports the problems of all forwarding sinks.
pub(super) fn validate(config: &Config, problems: &mut Problems) {
    // Forwarded entries have no key, so a family cannot be the target.
    let declared: BTreeSet<&StreamName> = config.streams.iter().filter_map(|stream| stream.name.stream()).collect();
    for (name, sink) in &config.sinks {
        if let Some(target) = sink.forwards_to().filter(|target| !declared.contains(target)) {
            let known = declared.iter().map(|stream| stream.as_str());
            let message =
                format!("`{target}` is not a declared stream{}", crate::config::nearest(target.as_str(), known));
            problems.add(&format!("sinks.{name}.stream"), message);
        }
    }
    let target = |group: &GroupConfig| config.sinks.get(group.sink.as_ref()?)?.forwards_to().cloned();
    let mut forwards: BTreeMap<&str, BTreeSet<StreamName>> = BTreeMap::new();
    for stream in &config.streams {
        forwards.entry(stream.name.as_str()).or_default().extend(stream.groups.iter().filter_map(target));
    }
    for (index, stream) in config.streams.iter().enumerate() {
        for (place, group) in stream.groups.iter().enumerate() {
            let Some(target) = target(group) else { continue };
            let path = format!("streams[{index}].groups[{place}]");
            if let Some(circle) = path_between(&forwards, &target, stream.name.as_str()) {
                let circle: Vec<&str> = circle.iter().map(|stream| stream.as_str()).collect();
                let message = format!("entries would circulate: {} → {}", stream.name, circle.join(" → "));
                problems.add(&format!("{path}.sink"), message);
            }
            let longest = longest_retries(group);
            if longest > config.publish.dedup_window {
                let text = humantime_serde::re::humantime::format_duration;
                let message = format!(
                    "retries take up to {}, but forwarded entries are recognized for {} only: increase \
                     publish.dedup_window, or an entry could be appended twice",
                    text(longest),
                    text(config.publish.dedup_window)
                );
                problems.add(&format!("{path}.retry"), message);
            }
        }
    }
}

/// Returns the streams between two streams, including both, if entries are forwarded that way.
fn path_between<'a>(
    forwards: &'a BTreeMap<&str, BTreeSet<StreamName>>,
    from: &'a StreamName,
    to: &str,
) -> Option<Vec<&'a StreamName>> {
    let mut seen = BTreeSet::from([from]);
    let mut paths = vec![vec![from]];
    while let Some(path) = paths.pop() {
        let last = *path.last()?;
        if last.as_str() == to {
            return Some(path);
        }
        for next in forwards.get(last.as_str()).into_iter().flatten().filter(|next| seen.insert(next)) {
            paths.push(path.iter().copied().chain([next]).collect());
        }
    }
    None
}

/// Returns the time from the first to the last attempt of an entry while the daemon runs.
fn longest_retries(group: &GroupConfig) -> Duration {
    let between = group.retry.cap + group.handler_timeout;
    between.saturating_mul(group.retry.max_attempts.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::SinkConfig;

    fn config(forwards: &[(&str, &str)]) -> Config {
        let mut config = Config { streams: Vec::new(), ..Config::default() };
        for (index, (from, to)) in forwards.iter().enumerate() {
            let name = format!("to-{index}");
            let sink: SinkConfig = toml::from_str(&format!("type = 'stream'\nstream = '{to}'")).expect("a sink");
            config.sinks.insert(name.clone(), sink);
            let stream = format!("name = '{from}'\n[[groups]]\nname = 'forward'\nsink = '{name}'");
            config.streams.push(toml::from_str(&stream).expect("a stream"));
        }
        config
    }

    fn problems_of(config: &Config) -> Vec<String> {
        let mut problems = Problems::default();
        validate(config, &mut problems);
        problems.into_vec().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn circles_are_reported_with_their_path() {
        let itself = problems_of(&config(&[("a", "a")]));
        assert_eq!(itself, ["streams[0].groups[0].sink: entries would circulate: a → a"]);
        let circle = problems_of(&config(&[("a", "b"), ("b", "c"), ("c", "a")]));
        assert_eq!(circle.len(), 3, "{circle:?}");
        assert!(circle[0].ends_with("a → b → c → a"), "{circle:?}");
    }

    #[test]
    fn target_of_a_sink_must_be_declared() {
        let found = problems_of(&config(&[("tasks", "results"), ("results", "task")]));
        assert_eq!(found, ["sinks.to-1.stream: `task` is not a declared stream, did you mean `tasks`?"]);
    }

    #[test]
    fn window_shorter_than_the_retries_is_reported() {
        let mut config = config(&[("a", "b"), ("b", "c")]);
        config.streams.push(toml::from_str("name = 'c'").expect("a stream"));
        assert_eq!(problems_of(&config), [""; 0]);
        config.publish.dedup_window = Duration::from_mins(10);
        let found = problems_of(&config);
        assert!(found.len() == 2 && found[0].starts_with("streams[0].groups[0].retry: "), "{found:?}");
    }
}
