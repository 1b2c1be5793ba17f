//! `cargo xtask`: builds the files that the tests need, and runs every check of the project.

#![forbid(unsafe_code)]

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use xtask::artifacts::Artifacts;
use xtask::cache::Cache;
use xtask::lab::{self, Series};
use xtask::suite::Choice;
use xtask::{bench, check, deb, disk, initramfs, kernel, node, promtool, python, setup};

/// Builds what the tests of samepage need, and runs every check of the project.
///
/// The results are in a cache (`$SAMEPAGE_CACHE`, or `~/.cache/samepage`). They are built again only when
/// something that they depend on has changed.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that builds and tests need, as root; otherwise print the command that does. Then
    /// install tools for Cargo
    Setup,
    /// Build the guest kernel and print its path
    Kernel,
    /// Build the initial RAM file system of test guests and print its path
    Initramfs,
    /// Build the disk image of test guests and print its path
    Disk,
    /// Build the kernel, the initramfs and the disk, and print their paths as JSON
    Artifacts,
    /// Install the Python programs that some tests use, and tools for Cargo
    Python,
    /// Install the JavaScript programs that some tests use
    Node,
    /// Download promtool, which checks metrics in a test
    Promtool,
    /// Build samepage and its benchmarks for release, and run `samepage bench` with these arguments
    #[command(disable_help_flag = true)]
    Bench {
        /// The benchmark and its arguments, as for `samepage bench`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run a script on an emulated machine with hardware virtualisation; without one, all scripts in tests/lab
    ///
    /// The exit status is the script's. The machine's console is printed. Everything in the machine is emulated, so
    /// its times say nothing. It is made of Debian's kernel and QEMU 9 or newer, which are downloaded once.
    Lab {
        /// Series of the machine's kernel [default: 6.1 for a script, each for the scripts in tests/lab]
        #[arg(long, value_name = "SERIES")]
        kernel: Option<Series>,
        /// Script for the shell of busybox. It finds samepage in its PATH, and kernels for guests beside itself
        #[arg(long, value_name = "FILE")]
        script: Option<PathBuf>,
        /// Memory of the machine, in MiB
        #[arg(long, value_name = "MIB", default_value_t = 3072, value_parser = clap::value_parser!(u32).range(512..))]
        memory: u32,
        /// Number of processors of the machine
        #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=255))]
        cpus: u32,
        /// Raw image that the machine has as a disk and writes to. Repeat the option for more disks
        #[arg(long = "disk", value_name = "FILE")]
        disks: Vec<PathBuf>,
        /// Files and folders to copy into the folder of the script
        files: Vec<PathBuf>,
    },
    /// Build the Debian package of samepage, and print its path. Installs cargo-deb if it is missing
    Deb,
    /// Run every check: packages, guests, format, lint, docs, licences, advisories, tests
    Test {
        /// Run only the tests whose name contains this text, and no other check
        filter: Option<String>,
        /// Skip the tests that boot guests, and do not build guests
        #[arg(long)]
        quick: bool,
        /// Number of test processes at a time [default: one for each core]
        #[arg(long, value_name = "N")]
        jobs: Option<NonZero<usize>>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::install().and_then(|()| deb::install()).and_then(|()| {
            let cache = Cache::of_user()?;
            python::build(&cache).map(drop)
        }),
        Task::Kernel => print(Cache::of_user().and_then(|cache| kernel::build(&cache))),
        Task::Initramfs => print(Cache::of_user().and_then(|cache| initramfs::build(&cache))),
        Task::Disk => print(Cache::of_user().and_then(|cache| disk::build(&cache))),
        Task::Artifacts => Artifacts::build().and_then(|artifacts| {
            println!("{}", serde_json::to_string_pretty(&artifacts)?);
            Ok(())
        }),
        Task::Python => Cache::of_user().and_then(|cache| python::build(&cache)).map(drop),
        Task::Node => Cache::of_user().and_then(|cache| node::build(&cache)).map(drop),
        Task::Promtool => Cache::of_user().and_then(|cache| promtool::build(&cache)),
        Task::Bench { arguments } => bench::run(&arguments),
        Task::Lab { kernel, script, memory, cpus, disks, files } => {
            match lab::run(&lab::Options { kernel, script, memory, cpus, disks, files }) {
                Ok(status) => return ExitCode::from(status),
                Err(error) => Err(error),
            }
        }
        Task::Deb => print(deb::install().and_then(|()| deb::build())),
        Task::Test { filter, quick, jobs } => {
            let jobs = jobs.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZero::get);
            return if check::run(&Choice { filter, quick, jobs }) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(path: Result<PathBuf>) -> Result<()> {
    println!("{}", path?.display());
    Ok(())
}
