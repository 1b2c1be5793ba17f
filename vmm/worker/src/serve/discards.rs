//! Pages that guests give back, which the engine in the managing process frees.
//!
//! A guest may use these pages again as soon as its request is answered. So the device waits until the engine has freed
//! them, or until no engine can do anything more about them: its connection has ended, and all that it had asked for
//! on it is done. Neither a reset of the device nor the end of the VM ends the wait before.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use samepage_machine::config::PageOrders;
use samepage_sharing::service::Discarded;

use super::outbox::Outbox;
use crate::messages::{Told, VmNumber};

/// A connection to an engine. Never the number of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct EngineConnection(u64);

/// What was asked for, and is waited for.
#[derive(Debug, Default)]
pub(super) struct Discards {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    connections: u64,
    open: HashSet<EngineConnection>,
    requests: u64,
    /// The requests that devices wait for, each with its answer once there is one.
    waiting: HashMap<u64, Option<Discarded>>,
}

impl Discards {
    /// An engine is connected.
    pub(super) fn open(&self) -> EngineConnection {
        let mut state = self.state.lock();
        state.connections += 1;
        let connection = EngineConnection(state.connections);
        state.open.insert(connection);
        connection
    }

    /// An engine does nothing more.
    pub(super) fn close(&self, connection: EngineConnection) {
        self.state.lock().open.remove(&connection);
        self.news.notify_all();
    }

    /// The engine has carried a request out. Nobody waits for the answer to one that has no engine any more.
    pub(super) fn answer(&self, number: u64, discarded: Discarded) {
        if let Some(answer) = self.state.lock().waiting.get_mut(&number) {
            *answer = Some(discarded);
            self.news.notify_all();
        }
    }

    /// Asks for pages to be freed, and waits.
    fn ask(&self, connection: EngineConnection, pages: &Range<u32>, tell: impl FnOnce(u64)) -> Discarded {
        let nothing = Discarded { next: pages.end, freed: 0 };
        let mut state = self.state.lock();
        if !state.open.contains(&connection) {
            return nothing;
        }
        state.requests += 1;
        let number = state.requests;
        state.waiting.insert(number, None);
        drop(state);
        tell(number);
        let mut state = self.state.lock();
        loop {
            let answer = state.waiting.get(&number).copied().flatten();
            if answer.is_some() || !state.open.contains(&connection) {
                state.waiting.remove(&number);
                return answer.unwrap_or(nothing);
            }
            self.news.wait(&mut state);
        }
    }
}

/// One VM's way to the engine.
pub(super) struct DiscardsOf {
    pub(super) discards: Arc<Discards>,
    pub(super) connection: EngineConnection,
    pub(super) outbox: Arc<Outbox>,
    pub(super) vm: VmNumber,
}

impl PageOrders for DiscardsOf {
    fn free(&self, pages: Range<u32>) -> Discarded {
        self.discards.ask(self.connection, &pages, |number| {
            self.outbox.send(&Told::Discard { vm: self.vm, number, first: pages.start, end: pages.end });
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_request_ends_with_its_answer_or_with_its_engine() {
        let discards = Discards::default();
        let (one, other) = (discards.open(), discards.open());
        let done = |next, freed| Discarded { next, freed };
        thread::scope(|scope| {
            let (told, numbers) = mpsc::channel();
            let ask = |connection| {
                let (discards, told) = (&discards, told.clone());
                let asked = scope
                    .spawn(move || discards.ask(connection, &(5..9), |number| told.send(number).unwrap()));
                (asked, numbers.recv().unwrap())
            };
            let (first, number) = ask(one);
            let (second, _) = ask(other);
            // Others' answers and ends are no news.
            discards.answer(number + 100, done(9, 4));
            discards.close(other);
            assert_eq!(second.join().unwrap(), done(9, 0));
            assert!(!first.is_finished());
            discards.answer(number, done(7, 2));
            assert_eq!(first.join().unwrap(), done(7, 2));
        });
        discards.close(one);
        let unheard = discards.ask(one, &(5..9), |_| panic!("nobody listens"));
        assert_eq!(unheard, done(9, 0));
        assert!(discards.state.lock().waiting.is_empty());
    }
}
