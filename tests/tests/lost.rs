//! VMs that lose memory while they run: the affected VM ends with a report, and the others continue.

#![expect(unsafe_code, reason = "takes memory from a running guest")]

use std::os::fd::AsRawFd;
use std::process::ExitCode;

use samepage_machine::VmEnd;
use samepage_resources::demo::plan::{Plan, Rate};
use samepage_sharing::PAGE_SIZE;
use samepage_tests::guests::{Guest, aggressive, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::shared::{audit, churn, start_all, wait_ready, wait_until};

fn main() -> ExitCode {
    harness::run(&[
        ("a_vm_whose_memory_is_unmapped_ends_alone", unmapped),
        ("a_vm_whose_backing_is_cut_off_ends_alone", cut_off),
        ("a_loss_that_the_vcpu_finds_first_ends_the_vm_alone", found_by_the_vcpu),
    ])
}

/// The first lost page, among the pages that the guests write.
const LOST: u32 = 4096;

/// Makes pages of a running guest inaccessible.
fn lose(guest: &Guest, access: i32, flags: i32, file: i32) {
    let range = guest.vm.ram().range(guest.vm.ram().pages() / 4, LOST);
    let (at, bytes) = (std::ptr::without_provenance_mut(range.address()), range.bytes());
    // SAFETY: the range is guest memory, which may be replaced by anything. The test is about accesses to
    // memory that the host cannot supply.
    let mapped = unsafe { libc::mmap(at, bytes, access, flags | libc::MAP_FIXED, file, 0) };
    assert_eq!(mapped, at, "{}", std::io::Error::last_os_error());
}

fn ends_alone(engine_looks: bool, lose: impl Fn(&Guest)) {
    let hypervisor = hypervisor();
    let sharing = sharing(aggressive());
    let rate = if engine_looks { Rate::Max } else { Rate::PerSecond(100) };
    let plan = Plan { pages: Some(8192), rate, ..churn() };
    let mut guests = start_all(&hypervisor, &sharing, 3, &plan);
    guests.iter().for_each(wait_ready);
    let victim = guests.remove(1);
    victim.console.wait_for_round(victim.console.round() + 1);
    if !engine_looks {
        // So many that some of the lost pages are among them.
        wait_until(&sharing, "sharing", || sharing.statistics().pages_sharing > u64::from(LOST / 4));
        sharing.pause();
    }
    lose(&victim);
    let VmEnd::Failed(reason) = victim.vm.wait() else { panic!("{:?}", victim.vm.end()) };
    println!("{reason}");
    assert!(reason.contains("memory"), "{reason}");
    if !engine_looks {
        // The engine has read none of what was lost, so its notes of these pages are wrong.
        audit(&sharing);
        sharing.resume();
    }
    for guest in &guests {
        guest.console.wait_for_round(guest.console.round() + 3);
    }
    audit(&sharing);
    // Its pages are freed while the others run, and a new VM takes its place.
    drop(victim);
    guests.extend(start_all(&hypervisor, &sharing, 1, &churn()));
    wait_ready(&guests[2]);
    audit(&sharing);
    guests.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}

fn unmapped() {
    ends_alone(true, |victim| lose(victim, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1));
}

fn cut_off() {
    cut_off_while_the_engine(true);
}

fn found_by_the_vcpu() {
    cut_off_while_the_engine(false);
}

fn cut_off_while_the_engine(looks: bool) {
    let file = tempfile::tempfile().expect("make a file");
    file.set_len(PAGE_SIZE as u64).expect("make it a page long");
    ends_alone(looks, |victim| {
        lose(victim, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, file.as_raw_fd());
    });
}
