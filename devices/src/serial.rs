//! A 16550 UART: the guest's console.
//!
//! Output goes byte by byte to any [`Write`] sink. If the sink fails or would block, the byte is lost and
//! [`SerialStats::lost`] counts it. The guest continues, because it must not depend on the reader of its
//! console. A sink that *blocks* also blocks the vCPU that writes, so use a non-blocking sink.
//!
//! Input goes through a FIFO of 64 bytes. The port refuses input that does not fit, and writes the event of
//! [`Serial::set_room_event`] when there is room again.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, EventTrigger, read_bytewise, write_bytewise};

/// Number of ports of the UART.
pub const PORTS: u16 = 8;
/// Offset of the modem control register, which holds the loopback bit.
const MODEM_CONTROL: u8 = 4;

/// Counters of one serial port, in bytes since its start.
#[derive(Debug, Default)]
pub struct SerialStats {
    /// Bytes from the guest that the sink accepted, without bytes in loopback mode.
    pub sent: AtomicU64,
    /// Bytes from the guest that were lost, because the sink failed or would have blocked.
    pub lost: AtomicU64,
    /// Bytes put into the receive FIFO.
    pub received: AtomicU64,
    /// Interrupts that could not be raised.
    pub interrupt_errors: AtomicU64,
}

impl SerialEvents for SerialStats {
    fn buffer_read(&self) {}

    fn out_byte(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Relaxed);
    }

    fn in_buffer_empty(&self) {}
}

/// A 16550 UART that writes to a sink and is fed through [`Serial::input`].
pub struct Serial {
    inner: vm_superio::Serial<EventTrigger, Arc<SerialStats>, Box<dyn Write + Send>>,
    stats: Arc<SerialStats>,
    room: Option<EventFd>,
    /// Whether input was refused since the last write of the room event.
    has_refused_input: bool,
}

impl Serial {
    /// Returns a serial port that raises `interrupt` and prints to `out`.
    pub fn new(interrupt: EventFd, out: Box<dyn Write + Send>) -> Self {
        let stats = Arc::<SerialStats>::default();
        let inner = vm_superio::Serial::with_events(EventTrigger(interrupt), stats.clone(), out);
        Self { inner, stats, room: None, has_refused_input: false }
    }

    /// Offers input to the guest. Returns how many bytes from the front of `data` the FIFO took. In loopback
    /// mode it takes 0.
    ///     ///
    /// If it did not take all bytes, the port writes the room event when there is room again.
    pub fn input(&mut self, data: &[u8]) -> usize {
        let room = self.inner.fifo_capacity();
        if let Err(Error::Trigger(_)) = self.inner.enqueue_raw_bytes(data) {
            // The bytes are in the FIFO nevertheless: a guest that polls finds them.
            self.stats.interrupt_errors.fetch_add(1, Relaxed);
        }
        let taken = room - self.inner.fifo_capacity();
        self.stats.received.fetch_add(taken as u64, Relaxed);
        self.has_refused_input |= taken < data.len();
        taken
    }

    /// Sets the event that the port writes when there is room again after a refusal.
    pub fn set_room_event(&mut self, event: EventFd) {
        self.room = Some(event);
    }

    /// Returns the counters of this port.
    pub fn stats(&self) -> &Arc<SerialStats> {
        &self.stats
    }

    /// Writes the room event if needed. Called after accesses that can make room: a read by the guest, or the
    /// end of loopback mode.
    fn announce_room(&mut self) {
        if self.has_refused_input
            && self.inner.fifo_capacity() > 0
            && let Some(room) = &self.room
        {
            self.has_refused_input = false;
            // A full event counter is readable, and the waiting thread needs no more than that.
            let _ = room.write(1);
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, data, |port| self.inner.read(port));
        self.announce_room();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, data, |port, value| {
            // The events of `inner` count errors of the sink. `inner` then continues as if the byte had been
            // sent.
            if let Err(Error::Trigger(_)) = self.inner.write(port, value) {
                self.stats.interrupt_errors.fetch_add(1, Relaxed);
            }
            if port == MODEM_CONTROL {
                self.announce_room();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    /// A sink that passes bytes on, or fails when the receiver is gone.
    struct Channel(mpsc::Sender<u8>);

    impl Write for Channel {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            for &byte in data {
                self.0.send(byte).map_err(|_| io::ErrorKind::BrokenPipe)?;
            }
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut byte = [0xaa];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_sink_and_a_dead_sink_costs_bytes_only() {
        let (sender, receiver) = mpsc::channel();
        let mut serial = Serial::new(event(), Box::new(Channel(sender)));
        for byte in *b"hello" {
            serial.write(DATA, &[byte]);
        }
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), b"hello");

        drop(receiver);
        serial.write(DATA, b"x");
        assert_eq!(read(&mut serial, LINE_STATUS) & 0x60, 0x60, "ready for the next byte");
        assert_eq!(serial.stats().sent.load(Relaxed), 5);
        assert_eq!(serial.stats().lost.load(Relaxed), 1);
    }

    #[test]
    fn refused_input_is_asked_for_once_the_guest_reads() {
        let (interrupt, room) = (event(), event());
        let mut serial = Serial::new(interrupt.try_clone().unwrap(), Box::new(io::sink()));
        serial.set_room_event(room.try_clone().unwrap());
        serial.write(INTERRUPT_ENABLE, &[1]);

        let input: Vec<u8> = (0..100).collect();
        let taken = serial.input(&input);
        assert!(taken > 0 && taken < input.len());
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(serial.input(&input[taken..]), 0);
        assert!(room.read().is_err());

        assert_eq!(read(&mut serial, DATA), 0);
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(serial.input(&input[taken..]), 1);

        for &expected in &input[1..=taken] {
            assert_eq!(read(&mut serial, DATA), expected);
        }
        assert_eq!(read(&mut serial, LINE_STATUS) & 1, 0);
    }

    #[test]
    fn input_waits_for_the_end_of_loopback_mode() {
        let room = event();
        let mut serial = Serial::new(event(), Box::new(io::sink()));
        serial.set_room_event(room.try_clone().unwrap());

        serial.write(MODEM_CONTROL.into(), &[0x10]);
        assert_eq!(serial.input(b"a"), 0);
        let _ = room.read();
        serial.write(MODEM_CONTROL.into(), &[0]);
        assert_eq!(room.read().unwrap(), 1);
        assert_eq!(serial.input(b"a"), 1);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(
            accesses in prop::collection::vec((any::<bool>(), 0u64..12, prop::collection::vec(any::<u8>(), 0..9)), 0..200),
        ) {
            let mut serial = Serial::new(event(), Box::new(io::sink()));
            for (is_write, offset, mut data) in accesses {
                if is_write {
                    serial.write(offset, &data);
                } else {
                    serial.read(offset, &mut data);
                }
                serial.input(&data);
            }
            serial.read(u64::MAX, &mut [0; 8]);
        }
    }
}
