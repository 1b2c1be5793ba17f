//! Maps of VMs' memory for many clients from few scans.
//!
//! The time for a map is proportional to the VM's memory. So another thread makes maps on request, one at a
//! time. Each map serves all requests of the next second. Making the maps of all VMs takes at most a
//! twentieth of the time: slow maps are made less often. A request for fewer cells gets sums of neighbouring
//! cells.

use crate::views;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use samepage_sharing::PAGE_SIZE;
use samepage_sharing::map::MapCell;
use samepage_sharing::pagemap::Pagemap;
use tokio::sync::Mutex;

use samepage_api_types::views::pages::MapView;
use samepage_host::record::Record;
use samepage_worker::machine::Machine;

/// Upper limit for the cells of a map.
pub(super) const MOST_CELLS: u32 = 16_384;
/// Least number of cells of a new map, for later requests.
const LEAST_CELLS: u32 = 1024;
/// The time during which a map counts as present.
const FRESH: Duration = Duration::from_secs(1);
/// The limit for the share of time that maps may take, as a divisor.
const SHARE: u32 = 20;
/// Number of kept maps.
const MOST_MAPS: usize = 16;

/// The latest maps.
#[derive(Debug)]
pub(super) struct Maps {
    pagemap: Arc<Pagemap>,
    /// The maps by age, the latest last.
    made: Mutex<Vec<Made>>,
}

#[derive(Debug)]
struct Made {
    of: Weak<Record>,
    wanted: u32,
    map: Arc<Map>,
    at: Instant,
    took: Duration,
}

#[derive(Debug)]
struct Map {
    /// Seconds since 1970.
    time: f64,
    publishing: bool,
    cells: Vec<MapCell>,
}

impl Maps {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { pagemap: Arc::new(Pagemap::open()?), made: Mutex::default() })
    }

    /// Returns a map of a VM's memory with at most `cells` cells, and no cells for a VM that has ended.
    pub(super) async fn map(&self, record: &Arc<Record>, cells: u32) -> Result<MapView, String> {
        let map = self.latest(record, cells).await?;
        let Some(map) = map else { return Ok(MapView::default()) };
        let together = map.cells.len().div_ceil(cells.max(1) as usize).max(1);
        let summed = map.cells.chunks(together).map(sum);
        Ok(MapView {
            time_seconds: Some(map.time),
            publishing: map.publishing,
            cells: summed.map(|cell| views::pages::cell(&cell, map.publishing)).collect(),
        })
    }

    async fn latest(&self, record: &Arc<Record>, cells: u32) -> Result<Option<Arc<Map>>, String> {
        // Simultaneous requests wait for the lock, and get the new map.
        let mut made = self.made.lock().await;
        made.retain(|made| made.of.upgrade().is_some_and(|record| record.vm().is_some()));
        let of_this = |made: &Made| made.of.as_ptr() == Arc::as_ptr(record);
        let pace = made.iter().map(|made| made.took).sum::<Duration>() * SHARE;
        if let Some(made) = made.iter().find(|made| of_this(made))
            && made.wanted >= cells
            && made.at.elapsed() < FRESH.max(pace)
        {
            return Ok(Some(Arc::clone(&made.map)));
        }
        let wanted = cells.clamp(LEAST_CELLS, MOST_CELLS);
        let (look_at, pagemap) = (Arc::clone(record), Arc::clone(&self.pagemap));
        let work = move || {
            let started = Instant::now();
            let map = look_at.inspect(|vm| look(vm, &pagemap, wanted)).transpose();
            (map, started.elapsed())
        };
        let scanned = tokio::task::spawn_blocking(work).await;
        let (map, took) = scanned.map_err(|_| "scan the VM's memory: the operation panicked".to_owned())?;
        let map = map.map_err(|error| format!("scan the memory of VM {}: {error}", record.name()))?;
        let Some(map) = map.map(Arc::new) else { return Ok(None) };
        made.retain(|made| !of_this(made));
        if made.len() >= MOST_MAPS {
            made.remove(0);
        }
        let of = Arc::downgrade(record);
        made.push(Made { of, wanted, map: Arc::clone(&map), at: Instant::now(), took });
        Ok(Some(map))
    }
}

/// Returns the sum of neighbouring cells.
fn sum(cells: &[MapCell]) -> MapCell {
    let mut all = MapCell { first_page: cells[0].first_page, ..MapCell::default() };
    for cell in cells {
        all.pages += cell.pages;
        all.states.iter_mut().zip(cell.states).for_each(|(sum, pages)| *sum += pages);
        all.types.iter_mut().zip(cell.types).for_each(|(sum, pages)| *sum += pages);
    }
    all
}

fn look(vm: &dyn Machine, pagemap: &Pagemap, cells: u32) -> io::Result<Map> {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let Some(membership) = vm.membership() else {
        return Ok(Map { time, publishing: false, cells: own_pages(vm, pagemap, cells)? });
    };
    let publishing = membership.claimed()?.publishing;
    Ok(Map { time, publishing, cells: membership.map(cells)? })
}

/// Returns the cells of a VM whose memory no engine shares: all touched pages are private.
fn own_pages(vm: &dyn Machine, pagemap: &Pagemap, cells: u32) -> io::Result<Vec<MapCell>> {
    let pages = (vm.memory_bytes() / PAGE_SIZE as u64) as u32;
    let size = pages.div_ceil(cells).max(1);
    let runs = vm.touched(pagemap)?;
    let mut map: Vec<_> = (0..pages)
        .step_by(size as usize)
        .map(|first| {
            let pages = size.min(pages - first);
            let mut cell = MapCell { first_page: first.into(), pages, ..MapCell::default() };
            (cell.states[3], cell.types[0]) = (pages, pages);
            cell
        })
        .collect();
    for page in runs.into_iter().flatten() {
        let states = &mut map[(page / size) as usize].states;
        states[1] += 1;
        states[3] -= 1;
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_added_up() {
        let cell = |first_page, pages| MapCell {
            first_page,
            pages,
            states: [pages, 0, 0, 0],
            types: [0, 0, pages, 0, 0, 0, 0, 0, 0],
        };
        let all = sum(&[cell(8, 4), cell(12, 4), cell(16, 1)]);
        assert_eq!(all, cell(8, 9));
    }
}
