//! What memory VMs cost: a process frees that of VMs that have ended, and a large VM costs what its guest touches.

use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use samepage_machine::boot::test_images::pvh_elf;
use samepage_machine::{ImageSource, Size, Vm, VmConfig, VmEnd};
use samepage_resources::demo::client::{BLOCK_BYTES, ClientPlan};
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::{DiskOp, DiskOps, DiskPlan, Plan};
use samepage_sharing::engine::Settings;
use samepage_tests::api::Host;
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::guests::{hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::process::Holdings;
use serde_json::json;

fn main() -> ExitCode {
    harness::run(&[
        ("a_process_gives_back_the_memory_of_vms_that_are_gone", rounds),
        ("a_vm_with_512_gib_costs_what_its_guest_touches", large),
    ])
}

const ROUNDS: u32 = 3;
const VMS: u32 = 24;
/// Memory of each guest, in bytes.
const MEMORY: u64 = 16 << 20;
/// Guest-physical address of a VM's first disk.
const FIRST_DISK: u64 = 0xd000_0000;
/// Blocks of the disk that all guests read.
const BLOCKS: u32 = 512;
/// Memory that the process may have in addition to that before the first VM, in bytes. Without freeing, it
/// would have more after the first round, and grow in each further one.
const SLACK_BYTES: u64 = 5 << 19;

/// A guest that shares a part of its memory, and reads a disk through its own page cache.
fn plan(vm: u32) -> Plan {
    let client = ClientPlan { pages: 128, blocks: BLOCKS, units: 32, check: false, ..ClientPlan::default() };
    let disk =
        DiskPlan { ops: DiskOps::new(&[DiskOp::Client]), depth: 4, client, ..DiskPlan::new(FIRST_DISK) };
    Plan { vm, rounds: 0, every_ms: 2000, pages: Some(256), disk: Some(disk), ..Plan::default() }
}

fn rounds() {
    let host = Host::serve(&["--sharing-cpu", "100", "--overcommit", "8"]);
    fs::write(host.folder.path().join("disk.img"), vec![7; BLOCKS as usize * BLOCK_BYTES as usize]).unwrap();
    let before = host.holdings().private_bytes;
    for round in 0..ROUNDS {
        live(&host);
        let most = before + SLACK_BYTES;
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let now = host.holdings().private_bytes;
            if now <= most {
                break;
            }
            assert!(Instant::now() < deadline, "after round {round}: {now} bytes, {before} before all VMs");
            // Memory is freed some time after the last VM's end. That causes no event, so poll.
            thread::sleep(Duration::from_millis(50));
        }
    }
    host.end().assert_code(0);
}

/// Runs VMs that work and share.
fn live(host: &Host) {
    let name = |vm: u32| format!("vm-{vm}");
    let each = |work: &(dyn Fn(u32) + Sync)| {
        thread::scope(|scope| (0..VMS).for_each(|vm| drop(scope.spawn(move || work(vm)))));
    };
    each(&|vm| {
        let mut body = host.vm(&name(vm), &plan(vm), true);
        body["memory"] = json!(MEMORY);
        body["disks"] =
            json!([{ "path": "disk.img", "readonly": true, "format": "raw", "cache": "exclusive" }]);
        host.done("POST", "/vms", Some(&body));
    });
    (0..VMS).for_each(|vm| host.wait_for_console(&name(vm), "round="));
    let wanted =
        Arena::on_map(&plan(0), std::iter::once(0..MEMORY)).unwrap().counts().reclaimable(VMS.into());
    host.wait_for("/sharing", "sharing some identical pages", |sharing| {
        let counted = &sharing["statistics"];
        counted["pages_sharing"].as_u64().unwrap() + counted["zero_pages"].as_u64().unwrap() >= wanted / 8
    });
    each(&|vm| assert_eq!(host.ask("DELETE", &format!("/vms/{}", name(vm)), None).0, 204));
}

/// Memory of the large VM, in bytes.
const LARGE: u64 = 512 << 30;
/// What its guest may cost the process, in bytes, besides what grows with the guest's memory.
const FIXED_BYTES: u64 = 8 << 20;
/// A bit for each page. The process notes by one whether the host has written to the page.
const BITS: u64 = LARGE / 4096 / 8;
/// Bits for each page where the engine shares them, as long as it has seen none of them.
const SHARED_BITS: u64 = 16;

/// Kernel memory for the process's page tables, in bytes.
fn page_tables() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("the process has a status");
    let line =
        status.lines().find_map(|line| line.strip_prefix("VmPTE:")).expect("the kernel counts page tables");
    let kib: u64 = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number of KiB");
    kib << 10
}

fn large() {
    let hypervisor = hypervisor();
    let engine = sharing(Settings::default());
    for engine in [None, Some(&engine)] {
        let before = (Holdings::now().private_bytes, page_tables());
        // Its guest stops in a few instructions, with soft off.
        let code = b"\x66\xba\x00\x06\xb0\x34\xee\xf4\xeb\xfd";
        let kernel = ImageSource::Bytes { name: "a guest that powers off", bytes: pvh_elf(code).into() };
        let mut config = VmConfig::new("large", kernel);
        config.spec.memory = Size(LARGE);
        config.sharing = engine.cloned();
        let start = Instant::now();
        let vm = Vm::build(config, &hypervisor).expect("a VM");
        let built = start.elapsed();
        let slots: Vec<_> = vm.memory().slots().iter().map(|slot| slot.range.bytes).collect();
        assert_eq!((slots.len(), slots.iter().sum::<u64>()), (2, LARGE));
        vm.start();
        assert_eq!(vm.wait(), VmEnd::PowerOff);
        let more = |now: u64, before: u64| now.saturating_sub(before);
        let private = more(Holdings::now().private_bytes, before.0);
        let tables = more(page_tables(), before.1);
        println!(
            "512 GiB{}: built in {built:?}; {private} bytes of the process, {tables} of page tables",
            if engine.is_some() { ", shared" } else { "" }
        );
        let bits = if engine.is_some() { SHARED_BITS * BITS } else { BITS };
        assert!(private <= bits + FIXED_BYTES && tables <= FIXED_BYTES, "{private} and {tables}");
    }
}
