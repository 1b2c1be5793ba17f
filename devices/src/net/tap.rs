//! Taps: network interfaces of the host whose other end is a file.
//!
//! A tap is opened by its name, or comes as an open file of whoever started the process. If no interface has the
//! name, the kernel makes one, which needs CAP_NET_ADMIN. Such a tap is gone when its VM is.

#![expect(unsafe_code, reason = "ioctls of taps and network interfaces")]

use std::ffi::{c_int, c_short, c_uint};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR, Ioctl,
    SIOCGIFFLAGS, SIOCGIFMTU, SIOCSIFFLAGS, SIOCSIFMTU, TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO,
    TUNGETIFF, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ, TUNSETVNETLE, ifreq,
};

use super::{HEADER_BYTES, Link, Offloads, Sent};

const CONTROL: &str = "/dev/net/tun";
/// The kernel's limit for an interface's name, in bytes.
const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// What is to be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapOptions {
    /// Its name, or an open file of the process.
    pub source: Result<String, RawFd>,
    /// The number of queues.
    pub queues: usize,
    /// The longest packet, in bytes; as the tap has it by default.
    pub mtu: Option<u16>,
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name can be no interface's.
    #[error(
        "{0:?} can be no network interface: a name has 1 to 15 bytes, no blanks and none of the letters / % :"
    )]
    Name(String),
    /// The driver's file cannot be opened.
    #[error("open {CONTROL}: {0}; load the driver (`modprobe tun`), and give this user access to the file")]
    Control(#[source] io::Error),
    /// The kernel refuses the tap.
    #[error("open the tap {name}: {source}{}", hint(.name, .source, *.queues))]
    Open {
        /// Its name.
        name: String,
        /// The number of queues.
        queues: usize,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file is no tap.
    #[error("use file {fd} as a tap: {source}; open /dev/net/tun, and set it up with TUNSETIFF before")]
    File {
        /// The number of the file.
        fd: RawFd,
        /// The error of the system call.
        source: io::Error,
    },
    /// The tap that came as a file lacks what the device needs.
    #[error(
        "use file {fd} as a tap: it needs {lacks}; give TUNSETIFF the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags {
        /// The number of the file.
        fd: RawFd,
        /// What it lacks.
        lacks: &'static str,
    },
    /// A file stands for one queue.
    #[error("{queues} queues on the tap in file {fd}: a file is one queue; name the tap instead")]
    Queues {
        /// The number of the file.
        fd: RawFd,
        /// The number of queues.
        queues: usize,
    },
    /// A property of the tap cannot be set.
    #[error("{what} of the tap {name}: {source}")]
    Set {
        /// The property.
        what: &'static str,
        /// Its name.
        name: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The MTU cannot be set.
    #[error(
        "set the MTU of the tap {name} to {mtu}: {source}; set it before the start: `ip link set {name} mtu {mtu}`"
    )]
    Mtu {
        /// Its name.
        name: String,
        /// The MTU in bytes.
        mtu: u16,
        /// The error of the system call.
        source: io::Error,
    },
}

fn hint(name: &str, error: &io::Error, queues: usize) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => format!(
            "; a user without CAP_NET_ADMIN needs a tap of their own: as root, `ip tuntap add {name} mode tap{} \
             user USER && ip link set {name} up`",
            if queues > 1 { " multi_queue" } else { "" }
        ),
        Some(libc::EBUSY) => "; another program uses it".to_owned(),
        Some(libc::EINVAL) if queues > 1 => format!(
            "; is it an interface of another kind, or a tap with one queue? Make it with `ip tuntap add {name} \
             mode tap multi_queue`"
        ),
        Some(libc::EINVAL) => "; it is an interface of another kind".to_owned(),
        _ => String::new(),
    }
}

/// A tap that was opened.
#[derive(Debug)]
pub struct OpenTap {
    /// Its queues, one at least.
    pub queues: Vec<Tap>,
    /// The longest packet in bytes, if the host tells.
    pub mtu: Option<u16>,
    /// Remarks for the user, in sentences.
    pub notices: Vec<String>,
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offloads: Offloads,
    has_queues: bool,
}

impl Tap {
    /// Opens all queues of a tap, and takes it up.
    ///
    /// # Errors
    /// Fails if there is no such tap and none can be made, or if it cannot do what the device needs.
    pub fn open(options: &TapOptions) -> Result<OpenTap, TapError> {
        let taps = match &options.source {
            Ok(name) => by_name(name, options.queues)?,
            Err(fd) if options.queues > 1 => {
                return Err(TapError::Queues { fd: *fd, queues: options.queues });
            }
            Err(fd) => vec![by_file(*fd)?],
        };
        let mut notices = Vec::new();
        let name = &taps[0].name;
        let mut mtu = None;
        if let Ok(interface) = Interface::new(name) {
            mtu = interface.mtu().ok();
            if let Some(wanted) = options.mtu.filter(|wanted| mtu != Some(*wanted)) {
                let failed = |source| TapError::Mtu { name: name.clone(), mtu: wanted, source };
                interface.set_mtu(wanted).map_err(failed)?;
                mtu = Some(wanted);
            }
            if let Err(error) = interface.take_up() {
                notices.push(format!(
                    "the tap {name} is down and cannot be taken up: {error}; `ip link set {name} up` does so"
                ));
            }
        }
        Ok(OpenTap { queues: taps, mtu, notices })
    }

    /// Returns the name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set_up(file: File, name: String, has_queues: bool) -> Result<Self, TapError> {
        let failed = |what| {
            let name = name.clone();
            move |source| TapError::Set { what, name, source }
        };
        let (header, little_endian): (c_int, c_int) = (HEADER_BYTES as c_int, 1);
        // SAFETY: both read one integer, which lives longer than the call.
        unsafe {
            check(libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header))
                .map_err(failed("set the header"))?;
            check(libc::ioctl(file.as_raw_fd(), TUNSETVNETLE, &raw const little_endian))
                .map_err(failed("set the byte order"))?;
        }
        let mut tap = Self { file, name, offloads: Offloads::default(), has_queues };
        let all = Offloads { checksum: true, tso4: true, tso6: true, ufo: true };
        let some = Offloads { ufo: false, ..all };
        tap.offloads =
            [all, some].into_iter().find(|work| tap.set_guest_offloads(*work).is_ok()).unwrap_or_default();
        let name = tap.name.clone();
        let none = tap.set_guest_offloads(Offloads::default());
        none.map_err(|source| TapError::Set { what: "turn the offloads off", name, source })?;
        Ok(tap)
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let wrong = |byte: u8| byte <= b' ' || byte >= 0x7f || b"/%:".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || name.bytes().any(wrong) || [".", ".."].contains(&name) {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

/// Returns a request about the interface of this name, which was checked.
fn request(name: &str) -> ifreq {
    // SAFETY: the structure holds numbers, names and addresses, for all of which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(MAX_NAME)) {
        *to = from as libc::c_char;
    }
    request
}

/// Runs an ioctl that reads and writes an interface request.
fn interface_ioctl(file: &impl AsRawFd, number: Ioctl, request: &mut ifreq) -> io::Result<()> {
    // SAFETY: the callers' ioctls read or write one `ifreq`, which lives longer than the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number, &raw mut *request) })
}

fn by_name(name: &str, queues: usize) -> Result<Vec<Tap>, TapError> {
    check_name(name)?;
    let basic = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    let open = |flags: c_int| -> Result<File, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(CONTROL)
            .map_err(TapError::Control)?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = flags as c_short;
        let failed = |source| TapError::Open { name: name.to_owned(), queues, source };
        interface_ioctl(&file, TUNSETIFF, &mut request).map_err(failed)?;
        Ok(file)
    };
    if queues == 1 {
        let is_other_kind = |error: &TapError| matches!(error, TapError::Open { source, .. } if source.raw_os_error() == Some(libc::EINVAL));
        return match open(basic) {
            // A tap with several queues that was made before.
            Err(error) if is_other_kind(&error) => {
                let file = open(basic | IFF_MULTI_QUEUE).map_err(|_| error)?;
                Ok(vec![Tap::set_up(file, name.to_owned(), true)?])
            }
            Err(error) => Err(error),
            Ok(file) => Ok(vec![Tap::set_up(file, name.to_owned(), false)?]),
        };
    }
    let queues = (0..queues).map(|_| Tap::set_up(open(basic | IFF_MULTI_QUEUE)?, name.to_owned(), true));
    queues.collect()
}

fn by_file(fd: RawFd) -> Result<Tap, TapError> {
    let failed = |source| TapError::File { fd, source };
    // SAFETY: the call has no pointers. A number that is no open file is an error.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    check(copy).map_err(failed)?;
    // SAFETY: the descriptor is new, and nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
    let mut request = request("");
    interface_ioctl(&file, TUNGETIFF, &mut request).map_err(failed)?;
    // SAFETY: the kernel has filled in the flags.
    let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    for (flag, lacks) in [
        (IFF_TAP, "frames (IFF_TAP) instead of packets"),
        (IFF_NO_PI, "no packet information (IFF_NO_PI)"),
        (IFF_VNET_HDR, "virtio's header (IFF_VNET_HDR)"),
    ] {
        if flags & flag == 0 {
            return Err(TapError::Flags { fd, lacks });
        }
    }
    // SAFETY: the calls have no pointers.
    unsafe {
        let status = libc::fcntl(copy, libc::F_GETFL);
        check(status).map_err(failed)?;
        check(libc::fcntl(copy, libc::F_SETFL, status | libc::O_NONBLOCK)).map_err(failed)?;
    }
    let name = request.ifr_name.iter().take_while(|&&letter| letter != 0).map(|&letter| letter as u8);
    let name = String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned();
    Tap::set_up(file, name, flags & IFF_MULTI_QUEUE != 0)
}

impl Link for Tap {
    fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match (&self.file).read(buffer) {
                Ok(length) if length > HEADER_BYTES => return Ok(Some(length)),
                // A frame of nothing.
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    // The interface is down, or this queue is detached.
                    Some(libc::EAGAIN | libc::EIO | libc::ENODEV) => return Ok(None),
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        loop {
            match (&self.file).write(frame) {
                Ok(length) if length == frame.len() => return Ok(Sent::Done),
                // A tap takes frames whole, or not at all.
                Ok(_) => return Ok(Sent::Dropped),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Sent::Full),
                    Some(libc::EINTR) => {}
                    // The interface was deleted.
                    Some(libc::EBADFD) => return Err(error),
                    _ => return Ok(Sent::Dropped),
                },
            }
        }
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bit = |is_set: bool, bit: c_uint| if is_set { bit } else { 0 };
        let bits = bit(offloads.checksum, TUN_F_CSUM)
            | bit(offloads.tso4, TUN_F_TSO4)
            | bit(offloads.tso6, TUN_F_TSO6)
            | bit(offloads.ufo, TUN_F_UFO);
        // SAFETY: this ioctl takes a number, no pointer.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        if !self.has_queues {
            return Ok(());
        }
        let mut request = request("");
        let flag = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as c_short;
        match interface_ioctl(&self.file, TUNSETQUEUE, &mut request) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

/// A network interface of the host.
struct Interface<'a> {
    name: &'a str,
    socket: OwnedFd,
}

impl<'a> Interface<'a> {
    fn new(name: &'a str) -> io::Result<Self> {
        // SAFETY: the call has no pointers.
        let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        check(socket)?;
        // SAFETY: the descriptor is new, and nobody else has it.
        Ok(Self { name, socket: unsafe { OwnedFd::from_raw_fd(socket) } })
    }

    fn mtu(&self) -> io::Result<u16> {
        let mut request = request(self.name);
        interface_ioctl(&self.socket, SIOCGIFMTU as Ioctl, &mut request)?;
        // SAFETY: the kernel has filled in the MTU.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u16::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::ERANGE))
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = request(self.name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        interface_ioctl(&self.socket, SIOCSIFMTU as Ioctl, &mut request)
    }

    fn take_up(&self) -> io::Result<()> {
        let mut request = request(self.name);
        interface_ioctl(&self.socket, SIOCGIFFLAGS as Ioctl, &mut request)?;
        // SAFETY: the kernel has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if c_int::from(flags) & IFF_UP != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | IFF_UP as c_short;
        interface_ioctl(&self.socket, SIOCSIFFLAGS as Ioctl, &mut request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for wrong in ["", "tap%d", "a/b", "a b", "sixteen-letters-", ".", "a:1"] {
            assert!(matches!(check_name(wrong), Err(TapError::Name(_))), "{wrong}");
        }
        assert!(check_name("tap0").is_ok() && check_name("fifteen-letters").is_ok());
    }

    #[test]
    fn a_file_that_is_no_tap_is_refused_with_a_remedy() {
        let null = File::open("/dev/null").unwrap();
        let error =
            Tap::open(&TapOptions { source: Err(null.as_raw_fd()), queues: 1, mtu: None }).unwrap_err();
        assert!(error.to_string().contains("TUNSETIFF"), "{error}");
        let error = Tap::open(&TapOptions { source: Err(0), queues: 2, mtu: None }).unwrap_err();
        assert!(error.to_string().contains("one queue"), "{error}");
    }

    #[test]
    fn refusals_say_what_helps() {
        let said = |errno, queues| hint("tap0", &io::Error::from_raw_os_error(errno), queues);
        assert!(said(libc::EPERM, 1).contains("ip tuntap add tap0 mode tap user"));
        assert!(said(libc::EPERM, 2).contains("multi_queue"));
        assert!(said(libc::EBUSY, 1).contains("another program"));
        assert!(said(libc::EINVAL, 4).contains("one queue"));
    }
}
