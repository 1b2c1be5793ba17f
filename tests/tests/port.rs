//! Guests that publish page types over a port of a virtio console, because they map no memory hole.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use samepage_machine::{DiskSpec, MemoryHole, Size, VmConfig, VmEnd};
use samepage_sharing::by_type::Claimed;
use samepage_sharing::engine::Settings;
use samepage_tests::agent::{figure, said};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness::{self, Need};
use samepage_tests::shared::{audit, wait_until};
use xtask::artifacts::{Artifacts, COMMAND_LINE};

fn main() -> ExitCode {
    harness::run_all(&[(
        "linux_says_over_a_port_what_its_kernel_says",
        &[Need::Kvm, Need::LinuxGuest],
        linux_tells_and_frees,
    )])
}

/// Little memory: if the guest's kernel is interpreted, publishing one page takes half a millisecond.
const MEMORY: u64 = 32 << 20;
/// Pause between two passes of the agent: longer than a pass takes.
const PAUSE_MS: u64 = 8000;
/// Ctrl-D.
const END_OF_INPUT: &[u8] = b"\x04";
/// Bytes that the guest frees.
const FREED: u64 = 4 << 20;
/// Freed pages that Linux keeps for each processor without the flag of free pages, and some isolated ones.
const KEPT: u64 = 256;

fn linux_tells_and_frees() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 100.0, rest_ms: 20, ..Settings::default() });
    let mut config = VmConfig::new("port", artifacts.kernel.clone().into());
    config.spec.initrd = Some(artifacts.initramfs.clone());
    // Only one program at a time has the port open: the check closes it, and publishing reopens it. The agent reads
    // its console up to the end of input, which Ctrl-D marks, so the guest waits for the host.
    config.spec.cmdline = format!(
        "{COMMAND_LINE} agent=check,publish:{PAUSE_MS},fill:4M:1,sum:/dev/ttyS0,verify,release,sum:/dev/ttyS0,\
         fill:4M:2,verify:8:250,poweroff"
    );
    config.spec.memory = Size(MEMORY);
    config.spec.memory_hole = MemoryHole::Port;
    config.sharing = Some(Arc::clone(&sharing));
    // A disk, so that the port is not the first device.
    config.spec.disks = vec![DiskSpec {
        path: artifacts.disk.clone(),
        readonly: true,
        id: Some("disk".into()),
        ..DiskSpec::default()
    }];
    let guest = Guest::start(&hypervisor, config);
    let claimed = || -> Claimed {
        let membership = guest.vm.membership().expect("the VM shares memory");
        membership.claimed().expect("the page map can be read")
    };

    let checked = said(&guest, "check ok");
    println!("check{checked}");
    assert!(figure(&checked, "percent") >= 99.5, "{checked}");
    assert!(figure(&checked, "unexplained") == 0.0, "{checked}");
    assert_eq!(figure(&checked, "pages") as u64, MEMORY / 4096, "{checked}");
    assert!(!claimed().publishing, "no pass is over");

    let published = said(&guest, "publish ok");
    println!("publish{published}");
    wait_until(&sharing, "a pass taken in", || claimed().passes > 0);
    let told = claimed();
    assert!(told.publishing && told.pass_cpu_us > 0, "{told:?}");
    let of = |name| {
        let place = samepage_hole::PageType::ALL.iter().position(|kind| kind.name() == name);
        told.types[place.expect("there is this type")].pages
    };
    assert_eq!(told.types.iter().map(|kind| kind.pages).sum::<u64>(), MEMORY / 4096, "each page has a type");
    assert!(of("slab") > 0 && of("page_table") > 0 && of("free") > 1000, "{told:?}");

    // A pass should see the filled pages in use, so that their freeing is a change. The pass in progress may have
    // gone by some of them.
    said(&guest, "fill ok pages=1024 seed=1");
    let filled = claimed().passes;
    wait_until(&sharing, "a pass after the pages were filled", || claimed().passes >= filled + 2);
    assert_eq!(guest.vm.serial_input(END_OF_INPUT), 1);
    said(&guest, "verify ok");
    let before = claimed();
    said(&guest, "release ok");
    let released = Instant::now();
    let back = || claimed().given_back - before.given_back;
    while back() < FREED / 4096 - KEPT {
        assert!(
            released.elapsed() < TIME_LIMIT,
            "{:?} {:?}\n{}",
            claimed(),
            sharing.statistics(),
            guest.console.lines().join("\n")
        );
        // The host's free memory causes no event, so poll.
        std::thread::sleep(Duration::from_millis(20));
    }
    let passes = claimed().passes - before.passes;
    println!("{} pages came back after {:.1?} and {passes} passes", back(), released.elapsed());
    println!("{:?}", claimed());
    // The pass in progress, the one that publishes the free pages, and the one that answers the host. On a busy host
    // the engine may request the next pass too late, so each of them may take two more.
    assert!(passes <= 7, "{:?} after {before:?}", claimed());
    assert_eq!(guest.vm.serial_input(END_OF_INPUT), 1);
    audit(&sharing);
    said(&guest, "fill ok pages=1024 seed=2");
    said(&guest, "verify ok pages=1024 rounds=8");
    assert!(said(&guest, "done").ends_with(" failed=0"));
    assert_eq!(guest.vm.wait(), VmEnd::Reset);
    drop(guest);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}
