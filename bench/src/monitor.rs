//! The compared monitors and their processes.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::qemu;

/// Memory of each guest, in MiB.
pub(super) const GUEST_MIB: u32 = 64;
/// The demo guest's command line: a few pages of memory, then idle for ever.
const COMMAND_LINE: &str = "pages=8 crash=sleep vm=";

/// samepage, and how its VMs are described.
#[derive(Debug)]
pub(super) struct Samepage {
    pub(super) program: PathBuf,
    /// As `samepage run` has it.
    pub(super) bus: String,
}

impl Samepage {
    /// Returns the command that runs `vms` guests, as users run it, with statistics on request.
    pub(super) fn command(&self, kernel: &Path, vms: u32, statistics: bool) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("run").arg("--kernel").arg(kernel);
        command.args(["--memory", &format!("{GUEST_MIB}M"), "--count", &vms.to_string()]);
        command.args(["--cmdline", &format!("{COMMAND_LINE}{{index}}"), "--bus", &self.bus]);
        if statistics {
            command.args(["--stats", "-"]);
        }
        command
    }
}

/// Returns the command by which QEMU runs guest number `vm`.
pub(super) fn qemu(kernel: &Path, vm: u32) -> Command {
    qemu::command(kernel, GUEST_MIB.into(), &format!("{COMMAND_LINE}{vm}"))
}

/// A running monitor. Dropping this value ends it.
pub(super) struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
    name: String,
}

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let output = child.stdout.take().context("no pipe to a monitor was made")?;
        Ok(Self { child, output: BufReader::new(output), name })
    }

    /// Returns the process ID.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the next line that the monitor or a guest prints.
    pub(super) fn line(&mut self) -> Result<String> {
        match self.next_line()? {
            Some(line) => Ok(line),
            None => bail!("{} ended before its guest had started: {}", self.name, self.child.wait()?),
        }
    }

    /// Returns the next line that the monitor or a guest prints, or `None` at its end.
    pub(super) fn next_line(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let count =
            self.output.read_line(&mut line).with_context(|| format!("reading from {}", self.name))?;
        Ok((count > 0).then_some(line))
    }

    /// Waits until `vms` guests have filled their memory and are idle.
    pub(super) fn wait_until_idle(&mut self, vms: u32) -> Result<()> {
        let mut ready = 0;
        while ready < vms {
            ready += u32::from(self.line()?.contains("ready pages="));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both calls fail only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the time from starting a monitor to the first byte on its guest's serial port.
pub(super) fn time_to_first_byte(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    let mut monitor = Running::start(command)?;
    let read = monitor.output.read(&mut [0]).with_context(|| format!("reading from {}", monitor.name))?;
    let elapsed = start.elapsed();
    if read == 0 {
        monitor.line()?;
    }
    Ok(elapsed)
}
