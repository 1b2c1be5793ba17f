//! Ways to misbehave, for tests of the monitor.

use core::arch::asm;
use core::hint;

use crate::boot;
use crate::clock::{self, Clock};
use crate::demo::layout::Ram;
use crate::demo::plan::Crash;
use crate::demo::report::{Hex, Report, Space};
use crate::port;

/// Addresses that may be RAM but never a device. The first one outside RAM is probed.
const MMIO_CANDIDATES: [u64; 3] = [0xe000_0000, 0xf000_0000, 0xc800_0000];
/// A port without a device.
const PORT: u16 = 0x5678;
/// Offset of an access across the border of two pages.
const STRADDLE: u64 = 0xffc;

/// Misbehaves as planned. Returns only from [`Crash::Mmio`].
pub(crate) fn misbehave(crash: Crash, every_ms: u64, ram: &Ram, clock: &Clock) {
    match crash {
        Crash::Triple => {
            // SAFETY: the gates are no longer needed.
            unsafe {
                boot::remove_gates();
                asm!("ud2", options(noreturn));
            }
        }
        Crash::Hang => loop {
            hint::spin_loop();
        },
        Crash::Sleep if every_ms == 0 => clock::sleep_forever(),
        Crash::Sleep => loop {
            clock.sleep(every_ms.saturating_mul(1000));
        },
        Crash::Mmio => {
            let in_ram = |address: &u64| {
                ram.ranges().any(|(start, pages)| (start..start + pages * 4096).contains(address))
            };
            if let Some(base) = MMIO_CANDIDATES.into_iter().find(|address| !in_ram(address)) {
                probe_memory(base);
            }
            probe_port();
        }
    }
}

/// Writes all ones to `$address`, where there is no memory, reads it back and reports.
macro_rules! touch {
    ($address:expr, $type:ty) => {{
        let place = core::ptr::with_exposed_provenance_mut::<$type>($address as usize);
        // SAFETY: neither memory nor a device is there, and the address is aligned.
        let read = unsafe {
            place.write_volatile(!0);
            place.read_volatile()
        };
        report(Space::Mmio, $address, size_of::<$type>(), read.into());
    }};
}

fn probe_memory(base: u64) {
    touch!(base, u8);
    touch!(base, u16);
    touch!(base, u32);
    touch!(base, u64);

    let straddling = base + STRADDLE;
    let read: u64;
    // SAFETY: neither memory nor a device is there. The access is in assembly, because the address is not
    // aligned.
    unsafe {
        asm!("mov [{0}], {1}", in(reg) straddling, in(reg) !0u64, options(nostack, preserves_flags));
        asm!("mov {1}, [{0}]", in(reg) straddling, out(reg) read, options(nostack, preserves_flags));
    }
    report(Space::Mmio, straddling, 8, read);
}

fn probe_port() {
    port::write8(PORT, !0);
    report(Space::Pio, PORT.into(), 1, port::read8(PORT).into());
    let (word, double): (u16, u32);
    // SAFETY: the port has no device.
    unsafe {
        asm!("out dx, ax", in("dx") PORT, in("ax") !0u16, options(nostack, nomem, preserves_flags));
        asm!("in ax, dx", in("dx") PORT, out("ax") word, options(nostack, nomem, preserves_flags));
        asm!("out dx, eax", in("dx") PORT, in("eax") !0u32, options(nostack, nomem, preserves_flags));
        asm!("in eax, dx", in("dx") PORT, out("eax") double, options(nostack, nomem, preserves_flags));
    }
    report(Space::Pio, PORT.into(), 2, word.into());
    report(Space::Pio, PORT.into(), 4, double.into());
}

fn report(space: Space, address: u64, size: usize, read: u64) {
    port::print(Report::Probe { space, address: Hex(address), size: size as u64, read: Hex(read) });
}
