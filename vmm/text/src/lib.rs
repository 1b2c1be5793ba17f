//! What people write and read: names and sizes as typed, figures and pictures as shown.
//!
//! All of it is text: nothing here touches files, VMs or the network.

pub mod counted;
pub mod names;
pub mod picture;
pub mod size;
pub mod units;
