//! The engine that shares the memory of a process's VMs.

use std::sync::Arc;

use samepage_process::tell::tell;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

/// Starts the engine that shares memory, or says why this host cannot, and with which option that is not said.
pub fn start_sharing(settings: &Settings, silently: Option<&str>) -> Option<Arc<Sharing>> {
    match Sharing::start(settings.clone()) {
        Ok(sharing) => Some(Arc::new(sharing)),
        Err(error) => {
            let option = silently
                .map_or_else(String::new, |option| format!(" ({option} says so without this message)"));
            tell(format_args!("the VMs run without sharing memory{option}: {error}"));
            None
        }
    }
}
