//! Creates a VM's vCPUs, in the state in which a PC's firmware hands them to a kernel: the first is at the kernel's
//! first instruction, and the others wait for the kernel to start them.
//!
//! KVM emulates the local APICs, and with them the start of a processor (INIT, then SIPI). A vCPU that waits has no
//! registers of its own: INIT sets them.

use kvm_bindings::{
    CpuId, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use samepage_spec::Cpu;

use super::VmError;
use crate::boot::load::Entry;
use crate::hypervisor::Hypervisor;
use crate::x86::cpuid::{self, Identity};
use crate::x86::registers;
use crate::x86::topology::Topology;

/// Checks that KVM gives a VM so many vCPUs.
pub(super) fn check_count(hypervisor: &Hypervisor, asked: u32) -> Result<(), VmError> {
    let most = hypervisor.max_vcpus;
    if asked > most { Err(VmError::Vcpus { asked, most }) } else { Ok(()) }
}

/// Has KVM use APIC ids of 32 bits where the guest's APICs do (x2APIC), and take the id 255 there for what it is.
/// Kernels before 4.8 cannot, and need not: no vCPU has such an id.
pub(super) fn use_long_apic_ids(kvm: &VmFd) {
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let capability =
        kvm_enable_cap { cap: KVM_CAP_X2APIC_API, args: [flags.into(), 0, 0, 0], ..Default::default() };
    let _ = kvm.enable_cap(&capability);
}

/// Creates all vCPUs, in the order of their numbers.
pub(super) fn create(
    hypervisor: &Hypervisor,
    kvm: &VmFd,
    (topology, cpu): (Topology, Cpu),
    entry: Entry,
) -> Result<Vec<VcpuFd>, VmError> {
    let features = cpuid::for_vm(hypervisor.supported_cpuid(), cpu).map_err(VmError::Cpuid)?;
    let failed = || VmError::kvm("set a vCPU's first registers");
    (0..topology.vcpus())
        .map(|number| {
            let vcpu = create_one(hypervisor, kvm, &features, topology, number)?;
            match number {
                0 => registers::set_up(&vcpu, entry).map_err(failed())?,
                _ => registers::set_up_waiting(&vcpu).map_err(failed())?,
            }
            Ok(vcpu)
        })
        .collect()
}

/// Creates one vCPU, which knows what processor it is.
pub(super) fn create_one(
    hypervisor: &Hypervisor,
    kvm: &VmFd,
    features: &CpuId,
    topology: Topology,
    number: u32,
) -> Result<VcpuFd, VmError> {
    let fd = kvm.create_vcpu(number.into()).map_err(VmError::kvm("create a vCPU"))?;
    let identity = Identity {
        vcpu: number,
        topology,
        // Hosts without a stable counter report no frequency. Guests then measure it.
        tsc_khz: fd.get_tsc_khz().ok().filter(|khz| *khz > 0),
        tsc_deadline: hypervisor.has_tsc_deadline,
    };
    let entries = cpuid::for_vcpu(features, identity).map_err(VmError::Cpuid)?;
    fd.set_cpuid2(&entries).map_err(VmError::kvm("describe the processor to the guest"))?;
    Ok(fd)
}
