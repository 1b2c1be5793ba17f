//! Tests of pages that KVM writes itself: they are merged repeatedly while KVM writes. Afterwards, KVM's
//! writes must be there, and in no other VM. See the table in docs/design.md.

#![expect(unsafe_code, reason = "reads and copies guest pages by address")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use samepage_sharing::calls::Linux;
use samepage_sharing::engine::{Engine, Settings};
use samepage_sharing::store::FrameStore;
use samepage_sharing::{PAGE_SIZE, Ram};

use super::memory::VmMemory;
use super::{create_machine, processors};
use crate::HugePages;
use crate::boot::ImageSource;
use crate::boot::load;
use crate::boot::test_images::pvh_elf;
use crate::hypervisor::Hypervisor;
use crate::x86::registers;
use crate::x86::topology::Topology;

const BYTES: u64 = 4 << 20;
/// Page numbers: the page for the time, and the page for the vCPUs' waiting time.
const CLOCK: u32 = 0x200;
const STEAL: u32 = 0x201;
/// `MSR_KVM_SYSTEM_TIME_NEW` and `MSR_KVM_STEAL_TIME` (Documentation/virt/kvm/x86/msr.rst).
const MSRS: [(u32, u32); 2] = [(0x4b56_4d01, CLOCK), (0x4b56_4d03, STEAL)];
const SECOND: u64 = 1_000_000_000;
const ROUNDS: u64 = 2000;

/// A VM whose vCPU leaves the guest in a loop, by an access to a port.
struct Machine {
    vcpu: VcpuFd,
    kvm: Arc<VmFd>,
    memory: VmMemory,
}

impl Machine {
    fn new(hypervisor: &Hypervisor) -> Self {
        let memory = VmMemory::reserve(BYTES, true, HugePages::Off).unwrap();
        // out 0x10, al; jmp back
        let kernel = ImageSource::Bytes { name: "loop", bytes: pvh_elf(b"\xe6\x10\xeb\xfc").into() };
        let entry = load::load(memory.view(), BYTES, None, &kernel, None, "").unwrap().entry;
        registers::write_tables(memory.view(), entry).unwrap();
        let kvm = Arc::new(create_machine(hypervisor).unwrap());
        memory.register(&kvm, false).unwrap();
        kvm.create_irq_chip().unwrap();
        let vcpu = processors::create_one(
            hypervisor,
            &kvm,
            hypervisor.supported_cpuid(),
            Topology::new(1, false),
            0,
        )
        .unwrap();
        registers::set_up(&vcpu, entry).unwrap();
        Self { vcpu, kvm, memory }
    }

    /// Makes KVM use its pages. Returns whether it can.
    fn keep_pages(&self) -> bool {
        MSRS.iter().all(|&(index, page)| {
            let data = (u64::from(page) * PAGE_SIZE as u64) | 1;
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            self.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).is_ok_and(|count| count == 1)
        })
    }

    fn run(&mut self) {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => return,
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                other => panic!("the guest left for {other:?}"),
            }
        }
    }

    fn word(&self, page: u32, offset: usize) -> u64 {
        let address = self.memory.ram().range(page, 1).page(0).wrapping_add(offset);
        // SAFETY: within the page, at a multiple of eight bytes. KVM writes there, but not at this moment.
        unsafe { address.cast::<u64>().read_volatile() }
    }

    /// Returns the versions of both pages, and the time in the clock page.
    fn read(&self) -> (u32, u32, u64) {
        (self.word(CLOCK, 0) as u32, self.word(STEAL, 8) as u32, self.word(CLOCK, 16))
    }
}

/// Copies the machine's pages to another VM.
fn copy(from: &Ram, to: &Ram) {
    for page in [CLOCK, STEAL] {
        let (from, to) = (from.range(page, 1).page(0), to.range(page, 1).page(0).cast_mut());
        for offset in (0..PAGE_SIZE).step_by(8) {
            // SAFETY: both are pages of guest RAM. KVM may write to the first meanwhile.
            unsafe {
                to.add(offset).cast::<u64>().write_volatile(from.add(offset).cast::<u64>().read_volatile())
            };
        }
    }
}

#[test]
fn pages_that_kvm_writes_to_lose_no_write_when_they_are_merged() {
    let Ok(hypervisor) = Hypervisor::open() else {
        eprintln!("SKIPPED: there is no KVM here");
        return;
    };
    let mut machine = Machine::new(&hypervisor);
    if !machine.keep_pages() {
        eprintln!("SKIPPED: this KVM has no clock page or no page of steal time");
        return;
    }
    machine.run();
    let first = machine.read();
    machine.run();
    let moves = machine.read().1 != first.1;
    if !moves {
        eprintln!("SKIPPED in part: this KVM does not fill the page of steal time");
    }
    let store = FrameStore::create(1 << 16).unwrap();
    let calls = match Linux::open(Arc::clone(store.file())) {
        Ok(calls) => calls,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return;
        }
    };
    let settings = Settings { settle: false, cpu_percent: 100.0, ..Settings::default() };
    let mut engine = Engine::new(&settings, store, Box::new(calls)).unwrap();
    let other = Arc::new(Ram::reserve(BYTES as usize).unwrap());
    other.use_small_pages().unwrap();
    let ram = Arc::clone(machine.memory.ram());
    for ram in [&ram, &other] {
        engine.add(Arc::clone(ram), None, Box::new(|error| panic!("{error}"))).unwrap();
    }
    let mut merged = 0;
    let pass = |engine: &mut Engine| while engine.pass_step().is_none() {};
    // First in turns: both pages are merged after each write of KVM.
    for round in 1..=50 {
        copy(&ram, &other);
        pass(&mut engine);
        merged += engine.statistics().pages_sharing;
        let (clock, steal, _) = machine.read();
        machine.kvm.set_clock(&kvm_clock_data { clock: round * SECOND, ..Default::default() }).unwrap();
        machine.run();
        let now = machine.read();
        assert!(now.0 > clock && now.2 >= round * SECOND, "round {round}: the clock was {clock}, is {now:?}");
        assert!(!moves || now.1 > steal, "round {round}: steal time was {steal}, is {now:?}");
    }
    assert!(merged >= 50, "the pages were hardly ever merged");
    // Then at the same time.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (machine, done) = (&mut machine, &done);
        scope.spawn(move || {
            for round in 51..51 + ROUNDS {
                let (clock, steal, _) = machine.read();
                machine
                    .kvm
                    .set_clock(&kvm_clock_data { clock: round * SECOND, ..Default::default() })
                    .unwrap();
                machine.run();
                let now = machine.read();
                let whole = now.0 > clock && now.2 >= round * SECOND && (!moves || now.1 > steal);
                if !whole {
                    done.store(true, Ordering::SeqCst);
                }
                assert!(whole, "round {round}: {clock} and {steal} became {now:?}");
            }
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            copy(&ram, &other);
            pass(&mut engine);
        }
    });
    let report = engine.audit().unwrap();
    assert!(report.passed(), "{report:#?}");
    eprintln!("merged {} pages; clock and steal time {:?}", engine.statistics().merges, machine.read());
}
