//! The sharing engine of samepage: finds identical pages of running VMs and lets them share one
//! frame of memory. It knows pages and frames, and nothing of KVM, virtio or HTTP.

pub mod ram;

pub use ram::{PAGE_SIZE, Ram};
