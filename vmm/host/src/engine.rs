//! The engine that shares the memory of a process's VMs.

use std::sync::Arc;

use samepage_process::tell::tell;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

/// Starts the engine that shares memory. If the host cannot share memory, prints the reason and the option
/// `silently` that avoids the message, and returns `None`.
pub fn start_sharing(settings: &Settings, silently: Option<&str>) -> Option<Arc<Sharing>> {
    match Sharing::start(settings.clone()) {
        Ok(sharing) => Some(Arc::new(sharing)),
        Err(error) => {
            let option =
                silently.map_or_else(String::new, |option| format!(" (use {option} to omit this message)"));
            tell(format_args!("the VMs run without sharing memory{option}: {error}"));
            None
        }
    }
}
