//! The disk that tells cloud-init in a guest who it is: its data source NoCloud.
//!
//! The disk is a FAT file system with the label `cidata`, in a sealed memory file that has no name. Only this process
//! can open it: what it holds may be secret, such as passwords.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use samepage_spec::{CachePolicy, CloudInitSpec, DiskSpec, Format, VmSpec};
use thiserror::Error;

/// The disk's name within the VM.
pub const SEED_ID: &str = "cidata";
/// Upper limit for each file in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// The label that cloud-init looks for, padded.
const LABEL: [u8; 11] = *b"cidata     ";
/// User data that change nothing. cloud-init ignores a disk without a file of user data.
const NO_USER_DATA: &[u8] = b"#cloud-config\n{}\n";
/// Space for the tables of the file system.
const ROOM: usize = 32 << 10;
/// The kinds of public keys in OpenSSH's format.
const KEY_KINDS: [&str; 4] = ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"];

/// The reason why there can be no disk for cloud-init.
#[derive(Debug, Error)]
pub enum SeedError {
    /// A file cannot be read.
    #[error("read {what} for cloud-init, {path}: {source}")]
    Read {
        /// The content of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file has too many bytes.
    #[error(
        "read {what} for cloud-init, {path}: it has more than {MAX_FILE_BYTES} bytes; let the guest download them"
    )]
    TooLarge {
        /// The content of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A line is no public key.
    #[error("read the ssh key for cloud-init, {path}: line {line} is no public key{hint}")]
    Key {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What to do, after a semicolon.
        hint: &'static str,
    },
    /// Keys are part of the meta data, and there are two sources of these.
    #[error(
        "both an ssh key and meta data are given for cloud-init; write public-keys into the meta data instead"
    )]
    KeyBesideMetaData,
    /// The host is out of memory or files.
    #[error("make the disk for cloud-init: {0}")]
    Make(#[from] io::Error),
}

/// A disk in memory, which exists until this value and all disks on it are dropped.
#[derive(Debug)]
pub(crate) struct Seed {
    file: File,
}

impl Seed {
    /// Makes the disk for the VM `name`.
    pub(crate) fn new(spec: &CloudInitSpec, name: &str) -> Result<Self, SeedError> {
        let image = image(&files(spec, name)?)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("samepage-cidata", flags).map_err(io::Error::from)?;
        let mut file = File::from(file);
        file.write_all(&image)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
        Ok(Self { file })
    }

    /// Returns the description of the disk, which opens this process's file.
    pub(crate) fn disk(&self) -> DiskSpec {
        DiskSpec {
            path: format!("/proc/self/fd/{}", self.file.as_raw_fd()).into(),
            readonly: true,
            id: Some(SEED_ID.to_owned()),
            format: Some(Format::Raw),
            // The file is in the host's memory already.
            cache: Some(CachePolicy::Buffered),
            ..DiskSpec::default()
        }
    }
}

/// Returns the description of a VM with its disk for cloud-init among the disks. The disk is a file that exists until the
/// second value is dropped, or until whoever has opened it closes it.
pub(crate) fn attach(mut spec: VmSpec) -> Result<(VmSpec, Option<Seed>), SeedError> {
    let seed = spec.cloud_init.as_ref().map(|files| Seed::new(files, &spec.name)).transpose()?;
    spec.disks.extend(seed.as_ref().map(Seed::disk));
    Ok((spec, seed))
}

/// Checks that the files can be read.
pub(crate) fn check(spec: &CloudInitSpec, name: &str) -> Result<(), SeedError> {
    files(spec, name).map(drop)
}

/// Returns the files of the disk.
fn files(spec: &CloudInitSpec, name: &str) -> Result<Vec<(&'static str, Vec<u8>)>, SeedError> {
    if spec.ssh_key.is_some() && spec.meta_data.is_some() {
        return Err(SeedError::KeyBesideMetaData);
    }
    let given = |what, path: &Option<PathBuf>| path.as_deref().map(|path| read(what, path)).transpose();
    let keys = spec.ssh_key.as_deref().map(keys).transpose()?.unwrap_or_default();
    let user_data = given("user data", &spec.user_data)?.unwrap_or_else(|| NO_USER_DATA.to_vec());
    let meta_data =
        given("meta data", &spec.meta_data)?.unwrap_or_else(|| meta_data(name, &keys).into_bytes());
    let network = given("network configuration", &spec.network_config)?;
    let network = network.map(|network| ("network-config", network));
    Ok([("user-data", user_data), ("meta-data", meta_data)].into_iter().chain(network).collect())
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, SeedError> {
    let failed = |source| SeedError::Read { what, path: path.to_owned(), source };
    // Opening a pipe must not wait for its other end.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(SeedError::TooLarge { what, path: path.to_owned() });
    }
    Ok(bytes)
}

/// Returns the public keys in a file, in OpenSSH's format.
fn keys(path: &Path) -> Result<Vec<String>, SeedError> {
    let text = String::from_utf8_lossy(&read("ssh key", path)?).into_owned();
    let wrong = |line, hint| SeedError::Key { path: path.to_owned(), line, hint };
    let mut keys = Vec::new();
    for (number, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.contains("PRIVATE KEY") {
            return Err(wrong(
                number + 1,
                "; it begins a private key, which no guest may have. Give the file that ends in .pub",
            ));
        }
        let is_key =
            KEY_KINDS.iter().any(|kind| line.starts_with(kind)) && line.split_whitespace().count() > 1;
        if !is_key || line.chars().any(char::is_control) {
            return Err(wrong(number + 1, "; give lines such as those in ~/.ssh/id_ed25519.pub"));
        }
        keys.push(line.to_owned());
    }
    if keys.is_empty() { Err(wrong(1, "; the file holds none")) } else { Ok(keys) }
}

/// Returns meta data as YAML. cloud-init takes a guest with another instance-id for a new one.
fn meta_data(name: &str, keys: &[String]) -> String {
    let mut text = format!("instance-id: {}\nlocal-hostname: {}\n", quoted(name), quoted(&host_name(name)));
    if !keys.is_empty() {
        text.push_str("public-keys:\n");
        for key in keys {
            let _ = writeln!(text, "  - {}", quoted(key));
        }
    }
    text
}

/// Returns text in quotes, so that YAML takes it for text whatever it looks like.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        if matches!(letter, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(letter);
    }
    quoted + "\""
}

/// Returns a host name like the VM's name: letters, digits, `-` and `.`.
fn host_name(name: &str) -> String {
    let name = name.replace('_', "-");
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { "vm".to_owned() } else { name.to_owned() }
}

/// Returns a FAT file system with these files. Equal files make equal images.
fn image(files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let content: usize = files.iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum();
    let mut image = Cursor::new(vec![0; (content + ROOM).next_multiple_of(4096)]);
    fatfs::format_volume(&mut image, FormatVolumeOptions::new().volume_label(LABEL))?;
    image.set_position(0);
    // Without a clock, all dates are the first that FAT has.
    let system = FileSystem::new(&mut image, FsOptions::new())?;
    for (name, bytes) in files {
        let mut file = system.root_dir().create_file(name)?;
        file.write_all(bytes)?;
        file.flush()?;
    }
    system.unmount()?;
    Ok(image.into_inner())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJx somebody@host";

    fn folder_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    /// Returns a file of the disk, as the crate reads it.
    fn content(image: &[u8], name: &str) -> Vec<u8> {
        let system = FileSystem::new(Cursor::new(image.to_vec()), FsOptions::new()).unwrap();
        let mut bytes = Vec::new();
        system.root_dir().open_file(name).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_guest_is_told_its_name_and_its_owners_key() {
        let folder = folder_with(&[("key.pub", &format!("# mine\n\n{KEY} \"x\"\n{KEY}\n"))]);
        let spec = CloudInitSpec { ssh_key: Some(folder.path().join("key.pub")), ..CloudInitSpec::default() };
        let files = files(&spec, "web_1.").unwrap();
        assert_eq!(files[0], ("user-data", NO_USER_DATA.to_vec()));
        let told = format!(
            "instance-id: \"web_1.\"\nlocal-hostname: \"web-1\"\npublic-keys:\n  - \"{KEY} \\\"x\\\"\"\n  - \"{KEY}\"\n"
        );
        assert_eq!(files[1], ("meta-data", told.into_bytes()));
        assert_eq!(files.len(), 2);
        assert_eq!([host_name("..."), host_name("true")], ["vm", "true"]);
    }

    #[test]
    fn files_are_passed_on_as_they_are() {
        let folder = folder_with(&[("u", "#!/bin/sh\n"), ("m", "instance-id: x\n"), ("n", "version: 2\n")]);
        let path = |name: &str| Some(folder.path().join(name));
        let spec = CloudInitSpec {
            user_data: path("u"),
            meta_data: path("m"),
            network_config: path("n"),
            ssh_key: None,
        };
        let image = image(&files(&spec, "vm").unwrap()).unwrap();
        for (name, text) in [
            ("user-data", "#!/bin/sh\n"),
            ("meta-data", "instance-id: x\n"),
            ("network-config", "version: 2\n"),
        ] {
            assert_eq!(content(&image, name), text.as_bytes());
        }
    }

    #[test]
    fn what_cannot_be_passed_on_is_told() {
        let folder = folder_with(&[
            ("private", "-----BEGIN OPENSSH PRIVATE KEY-----\n"),
            ("text", &format!("{KEY}\nhello\n")),
            ("empty", "\n"),
            ("key", KEY),
        ]);
        let said = |spec: CloudInitSpec| check(&spec, "vm").unwrap_err().to_string();
        let key = |name: &str| CloudInitSpec {
            ssh_key: Some(folder.path().join(name)),
            ..CloudInitSpec::default()
        };
        let user_data =
            |path: &Path| CloudInitSpec { user_data: Some(path.into()), ..CloudInitSpec::default() };
        assert!(said(key("private")).contains("ends in .pub"));
        assert!(said(key("text")).contains("line 2"));
        assert!(said(key("empty")).contains("holds none"));
        assert!(said(key("none")).contains("No such file"));
        assert!(said(user_data(folder.path())).contains("not a regular file"));
        assert!(said(user_data(Path::new("/dev/zero"))).contains("not a regular file"));
        let both = CloudInitSpec { meta_data: Some(folder.path().join("empty")), ..key("key") };
        assert!(said(both).contains("public-keys"));
        let large = folder.path().join("large");
        File::create(&large).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        assert!(said(user_data(&large)).contains("1048576"));
        File::create(&large).unwrap().set_len(MAX_FILE_BYTES).unwrap();
        check(&user_data(&large), "vm").unwrap();
    }

    #[test]
    fn the_disk_holds_files_of_any_size() {
        for bytes in [0, 1, 511, 4096, 50_000, 1 << 20] {
            let files = [("user-data", vec![7; bytes]), ("meta-data", vec![8; bytes])];
            let made = image(&files).unwrap();
            assert_eq!(made, image(&files).unwrap(), "{bytes} bytes");
            assert_eq!(content(&made, "user-data"), files[0].1);
            assert_eq!(content(&made, "meta-data"), files[1].1);
        }
    }

    #[test]
    fn other_programs_find_the_label_and_the_files() {
        let folder = folder_with(&[("u", "#cloud-config\n")]);
        let user_data = Some(folder.path().join("u"));
        let seed = Seed::new(&CloudInitSpec { user_data, ..CloudInitSpec::default() }, "web").unwrap();
        let disk = seed.disk();
        assert!(disk.readonly && disk.id.as_deref() == Some(SEED_ID));
        let copy = folder.path().join("copy");
        fs::copy(&disk.path, &copy).unwrap();
        assert!(
            File::options().write(true).open(&disk.path).and_then(|mut file| file.write_all(b"x")).is_err()
        );
        match Command::new("blkid").args(["-p", "-o", "export"]).arg(&copy).output() {
            Ok(output) => {
                let told = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(told.contains("LABEL=cidata\n") && told.contains("TYPE=vfat\n"), "{output:?}");
            }
            Err(error) => println!("skipped: blkid cannot be run: {error}"),
        }
        match Command::new("mtype").args(["-i".as_ref(), copy.as_os_str(), "::user-data".as_ref()]).output() {
            Ok(output) => assert_eq!(output.stdout, b"#cloud-config\n", "{output:?}"),
            Err(error) => println!("skipped: mtype (mtools) cannot be run: {error}"),
        }
    }
}
