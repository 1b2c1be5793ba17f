//! Guests give pages back by their balloons.

use super::World;

impl World {
    /// A guest puts pages into its balloon, or reports them as free.
    pub(super) fn put_into_balloon(&mut self) {
        let Some(index) = self.any_vm() else { return };
        let longest = [1, 8, 200, self.size][self.below(4) as usize];
        let (first, count) = self.run(longest);
        let player = &self.players[index];
        // A guest does not give up what a disk is about to fill.
        let is_read = |&page: &u32| {
            let of = |reading: &&super::Reading| reading.vm == player.id;
            self.readings.iter().filter(of).any(|reading| reading.targets.contains(&Some(page)))
        };
        let end = (first..first + count).find(is_read).unwrap_or(first + count);
        let (slot, id) = (player.vm.slot, player.id);
        self.tell(format!("VM {id} puts pages from {first} to {end} into its balloon"));
        let vm = self.engine.vm_number(slot);
        let mut next = first;
        while next < end {
            let discarded = self.engine.discard(vm, next..end);
            assert!(discarded.next > next && discarded.next <= end, "{discarded:?}");
            next = discarded.next;
        }
        self.players[index].pages[first as usize..end as usize]
            .iter_mut()
            .for_each(|page| page.or_zero = true);
    }
}
