//! Runs tests in order, because many of them measure the process. Prints which tests were skipped because the
//! host lacks a resource.

#![expect(unsafe_code, reason = "has signals act as by default")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::sync::LazyLock;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use samepage_devices::net::{Tap, TapOptions};
use samepage_machine::Hypervisor;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::ram::Ram;
use xtask::artifacts::Artifacts;
use xtask::{deb, lab, node, promtool, python};

use crate::browser;

/// The variable that, set to 1, skips tests if KVM cannot be used. The skipped tests are listed.
pub const WITHOUT_KVM: &str = "SAMEPAGE_TESTS_WITHOUT_KVM";

/// A test: its name and its function.
pub type Test = (&'static str, fn());

/// A test with its requirements.
pub type NeedyTest = (&'static str, &'static [Need], fn());

/// A resource that not every host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// VMs. Without them, a test fails, or is ignored if [`WITHOUT_KVM`] is set.
    Kvm,
    /// Mounts and devices that only one process sees. Without them, a test is ignored.
    Mounts,
    /// Taps that the process makes. Without them, a test is ignored.
    Taps,
    /// passt, for networks without privileges. Without it, a test is ignored.
    Passt,
    /// A browser. Without one a test is ignored.
    Browser,
    /// Linux guests, which take minutes to build. Without them, a test is ignored.
    LinuxGuest,
    /// Python programs from PyPI. Without them, a test is ignored.
    Python,
    /// Debian's kernels, of which the lab keeps four. Without them, a test is ignored.
    DebianKernels,
    /// Programs of systemd, which need not run on the host. Without them, a test is ignored.
    Systemd,
    /// JavaScript programs from npm. Without them, a test is ignored.
    Node,
    /// `cargo deb`, which writes Debian packages. Without it, a test is ignored.
    CargoDeb,
    /// Prometheus' checker of metrics. Without it a test is ignored.
    Promtool,
}

/// Makes a tap, which is gone at once. Returns why taps cannot be made or set up.
fn without_taps() -> Option<String> {
    let name = format!("sptry{}", std::process::id() % 1_000_000_000);
    if let Err(error) = Tap::open(&TapOptions { source: Ok(name), queues: 1, mtu: None }) {
        return Some(error.to_string());
    }
    let ip = Command::new("ip").arg("-V").output();
    ip.err().map(|error| format!("`ip` of iproute2: {error}"))
}

/// Runs tests that need KVM.
#[must_use]
pub fn run(tests: &[Test]) -> ExitCode {
    let tests: Vec<_> = tests.iter().map(|&(name, test)| (name, &[Need::Kvm][..], test)).collect();
    run_all(&tests)
}

/// Creates the resources that a process keeps to its end, so that they do not look like a leak later. These
/// are the thread that reports lost memory, and in the C library an arena and a stack for each thread.
fn warm_up() {
    Ram::reserve(PAGE_SIZE).and_then(|ram| ram.on_loss(drop)).expect("memory can be reserved and watched");
    let all_there = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                drop(std::hint::black_box(vec![1_u8; 1000]));
                all_there.wait();
            });
        }
    });
}

/// Runs tests with their requirements.
#[must_use]
pub fn run_all(tests: &[NeedyTest]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Many tests count the mappings, memory and descriptors of the process.
    arguments.test_threads = Some(1);
    warm_up();
    heed_signals();
    let missing = Hypervisor::open().err().map(|error| error.to_string());
    let skip = missing.is_some() && std::env::var_os(WITHOUT_KVM).is_some_and(|value| value == "1");
    let trials = tests
        .iter()
        .map(|&(name, needs, test)| {
            let needs_kvm = needs.contains(&Need::Kvm);
            let missing = missing.clone().filter(|_| needs_kvm);
            let run = move || match missing {
                Some(reason) => Err(format!("needs KVM: {reason} ({WITHOUT_KVM}=1 skips such tests)").into()),
                None if needs.contains(&Need::Mounts) && !*MOUNTS => {
                    Ok(Completion::ignored_with("needs root, to mount and to make devices"))
                }
                None if needs.contains(&Need::Taps)
                    && let Some(reason) = without_taps() =>
                {
                    Ok(Completion::ignored_with(format!("needs taps: {reason}")))
                }
                None if needs.contains(&Need::Passt)
                    && let Err(error) = Command::new("passt").arg("--version").output() =>
                {
                    Ok(Completion::ignored_with(format!("needs passt: {error}; `apt install passt` gets it")))
                }
                None if needs.contains(&Need::Browser) && browser::program().is_none() => {
                    Ok(Completion::ignored_with(browser::MISSING))
                }
                None if needs.contains(&Need::LinuxGuest)
                    && let Err(error) = Artifacts::locate() =>
                {
                    Ok(Completion::ignored_with(error.to_string()))
                }
                None if needs.contains(&Need::DebianKernels)
                    && let Err(error) = lab::find_kernels() =>
                {
                    Ok(Completion::ignored_with(error.to_string()))
                }
                None if needs.contains(&Need::Python) && !matches!(python::find(), Ok(Some(_))) => Ok(
                    Completion::ignored_with("needs programs in Python: `cargo xtask python` installs them"),
                ),
                None if needs.contains(&Need::Systemd) && !*SYSTEMD => {
                    Ok(Completion::ignored_with("needs systemd-analyze: `cargo xtask setup` installs it"))
                }
                None if needs.contains(&Need::Node) && !matches!(node::find(), Ok(Some(_))) => {
                    Ok(Completion::ignored_with(
                        "needs programs in JavaScript: `cargo xtask node` installs them",
                    ))
                }
                None if needs.contains(&Need::CargoDeb) && !deb::is_installed() => {
                    Ok(Completion::ignored_with("needs cargo-deb: `cargo xtask setup` gets it"))
                }
                None if needs.contains(&Need::Promtool) && promtool::find().is_none() => {
                    Ok(Completion::ignored_with("needs promtool: `cargo xtask promtool` gets it"))
                }
                None => catch_unwind(AssertUnwindSafe(test))
                    .map(|()| Completion::Completed)
                    .map_err(|panic| Failed::from(text(&*panic))),
            };
            Trial::ignorable_test(name, run).with_ignored_flag(skip && needs_kvm)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Sets signals to their default actions for programs that tests start. A shell that starts the tests in the
/// background, or `nohup`, ignores some signals, and programs inherit that.
fn heed_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: the default action calls no code of this program.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Whether a process may have its own mounts and devices.
static MOUNTS: LazyLock<bool> = LazyLock::new(|| {
    let attempt = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3";
    let output = Command::new("unshare").args(["--mount", "sh", "-c", attempt]).output();
    output.is_ok_and(|output| output.status.success())
});

/// Whether units can be verified.
static SYSTEMD: LazyLock<bool> = LazyLock::new(|| {
    let output = Command::new("systemd-analyze").arg("--version").output();
    output.is_ok_and(|output| output.status.success())
});

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panicked".into())
}
