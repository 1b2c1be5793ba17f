//! A pseudo terminal with the program, as a user sees it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{InputModes, LocalModes, OutputModes, Winsize, tcgetattr, tcsetwinsize};

use crate::program::{Finished, Running, TIME_LIMIT};

/// The settings of a terminal that a user notices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    input: InputModes,
    output: OutputModes,
    local: LocalModes,
}

impl Settings {
    /// Returns whether each key goes to the program immediately, unchanged and without an echo.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        !self.local.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN)
            && !self.input.intersects(InputModes::ICRNL | InputModes::IXON)
    }
}

/// The visible state of a terminal.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// The text, in lines.
    pub text: &'a str,
    /// Whether a program shows its own screen, which disappears with the program.
    pub alternate: bool,
    /// Whether the cursor is hidden.
    pub hidden: bool,
}

/// The terminal's side for keys and output.
pub struct Terminal {
    keyboard_and_screen: File,
    program_side: OwnedFd,
    seen: Vec<u8>,
    searched: usize,
    picture: vt100::Parser,
}

impl std::fmt::Debug for Terminal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Terminal").field("screen", &self.screen()).finish_non_exhaustive()
    }
}

impl Terminal {
    /// Opens a new terminal.
    ///
    /// # Panics
    /// Panics if the host has none left.
    #[must_use]
    pub fn open() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("open a pseudo terminal");
        grantpt(&master).expect("grant a pseudo terminal");
        unlockpt(&master).expect("unlock a pseudo terminal");
        let program_side = ioctl_tiocgptpeer(&master, flags).expect("open a pseudo terminal's other side");
        let picture = vt100::Parser::new(24, 80, 0);
        let mut terminal =
            Self { keyboard_and_screen: master.into(), program_side, seen: Vec::new(), searched: 0, picture };
        terminal.resize(80, 24);
        terminal
    }

    /// Starts a program as the leader of a session with this terminal.
    ///
    /// # Panics
    /// Panics if the program cannot be started.
    #[must_use]
    pub fn start(&self, command: &Command) -> Running {
        let side = || Stdio::from(self.program_side.try_clone().expect("pass the terminal on"));
        let mut leader = Command::new("setsid");
        leader.arg("--ctty").arg(command.get_program()).args(command.get_args());
        if let Some(folder) = command.get_current_dir() {
            leader.current_dir(folder);
        }
        leader.stdin(side()).stdout(side()).stderr(side());
        Running::start_as_is(leader)
    }

    /// Returns the present settings.
    ///
    /// # Panics
    /// Panics if the terminal does not return them.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let termios = tcgetattr(&self.program_side).expect("ask for the terminal's settings");
        Settings { input: termios.input_modes, output: termios.output_modes, local: termios.local_modes }
    }

    /// Sets the size in characters, and notifies the program.
    ///
    /// # Panics
    /// Panics if the terminal refuses the size.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.keyboard_and_screen, size).expect("change the terminal's size");
        self.picture.screen_mut().set_size(rows, columns);
    }

    /// Waits until a condition holds for the content of the screen, and returns the content as lines.
    ///
    /// # Panics
    /// Panics with the content if the condition does not become true.
    pub fn wait_for_picture(&mut self, what: &str, holds: impl Fn(&Picture<'_>) -> bool) -> String {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let screen = self.picture.screen();
            let text = screen.contents();
            if holds(&Picture {
                text: &text,
                alternate: screen.alternate_screen(),
                hidden: screen.hide_cursor(),
            }) {
                return text;
            }
            let mut watched = [PollFd::new(&self.keyboard_and_screen, PollFlags::IN)];
            let rest = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
                .expect("a minute is a time");
            let ready = poll(&mut watched, Some(&rest)).expect("wait for the terminal");
            assert!(ready > 0, "{what} did not come; the screen shows:\n{text}");
            self.read();
        }
    }

    /// Types keys.
    ///
    /// # Panics
    /// Panics if the terminal does not accept them.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard_and_screen.write_all(keys).expect("type");
    }

    /// Waits until `text` appears on the screen, after the previous awaited text.
    ///
    /// # Panics
    /// Panics with all output if the text does not appear.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let unsearched = &self.seen[self.searched..];
            if let Some(at) = unsearched.windows(text.len()).position(|window| window == text.as_bytes()) {
                self.searched += at + text.len();
                return;
            }
            let mut screen = [PollFd::new(&self.keyboard_and_screen, PollFlags::IN)];
            let rest = Timespec::try_from(deadline - Instant::now()).expect("a minute is a time");
            let ready = poll(&mut screen, Some(&rest)).expect("wait for the terminal");
            assert!(ready > 0, "{text:?} did not come; the screen has:\n{}", self.screen());
            self.read();
        }
    }

    /// Returns all output so far.
    #[must_use]
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Shows the program's output until the program has ended.
    ///
    /// # Panics
    /// Panics if it does not end.
    #[must_use]
    pub fn wait_for_end(&mut self, program: Running) -> Finished {
        let process = pidfd_open(program.pid(), PidfdFlags::empty()).expect("watch the program");
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let rest = Timespec::try_from(deadline - Instant::now()).expect("a minute is a time");
            let mut watched =
                [PollFd::new(&self.keyboard_and_screen, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
            let ready = poll(&mut watched, Some(&rest)).expect("wait for the program");
            assert!(ready > 0, "the program does not end; the screen has:\n{}", self.screen());
            // The program's last output is on the screen by then.
            if watched[0].revents().is_empty() {
                return Finished { stdout: self.screen(), ..program.wait() };
            }
            self.read();
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        let count = self.keyboard_and_screen.read(&mut buffer).expect("read from the terminal");
        self.seen.extend_from_slice(&buffer[..count]);
        self.picture.process(&buffer[..count]);
    }
}
