//! A Debian image for guests, as `resources/debian-image.sh` builds it, with its kernel and its initial RAM disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::apt;
use crate::cache::{Cache, Key};
use crate::{process, setup};

/// Debian's packages that build the image.
pub(super) const BUILDERS: [&str; 3] = ["e2fsprogs", "mmdebstrap", "qemu-utils"];
/// Debian's packages in the image, in addition to those that it always has: a compiler, sockets for scripts, and what
/// shows and makes networks. The lab's machine uses these as well. ssh and Python are there anyway.
const PACKAGES: &str = "curl,ethtool,gcc,libc6-dev,passt,socat";
const SCRIPT: &str = "resources/debian-image.sh";
/// To be raised when this module builds another image with the same script.
const RECIPE: &str = "lab debian 1";

/// The image. Nothing may write to it.
pub(super) struct Debian {
    folder: PathBuf,
}

impl Debian {
    /// A file system without partitions.
    pub(super) fn disk(&self) -> PathBuf {
        self.folder.join("debian.img")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.folder.join("initrd.img")
    }
}

/// Builds the image if the cache lacks it.
///
/// # Errors
/// Debian's packages cannot be had or installed. The error contains the command for it.
pub(super) fn build(cache: &Cache) -> Result<Debian> {
    let script = crate::project_root().join(SCRIPT);
    let folder = cache.get_or_build("lab-debian", &key(&script)?, |folder| {
        setup::install_packages(&BUILDERS)?;
        let mirror = apt::mirror()?;
        eprintln!("lab: building a Debian image, some minutes the first time");
        let mut command = Command::new(&script);
        command.args(["--format", "raw", "--mirror", &mirror, "--include", PACKAGES]).arg(folder);
        process::run(&mut command).context("building a Debian image for the lab's guests")
    })?;
    Ok(Debian { folder })
}

fn key(script: &Path) -> Result<Key> {
    Key::new().part(RECIPE).part(PACKAGES).file(script)
}
