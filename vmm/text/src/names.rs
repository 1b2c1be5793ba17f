//! Names of VMs, of their groups and of their disks.

use thiserror::Error;

/// Longest name of a VM in bytes. The name becomes part of thread names, file names and messages.
pub const MAX_NAME: usize = 64;
/// Longest name of a disk in bytes. The guest sees the name as a serial number (virtio-blk).
pub const MAX_DISK_ID: usize = 20;

/// An invalid name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// The name of a VM.
    #[error("a VM cannot be named {0:?}: use 1 to {MAX_NAME} letters, digits, '.', '_' or '-'")]
    Vm(String),
    /// The name of a group of VMs.
    #[error("a group of VMs cannot be named {0:?}: use 1 to {MAX_NAME} letters, digits, '.', '_' or '-'")]
    Group(String),
    /// The name of a disk.
    #[error("a disk cannot be named {0:?}: use 1 to {MAX_DISK_ID} letters, digits, '.', '_' or '-'")]
    Disk(String),
    /// The name of a network device.
    #[error(
        "a network device cannot be named {0:?}: use 1 to {MAX_DISK_ID} letters, digits, '.', '_' or '-'"
    )]
    Network(String),
}

/// Checks the name of a VM.
///
/// # Errors
/// Fails with the rules for names if the name is invalid.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if is_name(name, MAX_NAME) { Ok(()) } else { Err(NameError::Vm(name.to_owned())) }
}

/// Checks the name of a group of VMs that share memory.
///
/// # Errors
/// Fails with the rules for names if the name is invalid.
pub fn check_group(name: &str) -> Result<(), NameError> {
    if is_name(name, MAX_NAME) { Ok(()) } else { Err(NameError::Group(name.to_owned())) }
}

/// Checks the name of a disk.
///
/// # Errors
/// Fails with the rules for names if the name is invalid.
pub fn check_disk_id(id: &str) -> Result<(), NameError> {
    if is_name(id, MAX_DISK_ID) { Ok(()) } else { Err(NameError::Disk(id.to_owned())) }
}

/// Checks the name of a network device.
///
/// # Errors
/// Fails with the rules for names if the name is invalid.
pub fn check_network_id(id: &str) -> Result<(), NameError> {
    if is_name(id, MAX_DISK_ID) { Ok(()) } else { Err(NameError::Network(id.to_owned())) }
}

fn is_name(text: &str, max: usize) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    // These two would mean folders in a path.
    (1..=max).contains(&text.len()) && text.chars().all(letter) && !matches!(text, "." | "..")
}
