//! Views of the use of VMs' pages, and maps of memory.

use samepage_api_types::by_type::ByType;
use samepage_api_types::views::pages::{AgentView, CellView, PagesView, StatesView, TypeView, VmPagesView};
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::map::MapCell;

use samepage_host::record::Record;
use samepage_host::statistics::{Sample, VmSample};

/// Returns the use of a VM's pages.
pub(crate) fn of_vm(record: &Record, sample: Option<(f64, &VmSample)>) -> VmPagesView {
    let sample = sample.filter(|_| record.vm().is_some());
    let claimed = sample.and_then(|(_, vm)| vm.claimed.as_ref());
    let agent = claimed.filter(|claimed| claimed.publishing).map(|claimed| AgentView {
        passes: claimed.passes,
        changed_pages: claimed.words,
        pass_cpu_seconds: f64::from(claimed.pass_cpu_us) / 1e6,
    });
    VmPagesView {
        time_seconds: sample.map(|(time, _)| time),
        publishing: agent.is_some(),
        agent,
        given_back_bytes: claimed.map_or(0, |claimed| claimed.given_back * PAGE_SIZE as u64),
        types: sample.map(|(_, vm)| vm.types().map(TypeView::from)),
    }
}

/// Returns the use of the pages of all VMs together.
pub(crate) fn of_all(sample: &Sample) -> PagesView {
    let mut types = ByType::default();
    sample.vms.iter().for_each(|vm| types += vm.types());
    let claimed = || sample.vms.iter().filter_map(|vm| vm.claimed.as_ref());
    let given_back: u64 = claimed().map(|claimed| claimed.given_back).sum();
    PagesView {
        time_seconds: sample.time_seconds,
        vms: sample.vms.len() as u64,
        publishing: claimed().filter(|claimed| claimed.publishing).count() as u64,
        given_back_bytes: given_back * PAGE_SIZE as u64,
        types: types.map(TypeView::from),
    }
}

/// Returns a cell of a map.
pub(crate) fn cell(cell: &MapCell, publishing: bool) -> CellView {
    let [shared, private, zero, absent] = cell.states;
    CellView {
        first_page: cell.first_page,
        pages: cell.pages,
        states: StatesView { shared, private, zero, absent },
        types: publishing.then(|| ByType::new(cell.types)),
    }
}
