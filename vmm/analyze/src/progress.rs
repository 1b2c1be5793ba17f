//! Reports progress on standard error: one line that is redrawn on a terminal, and occasional lines
//! otherwise.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use samepage_text::units::bytes;

/// Time between two updates of the line on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
/// Time between two lines otherwise. Short work prints nothing.
const LINE: Duration = Duration::from_secs(10);

/// The progress display. It ends when dropped.
#[derive(Debug)]
pub(super) struct Progress {
    mode: Mode,
    total: u64,
    done: u64,
    started: Instant,
    shown: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Lines,
    Terminal,
}

impl Progress {
    /// Returns a display for work on `total` bytes.
    pub(super) fn new(total: u64) -> Self {
        let mode = if io::stderr().is_terminal() { Mode::Terminal } else { Mode::Lines };
        Self { mode, total, ..Self::off() }
    }

    /// Returns a display that prints nothing.
    pub(super) fn off() -> Self {
        let now = Instant::now();
        Self { mode: Mode::Off, total: 0, done: 0, started: now, shown: now }
    }

    /// Adds processed bytes.
    pub(super) fn add(&mut self, done: u64) {
        self.done += done;
        let every = match self.mode {
            Mode::Off => return,
            Mode::Lines => LINE,
            Mode::Terminal => REDRAW,
        };
        if self.shown.elapsed() < every {
            return;
        }
        self.shown = Instant::now();
        let line = line(self.done, self.total, self.started.elapsed());
        // A closed standard error needs no progress.
        let _ = match self.mode {
            Mode::Terminal => write!(io::stderr(), "\r\x1b[K{line}"),
            _ => writeln!(io::stderr(), "{line}"),
        };
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.mode == Mode::Terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(done: u64, total: u64, elapsed: Duration) -> String {
    let percent = (done as f64 * 100.0 / total.max(1) as f64).min(100.0);
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    format!("{percent:3.0} %: {} of {}, {}/s", bytes(done), bytes(total), bytes(rate as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_figures_with_units() {
        assert_eq!(
            line(1 << 29, 1 << 30, Duration::from_secs(2)),
            " 50 %: 512.0 MiB of 1.0 GiB, 256.0 MiB/s"
        );
        assert_eq!(line(0, 0, Duration::ZERO), "  0 %: 0 B of 0 B, 0 B/s");
    }
}
