//! What the managing process and a worker say to each other.

use std::path::PathBuf;

use samepage_machine::vm::VmEnd;
use samepage_sharing::remote::worker::VmIndex;
use samepage_spec::VmSpec;
use serde::{Deserialize, Serialize};

use crate::machine::DeviceChange;
use crate::report::DeviceReport;

/// The number of a VM in its worker, chosen by the managing process. Never used again in a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct VmNumber(pub(crate) u32);

/// The number of a connection to the engine of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct GroupNumber(pub(crate) u32);

/// Where the console goes, besides to the managing process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Target {
    Nowhere,
    Stdio,
    PrefixedStdio,
    File(PathBuf),
}

/// A request to a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The number by which the reply is told.
    pub(crate) number: u64,
    /// The VM, if the request is about one.
    pub(crate) vm: VmNumber,
    pub(crate) order: Order,
}

/// What a worker is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Answer the engine of a group at the socket that comes with this.
    Connect(GroupNumber),
    /// Build a machine.
    Build(Box<Build>),
    /// Free a machine. If it shares memory, the engine has emptied it.
    Free,
    Start,
    Pause,
    Stop,
    Fail(String),
    PressCtrlAltDel,
    AskToEnd,
    AskAgain,
    ReopenConsole,
    Type(Vec<u8>),
    Look,
    Change {
        id: String,
        change: DeviceChange,
    },
    /// Tell which pages have memory.
    Touched,
    /// The header of the memory hole has changed.
    HoleNews,
}

/// A machine to be built.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) spec: VmSpec,
    pub(crate) console: Target,
    /// The connection to the engine that is to share its memory.
    pub(crate) group: Option<GroupNumber>,
}

/// The reply to an order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Truth(bool),
    /// The memory hole comes with this, if there is one.
    Built {
        /// The number by which the engine asks for the VM's memory.
        index: Option<VmIndex>,
        notices: Vec<String>,
    },
    /// Bytes of typed input that were accepted.
    Taken(usize),
    Looked {
        cpu_nanoseconds: u64,
        devices: DeviceReport,
    },
    /// First and end of each run of pages.
    Runs(Vec<(u32, u32)>),
    /// The VM has no such device.
    NoDevice,
    /// It cannot be done, with the reason in a sentence.
    Failed(String),
}

/// What a worker tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Told {
    Reply {
        number: u64,
        answer: Answer,
    },
    /// Output of a guest; each byte is the character with its number.
    Console {
        vm: VmNumber,
        text: String,
    },
    /// The guest has published what its pages are for.
    Bell {
        vm: VmNumber,
    },
    /// The console accepts more input.
    Room {
        vm: VmNumber,
    },
    Ended {
        vm: VmNumber,
        end: VmEnd,
    },
    DiskError {
        vm: VmNumber,
        disk: String,
        message: String,
    },
}
