//! What the managing process and a worker say to each other.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use samepage_machine::vm::VmEnd;
use samepage_sharing::remote::worker::VmIndex;
use samepage_spec::{SharingMode, VmSpec};
use serde::{Deserialize, Serialize};

use crate::machine::DeviceChange;
use crate::report::DeviceReport;

/// The version of these messages. To be raised with each change by which one side would misread the other.
pub(crate) const VERSION: u32 = 3;

/// What the managing process says first, to a worker that it has started and to one that it takes over.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
    /// Where the worker is to be found if the managing process ends. Without it the worker ends as well.
    #[serde(default)]
    pub(crate) shelter: Option<Shelter>,
}

/// Where a worker is found, and how long it waits.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Shelter {
    pub(crate) folder: PathBuf,
    /// How long the worker waits once all of its VMs have ended.
    pub(crate) patience_seconds: u64,
}

/// What a worker says first to who may take it over. Every version can read it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) version: u32,
    /// The names of its VMs.
    #[serde(default)]
    pub(crate) vms: Vec<String>,
}

/// Nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Moment(u64);

impl Moment {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    pub(crate) fn time(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.0)
    }
}

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
    /// Have a disk, by its number, ask the block cache at the line that comes with this. One for each queue.
    ConnectDisk(usize),
    /// Free a machine. If it shares memory, the engine has emptied it.
    Free,
    Start,
    Pause,
    Stop,
    Fail(String),
    PressCtrlAltDel,
    AskToEnd,
    AskAgain {
        time_is_short: bool,
    },
    ReopenConsole,
    Type(Vec<u8>),
    Look,
    Change {
        id: String,
        change: DeviceChange,
    },
    /// Tell which pages have memory.
    Touched,
    /// Hold the vCPUs because memory is short, or do so no more.
    Withhold(bool),
    /// Count the private memory of RAM.
    CountPrivate,
    /// Name the threads of the vCPUs.
    NameThreads,
    /// The header of the memory hole has changed.
    HoleNews,
    /// Name all VMs.
    List,
    /// Describe a VM to who has taken the worker over.
    Describe,
    /// Tell what is kept of the console, and what it writes from now on.
    Follow,
    /// From now on, share these pages. Only noted, for who takes the worker over.
    NoteMode(SharingMode),
    /// The engine has freed pages, as [`Told::Discard`] has asked for.
    Discarded {
        number: u64,
        /// The page to go on with.
        next: u32,
        /// Pages that had memory and have none any more.
        freed: u32,
    },
}

/// A machine to be built.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Build {
    pub(crate) spec: VmSpec,
    pub(crate) console: Target,
    /// The connection to the engine that is to share its memory.
    pub(crate) group: Option<GroupNumber>,
    /// Disks can be connected to the block cache.
    pub(crate) has_cache: bool,
}

/// A VM, as its worker describes it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) spec: VmSpec,
    pub(crate) notices: Vec<String>,
    /// The guest has been started.
    pub(crate) has_run: bool,
    /// The vCPUs are not held.
    pub(crate) runs: bool,
    /// When the machine was built.
    pub(crate) built: Moment,
    /// When it came into its state.
    pub(crate) since: Moment,
    pub(crate) end: Option<VmEnd>,
}

/// What a worker leaves in the folder that nobody has taken over in time.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    pub(crate) vms: Vec<Description>,
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
        devices: Box<DeviceReport>,
    },
    Bytes(u64),
    /// The kernel's numbers of threads.
    Threads(Vec<u32>),
    /// First and end of each run of pages.
    Runs(Vec<(u32, u32)>),
    Listed(Vec<VmNumber>),
    Described(Box<Description>),
    /// What was kept of the console has been told.
    Following {
        /// Bytes that the guest wrote before.
        before: u64,
    },
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
    /// The guest's balloon has the size that was asked for.
    Balloon {
        vm: VmNumber,
        frames: u32,
    },
    /// The guest gives pages back. The engine is to free the first of them, and to say so by [`Order::Discarded`].
    Discard {
        vm: VmNumber,
        number: u64,
        first: u32,
        end: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What these messages were in the first version, they are in all: whoever comes has to learn the version by them.
    #[test]
    fn first_messages_are_read_whatever_the_version() {
        let greeting = r#"{"version":7,"more":{"of":"it"},"vms":["a"]}"#;
        let expected = Greeting { version: 7, vms: vec!["a".into()] };
        assert_eq!(serde_json::from_str::<Greeting>(greeting).unwrap(), expected);
        assert_eq!(serde_json::to_string(&expected).unwrap(), r#"{"version":7,"vms":["a"]}"#);
        let hello: Hello = serde_json::from_str(r#"{"version":7,"more":1}"#).unwrap();
        assert_eq!(hello, Hello { version: 7, shelter: None });
    }
}
