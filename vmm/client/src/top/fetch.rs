//! Polls the server on its own thread, so that keys never wait for the server.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::socket::{Client, ClientError};
use hyper::Method;
use parking_lot::Mutex;
use samepage_api_types::lifecycle::Action;
use samepage_api_types::views::pages::VmPagesView;
use samepage_api_types::views::{CacheView, SharingView, VmSummary};
use serde_json::json;
use vmm_sys_util::eventfd::EventFd;

/// The data of the screen at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    /// The time of the request.
    pub(super) at: Instant,
    pub(super) vms: Vec<VmSummary>,
    pub(super) sharing: SharingView,
    pub(super) cache: CacheView,
    /// The use of one VM's pages, with the VM's name.
    pub(super) pages: Option<(String, VmPagesView)>,
}

/// Requests the data of the screen, and the use of one VM's pages.
pub(super) fn snapshot(client: &Client, of: Option<String>) -> Result<Snapshot, ClientError> {
    let at = Instant::now();
    // Request the VMs last, so that their figures are from the sample that the other requests have caused.
    let (sharing, cache) = (client.get("/sharing")?, client.get("/cache")?);
    // The VM may have been deleted meanwhile.
    let pages = of.and_then(|vm| Some((client.get(&format!("/vms/{vm}/pages")).ok()?, vm)));
    let pages = pages.map(|(pages, vm)| (vm, pages));
    Ok(Snapshot { at, vms: client.get("/vms")?, sharing, cache, pages })
}

/// A request to the thread.
#[derive(Debug)]
enum Wish {
    Act(String, Action),
    /// Poll the server immediately.
    Look,
}

/// A message from the thread.
#[derive(Debug)]
pub(super) enum News {
    Snapshot(Box<Snapshot>),
    /// The result of an action.
    Done(String),
    Failed(ClientError),
}

/// The thread. It ends when this value is dropped.
#[derive(Debug)]
pub(super) struct Fetcher {
    wishes: Sender<Wish>,
    /// The VM whose pages are requested.
    pages_of: Arc<Mutex<Option<String>>>,
    news: Receiver<News>,
    event: EventFd,
}

impl Fetcher {
    pub(super) fn start(client: Client, interval: Duration) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (wishes, asked) = mpsc::channel();
        let pages_of = Arc::<Mutex<Option<String>>>::default();
        let of = Arc::clone(&pages_of);
        let (tell, news) = mpsc::channel();
        let bell = event.try_clone()?;
        thread::Builder::new().name("fetch".into()).spawn(move || {
            loop {
                let fetch = || fetch(&client, of.lock().clone());
                let next = match asked.recv_timeout(interval) {
                    Ok(Wish::Act(vm, action)) => {
                        let done = tell.send(News::Done(act(&client, &vm, action)));
                        done.and_then(|()| tell.send(fetch()))
                    }
                    Ok(Wish::Look) | Err(RecvTimeoutError::Timeout) => tell.send(fetch()),
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                if next.is_err() {
                    return;
                }
                // Writing fails only if the event counter is full. Then it is readable anyway.
                let _ = bell.write(1);
            }
        })?;
        Ok(Self { wishes, pages_of, news, event })
    }

    /// Requests an action for a VM.
    pub(super) fn ask(&self, vm: String, action: Action) {
        // The thread lives as long as this value.
        let _ = self.wishes.send(Wish::Act(vm, action));
    }

    /// Also requests the use of a VM's pages from now on.
    pub(super) fn ask_for_pages(&self, vm: Option<String>) {
        let mut now = self.pages_of.lock();
        if *now != vm {
            let any = vm.is_some();
            *now = vm;
            if any {
                let _ = self.wishes.send(Wish::Look);
            }
        }
    }

    /// Returns the new messages.
    pub(super) fn take(&self) -> Vec<News> {
        // If the event is not readable, there is nothing to clear.
        let _ = self.event.read();
        self.news.try_iter().collect()
    }
}

impl AsRawFd for Fetcher {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

fn fetch(client: &Client, pages_of: Option<String>) -> News {
    snapshot(client, pages_of).map_or_else(News::Failed, |snapshot| News::Snapshot(Box::new(snapshot)))
}

fn act(client: &Client, vm: &str, action: Action) -> String {
    let path = format!("/vms/{vm}/actions");
    let body = json!({ "action": action.name() });
    match client.send::<VmSummary>(Method::POST, &path, &body) {
        Ok(vm) => format!("VM {} is {}", vm.name, vm.state.name()),
        Err(error) => error.to_string(),
    }
}
