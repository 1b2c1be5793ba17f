//! Guest memory of one VM: one reservation of the host with three views. The sharing engine sees pages
//! ([`Ram`]), device models see guest addresses ([`GuestMemory`]), and KVM sees memory slots.

#![expect(unsafe_code, reason = "hands the addresses of guest RAM to vm-memory and to KVM")]

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use samepage_devices::GuestMemory;
use samepage_sharing::ram::HUGE_BYTES;
use samepage_sharing::{PAGE_SIZE, Ram};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::config::HugePages;
use crate::x86::layout::{RamRange, ram_ranges};

/// A range of guest RAM and the KVM memory slot that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// KVM's number of the slot.
    pub slot: u32,
    /// The range in the guest's address space and in the reservation.
    pub range: RamRange,
}

/// The RAM of one VM.
///
/// [`GuestMemory`] is a view without ownership. All clones of it must be dropped before the last share of
/// [`Ram`]. `Vm` guarantees that by dropping devices and memory guard first.
#[derive(Debug, Clone)]
pub struct VmMemory {
    view: GuestMemory,
    slots: Vec<MemorySlot>,
    ram: Arc<Ram>,
}

impl VmMemory {
    /// Reserves RAM of this length in bytes, a multiple of the page size.
    ///
    /// With `small_pages`, the memory does not become huge pages: a partly remapped huge page frees nothing.
    /// With `huge`, it does nevertheless, and the sharing engine splits the huge pages that it shares partly.
    pub(crate) fn reserve(bytes: u64, small_pages: bool, huge: HugePages) -> io::Result<Self> {
        let length = usize::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let ram = Arc::new(Ram::reserve(length)?);
        match huge {
            HugePages::Thp => ram.use_huge_pages()?,
            HugePages::Off if small_pages => ram.use_small_pages()?,
            HugePages::Off => {}
        }
        let mut regions = Vec::with_capacity(2);
        let mut slots = Vec::with_capacity(2);
        for (slot, range) in (0..).zip(ram_ranges(bytes)) {
            // Align the host address like the guest address, modulo 2 MiB. KVM maps huge pages only then.
            let offset = (host_address(&ram, range) as u64).wrapping_sub(range.gpa);
            debug_assert!(offset.is_multiple_of(HUGE_BYTES as u64), "{range:x?}");
            regions.push(region(&ram, range)?);
            slots.push(MemorySlot { slot, range });
        }
        let view = GuestMemory::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self { view, slots, ram })
    }

    /// Registers all RAM with KVM, with a dirty log if `logged`.
    pub(crate) fn register(&self, vm: &VmFd, logged: bool) -> Result<(), kvm_ioctls::Error> {
        self.slots.iter().try_for_each(|slot| self.set_slot(vm, slot, logged))
    }

    /// Registers a slot with KVM, or switches its dirty log on or off.
    pub(super) fn set_slot(
        &self,
        vm: &VmFd,
        MemorySlot { slot, range }: &MemorySlot,
        logged: bool,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: *slot,
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: range.gpa,
            memory_size: range.bytes,
            userspace_addr: host_address(&self.ram, *range) as u64,
        };
        // SAFETY: the slot lies within the reservation, which outlives the VM's file: `Vm` closes the file
        // first. Slots do not overlap, because `ram_ranges` splits the length once.
        unsafe { vm.set_user_memory_region(region) }
    }

    /// Returns the reservation. A page's index is its offset there / 4096.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Returns RAM by guest physical address, with a dirty bitmap of the VMM's own writes.
    pub fn view(&self) -> &GuestMemory {
        &self.view
    }

    /// Returns KVM's memory slots, by ascending address.
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }
}

fn host_address(ram: &Ram, range: RamRange) -> usize {
    // `ram_ranges` splits the reservation's own length, so the sum stays within it.
    ram.base().as_ptr() as usize + range.ram_offset as usize
}

fn region(ram: &Ram, range: RamRange) -> io::Result<GuestRegionMmap<AtomicBitmap>> {
    const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE).expect("pages are not empty");
    let bytes = range.bytes as usize;
    // SAFETY: the range lies within the reservation, which outlives every user of the region (see
    // `VmMemory`). The region does not own the memory, so it unmaps nothing.
    let mapping = unsafe {
        MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::new(bytes, PAGE))
            .with_raw_mmap_pointer(host_address(ram, range) as *mut u8)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
    }
    .map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, GuestAddress(range.gpa))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn guest_and_host_addresses_agree_within_huge_pages() {
        let bytes = (3 << 30) + (1 << 20);
        let memory = VmMemory::reserve(bytes, true, HugePages::Thp).unwrap();
        for slot in memory.slots() {
            let host = host_address(memory.ram(), slot.range) as u64;
            assert_eq!(host % HUGE_BYTES as u64, slot.range.gpa % HUGE_BYTES as u64);
        }
        assert!(memory.ram().huge());
        assert!(!VmMemory::reserve(bytes, true, HugePages::Off).unwrap().ram().huge());
    }

    #[test]
    fn both_views_show_the_same_memory_on_both_sides_of_the_hole() {
        let memory = VmMemory::reserve((3 << 30) + (1 << 20), true, HugePages::Off).unwrap();
        assert_eq!(memory.slots().len(), 2);

        memory.view().write_obj(0x1122_u16, GuestAddress(0x2000)).unwrap();
        memory.view().write_obj(0x3344_u16, GuestAddress((4 << 30) + 0x1000)).unwrap();
        assert!(memory.view().write_obj(0_u8, GuestAddress(3 << 30)).is_err());

        let at = |offset: usize| {
            // SAFETY: both offsets lie within the reservation, and no other thread writes to it.
            unsafe { memory.ram().base().as_ptr().add(offset).cast::<u16>().read() }
        };
        assert_eq!((at(0x2000), at((3 << 30) + 0x1000)), (0x1122, 0x3344));
    }
}
