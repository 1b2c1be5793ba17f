//! A virtual CPU: its thread, and the handling of its VM exits.

#![expect(unsafe_code, reason = "reads the page that a vCPU shares with KVM")]

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::{io, thread};

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::unblock_signal;

use super::VmEnd;
use super::control::{Control, kick_signal};
use super::crash::{CrashKind, CrashReport};
use super::devices::Devices;
use super::memory::VmMemory;
use crate::numa;

/// Size of a thread's stack in bytes: enough for device models that write to a console. Untouched pages cost
/// no memory.
const STACK_BYTES: usize = 256 << 10;

/// One vCPU, before and while it runs.
pub(super) struct Vcpu {
    pub(super) number: u32,
    pub(super) fd: VcpuFd,
    pub(super) memory: VmMemory,
    pub(super) devices: Arc<Devices>,
    /// The host's NUMA node whose memory its thread prefers.
    pub(super) node: Option<u32>,
}

impl Vcpu {
    /// Starts the thread, held until the VM runs.
    pub(super) fn spawn(self, vm: &str, control: &Arc<Control>) -> io::Result<JoinHandle<()>> {
        let member = control.add_vcpu();
        let shared = control.clone();
        let spawned = thread::Builder::new()
            .name(format!("vcpu-{vm}-{}", self.number))
            .stack_size(STACK_BYTES)
            .spawn(move || self.run(member, &shared));
        if spawned.is_err() {
            control.forget_vcpu(member);
        }
        spawned
    }

    fn run(mut self, member: usize, control: &Control) {
        // The kick must arrive even if the thread that started the VM blocks signals. The call cannot fail,
        // because the signal is valid.
        let _ = unblock_signal(kick_signal());
        if let Some(node) = self.node {
            // The memory of the VM has the same policy already, so the kernel knows the node.
            let _ = numa::prefer(node);
        }
        let page = NonNull::from(self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: the field lies within the shared page. `self`, and with it the mapping, is dropped after
        // `member`, which is declared later.
        let member = unsafe { control.join(member, page.add(offset_of!(kvm_run, immediate_exit))) };
        while let Some(was_held) = member.may_run() {
            if was_held {
                // Tells the guest's watchdogs that time has passed without it. Guests without KVM's clock get no such
                // word.
                let _ = self.fd.kvmclock_ctrl();
            }
            if let Some(end) = self.run_until_kicked() {
                control.finish(end);
                break;
            }
        }
    }

    /// Runs the guest until the VM ends (`Some`) or the vCPU is interrupted (`None`).
    fn run_until_kicked(&mut self) -> Option<VmEnd> {
        loop {
            let crash = match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let (data, bytes) = (data.as_ptr(), data.len());
                    let width = self.port_access_width();
                    // SAFETY: KVM points to `bytes` bytes in the shared page. Nothing changes them until
                    // KVM_RUN is entered again.
                    let data = unsafe { std::slice::from_raw_parts(data, bytes) };
                    // A string instruction makes several accesses to the same port.
                    data.chunks(width).for_each(|access| self.devices.port_write(port, access));
                    if let Some(end) = self.devices.requested_end(port) {
                        return Some(end);
                    }
                    continue;
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let (data, bytes) = (data.as_mut_ptr(), data.len());
                    let width = self.port_access_width();
                    // SAFETY: as above. Only the vCPU's thread writes there.
                    let data = unsafe { std::slice::from_raw_parts_mut(data, bytes) };
                    data.chunks_mut(width).for_each(|access| self.devices.port_read(port, access));
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    self.devices.mmio_write(address, data);
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.devices.mmio_read(address, data);
                    continue;
                }
                Ok(VcpuExit::Intr) => return None,
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(VmEnd::PowerOff),
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(VmEnd::Reset),
                Ok(VcpuExit::Shutdown) => CrashKind::TripleFault,
                Ok(VcpuExit::FailEntry(reason, _)) => CrashKind::FailEntry { reason },
                Ok(VcpuExit::InternalError) => {
                    // SAFETY: KVM's exit reason says that this field of the union is valid.
                    let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                    CrashKind::InternalError { suberror }
                }
                Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                    return Some(self.memory_lost(Some(gpa), libc::EFAULT));
                }
                Ok(other) => CrashKind::Unexpected(format!("{other:?}")),
                Err(error) => match error.errno() {
                    libc::EINTR => return None,
                    libc::EAGAIN => continue,
                    errno @ (libc::EFAULT | libc::ENOMEM | libc::EHWPOISON) => {
                        return Some(self.memory_lost(None, errno));
                    }
                    errno => {
                        let source = io::Error::from_raw_os_error(errno);
                        return Some(VmEnd::Failed(format!("KVM cannot run vCPU {}: {source}", self.number)));
                    }
                },
            };
            return Some(VmEnd::Crashed(CrashReport::take(crash, self.number, &self.fd, self.memory.view())));
        }
    }

    /// Returns the width in bytes of one access of the port instruction that made KVM_RUN return.
    fn port_access_width(&mut self) -> usize {
        // SAFETY: the callers have seen a port exit, so this field of the union is valid.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        usize::from(width).max(1)
    }

    /// Ends the VM, and keeps the engine from its memory: what the engine has noted of it may be wrong by now.
    fn memory_lost(&self, gpa: Option<u64>, errno: i32) -> VmEnd {
        let place = gpa.map_or_else(String::new, |gpa| format!(" at guest address {gpa:#x}"));
        let why = match errno {
            libc::ENOMEM => "the host is out of memory for this VM; give it a larger limit, or run fewer VMs",
            libc::EHWPOISON => "the host's memory is faulty there; see the kernel log (dmesg)",
            _ => "the host cannot supply it: its mapping is gone, or an I/O error hit swapped memory",
        };
        self.memory.ram().lose(0);
        VmEnd::Failed(format!(
            "guest memory{place} cannot be used: {why} ({})",
            io::Error::from_raw_os_error(errno)
        ))
    }
}
