//! VMs whose memory is in worker processes: they join the engine of this process through a connection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use crate::engine::Mode;
use crate::frames::space::LostHandler;
use crate::remote::worker::{PATIENCE, Process, RemoteVm, Worker};
use crate::service::group::Group;
use crate::service::worker::Crew;
use crate::service::{Membership, NO_SLOT, Sharing, StartError};

/// A place in a group for one more VM, which keeps the group up. It is given back, or becomes a membership.
#[derive(Debug)]
pub struct Place {
    crew: Arc<Crew>,
    /// Taken when the place becomes a membership.
    group: Option<Arc<Group>>,
}

/// Tells a group from others that had its name before, or have it later.
#[derive(Clone, Debug)]
pub struct GroupMark(Weak<Group>);

impl GroupMark {
    /// Whether the group is still up.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl Sharing {
    /// Takes a place in a group, which is put up if there is none of that name.
    ///
    /// # Errors
    /// Fails if the group cannot be put up.
    pub fn place(&self, group: &str) -> Result<Place, StartError> {
        Ok(Place { crew: Arc::clone(&self.crew), group: Some(self.crew.groups.join(group)?) })
    }
}

impl Place {
    fn group(&self) -> &Arc<Group> {
        self.group.as_ref().expect("a place has its group until it is gone")
    }

    /// Returns the mark of the group.
    #[must_use]
    pub fn mark(&self) -> GroupMark {
        GroupMark(Arc::downgrade(self.group()))
    }

    /// Whether this is a place in that group.
    #[must_use]
    pub fn is_in(&self, mark: &GroupMark) -> bool {
        std::ptr::eq(Arc::as_ptr(self.group()), mark.0.as_ptr())
    }

    /// Connects the engine of the group to a worker, whose end of a [`pair`](crate::remote::worker::pair) is served.
    /// `None` where sharing has stopped for the group.
    ///
    /// # Errors
    /// Fails if the worker is gone, does not answer, or is of another version.
    pub fn connect(&self, socket: OwnedFd, process: Process) -> io::Result<Option<Arc<Worker>>> {
        // Guests of other workers may wait for the engine, and this one may take its time to answer.
        let Some(frames) = self.group().engine.work(|engine| engine.frames_for_workers()) else {
            return Ok(None);
        };
        Worker::greet(socket, process, &frames?, PATIENCE).map(Some)
    }

    /// Has the engine share a VM's memory; `None` for a VM whose group has stopped. `on_lost` is called, from a sharing
    /// thread, when a part of the memory could not be kept: the VM must be stopped then.
    ///
    /// # Errors
    /// Fails if there are too many pages in all.
    pub fn share(
        mut self,
        vm: Option<RemoteVm>,
        mode: Mode,
        on_lost: LostHandler,
    ) -> Result<Membership, StartError> {
        let slot = {
            let engine = self.group().engine.working();
            match engine.zip(vm) {
                Some((mut engine, RemoteVm { memory, log, is_huge })) => {
                    let slot =
                        engine.add_memory(memory, is_huge, log, on_lost).map_err(StartError::Engine)?;
                    engine.set_mode(slot, mode);
                    slot
                }
                None => NO_SLOT,
            }
        };
        self.crew.refresh();
        let group = self.group.take().expect("a place has its group until it is gone");
        Ok(Membership { crew: Arc::clone(&self.crew), group, slot, hints: Arc::default() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(group) = self.group.take() {
            self.crew.groups.leave(&group);
        }
    }
}
