//! Kernels as distributions ship them.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use samepage_machine::boot::{Entry, describe};
use samepage_machine::{ImageSource, Size, Vm, VmConfig};
use samepage_tests::guests::hypervisor;
use samepage_tests::harness::{self, Need};
use vm_memory::{Bytes, GuestAddress};
use xtask::lab;

fn main() -> ExitCode {
    harness::run_all(&[
        ("debian_s_kernels_are_unpacked_and_start_by_pvh", &[Need::DebianKernels], unpacked),
        ("debian_s_kernels_lie_in_guest_memory_as_linked", &[Need::Kvm, Need::DebianKernels], loaded),
    ])
}

const RAM: u64 = 256 << 20;
/// The address that Linux is linked for.
const LINKED: u64 = 16 << 20;

fn unpacked() {
    let kernels = lab::find_kernels().expect("the harness has found them");
    assert_eq!(kernels.len(), 4);
    for kernel in kernels {
        let described = describe(&ImageSource::Path(kernel.clone()), RAM).expect("a kernel that boots");
        let Entry::Pvh(entry) = described.entry else { panic!("{}: {described:?}", kernel.display()) };
        assert!((LINKED..described.end).contains(&entry), "{}: {described:?}", kernel.display());
        assert_eq!((described.unpacked, described.remark), (Some(declared_size(&kernel)), None));
        let small = describe(&ImageSource::Path(kernel), 32 << 20).expect_err("it does not fit");
        assert!(small.to_string().contains("give the VM more memory"), "{small}");
    }
}

/// The size that the kernel's build has noted behind the compressed kernel.
fn declared_size(bzimage: &Path) -> u64 {
    let image = fs::read(bzimage).expect("a kernel");
    let number = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes")) as usize;
    let end = (usize::from(image[0x1f1]) + 1) * 512 + number(0x248) + number(0x24c);
    number(end - 4) as u64
}

fn loaded() {
    let hypervisor = hypervisor();
    for kernel in lab::find_kernels().expect("the harness has found them") {
        let mut config = VmConfig::new("debian", ImageSource::Path(kernel.clone()));
        config.spec.memory = Size(RAM);
        let vm = Vm::build(config, &hypervisor).expect("a VM");
        assert_eq!(vm.notices(), [] as [String; 0], "{}", kernel.display());
        let memory = vm.memory().view();
        // The version stands in the image as the kernel prints it.
        let mut image = vec![0; 64 << 20];
        memory.read_slice(&mut image, GuestAddress(LINKED)).expect("memory");
        let banner = b"Linux version 6.";
        assert!(image.windows(banner.len()).any(|bytes| bytes == banner), "{}", kernel.display());
    }
}
