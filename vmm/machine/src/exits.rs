//! KVM's counts of a vCPU's exits, for measurements.
//!
//! KVM provides its counters in a self-describing binary form: `Documentation/virt/kvm/api.rst`, 4.133
//! (`KVM_GET_STATS_FD`).

#![expect(unsafe_code, reason = "finds vCPUs among this process's files, and asks KVM for another")]

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Size of a descriptor without its name, in bytes.
const DESCRIPTOR: u64 = 16;

/// The counters of one vCPU.
#[derive(Debug)]
pub struct Counters {
    file: File,
    /// Name and position of each.
    places: Vec<(String, u64)>,
}

impl Counters {
    /// Returns the counters of this process's only vCPU. Returns `None` if the process has another number of
    /// vCPUs, or if KVM does not count (before Linux 5.14).
    #[must_use]
    pub fn of_the_vcpu() -> Option<Self> {
        let files = fs::read_dir("/proc/self/fd").ok()?.filter_map(|entry| {
            let entry = entry.ok()?;
            let target = fs::read_link(entry.path()).ok()?;
            let number: i32 = entry.file_name().to_str()?.parse().ok()?;
            target.to_str()?.starts_with("anon_inode:kvm-vcpu:").then_some(number)
        });
        let vcpus: Vec<_> = files.collect();
        let &[vcpu] = vcpus.as_slice() else { return None };
        // SAFETY: the file belongs to the vCPU, and callers drop no VM meanwhile.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu) };
        // SAFETY: the request takes no argument, and returns a file or an error.
        let file = File::from(unsafe { ioctl(vcpu, GetStatsFd) }.ok()?);
        Some(Self { places: places(&file).ok()?, file })
    }

    /// Returns a counter by KVM's name for it, such as `exits`, `mmio_exits` or `irq_injections`. `None` if this KVM
    /// does not have it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        let (_, place) = self.places.iter().find(|(known, _)| known == name)?;
        number(&self.file, *place).ok()
    }

    /// Returns all counters, with their names.
    #[must_use]
    pub fn all(&self) -> Vec<(&str, u64)> {
        let counters = self.places.iter();
        counters.filter_map(|(name, place)| Some((name.as_str(), number(&self.file, *place).ok()?))).collect()
    }
}

/// Returns the names and positions of all counters of one number. Histograms are left out.
fn places(file: &File) -> io::Result<Vec<(String, u64)>> {
    // Flags, length of a name and number of descriptors, then the positions of the names, the descriptors and
    // the data.
    let header = |index: u64| word(file, 4 * index).map(u64::from);
    let (name_bytes, count, descriptors, data) = (header(1)?, header(2)?, header(4)?, header(5)?);
    let mut places = Vec::new();
    for index in 0..count {
        let at = descriptors + index * (DESCRIPTOR + name_bytes);
        // Flags (4 bytes), exponent and number of values (2 each), offset (4), and 4 for histograms.
        let values = word(file, at + 4)? >> 16;
        let mut bytes = vec![0; name_bytes as usize];
        file.read_exact_at(&mut bytes, at + DESCRIPTOR)?;
        let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        if values == 1 {
            places.push((String::from_utf8_lossy(name).into_owned(), data + u64::from(word(file, at + 8)?)));
        }
    }
    Ok(places)
}

fn word(file: &File, at: u64) -> io::Result<u32> {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u32::from_ne_bytes(bytes))
}

fn number(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// `KVM_GET_STATS_FD`.
struct GetStatsFd;

// SAFETY: the request has no argument and returns a new file.
unsafe impl Ioctl for GetStatsFd {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xae, 0xce)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel has just opened the file for this caller.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}
