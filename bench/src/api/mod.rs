//! `samepage bench api`: how many requests a second the control socket answers with many VMs in its process,
//! and how soon a VM that a client creates says something, beside `samepage run`.
//!
//! The server is a process of its own, this program started with `serve`. Its VMs are small embedded guests
//! that do next to nothing. Clients wait for each answer before they ask again, so that a latency is what one
//! request takes with as many others under way as there are clients.

mod load;
mod server;
mod start;

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use samepage_text::counted::counted;
use serde::Serialize;

use load::Load;
use server::Server;
use start::Starts;

/// The arguments of `samepage bench api`.
#[derive(Debug, Args)]
pub(crate) struct ApiArgs {
    /// VMs in the process that is asked
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    vms: u32,

    /// Clients that ask at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=128))]
    clients: u32,

    /// Requests for each resource
    #[arg(long, value_name = "N", default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,

    /// VMs started in each way
    #[arg(long, value_name = "N", default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(super) json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// VMs in the process.
    vms: u32,
    /// Clients that asked at the same time.
    clients: u32,
    /// By resource.
    loads: Vec<Load>,
    /// With no other VM in the process.
    starts_alone: Starts,
    /// With all of them.
    starts_among_others: Starts,
}

/// Measures.
///
/// # Errors
/// Where a server or a VM does not come up, or an answer is not what it should be.
pub(super) fn measure(args: &ApiArgs) -> Result<Report> {
    let server = Server::start()?;
    let starts_alone = start::measure(&server, args.starts)?;
    server.create_vms(args.vms)?;
    let resources = ["/vms", "/vms/vm-0", "/sharing", "/metrics", "/version"];
    let loads = resources.map(|path| load::measure(server.socket(), path, args.clients, args.requests));
    let loads = loads.into_iter().collect::<Result<_>>()?;
    let starts_among_others = start::measure(&server, args.starts)?;
    Ok(Report { vms: args.vms, clients: args.clients, loads, starts_alone, starts_among_others })
}

impl Report {
    /// The report for people.
    pub(super) fn format(&self) -> String {
        let mut text = format!("{}, {}\n\n", counted(self.clients, "client"), counted(self.vms, "VM"));
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<12} {:>12} {:>10} {:>10} {:>10} {:>12}",
            "resource", "requests/s", "p50 us", "p99 us", "max us", "bytes"
        );
        for load in &self.loads {
            let _ = writeln!(
                text,
                "{:<12} {:>12.0} {:>10.0} {:>10.0} {:>10.0} {:>12}",
                load.path, load.per_second, load.p50_us, load.p99_us, load.max_us, load.bytes
            );
        }
        let _ = writeln!(text, "\nuntil a guest's first output, medians");
        for (name, starts) in
            [("no other VM", &self.starts_alone), ("among the others", &self.starts_among_others)]
        {
            let _ = writeln!(
                text,
                "{name:<18} POST /vms {:.1} ms, samepage run {:.1} ms, ratio {:.2}",
                starts.post_ms, starts.run_ms, starts.ratio
            );
        }
        text
    }
}

/// The value in the middle of those above a share of all, in microseconds. The times are sorted.
fn percentile_us(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let times: Vec<_> = (1..=200).map(Duration::from_micros).collect();
        assert_eq!(percentile_us(&times, 50).round(), 101.0);
        assert_eq!(percentile_us(&times, 99).round(), 199.0);
        assert_eq!(percentile_us(&times, 100).round(), 200.0);
        assert!(percentile_us(&[], 50).is_nan());
    }
}
