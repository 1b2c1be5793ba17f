//! Writes to guest memory, from KVM's dirty log and the VMM's own bitmap.
//!
//! KVM uses manual protection, with all pages marked as written at first
//! (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, `Documentation/virt/kvm/api.rst` 4.125 and 7.18 on). It
//! write-protects a page only when the page is armed, so a guest whose writes are not followed pays nothing.

#![expect(unsafe_code, reason = "ioctls of the dirty log that work on buffers of the caller's")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::changes::{ChangeLog, PageSet};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use super::control::Control;
use super::memory::{MemorySlot, VmMemory};

/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)`.
const GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
/// Number of pages that one call arms. KVM holds its lock for about 0.03 µs a page.
const ARM_PAGES: usize = 16384;

#[repr(C)]
struct GetDirtyLog {
    slot: u32,
    padding: u32,
    bitmap: *mut u64,
}

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    pages: u32,
    first_page: u64,
    bitmap: *const u64,
}

/// Makes KVM log writes to pages that are armed one by one. Returns whether KVM can do so. If not, guest
/// memory is registered without a log, and the engine scans all of it in a loop.
pub(super) fn enable(vm: &VmFd) -> bool {
    let wanted = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let mut capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    capability.args[0] = wanted;
    vm.enable_cap(&capability).is_ok()
}

/// The dirty log of one VM.
pub(super) struct DirtyLog {
    kvm: Arc<VmFd>,
    memory: VmMemory,
    control: Arc<Control>,
    /// CPU time of the vCPUs before the log was last read.
    ran_before: Option<Duration>,
    /// KVM's answer for one slot.
    bitmap: Vec<u64>,
}

impl DirtyLog {
    /// Returns the log of a VM whose memory slots were registered with logging. `control` knows its vCPUs.
    pub(super) fn new(kvm: Arc<VmFd>, memory: VmMemory, control: Arc<Control>) -> Self {
        Self { kvm, memory, control, ran_before: None, bitmap: Vec::new() }
    }

    /// Adds the pages of a slot that vCPUs and KVM itself have written.
    fn collect_slot(&mut self, slot: MemorySlot, written: &mut PageSet) -> io::Result<()> {
        let words = slot_words(slot);
        self.bitmap.clear();
        self.bitmap.resize(words, 0);
        let mut argument = GetDirtyLog { slot: slot.slot, padding: 0, bitmap: self.bitmap.as_mut_ptr() };
        // SAFETY: the bitmap has a bit for every page of the slot, rounded up to 64, as KVM expects.
        if unsafe { libc::ioctl(self.kvm.as_raw_fd(), GET_DIRTY_LOG as _, &raw mut argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
        written.insert_words(first_word(slot), &self.bitmap);
        Ok(())
    }
}

impl ChangeLog for DirtyLog {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        self.ran_before = Some(self.control.cpu_time());
        let slots: Vec<_> = self.memory.slots().to_vec();
        for slot in &slots {
            self.collect_slot(*slot, written)?;
        }
        // Regions and slots are the same ranges in the same order.
        for (region, slot) in self.memory.view().iter().zip(&slots) {
            written.insert_words(first_word(*slot), &own_writes(region));
        }
        Ok(())
    }

    fn arm(&mut self, first_word: usize, words: &[u64]) -> io::Result<()> {
        for slot in self.memory.slots() {
            let slot_start = self::first_word(*slot);
            let start = first_word.max(slot_start);
            let end = (first_word + words.len()).min(slot_start + slot_words(*slot));
            if start >= end {
                continue;
            }
            let slot_pages = slot.range.bytes as usize / PAGE_SIZE;
            let within = &words[start - first_word..end - first_word];
            for (index, chunk) in within.chunks(ARM_PAGES / 64).enumerate() {
                let chunk_start = start - slot_start + index * (ARM_PAGES / 64);
                let Some(start) = chunk.iter().position(|&word| word != 0) else { continue };
                let end = chunk.iter().rposition(|&word| word != 0).map_or(start, |last| last + 1);
                let first = (chunk_start + start) * 64;
                let argument = ClearDirtyLog {
                    slot: slot.slot,
                    pages: ((end - start) * 64).min(slot_pages - first) as u32,
                    first_page: first as u64,
                    bitmap: chunk[start..end].as_ptr(),
                };
                // SAFETY: the bitmap has a bit for each of the pages. KVM reads it.
                if unsafe { libc::ioctl(self.kvm.as_raw_fd(), CLEAR_DIRTY_LOG as _, &raw const argument) } < 0
                {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    }

    fn is_at_rest(&mut self, _since: Instant) -> bool {
        self.ran_before == Some(self.control.cpu_time())
    }

    fn set_noting(&mut self, noting: bool) -> io::Result<()> {
        for (index, slot) in self.memory.slots().iter().enumerate() {
            if let Err(error) = self.memory.set_slot(&self.kvm, slot, noting) {
                // Change all slots or none. If the reversal fails too, the guest still works.
                for slot in &self.memory.slots()[..index] {
                    let _ = self.memory.set_slot(&self.kvm, slot, !noting);
                }
                return Err(io::Error::from_raw_os_error(error.errno()));
            }
        }
        Ok(())
    }
}

/// Returns the VMM's own writes to a region since the last call.
fn own_writes(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<u64> {
    let region: &MmapRegion<AtomicBitmap> = region;
    region.bitmap().get_and_reset()
}

fn slot_words(slot: MemorySlot) -> usize {
    (slot.range.bytes as usize / PAGE_SIZE).div_ceil(64)
}

/// Returns the slot's first word in a set of all pages. Slots start at multiples of 64 pages in the
/// reservation.
fn first_word(slot: MemorySlot) -> usize {
    slot.range.ram_offset as usize / PAGE_SIZE / 64
}
