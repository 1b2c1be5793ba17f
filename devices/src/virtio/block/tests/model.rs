//! Random requests against a model of the disk. The model knows the content of each sector, or its possible
//! contents.

use proptest::prelude::*;

use super::targets::{Target, Test};
use super::*;

#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    sectors: usize,
    /// First byte of the written pattern.
    seed: u8,
    /// Lengths of the data's buffers. The last buffer takes the rest.
    pieces: Vec<usize>,
    is_indirect: bool,
}

fn request() -> impl Strategy<Value = Request> {
    (
        prop::sample::select(vec![READ, READ, WRITE, WRITE, WRITE, FLUSH, DISCARD, WRITE_ZEROES]),
        0..SECTORS as u64 + 4,
        0usize..40,
        any::<u8>(),
        prop::collection::vec(prop_oneof![1usize..4000, Just(512), Just(4096)], 0..6),
        any::<bool>(),
    )
        .prop_map(|(kind, sector, sectors, seed, pieces, is_indirect)| Request {
            kind,
            sector: match sector % 4 {
                0 => sector % 64,
                1 => sector & !7,
                _ => sector,
            },
            sectors,
            seed,
            pieces,
            is_indirect,
        })
}

/// Spreads `len` bytes over separate buffers from `address` on, aligned to sectors or not.
fn spread(len: usize, pieces: &[usize], is_written: bool, mut address: u64, aligned: bool) -> Vec<Buffer> {
    let (mut left, mut buffers) = (len, Vec::new());
    if !aligned {
        address += 3;
    }
    for piece in pieces.iter().copied().chain([usize::MAX]) {
        let piece = piece.min(left);
        if piece > 0 {
            buffers.push((address, piece as u32, is_written));
            address += piece as u64 + 5;
            if aligned {
                address = address.next_multiple_of(4096);
            }
            left -= piece;
        }
    }
    buffers
}

fn for_each_piece(buffers: &[Buffer], data: &mut [u8], mut copy: impl FnMut(GuestAddress, &mut [u8])) {
    let mut rest = data;
    for &(address, len, _) in buffers {
        let (piece, others) = rest.split_at_mut(len as usize);
        copy(GuestAddress(address), piece);
        rest = others;
    }
}

/// The possible contents of a sector; empty for a discarded sector.
type Sector = Vec<Vec<u8>>;

struct Model(Vec<Sector>);

impl Model {
    fn new(data: &[u8]) -> Self {
        Self(data.chunks(SECTOR).map(|sector| vec![sector.to_vec()]).collect())
    }

    fn set(&mut self, sector: u64, data: &[u8], is_certain: bool) {
        for (i, new) in data.chunks(SECTOR).enumerate() {
            let known = &mut self.0[sector as usize + i];
            if is_certain {
                known.clear();
            } else if known.is_empty() {
                continue;
            }
            known.push(new.to_vec());
        }
    }

    fn discard(&mut self, sector: u64, sectors: usize) {
        self.0[sector as usize..sector as usize + sectors].iter_mut().for_each(Vec::clear);
    }

    fn check(&self, sector: u64, data: &[u8]) -> Result<(), TestCaseError> {
        for (i, found) in data.chunks(SECTOR).enumerate() {
            let known = &self.0[sector as usize + i];
            prop_assert!(
                known.is_empty() || known.iter().any(|known| known == found),
                "sector {} holds something else: {:?}",
                sector as usize + i,
                &found[..16]
            );
        }
        Ok(())
    }
}

/// Header, status and data of one of several simultaneous requests.
#[derive(Clone, Copy)]
struct Slot(u64);

impl Slot {
    const COUNT: u64 = 6;

    fn header(self) -> u64 {
        HEADER + self.0 * 0x40
    }

    fn status(self) -> u64 {
        HEADER + self.0 * 0x40 + 0x38
    }

    fn data(self) -> u64 {
        DATA + self.0 * 0x24000
    }

    fn table(self) -> u64 {
        INDIRECT + self.0 * 0x400
    }
}

/// Submits a request. Returns the buffers of its data.
fn submit(driver: &mut Driver, slot: Slot, request: &Request, aligned: bool) -> Vec<Buffer> {
    let Request { kind, sector, sectors, seed, pieces, is_indirect } = request;
    let clears = [DISCARD, WRITE_ZEROES].contains(kind);
    let len = if *kind == FLUSH {
        0
    } else if clears {
        16
    } else {
        sectors * SECTOR
    };
    let mut data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
    if clears {
        let unmap = u32::from(*kind == WRITE_ZEROES && seed % 2 == 0);
        data[..8].copy_from_slice(&sector.to_le_bytes());
        data[8..12].copy_from_slice(&(*sectors as u32).to_le_bytes());
        data[12..].copy_from_slice(&unmap.to_le_bytes());
    }
    let buffers = spread(len, pieces, *kind == READ, slot.data(), aligned);
    if *kind != READ {
        for_each_piece(&buffers, &mut data, |address, piece| {
            driver.memory.write_slice(piece, address).unwrap();
        });
    }
    driver.put_header_at(slot.header(), *kind, *sector);
    driver.memory.write_obj(NO_STATUS, GuestAddress(slot.status())).unwrap();
    let chain = [&[(slot.header(), 16, false)], &buffers[..], &[(slot.status(), 1, true)]].concat();
    if *is_indirect {
        driver.submit_indirect_at(slot.table(), &chain)
    } else {
        driver.submit(&chain)
    }
    buffers
}

/// Applies a completed request to the model. Returns whether the request failed.
fn apply(
    model: &mut Model,
    driver: &Driver,
    slot: Slot,
    request: &Request,
    buffers: &[Buffer],
    bad_sectors: &HashSet<u64>,
) -> Result<bool, TestCaseError> {
    let Request { kind, sector, sectors, seed, .. } = *request;
    let end = sector + sectors as u64;
    let in_range = sectors > 0 && end <= SECTORS as u64;
    let is_good = kind == FLUSH || in_range && !(sector..end).any(|sector| bad_sectors.contains(&sector));
    let status: u8 = driver.memory.read_obj(GuestAddress(slot.status())).unwrap();
    prop_assert_eq!(status, if is_good { OK } else { IO_ERROR }, "{:?}", request);

    let len = sectors * SECTOR;
    match kind {
        READ if is_good => {
            let mut data = vec![0; len];
            for_each_piece(buffers, &mut data, |address, piece| {
                driver.memory.read_slice(piece, address).unwrap();
            });
            model.check(sector, &data)?;
        }
        // A write that fails may have stored part of its data.
        WRITE if in_range => {
            let data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
            model.set(sector, &data, is_good);
        }
        WRITE_ZEROES if in_range => model.set(sector, &vec![0; len], is_good),
        DISCARD if is_good => model.discard(sector, sectors),
        _ => {}
    }
    Ok(!is_good)
}

/// Several simultaneous requests for neighbouring sectors.
fn batch() -> impl Strategy<Value = Vec<Request>> {
    let one = (prop::sample::select(vec![READ, WRITE, WRITE, WRITE_ZEROES]), 1usize..12, request());
    (0..SECTORS as u64 - 12 * Slot::COUNT, prop::collection::vec(one, 1..=Slot::COUNT as usize)).prop_map(
        |(mut sector, requests)| {
            let place = |(kind, sectors, request)| {
                let placed = Request { kind, sectors, sector, is_indirect: true, ..request };
                sector += sectors as u64;
                placed
            };
            requests.into_iter().map(place).collect()
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Single(Request),
    Together(Vec<Request>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![request().prop_map(Step::Single), batch().prop_map(Step::Together)];
    prop::collection::vec(step, 1..40)
}

fn check(
    target: Target,
    steps: Vec<Step>,
    bad_sectors: HashSet<u64>,
    knows_flush: bool,
    aligned: bool,
) -> Result<(), TestCaseError> {
    let Some(Test { disk, initial, memory, guest, _directory }) = target.make() else { return Ok(()) };
    if let Some(memory) = &memory {
        memory.medium().bad_sectors = bad_sectors.clone();
    }
    let bad_sectors = if memory.is_some() { bad_sectors } else { HashSet::new() };
    let mut model = Model::new(&initial);
    let block = Block::new("vm", "disk", 1, disk).unwrap();
    let stats = block.stats();
    let features = if knows_flush { ALL_FEATURES } else { ALL_FEATURES & !FLUSH_FEATURE };
    let features = features & block.features();
    let mut driver = Driver::with_memory(block, guest);
    driver.start(crate::virtio::RING_FEATURES | features);
    let mut failures = 0;

    for step in steps {
        let requests = match step {
            Step::Single(request) => vec![request],
            Step::Together(requests) => requests,
        };
        let offered = |kind| kind != DISCARD || features & DISCARD_FEATURE != 0;
        let requests: Vec<_> = requests.into_iter().filter(|request| offered(request.kind)).collect();
        let slots: Vec<_> = (0..).map(Slot).zip(&requests).collect();
        let buffers: Vec<_> =
            slots.iter().map(|(slot, request)| submit(&mut driver, *slot, request, aligned)).collect();
        for _ in &slots {
            driver.wait_used();
        }
        for ((slot, request), buffers) in slots.into_iter().zip(buffers) {
            failures += u64::from(apply(&mut model, &driver, slot, request, &buffers, &bad_sectors)?);
        }
    }
    prop_assert_eq!(stats.errors.load(Relaxed), failures);
    if let Some(memory) = memory {
        memory.medium().bad_sectors.clear();
    }
    for sector in (0..SECTORS as u64).step_by(64) {
        model.check(sector, &driver.read_sectors(sector, 64).unwrap())?;
    }
    Ok(())
}

macro_rules! model_tests {
    ($($name:ident: $target:expr, $cases:expr;)*) => {$(
        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases($cases) })]

            #[test]
            fn $name(
                steps in steps(),
                bad_sectors in prop::collection::hash_set(0..SECTORS as u64, 0..20),
                knows_flush in any::<bool>(),
                aligned in any::<bool>(),
            ) {
                check($target, steps, bad_sectors, knows_flush, aligned)?;
            }
        }
    )*};
}

model_tests! {
    memory: Target::Memory { zeroes: true }, 64;
    memory_where_zeroes_are_written: Target::Memory { zeroes: false }, 32;
    raw_buffered: Target::Raw { policy: CachePolicy::Buffered, engine: Engine::Auto, align: None }, 24;
    raw_buffered_by_threads: Target::Raw { policy: CachePolicy::Buffered, engine: Engine::Threads, align: None }, 16;
    raw_direct: Target::Raw { policy: CachePolicy::None, engine: Engine::Auto, align: None }, 24;
    raw_direct_by_threads: Target::Raw { policy: CachePolicy::None, engine: Engine::Threads, align: None }, 16;
    raw_in_large_blocks: Target::Raw { policy: CachePolicy::None, engine: Engine::Auto, align: Some(4096) }, 48;
    raw_in_huge_blocks: Target::Raw { policy: CachePolicy::None, engine: Engine::Threads, align: Some(65536) }, 16;
    qcow2: Target::Qcow2 { clusters: &[65536], policy: CachePolicy::Buffered }, 12;
    qcow2_direct_in_small_clusters: Target::Qcow2 { clusters: &[512], policy: CachePolicy::None }, 12;
    qcow2_chain: Target::Qcow2 { clusters: &[4096, 65536, 1024], policy: CachePolicy::None }, 16;
    cached: Target::Cached { align: None }, 48;
    cached_in_large_blocks: Target::Cached { align: Some(4096) }, 48;
}
