//! Runs parts of the tests in parallel, and prints the progress after each.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Results;
use super::outcome::Outcome;
use super::programs::Part;

/// Time limit for one part. A part that takes longer hangs.
const LONGEST: Duration = Duration::from_secs(15 * 60);
/// Time without a finished part after which a line names the running ones.
const QUIET: Duration = Duration::from_secs(20);

enum Event {
    Started(String),
    Ended(Outcome, usize),
}

/// Runs all parts, `jobs` at a time, and prints the result of each.
pub(super) fn run(parts: Vec<Part>, jobs: usize, results: &mut Results) -> Result<()> {
    let all: usize = parts.iter().map(|part| part.tests).sum();
    println!("{all} tests in {} processes, {jobs} at a time", parts.len());
    let queue = Mutex::new(parts.into_iter());
    let (sender, events) = mpsc::channel();
    let start = Instant::now();
    thread::scope(|scope| {
        for _ in 0..jobs {
            let (queue, sender) = (&queue, sender.clone());
            scope.spawn(move || {
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some(part) = next() {
                    run_part(part, &sender);
                }
            });
        }
        drop(sender);
        let (mut done, mut running) = (0, BTreeMap::new());
        loop {
            match events.recv_timeout(QUIET) {
                Ok(Event::Started(name)) => {
                    running.insert(name, Instant::now());
                }
                Ok(Event::Ended(outcome, tests)) => {
                    running.remove(&outcome.name);
                    done += tests;
                    report(&outcome, &format!("{done:>4} of {all}, {}", clock(start.elapsed())), results);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let names: Vec<_> = running
                        .iter()
                        .map(|(name, since): (&String, &Instant)| {
                            format!("{name} ({} s)", since.elapsed().as_secs())
                        })
                        .collect();
                    println!(
                        "[{done:>4} of {all}, {}] still running: {}",
                        clock(start.elapsed()),
                        names.join(", ")
                    );
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    io::stdout().flush().context("printing how the tests went")
}

fn run_part(part: Part, events: &Sender<Event>) {
    let started = Instant::now();
    // The receiver outlives all lanes.
    let _ = events.send(Event::Started(part.name.clone()));
    let (output, ended) = captured(part.command);
    let outcome = Outcome { name: part.name, output, ended, took: started.elapsed() };
    let _ = events.send(Event::Ended(outcome, part.tests));
}

/// Runs a command to its end. Returns its output, and the reason if it did not succeed.
fn captured(mut command: Command) -> (String, Result<(), String>) {
    let mut output = Vec::new();
    let mut run = || -> io::Result<Result<(), String>> {
        // A process that a test left running could keep a pipe open, so use a file.
        let mut file = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file.try_clone()?);
        let mut child = command.spawn()?;
        let hangs = !ends_within(&child, LONGEST)?;
        if hangs {
            child.kill()?;
        }
        let status = child.wait()?;
        file.rewind()?;
        file.read_to_end(&mut output)?;
        Ok(match hangs {
            true => Err(format!("hung: killed after {} s", LONGEST.as_secs())),
            false if status.success() => Ok(()),
            false => Err(status.to_string()),
        })
    };
    let ended = run().unwrap_or_else(|error| Err(format!("cannot be run: {error}")));
    (String::from_utf8_lossy(&output).into_owned(), ended)
}

fn ends_within(child: &Child, longest: Duration) -> io::Result<bool> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let longest = Timespec::try_from(longest).map_err(io::Error::other)?;
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&longest))?;
    Ok(ended > 0)
}

fn report(outcome: &Outcome, progress: &str, results: &mut Results) {
    let skipped = results.skipped;
    let good = outcome.add_to(results);
    let word = match good {
        true if results.skipped > skipped => "left out",
        true => "ok",
        false => "FAILED",
    };
    if !good || results.skipped > skipped {
        println!("{}", outcome.output.trim_end());
    }
    println!("[{progress}] {} {word} in {:.1} s", outcome.name, outcome.took.as_secs_f64());
}

fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, script: &str) -> Part {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Part { name: name.into(), tests: 1, command }
    }

    #[test]
    fn parts_run_side_by_side_and_are_counted() {
        let passed = "echo 'test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out'";
        // Each waits for the other.
        let folder = tempfile::tempdir().expect("a folder");
        let wait = |mine: &str, theirs: &str| {
            let path = |name: &str| folder.path().join(name).display().to_string();
            format!(
                "mkfifo {0} 2>/dev/null; mkfifo {1} 2>/dev/null; {2}",
                path(mine),
                path(theirs),
                match mine {
                    "a" => format!("echo > {}; cat {}; {passed}", path("a"), path("b")),
                    _ => format!("cat {}; echo > {}; {passed}", path("a"), path("b")),
                }
            )
        };
        let parts =
            vec![part("one", &wait("a", "b")), part("two", &wait("b", "a")), part("dies", "kill -9 $$")];
        let mut results = Results::default();
        run(parts, 2, &mut results).expect("the tests run");
        assert_eq!((results.passed, results.failed), (2, 1));
        assert_eq!(results.failures.len(), 1);
        assert!(results.failures[0].starts_with("dies (signal: 9"), "{:?}", results.failures);
    }

    #[test]
    fn times_are_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_secs(125)), "2:05");
    }
}
