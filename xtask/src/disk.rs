//! The disk image of test guests: an ext2 file system with files of known content.
//!
//! The same recipe always produces the same bytes. Tests that write to the disk use a copy.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result};
use samepage_agent::content;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Must be increased when this module builds another image from the same inputs.
const RECIPE: &str = "disk 1";
/// The size of the image in bytes.
pub const SIZE: u64 = 16 << 20;
/// The ID of the file system, and the seed for the hashes of its folders.
const UUID: &str = "5a3e9a6e-0000-4000-8000-000000000001";

/// A file of the image, in its root folder.
#[derive(Clone, Copy, Debug)]
pub struct DiskFile {
    /// The name.
    pub name: &'static str,
    /// The size in bytes.
    pub bytes: usize,
    /// The seed of the [`content`].
    pub seed: u64,
}

/// All files of the image. Their sizes suit guests that read a megabyte per second.
pub const FILES: [DiskFile; 4] = [
    DiskFile { name: "small", bytes: 100_000, seed: 101 },
    DiskFile { name: "file", bytes: 1 << 20, seed: 102 },
    DiskFile { name: "large", bytes: 6 << 20, seed: 103 },
    DiskFile { name: "zeros", bytes: 256 << 10, seed: 0 },
];

/// Builds the image if the cache lacks it, and returns its path.
///
/// # Errors
/// Fails if a tool of e2fsprogs is missing or fails, or if a file cannot be written.
pub fn build(cache: &Cache) -> Result<PathBuf> {
    let entry = cache.get_or_build("disk", &key(), |dir| {
        eprintln!("disk: making an ext2 image");
        let content = dir.join("content");
        fs::create_dir(&content).context("creating the folder of the disk's files")?;
        for file in FILES {
            fs::write(content.join(file.name), content::bytes(file.seed, file.bytes))
                .with_context(|| format!("writing the disk's file {:?}", file.name))?;
        }
        make_image(&content, &dir.join("disk.img")).context("making the disk image")?;
        fs::remove_dir_all(&content).context("removing the folder of the disk's files")
    })?;
    Ok(entry.join("disk.img"))
}

/// Returns the path of the image if the cache has it.
pub fn find(cache: &Cache) -> Option<PathBuf> {
    cache.find("disk", &key()).map(|entry| entry.join("disk.img"))
}

fn key() -> Key {
    let start = Key::new().part(RECIPE).part(SIZE.to_le_bytes());
    FILES.iter().fold(start, |key, file| {
        key.part(file.name).part(file.bytes.to_le_bytes()).part(file.seed.to_le_bytes())
    })
}

fn make_image(content: &Path, image: &Path) -> Result<()> {
    // With blocks of 4 KiB, a block of the file system is a page of the guest.
    process::output(
        tool("mke2fs")
            .args(["-q", "-t", "ext2", "-b", "4096", "-U", UUID])
            .args(["-E", &format!("root_owner=0:0,hash_seed={UUID}"), "-d"])
            .arg(content)
            .arg(image)
            .arg(format!("{}k", SIZE / 1024)),
    )?;
    // Inodes have the times of the copied files.
    let inodes = FILES.iter().map(|file| format!("/{}", file.name)).chain(["/".into()]);
    let script: String = inodes
        .flat_map(|path| {
            ["atime", "ctime", "mtime"].map(|field| format!("set_inode_field {path} {field} @0\n"))
        })
        .collect();
    let script_path = content.join("times");
    fs::write(&script_path, script)?;
    process::output(tool("debugfs").arg("-w").arg("-f").arg(&script_path).arg(image))?;
    Ok(())
}

/// Returns a command of a tool of e2fsprogs.
fn tool(name: &str) -> Command {
    let mut command = process::admin_tool(name);
    // The time for everything that the tool marks with a time.
    command.env("E2FSPROGS_FAKE_TIME", "1");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_the_same_each_time() -> Result<()> {
        let images = [(); 2].map(|()| -> Result<Vec<u8>> {
            let dir = tempfile::tempdir()?;
            Ok(fs::read(build(&Cache::at(dir.path()))?)?)
        });
        let [first, second] = images;
        let first = first?;
        assert_eq!(first.len() as u64, SIZE);
        assert!(first == second?, "two images of one recipe differ");
        Ok(())
    }
}
