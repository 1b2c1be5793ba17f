//! `samepage bench unpack`: measures how long samepage takes to unpack a kernel.
//!
//! The kernel is a Linux kernel whose first instructions were replaced by those that write to the serial port. So the
//! time from the start of the process to the first byte is that of the monitor alone. The same kernel starts as it is,
//! and from a bzImage with each of the compressions that distributions use, in turn. The programs that compress it, and
//! their options, are those of Linux' own build (`scripts/Makefile.lib`).
//!
//! There is no code in these images that unpacks the kernel in the guest: that takes the time of the guest's processor,
//! and the benchmark would measure that.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use samepage_machine::Hypervisor;
use samepage_machine::boot::test_images::bzimage_with_payload;
use serde::Serialize;
use tempfile::TempDir;

use crate::host::Host;
use crate::monitor;
use crate::program;
use crate::report::Figure;
use crate::startup::guest::CODE;

/// A compression: its name, its program, and whether the build appends the kernel's size.
const COMPRESSIONS: [(&str, &[&str], bool); 6] = [
    ("gzip", &["gzip", "-n", "-9"], false),
    ("bzip2", &["bzip2", "-9"], true),
    ("lzma", &["xz", "--format=lzma", "-9"], true),
    ("xz", &["xz", "--check=crc32", "--x86", "--lzma2=,dict=32MiB"], true),
    ("lz4", &["lz4", "-l", "-9"], true),
    ("zstd", &["zstd", "-22", "--ultra"], true),
];

/// The arguments of `samepage bench unpack`.
#[derive(Args, Debug)]
pub(crate) struct UnpackArgs {
    /// The kernel, an ELF image with a PVH entry point. `cargo xtask bench` provides one
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Starts with each compression
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(crate) json: bool,
}

/// Results of `samepage bench unpack`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct UnpackReport {
    host: Host,
    runs: u32,
    /// Size of the kernel, in bytes.
    kernel_bytes: u64,
    /// The kernel as it is, then the compressions.
    rows: Vec<Row>,
}

/// Starts with one compression.
#[derive(Debug, Clone, Serialize)]
struct Row {
    compression: &'static str,
    /// Size of the image, in bytes.
    image_bytes: u64,
    /// Times from the start of samepage to the guest's first instruction, in milliseconds: quartiles and median.
    quartiles_ms: [f64; 2],
    median_ms: f64,
    /// The median without that of the kernel as it is.
    more_ms: f64,
}

/// Packs the kernel, and starts it with each compression in turn.
///
/// # Errors
/// Fails without KVM or one of the programs, and if samepage does not start a kernel.
pub(crate) fn measure(args: &UnpackArgs) -> Result<UnpackReport> {
    Hypervisor::open()?;
    let samepage = program::path()?;
    let mut host = Host::look()?;
    let folder = TempDir::new().context("creating a folder for the kernels")?;
    let kernel = fs::read(&args.kernel).with_context(|| format!("reading {}", args.kernel.display()))?;
    let kernel = tell_at_once(kernel)
        .with_context(|| format!("{} is no ELF image with a PVH entry point", args.kernel.display()))?;
    let plain = folder.path().join("kernel");
    fs::write(&plain, &kernel).context("writing the kernel")?;
    let mut images = vec![("none", plain.clone())];
    for (name, program, has_size) in COMPRESSIONS {
        let mut payload = pack(program, &plain)?;
        if has_size {
            payload.extend((kernel.len() as u32).to_le_bytes());
        }
        let path = folder.path().join(name);
        fs::write(&path, bzimage_with_payload(&payload)).context("writing a packed kernel")?;
        images.push((name, path));
    }
    let mut samples = vec![Vec::new(); images.len()];
    // The first start of each does not count, because it may read the program from disk.
    for run in 0..=args.runs {
        for (samples, (_, path)) in samples.iter_mut().zip(&images) {
            let mut command = Command::new(&samepage);
            command.args(["run", "--memory", "256M", "--kernel"]).arg(path);
            let elapsed = monitor::time_to_first_byte(&mut command)?;
            if run > 0 {
                samples.push(elapsed.as_secs_f64() * 1000.0);
            }
        }
    }
    host.look_again()?;
    let mut rows: Vec<Row> = Vec::new();
    for ((compression, path), samples) in images.into_iter().zip(samples) {
        let Figure { median, quartiles, .. } = Figure::of(&samples).context("nothing was measured")?;
        let image_bytes = path.metadata().context("looking at a packed kernel")?.len();
        let more_ms = rows.first().map_or(0.0, |plain| median - plain.median_ms);
        rows.push(Row { compression, image_bytes, quartiles_ms: quartiles, median_ms: median, more_ms });
    }
    Ok(UnpackReport { host, runs: args.runs, kernel_bytes: kernel.len() as u64, rows })
}

fn pack(command: &[&str], kernel: &Path) -> Result<Vec<u8>> {
    let (program, options) = command.split_first().context("a compression has no program")?;
    let input = File::open(kernel).context("opening the kernel")?;
    let mut packing = Command::new(program);
    packing.args(options).arg("-c").stdin(input).stderr(Stdio::inherit());
    let output = packing.output().with_context(|| format!("starting {program}; install it"))?;
    if !output.status.success() {
        bail!("{program} does not compress the kernel: {}", output.status);
    }
    Ok(output.stdout)
}

/// Replaces the first instructions of a kernel by [`CODE`]. Returns `None` for another kind of image.
fn tell_at_once(mut image: Vec<u8>) -> Option<Vec<u8>> {
    // The note has 4 bytes of name, 4 or 8 of content, and type 18 (Xen, include/public/elfnote.h).
    let note = image.windows(16).position(|bytes| {
        bytes[..4] == [4, 0, 0, 0] && bytes[5..] == *b"\0\0\0\x12\0\0\0Xen\0" && [4, 8].contains(&bytes[4])
    })?;
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    let entry = u64::from(word(note + 16)?);
    let long = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    let (headers, count) = (long(32)? as usize, word(56)? & 0xffff);
    let at = (0..count as usize).find_map(|index| {
        // Type, flags, offset, virtual and physical address, size in the file (System V ABI, "Program Header").
        let header = headers + index * 56;
        let (offset, start, size) = (long(header + 8)?, long(header + 24)?, long(header + 32)?);
        let is_here = word(header)? == 1 && entry.checked_sub(start)? < size;
        is_here.then(|| (offset + (entry - start)) as usize)
    })?;
    image.get_mut(at..at + CODE.len())?.copy_from_slice(&CODE);
    Some(image)
}

impl fmt::Display for UnpackReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, runs, kernel_bytes, rows } = self;
        writeln!(f, "{host}")?;
        writeln!(f, "medians of {runs} starts of a kernel of {kernel_bytes} bytes, with quartiles")?;
        writeln!(f, "\n{:12}{:>12}  ms to the first instruction", "packed by", "bytes")?;
        for Row { compression, image_bytes, quartiles_ms: [lower, upper], median_ms, more_ms } in rows {
            let times = format!("{median_ms:.1} ({lower:.1}-{upper:.1})");
            writeln!(f, "{compression:12}{image_bytes:>12}  {times:24}{more_ms:>+8.1}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use samepage_machine::boot::test_images::pvh_elf;

    use super::*;

    #[test]
    fn the_code_replaces_that_at_the_entry_point() {
        let old = [0xcc; 64];
        let image = tell_at_once(pvh_elf(&old)).unwrap();
        let found = image.windows(CODE.len()).position(|bytes| bytes == CODE).unwrap();
        assert_eq!(image[found + CODE.len()..][..4], [0xcc; 4]);
        assert_eq!(image.len(), pvh_elf(&old).len());
        assert_eq!(tell_at_once(b"\x7fELF".to_vec()), None);
    }
}
