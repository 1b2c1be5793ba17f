//! Disks: their contents on the host, and their permitted users.

use rustix::process::Signal;
use samepage_resources::demo::content::{SECTOR_WORDS, disk_word};
use samepage_resources::demo::plan::{DiskOp, DiskOps, DiskPlan, Plan};
use samepage_resources::demo::report::Report;

use crate::scratch::{Scratch, assert_verified, endless, report, short};

/// Guest-physical address of a VM's first disk.
const FIRST: u64 = 0xd000_0000;
const SECTOR: u64 = 512;

/// A guest that uses the first 64 KiB of its first disk, from sector 8 on.
fn with_disk(plan: Plan, ops: &[DiskOp]) -> Plan {
    let disk = DiskPlan { ops: DiskOps::new(ops), sector: 8, depth: 4, window: 4, ..DiskPlan::new(FIRST) };
    Plan { disk: Some(disk), ..plan }
}

/// Returns the content that a guest with this seed writes to this number of sectors, from sector 8 on.
fn pattern(seed: u32, sectors: u64) -> Vec<u8> {
    let words =
        (8..8 + sectors).flat_map(|sector| (0..SECTOR_WORDS).map(move |word| disk_word(seed, sector, word)));
    words.flat_map(u64::to_le_bytes).collect()
}

const WRITTEN: usize = 64 << 10;

pub(crate) fn written() {
    let scratch = Scratch::new();
    for index in 0..2 {
        scratch.sparse(&format!("vm-{index}.img"), 1 << 20);
    }
    let plan = with_disk(short(), &[DiskOp::Write, DiskOp::Flush, DiskOp::Verify, DiskOp::Id]);
    let cmdline = format!("{plan} seed=7{{index}} vm={{index}}");
    let end = scratch
        .start(cmdline, &["--count=2", "--disk=path={name}.img,id=root", "--console=file={name}.log"])
        .wait();
    end.assert_code(0);
    for index in 0..2 {
        let log = scratch.read_text(&format!("vm-{index}.log"));
        assert_verified(&log);
        assert!(log.contains("blk-id id=root\n"), "{log}");
        assert!(!log.contains("blk-corrupt"), "{log}");
        let image = scratch.read(&format!("vm-{index}.img")).unwrap();
        let (before, rest) = image.split_at(8 * SECTOR as usize);
        let (there, behind) = rest.split_at(WRITTEN);
        assert!(there == pattern(70 + index, WRITTEN as u64 / SECTOR), "VM {index} wrote something else");
        assert!(before.iter().chain(behind).all(|&byte| byte == 0), "VM {index} wrote beyond its range");
    }
}

pub(crate) fn left_over() {
    let scratch = Scratch::new();
    scratch.sparse("base.img", 1 << 20);
    let disk = "--disk=path=vm.qcow2,backing=base.img,create";
    // The socket is the last device.
    let end = scratch.start(short().to_string(), &[disk, "--vsock=uds=missing/socket"]).wait();
    end.assert_code(1);
    assert!(scratch.read("vm.qcow2").is_err());
    scratch.start(short().to_string(), &[disk]).wait().assert_code(0);
    assert!(scratch.read("vm.qcow2").is_ok());
    // An image that was there before stays.
    scratch.start(short().to_string(), &[disk, "--vsock=uds=missing/socket"]).wait().assert_code(1);
    assert!(scratch.read("vm.qcow2").is_ok());
}

pub(crate) fn read_only() {
    let scratch = Scratch::new();
    let mut image = vec![0; 1 << 20];
    image[8 * SECTOR as usize..][..WRITTEN].copy_from_slice(&pattern(1, WRITTEN as u64 / SECTOR));
    scratch.write("base.img", &image);
    let plan = with_disk(short(), &[DiskOp::Verify, DiskOp::Write, DiskOp::Verify]);
    let cmdline = format!("{plan} vm={{index}}");
    let end = scratch
        .start(cmdline, &["--count=2", "--disk=path=base.img,readonly", "--console=file={name}.log"])
        .wait();
    end.assert_code(0);
    for index in 0..2 {
        let log = scratch.read_text(&format!("vm-{index}.log"));
        assert_verified(&log);
        for passes in log.lines().filter_map(report) {
            if let Report::Blk { mode, requests, errors, unsupported, .. } = passes {
                let failed = if mode == DiskOp::Write { requests } else { 0 };
                assert_eq!(errors + unsupported, failed, "{log}");
            }
        }
    }
    assert!(scratch.read("base.img").unwrap() == image, "a read-only disk was written to");
}

pub(crate) fn in_use() {
    let scratch = Scratch::new();
    scratch.sparse("a.img", 1 << 20);
    let (writing, reading) = ("--disk=path=a.img", "--disk=path=a.img,readonly");
    for (holder, refused) in [(writing, writing), (writing, reading), (reading, writing)] {
        let first = scratch.start(endless(), &[holder]);
        first.stdout().wait_for_line("ready");
        let second = scratch.start(short(), &[refused]).wait();
        second.assert_code(1);
        assert_eq!((second.stdout.as_str(), second.stderr.lines().count()), ("", 1), "{}", second.stderr);
        for part in ["samepage: VM vm: disk disk0:", "disk a.img", "it is in use: samepage (process"] {
            assert!(second.stderr.contains(part), "{part:?} is missing in:\n{}", second.stderr);
        }
        first.signal(Signal::TERM);
        first.wait().assert_code(0);
    }
    let first = scratch.start(endless(), &[reading]);
    first.stdout().wait_for_line("ready");
    scratch.start(short(), &[reading]).wait().assert_code(0);
    first.signal(Signal::TERM);
    first.wait().assert_code(0);
    scratch.start(short(), &[writing]).wait().assert_code(0);
}
