//! Runs the machine: prints its console, and learns from it how the script ended.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How long the console may be silent: beyond that the machine hangs.
const SILENCE: Duration = Duration::from_secs(10 * 60);
/// What the machine's first process says before the script's exit status.
const EXIT: &str = "lab: exit ";
/// What is printed where the emulator has spoiled a guest: samepage says the first, and a script that waits for a guest
/// the second. docs/lab.md says why.
const SPOILED: [&str; 2] = ["triple fault", "nothing moved for "];
/// What the machine's own kernel says when it cannot go on.
const PANIC: &str = "Kernel panic - not syncing";

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct End {
    /// The exit status of the script in the machine.
    pub(super) status: u8,
    /// A guest took an exception that it could not handle or stood still, or the machine's own kernel panicked or reset
    /// the machine. The emulator causes that now and then.
    pub(super) lost: bool,
}

/// Runs an emulator to its end.
///
/// # Errors
/// The emulator cannot be started, it fails before the script has ended, or the machine hangs.
pub(super) fn run(command: &mut Command) -> Result<End> {
    follow(command, SILENCE)
}

fn follow(command: &mut Command, silence: Duration) -> Result<End> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = Guard(child.with_context(|| format!("starting {program}"))?);
    let console = child.0.stdout.take().context("reading the machine's console")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || read(console, &sender));
    let (mut status, mut lost, mut panicked) = (None, false, false);
    loop {
        match lines.recv_timeout(silence) {
            Ok(line) => {
                let line = line.context("reading the machine's console")?;
                status = exit_status(&line).or(status);
                lost |= SPOILED.iter().any(|text| line.contains(text));
                panicked |= line.contains(PANIC);
                println!("{line}");
                io::stdout().flush().context("printing the machine's console")?;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the lab's machine printed nothing for {} s, and was killed", silence.as_secs())
            }
        }
    }
    let ended = child.0.wait().with_context(|| format!("waiting for {program}"))?;
    match status {
        Some(status) => Ok(End { status, lost }),
        // A script prints the consoles of guests, which may have panicked too. Then the script has a status.
        None if panicked => Ok(End { status: 1, lost: true }),
        // Nothing in the machine resets it before the script has ended, but for an exception that its kernel cannot handle.
        None if ended.success() => {
            println!("lab: the machine was reset");
            Ok(End { status: 1, lost: true })
        }
        None => bail!("the lab's machine ended before its script did ({program}: {ended})"),
    }
}

/// Sends the lines of the console. They may hold anything that guests print.
fn read(console: impl Read, lines: &mpsc::Sender<io::Result<String>>) {
    for line in BufReader::new(console).split(b'\n') {
        let line = line.map(|line| String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned());
        if lines.send(line).is_err() {
            return;
        }
    }
}

fn exit_status(line: &str) -> Option<u8> {
    line.strip_prefix(EXIT)?.parse().ok()
}

/// Kills the emulator if this process stops to follow it.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_status_is_that_of_the_script() -> Result<()> {
        let end = |status, lost| End { status, lost };
        assert_eq!(run(&mut shell(r"printf 'x\r\n\377\r\nlab: exit 0\r\n'"))?, end(0, false));
        // The emulator's own status says nothing.
        assert_eq!(run(&mut shell("echo lab: exit 7; exit 1"))?, end(7, false));
        assert_eq!(run(&mut shell("echo crashed: triple fault on; echo lab: exit 1"))?, end(1, true));
        assert_eq!(run(&mut shell("echo nothing moved for 300 s; echo lab: exit 1"))?, end(1, true));
        Ok(())
    }

    #[test]
    fn a_panic_counts_where_it_ends_the_machine() -> Result<()> {
        let panic = "echo '[ 1.0] Kernel panic - not syncing: corrupted stack'";
        assert_eq!(run(&mut shell(panic))?, End { status: 1, lost: true });
        assert_eq!(run(&mut shell(&format!("{panic}; echo lab: exit 1")))?, End { status: 1, lost: false });
        Ok(())
    }

    #[test]
    fn a_machine_that_was_reset_is_lost() -> Result<()> {
        assert_eq!(run(&mut shell("echo hello"))?, End { status: 1, lost: true });
        Ok(())
    }

    #[test]
    fn an_early_end_is_an_error() {
        let error = run(&mut shell("echo hello lab: exit 0; exit 3")).expect_err("there is no status");
        assert!(error.to_string().contains("ended before its script did (sh: exit status: 3)"), "{error}");
    }

    #[test]
    fn a_silent_machine_is_killed() {
        let error = follow(&mut shell("exec sleep 600"), Duration::from_millis(10)).expect_err("it hangs");
        assert!(error.to_string().contains("printed nothing"), "{error}");
    }
}
