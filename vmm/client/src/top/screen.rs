//! The terminal while the picture is on it, and as it was afterwards, whichever way that comes about.

use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen};
use ratatui::{Frame, Terminal};
use samepage_process::terminal::RawTerminal;

/// The picture is on the terminal. There is one terminal for a process, and a panic hook reaches nothing
/// but statics.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// The terminal with the picture on it, until dropped.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    /// Goes back last.
    _raw: RawTerminal,
}

impl Screen {
    pub(super) fn enter() -> io::Result<Self> {
        let raw = RawTerminal::enter()?;
        SHOWN.store(true, Ordering::SeqCst);
        let screen = execute!(io::stdout(), EnterAlternateScreen, Hide)
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match screen {
            Ok(terminal) => Ok(Self { terminal, _raw: raw }),
            Err(error) => {
                leave();
                Err(error)
            }
        }
    }

    pub(super) fn draw(&mut self, picture: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(picture).map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

fn leave() {
    if SHOWN.swap(false, Ordering::SeqCst) {
        // A terminal that is gone needs nothing.
        let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
    }
}

/// Has what a panic says come onto the terminal as it was, where it can be read.
pub(super) fn restore_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        leave();
        tell(info);
    }));
}
