//! A driver for tests: sets a device up through its registers and uses its first queue.

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_mmio::*;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::MmioTransport;
use super::{RING_FEATURES, VirtioDevice};
use crate::{BusDevice, GuestMemory};

pub(super) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAILABLE: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
pub(super) const INDIRECT: u64 = 0x4000;
/// Buffers for requests, from here to the end of memory.
pub(super) const BUFFERS: u64 = 0x10000;
pub(super) const MEMORY_SIZE: u64 = 1 << 20;
/// A second region, after a gap.
pub(super) const FAR_REGION: u64 = 0x100_0000;
pub(super) const QUEUE_SIZE: u16 = 16;

pub(super) const ACKNOWLEDGED: u32 = 1;
pub(super) const DRIVER: u32 = 3;
pub(super) const FEATURES_OK: u32 = 11;
pub(super) const DRIVER_OK: u32 = 15;
pub(super) const NEEDS_RESET: u32 = 64;

/// Longer than any step of a test takes, even on a busy machine.
const TIMEOUT_MS: i32 = 120_000;

/// Memory of two regions with a gap between them.
pub(super) fn memory() -> GuestMemory {
    let ranges = [(GuestAddress(0), MEMORY_SIZE as usize), (GuestAddress(FAR_REGION), 0x10000)];
    GuestMemory::from_ranges(&ranges).unwrap()
}

/// A buffer of a request: address, length, and whether the device writes it.
pub(super) type Buffer = (u64, u32, bool);

/// A device with its transport, and the driver's view of its first queue.
pub(super) struct Driver {
    pub(super) transport: MmioTransport,
    pub(super) memory: GuestMemory,
    interrupt: EventFd,
    next_descriptor: u16,
    pub(super) available: u16,
    used: u16,
    event_idx: bool,
}

impl Driver {
    pub(super) fn new(device: impl VirtioDevice + 'static) -> Self {
        Self::with_memory(device, memory())
    }

    pub(super) fn with_memory(device: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = interrupt.try_clone().unwrap();
        let transport = MmioTransport::new(memory.clone(), Box::new(device), line).unwrap();
        Self { transport, memory, interrupt, next_descriptor: 0, available: 0, used: 0, event_idx: false }
    }

    /// Returns a driver whose device is ready for requests, with the ring features and `features`.
    pub(super) fn started(device: impl VirtioDevice + 'static, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(RING_FEATURES | features);
        driver
    }

    pub(super) fn get(&mut self, register: u32) -> u32 {
        let mut value = [0; 4];
        self.transport.read(register.into(), &mut value);
        u32::from_le_bytes(value)
    }

    pub(super) fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    /// Initialises the device up to FEATURES_OK (virtio 1.2, section 3.1.1). Returns the status.
    pub(super) fn negotiate(&mut self, features: u64) -> u32 {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGED);
        self.set(VIRTIO_MMIO_STATUS, DRIVER);
        for word in 0..2 {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
        self.set(VIRTIO_MMIO_STATUS, FEATURES_OK);
        self.status()
    }

    /// Sets up the first queue. Returns whether the device accepted the queue.
    pub(super) fn set_up_queue(&mut self, size: u32, descriptors: u64, available: u64, used: u64) -> bool {
        self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.set(VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        self.get(VIRTIO_MMIO_QUEUE_READY) == 1
    }

    /// Sets up queue `number`, of the usual size.
    pub(super) fn set_up_queue_number(&mut self, number: u32, descriptors: u64, available: u64, used: u64) {
        self.set_up_queue_of(number, QUEUE_SIZE.into(), descriptors, available, used);
    }

    fn set_up_queue_of(&mut self, number: u32, size: u32, descriptors: u64, available: u64, used: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, number);
        self.set(VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.set(register, address as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.get(VIRTIO_MMIO_QUEUE_READY), 1);
    }

    /// Puts a chain of `buffers` at the start of a descriptor table.
    pub(super) fn put_chain(&self, table: u64, buffers: &[Buffer]) {
        for (i, &(address, len, is_written)) in (0..).zip(buffers) {
            let mut flags = if is_written { VRING_DESC_F_WRITE } else { 0 };
            if usize::from(i) + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.put_descriptor(table, i, Descriptor::new(address, len, flags as u16, i + 1));
        }
    }

    pub(super) fn notify_queue(&mut self, number: u32) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, number);
    }

    /// Resets the device and starts it with clean rings.
    pub(super) fn start(&mut self, features: u64) {
        assert_eq!(self.negotiate(features), FEATURES_OK);
        self.memory.write_slice(&[0; 0x3000], GuestAddress(DESCRIPTORS)).unwrap();
        (self.next_descriptor, self.available, self.used) = (0, 0, 0);
        self.event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        assert!(self.set_up_queue(QUEUE_SIZE.into(), DESCRIPTORS, AVAILABLE, USED));
        self.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    pub(super) fn put_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.memory.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    /// Makes the chain at `head` available without a notification.
    pub(super) fn make_available(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + u64::from(self.available % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.publish_available(self.available);
    }

    pub(super) fn publish_available(&self, index: u16) {
        self.memory.store(index, GuestAddress(AVAILABLE + 2), Ordering::Release).unwrap();
    }

    pub(super) fn notify(&mut self) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }

    /// Notifies the device after one new chain, if the device has asked for it.
    fn notify_if_asked(&mut self) {
        fence(Ordering::SeqCst);
        let is_asked = if self.event_idx {
            let event = GuestAddress(USED + 4 + u64::from(QUEUE_SIZE) * 8);
            let event: u16 = self.memory.load(event, Ordering::SeqCst).unwrap();
            event == self.available.wrapping_sub(1)
        } else {
            self.memory.load::<u16>(GuestAddress(USED), Ordering::SeqCst).unwrap() == 0
        };
        if is_asked {
            self.notify();
        }
    }

    /// Submits a request of `buffers`.
    pub(super) fn submit(&mut self, buffers: &[Buffer]) {
        let head = self.next_descriptor;
        for (i, &(address, len, is_written)) in buffers.iter().enumerate() {
            let index = (head + i as u16) % QUEUE_SIZE;
            let mut flags = if is_written { VRING_DESC_F_WRITE } else { 0 };
            if i + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let next = (index + 1) % QUEUE_SIZE;
            self.put_descriptor(DESCRIPTORS, index, Descriptor::new(address, len, flags as u16, next));
        }
        self.next_descriptor = (head + buffers.len() as u16) % QUEUE_SIZE;
        self.make_available(head);
        self.notify_if_asked();
    }

    /// Submits a request of `buffers` through an indirect table.
    pub(super) fn submit_indirect(&mut self, buffers: &[Buffer]) {
        self.submit_indirect_at(INDIRECT, buffers);
    }

    /// Submits a request of `buffers` through an indirect table at `table`.
    pub(super) fn submit_indirect_at(&mut self, table: u64, buffers: &[Buffer]) {
        for (i, &(address, len, is_written)) in buffers.iter().enumerate() {
            let mut flags = if is_written { VRING_DESC_F_WRITE } else { 0 };
            if i + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            let descriptor = Descriptor::new(address, len, flags as u16, i as u16 + 1);
            self.put_descriptor(table, i as u16, descriptor);
        }
        let head = self.next_descriptor;
        let table = Descriptor::new(table, buffers.len() as u32 * 16, VRING_DESC_F_INDIRECT as u16, 0);
        self.put_descriptor(DESCRIPTORS, head, table);
        self.next_descriptor = (head + 1) % QUEUE_SIZE;
        self.make_available(head);
        self.notify_if_asked();
    }

    /// Returns the head of the next completed request and the number of bytes written, if there is one.
    pub(super) fn poll_used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let slot = USED + 4 + u64::from(self.used % QUEUE_SIZE) * 8;
        let element: VirtqUsedElem = self.memory.read_obj(GuestAddress(slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        // Asks for an interrupt at the next completion (`used_event`).
        let event = GuestAddress(AVAILABLE + 4 + u64::from(QUEUE_SIZE) * 2);
        self.memory.store(self.used, event, Ordering::SeqCst).unwrap();
        Some((element.id(), element.len()))
    }

    /// Waits for the next completed request. Fails the test if the device breaks instead.
    pub(super) fn wait_used(&mut self) -> (u32, u32) {
        loop {
            if let Some(used) = self.poll_used() {
                return used;
            }
            assert_eq!(self.status(), DRIVER_OK);
            self.wait_interrupt();
        }
    }

    /// Waits until the device says that it needs a reset.
    pub(super) fn wait_needs_reset(&mut self) {
        while self.status() & NEEDS_RESET == 0 {
            self.wait_interrupt();
        }
        assert_ne!(self.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
    }

    /// Waits for the interrupt line and acknowledges what caused it, configuration changes excepted.
    pub(super) fn wait_interrupt(&mut self) {
        let epoll = Epoll::new().unwrap();
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, self.interrupt.as_raw_fd(), interest).unwrap();
        let ready = loop {
            match epoll.wait(TIMEOUT_MS, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                ready => break ready.unwrap(),
            }
        };
        assert_eq!(ready, 1, "the device raised no interrupt; status {:#x}", self.status());
        self.interrupt.read().unwrap();
        self.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    }

    pub(super) fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }
}

/// Where the available and the used part of a [`Ring`] are, behind its descriptors.
pub(super) const AVAILABLE_OFFSET: u64 = 0x400;
pub(super) const USED_OFFSET: u64 = 0x800;

/// The driver's view of one of several queues, without EVENT_IDX. Each has a page for its rings, and a page for each
/// buffer.
pub(super) struct Ring {
    pub(super) queue: usize,
    pub(super) size: u16,
    pub(super) available: u16,
    used: u16,
}

impl Ring {
    pub(super) fn new(queue: usize, size: u16) -> Self {
        Self { queue, size, available: 0, used: 0 }
    }

    /// Returns the address of the descriptors.
    pub(super) fn base(&self) -> u64 {
        0x1000 * (1 + self.queue as u64)
    }

    /// Returns the address of a buffer.
    pub(super) fn buffer(&self, index: u16) -> u64 {
        BUFFERS + 0x1_0000 * self.queue as u64 + 0x1000 * u64::from(index)
    }

    /// Tells the device where the queue is, after a reset.
    pub(super) fn set_up(&mut self, driver: &mut Driver) {
        (self.available, self.used) = (0, 0);
        let base = self.base();
        driver.memory.write_slice(&[0; 0x1000], GuestAddress(base)).unwrap();
        let (queue, size) = (self.queue as u32, self.size.into());
        driver.set_up_queue_of(queue, size, base, base + AVAILABLE_OFFSET, base + USED_OFFSET);
    }

    /// Makes the chain at `head` available, and notifies the device.
    pub(super) fn make_available(&mut self, driver: &mut Driver, head: u16) {
        let available = self.base() + AVAILABLE_OFFSET;
        let slot = available + 4 + 2 * u64::from(self.available % self.size);
        driver.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        driver.memory.store(self.available, GuestAddress(available + 2), Ordering::SeqCst).unwrap();
        driver.notify_queue(self.queue as u32);
    }

    /// Makes one buffer available, and notifies the device.
    pub(super) fn give(&mut self, driver: &mut Driver, index: u16, (address, len, is_written): Buffer) {
        let flags = if is_written { VRING_DESC_F_WRITE } else { 0 };
        driver.put_descriptor(self.base(), index, Descriptor::new(address, len, flags as u16, 0));
        self.make_available(driver, index);
    }

    /// Returns the next completed chain, if there is one: its head, and the number of bytes written.
    pub(super) fn poll(&mut self, driver: &Driver) -> Option<(u16, u32)> {
        let ring = self.base() + USED_OFFSET;
        let index: u16 = driver.memory.load(GuestAddress(ring + 2), Ordering::SeqCst).unwrap();
        if index == self.used {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(self.used % self.size);
        let element: VirtqUsedElem = driver.memory.read_obj(GuestAddress(slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((element.id() as u16, element.len()))
    }

    /// Waits for the next completed chain. Fails the test if the device breaks instead.
    pub(super) fn wait(&mut self, driver: &mut Driver) -> (u16, u32) {
        loop {
            if let Some(used) = self.poll(driver) {
                return used;
            }
            assert_eq!(driver.status(), DRIVER_OK);
            driver.wait_interrupt();
        }
    }
}
