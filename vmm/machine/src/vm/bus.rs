//! Finds a VM's device at a port or an address.

use std::sync::Arc;

use parking_lot::Mutex;
use samepage_devices::BusDevice;

/// A device that several threads can access: vCPUs through the bus, other threads directly.
pub(crate) type SharedDevice = Arc<Mutex<dyn BusDevice>>;

struct Range {
    base: u64,
    bytes: u64,
    device: SharedDevice,
}

/// Devices by ascending, disjoint address ranges: a VM's ports, or its MMIO space.
#[derive(Default)]
pub(crate) struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Adds a device at `base`.
    ///
    /// # Panics
    /// Panics if the range overlaps another. The VMM chooses all addresses; the guest chooses none.
    pub(crate) fn insert(&mut self, base: u64, bytes: u64, device: SharedDevice) {
        let at = self.ranges.partition_point(|range| range.base < base);
        let clear = self.ranges.get(at).is_none_or(|next| base + bytes <= next.base)
            && self.ranges[..at].last().is_none_or(|last| last.base + last.bytes <= base);
        assert!(clear, "two devices at {base:#x}");
        self.ranges.insert(at, Range { base, bytes, device });
    }

    /// Reads from the device at `address`. An address without a device reads as all ones, like a floating
    /// bus.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.lock().read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`, if there is one.
    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&SharedDevice, u64)> {
        let at = self.ranges.partition_point(|range| range.base <= address);
        let range = &self.ranges[..at].last()?;
        let offset = address - range.base;
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= range.bytes);
        inside.then_some((&range.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_it_lies_in_and_no_other() {
        let device = || Arc::new(Mutex::new(Echo(Vec::new())));
        let (first, second) = (device(), device());
        let mut bus = Bus::default();
        bus.insert(0x20, 8, second.clone());
        bus.insert(0x10, 8, first.clone());

        bus.write(0x12, &[1]);
        bus.write(0x27, &[2]);
        bus.write(0x17, &[3, 3]); // sticks out of the first
        bus.write(u64::MAX, &[4, 4]);
        assert_eq!(first.lock().0, [(2, vec![1])]);
        assert_eq!(second.lock().0, [(7, vec![2])]);

        let mut data = [0; 2];
        bus.read(0x21, &mut data);
        assert_eq!(data, [1, 1]);
        for nobodys in [0, 0x18, 0x27, 0x30] {
            bus.read(nobodys, &mut data);
            assert_eq!(data, [0xff, 0xff]);
        }
    }

    #[test]
    #[should_panic(expected = "two devices")]
    fn ranges_may_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x10, 8, Arc::new(Mutex::new(Echo(Vec::new()))));
        bus.insert(0x17, 1, Arc::new(Mutex::new(Echo(Vec::new()))));
    }
}
