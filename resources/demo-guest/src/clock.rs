//! Time by the time stamp counter, and pauses by the local APIC's timer.
//!
//! One spell of counting both against each other, about a millisecond long, gives the timer's frequency when
//! that of the counter is known. If it is not, the timer's is taken for the 1 GHz of KVM.

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

/// Counter ticks that the calibration takes: 1 to 2 ms.
const CALIBRATION_TICKS: u64 = 4_000_000;
/// The timer's frequency in KVM.
const USUAL_TIMER_KHZ: u64 = 1_000_000;
/// What the counter's frequency is taken for if nothing tells it.
const USUAL_TSC_KHZ: u64 = 2_000_000;
/// Pauses shorter than this are spun away.
const SHORTEST_HALT_US: u64 = 20;
/// The longest time to set the timer to at once.
const LONGEST_HALT_US: u64 = 1_000_000;

/// The guest's clock. There is one.
pub(crate) struct Clock {
    pub(crate) tsc_khz: u64,
    /// 0 if there is no timer.
    pub(crate) timer_khz: u64,
}

/// A register of the local APIC.
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

/// The time stamp counter.
pub(crate) fn now() -> u64 {
    // SAFETY: every 64-bit processor has the counter, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

impl Clock {
    /// Set up the local APIC and find out the frequencies.
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

    /// Microseconds that have gone by since the counter was at `since`.
    pub(crate) fn elapsed_us(&self, since: u64) -> u64 {
        let ticks = now().saturating_sub(since);
        ticks / self.tsc_khz * 1000 + ticks % self.tsc_khz * 1000 / self.tsc_khz
    }

    /// Counter ticks in a time.
    pub(crate) fn ticks(&self, us: u64) -> u64 {
        us.saturating_mul(self.tsc_khz) / 1000
    }

    /// Idle until the counter has reached `deadline`.
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

    /// Idle for `us` microseconds.
    pub(crate) fn sleep(&self, us: u64) {
        self.sleep_until(now().saturating_add(self.ticks(us)));
    }
}

/// Idle for ever.
pub(crate) fn sleep_forever() -> ! {
    write(LVT_TIMER, MASKED);
    loop {
        halt();
    }
}

/// Halt until an interrupt has come in, through the gate at [`HALT_VECTOR`](crate::boot::HALT_VECTOR).
fn halt() {
    // SAFETY: the gate leaves all registers, flags and this ring's memory as they are.
    unsafe { asm!("int3", options(nostack)) }
}

/// Ticks of the counter and of the timer in the same time; `None` if there is no timer.
fn calibrate() -> Option<(u64, u64)> {
    // 0x10 to 0x15: an integrated APIC (Intel SDM, volume 3, section 12.4.8).
    if !(0x10..0x20).contains(&(read(VERSION) & 0xff)) {
        return None;
    }
    write(SPURIOUS, APIC_ENABLED | SPURIOUS_VECTOR as u32);
    write(TASK_PRIORITY, 0);
    for lint in LVT_LINT {
        write(lint, MASKED);
    }
    write(LVT_TIMER, MASKED);
    write(DIVIDE, DIVIDE_BY_1);
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

/// The frequency as the processor (leaf 0x15) or the hypervisor (leaf 0x4000_0010) tells it.
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
