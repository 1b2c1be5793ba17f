//! One image, used by samepage and QEMU: the second user is refused if sharing the image would be wrong.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use super::targets::{chain, qemu_img};
use super::*;

fn open(path: &Path, format: Format, read_only: bool) -> Result<Disk, OpenError> {
    Disk::open(&DiskOptions { format: Some(format), read_only, ..DiskOptions::new(path) })
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

/// Images for the tests: a raw image, and a qcow2 overlay of it.
fn images(directory: &Path) -> Option<[(std::path::PathBuf, Format); 2]> {
    let mut data = MemoryDisk::new().medium().data.clone();
    let top = chain(directory, &[65536], &mut data)?;
    let raw = directory.join("alone");
    fs::write(&raw, &data).unwrap();
    Some([(raw, Format::Raw), (top, Format::Qcow2)])
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// Checks that QEMU's tools refuse uses that conflict with our lock, and accept others.
fn tools_refuse(path: &Path, format: Format, reads: bool) {
    let (path, format) = (path.to_str().unwrap(), name(format));
    for (program, arguments) in [
        ("qemu-io", &["-f", format, "-c", "write 0 4k", path][..]),
        ("qemu-img", &["resize", "-q", "-f", format, path, "+1M"]),
    ] {
        let output = run(program, arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{program} {arguments:?}: {output:?}");
        assert!(error.contains("Failed to get") && error.contains("lock"), "{error}");
    }
    let read = run("qemu-io", &["-r", "-f", format, "-c", "read 0 4k", path]);
    assert_eq!(read.status.success(), reads, "{read:?}");
    let info = run("qemu-img", &["info", "-f", format, path]);
    assert_eq!(info.status.success(), reads, "{info:?}");
    assert!(run("qemu-img", &["info", "-U", "-f", format, path]).status.success());
}

#[test]
fn qemu_sees_our_locks() {
    let directory = tempfile::tempdir().unwrap();
    let Some(images) = images(directory.path()) else { return };
    for (path, format) in images {
        let size = fs::metadata(&path).unwrap().len();
        let writer = open(&path, format, false).unwrap();
        // QEMU's tools read a raw image while another program writes it. They do not read a format with
        // metadata then.
        tools_refuse(&path, format, format == Format::Raw);
        if format == Format::Qcow2 {
            tools_refuse(&directory.path().join("base"), Format::Raw, true);
        }
        drop(writer);
        let reader = open(&path, format, true).unwrap();
        tools_refuse(&path, format, true);
        drop(reader);
        assert_eq!(fs::metadata(&path).unwrap().len(), size);
        let written = run("qemu-io", &["-f", name(format), "-c", "write 0 4k", path.to_str().unwrap()]);
        assert!(written.status.success(), "{written:?}");
    }
}

/// A program of QEMU that has an image open.
struct Holder(Child);

impl Holder {
    /// Starts `qemu-io` with the image open. It waits for a command.
    fn tool(path: &Path, format: Format, read_only: bool) -> Self {
        let access: &[&str] = if read_only { &["-r"] } else { &[] };
        let mut child = Command::new("qemu-io")
            .args(access)
            .args(["-f", name(format)])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("KiB")), "it has opened the image");
        Self(child)
    }

    /// Starts a machine with the image as its disk; `None` if QEMU is missing.
    fn machine(path: &Path, format: Format) -> Option<Self> {
        let drive = format!("if=none,id=disk,file={},format={}", path.display(), name(format));
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm",
                "-accel",
                "tcg",
                "-S",
                "-nodefaults",
                "-display",
                "none",
                "-qmp",
                "stdio",
            ])
            .args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            println!("skipped: there is no qemu-system-x86_64");
            return None;
        };
        // The machine answers when all of its devices exist.
        child.stdin.as_mut().unwrap().write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("return")), "it has started");
        Some(Self(child))
    }

    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refused(path: &Path, format: Format, read_only: bool, holder: &Holder, does: &str) {
    let error = open(path, format, read_only).expect_err("it is in use").to_string();
    let process = format!("(process {})", holder.id());
    for part in [path.to_str().unwrap(), "it is in use: qemu-", &process, does] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn we_see_the_locks_of_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let Some(images) = images(directory.path()) else { return };
    let base = directory.path().join("base");
    for (path, format) in images {
        let writer = Holder::tool(&path, format, false);
        refused(&path, format, false, &writer, "writes to it");
        refused(&path, format, true, &writer, "writes to it");
        drop(writer);
        let reader = Holder::tool(&path, format, true);
        if format == Format::Qcow2 {
            refused(&path, format, false, &reader, "forbids changes");
        }
        open(&path, format, true).unwrap();
        drop(reader);
        if let Some(machine) = Holder::machine(&path, format) {
            refused(&path, format, false, &machine, "writes to it");
            refused(&path, format, true, &machine, "writes to it");
            if format == Format::Qcow2 {
                refused(&base, Format::Raw, false, &machine, "forbids changes");
                open(&base, Format::Raw, true).unwrap();
            }
        }
        // An image with a writer cannot back another one.
        if format == Format::Qcow2 {
            let writer = Holder::tool(&base, Format::Raw, false);
            let error = open(&path, format, true).unwrap_err().to_string();
            assert!(
                error.contains("is backed by another image") && error.contains("writes to it"),
                "{error}"
            );
            drop(writer);
        }
        open(&path, format, false).unwrap();
    }
}

#[test]
fn a_machine_of_qemus_cannot_start_on_an_image_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let Some(images) = images(directory.path()) else { return };
    for (path, format) in images {
        let disk = open(&path, format, false).unwrap();
        let drive = format!("if=none,id=disk,file={},format={}", path.display(), name(format));
        let output = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm", "-accel", "tcg", "-S", "-nodefaults", "-display", "none"])
            .args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"])
            .output();
        let Ok(output) = output else { return };
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("Failed to get \"write\" lock"), "{error}");
        drop(disk);
    }
    // Two programs may read the same base.
    let base = directory.path().join("base");
    let [ours, theirs] = [directory.path().join("ours"), directory.path().join("theirs")];
    let backing = format!("backing_file={},backing_fmt=raw", base.display());
    for path in [&ours, &theirs] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &backing], path).unwrap();
    }
    let disk = open(&ours, Format::Qcow2, false).unwrap();
    let machine = Holder::machine(&theirs, Format::Qcow2);
    assert!(machine.is_some_and(|mut machine| machine.0.try_wait().unwrap().is_none()));
    drop(disk);
}
