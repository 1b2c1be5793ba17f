//! VMs in other processes, which are killed at any point: nobody else notices, their frames come back, and what is
//! left is as the guests wrote it.
//!
//! This program starts itself as a worker. A worker's guests write to their memory all the time, and check each page
//! before they overwrite it.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::followed::{Resting, Told};
use common::{Fault, Faulty, Guest, Numbers, audit, engine, losses, no_rest, pass, take_off};
use parking_lot::Mutex;
use samepage_sharing::Slot;
use samepage_sharing::calls::Linux;
use samepage_sharing::changes::{ChangeLog, PageSet};
use samepage_sharing::engine::{Engine, Mode, Settings, Step};
use samepage_sharing::remote::serve::Server;
use samepage_sharing::remote::worker::{Process, VmIndex, Worker, pair};

/// What tells a process that it is a worker, and where it is to call.
const CONTROL: &str = "SAMEPAGE_TEST_WORKER";
/// The system call before which the worker kills itself, and how many of them it makes before: `map 3`.
const DIES_AT: &str = "SAMEPAGE_TEST_DIES_AT";
/// VMs of a worker.
const VMS: u32 = 4;
/// Pages of a VM.
const PAGES: u32 = 512;
/// The most pages that a guest writes in a row.
const RUN: u64 = 24;

/// Content of a page, alike in all VMs: one of a few.
fn content(page: u32, kind: u64) -> u64 {
    if kind == 0 { 0 } else { kind * 100_000 + u64::from(page / 2) }
}

/// The guest's program: runs of pages are checked and overwritten.
fn work(guest: &Guest, told: Option<&Told>, numbers: &mut Numbers, stop: &AtomicBool, writes: &AtomicU64) {
    let mut model = vec![0; PAGES as usize];
    let mut write = |page: u32, kind: u64| {
        guest.check(page, model[page as usize]);
        model[page as usize] = content(page, kind);
        guest.write(page, model[page as usize]);
        if let Some(Told(pages)) = told {
            pages.lock().insert(page);
        }
        writes.fetch_add(1, Ordering::Relaxed);
    };
    (0..PAGES).for_each(|page| write(page, 1 + u64::from(page / 100)));
    while !stop.load(Ordering::Relaxed) {
        let first = numbers.below(u64::from(PAGES)) as u32;
        let count = 1 + numbers.below(RUN) as u32;
        let kind = numbers.below(5);
        (first..PAGES.min(first + count)).for_each(|page| write(page, kind));
        // Pages are to be merged as well.
        thread::sleep(Duration::from_micros(numbers.below(300)));
    }
    (0..).zip(&model).for_each(|(page, &seed)| guest.check(page, seed));
}

/// Kills this process before a system call, if it is the one.
fn plan() -> impl FnMut(&'static str) -> Fault + Send + 'static {
    let dies_at = std::env::var(DIES_AT).ok();
    let dies_at = dies_at.as_deref().and_then(|text| {
        let (call, count) = text.rsplit_once(' ')?;
        Some((call.to_owned(), count.parse::<u32>().ok()?))
    });
    let mut calls = 0;
    move |call| {
        if let Some((name, count)) = &dies_at
            && name == call
        {
            calls += 1;
            if calls > *count {
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .unwrap();
            }
        }
        Fault::None
    }
}

/// What a worker does: its socket is where the standard input is otherwise.
fn work_as_worker(control: &str) {
    let control = UnixStream::connect(control).unwrap();
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let server = Server::accept_with(socket, |store| {
        let linux = Linux::open(store)?;
        Ok(Arc::new(Faulty { linux, plan: Arc::new(Mutex::new(plan())) }))
    });
    let server = server.unwrap();
    let vms = server.vms();
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let guests: Vec<_> = (0..VMS).map(|_| Guest::new(PAGES)).collect();
    let logs: Vec<_> = (0..VMS)
        .map(|vm| {
            // One VM has no log, and is scanned in full.
            (vm > 0).then(|| {
                let mut all = PageSet::new(PAGES);
                all.insert_range(0..PAGES);
                Told(Arc::new(Mutex::new(all)))
            })
        })
        .collect();
    for (vm, (guest, told)) in guests.iter().zip(&logs).enumerate() {
        let log = told.clone().map(|told| match vm {
            // The last VM's log knows when it rests.
            3 => Box::new(Resting::new(told, &Arc::default())) as Box<dyn ChangeLog>,
            _ => Box::new(told) as _,
        });
        vms.add(Arc::clone(&guest.ram), log).unwrap();
    }
    thread::spawn(move || server.run().unwrap());
    thread::scope(|scope| {
        for (vm, (guest, told)) in guests.iter().zip(&logs).enumerate() {
            let (stop, writes) = (&stop, &writes);
            let mut numbers = Numbers(u64::from(std::process::id()) * 10 + vm as u64 + 1);
            scope.spawn(move || {
                let work = || work(guest, told.as_ref(), &mut numbers, stop, writes);
                if catch_unwind(AssertUnwindSafe(work)).is_err() {
                    // The other side notices that nobody answers.
                    std::process::exit(1);
                }
            });
        }
        let mut lines = BufReader::new(control.try_clone().unwrap()).lines();
        writeln!(&control, "ready").unwrap();
        let _ = lines.next();
        stop.store(true, Ordering::Relaxed);
    });
    writeln!(&control, "ok {}", writes.load(Ordering::Relaxed)).unwrap();
    // Until it is told to end, its memory is there to be looked at.
    let mut line = String::new();
    let _ = BufReader::new(&control).read_line(&mut line);
}

/// A worker, as its starter has it.
struct Started {
    child: Child,
    control: UnixStream,
    worker: Arc<Worker>,
    slots: Vec<Slot>,
}

impl Started {
    fn start(engine: &mut Engine, dies_at: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let (ours, theirs) = pair().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_worker", "--nocapture"]).env(CONTROL, &path);
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        if let Some(dies_at) = dies_at {
            command.env(DIES_AT, dies_at);
        }
        let child = command.spawn().unwrap();
        drop(command);
        let (control, _) = listener.accept().unwrap();
        let worker = engine.greet(ours, Process::of(child.id()).unwrap()).unwrap();
        let mut started = Self { child, control, worker, slots: Vec::new() };
        assert_eq!(started.line(), "ready");
        for vm in 0..VMS {
            let Ok(vm) = started.worker.vm(VmIndex::new(vm)) else { break };
            started.slots.push(engine.add_memory(vm.memory, vm.is_huge, vm.log, losses().1).unwrap());
        }
        started
    }

    /// The next line that the worker says.
    fn line(&self) -> String {
        let mut line = String::new();
        BufReader::new(&self.control).read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Has the guests stop and check all of their memory. The memory stays.
    fn stop(&self) {
        writeln!(&self.control, "stop").unwrap();
        let line = self.line();
        assert!(line.starts_with("ok "), "a guest has found other contents than its own: {line}");
    }

    /// Its VMs end, whether or not it lives.
    fn remove(mut self, engine: &mut Engine) {
        for slot in &self.slots {
            engine.remove(*slot).unwrap();
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Not a test, but what a worker does. It does nothing where no worker was asked for.
#[test]
fn a_worker() {
    if let Ok(control) = std::env::var(CONTROL) {
        work_as_worker(&control);
    }
}

fn settings() -> Settings {
    Settings { rest_ms: 5, ..no_rest(false) }
}

/// The engine works for so long, or until a number of pages were merged.
fn work_on(engine: &mut Engine, merges: u64, limit: Duration) -> bool {
    let (before, end) = (engine.statistics().merges, Instant::now() + limit);
    while engine.statistics().merges < before + merges {
        engine.step(Instant::now());
        pass(engine);
        if Instant::now() > end {
            return false;
        }
    }
    true
}

/// All is let go, and no frame is left.
fn end(mut engine: Engine, started: Vec<Started>) {
    started.iter().for_each(Started::stop);
    audit(&mut engine);
    started.into_iter().for_each(|started| started.remove(&mut engine));
    let statistics = engine.statistics();
    assert_eq!(statistics.frames, 0, "{statistics:?}");
    audit(&mut engine);
}

#[test]
fn vms_in_several_processes_share_memory_and_keep_what_they_write() {
    let mut engine = engine(&settings());
    let local = Guest::new(PAGES);
    (0..PAGES).for_each(|page| local.write(page, content(page, 1 + u64::from(page / 100))));
    let local_slot = engine.add(Arc::clone(&local.ram), None, losses().1).unwrap();
    let workers: Vec<_> = (0..3).map(|_| Started::start(&mut engine, None)).collect();
    assert!(work_on(&mut engine, 5_000, Duration::from_secs(120)), "{:?}", engine.statistics());
    workers.iter().for_each(Started::stop);
    audit(&mut engine);
    for _ in 0..4 {
        pass(&mut engine);
    }
    (0..PAGES).for_each(|page| local.check(page, content(page, 1 + u64::from(page / 100))));
    audit(&mut engine);
    // Not one page of guests that rest is left alone.
    for slot in workers.iter().flat_map(|worker| worker.slots.clone()) {
        engine.set_mode(slot, Mode::Off);
    }
    take_off(&mut engine);
    audit(&mut engine);
    workers.into_iter().for_each(|worker| worker.remove(&mut engine));
    engine.remove(local_slot).unwrap();
    assert_eq!(engine.statistics().frames, 0);
    audit(&mut engine);
}

/// A worker dies before a call, while the engine has it do something. Another one does not notice.
fn dies_before(call: &str, count: u32, mut have: impl FnMut(&mut Engine, &[Slot])) {
    let mut engine = engine(&settings());
    let stays = Started::start(&mut engine, None);
    let dies = Started::start(&mut engine, Some(&format!("{call} {count}")));
    let limit = Instant::now() + Duration::from_secs(60);
    while !dies.worker.look() {
        have(&mut engine, &dies.slots);
        assert!(Instant::now() < limit, "it has not died before call {count} of `{call}`");
    }
    audit(&mut engine);
    dies.remove(&mut engine);
    assert!(work_on(&mut engine, 50, Duration::from_secs(60)), "nothing is merged any more");
    end(engine, vec![stays]);
}

#[test]
fn a_worker_may_die_at_any_point_of_a_merge() {
    for call in ["register", "protect", "map", "unprotect"] {
        // Each VM is registered once before anything is merged.
        for count in [VMS, 9] {
            dies_before(call, count, |engine, _| {
                work_on(engine, 50, Duration::from_millis(20));
            });
        }
    }
}

#[test]
fn a_worker_may_die_at_any_point_of_leaving_frames() {
    for call in ["stage", "restore", "unstage"] {
        for count in [0, 5] {
            dies_before(call, count, |engine, slots| {
                work_on(engine, 100, Duration::from_millis(200));
                slots.iter().for_each(|slot| engine.set_mode(*slot, Mode::Off));
                take_off(engine);
                slots.iter().for_each(|slot| engine.set_mode(*slot, Mode::Full));
            });
        }
    }
}

/// How often workers are killed: more often in the long form.
fn kills() -> u32 {
    std::env::var("SAMEPAGE_TEST_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(50)
}

#[test]
fn workers_may_be_killed_at_any_time() {
    let mut engine = engine(&settings());
    let mut numbers = Numbers(0x5eed);
    let mut workers: BTreeMap<u64, Started> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for kill in 0..u64::from(kills()) {
        while workers.len() < 3 {
            let worker = Started::start(&mut engine, None);
            workers.insert(kill * 10 + workers.len() as u64, worker);
        }
        let doomed = *workers.keys().nth(numbers.below(3) as usize).unwrap();
        let process = workers[&doomed].child.id();
        let wait = Duration::from_micros(numbers.below(30_000));
        let killer = thread::spawn(move || {
            thread::sleep(wait);
            let process = rustix::process::Pid::from_raw(process as i32).unwrap();
            rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        });
        while !workers[&doomed].worker.look() {
            engine.step(Instant::now());
            pass(&mut engine);
        }
        killer.join().unwrap();
        let began = Instant::now();
        workers.remove(&doomed).unwrap().remove(&mut engine);
        longest = longest.max(began.elapsed());
        if kill % 8 == 0 {
            audit(&mut engine);
        }
    }
    println!("the frames of a killed worker were back after at most {longest:?}");
    assert!(engine.statistics().merges > 0);
    end(engine, workers.into_values().collect());
}

#[test]
fn a_worker_that_is_silent_stops_the_engine_and_keeps_its_frames() {
    let mut engine = engine(&Settings { patience: Duration::from_secs(3), ..settings() });
    let started = Started::start(&mut engine, None);
    assert!(work_on(&mut engine, 50, Duration::from_secs(60)));
    let process = rustix::process::Pid::from_raw(started.child.id() as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    let stopped = catch_unwind(AssertUnwindSafe(|| work_on(&mut engine, 1 << 40, Duration::from_secs(60))));
    let reason = stopped.unwrap_err();
    let text = reason.downcast_ref::<String>().map(String::as_str).or_else(|| reason.downcast_ref().copied());
    assert!(text.is_some_and(|text| text.contains("stopped answering")), "{text:?}");
    assert!(!started.worker.has_ended());
    // Nothing that its pages may show is given up before it has ended.
    let frames = engine.statistics().frames;
    assert!(engine.remove(started.slots[0]).is_err());
    assert_eq!(engine.statistics().frames, frames);
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    while !started.worker.look() {
        thread::yield_now();
    }
    started.remove(&mut engine);
    // A merge that was under way when the engine stopped may hold the frames of its run.
    let left = engine.statistics().frames;
    assert!(left < frames && left <= RUN, "{left} of {frames} frames are left");
}

#[test]
fn one_question_is_enough_for_the_logs_of_all_vms_of_a_worker() {
    let mut engine = engine(&Settings { rest_ms: 100, ..no_rest(false) });
    let started = Started::start(&mut engine, None);
    // A VM without a log would be asked about in passes.
    engine.set_mode(started.slots[0], Mode::Off);
    started.stop();
    // Time is simulated from here on. All pages become idle, and are scanned.
    let mut now = Instant::now();
    let mut rest = |engine: &mut Engine, count: u32| {
        for _ in 0..count {
            now = loop {
                if let Step::RestUntil(due) = engine.step(now) {
                    break due;
                }
            };
        }
    };
    rest(&mut engine, 300);
    assert!(engine.statistics().pages_sharing > 0, "{:?}", engine.statistics());
    let before = started.worker.asked();
    rest(&mut engine, 100);
    let asked = started.worker.asked() - before;
    // In each interval there is one for the logs of two VMs. Since time is ahead of the clock, each of three VMs is asked
    // about its rest. Alone, each of the two would take one question more.
    assert!((100..470).contains(&asked), "{asked} questions in 100 intervals");
    audit(&mut engine);
    started.remove(&mut engine);
    assert_eq!(engine.statistics().frames, 0);
}

#[test]
fn a_sealed_vm_refuses_late_orders_that_ignore_content() {
    let mut engine = engine(&settings());
    let (ours, theirs) = pair().unwrap();
    // The worker is a thread. If the engine believed that it answers nonsense, this process would end.
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let guest = Guest::new(PAGES);
    let ram = Arc::clone(&guest.ram);
    let (told, vms) = std::sync::mpsc::channel();
    let serving = thread::spawn(move || {
        let server = Server::accept(theirs).unwrap();
        let index = server.vms().add(ram, None).unwrap();
        told.send((server.vms(), index)).unwrap();
        server.run().unwrap();
    });
    let worker = engine.greet(ours, Process::of(child.id()).unwrap()).unwrap();
    let (vms, index) = vms.recv().unwrap();
    let vm = worker.vm(index).unwrap();
    let slot = engine.add_memory(vm.memory, vm.is_huge, vm.log, losses().1).unwrap();
    let number = engine.vm_number(slot);
    (0..8).for_each(|page| guest.write(page, 7));
    assert_eq!(engine.discard(number, 0..4).freed, 4);
    assert!((0..4).all(|page| guest.is_zero(page)));
    (0..4).for_each(|page| guest.write(page, 8));
    vms.seal(index);
    assert_eq!(engine.discard(number, 0..8).freed, 0);
    (0..8).for_each(|page| guest.check(page, if page < 4 { 8 } else { 7 }));
    assert!(!worker.has_ended(), "a refusal is an answer");
    engine.remove(slot).unwrap();
    drop((engine, worker));
    child.kill().unwrap();
    child.wait().unwrap();
    serving.join().unwrap();
}

#[test]
fn a_worker_that_answers_nonsense_is_ended() {
    let engine = engine(&settings());
    let (ours, theirs) = pair().unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    // It says that it is of this version, and never a word that makes sense.
    let answers = thread::spawn(move || answer_nonsense(theirs));
    let worker = engine.greet(ours, Process::of(child.id()).unwrap()).unwrap();
    assert!(worker.vm(VmIndex::new(0)).is_err());
    assert!(worker.has_ended());
    assert!(!child.wait().unwrap().success());
    drop(worker);
    answers.join().unwrap();
}

fn answer_nonsense(socket: OwnedFd) {
    use rustix::net::{RecvFlags, SendFlags, recv, send};
    let mut room = [0; 4096];
    recv(&socket, &mut room[..], RecvFlags::empty()).unwrap();
    // The version that the engine has said.
    send(&socket, &room[..1], SendFlags::empty()).unwrap();
    recv(&socket, &mut room[..], RecvFlags::empty()).unwrap();
    send(&socket, &[0xee; 9], SendFlags::empty()).unwrap();
}
