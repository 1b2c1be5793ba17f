//! The host's KVM: opened and checked once, and used by all VMs of the process.

use std::io;
use std::path::{Path, PathBuf};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use crate::x86::cpuid;

const DEVICE: &str = "/dev/kvm";
/// The version of the stable API.
const API_VERSION: i32 = 12;

/// Capabilities of KVM that every VM needs, and their names in its documentation.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The reason why KVM cannot be used.
#[derive(Debug, Error)]
pub enum HypervisorError {
    /// The device is missing.
    #[error(
        "{0} does not exist: turn on virtualization in this machine's firmware (or nested virtualization in \
         the hypervisor below) and load the module of its processor: modprobe kvm_intel, or kvm_amd"
    )]
    Missing(PathBuf),
    /// The process may not open the device.
    #[error(
        "no permission to open {0}: add yourself to the group that owns it (sudo usermod -aG kvm $USER, then \
         log in again), or run as root"
    )]
    Permission(PathBuf),
    /// The device cannot be opened for another reason.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The device.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file at the device's path is not KVM.
    #[error(
        "{0} has the name of KVM's device, but is another file; in a container, pass the device with --device {0}"
    )]
    NotKvm(PathBuf),
    /// The device has another version of the API.
    #[error(
        "{path} has version {version} of the KVM API, and samepage needs {API_VERSION}; use a Linux kernel of 5.10 or later"
    )]
    Version {
        /// The device.
        path: PathBuf,
        /// The version of its API.
        version: i32,
    },
    /// KVM lacks a capability.
    #[error("this kernel's KVM lacks {0}; use a Linux kernel of 5.10 or later on x86-64")]
    Lacks(String),
    /// An ioctl failed.
    #[error("ask KVM for {what}: {source}")]
    Query {
        /// The step that failed.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// KVM's description of the processor cannot be used.
    #[error("use the processor features that KVM reports: {0}")]
    Cpuid(String),
}

/// The KVM of this host.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
    supported_cpuid: CpuId,
    /// Upper limit for the vCPUs of a VM, whose numbers are below it.
    pub(crate) max_vcpus: u32,
    pub(crate) has_tsc_deadline: bool,
    pub(crate) needs_tss: bool,
    pub(crate) needs_identity_map: bool,
}

impl Hypervisor {
    /// Opens `/dev/kvm` and checks its capabilities.
    ///
    /// # Errors
    /// Fails if the device or a capability is missing. The message says what to do.
    pub fn open() -> Result<Self, HypervisorError> {
        Self::open_device(Path::new(DEVICE))
    }

    fn open_device(path: &Path) -> Result<Self, HypervisorError> {
        let kvm = Kvm::new_with_path(path_to_c(path)?).map_err(|error| {
            let path = path.to_owned();
            match error.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => HypervisorError::Missing(path),
                libc::EACCES | libc::EPERM => HypervisorError::Permission(path),
                errno => HypervisorError::Open { path, source: io::Error::from_raw_os_error(errno) },
            }
        })?;
        let version = kvm.get_api_version();
        if version < 0 {
            return Err(HypervisorError::NotKvm(path.to_owned()));
        }
        if version != API_VERSION {
            return Err(HypervisorError::Version { path: path.to_owned(), version });
        }
        let lacking: Vec<&str> =
            REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !lacking.is_empty() {
            return Err(HypervisorError::Lacks(lacking.join(", ")));
        }
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|error| {
            HypervisorError::Query { what: "the processor features it supports", source: error.into() }
        })?;
        let mut supported_cpuid = cpuid::complete(&supported).map_err(HypervisorError::Cpuid)?;
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        if cpuid::holds_steal_time(&release) {
            supported_cpuid = cpuid::without_steal_time(&supported_cpuid).map_err(HypervisorError::Cpuid)?;
        }
        Ok(Self {
            max_vcpus: u32::try_from(kvm.get_max_vcpus().min(kvm.get_max_vcpu_id())).unwrap_or(u32::MAX),
            has_tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            needs_tss: kvm.check_extension(Cap::SetTssAddr),
            needs_identity_map: kvm.check_extension(Cap::SetIdentityMapAddr),
            supported_cpuid,
            kvm,
        })
    }

    /// Returns a new, empty VM of KVM.
    ///
    /// KVM takes all locks of the address space. It gives up if the kernel has other work for the thread
    /// meanwhile, such as completions of io_uring. Then this function tries again.
    pub(crate) fn create_vm(&self) -> Result<VmFd, kvm_ioctls::Error> {
        loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                made => return made,
            }
        }
    }

    /// Returns the number of bits in guest physical addresses that guests can use.
    pub(crate) fn address_bits(&self) -> u32 {
        cpuid::address_bits(&self.supported_cpuid)
    }

    pub(crate) fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }
}

fn path_to_c(path: &Path) -> Result<std::ffi::CString, HypervisorError> {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(|_| HypervisorError::Missing(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_a_wrong_one_are_explained() {
        let missing = Hypervisor::open_device(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(missing.to_string().contains("modprobe"), "{missing}");
        let wrong = Hypervisor::open_device(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(wrong, HypervisorError::NotKvm(_)), "{wrong}");
    }
}
