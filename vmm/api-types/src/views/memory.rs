//! What clients see of the host's memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::events::MemoryState;

/// How short memory is. The figures are those of the last look; looks become frequent as memory becomes short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemoryView {
    /// Whether VMs are held before memory runs out.
    pub governed: bool,
    /// How short memory is.
    pub state: MemoryState,
    /// Memory that is to be had without swapping: of the host, or of a control group if that has less.
    pub room_bytes: u64,
    /// The whole of which `room_bytes` is a part.
    pub of_bytes: u64,
    /// The part of `room_bytes` that no VM is to have.
    pub reserve_bytes: u64,
    /// What all VMs together may make private without asking, as far as it was measured.
    pub claims_bytes: u64,
    /// How often the state has changed.
    pub changes: u64,
    /// The longest time without a break that any VM was held.
    pub longest_seconds: f64,
    /// The VMs that were held since their start.
    pub vms: Vec<HeldView>,
}

/// For how long a VM was held because memory was short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HeldView {
    /// The VM's name.
    pub vm: String,
    /// Whether it is held now.
    pub held: bool,
    /// In all, the present time included.
    pub held_seconds: f64,
    /// The longest time without a break, the present one included.
    pub longest_seconds: f64,
}
