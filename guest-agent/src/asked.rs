//! Being asked to end: a host presses Ctrl-Alt-Del, and the kernel sends its init a SIGINT.

#![expect(unsafe_code, reason = "blocks a signal and waits for it")]

use std::mem::MaybeUninit;
use std::ptr;
use std::thread;

use rustix::system::{RebootCommand, reboot};

/// Has `end` called once the host asks this guest to end. Called by init before it starts threads, since all of
/// them have to leave the signal alone.
pub(crate) fn on_ctrl_alt_del(end: impl FnOnce() + Send + 'static) {
    let mut signals = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is filled in before it is used, and blocking a signal changes no memory of others.
    let signals = unsafe {
        libc::sigemptyset(signals.as_mut_ptr());
        libc::sigaddset(signals.as_mut_ptr(), libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, signals.as_ptr(), ptr::null_mut());
        signals.assume_init()
    };
    // Without this the kernel resets the machine by itself, and nothing more gets to a disk.
    if reboot(RebootCommand::CadOff).is_err() {
        return;
    }
    thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: waits for a signal of the set; the number is ours to be written.
        unsafe { libc::sigwait(&raw const signals, &raw mut signal) };
        end();
    });
}
