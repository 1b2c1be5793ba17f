//! A VM's machine, wherever it is.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use samepage_api_types::views::devices::BalloonView;
use samepage_devices::virtio::balloon::FRAME_BYTES;
use samepage_machine::vm::{Vm, VmEnd, VmHandle, VmState};
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::service::Membership;
use samepage_spec::{BalloonSpec, CachePolicy, RateLimits, SharingMode, Size};
use vmm_sys_util::eventfd::EventFd;

use crate::report::DeviceReport;

/// Called with a disk's name and a sentence for each error of the host.
pub type DiskErrorObserver = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Called when the guest's balloon has the size that was asked for, in page frames.
pub type BalloonObserver = Arc<dyn Fn(u32) + Send + Sync>;

/// The name of the memory balloon among a VM's devices.
pub const BALLOON: &str = "balloon";

/// Why a device cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The machine has no such device, or has it no more.
    #[error("the VM has no such device")]
    Missing,
    /// The device refuses, with the reason in a sentence.
    #[error("{0}")]
    Refused(String),
}

/// A change of a device that needs no new boot.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum DeviceChange {
    /// Another cache policy for a disk's further reads.
    DiskCache(CachePolicy),
    /// Other limits per second for a disk.
    DiskLimits(RateLimits),
    /// A disk gets the present size of its image.
    DiskSize,
    /// Frames of a network device pass, or do not.
    NetworkLink(bool),
    /// Other limits per second for what the guest receives.
    NetworkReceive(RateLimits),
    /// Other limits per second for what the guest sends.
    NetworkSend(RateLimits),
    /// Another size of the balloon, which the guest is asked for.
    BalloonSize(Size),
    /// Another time between two questions for statistics of the guest's memory, in seconds. 0 ends the questions.
    BalloonStatsInterval(u32),
    /// The guest is asked for hints at free memory. Once it has no more, it may use that memory again, at once if that
    /// is wanted and otherwise after [`DeviceChange::BalloonHintsEnd`].
    BalloonHints(bool),
    /// The guest may use the memory again at which it has hinted.
    BalloonHintsEnd,
}

/// What a machine has used and counted so far.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// The CPU time of the vCPUs.
    pub cpu_time: Duration,
    /// What the devices have counted, and how they are set.
    pub devices: DeviceReport,
}

/// Holds the vCPUs of a machine, wherever it is, also after the machine is freed.
pub trait Brake: Send + Sync {
    /// Holds the vCPUs until [`Brake::release`], without waiting. The state of the machine stays as it is.
    fn withhold(&self);
    /// Lets the vCPUs of a running machine run again.
    fn release(&self);
    /// Returns the kernel's numbers of the vCPUs' threads, which are of the process `worker` or of this one; none if
    /// they are not known yet.
    fn threads(&self) -> Vec<u32>;
}

impl Brake for VmHandle {
    fn withhold(&self) {
        self.withhold();
    }

    fn release(&self) {
        self.release();
    }

    fn threads(&self) -> Vec<u32> {
        self.threads()
    }
}

/// A machine that was built. Dropping it ends it and frees all that it has.
pub trait Machine: fmt::Debug + Send + Sync {
    /// Returns the VM's name.
    fn name(&self) -> &str;
    /// Returns the number of the worker process that has the machine; `None` if it is in this process.
    fn worker(&self) -> Option<u32> {
        None
    }
    /// Returns the number of the vCPUs.
    fn vcpus(&self) -> u32;
    /// Returns the size of RAM, in bytes.
    fn memory_bytes(&self) -> u64;
    /// Starts the guest, or resumes it after a pause.
    fn start(&self);
    /// Pauses the guest. On return its vCPUs have stopped.
    fn pause(&self);
    /// Asks the VM to stop without asking its guest, and does not wait.
    fn request_stop(&self);
    /// Waits until the VM has ended, and returns how.
    fn wait(&self) -> VmEnd;
    /// Returns how the VM ended, if it has.
    fn end(&self) -> Option<VmEnd>;
    /// Returns a file that becomes readable, and stays so, when the VM has ended.
    fn end_event(&self) -> RawFd;
    /// Returns the state of the vCPUs.
    fn state(&self) -> VmState;
    /// Returns the VM's membership in the sharing engine; `None` if it shares no memory.
    fn membership(&self) -> Option<&Membership>;
    /// Returns why the VM's memory is not shared although it could be, in a sentence.
    fn unshared(&self) -> Option<&'static str> {
        None
    }
    /// Notes which pages are to be shared, for a process that manages the machine later.
    fn note_mode(&self, _mode: SharingMode) {}
    /// Returns what holds the vCPUs while memory is short.
    fn brake(&self) -> Arc<dyn Brake>;
    /// Measures the private memory of RAM, in bytes.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    fn private_bytes(&self, pagemap: &Pagemap) -> io::Result<u64> {
        let pages: u64 = self.touched(pagemap)?.iter().map(|run| run.len() as u64).sum();
        Ok(pages * PAGE_SIZE as u64)
    }
    /// Returns the runs of pages that have memory, of a VM that shares none.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    fn touched(&self, pagemap: &Pagemap) -> io::Result<Vec<Range<u32>>>;
    /// Opens the console's file again, if it has one.
    ///
    /// # Errors
    /// Fails with a sentence if the file cannot be opened. Then output goes to the previous file.
    fn reopen_console(&self) -> Result<(), String>;
    /// Types to the console. Returns how many bytes from the start were accepted.
    fn serial_input(&self, data: &[u8]) -> usize;
    /// Sets the event that is written when the console accepts more.
    fn set_serial_room_event(&self, event: EventFd);
    /// Presses Ctrl, Alt and Delete. Returns `false` if the guest reads nothing from its keyboard.
    fn press_ctrl_alt_del(&self) -> bool;
    /// Asks the guest to shut down. Returns `false` if there is no way to.
    fn ask_to_end(&self) -> bool;
    /// Asks a guest in another way that was asked before and still runs. A guest that has read of the power button has
    /// until its time is short.
    fn ask_again(&self, time_is_short: bool);
    /// Returns remarks for the user on how the VM was built, in sentences.
    fn notices(&self) -> Vec<String>;
    /// Returns what the machine has used and counted so far. A machine elsewhere is asked once for all of it.
    fn look(&self) -> Look;
    /// Changes a device.
    ///
    /// # Errors
    /// Fails if there is no such device, or if it refuses.
    fn change_device(&self, id: &str, change: DeviceChange) -> Result<(), DeviceError>;
    /// Passes errors of the host at disks on from now on.
    fn observe_disk_errors(&self, observer: DiskErrorObserver);
    /// Tells from now on when the guest's balloon has the size that was asked for, once for each size.
    fn observe_balloon(&self, observer: BalloonObserver);
    /// Asks the guest for a balloon of this size, in bytes. Does not wait until the guest has it.
    ///
    /// # Errors
    /// Fails if the VM has no balloon, or less memory.
    fn set_balloon(&self, bytes: u64) -> Result<(), DeviceError> {
        self.change_device(BALLOON, DeviceChange::BalloonSize(Size(bytes)))
    }
    /// Returns what the balloon is, and what the guest has told of its memory; `None` if the VM has none.
    fn balloon(&self) -> Option<BalloonView> {
        self.look().devices.balloon
    }
}

impl Machine for Vm {
    fn name(&self) -> &str {
        self.name()
    }

    fn vcpus(&self) -> u32 {
        self.vcpus()
    }

    fn memory_bytes(&self) -> u64 {
        self.ram().bytes() as u64
    }

    fn start(&self) {
        self.start();
    }

    fn pause(&self) {
        self.pause();
    }

    fn request_stop(&self) {
        self.handle().request_stop();
    }

    fn wait(&self) -> VmEnd {
        self.wait()
    }

    fn end(&self) -> Option<VmEnd> {
        self.end()
    }

    fn end_event(&self) -> RawFd {
        self.end_event().as_raw_fd()
    }

    fn state(&self) -> VmState {
        self.state()
    }

    fn membership(&self) -> Option<&Membership> {
        self.membership()
    }

    fn brake(&self) -> Arc<dyn Brake> {
        Arc::new(self.handle())
    }

    fn touched(&self, pagemap: &Pagemap) -> io::Result<Vec<Range<u32>>> {
        let mut runs = Vec::new();
        pagemap.private(self.ram().range(0, self.ram().pages()), &mut runs)?;
        Ok(runs)
    }

    fn reopen_console(&self) -> Result<(), String> {
        self.reopen_console().map_err(|error| error.to_string())
    }

    fn serial_input(&self, data: &[u8]) -> usize {
        self.serial_input(data)
    }

    fn set_serial_room_event(&self, event: EventFd) {
        self.set_serial_room_event(event);
    }

    fn press_ctrl_alt_del(&self) -> bool {
        self.press_ctrl_alt_del()
    }

    fn ask_to_end(&self) -> bool {
        self.ask_to_end()
    }

    fn ask_again(&self, time_is_short: bool) {
        self.ask_again(time_is_short);
    }

    fn notices(&self) -> Vec<String> {
        let of_disks = self.disks().iter().flat_map(|disk| &disk.notices);
        let of_networks = self.networks().iter().flat_map(|network| &network.notices);
        self.notices().iter().chain(of_disks).chain(of_networks).cloned().collect()
    }

    fn look(&self) -> Look {
        Look { cpu_time: self.cpu_time(), devices: DeviceReport::of(self) }
    }

    fn change_device(&self, id: &str, change: DeviceChange) -> Result<(), DeviceError> {
        let disk = || self.disks().iter().find(|disk| disk.id == id).ok_or(DeviceError::Missing);
        let network = || self.networks().iter().find(|network| network.id == id).ok_or(DeviceError::Missing);
        let refused = |error: &dyn fmt::Display| DeviceError::Refused(error.to_string());
        let balloon = || self.balloon().ok_or(DeviceError::Missing);
        match change {
            DeviceChange::DiskCache(policy) => disk()?.set_cache(policy).map_err(|error| refused(&error))?,
            DeviceChange::DiskLimits(limits) => disk()?.limiter.set(limits),
            DeviceChange::DiskSize => {
                disk()?.size.refresh().map_err(|error| refused(&error))?;
            }
            DeviceChange::NetworkLink(up) => network()?.link.set(up),
            DeviceChange::NetworkReceive(limits) => network()?.limiters[0].set(limits),
            DeviceChange::NetworkSend(limits) => network()?.limiters[1].set(limits),
            DeviceChange::BalloonSize(size) => {
                let balloon = balloon()?;
                let fault = BalloonSpec::fault_of_size(size, Size(self.memory_bytes()));
                fault.map_or(Ok(()), |reason| Err(DeviceError::Refused(reason)))?;
                balloon.set_target(u32::try_from(size.0 / FRAME_BYTES).unwrap_or(u32::MAX));
            }
            DeviceChange::BalloonStatsInterval(seconds) => balloon()?.set_stats_interval(seconds),
            DeviceChange::BalloonHints(_) | DeviceChange::BalloonHintsEnd if !balloon()?.config().hinting => {
                let reason = "the balloon has no hints; create the VM with hinting";
                return Err(DeviceError::Refused(reason.to_owned()));
            }
            DeviceChange::BalloonHints(is_answered) => balloon()?.start_hints(is_answered),
            DeviceChange::BalloonHintsEnd => balloon()?.stop_hints(),
        }
        Ok(())
    }

    fn observe_disk_errors(&self, observer: DiskErrorObserver) {
        for disk in self.disks() {
            let (observer, id) = (Arc::clone(&observer), disk.id.clone());
            disk.stats.observe_host_errors(Box::new(move |message| observer(&id, message)));
        }
    }

    fn observe_balloon(&self, observer: BalloonObserver) {
        if let Some(balloon) = self.balloon() {
            balloon.on_arrival(move |frames| observer(frames));
        }
    }
}
