//! Being init: the first process of a guest, which must never end.
//!
//! The kernel hands every parameter that it doesn't know to init as an environment variable, so
//! the commands arrive as `agent=LIST` on the kernel's command line. When they have run, whatever
//! came of them, the machine is reset: with the kernel parameter `reboot=k` through the keyboard
//! controller (writing 0xfe to port 0x64), which ends a virtual machine of samepage.
//!
//! Ctrl-Alt-Del, by which a host asks a guest to end, does the same before the commands have run: what was
//! written gets to the disks first.

use crate::asked;
use crate::command::parse_list;
use crate::run::{Runner, say};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot, sysinfo};
use rustix::time::{ClockId, clock_gettime};
use std::thread;

/// The kernel parameter that holds the commands.
pub const PARAMETER: &str = "agent";

/// What init mounts, as (file system, mount point). A kernel may lack any of them.
const MOUNTS: [(&str, &str); 3] = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];

/// Runs the commands on the kernel's command line and resets the machine.
pub fn run() -> ! {
    for (kind, dir) in MOUNTS {
        // What needs a missing file system says so when it is used.
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

/// Resets the machine, once what was written is on the disks.
fn reset() -> ! {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::Restart) {
        say(format_args!("poweroff failed: {error}"));
    }
    // The kernel panics when init ends; a machine that did not reset is left standing instead.
    loop {
        thread::park();
    }
}

/// The time since the kernel started its clock, and the memory that it manages.
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
