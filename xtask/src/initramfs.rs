//! The initial RAM file system of test guests: the agent as `/init`, a console, and mount points.
//!
//! It depends on the agent's source, the locked dependencies and the compiler. It is a cpio
//! archive in the "newc" format (`Documentation/driver-api/early-userspace/buffer-format.rst` in
//! the kernel's source), not compressed: a guest's kernel unpacks bytes faster than it decodes.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// To be raised when this module builds something else from the same inputs.
const RECIPE: &str = "initramfs 1";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "guest";
/// One file that needs no loader, no libraries and no relocation.
const RUSTFLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds the agent and the archive if the cache lacks them, and returns the archive's path.
///
/// # Errors
/// The agent does not compile, or the archive can't be written.
pub fn build(cache: &Cache) -> Result<PathBuf> {
    let entry = cache.get_or_build("initramfs", &key()?, |dir| {
        let agent = build_agent().context("building the guest agent")?;
        let path = dir.join("initramfs.cpio");
        fs::write(&path, archive(&agent)).with_context(|| format!("writing {}", path.display()))
    })?;
    Ok(entry.join("initramfs.cpio"))
}

/// The path of the archive if the cache has it.
///
/// # Errors
/// What it depends on can't be read.
pub fn find(cache: &Cache) -> Result<Option<PathBuf>> {
    Ok(cache.find("initramfs", &key()?).map(|entry| entry.join("initramfs.cpio")))
}

fn key() -> Result<Key> {
    let root = crate::project_root();
    let rustc = process::output(Command::new("rustc").arg("-vV").current_dir(&root))?;
    Key::new()
        .part(RECIPE)
        .part(rustc)
        .part(RUSTFLAGS)
        .file(&root.join("Cargo.toml"))?
        .file(&root.join("Cargo.lock"))?
        .file(&root.join("guest-agent/Cargo.toml"))?
        .folder(&root.join("guest-agent/src"))?
        .file(&root.join("guest-agent/layout/Cargo.toml"))?
        .folder(&root.join("guest-agent/layout/src"))
}

/// Compiles the agent and returns the program.
fn build_agent() -> Result<Vec<u8>> {
    let target_dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::project_root().join("target"), PathBuf::from)
        // Other flags than those of the workspace: a folder of its own keeps both caches warm.
        .join("guest-agent");
    eprintln!("initramfs: building the guest agent");
    process::run(
        process::cargo()
            .args(["build", "--quiet", "--locked", "--package", "samepage-agent"])
            .args(["--profile", PROFILE, "--target", TARGET, "--target-dir"])
            .arg(&target_dir)
            .env("RUSTFLAGS", RUSTFLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )?;
    let program = crate::project_root().join(target_dir).join(TARGET).join(PROFILE).join("samepage-agent");
    fs::read(&program).with_context(|| format!("reading {}", program.display()))
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The whole file system as a cpio archive.
fn archive(agent: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "mnt"] {
        archive.add(dir, DIRECTORY, (0, 0), &[]);
    }
    // The kernel opens it for init before anything can be mounted.
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.add("init", PROGRAM, (0, 0), agent);
    archive.finish()
}

/// A cpio archive in the making. Owner is root, and all times are 0.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        self.header(self.entries, path, mode, device, content.len());
        self.bytes.extend(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.header(0, "TRAILER!!!", 0, (0, 0), 0);
        self.bytes
    }

    fn header(&mut self, inode: u32, path: &str, mode: u32, (major, minor): (u32, u32), size: usize) {
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, nlink, mtime, size, device (2), device number (2), name size, sum
        let fields = [inode, mode, 0, 0, links, 0, size as u32, 0, 0, major, minor, path.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode, device number and content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn entries(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            let field = |index: usize| {
                let at = 6 + 8 * index;
                let digits = std::str::from_utf8(&bytes[at..at + 8]).expect("ASCII");
                u32::from_str_radix(digits, 16).expect("hexadecimal")
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, device, name) =
                (field(1), field(6) as usize, (field(9), field(10)), field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).expect("UTF-8");
            let start = (110 + name).next_multiple_of(4);
            if path == "TRAILER!!!" {
                return entries;
            }
            entries.push((path, mode, device, bytes[start..start + size].to_vec()));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn the_archive_holds_init_and_a_console() {
        for agent in [&b"x"[..], b"1234", b""] {
            let entries = entries(&archive(agent));
            assert!(entries.contains(&("init".into(), PROGRAM, (0, 0), agent.into())));
            assert!(entries.contains(&("dev/console".into(), CHARACTER_DEVICE, (5, 1), vec![])));
            assert!(entries.contains(&("proc".into(), DIRECTORY, (0, 0), vec![])));
        }
    }

    #[test]
    fn a_folder_comes_before_what_it_holds() {
        let paths: Vec<String> = entries(&archive(b"")).into_iter().map(|entry| entry.0).collect();
        assert!(
            paths.iter().position(|path| path == "dev") < paths.iter().position(|path| path == "dev/console")
        );
    }
}
