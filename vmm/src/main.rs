//! The `samepage` program: see `samepage --help`.

mod analyze;
mod bench;
mod cli;
mod demo;
mod plan;
mod report;
mod run;
mod stdin;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    // Wrong usage ends here, with status 2.
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Serve(args) => run::serve(args),
        Command::Demo(args) => demo::main(args),
        Command::Analyze(args) => analyze::main(args),
        Command::Bench(args) => bench::main(args),
    };
    result.unwrap_or_else(|error| {
        report::tell(report::causes(&error));
        ExitCode::from(1)
    })
}
