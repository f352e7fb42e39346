//! What families of streams may not do: overlap with other names, or grow without bounds.

use crate::config::Config;
use crate::delivery::GroupStart;
use crate::event::StreamPattern;
use crate::validate::Problems;

/// The most keys that a family may be given: each one costs memory in every instance.
const MOST_KEYS: usize = 10_000;

/// Everything that is wrong with families.
pub(super) fn validate(config: &Config, problems: &mut Problems) {
    let is_family = |pattern: &StreamPattern| pattern.family().is_some();
    let differ = |a: &StreamPattern, b: &StreamPattern| a != b && (is_family(a) || is_family(b));
    for (index, stream) in config.streams.iter().enumerate() {
        let path = format!("streams[{index}]");
        for earlier in config.streams.iter().take(index).map(|earlier| &earlier.name) {
            if differ(earlier, &stream.name) && earlier.overlaps(&stream.name) {
                let message = format!("`{}` overlaps with `{earlier}`: one stream could be of both", stream.name);
                problems.add(&format!("{path}.name"), message);
            }
        }
        let dead_letter = stream.dead_letter();
        for family in config.streams.iter().filter_map(|other| other.name.family()) {
            for (key, named) in [("name", &stream.name), ("dead_letter", &dead_letter)] {
                if named.stream() == Some(&family.register()) {
                    let message = format!("`{named}` is where the keys of `{family}` are written down");
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
                let message = "is for families, whose name has a placeholder such as {tenant}";
                problems.add(&format!("{path}.max_keys"), message);
            }
            if is_family(&dead_letter) {
                let message = format!("`{dead_letter}` has a placeholder, and `{}` has none", stream.name);
                problems.add(&format!("{path}.dead_letter"), message);
            }
            continue;
        };
        if !(1..=MOST_KEYS).contains(&stream.max_keys()) {
            let message = format!("must be from 1 to {MOST_KEYS}, is {}", stream.max_keys());
            problems.add(&format!("{path}.max_keys"), message);
        }
        if let Some(theirs) = dead_letter.family().filter(|theirs| theirs.placeholder() != family.placeholder()) {
            let message = format!("has the placeholder `{}`, not `{}`", theirs.placeholder(), family.placeholder());
            problems.add(&format!("{path}.dead_letter"), message);
        }
        for (index, _) in stream.groups.iter().enumerate().filter(|(_, group)| group.start == GroupStart::New) {
            let message = "must be \"oldest\": a stream's first entry is there before its groups are";
            problems.add(&format!("{path}.groups[{index}].start"), message);
        }
        if let Some(theirs) = dead_letter.family().filter(|theirs| !theirs.has_room_for_keys()) {
            let message = format!("`{theirs}` leaves too little room for keys: name a shorter one");
            problems.add(&format!("{path}.dead_letter"), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(streams: &str) -> Vec<String> {
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
    fn a_family_of_its_own_is_fine() {
        let text = "[[streams]]\nname = 'aurora:tenant:{tenant}:alerts'\nmax_keys = 50\n[[streams.groups]]\n\
                    name = 'siem'\nsink = 'log'\n[[streams]]\nname = 'aurora:tenant:{tenant}:tasks'\n\
                    dead_letter = 'aurora:tenants:dead_letter'\n[[streams.groups]]\nname = 'agents'\n[[streams]]\nname = 'aurora:alerts'";
        assert_eq!(told(text), [""; 0]);
    }

    #[test]
    fn what_makes_no_sense_is_told_with_its_key() {
        let text = "[[streams]]\nname = 'a:{k}:b'\nmax_keys = 0\ndead_letter = 'a:{other}:dead'\n[[streams.groups]]\n\
                    name = 'g'\nstart = 'new'\n[[streams]]\nname = 'a:x:b'\nmax_keys = 3\ndead_letter = 'a:{k}:b'\n[[streams]]\n\
                    name = 'a:{z}:b'\n[[streams]]\nname = 'c'\ndead_letter = 'a:y:dead'\n\
                    [[streams]]\nname = 'a:~keys:b'";
        let keys: Vec<String> =
            told(text).iter().map(|line| line.split(": ").next().unwrap_or_default().to_owned()).collect();
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
            assert!(keys.iter().any(|told| told == key), "{key} is not among {keys:?}");
        }
    }

    #[test]
    fn every_key_leaves_room_for_the_name_of_its_dead_letters() {
        let named = |bytes: usize| format!("[[streams]]\nname = 'a:{{k}}:{}'", "x".repeat(bytes));
        assert_eq!(told(&named(200 - "a::".len() - ":dead_letter".len() - 64)), [""; 0]);
        let problems = told(&named(200 - "a::".len() - ":dead_letter".len() - 63));
        assert!(problems[0].starts_with("streams[0].dead_letter: "), "{problems:?}");
    }
}
