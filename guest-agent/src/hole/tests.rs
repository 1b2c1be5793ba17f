//! The parts that need neither a hole nor root.

use std::sync::atomic::{AtomicU32, Ordering};

use samepage_hole::{
    FREED_PAGES_ARE_ZERO, FREED_PAGES_MATTER, FrameRange, Hole, HostHeader, MAX_RANGES, bytes_for,
};

use super::check::{Checked, look};
use super::pages::{BATCH, Flags};
use super::{Error, Parameters, publish};

const FRAMES: u32 = 5000;

/// Flags that change in a way that a test decides.
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
    // More than there is.
    ranges[1] = FrameRange { first: 4000, count: u32::MAX };
    HostHeader { frames: FRAMES, ranges, ..HostHeader::default() }
}

#[test]
fn the_last_parameter_counts_and_what_is_for_init_does_not() {
    let parse = |line| Parameters::parse(line);
    assert_eq!(parse("quiet samepage.hole=16384@0xc0000000").hole, Some((16384, 0xc000_0000)));
    assert_eq!(parse("samepage.hole=1@2 samepage.hole=3@4 -- samepage.hole=5@6").hole, Some((3, 4)));
    assert_eq!(parse("quiet samepage.hole=much"), Parameters::default());
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
    let mut pass = |of: fn(u32) -> u32| publish::all(&hole, &header(), &mut Made(of), &mut words).unwrap();
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
    let hole = Hole::new(&memory, FRAMES).unwrap();
    let mut checked = Checked::default();
    let mut reads = [0; 6];
    // 0 stays; 1 changes once; 2 changes at each look; 3 changes to and fro once; 4 is different for
    // whoever publishes; 5 changes before it is published.
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
    look(&hole, 0, 6, &mut flags, 4, &mut checked).unwrap();
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
