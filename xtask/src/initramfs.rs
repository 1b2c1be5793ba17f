//! The initial RAM file system of test guests: the agent as `/init`, a console, and mount points.
//!
//! It depends on the agent's source, the locked dependencies and the compiler. It is a cpio archive without
//! compression, because a guest's kernel unpacks bytes faster than it decodes them.

use crate::cache::{Cache, Key};
use crate::cpio::{Archive, CHARACTER_DEVICE, DIRECTORY, PROGRAM};
use crate::process;
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

/// Must be increased when this module builds another archive from the same inputs.
const RECIPE: &str = "initramfs 2";
const AGENT: &str = "samepage-agent";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "guest";
/// A single file without loader, libraries and relocation.
const RUSTFLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds the agent and the archive if the cache lacks them, and returns the archive's path.
///
/// # Errors
/// Fails if the agent does not compile, or if the archive cannot be written.
pub fn build(cache: &Cache) -> Result<PathBuf> {
    Ok(build_entry(cache)?.join("initramfs.cpio"))
}

/// Builds both as well, and returns the path of the agent.
///
/// # Errors
/// As for [`build`].
pub fn agent(cache: &Cache) -> Result<PathBuf> {
    Ok(build_entry(cache)?.join(AGENT))
}

fn build_entry(cache: &Cache) -> Result<PathBuf> {
    cache.get_or_build("initramfs", &key()?, |dir| {
        let agent = build_agent().context("building the guest agent")?;
        let write = |name: &str, content: &[u8], mode: u32| {
            let path = dir.join(name);
            fs::write(&path, content)
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)))
                .with_context(|| format!("writing {}", path.display()))
        };
        write(AGENT, &agent, 0o755)?;
        write("initramfs.cpio", &archive(&agent), 0o644)
    })
}

/// Returns the path of the archive if the cache has it.
///
/// # Errors
/// Fails if a file that the archive depends on cannot be read.
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
        .file(&root.join("memory-hole/Cargo.toml"))?
        .folder(&root.join("memory-hole/src"))
}

/// Compiles the agent and returns the program.
fn build_agent() -> Result<Vec<u8>> {
    let target_dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::project_root().join("target"), PathBuf::from)
        // The flags differ from the workspace's, so a separate folder keeps both caches valid.
        .join("guest-agent");
    eprintln!("initramfs: building the guest agent");
    process::run(
        process::cargo()
            .args(["build", "--quiet", "--locked", "--package", AGENT])
            .args(["--profile", PROFILE, "--target", TARGET, "--target-dir"])
            .arg(&target_dir)
            .env("RUSTFLAGS", RUSTFLAGS)
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )?;
    let program = crate::project_root().join(target_dir).join(TARGET).join(PROFILE).join(AGENT);
    fs::read(&program).with_context(|| format!("reading {}", program.display()))
}

/// Returns the file system as a cpio archive.
fn archive(agent: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys", "mnt"] {
        archive.add(dir, DIRECTORY, (0, 0), &[]);
    }
    // The kernel opens the console for init before any mount.
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.add("init", PROGRAM, (0, 0), agent);
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::entries;

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
