//! The `samepage` program: see `samepage --help`.

mod bench;
mod cli;
mod create;
mod demo;
mod ending;
mod generate;
mod plan;
mod run;
mod upkeep;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use clap_complete::CompleteEnv;

use cli::{Cli, Command};
use samepage_process::tell;

fn main() -> ExitCode {
    let result = match samepage_firecracker::args::of_process() {
        Some(Ok(args)) => samepage_firecracker::main(&args),
        Some(Err(code)) => return code,
        None => command(),
    };
    result.unwrap_or_else(|error| {
        tell::tell(tell::causes(&error));
        ExitCode::from(1)
    })
}

fn command() -> anyhow::Result<ExitCode> {
    // A shell asks with a variable of its own how to complete a command line, and the process ends here.
    CompleteEnv::with_factory(Cli::command).complete();
    // A wrong command line ends the process here, with status 2.
    let cli = Cli::parse();
    match &cli.command {
        Command::Firecracker(args) => samepage_firecracker::main(args),
        Command::Run(args) => run::run(args),
        Command::Serve(args) => run::serve(args),
        Command::Demo(args) => demo::main(args),
        Command::Analyze(args) => samepage_analyze::main(args),
        Command::Bench { arguments } => bench::main(arguments),
        Command::Client(command) => samepage_client::main(command),
        Command::Create(args) => create::main(args),
        Command::Worker => {
            samepage_worker::serve::main().context("hold VMs for another process").map(|()| ExitCode::SUCCESS)
        }
        Command::Config { command } => generate::config(command),
        Command::Completions { shell } => generate::completions(*shell),
        Command::Man { folder } => generate::manual(folder),
    }
}
