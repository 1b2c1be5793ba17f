//! Requests to shut down: a host presses Ctrl-Alt-Del, and the kernel sends init a SIGINT.

#![expect(unsafe_code, reason = "blocks a signal and waits for it")]

use std::mem::MaybeUninit;
use std::ptr;
use std::thread;

use rustix::system::{RebootCommand, reboot};

/// Calls `end` when the host asks this guest to shut down. Init calls this before it starts threads, because
/// all threads must block the signal.
pub(crate) fn on_ctrl_alt_del(end: impl FnOnce() + Send + 'static) {
    let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is filled in before its use, and blocking a signal changes no other memory.
    let signals = unsafe {
        libc::sigemptyset(signals.as_mut_ptr());
        libc::sigaddset(signals.as_mut_ptr(), libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, signals.as_ptr(), ptr::null_mut());
        signals.assume_init()
    };
    // Otherwise the kernel resets the machine itself, and no more data reaches a disk.
    if reboot(RebootCommand::CadOff).is_err() {
        return;
    }
    thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: the call waits for a signal of the set and writes to this function's own number.
        unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
        end();
    });
}
