//! `samepage-agent`: init of a test guest, or a command by itself.

#![forbid(unsafe_code)]

use samepage_agent::command::{HELP, parse_list};
use samepage_agent::init;
use samepage_agent::run::Runner;
use std::process::ExitCode;

const USAGE: &str = "\
The agent of samepage inside Linux guests.

Usage: samepage-agent COMMAND...
       agent=COMMAND,COMMAND,...  on the kernel's command line, with the agent as init

Runs the commands one after the other and prints one line for each:
  samepage-agent: NAME ok KEY=VALUE...
  samepage-agent: NAME failed: REASON
The first failure ends the list. As init (process 1) it mounts /proc, /sys and
/dev, prints `samepage-agent: ready ...` first, and resets the machine at the
end. Otherwise it exits with 0, with 1 if a command failed, or with 2 if a
command could not be read; nothing is run then.

Commands:
";

const EXAMPLE: &str = "
Example: samepage-agent fill:16M:1 verify
";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        None | Some("-h" | "--help") => {
            println!("{USAGE}{HELP}\n{EXAMPLE}");
            return ExitCode::SUCCESS;
        }
        Some("-V" | "--version") => {
            println!("samepage-agent {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(_) => {}
    }
    match parse_list(&arguments.join(",")) {
        Ok(commands) if Runner::new(false).run(&commands) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("samepage-agent: {error}; `samepage-agent --help` lists the commands");
            ExitCode::from(2)
        }
    }
}
