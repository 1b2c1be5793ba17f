//! Waiting for several files at once.

#![expect(unsafe_code, reason = "calls poll")]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use libc::{POLLIN, POLLOUT, c_int, c_short, pollfd};

/// Waits until at least one of the files is readable, at its end or in error. Returns for each file whether
/// it is. `None` is never readable.
pub fn wait_readable<const N: usize>(files: [Option<RawFd>; N]) -> io::Result<[bool; N]> {
    // poll ignores negative numbers.
    let mut polled = files.map(|file| pollfd { fd: file.unwrap_or(-1), events: POLLIN, revents: 0 });
    wait(&mut polled)?;
    Ok(polled.map(|file| file.revents != 0))
}

/// Returns whether the file is readable at this moment.
pub fn is_readable_now(file: RawFd) -> io::Result<bool> {
    is_ready(file, POLLIN, Duration::ZERO)
}

/// Returns whether the file becomes writable, or fails, within this time.
pub fn is_writable_within(file: RawFd, wait: Duration) -> io::Result<bool> {
    is_ready(file, POLLOUT, wait)
}

fn is_ready(file: RawFd, events: c_short, wait: Duration) -> io::Result<bool> {
    let mut polled = pollfd { fd: file, events, revents: 0 };
    let milliseconds = c_int::try_from(wait.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: the one entry is valid.
    match unsafe { libc::poll(&raw mut polled, 1, milliseconds) } {
        0.. => Ok(polled.revents != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls poll(2) without a timeout, again after interruptions by signals.
pub fn wait(files: &mut [pollfd]) -> io::Result<()> {
    loop {
        // SAFETY: the pointer and the length are those of the slice.
        let ready = unsafe { libc::poll(files.as_mut_ptr(), files.len() as libc::nfds_t, -1) };
        if ready >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn readable_files_are_told_apart() {
        let quiet = EventFd::new(0).unwrap();
        let ready = EventFd::new(0).unwrap();
        ready.write(1).unwrap();
        let files = [Some(quiet.as_raw_fd()), None, Some(ready.as_raw_fd())];
        assert_eq!(wait_readable(files).unwrap(), [false, false, true]);
    }
}
