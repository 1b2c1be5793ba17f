use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use virtio_bindings::bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUFFER_BYTES;
use super::packet::HEADER_BYTES;
use super::*;
use crate::BusDevice;
use crate::virtio::RING_FEATURES;
use crate::virtio::testing::*;

const CID: u32 = 3;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
/// The guest's room for each connection, and the length of its buffers.
const ROOM: u32 = 1000;
const BUFFER: u32 = 2000;

/// A packet as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    /// The host's port, and the guest's.
    ports: (u32, u32),
    operation: u16,
    flags: u32,
    forwarded: u32,
    data: Vec<u8>,
}

struct Guest {
    driver: Driver,
    rings: [Ring; 3],
    dir: tempfile::TempDir,
    stats: Arc<VsockStats>,
}

impl Guest {
    fn started() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::new("vm", CID, &dir.path().join("v")).unwrap();
        Arc::get_mut(&mut vsock.common).unwrap().limits = limits;
        let stats = vsock.stats();
        let rings = [0, 1, 2].map(|queue| Ring::new(queue, QUEUE_SIZE));
        let mut guest = Self { driver: Driver::new(vsock), rings, dir, stats };
        guest.start();
        guest
    }

    /// Resets the device and starts it with clean rings.
    fn begin(&mut self) {
        // Without EVENT_IDX the device notifies for each buffer.
        assert_eq!(self.driver.negotiate(RING_FEATURES & !(1 << 29)), FEATURES_OK);
        self.rings.iter_mut().for_each(|ring| ring.set_up(&mut self.driver));
        self.driver.set(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    /// The same, with buffers for packets.
    fn start(&mut self) {
        self.begin();
        for index in 0..QUEUE_SIZE {
            self.give(0, index, self.rings[0].buffer(index), BUFFER, true);
        }
    }

    fn give(&mut self, queue: usize, index: u16, address: u64, length: u32, is_written: bool) {
        self.rings[queue].give(&mut self.driver, index, (address, length, is_written));
    }

    fn wait(&mut self, queue: usize) -> (u16, u32) {
        self.rings[queue].wait(&mut self.driver)
    }

    /// Sends bytes as a packet.
    fn say_bytes(&mut self, bytes: &[u8]) {
        let address = self.rings[1].buffer(0);
        self.driver.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        self.give(1, 0, address, bytes.len() as u32, false);
        assert_eq!(self.wait(1), (0, 0));
    }

    fn say(&mut self, (host, guest): (u32, u32), operation: u16, flags: u32, forwarded: u32, data: &[u8]) {
        let mut bytes = Vec::new();
        bytes.extend(u64::from(CID).to_le_bytes());
        bytes.extend(2_u64.to_le_bytes());
        bytes.extend([guest, host, data.len() as u32].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend([1, operation].into_iter().flat_map(u16::to_le_bytes));
        bytes.extend([flags, ROOM, forwarded].into_iter().flat_map(u32::to_le_bytes));
        bytes.extend(data);
        self.say_bytes(&bytes);
    }

    /// Returns the next packet for the guest.
    fn hear(&mut self) -> Packet {
        let (index, length) = self.wait(0);
        let address = self.rings[0].buffer(index);
        let mut bytes = vec![0; length as usize];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        self.give(0, index, address, BUFFER, true);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!((word(0), word(4), word(8), word(12), half(28)), (2, 0, CID, 0, 1));
        assert_eq!((word(36), word(24) as usize), (BUFFER_BYTES, bytes.len() - HEADER_BYTES));
        Packet {
            ports: (word(16), word(20)),
            operation: half(30),
            flags: word(32),
            forwarded: word(40),
            data: bytes[HEADER_BYTES..].to_vec(),
        }
    }

    fn hear_operation(&mut self, operation: u16) -> Packet {
        let packet = self.hear();
        assert_eq!(packet.operation, operation, "{packet:?}");
        packet
    }

    /// Connects a program of the host to port 52 of the guest, which accepts.
    fn called(&mut self) -> (UnixStream, (u32, u32)) {
        let mut program = self.dial();
        program.write_all(b"CONNECT 52\n").unwrap();
        let request = self.hear_operation(REQUEST);
        assert_eq!(request.ports.1, 52);
        self.say(request.ports, RESPONSE, 0, 0, &[]);
        assert_eq!(line(&mut program), format!("OK {}\n", request.ports.0));
        (program, request.ports)
    }

    /// Sends data until the program's socket and then the device's buffer are full. Returns how much that was.
    fn say_all_that_there_is_room_for(&mut self, ports: (u32, u32), chunk: &[u8], heard: u32) -> u32 {
        let (mut said, mut forwarded) = (0_u32, 0);
        while said.wrapping_sub(forwarded) + chunk.len() as u32 <= BUFFER_BYTES {
            self.say(ports, DATA, 0, heard, chunk);
            said += chunk.len() as u32;
            self.say(ports, CREDIT_REQUEST, 0, heard, &[]);
            // The device may have told of its own accord before.
            forwarded = forwarded.max(self.hear_operation(CREDIT_UPDATE).forwarded);
            assert!(said < 100 << 20, "the socket holds everything");
        }
        said
    }

    fn dial(&self) -> UnixStream {
        let program = UnixStream::connect(self.dir.path().join("v")).unwrap();
        program.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        program
    }

    /// Connects the guest's port 1000 to a program of the host that listens on port 7.
    fn calling(&mut self) -> (UnixStream, (u32, u32)) {
        let listener = UnixListener::bind(self.dir.path().join("v_7")).unwrap();
        self.say((7, 1000), REQUEST, 0, 0, &[]);
        assert_eq!(self.hear_operation(RESPONSE).ports, (7, 1000));
        let (program, _) = listener.accept().unwrap();
        program.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (program, (7, 1000))
    }
}

fn line(program: &mut UnixStream) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        program.read_exact(&mut byte).unwrap();
        line.push(byte[0].into());
    }
    line
}

fn read(program: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_program_of_the_host_calls_the_guest() {
    let mut guest = Guest::started();
    let mut config = [0; 8];
    guest.driver.transport.read(0x100, &mut config);
    assert_eq!(u64::from_le_bytes(config), u64::from(CID));
    let (mut program, ports) = guest.called();
    assert!(ports.0 >= 1 << 30);
    guest.say(ports, DATA, 0, 0, b"from the guest");
    assert_eq!(read(&mut program, 14), b"from the guest");
    program.write_all(b"from the host").unwrap();
    let heard = guest.hear_operation(DATA);
    assert_eq!((heard.data, heard.forwarded), (b"from the host".to_vec(), 14));
    // Half of it ends, and the other half goes on.
    program.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.hear_operation(SHUTDOWN).flags, 2);
    guest.say(ports, DATA, 0, 13, b"more");
    assert_eq!(read(&mut program, 4), b"more");
    guest.say(ports, SHUTDOWN, 3, 13, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, ports);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    let counted = [
        &guest.stats.connections,
        &guest.stats.ended,
        &guest.stats.sent_packets,
        &guest.stats.sent_bytes,
        &guest.stats.received_packets,
        &guest.stats.received_bytes,
    ];
    assert_eq!(counted.map(|counter| counter.load(Relaxed)), [1, 1, 4, 18, 4, 13]);
}

#[test]
fn the_guest_calls_a_program_of_the_host() {
    let mut guest = Guest::started();
    let (mut program, ports) = guest.calling();
    guest.say(ports, DATA, 0, 0, b"hello");
    assert_eq!(read(&mut program, 5), b"hello");
    guest.say(ports, CREDIT_REQUEST, 0, 0, &[]);
    assert_eq!(guest.hear_operation(CREDIT_UPDATE).forwarded, 5);
    // The guest ends its half after its last data.
    guest.say(ports, DATA, 0, 0, b"!");
    guest.say(ports, SHUTDOWN, 2, 0, &[]);
    let mut rest = Vec::new();
    program.write_all(b"bye").unwrap();
    program.read_to_end(&mut rest).unwrap();
    assert_eq!((rest, guest.hear_operation(DATA).data), (b"!".to_vec(), b"bye".to_vec()));
    drop(program);
    assert_eq!(guest.hear_operation(SHUTDOWN).flags, 2);
    guest.say(ports, RESET, 0, 0, &[]);
    // Nobody listens any more, and on no other port.
    for host in [7, 8] {
        guest.say((host, 1001), REQUEST, 0, 0, &[]);
        assert_eq!(guest.hear_operation(RESET).ports, (host, 1001));
    }
}

#[test]
fn neither_side_sends_more_than_the_other_can_hold() {
    let mut guest = Guest::started();
    let (mut program, ports) = guest.calling();
    let data: Vec<u8> = (0..5000).map(|at| at as u8).collect();
    program.write_all(&data).unwrap();
    let mut heard = Vec::new();
    while heard.len() < data.len() {
        let packet = guest.hear_operation(DATA);
        heard.extend(packet.data);
        assert!(heard.len() % ROOM as usize != 0 || heard.len() <= data.len());
        // The guest's programs read all of it.
        guest.say(ports, CREDIT_UPDATE, 0, heard.len() as u32, &[]);
    }
    assert_eq!(heard, data);
    // The program reads nothing, so its socket and then the device's buffer are full.
    let chunk = vec![9; 4096 - HEADER_BYTES];
    guest.say_all_that_there_is_room_for(ports, &chunk, 5000);
    // What exceeds the credit ends the connection.
    guest.say(ports, DATA, 0, 5000, &chunk);
    let mut packet = guest.hear();
    while packet.operation == CREDIT_UPDATE {
        packet = guest.hear();
    }
    assert_eq!((packet.operation, packet.ports), (RESET, ports));
}

#[test]
fn programs_that_say_something_else_are_turned_away() {
    let mut guest = Guest::started();
    for wrong in
        [&b"GET / HTTP/1.1\n"[..], b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", &[b'C'; 100]]
    {
        let mut program = guest.dial();
        program.write_all(wrong).unwrap();
        // It may be closed before all is read.
        assert!(!matches!(program.read(&mut [0; 8]), Ok(1..)), "{wrong:?}");
    }
    // A port on which no program of the guest listens.
    let mut program = guest.dial();
    program.write_all(b"CONNECT 9\r\n").unwrap();
    let request = guest.hear_operation(REQUEST);
    guest.say(request.ports, RESET, 0, 0, &[]);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn wrong_packets_are_dropped_or_reset_their_connection() {
    let mut guest = Guest::started();
    // Too short, from or to somebody else, and longer than its buffer.
    guest.say_bytes(&[1; HEADER_BYTES - 1]);
    guest.say_bytes(&[]);
    guest.say_bytes(&[0xff; HEADER_BYTES]);
    let mut long = [0; HEADER_BYTES];
    (long[0], long[8], long[24], long[28], long[30]) = (CID as u8, 2, 1, 1, DATA as u8);
    guest.say_bytes(&long);
    // Packets of no connection, and of none that there can be.
    for operation in [RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, u16::MAX] {
        guest.say((5, 6), operation, 0, 0, b"x");
        assert_eq!(guest.hear_operation(RESET).ports, (5, 6));
    }
    guest.say((5, 6), RESET, 0, 0, &[]);
    // A second answer, and a second request.
    let (mut program, ports) = guest.called();
    guest.say(ports, RESPONSE, 0, 0, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, ports);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    let (_program, ports) = guest.calling();
    guest.say(ports, REQUEST, 0, 0, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, ports);
}

#[test]
fn data_after_the_end_of_data_resets_the_connection() {
    let mut guest = Guest::started();
    let (_program, ports) = guest.calling();
    guest.say(ports, SHUTDOWN, 2, 0, &[]);
    guest.say(ports, DATA, 0, 0, b"x");
    assert_eq!(guest.hear_operation(RESET).ports, ports);
}

#[test]
fn connections_are_limited_and_end_with_a_reset_of_the_device() {
    let mut guest = Guest::started();
    let mut programs = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        programs.push(guest.called().0);
    }
    assert_eq!(guest.dial().read(&mut [0]).unwrap(), 0);
    let _listener = UnixListener::bind(guest.dir.path().join("v_7")).unwrap();
    guest.say((7, 1), REQUEST, 0, 0, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, (7, 1));
    guest.start();
    assert!(programs.iter_mut().all(|program| matches!(program.read(&mut [0]), Ok(0) | Err(_))));
    guest.called();
}

#[test]
fn buffers_that_cannot_be_used_break_the_device_until_its_reset() {
    for (queue, address, length) in [(1, MEMORY_SIZE - 8, 100), (0, MEMORY_SIZE - 8, 100), (0, BUFFERS, 43)] {
        let mut guest = Guest::started();
        if queue == 0 {
            // Only the buffers of this kind are left.
            guest.begin();
        }
        guest.give(queue, 0, address, length, queue == 0);
        // A buffer for the guest is taken when there is something to say. Otherwise nobody may call: the call would
        // wait for the device to work again.
        let program = (queue == 0).then(|| guest.dial());
        if let Some(mut program) = program.as_ref() {
            program.write_all(b"CONNECT 1\n").unwrap();
        }
        guest.driver.wait_needs_reset();
        assert_eq!(guest.stats.errors.load(Relaxed), 1);
        guest.start();
        guest.called();
    }
}

#[test]
fn a_socket_of_a_dead_process_is_replaced_and_one_in_use_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let first = Vsock::new("a", CID, &path).unwrap();
    assert!(matches!(Vsock::new("b", CID, &path), Err(VsockError::InUse(_))));
    drop(first);
    assert!(!path.exists());
    // A socket that somebody else has put in its place stays.
    let second = Vsock::new("a", CID, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let third = Vsock::new("b", CID, &path).unwrap();
    drop(second);
    assert!(path.exists());
    drop(third);
    // A program that listens and accepts nobody is not waited for.
    let slow = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&slow, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&slow, 0).unwrap();
    let _first = dial(&path).unwrap();
    assert!(matches!(Vsock::new("b", CID, &path), Err(VsockError::InUse(_))));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "no socket").unwrap();
    let error = Vsock::new("a", CID, &path).map(drop).unwrap_err();
    assert!(matches!(error, VsockError::Bind { .. }) && error.to_string().contains("remove it"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"no socket");
}

#[test]
fn a_program_gets_all_data_of_a_guest_that_does_not_wait_for_it() {
    let mut guest = Guest::started();
    let (mut program, ports) = guest.calling();
    // More than its socket holds.
    let chunk: Vec<u8> = (0..4096 - HEADER_BYTES).map(|at| at as u8).collect();
    let said = guest.say_all_that_there_is_room_for(ports, &chunk, 0);
    guest.say(ports, SHUTDOWN, 3, 0, &[]);
    guest.say(ports, RESET, 0, 0, &[]);
    // The pair of ports is free at once.
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert_eq!(all.len() as u32, said);
}

#[test]
fn data_of_a_program_that_has_closed_reaches_the_guest() {
    let mut guest = Guest::started();
    let (mut program, ports) = guest.called();
    program.write_all(b"last words").unwrap();
    drop(program);
    // The guest speaks to nobody, which does not keep it from hearing.
    guest.say(ports, DATA, 0, 0, b"x");
    let mut heard = Vec::new();
    let mut flags = 0;
    while flags != 3 {
        let packet = guest.hear();
        match packet.operation {
            DATA => heard.extend(packet.data),
            SHUTDOWN => flags |= packet.flags,
            CREDIT_UPDATE => {}
            _ => panic!("{packet:?}"),
        }
        if flags == 2 {
            guest.say(ports, DATA, 0, 0, b"x");
        }
    }
    assert_eq!(heard, b"last words");
    guest.say(ports, RESET, 0, 0, &[]);
}

#[test]
fn callers_that_go_away_leave_no_connection() {
    let mut guest = Guest::started();
    // Before the guest has answered.
    let mut program = guest.dial();
    program.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.hear_operation(REQUEST);
    drop(program);
    assert_eq!(guest.hear_operation(RESET).ports, request.ports);
    guest.say(request.ports, RESPONSE, 0, 0, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, request.ports);
    // After the guest has said that it reads no more.
    let (program, ports) = guest.called();
    guest.say(ports, SHUTDOWN, 1, 0, &[]);
    drop(program);
    assert_eq!(guest.hear_operation(SHUTDOWN).flags, 3);
    guest.say(ports, RESET, 0, 0, &[]);
    guest.called();
}

#[test]
fn connections_have_their_turns() {
    let mut guest = Guest::started();
    let (mut first, first_ports) = guest.called();
    let (mut second, second_ports) = guest.called();
    // One has much to say, and the other one a little.
    let writer = std::thread::spawn(move || {
        let _ = first.write_all(&vec![1; 1 << 20]);
    });
    let mut room = 0;
    let mut of_first = 0;
    while of_first < 4 {
        let packet = guest.hear_operation(DATA);
        assert_eq!(packet.ports, first_ports);
        room += packet.data.len() as u32;
        guest.say(first_ports, CREDIT_UPDATE, 0, room, &[]);
        of_first += 1;
    }
    second.write_all(b"me too").unwrap();
    // The device may have filled the buffers that it had.
    for _ in 0..2 * QUEUE_SIZE {
        let packet = guest.hear_operation(DATA);
        if packet.ports == second_ports {
            assert_eq!(packet.data, b"me too");
            guest.start();
            writer.join().unwrap();
            return;
        }
        room += packet.data.len() as u32;
        guest.say(first_ports, CREDIT_UPDATE, 0, room, &[]);
    }
    panic!("the second connection has no turn");
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for() {
    let limits = Limits { line: Duration::from_secs(600), answer: Duration::from_millis(20) };
    let mut guest = Guest::with_limits(limits);
    // The time of connections that are open does not end.
    let mut program = guest.dial();
    program.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.hear_operation(REQUEST);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.hear_operation(RESET).ports, request.ports);
    // An answer that comes too late finds nobody.
    guest.say(request.ports, RESPONSE, 0, 0, &[]);
    assert_eq!(guest.hear_operation(RESET).ports, request.ports);
    // A guest without buffers was never asked, and is not told.
    guest.begin();
    let mut program = guest.dial();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    guest.start();
    let (_program, ports) = guest.calling();
    guest.say(ports, CREDIT_REQUEST, 0, 0, &[]);
    assert_eq!(guest.hear_operation(CREDIT_UPDATE).ports, ports);
    let counted = [&guest.stats.timeouts, &guest.stats.connections, &guest.stats.ended];
    assert_eq!(counted.map(|counter| counter.load(Relaxed)), [2, 1, 0]);
}

#[test]
fn a_connection_outlives_the_limits_once_it_is_open() {
    let limit = Duration::from_millis(100);
    let mut guest = Guest::with_limits(Limits { line: limit, answer: limit });
    let (mut program, ports) = loop {
        let mut program = guest.dial();
        program.write_all(b"CONNECT 52\n").unwrap();
        let request = guest.hear_operation(REQUEST);
        guest.say(request.ports, RESPONSE, 0, 0, &[]);
        if matches!(program.read(&mut [0]), Ok(1)) {
            break (program, request.ports);
        }
        // A busy host was slower than the limit: one reset for that, and one for the answer.
        guest.hear_operation(RESET);
        guest.hear_operation(RESET);
    };
    // The time of a program that says nothing ends later.
    assert_eq!(guest.dial().read(&mut [0]).unwrap(), 0);
    assert!(guest.stats.timeouts.load(Relaxed) >= 1);
    assert_eq!(line(&mut program), format!("K {}\n", ports.0));
    guest.say(ports, DATA, 0, 0, b"still here");
    assert_eq!(read(&mut program, 10), b"still here");
}

#[test]
fn programs_that_wait_leave_room_for_others() {
    let mut guest = Guest::started();
    let silent: Vec<_> = (0..MAX_PENDING).map(|_| guest.dial()).collect();
    assert_eq!(guest.dial().read(&mut [0]).unwrap(), 0);
    let (mut program, ports) = guest.calling();
    guest.say(ports, DATA, 0, 0, b"hello");
    assert_eq!(read(&mut program, 5), b"hello");
    // They have not said what they want, so they can still be served.
    let mut first = &silent[0];
    first.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.hear_operation(REQUEST);
    guest.say(request.ports, RESPONSE, 0, 0, &[]);
    first.read_exact(&mut [0; 3]).unwrap();
    // One that is served waits no longer.
    guest.called();
}
