//! Builds the guest kernel from Debian's kernel source package.
//!
//! The result is an uncompressed `vmlinux`, an ELF file with a PVH entry point, in an entry of the cache with
//! its `System.map` and `config`. It depends on the project's configuration and patches, and on the version
//! of the source package. So it is built once, in some minutes, and then found in the cache. The compiler's
//! output is in `kernel.log` in the cache.

use crate::cache::{Cache, Key};
use crate::process;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// The Debian package with the kernel's source.
pub const SOURCE_PACKAGE: &str = "linux-source-6.1";
const PATCHES: [&str; 2] = ["software-kvm.patch", "quick-boot.patch"];
const TARBALL: &str = "/usr/src/linux-source-6.1.tar.xz";

/// Must be increased when this module builds another kernel from the same inputs.
const RECIPE: &str = "kernel 1";

/// Builds the kernel if the cache lacks it, and returns the path of `vmlinux`.
///
/// # Errors
/// Fails if the source is not installed, or if a step of the build fails. The error names the log.
pub fn build(cache: &Cache) -> Result<PathBuf> {
    let entry =
        cache.get_or_build("kernel", &key()?, |dir| build_in(dir, &cache.root().join("kernel.log")))?;
    Ok(entry.join("vmlinux"))
}

/// Returns the path of `vmlinux` if the cache has it.
///
/// # Errors
/// Fails if a file that the kernel depends on cannot be read.
pub fn find(cache: &Cache) -> Result<Option<PathBuf>> {
    Ok(cache.find("kernel", &key()?).map(|entry| entry.join("vmlinux")))
}

fn key() -> Result<Key> {
    let version = process::output(Command::new("dpkg-query").args([
        "--show",
        "--showformat=${Version}",
        SOURCE_PACKAGE,
    ]))
    .context("looking up the version of the kernel's source; `cargo xtask setup` installs it")?;
    let mut key = Key::new().part(RECIPE).part(version).file(&config())?;
    for patch in PATCHES {
        key = key.file(&resource(patch))?;
    }
    Ok(key)
}

fn config() -> PathBuf {
    resource("config")
}

fn resource(name: &str) -> PathBuf {
    crate::project_root().join("resources/guest-kernel").join(name)
}

fn build_in(dir: &Path, log_path: &Path) -> Result<()> {
    let start = Instant::now();
    eprintln!("kernel: building from {TARBALL}, some minutes the first time; log: {}", log_path.display());
    let tree = dir.join("tree");
    let built = compile(&tree, log_path)
        .with_context(|| format!("building the guest kernel; the log is {}", log_path.display()));
    let kept = built.and_then(|()| {
        for (from, to) in [("vmlinux", "vmlinux"), ("System.map", "System.map"), (".config", "config")] {
            fs::rename(tree.join(from), dir.join(to))
                .with_context(|| format!("keeping the kernel's {to}"))?;
        }
        fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))
    });
    eprintln!("kernel: {} in {} s", if kept.is_ok() { "built" } else { "failed" }, start.elapsed().as_secs());
    kept
}

fn compile(tree: &Path, log_path: &Path) -> Result<()> {
    fs::create_dir_all(tree).with_context(|| format!("creating {}", tree.display()))?;
    let log = File::create(log_path).context("creating the log")?;
    let logged = |command: &mut Command| -> Result<()> {
        process::run(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?))
    };
    logged(Command::new("tar").args(["-x", "--strip-components=1", "-f", TARBALL, "-C"]).arg(tree))?;
    for patch in PATCHES {
        logged(Command::new("patch").args(["-p1", "-d"]).arg(tree).arg("-i").arg(resource(patch)))
            .with_context(|| format!("applying {patch}"))?;
    }
    fs::copy(config(), tree.join(".config")).context("copying the configuration")?;
    logged(make(tree).arg("olddefconfig"))?;
    let wanted = fs::read_to_string(config())?;
    let got = fs::read_to_string(tree.join(".config"))?;
    if let Some(option) = unmet(&wanted, &got) {
        bail!("the kernel does not take this line of {}: {option}", config().display());
    }
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut child = make(tree)
        .arg(format!("-j{jobs}"))
        .arg("vmlinux")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("starting make")?;
    let output = child.stdout.take().context("reading what make prints")?;
    let copied = follow(output, log);
    let status = child.wait().context("waiting for make")?;
    copied.context("writing the log")?;
    if !status.success() {
        bail!("make failed: {status}");
    }
    Ok(())
}

fn make(tree: &Path) -> Command {
    let mut make = Command::new("make");
    make.arg("-C").arg(tree).arg("ARCH=x86_64");
    // The same inputs always produce the same bytes, for any user, place and time.
    make.env("KBUILD_BUILD_TIMESTAMP", "1970-01-01").env("KBUILD_BUILD_USER", "samepage");
    make.env("KBUILD_BUILD_HOST", "samepage").env("KBUILD_BUILD_VERSION", "1");
    for variable in ["MAKEFLAGS", "KCFLAGS", "KBUILD_OUTPUT", "CROSS_COMPILE", "LOCALVERSION"] {
        make.env_remove(variable);
    }
    make
}

/// Returns the first line of the configuration `wanted` that the configuration `got` lacks.
fn unmet<'a>(wanted: &'a str, got: &str) -> Option<&'a str> {
    wanted.lines().find(|line| {
        let disabled = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
        match disabled {
            Some(option) => got.lines().any(|line| line.split('=').next() == Some(option)),
            None => line.starts_with("CONFIG_") && !got.lines().any(|other| other == *line),
        }
    })
}

/// Copies the output of make to the log and shows the progress until it ends.
fn follow(output: ChildStdout, mut log: File) -> io::Result<()> {
    let (sender, lines) = mpsc::channel();
    let reader = thread::spawn(move || -> io::Result<()> {
        for line in BufReader::new(output).split(b'\n') {
            let mut line = line?;
            let compiled = line.starts_with(b"  CC") || line.starts_with(b"  AS");
            line.push(b'\n');
            log.write_all(&line)?;
            // The receiver exists until this function ends.
            let _ = sender.send(compiled);
        }
        Ok(())
    });
    let terminal = io::stderr().is_terminal();
    let interval = Duration::from_secs(if terminal { 1 } else { 20 });
    let start = Instant::now();
    let mut next = start + interval;
    let mut objects = 0;
    loop {
        match lines.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(compiled) => objects += usize::from(compiled),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if Instant::now() >= next {
            let ends = if terminal { ("\r", "") } else { ("", "\n") };
            eprint!(
                "{}kernel: {objects} objects compiled, {} s{}",
                ends.0,
                start.elapsed().as_secs(),
                ends.1
            );
            next += interval;
        }
    }
    if terminal {
        eprintln!();
    }
    reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader of make's output panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_option_is_named() {
        let got = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_CD=\"x y\"\n";
        assert_eq!(unmet("# why\n\nCONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\n", got), None);
        assert_eq!(unmet("CONFIG_A=m", got), Some("CONFIG_A=m"));
        assert_eq!(unmet("CONFIG_B=y", got), Some("CONFIG_B=y"));
        assert_eq!(unmet("# CONFIG_CD is not set", got), Some("# CONFIG_CD is not set"));
        assert_eq!(unmet("CONFIG_CD=\"x y\"", got), None);
    }
}
