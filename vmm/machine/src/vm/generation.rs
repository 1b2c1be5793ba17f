//! The VM generation ID: 16 random bytes in guest memory, by which a guest notices that it is another machine than
//! before.
//!
//! A guest that continues from a copy of another guest's memory has that guest's random numbers as well: its keys to
//! come are known to the other one. So each machine gets an ID of its own when it is built, which is at each start and
//! at each reset. [`Vm::renew_generation_id`] replaces the ID of a machine that exists, and tells the guest. Linux then
//! reseeds its generator (drivers/virt/vmgenid.c).
//!
//! The ID lies in a page that the guest's memory map reserves, and that the host writes to as it writes to any guest
//! memory: through its mapping. If the sharing engine has merged the page, the write makes a private copy. If it is
//! about to merge it, the write waits until the page is compared and unprotected, as a guest's write would. So no write
//! is lost, and the engine may treat the page as any other one. Other machines have other IDs, so it stays private.
//!
//! Source: Microsoft, Virtual Machine Generation ID (2012).

use rustix::rand::{GetRandomFlags, getrandom};
use samepage_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{Vm, VmError};
use crate::x86::layout::{GENERATION_ID, GENERATION_ID_BYTES};

/// Writes a new ID.
///
/// # Errors
/// Fails if the host has no random bytes, or the memory has no room for the ID.
pub(super) fn write_new(memory: &GuestMemory) -> Result<(), VmError> {
    let mut id = [0_u8; GENERATION_ID_BYTES];
    // So few bytes come all at once, or not at all.
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| VmError::Random(error.into()))?;
    memory.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(VmError::Tables)
}

impl Vm {
    /// Gives the machine a new generation ID, and tells the guest. A guest without a driver for it is not disturbed.
    /// Call this before a copy of a machine runs, so that the guest cannot use what it had in common with the original.
    ///
    /// # Errors
    /// Fails if the host has no random bytes. Then the guest has its previous ID.
    pub fn renew_generation_id(&self) -> Result<(), VmError> {
        write_new(self.memory.view())?;
        self.devices.tell_new_generation();
        // A guest whose interrupt is masked reads the ID when its driver starts.
        self.raise_event_interrupt();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use samepage_devices::power;
    use samepage_spec::Size;

    use super::*;
    use crate::boot::test_images::pvh_elf;
    use crate::{Hypervisor, ImageSource, VmConfig, VmEnd};

    /// Waits for the event of a new ID, and enters soft off.
    const WAITS: &[u8] = &[
        0x66,
        0xba,
        0x02,
        0x06, // mov dx, 0x602
        0xec, // wait: in al, dx
        0x3c,
        power::GENERATION_CHANGED, // cmp al, 2
        0x75,
        0xfb, // jne wait
        0x66,
        0xba,
        0x00,
        0x06, // mov dx, 0x600
        0xb0,
        0x34, // mov al, 0x34: soft off
        0xee, // out dx, al
        0xf4, // hlt
        0xeb,
        0xfd, // jmp to the hlt
        0x90, // nop
    ];

    fn build(hypervisor: &Hypervisor) -> Vm {
        let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(WAITS).into() };
        let mut config = VmConfig::new("generation", kernel);
        config.spec.memory = Size(4 << 20);
        Vm::build(config, hypervisor).expect("a VM")
    }

    fn id(vm: &Vm) -> [u8; GENERATION_ID_BYTES] {
        vm.memory().view().read_obj(GuestAddress(GENERATION_ID)).unwrap()
    }

    #[test]
    fn each_machine_has_an_id_of_its_own_and_hears_of_a_new_one() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        let (one, other) = (build(&hypervisor), build(&hypervisor));
        let (first, second) = (id(&one), id(&other));
        assert!(first != second && [first, second].iter().all(|id| id.iter().any(|byte| *byte != 0)));
        one.start();
        one.renew_generation_id().unwrap();
        assert_eq!(one.wait(), VmEnd::PowerOff);
        assert!(id(&one) != first && id(&other) == second);
    }
}
