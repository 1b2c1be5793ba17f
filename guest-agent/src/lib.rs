//! The program that runs inside Linux guests of samepage.
//!
//! When a kernel starts it as init, it mounts file systems, reports that it is ready, runs a list of
//! [commands](command) and ends the VM ([`init`]). When a user starts it, it runs the commands in its
//! arguments. It never forks and never executes another program, so it starts fast even if the kernel is
//! slow.
//!
//! It also publishes page types to the host ([`hole`]), as a service or as a command.
//!
//! Its content and its reports can be computed outside the guest: [`content`] defines the bytes of `fill` and
//! `write`, and [`checksum`] the checksums of `sum` and `read`.
//!
//! Every line of its output starts with `samepage-agent: ` and has one of these forms:
//!
//! ```text
//! samepage-agent: ready uptime_ms=2310 mem_total_kib=57344
//! samepage-agent: NAME ok key=value key=value
//! samepage-agent: NAME failed: the error
//! samepage-agent: done ran=4 failed=0
//! ```

pub(crate) mod asked;
pub mod checksum;
pub mod command;
pub mod content;
pub mod files;
pub mod hole;
pub mod init;
pub mod memory;
pub mod options;
pub mod run;
pub mod sockets;
