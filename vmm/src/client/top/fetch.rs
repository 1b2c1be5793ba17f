//! Asks the server again and again, on a thread of its own, so that keys never wait for it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hyper::Method;
use samepage::api::lifecycle::Action;
use samepage::api::views::{CacheView, SharingView, VmSummary};
use samepage::api::{Client, ClientError};
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
}

/// Asks for all that is shown.
pub(super) fn snapshot(client: &Client) -> Result<Snapshot, ClientError> {
    let at = Instant::now();
    // Last, so that what it says of memory is what the others have just had looked at.
    let (sharing, cache) = (client.get("/sharing")?, client.get("/cache")?);
    Ok(Snapshot { at, vms: client.get("/vms")?, sharing, cache })
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
    wishes: Sender<(String, Action)>,
    news: Receiver<News>,
    event: EventFd,
}

impl Fetcher {
    pub(super) fn start(client: Client, interval: Duration) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (wishes, asked) = mpsc::channel::<(String, Action)>();
        let (tell, news) = mpsc::channel();
        let bell = event.try_clone()?;
        thread::Builder::new().name("fetch".into()).spawn(move || {
            loop {
                let next = match asked.recv_timeout(interval) {
                    Ok((vm, action)) => {
                        let done = tell.send(News::Done(act(&client, &vm, action)));
                        done.and_then(|()| tell.send(fetch(&client)))
                    }
                    Err(RecvTimeoutError::Timeout) => tell.send(fetch(&client)),
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                if next.is_err() {
                    return;
                }
                // The one failure of an event counter is that it is full: then it is readable as it is.
                let _ = bell.write(1);
            }
        })?;
        Ok(Self { wishes, news, event })
    }

    /// Has a VM do something.
    pub(super) fn ask(&self, vm: String, action: Action) {
        // The thread lives as long as this.
        let _ = self.wishes.send((vm, action));
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

fn fetch(client: &Client) -> News {
    snapshot(client).map_or_else(News::Failed, |snapshot| News::Snapshot(Box::new(snapshot)))
}

fn act(client: &Client, vm: &str, action: Action) -> String {
    let path = format!("/vms/{vm}/actions");
    let body = json!({ "action": action.name() });
    match client.send::<VmSummary>(Method::POST, &path, &body) {
        Ok(vm) => format!("VM {} is {}", vm.name, vm.state.name()),
        Err(error) => error.to_string(),
    }
}
