//! x
#[derive(clap::Args)]
pub(crate) struct Arguments {}
pub(crate) fn run(_arguments: &Arguments) -> std::process::ExitCode { std::process::ExitCode::FAILURE }
