//! The terminal in raw mode: each key goes to the guest immediately, and the guest echoes it.
//!
//! The terminal's previous settings are restored however the process ends: when the guard is dropped (also in a
//! panic), or in a handler of the signals that kill a faulty process.

#![expect(unsafe_code, reason = "reads and sets terminal attributes, also from a signal handler")]

use std::cell::UnsafeCell;
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{STDIN_FILENO, c_int, c_void, siginfo_t, termios};
use samepage_sharing::loss;
use vmm_sys_util::signal::register_signal_handler;

/// Signals that end a faulty process, besides SIGSEGV and SIGBUS.
const FATAL: [c_int; 3] = [libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// The settings to restore. A process has one terminal, and signal handlers can reach only statics.
struct Saved {
    valid: AtomicBool,
    settings: UnsafeCell<MaybeUninit<termios>>,
}

// SAFETY: only `RawTerminal::enter` writes `settings`, and only while `valid` is false. Only the thread that
// changes `valid` from true to false reads it, and no two threads can do that.
unsafe impl Sync for Saved {}

static SAVED: Saved =
    Saved { valid: AtomicBool::new(false), settings: UnsafeCell::new(MaybeUninit::uninit()) };

/// The kind of standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StdinKind {
    /// A terminal that this process may read from.
    Terminal,
    /// A terminal that belongs to another job of the shell: reading would stop the process.
    BackgroundTerminal,
    /// A pipe, a file, nothing.
    Stream,
}

/// Returns the kind of standard input.
pub fn stdin_kind() -> StdinKind {
    // SAFETY: the calls query a file descriptor, which may be closed, and the process.
    unsafe {
        if libc::isatty(STDIN_FILENO) == 0 {
            StdinKind::Stream
        } else if libc::tcgetpgrp(STDIN_FILENO) == libc::getpgrp() {
            StdinKind::Terminal
        } else {
            StdinKind::BackgroundTerminal
        }
    }
}

/// Returns whether standard output is a terminal.
pub fn stdout_is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Standard input in raw mode, until dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input, a terminal, into raw mode.
    pub fn enter() -> io::Result<Self> {
        if SAVED.valid.load(Ordering::Acquire) {
            return Err(io::Error::other("standard input is in raw mode already"));
        }
        let mut settings = MaybeUninit::uninit();
        // SAFETY: the structure has the required size, and a successful call initialises it.
        let before = unsafe {
            if libc::tcgetattr(STDIN_FILENO, settings.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            settings.assume_init()
        };
        // SAFETY: no thread reads the settings while `valid` is false.
        unsafe { (*SAVED.settings.get()).write(before) };
        SAVED.valid.store(true, Ordering::Release);
        let guard = Self(());

        // Faults in guest memory end a VM, not the process.
        loss::on_other_faults(die)?;
        for signal in FATAL {
            register_signal_handler(signal, die).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        let mut raw = before;
        // Output processing stays on: our own messages end lines with a plain newline.
        raw.c_iflag &= !(libc::BRKINT | libc::ICRNL | libc::INLCR | libc::IGNCR | libc::ISTRIP | libc::IXON);
        raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::IEXTEN | libc::ISIG);
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        // SAFETY: sets attributes from an initialized structure.
        if unsafe { libc::tcsetattr(STDIN_FILENO, libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(guard)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the settings of the terminal, if they were changed. Safe to call from a signal handler.
fn restore() {
    if SAVED.valid.swap(false, Ordering::AcqRel) {
        // SAFETY: `valid` was true, so the settings are initialised, and no other thread reads them.
        unsafe { libc::tcsetattr(STDIN_FILENO, libc::TCSANOW, (*SAVED.settings.get()).as_ptr()) };
    }
}

extern "C" fn die(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    restore();
    // SAFETY: both calls are allowed in signal handlers. The signal is blocked until the handler returns. It
    // then ends the process as if there had been no handler.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
