//! Random requests against a model of the disk: a plain vector of bytes.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    sectors: usize,
    /// First byte of the pattern that a write brings.
    seed: u8,
    /// Lengths of the buffers that the data is spread over; the last takes the rest.
    pieces: Vec<usize>,
    is_indirect: bool,
}

fn request() -> impl Strategy<Value = Request> {
    (
        prop::sample::select(vec![READ, WRITE, WRITE, FLUSH]),
        0..SECTORS as u64 + 4,
        0usize..40,
        any::<u8>(),
        prop::collection::vec(1usize..4000, 0..6),
        any::<bool>(),
    )
        .prop_map(|(kind, sector, sectors, seed, pieces, is_indirect)| Request {
            kind,
            sector: if sector % 3 == 0 { sector % 64 } else { sector },
            sectors,
            seed,
            pieces,
            is_indirect,
        })
}

/// Spreads `len` bytes over buffers that neither touch nor begin at round addresses.
fn spread(len: usize, pieces: &[usize], is_written: bool) -> Vec<Buffer> {
    let (mut left, mut address, mut buffers) = (len, DATA + 3, Vec::new());
    for piece in pieces.iter().copied().chain([usize::MAX]) {
        let piece = piece.min(left);
        if piece > 0 {
            buffers.push((address, piece as u32, is_written));
            address += piece as u64 + 5;
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_disk_behaves_as_a_vector_of_bytes(
        requests in prop::collection::vec(request(), 1..60),
        bad_sectors in prop::collection::hash_set(0..SECTORS as u64, 0..20),
        knows_flush in any::<bool>(),
    ) {
        let disk = MemoryDisk::new();
        disk.medium().bad_sectors = bad_sectors.clone();
        let mut model = disk.medium().data.clone();
        let block = disk.block();
        let stats = block.stats();
        let mut driver = Driver::started(block, if knows_flush { FLUSH_FEATURE } else { 0 });
        let mut failures = 0;

        for Request { kind, sector, sectors, seed, pieces, is_indirect } in requests {
            let len = if kind == FLUSH { 0 } else { sectors * SECTOR };
            let range = sector as usize * SECTOR..sector as usize * SECTOR + len;
            let is_good = kind == FLUSH
                || len > 0
                    && range.end <= model.len()
                    && !(sector..sector + sectors as u64).any(|sector| bad_sectors.contains(&sector));
            let mut data: Vec<u8> = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();

            let buffers = spread(len, &pieces, kind == READ);
            if kind == WRITE {
                for_each_piece(&buffers, &mut data, |address, piece| {
                    driver.memory.write_slice(piece, address).unwrap();
                });
            }
            driver.put_header(kind, sector);
            let chain = [&[(HEADER, 16, false)], &buffers[..], &[(STATUS, 1, true)]].concat();
            if is_indirect { driver.submit_indirect(&chain) } else { driver.submit(&chain) }
            driver.wait_used();
            let status: u8 = driver.memory.read_obj(GuestAddress(STATUS)).unwrap();

            prop_assert_eq!(status, if is_good { OK } else { IO_ERROR });
            if !is_good {
                failures += 1;
            } else if kind == WRITE {
                model[range].copy_from_slice(&data);
            } else if kind == READ {
                for_each_piece(&buffers, &mut data, |address, piece| {
                    driver.memory.read_slice(piece, address).unwrap();
                });
                prop_assert!(data == model[range], "a read returned something else");
            }
        }
        prop_assert!(disk.medium().data == model, "the disk holds something else");
        prop_assert_eq!(stats.errors.load(Relaxed), failures);
    }
}
