//! Standard input on its way to a guest's console.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use crate::record::Record;
use anyhow::Context;
use samepage_process::escape::{EscapeFilter, HELP, Key};
use samepage_process::terminal::{self, RawTerminal, StdinKind};
use vmm_sys_util::eventfd::EventFd;

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    /// Text for the guest.
    Text,
    /// That the process is to end.
    Quit,
}

/// Standard input on its way to the one VM that has the console.
pub struct Input {
    record: Arc<Record>,
    /// Present where standard input is a terminal: then keys have to be told from commands.
    raw: Option<RawTerminal>,
    filter: EscapeFilter,
    /// Typed, and not yet taken by the guest. Nothing more is read meanwhile.
    waiting: Vec<u8>,
    room: EventFd,
    at_end: bool,
}

impl Input {
    /// Standard input for this VM; `None` where it is not ours to read.
    pub fn open(record: &Arc<Record>) -> anyhow::Result<Option<Self>> {
        let raw = match terminal::stdin_kind() {
            StdinKind::Terminal => Some(RawTerminal::enter().context("put the terminal into raw mode")?),
            StdinKind::BackgroundTerminal => return Ok(None),
            StdinKind::Stream => None,
        };
        let room = record.room().context("open an event")?;
        let filter = EscapeFilter::default();
        Ok(Some(Self { record: Arc::clone(record), raw, filter, waiting: Vec::new(), room, at_end: false }))
    }

    /// What to wait for: something typed, or room at the guest.
    pub fn files(&self) -> [Option<RawFd>; 2] {
        if !self.waiting.is_empty() {
            [None, Some(self.room.as_raw_fd())]
        } else if self.at_end {
            [None, None]
        } else {
            [Some(io::stdin().as_fd().as_raw_fd()), None]
        }
    }

    /// Passes on what was typed, or what waits.
    pub fn pump(&mut self, typed: bool) -> Typed {
        if typed {
            let mut buffer = [0; 256];
            match io::stdin()
                .as_fd()
                .try_clone_to_owned()
                .and_then(|file| std::fs::File::from(file).read(&mut buffer))
            {
                Ok(count) => {
                    self.at_end = count == 0;
                    if self.sort(&buffer[..count]) == Typed::Quit {
                        return Typed::Quit;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.at_end = true,
            }
        } else {
            // A room event that was written meanwhile has done its work.
            let _ = self.room.read();
        }
        if let Some(vm) = self.record.vm() {
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
                    // Who does not see the help can still type.
                    let _ = io::stderr().write_all(HELP.as_bytes());
                }
                Key::Nothing => {}
            }
        }
        Typed::Text
    }
}
