//! The files that samepage contains: so far, the demo guest.
//!
//! The demo guest is a freestanding x86-64 program, a PVH ELF image of about 40 KiB. It fills its memory with
//! known pages, verifies every word of them repeatedly, and can use a virtio-blk disk. It needs no
//! distribution, kernel or disk image, and starts in milliseconds. It proves that sharing memory never
//! changes what a guest reads. [`demo`] contains what the host needs to use it.
//!
//! ```
//! use samepage_resources::{DEMO_GUEST, demo::{layout::Arena, plan::Plan, report::Report}};
//!
//! let plan = Plan { vm: 3, rounds: 2, pages: Some(4096), ..Plan::default() };
//! let command_line = plan.to_string();
//! assert!(command_line.contains("vm=3"));
//! assert!(DEMO_GUEST.starts_with(b"\x7fELF"));
//!
//! let arena = Arena::on_map(&plan, std::iter::once(0..64 << 20))?;
//! assert_eq!(arena.pages(), 4096);
//! assert!(arena.counts().reclaimable(10) > 9 * arena.counts().alike);
//!
//! let line = "done rounds=2 corrupt=0";
//! assert_eq!(Report::parse(line)?, Report::Done { rounds: 2, corrupt: 0 });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod demo;
pub mod guest_kernel;
pub mod image;

/// The demo guest: an ELF image with a PVH entry point (`XEN_ELFNOTE_PHYS32_ENTRY`), linked at 1 MiB. It
/// needs at least 2 MiB of RAM from address 0 in addition to its arena.
pub const DEMO_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo-guest.elf"));

#[cfg(test)]
mod tests {
    use super::DEMO_GUEST;

    /// Name size, descriptor size and type of the note that PVH loaders look for, and its name.
    const PVH_NOTE: [u8; 16] = *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";

    #[test]
    fn the_guest_has_a_pvh_entry_point_in_its_image() {
        let note = DEMO_GUEST.windows(PVH_NOTE.len()).position(|bytes| bytes == PVH_NOTE).unwrap();
        let entry = &DEMO_GUEST[note + PVH_NOTE.len()..][..8];
        let entry = u64::from_le_bytes(entry.try_into().unwrap());
        assert!((0x10_0000..crate::demo::layout::FLOOR).contains(&entry));
    }
}
