//! `samepage top`: shows VMs and their shared memory, live on a terminal.
//!
//! - `fetch` polls the server each second on its own thread, and sends actions for VMs.
//! - `model` holds the state: the last responses, rates, and the order of the rows.
//! - `draw` draws the model; `screen` prepares the terminal and restores it.

mod draw;
mod fetch;
mod model;
mod screen;

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::socket::{Client, ClientError};
use anyhow::{Context, bail};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use samepage_api_types::lifecycle::{Action, State};
use samepage_process::poll::{is_readable_now, wait_readable};
use samepage_process::signals::{ResizeSignal, ShutdownSignals};
use samepage_process::terminal::{self, StdinKind};

use super::args::TopArgs;
use super::console;
use fetch::{Fetcher, News};
use model::Model;
use screen::Screen;

/// Time without a response after which the program ends.
const TIME_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn main(args: &TopArgs) -> anyhow::Result<()> {
    if terminal::stdin_kind() != StdinKind::Terminal || !terminal::stdout_is_terminal() {
        bail!("samepage top needs a terminal; samepage stats --json is for programs");
    }
    let client = args.socket.client();
    // Change the terminal only after the first response.
    let first = fetch::snapshot(&client, None)?;
    // Before the fetcher's thread starts, so that the thread also blocks the signals.
    let signals = ShutdownSignals::catch().context("catch the signals that end the program")?;
    let resize = ResizeSignal::catch().context("catch the signal of a terminal that changes its size")?;
    let mut model = Model::new(client.socket().display().to_string());
    model.add(first);
    let fetcher = Fetcher::start(client.clone(), args.interval).context("start a thread")?;
    screen::restore_on_panic();
    let mut top = Top { client, model, fetcher, signals, resize, unanswered: None };
    top.run()
}

/// A command of the user.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    Quit,
    Console(String),
}

struct Top {
    client: Client,
    model: Model,
    fetcher: Fetcher,
    signals: ShutdownSignals,
    resize: ResizeSignal,
    /// The time since which requests fail.
    unanswered: Option<Instant>,
}

impl Top {
    fn run(&mut self) -> anyhow::Result<()> {
        let mut screen = Screen::enter().context("put the terminal into raw mode")?;
        loop {
            self.fetcher.ask_for_pages(self.model.pages_of());
            screen.draw(|frame| draw::draw(frame, &self.model)).context("draw on the terminal")?;
            let ready = wait_readable([
                Some(self.signals.as_raw_fd()),
                Some(io::stdin().as_raw_fd()),
                Some(self.fetcher.as_raw_fd()),
                Some(self.resize.as_raw_fd()),
            ]);
            let [signal, typed, news, resized] = ready.context("wait for the terminal")?;
            if signal {
                return Ok(());
            }
            if resized {
                // The next picture uses the present size.
                self.resize.take();
            }
            if news {
                self.hear()?;
            }
            if typed {
                match self.read_keys().context("read from the terminal")? {
                    Wish::Nothing => {}
                    Wish::Quit => return Ok(()),
                    Wish::Console(vm) => {
                        drop(screen);
                        if let Err(error) = console::attach(&self.client, &vm, &self.signals) {
                            self.model.say(samepage_process::tell::causes(&error));
                        }
                        // If a signal ended the console, it is still pending and also ends this program.
                        screen = Screen::enter().context("put the terminal into raw mode")?;
                    }
                }
            }
        }
    }

    /// Processes the fetcher's messages.
    fn hear(&mut self) -> anyhow::Result<()> {
        for news in self.fetcher.take() {
            match news {
                News::Snapshot(snapshot) => {
                    self.unanswered = None;
                    self.model.add(*snapshot);
                }
                News::Done(text) => self.model.say(text),
                News::Failed(error @ ClientError::Connect { .. }) => return Err(error.into()),
                News::Failed(error) => {
                    if self.unanswered.get_or_insert_with(Instant::now).elapsed() > TIME_LIMIT {
                        return Err(error.into());
                    }
                    self.model.say(error.to_string());
                }
            }
        }
        Ok(())
    }

    fn read_keys(&mut self) -> io::Result<Wish> {
        let mut any = false;
        while event::poll(Duration::ZERO)? {
            any = true;
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
            {
                match self.press(key) {
                    Wish::Nothing => {}
                    wish => return Ok(wish),
                }
            }
        }
        // If standard input stays readable without a key, the terminal is gone.
        if !any && is_readable_now(io::stdin().as_raw_fd())? {
            return Ok(Wish::Quit);
        }
        Ok(Wish::Nothing)
    }

    fn press(&mut self, key: KeyEvent) -> Wish {
        let model = &mut self.model;
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if model.help {
            model.help = false;
            return if control && key.code == KeyCode::Char('c') { Wish::Quit } else { Wish::Nothing };
        }
        match key.code {
            KeyCode::Char('c') if control => return Wish::Quit,
            KeyCode::Char('t' | 'q') | KeyCode::Esc if model.types => model.types = false,
            KeyCode::Char('q') | KeyCode::Esc => return Wish::Quit,
            KeyCode::Up | KeyCode::Char('k') => model.select(-1),
            KeyCode::Down | KeyCode::Char('j') => model.select(1),
            KeyCode::PageUp => model.select(-10),
            KeyCode::PageDown => model.select(10),
            KeyCode::Home | KeyCode::Char('g') => model.select(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => model.select(isize::MAX),
            KeyCode::Char('s') | KeyCode::Right => model.sort_by_next(),
            KeyCode::Left => model.sort_by_previous(),
            KeyCode::Char('r') => model.reverse(),
            KeyCode::Char('?' | 'h') => model.help = true,
            KeyCode::Char('t') => model.types = true,
            KeyCode::Char('p' | ' ') => {
                let asked = model.selected().map(|vm| (vm.name.clone(), vm.state));
                if let Some((vm, state)) = asked {
                    let action = if state == State::Running { Action::Pause } else { Action::Resume };
                    self.fetcher.ask(vm, action);
                }
            }
            KeyCode::Char('c') | KeyCode::Enter => {
                if let Some(vm) = model.selected() {
                    return Wish::Console(vm.name.clone());
                }
            }
            _ => {}
        }
        Wish::Nothing
    }
}
