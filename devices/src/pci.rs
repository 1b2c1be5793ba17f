//! PCI's configuration space (PCI Local Bus 3.0, chapter 6), for functions with one memory range.
//!
//! The VMM chooses where a function's memory is, and it stays there. The guest can ask for the range's size as
//! the specification says. If the guest writes another address, it reads back the one that counts.

/// Bytes of a function's configuration space that a device here uses.
pub const CONFIG_BYTES: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const MEMORY_SPACE: u8 = 1 << 1;
/// Memory space, bus master.
const COMMAND_LOW: u8 = 0b110;
/// Interrupt disable.
const COMMAND_HIGH: u8 = 0b100;
const HAS_CAPABILITIES: u8 = 1 << 4;
/// The first capability, behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// A function on a PCI bus. Callers bound accesses to one, two or four bytes within [`CONFIG_BYTES`].
pub trait PciFunction: Send {
    /// Reads from the configuration space.
    fn read_config(&mut self, register: usize, data: &mut [u8]);

    /// Writes to the configuration space.
    fn write_config(&mut self, register: usize, data: &[u8]);
}

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Who made it.
    pub vendor: u16,
    /// The number of the device, by its maker.
    pub device: u16,
    /// The number that its maker gives to this use of it.
    pub subsystem: u16,
    /// Class, subclass and interface, from the highest byte on.
    pub class: u32,
    /// The revision.
    pub revision: u8,
}

/// The registers of a function, and which of their bits the guest can write.
#[derive(Debug)]
pub struct ConfigSpace {
    registers: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    memory: Option<Memory>,
    /// Where the next capability goes.
    end: usize,
    /// The place of the last capability's pointer to the next.
    link: usize,
}

/// A range of memory: its first address, and its length, a power of two. Both are below 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    base: u32,
    bytes: u32,
}

impl ConfigSpace {
    /// Returns the registers of a function.
    pub fn new(identity: Identity) -> Self {
        let mut registers = [0; CONFIG_BYTES];
        registers[..2].copy_from_slice(&identity.vendor.to_le_bytes());
        registers[2..4].copy_from_slice(&identity.device.to_le_bytes());
        registers[8] = identity.revision;
        registers[9..12].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        registers[0x2c..0x2e].copy_from_slice(&identity.vendor.to_le_bytes());
        registers[0x2e..0x30].copy_from_slice(&identity.subsystem.to_le_bytes());
        let mut writable = [0; CONFIG_BYTES];
        writable[COMMAND] = COMMAND_LOW;
        writable[COMMAND + 1] = COMMAND_HIGH;
        writable[INTERRUPT_LINE] = 0xff;
        Self { registers, writable, memory: None, end: FIRST_CAPABILITY, link: CAPABILITIES }
    }

    /// Gives the function memory at `base`, of a length in bytes that is a power of two.
    #[must_use]
    pub fn with_memory(mut self, base: u32, bytes: u32) -> Self {
        self.memory = Some(Memory { base, bytes });
        self.registers[BAR..BAR + 4].copy_from_slice(&base.to_le_bytes());
        self.writable[BAR..BAR + 4].copy_from_slice(&(!(bytes - 1)).to_le_bytes());
        self
    }

    /// Adds a capability: its number and what follows the pointer to the next. Returns its place. `writable` has the
    /// bits that the guest can write, and may be shorter.
    pub fn add_capability(&mut self, number: u8, content: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.registers[self.link] = at as u8;
        self.registers[at] = number;
        self.registers[at + 2..at + 2 + content.len()].copy_from_slice(content);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.registers[STATUS] |= HAS_CAPABILITIES;
        self.link = at + 1;
        self.end = (at + 2 + content.len()).next_multiple_of(4);
        at
    }

    /// Whether the guest has turned the function's memory on.
    pub fn is_memory_on(&self) -> bool {
        self.registers[COMMAND] & MEMORY_SPACE != 0
    }

    /// Returns registers as they were written.
    pub fn bytes<const N: usize>(&self, register: usize) -> [u8; N] {
        std::array::from_fn(|at| self.registers.get(register + at).copied().unwrap_or(0))
    }

    /// Sets registers, whether or not the guest can write them.
    pub fn set_bytes(&mut self, register: usize, bytes: &[u8]) {
        for (place, byte) in self.registers.iter_mut().skip(register).zip(bytes) {
            *place = *byte;
        }
    }

    /// Reads registers as the guest does. Those beyond the end are zeros.
    pub fn read(&self, register: usize, data: &mut [u8]) {
        let bar = self.bar().to_le_bytes();
        for (at, byte) in (register..).zip(data) {
            *byte = match at {
                BAR..0x14 => bar[at - BAR],
                _ => self.registers.get(at).copied().unwrap_or(0),
            };
        }
    }

    /// Writes what the guest can write.
    pub fn write(&mut self, register: usize, data: &[u8]) {
        for (at, byte) in (register..).zip(data) {
            let Some(mask) = self.writable.get(at) else { break };
            self.registers[at] = self.registers[at] & !mask | byte & mask;
        }
    }

    /// The address, or the bits of addresses if the guest has just written ones to all of them.
    fn bar(&self) -> u32 {
        let Some(Memory { base, bytes }) = self.memory else { return 0 };
        let addresses = !(bytes - 1);
        if u32::from_le_bytes(self.bytes(BAR)) == addresses { addresses } else { base }
    }
}

/// The bridge between processors and bus, which has nothing but a name.
#[derive(Debug)]
pub struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        // Intel's number for a virtual host bridge, which drivers leave alone.
        let class = 0x06_0000;
        let identity = Identity { vendor: 0x8086, device: 0x0d57, subsystem: 0, class, revision: 0 };
        Self(ConfigSpace::new(identity))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        self.0.read(register, data);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.0.write(register, data);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let identity =
            Identity { vendor: 0x1af4, device: 0x1042, subsystem: 2, class: 0x01_8000, revision: 1 };
        ConfigSpace::new(identity).with_memory(0xd100_0000, 0x8000)
    }

    fn word(space: &ConfigSpace, register: usize) -> u32 {
        let mut bytes = [0; 4];
        space.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let space = space();
        assert_eq!(word(&space, 0), 0x1042_1af4);
        assert_eq!(word(&space, 8), 0x0180_0001);
        assert_eq!(word(&space, 0x2c), 0x0002_1af4);
        assert_eq!((word(&space, 12), word(&space, 0x3c)), (0, 0));
    }

    #[test]
    fn memory_has_a_size_and_stays_where_it_is() {
        let mut space = space();
        assert_eq!(word(&space, 0x10), 0xd100_0000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(word(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0xd100_0000_u32.to_le_bytes());
        assert_eq!(word(&space, 0x10), 0xd100_0000);
        space.write(0x10, &0xe000_0000_u32.to_le_bytes());
        assert_eq!(word(&space, 0x10), 0xd100_0000);
        // There is no second range, and no ROM.
        for register in [0x14, 0x18, 0x24, 0x30] {
            space.write(register, &[0xff; 4]);
            assert_eq!(word(&space, register), 0);
        }
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        assert_eq!(word(&space, 0x34), 0);
        let first = space.add_capability(9, &[14, 1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        assert_eq!((word(&space, 0x34) as usize, word(&space, 4) >> 20 & 1), (first, 1));
        assert_eq!(space.bytes(first), [9, second as u8, 14, 1, 2, 3]);
        space.write(second, &[0xff; 4]);
        assert_eq!(space.bytes(second), [0x11, 0, 0, 0xc0]);
    }

    proptest! {
        #[test]
        fn no_write_changes_what_a_function_is(
            writes in prop::collection::vec((0_usize..0x1100, prop::collection::vec(any::<u8>(), 1..9)), 0..40),
        ) {
            let mut space = space();
            let fixed = [0, 8, 0x2c, 0x34].map(|register| word(&space, register));
            for (register, data) in writes {
                space.write(register, &data);
                let mut bytes = vec![0; data.len()];
                space.read(register, &mut bytes);
                let bar = word(&space, 0x10);
                prop_assert!(bar == 0xd100_0000 || bar == 0xffff_8000);
            }
            prop_assert_eq!([0, 8, 0x2c, 0x34].map(|register| word(&space, register)), fixed);
        }
    }
}
