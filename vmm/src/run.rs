//! `samepage run` and `samepage serve`: start VMs, serve clients, and wait for the end of each VM.

use samepage_host::engine::start_sharing;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use samepage_api::http::{HttpOptions, Token};
use samepage_api::listener::SocketOptions;
use samepage_api::{server::Listeners, server::Server};
use samepage_api_types::lifecycle::{Action, State};
use samepage_host::conflicts::{self, Uses};
use samepage_host::ends::Ended;
use samepage_host::error::HostError;
use samepage_host::governor::Governor;
use samepage_host::host_limits::HostMemory;
use samepage_host::record::Record;
use samepage_host::stats_writer::{StatsTarget, StatsWriter};
use samepage_host::validated::validate;
use samepage_host::{config_file, registry::Common, registry::Registry};
use samepage_machine::{ConsoleConfig, Hypervisor, Validated, VmEnd, huge_pages};
use samepage_process::poll::{is_readable_now, wait_readable};
use samepage_process::signals::{Hangup, ShutdownSignals};
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_spec::{HugePages, SharingMode, VmSpec};
use samepage_text::counted::counted;
use samepage_worker::machine::Machine;
use samepage_worker::pool::Workers;
use samepage_worker::state::StateFolder;
use vmm_sys_util::timerfd::TimerFd;

use crate::cli::{ConsoleArg, EngineArg, GovernorArg, ProcessArgs, RunArgs, ServeArgs, SocketAccess};
use crate::ending::Ending;
use crate::plan;
use crate::upkeep::{self, Upkeep};
use samepage_host::stdin::{Input, Typed};
use samepage_process::control_socket;
use samepage_process::tell::{self, tell};

/// The outcome of the process: the worst of its VMs' ends.
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

/// The tasks of a process in addition to hosting VMs.
struct Plan<'a> {
    process: &'a ProcessArgs,
    socket: Option<SocketOptions>,
    is_sharing: bool,
    /// The option that turns sharing off.
    no_sharing: &'static str,
    /// Whether the only VM has the terminal.
    has_terminal: bool,
    /// Whether the process continues without VMs.
    is_server: bool,
    /// Where workers wait for the next process if this one is killed.
    state: Option<StateFolder>,
}

/// Runs all VMs of the command line until they have ended.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let socket =
        args.socket.as_ref().map(|path| socket_options(path.as_deref(), &args.socket_access)).transpose()?;
    let vms = plan::vms(&args.vm, &args.name, &args.console);
    let has_terminal = args.console == ConsoleArg::Stdio && vms.len() == 1 && args.process.config.is_none();
    let is_sharing = args.vm.sharing != SharingMode::Off;
    let no_sharing = "--sharing off";
    host(
        vms,
        Plan {
            process: &args.process,
            socket,
            is_sharing,
            no_sharing,
            has_terminal,
            is_server: false,
            state: None,
        },
    )
}

/// Hosts VMs of clients until a signal ends the process.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let socket = Some(socket_options(args.socket.as_deref(), &args.socket_access)?);
    let is_sharing = !args.no_sharing;
    let no_sharing = "--no-sharing";
    let state = args.state.as_deref().map(|folder| state(folder, args)).transpose()?;
    host(
        Vec::new(),
        Plan {
            process: &args.process,
            socket,
            is_sharing,
            no_sharing,
            has_terminal: false,
            is_server: true,
            state,
        },
    )
}

/// Takes the folder in which workers wait.
fn state(folder: &Path, args: &ServeArgs) -> anyhow::Result<StateFolder> {
    if args.process.vms_per_worker == 0 {
        bail!(
            "--state {} keeps the VMs of worker processes only; add --vms-per-worker COUNT, or leave --state out",
            folder.display()
        );
    }
    Ok(StateFolder::take(folder, Duration::from_secs(args.adoption_timeout.into()))?)
}

/// Returns the options of the socket at this path, or at the default one.
fn socket_options(path: Option<&Path>, access: &SocketAccess) -> anyhow::Result<SocketOptions> {
    let path = path.map_or_else(control_socket::of_server, |path| Ok(path.to_owned()))?;
    Ok(SocketOptions { path, mode: access.socket_mode, group: access.socket_group.clone() })
}

fn http_options(process: &ProcessArgs) -> anyhow::Result<Option<HttpOptions>> {
    let token = process.http_token.as_deref().map(Token::read).transpose()?;
    Ok(process.http.map(|address| HttpOptions { address, token }))
}

fn host(named: Vec<(VmSpec, ConsoleConfig)>, mut plan: Plan<'_>) -> anyhow::Result<ExitCode> {
    upkeep::keep_arenas_few();
    let process = plan.process;
    let of_file = process.config.as_deref().map_or(Ok(Vec::new()), config_file::load)?;
    let mut vms = Vec::with_capacity(named.len() + of_file.len());
    for (spec, console) in named {
        vms.push(validate(spec, Some(console)).map_err(HostError::from)?);
    }
    vms.extend(of_file);
    check_huge_pages(&mut vms);
    let uses: Vec<_> = vms.iter().map(|vm| Uses::of(vm.config())).collect();
    conflicts::check_together(&uses).map_err(|error| match error.hint_of_templates() {
        Some(hint) => anyhow!("{error}{hint}"),
        None => error.into(),
    })?;
    if plan.state.is_none() {
        check_host(&vms, process.overcommit)?;
    }
    let hypervisor = Hypervisor::open()?;
    let hangup = Hangup::new();
    let signals = ShutdownSignals::catch_with_hangup().context("catch the signals that end the process")?;
    samepage_host::host_limits::raise_open_files();
    let statistics = process.stats.as_ref().map(Statistics::open).transpose()?;

    let settings = settings(process);
    let sharing = if plan.is_sharing { start_sharing(&settings, Some(plan.no_sharing)) } else { None };
    let workers = workers(process, plan.state.take());
    let common = Common {
        sharing: sharing.clone(),
        settings,
        overcommit: process.overcommit,
        workers: workers.clone(),
    };
    let registry = Arc::new(Registry::new(hypervisor, common).context("watch the VMs")?);
    // Lets workers go before the registry would end their VMs.
    let _registry = Arc::clone(&registry);
    let mut keeping = Keeping { workers: workers.clone(), all: false };
    let adopted = adopt(&registry, workers.as_ref())?;
    let starts = |vm: &Validated| !plan.is_server || vm.spec().start.unwrap_or(true);
    let mut to_start = Vec::new();
    vms.retain(|vm| match adopted.iter().find(|record| record.name() == vm.spec().name) {
        Some(record) if record.state() == State::Created && starts(vm) => {
            to_start.push(Arc::clone(record));
            false
        }
        Some(_) => false,
        None => true,
    });
    if let Some(workers) = workers.as_ref().filter(|_| plan.is_server) {
        workers.keep_spare();
    }
    if let Some(sharing) = &sharing {
        let registry = Arc::downgrade(&registry);
        sharing.on_notice(move |notice| {
            tell(format_args!("{notice}"));
            if let Some(registry) = registry.upgrade() {
                registry.tell_limit(notice.to_string());
            }
        });
    }
    registry.on_disk_error(Box::new(|message| tell(message)));
    let governor = match process.governor {
        GovernorArg::Off => None,
        GovernorArg::Auto => Governor::start(&registry).map_or_else(
            |error| {
                tell(format_args!(
                    "no VM is held when memory becomes short (use --governor off to omit this message): {error}"
                ));
                None
            },
            Some,
        ),
    };
    let starts: Vec<_> = vms.iter().map(starts).collect();
    let records = registry.create(vms)?;
    let new = records.iter().zip(starts).filter(|(_, start)| *start);
    to_start.extend(new.map(|(record, _)| Arc::clone(record)));
    tell_notices(records.iter().filter_map(|record| record.vm()));
    let input = match records.as_slice() {
        [record] if plan.has_terminal => Input::open(record)?,
        _ => None,
    };
    let http = http_options(process)?;
    let listeners = Listeners { socket: plan.socket.clone(), http };
    let open = listeners.socket.is_some() || listeners.http.is_some();
    let server = open.then(|| Server::start(&listeners, registry.clone())).transpose()?;
    if let Some(address) = server.as_ref().and_then(Server::http_address) {
        tell(format_args!("the web page is http://{address}/"));
    }
    if let Some(socket) = plan.socket.as_ref().filter(|_| plan.is_server) {
        tell(format_args!("the control socket is {}", socket.path.display()));
    }
    for record in &to_start {
        if let Some(turn) = record.try_turn() {
            registry.act(&turn, Action::Start)?;
        }
    }
    drop((adopted, to_start, records));
    keeping.all = true;
    let stats = process.stats.as_ref();
    let (audit, stop_timeout) = (process.audit, Duration::from_secs(process.stop_timeout.into()));
    let mut upkeep = Upkeep::new().context("open a timer")?;
    upkeep.note_change().context("set a timer")?;
    let mut process = Process {
        registry,
        signals,
        hangup,
        stats,
        statistics,
        input,
        audit,
        stop_timeout,
        ending: None,
        upkeep,
    };
    let outcome = process.watch(plan.is_server)?;
    drop(governor);
    keeping.end();
    // Clients learn of all ends before the socket is removed.
    drop(server);
    if let Some(statistics) = process.statistics {
        // The VMs have ended. A lost last line does not change the outcome.
        let _ = statistics.writer.finish();
    }
    Ok(if plan.is_server && outcome == Outcome::GuestCrashed { Outcome::AllEnded } else { outcome }
        .exit_code())
}

/// If this process fails, leaves the VMs of workers to the next one that uses the folder for the state.
struct Keeping {
    workers: Option<Arc<Workers>>,
    /// Not only VMs that were adopted.
    all: bool,
}

impl Keeping {
    /// All VMs have ended, and so may their workers.
    fn end(mut self) {
        if let Some(workers) = self.workers.take() {
            workers.close();
        }
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        match &self.workers {
            Some(workers) if self.all => workers.let_go(),
            Some(workers) => workers.let_go_adopted(),
            None => {}
        }
    }
}

/// Adopts the VMs that an earlier process has left. Returns all that are listed.
fn adopt(registry: &Registry, workers: Option<&Arc<Workers>>) -> anyhow::Result<Vec<Arc<Record>>> {
    let Some(workers) = workers else { return Ok(Vec::new()) };
    let adoption = workers.adopt().context("read the state folder")?;
    for left in &adoption.left {
        tell(left);
    }
    for vm in &adoption.missed {
        tell(format_args!("VM {}: it ended while no samepage managed it: {}", vm.spec.name, vm.end));
    }
    let records = registry.adopt(adoption).context("adopt VMs")?;
    if !records.is_empty() {
        let vms = counted(records.len() as u64, "VM");
        tell(format_args!("adopted {vms}, which share no more memory until their next start"));
    }
    Ok(registry.list())
}

/// The running process.
struct Process<'a> {
    registry: Arc<Registry>,
    signals: ShutdownSignals,
    hangup: Hangup,
    /// The target of statistics.
    stats: Option<&'a StatsTarget>,
    statistics: Option<Statistics>,
    input: Option<Input>,
    audit: bool,
    /// How long guests may take to shut down.
    stop_timeout: Duration,
    /// Present when guests have been asked to shut down.
    ending: Option<Ending>,
    upkeep: Upkeep,
}

impl Process<'_> {
    /// Waits until the last VM has ended. A server also waits for a signal.
    fn watch(&mut self, serve: bool) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut stay = serve;
        while stay || !self.registry.is_idle() {
            let [signal, end, settled, due, typed, room, waited, rested] = {
                let [typed, room] = self.input.as_ref().map_or([None, None], Input::files);
                let due = self.statistics.as_ref().map(|statistics| statistics.timer.as_raw_fd());
                let (ends, settled) = (self.registry.ends(), self.registry.settled());
                let signals = Some(self.signals.as_raw_fd());
                let waited = self.ending.as_ref().map(Ending::as_raw_fd);
                let rested = Some(self.upkeep.as_raw_fd());
                wait_readable([signals, Some(ends), Some(settled), due, typed, room, waited, rested])
                    .context("wait for the VMs")?
            };
            if settled {
                self.registry.clear_settled();
            }
            if settled || end {
                self.upkeep.note_change().context("set a timer")?;
            }
            if rested {
                self.upkeep.free_unused().context("wait until the process is idle")?;
            }
            match signal.then(|| self.signals.take()).flatten() {
                Some(libc::SIGHUP) if !self.hangup.is_end() => self.reopen_logs(),
                Some(signal) => {
                    stay = false;
                    self.end_by(signal);
                }
                None => {}
            }
            if waited && let Some(ending) = &mut self.ending {
                ending.check(&self.registry).context("wait for guests that were asked to end")?;
            }
            // VMs that have ended are still in the registry for a last line.
            if (due || end)
                && let Some(open) = &mut self.statistics
                && let Err(error) = open.write(&self.registry)
            {
                tell(format_args!("statistics end: {error}"));
                self.statistics = None;
            }
            if end {
                outcome = outcome.max(self.take_ended()?);
            }
            if (typed || room)
                && let Some(open) = &mut self.input
                && open.pump(typed) == Typed::Quit
            {
                self.registry.close();
            }
        }
        Ok(outcome)
    }

    /// Ends the process after a signal. Guests are asked first, except after SIGQUIT or a second signal.
    fn end_by(&mut self, signal: i32) {
        let at_once = signal == libc::SIGQUIT || self.stop_timeout.is_zero() || self.ending.is_some();
        if !at_once && let Ok(ending) = Ending::begin(&self.registry, self.stop_timeout) {
            self.ending = Some(ending);
            return;
        }
        self.registry.close();
    }

    /// Opens the files of consoles and statistics again.
    fn reopen_logs(&mut self) {
        for vm in self.registry.machines() {
            if let Err(error) = vm.reopen_console() {
                tell(format_args!("VM {}: {error}; its console continues in the earlier file", vm.name()));
            }
        }
        let opened = match (self.stats, &mut self.statistics) {
            (None, _) => Ok(()),
            (Some(target), Some(open)) => open.reopen(target),
            // Statistics had ended because of an error, which may be gone by now.
            (Some(target), None) => Statistics::open(target).map(|open| self.statistics = Some(open)),
        };
        if let Err(error) = opened {
            tell(tell::causes(&error));
        }
        tell("log files were opened again (SIGHUP)");
    }

    fn take_ended(&mut self) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        if self.audit {
            outcome = audit(self.registry.sharing().map(Arc::as_ref));
        }
        let ended = self.registry.collect().context("wait for the VMs")?;
        if self.registry.is_idle() {
            // Restore the terminal before printing anything.
            self.input = None;
        }
        for vm in &ended {
            report(vm);
            outcome = outcome.max(Outcome::of(&vm.end));
        }
        Ok(outcome)
    }
}

/// Prints the remarks on VMs and disks, once for each reason.
fn tell_notices(vms: impl Iterator<Item = Arc<dyn Machine>>) {
    let mut reasons: Vec<(String, usize)> = Vec::new();
    for notice in vms.flat_map(|vm| vm.notices()) {
        // The part before the first colon names the VM or the disk.
        let reason =
            |text: &str| text.split_once(": ").map_or_else(|| text.to_owned(), |(_, why)| why.to_owned());
        match reasons.iter_mut().find(|(told, _)| reason(told) == reason(&notice)) {
            Some((_, more)) => *more += 1,
            None => reasons.push((notice, 0)),
        }
    }
    for (notice, more) in reasons {
        match more {
            0 => tell(notice),
            more => tell(format_args!("{notice} (and so for {more} more)")),
        }
    }
}

/// Changes all VMs to small pages if the host has no huge pages.
fn check_huge_pages(vms: &mut [Validated]) {
    if vms.iter().all(|vm| vm.spec().hugepages == HugePages::Off) {
        return;
    }
    if let Some(reason) = huge_pages::unavailable() {
        tell(reason);
        vms.iter_mut().for_each(Validated::use_small_pages);
    }
}

fn check_host(vms: &[Validated], ratio: f64) -> anyhow::Result<()> {
    if let Some(memory) = HostMemory::measure() {
        let requested = vms.iter().map(|vm| vm.spec().memory.0).fold(0, u64::saturating_add);
        memory.check(requested, ratio)?;
    }
    Ok(())
}

/// Returns what starts worker processes, if VMs are to be in some.
fn workers(process: &ProcessArgs, state: Option<StateFolder>) -> Option<Arc<Workers>> {
    let per_worker = process.vms_per_worker;
    if per_worker == 0 {
        return None;
    }
    // The file may have been replaced by another version since this process started.
    let program = PathBuf::from("/proc/self/exe");
    let workers = Workers::new(program, per_worker, state).with_block_cache(process.worker_block_cache);
    Some(Arc::new(workers))
}

fn settings(args: &ProcessArgs) -> Settings {
    let EngineArg { lookahead, order, follow, types } = args.sharing_engine;
    Settings {
        cpu_percent: args.sharing_cpu,
        lookahead,
        order,
        follow,
        block_cache: args.block_cache,
        types,
        ..Settings::default()
    }
}

/// Compares the engine's metadata with the page maps, before the VMs that have ended release their memory.
fn audit(sharing: Option<&Sharing>) -> Outcome {
    let problems = match sharing.map(Sharing::audit) {
        None => return Outcome::AllEnded,
        Some(Ok(report)) if report.passed() => {
            let (pages, frames) = (counted(report.pages, "page"), counted(report.frames, "frame"));
            tell(format_args!("audit of {pages} and {frames} passed"));
            return Outcome::AllEnded;
        }
        Some(Ok(report)) => report.descriptions.join("; "),
        Some(Err(error)) => format!("the page maps cannot be read: {error}"),
    };
    tell(format_args!("audit failed: {problems}"));
    Outcome::Failed
}

fn report(vm: &Ended) {
    if vm.is_reset {
        tell(format_args!("VM {}: it was reset", vm.name));
    } else {
        tell(format_args!("VM {}: {}", vm.name, vm.end));
    }
    if vm.console_lost > 0 {
        tell(format_args!(
            "VM {}: {} of console output lost, because nobody read it",
            vm.name,
            counted(vm.console_lost, "byte")
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

    fn reopen(&mut self, target: &StatsTarget) -> anyhow::Result<()> {
        let opened = self.writer.reopen(target);
        opened.with_context(|| format!("open {target} again; statistics continue in the earlier file"))
    }

    fn write(&mut self, registry: &Registry) -> io::Result<()> {
        // This does not wait. It only makes the timer unreadable again.
        if is_readable_now(self.timer.as_raw_fd())? {
            self.timer.wait()?;
        }
        self.writer.write(|sampler| registry.sample(sampler, &registry.by_start()))
    }
}
