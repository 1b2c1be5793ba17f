//! Errors for invalid command lines, before anything starts.

use std::process::Command;

use samepage_tests::program::{Finished, Running};

use crate::scratch::{KERNEL, Scratch};

pub(crate) fn help() {
    let scratch = Scratch::new();
    let help = |arguments: &[&str]| {
        let end = Running::start(scratch.samepage(arguments)).wait();
        end.assert_code(0);
        assert_eq!(end.stderr, "", "{arguments:?}");
        end.stdout
    };
    let has = |text: &str, words: &[&str]| {
        for word in words {
            assert!(text.contains(word), "{word} is missing in:\n{text}");
        }
    };
    has(&help(&["--help"]), &["run", "demo", "--help", "--version"]);
    assert!(help(&["--version"]).starts_with("samepage "));
    let run = [
        "--kernel",
        "--initrd",
        "--cmdline",
        "--memory",
        "--name",
        "--count",
        "--disk",
        "--console",
        "--sharing",
        "--stats",
        "--audit",
        "--overcommit",
        "{index}",
        "{name}",
        "readonly",
        "Examples",
        "Exit status",
        "Ctrl-A x",
    ];
    has(&help(&["run", "--help"]), &run);
    has(&help(&["demo", "--help"]), &["--vms", "--cpu", "--json"]);
}

/// Runs a command that is refused. Its one line must contain all of `parts`.
fn refused_by(command: Command, code: i32, parts: &[&str]) -> Finished {
    let what = format!("{command:?}");
    let end = Running::start(command).wait();
    assert_eq!(end.status.code(), Some(code), "{what}\n{}{}", end.stdout, end.stderr);
    assert_eq!(end.stdout, "", "{what}: something has started");
    for part in parts {
        assert!(end.stderr.contains(part), "{what}: {part:?} is missing in:\n{}", end.stderr);
    }
    end
}

pub(crate) fn wrong_usage() {
    let scratch = Scratch::new();
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["Usage"]),
        (&["fly"], &["fly", "--help"]),
        (&["run"], &["--kernel <FILE>"]),
        (&["run", "--kernel", KERNEL, "--count", "0"], &["--count", "1..=4096"]),
        (&["run", "--kernel", KERNEL, "--count", "-1"], &["-1"]),
        (&["run", "--kernel", KERNEL, "--memory", "3K+1"], &["--memory", "use K, M, G or T, as in 512M"]),
        (&["run", "--kernel", KERNEL, "--memory", "1.5G"], &["--memory", "as in 512M"]),
        (&["run", "--kernel", KERNEL, "--memory", "99999999T"], &["--memory", "64 bits"]),
        (&["run", "--kernel", KERNEL, "--disk", "a.img"], &["a.img", "path=FILE"]),
        (&["run", "--kernel", KERNEL, "--disk", "path=a.img,rw"], &["\"rw\"", "readonly"]),
        (&["run", "--kernel", KERNEL, "--disk", "readonly"], &["path=FILE is missing"]),
        (&["run", "--kernel", KERNEL, "--console", "tty"], &["stdio, file=PATH or off"]),
        (&["run", "--kernel", KERNEL, "--sharing", "maybe"], &["full, zero, off"]),
        (&["run", "--kernel", KERNEL, "--sharing-cpu", "0"], &["100 is one core"]),
        (&["run", "--kernel", KERNEL, "--sharing-engine", "order=random"], &["order=digest|content"]),
        (&["run", "--kernel", KERNEL, "--overcommit", "0"], &["as in 1.5"]),
        (&["run", "--kernel", KERNEL, "--memory", "0"], &["0 bytes of memory", "2M at least"]),
        (&["run", "--kernel", KERNEL, "--memory", "1M"], &["1048576 bytes of memory", "2M at least"]),
        (
            &["run", "--kernel", KERNEL, "--memory", "16777217"],
            &["16777217 bytes", "multiple of the page size, 4096"],
        ),
        (&["run", "--kernel", KERNEL, "--memory", "100T"], &["less than 8T"]),
        (&["run", "--kernel", KERNEL, "--name", "a/b"], &["\"a/b\"", "letters, digits"]),
        (&["run", "--kernel", KERNEL, "--name", ""], &["cannot be named \"\"", "letters, digits"]),
        (&["run", "--kernel", KERNEL, "--disk", "path=disk,id=a b"], &["\"a b\"", "letters, digits"]),
        (&["demo", "--vms", "1"], &["--vms", "2..=256"]),
        (&["demo", "--cpu", "0"], &["--cpu", "up to 100"]),
    ];
    for (arguments, parts) in cases {
        let end = refused_by(scratch.samepage(arguments), 2, parts);
        if !arguments.is_empty() {
            assert_eq!(end.stderr.matches("error:").count(), 1, "{}", end.stderr);
        }
    }
}

/// Runs a command that is refused with one line, which must contain all of `parts`.
fn refused_in_one_line(command: Command, parts: &[&str]) {
    let what = format!("{command:?}");
    let end = refused_by(command, 1, parts);
    let text = end.stderr.strip_prefix("samepage: ").unwrap_or_else(|| panic!("{what}\n{}", end.stderr));
    assert_eq!(text.lines().count(), 1, "{what}\n{text}");
    for part in parts {
        assert_eq!(text.matches(part).count(), 1, "{what}: {part:?} is told again and again:\n{text}");
    }
}

/// Returns a bzImage whose setup header states a kernel of 1 MiB that the file does not contain.
fn truncated_bzimage() -> Vec<u8> {
    let mut image = vec![0; 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x1_0000_u32.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    image
}

pub(crate) fn refused() {
    let scratch = Scratch::new();
    scratch.write("text", b"#!/bin/sh\necho hello\n");
    scratch.write("short.elf", &scratch.read(KERNEL).unwrap()[..3000]);
    scratch.write("short.bz", &truncated_bzimage());
    scratch.write("empty", b"");
    scratch.sparse("big", 64 << 20);
    scratch.sparse("disk", 1 << 20);
    let kernels: &[(&str, &[&str])] = &[
        ("none", &["kernel none", "No such file"]),
        (".", &["kernel .", "not a regular file"]),
        ("empty", &["kernel empty", "give a vmlinux (x86-64 ELF) or a bzImage"]),
        ("text", &["kernel text", "a script", "give a vmlinux"]),
        ("short.elf", &["kernel short.elf", "truncated", "the file at 3000", "copy the file again"]),
        ("short.bz", &["kernel short.bz", "truncated", "the file at 4096", "copy the file again"]),
    ];
    for (kernel, parts) in kernels {
        refused_in_one_line(scratch.samepage(&["run", "--kernel", kernel]), parts);
    }

    let long = "x".repeat(3000);
    let cases: &[(&[&str], &[&str])] = &[
        (&["--initrd", "none"], &["initrd none", "No such file"]),
        (&["--initrd", "empty"], &["initrd empty", "leave out --initrd"]),
        (&["--initrd", "big"], &["initrd big", "does not fit", "give the VM more memory"]),
        (&["--cmdline", &long], &["2047 bytes at most", "this one has 3000", "shorten it"]),
        (&["--cmdline", "a\nb"], &["command line", "printable ASCII only"]),
        (&["--memory", "7T"], &["7340032 MiB", "the host can promise", "start fewer or smaller VMs"]),
        (&["--count", "4096", "--memory", "1T"], &["the host can promise", "raise --overcommit"]),
        (&["--disk", "path=none"], &["disk none", "No such file"]),
        (
            &["--disk", "path=disk,readonly,id=a", "--disk", "path=disk,readonly,id=a"],
            &["two disks are named a"],
        ),
        (&["--disk", "path=disk", "--disk", "path=./disk"], &["disk ./disk", "add readonly"]),
        (
            &["--count", "2", "--disk", "path=disk"],
            &["used by VM vm-0 and by VM vm-1", "{index}", "add readonly"],
        ),
        (&["--count", "2", "--console", "file=log"], &["used by VM vm-0 and by VM vm-1", "{index}"]),
    ];
    for (arguments, parts) in cases {
        let mut command = scratch.samepage(&["run", "--kernel", KERNEL]);
        if !arguments.contains(&"--memory") {
            command.args(["--memory", "16M"]);
        }
        command.args(*arguments);
        refused_in_one_line(command, parts);
    }
    let disks = (0..9).map(|number| format!("--disk=path=disk,readonly,id=d{number}"));
    let mut command = scratch.samepage(&["run", "--kernel", KERNEL]);
    command.args(disks);
    refused_in_one_line(command, &["9 disks", "8 at most"]);
}

pub(crate) fn not_built() {
    let scratch = Scratch::new();
    scratch.sparse("odd", 1000);
    scratch.sparse("none", 0);
    scratch.sparse("disk", 1 << 20);
    let cases: &[(&[&str], &[&str])] = &[
        (&["--disk", "path=."], &["disk .:", "is a directory", "give a regular file or a block device"]),
        (&["--disk", "path=/dev/null"], &["disk /dev/null", "give a regular file or a block device"]),
        (&["--disk", "path=odd"], &["disk odd", "1000 bytes", "truncate -s"]),
        (&["--disk", "path=none"], &["disk none", "0 bytes", "truncate -s"]),
        (&["--disk", "path=/proc/version"], &["/proc/version"]),
        (&["--console", "file=none/log"], &["console none/log", "Not a directory"]),
        (&["--console", "file=missing/log"], &["console missing/log", "No such file"]),
        (&["--stats", "missing/stats"], &["statistics", "missing/stats", "No such file"]),
        (&["--stats", "."], &["statistics", "directory"]),
    ];
    for (arguments, parts) in cases {
        refused_in_one_line(scratch.run("rounds=1", arguments), parts);
    }
    // A run that cannot start preserves an earlier guest's output.
    scratch.write("log", b"earlier");
    refused_in_one_line(scratch.run("", &["--console=file=log", "--disk=path=odd"]), &["truncate -s"]);
    assert_eq!(scratch.read_text("log"), "earlier");
}
