//! A writer that the wake of its window misses goes on soon all the same, whatever the engine does next.
#![expect(unsafe_code, reason = "plays a guest that writes")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::counted::Counted;
use common::{Guest, losses, no_rest};
use samepage_sharing::Slot;
use samepage_sharing::engine::{Engine, Mode};
use samepage_sharing::local::LocalMemory;
use samepage_sharing::space::Space;
use samepage_sharing::store::FrameStore;

/// How long a busy machine may keep a writer that was woken from its processor.
const LONG: Duration = Duration::from_secs(60);

/// A thread that writes to a page once.
struct Writer {
    ended: Receiver<()>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts it; its number is noted in `number`.
    fn start(guest: &Guest, page: u32, number: &Arc<AtomicI32>) -> Self {
        let (ram, number) = (guest.ram.clone(), Arc::clone(number));
        let (done, ended) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: asks for a number.
            number.store(unsafe { libc::gettid() }, Ordering::SeqCst);
            let address = ram.range(page, 1).page(0).cast::<u64>().cast_mut();
            // SAFETY: the page is reserved, writable and this thread's to write to.
            unsafe { address.write_volatile(7) };
            done.send(()).unwrap();
        });
        Self { ended, thread }
    }

    fn goes_on(self) {
        self.ended.recv_timeout(LONG).expect("the writer sleeps, and nobody wakes it");
        self.thread.join().unwrap();
    }
}

/// Waits until a thread sleeps in a page fault, or for a while where the kernel does not tell.
fn wait_asleep(number: &AtomicI32) {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        let thread = number.load(Ordering::SeqCst);
        let place = std::fs::read_to_string(format!("/proc/self/task/{thread}/wchan"));
        if thread != 0 && place.is_ok_and(|place| place == "handle_userfault") {
            return;
        }
        std::thread::yield_now();
    }
}

/// A guest with a writer that begins as soon as its page is protected, and calls that wait for it to sleep and
/// never wake it.
fn missed(pages: u32) -> (Guest, FrameStore, Counted, mpsc::Receiver<Writer>) {
    let guest = Guest::new(pages);
    let store = FrameStore::create(4096).unwrap();
    let number = Arc::new(AtomicI32::new(0));
    let (give, take) = mpsc::channel();
    let ram = guest.ram.clone();
    let started = parking_lot::Mutex::new(Some(give));
    let calls = Counted::mute(&store, move |name| {
        // What comes after the protection.
        if name == "map"
            && let Some(give) = started.lock().take()
        {
            give.send(Writer::start(&Guest { ram: ram.clone() }, 0, &number)).unwrap();
            wait_asleep(&number);
        }
    });
    (guest, store, calls, take)
}

#[test]
fn a_writer_that_was_missed_as_its_page_came_to_a_frame_goes_on() {
    let (guest, mut store, calls, writer) = missed(8);
    guest.write(0, 5);
    let hold = store.allocate(1, None).unwrap();
    let frame = hold.first();
    store.write(&hold, guest.ram.range(0, 1).page(0)).unwrap();
    store.fill(&hold);
    let host = store.host(Arc::new(calls), 1).unwrap();
    let mut space = Space::new(Arc::new(LocalMemory::new(guest.ram.clone(), host).unwrap()));
    assert_eq!(space.merge(0, frame, 1, &mut store).unwrap(), 1);
    writer.recv().unwrap().goes_on();
}

/// The engine does nothing for such a VM any more.
fn missed_and_then(what: impl FnOnce(&mut Engine, Slot)) {
    let (guest, store, calls, writer) = missed(8);
    (0..2).for_each(|page| guest.write(page, 5));
    let mut engine = Engine::new(&no_rest(false), store, Box::new(calls)).unwrap();
    let slot = engine.add(guest.ram.clone(), None, losses().1).unwrap();
    while engine.pass_step().is_none() {}
    assert_eq!(engine.statistics().pages_sharing, 1);
    what(&mut engine, slot);
    writer.recv().unwrap().goes_on();
}

#[test]
fn a_writer_of_a_vm_that_nobody_follows_goes_on() {
    missed_and_then(|engine, slot| engine.set_mode(slot, Mode::Off));
}

#[test]
fn a_writer_of_a_vm_that_was_removed_goes_on() {
    missed_and_then(|engine, slot| engine.remove(slot).unwrap());
}
