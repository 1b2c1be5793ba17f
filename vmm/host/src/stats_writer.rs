//! The writer of samples (`--stats`): one line of JSON each.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;

use samepage_process::log_file::open_again;
use samepage_process::poll;

use crate::statistics::{Sample, Sampler};

/// The target of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatsTarget {
    /// Standard output.
    Stdout,
    /// A file, appended to.
    File(PathBuf),
}

impl std::fmt::Display for StatsTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl std::str::FromStr for StatsTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "-" { Self::Stdout } else { Self::File(text.into()) })
    }
}

/// Writes samples, a line each.
///
/// A slow reader gets fewer lines and delays nothing else: no sample is taken while part of the previous line
/// is unwritten.
#[derive(Debug)]
pub struct StatsWriter {
    sampler: Sampler,
    file: File,
    /// Bytes for each write: all for a file, and as many as a pipe accepts without waiting.
    piece: usize,
    line: Vec<u8>,
    /// Bytes of the line that have been written.
    written: usize,
}

/// How long a reader may take for a piece of the last line.
const LAST_LINE_TIMEOUT: Duration = Duration::from_secs(1);

impl StatsWriter {
    /// Opens the target.
    ///
    /// # Errors
    /// Fails if the file cannot be opened for appending, or if statistics cannot be read.
    pub fn open(target: &StatsTarget) -> io::Result<Self> {
        let file = match target {
            StatsTarget::Stdout => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            StatsTarget::File(path) => OpenOptions::new().append(true).create(true).open(path)?,
        };
        Self::to_file(file)
    }

    fn to_file(file: File) -> io::Result<Self> {
        let piece = if file.metadata()?.is_file() { usize::MAX } else { libc::PIPE_BUF };
        Ok(Self { sampler: Sampler::new()?, file, piece, line: Vec::new(), written: 0 })
    }

    /// Opens the target again if it is a file, so that the renamed file can be moved away. An incomplete line is
    /// written again.
    ///
    /// # Errors
    /// Fails if the file cannot be opened. Then further lines go to the previous file.
    pub fn reopen(&mut self, target: &StatsTarget) -> io::Result<()> {
        // Only files are renamed and opened again.
        if let StatsTarget::File(path) = target
            && self.file.metadata()?.is_file()
        {
            self.file = open_again(path)?;
            if self.written < self.line.len() {
                self.written = 0;
            }
        }
        Ok(())
    }

    /// Writes the rest of the previous sample, or else takes a sample and writes it.
    ///
    /// # Errors
    /// Fails if the sample cannot be taken or written.
    pub fn write(&mut self, sample: impl FnOnce(&Sampler) -> io::Result<Sample>) -> io::Result<()> {
        self.pass_on(Duration::ZERO)?;
        if self.written < self.line.len() {
            return Ok(());
        }
        self.line.clear();
        self.written = 0;
        serde_json::to_writer(&mut self.line, &sample(&self.sampler)?)?;
        self.line.push(b'\n');
        self.pass_on(Duration::ZERO)
    }

    /// Writes the rest of the last sample, if a reader accepts it within a second for each piece.
    ///
    /// # Errors
    /// Fails if it cannot be written.
    pub fn finish(mut self) -> io::Result<()> {
        self.pass_on(LAST_LINE_TIMEOUT)
    }

    fn pass_on(&mut self, wait: Duration) -> io::Result<()> {
        while self.written < self.line.len() && poll::is_writable_within(self.file.as_raw_fd(), wait)? {
            let rest = &self.line[self.written..];
            match self.file.write(&rest[..rest.len().min(self.piece)]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(sampler: &Sampler) -> io::Result<Sample> {
        sampler.sample(None, [])
    }

    #[test]
    fn a_reader_who_is_slow_gets_fewer_lines_and_each_of_them_whole() {
        let (reader, writer) = io::pipe().unwrap();
        let mut statistics = StatsWriter::to_file(File::from(std::os::fd::OwnedFd::from(writer))).unwrap();
        // More than a pipe holds, and nothing waits.
        for _ in 0..1000 {
            statistics.write(empty).unwrap();
        }
        let reader = std::thread::spawn(|| io::read_to_string(reader).unwrap());
        statistics.finish().unwrap();
        let text = reader.join().unwrap();
        assert!(text.ends_with('\n') && (10..1000).contains(&text.lines().count()), "{text}");
        for line in text.lines() {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }

    #[test]
    fn lines_go_on_in_a_new_file_after_a_rename() {
        let folder = tempfile::tempdir().unwrap();
        let (path, renamed) = (folder.path().join("stats"), folder.path().join("stats.1"));
        let target = StatsTarget::File(path.clone());
        let mut statistics = StatsWriter::open(&target).unwrap();
        statistics.write(empty).unwrap();
        std::fs::rename(&path, &renamed).unwrap();
        statistics.write(empty).unwrap();
        statistics.reopen(&target).unwrap();
        statistics.write(empty).unwrap();
        // Cut short, as logrotate does with copytruncate.
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        statistics.write(empty).unwrap();
        for (path, lines) in [(&renamed, 2), (&path, 1)] {
            let text = std::fs::read_to_string(path).unwrap();
            assert_eq!(text.lines().count(), lines, "{text}");
            assert!(text.starts_with('{') && text.ends_with("}\n"), "{text}");
        }
        std::fs::remove_dir_all(folder.path()).unwrap();
        assert!(statistics.reopen(&target).is_err());
        statistics.write(empty).unwrap();
    }

    #[test]
    fn a_dash_is_standard_output() {
        assert_eq!("-".parse(), Ok(StatsTarget::Stdout));
        assert_eq!("s.jsonl".parse(), Ok(StatsTarget::File("s.jsonl".into())));
    }
}
