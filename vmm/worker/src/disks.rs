//! Serves disks of VMs in workers from the block cache of their groups.
//!
//! Each queue of such a disk has a line, and a thread of this process at the line's end. The thread opens no file by what
//! the worker says: it reads from the image that the description of the VM names.

#![expect(unsafe_code, reason = "hands memory of the frame store to the reader of an image")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use samepage_devices::disk::cache::{BLOCK_SIZE, Fetch};
use samepage_devices::disk::reader::{BlockReader, ReadImage};
use samepage_machine::DiskSpec;
use samepage_machine::vm::first_cached_layer;
use samepage_sharing::blocks::Image;
use samepage_sharing::service::BlockClient;
use samepage_sharing::service::line::messages::FileId;
use samepage_sharing::service::line::serving::{Fetching, Question, Serving};
use samepage_spec::{CachePolicy, Format};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::messages::{Answer, Order, VmNumber};
use crate::process::WorkerProcess;

/// Stack of a thread that serves a queue, in bytes.
const STACK_BYTES: usize = 256 << 10;

/// The threads that serve the disks of one VM. Dropping this ends them: the disks read directly then.
#[derive(Debug, Default)]
pub(crate) struct DiskServers(Vec<Server>);

#[derive(Debug)]
struct Server {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    is_set: AtomicBool,
    event: EventFd,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.is_set.store(true, Ordering::Release);
        // A full counter is readable as well.
        let _ = self.stop.event.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

impl DiskServers {
    /// Connects all disks of a VM that can use the cache. Returns remarks for the user as well, on disks that cannot be
    /// connected: these read directly.
    pub(crate) fn start(
        worker: &WorkerProcess,
        number: VmNumber,
        disks: &[DiskSpec],
        client: &BlockClient,
    ) -> (Self, Vec<String>) {
        let (mut servers, mut notices) = (Self::default(), Vec::new());
        for (index, disk) in disks.iter().enumerate() {
            let wants_cache = !matches!(disk.cache(), CachePolicy::None | CachePolicy::Buffered);
            let Some((path, format)) = cached_image(disk).filter(|_| wants_cache) else { continue };
            let connected =
                ReadImage::open(path, format).map_err(|error| error.to_string()).and_then(|image| {
                    let image = Arc::new(image);
                    for _ in 0..disk.queues() {
                        servers.0.push(connect(worker, (number, index), &image, client)?);
                    }
                    Ok(())
                });
            if let Err(reason) = connected {
                let id = disk.id(index);
                notices.push(format!("disk {id}: it is read without the block cache: {reason}"));
            }
        }
        (servers, notices)
    }

    /// Ends all threads. Nothing is delivered any more on return.
    pub(crate) fn end(&mut self) {
        self.0.clear();
    }
}

/// Returns the image of a disk that nobody writes to, if there is one, and its format if that is known.
fn cached_image(disk: &DiskSpec) -> Option<(&Path, Option<Format>)> {
    match first_cached_layer(disk)? {
        0 => Some((&disk.path, disk.format())),
        _ => Some((disk.backing.as_deref()?, disk.backing_format)),
    }
}

fn connect(
    worker: &WorkerProcess,
    (number, disk): (VmNumber, usize),
    image: &Arc<ReadImage>,
    client: &BlockClient,
) -> Result<Server, String> {
    let failed = |error: io::Error| format!("connect its VM's worker: {error}");
    let (serving, theirs) = Serving::create(client.clone(), disk).map_err(failed)?;
    let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
    let stop = Arc::new(Stop { is_set: AtomicBool::new(false), event });
    let (image, told) = (Arc::clone(image), Arc::clone(&stop));
    let thread = thread::Builder::new()
        .name("disk-server".into())
        .stack_size(STACK_BYTES)
        .spawn(move || serve(serving, image, &told))
        .map_err(failed)?;
    let server = Server { stop, thread: Some(thread) };
    match worker.ask_with(number, Order::ConnectDisk(disk), Some(theirs.as_fd())) {
        Ok((Answer::Done, _)) => Ok(server),
        Ok((Answer::Failed(reason), _)) => Err(reason),
        Ok((other, _)) => Err(format!("unexpected answer {other:?}")),
        Err(gone) => Err(gone.to_string()),
    }
}

/// Serves one queue until it is gone, or says what makes no sense, or this is to stop.
fn serve(serving: Serving, image: Arc<ReadImage>, stop: &Stop) {
    // Without a reader the line ends, and the disk reads directly.
    if let Ok(reader) = BlockReader::new(image, "disk-server") {
        let mut work = Work { serving, reader, fetches: Vec::new(), free: Vec::new() };
        // Whatever the reason, the line ends with this thread.
        let _ = work.go_on(stop);
        work.end();
    }
}

struct Work {
    serving: Serving,
    reader: BlockReader,
    /// What is being read, by number.
    fetches: Vec<Option<Fetching>>,
    free: Vec<usize>,
}

impl Work {
    fn go_on(&mut self, stop: &Stop) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        let files: [RawFd; 3] = [self.serving.event(), self.reader.event(), stop.event.as_raw_fd()];
        for file in files {
            epoll.ctl(ControlOperation::Add, file, interest)?;
        }
        while !stop.is_set.load(Ordering::Acquire) {
            let mut has_worked = false;
            while let Some(question) = self.serving.receive()? {
                has_worked = true;
                self.begin(&question)?;
            }
            for (id, is_read) in self.reader.work()? {
                has_worked = true;
                self.end_fetch(id, is_read)?;
            }
            if !has_worked {
                match epoll.wait(-1, &mut [EpollEvent::default(); 4]) {
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, question: &Question) -> io::Result<()> {
        let FileId { device, inode, format } = question.wanted.file;
        let first = question.wanted.first;
        let blocks = first..first.saturating_add(question.wanted.targets.len() as u64);
        let Some(source) = self.reader.locate([device, inode, format], blocks) else {
            return self.serving.pass(question);
        };
        for fetching in self.serving.begin(question, Image(source.image().parts()))? {
            let lease = Arc::new(self.serving.client().clone());
            let Fetching { first, blocks, landing, .. } = fetching;
            debug_assert!(landing.addr().get().is_multiple_of(BLOCK_SIZE as usize));
            let id = self.free.pop().unwrap_or_else(|| {
                self.fetches.push(None);
                self.fetches.len() - 1
            });
            // SAFETY: the landing place of a fetch is whole pages. Nothing else accesses them until the fetch ends, which
            // it does once the reader has finished. They exist as long as the group, which the client keeps.
            let fetch = unsafe { Fetch::new(first, blocks, landing, id as u64, lease) };
            self.fetches[id] = Some(fetching);
            self.reader.read(id, source, fetch);
        }
        Ok(())
    }

    fn end_fetch(&mut self, id: usize, is_read: bool) -> io::Result<()> {
        let Some(fetching) = self.fetches.get_mut(id).and_then(Option::take) else { return Ok(()) };
        self.free.push(id);
        self.serving.end(&fetching, is_read)
    }

    /// Ends all fetches, once nothing reads into their memory any more.
    fn end(self) {
        let Self { mut serving, reader, fetches, .. } = self;
        drop(reader);
        for fetching in fetches.into_iter().flatten() {
            // The disk may be gone.
            let _ = serving.end(&fetching, false);
        }
    }
}
