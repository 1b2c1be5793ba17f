//! The NUMA node of the host whose memory a VM prefers.
//!
//! The policy is *preferred*, not *bound*: where the node is full, the kernel takes memory of another node, and no guest
//! ends. It holds for the VM's RAM ([`Ram::prefer_node`](samepage_sharing::Ram::prefer_node)) and for the threads of its
//! vCPUs, and so for the threads of its devices, which these start. The kernel makes the tables of the guest's memory
//! and private copies of frames in these threads.

#![expect(unsafe_code, reason = "there is no other way to set a thread's memory policy")]

use std::{fs, io};

/// The nodes that have memory, as a list of ranges.
const NODES: &str = "/sys/devices/system/node/has_memory";

/// Says why a VM cannot prefer this node on this host.
pub(crate) fn unavailable(node: u32) -> Option<String> {
    missing(node, fs::read_to_string(NODES))
}

fn missing(node: u32, nodes: io::Result<String>) -> Option<String> {
    match nodes {
        Err(error) => Some(format!(
            "node {node} of the host: its kernel tells of no NUMA nodes ({NODES}: {error}); leave the node out"
        )),
        Ok(nodes) if has(&nodes, node) => None,
        Ok(nodes) => {
            Some(format!("node {node} of the host has no memory: the nodes with memory are {}", nodes.trim()))
        }
    }
}

/// Whether a list such as `0-3,8` has this number.
fn has(list: &str, node: u32) -> bool {
    list.trim().split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let bound = |text: &str| text.parse::<u32>();
        matches!((bound(first), bound(last)), (Ok(first), Ok(last)) if (first..=last).contains(&node))
    })
}

/// Has the calling thread, and threads that it starts, prefer memory of this node.
///
/// # Errors
/// Fails if the kernel does not have the node.
pub(crate) fn prefer(node: u32) -> io::Result<()> {
    let mut nodes = [0_u64; 16];
    let word = nodes.get_mut(node as usize / 64).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    *word = 1 << (node % 64);
    // The kernel reads one bit less than it is told of.
    let bits = 64 * nodes.len() + 1;
    let policy = libc::c_long::from(libc::MPOL_PREFERRED);
    // SAFETY: the kernel reads the mask, which is as long as it is told, and changes no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, policy, nodes.as_ptr(), bits) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::test_images::pvh_elf;
    use crate::{Hypervisor, ImageSource, Size, Vm, VmConfig};

    #[test]
    fn a_node_that_is_not_there_is_refused_with_those_that_are() {
        let list = || Ok("0-1,4\n".to_owned());
        assert!([0, 1, 4].iter().all(|node| missing(*node, list()).is_none()));
        assert!(missing(2, list()).unwrap().contains("the nodes with memory are 0-1,4"));
        assert!(missing(99, list()).unwrap().starts_with("node 99 of the host has no memory"));
        let none = || Err(io::ErrorKind::NotFound.into());
        assert!(missing(0, none()).unwrap().contains("no NUMA nodes"));
        assert!(!has("", 0) && !has("\n", 0) && !has("x", 0));
    }

    #[test]
    fn a_thread_prefers_a_node_of_the_host() {
        if unavailable(0).is_some() {
            eprintln!("SKIPPED: this host has no node 0");
            return;
        }
        std::thread::spawn(|| {
            prefer(0).unwrap();
            assert!(prefer(1023).is_err() && prefer(u32::MAX).is_err());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_vm_prefers_a_node_that_is_there_and_another_one_is_refused() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        if unavailable(0).is_some() {
            eprintln!("SKIPPED: this host has no node 0");
            return;
        }
        let config = |node| {
            let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(b"\xf4").into() };
            let mut config = VmConfig::new("near", kernel);
            (config.spec.memory, config.spec.host_numa_node) = (Size(4 << 20), Some(node));
            config
        };
        let faults = config(1022).validate().unwrap_err();
        assert!(faults[0].to_string().contains("node 1022 of the host has no memory"), "{faults:?}");
        let vm = Vm::build(config(0), &hypervisor).unwrap();
        let address = format!("{:x} ", vm.ram().base().as_ptr().addr());
        let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
        let policy = maps.lines().find_map(|line| line.strip_prefix(&address)).expect("the RAM is mapped");
        assert!(policy.starts_with("prefer"), "{policy}");
    }
}
