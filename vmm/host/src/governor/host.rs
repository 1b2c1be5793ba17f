//! What the policy is told of this host.

#![expect(unsafe_code, reason = "sets a thread's priority")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use samepage_machine::vm::VmState;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::available::{Available, Room};
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::ram::HUGE_BYTES;
use samepage_spec::HugePages;
use samepage_worker::machine::Brake;

use super::seen::{Guest, Host};
use crate::ends::MachineNumber;
use crate::record::Record;
use crate::registry::Registry;

/// A machine that the policy knows.
struct Known {
    record: Weak<Record>,
    brake: Arc<dyn Brake>,
    /// The process of its threads.
    process: u32,
    /// The thread numbers, once all vCPUs have theirs.
    threads: Vec<u32>,
    vcpus: u32,
}

/// This host and the VMs of a registry.
pub(super) struct ThisHost {
    registry: Weak<Registry>,
    available: Available,
    pagemap: Pagemap,
    began: Instant,
    known: BTreeMap<MachineNumber, Known>,
}

impl ThisHost {
    /// # Errors
    /// Fails if `/proc` is hidden.
    pub(super) fn new(registry: Weak<Registry>) -> io::Result<Self> {
        let available = Available::new();
        if available.room().is_none() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "/proc/meminfo cannot be read"));
        }
        let known = BTreeMap::new();
        Ok(Self { registry, available, pagemap: Pagemap::open()?, began: Instant::now(), known })
    }

    /// Describes all VMs that have a machine.
    pub(super) fn find_guests(&mut self, guests: &mut Vec<Guest>) {
        guests.clear();
        let Some(registry) = self.registry.upgrade() else { return };
        let known = &mut self.known;
        registry.glance_at_all(|record, number, vm| {
            let state = vm.state();
            if state == VmState::Ended {
                return;
            }
            known.entry(number).or_insert_with(|| Known {
                record: Arc::downgrade(record),
                brake: vm.brake(),
                process: vm.worker().unwrap_or_else(std::process::id),
                threads: Vec::new(),
                vcpus: vm.vcpus(),
            });
            let is_huge = record.spec().hugepages == HugePages::Thp;
            guests.push(Guest {
                number,
                memory: vm.memory_bytes(),
                weight: record.spec().memory_weight.into(),
                vcpus: vm.vcpus(),
                page: if is_huge { HUGE_BYTES } else { PAGE_SIZE } as u64,
                runs: state == VmState::Running,
            });
        });
        known.retain(|number, _| guests.iter().any(|guest| guest.number == *number));
    }
}

impl Host for ThisHost {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn room(&mut self) -> Room {
        // It could be read at first, so this is a moment's failure. Without room nobody gets anything.
        self.available.room().unwrap_or(Room { bytes: 0, of: u64::MAX })
    }

    fn private(&mut self, vm: MachineNumber) -> Option<u64> {
        let record = self.known.get(&vm)?.record.upgrade()?;
        record.try_inspect(|machine| machine.private_bytes(&self.pagemap).ok())?
    }

    fn faults(&mut self, vm: MachineNumber) -> Option<u64> {
        let known = self.known.get_mut(&vm)?;
        if known.threads.len() < known.vcpus as usize {
            known.threads = known.brake.threads();
            if known.threads.is_empty() {
                return None;
            }
        }
        known.threads.iter().map(|thread| minor_faults(known.process, *thread)).sum()
    }

    fn withhold(&mut self, vm: MachineNumber) {
        if let Some(known) = self.known.get(&vm) {
            known.brake.withhold();
        }
    }

    fn release(&mut self, vm: MachineNumber) {
        if let Some(known) = self.known.get(&vm) {
            known.brake.release();
        }
    }
}

/// Returns the faults of a thread that needed no disk (`proc_pid_stat(5)`). Those on behalf of a guest count as well.
fn minor_faults(process: u32, thread: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).ok()?;
    // The name, in parentheses, may have any characters in it.
    let (_, after) = text.rsplit_once(") ")?;
    after.split(' ').nth(7)?.parse().ok()
}

/// Has the kernel run the calling thread before all ordinary ones, or else prefer it, if it lets us.
pub(super) fn prefer_this_thread(nice: i32) {
    let parameters = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: both calls name the calling thread, and only the first reads memory, which is valid.
    unsafe {
        if libc::sched_setscheduler(0, policy, &raw const parameters) != 0 {
            libc::setpriority(libc::PRIO_PROCESS, 0, nice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_a_thread_are_counted() {
        // SAFETY: the call always succeeds.
        let thread = u32::try_from(unsafe { libc::gettid() }).unwrap();
        let before = minor_faults(std::process::id(), thread).unwrap();
        let mut pages = vec![0_u8; 256 * PAGE_SIZE];
        pages.iter_mut().step_by(PAGE_SIZE).for_each(|byte| *byte = 1);
        std::hint::black_box(&pages);
        let after = minor_faults(std::process::id(), thread).unwrap();
        // The allocator may map huge pages or have had some of the memory.
        assert!(after > before, "{before} {after}");
        assert_eq!(minor_faults(std::process::id(), 1), None);
    }
}
