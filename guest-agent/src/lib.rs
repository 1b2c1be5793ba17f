//! The program that runs inside Linux guests of samepage.
//!
//! Started by a kernel as init it mounts what it needs, says that it is ready, carries out a
//! short list of [commands](command) and ends the virtual machine ([`init`]). Started by hand it
//! carries out the commands given as arguments. It never forks and never executes another
//! program: where a kernel is slow to do either, one static binary still starts at once.
//!
//! It also tells the host what the guest's pages are for ([`hole`]), as a service or as a command.
//!
//! What it writes and what it reports can be computed again outside the guest: [`content`] gives
//! the bytes that `fill` and `write` produce, [`checksum`] what `sum` and `read` report.
//!
//! Every line it prints starts with `samepage-agent: ` and takes one of these forms:
//!
//! ```text
//! samepage-agent: ready uptime_ms=2310 mem_total_kib=57344
//! samepage-agent: NAME ok key=value key=value
//! samepage-agent: NAME failed: what went wrong
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
