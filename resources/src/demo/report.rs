//! The lines that the guest prints, one report each: a word for the kind, then `name=value` words.
//!
//! If a report's first value has the report's own name, the line starts with that value (`round=3
//! verified=…`). The guest writes reports with [`Report::write`], and the host parses them with
//! [`Report::parse`]. Both use the same description of the fields.

use core::fmt;

use super::content::Class;
use super::plan::{DiskOp, number};

/// A number that is printed in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Hex(pub u64);

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A short word from outside the guest, such as an option or a disk's serial number. It is truncated after
/// [`Text::MOST`] bytes, with `?` for every byte that is not printable ASCII.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Text {
    bytes: [u8; Self::MOST],
    len: usize,
}

impl Text {
    /// Length limit in bytes.
    pub const MOST: usize = 32;

    /// Returns the printable form of `raw`.
    pub fn new(raw: &[u8]) -> Self {
        let mut text = Self { bytes: [0; Self::MOST], len: raw.len().min(Self::MOST) };
        for (to, from) in text.bytes.iter_mut().zip(raw) {
            *to = if from.is_ascii_graphic() { *from } else { b'?' };
        }
        text
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..self.len]).unwrap_or_default()
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// The kind of a probed address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// A memory address.
    Mmio,
    /// An I/O port.
    Pio,
}

/// A value in a report.
trait Value: Sized {
    fn write(&self, out: &mut dyn FnMut(&[u8]));
    fn parse(text: &str) -> Option<Self>;
}

impl Value for u64 {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        write_number(*self, 10, out);
    }

    fn parse(text: &str) -> Option<Self> {
        number(text)
    }
}

impl Value for Hex {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        out(b"0x");
        write_number(self.0, 16, out);
    }

    fn parse(text: &str) -> Option<Self> {
        number(text).map(Self)
    }
}

impl Value for Text {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        out(&self.bytes[..self.len]);
    }

    fn parse(text: &str) -> Option<Self> {
        Some(Self::new(text.as_bytes()))
    }
}

impl Value for Class {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        out(self.name().as_bytes());
    }

    fn parse(text: &str) -> Option<Self> {
        Self::from_name(text)
    }
}

impl Value for DiskOp {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        out(self.name().as_bytes());
    }

    fn parse(text: &str) -> Option<Self> {
        Self::from_name(text)
    }
}

impl Value for Space {
    fn write(&self, out: &mut dyn FnMut(&[u8])) {
        out(match self {
            Self::Mmio => b"mmio",
            Self::Pio => b"pio",
        });
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "mmio" => Some(Self::Mmio),
            "pio" => Some(Self::Pio),
            _ => None,
        }
    }
}

fn write_number(mut value: u64, radix: u64, out: &mut dyn FnMut(&[u8])) {
    let mut digits = [0; 20];
    for (used, slot) in digits.iter_mut().rev().enumerate() {
        *slot = b"0123456789abcdef"[(value % radix) as usize];
        value /= radix;
        if value == 0 {
            return out(&digits[19 - used..]);
        }
    }
}

/// The reason why a line is not a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParseError {
    /// The line starts with no report's word: another program wrote to the serial port.
    NotAReport,
    /// A report's field is missing or has an invalid value.
    Field {
        /// The report's word.
        report: &'static str,
        /// The field.
        field: &'static str,
    },
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAReport => write!(f, "the line is not a report of the demo guest"),
            Self::Field { report, field } => {
                write!(f, "the guest's \"{report}\" line has no readable \"{field}=\"")
            }
        }
    }
}

impl core::error::Error for ParseError {}

macro_rules! reports {
    ($(
        $(#[$doc:meta])*
        $word:literal $variant:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty = $name:literal,)* }
    )*) => {
        /// A line of the guest's output.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Report {
            $($(#[$doc])* $variant { $($(#[$field_doc])* $field: $type,)* },)*
        }

        impl Report {
            /// Writes the line with its newline, in pieces.
            pub fn write(&self, out: &mut dyn FnMut(&[u8])) {
                match self {
                    $(Self::$variant { $($field,)* } => {
                        let mut separator = start($word, [$($name),*].first().copied(), out);
                        $(
                            out(separator);
                            out(concat!($name, "=").as_bytes());
                            Value::write($field, out);
                            separator = b" ";
                        )*
                        let _ = separator;
                    })*
                }
                out(b"\n");
            }

            /// Parses a line. Unknown words are skipped.
            ///
            /// # Errors
            /// Fails with the fault of the line.
            pub fn parse(line: &str) -> Result<Self, ParseError> {
                let first = line.split_ascii_whitespace().next().unwrap_or_default();
                match first.split_once('=').map_or(first, |(name, _)| name) {
                    $($word => Ok(Self::$variant {
                        $($field: field(line, $word, $name)?,)*
                    }),)*
                    _ => Err(ParseError::NotAReport),
                }
            }
        }
    };
}

/// Writes a report's word unless it equals the name of the first field. Returns the separator before the
/// first field.
fn start(word: &str, first_field: Option<&str>, out: &mut dyn FnMut(&[u8])) -> &'static [u8] {
    if first_field == Some(word) {
        return b"";
    }
    out(word.as_bytes());
    b" "
}

fn field<T: Value>(line: &str, report: &'static str, field: &'static str) -> Result<T, ParseError> {
    line.split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(name, _)| *name == field)
        .and_then(|(_, value)| T::parse(value))
        .ok_or(ParseError::Field { report, field })
}

reports! {
    /// The guest runs and has read its command line.
    "start" Start {
        /// Usable memory, in pages.
        ram: u64 = "ram",
        /// Frequency of the time stamp counter in kHz, as told or as found out.
        tsc_khz: u64 = "tsc_khz",
        /// Frequency of the local APIC's timer in kHz; 0 if there is none, so that pauses are spun away.
        timer_khz: u64 = "timer_khz",
    }
    /// A word of the command line that means nothing to the guest.
    "ignored" Ignored {
        /// The word.
        option: Text = "option",
    }
    /// The other processors were started, or not: then the first one does all the work.
    "processors" Processors {
        /// Processors that the plan asks for.
        asked: u64 = "asked",
        /// Processors that work.
        working: u64 = "working",
        /// Time that their start took, in microseconds.
        us: u64 = "us",
    }
    /// The arena is filled.
    "ready" Ready {
        /// Pages in the arena.
        pages: u64 = "pages",
        /// Pages that are the same in all VMs with the same seed.
        alike: u64 = "alike",
        /// Pages that equal no other.
        own: u64 = "own",
        /// Pages of zeros.
        zero: u64 = "zero",
        /// Guest-physical address of the first page.
        arena: Hex = "arena",
        /// Time it took to fill them, in microseconds.
        us: u64 = "us",
    }
    /// A walk through the arena is done.
    "walk" Walk {
        /// Words read.
        steps: u64 = "steps",
        /// Time it took, in microseconds.
        us: u64 = "us",
    }
    /// A round has verified everything.
    "round" Round {
        /// Number of the round, from 1.
        round: u64 = "round",
        /// Pages verified.
        verified: u64 = "verified",
        /// Pages rewritten since the last such line.
        writes: u64 = "writes",
        /// Time that verifying took (and the writes meanwhile), in microseconds.
        us: u64 = "us",
    }
    /// A page is not what it must be. At most 16 of these are printed.
    "corrupt" Corrupt {
        /// Index of the page in the arena.
        page: u64 = "page",
        /// Index of the first wrong word in the page.
        word: u64 = "word",
        /// What the word must be.
        expected: Hex = "expected",
        /// What it is.
        found: Hex = "found",
        /// Class of the page.
        class: Class = "class",
        /// Guest-physical address of the page.
        address: Hex = "address",
        /// Number of wrong words in the page.
        words: u64 = "words",
    }
    /// All is done; the guest resets the machine next.
    "done" Done {
        /// Rounds done.
        rounds: u64 = "rounds",
        /// Wrong pages and disk words found in all verifications, printed or not.
        corrupt: u64 = "corrupt",
    }
    /// A disk has been found and set up.
    "disk" Disk {
        /// Its size, in sectors of 512 bytes.
        sectors: u64 = "sectors",
        /// The feature bits it offers.
        features: Hex = "features",
        /// Entries of the queue.
        queue: u64 = "queue",
    }
    /// A pass over the disk is done.
    "blk" Blk {
        /// What was done.
        mode: DiskOp = "mode",
        /// Requests completed.
        requests: u64 = "requests",
        /// Bytes read or written.
        bytes: u64 = "bytes",
        /// Time it took, in microseconds.
        us: u64 = "us",
        /// [`Checksum`](super::content::Checksum) of what was read or written.
        checksum: Hex = "checksum",
        /// Requests that ended with VIRTIO_BLK_S_IOERR or a status that virtio doesn't define.
        errors: u64 = "errors",
        /// Requests that ended with VIRTIO_BLK_S_UNSUPP.
        unsupported: u64 = "unsupported",
    }
    /// A word of the disk does not fit the pattern. At most 16 of these are printed.
    "blk-corrupt" BlkCorrupt {
        /// Sector that the word is in.
        sector: u64 = "sector",
        /// Index of the word in the sector.
        word: u64 = "word",
        /// What the word must be.
        expected: Hex = "expected",
        /// What it is.
        found: Hex = "found",
    }
    /// A pass of the disk's client is done.
    "client" Client {
        /// Blocks used.
        blocks: u64 = "blocks",
        /// Blocks of them that were read and that its cache held.
        hits: u64 = "hits",
        /// Blocks of them that were read from the disk.
        misses: u64 = "misses",
        /// Blocks of them that were written.
        written: u64 = "written",
        /// Requests completed.
        requests: u64 = "requests",
        /// Time the pass took, in microseconds.
        us: u64 = "us",
        /// Time that half of the requests took at most, in nanoseconds.
        p50: u64 = "p50_ns",
        /// Time that 99 of 100 requests took at most, in nanoseconds.
        p99: u64 = "p99_ns",
    }
    /// What a client has done in all passes but the first ones, which its plan leaves out.
    "client-total" ClientTotal {
        /// Passes.
        passes: u64 = "passes",
        /// Blocks used.
        blocks: u64 = "blocks",
        /// Blocks of them that were read and that its cache held.
        hits: u64 = "hits",
        /// Blocks of them that were read from the disk.
        misses: u64 = "misses",
        /// Blocks of them that were written.
        written: u64 = "written",
        /// Requests completed.
        requests: u64 = "requests",
        /// Time the passes took, in microseconds.
        us: u64 = "us",
        /// Time that half of the requests took at most, in nanoseconds.
        p50: u64 = "p50_ns",
        /// Time that 99 of 100 requests took at most, in nanoseconds.
        p99: u64 = "p99_ns",
        /// Blocks in its cache.
        held: u64 = "held",
        /// Wrong words found.
        corrupt: u64 = "corrupt",
    }
    /// The disk's serial number.
    "blk-id" BlkId {
        /// The serial number.
        id: Text = "id",
    }
    /// The device's answer to a malformed request.
    "hostile" Hostile {
        /// Name of what was wrong with the request.
        case: Text = "case",
        /// Whether the request came back as used (1) or not (0).
        used: u64 = "used",
        /// The device's status register afterwards; bit 6 says that it needs a reset.
        status: Hex = "status",
        /// Whether a well-formed read worked afterwards, after a reset of the device (1) or not (0).
        alive: u64 = "alive",
    }
    /// A round of saying things in the memory hole is done.
    "hole" Hole {
        /// What was said: `honest`, or the name of a game.
        game: Text = "game",
        /// Passes that were told, or moves of the game.
        passes: u64 = "passes",
        /// Requests of the host's that were answered.
        answered: u64 = "answered",
        /// Pages that were freed.
        freed: u64 = "freed",
        /// Pages that the host had freed before the guest used them again, so that they held zeros.
        returned: u64 = "returned",
        /// Times that the doorbell was rung.
        rings: u64 = "rings",
    }
    /// A round of giving pages to the host and using them again is done. Counts are since the start.
    "given" Given {
        /// Requests that the host has answered.
        requests: u64 = "requests",
        /// Pages that the host was given.
        given: u64 = "given",
        /// Pages that held zeros when the guest used them again.
        returned: u64 = "returned",
        /// The longest time that a request took, in microseconds.
        us: u64 = "us",
    }
    /// What came back from an address that no device has.
    "probe" Probe {
        /// Kind of address.
        space: Space = "space",
        /// The address or port.
        address: Hex = "address",
        /// Bytes read.
        size: u64 = "size",
        /// What was read.
        read: Hex = "read",
    }
    /// The processor raised an exception; the guest resets the machine next.
    "fault" Fault {
        /// The exception's vector.
        vector: u64 = "vector",
        /// Its error code, 0 if it has none.
        error: Hex = "error",
        /// The instruction that raised it.
        rip: Hex = "rip",
        /// CR2: the address at fault, if the exception is a page fault.
        address: Hex = "address",
    }
    /// The guest can't go on; it resets the machine next.
    "error" Error {
        /// Why, in words joined by hyphens.
        reason: Text = "reason",
        /// A number that goes with it, such as a line or an address.
        value: Hex = "value",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(report: Report) -> String {
        let mut line = Vec::new();
        report.write(&mut |piece| line.extend_from_slice(piece));
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn lines_read_as_documented() {
        let report = Report::Round { round: 3, verified: 8192, writes: 120, us: 5400 };
        assert_eq!(line(report), "round=3 verified=8192 writes=120 us=5400\n");
        assert_eq!(line(Report::Done { rounds: 3, corrupt: 0 }), "done rounds=3 corrupt=0\n");
    }

    #[test]
    fn every_kind_of_value_reads_back() {
        let reports = [
            Report::Ignored { option: Text::new(b"console=ttyS0") },
            Report::Ready { pages: 1, alike: 2, own: 3, zero: 4, arena: Hex(0x20_0000), us: u64::MAX },
            Report::Corrupt {
                page: 0,
                word: 511,
                expected: Hex(u64::MAX),
                found: Hex(0),
                class: Class::Zero,
                address: Hex(1),
                words: 7,
            },
            Report::Blk {
                mode: DiskOp::Verify,
                requests: 1,
                bytes: 2,
                us: 3,
                checksum: Hex(4),
                errors: 5,
                unsupported: 6,
            },
            Report::Probe { space: Space::Pio, address: Hex(0x5678), size: 2, read: Hex(0xffff) },
        ];
        for report in reports {
            assert_eq!(Report::parse(&line(report)), Ok(report));
        }
    }

    #[test]
    fn text_from_outside_stays_one_printable_word() {
        assert_eq!(Text::new(b"a b\n\xff").as_str(), "a?b??");
        assert_eq!(Text::new(&[b'x'; 99]).as_str().len(), Text::MOST);
    }

    #[test]
    fn lines_that_are_no_reports_are_told_from_broken_ones() {
        assert_eq!(Report::parse(""), Err(ParseError::NotAReport));
        assert_eq!(Report::parse("rounds=3"), Err(ParseError::NotAReport));
        assert_eq!(
            Report::parse("done rounds=1 corr"),
            Err(ParseError::Field { report: "done", field: "corrupt" })
        );
        assert_eq!(
            Report::parse("done rounds=x corrupt=0"),
            Err(ParseError::Field { report: "done", field: "rounds" })
        );
    }
}
