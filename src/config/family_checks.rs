//! Checks of families of streams: no overlap with other names, and limited growth.

use crate::config::Config;
use crate::delivery::GroupStart;
use crate::event::StreamPattern;
use crate::validate::Problems;

/// Maximum of `max_keys`: each key costs memory in every instance.
const MAX_KEYS: usize = 10_000;

/// Reports the problems of all families.
pub(super) fn validate(config: &Config, problems: &mut Problems) {
    let is_family = |pattern: &StreamPattern| pattern.family().is_some();
    let differ = |a: &StreamPattern, b: &StreamPattern| a != b && (is_family(a) || is_family(b));
    for (index, stream) in config.streams.iter().enumerate() {
        let path = format!("streams[{index}]");
        for earlier in config.streams.iter().take(index).map(|earlier| &earlier.name) {
            if differ(earlier, &stream.name) && earlier.overlaps(&stream.name) {
                let message = format!("`{}` overlaps with `{earlier}`: a stream could belong to both", stream.name);
                problems.add(&format!("{path}.name"), message);
            }
        }
        let dead_letter = stream.dead_letter();
        for family in config.streams.iter().filter_map(|other| other.name.family()) {
            for (key, named) in [("name", &stream.name), ("dead_letter", &dead_letter)] {
                if named.stream() == Some(&family.key_index()) {
                    let message = format!("`{named}` is reserved for the key index of `{family}`");
                    problems.add(&format!("{path}.{key}"), message);
                }
            }
        }
        for other in &config.streams {
            if differ(&other.name, &dead_letter) && other.name.overlaps(&dead_letter) {
                let message = format!("`{dead_letter}` overlaps with the declared `{}`", other.name);
                problems.add(&format!("{path}.dead_letter"), message);
            }
            let others = other.dead_letter();
            if differ(&others, &dead_letter) && others.overlaps(&dead_letter) {
                let message = format!("`{dead_letter}` overlaps with the dead letters `{others}` of `{}`", other.name);
                problems.add(&format!("{path}.dead_letter"), message);
            }
        }
        let Some(family) = stream.name.family() else {
            if stream.max_keys.is_some() {
                let message = "is for families only: the name needs a placeholder such as {tenant}";
                problems.add(&format!("{path}.max_keys"), message);
            }
            if is_family(&dead_letter) {
                let message =
                    format!("`{dead_letter}` must not have a placeholder, because `{}` has none", stream.name);
                problems.add(&format!("{path}.dead_letter"), message);
            }
            continue;
        };
        if !(1..=MAX_KEYS).contains(&stream.max_keys()) {
            let message = format!("must be from 1 to {MAX_KEYS}, not {}", stream.max_keys());
            problems.add(&format!("{path}.max_keys"), message);
        }
        if let Some(theirs) = dead_letter.family().filter(|theirs| theirs.placeholder() != family.placeholder()) {
            let message =
                format!("must have the placeholder `{1}`, not `{0}`", theirs.placeholder(), family.placeholder());
            problems.add(&format!("{path}.dead_letter"), message);
        }
        for (index, _) in stream.groups.iter().enumerate().filter(|(_, group)| group.start == GroupStart::New) {
            let message = "must be \"oldest\": the first entry of a member exists before its groups";
            problems.add(&format!("{path}.groups[{index}].start"), message);
        }
        if let Some(theirs) = dead_letter.family().filter(|theirs| !theirs.has_room_for_keys()) {
            let message = format!("`{theirs}` leaves too little room for keys: choose a shorter name");
            problems.add(&format!("{path}.dead_letter"), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems_of(streams: &str) -> Vec<String> {
        #[derive(serde::Deserialize)]
        struct Streams {
            streams: Vec<crate::config::StreamConfig>,
        }
        let Streams { streams } = toml::from_str(streams).expect("streams");
        let config = Config { streams, ..Config::default() };
        let mut problems = Problems::default();
        validate(&config, &mut problems);
        problems.into_vec().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn valid_families_have_no_problems() {
        let text = "[[streams]]\nname = 'aurora:tenant:{tenant}:alerts'\nmax_keys = 50\n[[streams.groups]]\n\
                    name = 'siem'\nsink = 'log'\n[[streams]]\nname = 'aurora:tenant:{tenant}:tasks'\n\
                    dead_letter = 'aurora:tenants:dead_letter'\n[[streams.groups]]\nname = 'agents'\n[[streams]]\nname = 'aurora:alerts'";
        assert_eq!(problems_of(text), [""; 0]);
    }

    #[test]
    fn invalid_families_are_reported_with_their_keys() {
        let text = "[[streams]]\nname = 'a:{k}:b'\nmax_keys = 0\ndead_letter = 'a:{other}:dead'\n[[streams.groups]]\n\
                    name = 'g'\nstart = 'new'\n[[streams]]\nname = 'a:x:b'\nmax_keys = 3\ndead_letter = 'a:{k}:b'\n[[streams]]\n\
                    name = 'a:{z}:b'\n[[streams]]\nname = 'c'\ndead_letter = 'a:y:dead'\n\
                    [[streams]]\nname = 'a:~keys:b'";
        let keys: Vec<String> =
            problems_of(text).iter().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect();
        for key in [
            "streams[0].max_keys",
            "streams[0].dead_letter",
            "streams[0].groups[0].start",
            "streams[1].name",
            "streams[1].max_keys",
            "streams[1].dead_letter",
            "streams[2].name",
            "streams[3].dead_letter",
            "streams[4].name",
        ] {
            assert!(keys.iter().any(|found| found == key), "{key} is not among {keys:?}");
        }
    }

    #[test]
    fn dead_letter_family_needs_room_for_keys() {
        let named = |bytes: usize| format!("[[streams]]\nname = 'a:{{k}}:{}'", "x".repeat(bytes));
        assert_eq!(problems_of(&named(200 - "a::".len() - ":dead_letter".len() - 64)), [""; 0]);
        let problems = problems_of(&named(200 - "a::".len() - ":dead_letter".len() - 63));
        assert!(problems[0].starts_with("streams[0].dead_letter: "), "{problems:?}");
    }
}
