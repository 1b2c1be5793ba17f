//! Signals that ask the process to end or to open its logs again, as a file that can be polled.

#![expect(unsafe_code, reason = "opens a signalfd and reads from it")]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libc::c_int;
use vmm_sys_util::signal::create_sigset;

/// SIGINT, SIGTERM, SIGHUP and SIGQUIT, caught for the whole process until it ends.
#[derive(Debug)]
pub struct ShutdownSignals {
    file: OwnedFd,
}

/// The meaning of SIGHUP for a process with log files: the terminal is gone, or the files were renamed.
#[derive(Debug)]
pub struct Hangup {
    /// Whether the process was started on a terminal, and without nohup.
    ends_with_terminal: bool,
}

impl Hangup {
    /// Finds out how the process was started.
    #[must_use]
    pub fn new() -> Self {
        Self { ends_with_terminal: !is_ignored(libc::SIGHUP) && has_terminal() }
    }

    /// Returns whether the SIGHUP that just arrived asks the process to end.
    #[must_use]
    pub fn is_end(&self) -> bool {
        self.ends_with_terminal && !has_terminal()
    }
}

impl Default for Hangup {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns whether the process belongs to a session with a terminal. The kernel removes the terminal before
/// it sends SIGHUP.
fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

impl ShutdownSignals {
    /// Catches the signals. To be called before any thread starts, so that all threads block them. SIGHUP and
    /// SIGQUIT stay ignored if the process was started so (nohup).
    pub fn catch() -> io::Result<Self> {
        let mut caught = vec![libc::SIGTERM, libc::SIGINT];
        caught.extend([libc::SIGHUP, libc::SIGQUIT].into_iter().filter(|&signal| !is_ignored(signal)));
        Ok(Self { file: catch(&caught)? })
    }

    /// Does the same for a process with logs, which always catches SIGHUP. See [`Hangup`].
    pub fn catch_with_hangup() -> io::Result<Self> {
        let mut caught = vec![libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        caught.extend([libc::SIGQUIT].into_iter().filter(|&signal| !is_ignored(signal)));
        Ok(Self { file: catch(&caught)? })
    }

    /// Returns the next signal that arrived, if any.
    pub fn take(&self) -> Option<c_int> {
        take(&self.file)
    }
}

/// SIGWINCH (the terminal has a new size), caught for the whole process.
#[derive(Debug)]
pub struct ResizeSignal {
    file: OwnedFd,
}

impl ResizeSignal {
    /// Catches the signal. To be called before any thread starts, so that all threads block it.
    pub fn catch() -> io::Result<Self> {
        Ok(Self { file: catch(&[libc::SIGWINCH])? })
    }

    /// Returns whether the signal arrived.
    pub fn take(&self) -> bool {
        take(&self.file).is_some()
    }
}

impl AsRawFd for ResizeSignal {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Blocks signals for this thread and for threads that it starts. They can be read from the returned file.
fn catch(signals: &[c_int]) -> io::Result<OwnedFd> {
    let set = create_sigset(signals).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // SAFETY: `set` is a valid set of signals.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: as above; the kernel copies the set.
    let file = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if file < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the file was just opened and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

fn take(file: &OwnedFd) -> Option<c_int> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    let size = size_of_val(&info);
    // SAFETY: the buffer has the given size. A read of signalfd fills it completely or fails.
    unsafe {
        let count = libc::read(file.as_raw_fd(), info.as_mut_ptr().cast(), size);
        (count == size as isize).then(|| info.assume_init().ssi_signo.cast_signed())
    }
}

impl AsRawFd for ShutdownSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn is_ignored(signal: c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action without changing it. Zeros are a valid value of the structure.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}
