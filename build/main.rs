//! Refuses an optimized build if the compiler, with the flags it is given, miscompiles `build/shapes.rs`.
//!
//! `.cargo/config.toml` turns the faulty compiler pass off. Cargo does not read that file if it is started in another
//! folder (`cargo install --git`), and drops its flags if `RUSTFLAGS` is set.

#![expect(clippy::print_stdout, reason = "build scripts talk to Cargo there")]

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

/// The flags of `.cargo/config.toml`.
const FLAGS: &str = "-Zmir-enable-passes=-SimplifyComparisonIntegral -Zallow-features=";

fn main() {
    println!("cargo::rerun-if-changed=build");
    if variable("OPT_LEVEL") == "0" {
        return;
    }
    let rustc = variable("RUSTC");
    let program = PathBuf::from(variable("OUT_DIR")).join("shapes").with_extension(env::consts::EXE_EXTENSION);

    // The pass is the same for every target. So the program is built for this machine, which can run it, and of the
    // flags it gets only those that concern passes: others may be for the target alone.
    let flags = variable("CARGO_ENCODED_RUSTFLAGS").into_string().expect("Cargo encodes flags as UTF-8");
    let pass_flags = flags
        .split('\x1f')
        .map(|flag| flag.strip_prefix("-Z").unwrap_or(flag))
        .filter(|flag| flag.starts_with("mir-"))
        .map(|flag| format!("-Z{flag}"));
    let mut compiler = Command::new(&rustc);
    compiler.args(["--edition=2024", "-Copt-level=3", "build/shapes.rs", "-o"]).arg(&program).args(pass_flags);
    if let Some(linker) = env::var_os("RUSTC_LINKER").filter(|_| variable("HOST") == variable("TARGET")) {
        compiler.arg("-C").arg([OsString::from("linker="), linker].into_iter().collect::<OsString>());
    }
    let compiled = compiler.output().expect("the compiler starts");
    assert!(compiled.status.success(), "cannot compile:\n{}", String::from_utf8_lossy(&compiled.stderr));

    if !Command::new(&program).output().expect("the program starts").status.success() {
        let version = Command::new(&rustc).arg("--version").output().expect("the compiler starts").stdout;
        let version = String::from_utf8_lossy(&version);
        println!("cargo::error={} miscompiles optimized comparisons (rust-lang/rust#158206)", version.trim());
        println!(
            "cargo::error=in a checkout, run cargo inside it and without RUSTFLAGS: .cargo/config.toml has the flags"
        );
        println!("cargo::error=elsewhere, set RUSTC_BOOTSTRAP=1 and add to RUSTFLAGS: {FLAGS}");
    }
}

/// Returns a variable that Cargo sets for build scripts.
fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("{name} is not set; only Cargo can run this"))
}
