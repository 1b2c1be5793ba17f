//! The VM in this process.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use samepage_api_types::lifecycle::{Action, State};
use samepage_api_types::views::devices::BalloonView;
use samepage_host::ends::Ended;
use samepage_host::error::HostError;
use samepage_host::record::Record;
use samepage_host::registry::{Common, Registry};
use samepage_host::validated::validate;
use samepage_machine::{ConsoleConfig, Hypervisor, VmEnd};
use samepage_process::poll::wait_readable;
use samepage_process::signals::ShutdownSignals;
use samepage_sharing::engine::Settings;
use samepage_spec::{RateLimits, VmSpec};
use samepage_text::counted::counted;
use samepage_worker::machine::{BALLOON, DeviceChange, DeviceError};

use super::Exit;
use super::args::FirecrackerArgs;
use super::fault::Fault;
use super::log::Log;
use super::machine::{Activity, DeviceCounts, Machine, Services};
use super::server::Server;
use samepage_host::engine::start_sharing;
use samepage_host::stdin::{Input, Typed};

/// The VM, after its creation, and its resources.
pub(super) struct Local {
    name: String,
    registry: Arc<Registry>,
}

/// The thread's state for waiting for the VM's end.
pub(super) struct Watch {
    registry: Arc<Registry>,
    log: Arc<Log>,
}

/// Prepares for a VM in this process.
pub(super) fn start(args: &FirecrackerArgs, log: Arc<Log>) -> anyhow::Result<(Arc<Local>, Watch)> {
    let hypervisor = Hypervisor::open()?;
    samepage_host::host_limits::raise_open_files();
    let settings = Settings::default();
    let sharing = start_sharing(&settings, None);
    if let Some(sharing) = &sharing {
        let log = log.clone();
        sharing.on_notice(move |notice| log.info(notice));
    }
    // Each process has one VM, so the starter of the processes must decide about overcommitment.
    let common = Common { sharing, settings, overcommit: f64::INFINITY, workers: None };
    let registry = Arc::new(Registry::new(hypervisor, common).context("watch the VM")?);
    Ok((Arc::new(Local { name: args.id.clone(), registry: registry.clone() }), Watch { registry, log }))
}

impl From<HostError> for Fault {
    fn from(error: HostError) -> Self {
        Fault::new(format!("{error}."))
    }
}

impl Local {
    fn record(&self) -> Result<Arc<Record>, Fault> {
        self.registry.find(&self.name).map_err(|_| Fault::not_started())
    }

    fn change(&self, id: &str, change: DeviceChange, kind: &str) -> Result<(), Fault> {
        let vm = self.record()?.vm().ok_or_else(|| Fault::new("The VM has ended."))?;
        vm.change_device(id, change).map_err(|error| match error {
            DeviceError::Missing => Fault::new(format!("The VM has no such {kind}.")),
            DeviceError::Refused(reason) => Fault::new(format!("{reason}.")),
        })
    }

    fn act(&self, action: Action) -> Result<(), Fault> {
        let record = self.record()?;
        let busy = || Fault::new("Another action on the VM is in progress.");
        let turn = record.try_turn().ok_or_else(busy)?;
        Ok(self.registry.act(&turn, action).map(drop)?)
    }
}

impl Machine for Local {
    fn has_services(&self) -> bool {
        true
    }

    fn start(&self, mut spec: VmSpec, console: Option<PathBuf>, services: Services) -> Result<(), Fault> {
        let stdio = console.is_none().then_some(ConsoleConfig::Stdio);
        spec.console.file = console;
        let mut vm = validate(spec, stdio).map_err(HostError::from)?;
        vm.answer_at(services);
        let record = self.registry.create(vec![vm])?.remove(0);
        let started = self.act(Action::Start);
        if started.is_err()
            && let Some(turn) = record.try_turn()
        {
            self.registry.delete(&turn);
        }
        started
    }

    fn activity(&self) -> Option<Activity> {
        match self.record().ok()?.state() {
            State::Created => None,
            State::Paused => Some(Activity::Paused),
            // The process ends with the VM.
            State::Running | State::Stopped | State::Crashed | State::Failed => Some(Activity::Running),
        }
    }

    fn pause(&self) -> Result<(), Fault> {
        self.act(Action::Pause)
    }

    fn resume(&self) -> Result<(), Fault> {
        self.act(Action::Resume)
    }

    fn ctrl_alt_del(&self) -> Result<(), Fault> {
        self.act(Action::Shutdown)
    }

    fn set_limits(&self, disk: &str, limits: RateLimits) -> Result<(), Fault> {
        self.change(disk, DeviceChange::DiskLimits(limits), "disk")
    }

    fn set_network_limits(
        &self,
        network: &str,
        receive: Option<RateLimits>,
        send: Option<RateLimits>,
    ) -> Result<(), Fault> {
        let changes = [receive.map(DeviceChange::NetworkReceive), send.map(DeviceChange::NetworkSend)];
        changes.into_iter().flatten().try_for_each(|change| self.change(network, change, "network device"))
    }

    fn resize(&self, disk: &str) -> Result<(), Fault> {
        self.change(disk, DeviceChange::DiskSize, "disk")
    }

    fn change_balloon(&self, change: DeviceChange) -> Result<(), Fault> {
        self.change(BALLOON, change, "balloon")
    }

    fn balloon(&self) -> Result<BalloonView, Fault> {
        let balloon = self.record()?.vm().and_then(|vm| vm.balloon());
        balloon.ok_or_else(|| Fault::new("The VM has ended."))
    }

    fn counts(&self) -> Vec<DeviceCounts> {
        let Some(vm) = self.record().ok().and_then(|record| record.vm()) else { return Vec::new() };
        let devices = vm.look().devices;
        let disks = devices.disks.iter().map(|disk| DeviceCounts::drive(&disk.id, &disk.statistics));
        let networks =
            devices.networks.iter().map(|network| DeviceCounts::network(&network.id, &network.statistics));
        let entropy = devices.rng.iter().map(DeviceCounts::entropy);
        let vsock = devices.vsock.iter().map(DeviceCounts::vsock);
        let balloon = devices.balloon.iter().map(DeviceCounts::balloon);
        disks.chain(networks).chain(entropy).chain(vsock).chain(balloon).collect()
    }
}

impl Watch {
    /// Passes typed input on until the VM has ended, or a signal ends it.
    pub(super) fn until_the_end(
        self,
        signals: &ShutdownSignals,
        server: Option<Server>,
    ) -> anyhow::Result<Exit> {
        let registry = &self.registry;
        let (mut input, mut looked, mut closing) = (None::<Input>, false, false);
        loop {
            let [typed, room] = input.as_ref().map_or([None, None], Input::files);
            let (ends, settled) = (registry.ends(), registry.settled());
            let files = [Some(signals.as_raw_fd()), Some(ends), Some(settled), typed, room];
            let [signal, end, settled, typed, room] = wait_readable(files).context("wait for the VM")?;
            if settled {
                registry.clear_settled();
            }
            if settled
                && !looked
                && let Some(record) = registry.list().first()
            {
                looked = true;
                input = Input::open(record)?;
            }
            if signal && signals.take().is_some() {
                closing = true;
                registry.close();
            }
            if end && let Some(vm) = registry.collect().context("wait for the VM")?.first() {
                // Restore the terminal before printing anything, and let clients get their responses.
                drop((input, server));
                return Ok(self.tell_end(vm));
            }
            if closing && registry.is_idle() {
                return Ok(Exit::Ok);
            }
            if (typed || room)
                && let Some(open) = &mut input
                && open.pump(typed) == Typed::Quit
            {
                closing = true;
                registry.close();
            }
        }
    }

    fn tell_end(&self, vm: &Ended) -> Exit {
        let (end, lost) = (&vm.end, vm.console_lost);
        if lost > 0 {
            let lost = counted(lost, "byte");
            self.log.error(format_args!("{lost} of console output lost, because nobody read it"));
        }
        match end {
            VmEnd::Reset | VmEnd::PowerOff | VmEnd::Stopped => {
                self.log.info(end);
                Exit::Ok
            }
            VmEnd::Crashed(_) | VmEnd::Failed(_) => {
                self.log.error(end);
                Exit::Error
            }
        }
    }
}
