//! The keyboard controller and its keyboard. The host asks a guest to shut down through the keyboard, and x86
//! guests reset the machine through the controller.
//!
//! The device has ports 0x60 (data) and 0x64 (status and commands). The guest finds a keyboard that answers
//! like an AT keyboard (scan code sets 1 and 2, translation by the controller), and no mouse. The only key
//! presses are those of [`I8042::press_ctrl_alt_del`]. A command that pulses the CPU's reset line is noted for good, and
//! the VMM carries out the reset: several vCPUs may ask at once, and each finds the note.
//!
//! Bytes from the keyboard wait in a queue of [`QUEUE_BYTES`]. Bytes that do not fit are lost, as on real
//! hardware. Each byte that becomes readable raises the interrupt once, if the guest has enabled the
//! interrupt.
//!
//! Source: IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device
//! Controller" and "Keyboards (101- and 102-Key)".

use std::collections::VecDeque;

use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, read_bytewise, write_bytewise};

/// First port of the controller; offsets of [`BusDevice`] are relative to it.
pub const BASE_PORT: u16 = 0x60;
/// Number of ports from [`BASE_PORT`], the command register included.
pub const PORTS: u16 = 5;
/// Capacity of the queue of bytes from the keyboard.
pub const QUEUE_BYTES: usize = 32;

/// Offsets of the ports from the base.
const DATA: u8 = 0;
const COMMAND: u8 = 4;

bitflags::bitflags! {
    /// Bits of the status register.
    #[derive(Clone, Copy)]
    struct Status: u8 {
        /// The data register holds a byte for the guest.
        const OUTPUT_FULL = 1;
        /// The self-test has passed.
        const SYSTEM = 1 << 2;
        /// The last write was a command.
        const COMMAND = 1 << 3;
        /// The keyboard is not locked.
        const UNLOCKED = 1 << 4;
    }

    /// Bits that the guest sets in the controller's command byte.
    #[derive(Clone, Copy)]
    struct Control: u8 {
        const KEYBOARD_INTERRUPT = 1;
        const SYSTEM = 1 << 2;
        const KEYBOARD_OFF = 1 << 4;
        const MOUSE_OFF = 1 << 5;
        /// Scan codes of set 2 are translated to set 1.
        const TRANSLATE = 1 << 6;
    }
}

/// The controller's commands.
mod command {
    pub(super) const READ_CONTROL: u8 = 0x20;
    pub(super) const WRITE_CONTROL: u8 = 0x60;
    pub(super) const MOUSE_OFF: u8 = 0xa7;
    pub(super) const MOUSE_ON: u8 = 0xa8;
    pub(super) const TEST_MOUSE: u8 = 0xa9;
    pub(super) const TEST_SELF: u8 = 0xaa;
    pub(super) const TEST_KEYBOARD: u8 = 0xab;
    pub(super) const KEYBOARD_OFF: u8 = 0xad;
    pub(super) const KEYBOARD_ON: u8 = 0xae;
    pub(super) const READ_OUTPUT_PORT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub(super) const ECHO_AS_KEYBOARD: u8 = 0xd2;
    pub(super) const ECHO_AS_MOUSE: u8 = 0xd3;
    pub(super) const WRITE_MOUSE: u8 = 0xd4;
    /// From here on, bits 0 to 3 name lines of the output port that are not pulsed.
    pub(super) const PULSE: u8 = 0xf0;
}

/// The keyboard's commands and answers.
mod keyboard {
    pub(super) const LIGHTS: u8 = 0xed;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const SCAN_CODES: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const REPEAT: u8 = 0xf3;
    pub(super) const SCANNING_ON: u8 = 0xf4;
    pub(super) const SCANNING_OFF: u8 = 0xf5;
    pub(super) const DEFAULTS: u8 = 0xf6;
    pub(super) const RESET: u8 = 0xff;

    pub(super) const ACKNOWLEDGE: u8 = 0xfa;
    pub(super) const TEST_PASSED: u8 = 0xaa;
    pub(super) const RESEND: u8 = 0xfe;
    pub(super) const IDENTITY: [u8; 2] = [0xab, 0x83];
    /// The second byte of the same identity if the controller translates.
    pub(super) const IDENTITY_TRANSLATED: u8 = 0x41;
}

const SELF_TEST_PASSED: u8 = 0x55;
const KEYBOARD_TEST_PASSED: u8 = 0;
/// The result of the mouse test: the clock line is stuck low, so there is no mouse.
const NO_MOUSE: u8 = 1;
/// The line of the output port that keeps the CPU in reset while it is low.
const RESET_LINE: u8 = 1;
/// Output port: not in reset, address line 20 on.
const OUTPUT_PORT: u8 = RESET_LINE | 1 << 1;

/// A key's codes in both scan code sets.
struct Key {
    extended: bool,
    set_1: u8,
    set_2: u8,
}

const CTRL: Key = Key { extended: false, set_1: 0x1d, set_2: 0x14 };
const ALT: Key = Key { extended: false, set_1: 0x38, set_2: 0x11 };
const DELETE: Key = Key { extended: true, set_1: 0x53, set_2: 0x71 };

/// The prefix of an extended key's code.
const EXTENDED: u8 = 0xe0;
/// The prefix of the code of a released key in set 2.
const RELEASED: u8 = 0xf0;
/// The bit that marks the code of a released key in set 1.
const RELEASED_SET_1: u8 = 0x80;

/// A keyboard controller with a keyboard.
pub struct I8042 {
    reset: bool,
    interrupt: EventFd,
    control: Control,
    output_port: u8,
    last_was_command: bool,
    /// The controller's command that waits for a byte of data.
    awaits: Option<u8>,
    /// The controller's answer. The guest reads it before bytes from the keyboard.
    answer: Option<u8>,
    /// Bytes from the keyboard.
    queue: VecDeque<u8>,
    /// The keyboard's command that waits for a byte of data.
    keyboard_awaits: Option<u8>,
    scanning: bool,
    scan_codes: u8,
    /// Whether the guest has read from the controller.
    in_use: bool,
}

impl I8042 {
    /// Returns a controller. It writes `interrupt` for each byte
    /// from the keyboard, if the guest has enabled the interrupt.
    pub fn new(interrupt: EventFd) -> Self {
        Self {
            reset: false,
            interrupt,
            control: Control::KEYBOARD_INTERRUPT | Control::SYSTEM | Control::MOUSE_OFF,
            output_port: OUTPUT_PORT,
            last_was_command: false,
            awaits: None,
            answer: None,
            queue: VecDeque::with_capacity(QUEUE_BYTES),
            keyboard_awaits: None,
            scanning: true,
            scan_codes: 2,
            in_use: false,
        }
    }

    /// Returns whether the guest has ever read from the controller. If not, it has no keyboard driver.
    pub fn in_use(&self) -> bool {
        self.in_use
    }

    /// Presses and releases Ctrl, Alt and Delete. Returns `false` if the guest cannot take the keys: it has
    /// disabled the keyboard, or does not read earlier keys.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        let mut codes = Vec::with_capacity(QUEUE_BYTES);
        [CTRL, ALT, DELETE].iter().for_each(|key| self.encode(key, false, &mut codes));
        [DELETE, ALT, CTRL].iter().for_each(|key| self.encode(key, true, &mut codes));
        if !self.scanning || self.queue.len() + codes.len() > QUEUE_BYTES {
            return false;
        }
        self.enqueue(&codes);
        true
    }

    fn encode(&self, key: &Key, released: bool, codes: &mut Vec<u8>) {
        codes.extend(key.extended.then_some(EXTENDED));
        if self.scan_codes == 1 || self.control.contains(Control::TRANSLATE) {
            codes.push(if released { key.set_1 | RELEASED_SET_1 } else { key.set_1 });
        } else {
            codes.extend(released.then_some(RELEASED));
            codes.push(key.set_2);
        }
    }

    /// Puts bytes from the keyboard into the queue.
    fn enqueue(&mut self, bytes: &[u8]) {
        let waited = !self.queue.is_empty();
        let room = QUEUE_BYTES - self.queue.len();
        self.queue.extend(bytes.iter().take(room));
        if !waited {
            self.interrupt_for_queue();
        }
    }

    /// Raises the interrupt for a byte from the keyboard.
    fn interrupt_for_queue(&self) {
        if self.can_read_queue() && self.control.contains(Control::KEYBOARD_INTERRUPT) {
            // A full event counter means that an interrupt is pending already.
            let _ = self.interrupt.write(1);
        }
    }

    fn can_read_queue(&self) -> bool {
        !self.queue.is_empty() && !self.control.contains(Control::KEYBOARD_OFF)
    }

    fn status(&self) -> Status {
        let mut status = Status::SYSTEM | Status::UNLOCKED;
        status.set(Status::OUTPUT_FULL, self.answer.is_some() || self.can_read_queue());
        status.set(Status::COMMAND, self.last_was_command);
        status
    }

    fn read_data(&mut self) -> u8 {
        if let Some(answer) = self.answer.take() {
            self.interrupt_for_queue();
            return answer;
        }
        if !self.can_read_queue() {
            return 0;
        }
        let byte = self.queue.pop_front().unwrap_or(0);
        self.interrupt_for_queue();
        byte
    }

    fn set_control(&mut self, control: Control) {
        self.control = control;
        self.interrupt_for_queue();
    }

    /// Returns whether the guest has ever given a reset command.
    pub fn wants_reset(&self) -> bool {
        self.reset
    }

    fn command(&mut self, command: u8) {
        self.awaits = None;
        match command {
            command::READ_CONTROL => self.answer = Some(self.control.bits()),
            command::TEST_SELF => self.answer = Some(SELF_TEST_PASSED),
            command::TEST_KEYBOARD => self.answer = Some(KEYBOARD_TEST_PASSED),
            command::TEST_MOUSE => self.answer = Some(NO_MOUSE),
            command::READ_OUTPUT_PORT => self.answer = Some(self.output_port),
            command::MOUSE_OFF => self.set_control(self.control | Control::MOUSE_OFF),
            command::MOUSE_ON => self.set_control(self.control - Control::MOUSE_OFF),
            command::KEYBOARD_OFF => self.set_control(self.control | Control::KEYBOARD_OFF),
            command::KEYBOARD_ON => self.set_control(self.control - Control::KEYBOARD_OFF),
            command::WRITE_CONTROL
            | command::WRITE_OUTPUT_PORT
            | command::ECHO_AS_KEYBOARD
            | command::ECHO_AS_MOUSE
            | command::WRITE_MOUSE => self.awaits = Some(command),
            command if command >= command::PULSE && command & RESET_LINE == 0 => self.reset = true,
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        match self.awaits.take() {
            None => self.keyboard_command(byte),
            Some(command::WRITE_CONTROL) => self.set_control(Control::from_bits_retain(byte)),
            Some(command::WRITE_OUTPUT_PORT) => {
                self.output_port = byte;
                if byte & RESET_LINE == 0 {
                    self.reset = true;
                }
            }
            Some(command::ECHO_AS_KEYBOARD) => self.enqueue(&[byte]),
            // The byte lacks the mark of the mouse's bytes. This tells the guest that there is no mouse.
            Some(command::ECHO_AS_MOUSE) => self.answer = Some(byte),
            Some(_) => {}
        }
    }

    fn keyboard_command(&mut self, byte: u8) {
        use keyboard::{ACKNOWLEDGE, IDENTITY, IDENTITY_TRANSLATED, RESEND, TEST_PASSED};
        match self.keyboard_awaits.take() {
            Some(keyboard::SCAN_CODES) if byte == 0 => return self.enqueue(&[ACKNOWLEDGE, self.scan_codes]),
            Some(keyboard::SCAN_CODES) if matches!(byte, 1 | 2) => {
                self.scan_codes = byte;
                return self.enqueue(&[ACKNOWLEDGE]);
            }
            Some(keyboard::SCAN_CODES) => return self.enqueue(&[RESEND]),
            // There are no lights, and no key is held for long.
            Some(_) if byte < keyboard::LIGHTS => return self.enqueue(&[ACKNOWLEDGE]),
            // A command replaces the command that waited for data.
            _ => {}
        }
        match byte {
            keyboard::LIGHTS | keyboard::SCAN_CODES | keyboard::REPEAT => {
                self.keyboard_awaits = Some(byte);
                self.enqueue(&[ACKNOWLEDGE]);
            }
            keyboard::ECHO => self.enqueue(&[keyboard::ECHO]),
            keyboard::IDENTIFY => {
                let translated = self.control.contains(Control::TRANSLATE);
                let second = if translated { IDENTITY_TRANSLATED } else { IDENTITY[1] };
                self.enqueue(&[ACKNOWLEDGE, IDENTITY[0], second]);
            }
            keyboard::SCANNING_ON | keyboard::SCANNING_OFF => {
                self.scanning = byte == keyboard::SCANNING_ON;
                self.enqueue(&[ACKNOWLEDGE]);
            }
            keyboard::DEFAULTS | keyboard::RESET => {
                self.scanning = true;
                self.scan_codes = 2;
                self.queue.clear();
                let answer = [ACKNOWLEDGE, TEST_PASSED];
                self.enqueue(if byte == keyboard::RESET { &answer } else { &answer[..1] });
            }
            _ => self.enqueue(&[RESEND]),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.in_use = true;
        read_bytewise(offset, data, |port| match port {
            DATA => self.read_data(),
            COMMAND => self.status().bits(),
            _ => 0,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, data, |port, value| match port {
            DATA => {
                self.last_was_command = false;
                self.data(value);
            }
            COMMAND => {
                self.last_was_command = true;
                self.command(value);
            }
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        i8042: I8042,
        interrupt: EventFd,
    }

    impl Machine {
        fn new() -> Self {
            let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            Self { i8042: I8042::new(interrupt.try_clone().unwrap()), interrupt }
        }

        fn command(&mut self, command: u8) {
            self.i8042.write(4, &[command]);
        }

        fn send(&mut self, byte: u8) {
            self.i8042.write(0, &[byte]);
        }

        fn status(&mut self) -> u8 {
            let mut data = [0xaa];
            self.i8042.read(4, &mut data);
            data[0]
        }

        /// All that can be read, as a driver without interrupts reads it.
        fn read(&mut self) -> Vec<u8> {
            let mut all = Vec::new();
            while self.status() & 1 != 0 {
                let mut data = [0xaa];
                self.i8042.read(0, &mut data);
                all.push(data[0]);
            }
            all
        }

        fn asked(&mut self, command: u8) -> Vec<u8> {
            self.command(command);
            self.read()
        }

        fn answered(&mut self, bytes: &[u8]) -> Vec<u8> {
            bytes.iter().for_each(|byte| self.send(*byte));
            self.read()
        }
    }

    #[test]
    fn reset_commands_alone_reset_the_machine() {
        let wants = |what: &dyn Fn(&mut Machine)| {
            let mut machine = Machine::new();
            what(&mut machine);
            machine.i8042.wants_reset()
        };
        assert!(!wants(&|machine| {
            machine.command(0xfd);
            machine.command(0xff);
            machine.send(0xfe);
            machine.i8042.write(u64::MAX, &[0xfe, 0xfe]);
            machine.command(0xd1);
            machine.send(0x03);
        }));
        assert!(wants(&|machine| machine.command(0xfe)));
        // A wide write covers the command port with its second byte.
        assert!(wants(&|machine| machine.i8042.write(3, &[0, 0xfe])));
        assert!(wants(&|machine| {
            machine.command(0xd1);
            machine.send(0x02);
            // Whoever looks later finds it too.
            machine.command(0xd1);
            machine.send(0x03);
        }));
    }

    #[test]
    fn the_status_says_that_commands_may_be_sent_and_nothing_waits() {
        let mut machine = Machine::new();
        assert_eq!(machine.status(), 0x14);
        let mut data = [0xaa; 8];
        machine.i8042.read(5, &mut data);
        assert_eq!(data, [0; 8]);
        machine.i8042.read(0, &mut data[..1]);
        assert_eq!(data[0], 0);
        machine.command(0xae);
        assert_eq!(machine.status(), 0x1c);
    }

    #[test]
    fn a_driver_finds_a_controller_a_keyboard_and_no_mouse() {
        let mut machine = Machine::new();
        assert_eq!(machine.asked(0xaa), [0x55]);
        assert_eq!(machine.asked(0xab), [0]);
        assert_ne!(machine.asked(0xa9), [0]);
        assert_eq!(machine.asked(0x20), [0x25]);
        machine.command(0x60);
        machine.send(0x47);
        assert_eq!(machine.asked(0x20), [0x47]);
        machine.command(0xd3);
        assert_eq!(machine.answered(&[0x5a]), [0x5a]);
        assert_eq!(machine.status() & 0x20, 0);
        machine.command(0xd2);
        assert_eq!(machine.answered(&[0x1c]), [0x1c]);
        machine.command(0xd4);
        assert_eq!(machine.answered(&[0xff]), [0_u8; 0]);
        assert_eq!(machine.asked(0xd0), [0x03]);
    }

    #[test]
    fn the_keyboard_answers_its_driver() {
        let mut machine = Machine::new();
        assert_eq!(machine.answered(&[0xff]), [0xfa, 0xaa]);
        assert_eq!(machine.answered(&[0xf2]), [0xfa, 0xab, 0x83]);
        assert_eq!(machine.answered(&[0xed, 0x02]), [0xfa, 0xfa]);
        assert_eq!(machine.answered(&[0xf3, 0x00]), [0xfa, 0xfa]);
        assert_eq!(machine.answered(&[0xf0, 0x00]), [0xfa, 0xfa, 2]);
        assert_eq!(machine.answered(&[0xf0, 0x03]), [0xfa, 0xfe]);
        assert_eq!(machine.answered(&[0xee]), [0xee]);
        assert_eq!(machine.answered(&[0x01]), [0xfe]);
        // A command in place of the parameter.
        assert_eq!(machine.answered(&[0xed, 0xee]), [0xfa, 0xee]);
        machine.command(0x60);
        machine.send(0x45);
        assert_eq!(machine.answered(&[0xf2]), [0xfa, 0xab, 0x41]);
    }

    #[test]
    fn it_is_in_use_once_the_guest_has_read_from_it() {
        let mut machine = Machine::new();
        machine.command(0xfe);
        assert!(!machine.i8042.in_use(), "a reset command is not a read");
        machine.read();
        assert!(machine.i8042.in_use());
    }

    #[test]
    fn ctrl_alt_del_is_pressed_and_let_go_in_either_set() {
        let mut machine = Machine::new();
        assert!(machine.i8042.press_ctrl_alt_del());
        let set_2 = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
        assert_eq!(machine.read(), set_2);
        machine.command(0x60);
        machine.send(0x45);
        let set_1 = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
        assert!(machine.i8042.press_ctrl_alt_del());
        assert_eq!(machine.read(), set_1);
        machine.command(0x60);
        machine.send(0x05);
        assert_eq!(machine.answered(&[0xf0, 0x01]), [0xfa, 0xfa]);
        assert!(machine.i8042.press_ctrl_alt_del());
        assert_eq!(machine.read(), set_1);
    }

    #[test]
    fn each_byte_interrupts_once_and_only_if_wanted() {
        let mut machine = Machine::new();
        machine.command(0xad);
        assert!(machine.i8042.press_ctrl_alt_del());
        assert!(machine.interrupt.read().is_err());
        assert_eq!(machine.status() & 1, 0);
        // The controller's answer comes first, without an interrupt.
        assert_eq!(machine.asked(0x20), [0x35]);
        assert!(machine.interrupt.read().is_err());
        machine.command(0xae);
        for _ in 0..11 {
            assert_eq!(machine.interrupt.read().unwrap(), 1);
            assert_eq!(machine.status() & 1, 1);
            machine.i8042.read(0, &mut [0]);
        }
        assert!(machine.interrupt.read().is_err());
        machine.command(0x60);
        machine.send(0x04);
        assert!(machine.i8042.press_ctrl_alt_del());
        assert!(machine.interrupt.read().is_err());
        assert_eq!(machine.read().len(), 11);
    }

    #[test]
    fn a_guest_that_reads_nothing_costs_a_bounded_queue() {
        let mut machine = Machine::new();
        assert!(machine.i8042.press_ctrl_alt_del());
        assert!(machine.i8042.press_ctrl_alt_del());
        assert!(!machine.i8042.press_ctrl_alt_del());
        (0..1000).for_each(|_| machine.send(0xf2));
        assert_eq!(machine.read().len(), QUEUE_BYTES);
        assert_eq!(machine.answered(&[0xf5]), [0xfa]);
        assert!(!machine.i8042.press_ctrl_alt_del());
        assert_eq!(machine.answered(&[0xf4]), [0xfa]);
        assert!(machine.i8042.press_ctrl_alt_del());
    }
}
