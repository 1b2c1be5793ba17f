//! Publishing again and again, at little cost.
//!
//! A pass over 1 GiB reads `/proc/kpageflags` for some 30 ms. Unless an interval is given, passes are so far
//! apart that they take less than one part in a hundred of a processor; a host that asks for a pass gets it
//! as soon as that allows.

use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, Timespec, clock_gettime};
use samepage_hole::GuestHeader;

use super::mapping::Mapping;
use super::pages::{BATCH, KernelFlags};
use super::{Error, Parameters, publish};
use crate::run::say;

/// Passes are at least so far apart, unless an interval is given.
const SHORTEST: Duration = Duration::from_secs(2);
/// Time between passes for each unit of a pass's CPU time.
const REST: u32 = 100;
/// How often the host's header is looked at between passes.
const GLANCE: Duration = Duration::from_secs(1);
/// How long to wait before a hole that has gone is looked for again.
const GONE: Duration = Duration::from_secs(10);

/// How to publish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The time between two passes, whatever they cost; `None`: what cost and host suggest.
    pub interval: Option<Duration>,
    /// Print a line for each pass.
    pub verbose: bool,
}

/// What a pass was like.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// What the host was told.
    pub header: GuestHeader,
    /// How long it took.
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

/// The hole of this guest, and what is published in it.
#[derive(Debug)]
pub struct Publisher {
    mapping: Mapping,
    flags: KernelFlags,
    features: u32,
    words: Box<[u32; BATCH]>,
    options: Options,
}

impl Publisher {
    /// Finds the hole of the running guest and maps it.
    ///
    /// # Errors
    /// There is none, or the kernel does not show what is needed.
    pub fn open(options: Options) -> Result<Self, Error> {
        let parameters = Parameters::of_kernel()?;
        let (bytes, address) = parameters.hole.ok_or(Error::NoHole)?;
        Ok(Self {
            flags: KernelFlags::open()?,
            mapping: Mapping::open(bytes, address)?,
            features: parameters.features,
            words: Box::new([0; BATCH]),
            options,
        })
    }

    /// The hole, and the kernel's flags.
    pub fn parts(&mut self) -> (&Mapping, &mut KernelFlags) {
        (&self.mapping, &mut self.flags)
    }

    /// Goes over all page frames once and tells the host.
    ///
    /// # Errors
    /// The hole has gone, or the kernel's flags cannot be read.
    pub fn pass(&mut self) -> Result<Pass, Error> {
        let (hole, host) = (self.mapping.hole()?, self.mapping.header()?);
        let (start, cpu) = (Instant::now(), cpu_time());
        let last = hole.guest_header().map_or(0, |header| header.generation);
        let changed = publish::all(&hole, &host, &mut self.flags, &mut self.words)?;
        let cpu = cpu_time().saturating_sub(cpu);
        let now = duration(clock_gettime(ClockId::Monotonic));
        let header = GuestHeader {
            features: self.features,
            generation: last.wrapping_add(1),
            answered: host.requested,
            next_ms: milliseconds(self.pause(cpu, host.interval_ms)),
            time_ms: now.as_millis() as u64,
            changed,
            cpu_us: u32::try_from(cpu.as_micros()).unwrap_or(u32::MAX),
        };
        hole.set_guest_header(&header);
        self.mapping.ring();
        Ok(Pass { header, took: start.elapsed() })
    }

    /// Publishes for ever.
    ///
    /// # Errors
    /// The kernel's flags can be read no more.
    pub fn serve(&mut self) -> Result<std::convert::Infallible, Error> {
        let mut gone = false;
        loop {
            match self.pass() {
                Ok(pass) => {
                    gone = false;
                    if self.options.verbose {
                        say(format_args!("pass {pass}"));
                    }
                    self.rest(&pass);
                }
                // A guest that was moved may find it again.
                Err(error @ Error::Undescribed { .. }) => {
                    if !std::mem::replace(&mut gone, true) {
                        say(format_args!("waiting: {error}"));
                    }
                    thread::sleep(GONE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the next pass is due: by time, or since the host asks for it.
    fn rest(&self, pass: &Pass) {
        let ended = Instant::now();
        let pause = Duration::from_millis(pass.header.next_ms.into());
        let earliest = match self.options.interval {
            Some(_) => Duration::ZERO,
            None => self.pause(Duration::from_micros(pass.header.cpu_us.into()), 0),
        };
        while let Some(left) = pause.checked_sub(ended.elapsed()).filter(|left| !left.is_zero()) {
            let asked = self.mapping.header().is_ok_and(|host| host.requested != pass.header.answered);
            if asked && ended.elapsed() >= earliest {
                return;
            }
            thread::sleep(left.min(GLANCE));
        }
    }

    /// The time from the end of a pass that took so much of the processor to the next.
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
