//! The kind of a host's KVM, which decides what change tracking and small pages cost guests.

use std::fs;
use std::path::Path;

/// Returns a description of how this host's KVM translates guests' addresses.
pub(crate) fn kind() -> String {
    let parameter =
        |path: &str| fs::read_to_string(path).map(|text| text.trim() == "Y" || text.trim() == "1");
    let nested = |yes: bool| {
        if yes { "nested paging: guests' TLB misses walk the host's tables too" } else { "shadow paging" }
    };
    if Path::new("/sys/module/kvm_pvm").exists() {
        return "KVM in software (kvm_pvm): shadow paging in pages of 4 KiB, guests' kernels interpreted"
            .into();
    }
    if let Ok(yes) = parameter("/sys/module/kvm_intel/parameters/ept") {
        return format!("KVM on Intel VT-x, {}", nested(yes));
    }
    if let Ok(yes) = parameter("/sys/module/kvm_amd/parameters/npt") {
        return format!("KVM on AMD-V, {}", nested(yes));
    }
    "a KVM that does not say how it translates addresses".into()
}
