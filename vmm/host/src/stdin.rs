//! Standard input on its way to a guest's console.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use crate::record::Record;
use anyhow::Context;
use samepage_process::escape::{EscapeFilter, HELP, Key};
use samepage_process::terminal::{self, RawTerminal, StdinKind};
use vmm_sys_util::eventfd::EventFd;

/// The meaning of typed keys.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Input for the guest.
    Text,
    /// The process is to end.
    Quit,
}

/// Standard input on its way to the one VM that has the console.
pub struct Input {
    record: Arc<Record>,
    /// Present if standard input is a terminal, where some keys are commands.
    raw: Option<RawTerminal>,
    filter: EscapeFilter,
    /// Typed bytes that the guest has not accepted. Nothing more is read meanwhile.
    waiting: Vec<u8>,
    room: EventFd,
    is_at_end: bool,
}

impl Input {
    /// Opens standard input for this VM. Returns `None` for a background process of a terminal.
    ///
    /// # Errors
    /// Fails if the terminal refuses raw mode, or if the process is out of files.
    pub fn open(record: &Arc<Record>) -> anyhow::Result<Option<Self>> {
        let raw = match terminal::stdin_kind() {
            StdinKind::Terminal => Some(RawTerminal::enter().context("put the terminal into raw mode")?),
            StdinKind::BackgroundTerminal => return Ok(None),
            StdinKind::Stream => None,
        };
        let room = record.room().context("open an event")?;
        let filter = EscapeFilter::default();
        Ok(Some(Self {
            record: Arc::clone(record),
            raw,
            filter,
            waiting: Vec::new(),
            room,
            is_at_end: false,
        }))
    }

    /// Returns the files to wait for: typed input, or room at the guest.
    pub fn files(&self) -> [Option<RawFd>; 2] {
        if !self.waiting.is_empty() {
            [None, Some(self.room.as_raw_fd())]
        } else if self.is_at_end {
            [None, None]
        } else {
            [Some(io::stdin().as_fd().as_raw_fd()), None]
        }
    }

    /// Passes on new input if `typed`, and otherwise input that waits for room.
    pub fn pump(&mut self, typed: bool) -> Typed {
        if typed {
            let mut buffer = [0; 256];
            match io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .and_then(|file| std::fs::File::from(file).read(&mut buffer))
            {
                Ok(count) => {
                    self.is_at_end = count == 0;
                    if self.sort(&buffer[..count]) == Typed::Quit {
                        return Typed::Quit;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.is_at_end = true,
            }
        } else {
            // A room event that was written meanwhile has had its effect.
            let _ = self.room.read();
        }
        // The console is locked while a reader of its output stalls: nothing waits for it that has nothing to type.
        if !self.waiting.is_empty()
            && let Some(vm) = self.record.vm()
        {
            let taken = vm.serial_input(&self.waiting);
            self.waiting.drain(..taken);
        }
        Typed::Text
    }

    fn sort(&mut self, bytes: &[u8]) -> Typed {
        if self.raw.is_none() {
            self.waiting.extend_from_slice(bytes);
            return Typed::Text;
        }
        for byte in bytes {
            match self.filter.feed(*byte) {
                Key::Guest(byte) => self.waiting.push(byte),
                Key::Quit => return Typed::Quit,
                Key::Help => {
                    // Without the help, typing still works.
                    let _ = io::stderr().write_all(HELP.as_bytes());
                }
                Key::Nothing => {}
            }
        }
        Typed::Text
    }
}
