//! Tests of the parts that need neither a hole nor root.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use samepage_hole::port::{self, Decoder, Item};
use samepage_hole::{
    FREED_PAGES_ARE_ZERO, FREED_PAGES_MATTER, FrameRange, GuestHeader, Hole, HostHeader, MAX_RANGES,
    bytes_for,
};

use super::check::{Checked, look};
use super::pages::{BATCH, Flags};
use super::port::{Port, find};
use super::publish::Target;
use super::{Error, Parameters, publish};

const FRAMES: u32 = 5000;

/// Flags that change as a test decides.
struct Made<F>(F);

impl<F: FnMut(u32) -> u32> Flags for Made<F> {
    fn read(&mut self, first: u32, words: &mut [u32]) -> Result<(), Error> {
        (first..).zip(words).for_each(|(frame, word)| *word = (self.0)(frame));
        Ok(())
    }
}

fn memory() -> Vec<AtomicU32> {
    (0..bytes_for(FRAMES) / 4).map(|_| AtomicU32::new(0)).collect()
}

fn header() -> HostHeader {
    let mut ranges = [FrameRange::default(); MAX_RANGES];
    ranges[0] = FrameRange { first: 0, count: 1500 };
    // A range with more page frames than exist.
    ranges[1] = FrameRange { first: 4000, count: u32::MAX };
    HostHeader { frames: FRAMES, ranges, ..HostHeader::default() }
}

#[test]
fn the_last_parameter_counts_and_what_is_for_init_does_not() {
    let parse = |line| Parameters::parse(line);
    assert_eq!(parse("quiet samepage.hole=16384@0xc0000000").hole, Some((16384, 0xc000_0000)));
    assert_eq!(parse("samepage.hole=1@2 samepage.hole=3@4 -- samepage.hole=5@6").hole, Some((3, 4)));
    assert_eq!(parse("quiet samepage.hole=much"), Parameters::default());
    assert_eq!(
        parse("samepage.hole=1@2 samepage.hole=port"),
        Parameters { port: true, ..Parameters::default() }
    );
    assert_eq!(parse("samepage.hole=port samepage.hole=1@2").hole, Some((1, 2)));
    assert_eq!(parse("page_poison=1").features, FREED_PAGES_MATTER);
    assert_eq!(
        parse("debug_pagealloc=on init_on_free=1").features,
        FREED_PAGES_MATTER | FREED_PAGES_ARE_ZERO
    );
    assert_eq!(parse("page_poison=0 init_on_free=off").features, 0);
}

#[test]
fn a_pass_covers_ram_and_writes_only_what_changed() {
    let memory = memory();
    let hole = Hole::new(&memory, FRAMES).unwrap();
    let mut words = [0; BATCH];
    let mut pass =
        |of: fn(u32) -> u32| publish::all(&mut { hole }, &header(), &mut Made(of), &mut words).unwrap();
    assert_eq!(pass(|frame| frame + 1), 2500);
    for (frame, word) in (0..).zip(hole.flags()) {
        let ram = !(1500..4000).contains(&frame);
        assert_eq!(word.load(Ordering::Relaxed), if ram { frame + 1 } else { 0 });
    }
    let counters = || (0..hole.blocks()).map(|block| hole.counter(block)).collect::<Vec<_>>();
    // 4000 is in the block that ends at 4096.
    assert_eq!(counters(), [1, 1, 0, 1, 1]);
    assert_eq!(pass(|frame| frame + 1), 0);
    assert_eq!(pass(|frame| frame + 1 + u32::from(frame == 1030)), 1);
    assert_eq!(counters(), [1, 2, 0, 1, 1]);
}

#[test]
fn pages_that_change_are_told_from_flags_that_are_wrong() {
    let memory = memory();
    let mut hole = Hole::new(&memory, FRAMES).unwrap();
    let mut checked = Checked::default();
    let mut reads = [0; 6];
    // 0 stays; 1 changes once; 2 changes at each reading; 3 changes twice; 4 differs for the publisher; 5
    // changes before it is published.
    let mut flags = Made(|frame: u32| {
        let read = &mut reads[frame as usize];
        *read += 1;
        match frame {
            1 => u32::from(*read > 2),
            2 => *read,
            3 => u32::from(*read == 2),
            4 => u32::from(*read % 3 == 2),
            5 => u32::from(*read > 1),
            _ => 7,
        }
    });
    look(&mut hole, 0, 6, &mut flags, 4, &mut checked).unwrap();
    assert_eq!(checked, Checked { pages: 6, equal: 4, moved: 1, unexplained: 1 });
    assert!(!checked.passed());
    assert!(Checked { pages: 1000, equal: 995, moved: 5, unexplained: 0 }.passed());
    assert!(!Checked { pages: 1000, equal: 994, moved: 6, unexplained: 0 }.passed());
    assert!(!Checked::default().passed());
}

#[test]
fn what_is_missing_gets_a_sentence() {
    let text = Error::Flags { source: std::io::ErrorKind::PermissionDenied.into() }.to_string();
    assert!(text.contains("/proc/kpageflags") && text.contains("root"), "{text}");
    let text =
        Error::Memory { address: 4096, bytes: 1, source: std::io::ErrorKind::NotFound.into() }.to_string();
    assert!(text.contains("/dev/mem") && text.contains("CONFIG_DEVMEM"), "{text}");
    assert!(Error::NoHole.to_string().contains("--memory-hole on"));
}

/// Returns a port, and the host's end of it.
fn connected(header: &HostHeader) -> (Port, UnixStream) {
    let (host, guest) = UnixStream::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    (&host).write_all(&port::host(header, true)).unwrap();
    let mut port = Port::closed("/dev/vport0p1".into());
    port.begin(OwnedFd::from(guest).into()).unwrap();
    (port, host)
}

/// Returns everything that the host receives until the end of a pass.
fn heard(mut host: &UnixStream) -> (Vec<(u32, u32)>, GuestHeader, usize) {
    let (mut words, mut bytes, mut decoder) = (Vec::new(), 0, Decoder::new());
    loop {
        let mut buffer = [0; 1000];
        let length = host.read(&mut buffer).unwrap();
        bytes += length;
        let mut rest = &buffer[..length];
        while let Some(item) = decoder.next(&mut rest).unwrap() {
            match item {
                Item::Flags { frame, word } => words.push((frame, word)),
                Item::Pass(header) => return (words, header, bytes),
                Item::Host { .. } => panic!("the guest says what a host says"),
            }
        }
    }
}

#[test]
fn a_pass_over_a_port_sends_only_what_changed() {
    let (mut port, host) = connected(&header());
    assert_eq!(port.header().unwrap(), header());
    let pass = |port: &mut Port, generation, of: fn(u32) -> u32| {
        let host = host.try_clone().unwrap();
        // This does not fit into the socket, so another thread must read meanwhile.
        let listener = std::thread::spawn(move || heard(&host));
        let changed = publish::all(port, &header(), &mut Made(of), &mut [0; BATCH]).unwrap();
        port.end_pass(&GuestHeader { generation, ..GuestHeader::default() }).unwrap();
        let (words, end, bytes) = listener.join().unwrap();
        assert_eq!(end.generation, generation);
        (changed, words, bytes)
    };
    let (changed, words, _) = pass(&mut port, 1, |frame| frame + 1);
    assert_eq!((changed, words.len()), (2500, 2500));
    assert!(words.iter().all(|&(frame, word)| word == frame + 1 && !(1500..4000).contains(&frame)));
    let (changed, words, bytes) = pass(&mut port, 2, |frame| frame + 1);
    assert_eq!((changed, words, bytes), (0, Vec::new(), port::PASS_BYTES));
    // Neighbours share a message with the words between them. Distant words get their own.
    let (changed, words, bytes) = pass(&mut port, 3, |frame| match frame {
        5 | 8 | 9 | 4999 => 7,
        _ => frame + 1,
    });
    assert_eq!((changed, words), (4, vec![(5, 7), (6, 7), (7, 8), (8, 7), (9, 7), (4999, 7)]));
    assert_eq!(bytes, port::PASS_BYTES + 2 * port::FLAGS_BYTES + 6 * 4);
    assert_eq!((port.published(5), port.published(6), port.published(2000)), (7, 7, 0));

    // A host that begins anew gets all words again; a host that only sends a request does not.
    (&host).write_all(&port::host(&HostHeader { requested: 5, ..header() }, false)).unwrap();
    port.wait(Duration::from_secs(60)).unwrap();
    assert_eq!(port.header().unwrap().requested, 5);
    assert_eq!(pass(&mut port, 4, |frame| frame + 1).0, 4);
    (&host).write_all(&port::host(&header(), true)).unwrap();
    assert_eq!(port.header().unwrap().requested, 0);
    assert_eq!(pass(&mut port, 5, |frame| frame + 1).0, 2500);
}

#[test]
fn a_host_that_closes_its_end_is_noticed() {
    let (mut port, host) = connected(&header());
    drop(host);
    let error = port.header().unwrap_err();
    assert!(error.may_pass() && error.to_string().contains("/dev/vport0p1"), "{error}");
    assert!(port.end_pass(&GuestHeader::default()).is_err());

    let (mut port, mut host) = connected(&header());
    host.write_all(b"no message").unwrap();
    let error = port.header().unwrap_err();
    assert!(!error.may_pass() && error.to_string().contains("0x6d206f6e"), "{error}");
}

#[test]
fn the_port_is_found_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let (described, devices) = (folder.path().join("virtio-ports"), folder.path().join("dev"));
    std::fs::create_dir(&devices).unwrap();
    assert_eq!(find(&described, &devices), None);
    for name in ["tty", "vport1p1", "vport0p1"] {
        std::fs::write(devices.join(name), "").unwrap();
    }
    assert_eq!(find(&described, &devices), Some(devices.join("vport0p1")), "nobody tells names");
    for (port, name) in [("vport0p1", "org.qemu.guest_agent.0\n"), ("vport1p1", "org.samepage.hole\n")] {
        std::fs::create_dir_all(described.join(port)).unwrap();
        std::fs::write(described.join(port).join("name"), name).unwrap();
    }
    assert_eq!(find(&described, &devices), Some(devices.join("vport1p1")));
    std::fs::remove_file(described.join("vport1p1/name")).unwrap();
    assert_eq!(find(&described, &devices), None);
}
