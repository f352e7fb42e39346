//! The process: arguments, runtime, exit code.

use std::process::ExitCode;

use clap::Parser as _;

/// The system's allocator took a sixth of the time of publishing.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        // Only a second call in one process gets here, and there is none.
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
        Err(error) => return aurora_bus::cli::fail(&error.into()),
    };
    let code = match cli.run_on(&runtime) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => aurora_bus::cli::fail(&error),
    };
    // Blocking work that still waits for its turn is not waited for: what matters is durable by now.
    runtime.shutdown_background();
    code
}
