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

use samepage_machine::config::{ConfigError, DiskConfig, VmConfig};
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{Vm, VmEnd, VmError};

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
        "disk {path} is used {}, and not by both as readonly: they would damage it; give each an image of its own, \
         or add readonly to both", by_both(.first, .second)
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
    #[error("console file {path} is used {}; give each VM a file of its own", by_both(.first, .second))]
    SharedConsole {
        /// The console's file.
        path: PathBuf,
        /// The one VM.
        first: String,
        /// The other.
        second: String,
    },
    /// There is no folder for a console's file.
    #[error("VM {vm}: console {path}: {source}; make the folder, or give another path")]
    ConsoleFolder {
        /// The VM's name.
        vm: String,
        /// The console's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The fleet cannot be watched.
    #[error("watch the VMs: {0}; raise the limit of open files (ulimit -n)")]
    Watch(#[from] io::Error),
}

fn by_both(first: &str, second: &str) -> String {
    if first == second { format!("twice by VM {first}") } else { format!("by VM {first} and by VM {second}") }
}

impl FleetError {
    /// What may help where paths are templates for several VMs, to be said after the error.
    #[must_use]
    pub fn hint_of_templates(&self) -> Option<&'static str> {
        let shared = matches!(self, Self::SharedDisk { .. } | Self::SharedConsole { .. });
        shared.then_some(" ({index} and {name} in a path stand for each VM's number and name)")
    }
}

/// Checks what can be checked of VMs that are to run together, before any is started: each
/// configuration, that names are unique, that no disk is written by one while another uses it, and that
/// each console has a file of its own.
pub fn check(configs: &[VmConfig]) -> Result<(), FleetError> {
    for config in configs {
        config.check().map_err(|source| FleetError::Config { vm: config.name.clone(), source })?;
    }
    check_together(&configs.iter().map(Uses::of).collect::<Vec<_>>())
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

/// Checks that names are unique, that the files of disks and the folders of consoles are there, that no disk is
/// written by one VM while another uses it, and that each console has a file of its own.
///
/// # Errors
/// The first of [`conflicts`].
pub fn check_together(vms: &[Uses]) -> Result<(), FleetError> {
    conflicts(vms).into_iter().next().map_or(Ok(()), |conflict| Err(conflict.error))
}

/// Something that keeps a VM from running together with others.
#[derive(Debug)]
pub struct Conflict {
    /// The VM's place in the list.
    pub vm: usize,
    /// What of it.
    pub part: Part,
    /// What is wrong.
    pub error: FleetError,
}

/// A part of a VM's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its name.
    Name,
    /// The disk of this number.
    Disk(usize),
    /// Its console's file.
    Console,
}

/// Everything that keeps VMs from running together: names that are not unique, files of disks that are not
/// there, disks that are written by one VM while another uses them, consoles that have no folder or no file of
/// their own.
pub fn conflicts(vms: &[Uses]) -> Vec<Conflict> {
    let mut names = HashSet::new();
    let mut disks: HashMap<(u64, u64), (&str, bool)> = HashMap::new();
    let mut consoles: HashMap<&Path, &str> = HashMap::new();
    let mut found = Vec::new();
    for (number, uses) in vms.iter().enumerate() {
        let vm = || uses.name.clone();
        let mut tell = |part, error| found.push(Conflict { vm: number, part, error });
        if !names.insert(uses.name.as_str()) {
            let source = ConfigError::DuplicateName(vm());
            tell(Part::Name, FleetError::Config { vm: vm(), source });
        }
        for (place, disk) in uses.disks.iter().enumerate() {
            let path = disk.path.clone();
            let file = match image(&disk.path) {
                Ok(file) => file,
                Err(source) => {
                    tell(Part::Disk(place), FleetError::Disk { vm: vm(), path, source });
                    continue;
                }
            };
            if let Some((first, read_only)) = disks.insert(file, (&uses.name, disk.read_only))
                && !(read_only && disk.read_only)
            {
                let first = first.to_owned();
                tell(Part::Disk(place), FleetError::SharedDisk { path, first, second: vm() });
            }
        }
        let Some(path) = uses.console.as_deref() else { continue };
        let file = path.metadata();
        if file.is_err()
            && let Err(source) = folder(path)
        {
            tell(Part::Console, FleetError::ConsoleFolder { vm: vm(), path: path.to_owned(), source });
        }
        // A pipe or a terminal may well be everybody's.
        if file.map_or(true, |file| file.is_file())
            && let Some(first) = consoles.insert(path, &uses.name)
        {
            let (path, first) = (path.to_owned(), first.to_owned());
            tell(Part::Console, FleetError::SharedConsole { path, first, second: vm() });
        }
    }
    found
}

/// The device and inode of a disk's file.
fn image(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::other("it is a directory; give a regular file or a block device"));
    }
    Ok((metadata.dev(), metadata.ino()))
}

/// Checks that the folder of a file is there.
fn folder(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.metadata()?.is_dir() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOTDIR)) }
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
    /// It was told to stop so that it can be made anew.
    pub reset: bool,
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
        Some(Ended { name, end, console_lost, reset: false })
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
    use samepage_machine::boot::ImageSource;
    use samepage_machine::boot::test_images::pvh_elf;
    use samepage_machine::config::ConsoleConfig;

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
        let folder = tempfile::tempdir().unwrap();
        let in_folder = |path: &str| folder.path().join(path);
        let with = |name, path: PathBuf| VmConfig { console: ConsoleConfig::File(path), ..vm(name, &[]) };
        check(&[with("a", in_folder("a")), with("b", in_folder("b"))]).unwrap();
        check(&[with("a", "/dev/null".into()), with("b", "/dev/null".into())]).unwrap();
        let text = check(&[with("a", in_folder("x")), with("b", in_folder("x"))]).unwrap_err().to_string();
        assert!(text.contains("used by VM a and by VM b"), "{text}");
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
            assert!(text.contains("used by VM a and by VM b"), "{text}");
        }
        let twice = vm("a", &[(file.path(), false), (&link, false)]);
        assert!(matches!(check(&[twice]), Err(FleetError::SharedDisk { .. })));
        let missing = check(&[vm("a", &[(&folder.path().join("none"), true)])]).unwrap_err();
        assert!(matches!(missing, FleetError::Disk { .. }));
    }

    #[test]
    fn all_conflicts_are_found_each_with_its_vm_and_part() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (file, none) = (file.path(), folder.path().join("none"));
        let console = ConsoleConfig::File(none.join("log"));
        let vms = [
            vm("a", &[(file, false), (&none, true)]),
            VmConfig { console, ..vm("a", &[(folder.path(), true)]) },
            vm("b", &[(&none, true), (file, true)]),
        ];
        let uses: Vec<_> = vms.iter().map(Uses::of).collect();
        let found: Vec<_> = conflicts(&uses).iter().map(|conflict| (conflict.vm, conflict.part)).collect();
        let wanted = [
            (0, Part::Disk(1)),
            (1, Part::Name),
            (1, Part::Disk(0)),
            (1, Part::Console),
            (2, Part::Disk(0)),
            (2, Part::Disk(1)),
        ];
        assert_eq!(found, wanted);
        let twice = [Uses::of(&vm("a", &[(file, false), (file, false)]))];
        let text = check_together(&twice).unwrap_err().to_string();
        assert!(text.contains("used twice by VM a") && !text.contains("{index}"), "{text}");
    }
}
