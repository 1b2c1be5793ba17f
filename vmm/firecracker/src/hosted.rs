//! The VM in a process of `samepage serve`, with this process as its representative.
//!
//! The VM is bound to a connection to its console, which carries the guest's output and the user's input.
//! When the connection ends, for any reason, the host deletes the VM. When the VM ends, the connection ends
//! too.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context;
use hyper::Method;
use parking_lot::Mutex;
use samepage_api_types::lifecycle::{Action, State};
use samepage_api_types::views::devices::BalloonView;
use samepage_api_types::views::{VmSummary, VmView};
use samepage_client::socket::{Client, ClientError};
use samepage_machine::VmEnd;
use samepage_process::escape::{EscapeFilter, HELP, Key};
use samepage_process::poll::wait_readable;
use samepage_process::signals::ShutdownSignals;
use samepage_process::terminal::{self, RawTerminal, StdinKind};
use samepage_spec::{RateLimits, VmSpec};
use samepage_worker::machine::DeviceChange;
use serde_json::{Value, json};
use vmm_sys_util::eventfd::EventFd;

use super::Exit;
use super::args::FirecrackerArgs;
use super::fault::Fault;
use super::log::Log;
use super::machine::{Activity, DeviceCounts, Machine, Services};
use super::server::Server;

/// The connection to the VM's console, and the bytes that came with the response.
struct Console {
    stream: UnixStream,
    first: Vec<u8>,
    /// Whether the console also goes to a file on the host, so that it is not shown here.
    is_shown_elsewhere: bool,
}

/// The representative of the VM.
pub(super) struct Hosted {
    name: String,
    client: Client,
    is_started: AtomicBool,
    /// The connection, until the thread that waits for the VM's end takes it.
    console: Mutex<Option<Console>>,
    /// Written when the connection exists.
    attached: EventFd,
}

/// The thread's state for waiting for the VM's end.
pub(super) struct Watch {
    hosted: Arc<Hosted>,
    log: Arc<Log>,
}

/// Prepares for a VM in the process with this control socket.
pub(super) fn start(
    socket: &Path,
    args: &FirecrackerArgs,
    log: Arc<Log>,
) -> anyhow::Result<(Arc<Hosted>, Watch)> {
    let client = Client::new(socket);
    // Fails early if no server listens there.
    client.get::<Value>("/version")?;
    let hosted = Arc::new(Hosted {
        name: args.id.clone(),
        client,
        is_started: AtomicBool::new(false),
        console: Mutex::default(),
        attached: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("open an event")?,
    });
    Ok((hosted.clone(), Watch { hosted, log }))
}

impl From<ClientError> for Fault {
    fn from(error: ClientError) -> Self {
        Fault::new(format!("{error}."))
    }
}

impl Hosted {
    fn path(&self) -> String {
        format!("/vms/{}", self.name)
    }

    fn act(&self, action: Action) -> Result<(), ClientError> {
        let body = json!({ "action": action.name() });
        self.client.send::<VmSummary>(Method::POST, &(self.path() + "/actions"), &body).map(drop)
    }

    fn delete(&self) {
        // The host also deletes the VM when the connection ends.
        let _ = self.client.delete(&self.path());
    }
}

impl Machine for Hosted {
    fn has_services(&self) -> bool {
        false
    }

    fn start(&self, mut spec: VmSpec, console: Option<PathBuf>, _: Services) -> Result<(), Fault> {
        let is_shown_elsewhere = console.is_some();
        spec.console.file = console;
        spec.make_absolute().map_err(|error| Fault::new(format!("A path cannot be resolved: {error}.")))?;
        self.client.send::<Value>(Method::POST, "/vms", &spec)?;
        let attached = self.client.attach_for_life(&self.name);
        let started = attached.and_then(|(stream, first)| {
            self.act(Action::Start)?;
            Ok(Console { stream, first, is_shown_elsewhere })
        });
        match started {
            Ok(console) => {
                *self.console.lock() = Some(console);
                self.is_started.store(true, Ordering::SeqCst);
                // Writing fails only if the event counter is full. Then it is readable anyway.
                let _ = self.attached.write(1);
                Ok(())
            }
            Err(error) => {
                self.delete();
                Err(error.into())
            }
        }
    }

    fn activity(&self) -> Option<Activity> {
        if !self.is_started.load(Ordering::SeqCst) {
            return None;
        }
        let state = self.client.get::<VmSummary>(&self.path()).map(|vm| vm.state);
        Some(if matches!(state, Ok(State::Paused)) { Activity::Paused } else { Activity::Running })
    }

    fn pause(&self) -> Result<(), Fault> {
        Ok(self.act(Action::Pause)?)
    }

    fn resume(&self) -> Result<(), Fault> {
        Ok(self.act(Action::Resume)?)
    }

    fn ctrl_alt_del(&self) -> Result<(), Fault> {
        Ok(self.act(Action::Shutdown)?)
    }

    fn set_limits(&self, disk: &str, limits: RateLimits) -> Result<(), Fault> {
        let path = format!("{}/disks/{disk}", self.path());
        Ok(self.client.send::<Value>(Method::PATCH, &path, &json!({ "limits": limits })).map(drop)?)
    }

    fn set_network_limits(
        &self,
        network: &str,
        receive: Option<RateLimits>,
        send: Option<RateLimits>,
    ) -> Result<(), Fault> {
        let path = format!("{}/networks/{network}", self.path());
        let change = json!({ "receive": receive, "send": send });
        Ok(self.client.send::<Value>(Method::PATCH, &path, &change).map(drop)?)
    }

    fn resize(&self, disk: &str) -> Result<(), Fault> {
        let path = format!("{}/disks/{disk}/resize", self.path());
        Ok(self.client.send::<Value>(Method::POST, &path, &json!({})).map(drop)?)
    }

    fn change_balloon(&self, change: DeviceChange) -> Result<(), Fault> {
        let body = match change {
            DeviceChange::BalloonSize(size) => json!({ "size": size }),
            DeviceChange::BalloonStatsInterval(seconds) => json!({ "stats_interval": seconds }),
            DeviceChange::BalloonHints(true) => json!({ "hints": "start" }),
            DeviceChange::BalloonHints(false) => json!({ "hints": "hold" }),
            DeviceChange::BalloonHintsEnd => json!({ "hints": "stop" }),
            _ => return Err(Fault::missing("such change of a balloon")),
        };
        let path = self.path() + "/balloon";
        Ok(self.client.send::<Value>(Method::PATCH, &path, &body).map(drop)?)
    }

    fn balloon(&self) -> Result<BalloonView, Fault> {
        Ok(self.client.get(&(self.path() + "/balloon"))?)
    }

    fn counts(&self) -> Vec<DeviceCounts> {
        let Ok(vm) = self.client.get::<VmView>(&self.path()) else { return Vec::new() };
        let disks =
            vm.disks.iter().filter_map(|disk| Some(DeviceCounts::drive(&disk.id, disk.statistics.as_ref()?)));
        let networks = vm
            .networks
            .iter()
            .filter_map(|network| Some(DeviceCounts::network(&network.id, network.statistics.as_ref()?)));
        let entropy = vm.rng.iter().map(DeviceCounts::entropy);
        let vsock = vm.vsock.iter().map(DeviceCounts::vsock);
        let balloon = vm.balloon.iter().map(DeviceCounts::balloon);
        disks.chain(networks).chain(entropy).chain(vsock).chain(balloon).collect()
    }
}

impl Watch {
    /// Passes the console on in both directions until the VM has ended, or a signal ends it.
    pub(super) fn until_the_end(
        self,
        signals: &ShutdownSignals,
        server: Option<Server>,
    ) -> anyhow::Result<Exit> {
        let hosted = &self.hosted;
        let quit = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("open an event")?;
        let (mut console, mut raw) = (None::<Console>, None);
        let mut buffer = [0; 4096];
        let exit = loop {
            let stream = console.as_ref().map(|console| console.stream.as_raw_fd());
            let attached = Some(hosted.attached.as_raw_fd());
            let files = [Some(signals.as_raw_fd()), attached, Some(quit.as_raw_fd()), stream];
            let [signal, attached, quit_typed, output] = wait_readable(files).context("wait for the VM")?;
            if (signal && signals.take().is_some()) || quit_typed {
                break Exit::Ok;
            }
            if attached {
                // The event is readable.
                let _ = hosted.attached.read();
                if let Some(new) = hosted.console.lock().take() {
                    raw = type_along(&new.stream, &quit)?;
                    new.show(&new.first);
                    console = Some(new);
                }
            }
            if output && let Some(open) = &console {
                match (&open.stream).read(&mut buffer) {
                    Ok(count @ 1..) => open.show(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // The VM or the host has ended.
                    Ok(0) | Err(_) => break self.end(&mut raw),
                }
            }
        };
        // Restore the terminal before printing anything, and let clients get their responses.
        drop((raw, server));
        if console.is_some() {
            hosted.delete();
        }
        Ok(exit)
    }

    /// Finds out how the VM ended.
    fn end(&self, raw: &mut Option<RawTerminal>) -> Exit {
        *raw = None;
        match self.hosted.client.get::<VmSummary>(&self.hosted.path()) {
            Ok(VmSummary { state: State::Stopped, reason: Some(reason), .. })
                if [VmEnd::Reset, VmEnd::PowerOff].iter().any(|end| end.to_string() == reason) =>
            {
                self.log.info(reason);
                Exit::Ok
            }
            // Another client stopped the VM, or the host is about to end.
            Ok(VmSummary { state: State::Stopped, reason, .. }) => {
                let reason = reason.unwrap_or_default();
                self.log.error(format_args!("the host stopped the VM: {reason}"));
                Exit::Error
            }
            Ok(vm) => {
                self.log.error(vm.reason.unwrap_or_else(|| "the host closed the console".to_owned()));
                Exit::Error
            }
            Err(error) => {
                self.log.error(format_args!("the VM ended with its host: {error}"));
                Exit::Error
            }
        }
    }
}

impl Console {
    fn show(&self, bytes: &[u8]) {
        if !self.is_shown_elsewhere {
            let mut out = io::stdout().lock();
            // The VM continues if the output is closed.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }
    }
}

/// Passes typed input on, on a thread that lasts as long as the process, because a guest that reads nothing
/// blocks it. Writes `quit` when the user wants to end the VM.
fn type_along(stream: &UnixStream, quit: &EventFd) -> anyhow::Result<Option<RawTerminal>> {
    let kind = terminal::stdin_kind();
    if kind == StdinKind::BackgroundTerminal {
        return Ok(None);
    }
    let keys = kind == StdinKind::Terminal;
    let raw = keys.then(RawTerminal::enter).transpose().context("put the terminal into raw mode")?;
    let typing = || -> io::Result<_> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let (stream, quit) = (stream.try_clone()?, quit.try_clone()?);
        thread::Builder::new().name("stdin".into()).spawn(move || {
            // An error ends only the typing.
            let _ = pass_on(&stdin, &stream, keys, &quit);
        })
    };
    typing().context("read from standard input")?;
    Ok(raw)
}

fn pass_on(mut stdin: &File, mut stream: &UnixStream, keys: bool, quit: &EventFd) -> io::Result<()> {
    let mut filter = EscapeFilter::default();
    let mut buffer = [0; 256];
    loop {
        let count = match stdin.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if !keys {
            stream.write_all(&buffer[..count])?;
            continue;
        }
        let mut to_guest = Vec::with_capacity(count);
        for byte in &buffer[..count] {
            match filter.feed(*byte) {
                Key::Guest(byte) => to_guest.push(byte),
                Key::Quit => return quit.write(1),
                Key::Help => io::stderr().write_all(HELP.as_bytes())?,
                Key::Nothing => {}
            }
        }
        stream.write_all(&to_guest)?;
    }
}
