//! The demo's screen: a bar for each VM, redrawn in place on a terminal; plain lines elsewhere.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use samepage_sharing::PAGE_SIZE;

use super::Progress;
use samepage_host::statistics::{Sample, VmSample};

/// Cells of a VM's bar, so that a line fits into 80 columns.
const BAR: usize = 22;
/// Number of VMs with a line of their own, so that the picture fits into 24 lines.
const SHOWN: usize = 14;
/// How often a plain line is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(1);

/// The display of the demo's progress.
pub(super) struct Display {
    mode: Mode,
    can_save: u64,
    phase: &'static str,
    /// Lines on the screen that the next drawing overwrites.
    drawn: usize,
    last_plain: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Plain,
    Terminal,
}

impl Display {
    pub(super) fn off() -> Self {
        Self { mode: Mode::Off, can_save: 0, phase: "", drawn: 0, last_plain: None }
    }

    pub(super) fn new(terminal: bool, can_save: u64) -> Self {
        let mode = if terminal { Mode::Terminal } else { Mode::Plain };
        Self { mode, can_save, ..Self::off() }
    }

    /// Sets the description of the present phase.
    pub(super) fn phase(&mut self, phase: &'static str) {
        self.phase = phase;
        self.last_plain = None;
    }

    pub(super) fn draw(&mut self, elapsed: Duration, sample: &Sample, progress: &[Progress]) {
        let text = match self.mode {
            Mode::Off => return,
            Mode::Plain => {
                if self.last_plain.is_some_and(|last| last.elapsed() < PLAIN_EVERY) {
                    return;
                }
                self.last_plain = Some(Instant::now());
                self.plain(elapsed, sample, progress)
            }
            Mode::Terminal => self.screen(elapsed, sample, progress),
        };
        // The demo continues without a picture if standard output is closed.
        let _ = io::stdout().lock().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    }

    /// Keeps the last picture on the screen.
    pub(super) fn finish(&mut self) {
        self.drawn = 0;
    }

    fn plain(&self, elapsed: Duration, sample: &Sample, progress: &[Progress]) -> String {
        let rounds = progress.iter().map(|vm| vm.rounds).min().unwrap_or(0);
        format!(
            "{:5.1} s  resident {}  shared {} pages  saved {} of at least {}  sharing CPU {:.2} s  rounds {rounds}  ({})\n",
            elapsed.as_secs_f64(),
            mebibytes(sample.resident_bytes),
            sample.engine.pages_shared,
            mebibytes(gross_saved(sample)),
            mebibytes(self.can_save),
            sample.engine.cpu_seconds,
            self.phase,
        )
    }

    fn screen(&mut self, elapsed: Duration, sample: &Sample, progress: &[Progress]) -> String {
        let mut lines = vec![
            format!("{:5.1} s  {}", elapsed.as_secs_f64(), self.phase),
            String::new(),
            format!("VM       memory  {:BAR$}      own  shared    zero  verified", ""),
        ];
        for (vm, progress) in sample.vms.iter().zip(progress).take(SHOWN) {
            let state = match progress.done {
                _ if progress.corrupt > 0 => "CORRUPT".to_owned(),
                Some(_) => format!("{} rounds, done", progress.rounds),
                None if progress.ready => format!("{} rounds", progress.rounds),
                None => "filling".to_owned(),
            };
            if sample.vms.len() > SHOWN {
                lines.push(format!("and {} more", sample.vms.len() - SHOWN));
            }
            lines.push(format!(
                "{:8} {:>6}  {}  {:>6}  {:>6}  {:>6}  {state}",
                vm.name,
                short(vm.memory_bytes),
                bar(vm),
                short(vm.pages.pages_private * PAGE_SIZE as u64),
                short(vm.pages.pages_merged * PAGE_SIZE as u64),
                short(vm.pages.zero_pages * PAGE_SIZE as u64),
            ));
        }
        lines.push(format!("{:17}\x1b[31m█\x1b[0m own  \x1b[32m▓\x1b[0m shared  ░ zero pages freed", ""));
        lines.push(String::new());
        lines.push(format!(
            "resident {}   saved {} of at least {}   sharing CPU {:.2} s",
            mebibytes(sample.resident_bytes),
            mebibytes(gross_saved(sample)),
            mebibytes(self.can_save),
            sample.engine.cpu_seconds,
        ));
        let mut text = String::new();
        if self.drawn > 0 {
            let _ = write!(text, "\x1b[{}A", self.drawn);
        }
        for line in &lines {
            let _ = writeln!(text, "\r{line}\x1b[K");
        }
        self.drawn = lines.len();
        text
    }
}

fn gross_saved(sample: &Sample) -> u64 {
    (sample.engine.pages_sharing + sample.engine.zero_pages) * PAGE_SIZE as u64
}

/// Returns a VM's memory as a bar: own pages, shared pages, zero pages, and untouched pages.
fn bar(vm: &VmSample) -> String {
    let pages = vm.pages.pages.max(1);
    let cells = |count: u64| (count * BAR as u64).div_ceil(pages) as usize;
    let own = cells(vm.pages.pages_private).min(BAR);
    let shared = cells(vm.pages.pages_merged).min(BAR - own);
    let zero = cells(vm.pages.zero_pages).min(BAR - own - shared);
    let rest = BAR - own - shared - zero;
    format!(
        "\x1b[31m{}\x1b[32m{}\x1b[0m{}{}",
        "█".repeat(own),
        "▓".repeat(shared),
        "░".repeat(zero),
        "·".repeat(rest)
    )
}

/// Returns bytes as MiB with one decimal.
pub(super) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Returns bytes as whole MiB, in few letters.
fn short(bytes: u64) -> String {
    format!("{}M", (bytes + (1 << 19)) >> 20)
}
