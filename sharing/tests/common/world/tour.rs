//! Every kind of work once, in an order that gives the engine occasion for it.

use std::time::Duration;

use samepage_sharing::engine::Mode;

use super::World;

impl World {
    /// Merging, zeros, disks, free memory, modes, compaction, and VMs that come and go, once each.
    pub(crate) fn every_kind_of_work(&mut self) {
        while self.players.len() < 3 {
            // Where the first call is refused the VM is tried again.
            self.add_vm(true, true);
        }
        self.become_alike();
        for index in 0..self.players.len() {
            let zeros = 10 + 5 * index as u32;
            self.write_all(index, 0..zeros, |_| 0);
        }
        self.intervals(3);
        self.check_all(1);
        for disk in 0..4 {
            for index in 0..self.players.len() {
                let first = 8 * disk as u32;
                let page = 20 + first + index as u32;
                if !self.players[index].lost() {
                    self.read(index, disk, first.into(), (page..page + 6).map(Some).collect());
                }
            }
        }
        self.intervals(1);
        self.finish_all();
        self.check_all(1);
        // Guests leave most, and what is left moves together.
        for index in 0..self.players.len() {
            self.write_all(index, 0..self.size, |page| if page % 9 == 0 { 1 } else { 0 });
            let base = (index as u64 + 1) << 40;
            self.write_all(index, 0..self.size, |page| {
                if page % 9 == 0 { Self::alike(page) } else { base + u64::from(page) }
            });
        }
        self.steps(60, Duration::from_millis(120));
        self.check_all(1);
        // Free memory goes back.
        for player in self.players.iter_mut().filter(|player| !player.lost()) {
            for page in 0..player.free.len() - 4 {
                player.free[page] = true;
                player.pages[page].or_zero = true;
            }
        }
        for _ in 0..3 {
            (0..self.players.len()).for_each(|index| self.agent_pass_of(index));
            self.intervals(2);
        }
        self.check_all(1);
        for _ in 0..12 {
            self.put_into_balloon();
        }
        self.check_all(1);
        // Shared again, and no longer.
        self.become_alike();
        self.intervals(3);
        for mode in [Mode::Off, Mode::Full, Mode::Zero] {
            for index in (0..self.players.len()).take(2) {
                self.engine.set_mode(self.players[index].vm.slot, mode);
            }
            self.intervals(2);
            self.check_all(1);
        }
        self.remove_vm(0);
        self.intervals(1);
        self.check_all(1);
    }
}
