//! Keys that are commands for samepage, and not input for the guest.

/// Ctrl-A, which starts a command.
const PREFIX: u8 = 0x01;

/// The text for Ctrl-A h.
pub const HELP: &str = "\n\
    Ctrl-A x       end the VM and samepage\n\
    Ctrl-A h       this help\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\n";

/// The meaning of a typed byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Input for the guest.
    Guest(u8),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
    /// The first half of a command, or one that does not exist.
    Nothing,
}

/// Separates commands from input, byte by byte.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    armed: bool,
}

impl EscapeFilter {
    /// Returns the meaning of the next byte.
    pub fn feed(&mut self, byte: u8) -> Key {
        if !std::mem::take(&mut self.armed) {
            if byte != PREFIX {
                return Key::Guest(byte);
            }
            self.armed = true;
            return Key::Nothing;
        }
        match byte {
            PREFIX => Key::Guest(PREFIX),
            b'x' | b'X' => Key::Quit,
            b'h' | b'H' | b'?' => Key::Help,
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut filter = EscapeFilter::default();
        bytes.iter().map(|byte| filter.feed(*byte)).filter(|key| *key != Key::Nothing).collect()
    }

    #[test]
    fn text_passes_and_commands_do_not() {
        assert_eq!(keys(b"ax\x03"), [Key::Guest(b'a'), Key::Guest(b'x'), Key::Guest(3)]);
        assert_eq!(keys(b"\x01x"), [Key::Quit]);
        assert_eq!(keys(b"\x01hq"), [Key::Help, Key::Guest(b'q')]);
        assert_eq!(keys(b"\x01\x01x"), [Key::Guest(1), Key::Guest(b'x')]);
        assert_eq!(keys(b"\x01zx"), [Key::Guest(b'x')]);
    }
}
