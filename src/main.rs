//! The process: arguments, runtime and exit code.

use std::process::ExitCode;

use clap::Parser as _;

/// With the allocator of the system, a sixth of the time of publishing goes into allocations.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        // Fails only if a provider is installed already, which cannot happen here.
        return ExitCode::FAILURE;
    }
    let cli = match aurora_bus::cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(2);
            return if error.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return aurora_bus::cli::report_error(&error.into()),
    };
    let code = match cli.run_on(&runtime) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => aurora_bus::cli::report_error(&error),
    };
    // Blocking tasks that still wait are not awaited: everything accepted is durable by now.
    runtime.shutdown_background();
    code
}
