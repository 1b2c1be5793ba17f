//! The end of a process that hosts VMs: asks all guests at once to shut down, and waits for them.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;
use std::{fmt, io};

use samepage_host::registry::Registry;
use samepage_machine::VmState;
use samepage_machine::vm::TimeToEnd;
use vmm_sys_util::timerfd::TimerFd;

use samepage_process::tell::tell;

/// The shortest time of a timer: zero turns it off.
const SHORTEST: Duration = Duration::from_millis(1);
/// How many VMs a message names. It counts the others.
const NAMED: usize = 8;

/// An end in progress.
pub(crate) struct Ending {
    time: TimeToEnd,
    timer: TimerFd,
}

impl Ending {
    /// Asks all guests to shut down within `timeout`. VMs whose guests cannot be asked end at once.
    ///
    /// # Errors
    /// Fails if no timer can be opened; then no guest was asked.
    pub(crate) fn begin(registry: &Registry, timeout: Duration) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        let time = TimeToEnd::new(timeout);
        timer.reset(time.until_next().max(SHORTEST), None).map_err(io::Error::from)?;
        let asked = registry.ask_to_end();
        if !asked.is_empty() {
            tell(format_args!(
                "asked {} to end; waiting for up to {} s; another signal ends at once",
                Names(&asked),
                timeout.as_secs()
            ));
        }
        Ok(Self { time, timer })
    }

    /// Prints the VMs that still run and asks their guests again, or kills them at the end of the time. To be called
    /// when this file is readable.
    ///
    /// # Errors
    /// Fails if the timer fails.
    pub(crate) fn check(&mut self, registry: &Registry) -> io::Result<()> {
        self.timer.wait().map_err(io::Error::from)?;
        let vms = registry.machines();
        let waited: Vec<_> =
            vms.iter().filter(|vm| vm.state() != VmState::Ended).map(|vm| vm.name().to_owned()).collect();
        let rest = self.time.left();
        if rest.is_zero() {
            if !waited.is_empty() {
                tell(format_args!("killed, because they did not end in time: {}", Names(&waited)));
            }
            registry.close();
            return Ok(());
        }
        registry.ask_again(self.time.is_short());
        if !waited.is_empty() {
            tell(format_args!("waiting for {}, {} s more", Names(&waited), rest.as_secs_f64().ceil()));
        }
        self.timer.reset(self.time.until_next().max(SHORTEST), None).map_err(io::Error::from)
    }
}

impl AsRawFd for Ending {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// A shortened list of VMs' names.
struct Names<'a>(&'a [String]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(NAMED)];
        write!(f, "{}", shown.join(", "))?;
        match self.0.len() - shown.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_names_are_counted() {
        let names: Vec<_> = (0..10).map(|number| format!("vm-{number}")).collect();
        assert_eq!(Names(&names[..2]).to_string(), "vm-0, vm-1");
        assert!(Names(&names).to_string().ends_with("vm-7 and 2 more"), "{}", Names(&names));
    }
}
