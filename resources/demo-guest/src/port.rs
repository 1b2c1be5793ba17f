//! Port I/O, and its uses: the serial port, the interrupt controller and the reset line.
//!
//! Ring 3 may use ports, because the I/O bitmap of the boot code permits all of them.

use core::arch::asm;
use core::hint;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::demo::report::Report;

const SERIAL: u16 = 0x3f8;
const SERIAL_INTERRUPTS: u16 = SERIAL + 1;
const SERIAL_LINE_CONTROL: u16 = SERIAL + 3;
const SERIAL_LINE_STATUS: u16 = SERIAL + 5;
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
const KEYBOARD: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// Writes a byte to a port.
pub(crate) fn write8(port: u16, value: u8) {
    // SAFETY: no device here accesses memory on behalf of a port write.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, nomem, preserves_flags)) }
}

/// Reads a byte from a port.
pub(crate) fn read8(port: u16) -> u8 {
    let value;
    // SAFETY: as for writes.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem, preserves_flags)) }
    value
}

/// Brings the serial port and the interrupt controllers into a known state: 8 data bits, no interrupts.
pub(crate) fn init() {
    write8(SERIAL_LINE_CONTROL, 3);
    write8(SERIAL_INTERRUPTS, 0);
    for mask in PIC_MASKS {
        write8(mask, 0xff);
    }
}

/// Whether a processor prints.
static PRINTING: AtomicBool = AtomicBool::new(false);
/// How often a processor looks whether another one has printed its line. A processor that has faulted while it printed
/// must not keep others from reporting.
const LOOKS: u32 = 1 << 28;

/// Prints a report, as a whole line. The transmitter is assumed to be always ready: reading its status would cost as much as
/// the byte itself, and a monitor's serial port never blocks.
pub(crate) fn print(report: Report) {
    for _ in 0..LOOKS {
        if !PRINTING.swap(true, Ordering::Acquire) {
            break;
        }
        hint::spin_loop();
    }
    report.write(&mut |piece| piece.iter().for_each(|byte| write8(SERIAL, *byte)));
    PRINTING.store(false, Ordering::Release);
}

/// Returns a byte that has arrived on the serial port.
pub(crate) fn receive() -> Option<u8> {
    (read8(SERIAL_LINE_STATUS) & 1 != 0).then(|| read8(SERIAL))
}

/// The scan codes of Ctrl, Alt and Delete, the last in the lowest byte.
const CTRL_ALT_DEL: u32 = 0x14_11_e0_71;

/// Returns whether Ctrl-Alt-Del has been pressed. `codes` are the last scan codes.
pub(crate) fn ctrl_alt_del(codes: &mut u32) -> bool {
    /// The value that a bus returns without a controller.
    const NOBODY: u8 = 0xff;
    let has_code = |status: u8| status != NOBODY && status & 1 != 0;
    let mut pressed = false;
    while has_code(read8(I8042_COMMAND)) {
        *codes = *codes << 8 | u32::from(read8(KEYBOARD));
        pressed |= *codes == CTRL_ALT_DEL;
    }
    pressed
}

/// Reads the keyboard controller's status.
pub(crate) fn look_at_keyboard() {
    read8(I8042_COMMAND);
}

/// Resets the machine. Returns if there is no reset line at this place.
pub(crate) fn reset() {
    write8(I8042_COMMAND, I8042_RESET);
}
