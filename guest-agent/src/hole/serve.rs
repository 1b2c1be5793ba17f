//! Publishes repeatedly, at little cost.
//!
//! A pass over 1 GiB reads `/proc/kpageflags` for about 30 ms. Without a given interval, passes take less
//! than a hundredth of a processor. A pass that the host requests begins as soon as this limit allows.

use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, Timespec, clock_gettime};
use samepage_hole::{GuestHeader, HostHeader};

use super::check::{self, Checked};
use super::mapping::Mapping;
use super::pages::{BATCH, KernelFlags};
use super::port::Port;
use super::{Error, Parameters, publish};
use crate::run::say;

/// Shortest time between passes, without a given interval.
const SHORTEST: Duration = Duration::from_secs(2);
/// Time between passes, in units of a pass's CPU time.
const REST: u32 = 100;
/// Interval of polling the host's header between passes.
const GLANCE: Duration = Duration::from_secs(1);
/// Time before another search for a hole that has disappeared.
const GONE: Duration = Duration::from_secs(10);
/// Time in which the kernel must find a port that the host provides.
const FINDING: Duration = Duration::from_secs(10);

/// The options for publishing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The time between two passes, whatever they cost. `None` derives it from the cost and the host's wish.
    pub interval: Option<Duration>,
    /// Print a line for each pass.
    pub verbose: bool,
}

/// The results of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// The published header.
    pub header: GuestHeader,
    /// The duration.
    pub took: Duration,
}

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let GuestHeader { generation, changed, answered, cpu_us, next_ms, .. } = self.header;
        let ms = self.took.as_millis();
        write!(
            f,
            "generation={generation} answered={answered} changed={changed} pass_ms={ms} cpu_us={cpu_us} next_ms={next_ms}"
        )
    }
}

/// The connection to the hole.
#[derive(Debug)]
enum Way {
    Memory(Mapping),
    Port(Port),
}

impl Way {
    fn open(parameters: &Parameters) -> Result<Self, Error> {
        let Some((bytes, address)) = parameters.hole else {
            let wait = if parameters.port { FINDING } else { Duration::ZERO };
            return match Port::open(wait) {
                Err(Error::NoPort) if !parameters.port => Err(Error::NoHole),
                port => port.map(Self::Port),
            };
        };
        match Mapping::open(bytes, address) {
            // If the kernel forbids that, the host may provide a port too.
            Err(error @ Error::Memory { .. }) => {
                Port::open(Duration::ZERO).map(Self::Port).map_err(|_| error)
            }
            mapping => mapping.map(Self::Memory),
        }
    }

    /// Returns the host's present header.
    fn header(&mut self) -> Result<HostHeader, Error> {
        match self {
            Self::Memory(mapping) => mapping.header(),
            Self::Port(port) => port.header(),
        }
    }

    /// Returns the number of the next pass.
    fn generation(&self, now: Duration) -> Result<u32, Error> {
        let last = match self {
            Self::Memory(mapping) => mapping.hole()?.guest_header().map_or(0, |header| header.generation),
            // The number differs from that of an earlier agent.
            Self::Port(_) => now.as_millis() as u32,
        };
        Ok(last.wrapping_add(1))
    }

    fn end_pass(&mut self, header: &GuestHeader) -> Result<(), Error> {
        match self {
            Self::Memory(mapping) => {
                mapping.hole()?.set_guest_header(header);
                mapping.ring();
                Ok(())
            }
            Self::Port(port) => port.end_pass(header),
        }
    }

    /// Waits for a possible message of the host, at most for this time.
    fn wait(&mut self, longest: Duration) -> Result<(), Error> {
        match self {
            // The host's writes to memory cause no event.
            Self::Memory(_) => thread::sleep(longest.min(GLANCE)),
            Self::Port(port) => port.wait(longest)?,
        }
        Ok(())
    }

    /// Searches again for a hole that has disappeared.
    fn again(&mut self) {
        if let Self::Port(port) = self {
            // If opening fails, the next pass reports it.
            let _ = port.connect();
        }
    }
}

/// The hole of this guest, and the published words.
#[derive(Debug)]
pub struct Publisher {
    way: Way,
    flags: KernelFlags,
    features: u32,
    words: Box<[u32; BATCH]>,
    options: Options,
}

impl Publisher {
    /// Finds the hole of the running guest, and maps it or opens its port.
    ///
    /// # Errors
    /// Fails if there is no hole, or if the kernel does not provide the flags.
    pub fn open(options: Options) -> Result<Self, Error> {
        let parameters = Parameters::of_kernel()?;
        let way = Way::open(&parameters)?;
        Ok(Self {
            flags: KernelFlags::open()?,
            way,
            features: parameters.features,
            words: Box::new([0; BATCH]),
            options,
        })
    }

    /// Publishes all of RAM, and compares the result with the kernel's flags.
    ///
    /// # Errors
    /// Fails if the hole has disappeared, or if the kernel's flags cannot be read.
    pub fn check(&mut self) -> Result<Checked, Error> {
        let header = self.way.header()?;
        match &mut self.way {
            Way::Memory(mapping) => check::check(&mut mapping.hole()?, &header, &mut self.flags),
            Way::Port(port) => {
                let checked = check::check(port, &header, &mut self.flags)?;
                port.flush()?;
                Ok(checked)
            }
        }
    }

    /// Publishes all page frames once and notifies the host.
    ///
    /// # Errors
    /// Fails if the hole has disappeared, or if the kernel's flags cannot be read.
    pub fn pass(&mut self) -> Result<Pass, Error> {
        let host = self.way.header()?;
        let (start, cpu) = (Instant::now(), cpu_time());
        let (flags, words) = (&mut self.flags, &mut self.words);
        let changed = match &mut self.way {
            Way::Memory(mapping) => publish::all(&mut mapping.hole()?, &host, flags, words)?,
            Way::Port(port) => publish::all(port, &host, flags, words)?,
        };
        let cpu = cpu_time().saturating_sub(cpu);
        let now = duration(clock_gettime(ClockId::Monotonic));
        let header = GuestHeader {
            features: self.features,
            generation: self.way.generation(now)?,
            answered: host.requested,
            next_ms: milliseconds(self.pause(cpu, host.interval_ms)),
            time_ms: now.as_millis() as u64,
            changed,
            cpu_us: u32::try_from(cpu.as_micros()).unwrap_or(u32::MAX),
        };
        self.way.end_pass(&header)?;
        Ok(Pass { header, took: start.elapsed() })
    }

    /// Publishes for ever.
    ///
    /// # Errors
    /// Fails if the kernel's flags cannot be read any more.
    pub fn serve(&mut self) -> Result<std::convert::Infallible, Error> {
        let mut gone = false;
        loop {
            let passed = self.pass().and_then(|pass| {
                gone = false;
                if self.options.verbose {
                    say(format_args!("pass {pass}"));
                }
                self.rest(&pass)
            });
            match passed {
                Ok(()) => {}
                Err(error) if error.may_pass() => {
                    if !std::mem::replace(&mut gone, true) {
                        say(format_args!("waiting: {error}"));
                    }
                    thread::sleep(GONE);
                    self.way.again();
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the next pass is due, by time or by the host's request.
    fn rest(&mut self, pass: &Pass) -> Result<(), Error> {
        let ended = Instant::now();
        let pause = Duration::from_millis(pass.header.next_ms.into());
        let earliest = match self.options.interval {
            Some(_) => Duration::ZERO,
            None => self.pause(Duration::from_micros(pass.header.cpu_us.into()), 0),
        };
        while let Some(left) = pause.checked_sub(ended.elapsed()).filter(|left| !left.is_zero()) {
            let asked = self.way.header()?.requested != pass.header.answered;
            let early = earliest.saturating_sub(ended.elapsed());
            if asked && early.is_zero() {
                break;
            }
            self.way.wait(if asked { left.min(early) } else { left })?;
        }
        Ok(())
    }

    /// Returns the time between the end of a pass with this CPU time and the next pass.
    fn pause(&self, cpu: Duration, wanted_ms: u32) -> Duration {
        let wanted = Duration::from_millis(wanted_ms.into());
        self.options.interval.unwrap_or_else(|| SHORTEST.max(wanted).max(cpu.saturating_mul(REST)))
    }
}

fn cpu_time() -> Duration {
    duration(clock_gettime(ClockId::ThreadCPUTime))
}

fn duration(time: Timespec) -> Duration {
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
