//! The guest's plan, and its form as a command line.
//!
//! A command line is a sequence of `name=value` words. Numbers are decimal, or hexadecimal after `0x`. The
//! host renders a plan with [`Display`](fmt::Display). The guest parses it with [`Plan::parse`], which never
//! fails: it passes invalid words to the caller and keeps the default.

use core::fmt;

use samepage_hole::{PARAMETER, parse_parameter};

use super::client::ClientPlan;
use super::content::Class;

/// Upper limit for the processors that can share the work.
pub const MOST_PROCESSORS: u32 = 64;

/// A set of page classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Classes(u8);

impl Classes {
    /// Returns the set of the classes in `list`.
    pub const fn new(list: &[Class]) -> Self {
        let mut set = 0;
        let mut i = 0;
        while i < list.len() {
            set |= 1 << list[i] as u8;
            i += 1;
        }
        Self(set)
    }

    /// Returns whether `class` is in the set.
    pub const fn contains(self, class: Class) -> bool {
        self.0 & 1 << class as u8 != 0
    }
}

/// The rate of rewriting pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// Pages per second; 0 writes nothing.
    PerSecond(u32),
    /// As fast as possible: one page is written for each verified page, and pauses are filled with writes.
    Max,
}

/// A way to misbehave, for tests of the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// Raise an exception with an empty interrupt table, so that the processor shuts down.
    Triple,
    /// Read and write MMIO addresses and I/O ports without a device, report the results, then continue.
    Mmio,
    /// Loop for ever.
    Hang,
    /// Halt for ever, or wake each [`Plan::every_ms`] if that is not 0.
    Sleep,
}

impl Crash {
    const ALL: [Self; 4] = [Self::Triple, Self::Mmio, Self::Hang, Self::Sleep];

    /// Returns the value of `crash=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Triple => "triple",
            Self::Mmio => "mmio",
            Self::Hang => "hang",
            Self::Sleep => "sleep",
        }
    }
}

/// The place of the memory hole according to the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HolePlace {
    /// The size in bytes.
    pub bytes: u64,
    /// The guest-physical address.
    pub address: u64,
}

/// The data to publish in the memory hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoleMode {
    /// The truth. Pages of the arena are freed and used again continuously, and the host's requests are
    /// answered. Some pages are used again right after they were published as free.
    Honest,
    /// Confusing data for the host, as fast as possible. The guest's own pages are never published as free.
    Hostile,
    /// All memory as free, while the guest runs in it.
    Ruin,
}

impl HoleMode {
    const ALL: [Self; 3] = [Self::Honest, Self::Hostile, Self::Ruin];

    /// Returns the value of `hole_mode=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Honest => "honest",
            Self::Hostile => "hostile",
            Self::Ruin => "ruin",
        }
    }
}

/// One pass over a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// Read the range and compute its checksum.
    Read,
    /// Write the seeded pattern to the range.
    Write,
    /// Read the range and compare it with the seeded pattern.
    Verify,
    /// Flush, once.
    Flush,
    /// Request the disk's serial number, once.
    Id,
    /// Use blocks through a page cache; see [`client`](super::client).
    Client,
    /// Send malformed requests, then check that the device can be reset and still reads.
    Hostile,
}

impl DiskOp {
    const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Verify, Self::Flush, Self::Id, Self::Client, Self::Hostile];

    /// Returns the word in `blk_mode=` and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Verify => "verify",
            Self::Flush => "flush",
            Self::Id => "id",
            Self::Client => "client",
            Self::Hostile => "hostile",
        }
    }

    /// Returns the operation with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|op| op.name() == name)
    }
}

/// A short sequence of disk passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskOps {
    ops: [Option<DiskOp>; Self::MOST],
}

impl DiskOps {
    /// Limit for the operations of a sequence; further ones are dropped.
    pub const MOST: usize = 8;

    /// Returns the sequence of the operations in `list`.
    pub fn new(list: &[DiskOp]) -> Self {
        let mut ops = [None; Self::MOST];
        for (slot, op) in ops.iter_mut().zip(list) {
            *slot = Some(*op);
        }
        Self { ops }
    }

    /// Returns the operations in order.
    pub fn iter(&self) -> impl Iterator<Item = DiskOp> + '_ {
        self.ops.iter().flatten().copied()
    }
}

/// The use of a virtio-blk device in each round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskPlan {
    /// Guest-physical address of the device's virtio-mmio registers.
    pub base: u64,
    /// The passes of a round.
    pub ops: DiskOps,
    /// First sector of the range.
    pub sector: u64,
    /// Requests in a pass; 0 goes on to the end of the disk.
    pub count: u64,
    /// Bytes in a request, rounded up to whole sectors.
    pub size: u32,
    /// Requests in flight at the same time.
    pub depth: u32,
    /// Number of requests with distinct buffers: request `n` uses buffer `n % window`. So the last read data
    /// stays in guest memory, as in a page cache. At least [`depth`](Self::depth).
    pub window: u32,
    /// The work of a client. It uses the pages of its cache as buffers.
    pub client: ClientPlan,
}

impl DiskPlan {
    /// Returns a plan that reads the first 16 requests of 4 KiB of the device at `base`, one at a time.
    pub fn new(base: u64) -> Self {
        Self {
            base,
            ops: DiskOps::new(&[DiskOp::Read]),
            sector: 0,
            count: 16,
            size: 4096,
            depth: 1,
            window: 1,
            client: ClientPlan::default(),
        }
    }
}

/// The complete work of the guest.
///
/// The guest fills the arena, then does rounds. A round passes over the disk if there is one, walks through
/// the arena if planned, verifies every word of every page, then pauses. Meanwhile pages are rewritten at
/// [`rate`](Self::rate). After the last round, everything is verified once more without writes. With
/// [`HoleMode::Honest`], pages are freed and used again in the pauses. With other modes, nothing is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Percentage of the arena's pages that are identical in all VMs with the same seed.
    pub alike: u8,
    /// Percentage of the arena's pages that are unique.
    pub own: u8,
    /// Percentage of the arena's pages that are filled with zeros. The remaining pages are never touched.
    pub zero: u8,
    /// Pages in a run of one class.
    pub run: u32,
    /// Seed of the alike pages and of the disk pattern.
    pub seed: u32,
    /// This VM's number, which is the seed of its own pages and of all its writes.
    pub vm: u32,
    /// Number of processors that share the work; [`MOST_PROCESSORS`] at most. One works where the memory hole is used.
    pub cpus: u32,
    /// Limit for the pages in the arena; `None` for all usable memory.
    pub pages: Option<u64>,
    /// Usable pages to skip before the arena, to shift it against that of another VM.
    pub skip: u64,
    /// The rate of rewriting pages.
    pub rate: Rate,
    /// The classes of pages to rewrite.
    pub write: Classes,
    /// Percentage of writes that restore a page's base content.
    pub restore: u8,
    /// Number of rounds. 0 continues until the byte `q` arrives on the serial port, which also ends any other
    /// number of rounds early.
    pub rounds: u64,
    /// Pause between rounds, in milliseconds.
    pub every_ms: u64,
    /// Number of words to read at random places in each round before verification. Each place depends on the
    /// word read before, so this work waits only for memory and address translation.
    pub walk: u64,
    /// The misbehaviour after filling the arena, if any.
    pub crash: Option<Crash>,
    /// The number of the only VM that misbehaves; `None` for all VMs with this plan.
    pub crash_vm: Option<u32>,
    /// Frequency of the time stamp counter in kHz, if known.
    pub tsc_khz: Option<u32>,
    /// The use of a disk, if there is one.
    pub disk: Option<DiskPlan>,
    /// The memory hole, if there is one. The monitor adds it to the command line.
    pub hole: Option<HolePlace>,
    /// The data to publish in the hole, if any.
    pub hole_mode: Option<HoleMode>,
    /// Guest-physical address of the virtio-mmio registers of a balloon, if there is one. In the pauses, pages are given to
    /// the host and used again.
    pub balloon: Option<u64>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            alike: 40,
            own: 40,
            zero: 20,
            run: 64,
            seed: 1,
            vm: 0,
            cpus: 1,
            pages: None,
            skip: 0,
            rate: Rate::PerSecond(0),
            write: Classes::new(&[Class::Alike, Class::Own]),
            restore: 0,
            rounds: 1,
            every_ms: 0,
            walk: 0,
            crash: None,
            crash_vm: None,
            tsc_khz: None,
            disk: None,
            hole: None,
            hole_mode: None,
            balloon: None,
        }
    }
}

impl Plan {
    /// Parses a command line. Words that are not valid options are passed to `ignored` and change nothing.
    pub fn parse(line: &str, mut ignored: impl FnMut(&str)) -> Self {
        let mut plan = Self::default();
        for word in line.split_ascii_whitespace() {
            let known = word.split_once('=').and_then(|(name, value)| plan.set(name, value));
            if known.is_none() {
                ignored(word);
            }
        }
        plan
    }

    /// Returns the misbehaviour of this VM, if any.
    pub fn misbehaviour(&self) -> Option<Crash> {
        self.crash.filter(|_| self.crash_vm.is_none_or(|vm| vm == self.vm))
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "alike" => self.alike = percent(value)?,
            "own" => self.own = percent(value)?,
            "zero" => self.zero = percent(value)?,
            "run" => self.run = number32(value)?.max(1),
            "seed" => self.seed = number32(value)?,
            "vm" => self.vm = number32(value)?,
            "cpus" => self.cpus = number32(value).filter(|cpus| (1..=MOST_PROCESSORS).contains(cpus))?,
            "pages" => self.pages = Some(number(value)?),
            "skip" => self.skip = number(value)?,
            "rate" if value == "max" => self.rate = Rate::Max,
            "rate" => self.rate = Rate::PerSecond(number32(value)?),
            "write" => self.write = classes(value)?,
            "restore" => self.restore = percent(value)?,
            "rounds" => self.rounds = number(value)?,
            "every" => self.every_ms = number(value)?,
            "walk" => self.walk = number(value)?,
            "crash" => self.crash = Some(Crash::ALL.into_iter().find(|crash| crash.name() == value)?),
            "crash_vm" => self.crash_vm = Some(number32(value)?),
            "tsc_khz" => self.tsc_khz = Some(number32(value).filter(|khz| *khz > 0)?),
            PARAMETER => {
                let (bytes, address) = parse_parameter(value)?;
                self.hole = Some(HolePlace { bytes, address });
            }
            "hole_mode" => {
                self.hole_mode = Some(HoleMode::ALL.into_iter().find(|mode| mode.name() == value)?)
            }
            "balloon" => self.balloon = Some(number(value)?),
            "blk" => self.disk_mut().base = number(value)?,
            "blk_mode" => self.disk_mut().ops = disk_ops(value)?,
            "blk_sector" => self.disk_mut().sector = number(value)?,
            "blk_count" => self.disk_mut().count = number(value)?,
            "blk_size" => self.disk_mut().size = number32(value)?,
            "blk_depth" => self.disk_mut().depth = number32(value)?,
            "blk_window" => self.disk_mut().window = number32(value)?,
            _ => {
                let name = name.strip_prefix("client_")?;
                let mut disk = self.disk.unwrap_or(DiskPlan::new(0));
                disk.client.set(name, value)?;
                self.disk = Some(disk);
            }
        }
        Some(())
    }

    fn disk_mut(&mut self) -> &mut DiskPlan {
        self.disk.get_or_insert_with(|| DiskPlan::new(0))
    }
}

/// Renders the command line: options that differ from the default, and always the page classes.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        write!(f, "alike={} own={} zero={}", self.alike, self.own, self.zero)?;
        write!(f, " run={} seed={} vm={}", self.run, self.seed, self.vm)?;
        if self.cpus != default.cpus {
            write!(f, " cpus={}", self.cpus)?;
        }
        if let Some(pages) = self.pages {
            write!(f, " pages={pages}")?;
        }
        if self.skip != default.skip {
            write!(f, " skip={}", self.skip)?;
        }
        match self.rate {
            Rate::PerSecond(0) => {}
            Rate::PerSecond(rate) => write!(f, " rate={rate}")?,
            Rate::Max => write!(f, " rate=max")?,
        }
        if self.write != default.write {
            write!(f, " write=")?;
            let classes = Class::ALL.into_iter().filter(|class| self.write.contains(*class));
            list(f, classes.map(Class::name))?;
        }
        if self.restore != default.restore {
            write!(f, " restore={}", self.restore)?;
        }
        write!(f, " rounds={}", self.rounds)?;
        if self.every_ms != default.every_ms {
            write!(f, " every={}", self.every_ms)?;
        }
        if self.walk != default.walk {
            write!(f, " walk={}", self.walk)?;
        }
        if let Some(crash) = self.crash {
            write!(f, " crash={}", crash.name())?;
        }
        if let Some(vm) = self.crash_vm {
            write!(f, " crash_vm={vm}")?;
        }
        if let Some(khz) = self.tsc_khz {
            write!(f, " tsc_khz={khz}")?;
        }
        if let Some(HolePlace { bytes, address }) = self.hole {
            write!(f, " {PARAMETER}={bytes}@{address:#x}")?;
        }
        if let Some(mode) = self.hole_mode {
            write!(f, " hole_mode={}", mode.name())?;
        }
        if let Some(base) = self.balloon {
            write!(f, " balloon={base:#x}")?;
        }
        if let Some(disk) = &self.disk {
            write!(f, " blk={:#x} blk_mode=", disk.base)?;
            list(f, disk.ops.iter().map(DiskOp::name))?;
            write!(f, " blk_sector={} blk_count={} blk_size={}", disk.sector, disk.count, disk.size)?;
            write!(f, " blk_depth={} blk_window={}", disk.depth, disk.window)?;
            if disk.ops.iter().any(|op| op == DiskOp::Client) {
                write!(f, " {}", disk.client)?;
            }
        }
        Ok(())
    }
}

fn list(f: &mut fmt::Formatter<'_>, names: impl Iterator<Item = &'static str>) -> fmt::Result {
    for (i, name) in names.enumerate() {
        if i > 0 {
            f.write_str(",")?;
        }
        f.write_str(name)?;
    }
    Ok(())
}

/// Parses a decimal number, or a hexadecimal one after `0x`.
pub(super) fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None => (text, 10),
    };
    if digits.is_empty() {
        return None;
    }
    digits.bytes().try_fold(0u64, |value, byte| {
        let digit = char::from(byte).to_digit(radix)?;
        value.checked_mul(radix.into())?.checked_add(digit.into())
    })
}

pub(super) fn number32(text: &str) -> Option<u32> {
    u32::try_from(number(text)?).ok()
}

pub(super) fn percent(text: &str) -> Option<u8> {
    u8::try_from(number(text)?).ok().filter(|percent| *percent <= 100)
}

fn classes(text: &str) -> Option<Classes> {
    text.split(',').filter(|name| !name.is_empty()).try_fold(Classes::new(&[]), |set, name| {
        let class = Class::from_name(name).filter(|class| *class != Class::Untouched)?;
        Some(Classes(set.0 | Classes::new(&[class]).0))
    })
}

fn disk_ops(text: &str) -> Option<DiskOps> {
    let mut list = DiskOps::new(&[]);
    let mut slots = list.ops.iter_mut();
    for name in text.split(',').filter(|name| !name.is_empty()) {
        *slots.next()? = Some(DiskOp::from_name(name)?);
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::super::client::Pattern;
    use super::*;

    fn parse(line: &str) -> (Plan, Vec<String>) {
        let mut ignored = Vec::new();
        let plan = Plan::parse(line, |word| ignored.push(word.to_owned()));
        (plan, ignored)
    }

    #[test]
    fn a_rendered_plan_reads_back_as_itself() {
        let plans = [
            Plan::default(),
            Plan {
                alike: 10,
                own: 20,
                zero: 30,
                run: 7,
                seed: 5,
                vm: 99,
                cpus: 64,
                pages: Some(1234),
                skip: 3,
                rate: Rate::Max,
                write: Classes::new(&[Class::Zero, Class::Own]),
                restore: 50,
                rounds: 0,
                every_ms: 250,
                walk: 1 << 40,
                crash: Some(Crash::Mmio),
                crash_vm: Some(99),
                tsc_khz: Some(2_100_000),
                disk: Some(DiskPlan {
                    base: 0xfeb0_0e00,
                    ops: DiskOps::new(&[DiskOp::Write, DiskOp::Flush, DiskOp::Verify]),
                    sector: 8,
                    count: 0,
                    size: 65536,
                    depth: 4,
                    window: 64,
                    client: ClientPlan::default(),
                }),
                hole: Some(HolePlace { bytes: 16384, address: 0xc000_0000 }),
                hole_mode: Some(HoleMode::Hostile),
                balloon: Some(0xd000_1000),
            },
            Plan {
                disk: Some(DiskPlan {
                    ops: DiskOps::new(&[DiskOp::Client]),
                    client: ClientPlan {
                        pages: 9,
                        blocks: 99,
                        run: 32,
                        reads: Pattern::ScanOverZipf,
                        theta: 120,
                        units: 1 << 40,
                        writes: 3,
                        clear: true,
                        scatter: true,
                        check: false,
                        warmup: 2,
                    },
                    ..DiskPlan::new(0xd000_0000)
                }),
                ..Plan::default()
            },
            Plan { rate: Rate::PerSecond(300), write: Classes::new(&[]), ..Plan::default() },
        ];
        for plan in plans {
            assert_eq!(parse(&plan.to_string()), (plan, vec![]));
        }
    }

    #[test]
    fn what_makes_no_sense_is_handed_back_and_changes_nothing() {
        let line = "console=ttyS0 alike=101 own=x zero= run rate=-1 write=own,none crash=maybe seed=0x1g tsc_khz=0 cpus=65 \
             samepage.hole=1 hole_mode=odd";
        let (plan, ignored) = parse(line);
        assert_eq!(plan, Plan::default());
        assert_eq!(ignored.join(" "), line);
    }

    #[test]
    fn one_vm_of_many_can_misbehave() {
        let of = |vm| parse(&format!("crash=triple crash_vm=1 vm={vm}")).0.misbehaviour();
        assert_eq!((of(0), of(1)), (None, Some(Crash::Triple)));
        assert_eq!(parse("crash=triple vm=3").0.misbehaviour(), Some(Crash::Triple));
        assert_eq!(parse("crash_vm=0").0.misbehaviour(), None);
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal_and_never_wrap() {
        assert_eq!(number("18446744073709551615"), Some(u64::MAX));
        assert_eq!(number("18446744073709551616"), None);
        assert_eq!(number("0xffffffffffffffff"), Some(u64::MAX));
        assert_eq!(number("0x10000000000000000"), None);
        assert_eq!(number("0x"), None);
        assert_eq!(number(""), None);
    }
}
