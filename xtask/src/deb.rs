//! The Debian package: the program, its service, manual pages and completions.
//!
//! `cargo-deb` writes the package from the metadata in `vmm/Cargo.toml`. The program itself writes its manual pages and
//! completions first.

use crate::{process, project_root};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of what the package is made of, in the project.
const PARTS: &str = "target/deb";
/// Completions: the shell, and the file's name in the package.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "samepage"), ("zsh", "_samepage"), ("fish", "samepage.fish")];

/// Whether `cargo deb` can be used.
#[must_use]
pub fn is_installed() -> bool {
    process::succeeds(process::cargo().args(["deb", "--version"]))
}

/// Installs `cargo-deb` if it is missing.
///
/// # Errors
/// Fails if it cannot be built.
pub fn install() -> Result<()> {
    if is_installed() {
        return Ok(());
    }
    let install = ["install", "--quiet", "--locked", "--no-default-features", "cargo-deb"];
    process::run(process::cargo().args(install)).context("installing cargo-deb, which writes Debian packages")
}

/// Builds the program for release, and the package with it. Returns the package.
///
/// # Errors
/// Fails if a step fails.
pub fn build() -> Result<PathBuf> {
    process::run(process::cargo().args(["build", "--release", "--locked", "--package", "samepage"]))?;
    let root = project_root();
    package(&root.join("target/release/samepage"), &root.join("target/debian"))
}

/// Writes the package of a program into a folder, and returns the package.
///
/// # Errors
/// Fails if the program or `cargo deb` fails.
pub fn package(program: &Path, folder: &Path) -> Result<PathBuf> {
    let parts = project_root().join(PARTS);
    fs::create_dir_all(&parts).with_context(|| format!("making {}", parts.display()))?;
    // Another package may be in the making: both use these parts.
    let path = parts.with_extension("lock");
    let lock = File::create(&path).with_context(|| format!("making {}", path.display()))?;
    lock.lock().with_context(|| format!("locking {}", path.display()))?;
    let manual = parts.join("man");
    if manual.exists() {
        fs::remove_dir_all(&manual).with_context(|| format!("emptying {}", manual.display()))?;
    }
    process::run(Command::new(program).arg("man").arg(&manual))?;
    for (shell, name) in COMPLETIONS {
        let script = process::output(Command::new(program).args(["completions", shell]))?;
        let path = parts.join(name);
        fs::write(&path, script).with_context(|| format!("writing {}", path.display()))?;
    }
    let stripped = parts.join("samepage-program");
    // Debug information is larger than the program.
    process::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(program))?;

    let output = format!("{}/", folder.display());
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let options = ["deb", "--quiet", "--no-build", "--no-strip", "--package", "samepage", "--output"];
    let printed = process::output(process::cargo().args(options).arg(output))?;
    let package = printed.lines().last().map(PathBuf::from).unwrap_or_default();
    ensure!(package.is_file(), "cargo deb names no package: {printed}");
    Ok(package)
}
