//! The machine's file system, which is in memory: busybox, modules, samepage, and what the script needs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::debian::Debian;
use super::kernels::Kernels;
use crate::cpio::{Archive, CHARACTER_DEVICE, DIRECTORY, FILE, PROGRAM};
use crate::process;

/// As Debian's busybox-static installs it.
const BUSYBOX: &str = "/bin/busybox";
const INIT: &str = include_str!("init.sh");
/// What scripts have in common.
const HELPERS: &str = include_str!("helpers.sh");

/// What the file system holds.
pub(super) struct Contents<'a> {
    pub(super) kernels: &'a Kernels,
    /// The program samepage.
    pub(super) program: &'a Path,
    /// The agent for guests.
    pub(super) agent: &'a Path,
    /// The image that the machine has as a disk, whose kernel and initial RAM disk the script needs.
    pub(super) debian: Option<&'a Debian>,
    /// What the machine runs.
    pub(super) script: &'a Path,
    /// Files and folders for the script.
    pub(super) files: &'a [PathBuf],
}

impl Contents<'_> {
    /// Writes an archive that the machine's kernel unpacks.
    pub(super) fn write(&self, to: &Path) -> Result<()> {
        let mut tree = Tree::default();
        for folder in ["proc", "sys", "tmp", "root"] {
            tree.folder(folder);
        }
        tree.folder("dev");
        // The kernel opens it for init before anything can be mounted.
        tree.archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
        tree.file("init", PROGRAM, INIT.as_bytes());
        tree.copy("bin/busybox", Path::new(BUSYBOX))?;
        for module in self.kernels.modules()? {
            tree.copy(&format!("modules/{}", name(&module)), &module)?;
        }
        tree.file("bin/samepage", PROGRAM, &stripped(self.program)?);
        for library in libraries(self.program)? {
            let path = library.to_string_lossy().trim_start_matches('/').to_owned();
            tree.copy(&path, &library)?;
        }
        tree.copy("root/vmlinuz", &self.kernels.generic())?;
        tree.copy("root/vmlinuz-cloud", &self.kernels.cloud())?;
        for module in self.kernels.guest_modules()? {
            tree.copy(&format!("root/modules/{}", name(&module)), &module)?;
        }
        tree.copy("root/samepage-agent", self.agent)?;
        let service = crate::project_root().join("resources/samepage-agent.service");
        tree.copy("root/samepage-agent.service", &service)?;
        if let Some(debian) = self.debian {
            tree.copy("root/debian/vmlinuz", &debian.kernel())?;
            tree.copy("root/debian/initrd.img", &debian.initrd())?;
        }
        tree.file("root/helpers.sh", FILE, HELPERS.as_bytes());
        tree.copy("root/script", self.script)?;
        for file in self.files {
            tree.copy(&format!("root/{}", name(file)), file)?;
        }
        fs::write(to, tree.archive.finish()).with_context(|| format!("writing {}", to.display()))
    }
}

/// The last part of a path, which `.` and `..` lack until they are resolved.
fn name(path: &Path) -> String {
    let resolved = fs::canonicalize(path);
    let name = path.file_name().or_else(|| resolved.as_deref().ok()?.file_name());
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// The program without its symbols, which are most of it.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().context("making a file for the stripped program")?;
    process::run(Command::new("strip").arg("-o").arg(file.path()).arg(program))?;
    fs::read(file.path()).context("reading the stripped program")
}

/// The libraries that a program loads, and the loader. A static program has none.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("starting ldd")?;
    Ok(libraries_in(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads lines such as `libc.so.6 => /lib/libc.so.6 (0x7f00)` and `/lib64/ld-linux-x86-64.so.2 (0x7f00)`.
fn libraries_in(listing: &str) -> Vec<PathBuf> {
    let paths =
        listing.lines().filter_map(|line| line.split(' ').map(str::trim).find(|word| word.starts_with('/')));
    paths.map(PathBuf::from).collect()
}

/// An archive, with the folders that are in it.
#[derive(Default)]
struct Tree {
    archive: Archive,
    folders: BTreeSet<String>,
}

impl Tree {
    /// Adds a folder and those above it, once.
    fn folder(&mut self, path: &str) {
        if path.is_empty() || !self.folders.insert(path.to_owned()) {
            return;
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.archive.add(path, DIRECTORY, (0, 0), &[]);
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
        self.archive.add(path, mode, (0, 0), content);
    }

    /// Adds a file of the host's, or a folder with all that it holds. Links are followed.
    fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let reading = || format!("reading {}", from.display());
        let metadata = fs::metadata(from).with_context(reading)?;
        if !metadata.is_dir() {
            let mode = if metadata.permissions().mode() & 0o111 == 0 { FILE } else { PROGRAM };
            self.file(path, mode, &fs::read(from).with_context(reading)?);
            return Ok(());
        }
        self.folder(path);
        for entry in fs::read_dir(from).with_context(reading)? {
            let entry = entry.with_context(reading)?;
            self.copy(&format!("{path}/{}", entry.file_name().to_string_lossy()), &entry.path())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::entries;

    #[test]
    fn folders_come_once_and_before_what_they_hold() -> Result<()> {
        let dir = tempfile::tempdir()?;
        fs::create_dir(dir.path().join("sub"))?;
        fs::write(dir.path().join("sub/file"), "1")?;
        let mut tree = Tree::default();
        tree.file("a/b/c", FILE, b"x");
        tree.file("a/d", PROGRAM, b"y");
        tree.copy("a/e", dir.path())?;
        let entries = entries(&tree.archive.finish());
        let paths: Vec<_> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/c", "a/d", "a/e", "a/e/sub", "a/e/sub/file"]);
        assert_eq!((entries[6].1, &entries[6].3[..]), (FILE, &b"1"[..]));
        Ok(())
    }

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let listing = "\tlinux-vdso.so.1 (0x7ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f00)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x7f01)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries_in(listing), expected);
        assert!(libraries_in("\tstatically linked\n").is_empty());
    }
}
