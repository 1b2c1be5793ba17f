//! Time from the time stamp counter, and pauses with the local APIC's timer.
//!
//! If the counter's frequency is known, counting both for about a millisecond gives the timer's frequency. If
//! not, the timer is assumed to have KVM's 1 GHz.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc};
use core::hint;

use crate::boot::{SPURIOUS_VECTOR, TIMER_VECTOR};

const APIC: usize = 0xfee0_0000;
const VERSION: usize = 0x30;
const TASK_PRIORITY: usize = 0x80;
const SPURIOUS: usize = 0xf0;
const LVT_TIMER: usize = 0x320;
const LVT_LINT: [usize; 2] = [0x350, 0x360];
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
const APIC_ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;

/// Counter ticks for the calibration: 1 to 2 ms.
const CALIBRATION_TICKS: u64 = 4_000_000;
/// The timer's frequency in KVM.
const USUAL_TIMER_KHZ: u64 = 1_000_000;
/// The assumed frequency of the counter, if it is unknown.
const USUAL_TSC_KHZ: u64 = 2_000_000;
/// Pauses shorter than this are busy loops.
const SHORTEST_HALT_US: u64 = 20;
/// Longest time to set the timer to.
const LONGEST_HALT_US: u64 = 1_000_000;

/// The guest's only clock.
pub(crate) struct Clock {
    pub(crate) tsc_khz: u64,
    /// The timer's frequency in kHz, or 0 if there is no timer.
    pub(crate) timer_khz: u64,
}

/// Returns a register of the local APIC.
fn register(offset: usize) -> *mut u32 {
    core::ptr::with_exposed_provenance_mut(APIC + offset)
}

fn read(offset: usize) -> u32 {
    // SAFETY: the APIC's page is mapped, and nothing else lies there.
    unsafe { register(offset).read_volatile() }
}

fn write(offset: usize, value: u32) {
    // SAFETY: as for reads; no APIC register accesses memory.
    unsafe { register(offset).write_volatile(value) }
}

/// Returns the time stamp counter.
pub(crate) fn now() -> u64 {
    // SAFETY: every 64-bit processor has the counter, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

impl Clock {
    /// Sets up the local APIC and finds out the frequencies.
    pub(crate) fn start(tsc_khz: Option<u32>) -> Self {
        let told = tsc_khz.map(u64::from).or_else(tsc_khz_of_cpuid);
        match calibrate() {
            Some((counter, timer)) => {
                let tsc_khz = told.unwrap_or(USUAL_TIMER_KHZ * counter / timer);
                Self { tsc_khz, timer_khz: tsc_khz * timer / counter }
            }
            None => Self { tsc_khz: told.unwrap_or(USUAL_TSC_KHZ), timer_khz: 0 },
        }
    }

    /// Returns the microseconds since the counter was at `since`.
    pub(crate) fn elapsed_us(&self, since: u64) -> u64 {
        let ticks = now().saturating_sub(since);
        ticks / self.tsc_khz * 1000 + ticks % self.tsc_khz * 1000 / self.tsc_khz
    }

    /// Returns the counter ticks of a time.
    pub(crate) fn ticks(&self, us: u64) -> u64 {
        us.saturating_mul(self.tsc_khz) / 1000
    }

    /// Idles until the counter has reached `deadline`.
    pub(crate) fn sleep_until(&self, deadline: u64) {
        loop {
            let left = deadline.saturating_sub(now());
            if left == 0 {
                return;
            }
            let us =
                (left / self.tsc_khz * 1000 + left % self.tsc_khz * 1000 / self.tsc_khz).min(LONGEST_HALT_US);
            if self.timer_khz == 0 || us < SHORTEST_HALT_US {
                hint::spin_loop();
                continue;
            }
            let count = (us * self.timer_khz / 1000).clamp(1, u32::MAX.into());
            write(LVT_TIMER, TIMER_VECTOR as u32);
            write(INITIAL_COUNT, count as u32);
            halt();
        }
    }

    /// Idles for `us` microseconds.
    pub(crate) fn sleep(&self, us: u64) {
        self.sleep_until(now().saturating_add(self.ticks(us)));
    }
}

/// Idles for ever.
pub(crate) fn sleep_forever() -> ! {
    write(LVT_TIMER, MASKED);
    loop {
        halt();
    }
}

/// Halts until an interrupt arrives, through the gate at [`HALT_VECTOR`](crate::boot::HALT_VECTOR).
fn halt() {
    // SAFETY: the gate leaves all registers, flags and this ring's memory as they are.
    unsafe { asm!("int3", options(nostack)) }
}

/// Sets up the local APIC of this processor: on, no interrupts but those of its timer.
pub(crate) fn set_up_apic() {
    write(SPURIOUS, APIC_ENABLED | SPURIOUS_VECTOR as u32);
    write(TASK_PRIORITY, 0);
    for lint in LVT_LINT {
        write(lint, MASKED);
    }
    write(LVT_TIMER, MASKED);
    write(DIVIDE, DIVIDE_BY_1);
}

/// Has all other processors start at a page below 1 MiB, in real mode: INIT, then SIPI.
pub(crate) fn start_others(page: u8) {
    const COMMAND: usize = 0x300;
    const ALL_BUT_SELF: u32 = 0b11 << 18;
    const ASSERT: u32 = 1 << 14;
    const INIT: u32 = 0b101 << 8;
    const STARTUP: u32 = 0b110 << 8;
    const PENDING: u32 = 1 << 12;
    for command in [INIT, STARTUP | u32::from(page)] {
        write(COMMAND, ALL_BUT_SELF | ASSERT | command);
        while read(COMMAND) & PENDING != 0 {
            hint::spin_loop();
        }
    }
}

/// Returns the ticks of the counter and of the timer in the same time, or `None` if there is no timer.
fn calibrate() -> Option<(u64, u64)> {
    // 0x10 to 0x15: an integrated APIC (Intel SDM, volume 3, section 12.4.8).
    if !(0x10..0x20).contains(&(read(VERSION) & 0xff)) {
        return None;
    }
    set_up_apic();
    write(INITIAL_COUNT, u32::MAX);

    let timer_start = read(CURRENT_COUNT);
    let counter_start = now();
    while now().wrapping_sub(counter_start) < CALIBRATION_TICKS {
        hint::spin_loop();
    }
    let timer_end = read(CURRENT_COUNT);
    let counter = now().wrapping_sub(counter_start);
    let timer = u64::from(timer_start.saturating_sub(timer_end));
    (timer > 0).then_some((counter, timer))
}

/// Returns the frequency that the processor (leaf 0x15) or the hypervisor (leaf 0x4000_0010) reports.
fn tsc_khz_of_cpuid() -> Option<u64> {
    const CRYSTAL: u32 = 0x15;
    const HYPERVISOR: u32 = 0x4000_0000;
    const TIMING: u32 = 0x4000_0010;
    let told_by_processor = || {
        let leaf = (__cpuid(0).eax >= CRYSTAL).then(|| __cpuid(CRYSTAL))?;
        let khz = u64::from(leaf.ecx) * u64::from(leaf.ebx);
        khz.checked_div(u64::from(leaf.eax) * 1000)
    };
    let told_by_hypervisor = || {
        let in_hypervisor = __cpuid(1).ecx >> 31 != 0;
        let has_leaf = in_hypervisor && (TIMING..HYPERVISOR + 0x100).contains(&__cpuid(HYPERVISOR).eax);
        has_leaf.then(|| u64::from(__cpuid(TIMING).eax))
    };
    told_by_hypervisor().filter(|khz| *khz > 0).or_else(told_by_processor).filter(|khz| *khz > 0)
}
