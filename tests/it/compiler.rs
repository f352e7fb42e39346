//! The pinned compiler miscompiles comparisons (rust-lang/rust#158206), and the flags of `.cargo/config.toml` prevent it.
//!
//! The workaround can go when the pinned compiler has rust-lang/rust#150925, #158214 and #159220;
//! `optimized_build_without_the_flags_is_refused` then fails. What goes: `rustflags` and `RUSTC_BOOTSTRAP` in
//! `.cargo/config.toml`, `build/`, this file, and what `git grep SimplifyComparisonIntegral` finds.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

const MANIFEST: &str = r#"
[package]
name = "shapes"
version = "0.0.0"
edition = "2024"
build = "build/main.rs"

[[bin]]
name = "shapes"
path = "build/shapes.rs"
"#;

/// A package with this one's build script, whose program is `build/shapes.rs`.
struct Package(TempDir);

impl Package {
    fn new() -> Self {
        let package = Self(TempDir::new().expect("a folder"));
        for path in ["build/main.rs", "build/shapes.rs", "rust-toolchain.toml"] {
            package.copy(path);
        }
        fs::write(package.path().join("Cargo.toml"), MANIFEST).expect("a manifest");
        package
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn copy(&self, path: &str) {
        let to = self.path().join(path);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(Path::new(ROOT).join(path), to).expect("a copy");
    }

    /// Runs Cargo as a user would in this folder, without what the test runner was started with.
    fn cargo(&self, arguments: &[&str]) -> Output {
        let mut cargo = Command::new(env!("CARGO"));
        for inherited in ["RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "RUSTC_BOOTSTRAP"] {
            cargo.env_remove(inherited);
        }
        cargo.args(arguments).arg("--offline").current_dir(self.path()).output().expect("Cargo starts")
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn read(path: &str) -> toml::Table {
    let text = fs::read_to_string(Path::new(ROOT).join(path)).expect("a file");
    text.parse().expect("TOML")
}

fn product_flags() -> Vec<String> {
    let config = read(".cargo/config.toml");
    let flags = config["target"]["cfg(all())"]["rustflags"].as_array().expect("a list");
    flags.iter().map(|flag| flag.as_str().expect("a flag").to_owned()).collect()
}

#[test]
fn optimized_build_with_the_flags_is_right() {
    let package = Package::new();
    package.copy(".cargo/config.toml");

    let output = package.cargo(&["run", "--release"]);

    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches(": right").count(), 3, "{}", text(&output));
}

#[test]
fn optimized_build_without_the_flags_is_refused() {
    let package = Package::new();

    let output = package.cargo(&["build", "--release"]);

    if output.status.success() {
        let version =
            Command::new("rustc").arg("--version").current_dir(package.path()).output().expect("rustc starts");
        let version = text(&version);
        let toolchain = read("rust-toolchain.toml");
        let pinned = toolchain["toolchain"]["channel"].as_str().expect("a version");
        assert!(
            !version.starts_with(&format!("rustc {pinned} ")),
            "the pinned compiler needs no workaround: see the top of {} for what can go",
            file!(),
        );
        // Another compiler, and a right one.
        return;
    }
    for flag in product_flags() {
        assert!(text(&output).contains(&flag), "{flag} is not named in:\n{}", text(&output));
    }
}

#[test]
fn unoptimized_build_without_the_flags_is_right() {
    let output = Package::new().cargo(&["run"]);

    assert!(output.status.success(), "{}", text(&output));
}
