//! Disks that reach the blocks of their group through a line, as those of VMs in workers do.

#![expect(unsafe_code, reason = "fills what is fetched by address")]

mod common;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use common::Guest;
use samepage_sharing::blocks::{Image, Keep};
use samepage_sharing::content::Page;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::line::asking::Line;
use samepage_sharing::service::line::messages::{FileId, MOST_BLOCKS, SLOTS, SampleOf, Wanted};
use samepage_sharing::service::line::serving::Serving;
use samepage_sharing::service::{BlockClient, Membership, Sharing};
use samepage_sharing::{PAGE_SIZE, Ram};

const IMAGE: Image = Image([1, 2, 3, 0]);
const FILE: FileId = FileId { device: 1, inode: 2, format: 0 };
/// The content of a block is that of a page which a guest writes with this number and its own.
const SEED: u64 = 1000;

fn content(block: u64) -> Page {
    let guest = Guest::new(1);
    guest.write(0, SEED + block);
    // SAFETY: a page of RAM, which nobody writes to.
    unsafe { *guest.ram.range(0, 1).page(0).cast::<Page>() }
}

/// Answers a line until the disk is gone, or until it says what makes no sense. Blocks from `bad` on cannot be read.
fn serve(client: BlockClient, bad: u64) -> (OwnedFd, JoinHandle<std::io::ErrorKind>) {
    let (mut serving, theirs) = Serving::create(client, 0).unwrap();
    let thread = thread::spawn(move || {
        loop {
            let mut events = [rustix::event::PollFd::from_borrowed_fd(
                // SAFETY: the line is open as long as this thread.
                unsafe { BorrowedFd::borrow_raw(serving.event()) },
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut events, None).unwrap();
            let question = match serving.receive() {
                Ok(Some(question)) => question,
                Ok(None) => continue,
                Err(error) => return error.kind(),
            };
            if question.wanted.file != FILE {
                let _ = serving.pass(&question);
                continue;
            }
            let fetches = serving.begin(&question, IMAGE).unwrap_or_default();
            for fetch in fetches {
                let blocks = fetch.first..fetch.first + u64::from(fetch.blocks);
                let is_read = blocks.end <= bad;
                for (index, block) in blocks.enumerate() {
                    // SAFETY: the memory belongs to the fetch.
                    unsafe { fetch.landing.add(index * PAGE_SIZE).cast::<Page>().write(content(block)) };
                }
                let _ = serving.end(&fetch, is_read);
            }
        }
    });
    (theirs, thread)
}

fn join(sharing: &Sharing, ram: &Arc<Ram>) -> Membership {
    sharing.add(Arc::clone(ram), None, &Default::default(), Box::new(|_| {})).unwrap()
}

/// Reads blocks into pages, as a disk does. Returns how many came from guests, from the host, and from the image, and
/// which blocks the disk is to read itself.
fn read(line: &mut Line, guest: &Guest, first: u64, pages: &[u32], keep: Keep) -> ([u32; 3], u32) {
    let targets = pages.iter().copied().map(Some).collect();
    let wanted = Wanted { file: FILE, keep, first, targets, sample: None };
    let asked = line.ask(wanted).unwrap();
    line.wait().unwrap();
    let (slot, outcome) = line.receive().unwrap().unwrap();
    assert_eq!(slot, asked);
    for (index, &page) in pages.iter().enumerate() {
        if outcome.copied & 1 << index != 0 {
            let mut content = [0; PAGE_SIZE];
            line.take(slot, index, &mut content);
            let address = guest.ram.range(page, 1).page(0).cast::<Page>().cast_mut();
            // SAFETY: a page of RAM, which nobody else writes to.
            unsafe { address.write(content) };
        }
        if outcome.past & 1 << index == 0 {
            guest.check(page, SEED + first + index as u64);
        }
    }
    line.give_back(slot);
    assert!(!outcome.is_stopped);
    ([outcome.from_guests, outcome.from_host, outcome.fetched], outcome.past)
}

#[test]
fn a_line_delivers_what_others_hold_and_what_is_read_for_it() {
    let sharing = Sharing::start(Settings::default()).unwrap();
    let guests = [Guest::new(256), Guest::new(256)];
    let members = [join(&sharing, &guests[0].ram), join(&sharing, &guests[1].ram)];
    let served: Vec<_> = members.iter().map(|member| serve(member.blocks(), 1000)).collect();
    let (ends, threads): (Vec<_>, Vec<_>) = served.into_iter().unzip();
    let mut lines: Vec<_> = ends.into_iter().map(|end| Line::accept(end).unwrap().0).collect();
    let pages: Vec<_> = (64..64 + MOST_BLOCKS as u32).collect();
    let all = MOST_BLOCKS as u32;
    let keep = Keep::Exclusive;
    assert_eq!(read(&mut lines[0], &guests[0], 8, &pages, keep), ([0, 0, all], 0));
    assert_eq!(
        read(&mut lines[1], &guests[1], 8, &pages, keep),
        ([all, 0, 0], 0),
        "the other guest has them"
    );
    // Single blocks are copied.
    assert_eq!(read(&mut lines[0], &guests[0], 8, &[7], keep), ([1, 0, 0], 0));
    assert_eq!(read(&mut lines[0], &guests[0], 200, &[9, 3, 12], Keep::Inclusive), ([0, 0, 3], 0));
    assert_eq!(read(&mut lines[1], &guests[1], 200, &[1, 2, 3], Keep::Inclusive), ([0, 3, 0], 0));
    // What cannot be read is left to the disk, and so are pages that there are none of.
    assert_eq!(read(&mut lines[0], &guests[0], 998, &[20, 21, 22], keep), ([0, 0, 0], 7));
    let wanted = Wanted { file: FILE, keep, first: 0, targets: vec![Some(1 << 20)], sample: None };
    lines[0].ask(wanted.clone()).unwrap();
    lines[0].wait().unwrap();
    let (slot, outcome) = lines[0].receive().unwrap().unwrap();
    assert_eq!((outcome.past, outcome.copied), (1, 0));
    lines[0].give_back(slot);
    // Other files are not asked for, and a sample has numbers that make no sense.
    let file = FileId { inode: 3, ..FILE };
    let sample = Some(SampleOf { passed: u64::MAX, limit: 0 });
    for wanted in [Wanted { file, ..wanted.clone() }, Wanted { sample, targets: vec![Some(0)], ..wanted }] {
        lines[0].ask(wanted).unwrap();
    }
    let mut past = 0;
    while lines[0].in_progress() > 0 {
        lines[0].wait().unwrap();
        if let Some((slot, outcome)) = lines[0].receive().unwrap() {
            past += outcome.past;
            lines[0].give_back(slot);
        }
    }
    assert_eq!(past, 1);
    // A VM that is gone gets nothing.
    drop(members);
    assert_eq!(read(&mut lines[1], &guests[1], 8, &[5], keep), ([0, 0, 0], 1));
    drop(lines);
    for thread in threads {
        assert_eq!(thread.join().unwrap(), std::io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_disk_whose_questions_make_no_sense_is_served_no_more() {
    let sharing = Sharing::start(Settings::default()).unwrap();
    let guest = Guest::new(16);
    let member = join(&sharing, &guest.ram);
    let wanted = |count| Wanted {
        file: FILE,
        keep: Keep::Exclusive,
        first: 0,
        targets: vec![None; count],
        sample: None,
    };
    for (slot, count) in [(SLOTS as u32, 1), (0, 0), (0, MOST_BLOCKS + 1)] {
        let (theirs, thread) = serve(member.blocks(), 1000);
        // `Said::Read`, as postcard has it.
        let mut room = [0; 4096];
        let bytes = postcard::to_slice(&(0_u32, slot, wanted(count)), &mut room).unwrap();
        rustix::net::send(&theirs, bytes, rustix::net::SendFlags::empty()).unwrap();
        assert_eq!(thread.join().unwrap(), std::io::ErrorKind::InvalidData);
    }
    let (theirs, thread) = serve(member.blocks(), 1000);
    let (line, _) = Line::accept(theirs).unwrap();
    drop(thread);
    drop(line);
    // A line whose other end is gone says so at once.
    let (serving, theirs) = Serving::create(member.blocks(), 0).unwrap();
    let (mut line, _) = Line::accept(theirs).unwrap();
    drop(serving);
    assert!(line.receive().is_err());
}
