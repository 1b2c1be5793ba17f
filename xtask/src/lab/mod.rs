//! `cargo xtask lab`: an emulated machine with hardware virtualisation, and scripts that run on it.
//!
//! The hosts of the tests may have any kind of KVM, or one that interprets the guests' kernels. The lab has one that
//! is known: `kvm_amd` with nested paging, under a kernel of Debian's, on a machine that QEMU emulates. What runs there
//! shows how samepage behaves. It shows nothing about speed, since everything is emulated.
//!
//! A script is run by the shell of busybox, in a file system in memory. The program `samepage` is in its PATH. The
//! kernels `/root/vmlinuz` and `/root/vmlinuz-cloud` are there for its guests.

mod apt;
mod debian;
mod image;
mod kernels;
mod machine;
mod qemu;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::Cache;
use crate::suite::PROGRAM;
use crate::{initramfs, process, setup};

pub use kernels::Series;

/// Says, if set to 1, that all scripts are a part of all checks. Otherwise [`SHORT`] alone is.
pub const WANTED: &str = "SAMEPAGE_TESTS_LAB";
/// How often a script is tried in which the emulator has spoiled a guest. docs/lab.md says how that happens.
const ATTEMPTS: u32 = 3;
/// Where the project's scripts are.
const SCRIPTS: &str = "tests/lab";
/// Where those are that need a Debian image.
const IMAGE_SCRIPTS: &str = "tests/lab/image";
/// The script that is a part of all checks, and the kernel on which it runs.
const SHORT: (&str, Series) = ("short.sh", Series::V6_12);
/// Debian's packages for building the machine's file system.
const PACKAGES: [&str; 4] = ["binutils", "busybox-static", "kmod", "xz-utils"];

/// What is run, and on what.
#[derive(Debug)]
pub struct Options {
    /// The machine's kernel. If `None`, a chosen script runs on the first, and the project's scripts run on each.
    pub kernel: Option<Series>,
    /// The script. If `None`, all scripts of the project are run.
    pub script: Option<PathBuf>,
    /// The machine's memory in MiB.
    pub memory: u32,
    /// How many processors the machine has.
    pub cpus: u32,
    /// Images that the machine has as disks: /dev/vda and so on. They are written to.
    pub disks: Vec<PathBuf>,
    /// Files and folders to copy into the folder of the script.
    pub files: Vec<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { kernel: None, script: None, memory: 3072, cpus: 2, disks: Vec::new(), files: Vec::new() }
    }
}

/// Finds Debian's kernels for all machines and for clouds, of each series. Downloads nothing.
///
/// # Errors
/// Some of them have not been downloaded yet.
pub fn find_kernels() -> Result<Vec<PathBuf>> {
    let cache = Cache::of_user()?;
    let mut paths = Vec::new();
    for series in Series::ALL {
        let Some(kernels) = kernels::find(&cache, series) else {
            bail!("Debian's kernels {series} are missing from the cache; `cargo xtask lab` downloads them");
        };
        paths.extend([kernels.generic(), kernels.cloud()]);
    }
    Ok(paths)
}

/// Runs what the options ask for. Returns the exit status of the script, or for all scripts 1 if any failed.
///
/// # Errors
/// The machine cannot be built, or it ends before a script does.
pub fn run(options: &Options) -> Result<u8> {
    for path in options.script.iter().chain(&options.disks).chain(&options.files) {
        fs::metadata(path).with_context(|| format!("looking for {}", path.display()))?;
    }
    install()?;
    let program = program("release")?;
    let cache = Cache::of_user()?;
    match &options.script {
        Some(script) => {
            let kernel = options.kernel.unwrap_or(Series::ALL[0]);
            run_script(&cache, kernel, script, &program, options)
        }
        None => run_all(&cache, &program, options).map(|passed| u8::from(!passed)),
    }
}

/// Installs the tools that build and emulate the machine.
fn install() -> Result<()> {
    setup::install_packages(&PACKAGES).context("preparing to build the file system of the lab's machine")?;
    qemu::install()
}

/// Runs the project's scripts on each kernel.
///
/// # Errors
/// A script failed, or the machine cannot be built.
pub fn check() -> Result<()> {
    ensure!(run(&Options::default())? == 0, "scripts of {SCRIPTS} failed");
    Ok(())
}

/// Installs what the short script needs.
///
/// # Errors
/// The emulator or Debian's kernels cannot be had.
pub fn prepare_short() -> Result<()> {
    install()?;
    kernels::fetch(&Cache::of_user()?, SHORT.1).map(drop)
}

/// Runs the short script, with the program that the tests use.
///
/// # Errors
/// The script failed, or the machine cannot be built.
pub fn check_short() -> Result<()> {
    let (name, kernel) = SHORT;
    let script = crate::project_root().join(SCRIPTS).join(name);
    let status = run_script(&Cache::of_user()?, kernel, &script, &program("dev")?, &Options::default())?;
    ensure!(
        status == 0,
        "{SCRIPTS}/{name} failed; `cargo xtask lab --kernel {kernel} --script {SCRIPTS}/{name}` repeats it"
    );
    Ok(())
}

/// Runs the project's scripts, and prints what each came to. Returns whether all passed.
fn run_all(cache: &Cache, program: &Path, options: &Options) -> Result<bool> {
    let scripts = scripts()?;
    let mut lines = Vec::new();
    let mut all_passed = true;
    for kernel in Series::ALL.into_iter().filter(|kernel| options.kernel.is_none_or(|only| only == *kernel)) {
        for script in &scripts {
            let name = in_project(script);
            println!("\n-- lab: {name} on Linux {kernel}");
            let start = Instant::now();
            let result = run_script(cache, kernel, script, program, options);
            let word = match &result {
                Ok(0) => "passed".to_owned(),
                Ok(status) => format!("FAILED with exit status {status}"),
                Err(error) => format!("FAILED: {error:#}"),
            };
            all_passed &= matches!(result, Ok(0));
            lines.push(format!("{kernel:<5} {name:<30} {:>7.1} s  {word}", start.elapsed().as_secs_f64()));
        }
    }
    println!("\n-- lab: summary");
    lines.iter().for_each(|line| println!("{line}"));
    Ok(all_passed)
}

/// The project's scripts, by name. Those that need an image come last.
fn scripts() -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for folder in [SCRIPTS, IMAGE_SCRIPTS] {
        let folder = crate::project_root().join(folder);
        let reading = || format!("reading {}", folder.display());
        let entries = fs::read_dir(&folder).with_context(reading)?;
        let paths: Result<Vec<_>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut paths = paths.with_context(reading)?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "sh"));
        paths.sort();
        all.append(&mut paths);
    }
    Ok(all)
}

/// The path of a script of the project's, from the project's folder.
fn in_project(script: &Path) -> String {
    let root = crate::project_root();
    script.strip_prefix(&root).unwrap_or(script).display().to_string()
}

/// Whether a script is one of those that need a Debian image, at any depth.
fn needs_image(script: &Path) -> bool {
    let folder = fs::canonicalize(crate::project_root().join(IMAGE_SCRIPTS));
    let script = fs::canonicalize(script);
    matches!((script, folder), (Ok(script), Ok(folder)) if script.starts_with(&folder))
}

fn run_script(cache: &Cache, kernel: Series, script: &Path, program: &Path, options: &Options) -> Result<u8> {
    let kernels = kernels::fetch(cache, kernel)?;
    let debian = if needs_image(script) { Some(debian::build(cache)?) } else { None };
    let disk = debian.as_ref().map(debian::Debian::disk);
    let work = tempfile::tempdir().context("making a folder for the machine's file system")?;
    let initrd = work.path().join("initrd");
    let agent = &initramfs::agent(cache)?;
    let contents = image::Contents {
        kernels: &kernels,
        program,
        agent,
        debian: debian.as_ref(),
        script,
        files: &options.files,
    };
    contents.write(&initrd).context("building the file system of the lab's machine")?;
    let mut attempt = 1;
    loop {
        let mut command = qemu::command(&kernels.generic(), &initrd, disk.as_deref(), options);
        let end = machine::run(&mut command)?;
        if end.status == 0 || !end.lost || attempt == ATTEMPTS {
            return Ok(end.status);
        }
        attempt += 1;
        println!("\n-- lab: the emulator may have spoiled a guest; attempt {attempt} of {ATTEMPTS}");
    }
}

/// The program to run in the lab: the one that [`PROGRAM`] names, or else one built with this profile.
fn program(profile: &str) -> Result<PathBuf> {
    if let Some(program) = std::env::var_os(PROGRAM) {
        return Ok(program.into());
    }
    let build = ["build", "--profile", profile, "--locked", "--package", "samepage", "--bin", "samepage"];
    let messages = process::build(&build)?;
    match process::executable(&messages, "samepage") {
        Some(program) => Ok(program),
        None => bail!("cargo built no program samepage; run `cargo build --release` to see why"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_say_what_they_show_and_are_documented() -> Result<()> {
        let page = fs::read_to_string(crate::project_root().join("docs/lab.md"))?;
        let scripts = scripts()?;
        assert!(scripts.len() > 1, "{scripts:?}");
        for script in scripts {
            let text = fs::read_to_string(&script)?;
            assert!(text.starts_with("# "), "{} begins with no comment", script.display());
            let name = in_project(&script);
            assert!(page.contains(&format!("`{name}`")), "docs/lab.md says nothing about {name}");
        }
        Ok(())
    }

    #[test]
    fn scripts_that_need_an_image_are_known_by_their_folder() -> Result<()> {
        let (with, without): (Vec<_>, Vec<_>) =
            scripts()?.into_iter().partition(|script| needs_image(script));
        assert!(
            with.iter().all(|script| script.parent().is_some_and(|folder| folder.ends_with(IMAGE_SCRIPTS)))
        );
        assert!(!with.is_empty() && without.iter().all(|script| !script.starts_with(IMAGE_SCRIPTS)));
        assert!(!needs_image(Path::new("/nonexistent/debian.sh")));
        assert!(needs_image(&crate::project_root().join(IMAGE_SCRIPTS).join("long/work.sh")));
        Ok(())
    }

    #[test]
    fn a_missing_file_is_named_before_anything_is_done() {
        let options = Options { disks: vec!["/nonexistent/disk.img".into()], ..Options::default() };
        let error = run(&options).expect_err("there is no such disk");
        assert_eq!(error.to_string(), "looking for /nonexistent/disk.img");
    }
}
