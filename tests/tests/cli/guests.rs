//! Guests from their start to their ends.

use std::fs;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::Signal;
use samepage_resources::demo::plan::{Crash, Plan};
use samepage_resources::demo::report::Report;
use samepage_tests::program::{Running, TIME_LIMIT};

use crate::scratch::{Scratch, assert_verified, endless, report, short};

pub(crate) fn reset() {
    let scratch = Scratch::new();
    scratch.write("initrd", b"anything");
    for arguments in [&[][..], &["--initrd", "initrd"], &["--sharing", "off"]] {
        let end = scratch.start(short(), arguments).wait();
        end.assert_code(0);
        assert_verified(&end.stdout);
        assert_eq!(end.stderr, "samepage: VM vm: the guest reset the machine\n");
    }
}

pub(crate) fn templates() {
    let scratch = Scratch::new();
    scratch.write("web-1.log", &[b'x'; 1 << 16]);
    let cmdline = format!("{} vm={{index}} host={{name}}", short());
    let end = scratch.start(cmdline, &["--count=3", "--name=web", "--console", "file={name}.log"]).wait();
    end.assert_code(0);
    assert_eq!(end.stdout, "");
    let mut told: Vec<_> = end.stderr.lines().collect();
    told.sort_unstable();
    let ends = [0, 1, 2].map(|index| format!("samepage: VM web-{index}: the guest reset the machine"));
    assert_eq!(told, ends);
    for index in 0..3 {
        let log = scratch.read_text(&format!("web-{index}.log"));
        assert_verified(&log);
        assert!(!log.contains("xx"), "the earlier log is still there: {log}");
        assert!(log.contains(&format!("ignored option=host=web-{index}\n")), "{log}");
    }

    let end = scratch.start(short(), &["--console", "off"]).wait();
    assert_eq!(end.assert_code(0).stdout, "");
}

pub(crate) fn prefixes() {
    let end = Scratch::new().start(short(), &["--count=2", "--name=n"]).wait();
    end.assert_code(0);
    let (first, second): (Vec<_>, Vec<_>) = end.stdout.lines().partition(|line| line.starts_with("[n-0] "));
    assert!(second.iter().all(|line| line.starts_with("[n-1] ")), "{}", end.stdout);
    for lines in [first, second] {
        assert_verified(&lines.join("\n"));
    }
}

/// Waits until a guest has verified its memory once more.
fn wait_for_next_round(running: &Running, last: u64) -> u64 {
    running.stdout().wait_for(|line| match report(line) {
        Some(Report::Round { round, .. }) if round > last => Some(round),
        _ => None,
    })
}

pub(crate) fn keyboard() {
    let scratch = Scratch::new();
    let mut running = scratch.start(endless(), &[]);
    wait_for_next_round(&running, 0);
    // Ctrl-A has a meaning only on terminals.
    running.write(b"\x01xq");
    let end = running.wait();
    end.assert_code(0);
    assert_verified(&end.stdout);
    assert!(end.stderr.contains("the guest reset the machine"), "{}", end.stderr);

    let mut running = scratch.start(endless(), &[]);
    let round = wait_for_next_round(&running, 0);
    running.close_stdin();
    // Input has ended; the guest continues.
    wait_for_next_round(&running, round + 2);
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
}

pub(crate) fn threads() {
    let scratch = Scratch::new();
    for index in 0..2 {
        scratch.sparse(&format!("{index}.img"), 1 << 20);
    }
    let cmdline = format!("{} blk=0xd0000000", endless());
    let disk = "--disk=path={index}.img,id=d";
    let running = scratch.start(cmdline, &["--count=2", "--name=t", disk, "--stats=-"]);
    for vm in ["t-0", "t-1"] {
        // A disk has a thread when its driver is active.
        running.stdout().wait_for(|line| (line.contains(vm) && line.contains("blk mode=read")).then_some(()));
    }
    let threads = running.threads();
    for name in ["vcpu-t-0-0", "vcpu-t-1-0", "block-t-0-d", "block-t-1-d", "sharing-0"] {
        assert!(threads.iter().any(|thread| thread == name), "{name} is missing in {threads:?}");
    }
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
}

pub(crate) fn crash() {
    let plan = Plan { crash: Some(Crash::Triple), crash_vm: Some(1), ..endless() };
    let cmdline = format!("{plan} vm={{index}} rounds=20");
    let scratch = Scratch::new();
    let running = scratch.start(cmdline, &["--count=2", "--audit"]);
    let line = running.stderr().wait_for_line("crashed");
    assert!(
        line.starts_with("samepage: VM vm-1: the guest crashed: triple fault on vCPU 0 at RIP 0x10"),
        "{line}"
    );
    // The demo guest uses ud2 for this, and the line explains it.
    assert!(line.contains("bytes there 0f 0b"), "{line}");
    assert!(line.contains("an exception that it could not handle"), "{line}");
    let end = running.wait();
    end.assert_code(3);
    let lines =
        |vm: &str| end.stdout.lines().filter(|line| line.starts_with(vm)).collect::<Vec<_>>().join("\n");
    assert_verified(&lines("[vm-0]"));
    assert!(!lines("[vm-1]").contains("done"), "{}", end.stdout);
    assert!(end.stderr.contains("VM vm-0: the guest reset the machine"), "{}", end.stderr);
    assert_eq!(end.stderr.matches("audit of").count(), 2, "{}", end.stderr);
    assert!(!end.stderr.contains("audit failed"), "{}", end.stderr);
}

pub(crate) fn signals() {
    let scratch = Scratch::new();
    for (signal, plan, timeout) in [
        (Signal::TERM, endless(), "0"),
        // A guest without a keyboard driver cannot be asked to end.
        (Signal::INT, Plan { crash: Some(Crash::Sleep), ..short() }, "3600"),
        (Signal::QUIT, Plan { crash: Some(Crash::Hang), ..endless() }, "3600"),
    ] {
        let running = scratch.start(plan, &["--count=2", "--stop-timeout", timeout]);
        for vm in ["[vm-0]", "[vm-1]"] {
            running.stdout().wait_for(|line| (line.starts_with(vm) && line.contains("ready")).then_some(()));
        }
        running.signal(signal);
        let end = running.wait();
        end.assert_code(0);
        let mut told: Vec<_> = end.stderr.lines().collect();
        told.sort_unstable();
        assert_eq!(told, ["samepage: VM vm-0: stopped", "samepage: VM vm-1: stopped"], "{signal:?}");
    }
    for (signal, stop) in [(Signal::TERM, Signal::INT), (Signal::INT, Signal::TERM)] {
        // One guest reacts, the other does not.
        let plan = Plan { crash: Some(Crash::Hang), crash_vm: Some(1), ..endless() };
        let running = scratch.start(format!("{plan} vm={{index}}"), &["--count=2", "--stop-timeout=3600"]);
        running
            .stdout()
            .wait_for(|line| (line.starts_with("[vm-0]") && line.contains("round=")).then_some(()));
        running
            .stdout()
            .wait_for(|line| (line.starts_with("[vm-1]") && line.contains("ready")).then_some(()));
        running.signal(signal);
        running.stderr().wait_for_line("samepage: VM vm-0: the guest reset the machine");
        running.stderr().wait_for_line("samepage: waiting for vm-1, ");
        running.signal(stop);
        let end = running.wait();
        end.assert_code(0);
        let asked =
            "samepage: asked vm-0, vm-1 to end; waiting for up to 3600 s; another signal ends at once\n";
        assert!(end.stderr.starts_with(asked), "{}", end.stderr);
        assert!(end.stderr.ends_with("samepage: VM vm-1: stopped\n"), "{}", end.stderr);
    }
    // Its time ends.
    let plan = Plan { crash: Some(Crash::Hang), ..endless() };
    let running = scratch.start(plan, &["--stop-timeout=1"]);
    running.stdout().wait_for_line("ready");
    running.signal(Signal::TERM);
    let end = running.wait();
    end.assert_code(0);
    assert!(
        end.stderr.contains("samepage: killed, because they did not end in time: vm\n"),
        "{}",
        end.stderr
    );
    let left = fs::read_dir(scratch.folder()).expect("list the folder").count();
    assert_eq!(left, 1, "there is more than the kernel");
}

/// Waits until a file contains a complete line of the guest, and returns its content.
fn wait_for_log(scratch: &Scratch, name: &str) -> String {
    let deadline = Instant::now() + TIME_LIMIT;
    loop {
        let text = String::from_utf8_lossy(&scratch.read(name).unwrap_or_default()).into_owned();
        if text.lines().any(|line| report(line).is_some()) && text.ends_with('\n') {
            return text;
        }
        assert!(Instant::now() < deadline, "nothing comes into {name}: {text}");
        // A file's growth causes no event, so poll.
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn logs_are_rotated() {
    let scratch = Scratch::new();
    let logs = ["vm-0.log", "vm-1.log"];
    let running =
        scratch.start(endless(), &["--count=2", "--console", "file={name}.log", "--stats", "stats"]);
    logs.iter().for_each(|log| drop(wait_for_log(&scratch, log)));
    for log in [logs[0], logs[1], "stats"] {
        fs::rename(scratch.path(log), scratch.path(&format!("{log}.1"))).expect("rename a log");
    }
    running.signal(Signal::HUP);
    running.stderr().wait_for_line("log files were opened again");
    for log in logs {
        wait_for_log(&scratch, log);
        // In the way of logrotate with copytruncate. The guest continues to write.
        let file = fs::File::options().write(true).open(scratch.path(log)).expect("open a log");
        file.set_len(0).expect("cut a log short");
        let text = wait_for_log(&scratch, log);
        assert!(!text.contains('\0'), "{text}");
        assert!(scratch.read_text(&format!("{log}.1")).contains("start ram="), "the first part is gone");
    }
    // If a log cannot be opened again, its VM continues with the earlier file.
    fs::rename(scratch.path(logs[0]), scratch.path("elsewhere")).expect("rename a log");
    fs::create_dir(scratch.path(logs[0])).expect("make a folder in the place of a log");
    running.signal(Signal::HUP);
    running.stderr().wait_for_line("VM vm-0: open the console vm-0.log");
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
    // The first file may have been renamed before it had a line.
    let first = scratch.read_text("stats.1");
    assert!(first.is_empty() || first.ends_with("}\n"), "{first}");
    assert!(scratch.read_text("stats").contains("\"state\":\"ended\""));
}

pub(crate) fn readers_that_go_away() {
    let scratch = Scratch::new();
    let plan = Plan { rounds: 20, ..endless() };
    // As in `samepage run ... | head -1`.
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut command = scratch.run(&plan, &["--stats", "stats"]);
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let running = Running::start_as_is(command);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).expect("a line");
    assert!(matches!(report(&line), Some(Report::Start { .. })), "{line}");
    let end = running.wait();
    end.assert_code(0);
    assert!(end.stderr.contains("the guest reset the machine"), "{}", end.stderr);
    assert!(end.stderr.contains("of console output lost"), "{}", end.stderr);
    assert!(scratch.read_text("stats").contains("\"state\":\"ended\""));

    // As in `samepage run ... 2>&1 | head -1`, with statistics on standard output as well.
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut command = scratch.run(plan, &["--stats=-", "--audit"]);
    command.stdin(Stdio::null()).stdout(writer.try_clone().expect("a pipe")).stderr(writer);
    let running = Running::start_as_is(command);
    drop(reader);
    running.wait().assert_code(0);
}

/// A pipe of one page.
fn narrow_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = io::pipe().expect("a pipe");
    fcntl_setpipe_size(&writer, 4096).expect("narrow a pipe");
    (reader, writer)
}

pub(crate) fn readers_that_stall() {
    let scratch = Scratch::new();
    let (reader, writer) = narrow_pipe();
    let mut command = scratch.run(Plan { every_ms: 0, ..endless() }, &[]);
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let running = Running::start_as_is(command);
    // The guest's first letter fills the pipe, as far as poll(2) tells.
    let mut watched = [PollFd::new(&reader, PollFlags::IN)];
    let time_limit = Timespec::try_from(TIME_LIMIT).expect("a minute is a time");
    assert_eq!(
        poll(&mut watched, Some(&time_limit)).expect("wait for the guest"),
        1,
        "the guest does not write"
    );
    running.signal(Signal::TERM);
    let end = running.wait();
    end.assert_code(0);
    assert!(end.stderr.contains("VM vm: stopped"), "{}", end.stderr);

    // The statistics of so many VMs do not fit into the pipe.
    let (_reader, writer) = narrow_pipe();
    let plan = Plan { crash: Some(Crash::Triple), crash_vm: Some(0), ..endless() };
    let mut command = scratch.run(
        format!("{plan} vm={{index}}"),
        &["--count=16", "--console=off", "--stats=-", "--stop-timeout=0"],
    );
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let running = Running::start_as_is(command);
    running.stderr().wait_for_line("VM vm-0: the guest crashed");
    running.signal(Signal::TERM);
    let end = running.wait();
    end.assert_code(3);
    assert_eq!(end.stderr.matches(": stopped\n").count(), 15, "{}", end.stderr);
}

pub(crate) fn overcommit() {
    let scratch = Scratch::new();
    // A millionth of any host's memory is less than 16 MiB.
    let end = scratch.start(short(), &["--overcommit", "0.000001"]).wait();
    end.assert_code(1);
    assert!(end.stderr.contains("16 MiB") && end.stderr.contains("--overcommit 0.000001"), "{}", end.stderr);
    scratch.start(short(), &["--overcommit", "3"]).wait().assert_code(0);
}
