//! What the documentation claims, compared with the program.

use std::fs;
use std::path::Path;

use aurora_bus::metrics::Metrics;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("a README")
}

#[test]
fn the_readme_lists_every_metric() {
    let readme = readme();
    let (_, rest) = readme.split_once("<!-- metrics -->\n").expect("the table begins");
    let (table, _) = rest.split_once("<!-- /metrics -->").expect("the table ends");
    let expected: String = std::iter::once("| metric | labels | meaning |\n|---|---|---|\n".to_owned())
        .chain(Metrics::described().into_iter().map(|(name, labels, help)| {
            format!("| `{name}` | {} | {} |\n", labels.join(", "), help.trim_end_matches('.'))
        }))
        .collect();
    assert_eq!(table, expected, "the table in the README should be:\n{expected}");
}
