//! The `samepage` program as its users meet it: started with arguments, typed to, signalled, and
//! judged by what it says and the status that it ends with.
//!
//! The program is built on first use, with the profile of the tests, next to them. A program that is
//! still running when a test lets go of it is killed.

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

/// How long the program may take for anything.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A command line of the program.
pub fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(path());
    command.args(arguments);
    command
}

/// The program's file.
///
/// # Panics
/// Where it cannot be built.
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
        // With all of the workspace, dependencies have the features that they had for the tests.
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

/// What a stream has brought so far. Clones see the same stream.
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
                // An error is the end as well.
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

    /// Waits for the first line for which `find` gives something.
    ///
    /// # Panics
    /// When no such line comes, with all that did.
    pub fn wait_for<T>(&self, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
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
    /// As [`Transcript::wait_for`].
    pub fn wait_for_line(&self, part: &str) -> String {
        self.wait_for(|line| line.contains(part).then(|| line.to_owned()))
    }

    /// All of it, once it has ended.
    fn whole(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut text = self.shared.text.lock();
        while !text.at_end {
            let late = self.shared.more.wait_until(&mut text, deadline).timed_out();
            assert!(!late, "the program has ended, and somebody still holds its {}", self.what);
        }
        String::from_utf8_lossy(&text.bytes).into_owned()
    }
}

/// The program at work.
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
    /// What it wrote to standard output, where the test has not put another file there.
    pub stdout: String,
    /// What it wrote to standard error, likewise.
    pub stderr: String,
}

impl Running {
    /// Starts a program with pipes for its standard input, output and error.
    ///
    /// # Panics
    /// Where it cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self::start_as_is(command)
    }

    /// Starts a program with the files that the command has for it.
    ///
    /// # Panics
    /// Where it cannot be started.
    #[must_use]
    pub fn start_as_is(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
        let stdout = Transcript::of("standard output", child.stdout.take());
        let stderr = Transcript::of("standard error", child.stderr.take());
        Self { child, stdout, stderr }
    }

    /// What it has written to standard output.
    #[must_use]
    pub fn stdout(&self) -> &Transcript {
        &self.stdout
    }

    /// What it has written to standard error.
    #[must_use]
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// Where it does not take that.
    pub fn write(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("standard input is a pipe");
        stdin.write_all(bytes).expect("the program reads its standard input");
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// Where that is not possible.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the program");
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The names of its threads.
    ///
    /// # Panics
    /// Where it has none any more.
    #[must_use]
    pub fn threads(&self) -> Vec<String> {
        let tasks = format!("/proc/{}/task", self.child.id());
        fs::read_dir(tasks)
            .expect("list the program's threads")
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .collect()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn wait(self) -> Finished {
        self.wait_within(PATIENCE)
    }

    /// The same for what does a lot of work, and tells how it gets on by itself.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn wait_for_long(self) -> Finished {
        self.wait_within(12 * PATIENCE)
    }

    fn wait_within(mut self, patience: Duration) -> Finished {
        let process = pidfd_open(self.pid(), PidfdFlags::empty()).expect("watch the program");
        let patience = Timespec::try_from(patience).expect("an hour is a time");
        let mut watched = [PollFd::new(&process, PollFlags::IN)];
        if poll(&mut watched, Some(&patience)).expect("wait for the program") == 0 {
            // What it said so far tells where it hangs.
            let _ = self.child.kill();
            panic!("the program does not end\n{}{}", self.stdout.whole(), self.stderr.whole());
        }
        let status = self.child.wait().expect("the program has ended");
        Finished { status, stdout: self.stdout.whole(), stderr: self.stderr.whole() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing to one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Asserts that it ended by itself with this status.
    ///
    /// # Panics
    /// Where it did not, with all that it wrote.
    pub fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(self.status.signal(), None, "ended by a signal\n{}{}", self.stdout, self.stderr);
        assert_eq!(self.status.code(), Some(code), "status\n{}{}", self.stdout, self.stderr);
        self
    }
}
