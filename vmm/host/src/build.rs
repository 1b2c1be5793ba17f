//! Building several machines at a time.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use samepage_machine::config::Validated;
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::Vm;
use samepage_worker::machine::Machine;

use crate::error::HostError;
use crate::registry::Common;

/// Stack of a thread that builds VMs, in bytes.
const BUILDER_STACK_BYTES: usize = 256 << 10;

/// Builds all machines, on as many threads as there are processors, and returns them in the order given. They are in
/// worker processes if there are any.
///
/// # Errors
/// Fails with the error of the first machine that cannot be built, and drops the others.
pub(crate) fn build_all(
    hypervisor: &Hypervisor,
    common: &Common,
    configs: Vec<Validated>,
) -> Result<Vec<Arc<dyn Machine>>, HostError> {
    let build = |config: Validated| {
        let vm = config.spec().name.clone();
        if let Some(workers) = &common.workers {
            let built = workers.build(config, common.sharing.as_deref());
            return built.map_err(|source| HostError::Worker { vm, source });
        }
        let built = Vm::build(config, hypervisor).map_err(|source| HostError::Build { vm, source })?;
        Ok(Arc::new(built) as Arc<dyn Machine>)
    };
    let builders = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(configs.len());
    if builders <= 1 {
        return configs.into_iter().map(build).collect();
    }
    let queue = Mutex::new(configs.into_iter().enumerate());
    let built = Mutex::new(Vec::new());
    let work = || {
        loop {
            let Some((index, config)) = queue.lock().next() else { break };
            let result = build(config);
            if result.is_err() {
                queue.lock().by_ref().for_each(drop);
            }
            built.lock().push((index, result));
        }
    };
    thread::scope(|scope| {
        for _ in 1..builders {
            // Without more threads this one builds all.
            let _ = thread::Builder::new().stack_size(BUILDER_STACK_BYTES).spawn_scoped(scope, work);
        }
        work();
    });
    let mut built = built.into_inner();
    built.sort_by_key(|(index, _)| *index);
    built.into_iter().map(|(_, result)| result).collect()
}
