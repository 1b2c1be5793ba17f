//! The life of a VM's vCPUs, in one place.
//!
//! ```text
//!            start/resume             stop, fail, or a vCPU's own end
//!  HOLD  ───────────────────▶  RUN  ─────────────────────────────────▶  END
//!   ▲ │          pause          │                                       ▲
//!   │ └─────────────────────────┼───────────────────────────────────────┘
//!   └───────────────────────────┘
//! ```
//!
//! The VM has a *goal*. Each vCPU thread has a *phase* and follows the goal: it is held, it runs, or it has
//! ended for good. The first thread that ends the VM decides the reason, once. A VM has ended when its goal
//! is END and every vCPU thread has ended. [`Control::ended`] then becomes readable and stays so.
//!
//! Kicking a vCPU makes it leave KVM_RUN. `immediate_exit` is set, so that KVM_RUN returns immediately if it
//! has not begun. A signal makes it return if it has. Both happen under the lock under which the vCPU thread
//! clears `immediate_exit` before it enters KVM_RUN, so no kick is lost. A vCPU that waits for its start by the guest is
//! in KVM_RUN as well, and is kicked in the same way.
//!
//! Beside its goal, a VM may be *withheld*, because the host runs short of memory. Then its vCPU threads are held though
//! the goal is RUN: the user sees a running VM that gets no processor. The end of a VM overrides both.
//!
//! A change of the goal wakes held vCPU threads, and the last thread that follows it wakes who waits for that. So the
//! work for each change is proportional to the number of vCPUs.

#![expect(unsafe_code, reason = "signals vCPU threads and writes to the page they share with KVM")]

use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use libc::{c_int, c_void, pthread_t, siginfo_t};
use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{VmEnd, VmState};

/// The common goal of all vCPUs of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Hold,
    Run,
    End,
}

/// The phase of one vCPU thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Held,
    Running,
    Gone,
}

/// The means to kick a vCPU thread: its id, and `immediate_exit` in the page it shares with KVM.
struct KickTarget {
    thread: pthread_t,
    /// The kernel's number of the thread.
    id: u32,
    immediate_exit: NonNull<u8>,
}

// SAFETY: the pointer is used only with atomic accesses, and only while its vCPU thread lives. The thread
// removes the target under the lock before it unmaps the page.
unsafe impl Send for KickTarget {}

impl KickTarget {
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is in the vCPU's shared page, which the vCPU's thread keeps mapped as long as this
        // target exists. All users, including the kernel, access it as a single byte.
        unsafe { AtomicU8::from_ptr(self.immediate_exit.as_ptr()) }
    }

    fn kick(&self) {
        self.immediate_exit().store(1, Ordering::Release);
        // SAFETY: the thread lives as long as this target exists (see above); the signal has a handler.
        unsafe { libc::pthread_kill(self.thread, kick_signal()) };
    }

    /// Returns the CPU time of the thread, in the guest and on its behalf.
    fn cpu_time(&self) -> Duration {
        let mut clock = 0;
        // SAFETY: the thread lives as long as this target exists.
        let error = unsafe { libc::pthread_getcpuclockid(self.thread, &raw mut clock) };
        if error == 0 { read_clock(clock) } else { Duration::ZERO }
    }
}

/// Returns the time of a kernel clock, or zero if the clock does not exist.
fn read_clock(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is a valid place for the answer.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

struct Vcpu {
    phase: Phase,
    target: Option<KickTarget>,
}

struct State {
    goal: Goal,
    /// The vCPUs are held although the goal is RUN.
    is_withheld: bool,
    vcpus: Vec<Vcpu>,
    /// How many of them are running, and how many are gone.
    running: usize,
    gone: usize,
    end: Option<VmEnd>,
    /// CPU time of the vCPUs that have ended.
    spent: Duration,
}

impl State {
    fn kick_all(&self) {
        self.vcpus.iter().filter_map(|vcpu| vcpu.target.as_ref()).for_each(KickTarget::kick);
    }

    /// Whether vCPUs are to run.
    #[cfg(test)]
    fn runs(&self) -> bool {
        self.goal == Goal::Run && !self.is_withheld
    }

    fn set_phase(&mut self, number: usize, phase: Phase) {
        for (in_phase, count) in [(Phase::Running, &mut self.running), (Phase::Gone, &mut self.gone)] {
            *count -= usize::from(self.vcpus[number].phase == in_phase);
            *count += usize::from(phase == in_phase);
        }
        self.vcpus[number].phase = phase;
    }

    fn has_ended(&self) -> bool {
        self.end.is_some() && self.gone == self.vcpus.len()
    }
}

/// The control of a VM, shared with its vCPU threads and with every thread that may end it.
pub(super) struct Control {
    state: Mutex<State>,
    /// Notified when the goal changes, for vCPU threads.
    goal_changed: Condvar,
    /// Notified when no vCPU runs any more, and when all are gone.
    settled: Condvar,
    /// Written when the goal becomes END. Threads that wait on behalf of a vCPU then stop waiting.
    closing: EventFd,
    /// Written when the VM has ended.
    ended: EventFd,
}

impl Control {
    /// Returns the control of a held VM without vCPUs. Fails if the process is out of files.
    pub(super) fn new() -> io::Result<Self> {
        install_kick_handler()?;
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self {
            state: Mutex::new(State {
                goal: Goal::Hold,
                is_withheld: false,
                vcpus: Vec::new(),
                running: 0,
                gone: 0,
                end: None,
                spent: Duration::ZERO,
            }),
            goal_changed: Condvar::new(),
            settled: Condvar::new(),
            closing: event()?,
            ended: event()?,
        })
    }

    pub(super) fn closing(&self) -> &EventFd {
        &self.closing
    }

    pub(super) fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Adds a held vCPU and returns its number. The vCPU's thread must [`Control::join`].
    pub(super) fn add_vcpu(&self) -> usize {
        let mut state = self.state.lock();
        state.vcpus.push(Vcpu { phase: Phase::Held, target: None });
        state.vcpus.len() - 1
    }

    /// Counts a vCPU as ended, because its thread could not be created.
    pub(super) fn forget_vcpu(&self, number: usize) {
        self.leave(number);
    }

    /// Runs a held VM. Has no effect on a running or ended VM.
    pub(super) fn run(&self) {
        let mut state = self.state.lock();
        if state.goal == Goal::Hold {
            state.goal = Goal::Run;
            self.goal_changed.notify_all();
        }
    }

    /// Holds a running VM. On return no vCPU is in KVM_RUN or in a device model.
    pub(super) fn hold(&self) {
        let mut state = self.state.lock();
        if state.goal == Goal::Run {
            state.goal = Goal::Hold;
            state.kick_all();
        }
        self.settled.wait_while(&mut state, |state| state.goal == Goal::Hold && state.running > 0);
    }

    /// Holds the vCPUs whatever the goal, until [`Control::release`]. Does not wait.
    pub(super) fn withhold(&self) {
        let mut state = self.state.lock();
        if !state.is_withheld {
            state.is_withheld = true;
            state.kick_all();
        }
    }

    /// Lets the vCPUs follow the goal again.
    pub(super) fn release(&self) {
        let mut state = self.state.lock();
        if state.is_withheld {
            state.is_withheld = false;
            self.goal_changed.notify_all();
        }
    }

    /// Whether no vCPU is in KVM_RUN or in a device model, and none will be until the VM is resumed or released.
    #[cfg(test)]
    fn is_still(&self) -> bool {
        let state = self.state.lock();
        state.running == 0 && !state.runs()
    }

    /// Returns the numbers of the vCPUs' threads.
    pub(super) fn threads(&self) -> Vec<u32> {
        self.state.lock().vcpus.iter().filter_map(|vcpu| Some(vcpu.target.as_ref()?.id)).collect()
    }

    /// Ends the VM for this reason, unless it is already ending. Does not wait.
    pub(super) fn finish(&self, end: VmEnd) {
        let mut state = self.state.lock();
        if state.goal == Goal::End {
            return;
        }
        state.goal = Goal::End;
        state.end = Some(end);
        raise(&self.closing);
        state.kick_all();
        self.goal_changed.notify_all();
        // Who waits for a pause need not wait any longer.
        self.settled.notify_all();
        self.note_end(&state);
    }

    /// Returns the present state of the VM.
    pub(super) fn state(&self) -> VmState {
        match self.state.lock().goal {
            Goal::Hold => VmState::Held,
            Goal::Run => VmState::Running,
            Goal::End => VmState::Ended,
        }
    }

    /// Returns the CPU time of all vCPUs so far, including those that have ended.
    pub(super) fn cpu_time(&self) -> Duration {
        let state = self.state.lock();
        let running = state.vcpus.iter().filter_map(|vcpu| vcpu.target.as_ref());
        running.map(KickTarget::cpu_time).sum::<Duration>() + state.spent
    }

    /// Returns how the VM ended, or `None` if it has not ended.
    pub(super) fn end(&self) -> Option<VmEnd> {
        let state = self.state.lock();
        if state.has_ended() { state.end.clone() } else { None }
    }

    /// Waits until the VM has ended.
    pub(super) fn wait(&self) -> VmEnd {
        let mut state = self.state.lock();
        loop {
            if let Some(end) = &state.end
                && state.has_ended()
            {
                return end.clone();
            }
            self.settled.wait(&mut state);
        }
    }

    /// Registers the calling thread as the thread of a vCPU. The vCPU ends when the returned value is
    /// dropped.
    ///
    /// # Safety
    /// `immediate_exit` stays valid until the returned value is dropped.
    pub(super) unsafe fn join(&self, number: usize, immediate_exit: NonNull<u8>) -> Member<'_> {
        // SAFETY: both calls always succeed and name the calling thread.
        let (thread, id) = unsafe { (libc::pthread_self(), libc::gettid()) };
        let id = u32::try_from(id).unwrap_or(0);
        self.state.lock().vcpus[number].target = Some(KickTarget { thread, id, immediate_exit });
        Member { control: self, number }
    }

    fn leave(&self, number: usize) {
        let mut state = self.state.lock();
        let target = state.vcpus[number].target.take();
        state.spent += target.map_or(Duration::ZERO, |target| target.cpu_time());
        state.set_phase(number, Phase::Gone);
        if state.running == 0 {
            self.settled.notify_all();
        }
        self.note_end(&state);
    }

    fn note_end(&self, state: &State) {
        if state.has_ended() {
            raise(&self.ended);
            self.settled.notify_all();
        }
    }
}

fn raise(event: &EventFd) {
    // Writing fails only if the event counter is full. Then it is readable anyway.
    let _ = event.write(1);
}

/// The membership of a vCPU thread in the VM.
pub(super) struct Member<'a> {
    control: &'a Control,
    number: usize,
}

impl Member<'_> {
    /// Waits while the VM is held. Returns `None` if the vCPU must end. Otherwise the vCPU may run, and the
    /// answer is whether it was held. A vCPU calls this after each interruption of KVM_RUN.
    pub(super) fn may_run(&self) -> Option<bool> {
        let mut state = self.control.state.lock();
        let mut was_held = state.vcpus[self.number].phase == Phase::Held;
        loop {
            match state.goal {
                Goal::Run if !state.is_withheld => {
                    state.set_phase(self.number, Phase::Running);
                    if let Some(target) = &state.vcpus[self.number].target {
                        target.immediate_exit().store(0, Ordering::Release);
                    }
                    return Some(was_held);
                }
                Goal::End => return None,
                Goal::Run | Goal::Hold => {
                    if state.vcpus[self.number].phase != Phase::Held {
                        was_held = true;
                        state.set_phase(self.number, Phase::Held);
                        if state.running == 0 {
                            self.control.settled.notify_all();
                        }
                    }
                    self.control.goal_changed.wait(&mut state);
                }
            }
        }
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let text = "a vCPU thread of samepage panicked; this is a defect of samepage".to_owned();
            self.control.finish(VmEnd::Failed(text));
        }
        self.control.leave(self.number);
    }
}

/// The signal that makes KVM_RUN return.
pub(super) fn kick_signal() -> c_int {
    SIGRTMIN() + 1
}

/// Installs the handler of the kick signal, once for the process.
fn install_kick_handler() -> io::Result<()> {
    extern "C" fn interrupted(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(kick_signal(), interrupted).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread::JoinHandle;

    /// A vCPU that spins in place of KVM_RUN until it is kicked.
    fn spawn(control: &Arc<Control>) -> JoinHandle<u32> {
        let number = control.add_vcpu();
        let control = control.clone();
        std::thread::spawn(move || {
            let byte = AtomicU8::new(0);
            // SAFETY: `byte` is dropped after `member`.
            let member = unsafe { control.join(number, NonNull::from(&byte).cast()) };
            let mut runs = 0;
            while member.may_run().is_some() {
                runs += 1;
                while byte.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
            }
            drop(member);
            runs
        })
    }

    fn is_readable(event: &EventFd) -> bool {
        let readable = event.read().is_ok();
        if readable {
            event.write(1).unwrap();
        }
        readable
    }

    #[test]
    fn a_vm_is_held_runs_pauses_and_ends_once() {
        let control = Arc::new(Control::new().unwrap());
        let threads = [spawn(&control), spawn(&control)];
        assert!(control.end().is_none());
        for _ in 0..100 {
            control.run();
            control.hold();
            assert!(control.state.lock().vcpus.iter().all(|vcpu| vcpu.phase == Phase::Held));
        }
        control.run();
        assert!(!is_readable(control.ended()));

        control.finish(VmEnd::Reset);
        control.finish(VmEnd::Stopped);
        assert!(matches!(control.wait(), VmEnd::Reset));
        assert!(matches!(control.end(), Some(VmEnd::Reset)));
        assert!(is_readable(control.ended()) && is_readable(control.closing()));
        for thread in threads {
            thread.join().unwrap();
        }
        control.run();
        control.hold();
    }

    #[test]
    fn a_withheld_vm_does_not_run_until_it_is_released_or_ends() {
        let control = Arc::new(Control::new().unwrap());
        let threads = [spawn(&control), spawn(&control)];
        let running = || control.state.lock().running;
        let settles = |still: bool| {
            while control.is_still() != still || running() != if still { 0 } else { 2 } {
                std::thread::yield_now();
            }
        };
        control.withhold();
        control.run();
        assert_eq!(control.state(), VmState::Running);
        settles(true);
        // A pause neither waits for the release nor is undone by it.
        control.hold();
        control.release();
        settles(true);
        control.run();
        settles(false);
        control.withhold();
        control.withhold();
        settles(true);
        control.release();
        settles(false);
        assert_eq!(control.threads().len(), 2);

        control.withhold();
        control.finish(VmEnd::Stopped);
        assert!(matches!(control.wait(), VmEnd::Stopped));
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(control.threads().is_empty());
    }

    #[test]
    fn many_vcpus_follow_every_goal_and_the_first_end_counts() {
        let control = Arc::new(Control::new().unwrap());
        let threads: Vec<_> = (0..64).map(|_| spawn(&control)).collect();
        for _ in 0..20 {
            control.run();
            control.hold();
            let state = control.state.lock();
            assert_eq!((state.running, state.gone), (0, 0));
        }
        control.run();
        // One holds while another ends: neither waits for ever, and one reason remains.
        let other = control.clone();
        let holder = std::thread::spawn(move || other.hold());
        let enders: Vec<_> = [VmEnd::PowerOff, VmEnd::Reset, VmEnd::Stopped]
            .map(|end| (control.clone(), end))
            .map(|(control, end)| std::thread::spawn(move || control.finish(end)))
            .into();
        let end = control.wait();
        for thread in enders {
            thread.join().unwrap();
        }
        holder.join().unwrap();
        assert_eq!((control.end(), control.wait()), (Some(end.clone()), end));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(control.state.lock().gone, 64);
    }

    #[test]
    fn cpu_time_counts_while_vcpus_run_and_stays_when_they_are_gone() {
        let control = Arc::new(Control::new().unwrap());
        let threads = [spawn(&control), spawn(&control)];
        control.run();
        while control.cpu_time() < Duration::from_millis(5) {
            std::thread::yield_now();
        }
        control.hold();
        let held = control.cpu_time();
        control.finish(VmEnd::Stopped);
        control.wait();
        let spent = control.cpu_time();
        assert!(spent >= held, "{held:?} while held, {spent:?} at the end");
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(control.cpu_time(), spent);
    }

    #[test]
    fn a_vm_that_never_ran_can_end() {
        let control = Arc::new(Control::new().unwrap());
        let thread = spawn(&control);
        control.finish(VmEnd::Stopped);
        assert!(matches!(control.wait(), VmEnd::Stopped));
        assert_eq!(thread.join().unwrap(), 0);
    }

    #[test]
    fn a_vcpu_knows_whether_it_was_held() {
        let control = Control::new().unwrap();
        let byte = AtomicU8::new(0);
        let number = control.add_vcpu();
        // SAFETY: `byte` is dropped after `member`.
        let member = unsafe { control.join(number, NonNull::from(&byte).cast()) };
        control.run();
        assert_eq!([member.may_run(), member.may_run()], [Some(true), Some(false)]);
        std::thread::scope(|scope| {
            let holder = scope.spawn(|| {
                control.hold();
                control.run();
            });
            while byte.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            assert_eq!(member.may_run(), Some(true));
            holder.join().unwrap();
        });
        control.finish(VmEnd::Stopped);
        assert_eq!(member.may_run(), None);
    }

    #[test]
    fn a_thread_that_panics_ends_its_vm() {
        let control = Arc::new(Control::new().unwrap());
        let number = control.add_vcpu();
        let inner = control.clone();
        let thread = std::thread::spawn(move || {
            let byte = AtomicU8::new(0);
            // SAFETY: `byte` is dropped after the member.
            let _member = unsafe { inner.join(number, NonNull::from(&byte).cast()) };
            panic!("as a test");
        });
        assert!(matches!(control.wait(), VmEnd::Failed(_)));
        assert!(thread.join().is_err());
    }
}
