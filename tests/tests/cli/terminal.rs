//! One VM on a terminal.

use std::process::Command;

use rustix::process::Signal;
use samepage_resources::demo::plan::{Crash, Plan};
use samepage_tests::program::Running;
use samepage_tests::terminal::{Settings, Terminal};

use crate::scratch::{KERNEL, Scratch, endless};

/// Returns a terminal on which a guest runs, and the settings from before.
fn with_guest(scratch: &Scratch, plan: &Plan) -> (Terminal, Settings, Running) {
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    assert!(!before.is_raw());
    let program = terminal.start(&scratch.run(plan, &[]));
    terminal.wait_for("ready pages=");
    (terminal, before, program)
}

pub(crate) fn keys() {
    let scratch = Scratch::new();
    let (mut terminal, before, program) = with_guest(&scratch, &endless());
    assert!(terminal.settings().is_raw());
    // Ctrl-C, Ctrl-Z and Ctrl-\ are not signals, and only the guest's output is shown.
    terminal.type_keys(b"\x03\x1a\x1c\x04hello");
    terminal.wait_for("round=");
    terminal.wait_for("round=");
    terminal.type_keys(b"q");
    terminal.wait_for("the guest reset the machine");
    let end = terminal.wait_for_end(program);
    end.assert_code(0);
    assert!(!end.stdout.contains("hello") && !end.stdout.contains('^'), "{}", end.stdout);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn commands() {
    let scratch = Scratch::new();
    let (mut terminal, before, program) = with_guest(&scratch, &endless());
    terminal.type_keys(b"\x01h");
    terminal.wait_for("Ctrl-A x ");
    terminal.wait_for("Ctrl-A h ");
    // Neither key ends the program: `q` after Ctrl-A is no command, and `x` follows no Ctrl-A.
    terminal.type_keys(b"\x01q");
    terminal.wait_for("round=");
    terminal.wait_for("round=");
    terminal.type_keys(b"x");
    terminal.wait_for("round=");
    terminal.type_keys(b"\x01x");
    terminal.wait_for("samepage: VM vm: stopped");
    terminal.wait_for_end(program).assert_code(0);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn crash() {
    let scratch = Scratch::new();
    let plan = Plan { crash: Some(Crash::Triple), ..endless() };
    let (mut terminal, before, program) = with_guest(&scratch, &plan);
    terminal.wait_for("the guest crashed: triple fault");
    terminal.wait_for_end(program).assert_code(3);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn signal() {
    let scratch = Scratch::new();
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let (mut terminal, before, program) = with_guest(&scratch, &endless());
        assert!(terminal.settings().is_raw());
        program.signal(signal);
        // The guest reacts, unless it had not yet read from its keyboard.
        terminal.wait_for("samepage: VM vm: ");
        terminal.wait_for_end(program).assert_code(0);
        assert_eq!(terminal.settings(), before, "{signal:?}");
    }
    // A fault of the program itself.
    let (mut terminal, before, program) = with_guest(&scratch, &endless());
    program.signal(Signal::SEGV);
    let end = terminal.wait_for_end(program);
    assert!(!end.status.success(), "{}", end.status);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn error() {
    let scratch = Scratch::new();
    for arguments in [["--disk", "path=."], ["--console", "file=missing/log"], ["--stats", "missing/log"]] {
        let mut terminal = Terminal::open();
        let before = terminal.settings();
        let program = terminal.start(&scratch.run(endless(), &arguments));
        let end = terminal.wait_for_end(program);
        end.assert_code(1);
        assert_eq!(end.stdout.lines().count(), 1, "{}", end.stdout);
        assert_eq!(terminal.settings(), before);
    }
    // A console in a file leaves the terminal unchanged.
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let program = terminal.start(&scratch.samepage(&[
        "run",
        "--kernel",
        KERNEL,
        "--memory=16M",
        "--cmdline=rounds=3 pages=64",
        "--console=off",
    ]));
    terminal.wait_for("the guest reset the machine");
    terminal.wait_for_end(program).assert_code(0);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn background() {
    let scratch = Scratch::new();
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    // In the way of a shell for `samepage run ... &`.
    let program = scratch.run(Plan { rounds: 3, ..endless() }, &[]);
    let mut shell = Command::new("sh");
    shell.args(["-mc", r#""$@" & wait $!"#, "sh"]).arg(program.get_program()).args(program.get_args());
    let shell = terminal.start(shell.current_dir(scratch.folder()));
    terminal.wait_for("ready pages=");
    assert_eq!(terminal.settings(), before);
    // Input goes to the shell.
    terminal.type_keys(b"q\n");
    terminal.wait_for("done rounds=3");
    terminal.wait_for_end(shell).assert_code(0);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn hangup() {
    let scratch = Scratch::new();
    let (mut terminal, before, program) = with_guest(&scratch, &endless());
    // A SIGHUP says that logs were renamed; the terminal still exists.
    program.signal(Signal::HUP);
    terminal.wait_for("log files were opened again");
    program.signal(Signal::TERM);
    terminal.wait_for_end(program).assert_code(0);
    assert_eq!(terminal.settings(), before);
}

pub(crate) fn closed() {
    let scratch = Scratch::new();
    let (terminal, _, program) = with_guest(&scratch, &endless());
    drop(terminal);
    program.wait().assert_code(0);
}
