//! Message-signalled interrupts with a table in the device: MSI-X (PCI 3.0, section 6.8.2).
//!
//! A message is an address and a value, which the guest writes into the table. The VMM tells KVM of them
//! ([`Routes`]), so that an event raises the interrupt without further help. A masked message is not sent. It is
//! pending until the guest unmasks it.

use std::fmt;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// No message: an interrupt that nobody hears.
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of an entry of the table: address, value, and control.
pub(crate) const ENTRY_BYTES: u64 = 16;
/// Bit of an entry's control word.
const MASKED: u32 = 1;
/// Bits of the control word in PCI's configuration space.
pub(crate) const ENABLE: u16 = 1 << 15;
pub(crate) const MASK_ALL: u16 = 1 << 14;

/// Where a device's messages go: the VMM's side.
pub trait Routes: Send + Sync {
    /// Has writes to the event of `vector` send this message.
    ///
    /// # Errors
    /// Fails if KVM does not accept it. Then the message is not sent.
    fn set(&self, vector: usize, address: u64, value: u32) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Message {
    address: u64,
    value: u32,
}

#[derive(Debug)]
struct Entry {
    message: Message,
    is_masked: bool,
    is_pending: bool,
    /// What KVM was told last.
    routed: Option<Message>,
}

struct State {
    control: u16,
    entries: Vec<Entry>,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// The messages of one device: one for each queue, and one for changes of its configuration.
pub struct Messages {
    state: Mutex<State>,
    events: Vec<EventFd>,
    routes: Box<dyn Routes>,
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").field("count", &self.events.len()).finish_non_exhaustive()
    }
}

impl Messages {
    /// Returns the messages of a device with so many queues. `events` has one event more than there are queues.
    pub fn new(queues: usize, events: Vec<EventFd>, routes: Box<dyn Routes>) -> Self {
        let masked =
            || Entry { message: Message::default(), is_masked: true, is_pending: false, routed: None };
        let state = State {
            control: 0,
            entries: events.iter().map(|_| masked()).collect(),
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
        };
        Self { state: Mutex::new(state), events, routes }
    }

    /// Returns the events, one for each message.
    pub fn events(&self) -> &[EventFd] {
        &self.events
    }

    pub(crate) fn count(&self) -> usize {
        self.events.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn control(&self) -> u16 {
        self.state().control
    }

    /// Sets the bits that turn all messages on, and that mask all.
    pub(crate) fn set_control(&self, control: u16) {
        let mut state = self.state();
        state.control = control & (ENABLE | MASK_ALL);
        for vector in 0..state.entries.len() {
            self.update(&mut state, vector);
        }
    }

    /// Reads from the table. Bytes beyond it are zeros.
    pub(crate) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            *byte = match state.entries.get((at / ENTRY_BYTES) as usize) {
                Some(entry) => entry.bytes()[(at % ENTRY_BYTES) as usize],
                None => 0,
            };
        }
    }

    /// Writes to the table. Only whole words or pairs of them count, as in the specification.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let vector = (offset / ENTRY_BYTES) as usize;
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(vector) else { return };
        let mut bytes = entry.bytes();
        let at = (offset % ENTRY_BYTES) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        entry.set_bytes(bytes);
        self.update(&mut state, vector);
    }

    /// Reads from the bits of pending messages.
    pub(crate) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bit = |bit: usize| state.entries.get(first.checked_add(bit)?).map(|entry| entry.is_pending);
            *byte = (0..8).fold(0, |byte, number| byte | u8::from(bit(number) == Some(true)) << number);
        }
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.state().config_vector
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.state().config_vector = self.existing(vector);
    }

    pub(crate) fn queue_vector(&self, queue: usize) -> u16 {
        self.state().queue_vectors.get(queue).copied().unwrap_or(NO_VECTOR)
    }

    pub(crate) fn set_queue_vector(&self, queue: usize, vector: u16) {
        let vector = self.existing(vector);
        if let Some(place) = self.state().queue_vectors.get_mut(queue) {
            *place = vector;
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.events.len() { vector } else { NO_VECTOR }
    }

    /// Forgets which message is for what. The table belongs to PCI, and stays.
    pub(crate) fn reset_vectors(&self) {
        let mut state = self.state();
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
    }

    pub(crate) fn signal_config(&self) {
        let mut state = self.state();
        let vector = state.config_vector;
        self.signal(&mut state, vector);
    }

    pub(crate) fn signal_queue(&self, queue: usize) {
        let mut state = self.state();
        let vector = state.queue_vectors.get(queue).copied().unwrap_or(NO_VECTOR);
        self.signal(&mut state, vector);
    }

    /// Sends each message that is for some queue once.
    pub(crate) fn signal_all_queues(&self) {
        let mut state = self.state();
        let mut vectors = state.queue_vectors.clone();
        vectors.sort_unstable();
        vectors.dedup();
        vectors.into_iter().for_each(|vector| self.signal(&mut state, vector));
    }

    fn signal(&self, state: &mut State, vector: u16) {
        let vector = usize::from(vector);
        if state.control & ENABLE == 0 || vector >= state.entries.len() {
            return;
        }
        state.entries[vector].is_pending = true;
        self.update(state, vector);
    }

    /// Tells KVM of a message, and sends it if it is pending, unless it is masked.
    fn update(&self, state: &mut State, vector: usize) {
        let is_on = state.control & (ENABLE | MASK_ALL) == ENABLE;
        let entry = &mut state.entries[vector];
        if !is_on || entry.is_masked {
            return;
        }
        if entry.routed != Some(entry.message) {
            let Message { address, value } = entry.message;
            let accepted = self.routes.set(vector, address, value).is_ok();
            entry.routed = accepted.then_some(entry.message);
        }
        if entry.routed.is_some() && std::mem::take(&mut entry.is_pending) {
            // Writing fails only if the event counter is full. Then an interrupt is pending anyway.
            let _ = self.events[vector].write(1);
        }
    }
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY_BYTES as usize] {
        let mut bytes = [0; ENTRY_BYTES as usize];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.value.to_le_bytes());
        bytes[12] = u8::from(self.is_masked);
        bytes
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_BYTES as usize]) {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        self.message = Message { address: u64::from(word(0)) | u64::from(word(4)) << 32, value: word(8) };
        self.is_masked = word(12) & MASKED != 0;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use super::*;

    /// What KVM would be told: vector, address, value.
    pub(crate) type Told = Arc<Mutex<Vec<(usize, u64, u32)>>>;

    pub(crate) struct Recorder(pub(crate) Told);

    impl Routes for Recorder {
        fn set(&self, vector: usize, address: u64, value: u32) -> io::Result<()> {
            if value == 0xdead {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            self.0.lock().unwrap().push((vector, address, value));
            Ok(())
        }
    }

    pub(crate) fn messages(queues: usize) -> (Arc<Messages>, Told) {
        let told = Told::default();
        let event = |_| EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let events = (0..=queues).map(event).collect();
        (Arc::new(Messages::new(queues, events, Box::new(Recorder(told.clone())))), told)
    }

    fn set_entry(messages: &Messages, vector: u64, address: u64, value: u32, masked: bool) {
        let at = vector * ENTRY_BYTES;
        messages.write_table(at, &address.to_le_bytes());
        messages.write_table(at + 8, &value.to_le_bytes());
        messages.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    #[test]
    fn a_message_is_sent_where_the_table_says() {
        let (messages, told) = messages(2);
        messages.set_control(ENABLE);
        set_entry(&messages, 1, 0xfee0_1000, 0x41, false);
        messages.set_queue_vector(0, 1);
        messages.signal_queue(0);
        assert_eq!(*told.lock().unwrap(), [(1, 0xfee0_1000, 0x41)]);
        assert_eq!(messages.events()[1].read().unwrap(), 1);
        messages.signal_queue(1);
        messages.signal_config();
        assert!(messages.events().iter().all(|event| event.read().is_err()));
        // Two queues with one message send it once.
        messages.set_queue_vector(1, 1);
        messages.signal_all_queues();
        assert_eq!(messages.events()[1].read().unwrap(), 1);
        assert_eq!(told.lock().unwrap().len(), 1);
    }

    #[test]
    fn masked_messages_are_pending_until_they_are_unmasked() {
        let (messages, told) = messages(1);
        messages.set_queue_vector(0, 0);
        messages.signal_queue(0);
        let pending = || {
            let mut bits = [0; 8];
            messages.read_pending(0, &mut bits);
            bits[0]
        };
        // Without MSI-X there is no message to be pending.
        assert_eq!(pending(), 0);
        messages.set_control(ENABLE | MASK_ALL);
        set_entry(&messages, 0, 0xfee0_0000, 1, false);
        messages.signal_queue(0);
        assert_eq!((pending(), told.lock().unwrap().len()), (1, 0));
        messages.set_control(ENABLE);
        assert_eq!((pending(), messages.events()[0].read().unwrap()), (0, 1));
        set_entry(&messages, 0, 0xfee0_0000, 2, true);
        messages.signal_queue(0);
        assert_eq!(pending(), 1);
        assert!(messages.events()[0].read().is_err());
        set_entry(&messages, 0, 0xfee0_0000, 2, false);
        assert_eq!((pending(), messages.events()[0].read().unwrap()), (0, 1));
        assert_eq!(told.lock().unwrap().last(), Some(&(0, 0xfee0_0000, 2)));
    }

    #[test]
    fn what_kvm_refuses_is_not_sent() {
        let (messages, _) = messages(1);
        messages.set_control(ENABLE);
        messages.set_queue_vector(0, 0);
        set_entry(&messages, 0, 0xfee0_0000, 0xdead, false);
        messages.signal_queue(0);
        assert!(messages.events()[0].read().is_err());
        set_entry(&messages, 0, 0xfee0_0000, 3, false);
        assert_eq!(messages.events()[0].read().unwrap(), 1);
    }

    #[test]
    fn vectors_beyond_the_table_are_none() {
        let (messages, _) = messages(1);
        for vector in [2, 3, NO_VECTOR] {
            messages.set_config_vector(vector);
            messages.set_queue_vector(0, vector);
            assert_eq!((messages.config_vector(), messages.queue_vector(0)), (NO_VECTOR, NO_VECTOR));
        }
        messages.set_queue_vector(7, 0);
        assert_eq!(messages.queue_vector(7), NO_VECTOR);
    }
}
