//! A guest's console that a test can wait on.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use samepage_resources::demo::report::Report;

/// Time limit for any step of a guest. Only a guest that hangs needs this long, because a test must not fail
/// on a busy host.
pub const TIME_LIMIT: Duration = Duration::from_secs(600);

/// The output of a guest so far. Clones share the same console.
#[derive(Clone, Debug, Default)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    text: Mutex<Text>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Text {
    lines: Vec<String>,
    rest: Vec<u8>,
}

impl Console {
    /// Returns the sink for the VM.
    #[must_use]
    pub fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(&self.shared)))
    }

    /// Returns all complete lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.shared.text.lock().lines.clone()
    }

    /// Waits for the first line for which `find` returns a value.
    ///
    /// # Panics
    /// Panics with all lines if no such line comes.
    pub fn wait_for<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + TIME_LIMIT;
        let mut text = self.shared.text.lock();
        let mut seen = 0;
        loop {
            if let Some(found) = text.lines[seen..].iter().find_map(|line| find(line)) {
                return found;
            }
            seen = text.lines.len();
            if self.shared.more.wait_until(&mut text, deadline).timed_out() {
                panic!("{what} did not come; the console has:\n{}", text.lines.join("\n"));
            }
        }
    }

    /// Waits for a report of the demo guest for which `find` returns a value.
    ///
    /// # Panics
    /// Panics like [`Console::wait_for`], and if the guest reports a corrupt page.
    pub fn wait_for_report<T>(&self, what: &str, find: impl Fn(&Report) -> Option<T>) -> T {
        self.wait_for(what, |line| {
            let report = Report::parse(line).ok()?;
            assert!(!matches!(report, Report::Corrupt { .. } | Report::BlkCorrupt { .. }), "{line}");
            find(&report)
        })
    }

    /// Waits until the demo guest has verified its memory `rounds` times.
    pub fn wait_for_round(&self, rounds: u64) {
        self.wait_for_report("a round", |report| {
            matches!(report, Report::Round { round, .. } if *round >= rounds).then_some(())
        });
    }

    /// Returns the number of the demo guest's last round, or 0 before the first.
    #[must_use]
    pub fn round(&self) -> u64 {
        let text = self.shared.text.lock();
        let round = |line: &String| match Report::parse(line) {
            Ok(Report::Round { round, .. }) => Some(round),
            _ => None,
        };
        text.lines.iter().rev().find_map(round).unwrap_or(0)
    }
}

struct Sink(Arc<Shared>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.0.text.lock();
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut text.rest)).trim_end().to_owned();
                text.lines.push(line);
                self.0.more.notify_all();
            } else {
                text.rest.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
