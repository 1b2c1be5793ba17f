//! The agent as init: the first process of a guest, which must never end.
//!
//! The kernel passes unknown parameters to init as environment variables, so commands arrive as `agent=LIST`
//! on the kernel's command line. After the commands, successful or not, the agent resets the machine. With
//! the kernel parameter `reboot=k`, the reset uses the keyboard controller (writing 0xfe to port 0x64), which
//! ends a VM of samepage.
//!
//! Ctrl-Alt-Del, with which a host asks a guest to shut down, also resets the machine, before the commands
//! have run. Written data reaches the disks first.

use crate::asked;
use crate::command::parse_list;
use crate::run::{Runner, say};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot, sysinfo};
use rustix::time::{ClockId, clock_gettime};
use std::thread;

/// The kernel parameter with the commands.
pub const PARAMETER: &str = "agent";

/// The file systems and mount points that init mounts. A kernel may lack any of them.
const MOUNTS: [(&str, &str); 3] = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];

/// Runs the commands on the kernel's command line and resets the machine.
pub fn run() -> ! {
    for (kind, dir) in MOUNTS {
        // The user of a missing file system reports the error.
        let _ = mount(kind, dir, kind, MountFlags::empty(), None);
    }
    asked::on_ctrl_alt_del(|| {
        say("asked to end");
        reset();
    });
    say(ready_line());
    let mut runner = Runner::new(true);
    match parse_list(&std::env::var(PARAMETER).unwrap_or_default()) {
        Ok(commands) => {
            runner.run(&commands);
        }
        Err(error) => say(format_args!("{} failed: {error}", error.name())),
    }
    runner.unmount_all();
    reset();
}

/// Resets the machine, after written data is on the disks.
fn reset() -> ! {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::Restart) {
        say(format_args!("poweroff failed: {error}"));
    }
    // The kernel panics if init ends, so wait for ever if the reset fails.
    loop {
        thread::park();
    }
}

/// Returns the line with the time since the kernel's start, and the memory of the kernel.
fn ready_line() -> String {
    let uptime = clock_gettime(ClockId::Boottime);
    let memory = sysinfo();
    let total = memory.totalram.saturating_mul(u64::from(memory.mem_unit));
    format!(
        "ready uptime_ms={} mem_total_kib={}",
        uptime.tv_sec * 1000 + uptime.tv_nsec / 1_000_000,
        total / 1024
    )
}
