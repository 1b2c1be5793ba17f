//! `samepage-agent`: init of a test guest, or a command.

#![forbid(unsafe_code)]

use samepage_agent::command::{HELP, parse_list};
use samepage_agent::hole::serve::{self, Publisher};
use samepage_agent::hole::{self};
use samepage_agent::init;
use samepage_agent::options::{self, Action, Options};
use samepage_agent::run::{Runner, say};
use std::process::ExitCode;

const USAGE: &str = "\
The agent of samepage inside Linux guests.

Usage: samepage-agent --publish|--once|--check [--interval SECONDS] [--verbose]
       samepage-agent COMMAND...
       agent=COMMAND,COMMAND,...  on the kernel's command line, with the agent as init

Publishing tells the host what the guest's pages are for, as /proc/kpageflags has
it, so that the host looks first where sharing memory pays and takes back what is
free. It needs root, and /dev/mem in a VM of samepage with --memory-hole on, or
the driver virtio_console in one with --memory-hole port.
  --publish             publish again and again, at less than 1% of a processor
  --once                publish once
  --check               publish once and compare with /proc/kpageflags: fails
                        where the flags are not the kernel's
  --interval SECONDS    the time between two passes, whatever they cost
  --verbose, -v         print a line for each pass
It exits with 0, with 1 if something failed on the way, with 2 if an option could
not be read, or with 3 where this guest cannot publish; then it says why.

With commands it runs them one after the other and prints one line for each:
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
    match options::parse(&arguments) {
        Ok(Some(options)) => return publish(options),
        Ok(None) => {}
        Err(error) => {
            eprintln!("samepage-agent: {error}; `samepage-agent --help` lists the options");
            return ExitCode::from(2);
        }
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

/// The exit status if this guest cannot publish page types.
const CANNOT: u8 = 3;

fn publish(options: Options) -> ExitCode {
    let how = serve::Options { interval: options.interval, verbose: options.verbose };
    let mut publisher = match Publisher::open(how) {
        Ok(publisher) => publisher,
        Err(error) => {
            eprintln!("samepage-agent: {error}");
            return ExitCode::from(CANNOT);
        }
    };
    match act(options, &mut publisher) {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => {}
        Err(error) => eprintln!("samepage-agent: {error}"),
    }
    ExitCode::FAILURE
}

/// Returns whether a check found the expected flags.
fn act(options: Options, publisher: &mut Publisher) -> Result<bool, hole::Error> {
    match options.action {
        Action::Serve => match publisher.serve()? {},
        Action::Once => {
            let pass = publisher.pass()?;
            if options.verbose {
                say(format_args!("pass {pass}"));
            }
            Ok(true)
        }
        Action::Check => {
            let pass = publisher.pass()?;
            if options.verbose {
                say(format_args!("pass {pass}"));
            }
            let checked = publisher.check()?;
            say(format_args!("check {} {checked}", if checked.passed() { "ok" } else { "failed:" }));
            Ok(checked.passed())
        }
    }
}
