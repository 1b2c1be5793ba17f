//! Targets of a guest's serial output on the host.
//!
//! A vCPU thread writes to a sink. A slow reader delays its guest. Output is lost if the reader is gone (EPIPE)
//! or does not read before the VM ends; the serial port counts the lost bytes.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use samepage_process::log_file::open_again;
use samepage_process::poll;

/// Writes to a file, a terminal or a pipe, without a buffer.
pub(crate) struct FileSink {
    file: Arc<Mutex<File>>,
    /// Readable once the VM is ending; `None` for files whose writers never wait.
    closing: Option<EventFd>,
    /// Whether the first write must truncate the file.
    to_be_emptied: bool,
}

impl FileSink {
    /// Returns a sink to this process's standard output.
    pub(crate) fn stdout(closing: &EventFd) -> io::Result<Self> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Self::new(file, closing)
    }

    /// Returns a sink to a file, a FIFO or a terminal. A missing file is created. The first byte truncates an
    /// existing file, so a VM that cannot start preserves previous output. Each write goes to the present end
    /// of the file, so other programs may truncate it (`copytruncate` of logrotate).
    pub(crate) fn create(path: &Path, closing: &EventFd) -> io::Result<Self> {
        let sink = Self::new(File::options().append(true).create(true).open(path)?, closing)?;
        Ok(Self { to_be_emptied: sink.closing.is_none(), ..sink })
    }

    fn new(file: File, closing: &EventFd) -> io::Result<Self> {
        let closing = if file.metadata()?.is_file() { None } else { Some(closing.try_clone()?) };
        Ok(Self { file: Arc::new(Mutex::new(file)), closing, to_be_emptied: false })
    }

    /// Returns the sink's file, to be opened again at its path; `None` for a FIFO or a terminal.
    pub(crate) fn log(&self, path: &Path) -> Option<Log> {
        self.closing.is_none().then(|| Log { path: path.to_owned(), file: Arc::clone(&self.file) })
    }
}

/// The file of a sink, and its path.
pub(crate) struct Log {
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl Log {
    /// Returns the path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the path again, and creates the file if it is missing. Further output goes to the end of that file.
    ///
    /// # Errors
    /// Fails if the path cannot be opened, or is no longer a file. Then output goes to the previous file.
    pub(crate) fn reopen(&self) -> io::Result<()> {
        *self.file.lock() = open_again(&self.path)?;
        Ok(())
    }
}

/// Waits until a file accepts more, or the VM is ending.
fn wait_for_room(file: &File, closing: &EventFd) -> io::Result<()> {
    let mut files = [
        libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 },
        libc::pollfd { fd: closing.as_raw_fd(), events: libc::POLLIN, revents: 0 },
    ];
    // The signal that asks a vCPU to pause has no effect here: the pause waits for the reader.
    poll::wait(&mut files)?;
    if files[0].revents == 0 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
}

impl Write for FileSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // A file whose writers wait is not a log, so no other thread locks it.
        let mut file = self.file.lock();
        if std::mem::take(&mut self.to_be_emptied) {
            file.set_len(0)?;
        }
        loop {
            if let Some(closing) = &self.closing {
                wait_for_room(&file, closing)?;
            }
            // The part that a pipe with room takes without waiting.
            let part = &data[..data.len().min(libc::PIPE_BUF)];
            match file.write(part) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Held for each line on standard output, so that lines of several VMs do not mix.
static STDOUT_LINE: Mutex<()> = Mutex::new(());

/// Longest line that is kept together.
const LINE_MAX: usize = 1024;

/// Passes on whole lines, each after the VM's name.
pub(crate) struct PrefixSink<W: Write> {
    prefix: String,
    line: Vec<u8>,
    out: W,
}

impl<W: Write> PrefixSink<W> {
    pub(crate) fn new(vm: &str, out: W) -> Self {
        Self { prefix: format!("[{vm}] "), line: Vec::new(), out }
    }

    fn end_line(&mut self) -> io::Result<()> {
        while self.line.last().is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
            self.line.pop();
        }
        let mut text = Vec::with_capacity(self.prefix.len() + self.line.len() + 1);
        text.extend_from_slice(self.prefix.as_bytes());
        text.append(&mut self.line);
        text.push(b'\n');
        let _whole_line = STDOUT_LINE.lock();
        self.out.write_all(&text)
    }
}

impl<W: Write> Write for PrefixSink<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_MAX {
                self.end_line()?;
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> Drop for PrefixSink<W> {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            // The VM has ended, so nobody needs the error.
            let _ = self.end_line();
        }
    }
}

/// Writes each byte to a writer that never waits, and then to another sink.
pub(crate) struct CopySink {
    copy: Box<dyn Write + Send>,
    to: Box<dyn Write + Send>,
}

impl CopySink {
    pub(crate) fn new(copy: Box<dyn Write + Send>, to: Box<dyn Write + Send>) -> Self {
        Self { copy, to }
    }
}

impl Write for CopySink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.copy.write_all(data)?;
        // The copy already has all of the data. A partial write here would copy the rest again.
        self.to.write_all(data).map(|()| data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
    }

    /// Closes the reader and waits until no reader is left. A child process that another test starts may hold a
    /// copy for a moment.
    fn close(reader: io::PipeReader, writer: &io::PipeWriter) {
        drop(reader);
        let mut files = [libc::pollfd { fd: writer.as_raw_fd(), events: 0, revents: 0 }];
        poll::wait(&mut files).unwrap();
        assert_eq!(files[0].revents, libc::POLLERR);
    }

    #[test]
    fn lines_get_the_name_and_partial_ones_come_at_the_end() {
        let mut out = Vec::new();
        let mut sink = PrefixSink::new("vm-1", &mut out);
        for byte in b"one\r\ntwo\n\nlogin: " {
            sink.write_all(&[*byte]).unwrap();
        }
        drop(sink);
        assert_eq!(String::from_utf8(out).unwrap(), "[vm-1] one\n[vm-1] two\n[vm-1] \n[vm-1] login: \n");
    }

    #[test]
    fn an_endless_line_is_cut() {
        let mut out = Vec::new();
        let mut sink = PrefixSink::new("vm", &mut out);
        sink.write_all(&[b'x'; 3 * LINE_MAX]).unwrap();
        assert!(sink.line.is_empty());
        drop(sink);
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 3);
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_up_until_the_vm_ends() {
        let (mut reader, writer) = io::pipe().unwrap();
        let closing = event();
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let mut sink = FileSink::new(file, &closing).unwrap();
        let ender = std::thread::spawn({
            let closing = closing.try_clone().unwrap();
            move || closing.write(1).unwrap()
        });
        let mut written = 0;
        let error = loop {
            match sink.write(&[b'x'; 4096]) {
                Ok(count) => written += count,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        ender.join().unwrap();
        drop(sink);
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), written);
    }

    #[test]
    fn a_file_is_emptied_by_the_first_byte() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        std::fs::write(&path, "before").unwrap();
        let mut sink = FileSink::create(&path, &event()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
        sink.write_all(b"new").unwrap();
        sink.write_all(b"er").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"newer");
    }

    #[test]
    fn what_is_cut_short_meanwhile_gets_no_holes() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let mut sink = FileSink::create(&path, &event()).unwrap();
        sink.write_all(b"a line\n").unwrap();
        // As logrotate does with copytruncate.
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        sink.write_all(b"another\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "another\n");
    }

    #[test]
    fn what_was_renamed_is_left_when_it_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let (path, renamed) = (folder.path().join("log"), folder.path().join("log.1"));
        let mut sink = FileSink::create(&path, &event()).unwrap();
        let log = sink.log(&path).unwrap();
        sink.write_all(b"one").unwrap();
        std::fs::rename(&path, &renamed).unwrap();
        sink.write_all(b" and two").unwrap();
        log.reopen().unwrap();
        sink.write_all(b"three").unwrap();
        assert_eq!(std::fs::read_to_string(&renamed).unwrap(), "one and two");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three");
        // A file that is opened again without a rename keeps its content.
        log.reopen().unwrap();
        sink.write_all(b", four").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three, four");
        // If that fails, the sink continues with the earlier file.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(log.reopen().is_err());
        sink.write_all(b".").unwrap();
    }

    #[test]
    fn the_copy_is_whole_whatever_becomes_of_the_rest() {
        let (reader, writer) = io::pipe().unwrap();
        let (copied, copy) = io::pipe().unwrap();
        close(reader, &writer);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let to = Box::new(FileSink::new(file, &event()).unwrap());
        let mut sink = CopySink::new(Box::new(copy), to);
        assert_eq!(sink.write(b"text").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        drop(sink);
        assert_eq!(io::read_to_string(copied).unwrap(), "text");
    }

    #[test]
    fn a_pipe_whose_reader_is_gone_is_an_error() {
        let (reader, writer) = io::pipe().unwrap();
        close(reader, &writer);
        let file = File::from(std::os::fd::OwnedFd::from(writer));
        let mut sink = FileSink::new(file, &event()).unwrap();
        assert_eq!(sink.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
