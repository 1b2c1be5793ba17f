//! The `samepage` program as users run it: with arguments, input and signals. Tests check its output and its
//! exit status.
//!
//! The program is built on first use, with the profile of the tests and next to them. If the test drops a
//! running program, it is killed.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use xtask::suite::PROGRAM;

/// Time limit for any step of the program.
pub const TIME_LIMIT: Duration = Duration::from_secs(300);

/// Returns a command of the program.
pub fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(path());
    command.args(arguments);
    command
}

/// Returns the path of the program.
///
/// # Panics
/// Panics if the program cannot be built.
pub fn path() -> &'static Path {
    static PROGRAM: LazyLock<PathBuf> = LazyLock::new(build);
    &PROGRAM
}

fn build() -> PathBuf {
    if let Some(program) = env::var_os(PROGRAM) {
        return program.into();
    }
    // Cargo puts a test at TARGET/PROFILE/deps/NAME, and a program at TARGET/PROFILE/NAME.
    let test = env::current_exe().expect("find this test");
    let folder = test.parent().and_then(Path::parent).expect("a test lies in a target directory");
    let target = folder.parent().expect("a profile's directory lies in a target directory");
    let profile = match folder.file_name().and_then(OsStr::to_str).expect("profiles have ASCII names") {
        "debug" => "dev",
        profile => profile,
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        // Building the whole workspace gives dependencies the same features as for the tests.
        .args(["build", "--quiet", "--workspace", "--bin", "samepage", "--bin", "samepage-bench"])
        .args(["--profile", profile])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
        .arg("--target-dir")
        .arg(target)
        .status()
        .expect("start cargo");
    assert!(status.success(), "cargo cannot build the program: {status}");
    folder.join("samepage")
}

/// The content of a stream so far. Clones share the same stream.
#[derive(Clone, Debug)]
pub struct Transcript {
    what: &'static str,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    text: Mutex<Text>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Text {
    bytes: Vec<u8>,
    at_end: bool,
}

impl Transcript {
    fn of<R: Read + Send + 'static>(what: &'static str, stream: Option<R>) -> Self {
        let shared = Arc::<Shared>::default();
        let to = Arc::clone(&shared);
        thread::spawn(move || {
            if let Some(mut stream) = stream {
                let mut buffer = [0; 4096];
                // An error counts as the end.
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    to.text.lock().bytes.extend_from_slice(&buffer[..count]);
                    to.more.notify_all();
                }
            }
            to.text.lock().at_end = true;
            to.more.notify_all();
        });
        Self { what, shared }
    }

    /// Waits for the first line for which `find` returns a value.
    ///
    /// # Panics
    /// Panics with all lines if no such line comes.
    pub fn wait_for<T>(&self, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + TIME_LIMIT;
        let mut text = self.shared.text.lock();
        let mut seen = 0;
        loop {
            let lines = text.bytes.iter().rposition(|&byte| byte == b'\n').map_or(seen, |at| at + 1);
            let new = String::from_utf8_lossy(&text.bytes[seen..lines]);
            if let Some(found) = new.lines().find_map(&find) {
                return found;
            }
            seen = lines;
            if text.at_end || self.shared.more.wait_until(&mut text, deadline).timed_out() {
                let end = if text.at_end { "ended" } else { "is late" };
                panic!(
                    "what was waited for on {} did not come; it {end} and has:\n{}",
                    self.what,
                    String::from_utf8_lossy(&text.bytes)
                );
            }
        }
    }

    /// Waits for a line that contains `part`.
    ///
    /// # Panics
    /// Panics like [`Transcript::wait_for`].
    pub fn wait_for_line(&self, part: &str) -> String {
        self.wait_for(|line| line.contains(part).then(|| line.to_owned()))
    }

    /// Returns the whole content after the end.
    fn whole(&self) -> String {
        let deadline = Instant::now() + TIME_LIMIT;
        let mut text = self.shared.text.lock();
        while !text.at_end {
            let late = self.shared.more.wait_until(&mut text, deadline).timed_out();
            assert!(!late, "the program has ended, and somebody still holds its {}", self.what);
        }
        String::from_utf8_lossy(&text.bytes).into_owned()
    }
}

/// The running program.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Transcript,
    stderr: Transcript,
}

/// The program after its end.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// The content of standard output, unless the test has replaced it.
    pub stdout: String,
    /// The content of standard error, unless the test has replaced it.
    pub stderr: String,
}

impl Running {
    /// Starts a program with pipes for its standard input, output and error.
    ///
    /// # Panics
    /// Panics if the program cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::start_as_is(command)
    }

    /// Starts a program with the files of the command.
    ///
    /// # Panics
    /// Panics if the program cannot be started.
    #[must_use]
    pub fn start_as_is(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let stdout = Transcript::of("standard output", child.stdout.take());
        let stderr = Transcript::of("standard error", child.stderr.take());
        Self { child, stdout, stderr }
    }

    /// Returns the program's standard output.
    #[must_use]
    pub fn stdout(&self) -> &Transcript {
        &self.stdout
    }

    /// Returns the program's standard error.
    #[must_use]
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// Writes to the program's standard input.
    ///
    /// # Panics
    /// Panics if the program does not read the bytes.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("standard input is a pipe");
        stdin.write_all(bytes).expect("the program reads its standard input");
    }

    /// Closes the program's standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    /// Sends a signal to the program.
    ///
    /// # Panics
    /// Panics if that fails.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the program");
    }

    /// Returns the process ID.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Returns the names of the program's threads.
    ///
    /// # Panics
    /// Panics if there are none any more.
    #[must_use]
    pub fn threads(&self) -> Vec<String> {
        let tasks = format!("/proc/{}/task", self.child.id());
        fs::read_dir(tasks)
            .expect("list the program's threads")
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .collect()
    }

    /// Waits for the program's end.
    ///
    /// # Panics
    /// Panics if it does not end in time.
    #[must_use]
    pub fn wait(self) -> Finished {
        self.wait_within(TIME_LIMIT)
    }

    /// Waits longer for the program's end, for programs that do a lot of work and report their progress.
    ///
    /// # Panics
    /// Panics if it does not end in time.
    #[must_use]
    pub fn wait_for_long(self) -> Finished {
        self.wait_within(12 * TIME_LIMIT)
    }

    fn wait_within(mut self, time_limit: Duration) -> Finished {
        let process = pidfd_open(self.pid(), PidfdFlags::empty()).expect("watch the program");
        let time_limit = Timespec::try_from(time_limit).expect("an hour is a time");
        let mut watched = [PollFd::new(&process, PollFlags::IN)];
        if poll(&mut watched, Some(&time_limit)).expect("wait for the program") == 0 {
            // The output so far shows where it hangs.
            let _ = self.child.kill();
            panic!("the program does not end\n{}{}", self.stdout.whole(), self.stderr.whole());
        }
        let status = self.child.wait().expect("the program has ended");
        Finished { status, stdout: self.stdout.whole(), stderr: self.stderr.whole() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both calls have no effect after the end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Asserts that the program exited with this status.
    ///
    /// # Panics
    /// Panics with the output if it did not.
    pub fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(self.status.signal(), None, "ended by a signal\n{}{}", self.stdout, self.stderr);
        assert_eq!(self.status.code(), Some(code), "status\n{}{}", self.stdout, self.stderr);
        self
    }
}
