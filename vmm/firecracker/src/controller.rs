//! The configuration by clients, and their actions on the VM.
//!
//! Before the start, a setting can be repeated and replaces the earlier one. Invalid settings are refused
//! immediately, as far as possible. After the start, some settings can still change.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use samepage_machine::config::check_memory;
use samepage_spec::{DiskSpec, HugePages, NetworkSpec, RngSpec, Size, VirtioBus, VmSpec, VsockSpec};
use samepage_text::names::{check_disk_id, check_network_id};
use serde_json::{Value, json};

use super::VERSION;
use super::args::FirecrackerArgs;
use super::balloon::BalloonDevice;
use super::fault::Fault;
use super::log::Log;
use super::machine::{Activity, Machine};
use super::metadata::Mmds;
use super::metrics::Metrics;
use super::model::{
    BootSource, Drive, DriveUpdate, EntropyDevice, HugePagesConfig, InstanceInfo, InstanceState,
    LoggerConfig, MachineConfig, MachineConfigUpdate, MetricsConfig, NetworkInterface,
    NetworkInterfaceUpdate, RateLimiter, SerialConfig, VsockDevice, WantedState,
};

/// The default command line of the kernel. As with Firecracker, it has no console.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// The VM, before and after its start.
pub(super) struct Controller {
    id: String,
    enable_pci: bool,
    pub(super) machine: Arc<dyn Machine>,
    log: Arc<Log>,
    machine_config: MachineConfig,
    boot_source: Option<BootSource>,
    /// The root device first, then the others in the order of their creation.
    drives: Vec<Drive>,
    networks: Vec<NetworkInterface>,
    vsock: Option<VsockDevice>,
    entropy: Option<EntropyDevice>,
    pub(super) balloon: Option<BalloonDevice>,
    pub(super) mmds: Mmds,
    serial_out: Option<PathBuf>,
    logger: Option<LoggerConfig>,
    metrics: Option<Metrics>,
}

impl Controller {
    pub(super) fn new(args: &FirecrackerArgs, machine: Arc<dyn Machine>, log: Arc<Log>) -> Self {
        Self {
            id: args.id.clone(),
            enable_pci: args.enable_pci,
            machine,
            log,
            machine_config: MachineConfig::default(),
            boot_source: None,
            drives: Vec::new(),
            networks: Vec::new(),
            vsock: None,
            entropy: None,
            balloon: None,
            mmds: Mmds::new(args),
            serial_out: None,
            logger: None,
            metrics: None,
        }
    }

    /// Checks that the VM has not started.
    pub(super) fn before_start(&self) -> Result<(), Fault> {
        if self.machine.activity().is_some() { Err(Fault::started()) } else { Ok(()) }
    }

    pub(super) fn after_start(&self) -> Result<Activity, Fault> {
        self.machine.activity().ok_or_else(Fault::not_started)
    }

    pub(super) fn info(&self) -> InstanceInfo {
        let state = match self.machine.activity() {
            None => InstanceState::NotStarted,
            Some(Activity::Running) => InstanceState::Running,
            Some(Activity::Paused) => InstanceState::Paused,
        };
        InstanceInfo { id: self.id.clone(), state, vmm_version: VERSION, app_name: "Firecracker" }
    }

    pub(super) fn machine_config(&self) -> &MachineConfig {
        &self.machine_config
    }

    pub(super) fn set_machine_config(&mut self, config: MachineConfig) -> Result<(), Fault> {
        self.before_start()?;
        check_machine(&config)?;
        self.machine_config = config;
        Ok(())
    }

    pub(super) fn change_machine_config(&mut self, change: MachineConfigUpdate) -> Result<(), Fault> {
        if change == MachineConfigUpdate::default() {
            return Err(Fault::new("An empty request does not change the machine configuration."));
        }
        let old = self.machine_config.clone();
        self.set_machine_config(MachineConfig {
            vcpu_count: change.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: change.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: change.smt.unwrap_or(old.smt),
            cpu_template: change.cpu_template.or(old.cpu_template),
            track_dirty_pages: change.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: change.huge_pages.unwrap_or(old.huge_pages),
        })
    }

    pub(super) fn set_boot_source(&mut self, source: BootSource) -> Result<(), Fault> {
        self.before_start()?;
        let open = |path: &Path, what: &str| match File::open(path) {
            Ok(_) => Ok(()),
            Err(error) => {
                Err(Fault::new(format!("The {what} file {} cannot be opened: {error}.", path.display())))
            }
        };
        open(&source.kernel_image_path, "kernel")?;
        source.initrd_path.as_deref().map_or(Ok(()), |path| open(path, "initrd"))?;
        self.boot_source = Some(source);
        Ok(())
    }

    pub(super) fn set_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        self.before_start()?;
        let id = &drive.drive_id;
        if drive.socket.is_some() {
            return Err(Fault::missing("drives of vhost-user"));
        }
        let Some(path) = &drive.path_on_host else {
            return Err(Fault::new(format!("Drive {id} has no path_on_host.")));
        };
        if let Err(error) = File::open(path) {
            let path = path.display();
            return Err(Fault::new(format!("Drive {id}: {path} cannot be opened: {error}.")));
        }
        let other_root = self.drives.iter().any(|other| other.is_root_device && other.drive_id != *id);
        if drive.is_root_device && other_root {
            return Err(Fault::new("A root block device already exists!"));
        }
        self.check_image(&drive, path)?;
        self.drives.retain(|other| other.drive_id != *id);
        let at = if drive.is_root_device { 0 } else { self.drives.len() };
        self.drives.insert(at, drive);
        Ok(())
    }

    /// Checks that no other drive uses the same image if one of the two writes to it.
    fn check_image(&self, drive: &Drive, path: &Path) -> Result<(), Fault> {
        // An invalid path has already been refused.
        let file = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
        let written = |drive: &Drive| drive.is_read_only != Some(true);
        let same = self.drives.iter().find(|other| {
            other.drive_id != drive.drive_id
                && (written(other) || written(drive))
                && other.path_on_host.as_deref().and_then(file).is_some_and(|other| Some(other) == file(path))
        });
        let Some(other) = same else { return Ok(()) };
        Err(Fault::new(format!(
            "Drive {}: {} is also the image of drive {}, and both would damage it. Give each drive its own \
             image, or set is_read_only for both.",
            drive.drive_id,
            path.display(),
            other.drive_id
        )))
    }

    pub(super) fn change_drive(&mut self, change: &DriveUpdate) -> Result<(), Fault> {
        self.after_start()?;
        let id = &change.drive_id;
        let Some(at) = self.drives.iter().position(|drive| drive.drive_id == *id) else {
            return Err(Fault::new(format!("There is no drive {id}.")));
        };
        if change.path_on_host.is_some() && change.path_on_host != self.drives[at].path_on_host {
            return Err(Fault::missing("way to exchange the image of a drive while the guest runs"));
        }
        if change.path_on_host.is_some() {
            // Clients send this request after the image has another size.
            self.machine.resize(&disk_name(&self.drives[at], at))?;
        }
        let Some(limiter) = change.rate_limiter else { return Ok(()) };
        let limiter = self.drives[at].rate_limiter.unwrap_or_default().changed(limiter);
        self.machine.set_limits(&disk_name(&self.drives[at], at), limiter.limits())?;
        self.drives[at].rate_limiter = Some(limiter);
        Ok(())
    }

    pub(super) fn set_network(&mut self, interface: NetworkInterface) -> Result<(), Fault> {
        self.before_start()?;
        let others = || self.networks.iter().filter(|other| other.iface_id != interface.iface_id);
        if let Some(other) = others().find(|other| other.host_dev_name == interface.host_dev_name) {
            return Err(Fault::new(format!(
                "Network interface {}: the tap {} is also that of {}. Give each interface its own tap.",
                interface.iface_id, interface.host_dev_name, other.iface_id
            )));
        }
        if let Some(mac) = interface.guest_mac
            && others().any(|other| other.guest_mac == Some(mac))
        {
            return Err(Fault::new(format!("The MAC address is already in use: {mac}.")));
        }
        match self.networks.iter().position(|other| other.iface_id == interface.iface_id) {
            Some(at) => self.networks[at] = interface,
            None => self.networks.push(interface),
        }
        Ok(())
    }

    /// Whether there is a network interface with this name.
    pub(super) fn has_network(&self, id: &str) -> bool {
        self.networks.iter().any(|interface| interface.iface_id == id)
    }

    pub(super) fn change_network(&mut self, change: &NetworkInterfaceUpdate) -> Result<(), Fault> {
        self.after_start()?;
        let id = &change.iface_id;
        let Some(at) = self.networks.iter().position(|interface| interface.iface_id == *id) else {
            return Err(Fault::new(format!("There is no network interface {id}.")));
        };
        let interface = &self.networks[at];
        let changed = |old: Option<RateLimiter>, new: Option<RateLimiter>| {
            new.map(|new| old.unwrap_or_default().changed(new))
        };
        let receive = changed(interface.rx_rate_limiter, change.rx_rate_limiter);
        let send = changed(interface.tx_rate_limiter, change.tx_rate_limiter);
        if receive.is_none() && send.is_none() {
            return Ok(());
        }
        let limits = |limiter: Option<RateLimiter>| limiter.map(RateLimiter::limits);
        let name = network_name(interface, at);
        self.machine.set_network_limits(&name, limits(receive), limits(send))?;
        let interface = &mut self.networks[at];
        interface.rx_rate_limiter = receive.or(interface.rx_rate_limiter);
        interface.tx_rate_limiter = send.or(interface.tx_rate_limiter);
        Ok(())
    }

    pub(super) fn set_vsock(&mut self, device: VsockDevice) -> Result<(), Fault> {
        self.before_start()?;
        if let Some((_, reason)) = vsock_spec(&device).faults().into_iter().next() {
            return Err(Fault::new(format!("The vsock device is invalid: {reason}.")));
        }
        self.vsock = Some(device);
        Ok(())
    }

    pub(super) fn set_entropy(&mut self, device: EntropyDevice) -> Result<(), Fault> {
        self.before_start()?;
        self.entropy = Some(device);
        Ok(())
    }

    pub(super) fn set_serial(&mut self, serial: SerialConfig) -> Result<(), Fault> {
        self.before_start()?;
        if serial.rate_limiter.is_some() {
            return Err(Fault::missing("rate limiter of the serial port"));
        }
        self.serial_out = serial.serial_out_path;
        Ok(())
    }

    pub(super) fn set_logger(&mut self, logger: LoggerConfig) -> Result<(), Fault> {
        self.before_start()?;
        self.log.configure(&logger).map_err(|error| Fault::new(format!("{error:#}.")))?;
        self.logger = Some(logger);
        Ok(())
    }

    pub(super) fn set_metrics(&mut self, config: MetricsConfig) -> Result<(), Fault> {
        self.before_start()?;
        if self.metrics.is_some() {
            return Err(Fault::new("Reinitialization of metrics not allowed."));
        }
        self.metrics = Some(Metrics::open(&self.id, config)?);
        Ok(())
    }

    pub(super) fn set_metrics_path(&mut self, path: &Path) -> Result<(), Fault> {
        self.set_metrics(MetricsConfig { metrics_path: path.to_owned(), ..MetricsConfig::default() })
    }

    pub(super) fn flush_metrics(&mut self) -> Result<(), Fault> {
        self.after_start()?;
        let devices = self.machine.counts();
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(&devices))
    }

    /// Creates and starts the VM.
    pub(super) fn start(&mut self) -> Result<(), Fault> {
        self.before_start()?;
        let Some(source) = self.boot_source.clone() else {
            return Err(Fault::new("Cannot start microvm without kernel configuration."));
        };
        let disks = self.drives.iter().enumerate().map(|(at, drive)| DiskSpec {
            path: drive.path_on_host.clone().unwrap_or_default(),
            readonly: drive.is_read_only.unwrap_or(false),
            id: Some(disk_name(drive, at)),
            limits: drive.rate_limiter.unwrap_or_default().limits(),
            ..DiskSpec::default()
        });
        let networks = self.networks.iter().enumerate().map(|(at, interface)| NetworkSpec {
            tap: Some(interface.host_dev_name.clone()),
            id: Some(network_name(interface, at)),
            mac: interface.guest_mac,
            mtu: interface.mtu,
            receive: interface.rx_rate_limiter.unwrap_or_default().limits(),
            send: interface.tx_rate_limiter.unwrap_or_default().limits(),
            ..NetworkSpec::default()
        });
        let spec = VmSpec {
            initrd: source.initrd_path.clone(),
            cmdline: command_line(&source, &self.drives, self.enable_pci),
            memory: Size(self.machine_config.mem_size_mib << 20),
            vcpus: self.machine_config.vcpu_count.into(),
            smt: self.machine_config.smt,
            hugepages: match self.machine_config.huge_pages {
                HugePagesConfig::Transparent => HugePages::Thp,
                HugePagesConfig::None | HugePagesConfig::Hugetlbfs2M => HugePages::Off,
            },
            bus: if self.enable_pci { VirtioBus::Pci } else { VirtioBus::Mmio },
            disks: disks.collect(),
            networks: networks.collect(),
            vsock: self.vsock.as_ref().map(vsock_spec),
            rng: RngSpec {
                enabled: self.entropy.is_some(),
                limits: self.entropy.and_then(|device| device.rate_limiter).unwrap_or_default().limits(),
            },
            balloon: self.balloon.map(BalloonDevice::spec),
            ..VmSpec::new(self.id.clone(), source.kernel_image_path)
        };
        let services = self.mmds.services(|id| {
            let mut networks = self.networks.iter().enumerate();
            networks
                .find(|(_, network)| network.iface_id == id)
                .map(|(at, network)| network_name(network, at))
        });
        self.machine.start(spec, self.serial_out.clone(), services)
    }

    pub(super) fn want(&mut self, state: WantedState) -> Result<(), Fault> {
        match (self.after_start()?, state) {
            (Activity::Running, WantedState::Paused) => self.machine.pause(),
            (Activity::Paused, WantedState::Resumed) => self.machine.resume(),
            // No change is necessary.
            _ => Ok(()),
        }
    }

    pub(super) fn ctrl_alt_del(&self) -> Result<(), Fault> {
        self.after_start()?;
        self.machine.ctrl_alt_del()
    }

    /// Returns the complete configuration.
    pub(super) fn configuration(&self) -> Value {
        json!({
            "boot-source": self.boot_source.clone().unwrap_or_default(),
            "drives": self.drives,
            "machine-config": self.machine_config,
            "logger": self.logger,
            "metrics": self.metrics.as_ref().map(Metrics::config),
            "network-interfaces": self.networks,
            "pmem": [],
            "balloon": self.balloon,
            "cpu-config": null,
            "entropy": self.entropy,
            "memory-hotplug": null,
            "mmds-config": self.mmds.config(),
            "vsock": self.vsock,
        })
    }
}

/// Returns the disk name of a drive: the drive's own name if it is valid.
fn disk_name(drive: &Drive, at: usize) -> String {
    if check_disk_id(&drive.drive_id).is_ok() { drive.drive_id.clone() } else { format!("drive{at}") }
}

fn vsock_spec(device: &VsockDevice) -> VsockSpec {
    VsockSpec { uds: device.uds_path.clone(), cid: Some(device.guest_cid) }
}

/// Returns the name of a network interface: the client's if it is valid.
fn network_name(interface: &NetworkInterface, at: usize) -> String {
    let id = &interface.iface_id;
    if check_network_id(id).is_ok() { id.clone() } else { format!("interface{at}") }
}

/// Upper limit for the vCPUs, as in Firecracker's API.
const MOST_VCPUS: u8 = 32;

fn check_machine(config: &MachineConfig) -> Result<(), Fault> {
    if !(1..=MOST_VCPUS).contains(&config.vcpu_count) {
        return Err(Fault::new(format!(
            "{} vCPUs are requested: \"vcpu_count\" is 1 to {MOST_VCPUS}.",
            config.vcpu_count
        )));
    }
    if config.smt && config.vcpu_count > 1 && !config.vcpu_count.is_multiple_of(2) {
        return Err(Fault::new(format!(
            "{} vCPUs are not whole cores of 2 threads: with \"smt\" \"vcpu_count\" is 1 or even.",
            config.vcpu_count
        )));
    }
    if config.cpu_template.as_ref().is_some_and(|template| template != "None") {
        return Err(Fault::missing("CPU templates"));
    }
    if config.huge_pages == HugePagesConfig::Hugetlbfs2M {
        return Err(Fault::missing(
            "guest memory on hugetlbfs, which cannot be shared (\"Transparent\" huge pages can)",
        ));
    }
    let bytes = config.mem_size_mib.checked_mul(1 << 20).unwrap_or(!0xfff);
    check_memory(bytes).map_err(|error| Fault::new(format!("The memory size is invalid: {error}.")))
}

/// Returns the kernel's command line, which holds `pci=off` for a machine without PCI as Firecracker's does. The root
/// device comes before the arguments for init.
fn command_line(source: &BootSource, drives: &[Drive], pci: bool) -> String {
    let given = source.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS);
    let root = drives.first().filter(|drive| drive.is_root_device).map_or_else(String::new, |drive| {
        let device = drive.partuuid.as_ref().map(|uuid| format!("PARTUUID={uuid}"));
        let access = if drive.is_read_only.unwrap_or(false) { "ro" } else { "rw" };
        format!(" root={} {access}", device.as_deref().unwrap_or("/dev/vda"))
    });
    let off = if pci { "" } else { " pci=off" };
    match given.split_once(" -- ") {
        Some((kernel, init)) => format!("{kernel}{off}{root} -- {init}"),
        None => format!("{given}{off}{root}").trim_start().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_looks_for_pci_where_the_devices_are_there() {
        let source = |boot_args: &str| BootSource {
            kernel_image_path: "vmlinux".into(),
            initrd_path: None,
            boot_args: Some(boot_args.to_owned()),
        };
        let root = json!({ "drive_id": "rootfs", "is_root_device": true });
        let drives: Vec<Drive> = vec![serde_json::from_value(root).expect("a drive")];
        let line = |boot_args, drives, pci| command_line(&source(boot_args), drives, pci);
        assert_eq!(line("console=ttyS0", &[], false), "console=ttyS0 pci=off");
        assert_eq!(line("console=ttyS0", &drives, false), "console=ttyS0 pci=off root=/dev/vda rw");
        assert_eq!(line("console=ttyS0 -- x", &drives, true), "console=ttyS0 root=/dev/vda rw -- x");
        assert_eq!(line("", &[], true), "");
    }
}
