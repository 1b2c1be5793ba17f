//! `samepage analyze`: estimates the savings of sharing in memory images, or in the memory of running VMs of
//! this or another monitor. The memory is read and never changed.
//!
//! All inputs are opened and checked before the first is read, so that all faults are reported early. Each
//! file and each process is one VM. See `docs/analyze.md`.

pub mod args;
mod elf;
mod file;
mod foreign;
mod lime;
mod maps;
pub mod oracle;
mod process;
mod progress;
mod svg;
mod table;
mod xen;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use crate::oracle::{Oracle, Report};
use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::args::AnalyzeArgs;
use file::{FileImage, Format};
use maps::GuestMemory;
use process::Process;
use progress::Progress;
use samepage_process::tell::tell;

/// The name of the program that holds several VMs in one process.
const OWN_NAME: &str = "samepage";

/// The output of `--json`: the inputs and the [`Report`].
#[derive(Debug, Serialize)]
struct Analysis {
    /// The inputs, one for each VM, in the order of the report's images.
    inputs: Vec<Input>,
    /// Time for reading and counting, in seconds.
    seconds: f64,
    #[serde(flatten)]
    report: Report,
}

/// The source of a VM's memory.
#[derive(Debug, Serialize)]
struct Input {
    /// The name in the report.
    name: String,
    /// The earlier input that is the same file or process.
    #[serde(skip_serializing_if = "Option::is_none")]
    same_as: Option<String>,
    #[serde(flatten)]
    origin: Origin,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Origin {
    /// A raw memory image.
    Raw { path: PathBuf },
    /// An ELF core.
    Core { path: PathBuf },
    /// A file of LiME.
    Lime { path: PathBuf },
    /// A running process.
    Process { pid: u32, mappings: Vec<Part> },
}

/// A part of a process's memory that counts as guest memory.
#[derive(Debug, Serialize)]
struct Part {
    /// The name.
    what: String,
    /// The addresses in hexadecimal, as in `/proc/PID/maps`.
    range: String,
    /// Size in bytes.
    bytes: u64,
}

/// The open source of a VM's memory.
enum Source {
    File(PathBuf, FileImage),
    Process { pid: u32, process: Process },
}

/// Runs the command.
pub fn main(args: &AnalyzeArgs) -> Result<ExitCode> {
    let analysis = analyze(args)?;
    if let Some(path) = &args.svg {
        std::fs::write(path, svg::draw(&analysis.report))
            .with_context(|| format!("the picture cannot be written to {}", path.display()))?;
    }
    let text =
        if args.json { serde_json::to_string_pretty(&analysis)? + "\n" } else { table::format(&analysis) };
    io::stdout().write_all(text.as_bytes()).context("the result cannot be written to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn analyze(args: &AnalyzeArgs) -> Result<Analysis> {
    let started = Instant::now();
    let sources = open(args)?;
    for (at, source) in sources.iter().enumerate() {
        if let Some(first) = source.same_as(&sources[..at]) {
            tell(format_args!("{source} is the same as {first}: all of it counts as shared"));
        }
    }
    let mut progress = Progress::new(sources.iter().map(Source::bytes).sum());
    let mut oracle = Oracle::new().context("a key for digests cannot be made from /dev/urandom")?;
    let mut inputs = Vec::new();
    for (at, source) in sources.iter().enumerate() {
        let same_as = source.same_as(&sources[..at]).map(ToString::to_string);
        source.feed(args.each_mapping, same_as.as_deref(), &mut oracle, &mut inputs, &mut progress)?;
    }
    drop(progress);
    let report = oracle.report();
    Ok(Analysis { inputs, seconds: started.elapsed().as_secs_f64(), report })
}

fn open(args: &AnalyzeArgs) -> Result<Vec<Source>> {
    if !args.ranges.is_empty() && args.pids.len() != 1 {
        bail!("--range applies to one process: give --pid once");
    }
    let files = args.files.iter().map(|path| {
        let image = FileImage::open(path, args.format, args.min_mapping)
            .with_context(|| format!("{} cannot be used", path.display()))?;
        Ok(Source::File(path.clone(), image))
    });
    let processes = args.pids.iter().map(|&pid| {
        let process = Process::open(pid, &args.ranges, args.min_mapping)
            .with_context(|| format!("process {pid} cannot be used"))?;
        Ok(Source::Process { pid, process })
    });
    files.chain(processes).collect()
}

impl Source {
    fn bytes(&self) -> u64 {
        match self {
            Self::File(_, image) => image.bytes(),
            Self::Process { process, .. } => process.guest.iter().map(GuestMemory::bytes).sum(),
        }
    }

    /// Returns the input among these that is the same file or process.
    fn same_as<'a>(&self, others: &'a [Source]) -> Option<&'a Source> {
        others.iter().find(|other| match (self, other) {
            (Self::File(_, one), Self::File(_, other)) => one.identity() == other.identity(),
            (Self::Process { pid: one, .. }, Self::Process { pid: other, .. }) => one == other,
            _ => false,
        })
    }

    /// Reads all memory of the input, as one VM or as several.
    fn feed(
        &self,
        each_mapping: bool,
        same_as: Option<&str>,
        oracle: &mut Oracle,
        inputs: &mut Vec<Input>,
        progress: &mut Progress,
    ) -> Result<()> {
        match self {
            Self::File(path, image) => {
                let name = path.display().to_string();
                image
                    .feed(&mut oracle.image(&name), progress)
                    .with_context(|| format!("{} cannot be read", path.display()))?;
                let path = path.clone();
                let origin = match image.format() {
                    Format::Raw => Origin::Raw { path },
                    Format::Core => Origin::Core { path },
                    Format::Lime => Origin::Lime { path },
                };
                inputs.push(Input { name, same_as: same_as.map(str::to_owned), origin });
            }
            Self::Process { pid, process } => {
                let each = each_mapping || process.program == OWN_NAME;
                let vms: Vec<&[GuestMemory]> =
                    if each { process.guest.chunks(1).collect() } else { vec![&process.guest] };
                for (index, parts) in vms.iter().enumerate() {
                    let number =
                        if vms.len() > 1 { format!(", memory {}", index + 1) } else { String::new() };
                    let name = format!("{} (process {pid}{number})", process.program);
                    let mut image = oracle.image(&name);
                    for part in *parts {
                        process
                            .feed(part, &mut image, progress)
                            .with_context(|| format!("process {pid} cannot be read"))?;
                    }
                    let mappings = parts.iter().map(Part::of).collect();
                    let origin = Origin::Process { pid: *pid, mappings };
                    inputs.push(Input { name, same_as: same_as.map(str::to_owned), origin });
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, _) => path.display().fmt(f),
            Self::Process { pid, .. } => write!(f, "process {pid}"),
        }
    }
}

impl Part {
    fn of(memory: &GuestMemory) -> Self {
        let range = memory.range();
        Self {
            what: memory.name.clone(),
            range: format!("{:x}-{:x}", range.start, range.end),
            bytes: memory.bytes(),
        }
    }
}
