//! Debian's kernels: one for the machine, with the modules that it loads, and one more for its guests.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use super::apt::Lists;
use crate::cache::{Cache, Key};
use crate::process;

/// To be raised when this module takes something else from the same packages.
const RECIPE: &str = "lab kernels 2";
/// What the machine loads, with all that these need.
const MODULES: [&str; 7] = ["kvm-amd", "virtio_pci", "virtio_blk", "ext4", "loop", "tun", "bridge"];
/// What guests with the kernel for clouds load, with all that these need.
const GUEST_MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
];
/// A package's flavour, what its kernel is called here, the folder of its modules, and these.
type Flavour = (&'static str, &'static str, &'static str, &'static [&'static str]);
/// The kernel for all machines, and the one for machines in clouds, which has fewer drivers.
const FLAVOURS: [Flavour; 2] =
    [("amd64", GENERIC, "modules", &MODULES), ("cloud-amd64", CLOUD, "guest-modules", &GUEST_MODULES)];
const GENERIC: &str = "vmlinuz";
const CLOUD: &str = "vmlinuz-cloud";

/// A series of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Series {
    /// The kernel of Debian 12.
    #[value(name = "6.1")]
    V6_1,
    /// The kernel of Debian 13, as packaged for Debian 12.
    #[value(name = "6.12")]
    V6_12,
}

impl Series {
    /// All series, the oldest first.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "bookworm-backports",
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// The kernels of one series.
pub(super) struct Kernels {
    folder: PathBuf,
}

impl Kernels {
    /// The kernel for all machines.
    pub(super) fn generic(&self) -> PathBuf {
        self.folder.join(GENERIC)
    }

    /// The kernel for machines in clouds.
    pub(super) fn cloud(&self) -> PathBuf {
        self.folder.join(CLOUD)
    }

    /// The modules of the machine, in the order in which they are loaded.
    pub(super) fn modules(&self) -> Result<Vec<PathBuf>> {
        self.sorted("modules")
    }

    /// The modules of guests with the kernel for clouds.
    pub(super) fn guest_modules(&self) -> Result<Vec<PathBuf>> {
        self.sorted("guest-modules")
    }

    fn sorted(&self, folder: &str) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join(folder);
        let reading = || format!("reading {}", folder.display());
        let entries = fs::read_dir(&folder).with_context(reading)?;
        let paths: Result<Vec<_>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut paths = paths.with_context(reading)?;
        paths.sort();
        Ok(paths)
    }
}

/// Downloads the kernels if the cache lacks them.
///
/// # Errors
/// Debian's packages cannot be had or unpacked.
pub(super) fn fetch(cache: &Cache, series: Series) -> Result<Kernels> {
    let folder = cache.get_or_build(&kind(series), &key(), |folder| {
        fetch_into(folder, series).with_context(|| format!("getting Debian's kernels {series}"))
    })?;
    Ok(Kernels { folder })
}

/// The kernels of one series, if they were downloaded before.
pub(super) fn find(cache: &Cache, series: Series) -> Option<Kernels> {
    cache.find(&kind(series), &key()).map(|folder| Kernels { folder })
}

fn kind(series: Series) -> String {
    format!("lab-{series}")
}

fn key() -> Key {
    let modules = FLAVOURS.iter().flat_map(|(_, _, folder, modules)| [folder].into_iter().chain(*modules));
    modules.fold(Key::new().part(RECIPE), |key, part| key.part(part))
}

fn fetch_into(folder: &Path, series: Series) -> Result<()> {
    let work = folder.join("work");
    eprintln!("lab: downloading Debian's lists of packages ({})", series.suite());
    let lists = Lists::download(&work.join("apt"), &[series.suite()])?;
    for (flavour, file, modules, names) in FLAVOURS {
        let package = lists.behind(&format!("linux-image-{flavour}"))?;
        let version = package.strip_prefix("linux-image-").unwrap_or_default();
        ensure!(
            version.starts_with(&format!("{series}.")),
            "Debian's kernel in {} is {package}, not {series}",
            series.suite()
        );
        eprintln!("lab: downloading {package}, up to 110 MB");
        let tree = work.join(flavour);
        lists.unpack(&package, &tree)?;
        let kernel = tree.join("boot").join(format!("vmlinuz-{version}"));
        fs::rename(&kernel, folder.join(file)).with_context(|| format!("keeping {}", kernel.display()))?;
        keep_modules(&tree, version, names, &folder.join(modules))?;
    }
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
}

/// Moves the modules of these names and those that they need into a folder, numbered by the order in which they are
/// loaded.
fn keep_modules(tree: &Path, version: &str, names: &[&str], into: &Path) -> Result<()> {
    fs::create_dir(into).with_context(|| format!("making {}", into.display()))?;
    process::run(process::admin_tool("depmod").arg("-b").arg(tree).arg(version))?;
    let mut modules: Vec<PathBuf> = Vec::new();
    for module in names {
        let mut modprobe = process::admin_tool("modprobe");
        modprobe.arg("-d").arg(tree).args(["-S", version, "--show-depends", module]);
        for path in inserted(&process::output(&mut modprobe)?) {
            if !modules.contains(&path) {
                modules.push(path);
            }
        }
    }
    for (number, path) in modules.iter().enumerate() {
        let packed = path.extension().is_some_and(|extension| extension == "xz");
        if packed {
            process::run(std::process::Command::new("xz").arg("--decompress").arg(path))?;
        }
        let path = if packed { path.with_extension("") } else { path.clone() };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        fs::rename(&path, into.join(format!("{number:03}-{name}")))
            .with_context(|| format!("keeping the module {}", path.display()))?;
    }
    Ok(())
}

/// The files that `modprobe --show-depends` would load; drivers that are part of the kernel have none.
fn inserted(listing: &str) -> Vec<PathBuf> {
    let lines = listing.lines().filter_map(|line| line.strip_prefix("insmod "));
    lines.filter_map(|line| line.split(' ').next()).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_read_from_what_modprobe_would_do() {
        let listing = "insmod /t/kvm.ko.xz \ninsmod /t/kvm-amd.ko npt=1\nbuiltin virtio\n";
        assert_eq!(inserted(listing), [PathBuf::from("/t/kvm.ko.xz"), "/t/kvm-amd.ko".into()]);
    }

    #[test]
    fn series_are_named_as_on_the_command_line() {
        for series in Series::ALL {
            assert_eq!(Series::from_str(&series.to_string(), false), Ok(series));
        }
    }
}
