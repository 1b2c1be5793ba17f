//! Many VMs in one process: added and removed at any time, each with its own end.

use std::collections::{HashMap, HashSet};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use parking_lot::Mutex;
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::config::{ConfigError, DiskConfig, VmConfig};
use crate::hypervisor::Hypervisor;
use crate::vm::{Vm, VmEnd, VmError};

/// Stack of a thread that builds VMs.
const BUILDER_STACK_BYTES: usize = 256 << 10;

/// Why VMs cannot be added.
#[derive(Debug, Error)]
pub enum FleetError {
    /// One VM's configuration.
    #[error("VM {vm}: {source}")]
    Config {
        /// Its name.
        vm: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// One VM could not be made.
    #[error("VM {vm}: {source}")]
    Build {
        /// Its name.
        vm: String,
        /// What went wrong.
        source: VmError,
    },
    /// A disk's file cannot be looked at.
    #[error("VM {vm}: disk {path}: {source}")]
    Disk {
        /// The VM's name.
        vm: String,
        /// The disk's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A disk that is written would have another user.
    #[error(
        "disk {path} is used by {first} and by {second}, and not by both as readonly: they would damage it; \
         give each VM a copy of its own ({{index}} in the path is replaced), or add readonly"
    )]
    SharedDisk {
        /// The disk's file.
        path: PathBuf,
        /// The one VM.
        first: String,
        /// The other, or the same with two disks.
        second: String,
    },
    /// A file for one console would be written by two.
    #[error(
        "console file {path} is used by {first} and by {second}; give each VM a file of its own \
         ({{index}} and {{name}} in the path are replaced)"
    )]
    SharedConsole {
        /// The console's file.
        path: PathBuf,
        /// The one VM.
        first: String,
        /// The other.
        second: String,
    },
    /// The fleet cannot be watched.
    #[error("watch the VMs: {0}; raise the limit of open files (ulimit -n)")]
    Watch(#[from] io::Error),
}

/// Checks what can be checked of VMs that are to run together, before any is started: each
/// configuration, that names are unique, that no disk is written by one while another uses it, and that
/// each console has a file of its own.
pub fn check(configs: &[VmConfig]) -> Result<(), FleetError> {
    for config in configs {
        config.check().map_err(|source| FleetError::Config { vm: config.name.clone(), source })?;
    }
    check_together(configs.iter().map(Uses::of))
}

/// The files that a VM uses, which others may not use as well.
#[derive(Debug, Clone)]
pub struct Uses {
    name: String,
    disks: Vec<DiskConfig>,
    console: Option<PathBuf>,
}

impl Uses {
    /// What a VM of this configuration uses.
    pub fn of(config: &VmConfig) -> Self {
        let console = config.console.file().map(Path::to_owned);
        Self { name: config.name.clone(), disks: config.disks.clone(), console }
    }
}

/// Checks that names are unique, that no disk is written by one VM while another uses it, and that each
/// console has a file of its own.
pub fn check_together(vms: impl IntoIterator<Item = Uses>) -> Result<(), FleetError> {
    let mut names = HashSet::new();
    let mut disks: HashMap<(u64, u64), (String, bool)> = HashMap::new();
    let mut consoles: HashMap<PathBuf, String> = HashMap::new();
    for config in vms {
        let vm = || config.name.clone();
        if !names.insert(vm()) {
            return Err(FleetError::Config { vm: vm(), source: ConfigError::DuplicateName(vm()) });
        }
        for disk in &config.disks {
            let metadata = std::fs::metadata(&disk.path).map_err(|source| FleetError::Disk {
                vm: vm(),
                path: disk.path.clone(),
                source,
            })?;
            let file = (metadata.dev(), metadata.ino());
            if let Some((first, read_only)) = disks.insert(file, (vm(), disk.read_only))
                && !(read_only && disk.read_only)
            {
                return Err(FleetError::SharedDisk { path: disk.path.clone(), first, second: vm() });
            }
        }
        // A pipe or a terminal may well be everybody's.
        if let Some(path) = &config.console
            && path.metadata().map_or(true, |metadata| metadata.is_file())
            && let Some(first) = consoles.insert(path.clone(), vm())
        {
            return Err(FleetError::SharedConsole { path: path.clone(), first, second: vm() });
        }
    }
    Ok(())
}

/// A VM that has come to its end, and is gone.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub name: String,
    /// Why.
    pub end: VmEnd,
    /// Bytes of console output that could not be written anywhere.
    pub console_lost: u64,
}

#[derive(Debug)]
enum Member {
    /// Being built under this name.
    Reserved,
    Present(Arc<Vm>, u64),
}

/// The VMs of this process. Can be shared between threads.
///
/// As a file it becomes readable when a VM has ended; [`Fleet::take_ended`] says which.
#[derive(Debug)]
pub struct Fleet {
    hypervisor: Hypervisor,
    members: Mutex<HashMap<String, Member>>,
    ends: Epoll,
    next_token: AtomicU64,
}

impl Fleet {
    /// A fleet without VMs.
    pub fn new(hypervisor: Hypervisor) -> io::Result<Self> {
        Ok(Self { hypervisor, members: Mutex::default(), ends: Epoll::new()?, next_token: AtomicU64::new(0) })
    }

    /// Makes VMs, several at a time, and adds them, held. All or none: if one fails, the others of this
    /// call are taken apart again.
    pub fn add(&self, configs: Vec<VmConfig>) -> Result<Vec<Arc<Vm>>, FleetError> {
        let names: Vec<String> = configs.iter().map(|config| config.name.clone()).collect();
        self.reserve(&names)?;
        let added = self.build(configs).and_then(|vms| vms.into_iter().map(|vm| self.admit(vm)).collect());
        if added.is_err() {
            let mut members = self.members.lock();
            let gone: Vec<_> = names.iter().filter_map(|name| members.remove(name)).collect();
            drop(members);
            drop(gone);
        }
        added
    }

    fn reserve(&self, names: &[String]) -> Result<(), FleetError> {
        let mut members = self.members.lock();
        for (index, name) in names.iter().enumerate() {
            if members.contains_key(name) {
                names[..index].iter().for_each(|name| drop(members.remove(name)));
                let source = ConfigError::DuplicateName(name.clone());
                return Err(FleetError::Config { vm: name.clone(), source });
            }
            members.insert(name.clone(), Member::Reserved);
        }
        Ok(())
    }

    fn build(&self, configs: Vec<VmConfig>) -> Result<Vec<Vm>, FleetError> {
        let build = |config: VmConfig| {
            let vm = config.name.clone();
            Vm::build(config, &self.hypervisor).map_err(|source| FleetError::Build { vm, source })
        };
        let builders = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(configs.len());
        if builders <= 1 {
            return configs.into_iter().map(build).collect();
        }
        let queue = Mutex::new(configs.into_iter().enumerate());
        let built = Mutex::new(Vec::new());
        let work = || {
            loop {
                let Some((index, config)) = queue.lock().next() else { break };
                let result = build(config);
                if result.is_err() {
                    queue.lock().by_ref().for_each(drop);
                }
                built.lock().push((index, result));
            }
        };
        thread::scope(|scope| {
            for _ in 1..builders {
                // Without more threads this one builds all.
                let _ = thread::Builder::new().stack_size(BUILDER_STACK_BYTES).spawn_scoped(scope, work);
            }
            work();
        });
        let mut built = built.into_inner();
        built.sort_by_key(|(index, _)| *index);
        built.into_iter().map(|(_, result)| result).collect()
    }

    fn admit(&self, vm: Vm) -> Result<Arc<Vm>, FleetError> {
        let vm = Arc::new(vm);
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let mut members = self.members.lock();
        let event = EpollEvent::new(EventSet::IN, token);
        self.ends.ctl(ControlOperation::Add, vm.end_event().as_raw_fd(), event)?;
        members.insert(vm.name().to_owned(), Member::Present(vm.clone(), token));
        Ok(vm)
    }

    /// Lets all VMs run that do not.
    pub fn start_all(&self) {
        self.vms().iter().for_each(|vm| vm.start());
    }

    /// Asks all VMs to stop, and does not wait: their ends follow.
    pub fn request_stop_all(&self) {
        self.vms().iter().for_each(|vm| vm.handle().request_stop());
    }

    /// The VM of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Vm>> {
        match self.members.lock().get(name) {
            Some(Member::Present(vm, _)) => Some(vm.clone()),
            _ => None,
        }
    }

    /// All VMs, in the order in which they were added.
    pub fn vms(&self) -> Vec<Arc<Vm>> {
        let members = self.members.lock();
        let mut present: Vec<_> = members
            .values()
            .filter_map(|member| match member {
                Member::Present(vm, token) => Some((*token, vm.clone())),
                Member::Reserved => None,
            })
            .collect();
        drop(members);
        present.sort_by_key(|(token, _)| *token);
        present.into_iter().map(|(_, vm)| vm).collect()
    }

    /// Whether there are no VMs, nor any being made.
    pub fn is_empty(&self) -> bool {
        self.members.lock().is_empty()
    }

    /// Stops a VM and takes it out of the fleet. What it held is free on return, unless somebody else
    /// still holds the VM. `None` if there is no such VM.
    pub fn remove(&self, name: &str) -> Option<Ended> {
        let vm = self.get(name)?;
        vm.stop();
        let token = match self.members.lock().get(name) {
            Some(Member::Present(present, token)) if Arc::ptr_eq(present, &vm) => *token,
            _ => return None,
        };
        drop(vm);
        self.take(token)
    }

    /// The VMs that have ended since the last call. They are gone when this returns, unless somebody else
    /// still holds them. Does not wait.
    pub fn take_ended(&self) -> io::Result<Vec<Ended>> {
        let mut ended = Vec::new();
        loop {
            let mut events = [EpollEvent::default(); 16];
            let count = match self.ends.wait(0, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if count == 0 {
                return Ok(ended);
            }
            ended.extend(events[..count].iter().filter_map(|event| self.take(event.data())));
        }
    }

    /// Takes out a VM that has ended, by its token; `None` if another thread was faster.
    fn take(&self, token: u64) -> Option<Ended> {
        let mut members = self.members.lock();
        let is_it = |member: &Member| matches!(member, Member::Present(_, number) if *number == token);
        let name = members.iter().find(|(_, member)| is_it(member)).map(|(name, _)| name.clone())?;
        let Some(Member::Present(vm, _)) = members.remove(&name) else { return None };
        // Fails only where the file is not watched, which is what is wanted.
        let _ = self.ends.ctl(ControlOperation::Delete, vm.end_event().as_raw_fd(), EpollEvent::default());
        drop(members);
        let end = vm.wait();
        let console_lost = vm.serial_stats().lost.load(Ordering::Relaxed);
        Some(Ended { name, end, console_lost })
    }
}

impl AsRawFd for Fleet {
    fn as_raw_fd(&self) -> RawFd {
        self.ends.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::ImageSource;
    use crate::boot::test_images::pvh_elf;
    use crate::config::ConsoleConfig;

    fn vm(name: &str, disks: &[(&std::path::Path, bool)]) -> VmConfig {
        let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(b"\xf4").into() };
        let mut config = VmConfig::new(name, kernel);
        config.disks = (0..)
            .zip(disks)
            .map(|(n, (path, read_only))| DiskConfig {
                path: path.to_path_buf(),
                read_only: *read_only,
                id: format!("disk{n}"),
                ..DiskConfig::default()
            })
            .collect();
        config
    }

    #[test]
    fn names_are_unique() {
        check(&[vm("a", &[]), vm("b", &[])]).unwrap();
        let text = check(&[vm("a", &[]), vm("a", &[])]).unwrap_err().to_string();
        assert!(text.contains("two VMs are named a"), "{text}");
    }

    #[test]
    fn a_console_has_a_file_of_its_own() {
        let with = |name, path: &str| VmConfig { console: ConsoleConfig::File(path.into()), ..vm(name, &[]) };
        check(&[with("a", "/nonexistent/a"), with("b", "/nonexistent/b")]).unwrap();
        check(&[with("a", "/dev/null"), with("b", "/dev/null")]).unwrap();
        let text =
            check(&[with("a", "/nonexistent/x"), with("b", "/nonexistent/x")]).unwrap_err().to_string();
        assert!(text.contains("used by a and by b"), "{text}");
    }

    #[test]
    fn a_disk_has_one_writer_or_readers() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(file.path(), &link).unwrap();
        check(&[vm("a", &[(file.path(), true)]), vm("b", &[(&link, true)])]).unwrap();
        for (first, second) in [(true, false), (false, true), (false, false)] {
            let configs = [vm("a", &[(file.path(), first)]), vm("b", &[(&link, second)])];
            let text = check(&configs).unwrap_err().to_string();
            assert!(text.contains("used by a and by b"), "{text}");
        }
        let twice = vm("a", &[(file.path(), false), (&link, false)]);
        assert!(matches!(check(&[twice]), Err(FleetError::SharedDisk { .. })));
        let missing = check(&[vm("a", &[(&folder.path().join("none"), true)])]).unwrap_err();
        assert!(matches!(missing, FleetError::Disk { .. }));
    }
}
