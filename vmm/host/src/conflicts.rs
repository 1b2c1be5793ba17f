//! Resources that VMs cannot share: names, writable disks, taps, published ports, sockets, and console files.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::HostError;
use samepage_machine::config::{ConfigError, DiskSpec, VmConfig, VmSpec};
use samepage_spec::{HostPort, NetworkSpec, Publish};

/// The files that a VM uses, and that other VMs may not use.
#[derive(Debug, Clone)]
pub struct Uses {
    name: String,
    disks: Vec<DiskSpec>,
    networks: Vec<NetworkSpec>,
    socket: Option<PathBuf>,
    console: Option<PathBuf>,
}

impl Uses {
    /// Returns the files that a VM of this configuration uses.
    pub fn of(config: &VmConfig) -> Self {
        let console = config.console.file().map(Path::to_owned);
        let VmSpec { name, disks, networks, vsock, .. } = config.spec.clone();
        Self { name, disks, networks, socket: vsock.map(|vsock| vsock.uds), console }
    }
}

/// Checks that VMs can run together.
///
/// # Errors
/// Fails with the first of [`conflicts`].
pub fn check_together(vms: &[Uses]) -> Result<(), HostError> {
    conflicts(vms).into_iter().next().map_or(Ok(()), |conflict| Err(conflict.error))
}

/// Something that keeps a VM from running together with others.
#[derive(Debug)]
pub struct Conflict {
    /// The VM's place in the list.
    pub vm: usize,
    /// The part of the VM's configuration.
    pub part: Part,
    /// The conflict.
    pub error: HostError,
}

/// A part of a VM's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The name.
    Name,
    /// The disk of this number.
    Disk(usize),
    /// The network device of this number.
    Network(usize),
    /// The socket device.
    Vsock,
    /// The console's file.
    Console,
}

/// Returns all conflicts between VMs, and files that are missing: names that are not unique, missing files of
/// disks, disks that one VM writes while another uses them, taps of two devices, ports that two devices publish, sockets
/// of two VMs, consoles without a folder or with a common file.
pub fn conflicts(vms: &[Uses]) -> Vec<Conflict> {
    let mut names = HashSet::new();
    let mut disks: HashMap<Image, (&str, bool)> = HashMap::new();
    let mut taps: HashMap<String, &str> = HashMap::new();
    let mut ports: HashMap<(&HostPort, bool), Vec<(&Publish, &str)>> = HashMap::new();
    let mut sockets: HashMap<&Path, &str> = HashMap::new();
    let mut consoles: HashMap<&Path, &str> = HashMap::new();
    let mut found = Vec::new();
    for (number, uses) in vms.iter().enumerate() {
        let vm = || uses.name.clone();
        let mut tell = |part, error| found.push(Conflict { vm: number, part, error });
        if !names.insert(uses.name.as_str()) {
            let source = ConfigError::DuplicateName(vm());
            tell(Part::Name, HostError::Config { vm: vm(), source });
        }
        for (place, disk) in uses.disks.iter().enumerate() {
            let path = disk.path.clone();
            if let Some(backing) = &disk.backing
                && let Err(source) = image(backing)
            {
                let path = backing.clone();
                tell(Part::Disk(place), HostError::Disk { vm: vm(), path, source });
            }
            let file = match image(&disk.path) {
                Ok((device, number)) => Image::File(device, number),
                Err(error) if disk.create && error.kind() == io::ErrorKind::NotFound => {
                    match new_image(&path) {
                        Ok(path) => Image::New(path),
                        Err(source) => {
                            tell(Part::Disk(place), HostError::ImageFolder { vm: vm(), path, source });
                            continue;
                        }
                    }
                }
                Err(source) => {
                    tell(Part::Disk(place), HostError::Disk { vm: vm(), path, source });
                    continue;
                }
            };
            if let Some((first, read_only)) = disks.insert(file, (&uses.name, disk.readonly))
                && !(read_only && disk.readonly)
            {
                let first = first.to_owned();
                tell(Part::Disk(place), HostError::SharedDisk { path, first, second: vm() });
            }
        }
        for (place, network) in uses.networks.iter().enumerate() {
            let tap = network.tap.clone().or_else(|| Some(format!("in file {}", network.fd?)));
            if let Some(tap) = tap
                && let Some(first) = taps.insert(tap.clone(), &uses.name)
            {
                let first = first.to_owned();
                tell(Part::Network(place), HostError::SharedTap { tap, first, second: vm() });
            }
            for publish in &network.publish {
                // Ports of one number may be at several addresses.
                let same = ports.entry((&publish.host, publish.udp)).or_default();
                if let Some((_, first)) = same.iter().find(|(other, _)| publish.collides(other)) {
                    let (port, first) = (publish.to_string(), (*first).to_owned());
                    tell(Part::Network(place), HostError::SharedPort { port, first, second: vm() });
                }
                same.push((publish, &uses.name));
            }
        }
        if let Some(path) = uses.socket.as_deref()
            && let Some(first) = sockets.insert(path, &uses.name)
        {
            let (path, first) = (path.to_owned(), first.to_owned());
            tell(Part::Vsock, HostError::SharedSocket { path, first, second: vm() });
        }
        let Some(path) = uses.console.as_deref() else { continue };
        let file = path.metadata();
        if file.is_err()
            && let Err(source) = folder(path)
        {
            tell(Part::Console, HostError::ConsoleFolder { vm: vm(), path: path.to_owned(), source });
        }
        // Consoles may share a pipe or a terminal.
        if file.map_or(true, |file| file.is_file())
            && let Some(first) = consoles.insert(path, &uses.name)
        {
            let (path, first) = (path.to_owned(), first.to_owned());
            tell(Part::Console, HostError::SharedConsole { path, first, second: vm() });
        }
    }
    found
}

/// An image, by what makes two images the same.
#[derive(PartialEq, Eq, Hash)]
enum Image {
    /// Device and inode of a file.
    File(u64, u64),
    /// The path of an image that will be created.
    New(PathBuf),
}

/// Returns the path of an image that will be created, without links to its folder. Fails if there is no folder.
fn new_image(path: &Path) -> io::Result<PathBuf> {
    folder(path)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(parent.canonicalize()?.join(path.file_name().ok_or(io::ErrorKind::InvalidInput)?))
}

/// Returns the device and the inode of a disk's file.
fn image(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::other("it is a directory; give a regular file or a block device"));
    }
    Ok((metadata.dev(), metadata.ino()))
}

/// Checks that the folder of a file exists.
fn folder(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.metadata()?.is_dir() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOTDIR)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use samepage_machine::boot::ImageSource;
    use samepage_machine::boot::test_images::pvh_elf;
    use samepage_machine::config::ConsoleConfig;

    fn check(vms: &[VmConfig]) -> Result<(), HostError> {
        check_together(&vms.iter().map(Uses::of).collect::<Vec<_>>())
    }

    fn vm(name: &str, disks: &[(&std::path::Path, bool)]) -> VmConfig {
        let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(b"\xf4").into() };
        let mut config = VmConfig::new(name, kernel);
        config.spec.disks = disks
            .iter()
            .map(|(path, readonly)| DiskSpec {
                path: path.to_path_buf(),
                readonly: *readonly,
                ..DiskSpec::default()
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
    fn a_published_port_is_that_of_one_device() {
        let with = |name, ports: &[&str]| {
            let mut config = vm(name, &[]);
            let publish = ports.iter().map(|port| port.parse().unwrap()).collect();
            config.spec.networks = vec![NetworkSpec { user: true, publish, ..NetworkSpec::default() }];
            config
        };
        check(&[with("a", &["80:80", "80:80/udp"]), with("b", &["81:80", "127.0.0.2:80:80"])]).unwrap();
        let text = check(&[with("a", &["80:80"]), with("b", &["0.0.0.0:80:1"])]).unwrap_err().to_string();
        assert!(text.contains("port 0.0.0.0:80:1 is published by VM a and by VM b"), "{text}");
        let text = check(&[with("a", &["80:80", "80:81"])]).unwrap_err().to_string();
        assert!(text.contains("port 80:81 is published twice by VM a"), "{text}");
        let found = conflicts(&[Uses::of(&with("a", &["80:80"])), Uses::of(&with("b", &["81:80", "80:80"]))]);
        assert_eq!((found[0].vm, found[0].part, found.len()), (1, Part::Network(0), 1));
        assert!(found[0].error.hint_of_templates().unwrap().contains("a published port"));
    }

    #[test]
    fn a_socket_device_has_a_path_of_its_own() {
        let with = |name, uds: &str| {
            let mut config = vm(name, &[]);
            config.spec.vsock = Some(samepage_spec::VsockSpec { uds: uds.into(), cid: None });
            config
        };
        check(&[with("a", "/run/a"), with("b", "/run/b")]).unwrap();
        let text = check(&[with("a", "/run/v"), with("b", "/run/v")]).unwrap_err().to_string();
        assert!(text.contains("socket /run/v is used by VM a and by VM b"), "{text}");
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
        assert!(matches!(check(&[twice]), Err(HostError::SharedDisk { .. })));
        let missing = check(&[vm("a", &[(&folder.path().join("none"), true)])]).unwrap_err();
        assert!(matches!(missing, HostError::Disk { .. }));
    }

    #[test]
    fn an_image_that_will_be_created_has_a_folder_and_one_writer() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        std::fs::write(&base, "x").unwrap();
        let overlay = |name: &str, path: &str, backing: &Path| {
            let mut config = vm(name, &[(&folder.path().join(path), false)]);
            config.spec.disks[0] =
                DiskSpec { create: true, backing: Some(backing.to_owned()), ..config.spec.disks[0].clone() };
            config
        };
        check(&[overlay("a", "a", &base), overlay("b", "b", &base)]).unwrap();
        let twice = check(&[overlay("a", "a", &base), overlay("b", "./a", &base)]).unwrap_err();
        assert!(matches!(twice, HostError::SharedDisk { .. }), "{twice}");
        let nowhere = check(&[overlay("a", "none/a", &base)]).unwrap_err().to_string();
        assert!(nowhere.contains("make the folder"), "{nowhere}");
        let without_base = check(&[overlay("a", "a", &folder.path().join("gone"))]).unwrap_err().to_string();
        assert!(without_base.contains("gone"), "{without_base}");
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
