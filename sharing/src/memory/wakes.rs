//! Wakes writers that the wake of their window has missed.
//!
//! A writer that meets a protected page looks at the page once more before it sleeps. The kernel lets it sleep
//! if the page is absent or read-only by then (`userfaultfd_must_wait` in fs/userfaultfd.c), whether or not it
//! is still protected. Between the two looks the window may end: its wake finds nobody, and afterwards
//! the page of zeros, a discarded page or a page of a frame is absent or read-only without being protected.
//! The writer has no time limit for these steps: it may lose its processor between them.
//!
//! So a second wake at a fixed time is no answer. The kernel reports every writer that goes to sleep to whoever
//! polls the userfaultfd. A thread does so, and wakes all writers a moment later. A writer whose page is
//! still protected goes back to sleep, and is reported again.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;

use crate::memory::uffd::Userfaultfd;

/// How long a writer sleeps before it is woken: longer than a window, so that most are woken by theirs.
const PAUSE: Duration = Duration::from_millis(1);
/// Stack of the thread, in bytes.
const STACK_BYTES: usize = 64 << 10;
/// Userfaultfds that are reported by one call.
const EVENTS: usize = 16;

/// A thread that wakes writers of some userfaultfds. It ends when this value is dropped.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    epoll: OwnedFd,
    /// An eventfd that is written when the thread is to end.
    stop: OwnedFd,
    /// By the number of their descriptors. One that is closed leaves epoll by itself.
    watched: Mutex<HashMap<RawFd, Weak<Userfaultfd>>>,
}

impl Watch {
    /// Starts the thread, with nothing to watch.
    ///
    /// # Errors
    /// Where descriptors or threads have run out.
    pub fn start() -> io::Result<Self> {
        // SAFETY: takes flags alone and returns a new descriptor.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: as above.
        let stop = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        let shared = Arc::new(Shared { epoll, stop, watched: Mutex::default() });
        shared.add(shared.stop.as_raw_fd())?;
        let watching = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("sharing-wake".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || watching.watch())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Wakes the writers of a userfaultfd from now on, for as long as it is open.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub(crate) fn watch(&self, uffd: &Arc<Userfaultfd>) -> io::Result<()> {
        let fd = uffd.as_raw_fd();
        let mut watched = self.shared.watched.lock();
        watched.retain(|_, known| known.strong_count() > 0);
        watched.insert(fd, Arc::downgrade(uffd));
        self.shared.add(fd)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let one = 1_u64;
        // SAFETY: writes eight bytes of a live number to a descriptor that is ours.
        unsafe { libc::write(self.shared.stop.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn add(&self, fd: RawFd) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: the event is a live struct.
        let failed =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) } != 0;
        if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn watch(&self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        loop {
            // SAFETY: the kernel writes at most so many events to the live array.
            let found = unsafe {
                libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EVENTS as libc::c_int, -1)
            };
            // Nothing but a signal ends the wait without an event.
            let asleep = &events[..usize::try_from(found).unwrap_or(0)];
            if asleep.iter().any(|event| event.u64 == self.stop.as_raw_fd() as u64) {
                return;
            }
            std::thread::sleep(PAUSE);
            for event in asleep {
                let uffd = self.watched.lock().get(&(event.u64 as RawFd)).and_then(Weak::upgrade);
                if let Some(uffd) = uffd {
                    // The range is the constant of `wake_all`, and the kernel has no other reason to refuse.
                    let _ = uffd.wake_all();
                }
            }
        }
    }
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::memory::ram::{PAGE_SIZE, Ram};

    /// Whether a writer sleeps.
    fn asleep(uffd: &Userfaultfd) -> bool {
        let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the argument is one live struct.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }

    #[test]
    fn a_writer_that_no_window_wakes_is_woken() {
        let uffd = Arc::new(Userfaultfd::open().unwrap());
        let ram = Ram::reserve(PAGE_SIZE).unwrap();
        let page = ram.range(0, 1);
        uffd.register(page).unwrap();
        uffd.protect(page).unwrap();
        let address = page.address();
        let (done, ended) = mpsc::channel();
        let writer = std::thread::spawn(move || {
            // SAFETY: the page is reserved, writable and this test's own, which outlives the thread.
            unsafe { (address as *mut u8).write_volatile(1) };
            done.send(()).unwrap();
        });
        while !asleep(&uffd) {
            std::thread::yield_now();
        }
        // The window has ended, and the writer was missed.
        uffd.unprotect_silently(page).unwrap();
        assert!(ended.try_recv().is_err() && asleep(&uffd));
        let watch = Watch::start().unwrap();
        watch.watch(&uffd).unwrap();
        let woken = ended.recv_timeout(Duration::from_secs(30));
        // Whatever was found, the thread is not to be left behind.
        uffd.wake(page).unwrap();
        writer.join().unwrap();
        woken.expect("the writer sleeps for ever");
        assert!(!asleep(&uffd));
    }

    #[test]
    fn a_userfaultfd_that_is_closed_is_watched_no_longer() {
        let watch = Watch::start().unwrap();
        for _ in 0..3 {
            let uffd = Arc::new(Userfaultfd::open().unwrap());
            watch.watch(&uffd).unwrap();
            assert_eq!(watch.shared.watched.lock().len(), 1);
        }
    }
}
