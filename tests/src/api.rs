//! A process with a control socket, from its clients' view. Every response is checked against the process's
//! own description of the API.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use samepage_client::socket::{Answer, Client};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::console::TIME_LIMIT;
use crate::program::{Finished, Running, command};

/// Memory of each guest, in bytes.
pub const MEMORY: u64 = 64 << 20;

/// Resources of a process that VMs must not leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Open files.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings.
    pub mappings: usize,
    /// Private memory, in bytes.
    pub private_bytes: u64,
}

/// Mappings that an allocator may keep.
const KEPT_MAPPINGS: usize = 32;
/// Memory that an allocator may keep, in bytes.
const KEPT_BYTES: u64 = 16 << 20;

/// A process with a control socket in its own folder.
#[derive(Debug)]
pub struct Host {
    /// The process.
    pub running: Running,
    /// A client of the process.
    pub client: Client,
    /// The folder.
    pub folder: TempDir,
    openapi: Value,
}

impl Host {
    /// Starts `samepage serve` with more arguments, and waits until it is ready.
    ///
    /// # Panics
    /// Panics if it does not become ready.
    #[must_use]
    pub fn serve(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        fs::write(folder.path().join("demo.elf"), DEMO_GUEST).expect("write the guest");
        Self::serve_in(folder, arguments)
    }

    /// Starts `samepage serve` in an existing folder.
    ///
    /// # Panics
    /// Panics if it does not become ready.
    #[must_use]
    pub fn serve_in(folder: TempDir, arguments: &[&str]) -> Self {
        let socket = folder.path().join("socket");
        let mut serve = command(["serve", "--socket"]);
        serve.arg(&socket).args(arguments).current_dir(folder.path());
        let running = Running::start(serve);
        running.stderr().wait_for_line("the control socket is");
        let client = Client::new(socket);
        let openapi = client.get("/openapi.json").expect("the description of the API");
        Self { running, client, folder, openapi }
    }

    /// Returns the socket's path.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.client.socket().to_owned()
    }

    /// Returns the body of a request that creates a VM with the demo guest.
    #[must_use]
    pub fn vm(&self, name: &str, plan: &Plan, start: bool) -> Value {
        let kernel = self.folder.path().join("demo.elf");
        json!({
            "name": name, "kernel": kernel, "memory": MEMORY, "vcpus": plan.cpus, "cmdline": plan.to_string(),
            "start": start,
        })
    }

    /// Sends a request, checks the response against the description, and returns its status and JSON.
    ///
    /// # Panics
    /// Panics if there is no response, or if it does not match the description.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let bytes = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let answer = self.client.raw(method.parse().expect("a method"), path, bytes);
        let answer = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        self.check(method, path, &answer)
    }

    /// Sends a request that must succeed.
    ///
    /// # Panics
    /// Panics if the request is refused.
    pub fn done(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let (status, json) = self.ask(method, path, body);
        assert!(status < 300, "{method} {path}: {status} {json}");
        json
    }

    /// Requests an action of a VM, and returns its state.
    ///
    /// # Panics
    /// Panics if the request is refused.
    pub fn act(&self, vm: &str, action: &str) -> String {
        let vm = self.done("POST", &format!("/vms/{vm}/actions"), Some(&json!({ "action": action })));
        vm["state"].as_str().expect("a state").to_owned()
    }

    /// Checks a response against the description.
    ///
    /// # Panics
    /// Panics if the response does not match.
    pub fn check(&self, method: &str, path: &str, answer: &Answer) -> (u16, Value) {
        let status = answer.status;
        let json = match answer.body.as_slice() {
            [] => Value::Null,
            body if answer.media_type.ends_with("json") => {
                serde_json::from_slice(body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
            }
            _ => return (status, Value::Null),
        };
        assert_possible(&json);
        if let Some(schema) = self.schema(method, path, status, &answer.media_type) {
            let validator = jsonschema::validator_for(&schema).expect("a schema");
            let wrong: Vec<_> = validator.iter_errors(&json).map(|error| error.to_string()).collect();
            assert!(wrong.is_empty(), "{method} {path}: {status} {json} is not as described: {wrong:?}");
        } else {
            assert!(matches!(status, 204 | 404), "{method} {path} has no description of {status} {json}");
        }
        (status, json)
    }

    /// Returns the schema of a response.
    fn schema(&self, method: &str, path: &str, status: u16, media_type: &str) -> Option<Value> {
        let parts: Vec<_> = path.split('?').next()?.split('/').collect();
        let fits = |template: &str| {
            let template: Vec<_> = template.split('/').collect();
            template.len() == parts.len()
                && template.iter().zip(&parts).all(|(one, other)| one.starts_with('{') || one == other)
        };
        let (_, item) = self.openapi["paths"].as_object()?.iter().find(|(template, _)| fits(template))?;
        // The description of a missing resource is that of the present ones.
        let operation = match &item[method.to_lowercase()] {
            Value::Null => item.as_object()?.values().next()?,
            operation => operation,
        };
        let responses = &operation["responses"];
        let response = match &responses[status.to_string()] {
            Value::Null => &responses["default"],
            response => response,
        };
        let mut schema = response["content"].get(media_type)?["schema"].clone();
        schema["components"] = self.openapi["components"].clone();
        Some(schema)
    }

    /// Waits until a condition holds for the resource at a path.
    ///
    /// # Panics
    /// Panics with the resource if the condition does not become true.
    pub fn wait_for(&self, path: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let json = self.done("GET", path, None);
            if holds(&json) {
                return json;
            }
            assert!(Instant::now() < deadline, "{what} did not come about: {json}");
            // Statistics have no events, so poll.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until a VM's console contains a text.
    ///
    /// # Panics
    /// Panics if the text does not appear.
    pub fn wait_for_console(&self, vm: &str, text: &str) {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let console = self.console(vm);
            if console.contains(text) {
                return;
            }
            assert!(Instant::now() < deadline, "{text} did not come; the console has:\n{console}");
            // Other tests cover the stream, so poll.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the end of a VM's console.
    ///
    /// # Panics
    /// Panics if there is no such VM.
    #[must_use]
    pub fn console(&self, vm: &str) -> String {
        let path = format!("/vms/{vm}/console");
        let answer = self.client.raw("GET".parse().expect("a method"), &path, Vec::new());
        String::from_utf8_lossy(&answer.expect("a console").body).into_owned()
    }

    /// Writes bytes to the socket, and returns everything that comes back.
    ///
    /// # Panics
    /// Panics if nothing comes back.
    #[must_use]
    pub fn raw(&self, bytes: &[u8], then_close: bool) -> String {
        let mut stream = connect(&self.socket());
        // The server may close the connection before the end.
        let _ = stream.write_all(bytes);
        if then_close {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let mut answer = Vec::new();
        // A broken connection has delivered all that it could.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Returns the number of files that the process has open.
    ///
    /// # Panics
    /// Panics if the process has ended.
    #[must_use]
    pub fn open_files(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.running.pid().as_raw_nonzero());
        fs::read_dir(folder).expect("list open files").count()
    }

    /// Returns the resources of the process.
    ///
    /// # Panics
    /// Panics if the process has ended.
    #[must_use]
    pub fn holdings(&self) -> Held {
        let read = |name: &str| {
            let path = format!("/proc/{}/{name}", self.running.pid().as_raw_nonzero());
            fs::read_to_string(path).expect("ask the kernel about the process")
        };
        let status = read("status");
        let private = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kibibytes = private.and_then(|line| line.trim().strip_suffix(" kB")).expect("RssAnon");
        Held {
            files: self.open_files(),
            threads: self.running.threads().len(),
            mappings: read("maps").lines().count(),
            private_bytes: kibibytes.parse::<u64>().expect("a number") * 1024,
        }
    }

    /// Waits until the process has no more resources than before, except those that an allocator keeps.
    /// Closed connections are noticed after a moment, and idle threads end after a while.
    ///
    /// # Panics
    /// Panics if the process still has more in the end.
    pub fn assert_back_to(&self, before: &Held) {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let now = self.holdings();
            let is_back = now.files <= before.files
                && now.threads <= before.threads
                && now.mappings <= before.mappings + KEPT_MAPPINGS
                && now.private_bytes <= before.private_bytes + KEPT_BYTES;
            if is_back {
                return;
            }
            assert!(Instant::now() < deadline, "{before:?} before, {now:?} now");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the number of the process's threads for VMs.
    #[must_use]
    pub fn vm_threads(&self) -> usize {
        let of_vm = |name: &String| name.starts_with("vcpu-") || name.starts_with("blk-");
        self.running.threads().iter().filter(|name| of_vm(name)).count()
    }

    /// Kills the process, which has no time for anything. Returns its folder.
    ///
    /// # Panics
    /// Panics if there is no such process.
    #[must_use]
    pub fn kill(self) -> TempDir {
        self.running.signal(Signal::KILL);
        self.folder
    }

    /// Ends the process as users do.
    #[must_use]
    pub fn end(self) -> Finished {
        self.end_and_keep().0
    }

    /// Ends the process as users do, and returns its folder as well.
    ///
    /// # Panics
    /// Panics if the process does not end, or leaves its socket behind.
    #[must_use]
    pub fn end_and_keep(self) -> (Finished, TempDir) {
        self.running.signal(Signal::TERM);
        let finished = self.running.wait();
        assert!(!self.client.socket().exists(), "the socket was left behind");
        (finished, self.folder)
    }
}

/// Asserts that figures have possible values: dates are dates, durations are not dates, amounts are not
/// negative, and no page lives longer than the time of observation.
fn assert_possible(json: &Value) {
    let Value::Object(fields) = json else {
        return json.as_array().into_iter().flatten().for_each(assert_possible);
    };
    for (name, value) in fields {
        assert_possible(value);
        let Some(number) = value.as_f64() else { continue };
        let range = match name.as_str() {
            // From 2001 to 2096.
            name if name.ends_with("time_seconds") => 1e9..4e9,
            name if name.ends_with("_seconds") => 0.0..1e9,
            name if name.ends_with("_bytes") => 0.0..f64::INFINITY,
            _ => continue,
        };
        assert!(range.contains(&number) && !number.is_sign_negative(), "{name} cannot be {value}: {json}");
    }
    if let Some(life) = fields.get("mean_life_seconds").and_then(Value::as_f64) {
        assert!(Some(life) <= fields["watched_seconds"].as_f64(), "{json}");
    }
}

/// Returns a connection to a socket, with a time limit for responses.
///
/// # Panics
/// Panics if no server listens.
#[must_use]
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("connect to the control socket");
    stream.set_read_timeout(Some(TIME_LIMIT)).expect("set a timeout");
    stream
}
