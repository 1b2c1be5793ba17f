//! The terminal while the screen is shown. It is restored however the program ends.

use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen};
use ratatui::{Frame, Terminal};
use samepage_process::terminal::RawTerminal;

/// Whether the screen is shown. A process has one terminal, and a panic hook can access only statics.
static SHOWN: AtomicBool = AtomicBool::new(false);

/// The terminal with the screen, until dropped.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    /// Restored last.
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
        // A terminal that is gone needs no restoring.
        let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
    }
}

/// Makes panic messages appear on the restored terminal, where they can be read.
pub(super) fn restore_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        leave();
        tell(info);
    }));
}
