//! Where the frames of a network device go: a tap of the host's kernel, or a process of the user's.
//!
//! A [`Link`] carries whole Ethernet frames, each behind the header of virtio-net ([`HEADER_BYTES`]). Frames are
//! copied between guest memory and a buffer of the device: nothing pins guest memory, and what the device writes
//! there is in the dirty bitmap.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

pub mod passt;
mod stream;
mod tap;

pub use stream::StreamLink;
pub use tap::{OpenTap, Tap, TapError, TapOptions};

/// Length of `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6), in bytes.
pub const HEADER_BYTES: usize = 12;
/// Least length of a frame: the Ethernet header, in bytes.
pub const MIN_FRAME: usize = 14;
/// Largest frame: an IP packet of 65535 bytes, the Ethernet header and a VLAN tag, in bytes.
pub const MAX_FRAME: usize = 65535 + MIN_FRAME + 4;

/// What becomes of a frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The link has it.
    Done,
    /// The link has no room. The link's file becomes writable.
    Full,
    /// The link has refused it, and takes others.
    Dropped,
}

/// Work that one side leaves to the other one: checksums, and packets longer than the MTU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// TCP over IPv4.
    pub tso4: bool,
    /// TCP over IPv6.
    pub tso6: bool,
    /// UDP.
    pub ufo: bool,
}

/// A service of this process that a guest reaches by its network device. It takes frames of the guest before the link
/// does, and has frames for the guest. Frames have no header of virtio-net here. Calls do not wait.
pub trait Detour: Send + fmt::Debug {
    /// Takes a frame of the guest if it is for the service. Returns whether it was.
    fn take(&mut self, frame: &[u8]) -> bool;

    /// Writes the next frame for the guest into `buffer`. Returns its length; `None` if there is no frame at present.
    fn next(&mut self, buffer: &mut [u8]) -> Option<usize>;

    /// Returns after which time there may be a frame for the guest, even if the guest sends nothing.
    fn wait(&mut self) -> Option<Duration>;
}

/// One way for frames, in both directions. Calls do not wait.
pub trait Link: Send + Sync {
    /// Returns the file that becomes readable when there is a frame, and writable when there is room.
    fn file(&self) -> RawFd;

    /// Reads the next frame into `buffer`, behind its header. Returns the length of both; `None` if there is no
    /// frame at present.
    ///
    /// # Errors
    /// Fails if the link is gone for good.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>>;

    /// Sends a frame behind its header.
    ///
    /// # Errors
    /// Fails if the link is gone for good.
    fn send(&self, frame: &[u8]) -> io::Result<Sent>;

    /// Sends what is left of a frame that the link has taken.
    ///
    /// # Errors
    /// Fails if the link is gone for good.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the work that the link can take.
    fn offloads(&self) -> Offloads;

    /// Says which work the guest takes. Without a driver it takes none.
    ///
    /// # Errors
    /// Fails if the link cannot do so.
    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Says whether the guest uses this queue of several.
    ///
    /// # Errors
    /// Fails if the link cannot do so.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}
