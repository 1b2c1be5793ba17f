//! `samepage bench api`: measures the control socket with many VMs in its process. The results are requests
//! per second, and the time until the first output of a VM that a client creates, compared with `samepage
//! run`.
//!
//! The server is a separate process, started with `serve`. Its VMs are small embedded guests that do almost
//! nothing. Each client waits for a response before its next request. So a latency is that of one request,
//! with as many others in flight as there are clients.

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
    /// VMs in the server's process
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    vms: u32,

    /// Clients with simultaneous requests
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

/// The results.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// VMs in the server's process.
    vms: u32,
    /// Clients with simultaneous requests.
    clients: u32,
    /// Results by resource.
    loads: Vec<Load>,
    /// Start times without other VMs in the process.
    starts_alone: Starts,
    /// Start times with all VMs in the process.
    starts_among_others: Starts,
}

/// Measures everything.
///
/// # Errors
/// Fails if a server or a VM does not start, or if a response is invalid.
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
    /// Returns the report as text.
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

/// Returns the median of the times above a percentage of all times, in microseconds. The times must be
/// sorted.
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
