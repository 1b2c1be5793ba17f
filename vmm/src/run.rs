//! `samepage run`: starts the VMs, carries the terminal's input to the guest, and waits for every end.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use samepage::console::escape::{EscapeFilter, HELP, Key};
use samepage::console::terminal::{self, RawTerminal, StdinKind};
use samepage::fleet::{self, Ended, Fleet};
use samepage::host_limits::HostMemory;
use samepage::poll::{is_readable_now, wait_readable};
use samepage::signals::ShutdownSignals;
use samepage::statistics::{StatsTarget, StatsWriter};
use samepage::{HugePages, Hypervisor, Vm, VmConfig, VmEnd, huge_pages};
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::cli::{ConsoleArg, EngineArg, RunArgs, SharingArg};
use crate::plan;
use crate::report::tell;

/// What the process ends with, by the worst of what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    #[default]
    AllEnded,
    Failed,
    GuestCrashed,
}

impl Outcome {
    fn of(end: &VmEnd) -> Self {
        match end {
            VmEnd::Reset | VmEnd::PowerOff | VmEnd::Stopped => Outcome::AllEnded,
            VmEnd::Failed(_) => Outcome::Failed,
            VmEnd::Crashed(_) => Outcome::GuestCrashed,
        }
    }

    fn exit_code(self) -> ExitCode {
        ExitCode::from(match self {
            Outcome::AllEnded => 0,
            Outcome::Failed => 1,
            Outcome::GuestCrashed => 3,
        })
    }
}

/// Runs all VMs of the command line to their ends.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let mut configs = plan::configurations(args);
    check_huge_pages(&mut configs);
    fleet::check(&configs)?;
    check_host(&configs, args.overcommit)?;
    let hypervisor = Hypervisor::open()?;
    let signals = ShutdownSignals::catch().context("catch the signals that end the process")?;
    samepage::host_limits::raise_open_files();
    let mut statistics = args.stats.as_ref().map(Statistics::open).transpose()?;

    let sharing = if args.sharing == SharingArg::Off { None } else { start_sharing(args) };
    for config in &mut configs {
        config.sharing = sharing.clone();
    }
    let fleet = Fleet::new(hypervisor).context("watch the VMs")?;
    let vms = fleet.add(configs)?;
    let mut input = match vms.as_slice() {
        [vm] if args.console == ConsoleArg::Stdio => Input::open(vm)?,
        _ => None,
    };
    drop(vms);
    fleet.start_all();

    let mut outcome = Outcome::default();
    while !fleet.is_empty() {
        let [signal, end, due, typed, room] = {
            let [typed, room] = input.as_ref().map_or([None, None], Input::files);
            let due = statistics.as_ref().map(|statistics| statistics.timer.as_raw_fd());
            wait_readable([Some(signals.as_raw_fd()), Some(fleet.as_raw_fd()), due, typed, room])
                .context("wait for the VMs")?
        };
        if signal && signals.take().is_some() {
            fleet.request_stop_all();
        }
        // The VMs that have ended are still there for a last line.
        if (due || end)
            && let Some(open) = &mut statistics
            && let Err(error) = open.write(sharing.as_deref(), &fleet)
        {
            tell(format_args!("no more statistics: {error}"));
            statistics = None;
        }
        if end {
            if args.audit {
                outcome = outcome.max(audit(sharing.as_deref()));
            }
            let ended = fleet.take_ended().context("wait for the VMs")?;
            if fleet.is_empty() {
                // The terminal is the user's again before anything is told.
                input = None;
            }
            for vm in &ended {
                report(vm);
                outcome = outcome.max(Outcome::of(&vm.end));
            }
        }
        if (typed || room)
            && let Some(open) = &mut input
            && open.pump(&fleet, typed) == Typed::Quit
        {
            fleet.request_stop_all();
        }
    }
    if let Some(statistics) = statistics {
        // The VMs have ended; their ends count, not the last line.
        let _ = statistics.writer.finish();
    }
    Ok(outcome.exit_code())
}

/// Goes on with small pages where the host has no others.
fn check_huge_pages(configs: &mut [VmConfig]) {
    if configs.iter().all(|config| config.hugepages == HugePages::Off) {
        return;
    }
    if let Some(reason) = huge_pages::unavailable() {
        tell(format_args!("{reason}"));
        configs.iter_mut().for_each(|config| config.hugepages = HugePages::Off);
    }
}

fn check_host(configs: &[VmConfig], ratio: f64) -> anyhow::Result<()> {
    if let Some(memory) = HostMemory::measure() {
        let requested = configs.iter().map(|config| config.memory_bytes).fold(0, u64::saturating_add);
        memory.check(requested, ratio)?;
    }
    Ok(())
}

fn start_sharing(args: &RunArgs) -> Option<Arc<Sharing>> {
    let EngineArg { lookahead, order, follow } = args.sharing_engine;
    let cpu_percent = args.sharing_cpu;
    match Sharing::start(Settings { cpu_percent, lookahead, order, follow, ..Settings::default() }) {
        Ok(sharing) => {
            sharing.on_notice(|notice| tell(format_args!("{notice}")));
            Some(Arc::new(sharing))
        }
        Err(error) => {
            tell(format_args!(
                "the VMs run without sharing memory (--sharing off says so without this message): {error}"
            ));
            None
        }
    }
}

/// Recounts what is shared, while the VMs that have ended still hold their part of it.
fn audit(sharing: Option<&Sharing>) -> Outcome {
    let problems = match sharing.map(Sharing::audit) {
        None => return Outcome::AllEnded,
        Some(Ok(report)) if report.passed() => {
            tell(format_args!("audit of {} pages and {} frames passed", report.pages, report.frames));
            return Outcome::AllEnded;
        }
        Some(Ok(report)) => report.descriptions.join("; "),
        Some(Err(error)) => format!("the page maps cannot be read: {error}"),
    };
    tell(format_args!("audit failed: {problems}"));
    Outcome::Failed
}

fn report(vm: &Ended) {
    tell(format_args!("VM {}: {}", vm.name, vm.end));
    if vm.console_lost > 0 {
        tell(format_args!(
            "VM {}: {} bytes of console output were lost, because nobody took them",
            vm.name, vm.console_lost
        ));
    }
}

/// Statistics, due each second.
struct Statistics {
    writer: StatsWriter,
    timer: TimerFd,
}

impl Statistics {
    fn open(target: &StatsTarget) -> anyhow::Result<Self> {
        let writer = StatsWriter::open(target).with_context(|| format!("write statistics to {target}"))?;
        let mut timer = TimerFd::new().context("open a timer")?;
        let second = Duration::from_secs(1);
        timer.reset(second, Some(second)).context("set a timer")?;
        Ok(Self { writer, timer })
    }

    fn write(&mut self, sharing: Option<&Sharing>, fleet: &Fleet) -> io::Result<()> {
        // Nothing waits here: the timer is asked only so that it is readable no more.
        if is_readable_now(self.timer.as_raw_fd())? {
            self.timer.wait()?;
        }
        self.writer.write(sharing, fleet.vms().iter().map(Arc::as_ref))
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Text,
    Quit,
}

/// Standard input on its way to the one VM that has the console.
struct Input {
    vm: String,
    /// Present where standard input is a terminal: then keys have to be told from commands.
    raw: Option<RawTerminal>,
    filter: EscapeFilter,
    /// Typed, and not yet taken by the guest. Nothing more is read meanwhile.
    waiting: Vec<u8>,
    room: EventFd,
    at_end: bool,
}

impl Input {
    fn open(vm: &Vm) -> anyhow::Result<Option<Self>> {
        let raw = match terminal::stdin_kind() {
            StdinKind::Terminal => Some(RawTerminal::enter().context("put the terminal into raw mode")?),
            StdinKind::BackgroundTerminal => return Ok(None),
            StdinKind::Stream => None,
        };
        let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).context("open an event")?;
        vm.set_serial_room_event(room.try_clone().context("open an event")?);
        let filter = EscapeFilter::default();
        Ok(Some(Self { vm: vm.name().to_owned(), raw, filter, waiting: Vec::new(), room, at_end: false }))
    }

    /// What to wait for: something typed, or room at the guest.
    fn files(&self) -> [Option<RawFd>; 2] {
        if !self.waiting.is_empty() {
            [None, Some(self.room.as_raw_fd())]
        } else if self.at_end {
            [None, None]
        } else {
            [Some(io::stdin().as_fd().as_raw_fd()), None]
        }
    }

    fn pump(&mut self, fleet: &Fleet, typed: bool) -> Typed {
        if typed {
            let mut buffer = [0; 256];
            match io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .and_then(|file| std::fs::File::from(file).read(&mut buffer))
            {
                Ok(count) => {
                    self.at_end = count == 0;
                    if self.sort(&buffer[..count]) == Typed::Quit {
                        return Typed::Quit;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.at_end = true,
            }
        } else {
            // A room event that was written meanwhile has done its work.
            let _ = self.room.read();
        }
        if let Some(vm) = fleet.get(&self.vm) {
            let taken = vm.serial_input(&self.waiting);
            self.waiting.drain(..taken);
        }
        Typed::Text
    }

    fn sort(&mut self, bytes: &[u8]) -> Typed {
        if self.raw.is_none() {
            self.waiting.extend_from_slice(bytes);
            return Typed::Text;
        }
        for byte in bytes {
            match self.filter.feed(*byte) {
                Key::Guest(byte) => self.waiting.push(byte),
                Key::Quit => return Typed::Quit,
                Key::Help => {
                    // Who does not see the help can still type.
                    let _ = io::stderr().write_all(HELP.as_bytes());
                }
                Key::Nothing => {}
            }
        }
        Typed::Text
    }
}
