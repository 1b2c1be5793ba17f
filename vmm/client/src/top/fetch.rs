//! Asks the server again and again, on a thread of its own, so that keys never wait for it.

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

/// All that is shown, at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    /// When it was asked for.
    pub(super) at: Instant,
    pub(super) vms: Vec<VmSummary>,
    pub(super) sharing: SharingView,
    pub(super) cache: CacheView,
    /// What the pages of one VM, by name, are used for.
    pub(super) pages: Option<(String, VmPagesView)>,
}

/// Asks for all that is shown, and what one VM's pages are used for.
pub(super) fn snapshot(client: &Client, of: Option<String>) -> Result<Snapshot, ClientError> {
    let at = Instant::now();
    // The VMs last, so that what is said of their memory is what the others have just had looked at.
    let (sharing, cache) = (client.get("/sharing")?, client.get("/cache")?);
    // It may have been deleted meanwhile.
    let pages = of.and_then(|vm| Some((client.get(&format!("/vms/{vm}/pages")).ok()?, vm)));
    let pages = pages.map(|(pages, vm)| (vm, pages));
    Ok(Snapshot { at, vms: client.get("/vms")?, sharing, cache, pages })
}

/// What the thread is asked for.
#[derive(Debug)]
enum Wish {
    Act(String, Action),
    /// To ask the server at once.
    Look,
}

/// What the thread has to say.
#[derive(Debug)]
pub(super) enum News {
    Snapshot(Box<Snapshot>),
    /// Something was done, or refused.
    Done(String),
    Failed(ClientError),
}

/// The thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Fetcher {
    wishes: Sender<Wish>,
    /// The VM whose pages are asked for.
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
                // The one failure of an event counter is that it is full: then it is readable as it is.
                let _ = bell.write(1);
            }
        })?;
        Ok(Self { wishes, pages_of, news, event })
    }

    /// Has a VM do something.
    pub(super) fn ask(&self, vm: String, action: Action) {
        // The thread lives as long as this.
        let _ = self.wishes.send(Wish::Act(vm, action));
    }

    /// Asks for what a VM's pages are used for as well, from now on.
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

    /// What there is to be heard.
    pub(super) fn take(&self) -> Vec<News> {
        // Where nothing is to be read nothing is to be cleared.
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
