//! The log, in a file if the client asks for one, otherwise on standard error.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use parking_lot::Mutex;

use super::args::FirecrackerArgs;
use super::model::LoggerConfig;
use samepage_process::tell::tell;

/// The level of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Off,
    Error,
    Info,
}

/// The log of the process.
#[derive(Debug)]
pub(super) struct Log {
    id: String,
    settings: Mutex<Settings>,
}

#[derive(Debug)]
struct Settings {
    file: Option<File>,
    level: Level,
    show_level: bool,
}

impl Log {
    /// Returns the log that the command line asks for.
    pub(super) fn new(args: &FirecrackerArgs) -> anyhow::Result<Self> {
        let settings = Settings { file: None, level: Level::Info, show_level: false };
        let log = Self { id: args.id.clone(), settings: Mutex::new(settings) };
        log.configure(&LoggerConfig {
            log_path: args.log_path.clone(),
            level: args.level.clone(),
            show_level: args.show_level.then_some(true),
            ..LoggerConfig::default()
        })?;
        Ok(log)
    }

    /// Changes the settings that are present.
    pub(super) fn configure(&self, config: &LoggerConfig) -> anyhow::Result<()> {
        let level = config.level.as_deref().map(parse_level).transpose()?;
        let file = config.log_path.as_deref().map(open).transpose()?;
        let mut settings = self.settings.lock();
        settings.level = level.unwrap_or(settings.level);
        settings.show_level = config.show_level.unwrap_or(settings.show_level);
        if file.is_some() {
            settings.file = file;
        }
        Ok(())
    }

    /// Logs an event. On standard error, where the guest's console may be as well, such lines are omitted.
    pub(super) fn info(&self, text: impl Display) {
        self.write(Level::Info, &text);
    }

    /// Logs an error.
    pub(super) fn error(&self, text: impl Display) {
        self.write(Level::Error, &text);
    }

    fn write(&self, level: Level, text: &dyn Display) {
        let mut settings = self.settings.lock();
        if level > settings.level {
            return;
        }
        let show_level = settings.show_level;
        match &mut settings.file {
            Some(file) => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let word = match level {
                    _ if !show_level => "",
                    Level::Error => ":ERROR",
                    _ => ":INFO",
                };
                let line = format!("{:.6} [{}{word}] {text}\n", since.as_secs_f64(), self.id);
                // The VM continues if the log cannot be written.
                let _ = file.write_all(line.as_bytes());
            }
            None if level == Level::Error => tell(text),
            None => {}
        }
    }
}

fn parse_level(text: &str) -> anyhow::Result<Level> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "off" => Level::Off,
        "error" | "warn" | "warning" => Level::Error,
        "info" | "debug" | "trace" => Level::Info,
        _ => bail!("unknown level {text:?} of the log: use Error, Warning, Info, Debug, Trace or Off"),
    })
}

/// Opens a file, and creates it if it is missing, or opens a FIFO without waiting for its reader.
pub(super) fn open(path: &Path) -> anyhow::Result<File> {
    // A FIFO that is also open for reading needs no reader now, and survives the end of a reader.
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .with_context(|| format!("open {}", path.display()))
}
