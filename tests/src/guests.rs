//! Demo guests under the test's control.

use std::sync::Arc;

use samepage_machine::{ConsoleConfig, Hypervisor, ImageSource, Size, Vm, VmConfig, VmEnd};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use samepage_resources::demo::report::Report;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use crate::console::Console;

/// A VM and its console.
#[derive(Debug)]
pub struct Guest {
    /// The VM, started.
    pub vm: Vm,
    /// The guest's output.
    pub console: Console,
}

/// Opens KVM.
///
/// # Panics
/// Panics if there is no KVM. The harness has checked that before.
#[must_use]
pub fn hypervisor() -> Hypervisor {
    Hypervisor::open().expect("KVM was there a moment ago")
}

/// Returns settings for the engine at full speed: no limit, no pauses, and a search for every scanned page,
/// however often it changes.
#[must_use]
pub fn aggressive() -> Settings {
    Settings {
        cpu_percent: 100.0,
        follow: false,
        settle: false,
        shortest_pause_ms: 0,
        longest_pause_ms: 0,
        ..Settings::default()
    }
}

/// Starts the engine.
///
/// # Panics
/// Panics if the host cannot share memory.
#[must_use]
pub fn sharing(settings: Settings) -> Arc<Sharing> {
    Arc::new(Sharing::start(settings).expect("memory can be shared here"))
}

impl Guest {
    /// Returns a configuration of the demo guest.
    #[must_use]
    pub fn config(name: &str, plan: &Plan, memory_bytes: u64, sharing: Option<&Arc<Sharing>>) -> VmConfig {
        let kernel = ImageSource::Bytes { name: "demo guest", bytes: DEMO_GUEST.into() };
        let mut config = VmConfig::new(name, kernel);
        config.spec.cmdline = plan.to_string();
        config.spec.memory = Size(memory_bytes);
        config.spec.vcpus = plan.cpus;
        config.sharing = sharing.cloned();
        config
    }

    /// Builds a VM with a console for the test, and starts it.
    ///
    /// # Panics
    /// Panics if the VM cannot be built.
    #[must_use]
    pub fn start(hypervisor: &Hypervisor, mut config: VmConfig) -> Self {
        let console = Console::default();
        config.console = ConsoleConfig::Sink(console.sink());
        let vm = Vm::build(config, hypervisor).expect("a VM can be built");
        vm.start();
        Self { vm, console }
    }

    /// Asks the demo guest to finish, and waits for its last verification and its reset.
    ///
    /// # Panics
    /// Panics if the guest found a corrupt page, or ended in another way.
    pub fn finish(self) {
        assert_eq!(self.vm.serial_input(b"q"), 1);
        let corrupt = self.console.wait_for_report("the end", |report| match report {
            Report::Done { corrupt, .. } => Some(*corrupt),
            _ => None,
        });
        assert_eq!(corrupt, 0, "{}", self.console.lines().join("\n"));
        assert_eq!(self.vm.wait(), VmEnd::Reset);
    }
}
