//! A service that takes some frames of the guest, in place of the link.

use super::*;
use crate::net::Detour;

/// Takes frames that begin with a one. Answers with the same bytes, at once if the second byte is zero, or else after
/// so many milliseconds.
#[derive(Debug, Default)]
struct Echo {
    waiting: Vec<(Instant, Vec<u8>)>,
}

impl Detour for Echo {
    fn take(&mut self, frame: &[u8]) -> bool {
        if frame[0] != 1 {
            return false;
        }
        let due = Instant::now() + Duration::from_millis(frame[1].into());
        self.waiting.push((due, frame.to_vec()));
        true
    }

    fn next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let at = self.waiting.iter().position(|(due, _)| *due <= Instant::now())?;
        let (_, frame) = self.waiting.remove(at);
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }

    fn wait(&mut self) -> Option<Duration> {
        let now = Instant::now();
        self.waiting.iter().map(|(due, _)| due.saturating_duration_since(now)).min()
    }
}

#[test]
fn a_service_answers_its_own_frames_and_the_link_gets_the_others() {
    let (link, other) = TestLink::new();
    let net = Net::new(&config(), vec![link.clone() as Arc<dyn Link>]);
    net.set_detour(Box::new(Echo::default()));
    let (stats, state) = (net.stats(), net.link_state());
    let mut guest = Guest {
        driver: Driver::new(net),
        rings: Vec::new(),
        links: vec![link],
        others: vec![other],
        stats,
        state,
    };
    guest.start(MERGEABLE);
    // The second answer comes when its time does, though nothing else happens then.
    for (index, delay) in [(0, 0), (1, 50)] {
        guest.offer(index, 2000);
        let mut asked = frame(100);
        asked[..2].copy_from_slice(&[1, delay]);
        guest.transmit([0; HEADER_BYTES], &asked);
        guest.wait(SEND);
        assert_eq!(guest.wait(RECEIVE), (index, 112));
        let got = guest.bytes(Guest::buffer(RECEIVE, index), 112);
        assert_eq!(got, [&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], &asked[..]].concat());
    }
    guest.transmit([0; HEADER_BYTES], &frame(60));
    assert_eq!(guest.heard()[HEADER_BYTES..], frame(60));
    guest.offer(2, 2000);
    guest.others[0].send(&[vec![0; HEADER_BYTES], frame(70)].concat()).unwrap();
    assert_eq!(guest.wait(RECEIVE), (2, 82));
    let counted = [&guest.stats.sent_frames, &guest.stats.received_frames];
    assert_eq!(counted.map(|counter| counter.load(Relaxed)), [3, 3]);
}
