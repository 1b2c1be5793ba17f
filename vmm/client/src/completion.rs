//! Completions of arguments that only a running process knows.

use std::env;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap_complete::CompletionCandidate;
use clap_complete::engine::ArgValueCandidates;
use samepage_api_types::views::VmSummary;
use samepage_process::control_socket;

use crate::socket::Client;

/// How long a shell waits. A process that is busy must not keep the user from typing.
const TIME_LIMIT: Duration = Duration::from_secs(1);

/// Returns the names of VMs at the default socket, or at the one in the environment.
pub(crate) fn vms() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let vms = ask().unwrap_or_default();
        vms.into_iter()
            .map(|vm| CompletionCandidate::new(vm.name).help(Some(vm.state.name().into())))
            .collect()
    })
}

fn ask() -> Option<Vec<VmSummary>> {
    let named = env::var_os(control_socket::VARIABLE).filter(|path| !path.is_empty());
    let client = named.map_or_else(|| Client::of_default(control_socket::of_client()), Client::new);
    let (send, receive) = mpsc::channel();
    // The thread ends with the process if nobody answers.
    thread::spawn(move || send.send(client.get("/vms")));
    receive.recv_timeout(TIME_LIMIT).ok()?.ok()
}
