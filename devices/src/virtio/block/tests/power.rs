//! The host loses power: flushed data is there, whatever happened to the rest.

use proptest::prelude::*;

use super::*;
use crate::virtio::RING_FEATURES;

/// An operation on an image, as the medium sees it.
#[derive(Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Flush,
}

/// An image whose writes are volatile until a flush. It records everything.
#[derive(Clone)]
struct Recorder {
    disk: MemoryDisk,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Image for Recorder {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn physical_block_size(&self) -> u32 {
        512
    }
    fn can_discard(&self) -> bool {
        false
    }
    fn identity(&self) -> Option<ImageId> {
        None
    }
    fn locate(&self, offset: u64, len: u64) -> io::Result<Location> {
        self.disk.locate(offset, len)
    }
    fn read_at(&self, layer: Layer, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(layer, offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.write_at(offset, data)?;
        self.events.lock().unwrap().push(Event::Write(offset, data.to_vec()));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.events.lock().unwrap().push(Event::Flush);
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }
}

/// A step of the driver, and the number of events that the medium had seen by then.
enum Done {
    Write { sector: usize, data: Vec<u8>, seen: usize },
    Flush { seen: usize },
}

/// Returns the medium after a power cut behind the first `cut` events. Writes before the last flush are
/// there. Of later writes, each sector may or may not be there.
fn cut(initial: &[u8], events: &[Event], cut: usize, mut survives: impl FnMut() -> bool) -> Vec<u8> {
    let flushed = events[..cut].iter().rposition(|event| matches!(event, Event::Flush)).unwrap_or(0);
    let mut medium = initial.to_vec();
    for (i, event) in events[..cut].iter().enumerate() {
        let Event::Write(offset, data) = event else { continue };
        for (sector, piece) in data.chunks(SECTOR).enumerate() {
            let start = *offset as usize + sector * SECTOR;
            if i < flushed || survives() {
                medium[start..start + SECTOR].copy_from_slice(piece);
            }
        }
    }
    medium
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn what_was_flushed_survives_a_power_cut(
        steps in prop::collection::vec(prop::option::weighted(0.7, (0usize..64, 1usize..24, 1u8..)), 1..40),
        knows_flush in any::<bool>(),
        luck in any::<u64>(),
    ) {
        let disk = MemoryDisk::new();
        let initial = disk.medium().data.clone();
        let recorder = Recorder { disk, events: Arc::default() };
        let events = recorder.events.clone();
        let block = Block::new("vm", "disk", 1, Disk::new(Arc::new(recorder), Engine::Auto)).unwrap();
        let mut driver = Driver::new(block);
        driver.start(RING_FEATURES | if knows_flush { FLUSH_FEATURE } else { 0 });

        let mut done = Vec::new();
        for step in steps {
            match step {
                Some((sector, sectors, byte)) => {
                    let data = vec![byte; sectors * SECTOR];
                    prop_assert_eq!(driver.write_sectors(sector as u64, &data), OK);
                    done.push(Done::Write { sector, data, seen: events.lock().unwrap().len() });
                }
                None => {
                    prop_assert_eq!(driver.request(FLUSH, 0, &[]).0, OK);
                    done.push(Done::Flush { seen: events.lock().unwrap().len() });
                }
            }
        }

        let events = events.lock().unwrap().clone();
        let mut state = luck | 1;
        let mut survives = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state & 1 == 1
        };
        for point in 0..=events.len() {
            let medium = cut(&initial, &events, point, &mut survives);
            // Each sector holds its last stable content, or a later write.
            let stable = if knows_flush {
                done.iter().rposition(|done| matches!(done, Done::Flush { seen } if *seen <= point))
            } else {
                done.iter().rposition(|done| matches!(done, Done::Write { seen, .. } if *seen <= point))
                    .map(|last| last + 1)
            };
            let stable = stable.unwrap_or(0);
            let mut allowed: Vec<Vec<u8>> = initial.chunks(SECTOR).map(|sector| vec![sector[0]]).collect();
            for (i, write) in done.iter().enumerate() {
                let Done::Write { sector, data, .. } = write else { continue };
                for sector in &mut allowed[*sector..sector + data.len() / SECTOR] {
                    if i < stable {
                        sector.clear();
                    }
                    sector.push(data[0]);
                }
            }
            for (sector, (found, allowed)) in medium.chunks(SECTOR).zip(&allowed).enumerate() {
                prop_assert!(allowed.contains(&found[0]), "sector {sector} after {point} events: {found:?}");
            }
        }
    }
}

/// Returns the events of the medium when a disk is gone whose guest never flushed.
fn seen_at_the_end(requests: impl FnOnce(&mut Driver)) -> Vec<Event> {
    let recorder = Recorder { disk: MemoryDisk::new(), events: Arc::default() };
    let events = recorder.events.clone();
    let block = Block::new("vm", "disk", 1, Disk::new(Arc::new(recorder), Engine::Auto)).unwrap();
    let mut driver = Driver::new(block);
    driver.start(RING_FEATURES | FLUSH_FEATURE);
    requests(&mut driver);
    drop(driver);
    events.lock().unwrap().clone()
}

#[test]
fn what_was_written_is_flushed_however_a_vm_ends() {
    let events = seen_at_the_end(|driver| assert_eq!(driver.write_sectors(3, &[7; SECTOR]), OK));
    assert!(matches!(events[..], [Event::Write(..), Event::Flush]), "{} events", events.len());
}

#[test]
fn a_disk_that_nobody_wrote_to_is_not_flushed() {
    assert!(seen_at_the_end(|_| ()).is_empty());
}
