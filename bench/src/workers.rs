//! What it costs that VMs are in processes of their own: the same memory is merged in two workers, and in the
//! process of the engine.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use samepage_sharing::engine::Settings;
use samepage_sharing::remote::serve::Server;
use samepage_sharing::remote::worker::{Process, pair};

use super::context::Bench;
use super::cpu::micros_each;
use super::layout::{Gap, Layout};
use super::memory::{Memory, verify};
use super::ours::Ours;
use super::report::{Goal, Measurement, Section};

/// Number of consecutive duplicate pages.
const LENGTHS: [u32; 4] = [1, 8, 64, 512];
/// Workers, which have the VMs in turns.
const WORKERS: u32 = 2;
const VMS: u32 = 4;

/// The arguments of a worker, which this program starts itself.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct WorkerArgs {
    #[arg(long)]
    pages: u32,
    #[arg(long)]
    length: u32,
    /// The worker's number.
    #[arg(long)]
    worker: u32,
}

/// Duplicates of a layout.
#[derive(Clone, Copy, Debug)]
struct Runs {
    pages: u32,
    length: u32,
}

impl Runs {
    fn layout(self) -> Layout {
        Layout::runs(VMS, self.pages, self.length, Gap::Untouched)
    }
}

/// The VMs of a worker.
fn part(layout: &Layout, worker: u32) -> Layout {
    let vms = layout.vms.iter().skip(worker as usize).step_by(WORKERS as usize);
    Layout { vms: vms.cloned().collect() }
}

/// What a worker does: it has memory, and serves the engine at its standard input until that is gone.
pub(super) fn serve(args: WorkerArgs) -> Result<()> {
    let WorkerArgs { pages, length, worker } = args;
    let layout = part(&Runs { pages, length }.layout(), worker);
    let memory = Memory::filled(&layout)?;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("take the connection")?;
    let server = Server::accept(socket).context("answer the engine")?;
    let vms = server.vms();
    for memory in &memory {
        vms.add(memory.ram(), Some(Box::new(memory.log()))).context("share memory")?;
    }
    println!("ready");
    std::io::stdout().flush().context("say that all is ready")?;
    server.run().context("serve the engine")?;
    verify(&layout, &memory)
}

/// A worker that was started.
struct Worker(Child);

impl Worker {
    fn start(runs: Runs, worker: u32, ours: &mut Ours) -> Result<Self> {
        let (engine, theirs) = pair().context("connect to a worker")?;
        let number = |number: u32| number.to_string();
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["worker", "--worker", &number(worker), "--pages", &number(runs.pages)]);
        command.args(["--length", &number(runs.length)]);
        command.stdin(Stdio::from(theirs)).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a worker")?;
        drop(command);
        let process = Process::of(child.id()).context("take hold of a worker")?;
        let output = child.stdout.take().context("listen to a worker")?;
        let connection = ours.greet(engine, process)?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).context("listen to a worker")?;
        ensure!(line == "ready\n", "a worker did not start");
        ours.add_workers(&connection, VMS / WORKERS)?;
        Ok(Self(child))
    }

    /// CPU time of all its threads so far.
    fn cpu(&self) -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{}/task", self.0.id())).context("list a worker's threads")? {
            let text = fs::read_to_string(task?.path().join("schedstat")).context("ask for CPU time")?;
            let first = text.split_ascii_whitespace().next().and_then(|text| text.parse().ok());
            sum += Duration::from_nanos(first.context("read a thread's CPU time")?);
        }
        Ok(sum)
    }

    /// It checks its memory once the engine is gone.
    fn end(mut self) -> Result<()> {
        ensure!(self.0.wait().context("wait for a worker")?.success(), "a worker has lost content");
        Ok(())
    }
}

/// The results of one round.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// CPU time for each merged page, of all processes, in microseconds.
    cpu: f64,
    /// Time for all of them, in milliseconds.
    time: f64,
}

fn round(began: Instant, used: Duration, pages: u64) -> Round {
    Round { cpu: micros_each(used, pages), time: began.elapsed().as_secs_f64() * 1e3 }
}

fn in_workers(bench: &Bench, runs: Runs) -> Result<Round> {
    let pages = runs.layout().duplicates();
    let mut ours = Ours::new(&Settings::default(), &[])?;
    let workers =
        (0..WORKERS).map(|worker| Worker::start(runs, worker, &mut ours)).collect::<Result<Vec<_>>>()?;
    let cpu = || workers.iter().map(Worker::cpu).sum::<Result<Duration>>();
    let (before, began) = (cpu()?, Instant::now());
    let used = ours.merge(bench, pages, pages)?;
    let result = round(began, used + cpu()?.saturating_sub(before), pages);
    drop(ours);
    workers.into_iter().try_for_each(Worker::end)?;
    Ok(result)
}

fn in_this_process(bench: &Bench, runs: Runs) -> Result<Round> {
    let layout = runs.layout();
    let pages = layout.duplicates();
    let memory = Memory::filled(&layout)?;
    let mut ours = Ours::new(&Settings::default(), &memory)?;
    let began = Instant::now();
    let used = ours.merge(bench, pages, pages)?;
    let result = round(began, used, pages);
    verify(&layout, &memory)?;
    Ok(result)
}

fn pick(rounds: &[Round], figure: impl Fn(&Round) -> f64) -> Vec<f64> {
    rounds.iter().map(figure).collect()
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let title = "VMs in processes of their own, by equal pages in a run";
    let mut section = Section::new(title, "two workers", "one process");
    section.note("CPU: for each merged page, of all processes together; time: until all are merged");
    for length in LENGTHS {
        let pages = if length == 1 { bench.size(4096, 1024) } else { bench.size(32_768, 2048) };
        let runs = Runs { pages, length };
        let name = format!("{VMS} VMs, runs of {length}");
        let (workers, single) = bench.in_turns(
            &name,
            || in_workers(bench, runs).map(Some),
            || in_this_process(bench, runs).map(Some),
        )?;
        let figures = |figure: fn(&Round) -> f64| (pick(&workers, figure), pick(&single, figure));
        let (ours, others) = figures(|round| round.cpu);
        let cpu = Measurement::new(format!("{name}, CPU"), "µs/page", &ours, &others);
        section.push(cpu.goal(Goal::RatioAtMost(1.3)));
        let (ours, others) = figures(|round| round.time);
        let time = Measurement::new(format!("{name}, time"), "ms", &ours, &others);
        section.push(if length >= 64 { time.goal(Goal::RatioAtMost(1.2)) } else { time });
    }
    Ok(vec![section])
}
