//! VMs with several vCPUs, with guests that start their other processors as any kernel does: through the local APIC,
//! with INIT and SIPI.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use samepage_spec::Size;

use super::CrashReport;
use crate::boot::test_images::pvh_elf;
use crate::{Hypervisor, ImageSource, Vm, VmConfig, VmEnd, VmError};

/// Where the code of the other processors is copied to; its page is the vector of the SIPI.
const START: u32 = 0x8000;
/// A counter of the processors that have started.
const STARTED: u16 = 0x9000;

/// What a processor does that was started: counts itself, and more.
const COUNTS: [u8; 6] = [
    0xf0, 0x66, 0xff, 0x06, 0x00, 0x90, // lock inc dword [0x9000]
];
const HALTS: &[u8] = &[
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];
const SPINS: &[u8] = &[
    0xeb, 0xfe, // jmp to itself
];
const RESETS: &[u8] = &[
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xeb, 0xfa, // jmp to the mov
];
/// Raises an exception in protected mode, without an interrupt table.
const DIES: &[u8] = &[
    0x0f, 0x20, 0xc0, // mov eax, cr0
    0x0c, 0x01, // or al, 1
    0x0f, 0x22, 0xc0, // mov cr0, eax
    0x0f, 0x01, 0x1e, 0x00, 0x70, // lidt [0x7000], which is zero
    0xcc, // int3
];

/// Powers off.
const POWERS_OFF: &[u8] = &[
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, // mov al, 0x34
    0xee, // out dx, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// A kernel that starts all other processors, waits until `wait_for` of them have counted themselves, and goes on with
/// `then`.
fn starter(others: &[u8], wait_for: u32, then: &[u8]) -> Vec<u8> {
    let others = [&COUNTS, others].concat();
    let build = |others_at: u32| {
        let mut code = vec![0xbe]; // mov esi
        code.extend((0x10_0000 + others_at).to_le_bytes());
        code.push(0xbf); // mov edi
        code.extend(START.to_le_bytes());
        code.push(0xb9); // mov ecx
        code.extend((others.len() as u32).to_le_bytes());
        code.extend([0xf3, 0xa4]); // rep movsb
        // The APIC on; INIT, then SIPI, for all but itself.
        for (register, value) in
            [(0xfee0_00f0_u32, 0x1ff_u32), (0xfee0_0300, 0xc_4500), (0xfee0_0300, 0xc_4600 | START >> 12)]
        {
            code.extend([0xc7, 0x05]); // mov dword [register], value
            code.extend(register.to_le_bytes());
            code.extend(value.to_le_bytes());
        }
        code.push(0xa1); // wait: mov eax, [STARTED]
        code.extend(u32::from(STARTED).to_le_bytes());
        code.push(0x3d); // cmp eax
        code.extend(wait_for.to_le_bytes());
        code.extend([0x72, 0xf4]); // jb wait
        code.extend(then);
        code
    };
    let length = build(0).len() as u32;
    let mut code = build(length);
    code.extend(others);
    // Whole words.
    code.resize(code.len().next_multiple_of(4), 0x90);
    code
}

fn hypervisor() -> Option<Hypervisor> {
    let hypervisor = Hypervisor::open().ok();
    if hypervisor.is_none() {
        eprintln!("SKIPPED: there is no KVM here");
    }
    hypervisor
}

fn config(code: &[u8], vcpus: u32) -> VmConfig {
    let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(code).into() };
    let mut config = VmConfig::new("several", kernel);
    (config.spec.memory, config.spec.vcpus) = (Size(4 << 20), vcpus);
    config
}

fn build(hypervisor: &Hypervisor, code: &[u8], vcpus: u32) -> Vm {
    Vm::build(config(code, vcpus), hypervisor).expect("a VM")
}

#[test]
fn a_guest_starts_all_its_vcpus_and_powers_off() {
    let Some(hypervisor) = hypervisor() else { return };
    for vcpus in [1, 2, 5, 40] {
        let vm = build(&hypervisor, &starter(HALTS, vcpus - 1, POWERS_OFF), vcpus);
        assert_eq!(vm.vcpus(), vcpus);
        vm.start();
        assert_eq!(vm.wait(), VmEnd::PowerOff, "{vcpus} vCPUs");
    }
}

#[test]
fn a_vm_can_have_as_many_vcpus_as_can_be_described() {
    let Some(hypervisor) = hypervisor() else { return };
    if hypervisor.max_vcpus < 254 {
        eprintln!("SKIPPED: KVM gives a VM {} vCPUs here", hypervisor.max_vcpus);
        return;
    }
    let vm = build(&hypervisor, &starter(HALTS, 3, HALTS), 254);
    vm.start();
    vm.pause();
    vm.resume();
    assert_eq!(vm.stop(), VmEnd::Stopped);
}

#[test]
fn any_vcpu_can_end_the_vm_and_the_others_stop() {
    let Some(hypervisor) = hypervisor() else { return };
    for first_goes_on in [SPINS, HALTS] {
        let vm = build(&hypervisor, &starter(RESETS, 1, first_goes_on), 6);
        vm.start();
        assert_eq!(vm.wait(), VmEnd::Reset);
    }
    // The first vCPU resets the machine as well, at the same time.
    let as_in_32_bits = RESETS;
    let vm = build(&hypervisor, &starter(RESETS, 0, as_in_32_bits), 4);
    vm.start();
    assert_eq!(vm.wait(), VmEnd::Reset);
}

#[test]
fn a_crash_names_its_vcpu() {
    let Some(hypervisor) = hypervisor() else { return };
    let vm = build(&hypervisor, &starter(DIES, 1, SPINS), 2);
    vm.start();
    // A triple fault, or an internal error where KVM interprets the instruction.
    let end = vm.wait();
    assert!(matches!(&end, VmEnd::Crashed(CrashReport { vcpu: 1, .. })), "{end}");
    assert!(end.to_string().contains("on vCPU 1"), "{end}");
}

#[test]
fn vcpus_that_were_never_started_are_paused_and_stopped() {
    let Some(hypervisor) = hypervisor() else { return };
    let vm = build(&hypervisor, SPINS, 8);
    vm.start();
    for _ in 0..20 {
        vm.pause();
        vm.resume();
    }
    assert_eq!(vm.stop(), VmEnd::Stopped);
}

#[test]
fn vms_are_paused_resumed_and_stopped_while_their_vcpus_start() {
    let Some(hypervisor) = hypervisor() else { return };
    let code = starter(SPINS, 3, SPINS);
    // The start takes some hundred microseconds, and these moments are spread over it.
    for moment in (0..60).map(|step| Duration::from_micros(step * 20)) {
        let vm = build(&hypervisor, &code, 4);
        vm.start();
        let started = Instant::now();
        while started.elapsed() < moment {
            std::hint::spin_loop();
        }
        vm.pause();
        vm.resume();
        if moment.as_micros() % 40 == 0 {
            vm.pause();
        }
        assert_eq!(vm.stop(), VmEnd::Stopped);
    }
}

#[test]
fn more_vcpus_than_kvm_gives_are_refused() {
    let Some(mut hypervisor) = hypervisor() else { return };
    hypervisor.max_vcpus = 3;
    let error = Vm::build(config(HALTS, 4), &hypervisor).unwrap_err();
    assert!(matches!(error, VmError::Vcpus { asked: 4, most: 3 }), "{error}");
    assert!(error.to_string().starts_with("4 vCPUs: KVM gives a VM 3 at most"), "{error}");
    assert!(Vm::build(config(HALTS, 3), &hypervisor).is_ok());
}

#[test]
fn each_vcpu_has_a_thread_of_its_own_name() {
    let Some(hypervisor) = hypervisor() else { return };
    let vm = build(&hypervisor, HALTS, 3);
    let names: HashSet<_> = vm.threads.iter().filter_map(|thread| thread.thread().name()).collect();
    assert_eq!(names, HashSet::from(["vcpu-several-0", "vcpu-several-1", "vcpu-several-2"]));
}
