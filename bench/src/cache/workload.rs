//! The reads of guests.

use samepage_resources::demo::client::{ClientPlan, Pattern};

/// The order in which guests read blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Workload {
    /// By Zipf's law, with this exponent in hundredths.
    Zipf(u32),
    /// All blocks with equal probability.
    Uniform,
    /// All blocks in a repeated order.
    Scan,
    /// Zipf 0.9 over one half of the blocks. Every fourth read continues a scan of the other half.
    ScanOverZipf,
}

impl Workload {
    pub(super) const ALL: [Self; 6] =
        [Self::Zipf(60), Self::Zipf(90), Self::Zipf(120), Self::Uniform, Self::Scan, Self::ScanOverZipf];

    /// Returns the name for `--only`.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Zipf(..75) => "zipf-0.6",
            Self::Zipf(..105) => "zipf-0.9",
            Self::Zipf(_) => "zipf-1.2",
            Self::Uniform => "uniform",
            Self::Scan => "scan",
            Self::ScanOverZipf => "scan-over-zipf",
        }
    }

    /// Returns the client's plan for these reads, with other fields from `base`.
    pub(super) fn client(self, base: ClientPlan) -> ClientPlan {
        let (reads, theta) = match self {
            Self::Zipf(theta) => (Pattern::Zipf, theta),
            Self::Uniform => (Pattern::Uniform, 0),
            Self::Scan => (Pattern::Scan, 0),
            Self::ScanOverZipf => (Pattern::ScanOverZipf, 90),
        };
        ClientPlan { reads, theta, ..base }
    }

    /// Returns the name in tables, with the special parameters.
    pub(super) fn name(self, client: ClientPlan, depth: u32) -> String {
        let mut name = match self {
            Self::Zipf(theta) => format!("Zipf {}.{}", theta / 100, theta % 100 / 10),
            Self::Uniform => "uniform".to_owned(),
            Self::Scan => "scan".to_owned(),
            Self::ScanOverZipf => "scan over Zipf 0.9".to_owned(),
        };
        let mut add = |what: &str| name += &format!(", {what}");
        if client.run > 1 {
            add(&format!("{} blocks at once", client.run));
        }
        if client.scatter {
            add("pages scattered");
        }
        if client.clear {
            add("pages cleared");
        }
        if depth > 1 {
            add(&format!("{depth} in flight"));
        }
        name
    }
}
