//! The arguments of `samepage analyze`.

use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use samepage_text::size::parse_size;

/// The arguments of `samepage analyze`.
#[derive(Debug, Args)]
pub struct AnalyzeArgs {
    /// Memory image of a VM: a raw image, an ELF core of `virsh dump --memory-only`, QEMU's
    /// dump-guest-memory, `xl dump-core` or gcore, or a file of LiME
    #[arg(value_name = "FILE", required_unless_present = "pids")]
    pub(crate) files: Vec<PathBuf>,

    /// Format of the files, if it cannot be detected: a raw image may begin with a program's header
    #[arg(long, value_enum, value_name = "auto|raw|elf|lime", default_value_t = ImageFormatArg::Auto)]
    pub(crate) format: ImageFormatArg,

    /// Process ID of a running VM (QEMU, Firecracker, Cloud Hypervisor, samepage). Its memory is only read.
    /// May be repeated
    #[arg(long = "pid", value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) pids: Vec<u32>,

    /// Addresses of guest memory in the process, as in /proc/PID/maps. May be repeated. By default all large
    /// read-write mappings count as guest memory
    #[arg(long = "range", value_name = "START-END", value_parser = parse_range, requires = "pids")]
    pub(crate) ranges: Vec<Range<u64>>,

    /// Smallest mapping of a process or of its core that counts as guest memory
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    pub(crate) min_mapping: u64,

    /// Count each mapping or --range of a process as a VM of its own (always so for samepage)
    #[arg(long, requires = "pids")]
    pub(crate) each_mapping: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw the result into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

/// `--format` of `samepage analyze`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormatArg {
    Auto,
    Raw,
    Elf,
    Lime,
}

/// Parses addresses in hexadecimal, in the form of `/proc/PID/maps`.
fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok();
    let range = text.split_once('-').and_then(|(start, end)| Some(address(start)?..address(end)?));
    match range {
        Some(range) if range.start < range.end && (range.start | range.end).is_multiple_of(4096) => Ok(range),
        Some(_) => Err("the start must be below the end, and both multiples of 1000 (4 KiB)".to_owned()),
        None => Err("use two addresses in hexadecimal, as in 7f0000000000-7f0040000000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_pages() {
        assert_eq!(parse_range("1000-3000"), Ok(0x1000..0x3000));
        assert_eq!(parse_range("0x7f0000000000-0x7f0040000000"), Ok(0x7f00_0000_0000..0x7f00_4000_0000));
        for wrong in ["", "1000", "1000-1000", "2000-1000", "1001-3000", "x-y", "-1000", "1000-3000-4000"] {
            assert!(parse_range(wrong).is_err(), "{wrong}");
        }
    }
}
