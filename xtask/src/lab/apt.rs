//! Packages of a suite of Debian's that the host need not use.
//!
//! The lists lie in a folder of their own, so that the host's stay as they are, and so that no root is needed to
//! download. The mirror is the one that the host uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// The keys that the suites are signed with, as Debian installs them.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Lists of packages.
pub(super) struct Lists {
    folder: PathBuf,
    suite: String,
}

impl Lists {
    /// Downloads the lists of these suites into a folder. Packages are taken from the last suite.
    pub(super) fn download(folder: &Path, suites: &[&str]) -> Result<Self> {
        let mirror = mirror()?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part)).context("making a folder for lists of packages")?;
        }
        let sources: String =
            suites.iter().map(|suite| format!("deb [signed-by={KEYS}] {mirror} {suite} main\n")).collect();
        fs::write(folder.join("sources.list"), sources).context("writing the sources of packages")?;
        let suite = suites.last().copied().unwrap_or_default().to_owned();
        let lists = Self { folder: folder.to_owned(), suite };
        process::run(lists.tool("apt-get").args(["-qq", "update"])).with_context(|| {
            format!("downloading Debian's lists of packages ({}) from {mirror}", suites.join(", "))
        })?;
        Ok(lists)
    }

    /// The package that a package without content stands for: the newest kernel, for example.
    pub(super) fn behind(&self, package: &str) -> Result<String> {
        let listing = process::output(self.tool("apt-cache").args(["depends", package]))?;
        let first = first_dependency(&listing);
        first.with_context(|| format!("Debian's package {package} in {} stands for no other", self.suite))
    }

    /// Downloads a package and unpacks it into a folder.
    pub(super) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let folder = self.folder.join(package);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        process::run(self.tool("apt-get").args(["-qq", "download", package]).current_dir(&folder))
            .with_context(|| format!("downloading Debian's package {package}"))?;
        let entry = fs::read_dir(&folder)?.next().with_context(|| format!("{package} was not downloaded"))?;
        process::run(Command::new("dpkg-deb").arg("--extract").arg(entry?.path()).arg(into))
    }

    /// Installs a package, as root.
    pub(super) fn install(&self, package: &str) -> Result<()> {
        let mut install = self.tool("apt-get");
        install.env("DEBIAN_FRONTEND", "noninteractive");
        process::run(install.args(["install", "--yes", "--no-install-recommends", package]))
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            format!("APT::Default-Release={}", self.suite),
            // The user that apt changes to may not be able to enter the folder.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The mirror of Debian that the host uses.
pub(super) fn mirror() -> Result<String> {
    let listing = process::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(SITE) $(RELEASE)",
        "Created-By: Packages",
    ]))
    .context("looking up the host's mirror of Debian: the lab needs apt")?;
    match mirror_in(&listing) {
        Some(mirror) => Ok(mirror.to_owned()),
        None => bail!("the host's apt has no source of packages; add Debian's to /etc/apt/sources.list.d"),
    }
}

/// The site of a whole release: those of updates alone, which have a dash in their names, may lie elsewhere.
fn mirror_in(listing: &str) -> Option<&str> {
    let sites = listing.lines().filter_map(|line| line.split_once(' '));
    sites.filter(|(_, release)| !release.contains(['-', '/'])).map(|(site, _)| site).next()
}

fn first_dependency(listing: &str) -> Option<String> {
    listing.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_a_whole_release() {
        let listing = "http://s/debian-security bookworm-security\nhttp://m/debian bookworm\n";
        assert_eq!(mirror_in(listing), Some("http://m/debian"));
        assert_eq!(mirror_in("http://s/debian-security stable/updates\n"), None);
    }

    #[test]
    fn a_meta_package_names_another() {
        let listing = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n  Depends: other\n";
        assert_eq!(first_dependency(listing).as_deref(), Some("linux-image-6.1.0-9-amd64"));
        assert_eq!(first_dependency("linux-image-amd64\n"), None);
    }
}
