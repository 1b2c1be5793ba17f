//! Malformed virtio-blk requests, to check that a device refuses them and continues to work.
//!
//! Each case starts from a freshly reset device. A device may answer with an error status, return the request
//! as used, ask for a reset, or drop the request. After one more reset it must serve a well-formed read.

use crate::demo::content::SECTOR_BYTES;
use crate::demo::report::{Hex, Report, Text};
use crate::disk::{Disk, DiskError};
use crate::port;
use crate::virtio::{Descriptor, INDIRECT, NEXT, QUEUE_DESCRIPTORS, QUEUE_READY, QUEUE_SIZE, WRITE};

/// Time limit for an answer to a malformed request.
const ANSWER_LIMIT_US: u64 = 20_000;
/// An address beyond any guest's memory.
const NOWHERE: u64 = 1 << 60;

const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_UNKNOWN: u32 = 0xdead;

/// Header and status of the request.
#[repr(C, align(16))]
struct Parts {
    header: [u64; 2],
    status: u8,
}

static mut PARTS: Parts = Parts { header: [0; 2], status: 0 };

/// The descriptors of a request. The data goes to the first buffer, so a device that accepts a malformed
/// request does no harm.
struct Chain {
    header: Descriptor,
    data: Descriptor,
    status: Descriptor,
}

/// Offers a chain of header, data and status at descriptors 0 to 2, changed by `change`.
fn request(disk: &mut Disk<'_>, kind: u32, sector: u64, change: impl FnOnce(&mut Chain)) {
    let parts = &raw mut PARTS;
    // SAFETY: this is the only request, and the device has been reset since the previous one.
    let (header, status) = unsafe {
        (&raw mut (*parts).header).write_volatile([kind.into(), sector]);
        ((&raw const (*parts).header).addr() as u64, (&raw const (*parts).status).addr() as u64)
    };
    let direction = if kind == TYPE_WRITE { 0 } else { WRITE };
    let mut chain = Chain {
        header: Descriptor { address: header, len: 16, flags: NEXT, next: 1 },
        data: Descriptor {
            address: disk.buffers,
            len: SECTOR_BYTES as u32,
            flags: NEXT | direction,
            next: 2,
        },
        status: Descriptor { address: status, len: 1, flags: WRITE, next: 0 },
    };
    change(&mut chain);
    disk.device.describe(0, chain.header);
    disk.device.describe(1, chain.data);
    disk.device.describe(2, chain.status);
    disk.device.offer(0);
    disk.device.publish();
}

/// Submits a read of the first sector, changed by `change`.
fn read(disk: &mut Disk<'_>, change: impl FnOnce(&mut Chain)) {
    request(disk, TYPE_READ, 0, change);
}

type Case = (&'static str, fn(&mut Disk<'_>));

/// Only reads, or writes beyond the end of the disk, so that the disk's content does not change.
const CASES: &[Case] = &[
    ("data-nowhere", |disk| read(disk, |chain| chain.data.address = NOWHERE)),
    ("data-wraps", |disk| read(disk, |chain| chain.data.address = u64::MAX - 255)),
    ("data-in-registers", |disk| {
        let registers = disk.base();
        read(disk, |chain| chain.data.address = registers);
    }),
    ("data-empty", |disk| read(disk, |chain| chain.data.len = 0)),
    ("data-odd", |disk| read(disk, |chain| chain.data.len = 100)),
    ("data-huge", |disk| {
        let last = disk.sectors.saturating_sub(1);
        request(disk, TYPE_READ, last, |chain| chain.data.len = u32::MAX - 511);
    }),
    ("data-read-only", |disk| read(disk, |chain| chain.data.flags = NEXT)),
    ("header-nowhere", |disk| read(disk, |chain| chain.header.address = NOWHERE)),
    ("header-short", |disk| read(disk, |chain| chain.header.len = 8)),
    ("header-empty", |disk| read(disk, |chain| chain.header.len = 0)),
    ("header-writable", |disk| read(disk, |chain| chain.header.flags = NEXT | WRITE)),
    ("header-alone", |disk| read(disk, |chain| chain.header.flags = 0)),
    ("status-nowhere", |disk| read(disk, |chain| chain.status.address = NOWHERE)),
    ("status-empty", |disk| read(disk, |chain| chain.status.len = 0)),
    ("status-read-only", |disk| read(disk, |chain| chain.status.flags = 0)),
    ("chain-of-one-loops", |disk| read(disk, |chain| chain.header.next = 0)),
    ("chain-of-three-loops", |disk| {
        read(disk, |chain| (chain.status.flags, chain.status.next) = (NEXT | WRITE, 0));
    }),
    ("next-out-of-range", |disk| read(disk, |chain| chain.data.next = u16::MAX)),
    ("indirect-not-negotiated", |disk| read(disk, |chain| chain.header.flags = INDIRECT)),
    ("type-unknown", |disk| request(disk, TYPE_UNKNOWN, 0, |_| {})),
    ("sector-beyond-end", |disk| {
        let end = disk.sectors;
        request(disk, TYPE_WRITE, end, |_| {});
    }),
    ("sector-wraps", |disk| request(disk, TYPE_WRITE, u64::MAX, |_| {})),
    ("sector-times-512-wraps", |disk| request(disk, TYPE_WRITE, 1 << 55, |_| {})),
    ("head-out-of-range", |disk| {
        disk.device.offer(u16::MAX);
        disk.device.publish();
    }),
    ("ring-overrun", |disk| {
        disk.device.overrun(0x8000);
        disk.device.publish();
    }),
    ("queue-nowhere", |disk| {
        disk.device.write(QUEUE_READY, 0);
        disk.device.write64(QUEUE_DESCRIPTORS, NOWHERE);
        disk.device.write(QUEUE_READY, 1);
        read(disk, |_| {});
    }),
    ("queue-size-zero", |disk| {
        disk.device.write(QUEUE_READY, 0);
        disk.device.write(QUEUE_SIZE, 0);
        disk.device.write(QUEUE_READY, 1);
        read(disk, |_| {});
    }),
    ("queue-size-huge", |disk| {
        disk.device.write(QUEUE_READY, 0);
        disk.device.write(QUEUE_SIZE, u32::MAX);
        disk.device.write(QUEUE_READY, 1);
        read(disk, |_| {});
    }),
    ("queue-unknown", |disk| disk.device.notify(u32::MAX)),
];

/// Tries every case on the disk and reports the results.
///
/// # Errors
/// Fails if the disk cannot be reset any more.
pub(crate) fn attack(disk: &mut Disk<'_>) -> Result<(), DiskError> {
    for (name, case) in CASES {
        disk.restart()?;
        case(disk);
        let used = disk.wait_for_used(ANSWER_LIMIT_US).is_some();
        let status = disk.device.status();
        disk.restart()?;
        let alive = disk.probe()?;
        port::print(Report::Hostile {
            case: Text::new(name.as_bytes()),
            used: used.into(),
            status: Hex(status.into()),
            alive: alive.into(),
        });
    }
    Ok(())
}
